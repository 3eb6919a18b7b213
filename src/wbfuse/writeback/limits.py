"""How fast writers may go: the essence of balance_dirty_pages (mm/page-writeback.c). Pure; time is passed in.

    occupied:  0 ....... freerun ....... setpoint ....... limit
                  no delay   |  delayed by rate = bandwidth x position  |  wait

freerun = (background + limit) / 2, setpoint = (freerun + limit) / 2, and
position = clamp(1 + ((setpoint - occupied) / (limit - setpoint))^3, 0, 2).
"""

from __future__ import annotations

from dataclasses import dataclass

_PERIOD = 0.2
_AVERAGE = 3.0
_IDLE = 1.0
_FIRST = 20e6
_ENOUGH = 2 << 20
_FLOOR = 64 << 10
MAX_PAUSE = 0.2
"""Seconds that one reply is held at most while the store advances."""


@dataclass(slots=True)
class Bandwidth:
    """The store's write bandwidth in bytes a second, averaged over about 3 s of work; idle time does not count.

    Work under way is not seen before it is done, so a first measurement waits for enough of it.
    """

    value: float = _FIRST
    measured: bool = False
    _worked: float = 0.0
    """Seconds of work that `value` stands for, up to _AVERAGE."""
    _bytes: int = 0
    _since: float = 0.0
    _last: float = 0.0

    @property
    def unknown(self) -> bool:
        """Too little was seen to say anything of the store."""
        return not self.measured and self._bytes < _ENOUGH

    def start(self, now: float) -> None:
        """The store gets work."""
        if now - self._last > _IDLE:
            self._bytes, self._since = 0, now
        self._last = now

    def progress(self, now: float, done: int) -> None:
        """The store has taken `done` bytes."""
        self._bytes += done
        self._last = now
        span = now - self._since
        if span < (_PERIOD if self.measured else _PERIOD / 4):
            return
        if self.unknown and span < _IDLE:
            return
        rate = self._bytes / span
        self._worked = min(_AVERAGE, self._worked + span)
        self.value += (max(rate, _FLOOR) - self.value) * min(1.0, span / self._worked)
        self.measured = True
        self._bytes, self._since = 0, now


class Limits:
    """When the reply to a WRITE may leave. All amounts in bytes, all times in seconds."""

    def __init__(self, background: int, limit: int) -> None:
        if not 0 < background < limit:
            raise ValueError(f"background {background} must lie between 0 and limit {limit}")
        self.background = background
        self.limit = limit
        self.freerun = (background + limit) // 2
        self.setpoint = (self.freerun + limit) // 2
        self.bandwidth = Bandwidth()
        self._last, self._owed = 0.0, 0

    def position(self, occupied: int) -> float:
        """How much of the store's bandwidth writers may use now: 1 at the setpoint, 0 at the limit, at most 2."""
        x = (self.setpoint - occupied) / (self.limit - self.setpoint)
        return min(2.0, max(0.0, 1 + x * x * x))

    def ready_at(self, now: float, occupied: int) -> float | None:
        """When the next reply may leave; a time not after `now` means at once, None: not before `occupied` falls.

        The last reply paid for with its size at the rate that holds now, but never with more than MAX_PAUSE.
        """
        if occupied < self.freerun:
            return now
        if occupied >= self.limit:
            return None
        rate = max(self.bandwidth.value * self.position(occupied), _FLOOR)
        return self._last + min(self._owed / rate, MAX_PAUSE)

    def sent(self, now: float, size: int) -> None:
        """A reply for `size` bytes leaves at `now`."""
        self._last, self._owed = now, size
