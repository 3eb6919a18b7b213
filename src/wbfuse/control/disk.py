"""The log on disk of a mount: whose it is, finding what an earlier mount left in it, and its end."""

from __future__ import annotations

import logging
import os
import uuid
from typing import TYPE_CHECKING, Any

from wbfuse.store.directory import nodes, syscalls
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.disk.directory import Directory
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
