"""One FUSE connection: reader threads receive, decode, and answer or hand on; anybody may reply.

Rules:
- A reply is one writev. Each request is answered exactly once: directly by the thread that serves it, or, once
  parked, by whoever takes it out of `_parked` first.
- With one reader, what may block goes to the pool. With several (write-through), a reader may serve a blocking
  request itself while it holds one of `readers - 1` permits, so one reader at least is always reading; this saves
  the hand-over to another thread, which costs more than a 4 KiB request.
- What the reader does not answer itself is `_held` until it is answered. After NOTIFY_RESEND the kernel sends every
  unanswered request again with bit 63 of `unique` set: one that is held only learns its new unique, a reply that came
  between is kept in `_late` and sent then, and the rest are served. So each is done once.
- ENODEV and ECONNABORTED from the device are the normal end.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import mmap
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Any

from wbfuse.filesystem.api import PARKED, FileSystem, Lent, Parked, Request, WouldBlock, error_number, overrides
from wbfuse.filesystem.dispatch import Route, routes, wishes_of
from wbfuse.session.mount import max_pages_limit
from wbfuse.session.notifier import Notifier
from wbfuse.session.pool import Pool
from wbfuse.wire import replies, text
from wbfuse.wire import requests as wire
from wbfuse.wire.constants import IN_HEADER, UNIQUE_RESEND, WRITE_PREFIX, Cap, Opcode
from wbfuse.wire.negotiate import Agreement, Wishes, negotiate

log = logging.getLogger(__name__)

HELPERS = 32
_LATE, _LATE_LONGEST = 4096, 1024
"""Replies that found no request, kept in case it is sent again. Most are of requests that a signal ended."""
# Plain numbers: comparing with a member of an IntEnum costs a fifth of a microsecond, for each request.
_READ, _WRITE = int(Opcode.READ), int(Opcode.WRITE)
_CLONE = 0x8004E500
"""FUSE_DEV_IOC_CLONE."""
_GONE = (errno.ENODEV, errno.ECONNABORTED)
_AGAIN = (errno.EINTR, errno.EAGAIN, errno.ENOENT)
_unpack_header = wire.HEADER.unpack_from
_unpack_io = wire.READ_IN.unpack_from
_WRITE_REPLY = Struct("<IiQI4x")
_OUT = replies.OUT


class _Way:
    """The way back of one opcode's requests: how its value becomes bytes."""

    __slots__ = ("encode", "raw", "session")

    def __init__(self, session: Session, encode: Callable[[Any], bytes], raw: bool = False) -> None:
        self.session = session
        self.encode = encode
        self.raw = raw

    def park(self, request: Request) -> Parked:
        key = request.unique & ~UNIQUE_RESEND
        self.session.hold(key, request)
        self.session.parked[key] = request
        return PARKED

    def complete(self, request: Request, value: object, error: int) -> None:
        if self.session.parked.pop(request.unique & ~UNIQUE_RESEND, None) is None:
            return  # somebody else (an interrupt, most likely) was first
        if error:
            self.session.send_error(request, error)
        elif self.raw:
            self.session.send_data(request, value)
        else:
            self.session.send_value(request, self.encode, value)


class Session:
    """Serve `fs` over the connection `fd` (owned from now on). `start`, then `wait`.

    `debug` is called with one line a request and reply. `lifeline`, where another process keeps the connection: the end
    to write of a pipe that it holds, and each server that follows; the other end hangs up when nobody is left.
    Callers of `wait` get control back when the kernel has ended the connection (unmount) and every handler has
    returned.
    """

    def __init__(
        self, fd: int, fs: FileSystem, debug: Callable[[str], None] | None = None, lifeline: int | None = None
    ) -> None:
        self.fd = fd
        self._lifeline = lifeline
        self._io = fd
        """Where requests are read and answered: the connection, or a clone of it."""
        self.fs = fs
        self.debug = debug
        self.parked: dict[int, Request] = {}
        """By unique (without its resend bit). dict.pop is the one arbiter of who answers."""
        self._held: dict[int, Request] = {}
        self._late: OrderedDict[int, bytes] = OrderedDict()
        self._resend_lock = threading.Lock()
        """Guards `_held` against `_late` where a reply meets a resend; nothing else is held with it."""
        self.agreement: Agreement | None = None
        self.on_defect: Callable[[], None] | None = None
        """Called, from a reader, when it cannot go on; by default the connection ends."""
        self.failure: str | None = None
        """Why the connection could not be negotiated."""
        self.ready = threading.Event()
        """Set when INIT is answered, or has failed, or the session has ended."""
        self.ended = threading.Event()
        self.notifier = Notifier(fd, lifeline)
        fs.notify = self.notifier.send
        self.pool = Pool(HELPERS, "helper")
        self._read_pool = Pool(HELPERS, "read-helper")
        """READs have threads of their own: any number of slow ones leave names quick."""
        self._routes: dict[int, Route] = routes(fs)
        self._ways = {code: _Way(self, r.encode, code == Opcode.READ) for code, r in self._routes.items()}
        self._read_inline = "read" in fs.inline
        self._write_inline = "write" in fs.inline
        self._permits: list[None] = [None] * (fs.readers - 1)
        self._counts: list[list[int]] = []
        self._threads: list[threading.Thread] = []
        self._answers: deque[int] = deque(maxlen=1000)
        """Nanoseconds that the reader took for its last answers, READs and WRITEs apart."""

    # life

    def start(self, agreement: Agreement | None = None) -> None:
        """Start the first reader; the others follow once INIT has been answered.

        With `agreement` it was answered, by a server that died: what that one left unanswered is asked for again.
        """
        sys.setswitchinterval(50e-6)  # the default of 5 ms lets one busy thread starve the reader
        if agreement is not None:
            self.agreement = agreement
            self.fs.init(agreement)
            if agreement.capabilities & Cap.HAS_RESEND:
                # Before anything is read: what is unanswered now is all of the server that died.
                self._send(tuple(replies.notify_resend()))
            self._read_apart()
        self._start_reader()
        if agreement is not None:
            self._settle()
            self.ready.set()
        threading.Thread(target=self._finish, name="session-end", daemon=True).start()

    def wait(self) -> None:
        self.ended.wait()

    def quiet(self, seconds: float) -> bool:
        """Wait at most so long for a moment in which every request that was read is answered. Whether it came."""
        until = time.monotonic() + seconds
        while self._held and time.monotonic() < until:
            time.sleep(0.01)  # nobody counts, so nobody can tell
        return not self._held

    def requests(self) -> dict[str, int]:
        """Requests received so far, by opcode name."""
        totals = [sum(column) for column in zip(*self._counts, strict=True)]
        return {text.opcode_name(code): n for code, n in enumerate(totals) if n}

    def answers(self) -> dict[str, float]:
        """Microseconds the reader took for its last thousand answers, READ and WRITE apart."""
        times = sorted(self._answers) or [0]
        return {f"p{share}_us": times[len(times) * share // 100] / 1000 for share in (50, 99)}

    def _start_reader(self) -> None:
        counts = [0] * 64
        self._counts.append(counts)
        thread = threading.Thread(target=self._guard_reader, args=(counts,), name="reader", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guard_reader(self, counts: list[int]) -> None:
        try:
            self._read_loop(counts)
        except Exception:  # a reader must not die unseen: the mount would hang
            log.exception("the reader failed; the connection ends")
            if self.on_defect is not None:
                self.on_defect()
            self.failure = self.failure or "the reader failed, see the log"
        finally:
            if not self.ready.is_set():
                self.failure = self.failure or "the connection ended before it was negotiated"
                self.ready.set()

    def _finish(self) -> None:
        for thread in self._threads:  # grows while INIT is served, which is before the first thread ends
            thread.join()
        self.pool.close()
        self._read_pool.close()
        self.notifier.close()
        try:
            self.fs.destroy()
        except Exception:
            log.exception("destroy failed")
        if self._io != self.fd:
            os.close(self._io)
        os.close(self.fd)
        self.ended.set()

    # receiving

    def _read_loop(self, counts: list[int]) -> None:
        readv, fs = os.readv, self.fs
        receive_target = fs.receive_target if overrides(fs, "receive_target") else None
        write_way, read_way, no_way = self._ways[_WRITE], self._ways[_READ], _Way(self, bytes)
        prefix = bytearray(WRITE_PREFIX)
        own = memoryview(mmap.mmap(-1, max(fs.max_write, 1 << 17)))
        own[:: mmap.PAGESIZE] = bytes(len(own) // mmap.PAGESIZE)  # resident: a kill in mid-copy must not fail a WRITE
        while True:
            tail = own if receive_target is None else receive_target() or own
            try:
                n = readv(self._io, (prefix, tail))  # cut so that a payload begins where `tail` begins
            except OSError as e:
                if e.errno in _GONE:
                    return
                if e.errno in _AGAIN:
                    continue
                raise
            if n == 0:
                return  # a connection that is no device says its end like this
            length, opcode, unique, nodeid, uid, gid, pid, extensions = _unpack_header(prefix)
            if length != n or n < IN_HEADER:
                log.error("a request of %d bytes says that it has %d; dropped", n, length)
                continue
            counts[opcode & 63] += 1
            if unique & UNIQUE_RESEND and self._known_already(unique):
                continue
            if self.debug is not None:
                self._trace(prefix, tail, n)
            if opcode == _WRITE and n >= WRITE_PREFIX:
                self._write(Request(unique, nodeid, uid, gid, pid, write_way), prefix, tail[: n - WRITE_PREFIX])
            elif opcode == _READ and n >= WRITE_PREFIX:
                self._read(Request(unique, nodeid, uid, gid, pid, read_way), _unpack_io(prefix, IN_HEADER))
            else:
                body = prefix[IN_HEADER:n] if n <= WRITE_PREFIX else prefix[IN_HEADER:] + tail[: n - WRITE_PREFIX]
                self._other(
                    opcode, Request(unique, nodeid, uid, gid, pid, self._ways.get(opcode, no_way)), body, extensions
                )

    def _write(self, request: Request, prefix: bytearray, tail: memoryview) -> None:
        fh, offset, size, write_flags, _owner, flags = _unpack_io(prefix, IN_HEADER)
        if size != len(tail):
            log.error("a WRITE of %d bytes has %d; refused", size, len(tail))
            self.send_error(request, errno.EIO)
            return
        if self._write_inline:
            self._serve_write(request, fh, offset, tail, write_flags, flags)
            return
        request.blocking = True
        if self._permits and self._take_permit():
            self._serve_write(request, fh, offset, tail, write_flags, flags, True)
        else:
            self._copy_write(request, fh, offset, tail, write_flags, flags)

    def _copy_write(
        self, request: Request, fh: int, offset: int, data: memoryview, write_flags: int, flags: int
    ) -> None:
        """To the pool, with a copy: the receive buffer is needed for the next request."""
        copy = memoryview(bytes(data))
        job = partial(self._serve_write, request, fh, offset, copy, write_flags, flags)
        self._hand_over(request, job, self.pool)

    def _serve_write(
        self,
        request: Request,
        fh: int,
        offset: int,
        data: memoryview,
        write_flags: int,
        flags: int,
        permitted: bool = False,
    ) -> None:
        try:
            try:
                done = self.fs.write(request, fh, offset, data, write_flags, flags)
            finally:
                if permitted:  # before the reply: the next WRITE comes at once, and wants the permit
                    self._permits.append(None)
        except WouldBlock:
            request.blocking = True
            self._copy_write(request, fh, offset, data, write_flags, flags)
        except Exception as e:  # noqa: BLE001 - `_failed` logs what is not an answer; the mount must live on
            self._failed(request, Opcode.WRITE, e)
        else:
            if not isinstance(done, Parked):
                self._send_write(request, done)

    def _read(self, request: Request, fields: tuple[int, ...]) -> None:
        if self._read_inline:
            self._serve_read(request, fields)
            return
        request.blocking = True
        self._where_it_may_block(request, partial(self._serve_read, request, fields), self._read_pool)

    def _serve_read(self, request: Request, fields: tuple[int, ...]) -> None:
        fh, offset, size, _read_flags, _owner, flags = fields
        try:
            data = self.fs.read(request, fh, offset, size, flags)
        except WouldBlock:
            request.blocking = True
            self._where_it_may_block(request, partial(self._serve_read, request, fields), self._read_pool)
        except Exception as e:  # noqa: BLE001 - `_failed` logs what is not an answer; the mount must live on
            self._failed(request, Opcode.READ, e)
        else:
            if data is not PARKED:
                self.send_data(request, data)

    def _other(self, opcode: int, request: Request, raw: bytearray, extensions: int) -> None:
        op = wire.OPS.get(opcode)
        if op is None:
            self.send_error(request, errno.ENOSYS)
            return
        try:
            body = wire.decode_body(op, memoryview(raw)[: len(raw) - extensions * 8])
        except wire.WireError as e:
            log.error("%s", e)
            self.send_error(request, errno.EIO)
            return
        route = self._routes.get(opcode)
        if route is None:
            self._own(opcode, request, body)
        elif route.inline:
            self._serve(route, request, body, time.perf_counter_ns())
        else:
            request.blocking = True
            self._where_it_may_block(request, partial(self._serve, route, request, body), self.pool)

    def _own(self, opcode: int, request: Request, body: Any) -> None:
        """The requests that are the session's and not the file system's."""
        if opcode == Opcode.INIT:
            self._init(request, body)
        elif opcode == Opcode.INTERRUPT:
            parked = self.parked.get(body.unique & ~UNIQUE_RESEND)
            if parked is not None and parked.on_interrupt is not None:
                parked.on_interrupt()
        elif opcode == Opcode.DESTROY:
            self._reply(request, (_OUT.pack(16, 0, request.unique),))
        elif opcode != Opcode.NOTIFY_REPLY:
            self.send_error(request, errno.ENOSYS)

    def _init(self, request: Request, offer: wire.Init) -> None:
        fs = self.fs
        if offer.major > 7:
            # The kernel asks again with our major version.
            body = replies.init_out(45, 0, 0, 0, 0, 0, 0)
            self._reply(request, (_OUT.pack(16 + len(body), 0, request.unique), body))
            return
        wishes = Wishes(wishes_of(fs), fs.required, fs.max_write, fs.max_readahead)
        try:
            self.agreement = negotiate(offer, wishes, max_pages_limit())
            fs.init(self.agreement)
        except (wire.WireError, OSError) as e:
            self.failure = str(e)
            self.send_error(request, errno.EPROTO)
            self.ready.set()
            return
        self.send_value(request, Agreement.encode, self.agreement)
        self._read_apart()
        self._settle()
        self.ready.set()

    def _read_apart(self) -> None:
        """Read through a clone of the connection, where the kernel cannot send again what a dead server leaves
        unanswered (before Linux 6.9): it ends with an error then, when the clone is closed, instead of never.
        """
        if self._lifeline is None or self.agreement is None or self.agreement.capabilities & Cap.HAS_RESEND:
            return
        try:
            clone = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(clone, _CLONE, self.fd.to_bytes(4, "little"))
            except OSError:
                os.close(clone)
                raise
        except OSError as e:
            log.warning("the connection cannot be cloned (%s): what a dead worker leaves unanswered will hang", e)
            return
        self._io = clone

    def _settle(self) -> None:
        """What was agreed on is known: serve with all that was planned for."""
        gc.collect()
        gc.freeze()  # what lives from here to the end is not looked at again
        gc.set_threshold(50_000, 20, 50)  # nodes and files are no cycles: looking through all of them is in vain
        for _ in range(self.fs.readers - 1):
            self._start_reader()

    def _serve(self, route: Route, request: Request, body: Any, received: int = 0) -> None:
        try:
            value = route.call(request, body)
            if received:  # what follows the reply's system call is no part of the answer: its caller runs already
                self._answers.append(time.perf_counter_ns() - received)
            if route.silent:
                self._held.pop(request.unique & ~UNIQUE_RESEND, None)
            elif value is not PARKED:
                self.send_value(request, route.encode, value)
        except WouldBlock:
            request.blocking = True
            self._where_it_may_block(request, partial(self._serve, route, request, body), self.pool)
        except Exception as e:  # noqa: BLE001 - `_failed` logs what is not an answer; the mount must live on
            self._failed(request, route.op.opcode, e, body, route.silent)

    def _failed(self, request: Request, opcode: int, e: Exception, body: object = None, silent: bool = False) -> None:
        """An OSError is an answer; anything else is a defect: logged with its request, and answered EIO."""
        if isinstance(e, OSError):
            number = error_number(e)
        elif isinstance(e, OverflowError):
            number = errno.EOVERFLOW  # a number that no system call takes; Linux sends none
        else:
            number = errno.EIO
            header = wire.Header(0, opcode, request.unique, request.nodeid, request.uid, request.gid, request.pid, 0)
            log.error("a handler failed: %s", text.request_line(header, body), exc_info=e)
        self.parked.pop(request.unique & ~UNIQUE_RESEND, None)
        if silent:
            self._held.pop(request.unique & ~UNIQUE_RESEND, None)
        else:
            self.send_error(request, number)

    # threads

    def _take_permit(self) -> bool:
        try:
            self._permits.pop()
        except IndexError:
            return False
        return True

    def _where_it_may_block(self, request: Request, job: Callable[[], None], pool: Pool) -> None:
        if self._permits and self._take_permit():
            job()
            self._permits.append(None)
        else:
            self._hand_over(request, job, pool)

    def _hand_over(self, request: Request, job: Callable[[], None], pool: Pool) -> None:
        self.hold(request.unique & ~UNIQUE_RESEND, request)
        pool.submit(job)

    # requests that outlive the reader's turn, and NOTIFY_RESEND

    def hold(self, key: int, request: Request) -> None:
        """The reader lets go of `request` without an answer."""
        self._held[key] = request

    def _known_already(self, unique: int) -> bool:
        """Whether a request that the kernel sends again is being served, or has been; else it is to be served now."""
        key = unique & ~UNIQUE_RESEND
        with self._resend_lock:
            held = self._held.get(key)
            if held is not None and held.again:
                del self._held[key]
                self.parked.pop(key, None)
                return False
            if held is not None:
                held.unique = unique
                return True
            late = self._late.pop(key, None)
        if late is not None:
            self._send((_with_unique(late, unique),))
        return late is not None

    def _reply(self, request: Request, parts: tuple[Any, ...]) -> None:
        """Answer a request, under the number by which the kernel knows it now."""
        key = request.unique & ~UNIQUE_RESEND
        if key not in self._held:  # the reader's own turn
            if not self._send(parts):
                self._too_early(key, parts)
            return
        while True:
            unique = request.unique
            sent = self._send((_with_unique(parts[0], unique), *parts[1:]))
            with self._resend_lock:
                if not sent and request.unique != unique:
                    continue  # it was sent again while we answered under its old number
                if not sent:
                    self._too_early(key, parts)
                self._held.pop(key, None)
                return

    def _too_early(self, key: int, parts: tuple[Any, ...]) -> None:
        """The kernel does not know this request: a signal ended it, or it is on its way to us again.

        A long reply is of a READ or a listing, which may as well be served again.
        """
        if sum(map(len, parts)) > _LATE_LONGEST:
            return
        self._late[key] = b"".join(parts)
        while len(self._late) > _LATE:
            self._late.popitem(last=False)

    # replying, from any thread

    def send_error(self, request: Request, number: int) -> None:
        self._reply(request, (replies.error(request.unique, number),))

    def send_value(self, request: Request, encode: Callable[[Any], bytes], value: object) -> None:
        try:
            body = encode(value)
        except OSError as e:
            self.send_error(request, error_number(e))
        except Exception:
            log.exception("a reply could not be encoded: %r", value)
            self.send_error(request, errno.EIO)
        else:
            self._reply(request, (_OUT.pack(16 + len(body), 0, request.unique), body))

    def send_data(self, request: Request, data: Any) -> None:
        """A READ reply without a copy: one buffer or a sequence of them."""
        parts = data if isinstance(data, (list, tuple)) else (data,)
        try:
            self._reply(request, (_OUT.pack(16 + sum(map(len, parts)), 0, request.unique), *parts))
        finally:
            if isinstance(data, Lent):
                data.release()

    def _send_write(self, request: Request, done: int) -> None:
        """The reply that is sent most: one write(2) of one buffer."""
        reply = _WRITE_REPLY.pack(24, 0, request.unique, done)
        if self.debug is not None or self._held:
            self._reply(request, (reply,))  # it may be one that was held
            return
        try:
            os.write(self._io, reply)
        except OSError:
            self._reply(request, (reply,))  # which knows what each error means

    def _send(self, parts: tuple[Any, ...]) -> bool:
        """One writev. False where the kernel does not know the request (any more)."""
        _, error, unique = _OUT.unpack_from(parts[0])
        if self.debug is not None:
            self.debug(text.reply_line(unique, -error, sum(map(len, parts)) - 16))
        try:
            os.writev(self._io, parts)
        except OSError as e:
            if e.errno == errno.ENOENT:
                return False
            if e.errno in _GONE:
                return True  # the connection has ended: nobody waits for this
            log.error("the kernel refused a reply to %d: %s", unique, e)
            if len(parts) > 1 or len(parts[0]) > 16:
                return self._send((replies.error(unique, errno.EIO),))
        return True

    def _trace(self, prefix: bytearray, tail: memoryview, n: int) -> None:
        raw = bytes(prefix[:n]) + bytes(tail[: max(0, n - WRITE_PREFIX)])
        if self.debug is None:
            return
        try:
            self.debug(text.request_line(*wire.decode(memoryview(raw))))
        except wire.WireError as e:
            self.debug(f"> not understood: {e}")


def _with_unique(message: bytes, unique: int) -> bytes:
    """A reply under another number: the last 8 bytes of its out_header."""
    return message[:8] + unique.to_bytes(8, "little") + message[16:]
