"""The pure core of volumes: frames, extents, overlays and packs, against byte strings."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wbfuse.store.contract import Piece, Round
from wbfuse.store.volume.layout import FRAME, Extent, Frame, cut, decode_frames, hole, overlay, without_gaps
from wbfuse.store.volume.packer import COMPRESS, CorruptFrameError, frames_of, open_frame, pack_rounds, whole

SPACE = 6 * FRAME
GRAIN = 4096 - 7
"""Offsets are multiples of this, so that nothing is aligned."""

spans = st.tuples(st.integers(0, SPACE // GRAIN - 1), st.integers(1, 40)).map(
    lambda t: (t[0] * GRAIN, min(SPACE, (t[0] + t[1]) * GRAIN))
)
changes = st.lists(st.tuples(spans, st.booleans()), min_size=1, max_size=6)


def pieces_of(change: list[tuple[tuple[int, int], bool]], seed: int) -> tuple[list[Piece], bytearray, bytearray]:
    """Sorted pieces without overlaps, and what they write as bytes and mask over SPACE."""
    data, mask = bytearray(SPACE), bytearray(SPACE)
    for (start, end), zero in change:
        fill = bytes(end - start) if zero else os.urandom(1) * (end - start)
        data[start:end] = fill
        mask[start:end] = b"\1" * (end - start)
    pieces: list[Piece] = []
    at = 0
    while (start := mask.find(1, at)) >= 0:
        at = mask.find(0, start)
        at = SPACE if at < 0 else at
        middle = start + (at - start) // (2 + seed % 3)
        buffers = [memoryview(bytes(data[a:b])) for a, b in ((start, middle), (middle, at)) if a < b]
        pieces.append(Piece(start, at - start, buffers))
    return pieces, data, mask


def read(rows: list[Extent], packs: dict[int, bytes], compression: str) -> bytes:
    """The file as its map says, every frame verified."""
    out = bytearray()
    for start, end, row in without_gaps(rows, 0, SPACE):
        if row is None or row.pack == 0:
            out += bytes(end - start)
            continue
        at, raw = row.offset, b""
        for frame in decode_frames(row.frames):
            raw += open_frame(memoryview(packs[row.pack])[at : at + frame.stored], frame, compression)
            at += frame.stored
        assert len(raw) >= row.skip + row.length
        out += raw[row.skip : row.skip + row.length]
    return bytes(out)


@given(
    st.lists(changes, min_size=1, max_size=5),
    st.sampled_from(list(COMPRESS)),
    st.sampled_from([FRAME, 3 * FRAME]),
    st.booleans(),
)
def test_overlays_read_back_as_written(
    history: list[list[tuple[tuple[int, int], bool]]], compression: str, pack_size: int, keep_holes: bool
) -> None:
    rows: dict[int, Extent] = {}
    packs: dict[int, bytes] = {}
    live: dict[int, int] = {}
    model = bytearray(SPACE)
    for n, change in enumerate(history):
        pieces, data, mask = pieces_of(change, n)
        model = bytearray(d if m else old for old, d, m in zip(model, data, mask, strict=True))
        round_ = Round(1, None, pieces, SPACE)
        new: list[Extent] = []
        for pack in pack_rounds([round_], pack_size, COMPRESS[compression]):
            assert pack.size <= pack_size
            assert pack.size == sum(map(len, pack.buffers))
            packs[len(packs) + 1] = b"".join(pack.buffers)
            new += [e._replace(pack=len(packs)) for _, e in pack.extents]
        gone, come, delta = overlay(sorted(rows.values()), whole(round_, new), keep_holes)
        for start in gone:
            del rows[start]
        for row in come:
            assert row.start not in rows
            rows[row.start] = row
        for pack_id, change_by in delta.items():
            live[pack_id] = live.get(pack_id, 0) + change_by
    ordered = sorted(rows.values())
    assert all(a.end <= b.start for a, b in itertools.pairwise(ordered))
    assert read(ordered, packs, compression) == bytes(model)
    used = {p: sum(r.length for r in ordered if r.pack == p) for p in packs}
    assert {p: n for p, n in live.items() if n} == {p: n for p, n in used.items() if n}


@given(st.integers(0, SPACE - 2), st.integers(1, SPACE), st.integers(0, 3 * FRAME), st.integers(1, 3 * FRAME))
def test_a_cut_keeps_no_frame_too_many(at: int, length: int, start: int, size: int) -> None:
    raw = os.urandom(3 * FRAME)
    (pack,) = pack_rounds([Round(1, None, [Piece(FRAME - 100, len(raw), [memoryview(raw)])])], 1 << 30, None)
    extent = pack.extents[0][1]._replace(pack=1)
    low, high = FRAME - 100 + start, FRAME - 100 + start + size
    if low >= extent.end or high <= extent.start:
        return
    part = cut(extent, low, high)
    frames = list(decode_frames(part.frames))
    assert (part.start, part.end) == (max(low, extent.start), min(high, extent.end))
    held = sum(f.raw for f in frames)
    assert held >= part.skip + part.length
    assert part.skip < frames[0].raw
    assert held - frames[-1].raw < part.skip + part.length
    body = b"".join(pack.buffers)[part.offset :]
    assert body[part.skip : part.skip + part.length] == raw[part.start - FRAME + 100 : part.end - FRAME + 100]


def test_frames_that_reach_over_pieces_are_not_taken_for_holes() -> None:
    data = os.urandom(300)
    pieces = [Piece(at, 100, [memoryview(data)[at : at + 100]]) for at in (0, 100, 200)]
    round_ = Round(1, None, [*pieces, Piece(400, 50, None)])
    (pack,) = pack_rounds([round_], 1 << 20, None)
    found = whole(round_, [e for _, e in pack.extents])
    assert [(e.start, e.end, e.pack) for e in found] == [(0, 300, -1), (400, 450, 0)]


def test_a_changed_byte_is_told() -> None:
    data = os.urandom(FRAME)
    for compression in COMPRESS:
        text = data[:100] * 600
        (pack,) = pack_rounds(
            [Round(1, None, [Piece(0, len(text), [memoryview(text)])])], 1 << 20, COMPRESS[compression]
        )
        frame = next(decode_frames(pack.extents[0][1].frames))
        stored = bytearray(b"".join(pack.buffers))
        assert open_frame(memoryview(stored), frame, compression) == text
        assert (frame.stored < frame.raw) == (compression != "none")
        stored[len(stored) // 2] ^= 1
        with pytest.raises(CorruptFrameError):
            open_frame(memoryview(stored), frame, compression)


def test_frames_end_at_multiples_of_their_size() -> None:
    views = [memoryview(bytes(1000)), memoryview(bytes(3 * FRAME))]
    cuts = [(start, sum(map(len, parts))) for start, parts in frames_of(Piece(FRAME - 500, 1000 + 3 * FRAME, views))]
    assert cuts == [(FRAME - 500, 500), (FRAME, FRAME), (2 * FRAME, FRAME), (3 * FRAME, FRAME), (4 * FRAME, 500)]


def test_holes_over_a_base_are_cut_to_the_longest_extent() -> None:
    _, come, _ = overlay([], [hole(0, 100 << 20)], keep_holes=True)
    assert sum(e.length for e in come) == 100 << 20
    assert max(e.length for e in come) == 16 << 20


def test_what_is_no_list_of_frames_is_refused() -> None:
    assert list(decode_frames(b"")) == []
    with pytest.raises(ValueError, match="no list"):
        decode_frames(b"123")
    assert list(decode_frames(bytes(16))) == [Frame(0, 0, 0)]
