"""Pages on disk: a file an append, memory-mapped, with a checksum of every page; it survives a restart."""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_compile.kv_cache.layout import Key, PageLayout
from hstu_compile.kv_cache.storage import KVStorage, StorageError
from hstu_compile.ops.page_copies import HostPages

_MAGIC = b"HSTUKV01"
_START = struct.Struct("<8sII")  # magic, length and checksum of the header
_ALIGNMENT = 4096  # of the pages


@dataclass(frozen=True)
class _Extent:
    """A file: pages that were appended together, of which the first `count` are kept."""

    first: int
    count: int
    path: Path

    def kept(self, count: int) -> "_Extent":
        """The same file with fewer pages: their number is in its name, so that this is one atomic step."""
        path = self.path.with_name(f"{self.first:08d}-{count:08d}.kv")
        os.replace(self.path, path)
        return _Extent(self.first, count, path)


class DiskStorage(KVStorage):
    """Pages in files of a directory, a subdirectory a user.

    A file is complete before it has its name, and whatever is wrong with it later, after a crash for example, a
    checksum says so when it is read.

    Args:
        layout: the shape of a page.
        directory: made where it is not there; what another process with the same layout left in it is found.

    Raises:
        ValueError: the directory holds pages of another layout.
    """

    def __init__(self, layout: PageLayout, directory: str | Path) -> None:
        super().__init__(layout)
        self._root = Path(directory)
        self._root.mkdir(parents=True, exist_ok=True)
        described = {**asdict(layout), "dtype": str(layout.dtype)}
        path = self._root / "layout.json"
        if path.exists():
            if (found := json.loads(path.read_text())) != described:
                raise ValueError(f"DiskStorage: the layout of {self._root} is {found}, expected {described}")
        else:
            path.write_text(json.dumps(described))
        self._extents: dict[Key, list[_Extent]] = {}

    def scan(self) -> Iterable[tuple[Key, int]]:
        """Whatever does not continue the pages before it, or cannot be read, is deleted."""
        self._extents.clear()
        for folder in sorted(self._root.iterdir()):
            if not folder.is_dir():
                continue
            for path in sorted(folder.iterdir()):
                try:
                    first, count = map(int, path.stem.split("-"))
                    header, _ = _header(_mapped(path), path)
                    key = Key(*header["key"])
                    extents = self._extents.setdefault(key, [])
                    follows = first == sum(extent.count for extent in extents)
                    assert path.suffix == ".kv" and follows and 0 < count <= header["num_pages"]
                    extents.append(_Extent(first, count, path))
                except (StorageError, OSError, ValueError, AssertionError):
                    path.unlink()
        self._extents = {key: extents for key, extents in self._extents.items() if extents}
        return [(key, extents[-1].first + extents[-1].count) for key, extents in self._extents.items()]

    def append(self, key: Key, first_page: int, pages: HostPages) -> None:
        folder = self._root / sha256(json.dumps(key).encode()).hexdigest()[:32]
        folder.mkdir(exist_ok=True)
        count = len(pages.numbers)
        path = folder / f"{first_page:08d}-{count:08d}.kv"
        temporary = path.with_suffix(".part")
        layers, size = self.layout.num_layers, self.layout.layer_bytes
        room = -(-(200 + len(json.dumps(key)) + 12 * layers * count) // _ALIGNMENT) * _ALIGNMENT  # of the header
        with open(temporary, "wb+") as file:
            file.truncate(room + layers * count * size)
            mapped = mmap.mmap(file.fileno(), 0)
        data = self._tensor(mapped, room, layers * count).view(layers, count, *self.layout.shape)
        torch.index_select(pages.memory, 1, torch.from_numpy(pages.numbers), out=data)
        sums = [[_checksum(mapped, room + (i * count + p) * size, size) for p in range(count)] for i in range(layers)]
        header = json.dumps({"key": key, "num_pages": count, "data": room, "checksums": sums}).encode()
        assert _START.size + len(header) <= room
        mapped[: _START.size] = _START.pack(_MAGIC, len(header), zlib.crc32(header))
        mapped[_START.size : _START.size + len(header)] = header
        os.replace(temporary, path)
        self._extents[key] = [*self._extents.get(key, []), _Extent(first_page, count, path)]

    def read(self, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
        found = []
        size = self.layout.layer_bytes
        for extent in self._extents.get(key, []):
            count = min(extent.count, num_pages - extent.first)
            if count <= 0:
                break
            try:
                mapped = _mapped(extent.path)
                header, start = _header(mapped, extent.path)
            except (StorageError, OSError, ValueError) as error:
                raise StorageError(f"{extent.path}: {error}", valid_pages=extent.first) from error
            start += layer * header["num_pages"] * size
            for page, expected in enumerate(header["checksums"][layer][:count]):
                if _checksum(mapped, start + page * size, size) != expected:
                    message = f"{extent.path}: page {page} of layer {layer} is not what was written"
                    raise StorageError(message, valid_pages=extent.first + page)
            found.append(self._tensor(mapped, start, count))
        return found

    def truncate(self, key: Key, num_pages: int) -> None:
        kept = []
        for extent in reversed(self._extents.pop(key, [])):
            count = min(extent.count, num_pages - extent.first)
            if count <= 0:
                extent.path.unlink(missing_ok=True)
            else:
                kept.append(extent if count == extent.count else extent.kept(count))
        if kept:
            self._extents[key] = kept[::-1]

    def _tensor(self, mapped: mmap.mmap, start: int, pages: int) -> Tensor:
        layout = self.layout
        count = pages * layout.layer_bytes // layout.dtype.itemsize
        return torch.frombuffer(mapped, dtype=layout.dtype, count=count, offset=start).view(pages, *layout.shape)


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb+") as file:
        return mmap.mmap(file.fileno(), 0)


def _header(mapped: mmap.mmap, path: Path) -> tuple[dict[str, Any], int]:
    """What the file says about its pages, and where they begin."""
    magic, length, checksum = _START.unpack(mapped[: _START.size].ljust(_START.size))
    content = mapped[_START.size : _START.size + length]
    if magic != _MAGIC or zlib.crc32(content) != checksum:
        raise StorageError(f"{path}: the header is not what was written")
    header = json.loads(content)
    return header, header["data"]


def _checksum(mapped: mmap.mmap, start: int, size: int) -> int:
    return zlib.crc32(memoryview(mapped)[start : start + size])
