"""`serve`: mount a file system, serve it until it is unmounted, clean up whatever happens."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from wbfuse.filesystem.api import FileSystem
from wbfuse.session.mount import MountError, MountOptions, check_mountpoint, is_busy, mount, unmount
from wbfuse.session.session import Session
from wbfuse.wire.negotiate import Agreement

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Options:
    """How to mount. `options` are words of mount(8), e.g. `["ro", "allow_other"]`."""

    fsname: str = "wbfuse"
    subtype: str = "wbfuse"
    options: list[str] = field(default_factory=list)
    debug: Callable[[str], None] | None = None
    """Called with one line for each request and reply."""
    lifeline: int | None = None
    """Where another process keeps the connection, and a server follows if this one dies: see Session."""


def attach(fs: FileSystem, mountpoint: str, options: Options | None = None) -> tuple[Session, str]:
    """Mount and start serving in threads. Gives the running session and the mount point's absolute path.

    Raises MountError where that is not possible; nothing is left mounted then.
    """
    options = options or Options()
    path = check_mountpoint(mountpoint)
    fd = mount(path, MountOptions(options.fsname, options.subtype, options.options))
    session = Session(fd, fs, options.debug, options.lifeline)
    session.start()
    session.ready.wait()
    if session.failure is not None:
        detach(session, path)
        raise MountError(f"{path}: {session.failure}")
    return session, path


def resume(
    fs: FileSystem, fd: int, agreement: Agreement, lifeline: int, debug: Callable[[str], None] | None = None
) -> Session:
    """Serve `fs` over the connection of a server that died, which had agreed on `agreement` with the kernel."""
    session = Session(fd, fs, debug, lifeline)
    session.start(agreement)
    return session


def detach(session: Session, path: str) -> None:
    """Unmount (lazily where busy) and wait until the session has ended. Does nothing where it has already."""
    if not session.ended.is_set():
        try:
            unmount(path)
        except MountError as e:
            if is_busy(e):
                log.warning("%s is in use: detached; it ends when its last file is closed", path)
                unmount(path, lazy=True)
            elif not session.ended.wait(1):
                raise
    session.wait()


def serve(fs: FileSystem, mountpoint: str, options: Options | None = None) -> None:
    """Serve `fs` on `mountpoint` until it is unmounted; Ctrl-C and SIGTERM unmount it.

    Raises MountError. Works as root, and for users through fusermount3. The calling process must not use the mount.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main else None
    # From the moment that the mount is there until somebody waits to take it down, neither signal may come.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        session, path = attach(fs, mountpoint, options)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            session.wait()
        except KeyboardInterrupt:
            detach(session, path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
