"""From a log on disk to memory files that a worker can go on with, as if they had been kept."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from wbfuse.journal import Journal
from wbfuse.journal import Kind as Entry
from wbfuse.writeback import records
from wbfuse.writeback.disk.directory import Directory
from wbfuse.writeback.disk.format import DamagedError, Frame, Image, Kind, read, whole_pages
from wbfuse.writeback.log import Geometry, Log, LogError

KEPT = (Entry.COUNTER, Entry.NODE, Entry.DIRTY, Entry.SESSION, Entry.LOG, Entry.ERROR)
"""What a mount that is made anew needs to know; requests and handles ended with the kernel's side of the old one."""


@dataclass(slots=True)
class Loaded:
    """Descriptors of the memory files, owned by who asked."""

    log: int
    journal: int
    dirty: int
    """Files that have what the store has not."""
    warning: str
    """What of the log could not be read."""


def load(
    directory: Directory, adapt: Callable[[dict[int, bytes]], None] = lambda _table: None, lenient: bool = False
) -> Loaded | None:
    """What a log on disk holds; None where there is none. `adapt` may change the journal's table.

    Raises LogError; of a damaged one only where not `lenient`.
    """
    manifest = directory.manifest()
    if manifest is None:
        return None
    try:
        damage = directory.damage(manifest)
        if damage and not lenient:
            raise DamagedError(damage)
        image = read(directory.views(), manifest["epoch"], uuid.UUID(manifest["uuid"]).bytes, lenient)
        if image is None:
            raise DamagedError("its chunks are missing")
        image.warning = image.warning or damage
    except DamagedError as e:
        raise LogError(f"{directory.path}: the log cannot be used: {e}; see: wbfuse recover {directory.path}/") from e
    except OSError as e:
        raise LogError(f"{directory.path}: {e.strerror}") from e
    adapt(image.table)
    journal = restore_journal(image)
    log = restore_log(image)
    dirty = sum(tag & 0xFF == Entry.DIRTY for tag in image.table)
    return Loaded(log, os.dup(journal.fd), dirty, image.warning)


def restore_journal(image: Image) -> Journal:
    journal = Journal()
    for tag, value in image.table.items():
        if tag & 0xFF in KEPT:
            journal.put(Entry(tag & 0xFF), tag >> 8, value)
    return journal


def restore_log(image: Image) -> int:
    """A memory file with everything at its place. Raises LogError without memory."""
    geometry = Geometry(image.log_size, image.max_write)
    fd = Log.allocate(geometry.total)
    try:
        for index, segment in image.segments.items():
            if index >= geometry.count:
                raise LogError(f"segment {index} is beyond the end of the log")
            head = records.pack(segment.life, 0, 0, 0, 0, 0, records.Kind.LIFE)
            _pwrite(fd, memoryview(head), geometry.head(index))
            slot = 0
            for first in sorted(segment.slots):  # one after another, also where a damaged log has lost some
                _restore(fd, geometry, segment.slots[first], slot)
                slot += segment.slots[first].count
    except BaseException:
        os.close(fd)
        raise
    return fd


def _restore(fd: int, geometry: Geometry, f: Frame, slot: int) -> None:
    """The records of a frame, from a slot on, and their payloads to their places."""
    body, index, payload = f.body, f.segment, f.payloads()
    if f.first + f.count > geometry.slots or payload > len(body):
        raise LogError(f"a frame of segment {index} does not fit")
    _pwrite(fd, body[: f.count * records.SIZE], geometry.slot(index, slot))
    low, high = index * geometry.segment_size, (index + 1) * geometry.segment_size
    run_place, run_start, run_end = 0, payload, payload
    for i in range(f.count):
        record = records.unpack(body[i * records.SIZE : (i + 1) * records.SIZE])
        if record is None:
            raise LogError(f"a record of segment {index} is damaged")
        if record.kind != records.Kind.WRITE:
            continue
        length = whole_pages(record.length) if f.kind == Kind.PAGES else record.length
        if record.place < low or record.place + length > high or run_end + length > len(body):
            raise LogError(f"a record of segment {index} points outside it")
        if record.place != run_place + run_end - run_start:
            _pwrite(fd, body[run_start:run_end], run_place)
            run_place, run_start = record.place, run_end
        run_end += length
    _pwrite(fd, body[run_start:run_end], run_place)


def _pwrite(fd: int, data: memoryview, at: int) -> None:
    while len(data):
        done = os.pwrite(fd, data, at)
        if not done:
            raise OSError(errno.EIO, "nothing was written")
        data, at = data[done:], at + done
