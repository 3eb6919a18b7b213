"""ExtentMap: which bytes of a file stand where in the log. Pure.

Sorted, non-overlapping [start, end) -> place, as three parallel arrays of 64-bit integers: 24 bytes an extent, where
objects would cost 213 and make the garbage collector walk them. A place is a position in the log, or HOLE for zeros.
One map belongs to one generation, which is sealed at 8192 extents, so a flat array is short enough to insert into.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

HOLE = -1

Dropped = list[tuple[int, int]]
"""(place, length) of log bytes that nobody refers to any more."""


class ExtentMap:
    """All offsets in bytes. Neighbours that continue each other in file and log are one extent."""

    __slots__ = ("_ends", "_places", "_starts", "bytes")

    def __init__(self) -> None:
        self._starts = array("q")
        self._ends = array("q")
        self._places = array("q")
        self.bytes = 0
        """Bytes of log that the map refers to (holes not counted)."""

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self._starts, self._ends, self._places, strict=True)

    def write(self, start: int, end: int, place: int) -> Dropped:
        """Put [start, end) at `place`, over whatever was there. Answers what it replaced. `start < end`."""
        starts, ends, places = self._starts, self._ends, self._places
        if place != HOLE:
            self.bytes += end - start
        if not ends or start >= ends[-1]:  # a stream: append, or grow the last extent
            if ends and start == ends[-1] and _follows(places[-1], starts[-1], start, place):
                ends[-1] = end
            else:
                starts.append(start)
                ends.append(end)
                places.append(place)
            return []
        i, j = bisect_right(ends, start), bisect_left(starts, end)
        new = [(start, end, place)]
        dropped: Dropped = []
        for k in range(i, j):
            s, e, p = starts[k], ends[k], places[k]
            if s < start:
                new.insert(0, (s, start, p))
            if e > end:
                new.append((end, e, p if p == HOLE else p + end - s))
            if p != HOLE:
                low, high = max(s, start), min(e, end)
                dropped.append((p + low - s, high - low))
        if (
            i > 0
            and start == ends[i - 1]
            and new[0][0] == start
            and _follows(places[i - 1], starts[i - 1], start, place)
        ):
            i -= 1
            new[0] = (starts[i], new[0][1], places[i])
        if j < len(starts) and new[-1][1] == starts[j] and _follows(new[-1][2], new[-1][0], starts[j], places[j]):
            new[-1] = (new[-1][0], ends[j], new[-1][2])
            j += 1
        self._replace(i, j, new)
        self.bytes -= sum(length for _, length in dropped)
        return dropped

    def truncate(self, size: int) -> Dropped:
        """Forget everything from `size` on. Answers what that was."""
        starts, ends, places = self._starts, self._ends, self._places
        i = bisect_right(ends, size)
        if i == len(starts):
            return []
        dropped: Dropped = []
        new = []
        for k in range(i, len(starts)):
            s, e, p = starts[k], ends[k], places[k]
            if s < size:
                new.append((s, size, p))
            if p != HOLE:
                low = max(s, size)
                dropped.append((p + low - s, e - low))
        self._replace(i, len(starts), new)
        self.bytes -= sum(length for _, length in dropped)
        return dropped

    def overlapping(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The extents in [start, end), cut to it, in order."""
        starts, ends, places = self._starts, self._ends, self._places
        for k in range(bisect_right(ends, start), bisect_left(starts, end)):
            s, e, p = starts[k], ends[k], places[k]
            low, high = max(s, start), min(e, end)
            yield low, high, p if p == HOLE else p + low - s

    def places(self) -> Dropped:
        """Every (place, length) that the map refers to."""
        return [(p, e - s) for s, e, p in self if p != HOLE]

    def move(self, index: int, place: int) -> None:
        """Extent number `index` now stands elsewhere in the log."""
        self._places[index] = place

    def _replace(self, i: int, j: int, new: list[tuple[int, int, int]]) -> None:
        self._starts[i:j] = array("q", [n[0] for n in new])
        self._ends[i:j] = array("q", [n[1] for n in new])
        self._places[i:j] = array("q", [n[2] for n in new])


def _follows(place: int, start: int, at: int, next_place: int) -> bool:
    """Whether an extent at `at` with `next_place` continues one at `start` with `place`."""
    if place == HOLE or next_place == HOLE:
        return place == next_place
    return next_place == place + at - start
