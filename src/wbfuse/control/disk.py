"""The log on disk of a mount: whose it is, finding what an earlier mount left in it, and its end."""

from __future__ import annotations

import json
import logging
import os
import socket
import uuid
from typing import TYPE_CHECKING, Any

from wbfuse.store.directory import nodes, syscalls
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.disk.directory import MANIFEST, Directory
from wbfuse.writeback.disk.load import Loaded, load
from wbfuse.writeback.disk.writer import DiskLog, chunks_of
from wbfuse.writeback.log import Geometry, LogError

if TYPE_CHECKING:
    from wbfuse.control.mount import Spec

log = logging.getLogger(__name__)


def identity(spec: Spec) -> list[Any]:
    """What tells this source from any other, wherever it is mounted. Raises SourceError."""
    if spec.is_volume:
        from wbfuse.store.volume.store import uuid_of

        return ["volume", uuid_of(spec.source)]
    return ["directory", *_statx(spec.source)[1:]]


def _statx(path: str) -> syscalls.Identity:
    """Device, inode and birth of a directory. Raises LogError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise LogError(f"{path}: {e.strerror}") from e
    try:
        return syscalls.statx(fd)[1]
    finally:
        os.close(fd)


def is_note_of(note: str | None, number: str) -> bool:
    """Whether a store's note is about this log."""
    try:
        return note is not None and json.loads(note)["uuid"] == number
    except (ValueError, KeyError, TypeError):
        return False


def unwritten(note: str, anywhere: bool = False) -> str:
    """How to bring in what the log of a note has; empty where it has ended, or (not `anywhere`) is another host's."""
    try:
        found = json.loads(note)
        path, host, number = str(found["path"]), str(found["host"]), str(found["uuid"])
    except (ValueError, KeyError, TypeError):
        return ""
    if host != socket.gethostname() and not anywhere:
        return ""
    try:
        with open(os.path.join(path, MANIFEST), encoding="utf-8") as f:
            there = is_note_of(f.read(), number)
    except FileNotFoundError:
        there = not os.path.isdir(path)  # it may be mounted later
    except (OSError, ValueError):
        there = True
    how = f"the log {path}: mount with --log {path}, or give that up with: wbfuse recover {path} --discard"
    return how if there else ""


class LogDirectory:
    """The directory of `--log`, and what was found in it. `fd`: as the keeper has kept it, with its lock.

    Raises LogError, also where it holds the log of another source.
    """

    def __init__(self, path: str, spec: Spec, fd: int | None) -> None:
        self.directory = Directory(path, fd, make=True)
        whose = identity(spec)
        self._manifest: dict[str, Any] = {
            "source": spec.name, "identity": whose, "uuid": str(uuid.uuid4()), "mountpoint": spec.mountpoint
        }  # fmt: skip
        self.loaded: Loaded | None = None
        found = self.directory.manifest()
        if found is None:
            return
        if found["identity"] != whose:
            raise LogError(
                f"{path}: holds the log of {found['source']}; mount that with it, or see: wbfuse recover {path}"
            )
        self._manifest["uuid"] = found["uuid"]
        if fd is None:
            device = None if spec.is_volume else _statx(spec.source)[0]
            self.loaded = load(self.directory, lambda table: adapt(table, device))
            if self.loaded is not None:
                log.info("%s: %d files have what the store has not", path, self.loaded.dirty)

    @property
    def uuid(self) -> str:
        return str(self._manifest["uuid"])

    @property
    def note(self) -> str:
        """For the store, which tells it to whoever mounts it next."""
        return json.dumps({"uuid": self.uuid, "path": self.directory.path, "host": socket.gethostname()})

    def writer(self, cache: WritebackCache) -> DiskLog:
        """To be started. Raises LogError where there is no room."""
        size, max_write = cache.log.asked
        count, chunk = chunks_of(Geometry(size, max_write))
        self.directory.reserve(count, chunk)
        return DiskLog(self.directory, cache.log, cache.journal, cache.lock, cache.freed, self._manifest)


def adapt(table: dict[int, bytes], device: int | None) -> None:
    """A journal whose mount is gone, for one that is made anew; `device`: of the source, where it is a directory."""
    if device is not None:
        nodes.rebase(table, device)
