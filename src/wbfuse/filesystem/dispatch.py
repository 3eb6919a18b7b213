"""From a decoded request to a method of FileSystem and from its value to reply bytes. Pure routing: no threads, no I/O.

READ and WRITE do not come through here on the hot path; the session calls those methods with bare arguments.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from wbfuse.filesystem.api import Buffer, EntryMaker, FileSystem, Request, overrides
from wbfuse.wire import replies
from wbfuse.wire import requests as wire
from wbfuse.wire.constants import FSYNC_FDATASYNC, GETATTR_FH, Cap, Opcode
from wbfuse.wire.types import Attr, Dirent, Entry, Lock, Opened, Statfs

DIRENT_FIXED = 24
ENTRY_SIZE = 128


def wishes_of(fs: FileSystem) -> Cap:
    """Its capabilities, less those that need a method which it does not have."""
    taken = fs.capabilities
    if not overrides(fs, "readdirplus"):
        taken &= ~(Cap.DO_READDIRPLUS | Cap.READDIRPLUS_AUTO)
    return taken


def _sized(value: bytes, size: int) -> bytes:
    """The xattr convention: size 0 asks how long the value is, one too small is ERANGE."""
    if size == 0:
        return replies.size_out(len(value))
    if len(value) > size:
        raise OSError(errno.ERANGE, "the value is longer than the buffer")
    return value


def pack_dir(entries: Iterable[Dirent], size: int) -> bytes:
    """As many entries as fit into `size` bytes."""
    out, used = [], 0
    for entry in entries:
        need = DIRENT_FIXED + (len(entry.name) + 7 & ~7)
        if used + need > size:
            break
        out.append(replies.dirent(entry))
        used += need
    return b"".join(out)


_NO_ENTRY = Entry(0, Attr(0, 0), entry_timeout=0, attr_timeout=0)


def pack_dirplus(entries: Iterable[tuple[Dirent, EntryMaker]], size: int) -> bytes:
    """As `pack_dir`; a name is looked up only once it is known to fit, so no reference is given for nothing."""
    out, used = [], 0
    for entry, look_up in entries:
        need = ENTRY_SIZE + DIRENT_FIXED + (len(entry.name) + 7 & ~7)
        if used + need > size:
            break
        out.append(replies.direntplus(entry, look_up() or _NO_ENTRY))
        used += need
    return b"".join(out)


Encode = Callable[[Any], bytes]


def _nothing(value: None) -> bytes:
    return b""


def _entry(value: Entry) -> bytes:
    return replies.entry_out(value)


def _created(value: tuple[Entry, Opened]) -> bytes:
    return replies.create_out(*value)


def _data(value: Buffer | Sequence[Buffer]) -> bytes:
    return b"".join(value) if isinstance(value, (list, tuple)) else bytes(value)  # type: ignore[arg-type]


def _lock(value: Lock) -> bytes:
    return replies.lock_out(value)


def _statfs(value: Statfs) -> bytes:
    return replies.statfs_out(value)


@dataclass(slots=True)
class Route:
    """How one opcode is served: `call(request, body)` gives a value, `encode(value)` the reply's body."""

    op: wire.Op
    call: Callable[[Request, Any], Any]
    encode: Encode
    inline: bool
    silent: bool = False
    """The kernel expects no reply."""


def routes(fs: FileSystem) -> dict[int, Route]:
    """The table by which a session serves `fs`. INIT, DESTROY, INTERRUPT and NOTIFY_REPLY are the session's own."""

    def attr(value: Attr) -> bytes:
        return replies.attr_out(value, fs.attr_timeout)

    def do_setxattr(r: Request, b: wire.Setxattr) -> None:
        fs.setxattr(r, b.name, bytes(b.value), b.flags)

    def do_copy(r: Request, b: wire.CopyFileRange) -> int:
        return fs.copy_file_range(r, b.fh_in, b.offset_in, b.nodeid_out, b.fh_out, b.offset_out, b.length, b.flags)

    def do_ioctl(r: Request, b: wire.Ioctl) -> tuple[int, bytes]:
        return fs.ioctl(r, b.fh, b.cmd, b.arg, b.flags, bytes(b.data[: b.in_size]), b.out_size)

    def list_names(r: Request, size: int) -> bytes:
        return _sized(b"".join(name + b"\0" for name in fs.listxattr(r)), size)

    def getattr_fh(b: wire.Getattr) -> int | None:
        return b.fh if b.flags & GETATTR_FH else None

    table: dict[Opcode, tuple[Callable[[Request, Any], Any], Encode]] = {
        Opcode.LOOKUP: (lambda r, b: fs.lookup(r, b.name), _entry),
        Opcode.FORGET: (lambda r, b: fs.forget(r, b.nlookup), _nothing),
        Opcode.BATCH_FORGET: (lambda r, b: fs.batch_forget(r, b.forgets), _nothing),
        Opcode.GETATTR: (lambda r, b: fs.getattr(r, getattr_fh(b)), attr),
        Opcode.SETATTR: (fs.setattr, attr),
        Opcode.READLINK: (lambda r, b: fs.readlink(r), _data),
        Opcode.SYMLINK: (lambda r, b: fs.symlink(r, b.name, b.target), _entry),
        Opcode.MKNOD: (lambda r, b: fs.mknod(r, b.name, b.mode, b.rdev, b.umask), _entry),
        Opcode.MKDIR: (lambda r, b: fs.mkdir(r, b.name, b.mode, b.umask), _entry),
        Opcode.UNLINK: (lambda r, b: fs.unlink(r, b.name), _nothing),
        Opcode.RMDIR: (lambda r, b: fs.rmdir(r, b.name), _nothing),
        Opcode.RENAME: (lambda r, b: fs.rename(r, b.name, b.newdir, b.newname, b.flags), _nothing),
        Opcode.RENAME2: (lambda r, b: fs.rename(r, b.name, b.newdir, b.newname, b.flags), _nothing),
        Opcode.LINK: (lambda r, b: fs.link(r, b.oldnodeid, b.name), _entry),
        Opcode.OPEN: (lambda r, b: fs.open(r, b.flags, b.open_flags), replies.open_out),
        Opcode.READ: (lambda r, b: fs.read(r, b.fh, b.offset, b.size, b.flags), _data),
        Opcode.WRITE: (lambda r, b: fs.write(r, b.fh, b.offset, b.data, b.write_flags, b.flags), replies.size_out),
        Opcode.STATFS: (lambda r, b: fs.statfs(r), _statfs),
        Opcode.RELEASE: (lambda r, b: fs.release(r, b.fh, b.flags), _nothing),
        Opcode.FSYNC: (lambda r, b: fs.fsync(r, b.fh, bool(b.flags & FSYNC_FDATASYNC)), _nothing),
        Opcode.SETXATTR: (do_setxattr, _nothing),
        Opcode.GETXATTR: (lambda r, b: _sized(fs.getxattr(r, b.name), b.size), bytes),
        Opcode.LISTXATTR: (lambda r, b: list_names(r, b.size), bytes),
        Opcode.REMOVEXATTR: (lambda r, b: fs.removexattr(r, b.name), _nothing),
        Opcode.FLUSH: (lambda r, b: fs.flush(r, b.fh, b.lock_owner), _nothing),
        Opcode.OPENDIR: (lambda r, b: fs.opendir(r, b.flags), replies.open_out),
        Opcode.READDIR: (lambda r, b: pack_dir(fs.readdir(r, b.fh, b.offset), b.size), bytes),
        Opcode.READDIRPLUS: (lambda r, b: pack_dirplus(fs.readdirplus(r, b.fh, b.offset), b.size), bytes),
        Opcode.RELEASEDIR: (lambda r, b: fs.releasedir(r, b.fh, b.flags), _nothing),
        Opcode.FSYNCDIR: (lambda r, b: fs.fsyncdir(r, b.fh, bool(b.flags & FSYNC_FDATASYNC)), _nothing),
        Opcode.GETLK: (fs.getlk, _lock),
        Opcode.SETLK: (fs.setlk, _nothing),
        Opcode.SETLKW: (fs.setlkw, _nothing),
        Opcode.ACCESS: (lambda r, b: fs.access(r, b.mask), _nothing),
        Opcode.CREATE: (lambda r, b: fs.create(r, b.name, b.flags, b.mode, b.umask), _created),
        Opcode.TMPFILE: (lambda r, b: fs.tmpfile(r, b.flags, b.mode, b.umask), _created),
        Opcode.BMAP: (lambda r, b: fs.bmap(r, b.block, b.blocksize), replies.u64_out),
        Opcode.IOCTL: (do_ioctl, lambda v: replies.ioctl_out(*v)),
        Opcode.POLL: (lambda r, b: fs.poll(r, b.fh, b.kh, b.flags, b.events), replies.poll_out),
        Opcode.FALLOCATE: (lambda r, b: fs.fallocate(r, b.fh, b.offset, b.length, b.mode), _nothing),
        Opcode.LSEEK: (lambda r, b: fs.lseek(r, b.fh, b.offset, b.whence), replies.u64_out),
        Opcode.COPY_FILE_RANGE: (do_copy, replies.size_out),
        Opcode.COPY_FILE_RANGE_64: (do_copy, replies.u64_out),
        Opcode.SYNCFS: (lambda r, b: fs.syncfs(r), _nothing),
        Opcode.STATX: (lambda r, b: fs.getattr(r, None), lambda v: replies.statx_out(v, fs.attr_timeout)),
    }
    silent = (Opcode.FORGET, Opcode.BATCH_FORGET)
    return {
        code: Route(wire.OPS[code], call, encode, wire.OPS[code].handler in fs.inline, code in silent)
        for code, (call, encode) in table.items()
    }
