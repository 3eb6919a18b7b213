"""`.wbfuse`, the directory of our own in a source: the orphanage, and the note of a log on disk.

It is made when it is needed and removed when it is empty. Lock: none; the store's `names` is held where links move.
"""

from __future__ import annotations

import contextlib
import os

from wbfuse.store.contract import SourceError
from wbfuse.store.directory.fds import Fd

PRIVATE = b".wbfuse"
_ORPHANS = b"orphans"
_LOG = b"log"
DIR_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READABLE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST = 8192
"""Bytes of a note."""


class Private:
    """In the directory `root`, whose descriptor stays another's."""

    def __init__(self, root: Fd) -> None:
        self._root = root
        self._orphanage: Fd | None = None

    def _open(self, flags: int = DIR_FLAGS) -> Fd:
        return Fd(os.open(PRIVATE, flags, dir_fd=self._root.n))

    def _make(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(PRIVATE, 0o700, dir_fd=self._root.n)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(PRIVATE, dir_fd=self._root.n)

    def close(self) -> None:
        """What is empty goes."""
        if self._orphanage is not None:
            self._orphanage = None
            with contextlib.suppress(OSError):  # not empty: an orphan could not be removed, kept for a look
                private = self._open()
                os.rmdir(_ORPHANS, dir_fd=private.n)
            self._remove()

    # the log on disk

    def note_log(self, note: str | None) -> None:
        """Store.note_log. Raises OSError."""
        if note is None:
            with contextlib.suppress(FileNotFoundError):
                private = self._open(_READABLE)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_LOG, dir_fd=private.n)
                os.fsync(private.n)  # it may stay, for its orphans
                self._remove()
            os.fsync(self._root.n)
            return
        self._make()
        private = self._open(_READABLE)
        making = _LOG + b".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(making, flags, 0o600, dir_fd=private.n), "w", encoding="utf-8") as out:
            out.write(note)
            out.flush()
            os.fsync(out.fileno())
        os.rename(making, _LOG, src_dir_fd=private.n, dst_dir_fd=private.n)
        os.fsync(private.n)
        os.fsync(self._root.n)

    def noted_log(self) -> str | None:
        try:
            private = self._open()
            with os.fdopen(os.open(_LOG, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=private.n), encoding="utf-8") as f:
                return f.read(_MOST)
        except FileNotFoundError:
            return None

    # orphans

    def orphans(self) -> Fd:
        """The orphanage, made where there is none."""
        if self._orphanage is None:
            self._make()
            private = self._open()
            with contextlib.suppress(FileExistsError):
                os.mkdir(_ORPHANS, 0o700, dir_fd=private.n)
            self._orphanage = Fd(os.open(_ORPHANS, DIR_FLAGS, dir_fd=private.n))
        return self._orphanage

    def leftovers(self) -> tuple[Fd, list[bytes]]:
        """The orphanage and the names in it; none where there is no orphanage. Raises SourceError."""
        try:
            private = self._open()
            self._orphanage = Fd(os.open(_ORPHANS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=private.n))
        except FileNotFoundError:
            return self._root, []
        except OSError as e:
            raise SourceError(f"{PRIVATE.decode()}: cannot be used: {e.strerror}") from e
        return self._orphanage, [os.fsencode(name) for name in os.listdir(self._orphanage.n)]
