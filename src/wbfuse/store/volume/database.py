"""The database of a volume: engines, transactions, and what their failures mean.

Names: on SQLite a power cut may take those that were not synced, as on any local file system. A PostgreSQL that crashes
leaves this machine and its log alive, so there every transaction is durable by PostgreSQL's own rules.

A transaction is a function of a connection; one that lost a race is run again, so it must not have effects elsewhere.
Errors leave as OSError: ETIMEDOUT where the database is not there (waited out by write-back), EIO else.

Locks: `_writer` (SQLite only) is held over one writing transaction.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool, StaticPool

from wbfuse.store.volume.schema import counters

T = TypeVar("T")

_RACES = ("40001", "40P01")
_TRIES = 60
_DEAD = 50
"""Dead connections of the pool that one transaction may meet: a server that was started again leaves as many."""
_CONNECT_SECONDS = 10
_BUSY_SECONDS = 60
_IDLE_SECONDS = 10
"""After so long without a word inside a transaction the database gives it up."""


class DatabaseError(Exception):
    """The database cannot serve; one line for the person who asked."""


def parse(meta: str) -> URL:
    """META as a URL. Raises DatabaseError where it is none that is supported."""
    try:
        url = make_url(meta)
    except (ArgumentError, ValueError) as e:
        raise DatabaseError(f"{meta}: not a database URL; use sqlite:///PATH or postgresql://...") from e
    kind = url.get_backend_name()
    if kind == "sqlite":
        if not url.database or url.database == ":memory:":
            raise DatabaseError(f"{meta}: name a file: sqlite:///PATH (four slashes for an absolute path)")
        return url.set(database=os.path.abspath(url.database))
    if kind in ("postgresql", "cockroachdb"):
        return url.set(drivername=f"{kind}+psycopg")
    raise DatabaseError(f"{meta}: {kind} is not supported; use sqlite:///PATH or postgresql://...")


def _reason(error: BaseException) -> str:
    """The first line of what the driver said."""
    original = getattr(error, "orig", None) or error
    return str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__


class Database:
    """`create` makes the SQLite file; without it a missing one is refused. Raises DatabaseError."""

    def __init__(self, meta: str, create: bool = False) -> None:
        url = parse(meta)
        self.url = url
        self.sqlite = url.get_backend_name() == "sqlite"
        self._writer = threading.RLock()
        self._full: bool | None = None
        try:
            if self.sqlite:
                if not create and not os.path.exists(url.database or ""):
                    raise DatabaseError(
                        f"{url.database}: no such volume; make it with: wbfuse format {meta} --data URL"
                    )
                self._write, self._read = self._sqlite(url)
            else:
                self._write = self._postgres(url)
                # A query needs no BEGIN and ROLLBACK around it, each of which is a round trip.
                self._read = self._write.execution_options(isolation_level="AUTOCOMMIT")
            with self._read.connect() as c:
                c.execute(text("select 1"))
        except NoSuchModuleError as e:
            raise DatabaseError(f"{meta}: {e}") from e
        except ModuleNotFoundError as e:
            raise DatabaseError(f"PostgreSQL needs the extra: pip install 'wbfuse[postgres]' ({e})") from e
        except SQLAlchemyError as e:
            raise DatabaseError(f"{url.render_as_string()}: {_reason(e)}") from e

    def _sqlite(self, url: URL) -> tuple[Engine, Engine]:
        """One connection that writes, others that read beside it (WAL)."""
        arguments = {"check_same_thread": False, "timeout": _BUSY_SECONDS}
        write = create_engine(url, poolclass=StaticPool, connect_args=arguments)
        read = create_engine(url, poolclass=QueuePool, pool_size=8, max_overflow=32, connect_args=arguments)
        for engine, begin in ((write, "BEGIN IMMEDIATE"), (read, "BEGIN")):
            event.listen(engine, "connect", _sqlite_connected)
            event.listen(engine, "begin", lambda c, begin=begin: c.exec_driver_sql(begin) and None)
        return write, read

    @staticmethod
    def _postgres(url: URL) -> Engine:
        # A host that is cut off in mid-transaction must not keep its locks: it could never be fenced.
        options = f"-c idle_in_transaction_session_timeout={_IDLE_SECONDS}s -c tcp_user_timeout={_IDLE_SECONDS}s "
        options += "-c default_transaction_isolation=read\\ committed"
        arguments = {
            "connect_timeout": _CONNECT_SECONDS, "options": options, "keepalives_idle": 10, "keepalives_interval": 5,
            "keepalives_count": 3, "tcp_user_timeout": 30_000,
        }  # fmt: skip
        return create_engine(url, pool_size=16, max_overflow=32, pool_pre_ping=False, connect_args=arguments)

    @property
    def engine(self) -> Engine:
        """For what has no transaction of its own: making tables, looking at them."""
        return self._write

    def close(self) -> None:
        self._write.dispose()
        self._read.dispose()

    # transactions

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection whose queries all see the same moment. Raises OSError."""
        try:
            with self._read.connect() as c:
                if not self.sqlite:
                    c.execution_options(isolation_level="REPEATABLE READ")
                with c.begin():
                    yield c
        except SQLAlchemyError as e:
            raise _as_oserror(e) from e

    def query(self, act: Callable[[Connection], T]) -> T:
        """Run queries; tried once more where the connection turned out to be dead."""
        for last in (False, True):
            try:
                with self._read.connect() as c:
                    return act(c)
            except SQLAlchemyError as e:
                if last or not _is_dead(e):
                    raise _as_oserror(e) from e
        raise AssertionError("unreachable")

    def transact(
        self, act: Callable[[Connection], T], durable: bool = False, then: Callable[[T], None] | None = None
    ) -> T:
        """Run `act` in a transaction, again where it lost a race. Raises OSError; what `act` raises undoes it.

        With `durable` it survives a power cut, and so does every transaction before it. `then` gets the result
        after the commit (SQLite: before the next writer begins).
        """
        dead = 0
        for attempt in range(_TRIES):
            committing = threading.Event()
            try:
                with self._writer if self.sqlite else contextlib.nullcontext():
                    result = self._transact(act, durable, committing)
                    if then is not None:
                        then(result)
                    return result
            except SQLAlchemyError as e:
                # A connection that died before the COMMIT took nothing with it; several of the pool may have.
                dead += _is_dead(e)
                again = _lost_race(e) or (_is_dead(e) and not committing.is_set() and dead <= _DEAD)
                if attempt == _TRIES - 1 or not again:
                    raise _as_oserror(e) from e
                if not _is_dead(e):
                    time.sleep(0.001 * 2 ** min(attempt, 7))
        raise AssertionError("unreachable")

    def flush(self) -> None:
        """Every transaction so far survives a power cut when this returns."""
        touch = update(counters).where(counters.c.name == "sync").values(value=counters.c.value + 1)
        self.transact(lambda c: c.execute(touch), durable=True)

    def _transact(self, act: Callable[[Connection], T], durable: bool, committing: threading.Event) -> T:
        with self._write.connect() as c:
            if self.sqlite and self._full is not durable:
                c.connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._full = durable
            with c.begin() as transaction:
                if durable and not self.sqlite:
                    c.exec_driver_sql("SET LOCAL synchronous_commit TO on")
                result = act(c)
                committing.set()
                transaction.commit()
                return result


def _sqlite_connected(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # BEGIN is ours
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-16384", "temp_store=MEMORY", "mmap_size=0"):
        connection.execute(f"PRAGMA {pragma}")


def _lost_race(error: SQLAlchemyError) -> bool:
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _RACES


def _is_dead(error: SQLAlchemyError) -> bool:
    """Whether the connection was lost, of which nobody knew before it was used."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def _as_oserror(error: SQLAlchemyError) -> OSError:
    """A database that is not there is waited for; one that is full says so; the rest is a defect."""
    if isinstance(error, IntegrityError):
        return OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    said = _reason(error)
    if "disk is full" in said or getattr(getattr(error, "orig", None), "sqlstate", None) == "53100":
        return OSError(errno.ENOSPC, f"database: {said}")
    if (
        _is_dead(error)
        or isinstance(error, PoolTimeout)
        or (isinstance(error, OperationalError) and "disk I/O" not in said)
    ):
        return OSError(errno.ETIMEDOUT, f"database: {said}")
    return OSError(errno.EIO, f"database: {said}")
