"""A file system in memory: directories, files, links, attributes. Run: python examples/memory.py MOUNTPOINT."""

import errno
import itertools
import os
import stat
import sys
import time
from collections.abc import Iterator

import wbfuse
from wbfuse.wire import constants as c
from wbfuse.wire.requests import Setattr

LARGEST = 1 << 32


class Node:
    def __init__(self, ino: int, mode: int, uid: int, gid: int) -> None:
        now = time.time_ns()
        self.attr = wbfuse.Attr(ino, mode, uid=uid, gid=gid, atime_ns=now, mtime_ns=now, ctime_ns=now)
        self.data = bytearray()
        self.children: dict[bytes, Node] = {}
        self.parent = self
        self.lookups = 0


class Memory(wbfuse.FileSystem):
    """Nothing here blocks, so everything runs on the reader thread, one request at a time: no locks."""

    inline = frozenset(name for name in dir(wbfuse.FileSystem) if not name.startswith("_"))

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        root = Node(next(self.numbers), stat.S_IFDIR | 0o755, os.getuid(), os.getgid())
        root.attr.nlink = 2
        self.nodes = {root.attr.ino: root}

    @staticmethod
    def _check_size(size: int) -> None:
        if size > LARGEST:
            raise OSError(errno.EFBIG, "it would not fit into memory")

    def _child(self, request: wbfuse.Request, name: bytes) -> Node:
        if len(name) > 255:
            raise OSError(errno.ENAMETOOLONG, "the name is too long")
        try:
            return self.nodes[request.nodeid].children[name]
        except KeyError:
            raise OSError(errno.ENOENT, "no such name") from None

    def _entry(self, node: Node) -> wbfuse.Entry:
        node.lookups += 1
        self.nodes[node.attr.ino] = node
        node.attr.size = len(node.data)
        return wbfuse.Entry(node.attr.ino, node.attr)

    def _add(self, request: wbfuse.Request, name: bytes, mode: int) -> Node:
        parent = self.nodes[request.nodeid]
        if name in parent.children:
            raise OSError(errno.EEXIST, "the name is taken")
        node = Node(next(self.numbers), mode, request.uid, request.gid)
        node.parent = parent
        if stat.S_ISDIR(mode):
            node.attr.nlink = 2
            parent.attr.nlink += 1
        parent.children[name] = node
        parent.attr.mtime_ns = parent.attr.ctime_ns = time.time_ns()
        return node

    def _drop(self, parent: Node, name: bytes) -> None:
        node = parent.children.pop(name)
        node.attr.nlink -= 1
        if stat.S_ISDIR(node.attr.mode):
            node.attr.nlink -= 1
            parent.attr.nlink -= 1

    def lookup(self, request: wbfuse.Request, name: bytes) -> wbfuse.Entry:
        return self._entry(self._child(request, name))

    def forget(self, request: wbfuse.Request, nlookup: int) -> None:
        node = self.nodes[request.nodeid]
        node.lookups -= nlookup
        if node.lookups <= 0 and node.attr.nlink <= 0:
            del self.nodes[request.nodeid]

    def getattr(self, request: wbfuse.Request, fh: int | None) -> wbfuse.Attr:
        node = self.nodes[request.nodeid]
        node.attr.size = len(node.data)
        return node.attr

    def setattr(self, request: wbfuse.Request, change: Setattr) -> wbfuse.Attr:
        node, valid = self.nodes[request.nodeid], change.valid
        if valid & c.FATTR_SIZE:
            self._check_size(change.size)
            del node.data[change.size :]
            node.data.extend(bytes(change.size - len(node.data)))
        if valid & c.FATTR_MODE:
            node.attr.mode = change.mode
        if valid & c.FATTR_UID:
            node.attr.uid = change.uid
        if valid & c.FATTR_GID:
            node.attr.gid = change.gid
        if valid & c.FATTR_ATIME:
            node.attr.atime_ns = time.time_ns() if valid & c.FATTR_ATIME_NOW else change.atime_ns
        if valid & c.FATTR_MTIME:
            node.attr.mtime_ns = time.time_ns() if valid & c.FATTR_MTIME_NOW else change.mtime_ns
        node.attr.ctime_ns = time.time_ns()
        return self.getattr(request, None)

    def mknod(self, request: wbfuse.Request, name: bytes, mode: int, rdev: int, umask: int) -> wbfuse.Entry:
        node = self._add(request, name, mode)
        node.attr.rdev = rdev
        return self._entry(node)

    def mkdir(self, request: wbfuse.Request, name: bytes, mode: int, umask: int) -> wbfuse.Entry:
        return self._entry(self._add(request, name, stat.S_IFDIR | mode))

    def symlink(self, request: wbfuse.Request, name: bytes, target: bytes) -> wbfuse.Entry:
        node = self._add(request, name, stat.S_IFLNK | 0o777)
        node.data[:] = target
        return self._entry(node)

    def readlink(self, request: wbfuse.Request) -> bytes:
        return bytes(self.nodes[request.nodeid].data)

    def link(self, request: wbfuse.Request, nodeid: int, name: bytes) -> wbfuse.Entry:
        parent, node = self.nodes[request.nodeid], self.nodes[nodeid]
        if name in parent.children:
            raise OSError(errno.EEXIST, "the name is taken")
        parent.children[name] = node
        node.attr.nlink += 1
        return self._entry(node)

    def unlink(self, request: wbfuse.Request, name: bytes) -> None:
        self._child(request, name)
        self._drop(self.nodes[request.nodeid], name)

    def rmdir(self, request: wbfuse.Request, name: bytes) -> None:
        if self._child(request, name).children:
            raise OSError(errno.ENOTEMPTY, "not empty")
        self._drop(self.nodes[request.nodeid], name)

    def rename(self, request: wbfuse.Request, name: bytes, newdir: int, newname: bytes, flags: int) -> None:
        if flags:
            raise OSError(errno.EINVAL, "no flags here")
        source, target, node = self.nodes[request.nodeid], self.nodes[newdir], self._child(request, name)
        there = target.children.get(newname)
        if there is node:
            return
        if there is not None:
            if there.children:
                raise OSError(errno.ENOTEMPTY, "not empty")
            self._drop(target, newname)
        del source.children[name]
        target.children[newname] = node
        node.parent = target
        if stat.S_ISDIR(node.attr.mode):
            source.attr.nlink -= 1
            target.attr.nlink += 1

    def read(self, request: wbfuse.Request, fh: int, offset: int, size: int, flags: int) -> bytes:
        return bytes(self.nodes[request.nodeid].data[offset : offset + size])

    def write(
        self, request: wbfuse.Request, fh: int, offset: int, data: memoryview, write_flags: int, flags: int
    ) -> int:
        node = self.nodes[request.nodeid]
        self._check_size(offset + len(data))
        if offset > len(node.data):
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset : offset + len(data)] = data
        node.attr.mtime_ns = node.attr.ctime_ns = time.time_ns()
        return len(data)

    def fsync(self, request: wbfuse.Request, fh: int, datasync: bool) -> None:
        """Memory is as durable as it gets."""

    def readdir(self, request: wbfuse.Request, fh: int, offset: int) -> Iterator[wbfuse.Dirent]:
        node = self.nodes[request.nodeid]
        names = [(b".", node), (b"..", node.parent), *node.children.items()]
        for i, (name, child) in enumerate(names[offset:], offset + 1):
            yield wbfuse.Dirent(name, child.attr.ino, stat.S_IFMT(child.attr.mode) >> 12, i)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} MOUNTPOINT")
    wbfuse.serve(Memory(), sys.argv[1], wbfuse.Options(fsname="memory"))
