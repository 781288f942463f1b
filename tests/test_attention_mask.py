"""Masks in many spellings are identified by meaning; masks that are nearly of the family are not."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hstu_compile.ops.attention_mask import attention_mask
from hstu_compile.passes.attention_mask import MaskMeaning, MaskTerm, Opaque, identify, silu_of_fill_is_zero

OFFSETS = torch.tensor([0, 5, 11, 12, 20])
LENGTHS, TARGETS, CONTEXTUAL = torch.tensor([5, 6, 1, 8]), torch.tensor([2, 0, 0, 3]), torch.tensor([1, 2, 0, 3])
MODES = ("symbolic", "fake")


def read(function, *args, layout=("b", "i", "j"), jagged=False, role="keeps", mode="symbolic", batch=None):
    """What the mask `function(*args)` means; args[0] are the offsets of a jagged region."""
    gm = make_fx(function, pre_dispatch=True, tracing_mode=mode, _allow_non_fake_inputs=True)(*args)
    placeholders = gm.graph.find_nodes(op="placeholder")
    (mask,) = gm.graph.output_node().all_input_nodes
    counts = [p.meta["val"].shape[0] for p in placeholders if isinstance(p.meta.get("val"), torch.Tensor)]
    batch_size = batch or (counts[0] - 1 if jagged else counts[0] if counts else 2)
    return identify(
        [MaskTerm(mask, layout, role)],
        batch_size=batch_size,
        num_heads=2,
        max_seq_len=mask.meta["val"].shape[-1],
        seq_offsets=placeholders[0] if jagged else None,
        padding_matters=not jagged,
    )


def input_name(node: fx.Node | None) -> str | None:
    return node and node.name.removesuffix("_1")


def clamped_ids(offsets, targets, n, causal=True, window=0, contextual=0, full=0):
    """Targets and contextual tokens moved to the places where they stand, then compared."""
    lengths = offsets[1:] - offsets[:-1]
    place = torch.arange(n).unsqueeze(0)
    end = lengths[:, None, None]
    if contextual:
        place, end = (place - contextual + 1).clamp(min=0), end - contextual + 1
    if targets is None:
        row = place.view(n, 1).expand(n, n)
        row, col = row[None], row.t()[None]
    else:
        end = end - targets[:, None, None]
        place = torch.clamp(place, max=end)
        row, col = place.view(-1, n, 1).expand(-1, n, n), place.view(-1, 1, n).expand(-1, n, n)
    distance = row - col
    if not causal:
        distance = torch.where(distance > 0, distance, -distance)
    live = torch.eye(n, dtype=torch.bool)[None] | (distance > 0)
    if window:
        near = distance <= window
        live = live & (near | (row >= end - full) if full else near)
    return live | ((row == 0) & (col < end)) if contextual else live


def grouped_targets(offsets, targets, contextual, n, causal=True, window=0, group=1):
    """Contextual counts as a tensor; targets attend inside their group; the window counts a target's own place."""
    lengths = offsets[1:] - offsets[:-1]
    place = torch.clamp(torch.arange(n).view(1, n) - contextual.view(-1, 1) + 1, min=0)
    end = (lengths - contextual + 1)[:, None, None]
    row = place.unsqueeze(-1).expand(-1, n, n)
    distance = row - row.transpose(1, 2)
    distance = distance if causal else distance.abs()
    live = torch.logical_or(distance > 0, torch.eye(n, dtype=torch.bool))
    number = torch.clamp(row - end + targets.view(-1, 1, 1), min=-1) // group
    other = number.mT
    live = live.logical_and((number == other).logical_or((number < 0) + (other < 0)))
    if window:
        live = live.logical_and(distance <= window)
    return live | (row == 0).logical_and(row.mT < end - targets.view(-1, 1, 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, contextual, full", [(0, 0, 0), (4, 0, 0), (5, 3, 0), (7, 2, 6), (0, 4, 0)])
@pytest.mark.parametrize("with_targets", [True, False])
def test_clamped_ids(mode, causal, window, contextual, full, with_targets):
    def mask(offsets, targets, n):
        return clamped_ids(offsets, targets if with_targets else None, n, causal, window, contextual, full)

    meaning = read(mask, OFFSETS, TARGETS, 64, jagged=True, mode=mode)
    assert isinstance(meaning, MaskMeaning), meaning
    assert meaning.causal == causal
    assert input_name(meaning.num_targets) == ("targets" if with_targets else None)
    assert (meaning.max_attn_len, meaning.min_full_attn_seq_len) == (window, full)
    assert meaning.contextual_seq_len == contextual
    assert not (window and with_targets) or meaning.targets_share_position


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, group", [(0, 1), (0, 3), (5, 2)])
def test_grouped_targets(mode, causal, window, group):
    def mask(offsets, targets, contextual, n):
        return grouped_targets(offsets, targets, contextual, n, causal, window, group)

    meaning = read(mask, OFFSETS, TARGETS, CONTEXTUAL, 48, jagged=True, mode=mode)
    assert isinstance(meaning, MaskMeaning), meaning
    assert (meaning.causal, meaning.max_attn_len, meaning.target_group_size) == (causal, window, group)
    assert (input_name(meaning.num_targets), input_name(meaning.num_contextuals)) == ("targets", "contextual")
    assert not window or not meaning.targets_share_position


def test_lengths_of_a_dense_region_follow_from_offsets():
    """Jagged code with index arithmetic of its own: neither begins nor ends of the sequences are counts."""

    def mask(offsets):
        place = torch.arange(12)
        real = place < (offsets[1:] - offsets[:-1])[:, None]
        return (place[:, None] >= place) & real[:, None] & real[:, :, None]

    meaning = read(mask, OFFSETS, mode="fake", batch=4)
    assert isinstance(meaning, MaskMeaning), meaning
    assert meaning.causal and input_name(meaning.seq_lengths) == "sub"


def i(n):
    return torch.arange(n).view(-1, 1)


def j(n):
    return torch.arange(n)


CAUSAL = {
    "compare": lambda n: i(n) >= j(n),
    "float compare": lambda n: (j(n).float()[None] <= i(n).float()).to(torch.bfloat16),
    "tril": lambda n: torch.tril(torch.ones(n, n)),
    "bool tril": lambda n: torch.ones(1, 1, n, n, dtype=torch.bool).tril(),
    "one minus triu": lambda n: 1 - torch.triu(torch.ones(n, n), diagonal=1),
    "not triu": lambda n: ~torch.triu(torch.ones((n, n), dtype=torch.bool), diagonal=1),
    "where": lambda n: torch.where(j(n) > i(n), 0.0, 1.0),
    "masked_fill": lambda n: torch.ones(n, n).masked_fill(i(n) < j(n), 0),
    "eye or": lambda n: torch.eye(n).bool().logical_or(i(n) - j(n) > 0),
    "transposed": lambda n: (i(n) <= j(n)).t().expand(2, 2, n, n),
    "meshgrid": lambda n: torch.ge(*torch.meshgrid(j(n), j(n), indexing="ij")),
    "flat index": lambda n: (torch.arange(n * n) // n >= torch.arange(n * n) % n).view(n, n).int(),
    "cumulative": lambda n: torch.eye(n).cumsum(1).mT.bool(),
    "clamped": lambda n: (i(n) - j(n) + 1).clamp(0, 1),
    "flipped": lambda n: torch.flip(torch.ones(n, n).triu(), [0, 1]).unsqueeze(0),
    "like scores": lambda n: torch.ones_like(torch.randn(2, n, n)).tril(),
    "sign": lambda n: torch.sign(torch.relu(i(n) - j(n) + 1)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name, mode):
    assert read(CAUSAL[name], 40, layout=("b", "h", "i", "j"), mode=mode) == MaskMeaning(causal=True)


@pytest.mark.parametrize("mode", MODES)
def test_polarity_and_fills(mode):
    causal, n = MaskMeaning(causal=True), 30
    assert read(lambda n: i(n) < j(n), n, role="drops", mode=mode) == causal
    assert read(lambda n: torch.triu(torch.ones(n, n), 1), n, role="drops", mode=mode) == causal
    assert read(lambda n: torch.triu(torch.full((n, n), -1e9), 1), n, role="adds", mode=mode) == causal
    assert read(lambda n: (1.0 - torch.ones(n, n).tril()) * -1e4, n, role="adds", mode=mode) == causal

    def filled(fill):
        return lambda n: torch.zeros(n, n).masked_fill(i(n) < j(n), fill)

    for fill in (-30.0, float("-inf")):
        found = read(filled(fill), n, role="adds", mode=mode)
        assert isinstance(found, Opaque) and "neither dead nor live" in found.reason
    assert read(lambda n: i(n) < j(n), n, mode=mode) != causal


def test_layouts():
    def mask(lengths, n):
        return (i(n) >= j(n)) & (i(n) < lengths.view(-1, 1, 1)) & (j(n) < lengths.view(-1, 1, 1))

    def placed(place):
        return lambda lengths, n: place(mask(lengths, n))

    for layout, place in [
        (("b", "h", "i", "j"), lambda m: m.unsqueeze(1)),
        (("h", "b", "i", "j"), lambda m: m.unsqueeze(0)),
        (("b", "i", "j", "h"), lambda m: m.unsqueeze(-1)),
        (("b", "j", "i"), lambda m: m.mT),
        (("bh", "i", "j"), lambda m: m.repeat_interleave(2, 0)),
        (("hb", "i", "j"), lambda m: m.repeat(2, 1, 1)),
    ]:
        gm = make_fx(placed(place), pre_dispatch=True, tracing_mode="symbolic")(LENGTHS, 12)
        lengths, size = gm.graph.find_nodes(op="placeholder")
        (node,) = gm.graph.output_node().all_input_nodes
        sizes = {"batch_size": lengths.meta["val"].shape[0], "max_seq_len": size.meta["val"], "num_heads": 2}
        meaning = identify([MaskTerm(node, layout)], **sizes, seq_offsets=None, padding_matters=True)
        assert meaning == MaskMeaning(causal=True, seq_lengths=lengths), (layout, meaning)


@pytest.mark.parametrize("mode", MODES)
def test_padding_of_dense_batches(mode):
    def inside(lengths, n):
        return j(n) < lengths.view(-1, 1)

    def both(lengths, n):
        valid = inside(lengths, n).float()
        return torch.einsum("bi,bj->bij", valid, valid)

    meaning = read(lambda x, n: both(x, n) * torch.ones(n, n).tril(), LENGTHS, 20, mode=mode)
    assert isinstance(meaning, MaskMeaning) and meaning.causal and input_name(meaning.seq_lengths) == "x"
    meaning = read(lambda x, n: inside(x, n).unsqueeze(2) & inside(x, n).unsqueeze(1), LENGTHS, 20, mode=mode)
    assert isinstance(meaning, MaskMeaning) and not meaning.causal and input_name(meaning.seq_lengths) == "x"
    meaning = read(lambda x, n: (i(n) >= j(n)) & inside(x, n).unsqueeze(1), LENGTHS, 20, mode=mode)
    assert isinstance(meaning, MaskMeaning) and (meaning.causal, meaning.padding) == (True, "dead keys")
    # Lengths that the graph computes in its own way are taken as they come out.
    ids = torch.randint(0, 3, (4, 20))
    meaning = read(lambda ids: both(ids.sign().sum(1), 20), ids, mode=mode)
    assert isinstance(meaning, MaskMeaning) and meaning.seq_lengths.target == torch.ops.aten.sum.dim_IntList


def test_lengths_of_a_jagged_region_must_follow_from_its_offsets():
    def mask(offsets, lengths, n):
        return (i(n) >= j(n)) & (j(n) < lengths.view(-1, 1, 1))

    def with_both(offsets, lengths, n):
        return mask(offsets, lengths + 0 * offsets.diff(), n)

    meaning = read(with_both, OFFSETS, LENGTHS, 20, jagged=True)
    assert isinstance(meaning, Opaque) and "doesn't follow from the region's offsets" in meaning.reason
    meaning = read(lambda offsets, n: mask(offsets, offsets.diff(), n), OFFSETS, 20, jagged=True)
    assert meaning == MaskMeaning(causal=True)

    def with_offsets(lengths, n):
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return offsets.int(), mask(None, lengths, n)

    gm = make_fx(with_offsets, pre_dispatch=True, tracing_mode="symbolic")(LENGTHS, 20)
    lengths, size = gm.graph.find_nodes(op="placeholder")
    offsets, node = gm.graph.output_node().all_input_nodes
    sizes = {"batch_size": lengths.meta["val"].shape[0], "max_seq_len": size.meta["val"], "num_heads": 2}
    terms = [MaskTerm(node, ("b", "i", "j"))]
    assert identify(terms, **sizes, seq_offsets=offsets, padding_matters=False) == MaskMeaning(causal=True)


def test_several_terms_are_one_mask():
    def masks(lengths, n):
        valid = j(n) < lengths.unsqueeze(1)
        return torch.ones(n, n).triu(1).bool(), valid[:, None, :, None], valid[:, None, None, :].float()

    gm = make_fx(masks, pre_dispatch=True, tracing_mode="symbolic")(LENGTHS, 20)
    lengths, size = gm.graph.find_nodes(op="placeholder")
    future, rows, cols = gm.graph.output_node().all_input_nodes
    layout = ("b", "h", "i", "j")
    terms = [MaskTerm(future, layout, "drops"), MaskTerm(rows, layout), MaskTerm(cols, layout)]
    sizes = {"batch_size": lengths.meta["val"].shape[0], "max_seq_len": size.meta["val"], "num_heads": 2}
    found = identify(terms, **sizes, seq_offsets=None, padding_matters=True)
    assert found == MaskMeaning(causal=True, seq_lengths=lengths)
    assert identify([], **sizes, seq_offsets=None, padding_matters=True) == MaskMeaning(causal=False)


def test_sizes_of_the_graph_are_parameters():
    def mask(offsets, targets, n, window, contextual):
        return clamped_ids(offsets, targets, n, True, window, contextual)

    gm = make_fx(mask, pre_dispatch=True, tracing_mode="symbolic")(OFFSETS, TARGETS, 64, 6, 3)
    offsets, targets, n, window, contextual = gm.graph.find_nodes(op="placeholder")
    (node,) = gm.graph.output_node().all_input_nodes
    sizes = {"batch_size": offsets.meta["val"].shape[0] - 1, "max_seq_len": n.meta["val"], "num_heads": 4}
    found = identify([MaskTerm(node, ("b", "i", "j"))], **sizes, seq_offsets=offsets, padding_matters=False)
    expected = MaskMeaning(causal=True, num_targets=targets, contextual_seq_len=contextual, max_attn_len=window)
    assert found == expected
    assert "window window_1 from the end of history" in found.words


def test_sizes_that_coincide():
    def mask(lengths, n):
        valid = j(n) < lengths.view(-1, 1)
        return valid.unsqueeze(2) & valid.unsqueeze(1) & (i(n) >= j(n))

    for mode in MODES:  # a batch of one, whose only index is also that of a broadcast dimension
        found = read(mask, torch.tensor([5]), 12, mode=mode)
        assert isinstance(found, MaskMeaning) and found.causal and input_name(found.seq_lengths) == "lengths"
    # As many sequences as positions: one symbol for both.
    gm = make_fx(lambda lengths, x: mask(lengths, x.size(0)), pre_dispatch=True, tracing_mode="symbolic")(
        torch.arange(8), torch.ones(8, 2)
    )
    lengths, x = gm.graph.find_nodes(op="placeholder")
    (node,) = gm.graph.output_node().all_input_nodes
    sizes = {"batch_size": lengths.meta["val"].shape[0], "max_seq_len": x.meta["val"].shape[0], "num_heads": 1}
    found = identify([MaskTerm(node, ("b", "i", "j"))], **sizes, seq_offsets=None, padding_matters=True)
    assert found == MaskMeaning(causal=True, seq_lengths=lengths)


def test_a_window_longer_than_the_captured_length_is_found():
    meaning = read(lambda n: (i(n) >= j(n)) & (i(n) - j(n) <= 100), 16, batch=2)
    assert isinstance(meaning, MaskMeaning) and meaning.max_attn_len == 100


def test_counts_are_read_where_they_are_last_counts():
    def mask(offsets, candidates, n):
        return clamped_ids(offsets, candidates.to(torch.int64).clamp(min=0) * 2, n)

    meaning = read(mask, OFFSETS, TARGETS, 40, jagged=True)
    assert isinstance(meaning, MaskMeaning) and meaning.num_targets.target == torch.ops.aten.mul.Tensor


@pytest.mark.parametrize("causal", [True, False])
def test_the_formula_is_that_of_both_spellings_for_all_counts(causal):
    """Sequences without room for their contextual tokens and targets included."""
    n = 6
    counts = torch.tensor(list(itertools.product(range(n + 1), range(n + 2), range(n + 2))))
    lengths, targets, contextual = counts.unbind(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    lengths, targets_of, contextual_of = (x.view(-1, 1, 1) for x in (lengths, targets, contextual))
    real = (i(n) < lengths) & (j(n) < lengths)

    def formula(contextual, group, window, full, shared):
        numbers = {"target_group_size": group, "max_attn_len": window, "min_full_attn_seq_len": full}
        counts = {"num_targets": targets_of, "contextual": contextual, "targets_share_position": shared}
        return attention_mask(i(n), j(n), lengths, causal=causal, **numbers, **counts)

    for window, group in itertools.product((0, 1, 3), (1, 2, 4)):
        written = grouped_targets(offsets, targets, contextual, n, causal, window, group)
        assert torch.equal(formula(contextual_of, group, window, 0, False), written & real)
    for number, window, full in itertools.product(range(n + 2), (0, 1, 3), (0, 2)):
        written = clamped_ids(offsets, targets, n, causal, window, number, full)
        assert torch.equal(formula(number, 1, window, full, True), written & real)


def test_a_mask_that_differs_without_room_for_history_is_not_identified():
    def sees_what_there_is(offsets, targets, n):  # even if contextual tokens alone
        lengths = offsets[1:] - offsets[:-1]
        full = (lengths < 3).view(-1, 1, 1) & (i(n) >= j(n))
        return clamped_ids(offsets, targets, n, contextual=3) | full

    found = read(sees_what_there_is, OFFSETS, TARGETS, 40, jagged=True)
    assert isinstance(found, Opaque) and "closest is causal" in found.reason, found


NEAR_MISSES = {
    "one hole": lambda n: (i(n) >= j(n)) & ~((i(n) == 17) & (j(n) == 5)),
    "a dead row": lambda n: (i(n) >= j(n)) & (i(n) != 11),
    "a dead column": lambda n: (i(n) >= j(n)) & (j(n) != 0),
    "checkerboard": lambda n: (i(n) >= j(n)) & ((i(n) + j(n)) % 2 == 0),
    "dilated": lambda n: (i(n) >= j(n)) & ((i(n) - j(n)) % 3 == 0),
    "blocks": lambda n: i(n) // 8 == j(n) // 8,
    "strictly lower": lambda n: i(n) > j(n),
    "one ahead": lambda n: i(n) >= j(n) - 1,
    "anti-causal": lambda n: i(n) <= j(n),
    "uneven window": lambda n: (i(n) >= j(n)) & (i(n) - j(n) <= 5 + (i(n) > 20).int()),
    "window with sinks": lambda n: (i(n) >= j(n)) & ((i(n) - j(n) <= 5) | (j(n) < 2)),
    "one-sided window": lambda n: i(n) - j(n) <= 4,
    "random": lambda n: torch.rand(n, n) < 0.5,
    "weights": lambda n: torch.tril(torch.ones(n, n)) * 0.5,
    "decay": lambda n: torch.tril(0.9 ** (i(n) - j(n)).float()),
    "half precision ids": lambda n: i(n * 99).bfloat16() >= j(n * 99).bfloat16(),
    "head-dependent": lambda n: torch.stack([i(n) >= j(n), i(n) >= -j(n)]),
    "written in place": lambda n: torch.ones(n, n).tril().index_fill_(0, torch.tensor([3]), 0),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name, mode):
    found = read(NEAR_MISSES[name], 32, layout=("b", "h", "i", "j"), mode=mode)
    assert isinstance(found, Opaque) and found.reason
    if name in ("one hole", "a dead row"):
        assert "closest is causal, but row 1" in found.reason


def test_near_misses_of_targets_and_windows():
    def off_by_one(offsets, targets, n):  # targets see the first target
        return clamped_ids(offsets, targets - 1, n)

    def mixed(offsets, targets, n):
        return clamped_ids(offsets, targets, n, window=5) | clamped_ids(offsets, None, n, window=3)

    def neighbour(offsets, targets, n):  # the targets of another sequence
        return clamped_ids(offsets, targets.flip(0), n)

    def shortest(offsets, targets, n):
        return clamped_ids(offsets, targets.amin().expand_as(targets), n)

    for mask in (off_by_one, mixed, neighbour, shortest):
        found = read(mask, OFFSETS, TARGETS, 40, jagged=True)
        assert isinstance(found, Opaque) or found.num_targets.op != "placeholder", (mask, found)


def test_masks_from_outside_and_constants():
    outside = torch.ones(32, 32).tril()
    found = read(lambda buffer, n: buffer[:n, :n], outside, 16, mode="fake")
    assert isinstance(found, Opaque) and "reads buffer_1" in found.reason
    table = torch.ones(128, 128).tril()
    assert read(lambda x: table * 1, LENGTHS) == MaskMeaning(causal=True)
    table = table.clone()
    table[101, 57] = 0
    found = read(lambda x: table * 1, LENGTHS)
    assert isinstance(found, Opaque) and "row 101, column 57" in found.reason


class Elements(TorchDispatchMode):
    """Counts the elements of all real tensors that are made."""

    total = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor):
                self.total, self.largest = self.total + x.numel(), max(self.largest, x.numel())
        return result


def test_long_masks_take_no_time_and_no_memory():
    def mask(offsets, targets, n):
        return clamped_ids(offsets, targets, n, True, 512, 3, 64)

    def elements(n):
        with Elements() as made:
            meaning = read(mask, OFFSETS, TARGETS, n, jagged=True, mode="fake")
        assert isinstance(meaning, MaskMeaning) and meaning.min_full_attn_seq_len == 64
        return made

    short, long = elements(1 << 13), elements(1 << 17)
    assert long.total < 16 * short.total  # at most in step with the length; the cells of a mask: 256 times
    assert long.largest < 64 << 17  # rows and columns, never a mask of 1 << 34


def materialise(meaning, n, inputs):
    def count(node):
        return 0 if node is None else inputs[input_name(node)].view(-1, 1, 1)

    return attention_mask(
        i(n),
        j(n),
        inputs["lengths"].view(-1, 1, 1),
        causal=meaning.causal,
        contextual=count(meaning.num_contextuals) if meaning.num_contextuals else meaning.contextual_seq_len,
        num_targets=count(meaning.num_targets),
        target_group_size=meaning.target_group_size,
        max_attn_len=meaning.max_attn_len,
        min_full_attn_seq_len=meaning.min_full_attn_seq_len,
        targets_share_position=meaning.targets_share_position,
    )


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_what_is_identified_is_what_was_written(data):
    causal, n, mode = data.draw(st.booleans()), data.draw(st.integers(8, 80)), data.draw(st.sampled_from(MODES))
    window = data.draw(st.sampled_from([0, 0, 1, 3, 10]))
    contextual = data.draw(st.integers(0, 4))
    if data.draw(st.booleans()):
        full = data.draw(st.sampled_from([0, 0, 2, 9])) if window else 0

        def mask(offsets, targets, counts, n):
            return clamped_ids(offsets, targets, n, causal, window, contextual, full)
    else:
        group = data.draw(st.integers(1, 4))

        def mask(offsets, targets, counts, n):
            return grouped_targets(offsets, targets, counts, n, causal, window, group)

    meaning = read(mask, OFFSETS, TARGETS, CONTEXTUAL, n, jagged=True, mode=mode)
    assert isinstance(meaning, MaskMeaning), meaning
    if mode == "symbolic":
        n = data.draw(st.integers(8, 150))
    sizes = st.tuples(st.integers(0, 6), st.integers(0, n // 2), st.one_of(st.integers(0, 6), st.integers(0, n)))
    counts, targets, lengths = torch.tensor(data.draw(st.lists(sizes, min_size=1, max_size=5))).unbind(1)
    inputs = {"counts": counts, "targets": torch.minimum(targets, lengths), "lengths": lengths}
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    expected = mask(offsets, inputs["targets"], inputs["counts"], n)
    real = (i(n) < lengths.view(-1, 1, 1)) & (j(n) < lengths.view(-1, 1, 1))
    assert torch.equal(materialise(meaning, n, inputs), expected & real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fills_that_silu_makes_zero(dtype):
    lowest = torch.finfo(dtype).min
    for fill in (-1e4, lowest):
        assert silu_of_fill_is_zero(fill, dtype)
        scores = torch.tensor([fill], dtype=dtype, requires_grad=True)
        torch.nn.functional.silu(scores).backward(torch.ones(1, dtype=dtype))
        assert torch.nn.functional.silu(scores).item() == 0 and scores.grad.item() == 0
    assert silu_of_fill_is_zero(-1e9, dtype) == (dtype != torch.float16)  # -inf in float16
    for fill in (-30.0, 0.5, float("-inf"), float("nan")):
        assert not silu_of_fill_is_zero(fill, dtype)
