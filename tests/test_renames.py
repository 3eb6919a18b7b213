"""Renames that wait: a file that is replaced is the old or the new one in the store, whatever happens.

First against a model of the names that applications have made: over a real directory, with servers that die between any
two steps and get the request again, and data that becomes durable whenever it likes. Then on real mounts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.conftest import Mounter, needs_mount, wbfuse
from tests.test_disk_log import down
from tests.test_keeper import kill_worker
from wbfuse.filesystem.api import Request
from wbfuse.filesystem.store_fs import StoreFileSystem
from wbfuse.journal import Journal
from wbfuse.store.contract import ROOT_INO, Store
from wbfuse.store.directory import DirectoryStore
from wbfuse.wire.constants import RENAME_EXCHANGE, RENAME_NOREPLACE, UNIQUE_RESEND
from wbfuse.writeback.renames import DeferredRenames, Move

DIRECTORIES = (b"", b"a", b"b")
NAMES = (b"x", b"y")
Place = tuple[bytes, bytes]
places = st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(NAMES))
deaths = st.none() | st.integers(1, 14)
numbers = st.integers(0, 20)


class Died(BaseException):
    """The server is no more."""


class Mortal:
    """A store whose server may die before and after each call that changes something."""

    CHANGES = frozenset({"create", "mkdir", "rmdir", "symlink", "link", "unlink", "rename"})

    def __init__(self, store: DirectoryStore) -> None:
        self.store = store
        self.left = 0
        self.until = 0
        self.meanwhile: Callable[[], None] = lambda: None
        """Called, if `until` is not 0, before the call of that number."""

    def step(self, _record: bytes = b"") -> None:
        if self.left:
            self.left -= 1
            if not self.left:
                raise Died

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if name not in self.CHANGES | {"lookup"}:
            return found

        def call(*args: Any) -> Any:
            if self.until:
                self.until -= 1
                if not self.until:
                    self.meanwhile()
            if name == "lookup":
                return found(*args)
            self.step()
            answer = found(*args)
            self.step()
            return answer

        return call


class Names(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="wbfuse-names-", dir="/var/tmp"))
        self.model: dict[Place, int] = {}
        """What applications see: the files, by ino; a negative number is a symlink."""
        self.content: dict[int, bytes] = {}
        self.dirty: set[int] = set()
        self.guarded: dict[Place, int] = {}
        """Names that dirty files took from others: the store must not have them there."""
        self.inos = {b"": ROOT_INO}
        self.unique = 0
        self.journal = Journal()
        self.start(DirectoryStore(str(self.path), journal=self.journal))
        for name in DIRECTORIES[1:]:
            self.make_directory(name)

    def start(self, store: DirectoryStore) -> None:
        self.store = Mortal(store)
        self.renames = DeferredRenames(cast(Store, self.store), self.journal)
        self.renames.load()
        self.renames.waits = self.dirty.__contains__
        self.renames.settle = self.settle
        self.fs = StoreFileSystem(self.renames.as_store(), journal=self.journal)
        self.fs.take_over()

    def settle(self, move: Move) -> None:
        self.written(move.ino)
        self.renames.carry_out(move)

    def teardown(self) -> None:
        try:
            for ino in list(self.dirty):
                self.written(ino)
            for move in self.renames.pending:
                self.renames.carry_out(move)
            self.names_are_as_applications_made_them()
            there = {
                (os.fsencode(os.path.relpath(home, self.path)).strip(b"."), os.fsencode(name))
                for home, _, names in os.walk(self.path)
                for name in names
            }
            assert there == self.model.keys(), "in the store itself"
            nodes = self.store.store._nodes.by_ino.values()
            assert not [node.ino for node in nodes if node.holds], "held for ever"
        finally:
            self.store.store.close()
            shutil.rmtree(self.path)

    def ask(self, method: str, place: Place, *args: Any, death: int | None) -> Any:
        """A request, and again to the next server where the first one dies of it."""
        self.unique += 2
        request = Request(self.unique, self.inos[place[0]], 0, 0, 0, cast(Any, None))
        self.store.left = death or 0
        self.journal.on_append = self.store.step
        try:
            return getattr(self.fs, method)(request, place[1], *args)
        except Died:
            self.journal = Journal(os.dup(self.journal.fd))
            self.start(DirectoryStore(str(self.path), False, self.journal, os.dup(self.store.store.root_fd)))
            request.unique |= UNIQUE_RESEND
            return getattr(self.fs, method)(request, place[1], *args)
        finally:
            self.store.left = 0
            self.journal.on_append = None

    def make_directory(self, name: bytes, death: int | None = None) -> None:
        self.inos[name] = self.ask("mkdir", (b"", name), 0o755, 0, death=death).nodeid

    def links(self, ino: int) -> int:
        return list(self.model.values()).count(ino)

    def some(self, n: int) -> Place | None:
        """The place of some file."""
        there = sorted(self.model)
        return there[n % len(there)] if there else None

    def forget(self, place: Place) -> None:
        self.model.pop(place, None)
        self.guarded.pop(place, None)

    # what applications do

    @rule(place=places, death=deaths, dirty=st.sampled_from((False, True, True)))
    def create(self, place: Place, death: int | None, dirty: bool) -> None:
        if place[0] not in self.inos or place in self.model:
            return
        entry, opened = self.ask("create", place, os.O_RDWR, 0o644, 0, death=death)
        request = Request(0, entry.nodeid, 0, 0, 0, cast(Any, None))
        self.fs.release(request, opened.fh, os.O_RDWR)
        ino = self.model[place] = entry.nodeid
        self.content[ino] = b"%d" % ino
        self.dirty.add(ino)
        if not dirty:
            self.written(ino)

    @rule(place=places, death=deaths)
    def symlink(self, place: Place, death: int | None) -> None:
        if place[0] in self.inos and place not in self.model:
            self.model[place] = -self.ask("symlink", place, b"target", death=death).nodeid

    @rule(n=numbers, new=places, death=deaths)
    def link(self, n: int, new: Place, death: int | None) -> None:
        place = self.some(n)
        if place is None or (ino := self.model[place]) < 0 or new[0] not in self.inos or new in self.model:
            return
        assert self.ask("link", (new[0], cast(bytes, ino)), new[1], death=death).nodeid == ino
        self.model[new] = ino

    @rule(n=numbers, death=deaths)
    def unlink(self, n: int, death: int | None) -> None:
        place = self.some(n)
        if place is not None:
            self.ask("unlink", place, death=death)
            self.forget(place)

    @rule(n=numbers, new=places, keep=st.sampled_from((False, False, False, True)), death=deaths)
    def rename(self, n: int, new: Place, keep: bool, death: int | None) -> None:
        source = self.some(n)
        if source is None:
            return
        ino, other = self.model[source], self.model.get(new)
        if new[0] not in self.inos or ino == other:
            return
        if keep and other is not None:
            with pytest.raises(FileExistsError):
                self.ask("rename", source, self.inos[new[0]], new[1], RENAME_NOREPLACE, death=None)
            return
        flags = RENAME_NOREPLACE if keep else 0
        stays = self.stored(new) == ino  # it was replaced there, and nothing of that has come to the store
        self.ask("rename", source, self.inos[new[0]], new[1], flags, death=death)
        self.forget(source)
        self.forget(new)
        self.model[new] = ino
        if other is not None and ino in self.dirty and not stays:
            self.guarded[new] = ino

    @rule(n=numbers, new=places, which=numbers, until=st.sampled_from((1, 1, 1, 2, 3, 5)))
    @precondition(lambda self: self.renames.pending)
    def rename_while_another_is_carried_out(self, n: int, new: Place, which: int, until: int) -> None:
        source, pending = self.some(n), self.renames.pending
        of_this = [move for move in pending if source is not None and move.ino == self.model[source]]
        move = of_this[0] if of_this else pending[which % len(pending)]

        def carry_out() -> None:
            self.written(move.ino)
            self.renames.carry_out(move)

        committer = threading.Thread(target=carry_out)

        def meanwhile() -> None:
            committer.start()
            committer.join(0.01)  # it may have to wait for the rename

        self.store.until, self.store.meanwhile = until, meanwhile
        self.rename(n, new, False, None)
        self.store.until = 0
        if committer.ident is not None:
            committer.join()

    @rule(n=numbers, m=numbers, death=deaths)
    def exchange(self, n: int, m: int, death: int | None) -> None:
        source, new = self.some(n), self.some(m)
        if source is None or new is None:
            return
        one, two = self.model[source], self.model[new]
        if one == two:
            return
        self.ask("rename", source, self.inos[new[0]], new[1], RENAME_EXCHANGE, death=death)
        self.guarded.pop(source, None)
        self.guarded.pop(new, None)
        self.model[source], self.model[new] = two, one

    @rule(name=st.sampled_from(DIRECTORIES[1:]), death=deaths)
    def remove_or_make_directory(self, name: bytes, death: int | None) -> None:
        if name not in self.inos:
            self.make_directory(name, death)
        elif not any(home == name for home, _ in self.model):
            self.ask("rmdir", (b"", name), death=death)
            del self.inos[name]

    @rule(death=deaths)
    @precondition(lambda self: len(self.inos) == 3 and not any(home == b"b" for home, _ in self.model))
    def replace_a_directory(self, death: int | None) -> None:
        self.ask("rename", (b"", b"a"), ROOT_INO, b"b", 0, death=death)
        self.inos[b"b"] = self.inos.pop(b"a")
        for table in cast(list[dict[Place, int]], [self.model, self.guarded]):
            for place in [place for place in table if place[0] == b"a"]:
                table[(b"b", place[1])] = table.pop(place)

    # what the cache does

    def written(self, ino: int) -> None:
        """The file's data is durable."""
        if ino in self.dirty:
            with contextlib.suppress(OSError):  # it has no name any more
                self.store.write(ino, 0, self.content[ino])
            self.dirty.discard(ino)
            for place in [place for place, mine in self.guarded.items() if mine == ino]:
                del self.guarded[place]

    @rule(n=st.integers(0, 100), death=deaths)
    def become_durable(self, n: int, death: int | None) -> None:
        waiting = sorted(self.dirty)
        if waiting:
            self.written(waiting[n % len(waiting)])
        for move in self.renames.pending:
            if move.ino not in self.dirty:
                self.carry_out(lambda move=move: self.renames.carry_out(move), death)  # type: ignore[misc]
                return

    def carry_out(self, act: Callable[[], object], death: int | None) -> None:
        self.store.left = death or 0
        self.journal.on_append = self.store.step
        try:
            act()
        except Died:
            self.journal = Journal(os.dup(self.journal.fd))
            self.start(DirectoryStore(str(self.path), False, self.journal, os.dup(self.store.store.root_fd)))
        finally:
            self.store.left = 0
            self.journal.on_append = None

    # what holds at every moment

    @invariant()
    def names_are_as_applications_made_them(self) -> None:
        for home, parent in self.inos.items():
            listed = {e.name: e.ino for e in self.renames.readdir(parent, 0) if e.name not in (b".", b"..")}
            mine = {name: ino for (directory, name), ino in self.model.items() if directory == home}
            directories = self.inos.keys() - {b""} if not home else set()
            assert listed.keys() == mine.keys() | directories
            for name in NAMES:
                if name not in mine:
                    with pytest.raises(FileNotFoundError):
                        self.renames.lookup(parent, name)
                    continue
                ino, attr = self.renames.lookup(parent, name)
                self.renames.forget(ino)
                assert ino == abs(mine[name])
                assert attr.nlink == self.renames.getattr(ino).nlink == self.links(mine[name])
                if mine[name] > 0 and ino not in self.dirty:
                    assert self.read(ino) == self.content[ino]

    def read(self, ino: int) -> bytes:
        buffer = memoryview(bytearray(100))
        return bytes(buffer[: self.store.read(ino, 0, buffer)])

    @invariant()
    def no_half_written_file_has_the_name_of_a_whole_one_in_the_store(self) -> None:
        for place, ino in self.guarded.items():
            assert self.stored(place) != ino

    def stored(self, place: Place) -> int:
        """The file that the store itself has there; 0 for none."""
        try:
            ino, _ = self.store.store.lookup(self.inos[place[0]], place[1])
        except FileNotFoundError:
            return 0
        self.store.store.forget(ino)
        return ino


TestNames = Names.TestCase
TestNames.settings = settings(
    max_examples=int(os.environ.get("WBFUSE_NAMES", "150")), stateful_step_count=40, deadline=None
)


@pytest.mark.parametrize("death", range(1, 12))
def test_a_file_goes_back_by_another_of_its_names_to_one_that_the_store_has_never_taken_from_it(death: int) -> None:
    """rename(2) of one name of a file over another does nothing: sent again, it must not be that."""
    machine = Names()
    machine.create((b"", b"y"), None, False)
    machine.link(0, (b"a", b"x"), None)
    machine.create((b"b", b"x"), None, True)
    machine.rename(2, (b"", b"y"), False, None)
    machine.rename(1, (b"", b"y"), False, death)
    machine.names_are_as_applications_made_them()
    machine.teardown()


def test_a_rename_that_is_carried_out_just_then(tmp_path: Path) -> None:
    """mv x b; mv c d; mv b c: the first is carried out when the last one has begun, and takes the second's old name."""
    for name in ("b", "d", "x", "c"):
        (tmp_path / name).write_text(f"was {name}")
    journal = Journal()
    store = Mortal(DirectoryStore(str(tmp_path), journal=journal))
    renames = DeferredRenames(cast(Store, store), journal)
    renames.waits = lambda _ino: True
    for name in (b"b", b"d", b"x", b"c"):
        renames.lookup(ROOT_INO, name)
    renames.rename(ROOT_INO, b"x", ROOT_INO, b"b", 0)
    renames.rename(ROOT_INO, b"c", ROOT_INO, b"d", 0)
    first = renames.pending[0]
    committer = threading.Thread(target=renames.carry_out, args=(first,))
    look = store.store.lookup

    def carry_out(*args: Any) -> Any:
        cast(Any, store.store).lookup = look
        committer.start()
        committer.join(0.5)  # it may have to wait for this rename
        return look(*args)

    cast(Any, store.store).lookup = carry_out
    renames.rename(ROOT_INO, b"b", ROOT_INO, b"c", 0)
    committer.join()
    for move in renames.pending:
        renames.carry_out(move)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {
        "c": "was x",
        "d": "was c",
    }
    store.store.close()


SLOW = ("--bwlimit", "1MB/s", "--on-close", "background")


def names(home: Path) -> set[str]:
    return set(os.listdir(home)) - {".wbfuse"}


def replace(home: Path, data: bytes) -> None:
    """`file` is whole in the store, and replaced by what is on its way."""
    (home / "file").write_bytes(b"the old one")
    wbfuse("sync", str(home), check=True)
    (home / "new").write_bytes(data)
    os.rename(home / "new", home / "file")


@needs_mount
def test_the_old_file_stays_in_the_store_until_the_data_of_the_new_one_is_there(mounter: Mounter) -> None:
    m = mounter(*SLOW)
    data = os.urandom(4 << 20)
    replace(m.path, data)
    assert (m.source / "file").read_bytes() == b"the old one"
    assert names(m.path) == {"file"}
    assert (m.path / "file").read_bytes() == data
    assert not (m.path / "new").exists()
    assert m.status()["renames"] == 1
    assert "1 rename waits" in wbfuse("status", str(m.path)).stdout
    m.umount()
    assert names(m.source) == {"file"}
    assert (m.source / "file").read_bytes() == data


@needs_mount
def test_a_machine_that_stops_leaves_the_old_file(mounter: Mounter, volume: str) -> None:
    m = mounter(*SLOW, source=volume)
    replace(m.path, os.urandom(4 << 20))
    down(m)
    again = mounter(source=volume)
    assert (again.path / "file").read_bytes() == b"the old one"


@needs_mount
@pytest.mark.parametrize("kind", ["directory", "volume"])
def test_the_next_worker_goes_on_with_a_rename(mounter: Mounter, volume: str, kind: str) -> None:
    m = mounter(*SLOW, source=volume if kind == "volume" else None)
    data = os.urandom(2 << 20)
    with open(m.path / "kept", "wb") as f:
        f.write(b"open in the meantime, ")
        replace(m.path, data)
        os.rename(m.path / "kept", m.path / "file")
        kill_worker(m)
        f.write(b"and written to")
    assert names(m.path) == {"file"}
    assert (m.path / "file").read_bytes() == b"open in the meantime, and written to"
    m.umount()
    again = mounter(source=m.source)
    assert names(again.path) == {"file"}
    assert (again.path / "file").read_bytes() == b"open in the meantime, and written to"


@needs_mount
def test_fsync_of_the_file_or_of_its_directory_waits_for_the_name(mounter: Mounter) -> None:
    m = mounter(*SLOW)
    for of in ("file", "."):
        data = os.urandom(1 << 20)
        replace(m.path, data)
        fd = os.open(m.path / of, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        assert (m.source / "file").read_bytes() == data
        assert names(m.source) == {"file"}


@needs_mount
def test_names_of_files_on_their_way_are_free_for_others(mounter: Mounter) -> None:
    """As editors, package managers and build tools do it, one version after the other."""
    m = mounter(*SLOW)
    (m.path / "file").write_bytes(b"the old one")
    wbfuse("sync", str(m.path), check=True)
    for n in range(5):
        away = m.path / "away"
        away.mkdir()
        for where in (m.path, away):
            (where / "new").write_bytes(b"%d" % n * 100_000)
            os.rename(where / "new", m.path / "file")
        away.rmdir()
        assert names(m.path) == {"file"}
    assert (m.source / "file").read_bytes() == b"the old one"
    m.umount()
    assert names(m.source) == {"file"}
    assert (m.source / "file").read_bytes() == b"4" * 100_000


@needs_mount
def test_with_a_log_on_disk_both_files_are_whole_after_a_kill(mounter: Mounter, workdir: Path) -> None:
    log = ("--log", str(workdir / "log"), "--fsync", "log")
    m = mounter(*SLOW, *log)
    (m.path / "file").write_bytes(b"the old one")
    wbfuse("sync", str(m.path), check=True)
    data = os.urandom(4 << 20)
    with open(m.path / "new", "wb") as f:
        f.write(data)
        os.fsync(f.fileno())
    os.rename(m.path / "new", m.path / "file")
    down(m)
    again = mounter(*log, source=m.source)
    assert (again.path / "file").read_bytes() == b"the old one"
    assert (again.path / "new").read_bytes() == data


@needs_mount
@pytest.mark.parametrize("kind", ["directory", "volume"])
def test_fsync_of_the_directory_waits_for_what_the_kernel_holds(mounter: Mounter, volume: str, kind: str) -> None:
    m = mounter("--on-close", "background", source=volume if kind == "volume" else None)
    (m.path / "file").write_bytes(b"the old one")
    wbfuse("sync", str(m.path), check=True)
    with open(m.path / "new", "wb", buffering=0) as f:
        f.write(b"n" * 300_000)
        os.rename(m.path / "new", m.path / "file")
        home = os.open(m.path, os.O_RDONLY)
        os.fsync(home)
        os.close(home)
        down(m)
    again = mounter(source=m.source)
    assert (again.path / "file").read_bytes() == b"n" * 300_000
    assert names(again.path) == {"file"}


@needs_mount
def test_writes_to_a_replaced_file_do_not_change_what_has_its_name_in_the_store(mounter: Mounter) -> None:
    m = mounter(*SLOW)
    (m.path / "file").write_bytes(b"the old one")
    with open(m.path / "file", "r+b", buffering=0) as f:
        replace(m.path, os.urandom(3 << 20))
        f.truncate(3)
        os.fsync(f.fileno())
        assert (m.source / "file").stat().st_size == 3 << 20, "its fsync came after the rename"
        f.write(b"mine")
        assert os.pread(f.fileno(), 10, 0) == b"mine"


@needs_mount
def test_a_store_that_refuses_the_name_gets_the_data_once(mounter: Mounter) -> None:
    m = mounter("--on-close", "background")
    (m.path / "file").write_bytes(b"the old one")
    wbfuse("sync", str(m.path), check=True)
    if subprocess.run(["chattr", "+a", m.source], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("directories cannot be made append-only here")
    replaced = os.open(m.path / "file", os.O_RDWR)
    try:
        with open(m.path / "new", "wb") as f:
            f.write(b"n" * 300_000)
        before = m.status()["store"]["bytes_written"]
        os.rename(m.path / "new", m.path / "file")
        for _ in range(2):
            assert wbfuse("sync", str(m.path)).returncode == 1
        assert m.status()["store"]["bytes_written"] - before <= 300_000
        assert m.status()["renames"] == 1
        os.pwrite(replaced, b"and what is written to it", 0)
        os.fsync(replaced)  # does not wait for what may never be
    finally:
        os.close(replaced)
        subprocess.run(["chattr", "-a", m.source], check=True)
    m.umount()
    assert (m.source / "file").read_bytes() == b"n" * 300_000


@needs_mount
def test_fsync_of_a_replaced_file_does_not_wait_for_one_that_finds_no_room(mounter: Mounter, workdir: Path) -> None:
    source = workdir / "small"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "wbfuse-test", str(source)], check=True)
    try:
        (source / "file").write_bytes(b"the old one")
        m = mounter("--on-close", "background", source=source)
        replaced = os.open(m.path / "file", os.O_RDWR)
        with open(source / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(source).free)
        (m.path / "new").write_bytes(b"n" * 300_000)
        os.rename(m.path / "new", m.path / "file")
        os.pwrite(replaced, b"THE", 0)
        os.fsync(replaced)
        os.close(replaced)
        with open(m.path / "file", "rb") as f, pytest.raises(OSError, match="No space"):
            os.fsync(f.fileno())
        assert (source / "file").read_bytes() == b"THE old one"
        (source / "filler").unlink()
        m.umount()
        assert (source / "file").read_bytes() == b"n" * 300_000
    finally:
        subprocess.run(["umount", "-l", str(source)], check=True)
