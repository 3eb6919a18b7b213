"""Values that travel in replies: attributes, entries, directory entries. Times are nanoseconds, timeouts seconds."""

from __future__ import annotations

from dataclasses import dataclass

NS = 1_000_000_000


@dataclass(slots=True)
class Attr:
    """Attributes of an inode as stat(2) shows them. `ino` is what st_ino shows, not the kernel's nodeid."""

    ino: int
    mode: int
    size: int = 0
    blocks: int = 0
    """512-byte units, as st_blocks."""
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    blksize: int = 4096


@dataclass(slots=True)
class Entry:
    """Answer to LOOKUP and to everything that makes a name. `nodeid` 0 is a negative entry, kept entry_timeout."""

    nodeid: int
    attr: Attr
    generation: int = 0
    entry_timeout: float = 1.0
    attr_timeout: float = 1.0


@dataclass(slots=True)
class Opened:
    """Answer to OPEN, OPENDIR and (behind an Entry) CREATE: the handle and FOPEN_* flags."""

    fh: int
    flags: int = 0


@dataclass(slots=True)
class Statfs:
    """Answer to STATFS; blocks are counted in units of `frsize` bytes."""

    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    bsize: int = 4096
    namelen: int = 255
    frsize: int = 4096


@dataclass(slots=True)
class Dirent:
    """One name of a directory. `offset` is the position *after* it; `type` is the DT_* number (mode >> 12)."""

    name: bytes
    ino: int
    type: int
    offset: int


@dataclass(slots=True)
class Lock:
    """A POSIX lock range of GETLK/SETLK: [start, end], F_RDLCK/F_WRLCK/F_UNLCK, holder's pid."""

    start: int
    end: int
    type: int
    pid: int
