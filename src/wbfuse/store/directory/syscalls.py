"""System calls that Python 3.11 lacks, as functions: statx, renameat2, fallocate, getdents64. They release the GIL."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from struct import Struct

from wbfuse.wire.types import NS, Attr, Dirent

_libc = ctypes.CDLL(None, use_errno=True)

AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_NO_AUTOMOUNT = 0x800
AT_STATX_DONT_SYNC = 0x4000
_WANTED = 0x7FF | 0x800  # STATX_BASIC_STATS | STATX_BTIME

_STATX = Struct("<IIQIIIH2xQQQQqI4xqI4xqI4xqI4xIIII")
_DIRENT = Struct("<QqHB")

_statx = _libc.statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
_renameat2 = _libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_getdents64 = _libc.getdents64
_getdents64.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
_getdents64.restype = ctypes.c_ssize_t

_HANDLE = Struct("<Ii")
_MAX_HANDLE = 128
_name_to_handle_at = _libc.name_to_handle_at
_name_to_handle_at.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
)
_open_by_handle_at = _libc.open_by_handle_at
_open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int)

Identity = tuple[int, int, int]
"""(device, inode number, birth time in ns): tells a file from another that got its inode number later."""


def _raise(name: bytes | None = None) -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), name)


def statx(dir_fd: int, name: bytes = b"", more: int = 0) -> tuple[Attr, Identity]:
    """Attributes and identity of `name` in `dir_fd` (of the descriptor itself where empty); no symlink is followed.

    `more`: further AT_* flags.
    """
    buffer = ctypes.create_string_buffer(256)
    flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | more | (0 if name else AT_EMPTY_PATH)
    if _statx(dir_fd, name, flags, _WANTED, buffer) != 0:
        _raise(name)
    (_mask, blksize, _attributes, nlink, uid, gid, mode, ino, size, blocks, _attr_mask, at, atn, bt, btn, ct, ctn,
     mt, mtn, rdev_major, rdev_minor, dev_major, dev_minor) = _STATX.unpack_from(buffer)  # fmt: skip
    rdev = os.makedev(rdev_major, rdev_minor) if rdev_major or rdev_minor else 0
    attr = Attr(ino, mode, size, blocks, at * NS + atn, mt * NS + mtn, ct * NS + ctn, nlink, uid, gid, rdev, blksize)
    return attr, (dev_major << 32 | dev_minor, ino, bt * NS + btn)


def renameat2(dir_fd: int, name: bytes, new_dir_fd: int, newname: bytes, flags: int) -> None:
    if _renameat2(dir_fd, name, new_dir_fd, newname, flags) != 0:
        _raise(name)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _fallocate(fd, mode, offset, length) != 0:
        _raise()


def handle_of(dir_fd: int, name: bytes = b"") -> bytes:
    """What `open_handle` finds this file by, whatever becomes of its names; empty where the file system has none."""
    buffer = ctypes.create_string_buffer(_HANDLE.pack(_MAX_HANDLE, 0), _HANDLE.size + _MAX_HANDLE)
    mount = ctypes.c_int()
    if _name_to_handle_at(dir_fd, name, buffer, ctypes.byref(mount), 0 if name else AT_EMPTY_PATH) != 0:
        return b""
    length, _ = _HANDLE.unpack_from(buffer)
    return buffer.raw[: _HANDLE.size + length]


def open_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open a file of the file system of `mount_fd` by its handle; ESTALE where it is gone (CAP_DAC_READ_SEARCH)."""
    fd: int = _open_by_handle_at(mount_fd, handle, flags)
    if fd < 0:
        _raise()
    return fd


def syncfs(fd: int) -> None:
    if _libc.syncfs(fd) != 0:
        _raise()


def max_file_size(dir_fd: int) -> int:
    """The largest size that a file in this directory may have, found by halving on a nameless file.

    2^63 - 1 where no such file can be made: then the store's own errors must do.
    """
    low, high = 0, (1 << 63) - 1
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    except OSError:
        return high
    try:
        while low < high:
            middle = (low + high + 1) // 2
            try:
                os.ftruncate(fd, middle)
            except OSError:
                high = middle - 1
            else:
                low = middle
    finally:
        os.close(fd)
    return low


def getdents(fd: int, size: int) -> bytes:
    """The next directory records as the kernel packs them; empty at the end."""
    buffer = ctypes.create_string_buffer(size)
    n = _getdents64(fd, buffer, size)
    if n < 0:
        _raise()
    return buffer.raw[:n]


def parse_dents(raw: bytes) -> Iterator[Dirent]:
    at = 0
    while at < len(raw):
        ino, offset, length, kind = _DIRENT.unpack_from(raw, at)
        start = at + _DIRENT.size
        yield Dirent(raw[start : raw.index(b"\0", start)], ino, kind, offset)
        at += length
