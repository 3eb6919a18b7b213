"""What the log on disk costs, and how long a mount is away when its processes die with a full log."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers import Field, Peer, is_mounted, wbfuse

MIB = 1 << 20
WBFUSE = (sys.executable, "-m", "wbfuse")
SLOW = ("--log-size", "1GiB", "--bwlimit", "1MB/s", "--on-close", "background")


def status(path: Path) -> dict[str, Any]:
    done = subprocess.run([*WBFUSE, "status", "--json", str(path)], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def kill(pid: int) -> None:
    ended = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([ended], [], [])
    os.close(ended)


def fill(path: Path) -> int:
    """Write until the log takes no more without waiting. Answers the MiB in it."""
    block = os.urandom(MIB)
    fd = os.open(path / "dirty", os.O_RDWR | os.O_CREAT)
    log = status(path)["log"]
    for _ in range((log["limit"] - 32 * MIB) // MIB):
        os.write(fd, block)
    os.fdatasync(fd) if log.get("disk", {}).get("fsync") == "log" else os.sync()
    os.close(fd)
    return int(status(path)["log"]["used"] // MIB)


def worker_is_back(peer: Peer) -> tuple[float, int]:
    """Seconds from SIGKILL of the worker until the mount answers, with so many MiB in a log of 1 GiB."""
    used = fill(peer.path)
    pid = status(peer.path)["worker"]["pid"]
    start = time.monotonic()
    kill(pid)
    with open(peer.path / "dirty", "rb", buffering=0) as f:
        f.read(MIB)
    return time.monotonic() - start, used


def log_is_replayed(field: Field) -> tuple[float, int]:
    """Seconds for `wbfuse mount` to find a log on disk, in no cache, and answer."""
    source, path, log = field.root / "replay-source", field.root / "replay-mount", field.root / "replay-log"
    for place in (source, path):
        place.mkdir()
    words = [*WBFUSE, "mount", str(source), str(path), "--log", str(log), "--fsync", "log", "--log-size", "1GiB"]
    subprocess.run([*words, *SLOW[2:]], check=True)
    used = fill(path)
    found = status(path)
    for pid in (found["keeper"]["pid"], found["worker"]["pid"]):
        kill(pid)
    while is_mounted(path):
        subprocess.run([*WBFUSE, "umount", str(path)], check=True, capture_output=True)
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    start = time.monotonic()
    subprocess.run([*words, "--on-close", "background"], check=True)
    with open(path / "dirty", "rb", buffering=0) as f:
        f.read(MIB)
    elapsed = time.monotonic() - start
    subprocess.run([*WBFUSE, "umount", str(path)], check=True)
    return elapsed, used


def away(root: Path) -> dict[str, tuple[float, int]]:
    with Field(root) as field:
        found = {"log on disk": log_is_replayed(field)}
        for place in ("worker-source", "worker-mount"):
            (root / place).mkdir()
        with wbfuse("worker", root / "worker-source", root / "worker-mount", *SLOW) as peer:
            found["worker"] = worker_is_back(peer)
            (peer.path / "dirty").unlink()  # a second takes a megabyte
        return found
