"""One line of text for a request and for a reply: what `--debug-wire` prints and what an error log names."""

from __future__ import annotations

import dataclasses
import errno

from wbfuse.wire.constants import Opcode
from wbfuse.wire.requests import Header

_LONG = 64


def _show(value: object) -> str:
    if isinstance(value, (bytes, memoryview)):
        raw = bytes(value[:_LONG])
        return f"{raw!r}" if len(value) <= _LONG else f"{raw!r}...({len(value)} bytes)"
    return str(value)


def opcode_name(opcode: int) -> str:
    try:
        return Opcode(opcode).name
    except ValueError:
        return f"OPCODE_{opcode}"


def request_line(header: Header, body: object) -> str:
    fields = ""
    if dataclasses.is_dataclass(body):
        fields = " ".join(f"{f.name}={_show(getattr(body, f.name))}" for f in dataclasses.fields(body))
    who = f"uid={header.uid} gid={header.gid} pid={header.pid}"
    return f"> {header.unique} {opcode_name(header.opcode)} node={header.nodeid} {fields} {who}".replace("  ", " ")


def reply_line(unique: int, error: int, length: int) -> str:
    """`error` is 0 or a positive errno; `length` counts the body."""
    if error:
        return f"< {unique} {errno.errorcode.get(error, str(error))}"
    return f"< {unique} ok {length} bytes"
