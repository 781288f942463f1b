"""The promises of the KV cache (docs/inference.md), and the ways in which such caches go wrong, each as a test."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hstu_compile.kv_cache import (
    CapacityError,
    DiskStorage,
    GpuKVCacheManager,
    HostKVStorageManager,
    Key,
    KVCache,
    MemoryStorage,
    PageLayout,
)
from hstu_compile.kv_cache.layout import PAGE_SIZES
from hstu_compile.kv_cache.onload import AtOnce
from hstu_compile.kv_cache.streams import Done
from tests.kv_cache_steps import LAYOUT, Later, PoisonedMemory, Server, evict, late_server, tokens

PAGE = LAYOUT.page_size


def state(server: Server) -> object:
    """All that a refused call must leave as it was."""
    gpu, host = server.cache.gpu, server.cache.host
    gpu.poll()
    if host is not None:
        host.poll()
    users = {key: (history.length, list(history.pages)) for key, history in gpu._histories.items()}
    stored = dict(host._users) if host is not None else {}
    return copy.deepcopy((users, sorted(gpu._free), list(gpu._recency.idle()), gpu.counters, stored))


# 1. Cached equals uncached.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_promise_1_what_is_cached_is_what_was_computed_bit_for_bit(page_size: int, dtype: torch.dtype) -> None:
    """From the GPU's pages, and from the host after eviction; the server compares every token it finds."""
    layout = PageLayout(2, 2, 8, page_size, dtype)
    server = late_server(layout.pages(600), MemoryStorage(layout, 100), layout)
    assert server.step([1], [300]).tiers == ["miss"]
    again = server.step([1], [301])
    assert (again.tiers, again.cached) == (["gpu"], [300])
    evict(server)
    from_host = server.step([1], [333])
    assert (from_host.tiers, from_host.cached) == (["host"], [301 // page_size * page_size])
    server.time_passes()
    assert not server.wrong


# 2. A page in the batch, in flight or referenced is never evicted or reused; over capacity changes nothing.


def test_promise_2_over_capacity_raises_before_any_state_changes() -> None:
    server = late_server(4, PoisonedMemory(LAYOUT, 10))
    server.step([1, 2], [PAGE, PAGE])
    server.time_passes()
    before = state(server)
    with pytest.raises(CapacityError, match="needs 4 pages besides the 1 that its users have"):
        server.cache.begin([1, 3], [2 * PAGE, 3 * PAGE], version=0)
    assert state(server) == before
    server.step([1, 3], [2 * PAGE, 2 * PAGE])  # fits, if user 2 goes
    assert server.cache.gpu.counters.evictions == 1 and not server.wrong


def test_promise_2_what_can_never_fit_is_not_waited_for() -> None:
    server = late_server(4)
    server.step([1], [2 * PAGE])  # under way
    with pytest.raises(CapacityError):
        server.cache.begin([2], [5 * PAGE], version=0)
    assert server.cache.gpu.counters.waits == 0 and server.cache.streams.compute.done == 0  # type: ignore[attr-defined]
    server.step([2], [4 * PAGE])
    assert server.cache.gpu.counters.waits == 1


def test_promise_2_referenced_users_are_not_evicted() -> None:
    server = late_server(4)
    for user in range(4):
        server.step([user], [PAGE])
    server.time_passes()
    server.cache.gpu.hold(Key(0, 0, 0))  # the least recently used
    server.step([5, 6], [PAGE, PAGE])
    server.time_passes()
    assert [server.cache.gpu.lookup(Key(user, 0, 0)) for user in range(4)] == [PAGE, 0, 0, PAGE]
    with pytest.raises(CapacityError):
        server.cache.begin([7], [4 * PAGE], version=0)
    server.cache.gpu.release(Key(0, 0, 0))
    server.step([7], [4 * PAGE])


def test_eviction_spares_the_users_of_the_batch_when_all_others_are_locked() -> None:
    server = late_server(4)
    server.step([1, 2], [2 * PAGE, PAGE])
    server.step([3], [PAGE])
    server.time_passes()
    server.cache.gpu.hold(Key(3, 0, 0))
    before = state(server)
    with pytest.raises(CapacityError):  # user 1 would be the one to evict
        server.cache.begin([1, 2], [2 * PAGE, 2 * PAGE], version=0)
    assert state(server) == before
    server.cache.gpu.release(Key(3, 0, 0))
    batch = server.step([1, 2], [2 * PAGE, 2 * PAGE])
    server.time_passes()
    assert batch.cached == [2 * PAGE, PAGE] and not server.wrong


def test_a_page_freed_between_match_and_use_is_not_possible() -> None:
    """The user matched is the least recently used, and the batch needs a page more than are free."""
    server = late_server(3)
    server.step([1], [PAGE])
    server.step([2], [2 * PAGE])
    server.time_passes()
    batch = server.step([1, 3], [PAGE, PAGE])
    server.time_passes()
    assert batch.cached == [PAGE, 0] and not server.wrong
    assert server.cache.gpu.lookup(Key(2, 0, 0)) == 0


# 3. free + owned + in flight = all: also after every operation of tests/test_kv_cache_states.py.


def test_promise_3_pages_add_up() -> None:
    server = late_server(8)
    gpu = server.cache.gpu

    def counts() -> tuple[int, int, int]:
        return gpu.num_free, gpu.num_owned, gpu.num_in_flight

    assert counts() == (8, 0, 0)
    batch = server.cache.begin([1, 2], [PAGE + 1, 0], version=0)
    assert counts() == (6, 0, 2)
    batch.commit()
    assert counts() == (6, 2, 0)
    server.cache.begin([1], [5 * PAGE], version=0).abort()
    assert counts() == (3, 2, 3)  # the aborted step may still write
    server.time_passes()
    gpu.poll()
    assert counts() == (6, 2, 0)


# 4. No read before its copy has landed, no overwrite before its copy out is done.


def test_promise_4_no_layer_is_read_before_its_copy_has_landed() -> None:
    server = late_server(4, PoisonedMemory(LAYOUT, 10))
    server.step([1], [3 * PAGE])
    evict(server)
    batch = server.cache.begin([1], [3 * PAGE + 1], version=0)
    pages = batch.page_table[0, :3].tolist()
    for layer in range(LAYOUT.num_layers):
        batch.wait_layer(layer)
        server.cache.streams.compute.advance(10**9)
        for later, pool in enumerate(server.cache.gpu.pools):
            landed = torch.equal(pool[pages].transpose(0, 1).flatten(1, 2), tokens(Key(1, 0, 0), later, 0, 3 * PAGE))
            assert landed == (later <= layer)  # and no more than what was waited for
    batch.commit()


def test_offload_is_ordered_after_compute() -> None:
    """The copy to the host could run before the step has written its tokens: the server is slow, the copy is not."""
    server = late_server(2, PoisonedMemory(LAYOUT, 10))
    server.step([1], [2 * PAGE])
    server.cache.streams.offload.advance(10**9)
    server.writer.run_all()
    evict(server)
    batch = server.step([1], [2 * PAGE])
    server.time_passes()
    assert batch.cached == [2 * PAGE] and not server.wrong


def test_pages_are_written_after_they_were_copied(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The thread that writes comes before any stream has done anything."""
    server = late_server(2, DiskStorage(LAYOUT, tmp_path))
    server.step([1], [2 * PAGE])
    server.writer.run_all()
    evict(server)
    assert server.step([1], [2 * PAGE]).tiers == ["host"]
    server.time_passes()
    assert not server.wrong


def test_eviction_waits_for_an_offload_in_flight() -> None:
    server = late_server(2, PoisonedMemory(LAYOUT, 10))
    server.step([1], [2 * PAGE])
    server.cache.streams.compute.advance(10**9)  # the step is over, the copy of its pages is not
    server.step([2], [2 * PAGE])
    assert server.cache.gpu.counters.waits == 1
    server.time_passes()
    assert server.step([1], [2 * PAGE]).tiers == ["host"]
    server.time_passes()
    assert not server.wrong


def test_eviction_prefers_users_without_an_offload_in_flight() -> None:
    server = late_server(4, PoisonedMemory(LAYOUT, 10))
    server.step([1], [2 * PAGE])
    server.time_passes()
    server.step([2], [2 * PAGE])
    server.cache.streams.compute.advance(10**9)
    server.step([3], [2 * PAGE])
    assert [server.cache.gpu.lookup(Key(user, 0, 0)) for user in (1, 2, 3)] == [0, 2 * PAGE, 2 * PAGE]
    assert server.cache.gpu.counters.waits == 0


def test_host_memory_is_not_overwritten_before_it_is_loaded() -> None:
    """A user is on their way to the GPU while others fill the host."""
    host = HostKVStorageManager(PoisonedMemory(LAYOUT, 4), 4, copier=AtOnce(), writer=Later())
    late = late_server(2)
    server = Server(KVCache(late.cache.gpu, host, max_batch_size=4, max_seq_len=64, streams=late.cache.streams))
    server.writer = host._writer  # type: ignore[assignment]
    server.step([1], [2 * PAGE])
    evict(server)
    assert server.step([1], [2 * PAGE]).tiers == ["host"]
    for user in range(2, 6):
        server.step([user], [2 * PAGE])
        server.cache.streams.offload.advance(10**9)  # what may be copied to the host is
        server.writer.run_all()
    server.time_passes()
    assert not server.wrong


def test_pages_of_an_aborted_step_are_not_reused_while_it_runs() -> None:
    server = late_server(4, PoisonedMemory(LAYOUT, 10))
    server.step([1], [2 * PAGE])
    evict(server)
    server.step([9], [1], version="other")  # the GPU is free again
    server.time_passes()
    server.step([2], [2 * PAGE], commit=False)  # may still write
    batch = server.cache.begin([1], [2 * PAGE], version=0)  # copies to the GPU at once
    server.cache.streams.onload.advance(10**9)
    server.compute(batch)
    batch.commit()
    server.time_passes()
    assert batch.tiers == ["host"] and not server.wrong


# 5. tests/test_kv_cache_loads.py. 6. tests/test_kv_cache_cuda.py.


# 7. Validated up front.


@pytest.mark.parametrize(
    "users, lengths, epochs, message",
    [
        ([1, 1], [50, 50], None, "user 1 is twice in the batch"),
        ([1], [2 * PAGE - 1], None, "length of user 1 is 31, expected at least the 32 tokens that are cached"),
        ([3], [2 * PAGE], None, "length of user 3 is 32, expected at least the 48 tokens that are stored"),
        ([2], [-1], None, "length of user 2 is -1"),
        ([2], [601], None, "length of user 2 is 601, expected at most 600"),
        ([2, 4], [5], None, "lengths has 1 items, expected 2"),
        ([2], [5], [1, 2], "epochs has 2 items, expected 1"),
        ([2, 4, 5, 6, 7], [1] * 5, None, "5 users, expected at most max_batch_size, 4"),
        ([2.5], [5], None, "user is 2.5, expected an int or a string"),
        ([2], [5], [None], "epoch is None, expected an int or a string"),
    ],
)
def test_promise_7_arguments_are_validated_up_front(users, lengths, epochs, message: str) -> None:  # type: ignore[no-untyped-def]
    server = late_server(3, PoisonedMemory(LAYOUT, 10))
    server.step([3], [3 * PAGE])
    server.time_passes()
    server.step([1], [2 * PAGE])  # and evicts 3, into the host
    server.time_passes()
    before = state(server)
    with pytest.raises(ValueError, match=message):
        server.cache.begin(users, lengths, version=0, epochs=epochs)
    assert state(server) == before


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_promise_7_every_page_size_at_empty_histories_and_exact_multiples(page_size: int) -> None:
    layout = PageLayout(2, 1, 2, page_size, torch.float32)
    server = late_server(8, PoisonedMemory(layout, 20), layout)
    for length in (0, 0, 1, page_size - 1, page_size, page_size, page_size + 1, 2 * page_size):
        batch = server.step(["user", "empty"], [length, 0])
        server.time_passes()
        assert server.cache.gpu.num_owned == layout.pages(length)
        assert (batch.page_table[0, layout.pages(length) :] == -1).all() and (batch.page_table[1:] == -1).all()
    server.time_passes()
    assert not server.wrong
    assert server.cache.host is not None and server.cache.host.lookup(Key("user", 0, 0)) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PageLayout(1, 1, 8, page_size=17), "page_size is 17, expected one of"),
        (lambda: PageLayout(1, 0, 8), "num_heads is 0, expected a positive number"),
        (lambda: GpuKVCacheManager(LAYOUT, 0, "cpu"), "num_pages is 0"),
        (lambda: MemoryStorage(LAYOUT, 0), "num_pages is 0"),
        (lambda: HostKVStorageManager(MemoryStorage(LAYOUT, 1), 0), "capacity_pages is 0"),
        (lambda: KVCache(GpuKVCacheManager(LAYOUT, 1, "cpu"), max_batch_size=0, max_seq_len=1), "max_batch_size is 0"),
        (
            lambda: KVCache(
                GpuKVCacheManager(LAYOUT, 1, "cpu"),
                HostKVStorageManager(MemoryStorage(PageLayout(1, 1, 8), 1), 1),
                max_batch_size=1,
                max_seq_len=1,
            ),
            "the layout of host is",
        ),
    ],
)
def test_sizes_are_validated(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# 8. The key is (user, weights version, history epoch).


def test_promise_8_a_reload_under_new_weights_meets_nothing() -> None:
    server = late_server(4, PoisonedMemory(LAYOUT, 20))
    server.step([1], [2 * PAGE], version="monday")
    assert server.step([1], [2 * PAGE], version="tuesday").tiers == ["miss"]
    evict(server)
    assert server.step([1], [2 * PAGE], version="wednesday").tiers == ["miss"]
    assert server.step([1], [2 * PAGE], version="monday").tiers == ["host"]
    assert server.step([1], [PAGE], version="monday", epochs=["rewritten"]).tiers == ["miss"]
    assert server.step(["1"], [2 * PAGE], version="monday").tiers == ["miss"]
    server.time_passes()
    assert not server.wrong


# 9. Counters per tier. 10. What was found where, for those who measure.


def test_promise_9_counters_of_each_tier() -> None:
    server = late_server(2, PoisonedMemory(LAYOUT, 4))
    host = server.cache.host
    assert host is not None
    host.capacity_pages = 4
    page_bytes = LAYOUT.layer_bytes * LAYOUT.num_layers
    for user, tier in ((1, "miss"), (1, "gpu"), (2, "miss"), (1, "host"), (3, "miss")):
        assert server.step([user], [2 * PAGE]).tiers == [tier]
        server.time_passes()
    gpu = server.cache.counters["gpu"]
    assert (gpu.hits, gpu.misses, gpu.evictions, gpu.waits, gpu.failures) == (1, 4, 3, 0, 0)
    assert (gpu.bytes_read, gpu.bytes_written) == (2 * page_bytes, 6 * page_bytes)
    assert gpu.hit_rate == 0.2


# Who stays on the host.


def host_lookups(server: Server, *users: int) -> list[int]:
    server.time_passes()
    assert server.cache.host is not None
    return [server.cache.host.lookup(Key(user, 0, 0)) for user in users]


def test_users_in_use_on_the_gpu_stay_on_the_host() -> None:
    server = late_server(20, PoisonedMemory(LAYOUT, 5))
    server.cache.host.capacity_pages = 5  # type: ignore[union-attr]
    server.step([1], [2 * PAGE])
    server.step([2], [2 * PAGE])
    assert host_lookups(server, 1, 2) == [2, 2]
    server.step([1], [2 * PAGE + 1])  # nothing of it is to be stored
    server.step([3], [2 * PAGE])
    assert host_lookups(server, 1, 2, 3) == [2, 0, 2]
    assert server.cache.counters["host"].evictions == 1


def test_a_user_larger_than_the_host_evicts_nobody() -> None:
    server = late_server(20, PoisonedMemory(LAYOUT, 5))
    server.cache.host.capacity_pages = 5  # type: ignore[union-attr]
    server.step([1], [2 * PAGE])
    server.time_passes()
    server.step([2], [6 * PAGE])
    assert host_lookups(server, 1, 2) == [2, 0]
    host = server.cache.counters["host"]
    assert (host.evictions, host.failures) == (0, 1)


def test_what_cannot_be_written_now_is_stored_the_next_time() -> None:
    server = late_server(20, PoisonedMemory(LAYOUT, 10))
    server.cache.host.max_writing_pages = 3  # type: ignore[union-attr]
    server.step([1, 2], [2 * PAGE, 2 * PAGE])
    assert host_lookups(server, 1, 2) == [2, 0]
    server.step([1, 2], [2 * PAGE, 3 * PAGE])
    assert host_lookups(server, 1, 2) == [2, 3]


# The protocol.


def test_one_batch_is_open_at_a_time_and_ends_once() -> None:
    server = late_server(4)
    with server.cache.begin([1], [5], version=0) as batch:
        with pytest.raises(RuntimeError, match="begin\\(\\) while a batch is open"):
            server.cache.begin([2], [5], version=0)
        with pytest.raises(ValueError, match="layer is 3, expected 0 to 2"):
            batch.wait_layer(3)
    assert server.cache.gpu.lookup(Key(1, 0, 0)) == 0  # it was not committed
    for end in (batch.commit, batch.abort, batch.rollback, lambda: batch.wait_layer(0)):
        with pytest.raises(RuntimeError, match="committed or aborted"):
            end()


def test_tables_keep_their_addresses_and_are_empty_behind_the_batch() -> None:
    server = late_server(8)
    big = server.step([1, 2, 3], [20, 20, 20])
    server.time_passes()
    small = server.step([1], [20])
    server.time_passes()
    assert big.page_table.data_ptr() == small.page_table.data_ptr() and small.page_table.shape == (4, 38)
    assert big.page_table.data_ptr() % 16 == 0  # other addresses are another kernel, and launched anew each time
    assert big.cached_lengths.data_ptr() == small.cached_lengths.data_ptr() == server.cache.cached_lengths.data_ptr()
    assert small.cached_lengths.tolist() == [20, 0, 0, 0] and (small.page_table[1:] == -1).all()
    assert small.pool(1) is server.cache.gpu.pools[1]


def test_a_plan_leaves_the_tables_to_the_caller() -> None:
    """What `fill` writes, of more users than there are, is what `begin` publishes."""
    server = late_server(8)
    server.step([1, 2], [20, 3])
    server.time_passes()
    tables, before = (server.cache.page_table, server.cache.cached_lengths), server.cache.page_table.clone()
    with server.cache.plan([2, 1], [40, 20], version=0) as batch:
        mine = [np.full(x[:3].shape, 7, np.int32) for x in tables]
        batch.fill(*mine)
        server.time_passes()
        assert torch.equal(server.cache.page_table, before)
        batch.publish()
        server.time_passes()
    assert all(np.array_equal(own, x[:3].numpy()) for own, x in zip(mine, tables, strict=True))
    assert mine[1].tolist() == [3, 20, 0] and not torch.equal(server.cache.page_table, before)


def test_an_aborted_step_leaves_every_user_as_before() -> None:
    server = late_server(8, PoisonedMemory(LAYOUT, 10))
    server.step([1], [PAGE + 3])
    server.time_passes()
    server.step([1, 2], [3 * PAGE, PAGE], commit=False)
    server.time_passes()
    assert server.step([1, 2], [2 * PAGE, PAGE]).cached == [PAGE + 3, 0]
    server.time_passes()
    assert not server.wrong


def test_managers_refuse_a_user_in_two_open_batches() -> None:
    gpu = GpuKVCacheManager(LAYOUT, 4, "cpu")
    key = Key(1, 0, 0)
    first = gpu.allocate([key], [5])
    with pytest.raises(ValueError, match="in a batch that is open"):
        gpu.allocate([key], [6])
    gpu.abort(first, Done())
    gpu.commit(gpu.allocate([key], [6]), Done())
    assert gpu.lookup(key) == 6


def test_threads_of_its_own_and_close() -> None:
    """On the CPU with plain streams, as it comes."""
    host = HostKVStorageManager(MemoryStorage(LAYOUT, 20), 20)
    server = Server(KVCache(GpuKVCacheManager(LAYOUT, 4, "cpu"), host, max_batch_size=2, max_seq_len=64))
    for user in range(4):
        server.step([user], [2 * PAGE])
        host.drain()
    assert server.step([0, 1], [2 * PAGE, 2 * PAGE]).tiers == ["host", "host"]
    server.cache.close()
    assert host.counters.bytes_read == 4 * LAYOUT.num_layers * LAYOUT.layer_bytes and not server.wrong
