"""What a GPU does in a request of users who are loaded from host memory: copies of the next layers under compute.

    python -m bench.inference_timeline --batch 8 --seq-len 2048

PyTorch's profiler records one request of the model of bench/inference_e2e.py, replayed layer by layer. A lane is a
stream; intervals less than 5 us apart are one.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.inference_e2e import Ways
from bench.inference_problem import NUM_ITEMS, Sizes, Way, add_arguments, latency, record, row, shape_of

GAP = 5e-3  # ms


def lanes(events: Iterable[Any]) -> list[tuple[str, list[list[float]]]]:
    """Each stream with its intervals in ms from the first one on, by what takes most of its time; see `directed`."""
    found: dict[int, list[Any]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA and event.time_range.end > event.time_range.start:
            found.setdefault(event.device_resource_id, []).append(event)
    begin = min(event.time_range.start for stream in found.values() for event in stream)
    named = []
    for stream in found.values():
        times = [(e.time_range.start - begin, e.time_range.end - begin, "copy_pages" in e.name) for e in stream]
        copies = sum(end - start for start, end, is_copy in times if is_copy)
        name = "onload" if copies > 0.5 * sum(end - start for start, end, _ in times) else "compute"
        named.append((name, joined((1e-3 * start, 1e-3 * end) for start, end, _ in times)))
    return directed(named)


def directed(lanes: Iterable[tuple[str, list[list[float]]]]) -> list[tuple[str, list[list[float]]]]:
    """One kernel copies both ways: what copies first is `onload`, and another stream that does so `offload`."""
    found = sorted(lanes, key=lambda lane: (lane[0] != "onload", lane[1]))
    return [("offload" if name == "onload" and i else name, intervals) for i, (name, intervals) in enumerate(found)]


def joined(intervals: Iterable[tuple[float, float]]) -> list[list[float]]:
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start - merged[-1][1] <= GAP:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def overlap(ours: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """How long both are busy."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in ours for b in others)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--history", type=int, default=128, help="new tokens of it in a request")
    parser.add_argument("--candidates", type=int, default=256)
    add_arguments(parser)
    args = parser.parse_args(argv)
    shape, sizes = shape_of(args), Sizes(args.batch, args.seq_len, args.history + args.candidates, args.candidates)
    way = Way("cached", cuda_graph=True, tier="host")
    with torch.no_grad():
        items = torch.randint(NUM_ITEMS, (sizes.batch, sizes.seq_len))
        prepare = Ways(shape, [sizes], args.device).of(sizes, items)[way]
        found = latency(prepare, args.device, args.warm_up, args.rounds)
        answer = prepare(args.warm_up + 2 * args.rounds)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            answer()
            torch.cuda.synchronize()
    known = lanes(profiler.events())
    rows = [
        {**row(shape, sizes, way, found, args.device), "lane": name, "intervals": intervals}
        for name, intervals in known
    ]
    both = {
        name: sorted(i for other, intervals in known for i in intervals if other == name)
        for name in ("onload", "compute")
    }
    for name, intervals in both.items():
        print(f"{name}: busy {sum(end - start for start, end in intervals):.2f} ms of {intervals[-1][1]:.2f}")
    print(f"both at a time: {overlap(both['onload'], both['compute']):.2f} ms")
    record(args.json, "timeline", rows)


if __name__ == "__main__":
    main()
