"""What hstu_compile.serve takes, and what it refuses with a reason: a cache must never change an answer."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hstu_compile
from hstu_compile.serving import NotServable
from hstu_compile.serving import engine as engine_module
from tests.models.cases import MODELS
from tests.models.meta_stu import MetaSTU
from tests.models.ranking import ITEMS, WIDTH, Ranking
from tests.serving_traffic import MAX_SEQ_LEN, Traffic


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "compiled", lambda step: step.graph.forward)


def first_request(model: nn.Module) -> None:
    engine = hstu_compile.serve(model.eval(), max_batch=2, max_seq_len=MAX_SEQ_LEN, page_size=16)
    engine(["a", "b"], *Traffic(model).request(["a", "b"], [7, 4], [2, 1]))


class PositionFromTheEnd(Ranking):
    def position(self, row: Tensor, sequence: Tensor, offsets: Tensor, num_targets: Tensor) -> Tensor:
        return offsets[1:][sequence] - 1 - row


class RowNumber(Ranking):
    """Of the batch: not the user's."""

    def position(self, row: Tensor, sequence: Tensor, offsets: Tensor, num_targets: Tensor) -> Tensor:
        return row


class TimeSinceTheLast(Ranking):
    def embed(self, ids: Tensor, offsets: Tensor, num_targets: Tensor, timestamps: Tensor) -> Tensor:
        sequence = torch.bucketize(torch.arange(ids.shape[0]), offsets[1:], right=True)
        gap = timestamps[offsets[1:] - 1][sequence] - timestamps
        return super().embed(ids, offsets, num_targets, None) + gap.float().log1p().unsqueeze(-1)


class Centred(Ranking):
    def embed(self, *args: Tensor) -> Tensor:
        x = super().embed(*args)
        return x - x.mean(0)


class CentredBetween(Ranking):
    def between(self, x: Tensor, offsets: Tensor) -> Tensor:
        return x - x.mean(0)


class Accumulated(Ranking):
    def between(self, x: Tensor, offsets: Tensor) -> Tensor:
        return x.cumsum(0)


class ByLength(Ranking):
    def between(self, x: Tensor, offsets: Tensor) -> Tensor:
        sequence = torch.bucketize(torch.arange(x.shape[0]), offsets[1:], right=True)
        return x / offsets.diff()[sequence].unsqueeze(-1)


class ByNumberOfTokens(Ranking):
    def between(self, x: Tensor, offsets: Tensor) -> Tensor:
        return x / x.shape[0]


class TheTokenBefore(Ranking):
    def between(self, x: Tensor, offsets: Tensor) -> Tensor:
        row = torch.arange(x.shape[0])
        return x + x[(row - 1).clamp(min=0)]


class Rolled(Ranking):
    def between(self, x: Tensor, offsets: Tensor) -> Tensor:
        return x + torch.roll(x, 1, 0)


class Contextual(Ranking):
    def layer(self) -> nn.Module:
        return MetaSTU(WIDTH, 2, 16, 16, contextual=2)


class Window(Ranking):
    """The last of the history see all of it: others do when it has grown."""

    def layer(self) -> nn.Module:
        return MetaSTU(WIDTH, 2, 16, 16, window=3, min_full=2)


class TwoWidths(Ranking):
    def layer(self) -> nn.Module:
        return MetaSTU(WIDTH, 2, hidden_dim=8, attn_dim=16)


class BothWays(MetaSTU):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, n: int, num_targets: Tensor | None) -> Tensor:
        def pad(x: Tensor) -> Tensor:
            dense = torch.ops.fbgemm.jagged_to_padded_dense(x.flatten(1), [offsets], [n], 0.0)
            return dense.view(-1, n, self.heads, x.shape[2]).transpose(1, 2)

        weights = F.silu(pad(q) @ pad(k).transpose(2, 3) * self.alpha) / 16
        dense = (weights @ pad(v)).transpose(1, 2).flatten(2, 3)
        return torch.ops.fbgemm.dense_to_jagged(dense, [offsets], q.shape[0])[0].view(v.shape)


class NotCausal(Ranking):
    def layer(self) -> nn.Module:
        return BothWays(WIDTH, 2, 16, 16)


class GraphBreak(Ranking):
    def between(self, x: Tensor, offsets: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


class Autocast(Ranking):
    def embed(self, *args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().embed(*args)


HERE = "test_serving_models.py"
REFUSED: dict[Callable[..., nn.Module], str] = {
    PositionFromTheEnd: r"keys and values can't be cached: .* changes for an old token when its history grows",
    RowNumber: r"can't be cached: .* changes for an old token when its history grows or the batch is another",
    TimeSinceTheLast: r"can't be cached: .* changes for an old token when its history grows",
    Centred: rf"can't be cached: mean is computed from the whole batch .* at .*{HERE}.*x - x.mean\(0\)",
    CentredBetween: rf"for new tokens alone: mean needs rows of all tokens.* at .*{HERE}.*x - x.mean\(0\)",
    Accumulated: rf"for new tokens alone: cumsum works along dimension 0, that of the rows, at .*{HERE}.*cumsum",
    ByLength: r"can't be cached: .* changes for an old token when its history grows",
    ByNumberOfTokens: rf"can't be cached: div depends on a size of the batch: its other is s\d+, at .*{HERE}",
    TheTokenBefore: rf"for new tokens alone: .* at .*{HERE}.*x\[\(row - 1\)",
    Rolled: rf"for new tokens alone: roll is not known to work row by row, at .*{HERE}.*torch.roll",
    Contextual: r"can't be cached: hstu_attention has contextual tokens, which attend to all of the history",
    Window: r"can't be cached: hstu_attention has a window that the last tokens of the history are exempt from",
    TwoWidths: r"can't be cached: hstu_attention has keys and values of different widths",
    NotCausal: r"can't be cached: hstu_attention is not causal: old tokens attend to new ones",
    Autocast: r"the model enters autocast at .*, expected autocast around the engine's calls",
    GraphBreak: r"can't be captured as one graph",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_refused(model: Callable[..., nn.Module]) -> None:
    with pytest.raises(RuntimeError) as error:
        first_request(model(layers=2))
    assert re.search(REFUSED[model], str(error.value), re.DOTALL), str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("research unbroken", "has a bias, which attention over pages does not take"),
        ("single head", r"is dense, \[B, N\]; expected jagged sequences with offsets"),
    ],
)
def test_models_of_other_kinds_are_refused(name: str, message: str) -> None:
    model = MODELS[name].model().eval()
    engine = hstu_compile.serve(model, max_batch=4, max_seq_len=16)
    with pytest.raises(NotServable, match=message):
        engine(list(range(3)), *MODELS[name].arguments(3))


def test_nothing_to_serve() -> None:
    engine = hstu_compile.serve(nn.Linear(4, 4).eval(), max_batch=4, max_seq_len=16)
    with pytest.raises(NotServable, match="no attention of the model was recognised"):
        engine([0], torch.randn(3, 4))


class LastLayerByLength(Ranking):
    """What is behind the last keys and values may depend on anything that is computed row by row."""

    def forward(self, ids: Tensor, offsets: Tensor, *args: Tensor) -> Tensor:
        sequence = torch.bucketize(torch.arange(ids.shape[0]), offsets[1:], right=True)
        return super().forward(ids, offsets, *args) / offsets.diff()[sequence]


class PlainWindow(Ranking):
    def layer(self) -> nn.Module:
        return MetaSTU(WIDTH, 2, 16, 16, window=3)


class Padded(Ranking):
    """Embedded in a padded batch and made jagged, and of the padded result the last token."""

    def embed(self, ids: Tensor, offsets: Tensor, num_targets: Tensor, timestamps: Tensor | None) -> Tensor:
        n = MAX_SEQ_LEN
        dense = torch.ops.fbgemm.jagged_to_padded_dense(ids.unsqueeze(1).float(), [offsets], [n], 0.0)
        x = self.items(dense.squeeze(-1).long()) + self.positions(torch.arange(n))
        return torch.ops.fbgemm.dense_to_jagged(x, [offsets], ids.shape[0])[0]

    def forward(self, ids: Tensor, offsets: Tensor, num_targets: Tensor, *args: Tensor) -> Tensor:
        scores = super().forward(ids, offsets, num_targets, *args).unsqueeze(1)
        dense = torch.ops.fbgemm.jagged_to_padded_dense(scores, [offsets], [MAX_SEQ_LEN], 0.0)
        last = offsets.diff() - 1
        return dense[torch.arange(last.shape[0]), last].squeeze(-1)


@pytest.mark.parametrize("model", [LastLayerByLength, PlainWindow, Padded], ids=lambda model: model.__name__)
def test_served(model: Callable[..., nn.Module]) -> None:
    served = model(layers=2).eval()
    traffic = Traffic(served)
    engine = hstu_compile.serve(served, max_batch=2, max_seq_len=MAX_SEQ_LEN, page_size=16)
    for histories in ((7, 4), (8, 20), (30, 20)):
        args = traffic.request(["a", "b"], histories, [0, 1])
        traffic.check(engine(["a", "b"], *args), args)


class TwoColumns(Ranking):
    """As many as there are users in the first request."""

    def embed(self, ids: Tensor, offsets: Tensor, num_targets: Tensor, timestamps: Tensor | None) -> Tensor:
        return super().embed(ids[:, 0], offsets, num_targets, None) + self.items(ids[:, 1])


def test_an_input_that_is_as_wide_as_the_batch() -> None:
    model = TwoColumns(layers=2).eval()
    traffic = Traffic(model)
    single = traffic.request

    def request(*sizes: list) -> tuple:
        ids, *others = single(*sizes)
        return torch.stack([ids, 7 * ids % ITEMS], dim=1), *others

    traffic.request = request  # type: ignore[method-assign]
    engine = hstu_compile.serve(model, max_batch=4, max_seq_len=MAX_SEQ_LEN, page_size=16)
    for users, histories in ((["a", "b"], [7, 4]), (["a", "b", "c"], [8, 20, 5]), (["c"], [9])):
        args = traffic.request(users, histories, [1] * len(users))
        traffic.check(engine(users, *args), args)
