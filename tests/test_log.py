"""The log in memory: whatever is live when its server dies is found by the next, in the place where it stood."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from wbfuse.writeback.log import Log, LogFull
from wbfuse.writeback.records import SIZE, Kind, Record

MAX_WRITE = 8192


class LogMachine(RuleBasedStateMachine):
    """A log of a few segments that is often full, of both payloads and notes."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log(5 * 4 * MAX_WRITE, MAX_WRITE)
        self.fd = os.dup(self.log.fd)
        self.live: dict[int, tuple[int, Record, bytes]] = {}
        """By sequence: the segment in which the record stands, what it says, and its payload."""

    def _payload(self, place: int, data: bytes) -> None:
        sequence = self.log.stamp(1, 2, 3, len(data), place, 4)
        record = Record(sequence, 1, 2, 3, len(data), place, Kind.WRITE, 0, 4)
        self.live[sequence] = place // self.log.segment_size, record, data

    @rule(size=st.sampled_from([1, 100, 4096, MAX_WRITE]))
    def receive(self, size: int) -> None:
        try:
            self.log.advance()
        except LogFull:
            return
        data = os.urandom(size)
        self.log.tail[:size] = data
        self._payload(self.log.take(size), data)

    @rule(size=st.sampled_from([1, 4096]))
    def copy(self, size: int) -> None:
        data = os.urandom(size)
        try:
            place = self.log.put(memoryview(data))
        except LogFull:
            return
        self._payload(place, data)

    @rule(count=st.integers(1, 16))
    def note(self, count: int) -> None:
        for _ in range(count):
            try:
                segment = self.log.note(Kind.TRUNCATE, 5, 6, 7, 8)
            except LogFull:
                return
            sequence = self.log.sequence
            self.live[sequence] = segment, Record(sequence, 5, 6, 7, 8, 0, Kind.TRUNCATE, 0, 0), b""

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if not self.live:
            return
        segment, record, payload = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        if payload:
            self.log.release([(record.place, record.length)])
        else:
            self.log.unnote([segment])

    @rule()
    def die(self) -> None:
        self.log.close()
        self.log = Log(5 * 4 * MAX_WRITE, MAX_WRITE, os.dup(self.fd))
        found = self.log.scan()
        self.log.sequence = max((record.sequence for _, record in found), default=0)
        self.log.revive((segment, record) for segment, record in found if record.sequence in self.live)
        self.log.settle()

    @invariant()
    def what_is_live_stands_there(self) -> None:
        found = {record.sequence: (segment, record) for segment, record in self.log.scan()}
        for sequence, (segment, record, payload) in self.live.items():
            assert found.get(sequence) == (segment, record)
            assert self.log.view(record.place, len(payload)) == payload

    @invariant()
    def what_is_counted_is_there(self) -> None:
        counted = {s.index: s.live for s in self.log.segments}
        for segment, record, payload in self.live.values():
            counted[segment] -= record.length if payload else SIZE
        assert not any(counted.values())

    def teardown(self) -> None:
        self.log.close()
        os.close(self.fd)


TestLog = LogMachine.TestCase
TestLog.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
