"""`wbfuse recover`: what a mount had to set aside because another host had taken its files over."""

from __future__ import annotations

import os
import time

import click

from wbfuse.cli.units import show_size
from wbfuse.writeback.log import LogError
from wbfuse.writeback.quarantine import Kept, default_directory, discard, entries, write_out
from wbfuse.writeback.quarantine import export as export_entry
from wbfuse.writeback.salvage import dirty_files


def _line(kept: Kept) -> str:
    m = kept.manifest
    size = sum(end - start for start, end in m["ranges"])
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(m["kept_at"]))
    if kept.images is not None:
        return f"{kept.name}  {when}  {m['path']}, {m['source']}"
    return f"{kept.name}  {when}  {show_size(size)} of {m['path'] or 'inode ' + str(m['ino'])} in {m['source']}"


def _of_a_log(images: tuple[str, str], directory: str | None) -> None:
    """Show the dirty files of a log; with `directory`, write them there under their numbers."""
    try:
        if directory is not None:
            os.makedirs(directory, exist_ok=True)
        for dirty in dirty_files(*images):
            size = sum(piece.length for pieces in dirty.rounds for piece in pieces)
            click.echo(f"  {show_size(size)} of {dirty.path or 'inode ' + str(dirty.ino)}")
            if directory is not None:
                target = os.path.join(directory, str(dirty.ino))
                ranges = write_out(target, dirty.size, dirty.rounds)
                click.echo(f"    exported to {target}: " + ", ".join(f"{a} to {b}" for a, b in ranges))
    except OSError as e:
        raise click.ClickException(f"{e.filename or directory}: {e.strerror}") from e
    except LogError as e:
        raise click.ClickException(str(e)) from e


@click.command()
@click.argument("name", required=False)
@click.option("--export", type=click.Path(), metavar="FILE", help="Copy the entry's bytes to FILE, at their offsets.")
@click.option("--discard", "throw", is_flag=True, help="Remove the entry. Asks first.")
def recover(name: str | None, export: str | None, throw: bool) -> None:
    """Show what is in quarantine, or the entry NAME: dirty data of files that another host has taken over.

    --export gives a sparse file with the bytes that were written, and holes where nothing was; the ranges are shown. Of
    a whole log (a mount whose server died too often) it gives a directory with such a file for each.
    """
    found = entries(default_directory())
    if name is None:
        if export or throw:
            raise click.UsageError("name an entry; see: wbfuse recover")
        for kept in found:
            click.echo(_line(kept))
        if not found:
            click.echo("nothing is in quarantine")
        return
    named = [k for k in found if k.name == name]
    if not named:
        raise click.UsageError(f"{name}: not in quarantine; see: wbfuse recover")
    kept = named[0]
    click.echo(_line(kept))
    for start, end in kept.manifest["ranges"]:
        click.echo(f"  bytes {start} to {end}")
    if kept.images is not None:
        _of_a_log(kept.images, export)
    elif export:
        if os.path.lexists(export):
            raise click.UsageError(f"{export}: is there already")
        try:
            export_entry(kept, export)
        except OSError as e:
            raise click.ClickException(f"{export}: {e.strerror}") from e
        click.echo(f"exported to {export}")
    if throw:
        click.confirm(f"remove {name} for good?", abort=True)
        discard(kept)
        click.echo("removed")
