"""Triton launches, and how the same launch is done for other tensors without Triton's search for the compiled kernel.

`Launch` calls a kernel the public way. `Relaunch` has Triton say what it hands to its launcher in C, and from then on
hands over the same with other addresses, sizes, programs and stream; a `Plan` is those of one call, and holds what they
write besides results in one allocation. That takes private parts of
`triton.backends.nvidia.driver`, read in triton 3.6, 3.7 and 3.9: `CudaLauncher.launch` gets the grid (3 numbers), the
stream, and more; `wrap_handle_tensordesc` puts what encodes descriptors before the `launcher` in C, which its closure
holds. Where they are not as they were, the public way is left.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

ALIGNMENT = 16  # bytes: Triton compiles a kernel for pointers that are multiples of it, and another one for others
MAX_SIZE = 2**31 - 1  # larger integers have another type in the kernel
MAX_KNOWN = 256  # kinds of calls; sets of addresses that one launch's descriptors are encoded for
PIECE = 512  # bytes, of which the pieces of a workspace are multiples, as PyTorch's allocations are


class Extent(NamedTuple):
    """What calls of one kind may differ in: jagged batches have other numbers at every step."""

    rows: int
    sequences: int = 0
    max_seq_len: int = 0


class Launch(NamedTuple):
    """One kernel with everything it is called with.

    sizes: for an extent, the programs, and the arguments that go by it, by name; None where nothing does.
    """

    kernel: Any
    programs: int
    arguments: tuple
    constants: dict[str, Any]
    sizes: Callable[[Extent], tuple[int, dict[str, int]]] | None = None

    def __call__(self) -> Any:
        """Returns the compiled kernel; None where there is nothing to do."""
        return self.kernel[(self.programs,)](*self.arguments, **self.constants) if self.programs else None

    def sizes_for(self, extent: Extent) -> tuple[int, dict[str, int]]:
        return (self.programs, {}) if self.sizes is None else self.sizes(extent)


Shape = tuple[int, ...] | Callable[[Extent], tuple[int, ...]]  # or what it is for an extent


class Workspace:
    """What launches write besides results: tensors here, pieces of one allocation where the launches are done again."""

    def __init__(self, device: torch.device, extent: Extent) -> None:
        self.device, self.extent = device, extent
        self.tensors: list[Tensor] = []
        self.pieces: list[tuple[Shape, int]] = []  # and bytes of an element

    def empty(self, dtype: torch.dtype, shape: Shape) -> Tensor:
        """Uninitialised; in use until the last of the launches."""
        self.pieces.append((shape, dtype.itemsize))
        self.tensors.append(torch.empty(shape_for(shape, self.extent), dtype=dtype, device=self.device))
        return self.tensors[-1]


def shape_for(shape: Shape, extent: Extent) -> tuple[int, ...]:
    return shape(extent) if callable(shape) else shape


def offsets_of(pieces: list[tuple[Shape, int]], extent: Extent) -> list[int]:
    """Where each piece of a workspace begins, in bytes; at the end, how many there are in all."""
    sizes = [prod(shape_for(shape, extent)) * itemsize for shape, itemsize in pieces]
    return list(itertools.accumulate((-(-size // PIECE) * PIECE for size in sizes), initial=0))


class Place(NamedTuple):
    """Stands for an argument that changes: the address of a tensor, by its number, or a size, by its name."""

    key: Any


PROGRAMS, STREAM = Place("programs"), Place("stream")


class Base(NamedTuple):
    """As much of a descriptor's tensor as its encoding asks for."""

    key: int
    now: threading.local  # holds `pointers`

    def data_ptr(self) -> int:
        return self.now.pointers[self.key]


class Relaunch:
    """A launch with places; an exception where only the public way is left. It keeps no tensor alive."""

    def __init__(
        self, launch: Launch, compiled: Any, tensors: Sequence[Tensor | None], pointers: list[int], extent: Extent
    ) -> None:
        from triton.backends.nvidia import driver

        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
            raise NotImplementedError("a kernel that takes more than its arguments")
        self.compiled = compiled  # unloads its code when it goes
        self.programs, self.sizes = launch.programs, launch.sizes
        self.now = threading.local()
        self.parameters = with_places(launch, tensors, extent)
        descriptors = [x for x in self.parameters if is_descriptor(x)]
        self.bases = [x.base.key for x in descriptors]
        for x in descriptors:
            x.base = Base(x.base.key, self.now)
        in_c = inspect.getclosurevars(launcher.launch).nonlocals["launcher"] if self.bases else launcher.launch
        self.before_c = copy.copy(launcher)
        self.before_c.launch = driver.wrap_handle_tensordesc(
            self._hear, compiled.src.signature, getattr(compiled.metadata, "tensordesc_meta", None)
        )
        self.encoded: dict[tuple[int, ...], list] = {}
        self._encode(pointers)
        self.function, self.numbers = written(in_c, self.now.said)

    def resized(self, extent: Extent) -> tuple[int, list[int]]:
        """Programs, and the arguments that go by the extent, in the order of `numbers`."""
        programs, sizes = (self.programs, {}) if self.sizes is None else self.sizes(extent)
        return programs, [sizes[name] for name in self.numbers]

    def __call__(self, pointers: list[int], programs: int, numbers: list[int], stream: int) -> None:
        encoded = self.encoded.get(tuple([pointers[i] for i in self.bases]))
        if encoded is None:
            encoded = self._encode(pointers)
        self.function(pointers, encoded, programs, stream, *numbers)

    def _encode(self, pointers: list[int]) -> list:
        """Objects that go to C, of which descriptors are for these addresses."""
        self.now.pointers = pointers
        kernel = (self.compiled.function, self.compiled.packed_metadata, None, None, None)  # no hooks
        self.before_c(PROGRAMS, 1, 1, STREAM, *kernel, *self.parameters)
        if len(self.encoded) >= MAX_KNOWN:
            self.encoded.clear()
        objects = self.encoded[tuple([pointers[i] for i in self.bases])] = list(objects_in(self.now.said))
        return objects

    def _hear(self, *said: Any) -> None:
        self.now.said = said


LITERALS = (int, bool, type(None))


def objects_in(x: Any) -> Iterator[Any]:
    """All but places and literals."""
    if type(x) in (tuple, list):
        yield from itertools.chain.from_iterable(map(objects_in, x))
    elif type(x) not in (Place, *LITERALS):
        yield x


def written(launcher: Callable[..., None], said: tuple) -> tuple[Callable[..., None], list[str]]:
    """launcher(*said) as a function, compiled: of addresses, objects, programs, stream and further numbers, by name."""
    numbers: list[str] = []
    objects = itertools.count()

    def text(x: Any) -> str:
        if type(x) in (tuple, list):
            items = "".join(f"{text(item)}, " for item in x)
            return f"({items})" if type(x) is tuple else f"[{items}]"
        if type(x) is not Place:
            return repr(x) if type(x) in LITERALS else f"objects[{next(objects)}]"
        if isinstance(x.key, int):
            return f"pointers[{x.key}]"
        if x not in (PROGRAMS, STREAM) and x.key not in numbers:
            numbers.append(x.key)
        return f"number_{x.key}"

    call = f"launcher{text(said)}"
    names = ", ".join(f"number_{name}" for name in (PROGRAMS.key, STREAM.key, *numbers))
    return eval(f"lambda pointers, objects, {names}: {call}", {"launcher": launcher}), numbers


class Sized(NamedTuple):
    """A plan for one extent."""

    extent: Extent | None
    offsets: list[int]  # of the pieces of the workspace
    workspace: int  # bytes
    launches: list[tuple[Relaunch, int, list[int]]]  # with programs and numbers, if there are programs


class Plan:
    """All launches of a call, done again for other addresses and another extent."""

    def __init__(self, relaunches: list[Relaunch], workspace: Workspace) -> None:
        self.relaunches = relaunches
        self.pieces = workspace.pieces
        self.sized = Sized(None, [], 0, [])  # the layers of a model have one extent

    def __call__(self, pointers: list[int], extent: Extent, stream: int, device: torch.device) -> None:
        sized = self.sized
        if sized.extent != extent:
            sized = self.sized = self._for(extent)
        if sized.offsets:
            workspace = torch.empty(sized.workspace, dtype=torch.uint8, device=device)
            base = workspace.data_ptr()
            pointers += [base + offset for offset in sized.offsets]
        for relaunch, programs, numbers in sized.launches:
            relaunch(pointers, programs, numbers, stream)

    def _for(self, extent: Extent) -> Sized:
        *offsets, end = offsets_of(self.pieces, extent)
        launches = [(relaunch, *relaunch.resized(extent)) for relaunch in self.relaunches]
        return Sized(extent, offsets, end, [launch for launch in launches if launch[1]])


def is_descriptor(x: Any) -> bool:
    return hasattr(x, "block_shape")


def with_places(launch: Launch, tensors: Sequence[Tensor | None], extent: Extent) -> list:
    """What the kernel is called with, in the order of its parameters."""
    number = {id(t): Place(i) for i, t in enumerate(tensors) if t is not None}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    _, sizes = launch.sizes_for(extent)

    def placed(x: Any) -> Any:
        if isinstance(x, Tensor):
            return number[id(x)]
        if is_descriptor(x):
            return dataclasses.replace(x, base=number[id(x.base)])
        return tuple(map(placed, x)) if isinstance(x, tuple) else x

    parameters = []
    for p in launch.kernel.params:
        if p.name in sizes and not (p.do_not_specialize and given[p.name] == sizes[p.name]):
            raise ValueError(f"{p.name} is not a size")
        parameters.append(Place(p.name) if p.name in sizes else placed(given[p.name]))
    return parameters


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; without a GPU, in the Triton interpreter, one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def run(
    memory: dict[Hashable, Plan | bool | None] | None,
    key: Hashable,
    tensors: Sequence[Tensor | None],
    extent: Extent,
    launches: Callable[[Workspace], list[Launch]],
) -> None:
    """Do the launches, on the device of tensors[0] and the current stream there.

    memory: of launches that were done twice before under the same key, and differ at most in addresses, the extent and
        what is in memory. Whether an address is aligned is found out here.
    tensors: all that the launches refer to, but for the workspace that they ask for.
    """
    device = tensors[0].device
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    together = 0
    for pointer in pointers:
        together |= pointer
    if together % ALIGNMENT:
        key = key, *[pointer % ALIGNMENT == 0 for pointer in pointers]
    again = memory is not None and may_relaunch(extent)
    plan = memory.get(key) if again else None
    if plan and torch.cuda.current_device() == device.index:
        plan(pointers, extent, triton.runtime.driver.active.get_current_stream(device.index), device)
        return
    workspace = Workspace(device, extent)
    with torch.cuda.device_of(tensors[0]):
        todo = launches(workspace)
        compiled = [launch() for launch in todo]
    given = [id(t) for t in tensors if t is not None]
    distinct = len(set(given)) == len(given)  # of a tensor in two roles nobody knows which one an argument is
    if not again or plan is not None or None in compiled or not distinct:
        return
    if len(memory) >= MAX_KNOWN:
        memory.clear()
    if key not in memory:  # it may never come again
        memory[key] = None
    else:
        memory[key] = plan_of(todo, compiled, [*tensors, *workspace.tensors], workspace)


def plan_of(
    launches: list[Launch], compiled: list[Any], tensors: Sequence[Tensor | None], workspace: Workspace
) -> Plan | bool:
    """False where only the public way is left."""
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    try:
        each = zip(launches, compiled, strict=True)
        return Plan([Relaunch(*one, tensors, pointers, workspace.extent) for one in each], workspace)
    except (AttributeError, LookupError, TypeError, ValueError, NotImplementedError):
        return False


def may_relaunch(extent: Extent) -> bool:
    """Whether sizes have the type that kernels are compiled for, and nobody wants to hear of launches."""
    hooks = triton.knobs.runtime
    return max(extent) <= MAX_SIZE and not is_hooked(hooks.launch_enter_hook) and not is_hooked(hooks.launch_exit_hook)


def is_hooked(hook: Any) -> bool:
    """A chain of hooks, or one, or None."""
    return hook is not None and bool(getattr(hook, "calls", True))
