"""What explain says to the author of a layer that is not fused, or not as fast as it could be."""

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import hstu_compile
from hstu_compile.explain import Explanation
from hstu_compile.ops import kernel_table
from hstu_compile.passes.attention_drawbacks import drawback
from hstu_compile.passes.report import COSTS
from tests.models import hard_to_fuse as models

LENGTHS = torch.tensor([12, 7, 9])


def explain(layer: nn.Module, lengths: torch.Tensor = LENGTHS) -> Explanation:
    tokens = (28,) if isinstance(layer, models.PaddedByIndex) else (3, 12)
    return hstu_compile.explain(layer, torch.randn(*tokens, 16), lengths)


# The layer; which pass missed; words of what was seen, of what to write, and of the line that is in the way.
MISSED = {
    models.Softmax: ("attention", "softmax, not silu", "weights = F.silu(scores)", "return torch.softmax("),
    models.MinusInfinity: ("attention", "which gives NaN", "F.silu(scores) * mask", 'float("-inf")'),
    models.AttentionDropout: (
        "attention",
        "dropout on the attention weights",
        "after norm and gate",
        "F.dropout(F.silu(",
    ),
    models.DivisorOfPairs: (
        "attention",
        "a divisor of its own for each (query, key) pair",
        "divide by one number per query [N, 1] or key [N] or head [H, 1, 1]",
        "(1 + (place[:, None]",
    ),
    models.WeightsReturned: (
        "attention",
        "weights leave the graph",
        "return only what is made of weights @ v; to look at the weights, compute them outside",
        "F.silu(scores) / self.longest * mask",
    ),
    models.WrittenInPlace: ("output", "written in place by mul_", "into a copy", "self.out_norm(a) * u"),
    models.NormOverTokens: ("output", "stands layer_norm", "features of a token", "F.dropout(a * u"),
    models.NoNorm: ("output", "there is no norm", "features of a token", "F.dropout(a * u"),
    models.PaddedKeysAlone: (
        "packed_gradient",
        "not padded queries",
        "mask padded queries as well as padded keys (output rows of padded tokens change",
        "F.silu(self.uvqk(",
    ),
}

# Where what is in the way is not at the line of the region: that line.
IN_THE_WAY = {
    models.WeightsReturned: "leave the graph at {}: return self.out(self.gated(a, u)) + x, weights",
    models.WrittenInPlace: "written in place by mul_ at {}: q.mul_(0.5)",
    models.PaddedKeysAlone: "it is made at {}: return ((place[:, None] >= place) & (place < lengths[:, None, None]))[",
}


@pytest.mark.parametrize("kind", MISSED, ids=lambda kind: kind.__name__)
def test_a_miss(kind: type[nn.Module]) -> None:
    pass_name, seen, change, line = MISSED[kind]
    explanation = explain(kind())
    (report,) = explanation.reports
    (miss,) = report.missed(pass_name)
    assert seen in (miss.reason or "") and change in (miss.change or "")
    assert "hard_to_fuse.py:" in miss.source and line in miss.source
    text = str(explanation)
    assert text.index(f"not fused  {pass_name}") < text.index("  fused  "), "what is missed comes first"
    assert f"cost: {COSTS[pass_name]}" in text


@pytest.mark.parametrize("kind", IN_THE_WAY, ids=lambda kind: kind.__name__)
def test_the_line_of_what_is_in_the_way(kind: type[nn.Module]) -> None:
    pass_name, *_ = MISSED[kind]
    (report,) = explain(kind()).reports
    (miss,) = report.missed(pass_name)
    before, after = IN_THE_WAY[kind].split("{}")
    _, found, line = (miss.reason or "").partition(before)
    assert found and re.match(rf"\S*hard_to_fuse.py:\d+{re.escape(after)}", line), miss.reason


def test_what_leaves_the_graph_where_it_breaks() -> None:
    class Broken(models.Layer):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            u, a, weights = self.attend(x, lengths)
            torch._dynamo.graph_break()
            return self.out(self.gated(a, u)) + x + weights.sum()

    (miss,) = explain(Broken()).reports[0].missed("attention")
    assert "leave the graph at " in (miss.reason or "") and "torch._dynamo.graph_break()" in (miss.reason or "")


def entries(explanation: Explanation) -> dict[str, str]:
    """The text about each pass, up to the next."""
    texts = re.split(r"\n  (?=\S)", str(explanation))
    return {text.split()[2].rstrip(":"): text for text in texts if text.startswith("not fused")}


def test_what_follows_from_another_miss_says_so() -> None:
    told = entries(explain(models.Softmax()))
    assert "follows from attention, and is recognised once that is fused, at " in told["uvqk"]
    assert "return torch.softmax(" in told["uvqk"] and "last seen" not in told["uvqk"]


class ScaledInPlace(models.Layer):
    """By something learned: not a constant, which a copy would be enough for."""

    def __init__(self, scaled: str) -> None:
        super().__init__()
        self.scaled, self.scale = scaled, nn.Parameter(torch.ones(16))

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = nn.functional.silu(self.uvqk(self.norm(x))).unflatten(-1, (4, -1))
        parts = {name: y[..., i, :] for i, name in enumerate("uvqk")}
        for name in self.scaled:
            parts[name].mul_(self.scale)
        return parts["u"], *(parts[name].view(*x.shape[:2], self.heads, -1) for name in "vqk")


def test_a_change_that_takes_out_what_is_in_the_way_of_several() -> None:
    told = entries(explain(ScaledInPlace("q")))
    shared = "the change under packed_gradient, which cures this too"
    assert "change: take q as the split gives it (another model" in told["packed_gradient"]
    assert f"(same numbers); or {shared}" in told["output"] and f"change: {shared}" in told["uvqk"]
    assert "cures this too" not in told["packed_gradient"]


def test_a_change_that_takes_out_another_call_is_not_shared() -> None:
    told = entries(explain(ScaledInPlace("kq")))
    assert "written in place by mul_" in told["output"] and "q is changed" in told["packed_gradient"]
    assert "last seen in mul_" in told["uvqk"] and "under packed_gradient" not in told["output"] + told["uvqk"]


def test_one_change_in_all_entries() -> None:
    told = entries(explain(models.WrittenInPlace()))
    copy = "change: write into a copy: assign what mul returns (same numbers)\n"
    assert copy in told["output"] and copy in told["packed_gradient"]
    assert "change: the change under packed_gradient, which cures this too" in told["uvqk"]


def test_what_is_changed_between_split_and_attention() -> None:
    (report,) = explain(models.WrittenInPlace()).reports
    (miss,) = report.missed("packed_gradient")
    assert "q is changed between the split and the attention: mul_" in (miss.reason or "")
    assert "q.mul_(0.5)" in (miss.reason or "") and "assign what mul returns" in (miss.change or "")
    (miss,) = report.missed("uvqk")
    assert "found that takes its q" in (miss.reason or "") and "q.mul_(0.5)" in (miss.reason or "")


def test_the_name_of_an_argument_inside_a_checkpointed_region() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = models.Layer()

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.layer, x, lengths, use_reentrant=False, context_fn=all_recomputed)

    assert "padding by lengths: lengths;" in str(explain(Checkpointed()))


def all_recomputed() -> tuple:
    return create_selective_checkpoint_contexts([])


def test_nothing_is_missed_in_the_layer_itself() -> None:
    explanation = explain(models.Layer())
    (report,) = explanation.reports
    assert not report.missed() and not any(region.change for region in report.regions)
    assert "padding by lengths: lengths;" in str(explanation), "the argument's own name"


BREAKS = {
    models.NumberRead: ("a number is read from a tensor", "keep it a tensor", "mask.sum(-1).max().item()"),
    models.Branch: ("a Python branch on the value of a tensor", "torch.where", "if scores.isnan().any():"),
}


@pytest.mark.parametrize("kind", BREAKS, ids=lambda kind: kind.__name__)
def test_a_graph_break(kind: type[nn.Module]) -> None:
    explanation = explain(kind())
    text = explanation.graph_breaks[0]
    assert all(words in text for words in (*BREAKS[kind], "hard_to_fuse.py:", "cost: "))
    assert str(explanation).splitlines()[1].startswith(text.splitlines()[0])
    assert len(set(explanation.graph_breaks)) == str(explanation).count("graph break  ") == 1, "it is named once"


def test_what_is_not_compiled_though_no_graph_ends_there() -> None:
    class Disabled(models.Layer):
        @torch.compiler.disable
        def attend(self, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return super().attend(*args)

    (text,) = explain(Disabled()).graph_breaks
    assert "torch.compiler.disable" in text and "Disabled.attend>" in text and "change: " in text


MASK = torch.ones(12, 12, dtype=torch.bool).tril().expand(3, 1, 12, 12)
SLOWER = {
    models.HoleFromData: (LENGTHS, "it reads x, which", "positions (arange, tril)", "(x.abs().amax(-1) > 0.1)"),
    models.HoleFromPlaces: (LENGTHS, "it has no closed form", "padding, a window", "row 1, column 0"),
    models.MaskGiven: (MASK, "ready-made, as lengths", "in the graph of the attention", ""),
    models.PaddedByIndex: (LENGTHS, "padded by index_put", "fbgemm.jagged_to_padded_dense", ""),
}


@pytest.mark.parametrize("kind", SLOWER, ids=lambda kind: kind.__name__)
def test_fused_and_slower_than_others(kind: type[nn.Module]) -> None:
    lengths, seen, change, where = SLOWER[kind]
    explanation = explain(kind(), lengths)
    (report,) = explanation.reports
    (region,) = report.fused("attention")
    assert seen in (region.slower or "") and where in (region.slower or "") and change in (region.change or "")
    assert f"slower because {region.slower}" in str(explanation)


def test_layers_that_are_alike_are_told_once() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(models.Softmax() for _ in range(3))

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, lengths)
            return x

    explanation = explain(Stack())
    assert "not fused: 6" in str(explanation) and str(explanation).count("softmax, not silu") == 1
    assert "attention: silu(q @ k.T) @ v  (3 times)" in str(explanation)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel_table.choose_attention.cache_clear()
    yield
    kernel_table.choose_attention.cache_clear()


@pytest.mark.parametrize(("dim", "slower"), [(20, None), (512, "no kernel takes this call")])
def test_head_dimensions_that_no_kernel_of_the_gpu_takes(hopper: None, dim: int, slower: str | None) -> None:
    cuda = torch.device("cuda")
    kernel = kernel_table.describe(cuda, torch.bfloat16, dim, dim, has_mask=False, has_bias=False)
    assert f"attn_dim {dim} (of a head of q and k) is not a multiple of 8 up to 256" in kernel
    result = torch.fx.Graph().placeholder("out")
    result.meta["val"] = SimpleNamespace(device=cuda)
    layout = SimpleNamespace(region=SimpleNamespace(before=result), seq_offsets=result)
    assert drawback(layout, SimpleNamespace(meaning=None), kernel)[0] == slower  # type: ignore[arg-type]
    assert slower is None or "from 1 to 256, got 512" in kernel
