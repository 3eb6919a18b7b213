"""Every request of the protocol: one table row gives opcode, layout and value. Decoding never reads past its bytes.

The rule of this file: a request class lists its fields in the order in which they stand on the wire, so a row
`(opcode, class, layout, names, rest)` decodes it: the fixed part, then so many NUL-ended names, then the rest.
READ and WRITE have classes for completeness and logging; the session unpacks them bare (`READ_IN`, `WRITE_IN`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import Struct

from wbfuse.wire.constants import IN_HEADER, Opcode

HEADER = Struct("<IIQQIIIH2x")
READ_IN = Struct("<QQIIQI4x")
WRITE_IN = READ_IN


class WireError(ValueError):
    """These bytes are not a request of the protocol."""


@dataclass(slots=True)
class Header:
    length: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    extensions: int
    """Length of the trailing extension block in units of 8 bytes (`total_extlen`)."""


@dataclass(slots=True)
class Lookup:
    name: bytes


@dataclass(slots=True)
class Forget:
    nlookup: int


@dataclass(slots=True)
class Getattr:
    flags: int
    fh: int


@dataclass(slots=True)
class Setattr:
    """`valid` (FATTR_*) says which of the others count."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    uid: int
    gid: int

    @property
    def atime_ns(self) -> int:
        return _signed_ns(self.atime, self.atimensec)

    @property
    def mtime_ns(self) -> int:
        return _signed_ns(self.mtime, self.mtimensec)

    @property
    def ctime_ns(self) -> int:
        return _signed_ns(self.ctime, self.ctimensec)


def _signed_ns(seconds: int, nanoseconds: int) -> int:
    """Seconds are two's complement in 64 bits."""
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * 1_000_000_000 + nanoseconds


@dataclass(slots=True)
class Readlink:
    pass


@dataclass(slots=True)
class Symlink:
    name: bytes
    target: bytes


@dataclass(slots=True)
class Mknod:
    mode: int
    rdev: int
    umask: int
    name: bytes


@dataclass(slots=True)
class Mkdir:
    mode: int
    umask: int
    name: bytes


@dataclass(slots=True)
class Unlink:
    name: bytes


@dataclass(slots=True)
class Rmdir:
    name: bytes


@dataclass(slots=True)
class Rename:
    newdir: int
    name: bytes
    newname: bytes
    flags: int = 0


@dataclass(slots=True)
class Rename2:
    newdir: int
    flags: int
    name: bytes
    newname: bytes


@dataclass(slots=True)
class Link:
    oldnodeid: int
    name: bytes


@dataclass(slots=True)
class Open:
    flags: int
    open_flags: int


@dataclass(slots=True)
class Read:
    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


@dataclass(slots=True)
class Write:
    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    flags: int
    data: memoryview


@dataclass(slots=True)
class Statfs:
    pass


@dataclass(slots=True)
class Release:
    fh: int
    flags: int
    release_flags: int
    lock_owner: int


@dataclass(slots=True)
class Fsync:
    fh: int
    flags: int


@dataclass(slots=True)
class Setxattr:
    size: int
    flags: int
    name: bytes
    value: memoryview


@dataclass(slots=True)
class Getxattr:
    size: int
    name: bytes


@dataclass(slots=True)
class Listxattr:
    size: int


@dataclass(slots=True)
class Removexattr:
    name: bytes


@dataclass(slots=True)
class Flush:
    fh: int
    lock_owner: int


@dataclass(slots=True)
class Init:
    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int = 0

    @property
    def capabilities(self) -> int:
        """Both halves as one number; `flags2` counts only with INIT_EXT (bit 30)."""
        return self.flags | (self.flags2 << 32 if self.flags & (1 << 30) else 0)


@dataclass(slots=True)
class Opendir(Open):
    pass


@dataclass(slots=True)
class Readdir(Read):
    pass


@dataclass(slots=True)
class Readdirplus(Read):
    pass


@dataclass(slots=True)
class Releasedir(Release):
    pass


@dataclass(slots=True)
class Fsyncdir(Fsync):
    pass


@dataclass(slots=True)
class Getlk:
    fh: int
    owner: int
    start: int
    end: int
    type: int
    pid: int
    flags: int


@dataclass(slots=True)
class Setlk(Getlk):
    pass


@dataclass(slots=True)
class Setlkw(Getlk):
    pass


@dataclass(slots=True)
class Access:
    mask: int


@dataclass(slots=True)
class Create:
    flags: int
    mode: int
    umask: int
    open_flags: int
    name: bytes


@dataclass(slots=True)
class Tmpfile(Create):
    pass


@dataclass(slots=True)
class Interrupt:
    unique: int


@dataclass(slots=True)
class Bmap:
    block: int
    blocksize: int


@dataclass(slots=True)
class Destroy:
    pass


@dataclass(slots=True)
class Ioctl:
    fh: int
    flags: int
    cmd: int
    arg: int
    in_size: int
    out_size: int
    data: memoryview


@dataclass(slots=True)
class Poll:
    fh: int
    kh: int
    flags: int
    events: int


@dataclass(slots=True)
class NotifyReply:
    offset: int
    size: int
    data: memoryview


@dataclass(slots=True)
class BatchForget:
    forgets: list[tuple[int, int]] = field(default_factory=list)
    """(nodeid, nlookup) pairs."""


@dataclass(slots=True)
class Fallocate:
    fh: int
    offset: int
    length: int
    mode: int


@dataclass(slots=True)
class Lseek:
    fh: int
    offset: int
    whence: int


@dataclass(slots=True)
class CopyFileRange:
    fh_in: int
    offset_in: int
    nodeid_out: int
    fh_out: int
    offset_out: int
    length: int
    flags: int


@dataclass(slots=True)
class CopyFileRange64(CopyFileRange):
    pass


@dataclass(slots=True)
class Syncfs:
    pass


@dataclass(slots=True)
class Statx:
    getattr_flags: int
    fh: int
    flags: int
    mask: int


@dataclass(slots=True)
class Op:
    """A row of the opcode table. `handler` is the FileSystem method that serves it."""

    opcode: Opcode
    handler: str
    request: type
    layout: Struct
    names: int
    rest: bool


def _op(opcode: Opcode, request: type, layout: str = "", names: int = 0, rest: bool = False, handler: str = "") -> Op:
    return Op(opcode, handler or opcode.name.lower(), request, Struct("<" + layout), names, rest)


_READ, _LOCK, _CREATE = "QQIIQI4x", "QQQQIII4x", "IIII"

OPS: dict[int, Op] = {
    op.opcode: op
    for op in (
        _op(Opcode.LOOKUP, Lookup, names=1),
        _op(Opcode.FORGET, Forget, "Q"),
        _op(Opcode.GETATTR, Getattr, "I4xQ"),
        _op(Opcode.SETATTR, Setattr, "I4xQQQQQQIIII4xII4x"),
        _op(Opcode.READLINK, Readlink),
        _op(Opcode.SYMLINK, Symlink, names=2),
        _op(Opcode.MKNOD, Mknod, "III4x", names=1),
        _op(Opcode.MKDIR, Mkdir, "II", names=1),
        _op(Opcode.UNLINK, Unlink, names=1),
        _op(Opcode.RMDIR, Rmdir, names=1),
        _op(Opcode.RENAME, Rename, "Q", names=2),
        _op(Opcode.LINK, Link, "Q", names=1),
        _op(Opcode.OPEN, Open, "II"),
        _op(Opcode.READ, Read, _READ),
        _op(Opcode.WRITE, Write, _READ, rest=True),
        _op(Opcode.STATFS, Statfs),
        _op(Opcode.RELEASE, Release, "QIIQ"),
        _op(Opcode.FSYNC, Fsync, "QI4x"),
        _op(Opcode.SETXATTR, Setxattr, "II", names=1, rest=True),
        _op(Opcode.GETXATTR, Getxattr, "I4x", names=1),
        _op(Opcode.LISTXATTR, Listxattr, "I4x"),
        _op(Opcode.REMOVEXATTR, Removexattr, names=1),
        _op(Opcode.FLUSH, Flush, "Q8xQ"),
        _op(Opcode.INIT, Init, "IIII"),
        _op(Opcode.OPENDIR, Opendir, "II"),
        _op(Opcode.READDIR, Readdir, _READ),
        _op(Opcode.RELEASEDIR, Releasedir, "QIIQ"),
        _op(Opcode.FSYNCDIR, Fsyncdir, "QI4x"),
        _op(Opcode.GETLK, Getlk, _LOCK),
        _op(Opcode.SETLK, Setlk, _LOCK),
        _op(Opcode.SETLKW, Setlkw, _LOCK),
        _op(Opcode.ACCESS, Access, "I4x"),
        _op(Opcode.CREATE, Create, _CREATE, names=1),
        _op(Opcode.INTERRUPT, Interrupt, "Q"),
        _op(Opcode.BMAP, Bmap, "QI4x"),
        _op(Opcode.DESTROY, Destroy),
        _op(Opcode.IOCTL, Ioctl, "QIIQII", rest=True),
        _op(Opcode.POLL, Poll, "QQII"),
        _op(Opcode.NOTIFY_REPLY, NotifyReply, "8xQI20x", rest=True),
        _op(Opcode.BATCH_FORGET, BatchForget, "I4x", rest=True),
        _op(Opcode.FALLOCATE, Fallocate, "QQQI4x"),
        _op(Opcode.READDIRPLUS, Readdirplus, _READ),
        _op(Opcode.RENAME2, Rename2, "QI4x", names=2, handler="rename"),
        _op(Opcode.LSEEK, Lseek, "QQI4x"),
        _op(Opcode.COPY_FILE_RANGE, CopyFileRange, "QQQQQQQ"),
        _op(Opcode.SYNCFS, Syncfs, "8x"),
        _op(Opcode.TMPFILE, Tmpfile, _CREATE, names=1),
        _op(Opcode.STATX, Statx, "I4xQII"),
        _op(Opcode.COPY_FILE_RANGE_64, CopyFileRange64, "QQQQQQQ", handler="copy_file_range"),
    )
}

_INIT_LONG = Struct("<IIIII")
_FORGET_ONE = Struct("<QQ")


def decode_header(data: memoryview | bytes | bytearray) -> Header:
    """The 40-byte in_header at the front of `data`. Raises WireError where the bytes do not reach or disagree."""
    if len(data) < IN_HEADER:
        raise WireError(f"{len(data)} bytes are less than a header")
    header = Header(*HEADER.unpack_from(data))
    if header.length != len(data):
        raise WireError(f"header says {header.length} bytes, {len(data)} were received")
    return header


def decode(data: memoryview) -> tuple[Header, object]:
    """A whole request as (header, value). Raises WireError, and nothing else, for bytes that are none.

    The value's `data` and `value` fields are views of `data`; names are copies.
    """
    header = decode_header(data)
    op = OPS.get(header.opcode)
    if op is None:
        raise WireError(f"unknown opcode {header.opcode}")
    return header, decode_body(op, data[IN_HEADER : header.length - header.extensions * 8])


def decode_body(op: Op, body: memoryview) -> object:
    """The value behind a header. `body` excludes header and extensions. Raises WireError."""
    if len(body) < op.layout.size:
        raise WireError(f"{op.opcode.name}: {len(body)} bytes of {op.layout.size}")
    fields: list[object] = list(op.layout.unpack_from(body))
    at = op.layout.size
    if op.names:
        raw = bytes(body[at:])
        start = 0
        for _ in range(op.names):
            end = raw.find(b"\0", start)
            if end < 0:
                raise WireError(f"{op.opcode.name}: a name without its NUL")
            fields.append(raw[start:end])
            start = end + 1
        at += start
    if op.rest:
        fields.append(body[at:])
    return _finish(op, fields, body)


def _finish(op: Op, fields: list[object], body: memoryview) -> object:
    """The few requests whose tail depends on their head."""
    if op.opcode is Opcode.INIT:
        # Kernels before INIT_EXT sent 16 bytes; the second flag word stands behind them.
        return Init(*(_INIT_LONG.unpack_from(body) if len(body) >= _INIT_LONG.size else fields))
    if op.opcode is Opcode.BATCH_FORGET:
        count, tail = fields[0], body[op.layout.size :]
        if not isinstance(count, int) or count * _FORGET_ONE.size > len(tail):
            raise WireError(f"BATCH_FORGET: {count} entries in {len(tail)} bytes")
        return BatchForget([_FORGET_ONE.unpack_from(tail, i * _FORGET_ONE.size) for i in range(count)])
    if op.opcode in (Opcode.WRITE, Opcode.SETXATTR, Opcode.NOTIFY_REPLY):
        value = op.request(*fields)
        tail = value.value if op.opcode is Opcode.SETXATTR else value.data
        if len(tail) < value.size:
            raise WireError(f"{op.opcode.name}: {len(tail)} bytes of payload, {value.size} announced")
        if op.opcode is Opcode.SETXATTR:
            value.value = tail[: value.size]
        else:
            value.data = tail[: value.size]
        return value
    return op.request(*fields)
