"""FileCache: the dirty state of one file as a chain of generations. Pure: no locks, no I/O, no clock.

    open --seal--> sealed --begin--> in flight --end(ok)--> gone
                     ^                   |
                     +----end(failed)----+

The open generation absorbs changes; sealed ones never change again; only the oldest may be in flight. So what
reaches the store is at every moment a prefix of the order in which changes were accepted. A read sees the newest
generation that says anything of a byte, then the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from wbfuse.store.contract import Piece, Round
from wbfuse.writeback.extents import HOLE, Dropped, ExtentMap

STORE = -2
"""A place: these bytes are in the store."""

MAX_EXTENTS = 8192


@dataclass(slots=True)
class Generation:
    """One set of changes that is committed as a whole."""

    number: int
    born: float
    """When its first change was accepted (seconds of the caller's clock)."""
    size: int
    """The file's size after it."""
    extents: ExtentMap = field(default_factory=ExtentMap)
    lowest: int | None = None
    """The lowest size the file was truncated to; older bytes from there on are gone."""
    atime_ns: int | None = None
    mtime_ns: int | None = None
    tokens: list[int] = field(default_factory=list)
    """Log records without payload that belong to it."""
    times: tuple[int | None, int | None, int] | None = None
    """(atime, mtime, token) of the last record of times."""
    cuts: list[tuple[int, int, bool]] = field(default_factory=list)
    """(size, token, whether it moved the size only and cut nothing) of its truncations that still count, in order."""
    sealed: bool = False
    sequence: int = 0
    """Of the last record in it."""
    round: Round | None = None
    """Its bytes are staged in the store; only the commit is left."""
    staging: bool = False
    """Its bytes are on their way there."""
    pinned: list[Any] = field(default_factory=list)
    """What keeps its bytes in the log until then."""
    weighed: bool = False
    """Its commit was counted as a heavy one."""


class FileCache:
    """What is known of one file beyond the store. Sizes and offsets in bytes, times in ns where they say so."""

    __slots__ = (
        "_numbers",
        "atime_ns",
        "generations",
        "in_flight",
        "ino",
        "mtime_ns",
        "seal_bytes",
        "seal_early",
        "size",
    )

    def __init__(self, ino: int, size: int, mtime_ns: int, seal_bytes: int, seal_early: bool = False) -> None:
        self.ino = ino
        self.size = size
        self.mtime_ns = mtime_ns
        self.atime_ns: int | None = None
        """Where it was set and is not committed yet."""
        self.seal_bytes = seal_bytes
        self.seal_early = seal_early
        """The store takes the bytes of a generation while the one before it is being committed."""
        self.generations: list[Generation] = []
        """Oldest first; the last may be open."""
        self.in_flight = False
        self._numbers = 0

    # changes

    def _open(self, now: float) -> Generation:
        if not self.generations or self.generations[-1].sealed:
            self._numbers += 1
            self.generations.append(Generation(self._numbers, now, self.size))
        return self.generations[-1]

    def _full(self, g: Generation) -> None:
        # Where little waits, the first bytes leave early; where much does, generations are large.
        early = self.seal_early and len(self.generations) <= 2
        if (
            g.extents.bytes >= (self.seal_bytes >> 2 if early else self.seal_bytes)
            or len(g.extents) >= MAX_EXTENTS
            or len(g.tokens) >= MAX_EXTENTS
        ):
            g.sealed = True

    def write(
        self, start: int, end: int, place: int, now: float, sequence: int, mtime_ns: int | None = None
    ) -> Dropped:
        """[start, end) stands at `place` of the log. Answers log bytes that nobody needs any more.

        `mtime_ns` is given where the write moves the time itself; the kernel's cache sends it on its own.
        """
        g = self._open(now)
        dropped = g.extents.write(start, end, place)
        if end > self.size:
            self.size = end
        g.size = self.size
        if mtime_ns is not None:
            self.mtime_ns = mtime_ns
        g.mtime_ns = self.mtime_ns
        g.sequence = sequence
        self._full(g)
        return dropped

    def superseded_by_truncate(self, size: int) -> list[int]:
        """Forget records of the open generation that a truncation to `size` makes worthless. Answers their tokens.

        One that moved nothing but the size says nothing that the next does not; one to more than `size` cut nothing
        that the next does not cut. So neither a growing nor a shrinking file fills the log with records.
        """
        g = self.generations[-1] if self.generations else None
        if g is None or g.sealed:
            return []
        gone = [token for cut, token, mere in g.cuts if mere or cut > size]
        g.cuts = [c for c in g.cuts if not c[2] and c[0] <= size]
        for token in gone:
            g.tokens.remove(token)
        return gone

    def noted_times(self) -> tuple[int | None, int | None]:
        """(atime, mtime) of the open generation's record of times, which the next one must repeat."""
        g = self.generations[-1] if self.generations else None
        return (None, None) if g is None or g.sealed or g.times is None else g.times[:2]

    def superseded_by_times(self) -> list[int]:
        """Forget that record: a newer one is there. Answers its token."""
        g = self.generations[-1] if self.generations else None
        if g is None or g.sealed or g.times is None:
            return []
        token = g.times[2]
        g.times = None
        g.tokens.remove(token)
        return [token]

    def truncate(self, size: int, now: float, sequence: int, token: int, mtime_ns: int | None = None) -> Dropped:
        g = self._open(now)
        dropped = []
        mere = size >= self.size or (g.lowest is not None and g.lowest <= size)
        if size < self.size:
            g.lowest = size if g.lowest is None else min(g.lowest, size)
            dropped = g.extents.truncate(size)
        g.cuts.append((size, token, mere and not dropped))
        self.size = g.size = size
        if mtime_ns is not None:
            self.mtime_ns = mtime_ns
        g.mtime_ns = self.mtime_ns
        g.sequence = sequence
        g.tokens.append(token)
        self._full(g)
        return dropped

    def zero(
        self, start: int, end: int, grow: bool, now: float, sequence: int, token: int, mtime_ns: int | None = None
    ) -> Dropped:
        """[start, end) reads as zeros; beyond the size it counts only with `grow`, which moves the size."""
        g = self._open(now)
        g.tokens.append(token)
        g.sequence = sequence
        if grow and end > self.size:
            self.size = end
        g.size = self.size
        if mtime_ns is not None:
            self.mtime_ns = mtime_ns
        g.mtime_ns = self.mtime_ns
        end = min(end, self.size)
        dropped = g.extents.write(start, end, HOLE) if start < end else []
        self._full(g)
        return dropped

    def set_times(self, atime_ns: int | None, mtime_ns: int | None, now: float, sequence: int, token: int) -> None:
        g = self._open(now)
        g.tokens.append(token)
        g.times = atime_ns, mtime_ns, token
        g.sequence = sequence
        g.size = self.size
        if atime_ns is not None:
            g.atime_ns = self.atime_ns = atime_ns
        if mtime_ns is not None:
            g.mtime_ns = self.mtime_ns = mtime_ns
        self._full(g)

    def grown(self, end: int, mtime_ns: int) -> None:
        """The store itself has put bytes up to `end` below all generations (a copy inside it)."""
        self.size = max(self.size, end)
        self.mtime_ns = mtime_ns
        for g in self.generations:
            g.size = max(g.size, end)
            g.mtime_ns = mtime_ns

    # reading

    def resolve(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """[start, end), cut to the size, as (start, end, place) without gaps; place may be HOLE or STORE."""
        end = min(end, self.size)
        out: list[tuple[int, int, int]] = []
        gaps = [(start, end)] if start < end else []
        for g in reversed(self.generations):
            if not gaps:
                break
            gaps = _look(g, gaps, out)
        out.extend((low, high, STORE) for low, high in gaps)
        out.sort()
        return out

    @property
    def dirty_bytes(self) -> int:
        return sum(g.extents.bytes for g in self.generations)

    # rounds

    def seal(self) -> int:
        """Close the open generation, if any. Answers the number of the newest generation (0: there is none)."""
        if not self.generations:
            return 0
        self.generations[-1].sealed = True
        return self.generations[-1].number

    def begin(self) -> Generation | None:
        """Put the oldest sealed generation in flight; None where one is already, or none is sealed and at hand."""
        if self.in_flight or not self.generations or not self.generations[0].sealed or self.generations[0].staging:
            return None
        self.in_flight = True
        return self.generations[0]

    def ahead(self) -> Generation | None:
        """The oldest sealed generation behind the one in flight whose bytes nobody carries yet."""
        for g in self.generations[self.in_flight :]:
            if not g.sealed:
                return None
            if g.round is None and not g.staging:
                return g
        return None

    def end(self, ok: bool) -> Generation | None:
        """The round in flight has ended. On success answers its generation, whose log bytes are free now."""
        self.in_flight = False
        if not ok:
            return None
        g = self.generations.pop(0)
        if g.atime_ns == self.atime_ns:
            self.atime_ns = None
        return g

    def discard(self) -> list[Generation]:
        """Nobody can see the file any more: forget all but what is in flight. Answers what was forgotten."""
        keep = 1 if self.in_flight else 0
        gone = self.generations[keep:]
        del self.generations[keep:]
        return gone


def _look(g: Generation, gaps: list[tuple[int, int]], out: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Fill `gaps` from one generation; answers what is still open to older ones."""
    rest: list[tuple[int, int]] = []
    for start, end in gaps:
        at = start
        for low, high, place in g.extents.overlapping(start, end):
            if at < low:
                rest.append((at, low))
            out.append((low, high, place))
            at = high
        if at < end:
            rest.append((at, end))
    if g.lowest is None:
        return rest
    older = []
    for start, end in rest:
        cut = min(max(start, g.lowest), end)
        if start < cut:
            older.append((start, cut))
        if cut < end:
            out.append((cut, end, HOLE))
    return older


def contents(g: Generation, size: int, view: Callable[[int, int], memoryview]) -> list[Piece]:
    """All that a generation says of a file that has `size` in the end: zeros from where it was cut, and its extents."""
    pieces = plan(g.extents, 1 << 30, view)
    if g.lowest is not None and g.lowest < size:
        pieces.insert(0, Piece(g.lowest, size - g.lowest, None))
    return pieces


def plan(
    extents: ExtentMap, piece: int, view: Callable[[int, int], memoryview], first: int | None = None
) -> list[Piece]:
    """The extents of a generation as pieces of about `piece` bytes: neighbours leave together.

    With `first` they begin at that size and double, as long as nobody knows how long a piece will take.
    """
    pieces: list[Piece] = []
    last: Piece | None = None
    following, size = first or piece, piece
    for start, end, place in extents:
        if place == HOLE:
            pieces.append(Piece(start, end - start, None))
            last = None
            continue
        at = start
        while at < end:
            if last is None or last.offset + last.length != at or last.length >= size or last.buffers is None:
                last = Piece(at, 0, [])
                pieces.append(last)
                size, following = following, min(piece, 2 * following)
            n = min(end - at, size - last.length)
            last.buffers.append(view(place + at - start, n))  # type: ignore[union-attr]
            last.length += n
            at += n
    return pieces
