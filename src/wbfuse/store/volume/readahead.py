"""Which reads of a file are streams, and what to fetch ahead of them. Pure.

Several streams of one file are told apart; a read that continues none of them begins a new one and fetches nothing
ahead, so random reads and scans backwards cost only what they read. Requests of one stream may come out of order: the
kernel sends several at once.
"""

from __future__ import annotations

from dataclasses import dataclass

_STREAMS = 8
_SLACK = 4 << 20
"""How far from where it is expected a read may be and still belong to a stream."""
_FIRST = 2 << 20


@dataclass(slots=True)
class Stream:
    begin: int
    next: int
    """The end of the furthest read."""
    read: int = 0
    """Bytes read in it."""
    ahead: int = 0
    """What is fetched, or being fetched, ends here."""


class Streams:
    """Streams of one file. `most`: bytes to be ahead at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._streams: list[Stream] = []

    def read(self, offset: int, length: int) -> tuple[int, int] | None:
        """A read of [offset, offset + length) has come. Answers the range to fetch ahead now, if any."""
        end = offset + length
        for i, s in enumerate(self._streams):
            if max(s.begin, s.next - _SLACK) <= offset <= s.next + _SLACK:
                del self._streams[i]
                break
        else:
            s = Stream(offset, offset)
            s.ahead = end
        self._streams.insert(0, s)
        del self._streams[_STREAMS:]
        s.next = max(s.next, end)
        s.read += length
        if s.read <= length:
            return None  # its first read says nothing
        window = min(self._most, max(_FIRST, 2 * s.read))
        start = max(s.ahead, s.next)
        if start - s.next > window // 2:
            return None
        s.ahead = s.next + window
        return start, s.ahead
