"""Renames that wait: what replaces a file gets its name in the store only after its data.

rename(2) over another file is answered at once. While the data of the source is not durable, this layer between file
system and store shows the names as they are for applications, and the store still has them as they were:

    names shown:    new -> source            (the replaced file has lost a name)
    store:          tmp -> source, new -> replaced file

So a machine that stops leaves the old file or the new one, never an empty one. `carry_out` renames in the store.
Whatever else applications do with these names meanwhile is done at once as well, and always in an order in which the
store shows no half-written file under the name of a whole one:

- the source's old name is given to something else, or its directory removed: the source steps aside, to a hidden name
  in the target's directory;
- the new name is replaced again: the first source goes, the second waits;
- the new name is removed: both files go; is moved on: the replaced one goes, and the source goes on from where it is.

Only what changes two names at once (RENAME_EXCHANGE), what is not a file, and a second name of a file of which one
waits already, wait for the data first (`settle`).

Each is an entry of the journal before rename(2) is answered; the order of the steps is such that a server that dies
between any two leaves what the next one can go on with when the request comes again.

Lock: `_lock` guards the tables and is held over the store's calls that change a name that waits. What meets only names
that do not wait does not take it: while a request holds its directories none can begin to. One that waits may be
carried out at any moment, so whatever meets it looks again with the lock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, cast

from wbfuse.journal import Journal, Kind
from wbfuse.store.contract import Change, Found, Owner, Store
from wbfuse.wire.constants import RENAME_EXCHANGE, RENAME_NOREPLACE
from wbfuse.wire.types import Attr, Dirent

log = logging.getLogger(__name__)

Place = tuple[int, bytes]
"""A directory's ino, and a name in it."""
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)
_ENTRY = Struct("<QQQBBB")
"""Inos of the source's directory, the target's and the replaced file; lengths of the names."""


@dataclass(slots=True, eq=False)
class Move:
    """The file `ino`, which the store has at `source`, is to replace what it has at `target`."""

    ino: int
    source: Place
    target: Place
    victim: int
    """The ino of what is replaced."""
    aside: bytes = b""
    """The name in the target's directory under which the store may have it instead."""
    held: list[int] = field(default_factory=list)
    number: int = 0
    """The inode number of the source that applications see in listings."""
    followed: bool = False
    """Somebody sees to it that it is carried out."""
    lost: tuple[int, int] = (0, 0)
    """What the store answered when the replaced file was removed from the target before this was carried out."""
    failed: bool = False
    """The store would not have it, or its data, and may never: nothing else waits for it."""

    def encode(self) -> bytes:
        (parent, name), (newparent, newname) = self.source, self.target
        head = _ENTRY.pack(parent, newparent, self.victim, len(name), len(newname), len(self.aside))
        return head + name + newname + self.aside

    @classmethod
    def decode(cls, ino: int, value: bytes) -> Move:
        parent, newparent, victim, n, m, _ = _ENTRY.unpack_from(value)
        names = value[_ENTRY.size :]
        return cls(ino, (parent, names[:n]), (newparent, names[n : n + m]), victim, names[n + m :])


class DeferredRenames:
    """Wraps a store; see `as_store`. Everything that is not about names goes straight to it."""

    def __init__(self, store: Store, journal: Journal) -> None:
        self._store = store
        self._journal = journal
        self._lock = threading.RLock()
        self._moves: dict[int, Move] = {}
        self._at: dict[Place, Move] = {}
        """By target."""
        self._hidden: dict[Place, Move] = {}
        """By source."""
        self._victims: dict[int, tuple[Move, ...]] = {}
        """What each replaced file has lost names to."""
        self._inherited = [Move.decode(ino, value) for ino, value in journal.inherited(Kind.RENAME).items()]
        self.waits: Callable[[int], bool] = lambda _ino: False
        """Whether data of a regular file may not be durable in the store."""
        self.on_released: Callable[[int], None] = lambda _ino: None
        """Called when nothing of a file is held back any more (see `is_replaced`)."""
        self.on_gone: Callable[[int, int], None] = lambda _ino, _links: None
        """Called with a replaced file that lost its name otherwise than by being replaced, as Store.unlink answers.
        Must not raise."""
        self.on_kept: Callable[[int], None] = lambda _ino: None
        """Called with a file that is not replaced after all. Must not raise."""
        self.incomplete: Callable[[int], bool] = lambda _ino: False
        """Whether a file has lost data that was written to it, so that it must not replace another."""
        self.on_deferred: Callable[[Move], None] = lambda _move: None
        """Called when a rename has been taken; it is to be carried out once the data of its source is durable."""
        self.settle: Callable[[Move], object] = self.carry_out
        """Carry out one now, its data first. Waits for the store; raises OSError."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        setattr(self, name, method)
        return method

    def as_store(self) -> Store:
        return cast(Store, self)

    @property
    def pending(self) -> list[Move]:
        """Those that the store has not."""
        return list(self._moves.values())

    def is_replaced(self, ino: int) -> bool:
        """Whether the store has the file under a name that is another's for applications: it should not change then.

        One that waits for a name itself does not wait for this as well: two could wait for each other.
        """
        return ino not in self._moves and not all(move.failed for move in self._victims.get(ino, ()))

    def is_victim(self, ino: int) -> bool:
        """Whether the store still has the file under a name that is another's, and will where that one never comes."""
        return ino in self._victims

    def inside(self, directory: int) -> list[Move]:
        """Those that come from or go to a directory."""
        return [move for move in self.pending if directory in (move.source[0], move.target[0])]

    # taking and ending

    def load(self) -> list[Move]:
        """Go on with those of a server that died; answers them. Raises OSError where the store does not answer, and may
        be called again then."""
        while self._inherited:
            move = self._inherited[-1]
            if not self._begun(move):
                self._journal.remove(Kind.RENAME, move.ino)
            self._inherited.pop()
        return self.pending

    def _begun(self, move: Move) -> bool:
        try:
            self._hold(move)  # before anything is looked up: nobody else may need these nodes yet
        except OSError as e:
            if e.errno not in _GONE:
                raise
            log.warning("node %d is gone, so it did not become %r", move.ino, move.target[1])
            return False
        held, move.held = move.held, []
        try:
            if self._find(move):
                self._begin(move)
                return True
            if self._ino_at(move.target) != move.ino:
                log.warning("node %d has moved, so it did not become %r", move.ino, move.target[1])
            return False
        finally:
            self._release(held)

    def _find(self, move: Move) -> bool:
        """Whether the store still has the source where it waits, now in `move.source`."""
        beside = (move.target[0], move.aside)
        for place in ([beside] if move.aside else []) + [move.source]:
            found = self._look(place)
            if found is not None and found[0] == move.ino:
                move.source, move.number = place, found[1].ino
                return True
        return False

    def _look(self, place: Place) -> tuple[int, Attr] | None:
        """What the store has there."""
        try:
            ino, attr = self._store.lookup(*place)
        except OSError as e:
            if e.errno in _GONE:
                return None
            raise
        self._store.forget(ino)
        return ino, attr

    def _ino_at(self, place: Place) -> int:
        found = self._look(place)
        return 0 if found is None else found[0]

    def _begin(self, move: Move) -> None:
        """Held: lock, or nobody else is there yet. Raises OSError with nothing changed."""
        before = self._moves.get(move.ino)
        self._hold(move)
        try:
            self._journal.put(Kind.RENAME, move.ino, move.encode())
        except BaseException:
            self._release(move.held)
            raise
        self._moves[move.ino] = self._at[move.target] = self._hidden[move.source] = move
        self._victims[move.victim] = (*self._victims.get(move.victim, ()), move)
        if before is not None:
            self._take_out(before)

    def _end(self, move: Move) -> None:
        """Held: lock."""
        self._journal.remove(Kind.RENAME, move.ino)
        self._take_out(move)

    def _take_out(self, move: Move) -> None:
        """Held: lock."""
        if self._moves.get(move.ino) is move:
            del self._moves[move.ino]
        for table, place in ((self._at, move.target), (self._hidden, move.source)):
            if table.get(place) is move:
                del table[place]
        left = tuple(m for m in self._victims[move.victim] if m is not move)
        if left:
            self._victims[move.victim] = left
        else:
            del self._victims[move.victim]
        if not self.is_replaced(move.victim):
            self.on_released(move.victim)
        self._release(move.held)
        self.on_gone(*move.lost)

    def _hold(self, move: Move) -> None:
        """All or, where it raises OSError, nothing."""
        try:
            for ino in (move.ino, move.source[0], move.target[0]):
                self._store.hold(ino)
                move.held.append(ino)
        except BaseException:
            self._release(move.held)
            raise

    def _release(self, held: list[int]) -> None:
        for ino in held:
            with contextlib.suppress(OSError):  # it is not there any more
                self._store.drop(ino)
        held.clear()

    def _cancel(self, move: Move) -> None:
        """Held: lock. It is not renamed, and what it was to replace stays."""
        self._end(move)
        self.on_kept(move.victim)

    def carry_out(self, move: Move) -> tuple[int, int]:
        """Rename in the store, where that is still wanted. Answers as Store.rename; after OSError it waits on."""
        with self._lock:
            if self._moves.get(move.ino) is not move:
                return 0, 0
            lost = (0, 0)
            try:
                lost = self._store.rename(*move.source, *move.target, 0)
            except OSError as e:
                if e.errno not in _GONE or self._ino_at(move.source) == move.ino:
                    raise
                log.warning("node %d was moved away, so it does not become %r", move.ino, move.target[1])
                self._cancel(move)
                return lost
            self._end(move)
            return lost

    def fail(self, move: Move) -> None:
        """It, or the data before it, met an error that is told. It is tried again, but holds nothing back meanwhile."""
        with self._lock:
            if self._moves.get(move.ino) is move and not move.failed:
                move.failed = True
                self.on_released(move.victim)

    def give_up(self, move: Move) -> None:
        """The data of the source will never be in the store: what it was to replace stays."""
        with self._lock:
            if self._moves.get(move.ino) is move:
                log.error("%r is not replaced by node %d, whose data could not be written", move.target[1], move.ino)
                self._cancel(move)

    # names as they are shown

    def _lost(self, ino: int) -> int:
        """How many names the store has of a file that are another's by now."""
        return len(self._victims.get(ino, ()))

    def _shown(self, found: Found) -> Found:
        if lost := self._lost(found[0]):
            found[1].nlink = max(0, found[1].nlink - lost)
        return found

    def lookup(self, parent: int, name: bytes, nowait: bool = False) -> Found:
        place = (parent, name)
        while True:
            self._check(place)
            move = self._at.get(place)
            if move is None:
                return self._shown(self._store.lookup(parent, name, nowait))
            try:
                found = self._store.lookup(*move.source, nowait)
                if found[0] == move.ino:
                    return self._shown(found)
                self._store.forget(found[0])
            except OSError as e:
                if e.errno not in _GONE:
                    raise
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "it is being renamed")
            with self._lock:  # it has just been carried out, or it steps aside
                if self._at.get(place) is move and self._ino_at(move.source) != move.ino:
                    log.warning("node %d was moved away, so it does not become %r", move.ino, name)
                    self._cancel(move)

    def readdir(self, ino: int, offset: int) -> Iterator[Dirent]:
        # As they are now: what is carried out during the listing is hidden, or shown, to its end.
        hidden = {name for parent, name in list(self._hidden) if parent == ino}
        moved = {name: move for (parent, name), move in list(self._at.items()) if parent == ino}
        return self._listed(ino, self._store.readdir(ino, offset), hidden, moved)

    def _listed(
        self, ino: int, entries: Iterator[Dirent], hidden: set[bytes], moved: dict[bytes, Move]
    ) -> Iterator[Dirent]:
        for entry in entries:
            if entry.name in hidden or (ino, entry.name) in self._hidden:
                continue
            move = moved.get(entry.name)
            if move is not None:
                entry.ino, entry.type = move.number, stat.S_IFREG >> 12
            yield entry

    def getattr(self, ino: int, nowait: bool = False) -> Attr:
        if ino not in self._victims:
            return self._store.getattr(ino, nowait)
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "it is being replaced")
        with self._lock:  # the store's count and what is taken off it are of one moment
            return self._shown((ino, self._store.getattr(ino)))[1]

    def setattr(self, ino: int, change: Change) -> Attr:
        attr = self._store.setattr(ino, change)
        return self.getattr(ino) if ino in self._victims else attr

    # making

    def _vacate(self, place: Place) -> None:
        """A name that is free for applications is to be free in the store as well."""
        if place in self._at:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place[1])
        if place in self._hidden:
            with self._lock:
                move = self._hidden.get(place)
                if move is not None:
                    self._step_aside(move)

    def _step_aside(self, move: Move) -> None:
        """Held: lock. To a name of our own beside the target."""
        if not move.aside:
            move.aside = b".wbfuse-" + os.urandom(8).hex().encode()
            self._journal.put(Kind.RENAME, move.ino, move.encode())  # first: the next server looks for it there too
        beside = (move.target[0], move.aside)
        self._hidden[beside] = move
        try:
            self._store.rename(*move.source, *beside, RENAME_NOREPLACE)
        except OSError:
            del self._hidden[beside]
            raise
        del self._hidden[move.source]
        before, move.source = move.source, beside
        self._journal.put(Kind.RENAME, move.ino, move.encode())  # the directory that it came from may go now
        self._store.hold(beside[0])
        move.held.append(beside[0])
        move.held.remove(before[0])
        self._store.drop(before[0])

    def _empty(self, directory: int) -> None:
        """A directory that is empty for applications is to be so in the store."""
        with self._lock:
            for move in [move for move in self.pending if move.source[0] == directory and move.source[1] != move.aside]:
                self._step_aside(move)

    def create(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        self._vacate((parent, name))
        return self._store.create(parent, name, mode, owner)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, owner: Owner) -> Found:
        self._vacate((parent, name))
        return self._store.mknod(parent, name, mode, rdev, owner)

    def mkdir(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        self._vacate((parent, name))
        return self._store.mkdir(parent, name, mode, owner)

    def symlink(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Found:
        self._vacate((parent, name))
        return self._store.symlink(parent, name, target, owner)

    def link(self, ino: int, parent: int, name: bytes) -> Found:
        self._vacate((parent, name))
        return self._shown(self._store.link(ino, parent, name))

    # removing and moving

    def _check(self, place: Place) -> None:
        if place in self._hidden:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place[1])

    def _left(self, lost: tuple[int, int]) -> tuple[int, int]:
        """What a removal answered, less the names that are lost already."""
        return lost[0], lost[1] - self._lost(lost[0])

    def _remove(self, place: Place) -> tuple[int, int]:
        """A name goes from the store, where it is there: a server before this one may have removed it."""
        try:
            return self._store.unlink(*place)
        except FileNotFoundError:
            return 0, 0

    def _remove_victim(self, move: Move) -> None:
        """Held: lock. What it was to replace goes, from the name that it has; once, though this may be repeated."""
        lost = self._remove(move.target)
        if lost[0]:
            move.lost = lost

    def unlink(self, parent: int, name: bytes) -> tuple[int, int]:
        place = (parent, name)
        self._check(place)
        if place in self._at:
            with self._lock:
                move = self._at.get(place)
                if move is not None:
                    self._remove_victim(move)
                    lost = self._remove(move.source)
                    self._end(move)
                    return self._left(lost)
        return self._left(self._store.unlink(parent, name))

    def rmdir(self, parent: int, name: bytes) -> None:
        if self._moves:
            self._empty(self._ino_at((parent, name)))
        self._store.rmdir(parent, name)

    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> tuple[int, int]:
        source, target = (parent, name), (newparent, newname)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            return self._store.rename(*source, *target, flags)  # which refuses what it does not know
        while True:
            self._check(source)
            # The kernel holds both directories, so no rename of these names can begin to wait meanwhile; one that waits
            # may be carried out at any time. So without the lock only "nothing waits here" is certain.
            if source in self._at or target in self._at or target in self._hidden:
                done = self._rename_waiting(source, target, flags)
            else:
                done = self._rename_free(source, target, flags)
            if done is not None:
                return self._left(done)

    def _rename_free(self, source: Place, target: Place, flags: int) -> tuple[int, int] | None:
        """Neither name waits for anything. None: something had to be settled first; look again."""
        found = self._look(source)
        if found is None or flags & RENAME_EXCHANGE:
            return self._store.rename(*source, *target, flags)
        ino, attr = found
        if not stat.S_ISREG(attr.mode):
            if self._moves and stat.S_ISDIR(attr.mode):
                self._empty(self._ino_at(target))
            return self._store.rename(*source, *target, flags)
        also = self._moves.get(ino)
        if also is not None:  # by another of its names
            self.settle(also)
            return None
        if not flags and attr.nlink > 1 and self._ino_at(target) == ino:
            # For applications something else was there, else the kernel would not ask, but a server before this one had
            # removed it when it died. As rename(2) of two names of one file the store would do nothing.
            return self._remove(source)
        wanted = self.waits(ino) or self.incomplete(ino)
        if not (wanted and self._look(target) is not None):
            return self._store.rename(*source, *target, flags)
        with self._lock:
            if ino in self._moves:
                return None
            deferred, lost = self._rename_file(ino, attr.ino, source, target, flags)
        if deferred is not None:
            self.on_deferred(deferred)
        return lost

    def _rename_waiting(self, source: Place, target: Place, flags: int) -> tuple[int, int] | None:
        """A rename of one of these names waits. None: it does not any more; look again."""
        first: list[Move] = []
        deferred, lost = None, None
        with self._lock:
            mine, other = self._at.get(source), self._at.get(target)
            waiting = [move for move in (mine, other) if move is not None]
            if not waiting and target not in self._hidden:
                return None
            found = self._look(source if mine is None else mine.source)
            if mine is not None and (found is None or found[0] != mine.ino):
                log.warning("node %d was moved away, so it does not become %r", mine.ino, source[1])
                self._cancel(mine)
                return None
            if found is None or (flags & RENAME_EXCHANGE and not waiting):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source[1])
            also = self._moves.get(found[0])
            if also is not None and also is not mine:  # by another of its names
                first = [also]
            elif flags & RENAME_EXCHANGE or not stat.S_ISREG(found[1].mode):
                first = waiting
                if not waiting:
                    self._vacate(target)
            else:
                deferred, lost = self._rename_file(found[0], found[1].ino, source, target, flags)
        for move in first:
            self.settle(move)
        if deferred is not None:
            self.on_deferred(deferred)
        return lost

    def _rename_file(
        self, ino: int, number: int, source: Place, target: Place, flags: int
    ) -> tuple[Move | None, tuple[int, int]]:
        """Held: lock. Answers what was deferred, if it was, and the name that is lost."""
        mine = self._at.get(source)
        """The source is the target of one that waits."""
        begin = source if mine is None else mine.source
        """Where the store has it."""
        if mine is not None and target == mine.source:  # back to where it came from
            self._remove_victim(mine)
            self._end(mine)
            return None, (0, 0)
        other = self._at.get(target)
        if other is None:
            self._vacate(target)
        replaced = self._look(target)
        if flags & RENAME_NOREPLACE and (other is not None or replaced is not None):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target[1])
        if self.incomplete(ino) and (other is not None or replaced is not None):
            raise OSError(errno.EIO, "what was written to it is in quarantine", source[1])
        lost = (0, 0)
        if other is not None:
            lost = self._remove(other.source)
            self._end(other)
        elif replaced is not None:
            lost = replaced[0], replaced[1].nlink  # `_left` takes off what is lost by this one
        if mine is not None:
            self._remove_victim(mine)
        if replaced is None or (other is not None and replaced[0] == ino):
            if replaced is None:
                self._store.rename(*begin, *target, flags)
            else:  # another name of the same file, which stays
                self._remove(begin)
            if mine is not None:
                self._end(mine)
            return None, lost
        move = Move(ino, begin, target, replaced[0], number=number)
        self._begin(move)
        return move, lost
