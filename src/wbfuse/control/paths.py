"""Where the control sockets and logs of running mounts are. Only their owner can reach the directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat


class ControlError(Exception):
    """One line for the person who asked."""


def runtime_dir(uid: int | None = None) -> str:
    """/run/wbfuse for root; for others XDG_RUNTIME_DIR/wbfuse, or a private directory in /tmp where there is none."""
    uid = os.geteuid() if uid is None else uid
    if uid == 0:
        return "/run/wbfuse"
    base = os.environ.get("XDG_RUNTIME_DIR") if uid == os.geteuid() else f"/run/user/{uid}"
    return f"{base}/wbfuse" if base and os.path.isdir(base) else f"/tmp/wbfuse-{uid}"  # noqa: S108 - checked below


def make_runtime_dir() -> str:
    """The directory, made where it is missing. Raises ControlError where somebody else could write to it."""
    path = runtime_dir()
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as e:
        raise ControlError(f"{path}: {e.strerror}") from e
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ControlError(f"{path}: not a private directory of yours; remove it and try again")
    return path


def _key(mountpoint: str) -> str:
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]


def socket_path(mountpoint: str, directory: str | None = None) -> str:
    return f"{directory or runtime_dir()}/{_key(mountpoint)}.sock"


def log_path(mountpoint: str) -> str:
    return f"{runtime_dir()}/{_key(mountpoint)}.log"


def forget_old(now: float, age: float = 7 * 86400.0) -> None:
    """Remove messages of mounts that ended badly, seconds after the last of them."""
    directory = runtime_dir()
    for name in os.listdir(directory):
        path = f"{directory}/{name}"
        if name.endswith(".log") and not os.path.exists(f"{path.removesuffix('.log')}.sock"):
            with contextlib.suppress(FileNotFoundError):  # somebody else has tidied up
                if os.stat(path).st_mtime < now - age:
                    os.unlink(path)


def last_words(mountpoint: str) -> str:
    """Where to read why a mount is not there any more, as the end of a message; empty where nothing is known."""
    path = log_path(mountpoint)
    return f"; what its server said last: {path}" if os.path.exists(path) else ""


def sockets() -> list[str]:
    """Every control socket that the caller may reach: its own, and for root everybody's."""
    places = [runtime_dir()]
    if os.geteuid() == 0:
        users = os.listdir("/run/user") if os.path.isdir("/run/user") else []
        places += [f"/run/user/{u}/wbfuse" for u in users]
        places += [f"/tmp/{name}" for name in os.listdir("/tmp") if name.startswith("wbfuse-")]  # noqa: S108
    return [f"{d}/{name}" for d in places if _is_private(d) for name in sorted(os.listdir(d)) if name.endswith(".sock")]


def _is_private(path: str) -> bool:
    """Whether it is a directory that only its owner writes to; in /tmp, the one whose number is in its name."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    _, _, owner = path.rpartition("/tmp/wbfuse-")  # noqa: S108
    if path.startswith("/tmp/") and owner != str(found.st_uid):  # noqa: S108
        return False
    return stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022


def find_socket(mountpoint: str) -> str | None:
    """The control socket of the mount on this (absolute) path, None where there is none."""
    name = f"{_key(mountpoint)}.sock"
    return next((path for path in sockets() if path.endswith("/" + name)), None)
