"""A volume opened for keeping it, without a session: its database, its bucket, its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wbfuse.store.volume.database import Database, DatabaseError
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.store import VolumeError, open_objects, read_settings


@dataclass(slots=True)
class Opened:
    database: Database
    objects: Objects
    settings: dict[str, str]


@contextmanager
def opened(meta: str, options: dict[str, str]) -> Iterator[Opened]:
    """Raises VolumeError."""
    try:
        database = Database(meta)
    except DatabaseError as e:
        raise VolumeError(str(e)) from e
    try:
        found = read_settings(database)
        yield Opened(database, open_objects(found, options), found)
    finally:
        database.close()
