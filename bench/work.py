"""The workloads: each does its work in the calling process (or a child) and answers seconds or a rate."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.peers import Peer, quiet

MIB = 1 << 20


def make_source(path: Path, size: int) -> None:
    """A file of random bytes, in the page cache."""
    with open(path, "wb") as f:
        f.writelines(os.urandom(MIB) for _ in range(size // MIB))
    path.read_bytes()


def make_warm(path: Path) -> None:
    """Bring a file into the page cache."""
    with open(path, "rb", buffering=0) as f:
        buffer = memoryview(bytearray(MIB))
        while f.readinto(buffer):
            pass


def copy_with_fsync(peer: Peer, source: Path) -> float:
    """Seconds to copy `source` into a new file and have it on the disk.

    The file below is synced as well: pyfuse3's example does not implement fsync, so there the kernel's answer to it
    says nothing; for the others that second sync finds nothing to do.
    """
    target = peer.path / "copy"
    buffer = memoryview(bytearray(MIB))
    start = time.monotonic()
    with open(source, "rb", buffering=0) as a, open(target, "wb", buffering=0) as b:
        while n := a.readinto(buffer):
            b.write(buffer[:n])
        os.fsync(b.fileno())
    below = os.open(peer.source / "copy", os.O_RDONLY)
    os.fsync(below)
    elapsed = time.monotonic() - start
    os.close(below)
    target.unlink()
    os.sync()
    return elapsed


def small_buffered_writes(peer: Peer, count: int, spread: int) -> float:
    """Microseconds for a buffered write of 4 KiB: appended to a new file, or (`spread` > 0) random in so many bytes."""
    target = peer.path / "small-writes"
    block = os.urandom(4096)
    fd = os.open(target, os.O_CREAT | os.O_RDWR)
    offsets = [i * 4096 for i in range(count)]
    if spread:
        for at in range(0, spread, MIB):
            os.pwrite(fd, bytes(MIB), at)
        os.fsync(fd)
        rng = random.Random(1)
        offsets = [rng.randrange(spread // 4096) * 4096 for _ in range(count)]
    start = time.monotonic()
    for offset in offsets:
        os.pwrite(fd, block, offset)
    elapsed = time.monotonic() - start
    os.close(fd)
    target.unlink()
    os.sync()
    return elapsed / count * 1e6


def sequential_cold_read(peer: Peer, name: str) -> float:
    """Seconds to read a file of which nothing is cached, neither by the mount nor below it."""
    quiet()
    buffer = memoryview(bytearray(MIB))
    start = time.monotonic()
    with open(peer.path / name, "rb", buffering=0) as f:
        while f.readinto(buffer):
            pass
    return time.monotonic() - start


def small_files(peer: Peer, count: int) -> float:
    """Seconds to create, write 4 KiB into and close so many files.

    They are left: ext4 looks twice at each inode that was freed a moment ago, and would be what is measured next. The
    kernel is made to forget them, for the C example keeps a descriptor for each that it has not.
    """
    here = tempfile.mkdtemp(dir=peer.path)
    block = os.urandom(4096)
    start = time.monotonic()
    for i in range(count):
        fd = os.open(f"{here}/{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, block)
        os.close(fd)
    elapsed = time.monotonic() - start
    quiet()
    return elapsed


def processor_per_write(peer: Peer, count: int) -> tuple[float, float]:
    """(daemon's processor microseconds, caller's wall microseconds) for one write(2) of 4 KiB that goes through."""
    fd = os.open(peer.path / "through", os.O_CREAT | os.O_RDWR)
    block = os.urandom(4096)
    for i in range(2000):
        os.pwrite(fd, block, i * 4096)
    used, start = peer.processor_seconds(), time.monotonic()
    for i in range(count):
        os.pwrite(fd, block, i % 4096 * 4096)
    wall = time.monotonic() - start
    used = peer.processor_seconds() - used
    os.close(fd)
    return used / count * 1e6, wall / count * 1e6


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def getattr_latency(peer: Peer, seconds: float) -> list[float]:
    """Seconds of each forced GETATTR (statx with AT_STATX_FORCE_SYNC) of an open file."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(peer.path / "watched", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"x")
    buffer = ctypes.create_string_buffer(256)
    out = []
    end = time.monotonic() + seconds
    while (start := time.monotonic()) < end:
        if libc.statx(fd, b"", 0x1000 | 0x2000, 0x7FF, buffer) != 0:
            raise OSError(ctypes.get_errno(), "statx")
        out.append(time.monotonic() - start)
        time.sleep(0.001)
    os.close(fd)
    return out


def _saturate(path: str) -> None:
    block = os.urandom(MIB)
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    while True:
        for _ in range(1024):
            os.write(fd, block)
        os.lseek(fd, 0, os.SEEK_SET)


def _answer_p99(peer: Peer) -> float:
    """p99 in microseconds of the reader thread's last thousand answers; 0 for other peers."""
    done = subprocess.run(
        [sys.executable, "-m", "wbfuse", "status", "--json", str(peer.path)], capture_output=True, check=False
    )
    return float(json.loads(done.stdout)["answers"]["p99_us"]) if done.returncode == 0 else 0.0


def _bystander_p99(seconds: float) -> float:
    """p99 in microseconds of a few microseconds of work in a process that has nothing to do with the mount."""
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)
        start = time.perf_counter_ns()
        sum(range(300))
        times.append(time.perf_counter_ns() - start)
    return percentile(times, 0.99) / 1e3


@dataclass
class Waits:
    """p99 in microseconds."""

    caller: float
    """A forced GETATTR as its caller sees it, behind the WRITEs that stand before it in the kernel's queue."""
    answer: float
    """The reader thread's own answer to it."""
    bystander: float


def getattr_under_load(peer: Peer, seconds: float) -> tuple[Waits, Waits]:
    """How long a GETATTR takes, idle and while a fast writer saturates write-back."""
    idle = _waits(peer, seconds)
    writer = mp.Process(target=_saturate, args=(str(peer.path / "flood"),), daemon=True)
    writer.start()
    time.sleep(1.0)  # until the log is in steady state
    busy = _waits(peer, seconds)
    writer.terminate()
    writer.join()
    (peer.path / "flood").unlink()
    return idle, busy


def _waits(peer: Peer, seconds: float) -> Waits:
    caller = percentile(getattr_latency(peer, seconds), 0.99) * 1e6
    return Waits(caller, _answer_p99(peer), _bystander_p99(seconds))
