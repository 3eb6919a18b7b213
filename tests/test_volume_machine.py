"""A volume against a model: files written, cut, punched, cloned, copied, renamed, with commits that fail and everything
that keeps a volume run in between; at each end `check` finds nothing and a rebuilt volume shows the same."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select

from wbfuse.store.contract import ROOT_INO, Owner, Piece, Round
from wbfuse.store.volume import Tuning, VolumeStore, format_volume
from wbfuse.store.volume.admin.check import check
from wbfuse.store.volume.admin.dump import dump_to_bucket, load_dump, newest_dump
from wbfuse.store.volume.admin.gc import collect
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.layout import FRAME
from wbfuse.store.volume.schema import extents, packs
from wbfuse.wire.constants import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE

ME = Owner(0, 0)
SPACE = 5 * FRAME
offsets = st.integers(0, SPACE - 1) | st.integers(0, 8).map(lambda n: n * FRAME // 2)
lengths = st.one_of(st.integers(1, 9000), st.integers(1, 3 * FRAME))
numbers = st.integers(0, 1000)
quiet = Tuning(compact_rate=0, memory=1 << 20, readahead=0)


class VolumeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="wbfuse-machine-", dir="/var/tmp"))
        self.model: dict[int, bytearray] = {}
        self.names: dict[int, bytes] = {}
        self.count = 0
        self.fill = 0

    @initialize(compress=st.sampled_from(["none", "zstd", "lz4"]))
    def make(self, compress: str) -> None:
        self.meta, self.data = f"sqlite:///{self.path}/v.db", f"file://{self.path}/o"
        format_volume(self.meta, self.data, {}, 1 << 20, compress)
        self.store = VolumeStore(self.meta, quiet)

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.everything_is_whole()
                self.a_rebuilt_volume_shows_the_same()
        finally:
            if hasattr(self, "store"):
                self.store.close()
            shutil.rmtree(self.path)

    def _bytes(self, n: int, zeros: bool) -> bytes:
        self.fill += 1
        if zeros:
            return bytes(n)
        return os.urandom(1) * (n // 2) + os.urandom(n - n // 2) if self.fill % 2 else self.fill.to_bytes(4, "big") * n

    @rule()
    @precondition(lambda self: len(self.model) < 5)
    def create(self) -> None:
        self.count += 1
        name = b"f%d" % self.count
        ino, _ = self.store.create(ROOT_INO, name, 0o644, ME)
        self.model[ino], self.names[ino] = bytearray(), name

    def _file(self, i: int) -> int:
        if not self.model:
            self.create()
        return sorted(self.model)[i % len(self.model)]

    def _two(self, i: int, j: int) -> tuple[int, int]:
        while len(self.model) < 2:
            self.create()
        a = self._file(i)
        b = sorted(self.model.keys() - {a})[j % (len(self.model) - 1)]
        return a, b

    def _round(self, ino: int, writes: list[tuple[int, int, bool]], lowest: int | None) -> tuple[Round, bytearray]:
        after = bytearray(self.model[ino])
        if lowest is not None:
            after = after[:lowest]
        mask = bytearray(SPACE * 2)
        for offset, length, zeros in writes:
            data = self._bytes(length, zeros)[:length]
            after.extend(bytes(max(0, offset + length - len(after))))
            after[offset : offset + length] = data
            mask[offset : offset + length] = b"\1" * length
        pieces, at = [], 0
        while (start := mask.find(1, at)) >= 0:
            at = mask.find(0, start)
            step = (at - start, 10_000, FRAME)[self.fill % 3]  # one run of bytes may come in several pieces
            for low in range(start, at, step):
                part = bytes(after[low : min(at, low + step)])
                pieces.append(Piece(low, len(part), [memoryview(part)]))
        return Round(ino, lowest, pieces, len(after), mtime_ns=self.fill), after

    @rule(
        i=numbers,
        writes=st.lists(st.tuples(offsets, lengths, st.booleans()), max_size=4),
        lowest=st.none() | offsets,
        ahead=st.booleans(),
    )
    def commit(self, i: int, writes: list[tuple[int, int, bool]], lowest: int | None, ahead: bool) -> None:
        ino = self._file(i)
        round_, after = self._round(ino, writes, lowest)
        if ahead:
            self.store.stage([round_], lambda _n: None)
        self.store.commit([round_], lambda _n: None)
        self.model[ino] = after

    @rule(i=numbers, j=numbers, write=st.tuples(offsets, lengths, st.booleans()))
    def commit_two_together(self, i: int, j: int, write: tuple[int, int, bool]) -> None:
        a, b = self._two(i, j)
        rounds = [self._round(ino, [write], None) for ino in (a, b)]
        self.store.commit([r for r, _ in rounds], lambda _n: None)
        for ino, (_, after) in zip((a, b), rounds, strict=True):
            self.model[ino] = after

    @rule(i=numbers, write=st.tuples(offsets, lengths, st.booleans()), where=st.sampled_from(["put", "transact"]))
    def a_commit_that_fails_changes_nothing(self, i: int, write: tuple[int, int, bool], where: str) -> None:
        ino = self._file(i)
        round_, _ = self._round(ino, [write], 7)

        def broken(*_: Any, **__: Any) -> None:
            raise OSError(errno.ETIMEDOUT, "by the test")

        owner = self.store.objects if where == "put" else self.store.database
        setattr(owner, where, broken)
        try:
            if where == "put" and not any(any(b) for p in round_.pieces for b in p.buffers or ()):
                return  # zeros are not uploaded
            with pytest.raises(OSError, match="by the test"):
                self.store.commit([round_], lambda _n: None)
        finally:
            delattr(owner, where)

    @rule(i=numbers, offset=offsets, length=lengths)
    def punch(self, i: int, offset: int, length: int) -> None:
        ino = self._file(i)
        self.store.fallocate(ino, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
        model = self.model[ino]
        end = min(len(model), offset + length)
        if offset < end:
            model[offset:end] = bytes(end - offset)

    @rule(i=numbers)
    @precondition(lambda self: 0 < len(self.model) < 7)
    def clone(self, i: int) -> None:
        self.count += 1
        name = b"f%d" % self.count
        ino = self._file(i)
        new = self.store.clone(ino, ROOT_INO, name)
        assert self.store.lookup(ROOT_INO, name)[0] == new
        self.model[new], self.names[new] = bytearray(self.model[ino]), name

    @rule(i=numbers, j=numbers, offset=offsets, to=offsets, length=lengths)
    def copy(self, i: int, j: int, offset: int, to: int, length: int) -> None:
        a, b = self._two(i, j)
        n = self.store.copy_range(a, offset, b, to, length)
        part = self.model[a][offset : offset + length]
        assert n == len(part)
        if n:
            model = self.model[b]
            model.extend(bytes(max(0, to + n - len(model))))
            model[to : to + n] = part

    @rule(i=numbers, j=numbers, cut=offsets, whole=st.booleans())
    def copy_from_the_start(self, i: int, j: int, cut: int, whole: bool) -> None:
        """As cp(1) does with files that are larger than one call takes; or a part only, and then the file grows."""
        a, b = self._two(i, j)
        self.store.truncate(b, 0)
        done = 0
        for n in (cut, SPACE * 2) if whole else (cut,):
            if n:
                done += self.store.copy_range(a, done, b, done, n)
        wanted = self.model[a] if whole else self.model[a][:cut]
        assert done == len(wanted)
        if not whole:
            self.store.truncate(b, SPACE)
        self.model[b] = wanted + bytes(0 if whole else SPACE - len(wanted))

    @rule(i=numbers)
    def unlink(self, i: int) -> None:
        ino = self._file(i)
        assert self.store.unlink(ROOT_INO, self.names[ino]) == (ino, 0)
        del self.model[ino], self.names[ino]

    @rule(i=numbers, j=numbers)
    def rename_over(self, i: int, j: int) -> None:
        a, b = self._two(i, j)
        self.store.rename(ROOT_INO, self.names[a], ROOT_INO, self.names[b], 0)
        self.names[a] = self.names.pop(b)
        del self.model[b]

    @rule(i=numbers)
    def compact(self, i: int) -> None:
        ino = self._file(i)
        with patch("wbfuse.store.volume.compact._DEEP", 0):  # every clone is flattened as well
            self.store.compactor.compact(ino)

    @rule()
    def gc(self) -> None:
        collect(self.store.database, self.store.objects, scan=True)

    @rule()
    def dump(self) -> None:
        dump_to_bucket(self.store.database, self.store.objects)

    @precondition(lambda self: hasattr(self, "store"))
    @rule()
    def mount_again(self) -> None:
        self.store.close()
        self.store = VolumeStore(self.meta, quiet)
        for ino, name in self.names.items():
            assert self.store.lookup(ROOT_INO, name)[0] == ino

    @invariant()
    def files_read_as_the_model_says(self) -> None:
        for ino, wanted in self.model.items():
            buffer = memoryview(bytearray(len(wanted) + 10))
            n = self.store.read(ino, 0, buffer)
            assert bytes(buffer[:n]) == bytes(wanted), ino
            assert self.store.getattr(ino).size == len(wanted)

    def everything_is_whole(self) -> None:
        problems = check(
            self.store.database, self.store.objects, self.store.settings["compress"], True, lambda *_: None
        )
        assert [p.text for p in problems] == []

    def a_rebuilt_volume_shows_the_same(self) -> None:
        dump_to_bucket(self.store.database, self.store.objects)
        meta = f"sqlite:///{self.path}/rebuilt.db"
        database = Database(meta, create=True)
        found = self.store.objects.get_all(newest_dump(self.store.objects))
        fresh = load_dump(database, io.BytesIO(found), self.store.objects, self.data)
        database.close()
        self.store.objects.put("wbfuse-volume", [fresh.encode()], replace=True)
        rebuilt = VolumeStore(meta, quiet)
        try:
            for ino, wanted in self.model.items():
                assert rebuilt.lookup(ROOT_INO, self.names[ino])[0] == ino
                buffer = memoryview(bytearray(len(wanted)))
                assert rebuilt.read(ino, 0, buffer) == len(wanted)
                assert bytes(buffer) == bytes(wanted)
            named = set(rebuilt.database.query(lambda c: c.execute(select(extents.c.pack)).scalars().all())) - {0}
            known = set(rebuilt.database.query(lambda c: c.execute(select(packs.c.pack)).scalars().all()))
            assert named <= known
        finally:
            rebuilt.close()


TestVolumeMachine = VolumeMachine.TestCase
TestVolumeMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
