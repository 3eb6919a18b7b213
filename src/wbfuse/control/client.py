"""The asking end of the control socket."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

from wbfuse.control.paths import ControlError


def ask(path: str, command: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Send a command to the mount behind the socket `path`; yields its answers until it closes.

    Raises ControlError where nobody answers, and where the answer is an error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(path)
        except (ConnectionRefusedError, FileNotFoundError) as e:
            raise ControlError("the mount's server is not running") from e
        except PermissionError as e:
            raise ControlError("this mount belongs to another user") from e
        with connection.makefile("rwb") as stream:
            stream.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            stream.flush()
            try:
                for line in stream:
                    answer = json.loads(line)
                    if "error" in answer:
                        raise ControlError(answer["error"])
                    yield answer
            except ConnectionResetError as e:
                raise ControlError("the mount's server ended while it answered") from e


def place_of(path: str) -> str:
    """An absolute path whose last component is not looked at, so that a dead mount there does no harm."""
    absolute = os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
