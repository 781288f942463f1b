"""The KV cache's bookkeeping keeps up with serving: bench/kv_cache.py prints the figures."""

from bench.kv_cache import operations_per_second


def test_lookups_and_allocations_of_many_users() -> None:
    """100 000 users, a million pages, on one core. Time of this process, so that others on the machine do not count."""
    rate = 0.0
    for seed in range(3):
        rate = max(rate, operations_per_second(100_000, 1_000_000, steps=2500, seed=seed))
        if rate >= 50_000:
            return
    raise AssertionError(f"{rate:.0f} lookups and allocations a second, expected 50 000")
