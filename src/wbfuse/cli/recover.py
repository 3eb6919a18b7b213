"""`wbfuse recover`: what a mount had to set aside, and what is in a log on disk."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable

import click

from wbfuse.cli.units import show_size
from wbfuse.control.disk import is_note_of, notes, unwritten
from wbfuse.store.contract import SourceError
from wbfuse.writeback.disk.directory import Directory
from wbfuse.writeback.disk.load import load
from wbfuse.writeback.log import LogError
from wbfuse.writeback.quarantine import Kept, default_directory, discard, entries, write_out
from wbfuse.writeback.quarantine import export as export_entry
from wbfuse.writeback.salvage import dirty_files, in_memory


def _line(kept: Kept) -> str:
    m = kept.manifest
    size = sum(end - start for start, end in m["ranges"])
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(m["kept_at"]))
    if kept.images is not None:
        return f"{kept.name}  {when}  {m['path']}, {m['source']}"
    return f"{kept.name}  {when}  {show_size(size)} of {_shown(m['path']) or 'inode ' + str(m['ino'])} in {m['source']}"


def _shown(path: str) -> str:
    """A path as a terminal may have it: one line, and no commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)


def _of_a_log(log: int, journal: int, source: str, directory: str | None) -> int:
    """Show the dirty files of a log; with `directory`, write them there under their paths. Answers how many."""
    count = 0
    path_in = _paths_in(source)
    try:
        if directory is not None:
            os.makedirs(directory, exist_ok=True)
        for dirty in dirty_files(log, journal):
            count += 1
            path = dirty.path or path_in(dirty.ino)
            size = sum(piece.length for pieces in dirty.rounds for piece in pieces)
            click.echo(f"  {show_size(size)} of {_shown(path) or 'inode ' + str(dirty.ino)}")
            if directory is not None:
                target = os.path.join(directory, _below(path) or f"inode-{dirty.ino}")
                os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
                ranges = write_out(target, dirty.size, dirty.rounds)
                click.echo(f"    exported to {_shown(target)}: " + ", ".join(f"{a} to {b}" for a, b in ranges))
    except OSError as e:
        raise click.ClickException(f"{e.filename or directory}: {e.strerror}") from e
    except (ValueError, KeyError, IndexError, struct.error) as e:
        raise click.ClickException(f"the log is damaged: {e}") from e
    return count


def _paths_in(source: str) -> Callable[[int], str]:
    """Where the files of a volume are, as far as its database says; a log names those of a directory itself."""
    if "://" not in source:
        return lambda _ino: ""
    from wbfuse.store.volume.store import paths_in

    try:
        return paths_in(source)
    except SourceError as e:
        click.echo(f"  {source}: {e}; so files are shown by their numbers", err=True)
        return lambda _ino: ""


def _below(path: str) -> str:
    """Where below a directory an export goes: nowhere else, whatever the log says. Empty where that cannot be told."""
    parts = [part for part in path.split("/") if part]
    return os.path.join(*parts) if parts and not {"..", "?"} & set(parts) and "\0" not in path else ""


def _log_on_disk(path: str, export: str | None, throw: bool) -> None:
    """The same of a directory of `mount --log`."""
    directory = Directory(path)
    manifest = None
    try:
        manifest = directory.manifest()
        if manifest is None:
            raise click.UsageError(f"{path}: no log is here")
        click.echo(f"{path}: the log of {manifest['source']}")
        loaded = None if manifest.get("ended") else load(directory, lenient=True)
        if loaded is not None and loaded.warning:
            click.echo(f"  damaged, so this is what could be read: {loaded.warning}")
        found = 0 if loaded is None else _of_a_log(loaded.log, loaded.journal, manifest["source"], export)
        if not found:
            whole = loaded is None or not loaded.warning
            click.echo("  nothing that the store has not" if whole else "  in it nothing that the store has not")
    except LogError as e:
        if not throw:
            raise
        click.echo(str(e), err=True)
    if throw:
        _ask_twice(f"remove the log {path}")
        directory.withdraw()
        directory.clear()
        click.echo("removed")
        if manifest is not None:
            _forget_in(manifest["source"], manifest["uuid"])


def _forget_in(source: str, number: str) -> None:
    """The log is gone, so its source need not wait for it."""
    try:
        found, forget = notes(source)
        if any(is_note_of(note, number) for note in found):
            forget()
    except SourceError as e:
        click.echo(f"{source} still waits for it ({e}); have it forgotten: wbfuse recover --of {source}", err=True)


def _ask_twice(what: str) -> None:
    click.confirm(f"{what} for good?", abort=True)
    click.confirm("what was written and is not in the store is lost then; really?", abort=True)


def _give_up(source: str) -> None:
    """Have a source forget the log that its last mount left."""
    found, forget = notes(source)
    if not found:
        raise click.UsageError(f"{source}: knows of no log that was left")
    for note in found:
        click.echo(f"{source}: its last mount may have left data in {unwritten(note, anywhere=True) or note}")
    _ask_twice("have that forgotten")
    forget()
    click.echo("forgotten")


@click.command()
@click.argument("name", required=False)
@click.option("--export", type=click.Path(), metavar="FILE", help="Copy the entry's bytes to FILE, at their offsets.")
@click.option("--discard", "throw", is_flag=True, help="Remove the entry. Asks first; of a log on disk twice.")
@click.option(
    "--of", "source", metavar="SOURCE", help="Have SOURCE forget the log that its last mount left. Asks twice."
)
def recover(name: str | None, export: str | None, throw: bool, source: str | None) -> None:
    """Show what is in quarantine, the entry NAME there, or what a log on disk has (NAME is its directory, with a /).

    In quarantine is dirty data that could not be brought to its store: of files that another host has taken over, of
    mounts that were told to end or whose server died too often.

    --export gives a sparse file with the bytes that were written, and holes where nothing was; the ranges are shown. Of
    a whole log it gives a directory with such a file for each, under its path.
    """
    try:
        if source is not None:
            _give_up(source)
        elif name is not None and "/" in name:
            _log_on_disk(name, export, throw)
        else:
            _quarantined(name, export, throw)
    except (LogError, SourceError) as e:
        raise click.ClickException(str(e)) from e


def _quarantined(name: str | None, export: str | None, throw: bool) -> None:
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
    if not named and os.path.isdir(name):
        _log_on_disk(name, export, throw)
        return
    if not named:
        raise click.UsageError(f"{name}: not in quarantine; see: wbfuse recover")
    _one(named[0], export, throw)


def _one(kept: Kept, export: str | None, throw: bool) -> None:
    """Show an entry of the quarantine; copy its bytes, and remove it, where that was asked for."""
    click.echo(_line(kept))
    for start, end in kept.manifest["ranges"]:
        click.echo(f"  bytes {start} to {end}")
    if kept.images is not None:
        if not kept.sound():
            click.echo("  damaged since it was kept, so this is what could be read")
        try:
            log, journal = map(in_memory, kept.images)
        except OSError as e:
            raise click.ClickException(f"{e.filename}: {e.strerror}") from e
        _of_a_log(log, journal, kept.manifest["source"], export)
    elif export:
        if os.path.lexists(export):
            raise click.UsageError(f"{export}: is there already")
        try:
            export_entry(kept, export)
        except OSError as e:
            raise click.ClickException(f"{export}: {e.strerror}") from e
        click.echo(f"exported to {export}")
    if throw:
        click.confirm(f"remove {kept.name} for good?", abort=True)
        discard(kept)
        click.echo("removed")
