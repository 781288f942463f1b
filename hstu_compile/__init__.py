"""torch.compile(model, backend=hstu_compile.backend): unmodified HSTU models as fused kernels, forward and backward."""

import hstu_compile.ops as _ops  # noqa: F401  registers the ops
from hstu_compile.buckets import TokenBuckets
from hstu_compile.compiler import backend
from hstu_compile.explain import explain
from hstu_compile.exported import fuse
from hstu_compile.serving import serve

__version__ = "0.1.0"
__all__ = ["TokenBuckets", "__version__", "backend", "explain", "fuse", "serve"]
