"""Bytes that nobody meant: requests, images of logs, the control socket, the rows of a volume.

WBFUSE_FUZZ is how many of each; `make torture` asks for many.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import resource
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import BigInteger, Column, LargeBinary, update

from tests.test_volume_check import QUIET
from wbfuse.control.client import ask
from wbfuse.control.paths import ControlError
from wbfuse.control.server import ControlServer
from wbfuse.filesystem.cached_fs import CachedFileSystem
from wbfuse.filesystem.store_fs import StoreFileSystem
from wbfuse.journal import Journal, Kind
from wbfuse.session.session import Session
from wbfuse.store.contract import ROOT_INO
from wbfuse.store.directory import DirectoryStore
from wbfuse.store.volume import VolumeError, VolumeStore, format_volume
from wbfuse.store.volume.admin.check import check
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.schema import dentries, extents, inodes, layers, packs
from wbfuse.testing.store import ME, put
from wbfuse.wire import requests as wire
from wbfuse.wire.constants import Opcode
from wbfuse.writeback.cache import GEOMETRY, WritebackCache
from wbfuse.writeback.engine import Engine
from wbfuse.writeback.log import Log, LogError
from wbfuse.writeback.renames import DeferredRenames
from wbfuse.writeback.salvage import dirty_files

COUNT = int(os.environ.get("WBFUSE_FUZZ", "300"))
HEADER = struct.Struct("<IIQQIIIHH")


# a kernel that sends anything


class Kernel:
    """The other end of a connection that looks like /dev/fuse."""

    def __init__(self, fs: StoreFileSystem) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        for end in (self.socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.session = Session(theirs.detach(), fs)
        self.uniques = 0
        self.session.start()
        body = struct.pack("<IIIIII44x", 7, 45, 1 << 20, 0xFFFFFFFF & ~(1 << 13), 0xFFFFFFFF, 0)
        assert self.ask(Opcode.INIT, 0, body)[0] == 0

    def send(self, opcode: int, nodeid: int, body: bytes, length: int | None = None, bits: int = 0) -> int:
        self.uniques += 2
        unique = self.uniques | bits
        raw = HEADER.pack(40 + len(body) if length is None else length, opcode, unique, nodeid, 0, 0, os.getpid(), 0, 0)
        self.socket.send(raw + body)
        return unique

    def ask(self, opcode: int, nodeid: int, body: bytes) -> tuple[int, bytes]:
        """(errno, what follows the header) of the answer to a sound request; whatever else comes is passed over."""
        unique = self.send(opcode, nodeid, body)
        while True:
            raw = self.socket.recv(4 << 20)
            assert raw, "the connection has ended"
            length, error, answered = struct.unpack_from("<IiQ", raw)
            assert length == len(raw)
            if answered == unique:
                return -error, raw[16:]

    def quiet(self) -> None:
        """Take the answers that are there, so that nobody waits to send one."""
        while select.select([self.socket], [], [], 0)[0]:
            self.socket.recv(4 << 20)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)
        while self.socket.recv(4 << 20):
            pass
        self.session.wait()
        self.socket.close()


def body_of(op: wire.Op, rng: random.Random, files: list[tuple[int, int]]) -> bytes:
    """A body of the right shape, with plausible fields."""
    raw = bytearray(rng.choice((bytes(op.layout.size), rng.randbytes(op.layout.size))))
    if files and len(raw) >= 8 and rng.random() < 0.7:
        raw[:8] = rng.choice(files)[1].to_bytes(8, "little")
    if len(raw) >= 24 and rng.random() < 0.7:  # offset, size of READ, WRITE and their like
        struct.pack_into("<QI", raw, 8, rng.randrange(100_000), rng.randrange(9000))
    names = b"".join(
        rng.choice((b"a", b"b", b"..", b"x" * 300, rng.randbytes(5), b"a/b")) + b"\0" for _ in range(op.names)
    )
    return bytes(raw) + names + (rng.randbytes(rng.randrange(9000)) if op.rest or op.opcode == Opcode.WRITE else b"")


def mutate(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.randrange(4)):
        if not out:
            break
        at = rng.randrange(len(out))
        what = rng.randrange(4)
        if what == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), b"\x00" * 7 + b"\x80"))[: len(out) - at]
        elif what == 2:
            del out[at:]
        else:
            out += rng.randbytes(rng.randrange(100))
    return bytes(out)


@pytest.fixture(params=["cached", "written through"])
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kernel]:
    source = tmp_path / "source"
    source.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, hard))  # requests for petabytes shall not fill the disk
    (tmp_path / "secret").write_bytes(b"nobody's business")
    store = DirectoryStore(str(source))
    if request.param == "cached":
        renames = DeferredRenames(store, Journal())
        cache = WritebackCache(renames.as_store(), 32 << 20, 1 << 20, 4 << 20)
        fs: StoreFileSystem = CachedFileSystem(renames, cache, Engine(cache, 0.05), True)
    else:
        fs = StoreFileSystem(store)
    made = Kernel(fs)
    yield made
    made.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_request_crashes_the_server_or_leaves_the_source(
    kernel: Kernel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    rng = random.Random(COUNT)
    files: list[tuple[int, int]] = []
    for name in (b"a", b"b"):
        error, reply = kernel.ask(Opcode.CREATE, 1, struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + name + b"\0")
        assert error == 0
        files.append((struct.unpack_from("<Q", reply)[0], struct.unpack_from("<Q", reply, 128)[0]))
    ops = [op for op in wire.OPS.values() if op.opcode not in (Opcode.INIT, Opcode.DESTROY, Opcode.NOTIFY_REPLY)]
    for _ in range(COUNT):
        for _ in range(20):
            op = rng.choice(ops)
            nodeid = rng.choice((1, files[0][0], files[1][0], rng.randrange(50), rng.getrandbits(64)))
            body = mutate(body_of(op, rng, files), rng)
            wrong = 40 + len(body) + rng.choice((-3, 1, 4000)) if rng.random() < 0.05 else None
            bits = 1 << 63 if rng.random() < 0.1 else 0
            kernel.send(op.opcode if rng.random() < 0.95 else rng.randrange(80), nodeid, body[:60_000], wrong, bits)
            kernel.quiet()
        assert kernel.ask(Opcode.GETATTR, 1, bytes(16))[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["secret", "source"]
    assert (tmp_path / "secret").read_bytes() == b"nobody's business"
    defects = {str(r.exc_info[1]) for r in caplog.records if r.exc_info and "a handler failed" in r.getMessage()}
    assert not defects


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../secret", b"a/../../secret", b".wbfuse"])
def test_no_name_leads_out(kernel: Kernel, tmp_path: Path, name: bytes) -> None:
    for opcode, head in (
        (Opcode.LOOKUP, b""), (Opcode.UNLINK, b""), (Opcode.RMDIR, b""), (Opcode.MKDIR, bytes(8)),
        (Opcode.CREATE, struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0)), (Opcode.SYMLINK, b""),
    ):  # fmt: skip
        assert kernel.ask(opcode, 1, head + name + b"\0target\0")[0] != 0
    assert (tmp_path / "secret").read_bytes() == b"nobody's business"


# images of logs


def test_no_image_of_a_log_makes_recover_fail_badly() -> None:
    log = Log(2 << 20, 1 << 17)
    journal = Journal()
    journal.put(Kind.LOG, 0, GEOMETRY.pack(2 << 20, 1 << 17))
    rng = random.Random(1)
    for n in range(60):
        place = log.put(memoryview(rng.randbytes(rng.randrange(1, 9000))))
        log.stamp(n, n % 3 + 2, rng.randrange(100_000), 1 + n * 100, place, n)
        journal.put(Kind.DIRTY, n % 3 + 2, (n // 2).to_bytes(8, "little"))
        journal.put(Kind.NODE, n % 5 + 2, rng.randbytes(40))
    images = [os.pread(fd, os.fstat(fd).st_size, 0) for fd in (log.fd, journal.fd)]
    records = log.geometry.head(0)
    refused = 0
    for _ in range(COUNT):
        fds = []
        for image, start in zip(images, (records, 0), strict=True):
            raw = bytearray(image)
            used = len(bytes(raw).rstrip(b"\0"))
            for _ in range(rng.randrange(4)):
                at = rng.randrange(start, max(used, start + 1))
                raw[at : at + 8] = rng.randbytes(len(raw[at : at + 8]))
            fds.append(os.memfd_create("image"))
            os.write(fds[-1], raw)
        try:
            for dirty in dirty_files(*fds):
                assert dirty.size >= 0
        except LogError:
            refused += 1
    assert refused < COUNT


# the control socket


def test_the_control_socket_answers_or_closes(tmp_path: Path) -> None:
    def status(_request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"done": True}

    path = str(tmp_path / "socket")
    server = ControlServer(path, {"status": status})
    rng = random.Random(2)
    sound = json.dumps({"command": "status", "path": "x"}).encode()
    try:
        for n in range(COUNT):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(20)
                connection.connect(path)
                raw = mutate(sound, rng) if n % 2 else rng.randbytes(rng.randrange(100_000))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(raw)
                    if n % 3:
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(65536):
                            pass
        assert list(ask(path, "status")) == [{"done": True}]
        with pytest.raises(ControlError, match="not understood"):
            list(ask(path, "nothing of the kind"))
    finally:
        server.close()
    assert threading.active_count() < 50


# the rows of a volume


def nobody(_what: str, _done: int, _all: int) -> None: ...


def wrong_value(column: Column[Any], rng: random.Random) -> Any:
    if isinstance(column.type, LargeBinary):
        return rng.randbytes(rng.randrange(60))
    return rng.choice(
        (0, -1, 1, 77, 4095, 1 << 30, *([1 << 40, (1 << 62) + 5] if isinstance(column.type, BigInteger) else []))
    )


def test_no_row_of_a_volume_makes_it_read_what_is_not_there(tmp_path: Path) -> None:
    """A file says what was written to it, or an error; never other bytes. `check` does not fail over it."""
    rng = random.Random(3)
    meta = f"sqlite:///{tmp_path}/volume.db"
    format_volume(meta, f"file://{tmp_path}/objects", {})
    store = VolumeStore(meta, QUIET)
    ino = store.create(ROOT_INO, b"a", 0o644, ME)[0]
    data = rng.randbytes(300_000)
    put(store, ino, data)
    store.close()
    raw = (tmp_path / "volume.db").read_bytes()
    columns = [c for t in (extents, inodes, layers, packs, dentries) for c in t.c if not c.primary_key]
    errors = 0
    for n in range(max(len(columns) * 3, COUNT // 5)):
        (tmp_path / "volume.db").write_bytes(raw)
        column = columns[n % len(columns)]
        database = Database(meta)
        change = update(column.table).values({column.name: wrong_value(column, rng)})
        with contextlib.suppress(OSError):  # the database itself may refuse it
            database.transact(lambda c, change=change: c.execute(change))  # type: ignore[misc]
        database.close()
        try:
            store = VolumeStore(meta, QUIET)
        except VolumeError:
            errors += 1
            continue
        try:
            found = store.lookup(ROOT_INO, b"a")[0]
            buffer = memoryview(bytearray(min(max(store.getattr(found).size, 0), 1 << 20)))
            same = bytes(buffer[: store.read(found, 0, buffer)])
            parts = [same[at : at + 64] for at in range(0, len(same), 64)]
            strange = [p for p in parts if p not in data and p.strip(b"\0")]
            assert len(strange) <= len(same) // 65536 + 2, "only where frames meet"
        except OSError:
            errors += 1
        finally:
            list(check(store.database, store.objects, store.settings["compress"], True, nobody))
            store.close()
    assert errors > 0
