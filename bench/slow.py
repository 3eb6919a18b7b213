"""A store of 20 MB/s, a log of 64 MiB, three writers that never stop, all in one memory cgroup of 256 MiB.

What is looked at: memory, whether anything was killed, how long the writers pause, and how quick `stat` of names
never looked up before, `ls`, and 4 KiB reads with a cold page cache stay meanwhile.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.peers import quiet
from bench.work import MIB, percentile

GROUP = Path("/sys/fs/cgroup/memory/wbfuse-bench")
SECONDS = 20
WARM = 3.0


def _enter() -> None:
    (GROUP / "cgroup.procs").write_text(str(os.getpid()))


def _kills() -> int:
    text = (GROUP / "memory.oom_control").read_text()
    return int(dict(line.split() for line in text.splitlines()).get("oom_kill", 0))


def _stream(path: str, until: float, pauses: list[tuple[float, float]]) -> None:
    block = os.urandom(64 << 10)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    while time.monotonic() < until:
        start = time.monotonic()
        os.write(fd, block)
        pauses.append((start, time.monotonic() - start))


def _random(path: str, until: float, pauses: list[tuple[float, float]]) -> None:
    block = os.urandom(4096)
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 1 << 30)
    rng = random.Random(7)
    while time.monotonic() < until:
        start = time.monotonic()
        os.pwrite(fd, block, rng.randrange(1 << 18) * 4096)
        pauses.append((start, time.monotonic() - start))


def _writer(what: Callable[[str, float, list[tuple[float, float]]], None], path: str, until: float, out: str) -> None:
    _enter()
    pauses: list[tuple[float, float]] = []
    what(path, until, pauses)
    longest = sorted(pauses, key=lambda p: -p[1])[:50]
    Path(out).write_text(json.dumps({"writes": len(pauses), "longest": longest}))
    os._exit(0)  # the descriptor is closed by the kernel, after the result is there


def run(root: Path) -> dict[str, float]:
    """Answers the measured values, times in milliseconds and memory in MiB."""
    source, mount, results = root / "slow-source", root / "slow-mount", root / "slow-results"
    for path in (source, mount, results, source / "names"):
        path.mkdir()
    for i in range(4000):
        (source / "names" / f"{i}").touch()
    (source / "cold").write_bytes(os.urandom(64 * MIB))
    quiet()
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(256 * MIB))
    words = [sys.executable, "-m", "wbfuse"]
    options = ["--log-size", "64MiB", "--bwlimit", "20MB/s", "--on-close", "background"]
    subprocess.run([*words, "mount", str(source), str(mount), *options], check=True, preexec_fn=_enter)
    try:
        return _measure(words, mount, results)
    finally:
        subprocess.run([*words, "umount", str(mount)], check=True)
        GROUP.rmdir()


def _measure(words: list[str], mount: Path, results: Path) -> dict[str, float]:
    asked = subprocess.run([*words, "status", "--json", str(mount)], check=True, capture_output=True).stdout
    pid = json.loads(asked)["worker"]["pid"]
    began = time.monotonic()
    until = began + SECONDS
    writers = [
        mp.Process(target=_writer, args=(what, str(mount / name), until, str(results / name)))
        for name, what in (("stream1", _stream), ("stream2", _stream), ("random", _random))
    ]
    for writer in writers:
        writer.start()
    time.sleep(WARM)  # into the steady state
    stats, lists, reads, memory, n = [], [], [], 0, 0
    cold = os.open(mount / "cold", os.O_RDONLY)
    os.posix_fadvise(cold, 0, 0, os.POSIX_FADV_RANDOM)
    while time.monotonic() < until - 0.5:
        start = time.monotonic()
        os.stat(mount / "names" / str(n))
        stats.append(time.monotonic() - start)
        start = time.monotonic()
        os.listdir(mount)
        lists.append(time.monotonic() - start)
        start = time.monotonic()
        os.pread(cold, 4096, n * 16384 % (64 * MIB))
        reads.append(time.monotonic() - start)
        status = Path(f"/proc/{pid}/status").read_text()
        memory = max(memory, int(status.split("VmRSS:")[1].split()[0]))
        n += 1
        time.sleep(0.01)
    os.close(cold)
    for writer in writers:
        writer.join()
    found = [json.loads((results / name).read_text()) for name in ("stream1", "stream2", "random")]
    pauses = [(start - began, length) for f in found for start, length in f["longest"]]
    return {
        "stat p99 ms": percentile(stats, 0.99) * 1e3,
        "ls p99 ms": percentile(lists, 0.99) * 1e3,
        "cold read p99 ms": percentile(reads, 0.99) * 1e3,
        "longest pause ms": max(length for _, length in pauses) * 1e3,
        "longest pause after warm-up ms": max((length for at, length in pauses if at > WARM), default=0.0) * 1e3,
        "resident MiB": memory / 1024,
        "killed": float(_kills()),
    }
