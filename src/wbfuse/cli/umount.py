"""`wbfuse umount` and `wbfuse sync`: make things durable, with a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

import click

from wbfuse.cli.units import show_size
from wbfuse.control.client import EndedError, ask, persist, place_of
from wbfuse.control.paths import ControlError, find_socket, last_words
from wbfuse.journal import VERSION
from wbfuse.session.mount import MountError, find_mount, unmount

_LAST_BREATH = 10.0
"""Seconds that a server may take to exit after it has said that it is done."""


def follow(title: str, answers: Iterator[dict[str, Any]]) -> None:
    """Show {"left": bytes} answers as a bar on a terminal; raises what the answers raise."""
    if not sys.stderr.isatty():
        for _ in answers:
            pass
        return
    from rich.console import Console  # imported here: it takes longer than the whole command elsewhere
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]} left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, left="?")
        most = 0
        for answer in answers:
            if "left" in answer:
                left = int(answer["left"])
                most = max(most, left)
                bar.update(task, total=most, completed=most - left, left=show_size(left))


def syncfs(path: str) -> None:
    """Have the kernel start to write back (on FUSE it does not wait for the end)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ctypes.CDLL(None, use_errno=True).syncfs(fd)
    finally:
        os.close(fd)


def _until_gone(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same answers; ends when the server's process has ended, so that nothing of the mount is left."""
    server = None
    try:
        for answer in answers:
            if "pid" in answer:
                with contextlib.suppress(ProcessLookupError):
                    server = os.pidfd_open(answer["pid"])
            yield answer
        if server is not None:
            select.select([server], [], [], _LAST_BREATH)
    finally:
        if server is not None:
            os.close(server)


@click.command()
@click.argument("mountpoint")
@click.option("--lazy", is_flag=True, help="Detach a busy mount now; it ends when its last file is closed.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Make everything durable, then unmount MOUNTPOINT. A mount whose server has died is removed."""
    path = place_of(mountpoint)
    socket = find_socket(path)
    found = find_mount(path)
    try:
        if found is None:
            raise click.UsageError(f"{path}: nothing is mounted here{last_words(path)}")
        if not found.fstype.startswith("fuse.wbfuse"):
            raise click.UsageError(f"{path}: a mount of {found.fstype}, not of wbfuse; use: umount {path}")
        try:
            if socket is None:
                raise ControlError("the mount's server is not running")
            follow(f"unmounting {path}", _until_gone(persist(socket, "umount", lazy=lazy)))
        except ControlError as e:
            if "not running" not in str(e):
                raise click.ClickException(_busy_hint(path, str(e))) from e
            unmount(path, lazy=True, dead=True)
            if socket is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(socket)
            click.echo(f"{path}: its server was gone; the dead mount is removed{last_words(path)}", err=True)
    except MountError as e:
        raise click.ClickException(str(e)) from e


def _busy_hint(path: str, text: str) -> str:
    if "busy" in text.lower():
        return f"{path}: in use; close its files (see: fuser -vm {path}) or detach it: wbfuse umount --lazy {path}"
    return f"{path}: {text}"


def _on_wbfuse(path: str) -> bool:
    while True:
        found = find_mount(path)
        if found is not None or path == "/":
            return found is not None and found.fstype.startswith("fuse.wbfuse")
        path = os.path.dirname(path)


@click.command()
@click.argument("mountpoint")
def restart(mountpoint: str) -> None:
    """Have MOUNTPOINT served by a new process, of the version that is installed now.

    The mount stays, open files stay open, and nothing that was written is lost; applications notice a short pause. A
    version that cannot go on with what this one has open says so before anything happens.
    """
    path = place_of(mountpoint)
    socket = find_socket(path)
    if socket is None:
        raise click.UsageError(f"{path}: no wbfuse mount is served here")
    try:
        with contextlib.suppress(EndedError):  # that is how it goes
            for _ in _until_gone(ask(socket, "restart", version=VERSION)):
                pass
        pid = next(ask(socket, "status"))["status"]["worker"]["pid"]  # waits for the next one
    except ControlError as e:
        raise click.ClickException(f"{path}: {e}") from e
    click.echo(f"{path}: served by process {pid} now")


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
def sync(paths: tuple[str, ...]) -> None:
    """Make each PATH durable in the store: a file or directory as fsync(2) does, a mount point the whole mount.

    sync(1) and syncfs(2) cannot do this: the kernel does not wait for FUSE file systems.
    """
    failed = False
    for path in paths:
        try:
            place = place_of(path)
            mounted = find_mount(place)
            socket = find_socket(place) if mounted is not None else None
            if socket is None and mounted is not None and mounted.fstype.startswith("fuse.wbfuse"):
                raise ControlError("only who mounted it can sync all of it, while its server runs")
            if socket is not None:
                syncfs(place)
                follow(f"syncing {place}", persist(socket, "sync"))
                continue
            if not _on_wbfuse(place):
                raise ControlError("not on a mount of wbfuse")
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except (OSError, ControlError) as e:
            click.echo(f"wbfuse: {path}: {e.strerror if isinstance(e, OSError) else e}", err=True)
            failed = True
    sys.exit(1 if failed else 0)
