"""Random steps, evictions, delays, failures: pages add up, users are what they were, and every token read is right."""

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.kv_cache_traffic import Traffic

HOST_PAGES = [0, 5, 40]
RANDOMS = st.randoms(use_true_random=False)


class KVCacheMachine(RuleBasedStateMachine):
    traffic: Traffic | None = None

    @initialize(host_pages=st.sampled_from(HOST_PAGES))
    def start(self, host_pages: int) -> None:
        self.traffic = Traffic(host_pages)

    @rule(rng=RANDOMS)
    def step(self, rng: Random) -> None:
        assert self.traffic is not None
        self.traffic.step(rng)
        self.traffic.check()

    @rule(rng=RANDOMS)
    def something_else(self, rng: Random) -> None:
        assert self.traffic is not None
        self.traffic.something_else(rng)
        self.traffic.check()

    def teardown(self) -> None:
        if self.traffic is not None:
            self.traffic.end()


TestKVCacheStates = KVCacheMachine.TestCase
TestKVCacheStates.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("host_pages", HOST_PAGES)
def test_long_traffic(host_pages: int) -> None:
    """As above, for long, and in the end everything there is to see has been seen."""
    traffic, rng = Traffic(host_pages), Random(0)
    for _ in range(1000):
        traffic.step(rng)
        traffic.something_else(rng)
        traffic.check()
    traffic.end()
    gpu = traffic.cache.counters["gpu"]
    assert min(gpu.hits, gpu.misses, gpu.evictions, gpu.waits) > 30
    if host_pages:
        host = traffic.cache.counters["host"]
        assert min(host.hits, host.misses, host.evictions, host.waits, host.failures) > 30
