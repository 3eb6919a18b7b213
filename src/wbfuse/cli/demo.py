"""`make demo`: the main job, seen. A real disk image is copied into a slow volume three ways, side by side.

    python -m wbfuse.cli.demo [volume | directory]

Builds an ext4 image of 512 MiB filled with the machine's own Python library, mounts a volume (or a directory) behind
--slow as write-through, write-back, and write-back with --on-close background, copies the image into each, and checks
what arrived: sha256, e2fsck, and a file read out of the image loop-mounted from the mount itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from wbfuse.session.mount import find_mount
from wbfuse.writeback.log import free_memory

MIB = 1 << 20
IMAGE_MIB = 512
SLOW = "60MB/s,4ms"
KINDS = {
    "write-through": ["--policy", "writethrough"],
    "write-back": ["--policy", "writeback"],
    "write-back, close in background": ["--policy", "writeback", "--on-close", "background"],
}


@dataclass(slots=True)
class Result:
    returned: float = 0.0
    """Seconds until cp had returned."""
    durable: float = 0.0
    requests: int = 0
    piece: float = 0.0
    """Bytes a store write."""
    worst_read: float = 0.0
    checks: list[str] = field(default_factory=list)


def wbfuse(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "wbfuse", *words], check=True, capture_output=True, text=True).stdout


def status(mountpoint: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(wbfuse("status", "--json", mountpoint))
    return found


def build_image(path: str, work: str) -> None:
    """An ext4 image with the Python library in it."""
    tree = os.path.join(work, "tree")
    library = sysconfig.get_path("stdlib")
    ignore = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages", "test", "*.a")
    shutil.copytree(library, os.path.join(tree, "python"), symlinks=True, ignore=ignore)
    size = 0
    for i in range(1000):  # fill up with copies of real files, so that most of the image is data
        if size > (IMAGE_MIB - 120) * MIB:
            break
        shutil.copytree(os.path.join(tree, "python"), os.path.join(tree, f"copy{i}"), symlinks=True)
        size += sum(
            os.lstat(os.path.join(d, f)).st_size for d, _, fs in os.walk(os.path.join(tree, f"copy{i}")) for f in fs
        )
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, path, f"{IMAGE_MIB}M"], check=True, capture_output=True)
    shutil.rmtree(tree)


def sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class ColdReads(threading.Thread):
    """Reads 4 KiB at a time from places of a file that were not read before; remembers the longest that it took."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self._fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._size = os.fstat(self._fd).st_size
        self._ended = threading.Event()
        self.worst = 0.0

    def run(self) -> None:
        at = 0
        while not self._ended.wait(0.05):
            start = time.monotonic()
            os.pread(self._fd, 4096, at)
            self.worst = max(self.worst, time.monotonic() - start)
            at = (at + 1_048_576 + 4096) % self._size // 4096 * 4096

    def stop(self) -> float:
        self._ended.set()
        self.join()
        os.close(self._fd)
        return self.worst


def new_source(store: str, work: str) -> str:
    """A fresh volume or directory with a file of 64 MiB that nobody has read."""
    place, mountpoint = os.path.join(work, "slow"), os.path.join(work, "mnt")
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)
    source, where = place, place
    if store == "volume":
        source, where = f"sqlite:///{place}/meta.db", mountpoint
        wbfuse("format", source, "--data", f"file://{place}/objects")
        wbfuse("mount", source, mountpoint, "--log-size", "128MiB")
    with open(os.path.join(where, "cold"), "wb") as f:
        f.write(os.urandom(64 * MIB))
    if store == "volume":
        wbfuse("umount", mountpoint)
    return source


def check_stored(kind: str, source: str, image: str, work: str, result: Result) -> None:
    """What the store holds is what was copied, byte for byte and as ext4; a volume is seen by a new mount."""
    mountpoint = os.path.join(work, "mnt")
    volume = "://" in source
    if volume:
        wbfuse("mount", source, mountpoint, "--log-size", "128MiB")
    stored = os.path.join(mountpoint if volume else source, "disk.img")
    if sha256(stored) != sha256(image):
        raise SystemExit(f"{kind}: the stored image differs from what was copied")
    checked = subprocess.run(["e2fsck", "-fn", stored], capture_output=True, text=True, check=False)
    if checked.returncode != 0:
        raise SystemExit(f"{kind}: e2fsck: {checked.stdout}{checked.stderr}")
    result.checks += ["sha256 equal", "e2fsck clean"]
    if volume:
        wbfuse("umount", mountpoint)
        wbfuse("check", source)  # fails where anything is wrong
        result.checks.append("wbfuse check clean")


def copy_into(kind: str, store: str, image: str, work: str, bar: Progress, task: TaskID) -> Result:
    """Mount, copy, wait until durable, check, unmount."""
    mountpoint = os.path.join(work, "mnt")
    os.makedirs(mountpoint, exist_ok=True)
    source = new_source(store, work)
    log = f"{2 * IMAGE_MIB + 256}MiB"
    wbfuse("mount", source, mountpoint, "--slow", SLOW, "--log-size", log, *KINDS[kind])
    result = Result()
    try:
        reader = ColdReads(os.path.join(mountpoint, "cold"))
        reader.start()
        start = time.monotonic()
        with subprocess.Popen(["cp", image, os.path.join(mountpoint, "disk.img")]) as cp:
            while cp.poll() is None:
                bar.update(task, completed=status(mountpoint)["store"]["bytes_written"])
                time.sleep(0.2)  # how often the bar moves
        if cp.returncode != 0:
            raise SystemExit(f"cp into the {kind} mount failed")
        result.returned = time.monotonic() - start
        with subprocess.Popen([sys.executable, "-m", "wbfuse", "sync", mountpoint]) as sync:
            while sync.poll() is None:
                bar.update(task, completed=status(mountpoint)["store"]["bytes_written"])
                time.sleep(0.2)
        result.durable = time.monotonic() - start
        result.worst_read = reader.stop()
        state = status(mountpoint)
        result.requests = sum(state["requests"].values())
        result.piece = state["store"]["bytes_written"] / max(1, state["store"]["writes"])
        if kind == list(KINDS)[-1]:
            loop_mount(os.path.join(mountpoint, "disk.img"), os.path.join(work, "loop"), result)
    except BaseException:
        subprocess.run(["umount", "-l", mountpoint], check=False)  # what went wrong is on its way up
        raise
    wbfuse("umount", mountpoint)
    check_stored(kind, source, image, work, result)
    return result


def loop_mount(image: str, where: str, result: Result) -> None:
    """Use the image in place, from the mount, and read a file in it."""
    os.makedirs(where, exist_ok=True)
    subprocess.run(["mount", "-o", "loop,ro", image, where], check=True)
    try:
        with open(os.path.join(where, "python", "os.py"), "rb") as inside, open(os.__file__, "rb") as here:
            if inside.read() != here.read():
                raise SystemExit("a file in the loop-mounted image differs")
        result.checks.append("loop-mounted from the mount, os.py read")
    finally:
        subprocess.run(["umount", where], check=True)


def clean_up(work: str) -> None:
    """Whatever happened, nothing stays mounted and nothing stays on disk."""
    for name in ("loop", "mnt"):
        path = os.path.realpath(os.path.join(work, name))
        if find_mount(path) is not None:
            subprocess.run(["umount", "-l", path], check=False)
    shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    store = sys.argv[1] if len(sys.argv) > 1 else "volume"
    if store not in ("volume", "directory"):
        raise SystemExit(f"{store}: the demo runs on a volume or on a directory")
    console = Console()
    if os.geteuid() != 0:
        raise SystemExit("the demo needs root: it mounts, and loop-mounts an image")
    if free_memory() < (2 * IMAGE_MIB + 512) * MIB:
        raise SystemExit(f"the demo needs {2 * IMAGE_MIB + 512} MiB of free memory for its log")
    work = tempfile.mkdtemp(prefix="wbfuse-demo-", dir="/var/tmp")
    began = time.monotonic()
    try:
        image = os.path.join(work, "disk.img")
        with console.status(f"building an ext4 image of {IMAGE_MIB} MiB from the Python library"):
            build_image(image, work)
        results = {}
        columns = (TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.percentage:3.0f}% in the store"))
        with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
            for kind in KINDS:
                task = bar.add_task(kind, total=os.path.getsize(image))
                results[kind] = copy_into(kind, store, image, work, bar, task)
                bar.update(task, completed=os.path.getsize(image))
        table = Table(title=f"cp of a {IMAGE_MIB} MiB disk image into a {store} behind --slow {SLOW}")
        table.add_column("")
        for kind in results:
            table.add_column(kind, justify="right")
        rows = {
            "cp returned after": [f"{r.returned:.1f} s" for r in results.values()],
            "durable after": [f"{r.durable:.1f} s" for r in results.values()],
            "requests": [str(r.requests) for r in results.values()],
            "bytes per store write": [f"{r.piece / 1024:.0f} KiB" for r in results.values()],
            "worst 4 KiB cold read meanwhile": [f"{r.worst_read * 1000:.0f} ms" for r in results.values()],
            "checked": ["\n".join(r.checks) for r in results.values()],
        }
        for name, cells in rows.items():
            table.add_row(name, *cells)
        console.print(table)
        console.print(f"everything is unmounted; {time.monotonic() - began:.0f} s in all")
    finally:
        clean_up(work)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
