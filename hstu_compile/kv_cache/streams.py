"""Where copies run: CUDA streams, and on the CPU the same interface over plain calls."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Protocol

import torch


class Event(Protocol):
    """A point in the work of a stream; torch.cuda.Event is one."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Stream(Protocol):
    """Work that runs in order, later than it is given."""

    def run(self, work: Callable[[], object]) -> None: ...
    def record(self) -> Event: ...
    def wait(self, event: Event) -> None: ...


class Done:
    """The event of work that is over."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


@dataclass(frozen=True)
class AllOf:
    """The event of several."""

    events: Sequence[Event]

    def query(self) -> bool:
        return all(event.query() for event in self.events)

    def synchronize(self) -> None:
        for event in self.events:
            event.synchronize()


@dataclass(frozen=True)
class Finished:
    """The event of a thread's work being over."""

    future: Future[None]

    def query(self) -> bool:
        return self.future.done()

    def synchronize(self) -> None:
        wait([self.future])


class PlainStream:
    """The CPU: what is given has run."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def record(self) -> Event:
        return Done()

    def wait(self, event: Event) -> None:
        event.synchronize()


class CudaStream:
    """A CUDA stream; without one, whichever is torch's current one at the call."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> Event:
        event = torch.cuda.Event(blocking=True)  # threads that wait for it leave the core to others
        event.record(self._now())
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._now().wait_event(event)

    def _now(self) -> torch.cuda.Stream:
        return self._stream if self._stream is not None else torch.cuda.current_stream(self._device)


@dataclass(frozen=True)
class Streams:
    """The stream that computes, and those of what comes from the host and goes there."""

    compute: Stream
    onload: Stream
    offload: Stream

    @classmethod
    def on(cls, device: torch.device) -> "Streams":
        if device.type != "cuda":
            return cls(*(PlainStream() for _ in range(3)))
        return cls(CudaStream(device), *(CudaStream(device, torch.cuda.Stream(device)) for _ in range(2)))


class InFlight:
    """Work under way, and what is to be done once it is over."""

    def __init__(self) -> None:
        self._items: list[tuple[Event, Callable[[], None]]] = []

    def add(self, event: Event, then: Callable[[], None]) -> None:
        self._items.append((event, then))

    def poll(self) -> None:
        """Do what is due; waits for nothing."""
        items, self._items = self._items, []
        for event, then in items:
            if event.query():
                then()
            else:
                self._items.append((event, then))

    def wait_for_oldest(self) -> bool:
        """Wait for the work that began first, and do what is due then. False: there is none."""
        if self._items:
            self._items[0][0].synchronize()
            self.poll()
            return True
        return False
