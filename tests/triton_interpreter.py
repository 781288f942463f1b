"""Makes the Triton interpreter (TRITON_INTERPRET=1) do for these tests. Import it first.

Loop bounds may come from arguments under numpy >= 2.4: its scalars are arrays of one element, and int() of those is now
an error. And it is fast enough for tests: it replaces every function of triton.language for a call, those of one
@triton.jit function by another among them, inside of which that has been done.

Private functions, read in triton 3.6 to 3.9.
"""

import functools
from types import FunctionType

import triton.language as tl
import triton.runtime.interpreter as interpreter

_patch_tensor, _patch_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
_replaced: set[str] = set()  # modules whose functions are the interpreter's, at this moment


def _patch_tensor_with_index(tensor, *scope):
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


def _patch_lang_once(function):
    more = _languages(function) - _replaced
    if not more:
        return interpreter._LangPatchScope()
    scope = _patch_lang(function)
    _replaced.update(more)
    restore = scope.restore

    def restore_all():
        restore()
        _replaced.difference_update(more)

    scope.restore = restore_all
    return scope


@functools.cache
def _languages(function: FunctionType) -> frozenset[str]:
    return frozenset(x.__name__ for x in function.__globals__.values() if x is tl or x is tl.core)


interpreter._patch_lang_tensor = _patch_tensor_with_index
interpreter._patch_lang = _patch_lang_once
