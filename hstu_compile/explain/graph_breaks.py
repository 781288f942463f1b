"""Where Dynamo had to break the graph, in words of the model's author."""

from typing import Any

COST = "what it cuts in two, an attention or a layer, is not fused as one"

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
        "keep it a tensor (no .item(), int(), float()), or set torch._dynamo.config.capture_scalar_outputs",
    ),
    "Data dependent operator": (
        "a call whose result depends on the values of a tensor",
        "keep numbers tensors (no .tolist()), or hand them to the model as Python numbers",
    ),
}


def describe(reason: Any) -> str:
    """What breaks the graph, at which of the user's lines, and what to do about it; Dynamo's own words if not KNOWN."""
    first, *more = (line.strip() for line in reason.reason.strip().splitlines())
    meant, *changes = next((words for start, words in KNOWN.items() if first.startswith(start)), (first,))
    changes += [line.removeprefix("Hint: ") for line in more if line.startswith("Hint: ")][: not changes]
    frames = [frame for frame in reason.user_stack or [] if "/torch/" not in frame.filename]
    at = [f"at {frame.filename}:{frame.lineno}: {frame.line}" for frame in frames[-1:]]
    change = [f"change: {text}" for text in changes]
    return "\n    ".join([f"graph break  {meant}", *at, *change, f"cost: {COST}"])
