"""What a compiled graph takes for granted of the model's own tensors, checked at every call.

The content of a buffer (a causal mask, positions) is only known while it is compiled. The next call may bring another
tensor, or the same one with other values. So: a tensor that autograd's version counter and its address say is the one
that was looked at still holds; any other is compared first; where the content is another, the graph as it was before
anything was read is compiled, and runs instead. A write that the counter does not see (`.data`, a kernel of the user's)
is found where the tensor is, without waiting for it, and stops the program: rather that than a wrong number.
"""

import collections
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from hstu_compile.capture import placeholders
from hstu_compile.ops import validation
from hstu_compile.passes.contents import Content, content_of, offer

log = logging.getLogger("hstu_compile")

WRITTEN = "hstu_compile: a tensor of the model was written past autograd's version counter after it was compiled"


def offer_contents(captured: fx.GraphModule, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Offer to the passes what the model's own tensors hold: those reached through a module, without a gradient, that
    share no memory with another input. `captured` is of Dynamo's `gm`; fake tensors hold nothing."""
    real = [given for given in example_inputs if isinstance(given, Tensor) and not isinstance(given, FakeTensor)]
    memory = collections.Counter(map(_memory, real))
    for old, new, given in zip(placeholders(gm), placeholders(captured), example_inputs, strict=True):
        if type(given) not in (Tensor, torch.nn.Parameter) or given.requires_grad or given.is_inference():
            continue
        source = getattr(old, "_dynamo_source", None)
        # GuardSource: read in torch 2.11 and 2.13. An argument of the call is another tensor each time.
        if source is not None and source.guard_source.is_unspecialized_nn_module() and memory[_memory(given)] == 1:
            offer(new, given)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def while_they_hold(
    assumed: dict[int, Content], compiled: Callable[..., Any], compile_unread: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    """`compiled` where the inputs at these positions hold what is assumed, else what `compile_unread` gives, once."""
    looked_at = {position: _LookedAt(content) for position, content in assumed.items()}
    unread = functools.cache(compile_unread)

    def call(*args: Any) -> Any:
        if all([known.holds(args[position]) for position, known in looked_at.items()]):
            return compiled(*args)
        return unread()(*args)

    return call


class _LookedAt:
    """The tensors that were found to hold a content, or not to, and in which state of theirs."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._states: Any = WeakTensorKeyDictionary()
        self._values: Any = WeakTensorKeyDictionary()  # copies
        self._others: Any = WeakTensorKeyDictionary()

    def holds(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):  # nothing is computed: Dynamo's DDPOptimizer calls while it compiles
            return True
        if tensor in self._others:
            return False  # its values are not what they were: it is not looked at each time they change
        state = None if tensor.is_inference() else (tensor._version, tensor.data_ptr())
        may_wait = validation.checks_values(tensor.device)
        if may_wait or state is None or self._states.get(tensor) != state or tensor not in self._values:
            if content_of(tensor) != self._content:
                log.warning("hstu_compile: a tensor of the model changed, its content is no longer taken for granted")
                self._others[tensor] = True
                return False
            self._states[tensor] = state
            if not may_wait:
                self._values[tensor] = tensor.detach().clone()
        else:
            # Private; read in torch 2.11 and 2.13. It is recorded with a CUDA graph, and checks at each replay.
            torch.ops.aten._assert_async.msg((tensor.detach() == self._values[tensor]).all(), WRITTEN)
        return True
