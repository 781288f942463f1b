"""The bookkeeping of the KV cache: lookups and allocations a second on one core.

python -m bench.kv_cache [--users 100000] [--pages 1000000] [--steps 20000]
"""

import argparse
import random
import time

import torch

from hstu_compile.kv_cache import GpuKVCacheManager, Key, PageLayout
from hstu_compile.kv_cache.streams import Done

BATCH = 8


def operations_per_second(num_users: int, num_pages: int, steps: int, seed: int = 0) -> float:
    """Steps of 8 users with 1 to 20 pages each, looked up, allocated and committed; users a second of the core's time.

    All pages are taken before, so that every allocation evicts.
    """
    layout = PageLayout(num_layers=1, num_heads=1, head_dim=1, page_size=16, dtype=torch.float16)
    gpu = GpuKVCacheManager(layout, num_pages, "cpu")
    keys = [Key(user, 0, 0) for user in range(num_users)]
    each = num_pages // num_users * layout.page_size
    for first in range(0, num_users, BATCH):
        batch = keys[first : first + BATCH]
        gpu.commit(gpu.allocate(batch, [each] * len(batch)), Done())
    rng = random.Random(seed)
    batches = [[keys[user] for user in rng.sample(range(num_users), BATCH)] for _ in range(steps)]
    new_tokens = [rng.randint(1, 20 * layout.page_size) for _ in range(BATCH)]
    start = time.process_time()
    for batch in batches:
        lengths = [gpu.lookup(key) + new for key, new in zip(batch, new_tokens, strict=True)]
        gpu.commit(gpu.allocate(batch, lengths), Done())
    seconds = time.process_time() - start
    assert gpu.counters.evictions > 0 and gpu.num_owned + gpu.num_free == num_pages
    return steps * BATCH / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Bookkeeping of the KV cache, on one core.")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    for users, pages in ((args.users // 100, args.pages // 100), (args.users, args.pages)):
        rate = operations_per_second(users, pages, args.steps)
        print(f"{users} users, {pages} pages: {rate:,.0f} lookups and allocations a second")


if __name__ == "__main__":
    main()
