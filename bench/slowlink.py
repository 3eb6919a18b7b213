"""A slow link: a TCP proxy with a rate and a delay for each direction, shared by all its connections.

    python -m bench.slowlink LISTEN TARGET MBIT DELAY_MS

LISTEN is a port on 127.0.0.1 or ADDRESS:PORT, TARGET a port on 127.0.0.1. What a connection may have on the
way is bounded, so that one large upload does not hold up the small requests of others more than a real router would.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque

_CHUNK = 32 << 10
_QUEUED = 128 << 10


class Direction:
    """One way of the link: when it is free again."""

    def __init__(self, rate: float, delay: float) -> None:
        self.rate, self.delay = rate, delay
        self.free_at = 0.0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Move bytes until the end, each chunk when the link has carried it, and `delay` later."""
        loop = asyncio.get_running_loop()
        flying: deque[tuple[float, bytes]] = deque()
        more, landed = asyncio.Event(), asyncio.Event()
        ended = False

        async def land() -> None:
            while flying or not ended:
                if not flying:
                    more.clear()
                    await more.wait()
                    continue
                due, data = flying[0]
                wait = due - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                flying.popleft()
                landed.set()
                writer.write(data)
                await writer.drain()
            with contextlib.suppress(OSError):
                writer.write_eof()

        landing = asyncio.create_task(land())
        try:
            while data := await reader.read(_CHUNK):
                now = loop.time()
                self.free_at = max(now, self.free_at) + len(data) / self.rate
                flying.append((self.free_at + self.delay, data))
                more.set()
                # What waits for the link, not what is on it, is held back.
                if self.free_at - now > _QUEUED / self.rate:
                    await asyncio.sleep(self.free_at - now - _QUEUED / self.rate)
        finally:
            ended = True
            more.set()
            await landing


async def serve(listen: str, target: int, rate: float, delay: float) -> None:
    out, back = Direction(rate, delay), Direction(rate, delay)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back_there = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(out.carry(reader, back_there), back.carry(there, writer))
        except OSError:
            return  # an end went away
        finally:
            writer.close()
            back_there.close()

    address, _, port = listen.rpartition(":")
    server = await asyncio.start_server(connected, address or "127.0.0.1", int(port), limit=_CHUNK)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    listen, target, mbit, delay = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(listen, int(target), float(mbit) * 125_000, float(delay) / 1000))
