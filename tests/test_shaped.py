"""The slow link that tests and demonstrations use: its rate, and that it is shared by bytes and not by calls."""

from __future__ import annotations

import threading

import pytest

from wbfuse.store import shaped
from wbfuse.store.shaped import Bucket, Flow


class Clock:
    """`time` as the link sees it: a sleep moves it. One thread at a time, in the order in which they are to wake."""

    def __init__(self) -> None:
        self.now = 100.0
        self._turn = threading.Condition()
        self._asleep: dict[int, float] = {}
        self._running = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        me = threading.get_ident()
        with self._turn:
            self._asleep[me] = self.now + seconds
            self._running -= 1
            self._wake()
            self._turn.wait_for(lambda: me not in self._asleep)

    def _wake(self) -> None:
        if self._running == 0 and self._asleep:
            first = min(self._asleep, key=lambda key: self._asleep[key])
            self.now = max(self.now, self._asleep.pop(first))
            self._running += 1
            self._turn.notify_all()

    def run(self, *jobs: object) -> list[float]:
        """When each job ended."""
        ended = [0.0] * len(jobs)

        def go(i: int) -> None:
            jobs[i]()  # type: ignore[operator]
            ended[i] = self.now
            with self._turn:
                self._running -= 1
                self._wake()

        self._running = len(jobs)
        threads = [threading.Thread(target=go, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [end - 100.0 for end in ended]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(shaped, "time", made)
    return made


def test_a_link_carries_its_rate(clock: Clock) -> None:
    link = Bucket(20e6)
    assert clock.run(lambda: link.wait(20_000_000)) == [pytest.approx(1.0, rel=0.01)]


def test_a_small_transfer_does_not_wait_for_a_large_one(clock: Clock) -> None:
    link = Bucket(20e6)
    large, small = clock.run(lambda: link.wait(20_000_000), lambda: link.wait(4096))
    assert small < 0.02
    assert large == pytest.approx(1.0, rel=0.02)


def test_many_small_pieces_get_the_share_of_few_large_ones(clock: Clock) -> None:
    link = Bucket(20e6)

    def pieces(count: int, size: int) -> None:
        flow = Flow(link)
        for _ in range(count):
            flow.put(size)
        flow.settle()

    few, many = clock.run(lambda: pieces(2, 5_000_000), lambda: pieces(2441, 4096))
    assert few == pytest.approx(1.0, rel=0.05)
    assert many == pytest.approx(1.0, rel=0.05)
