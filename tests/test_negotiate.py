"""INIT as a function: what is agreed is what was offered and wished, no more."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wbfuse.wire.constants import Cap
from wbfuse.wire.negotiate import Agreement, Wishes, negotiate
from wbfuse.wire.requests import Init, WireError

ALL = (1 << 43) - 1


def offer(flags: int, minor: int = 45) -> Init:
    return Init(7, minor, 1 << 17, flags & 0xFFFF_FFFF, flags >> 32)


@given(offered=st.integers(0, ALL), wished=st.integers(0, ALL))
def test_nothing_is_taken_that_was_not_offered_or_not_wished(offered: int, wished: int) -> None:
    agreed = negotiate(offer(offered), Wishes(Cap(wished)))
    always = Cap.MAX_PAGES | Cap.BIG_WRITES | Cap.INIT_EXT
    assert not agreed.capabilities & ~Cap(offered)
    assert not agreed.capabilities & ~(Cap(wished) | always)
    if not offered & Cap.INIT_EXT:
        assert agreed.capabilities < 1 << 32


@given(offered=st.integers(0, ALL), wished=st.integers(0, ALL), minor=st.integers(31, 60))
def test_an_agreement_is_known_from_its_reply(offered: int, wished: int, minor: int) -> None:
    agreed = negotiate(offer(offered, minor), Wishes(Cap(wished)))
    assert Agreement.decode(agreed.encode()) == agreed


def test_writeback_is_taken_only_where_it_is_wished() -> None:
    assert not negotiate(offer(ALL), Wishes(Cap.ASYNC_READ)).capabilities & Cap.WRITEBACK_CACHE
    assert negotiate(offer(ALL), Wishes(Cap.WRITEBACK_CACHE)).capabilities & Cap.WRITEBACK_CACHE


def test_requests_are_small_without_max_pages() -> None:
    assert negotiate(offer(ALL & ~int(Cap.MAX_PAGES)), Wishes(Cap(0))).max_write == 128 << 10
    assert negotiate(offer(ALL), Wishes(Cap(0)), max_pages_limit=256).max_write == 1 << 20


@pytest.mark.parametrize("minor", [0, 30])
def test_old_kernels_are_refused_with_the_version_that_is_needed(minor: int) -> None:
    with pytest.raises(WireError, match=r"needs 7\.31"):
        negotiate(offer(ALL, minor), Wishes(Cap(0)))


def test_a_required_capability_that_is_missing_refuses_the_mount() -> None:
    with pytest.raises(WireError, match="does not offer"):
        negotiate(offer(0), Wishes(Cap.WRITEBACK_CACHE, required=Cap.WRITEBACK_CACHE))


def test_the_answer_says_what_was_agreed() -> None:
    raw = negotiate(offer(ALL, 40), Wishes(Cap.HAS_RESEND | Cap.ASYNC_READ)).encode()
    major, minor, _, flags = struct.unpack_from("<IIII", raw)
    assert (major, minor) == (7, 40)
    assert flags & Cap.ASYNC_READ
    assert struct.unpack_from("<I", raw, 32)[0] == Cap.HAS_RESEND >> 32
    assert struct.unpack_from("<HHIIH", raw, 16) == (65535, 49151, 1 << 20, 1, 256)
