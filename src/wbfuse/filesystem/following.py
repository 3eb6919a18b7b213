"""Following renames: each that waits (writeback/renames.py) is carried out once the data of its source is durable.

Where the kernel may hold some of that data, it is asked for it first. Renames are not waited for: what follows the data
of a file is the Sequel of its state in the cache, and whoever syncs or drains that file waits for it with the data.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial

from wbfuse.wire.types import Attr
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cached_file import File, Sequel
from wbfuse.writeback.renames import DeferredRenames, Move

log = logging.getLogger(__name__)

_LOOK_AGAIN = 1.0


class Follower:
    """`pull` has the kernel hand over what it holds of a file, and is None where it holds nothing.

    `taking` keeps a file this mount's, which raises EBUSY where another host has it; `fresh` gives its attributes.
    `lost` is told of names that went, as Store.rename answers.
    """

    def __init__(
        self, renames: DeferredRenames, cache: WritebackCache, pull: Callable[[int], Future[None]] | None,
        taking: Callable[[int], AbstractContextManager[None]], fresh: Callable[[int], Attr],
        lost: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self._renames = renames
        self._cache = cache
        self._pull = pull
        self._taking = taking
        self._fresh = fresh
        self._lost = lost
        self._following = threading.Lock()
        """Held by who sees to renames that wait; the cache's lock is inside it."""

    def load(self) -> None:
        """Go on with those of a server that died; waits for a store that does not answer."""
        while True:
            try:
                self._renames.load()
                return
            except OSError as e:
                log.warning("renames wait in the journal: %s", e.strerror)
            with self._cache.lock:
                self._cache.room.wait(_LOOK_AGAIN)

    def follow_all(self) -> None:
        """See to all that wait, also of a server before this one. Raises OSError where the store does not answer."""
        with self._following:
            for move in self._renames.pending:
                if move.followed:
                    continue
                try:
                    with self._taking(move.ino):
                        self._follow(move)
                except OSError as e:
                    if e.errno != errno.EBUSY:
                        raise
                    self.carry_out(move)  # another host has the source, so all that was written here is durable

    def try_all(self, *_move: Move) -> None:
        """`follow_all`, where another time will do as well: the next rename, sync, or unmount."""
        try:
            self.follow_all()
        except OSError as e:
            log.warning("renames wait: %s", e.strerror)

    def _follow(self, move: Move) -> None:
        """Have it carried out once everything that was written to its source so far is durable."""
        sequel = Sequel(
            partial(self.carry_out, move), partial(self._renames.fail, move), partial(self._renames.give_up, move)
        )
        f = self._cache.files.get(move.ino)
        f = self._cache.follow(move.ino, self._fresh(move.ino) if f is None else f.attr, sequel)
        move.followed = True
        if f.opens and self._pull is not None:
            self._pull(move.ino).add_done_callback(partial(self._pulled, f, sequel))
        else:
            self._cache.let_follow(f, sequel)

    def _pulled(self, f: File, sequel: Sequel, done: Future[None]) -> None:
        error = done.exception()
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENODEV):  # it has nothing of it
            log.warning("the kernel does not hand over the data of node %d, which is renamed: %s", f.ino, error)
        self._cache.let_follow(f, sequel)

    def handed_over(self, f: File) -> None:
        """The kernel holds nothing of the file that was written before this."""
        sequel = f.sequel
        if sequel is not None:
            self._cache.let_follow(f, sequel)

    def carry_out(self, move: Move) -> None:
        """Rename in the store, whose source is durable. Raises OSError; it waits on then."""
        self._lost(*self._renames.carry_out(move))
