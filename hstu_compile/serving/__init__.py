"""hstu_compile.serve: the trained model, unmodified, computing what its cache does not hold: docs/serving.md."""

from collections.abc import Sequence

from torch import nn

from hstu_compile.serving.engine import Answer, Engine, Host
from hstu_compile.serving.step import NotServable

__all__ = ["Answer", "Engine", "NotServable", "serve"]


def serve(
    model: nn.Module,
    *,
    max_batch: int,
    max_seq_len: int,
    page_size: int = 32,
    num_pages: int | None = None,
    host: Host = 0,
    cuda_graphs: Sequence[tuple[int, int]] = (),
    version: int | str = 0,
) -> Engine:
    """An engine that answers requests to a model from a paged cache of keys and values.

        engine = hstu_compile.serve(model, max_batch=8, max_seq_len=4096)
        answer = engine(users, ids, offsets, num_targets)  # behind the users, the model's own arguments

    Args:
        model: in eval mode; it is captured, in one graph, at the first request.
        max_batch: users in a request at most.
        max_seq_len: tokens of a user at most, history and candidates.
        page_size: tokens in a page: 16, 32, 64, 128 or 256.
        num_pages: of each layer; None: as many as `max_batch` users of `max_seq_len` need, four times.
        host: where users go that no longer fit the pages: bytes of host memory, or a function of the
            `kv_cache.PageLayout` that makes a `kv_cache.HostKVStorageManager`; 0: these users are computed again.
        cuda_graphs: (users, new tokens): requests of up to so many replay a CUDA graph; others are launched.
        version: of the weights: the name of a checkpoint, where `host` is a storage that survives a restart.

    Raises:
        ValueError: an argument does not fit.
    """
    return Engine(
        model,
        max_batch=max_batch,
        max_seq_len=max_seq_len,
        page_size=page_size,
        num_pages=num_pages,
        host=host,
        graph_sizes=cuda_graphs,
        version=version,
    )
