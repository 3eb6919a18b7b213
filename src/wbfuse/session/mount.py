"""Mounting and unmounting: mount(2) as root, fusermount3 otherwise. Errors say what to do.

A stale or foreign mount is found in /proc/self/mountinfo, never by touching it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass, field

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_DIRSYNC, MS_NOATIME = 1, 2, 4, 8, 16, 128, 1024
MNT_FORCE, MNT_DETACH = 1, 2

_FLAGS = {
    "ro": MS_RDONLY, "rw": 0, "nosuid": MS_NOSUID, "suid": 0, "nodev": MS_NODEV, "dev": 0, "noexec": MS_NOEXEC,
    "exec": 0, "sync": MS_SYNCHRONOUS, "dirsync": MS_DIRSYNC, "noatime": MS_NOATIME, "atime": 0,
}  # fmt: skip
_DATA = {"allow_other", "default_permissions"}
_IGNORED = {"auto", "noauto", "_netdev", "nofail", "user", "nouser", "defaults"}


class MountError(Exception):
    """The mount cannot be made or undone; the text is one line for the person who asked."""


@dataclass(slots=True)
class MountOptions:
    """`options` are those of mount(8), each a word or `key=value`."""

    fsname: str = "wbfuse"
    subtype: str = "wbfuse"
    options: list[str] = field(default_factory=list)
    max_read: int = 0


@dataclass(slots=True)
class MountInfo:
    mount_id: int
    device: str
    """MAJOR:MINOR."""
    mountpoint: str
    fstype: str
    source: str


def mounts() -> list[MountInfo]:
    """What /proc/self/mountinfo lists, in its order (a later one on the same directory covers an earlier one)."""
    out = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            left, right = line.rstrip("\n").split(" - ", 1)
            ids, (fstype, source) = left.split(" "), right.split(" ")[:2]
            path = ids[4].encode("utf-8", "surrogateescape").decode("unicode_escape").encode("latin-1")
            out.append(MountInfo(int(ids[0]), ids[2], os.fsdecode(path), fstype, source))
    return out


def find_mount(mountpoint: str) -> MountInfo | None:
    """The topmost mount on exactly this directory."""
    return next((m for m in reversed(mounts()) if m.mountpoint == mountpoint), None)


def check_mountpoint(mountpoint: str) -> str:
    """The absolute path of a directory that can be mounted on. Raises MountError with what to do."""
    path = os.path.join(
        os.path.realpath(os.path.dirname(os.path.abspath(mountpoint))), os.path.basename(os.path.abspath(mountpoint))
    )
    if os.path.abspath(mountpoint) == "/":
        raise MountError("/: the root cannot be a mount point; name an empty directory")
    covered = find_mount(path)
    if covered is not None and covered.fstype.startswith("fuse"):
        try:
            os.stat(path)
        except OSError as e:
            if e.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                raise MountError(
                    f"{path}: a mount whose server has died is still there; remove it with: wbfuse umount {path}"
                ) from e
        raise MountError(
            f"{path}: already a mount point of {covered.source} ({covered.fstype});"
            f" unmount it with: wbfuse umount {path}"
        )
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise MountError(f"{path}: no such directory; make it with: mkdir -p {path}") from None
    except OSError as e:
        raise MountError(f"{path}: {e.strerror}") from e
    if not stat.S_ISDIR(mode):
        raise MountError(f"{path}: not a directory; a mount point must be one")
    return os.path.realpath(path)


def mount(mountpoint: str, options: MountOptions) -> int:
    """Mount and give the descriptor of the connection. `mountpoint` must come from `check_mountpoint`.

    Raises MountError, with nothing left mounted.
    """
    for word in options.options:
        key = word.split("=")[0]
        if key not in _FLAGS and key not in _DATA and key not in _IGNORED:
            raise MountError(
                f"-o {word}: no such mount option; known are {', '.join(sorted(_FLAGS | dict.fromkeys(_DATA)))}"
            )
    return _mount_as_root(mountpoint, options) if os.geteuid() == 0 else _mount_by_helper(mountpoint, options)


def _mount_as_root(mountpoint: str, options: MountOptions) -> int:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise MountError(f"/dev/fuse: {e.strerror}; is the fuse module there (modprobe fuse)?") from e
    flags, data = 0, [f"fd={fd}", f"rootmode={stat.S_IFDIR:o}", "user_id=0", "group_id=0"]
    for word in options.options:
        flags |= _FLAGS.get(word, 0)
        if word in _DATA:
            data.append(word)
    if options.max_read:
        data.append(f"max_read={options.max_read}")
    result = _libc.mount(
        os.fsencode(options.fsname), os.fsencode(mountpoint), b"fuse." + options.subtype.encode(),
        ctypes.c_ulong(flags), ",".join(data).encode(),
    )  # fmt: skip
    if result != 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise MountError(f"{mountpoint}: mount(2) failed: {os.strerror(code)}")
    return fd


def _fusermount() -> str:
    tool = shutil.which("fusermount3") or shutil.which("fusermount")
    if tool is None:
        raise MountError("fusermount3 is not installed, and only root can mount without it: apt-get install fuse3")
    return tool


def _mount_by_helper(mountpoint: str, options: MountOptions) -> int:
    words = [w for w in options.options if w.split("=")[0] not in _IGNORED]
    words += [f"fsname={options.fsname.replace(',', '_')}", f"subtype={options.subtype}"]
    if options.max_read:
        words.append(f"max_read={options.max_read}")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [_fusermount(), "-o", ",".join(words), "--", mountpoint],
            env=dict(os.environ, _FUSE_COMMFD=str(theirs.fileno())),
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            check=False,
        )
        theirs.close()
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip().splitlines()
            reason = text[-1] if text else f"exit {done.returncode}"
            raise MountError(f"{mountpoint}: {_explain(reason)}")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(payload[: fds.itemsize])
            os.set_inheritable(fds[0], False)
            return int(fds[0])
    raise MountError(f"{mountpoint}: fusermount3 ended well but handed over no descriptor")


def _explain(reason: str) -> str:
    if "/dev/fuse" in reason and "ermission" in reason:
        return f"{reason} (an administrator allows FUSE to users with: chmod 0666 /dev/fuse)"
    if "user_allow_other" in reason:
        return f"{reason} (an administrator allows it by that word in /etc/fuse.conf)"
    return reason


def unmount(mountpoint: str, lazy: bool = False, dead: bool = False) -> None:
    """Unmount; `lazy` detaches a busy mount at once. Raises MountError (its cause an OSError where errno is known).

    `dead`: nobody serves it any more, so what applications wait for ends with an error.
    """
    if os.geteuid() == 0:
        flags = MNT_DETACH * lazy | MNT_FORCE * dead
        if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:
                raise MountError(f"{mountpoint}: not mounted") from OSError(code, "")
            raise MountError(f"{mountpoint}: {os.strerror(code)}") from OSError(code, "")
        return
    found = find_mount(mountpoint) if dead else None
    if found is not None:
        number = found.device.partition(":")[2]
        with contextlib.suppress(OSError), open(f"/sys/fs/fuse/connections/{number}/abort", "w", encoding="ascii") as f:
            f.write("1")
    words = [_fusermount(), "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(words, stderr=subprocess.PIPE, check=False)
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace").strip()
        code = errno.EBUSY if "busy" in text else errno.EINVAL
        raise MountError(f"{mountpoint}: {text or 'fusermount3 failed'}") from OSError(code, "")


def is_busy(e: MountError) -> bool:
    return isinstance(e.__cause__, OSError) and e.__cause__.errno == errno.EBUSY


def tune_bdi(device: str, read_ahead_kb: int | None = None, max_bytes: int | None = None) -> dict[str, str]:
    """Set knobs of the mount's backing device in /sys/class/bdi where permitted; answers those that were set.

    Where that is not possible (an unprivileged mount, a read-only /sys) the kernel's defaults stay; nothing is raised.
    """
    done = {}
    for name, value in (("read_ahead_kb", read_ahead_kb), ("max_bytes", max_bytes)):
        if value is None:
            continue
        with contextlib.suppress(OSError):
            with open(f"/sys/class/bdi/{device}/{name}", "w", encoding="ascii") as f:
                f.write(str(value))
            done[name] = str(value)
    return done


def bdi_value(device: str, name: str) -> int | None:
    """One number of /sys/class/bdi, None where it cannot be read."""
    try:
        with open(f"/sys/class/bdi/{device}/{name}", encoding="ascii") as f:
            return int(f.read())
    except (OSError, ValueError):
        return None


def max_pages_limit() -> int:
    """The kernel's ceiling on pages a request; 256 where it has no such knob (before 6.13)."""
    try:
        with open("/proc/sys/fs/fuse/max_pages_limit", encoding="ascii") as f:
            return int(f.read())
    except (OSError, ValueError):
        return 256
