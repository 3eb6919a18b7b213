"""The simulation in small; `make torture` runs it at length."""

from __future__ import annotations

import os

import pytest

from tests.simulation import simulate
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.log import Log

SEEDS = int(os.environ.get("WBFUSE_SEEDS", "300"))


def run(seeds: int) -> int:
    """Answers how many workers died."""
    return sum(simulate(seed)[1] for seed in range(seeds))


def test_workers_that_die_at_any_step_lose_nothing() -> None:
    assert run(SEEDS) > 3 * SEEDS


def test_the_simulation_finds_a_floor_that_is_not_stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a file that is not marked dirty are taken for committed."""
    monkeypatch.setattr(WritebackCache, "_mark", lambda self, f: setattr(f, "marked", True))
    with pytest.raises(AssertionError, match="seed"):
        run(50)


def test_the_simulation_finds_a_record_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload that the cleaner moves must keep its turn."""
    real = Log.stamp_moved

    def late(self: Log, sequence: int, ino: int, offset: int, length: int, place: int, mtime_ns: int) -> None:
        self.sequence += 1
        real(self, self.sequence, ino, offset, length, place, mtime_ns)

    monkeypatch.setattr(Log, "stamp_moved", late)
    with pytest.raises(AssertionError, match="seed"):
        run(3000)
