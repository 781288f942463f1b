"""Lets the Triton interpreter (TRITON_INTERPRET=1) take loop bounds from arguments under numpy >= 2.4. Import it first.

Its scalars are arrays of one element, and int() of those is now an error; read in triton 3.6.
"""

import triton.runtime.interpreter as interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_with_index(tensor, *scope):
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_with_index
