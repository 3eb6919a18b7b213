"""A read-only file system with one file. Run: python examples/hello.py MOUNTPOINT, then cat MOUNTPOINT/hello."""

import errno
import stat
import sys
from collections.abc import Iterator

import wbfuse

TEXT = b"hello from Python\n"
ROOT, FILE = 1, 2


class Hello(wbfuse.FileSystem):
    def _attr(self, nodeid: int) -> wbfuse.Attr:
        if nodeid == ROOT:
            return wbfuse.Attr(ino=ROOT, mode=stat.S_IFDIR | 0o755, nlink=2)
        return wbfuse.Attr(ino=FILE, mode=stat.S_IFREG | 0o444, size=len(TEXT))

    def lookup(self, request: wbfuse.Request, name: bytes) -> wbfuse.Entry:
        if request.nodeid != ROOT or name != b"hello":
            raise OSError(errno.ENOENT, "no such name")
        return wbfuse.Entry(FILE, self._attr(FILE))

    def getattr(self, request: wbfuse.Request, fh: int | None) -> wbfuse.Attr:
        return self._attr(request.nodeid)

    def readdir(self, request: wbfuse.Request, fh: int, offset: int) -> Iterator[wbfuse.Dirent]:
        names = [(b".", ROOT, stat.S_IFDIR), (b"..", ROOT, stat.S_IFDIR), (b"hello", FILE, stat.S_IFREG)]
        for i, (name, ino, kind) in enumerate(names[offset:], offset + 1):
            yield wbfuse.Dirent(name, ino, kind >> 12, i)

    def read(self, request: wbfuse.Request, fh: int, offset: int, size: int, flags: int) -> bytes:
        return TEXT[offset : offset + size]


if __name__ == "__main__":
    wbfuse.serve(Hello(), sys.argv[1], wbfuse.Options(fsname="hello", options=["ro"]))
