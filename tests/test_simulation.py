"""The simulation in small; `make torture` runs it at length."""

from __future__ import annotations

import errno
import os

import pytest

from tests.simulation import LOG, MAX_WRITE, Machine, simulate
from wbfuse.journal import Journal
from wbfuse.store.contract import FencedError
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.engine import Engine
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


@pytest.mark.parametrize(
    "error", [FencedError("by another host"), OSError(errno.EBUSY, "leased"), OSError(errno.ESTALE, "")]
)
def test_what_was_taken_over_while_no_worker_lived_is_set_aside(
    monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """It must not be waited for: the mount would hang for ever."""
    machine = Machine(1)
    machine._change(machine._write(11))
    wanted = machine.past[11].states[-1].data

    def refuse(_ino: int) -> None:
        raise error

    monkeypatch.setattr(machine.store, "acquire", refuse)
    journal = Journal(os.dup(machine.journal.fd))
    cache = WritebackCache(
        machine.store,
        LOG,
        MAX_WRITE,
        0,
        journal=journal,
        log_fd=os.dup(machine.cache.log.fd),  # type: ignore[arg-type]
    )
    engine, kept = Engine(cache, 5.0, committers=0), []
    engine.keep = lambda ino, size, rounds: kept.append((ino, size, sum(p.length for r in rounds for p in r)))
    ((ino, records),) = cache.inherited().items()
    engine.take_over(ino, records)
    ((found, size, length),) = kept
    assert (found, size) == (11, len(wanted))
    assert 0 < length <= len(wanted)
    assert not cache.files
    cache.log.close()
    machine.close()
