"""The workloads of volumes: a far store, random writes, metadata, clones of very fragmented files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import servers

from bench import far, peers, work
from bench.far import Far, Site, run

MIB, GIB = 1 << 20, 1 << 30
WBFUSE = [sys.executable, "-m", "wbfuse"]


def copy_until_durable(peer: Far, source: Path) -> tuple[float, float]:
    """Seconds until cp has returned, and until the copy is in the store."""
    start = time.monotonic()
    run("cp", str(source), str(peer.path / "copy"))
    returned = time.monotonic() - start
    peer.durable()
    return returned, time.monotonic() - start


def far_copies(root: Path, size: int) -> dict[str, float]:
    """Seconds to copy a file of random bytes over the slow link until it is durable, by peer; and to read it back."""
    found: dict[str, float] = {}
    source = root / "source"
    work.make_source(source, size)
    with far.site(root) as site:
        meta = f"sqlite:///{root}/wbfuse.db"
        log = ("--log-size", f"{2 * size // MIB + 256}MiB", "--on-close", "background")
        with far.wbfuse(site, "wb", meta, site.endpoint, *log) as peer:
            found["returned"], found["wbfuse"] = copy_until_durable(peer, source)
        with far.wbfuse(site, "wb", meta, site.endpoint, "--log-size", "128MiB", fresh=False) as peer:
            peers.quiet()
            work.make_warm(source)
            start = time.monotonic()
            run("cmp", str(source), str(peer.path / "copy"))
            found["read"] = time.monotonic() - start
        others: list[tuple[str, Callable[[], contextlib.AbstractContextManager[Far]]]] = [
            ("JuiceFS", lambda: far.juicefs(site, "juice", f"sqlite3://{root}/juice.db", site.endpoint)),
            ("JuiceFS --writeback", lambda: far.juicefs(
                site, "juicewb", f"sqlite3://{root}/juicewb.db", site.endpoint, "--writeback")),
            ("rclone", lambda: far.rclone(site, "rclone", site.endpoint)),
            ("s3fs", lambda: far.s3fs(site, "s3fs", site.endpoint)),
        ]  # fmt: skip
        for name, mount in others:
            with mount() as peer:
                found[name] = copy_until_durable(peer, source)[1]
        found["scp"] = far.scp(site, source)
    with peers.Field(root / "c") as field:
        c = field.c("C", "writeback")
        start = time.monotonic()
        run("cp", str(source), str(c.path / "copy"))
        found["C returned"] = time.monotonic() - start
    return found


def random_writes(peer: Far, size: int, count: int, every: int = 32) -> float:
    """4 KiB writes a second at random places of a sparse image, with an fsync after each `every`."""
    rng = random.Random(7)
    block = os.urandom(4096)
    fd = os.open(peer.path / "image", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    os.fsync(fd)
    start = time.monotonic()
    for i in range(1, count + 1):
        os.pwrite(fd, block, rng.randrange(size // 4096) * 4096)
        if i % every == 0:
            os.fsync(fd)
    rate = count / (time.monotonic() - start)
    os.close(fd)
    return rate


def far_random_writes(root: Path, count: int) -> dict[str, float]:
    """Operations a second of durable random writes over the link, and bytes uploaded for each byte written."""
    found = {}
    with far.site(root) as site:
        with far.wbfuse(site, "wb", f"sqlite:///{root}/wb.db", site.endpoint, "--log-size", "256MiB") as peer:
            before = uploaded(peer)
            found["wbfuse"] = random_writes(peer, 4 * GIB, count)
            peer.durable()
            found["amplification"] = (uploaded(peer) - before) / (count * 4096)
        with far.juicefs(site, "juice", f"sqlite3://{root}/juice.db", site.endpoint) as peer:
            found["JuiceFS"] = random_writes(peer, 4 * GIB, count)
        log = ("--log-size", "256MiB", "--log", str(root / "log"), "--fsync", "log")
        with far.wbfuse(site, "wb2", f"sqlite:///{root}/wb2.db", site.endpoint, *log) as peer:
            found["by log"] = random_writes(peer, 4 * GIB, count)
            peer.durable()
        with far.juicefs(site, "juice2", f"sqlite3://{root}/juice2.db", site.endpoint, "--writeback") as peer:
            found["JuiceFS wb"] = random_writes(peer, 4 * GIB, count)
            peer.durable()
    return found


def uploaded(peer: Far) -> int:
    status = json.loads(run(*WBFUSE, "status", "--json", str(peer.path)))
    return int(status["store"]["bytes_written"])


def metadata(peer: Far, count: int) -> dict[str, float]:
    """Seconds to create, stat, list, rename and remove so many empty files in one directory."""
    directory = peer.path / "many"
    directory.mkdir()
    names = [str(directory / f"file-{i}") for i in range(count)]

    def create() -> None:
        for name in names:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))

    def rename() -> None:
        for name in names:
            os.rename(name, name + "-renamed")

    def remove() -> None:
        for name in names:
            os.unlink(name + "-renamed")

    def forgotten(act: Callable[[], object]) -> Callable[[], object]:
        """With nothing of it in the kernel's caches."""
        Path("/proc/sys/vm/drop_caches").write_text("2")
        return act

    steps: dict[str, Callable[[], object]] = {
        "create": create,
        "stat": lambda: [os.stat(name) for name in names],
        "list": lambda: len(os.listdir(directory)),
        "rename": rename,
        "remove": remove,
    }
    found = {}
    for name, act in steps.items():
        forgotten(act)
        start = time.monotonic()
        act()
        found[name] = time.monotonic() - start
    return found


@contextlib.contextmanager
def _metadata_site(root: Path, kind: str) -> Iterator[tuple[Site, str, str]]:
    """Servers near, and META for wbfuse and for JuiceFS."""
    with far.site(root) as site:
        if kind == "SQLite":
            yield site, f"sqlite:///{root}/wb.db", f"sqlite3://{root}/juice.db"
            return
        root.chmod(0o755)
        with servers.postgres_server(root / "postgres") as postgres:
            juice = postgres.create("juice").removeprefix("postgresql://")
            yield site, postgres.create("wb"), f"postgres://{juice}?sslmode=disable"


def metadata_against_juicefs(root: Path, kind: str, count: int) -> dict[str, tuple[float, float]]:
    """Seconds of wbfuse and of JuiceFS, by operation."""
    with _metadata_site(root, kind) as (site, ours, theirs):
        with far.wbfuse(site, "wb", ours, site.near, "--log-size", "128MiB") as peer:
            mine = metadata(peer, count)
        with far.juicefs(site, "juice", theirs, site.near) as peer:
            other = metadata(peer, count)
    return {name: (mine[name], other[name]) for name in mine}


FRAGMENTED = """
import os, sys, time
from sqlalchemy import insert
from wbfuse.store.contract import ROOT_INO, Owner, Piece, Round
from wbfuse.store.volume import Tuning, VolumeStore, format_volume
from wbfuse.store.volume.rows import as_row, rows_in
from wbfuse.store.volume.schema import extents, packs, inodes
from sqlalchemy import update

def resident():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) * 1024

meta, data, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
format_volume(meta, data, {})
store = VolumeStore(meta, Tuning(dump_interval=0, compact_rate=0))
ino, _ = store.create(ROOT_INO, b'image', 0o644, Owner(0, 0))
store.commit([Round(ino, None, [Piece(0, 4096, [memoryview(os.urandom(4096))])], 8192 * count)], lambda n: None)
row = store.database.query(lambda c: c.execute(inodes.select().where(inodes.c.ino == ino)).one())
first, = store.database.query(lambda c: rows_in(c, row.layer, 0, 4096))
for at in range(1, count, 20000):  # rows as random writes leave them, all of one frame: what counts here is how many
    some = [as_row(row.layer, first._replace(start=8192 * i)) for i in range(at, min(count, at + 20000))]
    def fill(c):
        c.execute(insert(extents), some)
        c.execute(update(packs).where(packs.c.pack == first.pack).values(live=packs.c.live + 4096 * len(some)))
    store.database.transact(fill)
before = len(list(store.objects.list('packs')))
began = time.monotonic()
store.clone(ino, ROOT_INO, b'clone')
cloned = time.monotonic() - began
found, _ = store.lookup(ROOT_INO, b'clone')
buffer = memoryview(bytearray(1 << 20))
idle = resident()
most = 0
for at in range(0, 8192 * count, 8 << 20):
    store.read(found, at, buffer)
    most = max(most, resident())
assert len(list(store.objects.list('packs'))) == before
print(cloned, (most - idle) / (1 << 20))
store.close()
"""


def fragmented(root: Path, kind: str, count: int) -> tuple[float, float]:
    """Seconds to clone a file of so many extents, and MiB that reading all over it takes in memory."""
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o755)
    with contextlib.ExitStack() as stack:
        if kind == "SQLite":
            meta = f"sqlite:///{root}/fragmented.db"
        else:
            meta = stack.enter_context(servers.postgres_server(root / "postgres")).create("fragmented")
        words = [sys.executable, "-c", FRAGMENTED, meta, f"file://{root}/objects-{kind}", str(count)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
    cloned, memory = done.stdout.split()
    return float(cloned), float(memory)
