"""Throttling as a simulation with a clock of its own: a fast writer and a slow store come to the store's pace."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wbfuse.writeback.limits import MAX_PAUSE, Bandwidth, Limits

MIB = 1 << 20


def simulate(
    rate: float, seconds: float, size: int = MIB, limit: int = 48 * MIB
) -> tuple[Limits, list[tuple[float, int]]]:
    """One writer that writes as soon as it may, one store of `rate` bytes a second in pieces of a tenth of a second.

    Answers the limits and (time, occupied) at each write.
    """
    limits = Limits(limit // 4, limit)
    now, occupied, credit, writes = 0.0, 0, 0.0, []
    limits.bandwidth.start(now)
    tick = 0.001
    while now < seconds:
        credit += rate * tick if occupied else 0
        piece = max(int(rate / 20), 1)
        if credit >= piece and occupied >= piece:
            credit -= piece
            occupied -= piece
            limits.bandwidth.progress(now, piece)
        at = limits.ready_at(now, occupied)
        if at is not None and at <= now:
            limits.sent(now, size)
            occupied += size
            writes.append((now, occupied))
        now += tick
    return limits, writes


@pytest.mark.parametrize("rate", [5e6, 20e6, 200e6])
def test_inflow_comes_to_the_bandwidth_of_the_store(rate: float) -> None:
    _, writes = simulate(rate, 20)
    late = [t for t, _ in writes if t > 10]
    assert len(late) * MIB / 10 == pytest.approx(rate, rel=0.25)


@pytest.mark.parametrize("rate", [20e6, 100e6])
def test_a_writer_is_never_held_longer_than_the_largest_pause_while_the_store_advances(rate: float) -> None:
    _, writes = simulate(rate, 20)
    late = [t for t, _ in writes if t > 5]
    assert max(b - a for a, b in itertools.pairwise(late)) <= MAX_PAUSE + 0.01


def test_occupied_stays_under_the_limit_and_about_the_setpoint() -> None:
    limits, writes = simulate(20e6, 30)
    late = [o for t, o in writes if t > 15]
    assert max(late) <= limits.limit + MIB
    assert limits.freerun < sum(late) / len(late) < limits.limit


def test_nothing_is_held_below_freerun_and_everything_at_the_limit() -> None:
    limits = Limits(MIB, 8 * MIB)
    limits.sent(100.0, 64 * MIB)
    assert limits.ready_at(100.0, limits.freerun - 1) == 100.0
    assert limits.ready_at(100.0, limits.limit) is None


@given(st.integers(0, 1 << 34))
def test_position_falls_as_the_log_fills(occupied: int) -> None:
    limits = Limits(1 << 20, 1 << 30)
    assert 0.0 <= limits.position(occupied) <= 2.0
    assert limits.position(occupied) >= limits.position(occupied + (1 << 20))
    assert limits.position(limits.setpoint) == 1.0


def test_bandwidth_forgets_idle_time() -> None:
    b = Bandwidth()
    b.start(10.0)
    for i in range(1, 51):
        b.progress(10 + i * 0.1, MIB)
    assert b.value == pytest.approx(10 * MIB, rel=0.15)
    b.start(1000.0)
    b.progress(1000.25, int(2.5 * MIB))
    assert b.value == pytest.approx(10 * MIB, rel=0.15)


def test_a_first_measurement_waits_until_work_under_way_hardly_counts() -> None:
    b = Bandwidth()
    b.start(0.0)
    b.progress(0.1, MIB // 10)  # of three flows only one has told yet
    assert not b.measured
    b.progress(0.2, 4 * MIB)
    assert b.measured
    assert b.value == pytest.approx(20 * MIB, rel=0.05)


def test_an_early_error_is_forgotten_with_the_first_second() -> None:
    b = Bandwidth()
    b.start(0.0)
    b.progress(0.3, 2 * MIB)  # 7 MiB/s
    for i in range(1, 11):
        b.progress(0.3 + i * 0.2, 4 * MIB)
    assert b.value == pytest.approx(20 * MIB, rel=0.15)


def test_limits_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="background"):
        Limits(10, 10)
