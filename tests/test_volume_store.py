"""The contract suite on volumes, and what only volumes promise."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, update

from tests import servers
from wbfuse.store.contract import ROOT_INO, FencedError, Piece, Round
from wbfuse.store.volume import Tuning, VolumeError, VolumeStore, format_volume
from wbfuse.store.volume.admin.check import check
from wbfuse.store.volume.admin.dump import dump_to_bucket, load_dump, read_dump
from wbfuse.store.volume.admin.gc import collect
from wbfuse.store.volume.compact import thin_inodes
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.layout import FRAME
from wbfuse.store.volume.objects import MARK
from wbfuse.store.volume.schema import dentries, extents, inodes, layers, packs, settings
from wbfuse.testing.store import ME, StoreContract, fails_with, put, read_all


@pytest.fixture
def volume_store(tmp_path: Path) -> Iterator[VolumeStore]:
    """A volume on SQLite and a directory."""
    meta = f"sqlite:///{tmp_path}/meta.db"
    format_volume(meta, f"file://{tmp_path}/data", {})
    store = VolumeStore(meta)
    yield store
    store.close()


class TestVolumeOnSqlite(StoreContract):
    @pytest.fixture
    def store(self, volume_store: VolumeStore) -> VolumeStore:
        return volume_store


class TestVolumeOnPostgresAndS3(StoreContract):
    @pytest.fixture
    def store(self, postgres_meta: str, s3_url: str) -> Iterator[VolumeStore]:
        format_volume(postgres_meta, s3_url, {}, compress="zstd")
        store = VolumeStore(postgres_meta)
        yield store
        store.close()


class TestVolumeOnAzure(StoreContract):
    @pytest.fixture
    def store(self, azure: str, tmp_path: Path) -> Iterator[VolumeStore]:
        meta = f"sqlite:///{tmp_path}/meta.db"
        options = {"endpoint": azure, "account_name": servers.AZURE_ACCOUNT, "account_key": servers.AZURE_KEY}
        format_volume(meta, f"az://container/{secrets.token_hex(6)}", options)
        store = VolumeStore(meta, Tuning(options=options))
        yield store
        store.close()


def objects_of(store: VolumeStore) -> set[str]:
    return {key for key, _ in store.objects.list("packs")}


def count(store: VolumeStore, table: object) -> int:
    return int(store.database.query(lambda c: c.execute(select(func.count()).select_from(table)).scalar_one()))  # type: ignore[arg-type]


def test_what_a_retained_dump_names_is_not_collected(volume_store: VolumeStore, tmp_path: Path) -> None:
    store = volume_store
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    put(store, ino, b"old" * 100)
    before = objects_of(store)
    key = dump_to_bucket(store.database, store.objects)
    put(store, ino, b"new" * 100)
    assert collect(store.database, store.objects).kept_for_dumps == 1
    assert before <= objects_of(store)
    database = Database(f"sqlite:///{tmp_path}/loaded.db", create=True)
    fresh = load_dump(database, io.BytesIO(store.objects.get_all(key)), store.objects, store.settings["data"])
    database.close()
    assert fails_with(errno.EPERM, lambda: dump_to_bucket(store.database, store.objects))
    assert fails_with(errno.EPERM, lambda: collect(store.database, store.objects))
    store.objects.put(MARK, [store.settings["uuid"].encode()], replace=True)
    for _ in range(4):
        dump_to_bucket(store.database, store.objects)
    collect(store.database, store.objects)
    assert not before & objects_of(store), "the dump that named it is gone, so it may go"
    assert fresh != store.settings["uuid"]


def test_a_changed_byte_in_a_pack_is_eio_and_found_by_check(volume_store: VolumeStore, tmp_path: Path) -> None:
    store = volume_store
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    put(store, ino, os.urandom(3 * FRAME))
    (key,) = objects_of(store)
    path = tmp_path / "data" / key
    data = bytearray(path.read_bytes())
    data[FRAME + 5] ^= 1
    path.write_bytes(data)
    store.frames._raw.clear()  # what was just written is in memory
    assert fails_with(errno.EIO, lambda: read_all(store, ino, 3 * FRAME))
    (problem,) = check(store.database, store.objects, "none", True, lambda *_: None)
    assert key in problem.text
    assert problem.lost
    assert list(check(store.database, store.objects, "none", False, lambda *_: None)) == []


def test_check_tells_which_files_a_missing_pack_was_of(volume_store: VolumeStore) -> None:
    store = volume_store
    ino, _ = store.create(ROOT_INO, b"precious", 0o644, ME)
    put(store, ino, b"x" * 1000)
    (key,) = objects_of(store)
    store.objects.delete(key)
    (problem,) = check(store.database, store.objects, "none", False, lambda *_: None)
    assert "/precious" in problem.text
    assert problem.repair is None


def test_check_repairs_counts_and_finds_what_lost_its_name(volume_store: VolumeStore) -> None:
    store = volume_store
    d, _ = store.mkdir(ROOT_INO, b"d", 0o755, ME)
    ino, _ = store.create(d, b"f", 0o644, ME)
    put(store, ino, b"data")

    def break_it(c: object) -> None:
        c.exec_driver_sql("delete from dentries")  # type: ignore[attr-defined]
        c.execute(update(packs).values(live=12345))  # type: ignore[attr-defined]

    store.database.transact(break_it)
    for _ in range(2):  # links are counted anew once names are back
        for problem in check(store.database, store.objects, "none", False, lambda *_: None):
            assert problem.repair is not None, problem.text
            store.database.transact(problem.repair)
    assert list(check(store.database, store.objects, "none", True, lambda *_: None)) == []
    store.close()
    store.__init__(store.database.url.render_as_string())  # type: ignore[misc]
    lost, _ = store.lookup(ROOT_INO, b"lost+found")
    assert read_all(store, store.lookup(lost, b"#%d" % ino)[0]) == b"data"


def test_a_dump_that_was_cut_is_refused(volume_store: VolumeStore) -> None:
    store = volume_store
    for i in range(50):
        store.create(ROOT_INO, b"f%d" % i, 0o644, ME)
    whole = store.objects.get_all(dump_to_bucket(store.database, store.objects))
    assert sum(1 for _ in read_dump(io.BytesIO(whole))) > 50
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        with pytest.raises(Exception, match=r"not a whole dump|the end is missing"):
            list(read_dump(io.BytesIO(whole[:n])))


def test_a_packs_row_that_was_taken_makes_the_commit_stage_again(volume_store: VolumeStore) -> None:
    store = volume_store
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    round_ = Round(ino, None, [Piece(0, 5, [memoryview(b"hello")])], 5)
    store.stage([round_], lambda _n: None)
    store.database.transact(lambda c: c.execute(update(packs).values(state=2)))
    assert fails_with(errno.EAGAIN, lambda: store.commit([round_], lambda _n: None))
    assert round_.staged is None
    put(store, ino, b"hello")
    assert read_all(store, ino) == b"hello"


def test_many_small_files_are_one_pack_and_one_transaction(volume_store: VolumeStore) -> None:
    store = volume_store
    inos = [store.create(ROOT_INO, b"f%d" % i, 0o644, ME)[0] for i in range(300)]
    rounds = [Round(ino, None, [Piece(0, 5, [memoryview(b"%05d" % ino)])], 5) for ino in inos]
    store.commit(rounds, lambda _n: None)
    assert len(objects_of(store)) == 1
    assert all(read_all(store, ino) == b"%05d" % ino for ino in inos)


def test_a_volume_of_a_newer_version_and_foreign_ones_are_refused(volume_store: VolumeStore, tmp_path: Path) -> None:
    store = volume_store
    meta = store.database.url.render_as_string()
    with pytest.raises(VolumeError, match="in use by"):
        VolumeStore(meta)
    with pytest.raises(VolumeError, match="holds a volume already"):
        format_volume(f"sqlite:///{tmp_path}/other.db", store.settings["data"], {})
    with pytest.raises(VolumeError, match="there is a volume already"):
        format_volume(meta, f"file://{tmp_path}/elsewhere", {})
    with pytest.raises(VolumeError, match="no such volume"):
        VolumeStore(f"sqlite:///{tmp_path}/missing.db")
    store.objects.put("wbfuse-volume", [b"somebody else"], replace=True)
    with pytest.raises(VolumeError, match="holds another volume"):
        VolumeStore(meta)
    newer = update(settings).where(settings.c.name == "version").values(value="999")
    store.database.transact(lambda c: c.execute(newer))
    with pytest.raises(VolumeError, match="made by a newer wbfuse"):
        VolumeStore(meta)


def test_a_file_of_very_many_extents_is_cloned_without_a_byte(volume_store: VolumeStore) -> None:
    store = volume_store
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    data = os.urandom(4096)
    pieces = [Piece(i * 8192, 4096, [memoryview(data)]) for i in range(2000)]
    store.commit([Round(ino, None, pieces, 2000 * 8192)], lambda _n: None)
    rows, there = count(store, extents), objects_of(store)
    new = store.clone(ino, ROOT_INO, b"b")
    assert (count(store, extents), objects_of(store)) == (rows, there)
    found, _ = store.lookup(ROOT_INO, b"b")
    assert found == new
    assert store.seek(new, 4096, os.SEEK_DATA) == 8192
    assert store.seek(new, 8192, os.SEEK_HOLE) == 8192 + 4096
    buffer = memoryview(bytearray(12288))
    assert store.read(found, 8192 * 1999 - 4096, buffer) == 12288
    assert bytes(buffer) == bytes(4096) + data + bytes(4096)


def test_a_quiet_file_of_random_writes_is_compacted(volume_store: VolumeStore) -> None:
    store = volume_store
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    size = 33 << 20
    data = bytearray(os.urandom(size))
    store.commit([Round(ino, None, [Piece(0, size, [memoryview(bytes(data))])], size)], lambda _n: None)
    for i in range(600):
        at = i * 37 * 4096 % (size - 4096)
        data[at : at + 4096] = os.urandom(4096)
    pieces = [
        Piece(at, 4096, [memoryview(data)[at : at + 4096]])
        for at in sorted({i * 37 * 4096 % (size - 4096) for i in range(600)})
    ]
    store.commit([Round(ino, None, pieces, size)], lambda _n: None)
    assert count(store, extents) > 600
    assert store.compactor.compact(ino) == 3
    assert count(store, extents) == 3
    assert read_all(store, ino, size) == bytes(data)


def test_a_directory_of_very_many_names(volume_store: VolumeStore) -> None:
    store = volume_store
    d, _ = store.mkdir(ROOT_INO, b"many", 0o755, ME)
    first, _ = store.create(d, b"f", 0o644, ME)
    n = 100_000
    row = dict(store.database.query(lambda c: c.execute(select(inodes).where(inodes.c.ino == first)).one())._mapping)
    base = store.session.ids(n)

    def fill(c: object) -> None:
        numbers = range(base, base + n)
        c.execute(insert(inodes), [row | {"ino": i} for i in numbers])  # type: ignore[attr-defined]
        names = [{"parent": d, "name": b"f%d" % i, "ino": i, "type": 8, "cookie": i} for i in numbers]
        c.execute(insert(dentries), names)  # type: ignore[attr-defined]

    store.database.transact(fill)
    store.close()
    store.__init__(store.database.url.render_as_string())  # type: ignore[misc]
    assert store.lookup(ROOT_INO, b"many")[0] == d
    listed = [e.name for e in store.readdir(d, 0)]
    assert len(listed) == len(set(listed)) == n + 3
    assert store.lookup(d, b"f%d" % (base + n - 1))[0] == base + n - 1
    assert fails_with(errno.ENOENT, lambda: store.lookup(d, b"missing"))
    assert store.unlink(d, b"f%d" % base) == (base, 0)
    assert sum(1 for _ in store.readdir(d, 0)) == n + 2


def test_bytes_of_a_file_that_is_not_there_any_more_are_not_tried_for_ever(volume_store: VolumeStore) -> None:
    """The cache sets them aside: that is what FencedError asks for."""
    store = volume_store
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    store.database.transact(lambda c: c.execute(delete(inodes).where(inodes.c.ino == ino)))
    with pytest.raises(FencedError, match="not in the volume"):
        put(store, ino, b"data")


def test_a_pack_that_is_mostly_dead_is_emptied_and_collected(volume_store: VolumeStore) -> None:
    store = volume_store
    made = [store.create(ROOT_INO, b"f%d" % i, 0o644, ME)[0] for i in range(10)]
    data = {ino: os.urandom(FRAME) for ino in made}
    rounds = [Round(ino, None, [Piece(0, FRAME, [memoryview(data[ino])])], FRAME) for ino in made]
    store.commit(rounds, lambda _n: None)
    (shared,) = objects_of(store)
    assert store.database.query(lambda c: thin_inodes(c, 10)) == []
    for i in range(9):
        store.truncate(made[i], 0)
    assert store.database.query(lambda c: thin_inodes(c, 10)) == [made[9]]
    assert store.compactor.compact(made[9]) == 1
    collect(store.database, store.objects)
    assert shared not in objects_of(store)
    assert read_all(store, made[9], FRAME) == data[made[9]]
    assert store.database.query(lambda c: thin_inodes(c, 10)) == []


def test_a_clone_that_goes_on_while_it_is_brought_to_its_own_layer_is_whole(
    volume_store: VolumeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second piece comes between two transactions: it raises what the file shows of the layer below."""
    store, size = volume_store, 2 << 20
    a, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    put(store, a, os.urandom(2 * size))
    for i in range(10):  # many layers deep
        clone, _ = store.create(ROOT_INO, b"c%d" % i, 0o644, ME)
        store.copy_range(a, 0, clone, 0, 2 * size)
        store.write(a, i * 4096, os.urandom(4096))
    last, _ = store.create(ROOT_INO, b"last", 0o644, ME)
    store.copy_range(a, 0, last, 0, 2 * size)
    b, _ = store.create(ROOT_INO, b"b", 0o644, ME)
    assert store.copy_range(a, 0, b, 0, size) == size
    transact = store.database.transact

    def then(*args: Any, **kwargs: Any) -> Any:
        done = transact(*args, **kwargs)
        monkeypatch.undo()
        assert store.copy_range(a, size, b, size, size) == size
        return done

    monkeypatch.setattr(store.database, "transact", then)
    store.compactor.compact(b)
    assert read_all(store, b, 2 * size) == read_all(store, a, 2 * size)


def test_a_file_that_was_cloned_often_stands_on_few_layers_again(volume_store: VolumeStore) -> None:
    store = volume_store
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    model = bytearray(os.urandom(200_000))
    put(store, ino, bytes(model))
    clones = []
    for n in range(12):
        clones.append((store.clone(ino, ROOT_INO, b"clone%d" % n), bytes(model)))
        at = n * 15_000
        model[at : at + 5000] = os.urandom(5000)
        store.write(ino, at, bytes(model[at : at + 5000]))
    store.fallocate(ino, 3, 100_000, 50_000)
    model[100_000:150_000] = bytes(50_000)
    of = select(layers.c.depth).join(inodes, inodes.c.layer == layers.c.layer).where(inodes.c.ino == ino)
    assert store.database.query(lambda c: c.execute(of).scalar_one()) == 12
    moved = store.compactor.bytes
    before = objects_of(store)
    store.compactor.compact(ino)
    assert store.database.query(lambda c: c.execute(of).scalar_one()) == 0
    assert before <= objects_of(store)
    assert store.compactor.bytes - moved <= 200_000
    assert read_all(store, ino, 200_000) == model
    for clone, content in clones:
        store.find(b"clone%d" % clones.index((clone, content)))
        assert read_all(store, clone, 200_000) == content
    assert list(check(store.database, store.objects, "none", True, lambda *_: None)) == []
