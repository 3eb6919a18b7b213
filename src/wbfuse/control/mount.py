"""One running mount: store, cache, file system, session and control socket put together, and taken down in order.

    build -> attach -> (serve) -> barrier -> unmount -> drain -> close

The process lives on after the kernel has let go until everything is durable, or it is told twice to end.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from wbfuse.control import paths
from wbfuse.control.disk import LogDirectory, is_note_of, unwritten
from wbfuse.control.keeper import GIVEN_UP, RESTART
from wbfuse.control.server import ControlServer, Message
from wbfuse.filesystem.cached_fs import CachedFileSystem
from wbfuse.filesystem.store_fs import StoreFileSystem
from wbfuse.journal import VERSION, Journal, Kind
from wbfuse.session.mount import MountError, find_mount, is_busy, max_pages_limit, tune_bdi, unmount
from wbfuse.session.serve import Options, attach, detach, resume
from wbfuse.session.session import Session
from wbfuse.store.contract import ROOT_INO, Piece, Store
from wbfuse.store.directory import DirectoryStore
from wbfuse.store.shaped import Shape, shaped
from wbfuse.wire.negotiate import PAGE, Agreement
from wbfuse.writeback import quarantine
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.disk.writer import DiskLog
from wbfuse.writeback.drain import drain
from wbfuse.writeback.engine import Engine
from wbfuse.writeback.limits import MAX_PAUSE
from wbfuse.writeback.log import LogError
from wbfuse.writeback.renames import DeferredRenames

log = logging.getLogger(__name__)

MIB = 1 << 20
_QUIET_SECONDS = 5.0
"""How long a restart waits for what is being served; what is not answered then is sent again."""
_READ_AHEAD_KB = 4096
_KERNELS_GUESS = 100e6
_LEAST_SHARE, _FIRST_SHARE = 2 * MIB, 4 * MIB
"""What the kernel may hold of a slow store, and of one that has not been measured."""


@dataclass(slots=True)
class Spec:
    """What `wbfuse mount` was asked for. Sizes in bytes, times in seconds."""

    source: str
    mountpoint: str
    policy: str = "writeback"
    kernel_cache: str = "writeback"
    log_size: int = 1 << 30
    on_close: str = "wait"
    dirty_expire: float = 5.0
    full_timeout: float | None = None
    log_dir: str | None = None
    """Where the log is on disk as well."""
    log_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    """Of a new log there."""
    fsync: str = "store"
    """What fsync waits for: "store" or "log"."""
    shape: Shape = field(default_factory=Shape)
    read_only: bool = False
    options: list[str] = field(default_factory=list)
    max_deaths: int = 10
    debug_wire: bool = False
    """Log each request and reply."""
    tuning: dict[str, Any] = field(default_factory=dict)
    """Of a volume: arguments of `volume.Tuning`."""

    def encode(self) -> dict[str, Any]:
        """As a value that JSON knows, for `decode`."""
        return asdict(self) | {"name": self.name}

    @classmethod
    def decode(cls, value: dict[str, Any]) -> Spec:
        fields = {name: item for name, item in value.items() if name != "name"}
        return cls(**fields | {"shape": Shape(**value["shape"])})

    @property
    def is_volume(self) -> bool:
        """Whether `source` is a database URL, not a directory."""
        return "://" in self.source

    @property
    def name(self) -> str:
        """The source as it may be shown: an absolute path, or a URL without its password."""
        return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1@", self.source) if self.is_volume else os.path.abspath(self.source)


def kernel_dirty_share() -> int:
    """Bytes that the kernel lets be dirty for a FUSE mount that nobody tuned: 1 % of its dirty threshold."""
    with open("/proc/vmstat", encoding="ascii") as f:
        values = dict(line.split() for line in f)
    return int(values["nr_dirty_threshold"]) * PAGE // 100


def open_store(spec: Spec, journal: Journal, kept: dict[str, int]) -> Store:
    """The store that `spec.source` names; `kept` as in Mount (or of a log on disk, which has no connection)."""
    if spec.is_volume:
        from wbfuse.store.volume import Tuning, VolumeStore  # SQL and object stores take their time to import

        return VolumeStore(spec.source, Tuning(**spec.tuning), log.warning, journal, os.getppid(), unwritten)
    revived = "log" in kept and "fuse" not in kept
    return DirectoryStore(spec.source, spec.read_only, journal, kept.get("source"), spec.log_dir is not None, revived)


def _die() -> None:
    """End this process at once: the next one goes on from what log and journal say."""
    logging.shutdown()
    os._exit(GIVEN_UP)


def _pipe_without_reader() -> int:
    """The end to write; whoever wants the other opens it through /proc."""
    other, end = os.pipe2(os.O_CLOEXEC)
    os.close(other)
    return end


class Mount:
    """A mount that is served by this process. Raises MountError, SourceError or LogError where it cannot be made.

    `kept` has the descriptors of a mount whose server died, by name: it is gone on with. Else a new one is made, and
    `keep` is given its descriptors. `deaths`: of servers in the last minute, for status.
    """

    def __init__(self, spec: Spec, kept: dict[str, int], keep: Callable[[str, int], None], deaths: int = 0) -> None:
        self.spec = spec
        self.deaths = deaths
        self.started = time.time()
        self._stop_lock = threading.Lock()
        self._impatient = threading.Event()
        self._warned = False
        self._written_at_stop = 0
        self.left = 0
        """Bytes that are not in the store at the end."""
        self.where_left = "are lost"
        self.alone = threading.Event()
        """The keeper is gone."""
        self.brought_in = 0
        """Bytes that an earlier mount had left in the log on disk."""
        self._aside: list[str] = []
        """Quarantine entries of which no sync has told yet."""
        self.disk: DiskLog | None = None
        self._log_dir = LogDirectory(spec.log_dir, spec, kept) if spec.log_dir else None
        loaded = self._log_dir.loaded if self._log_dir else None
        first = not kept
        """Nobody served this mount before."""
        if loaded is not None:
            kept = kept | {"log": loaded.log, "journal": loaded.journal}
        self._kept = kept
        self.journal = Journal(kept.get("journal"))
        self._check_version("journal" in kept and loaded is None)
        agreed = self.journal.inherited(Kind.AGREEMENT).get(0)
        self._store: Any = open_store(spec, self.journal, kept)
        store, self._meter = shaped(self._store, spec.shape)
        self.cache: WritebackCache | None = None
        self.engine: Engine | None = None
        try:
            self.fs = self._build(store)
            self._compare_notes(first, loaded is not None)
            if kept:
                self.fs.take_over()
            if loaded is not None and self.cache is not None:
                self.brought_in = self.cache.unwritten
            elif first and self._log_dir is not None:
                self._make_durable()
            self._begin_log()
            lifeline = kept.get("lifeline") or _pipe_without_reader()
            self.session, self.path = self._connect(agreed, lifeline)
        except BaseException:
            if first:  # else the next worker goes on with it, and with its session
                self._end_log(keep=loaded is not None)
                store.close()
            raise
        self.session.on_defect = _die
        try:
            self.tuned = self._tune()
            commands = {
                "status": self._do_status, "sync": self._do_sync, "umount": self._do_umount, "clone": self._do_clone,
                "restart": self._do_restart,
            }  # fmt: skip
            self._control = ControlServer(paths.socket_path(self.path), commands, kept.get("control"))
        except BaseException:
            if first:
                detach(self.session, self.path)
            raise
        if "lifeline" not in kept:
            keep("lifeline", lifeline)
        if first:
            keep("fuse", self.session.fd)
            keep("journal", self.journal.fd)
            keep("control", self._control.fd)
            if self.cache is not None:
                keep("log", self.cache.log.fd)
            if self._log_dir is not None:
                keep("disk", self._log_dir.directory.fd)
            if not spec.is_volume:
                keep("source", cast(Any, self._store).root_fd)

    def _connect(self, agreed: bytes | None, lifeline: int) -> tuple[Session, str]:
        """Go on with what a server before this one `agreed` on with the kernel; else mount."""
        spec = self.spec
        if agreed is not None:
            return resume(self.fs, self._kept["fuse"], Agreement.decode(agreed), lifeline, self._debug), spec.mountpoint
        options = [*spec.options, "default_permissions"] + (["ro"] if spec.read_only else [])
        return attach(self.fs, spec.mountpoint, Options(spec.name, "wbfuse", options, self._debug, lifeline))

    def _check_version(self, inherited: bool) -> None:
        """What another version left is not to be misread. Raises LogError, upon which it is tried again later."""
        if not inherited:
            self.journal.put(Kind.VERSION, 0, bytes([VERSION]))
            return
        found = self.journal.inherited(Kind.VERSION).get(0, b"\0")[0]
        if found != VERSION:
            raise LogError(
                f"{self.spec.mountpoint}: was served by another version of wbfuse ({found}, this is {VERSION});"
                " install that one again, and unmount before the next update"
            )

    @property
    def _debug(self) -> Callable[[str], None] | None:
        return logging.getLogger("wbfuse.wire").info if self.spec.debug_wire else None

    def _build(self, store: Store) -> StoreFileSystem:
        spec = self.spec
        direct, wait = spec.kernel_cache == "off", spec.on_close == "wait"
        if spec.policy == "writethrough":
            return StoreFileSystem(store, direct, wait, self.journal)
        max_write = min(StoreFileSystem.max_write, max_pages_limit() * PAGE)
        # Root tells the kernel how much it may hold (see _tune); others have to live with its default.
        kernel_dirty = self._kernel_share() if os.geteuid() == 0 else kernel_dirty_share()
        renames = DeferredRenames(store, self.journal)
        self.cache = WritebackCache(
            renames.as_store(), spec.log_size, max_write, kernel_dirty,
            journal=self.journal, log_fd=self._kept.get("log"),
        )  # fmt: skip
        self.engine = Engine(self.cache, spec.dirty_expire)
        if spec.full_timeout is not None:
            self.engine.pacer.full_timeout = spec.full_timeout
        self.engine.keep = self._set_aside
        self.engine.on_defect = _die
        outer = self

        class Draining(CachedFileSystem):
            def destroy(self) -> None:
                try:
                    outer._drain()
                except Exception:  # a defect must not end the mount with dirty data: the next worker drains
                    log.exception("draining failed")
                    _die()
                super().destroy()

        kernel_writeback = spec.kernel_cache == "writeback"
        fs = Draining(renames, self.cache, self.engine, kernel_writeback, direct, wait, self.journal)
        fs.fsync_by_log = spec.fsync == "log"
        self.engine.sync_each = spec.log_dir is not None
        fs.on_stopped = lambda: self._end_log(keep=bool(self.left))
        return fs

    def _compare_notes(self, first: bool, loaded: bool) -> None:
        """The log on disk must be the one that the store knows of. Raises LogError."""
        if not first:
            return
        note = self._store.noted_log()
        ours = self._log_dir is not None and is_note_of(note, self._log_dir.uuid)
        if loaded and not ours:
            path = self.spec.log_dir
            raise LogError(
                f"{path}: {self.spec.name} was changed without this log, so what it holds is not brought in;"
                f" see: wbfuse recover {path}"
            )
        if note is None or ours:
            return
        name, how = self.spec.name, unwritten(note, anywhere=True)
        raise LogError(f"{name}: the last mount may have left data in {how}; or give it up: wbfuse recover --of {name}")

    def _make_durable(self) -> None:
        """The history of a log begins with what no power cut can take. Raises LogError."""
        try:
            self._store.sync_all()
        except OSError as e:
            raise LogError(f"{self.spec.name}: cannot be made durable, which a log needs: {e.strerror}") from e

    def _begin_log(self) -> None:
        if self._log_dir is not None and self.cache is not None:
            self.cache.disk = self.disk = self._log_dir.writer(self.cache, self._store)
            self.disk.on_defect = _die
            self._store.barrier = self.disk.wait
            if getattr(self._store, "leases", None) is not None:
                self._store.leases.barrier = self.disk.wait
            self.disk.start()

    def _end_log(self, keep: bool = False) -> None:
        """The log on disk goes where the store has everything; else it is what is left."""
        if self.disk is None or self._log_dir is None:
            return
        self.disk.stop()
        if keep:
            return
        try:
            self.disk.end()
            self._log_dir.directory.clear()
        except (OSError, LogError) as e:  # replaying it again would do no harm
            log.warning("%s: the log could not be removed: %s", self.spec.log_dir, e)

    def _set_aside(self, ino: int, size: int, rounds: list[list[Piece]]) -> None:
        """Dirty data of a file that another host has taken over goes to quarantine."""
        try:
            # A database may not answer.
            path = "" if self.impatient and self.spec.is_volume else self._store.path_of(ino)
        except OSError:
            path = ""  # the database may be just what cannot be reached
        directory = quarantine.default_directory()
        name = quarantine.keep(directory, self.spec.name, ino, path, size, rounds)
        self._aside.append(name)
        log.error("%s: what was not committed is kept in quarantine; see: wbfuse recover %s", path or ino, name)

    def _kernel_share(self) -> int:
        return max(4 * MIB, self.spec.log_size // 8)

    def _tune(self) -> dict[str, str]:
        found = find_mount(self.path)
        if found is None:
            return {}
        if self.engine is None:
            return tune_bdi(found.device, _READ_AHEAD_KB)
        self._device = found.device
        self.engine.on_bandwidth = self._fit_kernel_share
        return tune_bdi(found.device, _READ_AHEAD_KB, _FIRST_SHARE)

    def _fit_kernel_share(self, bandwidth: float) -> None:
        """Of a slow store the kernel may hold what it takes in a fifth of a second: a write(2) may wait for it all.

        Slow is below the 100 MB/s that the kernel itself assumes of a device; above, it may have its eighth.
        """
        share = self._kernel_share()
        if bandwidth < _KERNELS_GUESS:
            share = max(_LEAST_SHARE, min(share, int(bandwidth * MAX_PAUSE)))
        self.tuned |= tune_bdi(self._device, max_bytes=share)

    # ending

    def wait(self) -> None:
        """Until the session has ended and everything is durable (or given up)."""
        self.session.wait()
        self._control.close()

    def hurry(self) -> None:
        """Somebody asked again: do not wait for a store that does not answer. One that does is worth a third time."""
        written = self._meter.bytes_written
        if self.cache is not None and not self._warned and written != self._written_at_stop:
            self._warned = True
            left = self.cache.unwritten
            log.warning("still writing, %d bytes are left; another signal gives them up", left)
            return
        self._impatient.set()
        if self.disk is not None and self.disk.error:
            self.disk.abandon()
        if self.cache is not None:
            self.cache.close()

    @property
    def impatient(self) -> bool:
        return self._impatient.is_set()

    def stop(self) -> None:
        """Make everything durable and unmount; a busy mount is detached and ends with its last open file.

        What cannot be written stays in the log while the process lives on and tries again (`_drain`).
        """
        with self._stop_lock:
            if self.session.ended.is_set():
                return
            left = self.cache.unwritten if self.cache is not None else 0
            self._written_at_stop = self._meter.bytes_written
            log.info("%s: writing back (%d bytes here, more in the kernel perhaps), then unmounting", self.path, left)
            try:
                for _ in self._barrier():
                    pass
            except OSError as e:
                then = "" if self.impatient else ", and trying on"
                log.error("not everything could be written: %s; unmounting%s", e.strerror, then)
            try:
                unmount(self.path)
            except MountError as e:
                if not is_busy(e):
                    log.warning("%s", e)
                    return
                log.warning("%s is in use: detached; it ends when its last file is closed", self.path)
                unmount(self.path, lazy=True)

    def _barrier(self) -> Iterator[int]:
        """The durability barrier: have the kernel hand over what it holds, then drain. Yields bytes left.

        Raises OSError where something could not be written or made durable.
        """
        fs, cache = self.fs, self.cache
        if cache is None or not isinstance(fs, CachedFileSystem):
            fs.store.sync_all()
            return
        for ino in {handle.ino for _, handle in fs.handles.all() if handle.writable}:
            fs.pull(ino)
        fs.follow_renames()
        progress: list[int] = []
        with ThreadPoolExecutor(1, "drain") as pool:
            drained = pool.submit(drain, cache, progress.append, self._impatient.is_set)
            while not wait([drained], 0.1).done:
                if progress:
                    yield progress[-1]
            failed = drained.result()
        if failed and self.impatient:
            raise OSError(errno.EINTR, f"{len(failed)} files were given up")
        if failed:
            ino, code = failed[0]
            raise OSError(code, f"{len(failed)} files could not be written, node {ino}: {os.strerror(code)}")
        aside, self._aside = self._aside, []
        if aside:  # told once, as an fsync would
            raise OSError(errno.EIO, f"{len(aside)} files were set aside, see: wbfuse recover {aside[0]}")

    def _drain(self) -> None:
        """After the last request: write what is left, as often as it takes, unless told twice to end."""
        if self.cache is None or not isinstance(self.fs, CachedFileSystem):
            return
        while True:
            try:
                self.fs.follow_renames()
                failed = drain(self.cache, lambda _left: None, self._impatient.is_set)
                if not failed:
                    return
                why = os.strerror(failed[0][1]) if failed[0][1] else "told to end"
            except OSError as e:
                why = e.strerror or str(e)
            left = self.cache.unwritten
            if not self.impatient:
                log.error("%d bytes are not durable: %s; trying again", left, why)
            if self._impatient.wait(1.0):
                self.left = max(left, 1)  # it may be names alone
                self._rescue()
                return

    def _rescue(self) -> None:
        """Keep what could not be written, as far as that goes."""
        if self.disk is not None and not self.disk.error:
            where = self.spec.log_dir
            self.where_left = f"are in the log; to bring them in: wbfuse mount {self.spec.name} ... --log {where}"
        elif self.engine is not None and self.engine.rescue():
            self.where_left = "are in quarantine; see: wbfuse recover"
        log.error("told to end: %d bytes %s", self.left, self.where_left)

    # the control socket

    def status(self) -> Message:
        """What `wbfuse status --json` prints for this mount."""
        spec, agreement = self.spec, self.session.agreement
        out: dict[str, Any] = {
            "mountpoint": self.path,
            "source": spec.name,
            "policy": spec.policy,
            "kernel_cache": spec.kernel_cache,
            "on_close": spec.on_close,
            "read_only": spec.read_only,
            "shared": bool(spec.tuning.get("shared")),
            "started": self.started,
            "keeper": {"pid": 0 if self.alone.is_set() else os.getppid()},
            "worker": {"pid": os.getpid(), "deaths": self.deaths},
            "dirty_bytes": 0,
            "writeback_bytes": 0,
            "renames": 0,
            "last_error": "",
            "log": {},
            "negotiated": {},
            "requests": self.session.requests(),
            "answers": self.session.answers(),
            "bdi": self.tuned,
            "store": {"bytes_written": self._meter.bytes_written, "writes": self._meter.writes}
            | self._store.counters(),
        }
        if agreement is not None:
            out["negotiated"] = {
                "protocol": f"7.{agreement.minor}",
                "capabilities": [c.name for c in type(agreement.capabilities) if c in agreement.capabilities],
                "max_write": agreement.max_write,
                "max_readahead": agreement.max_readahead,
                "max_background": agreement.max_background,
            }
        if self.cache is not None:
            state = self.cache.status()
            for key in (
                "dirty_bytes",
                "writeback_bytes",
                "last_error",
                "dirty_files",
                "failing_files",
                "parked_writes",
            ):
                out[key] = state[key]
            out["log"] = {"size": state["log_size"], "used": state["log_used"], "limit": state["log_limit"]}
            if self.disk is not None:
                disk = {"path": self.spec.log_dir, "fsync": self.spec.fsync, "brought_in": self.brought_in}
                out["log"]["disk"] = disk | self.disk.status()
            out["store"]["bandwidth"] = state["bandwidth"]
        if isinstance(self.fs, CachedFileSystem):
            out["renames"] = len(self.fs.renames.pending)
        return out

    def _do_status(self, _request: Message) -> Iterator[Message]:
        yield {"done": True, "status": self.status()}

    def _do_sync(self, _request: Message) -> Iterator[Message]:
        for left in self._barrier():
            yield {"left": left}
        yield {"done": True}

    def _do_clone(self, request: Message) -> Iterator[Message]:
        """Clone `source` as `target`, both paths below the mount point, after what was written is durable."""
        if not self.spec.is_volume:
            raise OSError(errno.EOPNOTSUPP, "only volumes can clone")
        for left in self._barrier():
            yield {"left": left}
        store = self._store
        source = store.find(os.fsencode(request["source"]))
        parent, _, name = os.fsencode(request["target"]).rpartition(b"/")
        home = store.find(parent or b".")
        try:
            store.clone(source, home, name, home if source == ROOT_INO else 0)
        finally:
            store.forget(source)
            store.forget(home)
        yield {"done": True}

    def _do_restart(self, request: Message) -> Iterator[Message]:
        """End this process between two requests; the keeper starts the next. Meanwhile requests wait in the kernel."""
        if request.get("version") != VERSION:
            raise OSError("the installed version cannot go on with this mount: unmount it, and mount it again")
        if self.alone.is_set():
            raise OSError(errno.ECHILD, "the keeper is gone, so nobody would follow; unmount instead")
        yield {"pid": os.getpid()}
        self.session.quiet(_QUIET_SECONDS)
        log.info("asked for a new worker")
        logging.shutdown()
        os._exit(RESTART)

    def _do_umount(self, request: Message) -> Iterator[Message]:
        yield {"pid": os.getpid() if self.alone.is_set() else os.getppid()}
        for left in self._barrier():
            yield {"left": left}
        unmount(self.path, bool(request.get("lazy")))
        if request.get("lazy"):  # it ends with its last open file, whenever that is
            yield {"done": True}
            return
        while not self.session.ended.wait(0.1):
            yield {"left": self.cache.unwritten if self.cache is not None else 0}
        if self.left:
            raise OSError(f"{self.left} bytes could not be written and {self.where_left}")
        yield {"done": True}
