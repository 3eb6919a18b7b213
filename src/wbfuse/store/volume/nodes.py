"""What this mount knows of inodes: references, opens, and the newest attributes that anybody here has seen.

A row's `version` orders answers: an older one never replaces a newer one, whatever order threads come back in.
Nodes that nobody refers to stay for a while, so that a listing need not be asked for twice.

Lock: `lock` guards everything here, for an instant, with nothing held inside it.
"""

from __future__ import annotations

import errno
import stat
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from wbfuse.store.contract import ROOT_INO
from wbfuse.wire.types import Attr

_SPARE = 50_000
"""Nodes kept without a reference."""
_NAMES = 200_000
"""Names kept."""


@dataclass(slots=True)
class Node:
    ino: int
    row: Any
    """Its row of `inodes`."""
    seen_at: float
    lookups: int = 0
    holds: int = 0
    opened: int = 0
    """The version of its row when it was last opened."""
    gone: bool = False
    """It has neither names nor opens, and is being removed."""


def attr_of(row: Any) -> Attr:
    """Raises EIO where the row makes no sense."""
    try:
        directory = stat.S_ISDIR(row.mode)
        return Attr(
            row.ino, row.mode, 4096 if directory else row.size, -(-row.bytes // 512), row.atime_ns, row.mtime_ns,
            row.ctime_ns, row.nlink, row.uid, row.gid, row.rdev,
        )  # fmt: skip
    except (OverflowError, TypeError) as e:
        raise OSError(errno.EIO, f"the row of inode {row.ino} makes no sense; see wbfuse check") from e


class Nodes:
    """`timeout`: seconds for which attributes and names hold without asking; None where nobody else changes them.

    `inherited`: the kernel may know nodes from a server that died, of which nothing is known here yet.
    """

    def __init__(self, timeout: float | None, inherited: bool = False) -> None:
        self.timeout = timeout
        self._inherited = inherited
        self.lock = threading.Lock()
        self._nodes: dict[int, Node] = {}
        self._spare: OrderedDict[int, None] = OrderedDict()
        self._names: OrderedDict[tuple[int, bytes], tuple[int, float]] = OrderedDict()
        self._changes: dict[int, int] = {}
        """When a directory's names changed here, as a number of `_clock`; `_floor` for those that are not in it."""
        self._clock = self._floor = 0
        self._whole: set[int] = set()
        """Directories of which every name is in `_names`."""

    def _fresh(self, at: float) -> bool:
        return self.timeout is None or time.monotonic() - at < self.timeout

    # inodes

    def learn(self, row: Any, lookups: int = 0) -> Attr:
        """A row was read or written. Answers the newest attributes; `lookups` references to it are given out."""
        with self.lock:
            return attr_of(self._learn(row, lookups).row)

    def _learn(self, row: Any, lookups: int = 0) -> Node:
        node = self._nodes.get(row.ino)
        now = time.monotonic()
        if node is None:
            node = self._nodes[row.ino] = Node(row.ino, row, now)
            self._spare[row.ino] = None
            if len(self._spare) > _SPARE:
                del self._nodes[self._spare.popitem(last=False)[0]]
        elif row.version >= node.row.version:
            node.row, node.seen_at = row, now
            if row.nlink:
                node.gone = False  # it was given a name in the moment that its last open went
        if lookups:
            node.lookups += lookups
            self._spare.pop(node.ino, None)
        return node

    def known(self, ino: int) -> Node:
        """A node that somebody refers to. ESTALE where nobody does, or where it is gone."""
        node = self._nodes.get(ino)
        unreferenced = node is not None and not node.lookups and not node.holds and ino != ROOT_INO
        if node is None or (unreferenced and not self._inherited):
            raise OSError(errno.ESTALE, f"node {ino} is not known")
        if node.gone:
            raise OSError(errno.ESTALE, f"node {ino} was removed")
        return node

    def fresh(self, ino: int) -> Any | None:
        """The row of a known node, None where it should be asked for again."""
        with self.lock:
            if self._inherited and ino not in self._nodes:
                return None
            node = self.known(ino)
            return node.row if self._fresh(node.seen_at) else None

    def missing(self, ino: int) -> bool:
        """Whether nothing is known of a node that the kernel may know."""
        return self._inherited and ino not in self._nodes

    def version(self, ino: int) -> int:
        """The version of the newest row seen, 0 for none."""
        node = self._nodes.get(ino)
        return 0 if node is None else int(node.row.version)

    def opened(self, ino: int) -> bool:
        """Whether the row is the same as when this was last asked."""
        with self.lock:
            node = self.known(ino)
            same: bool = node.opened == node.row.version
            node.opened = node.row.version
            return same

    def forget(self, ino: int, nlookup: int) -> bool:
        """Give references back. Whether the last went from a file without names, which must be removed now."""
        with self.lock:
            node = self._nodes.get(ino)
            if node is None:
                return False
            node.lookups = max(0, node.lookups - nlookup)
            if node.lookups or node.holds or ino == ROOT_INO:
                return False
            dies = self._bury(node)
            if node.row.nlink == 0:
                del self._nodes[ino]
                return dies
            self._spare[ino] = None
            if len(self._spare) > _SPARE:
                del self._nodes[self._spare.popitem(last=False)[0]]
            return False

    def hold(self, ino: int) -> None:
        with self.lock:
            self.known(ino).holds += 1

    def drop(self, ino: int) -> bool:
        """Undo a hold. Whether it was the last of a file without names, which must be removed now."""
        with self.lock:
            node = self._nodes[ino]
            node.holds -= 1
            dies = self._bury(node)
            if not node.lookups and not node.holds:
                if node.row.nlink == 0:
                    del self._nodes[ino]
                else:
                    self._spare[ino] = None
            return dies

    def held(self, ino: int) -> bool:
        with self.lock:
            node = self._nodes.get(ino)
            return node is not None and node.holds > 0

    def unnamed(self, ino: int) -> bool:
        """The last name of a file went. Whether it must be removed now, because nobody has it open."""
        with self.lock:
            node = self._nodes.get(ino)
            return node is not None and self._bury(node)

    def _bury(self, node: Node) -> bool:
        """Held: lock. Whether this file dies now, for which nobody but who asks is to blame."""
        if node.gone or node.holds or node.row.nlink or stat.S_ISDIR(node.row.mode):
            return False
        node.gone = True
        return True

    # names

    def find(self, parent: int, name: bytes) -> tuple[int, Attr] | None:
        """What stands under a name, with a reference, where both name and attributes are known well enough."""
        with self.lock:
            found = self._names.get((parent, name))
            if found is None or not self._fresh(found[1]):
                return None
            node = self._nodes.get(found[0])
            if node is None or not self._fresh(node.seen_at) or node.gone:
                return None
            node.lookups += 1
            self._spare.pop(node.ino, None)
            return node.ino, attr_of(node.row)

    def stamp(self, parent: int) -> int:
        """To be taken before names of `parent` are read, for `listed`."""
        with self.lock:
            return self._changes.get(parent, self._floor)

    def listed(self, parent: int, stamp: int, entries: list[tuple[bytes, Any]]) -> None:
        """Names and rows as they were read; kept unless a name of `parent` has changed here since `stamp`."""
        with self.lock:
            current = self._changes.get(parent, self._floor) == stamp
            for name, row in entries:
                self._learn(row)
                if current:
                    self._keep(parent, name, row.ino)

    def _keep(self, parent: int, name: bytes, ino: int) -> None:
        self._names[parent, name] = ino, time.monotonic()
        self._names.move_to_end((parent, name))
        if len(self._names) > _NAMES:
            (other, _), _ = self._names.popitem(last=False)
            self._whole.discard(other)
            self._change(other)

    def whole(self, parent: int, stamp: int | None) -> None:
        """All names of a directory are known: it is new (`stamp` None), or was listed from `stamp` on."""
        with self.lock:
            if self.timeout is None and stamp in (None, self._changes.get(parent, self._floor)):
                self._whole.add(parent)

    def absent(self, parent: int, name: bytes) -> bool:
        """Whether it is known that there is no such name."""
        with self.lock:
            return parent in self._whole and (parent, name) not in self._names

    def _change(self, parent: int) -> None:
        """Held: lock. What is being read of a directory's names is not the newest any more."""
        self._clock += 1
        if len(self._changes) > _SPARE:
            self._changes.clear()
            self._floor = self._clock
        self._changes[parent] = self._clock

    def renamed(self, parent: int, name: bytes, ino: int | None) -> None:
        """A name was made (for `ino`) or removed here."""
        with self.lock:
            self._change(parent)
            if ino is None:
                self._names.pop((parent, name), None)
            else:
                self._keep(parent, name, ino)
