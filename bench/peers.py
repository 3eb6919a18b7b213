"""File systems to stand beside: each is started in a process of its own over a fresh directory and taken down again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build" / "bench"
PASSTHROUGH_SOURCE = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")


@dataclass
class Peer:
    """A mounted file system under measurement."""

    name: str
    path: Path
    pid: int
    source: Path

    def processor_seconds(self) -> float:
        """User and system time of the daemon so far, to the nanosecond."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9


def passthrough_ll() -> Path:
    """libfuse's own example, compiled."""
    out = BUILD / "passthrough_ll"
    if not out.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "fuse3"], check=True, capture_output=True, text=True
        )
        subprocess.run(["gcc", "-O2", "-o", out, PASSTHROUGH_SOURCE, *flags.stdout.split()], check=True)
    return out


def passthroughfs() -> list[str] | None:
    """The words that run pyfuse3's example, which stands in its source package; None where it cannot be had."""
    script = BUILD / "passthroughfs.py"
    python = BUILD / "venv" / "bin" / "python"
    if not script.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(BUILD / "venv")], check=True)
            pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "pyfuse3"], check=True)
            subprocess.run(
                [*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", str(BUILD), "pyfuse3"], check=True
            )
            archive = next(BUILD.glob("pyfuse3-*.tar.gz"))
            subprocess.run(["tar", "xzf", archive, "-C", BUILD], check=True)
            shutil.copy(next(BUILD.glob("pyfuse3-*/examples/passthroughfs.py")), script)
        except (subprocess.CalledProcessError, StopIteration) as e:
            print(f"pyfuse3's passthroughfs is not to be had here: {e}", file=sys.stderr)
            return None
    return [str(python), str(script)]


def is_mounted(path: Path) -> bool:
    return any(line.split(" ")[1] == str(path) for line in Path("/proc/self/mounts").read_text().splitlines())


@contextlib.contextmanager
def foreground(name: str, words: list[str], source: Path, path: Path) -> Iterator[Peer]:
    """A peer that stays in the foreground until it is unmounted."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 20
        while not is_mounted(path):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} did not mount: {' '.join(words)}")
            time.sleep(0.01)  # it tells nobody when it is there
        try:
            yield Peer(name, path, process.pid, source)
        finally:
            subprocess.run(["umount", str(path)], check=True)
            process.wait()


@contextlib.contextmanager
def wbfuse(name: str, source: Path, path: Path, *options: str) -> Iterator[Peer]:
    words = [sys.executable, "-m", "wbfuse"]
    subprocess.run([*words, "mount", str(source), str(path), *options], check=True)
    try:
        status = json.loads(
            subprocess.run([*words, "status", "--json", str(path)], check=True, capture_output=True).stdout
        )
        yield Peer(name, path, status["worker"]["pid"], source)
    finally:
        subprocess.run([*words, "umount", str(path)], check=True)


class Field:
    """A directory with a source and a mount point for each peer; on disk, removed at the end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Field:
        self.root.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stack.close()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    def _place(self, name: str) -> tuple[Path, Path]:
        source, path = self.root / f"{name}-source", self.root / f"{name}-mount"
        source.mkdir()
        path.mkdir()
        return source, path

    def wbfuse(self, name: str, *options: str) -> Peer:
        return self._stack.enter_context(wbfuse(name, *self._place(name), *options))

    def c(self, name: str, *options: str) -> Peer:
        source, path = self._place(name)
        words = [
            str(passthrough_ll()),
            "-f",
            "-o",
            f"source={source}",
            *(w for o in options for w in ("-o", o)),
            str(path),
        ]
        return self._stack.enter_context(foreground(name, words, source, path))

    def alone(self, name: str) -> Peer:
        """wbfuse in write-through without its keeper."""
        source, path = self._place(name)
        words = [sys.executable, "-m", "bench.alone", str(source), str(path)]
        return self._stack.enter_context(foreground(name, words, source, path))

    def pyfuse3(self, name: str) -> Peer | None:
        words = passthroughfs()
        if words is None:
            return None
        source, path = self._place(name)
        return self._stack.enter_context(foreground(name, [*words, str(source), str(path)], source, path))


def quiet() -> None:
    """Nothing dirty, nothing cached: what the last measurement left must not be paid by the next."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
