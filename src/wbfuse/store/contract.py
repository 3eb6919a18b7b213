"""What the file system needs of a store.

An `ino` is the store's own number of a file: never reused while the store is open, the root is 1. It is also the
kernel's nodeid. Names are single components as bytes. Errors are OSError with the errno that Linux would give.
Every method may be called from several threads and may block, except where it says otherwise.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from wbfuse.wire.types import Attr, Dirent, Statfs

ROOT_INO = 1


class FencedError(OSError):
    """Another host has taken over: nothing that this mount still has can ever be committed. An EIO for applications."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EIO, why)


class SourceError(Exception):
    """What was named cannot serve as a store; one line for the person who asked."""


Buffer = bytes | bytearray | memoryview
Progress = Callable[[int], None]


@dataclass(slots=True, frozen=True)
class Capabilities:
    """What a store can do; asked once."""

    atomic_commit: bool
    """A commit is seen whole or not at all, also after a crash."""
    preferred_piece: int
    """Bytes in which data leaves best."""
    max_file_size: int
    """The largest size that a file can have; beyond it a change is EFBIG at once, not at its commit."""
    stages: bool = False
    """`stage` brings bytes to the store ahead of their commit, for several rounds of a file at once."""
    group_bytes: int = 0
    """Rounds of many files with so many bytes together are best committed in one call; 0: one by one."""
    clones: bool = False
    """`copy_range` moves no bytes, so it is worth committing first what is not committed yet."""
    quick_names: bool = False
    """Most lookups can be answered without waiting."""
    shared: bool = False
    """Other hosts change it too."""
    attr_timeout: float = 1.0
    """Seconds for which the kernel may believe attributes and names."""


@dataclass(slots=True, frozen=True)
class Owner:
    """Whose a new file is: the caller's ids."""

    uid: int
    gid: int


@dataclass(slots=True)
class Change:
    """What setattr sets; None leaves as it is. Sizes change by rounds, never here."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@dataclass(slots=True)
class Piece:
    """A contiguous range that leaves as one write; `buffers` None makes it a hole of zeros."""

    offset: int
    length: int
    buffers: list[memoryview] | None


@dataclass(slots=True)
class Round:
    """What one commit brings to one file, applied in the order of these fields."""

    ino: int
    lowest: int | None = None
    """Truncate to this size first, where the file is larger: the lowest that it was truncated to."""
    pieces: list[Piece] = field(default_factory=list)
    """Sorted by offset, not overlapping."""
    size: int | None = 0
    """The size afterwards; None: as it is, or where the last piece ends if that is more."""
    atime_ns: int | None = None
    mtime_ns: int | None = None
    staged: object | None = None
    """What `stage` left for `commit`; the store's own."""


Found = tuple[int, Attr]
"""An ino and its attributes, and a reference to it that `forget` gives back."""


class Store(ABC):
    """The contract. `wbfuse.testing.store` has the suite that every store must pass."""

    barrier: Callable[[], None] = staticmethod(lambda: None)
    """To be called before anything that a replay of older changes would undo or could not follow; may wait."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def close(self) -> None:
        """Release everything. What was committed stays."""

    # names

    @abstractmethod
    def lookup(self, parent: int, name: bytes, nowait: bool = False) -> Found:
        """With `nowait`, raises BlockingIOError rather than wait."""

    @abstractmethod
    def forget(self, ino: int, nlookup: int = 1) -> None:
        """Give back so many references. Each `Found` is one; without any, `ino` may be dropped. Does not block."""

    @abstractmethod
    def create(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        """A new regular file; EEXIST where the name is there."""

    @abstractmethod
    def tmpfile(self, parent: int, mode: int, owner: Owner) -> Found:
        """A new regular file without a name, as O_TMPFILE; `link` may give it one."""

    @abstractmethod
    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, owner: Owner) -> Found: ...

    @abstractmethod
    def mkdir(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found: ...

    @abstractmethod
    def symlink(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Found: ...

    @abstractmethod
    def link(self, ino: int, parent: int, name: bytes) -> Found: ...

    @abstractmethod
    def readlink(self, ino: int) -> bytes: ...

    @abstractmethod
    def unlink(self, parent: int, name: bytes) -> tuple[int, int]:
        """Remove a name. Answers the ino (0 where the store has not met it) and how many links are left."""

    @abstractmethod
    def rmdir(self, parent: int, name: bytes) -> None: ...

    @abstractmethod
    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> tuple[int, int]:
        """`flags`: RENAME_NOREPLACE or RENAME_EXCHANGE. Answers as unlink does, for the file that was replaced."""

    @abstractmethod
    def readdir(self, ino: int, offset: int) -> Iterator[Dirent]:
        """Entries after `offset` (0: from the start), "." and ".." included; offsets hold across changes."""

    @abstractmethod
    def fsyncdir(self, ino: int) -> None: ...

    # attributes

    @abstractmethod
    def getattr(self, ino: int, nowait: bool = False) -> Attr:
        """With `nowait`, raises BlockingIOError rather than wait."""

    @abstractmethod
    def setattr(self, ino: int, change: Change) -> Attr: ...

    @abstractmethod
    def getxattr(self, ino: int, name: bytes) -> bytes: ...

    @abstractmethod
    def listxattr(self, ino: int) -> Sequence[bytes]: ...

    @abstractmethod
    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int) -> None: ...

    @abstractmethod
    def removexattr(self, ino: int, name: bytes) -> None: ...

    @abstractmethod
    def statfs(self) -> Statfs: ...

    # data

    @abstractmethod
    def hold(self, ino: int) -> None:
        """The file is open: it lives on without links until `drop`. Counts. Does not block; ESTALE for what is gone."""

    @abstractmethod
    def drop(self, ino: int) -> None:
        """Undo one `hold`."""

    def opened(self, ino: int) -> bool:
        """Somebody opens the file: what other hosts have committed is seen from here on (close-to-open).

        Answers whether what the kernel has cached of it is still true.
        """
        return True

    def acquire(self, ino: int) -> None:  # noqa: B027 - only shared stores have leases
        """The file is about to be written here. EBUSY where another host writes it; ends with the last hold."""

    def counters(self) -> dict[str, int]:
        """What status shows of the store itself."""
        return {}

    def taken_over(self) -> None:  # noqa: B027 - most stores have nothing to clear
        """All that a server before this one had open or dirty is held again: what else was its is needed no more."""

    def note_log(self, note: str | None) -> None:  # noqa: B027 - only a store that outlives a power cut needs one
        """From here on, durably: where the log on disk is that has what this store has not. None: there is none."""

    def noted_log(self) -> str | None:
        """What was noted last, also by a mount that is gone."""
        return None

    def path_of(self, ino: int) -> str:
        """A path of the file, for people; empty where nobody knows."""
        return ""

    @abstractmethod
    def read(self, ino: int, offset: int, buffer: memoryview, nowait: bool = False) -> int:
        """Fill `buffer` with committed bytes; fewer only at the end of the file.

        With `nowait`, raises BlockingIOError rather than wait.
        """

    @abstractmethod
    def write(self, ino: int, offset: int, data: Buffer) -> None:
        """Write-through: all bytes, or an error."""

    @abstractmethod
    def truncate(self, ino: int, size: int) -> None: ...

    def stage(self, rounds: Sequence[Round], progress: Progress) -> None:  # noqa: B027 - most stores do not
        """Bring the bytes of rounds to where their commit only has to point at them, and set `staged`.

        The buffers are not used any more afterwards. A commit that finds the bytes gone unsets `staged` and raises
        EAGAIN: the round must be planned anew.
        """

    def unstage(self, round_: Round) -> None:  # noqa: B027 - most stores do not
        """A staged round will never be committed. Does not block."""

    @abstractmethod
    def commit(self, rounds: Sequence[Round], progress: Progress) -> None:
        """Apply rounds of different files: all or, where the store is atomic, none.

        `progress` is called with the bytes of each piece as it is taken; what was staged is not told again. It may
        raise OSError: nobody wants the rest, which is then left out or done, as is easier, and the error passed on.
        """

    @abstractmethod
    def sync(self, ino: int, datasync: bool = False) -> None:
        """What was committed of this file is durable when this returns."""

    @abstractmethod
    def sync_all(self) -> None:
        """Everything that was committed is durable when this returns."""

    @abstractmethod
    def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None: ...

    @abstractmethod
    def seek(self, ino: int, offset: int, whence: int) -> int:
        """os.SEEK_DATA or os.SEEK_HOLE in committed bytes; ENXIO past the end."""

    @abstractmethod
    def copy_range(self, source: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """Copy inside the store; answers the bytes copied. EOPNOTSUPP or EXDEV where it cannot."""
