"""What `wbfuse check` finds and mends, and dumps and buckets that are not what they should be."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, insert, inspect, select, update

from tests.conftest import wbfuse
from tests.test_promises import wait_until
from wbfuse.store.contract import ROOT_INO
from wbfuse.store.volume import Tuning, VolumeStore, format_volume
from wbfuse.store.volume.admin.check import Problem, check
from wbfuse.store.volume.admin.dump import DumpError, load_dump, read_dump, write_dump
from wbfuse.store.volume.admin.gc import collect
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.objects import MARK
from wbfuse.store.volume.schema import dentries, extents, inodes, layers, orphans, packs
from wbfuse.testing.store import ME, fails_with, put, read_all

QUIET = Tuning(compact_rate=0, dump_interval=0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VolumeStore]:
    """A volume with /a/b/file (3 frames) and /a/c, nothing in memory."""
    meta = f"sqlite:///{tmp_path}/meta.db"
    format_volume(meta, f"file://{tmp_path}/data", {})
    made = VolumeStore(meta, QUIET)
    a, _ = made.mkdir(ROOT_INO, b"a", 0o755, ME)
    b, _ = made.mkdir(a, b"b", 0o755, ME)
    made.mkdir(a, b"c", 0o755, ME)
    ino, _ = made.create(b, b"file", 0o644, ME)
    put(made, ino, os.urandom(150_000))
    made.close()
    made = VolumeStore(meta, QUIET)
    yield made
    made.close()


def problems(store: VolumeStore, data: bool = False) -> list[Problem]:
    return list(check(store.database, store.objects, "none", data, lambda *_: None))


def repaired(store: VolumeStore) -> list[str]:
    """Repair until nothing is left that can be. Answers what is left."""
    for _ in range(4):
        for problem in problems(store):
            if problem.repair is not None:
                store.database.transact(problem.repair)
    return [p.text for p in problems(store)]


def ino_of(store: VolumeStore, path: bytes) -> int:
    at = ROOT_INO
    for name in path.split(b"/"):
        under = select(dentries.c.ino).where(dentries.c.parent == at, dentries.c.name == name)
        at = store.database.query(lambda c, under=under: c.execute(under).scalar_one())  # type: ignore[misc]
    return int(at)


def tree(store: VolumeStore) -> set[str]:
    """Paths that can be reached from the root."""
    out, queue = set(), [(ROOT_INO, "")]
    while queue:
        at, path = queue.pop()
        rows = store.database.query(lambda c, at=at: c.execute(select(dentries).where(dentries.c.parent == at)).all())  # type: ignore[misc]
        for row in rows:
            out.add(f"{path}/{bytes(row.name).decode()}")
            if row.type == stat.S_IFDIR >> 12:
                queue.append((row.ino, f"{path}/{bytes(row.name).decode()}"))
    return out


Spoil = Callable[[Connection, VolumeStore], Any]


def _ring(c: Connection, s: VolumeStore) -> None:
    a, b = ino_of(s, b"a"), ino_of(s, b"a/b")
    c.execute(update(dentries).where(dentries.c.ino == a).values(parent=b))
    c.execute(update(inodes).where(inodes.c.ino == a).values(parent=b))


SPOILED: dict[str, tuple[Spoil, str]] = {
    "links": (lambda c, s: c.execute(update(inodes).where(inodes.c.ino == ino_of(s, b"a")).values(nlink=9)), "links"),
    "type": (lambda c, s: c.execute(update(dentries).where(dentries.c.name == b"file").values(type=4)), "type"),
    "cookies": (lambda c, s: c.execute(update(dentries).where(dentries.c.parent == ino_of(s, b"a")).values(cookie=99)),
                "same place"),
    "dot dot": (lambda c, s: c.execute(update(inodes).where(inodes.c.ino == ino_of(s, b"a/b")).values(parent=1)),
                "says it is in"),
    "two names": (lambda c, s: c.execute(insert(dentries).values(
        parent=1, name=b"twin", ino=ino_of(s, b"a/b"), type=4, cookie=77)), "several names"),
    "named orphan": (lambda c, s: c.execute(insert(orphans).values(ino=ino_of(s, b"a/b/file"), session=1)),
                     "waits to be removed"),
    "live count": (lambda c, _: c.execute(update(packs).where(packs.c.live > 0).values(live=5)), "live bytes"),
    "users": (lambda c, _: c.execute(update(layers).values(users=7)), "users"),
    "lost layer": (lambda c, _: c.execute(delete(layers)), "is missing"),
    "beyond the end": (lambda c, s: c.execute(
        update(inodes).where(inodes.c.ino == ino_of(s, b"a/b/file")).values(size=10)), "rows beyond"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_check_finds_it_and_puts_it_right(store: VolumeStore, name: str) -> None:
    spoil, says = SPOILED[name]
    before = tree(store)
    store.database.transact(lambda c: spoil(c, store))
    assert any(says in p.text for p in problems(store)), [p.text for p in problems(store)]
    assert repaired(store) == []
    assert before <= tree(store)


ROWS: dict[str, dict[str, int]] = {
    "too long": {"length": 1 << 30},
    "longer than its frames": {"length": 160_000},
    "negative": {"offset": -1},
    "beyond the pack": {"offset": 1 << 20},
    "another pack": {"pack": 999_999},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_cannot_be_is_found_and_read_as_eio(store: VolumeStore, name: str) -> None:
    ino = ino_of(store, b"a/b/file")
    store.database.transact(lambda c: c.execute(update(extents).values(**ROWS[name])))
    store.database.transact(lambda c: c.execute(update(inodes).where(inodes.c.ino == ino).values(size=160_000)))
    assert any(p.lost for p in problems(store))
    store.find(b"a/b/file")
    with pytest.raises((OSError, OverflowError)) as raised:
        read_all(store, ino, 160_000)
    assert getattr(raised.value, "errno", errno.EIO) == errno.EIO


def test_a_layer_that_stands_on_itself_ends_in_eio(store: VolumeStore) -> None:
    ino = store.find(b"a/b/file")
    store.database.transact(lambda c: c.execute(update(layers).values(base=layers.c.layer, base_size=1 << 20)))
    store.database.transact(lambda c: c.execute(delete(extents)))
    assert fails_with(errno.EIO, lambda: read_all(store, ino, 100))
    assert any("cannot be" in p.text for p in problems(store))


def test_a_pack_that_was_cut_short_is_found_without_reading(store: VolumeStore, tmp_path: Path) -> None:
    ((key, size),) = [(k, n) for k, n in store.objects.list("packs") if n > 100]
    os.truncate(tmp_path / "data" / key, size - 1)
    (problem,) = problems(store)
    assert f"{size - 1} bytes of {size}" in problem.text
    assert "/a/b/file" in problem.text
    ino = store.find(b"a/b/file")
    assert fails_with(errno.EIO, lambda: read_all(store, ino, 150_000))


def test_what_lost_its_directory_comes_back_with_its_tree(store: VolumeStore) -> None:
    a = ino_of(store, b"a")
    store.database.transact(lambda c: c.execute(delete(dentries).where(dentries.c.ino == a)))
    store.create(ROOT_INO, b"lost+found", 0o644, ME)
    assert repaired(store) == []
    assert f"/lost+found.1/#{a}/b/file" in tree(store)


def test_an_inode_of_a_directory_that_is_gone_leaves_its_files_reachable(store: VolumeStore) -> None:
    b, file = ino_of(store, b"a/b"), ino_of(store, b"a/b/file")
    store.database.transact(lambda c: c.execute(delete(inodes).where(inodes.c.ino == b)))
    assert repaired(store) == []
    assert f"/lost+found/#{file}" in tree(store)


def test_a_ring_is_cut_at_one_place(store: VolumeStore) -> None:
    a = ino_of(store, b"a")
    store.database.transact(lambda c: _ring(c, store))
    assert repaired(store) == []
    assert {f"/lost+found/#{a}/b/file", f"/lost+found/#{a}/c"} <= tree(store)


def test_repair_is_refused_while_the_volume_is_mounted(store: VolumeStore) -> None:
    refused = wbfuse("check", store.database.url.render_as_string(), "--repair")
    assert refused.returncode == 2
    assert "in use by" in refused.stderr
    assert wbfuse("check", store.database.url.render_as_string()).returncode == 0


def test_a_flipped_bit_in_a_dump_is_found(store: VolumeStore) -> None:
    """Or it is one that says nothing: zstd has spare bits, and several ways to say one thing."""
    out = io.BytesIO()
    write_dump(store.database, out)
    whole = bytearray(out.getvalue())
    rows = list(read_dump(io.BytesIO(whole)))
    found = 0
    for bit in range(len(whole) * 8):
        bad = bytearray(whole)
        bad[bit >> 3] ^= 1 << (bit & 7)
        try:
            assert list(read_dump(io.BytesIO(bad))) == rows
        except DumpError:
            found += 1
    assert found > len(whole) * 8 * 0.95


def test_nothing_is_kept_of_a_dump_with_a_flipped_bit(store: VolumeStore, tmp_path: Path) -> None:
    out = io.BytesIO()
    write_dump(store.database, out)
    bad = bytearray(out.getvalue())
    bad[-1] ^= 1  # of its checksum
    database = Database(f"sqlite:///{tmp_path}/new.db", create=True)
    with pytest.raises(DumpError):
        load_dump(database, io.BytesIO(bad), store.objects, store.settings["data"])
    assert inspect(database.engine).get_table_names() == []
    database.close()
    assert store.objects.owners() == [store.settings["uuid"]]


def test_a_dump_of_another_volume_is_refused_and_foreign_tables_stay(store: VolumeStore, tmp_path: Path) -> None:
    out = io.BytesIO()
    write_dump(store.database, out)
    meta, data = f"sqlite:///{tmp_path}/b.db", f"file://{tmp_path}/b"
    format_volume(meta, data, {})
    other = VolumeStore(meta, QUIET)
    database = Database(f"sqlite:///{tmp_path}/new.db", create=True)
    with pytest.raises(DumpError, match="another volume"):
        load_dump(database, io.BytesIO(out.getvalue()), other.objects, data)
    database.transact(lambda c: c.exec_driver_sql("create table sessions (x)"))
    with pytest.raises(DumpError, match="not empty"):
        load_dump(database, io.BytesIO(out.getvalue()), store.objects, store.settings["data"])
    assert database.query(lambda c: c.exec_driver_sql("select count(*) from sessions").scalar_one()) == 0
    database.close()
    other.close()


def test_older_dumps_of_a_volume_that_was_loaded_can_be_loaded_still(store: VolumeStore, tmp_path: Path) -> None:
    out = io.BytesIO()
    write_dump(store.database, out)
    for n in range(2):
        database = Database(f"sqlite:///{tmp_path}/new{n}.db", create=True)
        load_dump(database, io.BytesIO(out.getvalue()), store.objects, store.settings["data"])
        database.close()
    assert len(store.objects.owners()) == 3
    assert fails_with(errno.EPERM, lambda: collect(store.database, store.objects))
    store.objects.put(MARK, [store.settings["uuid"].encode()], replace=True)


def test_foreign_objects_are_left_alone(store: VolumeStore) -> None:
    for key in ("packs/README", "packs/de/.DS_Store", "packs/ff/fffffffffffffffffff", "dumps/README"):
        store.objects.put(key, [b"x"])
    assert problems(store) == []
    assert collect(store.database, store.objects, scan=True).objects == 0


def test_what_empties_a_pack_is_durable_before_its_object_goes(
    store: VolumeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite: names may be lost in a power cut, and would then name what gc has deleted."""
    ino = store.find(b"a/b/file")
    store.unlink(ino_of(store, b"a/b"), b"file")
    store.forget(ino)
    with_rows = select(layers.c.layer).limit(1)
    assert wait_until(lambda: store.database.query(lambda c: c.execute(with_rows).first()) is None)  # the reaper
    events: list[str] = []
    transact, remove = Database.transact, store.objects.delete

    def spy(self: Database, act: Any, durable: bool = False, then: Any = None) -> Any:
        result = transact(self, act, durable, then)
        events.append("durable" if durable else "lazy")
        return result

    monkeypatch.setattr(Database, "transact", spy)
    monkeypatch.setattr(store.objects, "delete", lambda key: (events.append("delete"), remove(key)))
    collect(store.database, store.objects)
    assert "delete" in events
    for i, event in enumerate(events):
        if event == "delete":
            assert next(e for e in reversed(events[:i]) if e != "delete") == "durable"


def test_a_host_that_commits_sees_what_another_has_written_elsewhere_in_the_file(tmp_path: Path) -> None:
    meta = f"sqlite:///{tmp_path}/meta.db"
    format_volume(meta, f"file://{tmp_path}/data", {})
    shared = Tuning(compact_rate=0, dump_interval=0, shared=True, lease_wait=5.0)
    one, two = VolumeStore(meta, shared), VolumeStore(meta, shared)
    far = 16 << 20  # in the next window of the map
    ino, _ = one.create(ROOT_INO, b"f", 0o644, ME)
    for at in (0, far):
        one.write(ino, at, b"1" * 4096)
    two.lookup(ROOT_INO, b"f")
    buffer = memoryview(bytearray(8))
    two.read(ino, far, buffer)
    one.write(ino, far, b"2" * 4096)
    two.write(ino, 0, b"B")
    two.read(ino, far, buffer)
    assert bytes(buffer) == b"2" * 8
    two.close()
    one.close()
