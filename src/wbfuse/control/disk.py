"""The log on disk of a mount: whose it is, finding what an earlier mount left in it, and its end."""

from __future__ import annotations

import json
import logging
import os
import socket
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wbfuse.store.contract import Store
from wbfuse.store.directory import DirectoryStore, nodes, syscalls
from wbfuse.store.directory.fds import Fd
from wbfuse.store.directory.private import Private
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.disk.directory import MANIFEST, Directory
from wbfuse.writeback.disk.load import Loaded, load
from wbfuse.writeback.disk.stream import chunks_of
from wbfuse.writeback.disk.writer import DiskLog
from wbfuse.writeback.log import Geometry, LogError

if TYPE_CHECKING:
    from wbfuse.control.mount import Spec

log = logging.getLogger(__name__)


def identity(spec: Spec) -> list[Any]:
    """What tells this source from any other, wherever it is mounted. Raises SourceError."""
    if spec.is_volume:
        from wbfuse.store.volume.store import uuid_of

        return ["volume", uuid_of(spec.source)]
    try:
        fd = os.open(spec.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise LogError(f"{spec.source}: {e.strerror}") from e
    try:
        return _whose(fd)
    finally:
        os.close(fd)


def _whose(fd: int) -> list[Any]:
    return ["directory", *syscalls.statx(fd)[1][1:]]


def is_note_of(note: str | None, number: str) -> bool:
    """Whether a store's note is about this log."""
    try:
        return note is not None and json.loads(note)["uuid"] == number
    except (ValueError, KeyError, TypeError):
        return False


def unwritten(note: str, anywhere: bool = False) -> str:
    """How to bring in what the log of a note has; empty where (not `anywhere`) it is another host's."""
    try:
        found = json.loads(note)
        path, host = str(found["path"]), str(found["host"])
    except (ValueError, KeyError, TypeError):
        return ""
    if host != socket.gethostname() and not anywhere:
        return ""
    there = "" if os.path.exists(os.path.join(path, MANIFEST)) else ", which is not there now (is its disk mounted?)"
    return f"the log {path}{there}: mount with --log {path}"


def _peek(source: str) -> list[str]:
    """The notes of a source that is not mounted, which is not touched. Raises LogError, SourceError."""
    if "://" in source:
        from wbfuse.store.volume.store import notes_of

        return notes_of(source)[0]
    try:
        root = Fd(os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        note = Private(root).noted_log()
    except OSError as e:
        raise LogError(f"{source}: {e.strerror}") from e
    return [] if note is None else [note]


def notes(source: str) -> tuple[list[str], Callable[[], None]]:
    """The notes of logs that mounts of a source have left, and how to remove them. Raises SourceError."""
    if "://" in source:
        from wbfuse.store.volume.store import notes_of

        return notes_of(source)
    store = DirectoryStore(source)
    note = store.noted_log()
    return [] if note is None else [note], lambda: store.note_log(None)


class LogDirectory:
    """The directory of `--log`, and what was found in it. `kept`: as Mount has it.

    Raises LogError, also where it holds the log of another source.
    """

    def __init__(self, path: str, spec: Spec, kept: dict[str, int]) -> None:
        self.directory = Directory(path, kept.get("disk"), make=True)
        self.loaded: Loaded | None = None
        self._there = False
        """A manifest names chunks that count, if the source's note agrees."""
        self._first = not kept
        found = None if self.directory.trouble and kept else self.directory.manifest()
        ended, begun = (False, False) if found is None else (found.pop("ended", False), found.pop("begun", False))
        self._there = found is not None and not ended
        if found is not None and kept:  # it was looked at by the first worker
            self._manifest: dict[str, Any] = found
            return
        whose = _whose(kept["source"]) if "source" in kept else identity(spec)
        # Where it cannot be read, nothing that stands there may be taken for what comes now.
        number = str(uuid.uuid4()) if self.directory.trouble else spec.log_uuid
        self._manifest = {"source": spec.name, "identity": whose, "uuid": number}
        if found is None:
            return
        if found["identity"] != whose:
            raise LogError(
                f"{path}: holds the log of {found['source']}; mount that with it, or see: wbfuse recover {path}/"
            )
        self._manifest = found
        if ended:
            return
        if begun and not any(is_note_of(note, self.uuid) for note in _peek(spec.source)):
            return  # a mount died before it was of any use
        self.loaded = load(self.directory, lambda table: adapt(table, spec))
        if self.loaded is not None:
            log.info("%s: %d files have what the store has not", path, self.loaded.dirty)

    @property
    def uuid(self) -> str:
        return str(self._manifest["uuid"])

    @property
    def note(self) -> str:
        """For the store, which tells it to whoever mounts it next."""
        return json.dumps({"uuid": self.uuid, "path": self.directory.path, "host": socket.gethostname()})

    def writer(self, cache: WritebackCache, store: Store) -> DiskLog:
        """To be started. Raises LogError where there is no room."""
        if self._first:
            self.directory.reserve(*chunks_of(Geometry(*cache.log.asked)))
        note = self.note

        def noted() -> bool:
            return is_note_of(store.noted_log(), self.uuid)

        def remember() -> None:
            store.note_log(note)  # also where it stands there: nobody knows whether it is durable

        return DiskLog(
            self.directory, cache.log, cache.journal, cache.lock, cache.freed, self._manifest, noted, remember,
            lambda: store.note_log(None), self._there, self.directory.trouble,
        )  # fmt: skip


def adapt(table: dict[int, bytes], spec: Spec) -> None:
    """A journal whose mount is gone, for one that is made anew: a directory may be on another device after a reboot."""
    if not spec.is_volume:
        fd = os.open(spec.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            nodes.rebase(table, syscalls.statx(fd)[1][0])
        finally:
            os.close(fd)
