"""A directory of a log on disk in memory, that forgets what was not synced when the power is cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from wbfuse.writeback.disk.format import Header

PAGE = 4096
SECTOR = 512


class SimChunk:
    """A file: what is in the page cache, and what is on the platter."""

    def __init__(self, size: int, steps: Callable[[], None]) -> None:
        self.cached = bytearray(size)
        self.durable = bytearray(size)
        self.dirty: set[int] = set()
        """Sectors that differ, or may."""
        self._steps = steps

    def write(self, buffers: Sequence[Any], at: int) -> None:
        data = b"".join(map(bytes, buffers))
        assert at + len(data) <= len(self.cached), "beyond the end of the chunk"
        self._steps()
        half = len(data) // 2
        self._put(data[:half], at)
        self._steps()  # a worker may die in the middle of it
        self._put(data[half:], at + half)
        self._steps()

    def write_pages(self, buffers: Sequence[Any], at: int) -> None:
        assert at % PAGE == 0
        assert all(len(b) % PAGE == 0 for b in buffers)
        self.write(buffers, at)

    def _put(self, data: bytes, at: int) -> None:
        self.cached[at : at + len(data)] = data
        if data:
            self.dirty.update(range(at // SECTOR, (at + len(data) - 1) // SECTOR + 1))

    def sync(self) -> None:
        self._steps()
        self.durable[:] = self.cached
        self.dirty.clear()
        self._steps()

    def close(self) -> None: ...

    def cut(self, rng: random.Random) -> None:
        """Of the sectors that were not synced any may be lost; those of a page mostly share their fate."""
        for page in {sector * SECTOR // PAGE for sector in self.dirty}:
            lost, torn = rng.random() < 0.5, rng.random() < 0.2
            for sector in range(page * PAGE // SECTOR, (page + 1) * PAGE // SECTOR):
                if rng.random() < 0.5 if torn else lost:
                    at = sector * SECTOR
                    self.cached[at : at + SECTOR] = self.durable[at : at + SECTOR]
        self.durable[:] = self.cached
        self.dirty.clear()


class SimDirectory:
    """As writer.Directory and load want it. The manifest is durable at once, as the real one is."""

    path = "simulated"
    trouble = ""

    def __init__(self, steps: Callable[[], None], fault: Callable[[], None]) -> None:
        self._steps = steps
        self._fault = fault
        self._manifest: dict[str, Any] | None = None
        self.newest_epoch = 0
        self.note = False
        """The source knows of it, durably."""
        self.gone = False
        """It was withdrawn, and no other has begun."""
        self.files: list[SimChunk] = []
        self._at: dict[tuple[int, int], SimChunk] = {}
        self._free: list[SimChunk] = []

    def look(self) -> None:
        """As directory.Directory does for each worker."""
        found, heads = {}, {}
        for file in self.files:
            header = Header.decode(bytes(file.cached[:PAGE]))
            if header is not None:
                found[header.epoch, header.number] = file
                heads[header.epoch] = max(heads.get(header.epoch, (0, 0)), (header.number, header.head))
        epoch = self._manifest["epoch"] if self._manifest else 0
        for (of, _), file in found.items():
            if of == epoch:
                file.sync()
        head = heads.get(epoch, (0, 0))[1]
        self._at = {key: file for key, file in found.items() if key[0] == epoch and key[1] >= head}
        self._free = [file for file in self.files if file not in self._at.values()]
        self.newest_epoch = max(heads, default=0)

    def damage(self, _manifest: dict[str, Any]) -> str:
        return ""

    def manifest(self) -> dict[str, Any] | None:
        return self._manifest

    def publish(self, manifest: dict[str, Any]) -> None:
        self._steps()
        self._fault()
        self._manifest = manifest
        self.gone &= not self.note
        self._steps()

    def withdraw(self) -> None:
        self._steps()
        self._fault()
        self._manifest = None
        self.gone = True
        self._steps()
        self.remove(self.chunks())

    def noted(self) -> bool:
        self._fault()
        return self.note

    def remember(self) -> None:
        self._steps()
        self._fault()
        self.note = True
        self.gone &= self._manifest is None
        self._steps()

    def forget(self) -> None:
        self._steps()
        self._fault()
        self.note = False
        self.gone = True
        self._steps()

    @property
    def counts(self) -> bool:
        return self.note and self._manifest is not None

    def chunks(self) -> list[tuple[int, int]]:
        return sorted(self._at)

    def create(self, epoch: int, number: int, size: int) -> SimChunk:
        self._fault()
        if not self._free:
            self.files.append(SimChunk(size, self._steps))
            self._free.append(self.files[-1])
        assert (epoch, number) not in self._at
        file = self._at[epoch, number] = self._free.pop()
        self._steps()
        return file

    def remove(self, chunks: Sequence[tuple[int, int]]) -> None:
        for chunk in list(chunks):
            self._steps()
            self._free.insert(0, self._at.pop(chunk))

    def views(self) -> Iterator[memoryview]:
        self.look()
        for chunk in self.chunks():
            yield memoryview(bytes(self._at[chunk].cached))

    def cut(self, rng: random.Random) -> None:
        for file in self.files:
            file.cut(rng)
