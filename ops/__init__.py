"""torch.library ops in the namespace `hstu_compile::`: each with its reference, fake and autograd formula."""

if __name__ != "hstu_compile.ops":
    raise ImportError(
        f"imported as {__name__!r}; import it as hstu_compile.ops (a second copy would register its ops twice)"
    )

from hstu_compile.ops.append_kv import append_kv
from hstu_compile.ops.gated_paged_attention import gated_paged_attention
from hstu_compile.ops.gated_silu_attention import gated_silu_attention
from hstu_compile.ops.hstu_attention import hstu_attention
from hstu_compile.ops.mask_tile_states import mask_tile_states
from hstu_compile.ops.norm_gate_dropout import norm_gate_dropout
from hstu_compile.ops.paged_hstu_attention import paged_hstu_attention
from hstu_compile.ops.silu_append_kv import silu_append_kv
from hstu_compile.ops.silu_attention import silu_attention
from hstu_compile.ops.silu_in_place import silu_
from hstu_compile.ops.table_lookup import table_grad, table_lookup
from hstu_compile.ops.wait_layer import waiting

__all__ = [
    "append_kv",
    "gated_paged_attention",
    "gated_silu_attention",
    "hstu_attention",
    "mask_tile_states",
    "norm_gate_dropout",
    "paged_hstu_attention",
    "silu_",
    "silu_append_kv",
    "silu_attention",
    "table_grad",
    "table_lookup",
    "waiting",
]
