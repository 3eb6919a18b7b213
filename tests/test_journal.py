"""The journal against a dict: through replacement, removal, restarts, torn tails and the death of its writer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from wbfuse.journal import MAX_VALUE, SLACK, WINDOW, Counter, Journal, Kind, records

KINDS = st.sampled_from([Kind.OPEN, Kind.NODE])
KEYS = st.integers(0, 12)


def again(journal: Journal) -> Journal:
    """What the next process finds."""
    return Journal(os.dup(journal.fd))


def table(journal: Journal) -> dict[tuple[int, int], bytes]:
    return {(kind, key): value for kind in Kind for key, value in journal.inherited(kind).items()}


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal()
        self.model: dict[tuple[int, int], bytes] = {}

    @rule(kind=KINDS, key=KEYS, byte=st.integers(0, 255), size=st.integers(0, MAX_VALUE))
    def put(self, kind: Kind, key: int, byte: int, size: int) -> None:
        self.journal.put(kind, key, bytes([byte]) * size)
        self.model[kind, key] = bytes([byte]) * size

    @rule(kind=KINDS, key=KEYS)
    def remove(self, kind: Kind, key: int) -> None:
        self.journal.remove(kind, key)
        self.model.pop((kind, key), None)

    @rule(kind=KINDS, key=KEYS, times=st.integers(1, 40))
    def churn(self, kind: Kind, key: int, times: int) -> None:
        for n in range(times):
            self.journal.put(kind, key, bytes([n]) * 30_000)
        self.model[kind, key] = bytes([times - 1]) * 30_000

    @rule(garbage=st.binary(max_size=200))
    def die_in_mid_append(self, garbage: bytes) -> None:
        """A killed writer leaves some bytes of a record behind the tail; the next process goes on."""
        room = self.journal._window[self.journal._at :]
        self.journal._window[self.journal._at : self.journal._at + min(len(garbage), len(room))] = garbage[: len(room)]
        self.journal = again(self.journal)

    @invariant()
    def the_next_process_finds_the_table(self) -> None:
        assert table(again(self.journal)) == self.model

    @invariant()
    def it_stays_small(self) -> None:
        assert self.journal.used <= 3 * self.journal.live + SLACK + 2 * WINDOW
        pages = os.fstat(self.journal.fd).st_blocks * 512
        assert pages <= self.journal.used + 2 * WINDOW


TestJournal = Machine.TestCase
TestJournal.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_long_life_costs_no_more_than_the_table() -> None:
    journal = Journal()
    before = descriptors()
    for key in range(2000):
        journal.put(Kind.NODE, key, b"stays %d" % key)
    for n in range(200_000):
        journal.put(Kind.OPEN, n, b"passes")
        journal.remove(Kind.OPEN, n)
    assert os.fstat(journal.fd).st_blocks * 512 <= 3 * journal.live + SLACK + 3 * WINDOW
    assert descriptors() < before + 100  # windows in between keep no descriptor
    found = table(again(journal))
    assert found == {(Kind.NODE, key): b"stays %d" % key for key in range(2000)}


def test_a_value_that_is_too_long_is_refused_and_nothing_changes() -> None:
    journal = Journal()
    with pytest.raises(ValueError, match="too long"):
        journal.put(Kind.NODE, 1, bytes(MAX_VALUE + 1))
    assert table(again(journal)) == {}


@pytest.mark.parametrize("what", ["_grow", "_map"])
def test_where_memory_or_a_descriptor_is_lacking_nothing_changes(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call that may fail fails once; whoever was told so finds the table as before, and nobody else notices."""
    real = getattr(Journal, what)
    calls, failing, refused = 0, 0, 0

    def lacking(journal: Journal, base: int) -> object:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(journal, base)

    while calls >= failing:
        journal, model = Journal(), {}
        calls, failing = 0, failing + 1
        monkeypatch.setattr(Journal, what, lacking)
        for n in range(400):
            key = n % 7 if n % 3 else 100 + n
            try:
                journal.put(Kind.NODE, key, bytes([n % 251]) * 9000)
                model[Kind.NODE, key] = bytes([n % 251]) * 9000
                if n % 5 == 0:
                    journal.remove(Kind.NODE, key)
                    del model[Kind.NODE, key]
            except OSError:
                refused += 1
        monkeypatch.setattr(Journal, what, real)
        assert table(again(journal)) == model
        journal.put(Kind.NODE, 1, b"and it goes on")
        assert table(again(journal)) == model | {(Kind.NODE, 1): b"and it goes on"}
    assert failing > 5
    assert refused > 2


def test_counters_give_no_number_twice_across_restarts() -> None:
    journal, seen = Journal(), set()
    for _ in range(3):
        counter = Counter(journal, Kind.OPEN, 1)
        numbers = {counter.take() for _ in range(1500)}
        assert len(numbers) == 1500
        assert not numbers & seen
        seen |= numbers
        journal = again(journal)


def test_torn_records_end_the_reading() -> None:
    journal = Journal()
    journal.put(Kind.NODE, 1, b"one")
    journal.put(Kind.NODE, 2, b"two")
    whole = bytes(journal._window[: journal._at])
    for cut in range(len(whole)):
        torn = whole[:cut] + bytes(len(whole) - cut)
        values = [value for _, _, _, value in records(torn)]
        assert values == [b"one", b"two"][: len(values)]
        assert len(values) < 2


WRITER = """
import os, sys
from wbfuse.journal import Journal, Kind
journal = Journal(int(sys.argv[1]))
n = 0
while True:
    n += 1
    journal.put(Kind.NODE, n % 50, b"%d" % n * (n % 40))
    os.write(1, n.to_bytes(8, "little"))  # from here on somebody relies on it
"""


def test_what_a_killed_writer_has_acknowledged_is_there() -> None:
    for patience in (1, 500, 5_000, 20_000):
        journal = Journal()
        os.set_inheritable(journal.fd, True)
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(journal.fd)], stdout=subprocess.PIPE, close_fds=False
        )
        try:
            assert child.stdout is not None
            for _ in range(patience):
                acknowledged = child.stdout.read(8)
        finally:
            child.send_signal(signal.SIGKILL)
            rest = child.communicate()[0]
        last = int.from_bytes((acknowledged + rest)[-8:], "little")
        found = again(journal).inherited(Kind.NODE)
        for n in range(max(1, last - 48), last + 1):
            if (last + 1) % 50 == n % 50:
                continue  # the one that was under way
            assert found[n % 50] == b"%d" % n * (n % 40)
