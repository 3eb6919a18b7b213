"""What the next server knows: nodes and open handles, replayed from the journal, against the live tables."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.conftest import Mounter, needs_mount
from wbfuse.filesystem.handles import OpenTable
from wbfuse.journal import Journal, Kind
from wbfuse.store.contract import ROOT_INO
from wbfuse.store.directory.nodes import ORPHANAGE, Node, Nodes, Place
from wbfuse.wire.negotiate import Agreement

ROOT = (1, 2, 3)
NAMES = st.sampled_from([b"a", b"b", b"c" * 255])
BORN = st.integers(0, 6)


def again(journal: Journal) -> Journal:
    return Journal(os.dup(journal.fd))


def known(nodes: Nodes) -> dict[int, tuple[object, ...]]:
    return {
        ino: (n.identity, n.kind, n.places, n.children, n.removed, nodes.find(n.identity) is n)
        for ino, n in nodes.by_ino.items()
    }


class Machine(RuleBasedStateMachine):
    """Names come and go, files are opened and forgotten, and at any moment another server may take over."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal()
        self.nodes = Nodes(ROOT, stat.S_IFDIR, self.journal)
        self.numbers: dict[int, tuple[int, int, int]] = {ROOT_INO: ROOT}

    def pick(self, data: st.DataObject) -> Node:
        return self.nodes.by_ino[data.draw(st.sampled_from(sorted(self.nodes.by_ino)))]

    def place(self, data: st.DataObject, name: bytes) -> Place:
        return data.draw(st.sampled_from([ORPHANAGE, *sorted(self.nodes.by_ino)])), name

    @rule(data=st.data(), born=BORN, name=NAMES)
    def see(self, data: st.DataObject, born: int, name: bytes) -> None:
        node = self.nodes.see((9, born, -born), stat.S_IFREG, self.place(data, name))
        assert self.numbers.setdefault(node.ino, node.identity) == node.identity  # no number is given twice

    @precondition(lambda self: len(self.nodes.by_ino) > 1)
    @rule(data=st.data(), name=NAMES)
    def move(self, data: st.DataObject, name: bytes) -> None:
        node = self.pick(data)
        old = list(node.places)
        self.nodes.add(node, self.place(data, name))
        if old:
            self.nodes.lose(node, old[0])

    @precondition(lambda self: len(self.nodes.by_ino) > 1)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        node = self.pick(data)
        if node.ino != ROOT_INO:
            node.lookups = 0
            self.nodes.settle(node)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        node = self.pick(data)
        if node.ino != ROOT_INO:
            for place in list(node.places):
                self.nodes.lose(node, place)
            self.nodes.removed(node)

    @rule()
    def take_over(self) -> None:
        self.journal = again(self.journal)
        self.nodes = Nodes(ROOT, stat.S_IFDIR, self.journal)

    @invariant()
    def the_next_server_knows_the_same(self) -> None:
        assert known(Nodes(ROOT, stat.S_IFDIR, again(self.journal))) == known(self.nodes)


TestNodes = Machine.TestCase
TestNodes.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_file_of_many_names_is_known_by_its_freshest() -> None:
    journal = Journal()
    nodes = Nodes(ROOT, stat.S_IFDIR, journal)
    for n in range(1000):
        node = nodes.see((9, 9, 9), stat.S_IFREG, (ROOT_INO, b"%0255d" % n))
    after = Nodes(ROOT, stat.S_IFDIR, again(journal)).by_ino[node.ino]
    assert after.places == node.places[-len(after.places) :]
    assert len(after.places) == 32


def test_handles_are_known_until_released() -> None:
    journal = Journal()
    table = OpenTable(journal)
    first, _ = table.open(7, True)
    second, _ = table.open(8, False)
    third, _ = table.open(7, True)
    table.close(third)
    journal = again(journal)
    after = OpenTable(journal)
    assert {(fh, h.ino, h.writable) for fh, h in after.all()} == {(first, 7, True), (second, 8, False)}
    assert after.open(9, True)[0] not in (first, second, third)


@needs_mount
def test_a_journal_taken_from_a_dead_server_names_what_is_open(mounter: Mounter) -> None:
    """The server dies with files open; its journal says which, under which numbers, and where they are."""
    m = mounter("--policy", "writeback")
    (m.path / "d").mkdir()
    (m.path / "d" / "old").write_bytes(b"x")
    kept = [os.open(m.path / "d" / "old", os.O_RDONLY), os.open(m.path / "gone", os.O_WRONLY | os.O_CREAT)]
    (m.path / "d" / "old").rename(m.path / "d" / "new")
    (m.path / "gone").unlink()
    with (m.path / "closed").open("wb"):
        pass
    inodes = {os.fstat(fd).st_ino for fd in kept}
    pid = m.status()["worker"]["pid"]
    fds = Path(f"/proc/{pid}/fd")
    memfd = next(fd for fd in fds.iterdir() if "wbfuse-journal" in str(fd.readlink()))
    journal = Journal(os.open(memfd, os.O_RDWR))
    m.kill()
    nodes = Nodes(ROOT, stat.S_IFDIR, again(journal))
    handles = [handle for _, handle in OpenTable(journal).all()]
    assert {h.writable for h in handles} == {True, False}
    places = {h.writable: nodes.by_ino[h.ino].places for h in handles}
    ((parent, name),) = places[False]
    assert (nodes.by_ino[parent].places, name) == ([(ROOT_INO, b"d")], b"new")
    assert [p for p, _ in places[True]] == [ORPHANAGE]
    assert {nodes.by_ino[h.ino].identity[1] for h in handles} == inodes
    assert Agreement.decode(journal.inherited(Kind.AGREEMENT)[0]).max_write >= 1 << 17
    for fd in kept:
        with contextlib.suppress(OSError):  # its server is dead
            os.close(fd)
