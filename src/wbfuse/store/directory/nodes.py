"""The directory store's table of nodes: our number -> where the file was last seen and what it is.

Pure memory. A node is identified by (device, inode, birth time): hard links are one node, and a file that got the
inode number of a removed one is another. Numbers come from a counter and are never used twice.

A node stays while somebody above has a reference to it (`lookups`, `holds`) and while another node is found through
it (`children`): a dirty file must find its way though the kernel has forgotten the directory.

Every change is in the journal before anybody is told of it, so that the next server knows the same numbers. What it
cannot know is how often the kernel looked a node up; that counts as once, for the kernel forgets all of it at a time.

Lock: the store's `_table` guards all of it, for an instant at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct
from struct import error as struct_error

from wbfuse.journal import Counter, Journal, Kind
from wbfuse.store.contract import ROOT_INO
from wbfuse.store.directory.syscalls import Identity

Place = tuple[int, bytes]
"""(parent ino, name). Parent 0 is the orphanage: a link of wbfuse's own that keeps an unlinked open file."""

ORPHANAGE = 0

_NODE = Struct("<QQqIBB")
"""Device, inode, birth time in ns, type, whether the file is gone from the store, and the length of its handle."""
_PLACE = Struct("<QB")
_JOURNALED = 32
"""So many places of a node are in its record, the freshest. One is enough to find it; a file may have 65,000."""


@dataclass(slots=True)
class Node:
    ino: int
    identity: Identity
    kind: int
    """The file type, S_IFMT part of the mode."""
    places: list[Place] = field(default_factory=list)
    """Names by which it was seen, the freshest last. Empty for the root, and for what is gone."""
    lookups: int = 0
    """References that `Found` answers gave and `forget` has not taken back."""
    holds: int = 0
    children: int = 0
    """Places of other nodes that name this one as parent."""
    removed: bool = False
    """It is gone from the store for good: its identity may be another's soon."""
    handle: bytes = b""
    """What finds it though its names be unknown (syscalls.open_handle), where that was asked for."""

    @property
    def orphan(self) -> bool:
        """It has a link in the orphanage, which nobody shall see counted."""
        return any(parent == ORPHANAGE for parent, _ in self.places)


def path_of(places: Callable[[int], list[Place]], ino: int) -> str:
    """A path by the freshest names, for people; empty where one is not known. `places`: those of a node."""
    names: list[str] = []
    at = ino
    while at != ROOT_INO and len(names) < 4096 and (known := places(at)):
        at, name = known[-1]
        names.append(os.fsdecode(name))
    return "/" + "/".join(reversed(names)) if names and at == ROOT_INO else ""


def pack(identity: Identity, kind: int, removed: bool, places: list[Place], handle: bytes = b"") -> bytes:
    """A node as its journal entry."""
    out = [_NODE.pack(*identity, kind, removed, len(handle)), handle]
    for parent, name in places[-_JOURNALED:]:
        out += (_PLACE.pack(parent, len(name)), name)
    return b"".join(out)


def unpack(ino: int, entry: bytes) -> Node:
    """The node of a journal entry, looked up once. Raises ValueError where it is none."""
    try:
        return _unpack(ino, entry)
    except struct_error as e:
        raise ValueError(f"the entry of node {ino} is none: {e}") from e


def _unpack(ino: int, entry: bytes) -> Node:
    device, inode, born, kind, removed, length = _NODE.unpack_from(entry)
    at = _NODE.size + length
    node = Node(ino, (device, inode, born), kind, lookups=1, removed=bool(removed), handle=entry[_NODE.size : at])
    while at < len(entry):
        parent, length = _PLACE.unpack_from(entry, at)
        at += _PLACE.size + length
        node.places.append((parent, entry[at - length : at]))
    return node


def rebase(table: dict[int, bytes], device: int) -> None:
    """A journal's table, by tag, for a new mount of the directory, which may be on another `device` after a reboot.

    Of the nodes only those of dirty files and their directories stay: the kernel knows none.
    """
    nodes = {tag >> 8: unpack(tag >> 8, value) for tag, value in table.items() if tag & 0xFF == Kind.NODE}
    needed: set[int] = set()
    waiting: list[int] = []
    for tag in [tag for tag in table if tag & 0xFF == Kind.DIRTY]:
        ino = tag >> 8
        node = nodes.get(ino)
        if node is not None and node.removed:
            del table[tag]
            continue
        waiting.append(ino)
    while waiting:
        at = waiting.pop()
        if at not in needed and at in nodes:
            needed.add(at)
            waiting += [parent for parent, _ in nodes[at].places]
    for ino, node in nodes.items():
        if ino in needed:
            identity = device, *node.identity[1:]
            table[ino << 8 | Kind.NODE] = pack(identity, node.kind, node.removed, node.places, node.handle)
        else:
            del table[ino << 8 | Kind.NODE]


class Nodes:
    """ino -> Node and identity -> Node, beginning with what `journal` inherited; `known` to the kernel or not."""

    def __init__(self, root: Identity, kind: int, journal: Journal, known: bool = True) -> None:
        self._journal = journal
        self._numbers = Counter(journal, Kind.NODE, ROOT_INO + 1)
        top = Node(ROOT_INO, root, kind, lookups=1)
        self.by_ino: dict[int, Node] = {ROOT_INO: top}
        self._by_identity: dict[Identity, Node] = {root: top}
        for ino, entry in journal.inherited(Kind.NODE).items():
            node = self.by_ino[ino] = unpack(ino, entry)
            node.lookups = int(known)
            if not node.removed:
                self._by_identity[node.identity] = node
        for node in self.by_ino.values():
            for parent, _ in node.places:
                if parent in self.by_ino:
                    self.by_ino[parent].children += 1

    def _stamp(self, node: Node, places: list[Place], removed: bool = False) -> None:
        """What `node` is about to become. Where this raises (no memory) nothing has changed."""
        if self.by_ino.get(node.ino) is node:
            gone = removed or node.removed
            self._journal.put(Kind.NODE, node.ino, pack(node.identity, node.kind, gone, places, node.handle))

    def see(self, identity: Identity, kind: int, place: Place, handle: Callable[[], bytes] = lambda: b"") -> Node:
        """The node of a file just found at `place`, made where it is new (with this handle), with one more lookup."""
        node = self._by_identity.get(identity)
        if node is not None:
            self.add(node, place)
        else:
            node = Node(self._numbers.take(), identity, kind, [place], handle=handle())
            self._journal.put(Kind.NODE, node.ino, pack(identity, kind, False, node.places, node.handle))
            self.by_ino[node.ino] = node
            self._by_identity[identity] = node
            self._child(place, 1)
        node.lookups += 1
        return node

    def _child(self, place: Place, more: int) -> Node | None:
        """Count a place with its parent; answers the parent, None where that is not known."""
        parent = self.by_ino.get(place[0])
        if parent is not None:
            parent.children += more
        return parent

    def find(self, identity: Identity) -> Node | None:
        return self._by_identity.get(identity)

    def add(self, node: Node, place: Place) -> None:
        """`node` was seen at `place`, which becomes its freshest."""
        if node.ino == ROOT_INO or (node.places and node.places[-1] == place):
            return
        known = place in node.places
        places = [p for p in node.places if p != place] + [place]
        self._stamp(node, places)
        node.places = places
        if not known:
            self._child(place, 1)

    def lose(self, node: Node, place: Place) -> list[int]:
        """`node` is not at `place` any more. Answers the numbers of nodes that nobody needs now."""
        if place not in node.places:
            return []
        places = [p for p in node.places if p != place]
        self._stamp(node, places)
        node.places = places
        parent = self._child(place, -1)
        return [] if parent is None else self.settle(parent)

    def settle(self, node: Node) -> list[int]:
        """Remove `node` where nobody needs it, and those that it alone kept. Answers their numbers."""
        if node.ino == ROOT_INO or node.lookups > 0 or node.holds > 0 or node.children > 0:
            return []
        if self.by_ino.get(node.ino) is not node:
            return []
        self._journal.remove(Kind.NODE, node.ino)
        del self.by_ino[node.ino]
        if self._by_identity.get(node.identity) is node:
            del self._by_identity[node.identity]
        gone = [node.ino]
        for place in list(node.places):
            gone += self.lose(node, place)
        return gone

    def removed(self, node: Node) -> None:
        """The file is gone from the store for good."""
        if self._by_identity.get(node.identity) is node:
            self._stamp(node, node.places, removed=True)
            del self._by_identity[node.identity]
            node.removed = True
