"""Commands that make and keep volumes. They import SQL and object stores only when they run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from wbfuse.cli.progress import bar
from wbfuse.cli.stores import collect_options, store_options
from wbfuse.cli.umount import follow
from wbfuse.cli.units import SIZE, show_size
from wbfuse.control.client import ask
from wbfuse.control.paths import ControlError, find_socket
from wbfuse.session.mount import find_mount
from wbfuse.store.contract import SourceError

if TYPE_CHECKING:
    from wbfuse.store.volume.admin.opened import Opened

_SESSION_SECONDS = 20.0

Words = dict[str, Any]
"""What `store_options` collects, as a command gets it."""


def _options(words: Words) -> dict[str, str]:
    return collect_options(
        words["endpoint"], words["access_key"], words["secret_key"], words["profile"], words["store_option"]
    )


@contextlib.contextmanager
def _volume(meta: str, words: Words) -> Iterator[Opened]:
    """The volume of a command; what goes wrong is one line."""
    from wbfuse.store.volume.admin.opened import opened

    try:
        with opened(meta, _options(words)) as volume:
            yield volume
    except SourceError as e:
        raise click.UsageError(str(e)) from e
    except OSError as e:
        path = e.filename if isinstance(e.filename, str) and e.filename.startswith("/") else meta
        raise click.ClickException(f"{path}: {e.strerror or e}") from e


@click.command("format")
@click.argument("meta")
@click.option(
    "--data", required=True, metavar="URL", help="Where bytes go: file:///DIR, s3://BUCKET/PREFIX, gs://, az://."
)
@click.option("--pack-size", type=SIZE, default="16MiB", show_default=True, help="The largest object.")
@click.option(
    "--compress", type=click.Choice(["none", "zstd", "lz4"]), default="none", show_default=True, help="Of every frame."
)
@store_options
def format_command(meta: str, data: str, pack_size: int, compress: str, **words: Any) -> None:
    """Make an empty volume: its names and maps in the database META, its bytes in immutable objects under --data.

    META is sqlite:///PATH (one host) or postgresql://USER@HOST/DATABASE (many). The object store is tried out first
    and refused where it does not keep what a volume rests on. Secrets are not kept: give them again when mounting, or
    in the environment.
    """
    from wbfuse.store.volume import format_volume

    if data.startswith("memory:"):
        raise click.UsageError(f"{data}: lives in one process only, for tests; use file:///DIR")
    try:
        made = format_volume(meta, data, _options(words), pack_size, compress)
    except SourceError as e:
        raise click.UsageError(str(e)) from e
    click.echo(f"volume {made['uuid']}: packs of {show_size(pack_size)} in {data}")
    click.echo(f"mount it with: wbfuse mount {meta} MOUNTPOINT")


@contextlib.contextmanager
def _alone(meta: str, volume: Opened, wanted: bool) -> Iterator[None]:
    """Where that is wanted, nobody else has the volume mounted while the block runs. Raises UsageError."""
    from wbfuse.store.volume.sessions import Session, VolumeBusyError

    if not wanted:
        yield
        return
    try:
        session = Session(
            volume.database, False, _SESSION_SECONDS, lambda text: click.echo(f"wbfuse: {text}", err=True)
        )
    except VolumeBusyError as e:
        raise click.UsageError(f"{meta}: {e}") from e
    try:
        yield
    finally:
        session.close()


@click.command()
@click.argument("meta")
@click.option("--data", is_flag=True, help="Read every byte and verify its checksum.")
@click.option("--repair", is_flag=True, help="Put right what can be, without removing anything that could be wanted.")
@store_options
def check(meta: str, data: bool, repair: bool, **words: Any) -> None:
    """Look whether the volume META is whole: every row has its pack, counts are true, names are connected.

    A line for each problem; exit 1 where one is left. The volume may be mounted, but not for --repair.
    """
    from wbfuse.store.volume.admin.check import check as problems

    left = mended = 0
    with _volume(meta, words) as volume, _alone(meta, volume, repair), bar("checking") as show:
        for round_ in range(3):  # a repair may bring up what it hid
            found = list(problems(volume.database, volume.objects, volume.settings["compress"], data, show))
            left = 0
            for problem in found:
                mends = repair and problem.repair is not None and round_ < 2
                if mends and problem.repair is not None:
                    volume.database.transact(problem.repair, durable=True)
                    mended += 1
                else:
                    left += 1
                click.echo(f"{problem.text}{' (repaired)' if mends else ''}")
            if len(found) == left:
                break
    click.echo(f"{left} problems{f', {mended} repaired' if repair else ''}")
    sys.exit(1 if left else 0)


@click.command()
@click.argument("meta")
@click.option("--scan", is_flag=True, help="List the bucket as well, for objects that the volume does not know.")
@store_options
def gc(meta: str, scan: bool, **words: Any) -> None:
    """Delete what the volume META does not need any more. It may be mounted; a mount does this by itself as well.

    Packs that a retained dump names are kept until that dump is replaced.
    """
    from wbfuse.store.volume.admin.gc import collect

    with _volume(meta, words) as volume, bar("collecting") as show:
        done = collect(volume.database, volume.objects, lambda what, n: show(what, n, 0), scan)
    unknown = f", {done.objects} unknown objects" if scan else ""
    click.echo(f"deleted {done.packs} packs{unknown}; {done.kept_for_dumps} dead packs kept for dumps")


@click.command()
@click.argument("meta")
@click.argument("file", required=False, type=click.Path(dir_okay=False))
@store_options
def dump(meta: str, file: str | None, **words: Any) -> None:
    """Write names and maps of the volume META to FILE, or into its own bucket, as of one moment.

    With the packs in the bucket, a dump is all that `wbfuse load` needs. A mount writes one into the bucket at
    intervals (--dump-interval). Garbage collection keeps the packs that dumps in the bucket name; it does not know of
    FILE, so load that one before much has been overwritten.
    """
    from wbfuse.store.volume.admin.dump import dump_to_bucket, write_dump

    with _volume(meta, words) as volume, bar("dumping") as show:
        if file is None:
            where = dump_to_bucket(volume.database, volume.objects, lambda n, total: show("rows", n, total))
            where = f"{volume.settings['data']}/{where}"
        else:
            where = file
            temporary = f"{file}.part"
            with open(temporary, "wb") as out:
                write_dump(volume.database, out, lambda n, total: show("rows", n, total))
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, file)
    click.echo(f"dumped to {where}")


@click.command()
@click.argument("meta")
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--data", required=True, metavar="URL", help="Where the volume's packs are.")
@store_options
def load(meta: str, file: str | None, data: str, **words: Any) -> None:
    """Rebuild a volume in the empty database META from FILE, or from the newest dump in the bucket.

    The old database must not be used any more: it is refused from then on, because the bucket belongs to this one.
    """
    from wbfuse.store.volume.admin.dump import DumpError
    from wbfuse.store.volume.admin.load import load_volume

    try:
        with bar("loading") as show:
            where = load_volume(meta, file, data, _options(words), lambda n, total: show("rows", n, total))
    except (SourceError, DumpError) as e:
        raise click.UsageError(str(e)) from e
    except OSError as e:
        raise click.ClickException(f"{data}: {e.strerror or e}") from e
    click.echo(f"loaded {where}; mount it with: wbfuse mount {meta} MOUNTPOINT")


def _on_mount(path: str) -> tuple[str, str, str]:
    """(control socket, mount point, path below it) of a path on a mount of wbfuse. Raises UsageError."""
    absolute = os.path.realpath(path)
    at = absolute
    while True:
        found = find_mount(at)
        if found is not None:
            socket = find_socket(at) if found.fstype.startswith("fuse.wbfuse") else None
            if socket is None:
                raise click.UsageError(f"{path}: not on a mount of wbfuse")
            return socket, at, os.path.relpath(absolute, at)
        if at == "/":
            raise click.UsageError(f"{path}: not on a mount of wbfuse")
        at = os.path.dirname(at)


@click.command()
@click.argument("source", metavar="A", type=click.Path(exists=True))
@click.argument("target", metavar="B", type=click.Path())
def clone(source: str, target: str) -> None:
    """Clone the file or tree A of a mounted volume as B, in the same volume, at once and without moving a byte.

    A tree is cloned as of one moment, after everything written to it so far is durable.
    """
    if os.path.lexists(target):
        raise click.UsageError(f"{target}: is there already")
    parent, name = os.path.split(os.path.abspath(target))
    if not os.path.isdir(parent):
        raise click.UsageError(f"{parent}: no such directory")
    socket, top, inside = _on_mount(source)
    other, _, below = _on_mount(parent)
    if other != socket:
        raise click.UsageError(f"{target}: on another mount than {source}")
    _ask_clone(socket, top, inside, os.path.join(below, name), f"cloning {source}")


def _ask_clone(socket: str, top: str, source: str, target: str, title: str) -> None:
    try:
        follow(title, ask(socket, "clone", source=source, target=target))
    except ControlError as e:
        raise click.ClickException(f"{top}: {e}") from e


@click.command()
@click.argument("mountpoint", type=click.Path(exists=True, file_okay=False))
@click.argument("name", required=False)
def snapshot(mountpoint: str, name: str | None) -> None:
    """Keep everything on MOUNTPOINT as it is now under MOUNTPOINT/.snapshots/NAME (default: date and time).

    A snapshot shares its bytes with the rest of the volume and is an ordinary tree: read it, clone it, remove it.
    """
    import datetime

    socket, top, _ = _on_mount(mountpoint)
    if "://" not in next(ask(socket, "status"))["status"]["source"]:
        raise click.UsageError(f"{top}: a mount of a directory; only volumes have snapshots")
    name = name or datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if "/" in name or name in (".", ".."):
        raise click.UsageError(f"{name}: not a name")
    home = os.path.join(top, SNAPSHOTS)
    os.makedirs(home, mode=0o700, exist_ok=True)
    if os.path.lexists(os.path.join(home, name)):
        raise click.UsageError(f"{os.path.join(home, name)}: is there already")
    _ask_clone(socket, top, ".", os.path.join(SNAPSHOTS, name), f"snapshot of {top}")
    click.echo(os.path.join(home, name))


SNAPSHOTS = ".snapshots"
