"""Random spellings of HSTU layers are recognised and keep their numbers; layers that mean something else keep theirs.

`python -m tests.spelling_trials --help` runs as many as one likes.
"""

import random

import pytest
import torch

from hstu_compile.ops.hstu_attention import PARAMETERS
from hstu_compile.passes import NAMES
from tests import spelling_trials
from tests.spelled import MUTATIONS, write
from tests.without_codegen import Compiled, inductor_without_codegen

compiles = pytest.fixture(inductor_without_codegen)

TRIED, SEED = 35, 20_000
WHOLE_WAY = range(SEED, SEED + 4)  # these go through Dynamo and AOTAutograd
# Their softmax or gelu is no attention of ours; the others may be computed by an op that does what was written.
LEFT_ALONE = {
    *("softmax", "gelu", "relu", "sigmoid", "silu twice", "tanh of the weights", "weights + 0.1", "fill with -inf"),
    *("fill with -30", "fill with 1", "square of the weights", "dropout on weights"),
}


def test_ten_thousand_layers_are_distinct() -> None:
    assert len({write(random.Random(seed)).source for seed in range(10_000)}) == 10_000


@pytest.mark.parametrize("seed", range(SEED, SEED + TRIED))
def test_spelled_layers(seed: int) -> None:
    outcome = spelling_trials.try_out(spelling_trials.layer_of(seed), seed)
    assert outcome.wrong is None, f"{outcome.wrong}\n{outcome.layer.source}"
    assert outcome.recognised("attention"), f"{outcome.report}\n{outcome.layer.source}"


@pytest.mark.parametrize("seed", range(SEED, SEED + TRIED // 2))
def test_one_sequence_is_known_as_several_are(seed: int) -> None:
    layer = spelling_trials.layer_of(seed)
    several, one = (spelling_trials.try_out(layer, seed, batches=batches) for batches in ((3,), (1, 1)))
    assert one.wrong is None, f"{one.wrong}\n{layer.source}"
    for part in NAMES:
        assert one.recognised(part) >= several.recognised(part), f"{one.report}\n{layer.source}"
    assert [region.what for region in one.report.fused("attention")] == [
        region.what for region in several.report.fused("attention")
    ]


@pytest.mark.parametrize("seed", WHOLE_WAY)
def test_spelled_layers_through_the_backend(seed: int, compiles: Compiled) -> None:
    outcome = spelling_trials.try_out(spelling_trials.layer_of(seed), seed, spelling_trials.through_dynamo)
    assert outcome.wrong is None, f"{outcome.wrong}\n{outcome.layer.source}"
    assert outcome.recognised("attention"), f"{outcome.report}\n{outcome.layer.source}"
    assert outcome.graphs == 1, "another batch size compiled again"


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_layers_that_mean_something_else(mutation: str) -> None:
    seed = SEED + MUTATIONS.index(mutation)
    outcome = spelling_trials.try_out(write(random.Random(seed), mutation), seed)
    assert outcome.wrong is None, f"{outcome.wrong}\n{outcome.layer.source}"
    if mutation in LEFT_ALONE:
        assert not outcome.recognised("attention"), f"{outcome.report}\n{outcome.layer.source}"


def test_the_trials_see_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the guard: an op that is off by a thousandth is found."""
    op = torch.ops.hstu_compile.hstu_attention.default

    def off(layer, args):
        call, report, graphs = spelling_trials.through_trace(layer, args)
        for node in graphs[0].graph.find_nodes(op="call_function", target=op):
            alpha = 3 + PARAMETERS.index("alpha")
            node.update_arg(alpha, node.args[alpha] * 1.001)
        graphs[0].recompile()
        return call, report, graphs

    outcome = spelling_trials.try_out(spelling_trials.layer_of(SEED), SEED, off)
    assert outcome.wrong is not None
