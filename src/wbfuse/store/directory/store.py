"""The name space over a directory: every call goes through the descriptor of a parent, so no symlink leads out.

Descriptors are a cache (`fds`); a node that has none is found again by its last names, from the root down, and its
identity is verified: another file in its place is ESTALE. An unlinked file that is open is moved to
`.wbfuse/orphans/` and removed when it is closed, so it needs no descriptor either. `.wbfuse` itself is not shown.

Locks: `names` is held over the system calls that move or remove names, so that whoever holds it finds every file
where the table says; `_table` guards the node table, for an instant, and may be taken with `names` held.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import stat
import threading
from collections.abc import Iterator, Sequence

from wbfuse.journal import Journal
from wbfuse.store.contract import ROOT_INO, Capabilities, Change, Found, Owner, SourceError, Store
from wbfuse.store.directory import syscalls
from wbfuse.store.directory.data import DirectoryData
from wbfuse.store.directory.fds import Fd, FdCache
from wbfuse.store.directory.nodes import ORPHANAGE, Node, Nodes, Place, path_of
from wbfuse.store.directory.private import DIR_FLAGS, PRIVATE, Private
from wbfuse.wire.constants import RENAME_EXCHANGE, RENAME_NOREPLACE
from wbfuse.wire.types import Attr, Dirent, Statfs

_GETDENTS = 8192


def _proc(fd: Fd) -> str:
    """A path that leads to exactly this open file, whatever happened to its names."""
    return f"/proc/self/fd/{fd.n}"


class DirectoryStore(DirectoryData, Store):
    """Serve `path`. Raises SourceError where that cannot be. One store at a time has a directory for writing.

    `journal` keeps the node numbers for a server that comes after this one; `root_fd` (owned from now on) is what such
    a one got from the server before it: its descriptor of `path`, which is not looked up again, and with it its lock.
    `logged`: the journal may outlive the mount, so files must be found though their names changed unseen; `revived`: it
    has, so the kernel knows no node.
    """

    def __init__(
        self, path: str, read_only: bool = False, journal: Journal | None = None, root_fd: int | None = None,
        logged: bool = False, revived: bool = False,
    ) -> None:  # fmt: skip
        try:
            self._root = Fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if root_fd is None else root_fd)
        except FileNotFoundError:
            raise SourceError(f"{path}: no such directory; make it with: mkdir -p {path}") from None
        except NotADirectoryError:
            raise SourceError(f"{path}: not a directory") from None
        except OSError as e:
            raise SourceError(f"{path}: {e.strerror}") from e
        if not read_only:
            try:
                fcntl.flock(self._root.n, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise SourceError(f"{path}: another wbfuse mount writes to this directory; unmount that first") from e
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        share = max(16, (min(hard, 20000) - 256) // 4)
        self._privileged = os.geteuid() == 0
        self._dirs = FdCache(share // 2)
        self._listings = FdCache(min(256, share // 2))
        attr, identity = syscalls.statx(self._root.n)
        self._device = identity[0]
        self.names = threading.RLock()
        self._table = threading.Lock()
        self._nodes = Nodes(identity, stat.S_IFMT(attr.mode), journal or Journal(), known=not revived)
        self._handles = logged and self._privileged
        self._private = Private(self._root)
        DirectoryData.__init__(self, share)
        self._max_file_size = (1 << 63) - 1 if read_only else syscalls.max_file_size(self._root.n)
        if not read_only:
            self._clear_orphans()
        if revived:
            self._find_again()

    @property
    def root_fd(self) -> int:
        return self._root.n

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(atomic_commit=False, preferred_piece=8 << 20, max_file_size=self._max_file_size)

    def close(self) -> None:
        """Close every descriptor; the private directory goes where it is empty."""
        self.close_data()
        self._dirs.clear()
        self._listings.clear()
        self._private.close()
        fcntl.flock(self._root.n, fcntl.LOCK_UN)

    # the log on disk

    def note_log(self, note: str | None) -> None:
        self._private.note_log(note)

    def noted_log(self) -> str | None:
        return self._private.noted_log()

    # orphans

    def _clear_orphans(self) -> None:
        """Files that were unlinked while open, of a mount that did not end well. Nobody can name them any more.

        Those of the journal's nodes are open, or dirty, still. They bear the node's number, for a journal that is
        replayed from disk may not have heard of the removal.
        """
        orphans, names = self._private.leftovers()
        for name in names:
            node = self._nodes.find(syscalls.statx(orphans.n, name)[1])
            if node is not None and name == b"%d" % node.ino:
                self._nodes.add(node, (ORPHANAGE, name))
            else:
                os.unlink(name, dir_fd=orphans.n)

    def _handle(self, kind: int, fd: int, name: bytes) -> bytes:
        return syscalls.handle_of(fd, name) if self._handles and kind == stat.S_IFREG else b""

    def _find_again(self) -> None:
        """Give files whose names changed unseen a place of our own until they are clean: a link in the orphanage."""
        for node in list(self._nodes.by_ino.values()):
            if node.kind != stat.S_IFREG or not node.handle:
                continue
            try:
                self._open_at_place(node, os.O_PATH)
                continue
            except OSError as e:
                if e.errno != errno.ESTALE:
                    raise
            with contextlib.suppress(OSError):  # it is gone, and with it what was to be written to it
                fd = Fd(syscalls.open_handle(self._root.n, node.handle, os.O_PATH | os.O_CLOEXEC))
                if syscalls.statx(fd.n)[1] == node.identity:
                    for place in [p for p in node.places if p[0] == ORPHANAGE]:
                        self._nodes.lose(node, place)
                    orphans, name = self._private.orphans(), b"%d" % node.ino
                    os.link(_proc(fd), name, dst_dir_fd=orphans.n, follow_symlinks=True)
                    self._nodes.add(node, (ORPHANAGE, name))

    # finding

    def _node(self, ino: int) -> Node:
        node = self._nodes.by_ino.get(ino)
        if node is None:
            raise OSError(errno.ESTALE, f"node {ino} is not known")
        return node

    def _open_at_place(self, node: Node, flags: int) -> Fd:
        """Open `node` by one of its names and verify that it is still that file. ESTALE where none fits."""
        error: OSError | None = None
        with self._table:
            places = list(node.places)
        for parent, name in reversed(places):
            try:
                at = self._private.orphans() if parent == ORPHANAGE else self.dir_fd(parent)
                fd = Fd(os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at.n))
            except OSError as e:
                if e.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ESTALE):
                    raise
                error = e
                continue
            if syscalls.statx(fd.n)[1] == node.identity:
                return fd
        raise OSError(errno.ESTALE, "the file is no longer where it was") from error

    def open_node(self, ino: int, flags: int) -> Fd:
        """A fresh descriptor of the file, found by its names."""
        if ino == ROOT_INO:
            return Fd(os.open(".", flags | os.O_CLOEXEC, dir_fd=self._root.n))
        node = self._node(ino)
        try:
            return self._open_at_place(node, flags)
        except OSError as e:
            if e.errno != errno.ESTALE:
                raise
        with self.names:  # a rename may have been under way: look again while nothing moves
            return self._open_at_place(node, flags)

    def dir_fd(self, ino: int) -> Fd:
        """A path descriptor of a directory, from the cache or found from the root down."""
        if ino == ROOT_INO:
            return self._root
        fd = self._dirs.get(ino)
        return fd if fd is not None else self._dirs.put(ino, self.open_node(ino, DIR_FLAGS))

    def _check(self, parent: int, name: bytes) -> None:
        if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
            raise OSError(errno.EINVAL, "not a name", name)
        if len(name) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
        if parent == ROOT_INO and name == PRIVATE:
            raise OSError(errno.EPERM, "this name is wbfuse's own", name)

    def _seen(self, parent: int, name: bytes, fd: int, at: bytes) -> Found:
        attr, identity = syscalls.statx(fd, at)
        if identity[0] != self._device:
            # Neither orphans nor sync could reach a file system mounted inside the source.
            raise OSError(errno.EXDEV, "another file system is mounted here", name)
        with self._table:
            kind = stat.S_IFMT(attr.mode)
            node = self._nodes.see(identity, kind, (parent, name), lambda: self._handle(kind, fd, at))
            if node.orphan:
                attr.nlink -= 1
        return node.ino, attr

    def lookup(self, parent: int, name: bytes, nowait: bool = False) -> Found:
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "the directory must be asked")
        if parent == ROOT_INO and name == PRIVATE:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self._check(parent, name)
        at = self.dir_fd(parent)
        return self._seen(parent, name, at.n, name)

    def forget(self, ino: int, nlookup: int = 1) -> None:
        with self._table:
            node = self._nodes.by_ino.get(ino)
            if node is None or ino == ROOT_INO:
                return
            node.lookups -= nlookup
            gone = self._nodes.settle(node)
        self._close_all(gone)

    def _close_all(self, gone: list[int]) -> None:
        """The descriptors of nodes that are no more."""
        for ino in gone:
            self._dirs.discard(ino)
            self._listings.discard(ino)
            self.forget_data(ino)

    # making

    def _own(self, parent: int, fd: int, mode: int, owner: Owner, name: bytes | None = None) -> None:
        """Give a new file to who asked for it; a set-group-id directory gives its own group."""
        if not self._privileged:
            return
        at = self.dir_fd(parent)
        above = os.fstat(at.n)
        gid = -1 if above.st_mode & stat.S_ISGID else owner.gid
        if name is None:
            mine = os.fstat(fd)
            if mine.st_uid == owner.uid and gid in (-1, mine.st_gid):
                return
            os.fchown(fd, owner.uid, gid)
            if mode & (stat.S_ISUID | stat.S_ISGID):
                os.fchmod(fd, mode & 0o7777)  # chown took these bits
            return
        mine = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if mine.st_uid != owner.uid or gid not in (-1, mine.st_gid):
            os.chown(name, owner.uid, gid, dir_fd=fd, follow_symlinks=False)

    def create(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        self._check(parent, name)
        at = self.dir_fd(parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = Fd(os.open(name, flags, mode & 0o7777, dir_fd=at.n), writable=True)
        self._own(parent, fd.n, mode, owner)
        ino, attr = self._seen(parent, name, fd.n, b"")
        self.keep_data_fd(ino, fd)
        return ino, attr

    def tmpfile(self, parent: int, mode: int, owner: Owner) -> Found:
        """Made in the orphanage under its number, so that it needs no descriptor; `link` gives it a real name."""
        orphans = self._private.orphans()
        self.dir_fd(parent)  # ESTALE where that is gone
        with self.names:
            temporary = b"new-%d" % threading.get_ident()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = Fd(os.open(temporary, flags, mode & 0o7777, dir_fd=orphans.n), writable=True)
            self._own(parent, fd.n, mode, owner)
            attr, identity = syscalls.statx(fd.n)
            with self._table:
                kind = stat.S_IFMT(attr.mode)
                node = self._nodes.see(identity, kind, (ORPHANAGE, temporary), lambda: self._handle(kind, fd.n, b""))
                self._nodes.lose(node, (ORPHANAGE, temporary))
                place = (ORPHANAGE, b"%d" % node.ino)
                self._nodes.add(node, place)
            os.rename(temporary, place[1], src_dir_fd=orphans.n, dst_dir_fd=orphans.n)
        self.keep_data_fd(node.ino, fd)
        attr.nlink = 0
        return node.ino, attr

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, owner: Owner) -> Found:
        self._check(parent, name)
        at = self.dir_fd(parent)
        os.mknod(name, mode, rdev, dir_fd=at.n)
        self._own(parent, at.n, mode, owner, name)
        if not stat.S_ISLNK(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            os.chmod(name, mode & 0o7777, dir_fd=at.n)
        return self._seen(parent, name, at.n, name)

    def mkdir(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        self._check(parent, name)
        at = self.dir_fd(parent)
        os.mkdir(name, mode & 0o7777, dir_fd=at.n)
        self._own(parent, at.n, mode, owner, name)
        return self._seen(parent, name, at.n, name)

    def symlink(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Found:
        self._check(parent, name)
        at = self.dir_fd(parent)
        os.symlink(target, name, dir_fd=at.n)
        self._own(parent, at.n, 0, owner, name)
        return self._seen(parent, name, at.n, name)

    def link(self, ino: int, parent: int, name: bytes) -> Found:
        self._check(parent, name)
        at = self.dir_fd(parent)
        with self.names:
            node = self._node(ino)
            path = self.open_node(ino, os.O_PATH)
            own = next((place for place in node.places if place[0] == ORPHANAGE), None)
            if own is not None and syscalls.statx(path.n)[0].nlink == 1:
                # It gets a name again: the orphanage's link is moved there, unless the name is taken.
                orphans = self._private.orphans()
                self._found_at(node, (parent, name))  # first, see rename
                if not self._handles:
                    self.barrier()
                try:
                    syscalls.renameat2(orphans.n, own[1], at.n, name, RENAME_NOREPLACE)
                except OSError:
                    with self._table:
                        self._nodes.lose(node, (parent, name))
                    raise
                with self._table:
                    self._nodes.lose(node, own)
            else:
                os.link(_proc(path), name, dst_dir_fd=at.n, follow_symlinks=True)
            return self._seen(parent, name, at.n, name)

    def readlink(self, ino: int) -> bytes:
        node = self._node(ino)
        for parent, name in reversed(list(node.places)):
            at = self.dir_fd(parent)
            with contextlib.suppress(FileNotFoundError):
                return os.readlink(name, dir_fd=at.n)
        raise OSError(errno.ESTALE, "the link is no longer where it was")

    # removing and moving

    def _victim(self, at: Fd, name: bytes) -> tuple[Node | None, int]:
        """The known node under a name that is about to lose it, and its links now (0 for a directory). Held: names."""
        attr, identity = syscalls.statx(at.n, name)
        with self._table:
            node = self._nodes.find(identity)
        if node is not None and node.orphan:
            attr.nlink -= 1
        return node, 0 if stat.S_ISDIR(attr.mode) else attr.nlink

    def _must_keep(self, node: Node | None, place: Place, links: int) -> bool:
        """Whether the file is open and would be found nowhere once `place` is gone: its last link, or its last
        known one, for there may be others that nobody has looked up."""
        if node is None or not node.holds or links == 0 or node.orphan:
            return False
        return links == 1 or not [p for p in node.places if p != place]

    def _shelter(self, node: Node, at: Fd, name: bytes) -> None:
        """Give an open file a link in the orphanage, under its number. Held: names."""
        orphans = self._private.orphans()
        os.link(name, b"%d" % node.ino, src_dir_fd=at.n, dst_dir_fd=orphans.n, follow_symlinks=False)
        with self._table:
            self._nodes.add(node, (ORPHANAGE, b"%d" % node.ino))

    def _unshelter(self, node: Node) -> None:
        """Remove the link again. Held: names."""
        place, orphans = (ORPHANAGE, b"%d" % node.ino), self._private.orphans()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place[1], dir_fd=orphans.n)
        with self._table:
            self._nodes.lose(node, place)

    def _found_at(self, node: Node | None, place: Place) -> None:
        if node is not None:
            with self._table:
                self._nodes.add(node, place)

    def _lost(self, node: Node | None, place: Place, links: int) -> tuple[int, int]:
        """Book that `place` is gone, where `links` are left that others can see. Held: names."""
        if node is None:
            return 0, links
        with self._table:
            gone = self._nodes.lose(node, place)
            if links == 0 and not node.holds:
                self._nodes.removed(node)
                gone.append(node.ino)
        self._close_all(gone)
        return node.ino, links

    def unlink(self, parent: int, name: bytes) -> tuple[int, int]:
        self._check(parent, name)
        at = self.dir_fd(parent)
        place = (parent, name)
        with self.names:
            node, links = self._victim(at, name)
            keep = self._must_keep(node, place, links)
            if keep and node is not None:
                self._shelter(node, at, name)
            try:
                os.unlink(name, dir_fd=at.n)
            except OSError:
                if keep and node is not None:
                    self._unshelter(node)
                raise
            return self._lost(node, place, links - 1)

    def rmdir(self, parent: int, name: bytes) -> None:
        self._check(parent, name)
        at = self.dir_fd(parent)
        with self.names:
            node, _ = self._victim(at, name)
            os.rmdir(name, dir_fd=at.n)
            self._lost(node, (parent, name), 0)

    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> tuple[int, int]:
        self._check(parent, name)
        self._check(newparent, newname)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "these rename flags are not supported")
        at, to = self.dir_fd(parent), self.dir_fd(newparent)
        old, new = (parent, name), (newparent, newname)
        with self.names:
            moving, _ = self._victim(at, name)
            target, links = None, 0
            with contextlib.suppress(FileNotFoundError):
                target, links = self._victim(to, newname)
            same = moving is not None and moving is target
            keep = not flags and not same and self._must_keep(target, new, links)
            if keep and target is not None:
                self._shelter(target, to, newname)
            # Where they will be is written down first: a server that dies in between must find them.
            moves = [(moving, old, new)] + ([(target, new, old)] if flags & RENAME_EXCHANGE else [])
            for node, _, to_place in moves:
                self._found_at(node, to_place)
            if not self._handles:
                self.barrier()
            try:
                syscalls.renameat2(at.n, name, to.n, newname, flags)
            except OSError:
                if keep and target is not None:
                    self._unshelter(target)
                for node, from_place, to_place in moves:
                    self._found_at(node, from_place)
                    if not same:
                        self._lost(node, to_place, 1)
                raise
            if same:
                return 0, links  # two names of one file: rename(2) does nothing
            for node, from_place, _ in moves:
                self._lost(node, from_place, 1)
            if flags & RENAME_EXCHANGE:
                return 0, 0
            return self._lost(target, new, links - 1)

    def path_of(self, ino: int) -> str:
        def places(at: int) -> list[Place]:
            node = self._nodes.by_ino.get(at)
            return node.places if node is not None else []

        return path_of(places, ino)

    # listing

    def readdir(self, ino: int, offset: int) -> Iterator[Dirent]:
        fd = self._listings.get(ino)
        if fd is None:
            fd = self.open_node(ino, os.O_RDONLY | os.O_DIRECTORY)
            # Once from its start: on ext4 a descriptor that is first read at the end finds nothing at the start later.
            syscalls.getdents(fd.n, _GETDENTS)
            self._listings.put(ino, fd)
        while True:
            with fd.lock:
                os.lseek(fd.n, offset, os.SEEK_SET)
                raw = syscalls.getdents(fd.n, _GETDENTS)
            if not raw:
                return
            for entry in syscalls.parse_dents(raw):
                offset = entry.offset
                if ino != ROOT_INO or entry.name != PRIVATE:
                    yield entry

    def fsyncdir(self, ino: int) -> None:
        fd = self.open_node(ino, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd.n)

    # attributes

    def getattr(self, ino: int, nowait: bool = False) -> Attr:
        fd = self._root if ino == ROOT_INO else (self.cached_data_fd(ino) or self._dirs.get(ino))
        if fd is None and nowait:
            raise BlockingIOError(errno.EAGAIN, "not open")
        if fd is None:
            fd = self.open_node(ino, os.O_PATH)
        # An open inode is in memory; DONT_SYNC keeps a network file system from asking its server all the same.
        attr, _ = syscalls.statx(fd.n, more=syscalls.AT_STATX_DONT_SYNC if nowait else 0)
        node = self._nodes.by_ino.get(ino)
        if node is not None and node.orphan:
            attr.nlink -= 1
        return attr

    def setattr(self, ino: int, change: Change) -> Attr:
        fd = self.open_node(ino, os.O_PATH)
        path = _proc(fd)
        if change.uid is not None or change.gid is not None:
            uid = -1 if change.uid is None else change.uid
            gid = -1 if change.gid is None else change.gid
            os.chown(path, uid, gid)
        if change.mode is not None:
            os.chmod(path, change.mode & 0o7777)
        if change.atime_ns is not None or change.mtime_ns is not None:
            now = syscalls.statx(fd.n)[0]
            atime = now.atime_ns if change.atime_ns is None else change.atime_ns
            mtime = now.mtime_ns if change.mtime_ns is None else change.mtime_ns
            os.utime(path, ns=(atime, mtime))
        return self.getattr(ino)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        fd = self.open_node(ino, os.O_PATH)
        return os.getxattr(_proc(fd), name)

    def listxattr(self, ino: int) -> Sequence[bytes]:
        fd = self.open_node(ino, os.O_PATH)
        return [os.fsencode(name) for name in os.listxattr(_proc(fd))]

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int) -> None:
        fd = self.open_node(ino, os.O_PATH)
        os.setxattr(_proc(fd), name, value, flags)

    def removexattr(self, ino: int, name: bytes) -> None:
        fd = self.open_node(ino, os.O_PATH)
        os.removexattr(_proc(fd), name)

    def sync_all(self) -> None:
        syscalls.syncfs(self._root.n)

    def statfs(self) -> Statfs:
        s = os.fstatvfs(self._root.n)
        return Statfs(s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_bsize, s.f_namemax, s.f_frsize)

    # open files

    def hold(self, ino: int) -> None:
        with self._table:
            node = self._node(ino)
            if not node.places and ino != ROOT_INO:
                raise OSError(errno.ESTALE, "the file was removed")
            node.holds += 1

    def drop(self, ino: int) -> None:
        with self._table:
            node = self._node(ino)
            node.holds -= 1
            if node.holds:
                return
            gone = [] if node.orphan else self._nodes.settle(node)
        self._close_all(gone)
        if node.orphan:
            self._bury(node)

    def taken_over(self) -> None:
        for node in list(self._nodes.by_ino.values()):
            if node.orphan and not node.holds:
                self._bury(node)

    def _bury(self, node: Node) -> None:
        """An orphan was closed: its own link goes, and where that was the last one the file does."""
        with self.names:
            if node.holds or not node.orphan:
                return  # opened, or named, again meanwhile
            orphans = self._private.orphans()
            links = 0
            with contextlib.suppress(FileNotFoundError):  # a server before this one died when it had just removed it
                links = syscalls.statx(orphans.n, b"%d" % node.ino)[0].nlink
            self._unshelter(node)
            with self._table:
                if links == 1 or not node.places:
                    self._nodes.removed(node)
                gone = self._nodes.settle(node)
            self._close_all([node.ino, *gone])
