"""ExtentMap against a dictionary of bytes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from wbfuse.writeback.extents import HOLE, ExtentMap

SPACE = 64
STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, SPACE - 1), st.integers(1, 16), st.booleans()),
    st.tuples(st.just("truncate"), st.integers(0, SPACE), st.just(0), st.just(False)),
)


def flatten(m: ExtentMap) -> dict[int, int]:
    return {at: p if p == HOLE else p + at - s for s, e, p in m for at in range(s, e)}


@given(st.lists(STEP, max_size=40))
def test_map_holds_what_was_written_last_and_accounts_for_every_byte(steps: list[tuple[str, int, int, bool]]) -> None:
    m, model, tail, live = ExtentMap(), {}, 0, set()
    for kind, start, length, hole in steps:
        if kind == "write":
            end = start + length
            place = HOLE if hole else tail
            tail += 0 if hole else length
            dropped = m.write(start, end, place)
            model |= {at: HOLE if hole else place + at - start for at in range(start, end)}
            live |= set() if hole else set(range(place, place + length))
        else:
            dropped = m.truncate(start)
            model = {at: p for at, p in model.items() if at < start}
        for place, n in dropped:
            gone = set(range(place, place + n))
            assert gone <= live, "dropped twice, or never written"
            live -= gone
        assert flatten(m) == model
        assert live == {p for p in model.values() if p != HOLE}
        assert m.bytes == len(live)
        extents = list(m)
        assert all(s < e for s, e, _ in extents)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(extents))


@given(st.lists(STEP, max_size=30), st.integers(0, SPACE), st.integers(0, SPACE))
def test_overlapping_cuts_to_the_range(steps: list[tuple[str, int, int, bool]], a: int, b: int) -> None:
    m, tail = ExtentMap(), 0
    for kind, start, length, hole in steps:
        if kind == "write":
            m.write(start, start + length, HOLE if hole else tail)
            tail += length
    start, end = min(a, b), max(a, b)
    found = {at: p if p == HOLE else p + at - s for s, e, p in m.overlapping(start, end) for at in range(s, e)}
    assert found == {at: p for at, p in flatten(m).items() if start <= at < end}


def test_a_stream_is_one_extent() -> None:
    m = ExtentMap()
    for i in range(100):
        m.write(i * 10, i * 10 + 10, 1000 + i * 10)
    assert list(m) == [(0, 1000, 1000)]


def test_neighbours_that_do_not_follow_in_the_log_stay_apart() -> None:
    m = ExtentMap()
    m.write(0, 10, 0)
    m.write(10, 20, 500)
    assert len(m) == 2
