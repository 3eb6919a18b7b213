"""Replies and notifications as bytes. Each function gives a body; `reply` and `notify` put the out_header before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from struct import Struct

from wbfuse.wire.constants import OUT_HEADER, Notify
from wbfuse.wire.types import NS, Attr, Dirent, Entry, Lock, Opened, Statfs

OUT = Struct("<IiQ")
_ATTR = Struct("<QQQQQQIIIIIIIIII")
_ENTRY = Struct("<QQQQII")
_ATTR_OUT = Struct("<QI4x")
_OPEN_OUT = Struct("<QI4x")
_SIZE_OUT = Struct("<I4x")
_U64 = Struct("<Q")
_STATFS = Struct("<QQQQQIII28x")
_LOCK = Struct("<QQII")
_DIRENT = Struct("<QQII")
_IOCTL = Struct("<iIII")
INIT_OUT = Struct("<IIIIHHIIHHIIH22x")
_STATX = Struct("<QII16xIIQIIIH2xQQQQqI4xqI4xqI4xqI4xIIII112x")
_INVAL_INODE = Struct("<Qqq")
_INVAL_ENTRY = Struct("<QII")
_DELETE = Struct("<QQI4x")
_STORE = Struct("<QQI4x")
_RETRIEVE = Struct("<QQQI4x")
_PRUNE = Struct("<I4xQ")


def reply_header(unique: int, length: int) -> bytes:
    """The out_header of a successful reply whose body has `length` bytes."""
    return OUT.pack(OUT_HEADER + length, 0, unique)


def error(unique: int, errno: int) -> bytes:
    """A whole error reply. `errno` is positive, as in `errno.EIO`."""
    return OUT.pack(OUT_HEADER, -errno, unique)


def _timeout(seconds: float) -> tuple[int, int]:
    if seconds == math.inf:
        return (1 << 63) - 1, 0
    whole = int(seconds)
    return whole, int((seconds - whole) * NS)


def attr(a: Attr) -> bytes:
    """fuse_attr, 88 bytes."""
    atime, atimensec = divmod(a.atime_ns, NS)
    mtime, mtimensec = divmod(a.mtime_ns, NS)
    ctime, ctimensec = divmod(a.ctime_ns, NS)
    mask = 0xFFFF_FFFF_FFFF_FFFF  # times before 1970 are negative seconds in two's complement
    return _ATTR.pack(
        a.ino, a.size, a.blocks, atime & mask, mtime & mask, ctime & mask, atimensec, mtimensec, ctimensec,
        a.mode, a.nlink, a.uid, a.gid, a.rdev, a.blksize, 0,
    )  # fmt: skip


def attr_out(a: Attr, timeout: float) -> bytes:
    """Answer to GETATTR and SETATTR, 104 bytes."""
    return _ATTR_OUT.pack(*_timeout(timeout)) + attr(a)


def entry_out(e: Entry) -> bytes:
    """Answer to LOOKUP, MKNOD, MKDIR, SYMLINK, LINK, 128 bytes."""
    entry_s, entry_ns = _timeout(e.entry_timeout)
    attr_s, attr_ns = _timeout(e.attr_timeout)
    return _ENTRY.pack(e.nodeid, e.generation, entry_s, attr_s, entry_ns, attr_ns) + attr(e.attr)


def open_out(o: Opened) -> bytes:
    return _OPEN_OUT.pack(o.fh, o.flags)


def create_out(e: Entry, o: Opened) -> bytes:
    return entry_out(e) + open_out(o)


def size_out(size: int) -> bytes:
    """Answer to WRITE and COPY_FILE_RANGE (bytes done), and to GETXATTR/LISTXATTR of size 0 (bytes needed)."""
    return _SIZE_OUT.pack(size)


def u64_out(value: int) -> bytes:
    """Answer to LSEEK, BMAP and COPY_FILE_RANGE_64."""
    return _U64.pack(value)


def poll_out(revents: int) -> bytes:
    return _SIZE_OUT.pack(revents)


def statfs_out(s: Statfs) -> bytes:
    return _STATFS.pack(s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.frsize)


def lock_out(lock: Lock) -> bytes:
    return _LOCK.pack(lock.start, lock.end, lock.type, lock.pid)


def ioctl_out(result: int, data: bytes = b"") -> bytes:
    return _IOCTL.pack(result, 0, 0, 0) + data


def dirent(d: Dirent) -> bytes:
    """One entry of a READDIR answer, padded to 8 bytes."""
    n = len(d.name)
    return _DIRENT.pack(d.ino, d.offset, n, d.type) + d.name + bytes(-n % 8)


def direntplus(d: Dirent, e: Entry) -> bytes:
    """One entry of a READDIRPLUS answer. An Entry with nodeid 0 gives a name only and takes no lookup count."""
    return entry_out(e) + dirent(d)


def statx_out(a: Attr, timeout: float) -> bytes:
    """Answer to STATX, 288 bytes: the basic fields (mask STATX_BASIC_STATS)."""
    times = [divmod(t, NS) for t in (a.atime_ns, 0, a.ctime_ns, a.mtime_ns)]
    return _STATX.pack(
        *_timeout(timeout), 0, 0x7FF, a.blksize, 0, a.nlink, a.uid, a.gid, a.mode, a.ino, a.size, a.blocks, 0,
        *(field for pair in times for field in pair),
        a.rdev >> 20, a.rdev & 0xFFFFF, 0, 0,
    )  # fmt: skip


def init_out(
    minor: int, max_readahead: int, capabilities: int, max_background: int, max_write: int, max_pages: int,
    congestion_threshold: int,
) -> bytes:  # fmt: skip
    """Answer to INIT, 64 bytes. `time_gran` is 1 ns; `capabilities` as in `Cap`."""
    return INIT_OUT.pack(
        7, minor, max_readahead, capabilities & 0xFFFF_FFFF, max_background, congestion_threshold, max_write,
        1, max_pages, 0, capabilities >> 32, 0, 0,
    )  # fmt: skip


def notify(code: Notify, *body: bytes) -> list[bytes]:
    """A whole notification as a vector for writev: unique 0, the code where an error would stand."""
    return [OUT.pack(OUT_HEADER + sum(map(len, body)), code, 0), *body]


def notify_inval_inode(nodeid: int, offset: int = 0, length: int = 0) -> Sequence[bytes]:
    """Drop cached attributes, and pages from `offset` on (length 0: to the end; offset < 0: attributes only)."""
    return notify(Notify.INVAL_INODE, _INVAL_INODE.pack(nodeid, offset, length))


def notify_inval_entry(parent: int, name: bytes, flags: int = 0) -> Sequence[bytes]:
    return notify(Notify.INVAL_ENTRY, _INVAL_ENTRY.pack(parent, len(name), flags), name + b"\0")


def notify_delete(parent: int, child: int, name: bytes) -> Sequence[bytes]:
    return notify(Notify.DELETE, _DELETE.pack(parent, child, len(name)), name + b"\0")


def notify_store(nodeid: int, offset: int, data: bytes) -> Sequence[bytes]:
    return notify(Notify.STORE, _STORE.pack(nodeid, offset, len(data)), data)


def notify_retrieve(unique: int, nodeid: int, offset: int, size: int) -> Sequence[bytes]:
    return notify(Notify.RETRIEVE, _RETRIEVE.pack(unique, nodeid, offset, size))


def notify_poll(kh: int) -> Sequence[bytes]:
    return notify(Notify.POLL, _U64.pack(kh))


def notify_resend() -> Sequence[bytes]:
    """Ask for every unanswered request again (Linux 6.9, needs HAS_RESEND)."""
    return notify(Notify.RESEND)


def notify_inc_epoch() -> Sequence[bytes]:
    return notify(Notify.INC_EPOCH)


def notify_prune(nodeids: Sequence[int]) -> Sequence[bytes]:
    """Ask the kernel to drop its caches of these nodes (Linux 6.18)."""
    return notify(Notify.PRUNE, _PRUNE.pack(len(nodeids), 0), b"".join(map(_U64.pack, nodeids)))
