"""`wbfuse recover`: what a mount had to set aside because another host had taken its files over."""

from __future__ import annotations

import os
import time

import click

from wbfuse.cli.units import show_size
from wbfuse.writeback.quarantine import Kept, default_directory, discard, entries
from wbfuse.writeback.quarantine import export as export_entry


def _line(kept: Kept) -> str:
    m = kept.manifest
    size = sum(end - start for start, end in m["ranges"])
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(m["kept_at"]))
    return f"{kept.name}  {when}  {show_size(size)} of {m['path'] or 'inode ' + str(m['ino'])} in {m['source']}"


@click.command()
@click.argument("name", required=False)
@click.option("--export", type=click.Path(), metavar="FILE", help="Copy the entry's bytes to FILE, at their offsets.")
@click.option("--discard", "throw", is_flag=True, help="Remove the entry. Asks first.")
def recover(name: str | None, export: str | None, throw: bool) -> None:
    """Show what is in quarantine, or the entry NAME: dirty data of files that another host has taken over.

    --export gives a sparse file with the bytes that were written, and holes where nothing was; the ranges are shown.
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
    if export:
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
