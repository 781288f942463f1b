"""The engine: requests in, answers out; between them the cache, the graph of new rows, and CUDA graphs of it."""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from hstu_compile.kv_cache import (
    Batch,
    GpuKVCacheManager,
    HostKVStorageManager,
    KVCache,
    LoadFailed,
    MemoryStorage,
    PageLayout,
)
from hstu_compile.ops import waiting
from hstu_compile.passes import residual
from hstu_compile.serving import cuda_graphs
from hstu_compile.serving.captured_call import capture_call, sizes_apart
from hstu_compile.serving.padding import Rows
from hstu_compile.serving.plan import Plan
from hstu_compile.serving.step import OneToken, Request, Step

User = int | str
Host = int | Callable[[PageLayout], HostKVStorageManager]
LEAST = 2  # rows, sequences, tokens: a size of 1 would be compiled as a constant


class Answer(NamedTuple):
    """What the model returns, and for which tokens."""

    output: Any  # where the model gives a row for each token, it has those of `rows` only
    rows: Tensor  # [R] int64: the computed tokens, as rows of the request; on the CPU


class Engine:
    """Made by `hstu_compile.serve`. For one thread, and one CUDA stream."""

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch: int,
        max_seq_len: int,
        page_size: int,
        num_pages: int | None,
        host: Host,
        graph_sizes: Sequence[tuple[int, int]],
        version: int | str,
    ) -> None:
        if model.training:
            raise ValueError("serve: model.training is True, expected a model in eval mode: model.eval()")
        for name, given in (("max_batch", max_batch), ("max_seq_len", max_seq_len)):
            if given < 1:
                raise ValueError(f"serve: {name} is {given}, expected a positive number")
        for users, tokens in graph_sizes:
            if not 0 < users <= max_batch or tokens < 1:
                expected = f"(users, new tokens), of up to max_batch, {max_batch}, users"
                raise ValueError(f"serve: cuda_graphs has {(users, tokens)}, expected {expected}")
        self.model, self.max_batch, self.max_seq_len = model, max_batch, max_seq_len
        self.version: int | str = version
        self._page_size, self._num_pages, self._host = page_size, num_pages, host
        self._sizes = sorted(graph_sizes)
        self._epochs: Counter[User] = Counter()
        self._step: Step | None = None
        self._graphs: cuda_graphs.CudaGraphs | None = None
        self._cache: KVCache | None = None

    def __call__(self, users: Sequence[User], *args: Any, **kwargs: Any) -> Answer:
        """The model's output for what of these users is not cached: new history, and candidates.

        Args:
            users: one name for each sequence, none twice. A history only grows: see `forget`.
            *args, **kwargs: the model's own, for whole sequences, on any device.

        Raises:
            NotServable: the model can't be computed from a cache (at the first request).
            ValueError: an argument does not fit.
            CapacityError: the request needs more pages than there are.
        """
        with torch.inference_mode(False), torch.no_grad():  # what is written to in place must not be of inference mode
            if self._step is None:
                try:
                    self._start(args, kwargs)
                except OneToken:
                    return Answer(
                        self.model(*self._on_device(args), **self._on_device(kwargs)),
                        torch.zeros(1, dtype=torch.int64, device="cpu"),
                    )
            assert self._step is not None and self._cache is not None
            request = self._step.prepare(args, kwargs)
            self._check(users, request)
            epochs = [self._epochs[user] for user in users]
            with self._cache.plan(users, request.histories, version=self.version, epochs=epochs) as batch:
                while True:
                    try:
                        answer = self._compute(request, batch)
                        break
                    except LoadFailed:
                        batch.rollback()
                batch.commit()
            return answer

    def reload(self, state_dict: Mapping[str, Any] | None = None, version: int | str | None = None) -> None:
        """New weights, loaded from here or by the caller in place: nothing cached of the old ones is used again.

        Args:
            state_dict: of the model.
            version: by which keys and values are cached from here on; None: the next number.
        """
        if version is None and isinstance(self.version, int):
            version = self.version + 1
        if version is None or version == self.version:
            raise ValueError(f"reload: version is {version!r}, expected another name than {self.version!r}")
        self.version = version
        if state_dict is not None:
            self.model.load_state_dict(state_dict)
        if self._step is not None and not self._step.holds(self.model):
            self.close()  # the next request captures the model anew
            self._step = self._graphs = self._cache = None

    def forget(self, user: User) -> None:
        """The user's history is another than it was: nothing that is cached of it is used again."""
        self._epochs[user] += 1

    def drain(self) -> None:
        """Wait for copies to and from the host that are under way."""
        if self._cache is not None:
            self._cache.gpu.drain()

    def close(self) -> None:
        """Wait for copies under way, and give back memory and threads."""
        if self._cache is not None:
            self._cache.close()

    def report(self) -> str:
        """What is served and how: the model's regions, what is computed for all rows, the cache and its graphs."""
        if self._step is None or self._cache is None:
            return "serve: no request yet"
        return "\n".join([*self._step.words(), *self._words(), *(self._graphs.words() if self._graphs else [])])

    def _words(self) -> list[str]:
        assert self._cache is not None
        gpu = self._cache.gpu
        megabytes = sum(pool.numel() * pool.element_size() for pool in gpu.pools) / 2**20
        lines = [
            f"cache: {gpu.num_pages} pages of {self._page_size} tokens in {len(gpu.pools)} layers: {megabytes:.1f} MiB"
        ]
        for tier, counters in self._cache.counters.items():
            lines.append(f"{tier}: {counters}")
        return lines

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device = self._device
        call = capture_call(self.model, self._on_device(args), self._on_device(kwargs))
        with torch.device("cpu"):  # whatever the caller's default device is
            step = Step(call)
        g = step.geometry
        layout = PageLayout(g.num_layers, g.num_heads, g.head_dim, self._page_size, g.dtype)
        per_user = layout.pages(self.max_seq_len)
        gpu = GpuKVCacheManager(layout, self._num_pages or 4 * self.max_batch * per_user, device)
        with torch.device("cpu"):
            step.page(gpu.pools, per_user)
        cache = KVCache(gpu, self._storage(layout), max_batch_size=self.max_batch, max_seq_len=self.max_seq_len)
        launch = compiled(step)
        self._step, self._cache, self._launch = step, cache, launch
        if self._sizes and cuda_graphs.supported(device):
            self._graphs = cuda_graphs.CudaGraphs(step, launch, self._sizes, self.max_seq_len, cache)

    @property
    def _device(self) -> torch.device:
        return next((t.device for t in (*self.model.parameters(), *self.model.buffers())), torch.device("cpu"))

    def _on_device(self, given: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.to(self._device), given)

    def _storage(self, layout: PageLayout) -> HostKVStorageManager | None:
        if not isinstance(self._host, int):
            return self._host(layout)
        pages = self._host // (layout.page_size * layout.token_bytes)
        return HostKVStorageManager(MemoryStorage(layout, pages), pages) if pages else None

    def _check(self, users: Sequence[User], request: Request) -> None:
        lengths, histories = request.lengths, request.histories
        if len(users) != len(lengths):
            raise ValueError(f"serve: users has {len(users)} names, expected {len(lengths)}, one for each sequence")
        if len(users) > self.max_batch:
            raise ValueError(f"serve: users has {len(users)} names, expected at most max_batch, {self.max_batch}")
        for user, length, history in zip(users, lengths, histories, strict=True):
            if not 0 <= history <= length <= self.max_seq_len:
                raise ValueError(
                    f"serve: user {user!r} has {length} tokens and {length - history} candidates, expected at most "
                    f"max_seq_len, {self.max_seq_len}, and no more candidates than tokens"
                )

    def _compute(self, request: Request, batch: Batch) -> Answer:
        assert self._step is not None
        plan = Plan(request, batch)
        is_loading = "host" in batch.tiers
        size = self._graphs.size(request, plan) if self._graphs is not None else None
        if size is not None:
            assert self._graphs is not None
            replayed = self._graphs.replay(size, request, plan, batch.wait_layer if is_loading else None)
            outputs = self._step.cut(replayed, request, plan.num_rows)
            outputs = [x.clone() if isinstance(x, Tensor) else x for x in outputs]
        else:
            # What waits is called from compiled code, and is none of it.
            loading = waiting(torch.compiler.disable(batch.wait_layer)) if is_loading else contextlib.nullcontext()
            with loading:
                outputs = self._step.cut(self._launched(request, plan), request, plan.num_rows)
        return Answer(self._step.rebuild(outputs), torch.from_numpy(plan.rows()))

    def _launched(self, request: Request, plan: Plan) -> Sequence[Any]:
        assert self._step is not None and self._cache is not None
        tokens = request.offsets[-1]
        sequences = max(plan.num_sequences + (tokens < LEAST), LEAST)
        given = plan.tensors(max(plan.num_rows, LEAST), sequences, self._step, self._cache.max_pages)
        device = self._step.device
        planned = [x.to(device, non_blocking=True) for x in given]
        inputs = self._step.padding.pad(request.inputs, Rows(given[0], planned[0]), max(tokens, LEAST), sequences)
        moved = [x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in inputs]
        return self._launch(*moved, *planned)


def compiled(step: Step) -> Callable[..., Sequence[Any]]:
    """Inductor writes to the pools in place: a copy of one would miss what is loaded into it meanwhile."""
    run = torch.compile(step.graph.forward, fullgraph=True, dynamic=True, options=residual.hooks())

    def launch(*inputs: Any) -> Sequence[Any]:
        with sizes_apart():
            return run(*inputs)

    return launch
