"""`wbfuse mount`: check, start the serving process, wait until the mount answers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time

import click
from click.core import ParameterSource

from wbfuse.cli.policy import PolicyError, choose
from wbfuse.cli.status import ask_status
from wbfuse.cli.stores import collect_options, store_options
from wbfuse.cli.units import RATE, SIZE, SLOW, TIME, show_size
from wbfuse.control.keeper import Keeper
from wbfuse.control.mount import MIB, Spec
from wbfuse.control.paths import ControlError, forget_old, log_path, make_runtime_dir, socket_path
from wbfuse.session.mount import MountError, check_mountpoint
from wbfuse.store.shaped import Shape
from wbfuse.writeback.log import free_memory
from wbfuse.writeback.quarantine import default_directory, entries

_OF_VOLUMES = frozenset({
    "endpoint", "access_key", "secret_key", "profile", "store_option", "cache_dir", "cache_size", "lease_wait",
    "attr_timeout", "session_timeout", "compact_rate", "dump_interval",
})  # fmt: skip
"""Options that mean nothing to a directory."""


def default_log_size() -> int:
    """The least of 1 GiB and a quarter of the memory that is free here, in whole MiB; at least 64 MiB."""
    return max(64 * MIB, min(1 << 30, free_memory() // 4) // MIB * MIB)


@click.command()
@click.argument("source")
@click.argument("mountpoint")
@click.option(
    "--policy",
    type=click.Choice(["writeback", "writethrough"]),
    default="writeback",
    show_default=True,
    help="wbfuse's own cache: take writes at memory speed and write back later, or pass each on at once.",
)
@click.option(
    "--kernel-cache",
    type=click.Choice(["writeback", "writethrough", "off"]),
    help="The kernel's cache. Default: writeback, where policy and administrator allow it.",
)
@click.option(
    "--log-size",
    type=SIZE,
    help="Memory for dirty data, allocated at once.  [default: least of 1GiB and a quarter of free memory]",
)
@click.option(
    "--log",
    "log_dir",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Keep the log on disk as well, in DIR (of this mount alone; three times --log-size): what was written "
    "survives a power cut. The next mount of SOURCE with --log DIR brings it to the store.",
)
@click.option(
    "--fsync",
    type=click.Choice(["store", "log"]),
    default="store",
    show_default=True,
    help="What fsync(2) and close(2) wait for: that data is durable in the store, or in the log of --log.",
)
@click.option(
    "--on-close",
    type=click.Choice(["wait", "background"]),
    default="wait",
    show_default=True,
    help="Whether close(2) of a written file waits until it is durable in the store.",
)
@click.option("--dirty-expire", type=TIME, default="5s", show_default=True, help="Age at which dirty data is written.")
@click.option(
    "--full-timeout",
    type=TIME,
    help="How long an O_DIRECT write waits for room in a full log, before ENOSPC.  [default: as long as it takes]",
)
@click.option("--bwlimit", type=RATE, help="Write to the store at most this fast, e.g. 20MB/s.")
@click.option("--slow", type=SLOW, help="Delay every store call, for demonstration and tests, e.g. 50MB/s,20ms.")
@click.option("--read-only", is_flag=True, help="Refuse all changes.")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPT[,OPT...]",
    help="Options of mount(8): allow_other, ro, nosuid, nodev, noexec, noatime, sync, dirsync.",
)
@store_options
@click.option(
    "--cache",
    "cache_dir",
    type=click.Path(file_okay=False),
    help="Volumes: keep what was read in this directory, also for later mounts.",
)
@click.option("--cache-size", type=SIZE, default="10GiB", show_default=True, help="Volumes: most bytes in --cache.")
@click.option(
    "--shared",
    is_flag=True,
    help="Volumes: let other hosts mount it too, with a lease for each file that is written here. "
    "Means --kernel-cache writethrough.",
)
@click.option(
    "--lease-wait",
    type=TIME,
    default="0s",
    show_default=True,
    help="Volumes: how long open(2) waits for a file that another host is writing, before EBUSY.",
)
@click.option(
    "--attr-timeout",
    type=TIME,
    default="1s",
    show_default=True,
    help="Shared volumes: after this the changes of other hosts are seen in files that are open.",
)
@click.option(
    "--session-timeout",
    type=TIME,
    default="20s",
    show_default=True,
    help="Volumes: how long a mount may be silent before another takes over.",
)
@click.option(
    "--compact-rate",
    type=RATE,
    default="20MB/s",
    show_default=True,
    help="Volumes: bandwidth for bringing quiet, fragmented files together again.",
)
@click.option(
    "--dump-interval", type=TIME, default="1h", show_default=True, help="Volumes: how often a dump goes to the bucket."
)
@click.option(
    "--max-deaths",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Give up when the serving process has died so often within a minute.",
)
@click.option("--foreground", "-f", is_flag=True, help="Stay in the foreground; Ctrl-C unmounts.")
@click.option("--debug-wire", is_flag=True, help="Log one line for each request and reply of the kernel.")
def mount(
    source: str, mountpoint: str, policy: str, kernel_cache: str | None, log_size: int | None, log_dir: str | None,
    fsync: str, on_close: str, dirty_expire: float, full_timeout: float | None, bwlimit: float | None,
    slow: Shape | None, read_only: bool,
    options: tuple[str, ...], endpoint: str | None, access_key: str | None, secret_key: str | None, profile: str | None,
    store_option: tuple[str, ...], cache_dir: str | None, cache_size: int, shared: bool, lease_wait: float,
    attr_timeout: float, session_timeout: float, compact_rate: float, dump_interval: float, max_deaths: int,
    foreground: bool, debug_wire: bool,
) -> None:  # fmt: skip
    """Mount SOURCE on the directory MOUNTPOINT with a write-back cache between them.

    SOURCE is a directory, or the database of a volume that `wbfuse format` made: sqlite:///PATH or postgresql://...
    Returns 0 once the mount answers. Unmount with `wbfuse umount MOUNTPOINT`, which makes everything durable first.
    SOURCE must only be changed through the mount while it is mounted.
    """
    words = [w for option in options for w in option.split(",") if w]
    try:
        path = check_mountpoint(mountpoint)
        volume = "://" in source
        inside = _absolute(source) if volume else os.path.realpath(source)
        if not volume:
            _check_places(path, inside)
            _check_no_volume_options(source)
        if shared:
            _check_shared(volume, kernel_cache)
        read_only = read_only or "ro" in words
        _check_log(log_dir, fsync, policy == "writethrough" or read_only, [path] if volume else [path, inside])
        wanted = kernel_cache or ("writethrough" if shared else None)
        cache, message = choose(policy, wanted, os.geteuid() == 0)
        make_runtime_dir()
        forget_old(time.time())
        if message:
            click.echo(f"wbfuse: {message}", err=True)
        shape = Shape(slow.rate if slow else None, slow.delay if slow else 0.0, bwlimit)
        spec = Spec(
            source=inside,
            mountpoint=path,
            policy=policy,
            kernel_cache=cache,
            log_size=default_log_size() if log_size is None else log_size,
            log_dir=None if log_dir is None else os.path.abspath(log_dir),
            fsync=fsync,
            on_close=on_close,
            dirty_expire=dirty_expire,
            full_timeout=full_timeout,
            shape=shape,
            read_only=read_only,
            options=[w for w in words if w not in ("ro", "default_permissions")],
            debug_wire=debug_wire,
            max_deaths=max_deaths,
        )
        if volume:
            spec.tuning = {
                "options": collect_options(endpoint, access_key, secret_key, profile, store_option),
                "cache_dir": os.path.abspath(cache_dir) if cache_dir else None, "cache_size": cache_size,
                "shared": shared, "lease_wait": lease_wait, "attr_timeout": attr_timeout,
                "session_timeout": session_timeout, "compact_rate": compact_rate, "dump_interval": dump_interval,
            }  # fmt: skip
    except (MountError, ControlError, PolicyError) as e:
        raise click.UsageError(str(e)) from e
    if foreground:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
        code = Keeper(
            spec.encode(),
            lambda error: click.echo(f"wbfuse: {error}" if error else f"{path}: mounted", err=True),
            max_deaths,
        ).run()
    else:
        code = start(spec)
        if code == 0:
            _remind(spec)
    sys.exit(code)


def _remind(spec: Spec) -> None:
    """Say what earlier mounts of the source have left."""
    source = spec.name
    if spec.log_dir:
        with contextlib.suppress(ControlError):  # it is unmounted again already
            brought_in = ask_status(socket_path(spec.mountpoint))["log"]["disk"]["brought_in"]
            if brought_in:
                click.echo(f"wbfuse: {source}: writing {show_size(brought_in)} that an earlier mount left in its log",
                           err=True)  # fmt: skip
    kept = [entry for entry in entries(default_directory()) if entry.manifest.get("source") == source]
    if kept:
        click.echo(f"wbfuse: {source}: {len(kept)} in quarantine, never stored; see: wbfuse recover", err=True)


def _check_shared(volume: bool, kernel_cache: str | None) -> None:
    """Raises PolicyError where --shared cannot be."""
    if not volume:
        raise PolicyError("--shared is for volumes; a directory has one mount")
    if kernel_cache == "writeback":
        raise PolicyError("--shared and --kernel-cache writeback exclude each other: the kernel would keep other "
                          "hosts' changes from being seen")  # fmt: skip


def _check_places(mountpoint: str, source: str) -> None:
    """Raises MountError where one of two directories hides or serves the other."""
    if not os.path.isdir(source):
        return
    above = os.path.commonpath([mountpoint, source])
    if above == source:
        raise MountError(f"{mountpoint}: lies inside {source}; the mount would serve itself; choose another directory")
    if above == mountpoint:
        raise MountError(f"{mountpoint}: the mount would hide {source}, which it serves; choose another directory")


def _check_no_volume_options(source: str) -> None:
    """Raises PolicyError where the caller gave what would do nothing."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name in _OF_VOLUMES:
            raise PolicyError(f"{option.opts[0]} is for volumes, and {source} is a directory")


def _check_log(log_dir: str | None, fsync: str, nothing_waits: bool, outside: list[str]) -> None:
    """Raises PolicyError where there cannot be such a log on disk. `outside`: directories that it must not lie in."""
    if log_dir is None:
        if fsync == "log":
            raise PolicyError("--fsync log needs --log DIR: without it the log is gone with the machine's memory")
        return
    if nothing_waits:
        raise PolicyError("--log is for what waits to be written: not with --policy writethrough or --read-only")
    for directory in outside:
        if os.path.commonpath([os.path.realpath(log_dir), directory]) == directory:
            raise PolicyError(f"--log {log_dir} lies inside {directory}; choose another directory")


def _absolute(meta: str) -> str:
    """META with an absolute path where it names a file: the server does not stay in this directory."""
    prefix = "sqlite:///"
    return prefix + os.path.abspath(meta.removeprefix(prefix)) if meta.startswith(prefix) else meta


def start(spec: Spec) -> int:
    """Serve in a new background process; answer its exit status, 0 once the mount answers."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _serve_detached(spec, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    if said == "ready":
        os.stat(spec.mountpoint)
        return 0
    os.waitpid(child, 0)
    click.echo(f"wbfuse: {said or 'the server died at its start; see ' + log_path(spec.mountpoint)}", err=True)
    return 2


def _serve_detached(spec: Spec, pipe: int) -> None:
    """The child: a session of its own, no terminal, a log file; never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir("/")
        log = os.open(log_path(spec.mountpoint), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, descriptor in ((0, null), (1, log), (2, log)):
            os.dup2(descriptor, target)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")

        def report(error: str | None) -> None:
            try:
                os.write(pipe, error.encode() if error else b"ready")
            except BrokenPipeError:  # who asked for the mount has been interrupted, and does not want it
                os.kill(os.getpid(), signal.SIGTERM)
            os.close(pipe)

        code = Keeper(spec.encode(), report, spec.max_deaths).run()
        if code == 0:
            os.unlink(log_path(spec.mountpoint))  # it ended well: nobody will ask
    except BaseException:
        logging.exception("the server failed")
    finally:
        logging.shutdown()
        os._exit(code)
