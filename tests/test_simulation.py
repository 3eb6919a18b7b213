"""The simulation in small; `make torture` runs it at length."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from tests.simulated_disk import SimChunk
from tests.simulation import LOG, MAX_WRITE, Machine, SimDisk, simulate
from wbfuse.journal import Journal
from wbfuse.store.contract import FencedError
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.disk import format as stream
from wbfuse.writeback.engine import Engine
from wbfuse.writeback.log import Log

SEEDS = int(os.environ.get("WBFUSE_SEEDS", "300"))


def run(seeds: int) -> tuple[int, int]:
    """Answers how many workers died, and how often the power was cut."""
    found = [simulate(seed) for seed in range(seeds)]
    return sum(f[1] for f in found), sum(f[2] for f in found)


def test_workers_and_machines_that_die_at_any_step_lose_nothing() -> None:
    deaths, cuts = run(SEEDS)
    assert deaths > 3 * SEEDS
    assert cuts > SEEDS


def test_the_simulation_finds_a_log_that_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its note comes back while the manifest is of what the store has left behind."""

    def remembers_first(self: SimDisk) -> None:
        self._remember()
        begin(self)

    begin = SimDisk._begin
    monkeypatch.setattr(SimDisk, "_begin", remembers_first)
    with pytest.raises(AssertionError, match="after a power cut"):
        run(300)


def test_the_simulation_finds_a_store_that_is_ahead_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is older than what the store has would be replayed over it."""
    monkeypatch.setattr(SimDisk, "wait", lambda self, sequence=None: None)
    with pytest.raises(AssertionError, match="after a power cut"):
        run(300)


def test_the_simulation_finds_a_log_that_is_not_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimChunk, "sync", lambda self: None)
    with pytest.raises(AssertionError, match="after a power cut"):
        run(300)


def test_the_simulation_finds_half_a_batch_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def frames(chunk: memoryview, seed: int, *at: int) -> Iterator[stream.Frame]:
        for f in whole(chunk, seed, *at):
            yield f
            if f.kind != stream.Kind.COMMIT:  # it counts at once
                body = memoryview(bytes(16))
                yield stream.Frame(stream.Kind.COMMIT, 0, 0, 0, 0, body, f.begin, f.end)

    whole = stream.frames
    monkeypatch.setattr(stream, "frames", frames)
    with pytest.raises(AssertionError, match="after a power cut"):
        run(1000)


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
