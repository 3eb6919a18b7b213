"""INIT as a pure function: what the kernel offers and what we wish for give what is agreed.

The rule: a capability is taken only where the file system honours it, so the wish list is an allow list.
"""

from __future__ import annotations

from dataclasses import dataclass

from wbfuse.wire import replies
from wbfuse.wire.constants import MAJOR, MINOR, OLDEST_MINOR, Cap
from wbfuse.wire.requests import Init, WireError

PAGE = 4096
MIB = 1 << 20
NO_CAPABILITY = Cap(0)


@dataclass(slots=True)
class Wishes:
    """What a file system would like. Sizes in bytes."""

    capabilities: Cap
    required: Cap = NO_CAPABILITY
    """Those without which the mount is refused."""
    max_write: int = MIB
    max_readahead: int = MIB
    max_background: int = 65535


@dataclass(slots=True)
class Agreement:
    """What holds for the life of the connection."""

    minor: int
    capabilities: Cap
    max_write: int
    max_readahead: int
    max_background: int

    def encode(self) -> bytes:
        """The INIT reply's body."""
        return replies.init_out(
            self.minor,
            self.max_readahead,
            self.capabilities,
            self.max_background,
            self.max_write,
            self.max_write // PAGE,
            self.max_background * 3 // 4,
        )

    @classmethod
    def decode(cls, body: bytes) -> Agreement:
        """What `encode` gave: how a server that comes after the one that negotiated knows what holds."""
        _, minor, readahead, low, background, _, max_write, _, _, _, high, *_ = replies.INIT_OUT.unpack(body)
        return cls(minor, Cap(high << 32 | low), max_write, readahead, background)


def negotiate(offer: Init, wishes: Wishes, max_pages_limit: int = 256) -> Agreement:
    """What to answer to `offer`.

    `max_pages_limit` is the kernel's ceiling on a request (fs.fuse.max_pages_limit, 256 before 6.13).
    Raises WireError where the kernel is too old or lacks a required capability.
    """
    if offer.major != MAJOR or offer.minor < OLDEST_MINOR:
        raise WireError(
            f"the kernel speaks FUSE {offer.major}.{offer.minor};"
            f" wbfuse needs {MAJOR}.{OLDEST_MINOR} (Linux 5.4) or newer"
        )
    offered = Cap(offer.capabilities)
    taken = offered & wishes.capabilities
    missing = wishes.required & ~taken
    if missing:
        raise WireError(f"the kernel does not offer {missing!r}")
    # MAX_PAGES carries max_write above 128 KiB; INIT_EXT is how the upper half of the flags is confirmed.
    pages = min(max_pages_limit, wishes.max_write // PAGE) if offered & Cap.MAX_PAGES else 32
    taken |= offered & (Cap.MAX_PAGES | Cap.BIG_WRITES | Cap.INIT_EXT)
    if not taken & Cap.INIT_EXT:
        taken &= Cap(0xFFFF_FFFF)
    return Agreement(
        minor=min(MINOR, offer.minor),
        capabilities=taken,
        max_write=pages * PAGE,
        max_readahead=min(offer.max_readahead, wishes.max_readahead),
        max_background=wishes.max_background,
    )
