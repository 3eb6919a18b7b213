"""Applications that write in many ways and check what they read, for mounts whose server is being killed.

    python -m tests.writers DIRECTORY SEED      until standard input is closed; exit 1 where anything went wrong

Each kind of writer is a thread; it keeps a model of its own files, and any error or difference is told with a trace.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20


class Writers:
    """One method a kind: called again and again with a counter."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home = home
        self.rng = {name: random.Random(f"{name}{seed}") for name in self.kinds()}
        self.patched = bytearray(MIB)
        self.mapped = bytearray(65536)
        self.descriptor = os.open(home / "kept", os.O_RDWR | os.O_CREAT)
        self.kept = bytearray()

    @classmethod
    def kinds(cls) -> list[str]:
        return [n for n in vars(cls) if n.startswith("w_")]

    def w_whole(self, n: int) -> None:
        """Files written anew, closed and read back."""
        rng = self.rng["w_whole"]
        data = rng.randbytes(rng.randrange(1, 300_000))
        path = self.home / f"whole{n % 5}"
        path.write_bytes(data)
        assert path.read_bytes() == data

    def w_patch(self, n: int) -> None:
        """A file changed in place, sometimes fsynced."""
        rng, path = self.rng["w_patch"], self.home / "patched"
        if n == 0:
            path.write_bytes(self.patched)
        with open(path, "r+b", buffering=0) as f:
            at = rng.randrange(MIB)
            data = rng.randbytes(min(5000, MIB - at))
            os.pwrite(f.fileno(), data, at)
            self.patched[at : at + len(data)] = data
            if n % 7 == 0:
                os.fsync(f.fileno())
        assert path.read_bytes() == self.patched

    def w_direct(self, n: int) -> None:
        """O_DIRECT."""
        data = self.rng["w_direct"].randbytes(65536)
        out, back = mmap.mmap(-1, 65536), mmap.mmap(-1, 65536)
        out.write(data)
        fd = os.open(self.home / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            assert os.pwrite(fd, out, 65536 * (n % 16)) == 65536
            assert os.preadv(fd, [back], 65536 * (n % 16)) == 65536
        finally:
            os.close(fd)
        assert back[:] == data

    def w_mapped(self, n: int) -> None:
        """A shared mapping, sometimes msynced."""
        rng = self.rng["w_mapped"]
        fd = os.open(self.home / "mapped", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 65536)
        with mmap.mmap(fd, 65536) as view:
            os.close(fd)
            assert view[:] == self.mapped
            for _ in range(4):
                at, data = rng.randrange(65000), rng.randbytes(300)
                view[at : at + 300] = self.mapped[at : at + 300] = data
            if n % 5 == 0:
                view.flush()

    def w_kept(self, n: int) -> None:
        """A descriptor that stays open over every death: appends, truncations, punches."""
        rng, fd = self.rng["w_kept"], self.descriptor
        if n % 40 == 39:
            size = rng.randrange(len(self.kept) + 1)
            os.ftruncate(fd, size)
            del self.kept[size:]
        data = rng.randbytes(rng.randrange(1, 20_000))
        os.pwrite(fd, data, len(self.kept))
        self.kept += data
        assert os.fstat(fd).st_size == len(self.kept)
        at = rng.randrange(len(self.kept))
        assert os.pread(fd, 10_000, at) == self.kept[at : at + 10_000]

    def w_names(self, n: int) -> None:
        """Everything that changes names, each of which must happen once."""
        d = self.home / f"names{n % 3}"
        d.mkdir()
        os.mknod(d / "x")
        os.link(d / "x", d / "y")
        os.rename(d / "y", d / "z")
        os.symlink("x", d / "s")
        assert sorted(os.listdir(d)) == ["s", "x", "z"]
        (d / "a").write_bytes(b"old")
        (d / "b").write_bytes(b"new %d" % n)
        os.rename(d / "b", d / "a")
        assert (d / "a").read_bytes() == b"new %d" % n
        os.setxattr(d / "a", "user.n", b"%d" % n, os.XATTR_CREATE)
        assert os.getxattr(d / "a", "user.n") == b"%d" % n
        os.removexattr(d / "a", "user.n")
        os.unlink(d / "x")
        assert os.stat(d / "z").st_nlink == 1
        for name in ("a", "z", "s"):
            os.unlink(d / name)
        d.rmdir()

    def w_saves(self, n: int) -> None:
        """A file replaced while the data of its next version is on its way, and what programs do with it then."""
        d = self.home / "saves"
        away = d / "away" if n % 2 else d
        away.mkdir(parents=True, exist_ok=True)
        path, new = d / "file", away / "file.new"
        data = b"version %d, " % n * 1000
        with open(new, "wb", buffering=0) as f:
            f.write(data)
            os.rename(new, path)
            f.write(b"its end")
        if n % 2:
            away.rmdir()
        if n % 5 == 4:
            os.rename(path, d / "backup")
            there = os.listdir(d)
            assert there == ["backup"], there
            os.rename(d / "backup", path)
        there = os.listdir(d)
        assert there == ["file"], there
        assert path.read_bytes() == data + b"its end"
        if n % 7 == 6:
            os.unlink(path)
            assert os.listdir(d) == []

    def w_unlinked(self, n: int) -> None:
        """A lock file made exclusively, and used on after its name has gone."""
        path = self.home / "lock"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.write(fd, b"x")
            os.unlink(path)
            os.write(fd, b"y" * 5000)
            found = os.fstat(fd)
            assert (found.st_size, found.st_nlink) == (5001, 0)
            assert os.pread(fd, 6000, 0) == b"x" + b"y" * 5000
        finally:
            os.close(fd)

    def w_exchange(self, n: int) -> None:
        """Trees moved about, with a file that is dirty in them."""
        a, b = self.home / f"tree{n % 2}", self.home / f"moved{n % 2}"
        (a / "deep").mkdir(parents=True)
        with open(a / "deep/f", "wb", buffering=0) as f:
            f.write(b"1" * 1000)
            os.rename(a, b)
            f.write(b"2" * 1000)
            os.rename(b / "deep/f", b / "g")
        assert (b / "g").read_bytes() == b"1" * 1000 + b"2" * 1000
        (b / "g").unlink()
        (b / "deep").rmdir()
        b.rmdir()

    def contents(self) -> dict[str, str]:
        """What files must hold in the end, as hexadecimal digits of the model."""
        return {"patched": self.patched.hex(), "mapped": self.mapped.hex(), "kept": self.kept.hex()}


def main() -> int:
    home, seed = Path(sys.argv[1]), int(sys.argv[2])
    writers, ended = Writers(home, seed), threading.Event()
    wrong: list[str] = []
    counts: dict[str, int] = {}

    def run(kind: str) -> None:
        act: Callable[[int], None] = getattr(writers, kind)
        n = 0
        try:
            while not ended.is_set():
                act(n)
                n += 1
        except Exception:  # noqa: BLE001 - told below
            wrong.append(f"{kind}, turn {n}: {traceback.format_exc()}")
            ended.set()
        counts[kind] = n

    threads = [threading.Thread(target=run, args=(kind,)) for kind in Writers.kinds()]
    for t in threads:
        t.start()
    print("started", flush=True)
    sys.stdin.read()
    ended.set()
    for t in threads:
        t.join()
    os.close(writers.descriptor)
    print(json.dumps({"wrong": wrong, "counts": counts, "contents": writers.contents()}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
