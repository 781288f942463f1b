"""Where Dynamo had to break the graph, in words of the model's author."""

import re
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

CONTEXT = "Developer debug context: "
COST = "what it cuts in two, an attention or a layer, is not fused as one; explain again without the break"

BRANCH = (
    "a Python branch on the value of a tensor",
    "torch.where instead of if, or the check outside the compiled model",
)
# What Dynamo's reason begins with (torch 2.11), what it means, and what to write.
KNOWN = {
    "generic_jump": BRANCH,
    "Data-dependent branching": BRANCH,
    "Unsupported Tensor.item() call": (
        "a number is read from a tensor",
        "keep it a tensor (no .item(), int(), float()), or set torch._dynamo.config.capture_scalar_outputs = True "
        "(same numbers)",
    ),
    "Data dependent operator": (
        "a call whose result depends on the values of a tensor",
        "keep numbers tensors (no .tolist()); a jagged batch padded, or by torch.ops.fbgemm, instead of a loop",
    ),
    "Dynamic shape operator": (
        "a call whose result has a size that depends on the values of a tensor",
        "set torch._dynamo.config.capture_dynamic_output_shape_ops, or gather by indices of a known number",
    ),
}


def count() -> Counter[str]:
    """How often Dynamo broke a graph so far, by its reason."""
    return Counter(torch._dynamo.utils.counters["graph_break"])


def describe_unseen(reasons: Counter[str], seen: Iterable[Any]) -> list[str]:
    """Those of these reasons at which no graph ended, because nothing stood before: what they name is not compiled."""
    known = {_meaning(reason.reason)[0] for reason in seen}
    return [_describe(text, []) for text in reasons if _meaning(text)[0] not in known]


def describe(reason: Any) -> str:
    """What breaks the graph, at which of the user's lines, and what to do about it; Dynamo's own words if not KNOWN."""
    return _describe(reason.reason, reason.user_stack or [])


def _describe(text: str, stack: Sequence[traceback.FrameSummary]) -> str:
    more = [line.strip() for line in text.splitlines()]
    meant, *changes = _meaning(text)
    changes += [line.removeprefix("Hint: ") for line in more if line.startswith("Hint: ")][: not changes]
    frames = [frame for frame in stack if "/torch/" not in frame.filename]
    at = [f"at {frame.filename}:{frame.lineno}: {frame.line}" for frame in frames[-1:]]
    contexts = [line.removeprefix(CONTEXT) for line in more if line.startswith(CONTEXT)]
    at = at or [f"at {re.sub(' at 0x[0-9a-f]+', '', context)}" for context in contexts]
    change = [f"change: {text}" for text in changes]
    return "\n    ".join([f"graph break  {meant}", *at, *change, f"cost: {COST}"])


def _meaning(text: str) -> tuple[str, ...]:
    """What breaks the graph, and what to write where that is known."""
    first = text.strip().splitlines()[0].strip()
    return next((words for start, words in KNOWN.items() if first.startswith(start)), (first,))
