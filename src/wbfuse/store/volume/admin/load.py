"""A volume rebuilt from a dump: a new database, and a new mark on the bucket, so that the old database is refused."""

from __future__ import annotations

import io
from collections.abc import Callable

from sqlalchemy import inspect

from wbfuse.store.volume.admin.dump import load_dump, newest_dump
from wbfuse.store.volume.database import Database, DatabaseError
from wbfuse.store.volume.objects import Objects, ObjectsError, explain
from wbfuse.store.volume.schema import settings
from wbfuse.store.volume.store import VolumeError


def load_volume(
    meta: str, file: str | None, data: str, options: dict[str, str], progress: Callable[[int, int], None]
) -> str:
    """Answers what was loaded. Raises VolumeError and DumpError; nothing is changed then."""
    try:
        database = Database(meta, create=True)
    except DatabaseError as e:
        raise VolumeError(str(e)) from e
    try:
        if inspect(database.engine).has_table(settings.name):
            raise VolumeError(f"{database.url.render_as_string()}: there is a volume already; use an empty database")
        try:
            objects = Objects(data, options)
            where = file or newest_dump(objects)
            if file is None:
                load_dump(database, io.BytesIO(objects.get_all(where)), objects, data, progress)
            else:
                with open(file, "rb") as source:
                    load_dump(database, source, objects, data, progress)
        except ObjectsError as e:
            raise VolumeError(str(e)) from e
        except FileNotFoundError as e:
            raise VolumeError(f"{data}: holds no volume (or no such bucket): {e.strerror}") from e
        except OSError as e:
            raise VolumeError(f"{data}: {explain(e)}") from e
        return where
    finally:
        database.close()
