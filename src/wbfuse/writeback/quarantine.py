"""Where dirty data goes that can never be committed: another host writes the file now, or the store has it no more.

A directory of entries, each a sparse file `data` with the bytes at their offsets and a `manifest.json` that says what
they are. An entry is there whole or not at all: it is made under a temporary name and renamed after fsync.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from wbfuse.store.contract import Piece
from wbfuse.store.directory.syscalls import fallocate
from wbfuse.wire.constants import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE

log = logging.getLogger(__name__)

_COPY = 8 << 20
_MANIFEST, _DATA = "manifest.json", "data"


def default_directory() -> str:
    """Below XDG_STATE_HOME, which is /var/lib for root where it is not set."""
    home = "/var/lib" if os.geteuid() == 0 else os.path.expanduser("~/.local/state")
    base = os.environ.get("XDG_STATE_HOME") or home
    return os.path.join(base, "wbfuse", "quarantine")


@dataclass(slots=True)
class Kept:
    """One entry: `ranges` are the (start, end) of bytes that were written, holes included."""

    name: str
    path: str
    manifest: dict[str, Any]

    @property
    def data(self) -> str:
        return os.path.join(self.path, _DATA)

    @property
    def images(self) -> tuple[str, str] | None:
        """Log and journal of a mount that could not be served, where that is what was kept."""
        if self.manifest.get("kind") != "log":
            return None
        return os.path.join(self.path, "log"), os.path.join(self.path, "journal")

    def sound(self) -> bool:
        """Whether the images are what was kept. Raises OSError."""
        wanted = self.manifest.get("checksums")
        if wanted is None:  # it was kept before there were any
            return True
        return all(os.path.exists(p) and wanted.get(os.path.basename(p)) == _checksum(p) for p in self.images or ())


def keep_log(directory: str, source: str, images: dict[str, int]) -> str:
    """Keep the memory files of a mount that nobody can serve, by name. Answers the entry's name. Raises OSError."""

    def fill(making: str) -> dict[str, Any]:
        for name, fd in images.items():
            with open(os.path.join(making, name), "xb") as out:
                size = os.fstat(fd).st_size
                out.truncate(size)
                for at in range(0, size, _COPY):
                    part = os.pread(fd, min(_COPY, size - at), at)
                    if part.strip(b"\0"):
                        os.pwrite(out.fileno(), part, at)
                os.fsync(out.fileno())
        checksums = {name: _checksum(os.path.join(making, name)) for name in images}
        return {"source": source, "kind": "log", "ino": 0, "path": "the log of a mount that could not be served",
                "size": 0, "ranges": [], "checksums": checksums}  # fmt: skip

    return _make(directory, "log", fill)


def keep(directory: str, source: str, ino: int, path: str, size: int, rounds: Iterable[list[Piece]]) -> str:
    """Keep the pieces of `rounds`, oldest first. Answers the entry's name. Raises OSError."""

    def fill(making: str) -> dict[str, Any]:
        ranges = write_out(os.path.join(making, _DATA), size, rounds)
        return {"source": source, "ino": ino, "path": path, "size": size, "ranges": ranges}

    return _make(directory, str(ino), fill)


def _checksum(path: str) -> str:
    check = xxhash.xxh3_64()
    with open(path, "rb") as f:
        while part := f.read(_COPY):
            check.update(part)
    return check.hexdigest()


def _make(directory: str, what: str, fill: Callable[[str], dict[str, Any]]) -> str:
    """An entry that is there whole or not at all: `fill` puts its files into a directory and answers the manifest."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{what}-{secrets.token_hex(3)}"
    making = os.path.join(directory, f".{name}")
    os.mkdir(making, 0o700)
    try:
        manifest = fill(making) | {"kept_at": time.time()}
        with open(os.path.join(making, _MANIFEST), "w", encoding="utf-8") as out:
            json.dump(manifest, out)
            out.flush()
            os.fsync(out.fileno())
        os.rename(making, os.path.join(directory, name))
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    parent = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    return name


def _write(fd: int, piece: Piece) -> None:
    at = piece.offset
    if piece.buffers is None:
        length = min(piece.length, os.fstat(fd).st_size - at)
        if length > 0:
            fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, at, length)
        return
    for buffer in piece.buffers:
        done = 0
        while done < len(buffer):
            done += os.pwrite(fd, buffer[done:], at + done)
        at += len(buffer)


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


def entries(directory: str) -> list[Kept]:
    """What is kept, oldest first."""
    if not os.path.isdir(directory):
        return []
    out = []
    for name in sorted(os.listdir(directory)):
        if not name.startswith("."):
            path = os.path.join(directory, name)
            try:
                with open(os.path.join(path, _MANIFEST), encoding="utf-8") as f:
                    out.append(Kept(name, path, _sane(json.load(f))))
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
                log.warning("%s: not an entry of the quarantine: %s", path, e)
    return out


def _sane(manifest: Any) -> dict[str, Any]:
    """A manifest with all that is asked of it. Raises ValueError, KeyError or TypeError."""
    for name, kind in (("source", str), ("path", str), ("ino", int), ("kept_at", int | float), ("ranges", list)):
        if not isinstance(manifest[name], kind):
            raise ValueError(f"its {name} makes no sense")
    if not all(isinstance(start, int) and isinstance(end, int) for start, end in manifest["ranges"]):
        raise ValueError("its ranges make no sense")
    return dict(manifest)


def discard(kept: Kept) -> None:
    going = os.path.join(os.path.dirname(kept.path), f".{kept.name}")
    os.rename(kept.path, going)  # half an entry is none
    shutil.rmtree(going)


def write_out(target: str, size: int, rounds: Iterable[list[Piece]]) -> list[tuple[int, int]]:
    """A new sparse file with these pieces, oldest first. Answers the ranges that they cover. Raises OSError."""
    ranges: list[tuple[int, int]] = []
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, size)
        for pieces in rounds:
            for piece in pieces:
                ranges.append((piece.offset, piece.offset + piece.length))
                _write(fd, piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    return _merged(ranges)


def export(kept: Kept, target: str) -> None:
    """Copy the bytes of an entry to a new file, holes as holes. Raises OSError."""
    out_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(kept.data, "rb") as source, os.fdopen(out_fd, "wb") as out:
        size = os.fstat(source.fileno()).st_size
        out.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(source.fileno(), at, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:  # holes up to the end
                    break
                raise
            end = os.lseek(source.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += os.pwrite(out.fileno(), os.pread(source.fileno(), min(end - at, _COPY), at), at)
        os.fsync(out.fileno())
