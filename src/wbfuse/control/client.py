"""The asking end of the control socket."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

from wbfuse.control.paths import ControlError

_PATIENCE = 10
"""Workers that may die over one command."""


class EndedError(ControlError):
    def __init__(self) -> None:
        super().__init__("the mount's server ended while it answered")


def ask(path: str, command: str, patience: float | None = None, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Send a command to the mount behind the socket `path`; yields its answers until it closes.

    Raises ControlError where nobody answers (within `patience` seconds, where given), and where the answer is an error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience)
        try:
            connection.connect(path)
        except (ConnectionRefusedError, FileNotFoundError) as e:
            raise ControlError("the mount's server is not running") from e
        except PermissionError as e:
            raise ControlError("this mount belongs to another user") from e
        with connection.makefile("rwb") as stream:
            stream.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            stream.flush()
            done = False
            try:
                for line in stream:
                    answer = json.loads(line)
                    if "error" in answer:
                        raise ControlError(answer["error"])
                    done = bool(answer.get("done"))
                    yield answer
            except ConnectionResetError as e:
                raise EndedError from e
            except TimeoutError as e:
                raise ControlError("the mount's server does not answer now") from e
            if not done:
                raise EndedError


def persist(path: str, command: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """`ask`, for a command that may be given twice: again where the worker died over it and another follows."""
    for last in (*[False] * _PATIENCE, True):
        try:
            yield from ask(path, command, **arguments)
            return
        except EndedError:
            if last:
                raise


def place_of(path: str) -> str:
    """An absolute path whose last component is not looked at, so that a dead mount there does no harm."""
    absolute = os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
