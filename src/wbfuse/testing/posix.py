"""What POSIX and Linux say of names, attributes and files, as a table of name -> function, for any directory.

    python -m wbfuse.testing.posix DIRECTORY

Each check gets a fresh empty directory and asserts. The same table must pass on a kernel file system first: then a
failure on a mount is the mount's.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable

Check = Callable[[str], None]
CHECKS: dict[str, Check] = {}
_libc = ctypes.CDLL(None, use_errno=True)
_NOREPLACE, _EXCHANGE = 1, 2


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def fails(code: int, act: Callable[[], object]) -> None:
    """`act` must raise OSError with this errno."""
    try:
        act()
    except OSError as e:
        if e.errno != code:
            raise AssertionError(f"{errno.errorcode.get(e.errno or 0)} instead of {errno.errorcode[code]}") from e
        return
    raise AssertionError(f"no error instead of {errno.errorcode[code]}")


def write(path: str, data: bytes = b"data") -> str:
    with open(path, "wb") as f:
        f.write(data)
    return path


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def renameat2(old: str, new: str, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


@check
def create_exclusive(d: str) -> None:
    os.close(os.open(d + "/a", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    fails(errno.EEXIST, lambda: os.open(d + "/a", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


@check
def create_honours_umask(d: str) -> None:
    old = os.umask(0o027)
    try:
        os.close(os.open(d + "/a", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(d + "/b", 0o777)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(d + "/a").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(d + "/b").st_mode) == 0o750


@check
def names_of_255_bytes_and_no_more(d: str) -> None:
    write(d + "/" + "x" * 255)
    fails(errno.ENAMETOOLONG, lambda: write(d + "/" + "x" * 256))
    fails(errno.ENAMETOOLONG, lambda: os.stat(d + "/" + "x" * 256))
    name = os.fsencode(d) + b"/\xff\xfe\x01 \n"
    with open(name, "wb"):
        pass
    assert b"\xff\xfe\x01 \n" in os.listdir(os.fsencode(d))


@check
def missing_names(d: str) -> None:
    fails(errno.ENOENT, lambda: os.stat(d + "/no"))
    fails(errno.ENOENT, lambda: os.unlink(d + "/no"))
    fails(errno.ENOENT, lambda: os.rename(d + "/no", d + "/other"))
    fails(errno.ENOTDIR, lambda: os.stat(write(d + "/f") + "/x"))


@check
def mkdir_and_rmdir(d: str) -> None:
    os.mkdir(d + "/a")
    assert os.stat(d).st_nlink in (1, 3)
    fails(errno.EEXIST, lambda: os.mkdir(d + "/a"))
    write(d + "/a/f")
    fails(errno.ENOTEMPTY, lambda: os.rmdir(d + "/a"))
    os.unlink(d + "/a/f")
    os.rmdir(d + "/a")
    fails(errno.ENOENT, lambda: os.stat(d + "/a"))
    fails(errno.ENOTDIR, lambda: os.rmdir(write(d + "/f")))
    fails(errno.EINVAL, lambda: os.rmdir(d + "/."))


@check
def unlink_of_a_directory(d: str) -> None:
    os.mkdir(d + "/a")
    fails(errno.EISDIR, lambda: os.unlink(d + "/a"))


@check
def special_files(d: str) -> None:
    os.mkfifo(d + "/fifo", 0o600)
    assert stat.S_ISFIFO(os.stat(d + "/fifo").st_mode)
    with socket.socket(socket.AF_UNIX) as s:
        here = os.open(d, os.O_RDONLY)
        s.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    assert stat.S_ISSOCK(os.stat(d + "/socket").st_mode)
    if os.geteuid() == 0:
        os.mknod(d + "/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        assert os.stat(d + "/null").st_rdev == os.makedev(1, 3)
    os.mknod(d + "/plain", stat.S_IFREG | 0o600)
    assert stat.S_ISREG(os.stat(d + "/plain").st_mode)


@check
def symlinks(d: str) -> None:
    os.symlink("a/b/../c", d + "/l")
    assert os.readlink(d + "/l") == "a/b/../c"
    assert os.lstat(d + "/l").st_size == 8
    os.symlink("loop", d + "/loop")
    fails(errno.ELOOP, lambda: os.stat(d + "/loop"))
    write(d + "/target")
    os.symlink("target", d + "/s")
    assert read(d + "/s") == b"data"
    fails(errno.EINVAL, lambda: os.readlink(d + "/target"))
    os.symlink("x" * 4000, d + "/long")
    assert len(os.readlink(d + "/long")) == 4000


@check
def hard_links(d: str) -> None:
    write(d + "/a")
    os.link(d + "/a", d + "/b")
    a, b = os.stat(d + "/a"), os.stat(d + "/b")
    assert (a.st_ino, a.st_nlink) == (b.st_ino, 2)
    write(d + "/b", b"through b")
    assert read(d + "/a") == b"through b"
    os.unlink(d + "/a")
    assert os.stat(d + "/b").st_nlink == 1
    os.mkdir(d + "/dir")
    fails(errno.EPERM, lambda: os.link(d + "/dir", d + "/c"))
    fails(errno.EEXIST, lambda: os.link(d + "/b", d + "/dir"))


@check
def rename_replaces(d: str) -> None:
    write(d + "/a", b"a")
    write(d + "/b", b"b")
    os.rename(d + "/a", d + "/b")
    assert read(d + "/b") == b"a"
    assert os.listdir(d) == ["b"]
    os.mkdir(d + "/dir")
    fails(errno.EISDIR, lambda: os.rename(d + "/b", d + "/dir"))
    fails(errno.ENOTDIR, lambda: os.rename(d + "/dir", d + "/b"))
    os.mkdir(d + "/full")
    write(d + "/full/x")
    fails(errno.ENOTEMPTY, lambda: os.rename(d + "/dir", d + "/full"))
    os.rename(d + "/full", d + "/dir")
    assert read(d + "/dir/x") == b"data"
    fails(errno.EINVAL, lambda: os.rename(d + "/dir", d + "/dir/inside"))


@check
def rename_of_two_names_of_one_file_does_nothing(d: str) -> None:
    write(d + "/a")
    os.link(d + "/a", d + "/b")
    os.rename(d + "/a", d + "/b")
    assert sorted(os.listdir(d)) == ["a", "b"]


@check
def rename_noreplace_and_exchange(d: str) -> None:
    write(d + "/a", b"a")
    os.mkdir(d + "/b")
    write(d + "/b/x", b"x")
    fails(errno.EEXIST, lambda: renameat2(d + "/a", d + "/b", _NOREPLACE))
    renameat2(d + "/a", d + "/b", _EXCHANGE)
    assert read(d + "/b") == b"a"
    assert read(d + "/a/x") == b"x"
    renameat2(d + "/b", d + "/c", _NOREPLACE)
    assert read(d + "/c") == b"a"


@check
def unlinked_open_file_lives(d: str) -> None:
    fd = os.open(write(d + "/a", b"before"), os.O_RDWR)
    os.unlink(d + "/a")
    assert os.listdir(d) == []
    os.pwrite(fd, b"after!", 0)
    assert os.pread(fd, 10, 0) == b"after!"
    assert os.fstat(fd).st_nlink == 0
    os.ftruncate(fd, 2)
    assert os.fstat(fd).st_size == 2
    os.fchmod(fd, 0o600)
    os.close(fd)
    assert os.listdir(d) == []


@check
def replaced_open_file_lives(d: str) -> None:
    fd = os.open(write(d + "/a", b"old"), os.O_RDWR)
    os.rename(write(d + "/b", b"new"), d + "/a")
    assert os.pread(fd, 10, 0) == b"old"
    os.pwrite(fd, b"older", 0)
    assert read(d + "/a") == b"new"
    assert os.pread(fd, 10, 0) == b"older"
    os.close(fd)


@check
def tmpfile_is_nameless_until_linked(d: str) -> None:
    fd = os.open(d, os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"quietly")
    assert os.listdir(d) == []
    here = os.open(d, os.O_RDONLY)
    os.link(f"/proc/self/fd/{fd}", "named", dst_dir_fd=here, follow_symlinks=True)
    os.close(here)
    os.close(fd)
    assert read(d + "/named") == b"quietly"
    assert os.stat(d + "/named").st_nlink == 1


@check
def times_to_the_nanosecond(d: str) -> None:
    write(d + "/a")
    os.utime(d + "/a", ns=(1_111_111_111_123_456_789, 1_222_222_222_987_654_321))
    found = os.stat(d + "/a")
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_111_111_111_123_456_789, 1_222_222_222_987_654_321)
    os.symlink("nowhere", d + "/l")
    os.utime(d + "/l", ns=(5, 7), follow_symlinks=False)
    assert os.lstat(d + "/l").st_mtime_ns == 7
    before = os.stat(d + "/a").st_mtime_ns
    os.utime(d + "/a")
    assert os.stat(d + "/a").st_mtime_ns > before


@check
def writing_moves_mtime_and_reading_does_not(d: str) -> None:
    write(d + "/a")
    os.utime(d + "/a", ns=(1, 1))
    read(d + "/a")
    assert os.stat(d + "/a").st_mtime_ns == 1
    with open(d + "/a", "ab") as f:
        f.write(b"x")
    assert os.stat(d + "/a").st_mtime_ns > 1
    os.utime(d, ns=(1, 1))
    write(d + "/b")
    assert os.stat(d).st_mtime_ns > 1


@check
def modes_and_owners(d: str) -> None:
    write(d + "/a")
    os.chmod(d + "/a", 0o7751)
    assert stat.S_IMODE(os.stat(d + "/a").st_mode) == 0o7751
    if os.geteuid() == 0:
        os.chown(d + "/a", 123, 456)
        found = os.stat(d + "/a")
        assert (found.st_uid, found.st_gid) == (123, 456)
        assert not found.st_mode & stat.S_ISUID
        os.symlink("a", d + "/l")
        os.lchown(d + "/l", 7, 8)
        assert os.lstat(d + "/l").st_uid == 7
        assert os.stat(d + "/a").st_uid == 123


@check
def writing_as_a_user_clears_setuid(d: str) -> None:
    if os.geteuid() != 0:
        return
    os.chmod(d, 0o777)
    write(d + "/a")
    os.chown(d + "/a", 65534, 65534)
    os.chmod(d + "/a", 0o6777)
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            fd = os.open("a", os.O_WRONLY, dir_fd=_open_as_child(d))
            os.write(fd, b"x")
            os.close(fd)
        except OSError:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 0:  # else the path there is closed to other users
        assert stat.S_IMODE(os.stat(d + "/a").st_mode) == 0o777


def _open_as_child(d: str) -> int:
    return os.open(d, os.O_PATH)


@check
def extended_attributes(d: str) -> None:
    write(d + "/a")
    try:
        os.setxattr(d + "/a", "user.x", b"1", os.XATTR_CREATE)
    except OSError as e:
        if e.errno == errno.EOPNOTSUPP:
            return  # tmpfs of older kernels
        raise
    fails(errno.EEXIST, lambda: os.setxattr(d + "/a", "user.x", b"2", os.XATTR_CREATE))
    fails(errno.ENODATA, lambda: os.setxattr(d + "/a", "user.y", b"2", os.XATTR_REPLACE))
    os.setxattr(d + "/a", "user.x", b"v" * 1000)
    assert os.getxattr(d + "/a", "user.x") == b"v" * 1000
    assert "user.x" in os.listxattr(d + "/a")
    os.removexattr(d + "/a", "user.x")
    fails(errno.ENODATA, lambda: os.getxattr(d + "/a", "user.x"))
    fails(errno.E2BIG, lambda: os.setxattr(d + "/a", "user.big", b"x" * 65537))
    fails(errno.ERANGE, lambda: os.setxattr(d + "/a", "user." + "n" * 251, b"x"))


@check
def append_goes_to_the_end(d: str) -> None:
    fds = [os.open(d + "/a", os.O_CREAT | os.O_WRONLY | os.O_APPEND) for _ in range(2)]
    for i in range(50):
        os.write(fds[i % 2], b"%03d\n" % i)
    for fd in fds:
        os.close(fd)
    assert read(d + "/a") == b"".join(b"%03d\n" % i for i in range(50))


@check
def truncate_cuts_and_grows_with_zeros(d: str) -> None:
    write(d + "/a", b"x" * 10000)
    os.truncate(d + "/a", 5)
    os.truncate(d + "/a", 9000)
    assert read(d + "/a") == b"x" * 5 + bytes(8995)
    fd = os.open(d + "/a", os.O_RDWR | os.O_TRUNC)
    assert os.fstat(fd).st_size == 0
    os.close(fd)
    fails(errno.EINVAL, lambda: os.truncate(d + "/a", -1))


@check
def sizes_near_the_end_of_the_world(d: str) -> None:
    fd = os.open(write(d + "/a"), os.O_RDWR)
    fails(errno.EINVAL, lambda: os.pwrite(fd, b"x", -1))
    for offset in ((1 << 63) - 1, (1 << 63) - 2):
        try:
            written = os.pwrite(fd, b"xx", offset)
        except OSError as e:
            if e.errno not in (errno.EFBIG, errno.EINVAL):
                raise
        else:
            assert written < 2, "a write past the end of the world"
            os.ftruncate(fd, 4)
    try:
        os.ftruncate(fd, (1 << 63) - 1)
    except OSError as e:
        if e.errno not in (errno.EFBIG, errno.EINVAL):
            raise
    os.ftruncate(fd, 4)
    assert os.pread(fd, 10, 1 << 61) == b""
    os.close(fd)


@check
def sparse_files_read_as_zeros(d: str) -> None:
    fd = os.open(d + "/a", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"end", 1 << 30)
    assert os.fstat(fd).st_size == (1 << 30) + 3
    assert os.pread(fd, 4096, 1 << 29) == bytes(4096)
    assert os.pread(fd, 10, (1 << 30) - 4) == b"\0\0\0\0end"
    os.close(fd)
    assert os.stat(d + "/a").st_blocks * 512 < 1 << 29


@check
def shared_mappings(d: str) -> None:
    fd = os.open(write(d + "/a", bytes(10000)), os.O_RDWR)
    with mmap.mmap(fd, 10000) as m:
        m[4090:4100] = b"0123456789"
        assert os.pread(fd, 10, 4090) == b"0123456789"
        os.pwrite(fd, b"written", 0)
        assert m[:7] == b"written"
        m.flush()
    os.close(fd)
    assert read(d + "/a")[4090:4100] == b"0123456789"


@check
def holes_and_data_are_found(d: str) -> None:
    fd = os.open(d + "/a", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"x" * 65536, 1 << 20)
    os.ftruncate(fd, 4 << 20)
    data = os.lseek(fd, 0, os.SEEK_DATA)
    assert data <= 1 << 20
    hole = os.lseek(fd, 1 << 20, os.SEEK_HOLE)
    assert (1 << 20) + 65536 <= hole <= 4 << 20
    fails(errno.ENXIO, lambda: os.lseek(fd, 4 << 20, os.SEEK_DATA))
    os.close(fd)


@check
def locks_hold_between_processes(d: str) -> None:
    fd = os.open(write(d + "/a"), os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
    child = os.fork()
    if child == 0:
        other = os.open(d + "/a", os.O_RDWR)
        try:
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
        except OSError:
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 0


@check
def listing_a_large_directory_gives_each_name_once(d: str) -> None:
    names = {f"n{i:05d}" for i in range(3000)}
    for name in names:
        os.close(os.open(f"{d}/{name}", os.O_CREAT | os.O_WRONLY))
    found = os.listdir(d)
    assert len(found) == len(set(found))
    assert set(found) == names
    with os.scandir(d) as entries:
        assert all(e.is_file(follow_symlinks=False) for e in entries)
    shutil.rmtree(d)
    os.mkdir(d)


@check
def removing_while_listing_leaves_nothing(d: str) -> None:
    for i in range(1000):
        os.mkdir(f"{d}/{i}")
    with os.scandir(d) as entries:
        for e in entries:
            os.rmdir(e.path)
    left = os.listdir(d)
    for name in left:
        os.rmdir(f"{d}/{name}")
    assert os.listdir(d) == []


@check
def copy_between_files(d: str) -> None:
    data = os.urandom(300_000)
    source = os.open(write(d + "/a", data), os.O_RDONLY)
    target = os.open(d + "/b", os.O_CREAT | os.O_WRONLY)
    done = 0
    while done < len(data):
        done += os.copy_file_range(source, target, len(data) - done)
    os.close(source)
    os.close(target)
    assert read(d + "/b") == data


@check
def write_only_files_take_partial_pages(d: str) -> None:
    write(d + "/a", b"x" * 10000)
    fd = os.open(d + "/a", os.O_WRONLY)
    os.pwrite(fd, b"yy", 5000)
    os.close(fd)
    assert read(d + "/a") == b"x" * 5000 + b"yy" + b"x" * 4998


@check
def sync_calls_answer(d: str) -> None:
    fd = os.open(write(d + "/a"), os.O_RDWR | os.O_SYNC)
    os.write(fd, b"sync")
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    here = os.open(d, os.O_RDONLY)
    os.fsync(here)
    os.close(here)


@check
def statfs_is_sane(d: str) -> None:
    found = os.statvfs(d)
    assert found.f_blocks >= found.f_bfree >= found.f_bavail
    assert found.f_namemax == 255


@check
def a_file_that_was_written_can_be_run(d: str) -> None:
    shutil.copy("/bin/true", d + "/true")
    assert os.spawnv(os.P_WAIT, d + "/true", ["true"]) == 0


def run(directory: str, name: str) -> None:
    """Run one check in a fresh directory below `directory`. Raises what the check raises."""
    path = os.path.join(directory, name)
    os.mkdir(path)
    try:
        CHECKS[name](path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a directory's file system against a table of POSIX behaviour.")
    parser.add_argument("directory", help="an existing directory; each check works in a fresh one below it")
    directory = parser.parse_args().directory
    if not os.path.isdir(directory):
        parser.error(f"{directory}: not a directory")
    bad = 0
    for name in CHECKS:
        try:
            run(directory, name)
        except (AssertionError, OSError) as e:
            bad += 1
            print(f"FAILED {name}: {e}")
    print(f"{len(CHECKS) - bad} passed, {bad} failed")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
