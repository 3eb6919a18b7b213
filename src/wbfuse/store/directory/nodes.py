"""The directory store's table of nodes: our number -> where the file was last seen and what it is.

Pure memory. A node is identified by (device, inode, birth time): hard links are one node, and a file that got the
inode number of a removed one is another. Numbers come from a counter and are never used twice.

Lock: the store's `names` lock guards the whole table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from wbfuse.store.contract import ROOT_INO
from wbfuse.store.directory.syscalls import Identity

Place = tuple[int, bytes]
"""(parent ino, name)."""


@dataclass(slots=True)
class Node:
    ino: int
    identity: Identity
    kind: int
    """The file type, S_IFMT part of the mode."""
    places: list[Place] = field(default_factory=list)
    """Names by which it was seen, the freshest last. Empty for the root."""
    holds: int = 0
    orphan: bool = False
    """It has no name of its own left; its place is in the orphanage."""
    known: bool = True
    """Somebody above may still ask for it."""


class Nodes:
    """ino -> Node and identity -> Node."""

    def __init__(self, root: Identity, kind: int) -> None:
        self._next = ROOT_INO + 1
        top = Node(ROOT_INO, root, kind)
        self.by_ino: dict[int, Node] = {ROOT_INO: top}
        self._by_identity: dict[Identity, Node] = {root: top}

    def see(self, identity: Identity, kind: int, place: Place | None) -> Node:
        """The node of a file just found at `place`, made where it is new."""
        node = self._by_identity.get(identity)
        if node is None:
            node = Node(self._next, identity, kind)
            self._next += 1
            self.by_ino[node.ino] = node
            self._by_identity[identity] = node
        node.known = True
        if place is not None:
            self.moved(node, None, place)
        return node

    def find(self, identity: Identity) -> Node | None:
        return self._by_identity.get(identity)

    def moved(self, node: Node, old: Place | None, new: Place | None) -> None:
        """A name of `node` has gone or come."""
        if old is not None and old in node.places:
            node.places.remove(old)
        if new is not None and node.ino != ROOT_INO and (not node.places or node.places[-1] != new):
            if new in node.places:
                node.places.remove(new)
            node.places.append(new)

    def remove(self, node: Node) -> None:
        """The file is gone for good, or nobody knows it any more."""
        self.by_ino.pop(node.ino, None)
        if self._by_identity.get(node.identity) is node:
            del self._by_identity[node.identity]
