"""FileCache against a byte array, in every interleaving of changes and rounds; what a store holds is a prefix."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wbfuse.writeback.extents import HOLE
from wbfuse.writeback.file import STORE, FileCache, Generation, plan

SPACE = 48


def apply_round(store: bytearray, g: Generation, log: bytearray) -> bytearray:
    """What a store does with a round, in the order of its contract."""
    out = bytearray(store)
    if g.lowest is not None and g.lowest < len(out):
        del out[g.lowest :]
    for piece in plan(g.extents, 8, lambda place, n: memoryview(log)[place : place + n]):
        data = bytes(piece.length) if piece.buffers is None else b"".join(piece.buffers)
        assert len(data) == piece.length
        if piece.offset > len(out):
            out.extend(bytes(piece.offset - len(out)))
        out[piece.offset : piece.offset + piece.length] = data
    del out[g.size :]
    out.extend(bytes(g.size - len(out)))
    return out


class Machine(RuleBasedStateMachine):
    """`model` is what an application sees; `history` every state that it has had; `store` what is committed."""

    @initialize(content=st.binary(max_size=SPACE))
    def start(self, content: bytes) -> None:
        self.store = bytearray(content)
        self.model = bytearray(content)
        self.log = bytearray()
        self.live: set[int] = set()
        self.cache = FileCache(1, len(content), 0, seal_bytes=24)
        self.now = 0.0
        self.sequence = 0
        self.history: list[bytes] = [bytes(content)]
        self.at_generation: dict[int, int] = {0: 0}
        self.committed = 0

    def _changed(self, dropped: list[tuple[int, int]]) -> None:
        for place, n in dropped:
            gone = set(range(place, place + n))
            assert gone <= self.live
            self.live -= gone
        self.now += 1
        self.history.append(bytes(self.model))
        self.at_generation[self.cache.generations[-1].number] = len(self.history) - 1

    @rule(start=st.integers(0, SPACE), data=st.binary(min_size=1, max_size=16))
    def write(self, start: int, data: bytes) -> None:
        place = len(self.log)
        self.log += data
        self.live |= set(range(place, place + len(data)))
        self.sequence += 1
        if start > len(self.model):
            self.model.extend(bytes(start - len(self.model)))
        self.model[start : start + len(data)] = data
        self._changed(self.cache.write(start, start + len(data), place, self.now, self.sequence))

    @rule(size=st.integers(0, SPACE))
    def truncate(self, size: int) -> None:
        self.sequence += 1
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self._changed(self.cache.truncate(size, self.now, self.sequence, 0))

    @rule(start=st.integers(0, SPACE), length=st.integers(1, 16), grow=st.booleans())
    def punch(self, start: int, length: int, grow: bool) -> None:
        self.sequence += 1
        end = start + length
        if grow:
            self.model.extend(bytes(max(0, end - len(self.model))))
        stop = min(end, len(self.model))
        if start < stop:
            self.model[start:stop] = bytes(stop - start)
        self._changed(self.cache.zero(start, end, grow, self.now, self.sequence, 0))

    @rule()
    def seal(self) -> None:
        self.cache.seal()

    @precondition(lambda self: not self.cache.in_flight)
    @rule()
    def round_begins(self) -> None:
        g = self.cache.begin()
        assert (g is None) == (not self.cache.generations or not self.cache.generations[0].sealed)

    @precondition(lambda self: self.cache.in_flight)
    @rule()
    def round_ends_well(self) -> None:
        g = self.cache.generations[0]
        self.store = apply_round(self.store, g, self.log)
        assert self.cache.end(True) is g
        for place, n in g.extents.places():
            self.live -= set(range(place, place + n))
        self.committed = g.number
        assert bytes(self.store) == self.history[self.at_generation[g.number]], "the store is not a prefix"

    @precondition(lambda self: self.cache.in_flight)
    @rule(applied=st.booleans())
    def round_ends_ill(self, applied: bool) -> None:
        """It failed; the store may have taken it all the same, and will be given it again."""
        if applied:
            self.store = apply_round(self.store, self.cache.generations[0], self.log)
        self.cache.end(False)

    @invariant()
    def reads_are_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.size == len(self.model)
        out = bytearray()
        for start, end, place in self.cache.resolve(0, SPACE * 2):
            assert start == len(out)
            if place == STORE:
                part = self.store[start:end]
                out += part + bytes(end - start - len(part))
            else:
                out += bytes(end - start) if place == HOLE else self.log[place : place + end - start]
        assert out == self.model

    @invariant()
    def log_bytes_are_counted(self) -> None:
        if hasattr(self, "cache"):
            assert self.cache.dirty_bytes == len(self.live)


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestFileCache = Machine.TestCase


def test_pieces_join_neighbours_and_respect_the_piece_size() -> None:
    cache = FileCache(1, 0, 0, 1 << 20)
    log = bytearray(range(200))
    for i in range(10):
        cache.write(i * 10, i * 10 + 10, 190 - i * 10, 0.0, i)
    g = cache.generations[0]
    pieces = plan(g.extents, 40, lambda place, n: memoryview(log)[place : place + n])
    assert [(p.offset, p.length) for p in pieces] == [(0, 40), (40, 40), (80, 20)]
    pieces = plan(g.extents, 40, lambda place, n: memoryview(log)[place : place + n], first=15)
    assert [(p.offset, p.length) for p in pieces] == [(0, 15), (15, 30), (45, 40), (85, 15)]


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 20), st.integers(1, 6)),
        st.tuples(st.just("truncate"), st.integers(0, 24), st.just(0)),
        st.tuples(st.just("zero"), st.integers(0, 20), st.integers(1, 6)),
    ),
    max_size=30,
)


@given(start=st.integers(0, 20), changes=CHANGES)
def test_records_that_are_superseded_are_not_missed(start: int, changes: list[tuple[str, int, int]]) -> None:
    """Replaying the records that still count gives the file that all of them gave."""
    cache = FileCache(1, start, 0, 1 << 20)
    records: dict[int, tuple[str, int, int]] = {}
    whole = bytearray(b"." * start)
    for n, change in enumerate(changes, 1):
        kind, at, length = change
        if kind == "write":
            cache.write(at, at + length, n * 100, 0.0, n)
        elif kind == "truncate":
            for token in cache.superseded_by_truncate(at):
                del records[token]
            cache.truncate(at, 0.0, n, n)
        else:
            cache.zero(at, at + length, False, 0.0, n, n)
        records[n] = change
        replay(whole, n, change)
    after = bytearray(b"." * start)
    for n, change in records.items():
        replay(after, n, change)
    assert after == whole
    assert cache.size == len(whole)
    cuts = [at for kind, at, _ in records.values() if kind == "truncate"]
    assert len(cuts) <= 2 + sum(kind == "write" for kind, _, _ in changes)  # never one for each call


def replay(file: bytearray, n: int, change: tuple[str, int, int]) -> None:
    kind, at, length = change
    if kind == "truncate":
        del file[at:]
        file.extend(bytes(at - len(file)))
    elif kind == "write":
        file.extend(bytes(max(0, at + length - len(file))))
        file[at : at + length] = bytes([n + 64]) * length
    else:
        end = min(at + length, len(file))
        file[at:end] = bytes(max(0, end - at))


def test_times_are_one_record_and_keep_both() -> None:
    cache = FileCache(1, 0, 0, 1 << 20)
    cache.set_times(5, None, 0.0, 1, 11)
    assert cache.noted_times() == (5, None)
    assert cache.superseded_by_times() == [11]
    cache.set_times(5, 7, 0.0, 2, 12)
    assert cache.generations[0].tokens == [12]
    cache.seal()
    assert cache.noted_times() == (None, None)
    assert cache.superseded_by_times() == []
