"""The protocol as values: every request decodes, every reply has its size, no bytes raise anything but WireError."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wbfuse.wire import replies, text
from wbfuse.wire import requests as wire
from wbfuse.wire.constants import IN_HEADER, Notify, Opcode
from wbfuse.wire.types import Attr, Dirent, Entry, Lock, Opened, Statfs

NAME = st.binary(min_size=1, max_size=255).filter(lambda b: b"\0" not in b and b"/" not in b)


def header(opcode: int, body: bytes, unique: int = 7) -> memoryview:
    return memoryview(wire.HEADER.pack(IN_HEADER + len(body), opcode, unique, 1, 2, 3, 4, 0) + body)


def encode(op: wire.Op, fields: list[object]) -> bytes:
    """The inverse of decode_body, for the round trip: fixed part, names, rest."""
    fixed = len(struct.unpack(op.layout.format, bytes(op.layout.size)))
    out = op.layout.pack(*fields[:fixed])
    for name in fields[fixed : fixed + op.names]:
        assert isinstance(name, bytes)
        out += name + b"\0"
    if op.rest:
        out += bytes(fields[-1])  # type: ignore[call-overload]
    return out


SPECIAL = {Opcode.INIT, Opcode.BATCH_FORGET, Opcode.WRITE, Opcode.SETXATTR, Opcode.NOTIFY_REPLY}
PLAIN = [op for op in wire.OPS.values() if op.opcode not in SPECIAL]


@pytest.mark.parametrize("op", PLAIN, ids=lambda op: op.opcode.name)
@given(data=st.data())
def test_request_round_trip(op: wire.Op, data: st.DataObject) -> None:
    limits = {"I": 32, "Q": 64}
    letters = [c for c in op.layout.format.lstrip("<") if c in limits or c == "x" or c.isdigit()]
    widths = [limits[c] for c in letters if c in limits]
    fields: list[object] = [data.draw(st.integers(0, (1 << w) - 1)) for w in widths]
    fields += [data.draw(NAME) for _ in range(op.names)]
    if op.rest:
        fields.append(data.draw(st.binary(max_size=64)))
    head, value = wire.decode(header(op.opcode, encode(op, fields)))
    assert head.opcode == op.opcode
    assert type(value) is op.request
    got = [getattr(value, f.name) for f in dataclasses.fields(value)]  # type: ignore[arg-type]
    shown = [bytes(v) if isinstance(v, memoryview) else v for v in got]
    assert shown[: len(fields)] == fields


@given(payload=st.binary(max_size=200), offset=st.integers(0, 1 << 62))
def test_write_payload_is_cut_to_its_size(payload: bytes, offset: int) -> None:
    body = wire.WRITE_IN.pack(9, offset, len(payload), 1, 0, 2) + payload
    _, value = wire.decode(header(Opcode.WRITE, body))
    assert isinstance(value, wire.Write)
    assert (value.fh, value.offset, bytes(value.data)) == (9, offset, payload)
    with pytest.raises(wire.WireError, match="payload"):
        wire.decode(header(Opcode.WRITE, wire.WRITE_IN.pack(9, 0, len(payload) + 1, 1, 0, 2) + payload))


@given(pairs=st.lists(st.tuples(st.integers(0, 1 << 63), st.integers(0, 1 << 63)), max_size=5))
def test_batch_forget_holds_its_pairs(pairs: list[tuple[int, int]]) -> None:
    body = struct.pack("<II", len(pairs), 0) + b"".join(struct.pack("<QQ", *p) for p in pairs)
    _, value = wire.decode(header(Opcode.BATCH_FORGET, body))
    assert isinstance(value, wire.BatchForget)
    assert value.forgets == pairs


def test_init_of_old_and_new_kernels() -> None:
    _, old = wire.decode(header(Opcode.INIT, struct.pack("<IIII", 7, 31, 4096, 1 << 16)))
    assert isinstance(old, wire.Init)
    assert old.capabilities == 1 << 16
    _, new = wire.decode(header(Opcode.INIT, struct.pack("<IIIII44x", 7, 45, 4096, 1 << 30, 1 << 7)))
    assert isinstance(new, wire.Init)
    assert new.capabilities == 1 << 39 | 1 << 30


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_raise_wire_error(raw: bytes) -> None:
    try:
        _, value = wire.decode(memoryview(raw))
    except wire.WireError:
        return
    assert value is not None


@given(opcode=st.sampled_from(sorted(wire.OPS)), body=st.binary(max_size=300), extensions=st.integers(0, 65535))
def test_any_body_decodes_or_raises_wire_error(opcode: int, body: bytes, extensions: int) -> None:
    raw = wire.HEADER.pack(IN_HEADER + len(body), opcode, 1, 1, 0, 0, 0, extensions) + body
    try:
        head, value = wire.decode(memoryview(raw))
    except wire.WireError:
        return
    assert text.request_line(head, value).startswith("> 1 ")


ATTR = Attr(ino=5, mode=0o100644, size=1 << 40, mtime_ns=1_500_000_000_123_456_789, atime_ns=-1)


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (replies.attr(ATTR), 88),
        (replies.attr_out(ATTR, 1.5), 104),
        (replies.entry_out(Entry(3, ATTR)), 128),
        (replies.open_out(Opened(1)), 16),
        (replies.create_out(Entry(3, ATTR), Opened(1)), 144),
        (replies.size_out(3), 8),
        (replies.u64_out(3), 8),
        (replies.statfs_out(Statfs(1, 2, 3, 4, 5)), 80),
        (replies.lock_out(Lock(0, 1, 2, 3)), 24),
        (replies.ioctl_out(0, b"abc"), 19),
        (replies.dirent(Dirent(b"name", 1, 8, 1)), 32),
        (replies.direntplus(Dirent(b"12345678", 1, 8, 1), Entry(3, ATTR)), 160),
        (replies.statx_out(ATTR, 1.0), 288),
        (replies.init_out(45, 4096, 1 << 39 | 1, 12, 1 << 20, 256, 9), 64),
    ],
)
def test_reply_sizes_are_those_of_the_header(body: bytes, size: int) -> None:
    assert len(body) == size


def test_attr_fields_stand_where_the_kernel_reads_them() -> None:
    raw = replies.attr(ATTR)
    ino, size = struct.unpack_from("<QQ", raw)
    mtime, mtimensec, atimensec = (
        struct.unpack_from("<Q", raw, 32) + struct.unpack_from("<I", raw, 52) + struct.unpack_from("<I", raw, 48)
    )
    assert (ino, size, mtime, mtimensec) == (5, 1 << 40, 1_500_000_000, 123_456_789)
    assert struct.unpack_from("<q", raw, 24)[0] == -1
    assert atimensec == 999_999_999


@pytest.mark.parametrize(
    ("message", "code", "size"),
    [
        (replies.notify_inval_inode(1, 0, 0), Notify.INVAL_INODE, 24),
        (replies.notify_inval_entry(1, b"ab"), Notify.INVAL_ENTRY, 19),
        (replies.notify_delete(1, 2, b"ab"), Notify.DELETE, 27),
        (replies.notify_store(1, 0, b"abc"), Notify.STORE, 27),
        (replies.notify_retrieve(1, 2, 3, 4), Notify.RETRIEVE, 32),
        (replies.notify_poll(4), Notify.POLL, 8),
        (replies.notify_resend(), Notify.RESEND, 0),
        (replies.notify_inc_epoch(), Notify.INC_EPOCH, 0),
        (replies.notify_prune([1, 2]), Notify.PRUNE, 32),
    ],
)
def test_notifications_carry_code_and_no_unique(message: list[bytes], code: int, size: int) -> None:
    length, error, unique = replies.OUT.unpack(message[0])
    assert (length, error, unique) == (16 + size, code, 0)
    assert sum(map(len, message)) == length
