"""`wbfuse status`: what running mounts say of themselves."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import click

from wbfuse.cli.units import show_size
from wbfuse.control.client import ask, place_of
from wbfuse.control.paths import ControlError, find_socket, last_words, sockets

_PATIENCE = 10.0
"""Seconds for each of all mounts: one whose worker is on its way must not keep the others from being shown."""


def ask_status(socket: str, patience: float | None = None) -> dict[str, Any]:
    """What a mount says of itself, within `patience` seconds. Raises ControlError."""
    for answer in ask(socket, "status", patience):
        if "status" in answer:
            found: dict[str, Any] = answer["status"]
            return found
    raise ControlError("the mount's server ended before it answered")


@click.command()
@click.argument("mountpoint", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for one mount, a list for all.")
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show the state of the mount on MOUNTPOINT, or of all that you may ask."""
    if mountpoint is None:
        found = []
        for path in sockets():
            try:
                found.append(ask_status(path, _PATIENCE))
            except ControlError as e:
                if "not running" not in str(e):
                    click.echo(f"wbfuse: {path}: {e}", err=True)
                    continue
                with contextlib.suppress(OSError):
                    os.unlink(path)  # of a server that died
        if as_json:
            click.echo(json.dumps(found, indent=2))
            return
        if not found:
            click.echo("no wbfuse mounts")
        for one in found:
            _show(one)
        return
    place = place_of(mountpoint)
    socket = find_socket(place)
    try:
        if socket is None:
            raise ControlError("no wbfuse mount of yours answers here")
        one = ask_status(socket)
    except ControlError as e:
        raise click.UsageError(f"{place}: {e}{last_words(place)}") from e
    if as_json:
        click.echo(json.dumps(one, indent=2))
    else:
        _show(one)


def _on_disk(disk: dict[str, Any] | None) -> dict[str, str]:
    if disk is None:
        return {}
    state = f"cannot be written: {disk['error']}" if disk["error"] else f"{disk['behind']} changes behind"
    return {"log on disk": f"{disk['path']}, fsync waits for the {disk['fsync']}; {state}"}


def _waiting(renames: int) -> str:
    return f"; {renames} rename{'s wait' if renames > 1 else ' waits'} for them" if renames else ""


def _show(one: dict[str, Any]) -> None:
    from rich.console import Console  # imported here: `--json` must be quick
    from rich.table import Table

    table = Table(title=f"{one['source']} on {one['mountpoint']}", show_header=False, title_justify="left")
    negotiated, log, store = one["negotiated"], one["log"], one["store"]
    rows = {
        "policy": f"{one['policy']}, kernel cache {one['kernel_cache']}, on close {one['on_close']}"
        + (", shared (a lease for each file that is written)" if one.get("shared") else ""),
        "kernel": f"FUSE {negotiated.get('protocol')}, requests up to {show_size(negotiated.get('max_write', 0))}, "
        + " ".join(negotiated.get("capabilities", [])),
        "not in the store": f"{show_size(one['dirty_bytes'] + one['writeback_bytes'])} in"
        f" {one.get('dirty_files', 0)} files" + _waiting(one.get("renames", 0)),
        "of it on the way": show_size(one["writeback_bytes"]),
        "log": f"{show_size(log['used'])} of {show_size(log['size'])}, writers wait at {show_size(log['limit'])}"
        if log
        else "none",
        **_on_disk(log.get("disk")),
        "store": f"{show_size(store['bytes_written'])} in {store['writes']} writes",
        "requests": ", ".join(f"{name} {n}" for name, n in sorted(one["requests"].items(), key=lambda x: -x[1])),
        "worker": f"pid {one['worker']['pid']}"
        + (f"; {one['worker']['deaths']} died in the last minute" if one["worker"].get("deaths") else "")
        + f"; keeper {one['keeper']['pid']}",
        "last error": one["last_error"] or "none",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table)
