"""Staging: the bytes of rounds are cut, packed and uploaded before the transaction that points at them.

The row of a pack is there, pending, before its object is: whatever happens, gc knows of it.

Lock: `_lock` guards the stock of numbers; the transaction that fills it runs under it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sqlalchemy import Connection, insert

from wbfuse.store.contract import Progress, Round
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.frames import FrameCache
from wbfuse.store.volume.layout import Extent, pack_key
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.packer import Compress, Pack, pack_rounds
from wbfuse.store.volume.schema import PENDING, packs
from wbfuse.store.volume.sessions import Session

_RESERVE = 16
_ADD_PACKS = insert(packs)


@dataclass(slots=True)
class Staged:
    """What `Round.staged` is here: where the bytes of a round are."""

    extents: list[Extent] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of the packs in which they are."""


class Staging:
    """Packs rounds and uploads the packs with `workers`. `abandon` is told of packs that no commit will name."""

    def __init__(
        self, database: Database, session: Session, objects: Objects, frames: FrameCache, pack_size: int,
        compress: Compress | None, workers: ThreadPoolExecutor, abandon: Callable[[list[int]], None],
    ) -> None:  # fmt: skip
        self._database = database
        self._session = session
        self._objects = objects
        self._frames = frames
        self._pack_size = pack_size
        self._compress = compress
        self._workers = workers
        self._abandon = abandon
        self._stock: list[int] = []
        self._lock = threading.Lock()

    def forget_stock(self) -> None:
        """Numbers that were taken ahead are not ours any more."""
        with self._lock:
            self._stock.clear()

    def _new_pack(self) -> int:
        """The number of a pack whose row is there, pending, so that gc knows of it whatever happens."""
        with self._lock:
            if not self._stock:
                first = self._session.ids(_RESERVE)
                rows = [
                    {"pack": first + i, "state": PENDING, "session": self._session.number, "size": 0, "live": 0}
                    for i in range(_RESERVE)
                ]

                def act(c: Connection) -> None:
                    self._session.guard(c)
                    c.execute(_ADD_PACKS, rows)

                self._database.transact(act)
                self._stock = [first + i for i in range(_RESERVE)]
            return self._stock.pop()

    def _upload(self, pack: Pack, progress: Progress) -> int:
        """Put a pack under a new number. A number whose key turned out to be taken is given up."""
        for _ in range(3):
            number = self._new_pack()
            try:
                self._objects.put(pack_key(number), pack.buffers)
                progress(sum(e.length for _, e in pack.extents))
            except FileExistsError:
                self._abandon([number])  # an answer was lost on the way, perhaps
                continue
            except BaseException:
                self._abandon([number])
                raise
            for offset, parts in pack.raw:
                self._frames.put(number, offset, b"".join(parts))
            self._frames.put_stored(number, pack.buffers)
            return number
        raise OSError(errno.EAGAIN, "the store says again and again that a new key is taken")

    def stage(self, rounds: Sequence[Round], progress: Progress) -> None:
        staged = [Staged() for _ in rounds]
        waiting: list[tuple[Pack, Callable[[], int]]] = []
        last: Pack | None = None
        for pack in pack_rounds(rounds, self._pack_size, self._compress):
            if last is not None:
                waiting.append((last, self._workers.submit(self._upload, last, progress).result))
            last = pack
        if last is not None:
            waiting.append((last, lambda: self._upload(last, progress)))
        error: Exception | None = None
        made: list[int] = []
        for pack, result in reversed(waiting):  # the last one goes in this thread
            try:
                number = result()
            except Exception as e:  # noqa: BLE001 - raised below, once nobody uses the buffers any more
                error = e
                continue
            made.append(number)
            for i, extent in pack.extents:
                staged[i].extents.append(extent._replace(pack=number))
                staged[i].sizes[number] = pack.size
        if error is not None:
            self._abandon(made)
            raise error
        for round_, s in zip(rounds, staged, strict=True):
            s.extents.sort()
            round_.staged = s
            for piece in round_.pieces:
                piece.buffers = None

    def unstage(self, round_: Round) -> None:
        if isinstance(round_.staged, Staged):
            # A pack that other rounds share stays: once they have committed, gc finds what is dead in it.
            self._abandon(sorted({e.pack for e in round_.staged.extents}))
            round_.staged = None
