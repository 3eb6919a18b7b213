"""Compaction: the map of a quiet file is brought back to few rows on few layers, mostly dead packs are emptied.

A window of a file whose map has many rows is read and written again as one extent, in a transaction that sees that
nobody has changed the window meanwhile; else it is left for another time. Only the file's own layer is rewritten: what
lies below is shared, and rewriting it would take its space twice.

Thread: one, of the mount; between windows it sleeps so that it stays within its bandwidth.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, func, select

from wbfuse.store.contract import Piece, Round
from wbfuse.store.volume.layout import HOLE, Extent, without_gaps
from wbfuse.store.volume.maps import WINDOW
from wbfuse.store.volume.rows import layer_row, rows_in
from wbfuse.store.volume.schema import LIVE, extents, inodes, layers, packs

log = logging.getLogger(__name__)

_QUIET = 10.0
_SPARSE = 4
"""A pack is emptied where less than one part in so many of it is live."""
_DEEP = 8
"""A file that stands on more layers gets the rows that it shows of them."""
_TIDY_SECONDS, _THIN_AT_ONCE = 60.0, 64
"""How often packs that are mostly dead are looked for, and in how many files at a time."""


def crowded(c: Connection, layer: int, most: int) -> list[int]:
    """Numbers of the windows of a layer that have more rows than `most`."""
    n = (extents.c.start // WINDOW).label("n")
    rows = select(n).where(extents.c.layer == layer, extents.c.pack != HOLE).group_by(n).having(func.count() > most)
    return [int(r) for r in c.execute(rows.order_by(n)).scalars()]


_THIN = select(packs.c.pack).where(packs.c.state == LIVE, packs.c.live > 0, packs.c.live * _SPARSE < packs.c.size)


def thin_windows(c: Connection, layer: int) -> list[int]:
    """Numbers of the windows of a layer that have bytes in packs that are mostly dead."""
    n = extents.c.start // WINDOW
    return [
        int(r)
        for r in c.execute(select(n).where(extents.c.layer == layer, extents.c.pack.in_(_THIN)).distinct()).scalars()
    ]


def thin_inodes(c: Connection, limit: int) -> list[int]:
    """Files that have bytes of their own in packs that are mostly dead."""
    found = select(inodes.c.ino).join(extents, extents.c.layer == inodes.c.layer).where(extents.c.pack.in_(_THIN))
    return list(c.execute(found.distinct().limit(limit)).scalars())


def deep_inodes(c: Connection, limit: int) -> list[int]:
    """Files that stand on many layers, the deepest first: each read of one asks all of them."""
    found = select(inodes.c.ino).join(layers, layers.c.layer == inodes.c.layer).where(layers.c.depth > _DEEP)
    return list(c.execute(found.order_by(layers.c.depth.desc()).limit(limit)).scalars())


class Compactor:
    """Rewrites windows of files that were written here, once they are quiet. `rate`: bytes a second, 0 for never."""

    def __init__(
        self, store: Any, rate: float, quiet: float = _QUIET, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._rate = rate
        self._quiet = quiet
        self._clock = clock
        self._lock = threading.Lock()
        """Guards `_written`, for an instant."""
        self._written: dict[int, float] = {}
        self._ended = threading.Event()
        self.bytes = 0
        self._thread = threading.Thread(target=self._run, name="compactor", daemon=True)
        if rate > 0:
            self._thread.start()

    def wrote(self, ino: int) -> None:
        with self._lock:
            self._written[ino] = self._clock()

    def close(self) -> None:
        self._ended.set()
        if self._rate > 0:
            self._thread.join()

    def _due(self) -> list[int]:
        with self._lock:
            until = self._clock() - self._quiet
            found = [ino for ino, at in self._written.items() if at <= until]
            for ino in found:
                del self._written[ino]
        return found

    def _run(self) -> None:
        tidy_at = self._clock() + _TIDY_SECONDS
        while not self._ended.wait(min(1.0, self._quiet / 4)):
            due = self._due()
            if self._clock() >= tidy_at:
                tidy_at = self._clock() + _TIDY_SECONDS
                due += self._untidy()
            for ino in due:
                try:
                    self.compact(ino)
                except OSError as e:
                    if e.errno not in (errno.ESTALE, errno.ENOENT):
                        log.warning("compaction of node %d: %s", ino, e)
                except Exception:
                    log.exception("compaction of node %d", ino)

    def _untidy(self) -> list[int]:
        """Files with bytes in packs that are mostly dead, or on many layers."""
        query = self._store.database.query
        try:
            found: list[int] = query(lambda c: thin_inodes(c, _THIN_AT_ONCE) + deep_inodes(c, _THIN_AT_ONCE))
            return found
        except OSError as e:
            log.warning("compaction: %s", e)
            return []

    def compact(self, ino: int) -> int:
        """Bring a file's map to few rows. Answers how many windows were rewritten."""
        try:
            with self._store.writing(ino):
                return self._compact(ino)
        except OSError as e:
            if e.errno == errno.EBUSY:
                return 0  # another host writes it, and will see to it
            raise

    def _compact(self, ino: int) -> int:
        database = self._store.database
        layer = database.query(
            lambda c: c.execute(select(inodes.c.layer).where(inodes.c.ino == ino)).scalar_one_or_none()
        )
        if not layer:
            return 0
        if database.query(lambda c: layer_row(c, layer)).depth > _DEEP:
            self._store.flatten(ino, layer, self._ended.is_set)
        most = max(1, WINDOW // self._store.pack_size)
        done = 0
        thin = set(database.query(lambda c: thin_windows(c, layer)))
        for number in sorted({*thin, *database.query(lambda c: crowded(c, layer, most))}):
            if self._ended.is_set():
                break
            began = self._clock()
            size = self._rewrite(ino, layer, number, number in thin)
            done += size > 0
            self.bytes += size
            if self._rate > 0:
                self._ended.wait(max(0.0, size / self._rate - (self._clock() - began)))
        return done

    def _rewrite(self, ino: int, layer: int, number: int, thin: bool) -> int:
        """One window. Answers the bytes written, 0 where it was left alone."""
        store = self._store
        start, end = number * WINDOW, (number + 1) * WINDOW
        before: list[Extent] = store.database.query(lambda c: rows_in(c, layer, start, end))
        pieces: list[Piece] = []
        for a, b, extent in without_gaps(before, start, end):
            if extent is None or extent.pack == HOLE:
                continue
            if pieces and pieces[-1].offset + pieces[-1].length == a:
                pieces[-1].length += b - a
            else:
                pieces.append(Piece(a, b - a, []))
        if not pieces or (len(pieces) >= len(before) and not thin):
            return 0  # holes between them: nothing would be gained
        for piece in pieces:
            buffer = memoryview(bytearray(piece.length))
            store.read_rows(before, piece.offset, buffer)
            piece.buffers = [buffer]
        total = sum(p.length for p in pieces)
        round_ = Round(ino, None, pieces, None)
        store.stage([round_], lambda _n: None)
        replaced = False
        try:
            replaced = store.replace_rows(round_, layer, start, end, before)
        finally:
            if not replaced:
                store.unstage(round_)  # takes only what is not live
        return total if replaced else 0
