"""The fourteen promises of the 2012 patches, each by name, on real mounts. The store is looked at from below."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Mounted, Mounter, mounted_here, needs_mount, wbfuse

pytestmark = needs_mount
MIB = 1 << 20
BACKGROUND = ("--on-close", "background")


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Poll for a state of another process; False after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)  # the state is another process's: nothing to wait on
    return False


@pytest.fixture
def faulty(mounter: Mounter, workdir: Path) -> tuple[Mounter, Callable[[dict[str, object]], None]]:
    """(mounter of stores that fail by script, set_script)."""
    script = workdir / "script.json"

    def set_script(what: dict[str, object]) -> None:
        new = script.with_suffix(".new")
        new.write_text(json.dumps(what))
        new.rename(script)

    def make(*options: str, **more: object) -> Mounted:
        return mounter(*options, command=[sys.executable, "-m", "wbfuse.testing.faults", str(script)], **more)

    set_script({})
    return make, set_script


def test_01_a_write_after_release_lands(mounter: Mounter) -> None:
    """A shared mapping outlives its descriptor: its pages are written through the inode, not the handle."""
    import mmap

    m = mounter(*BACKGROUND)
    fd = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 8192)
    mapping = mmap.mmap(fd, 8192)
    os.close(fd)
    mapping[4000:4200] = b"m" * 200
    mapping.close()
    m.umount()
    assert (m.source / "a").read_bytes() == bytes(4000) + b"m" * 200 + bytes(3992)


def test_02_a_write_only_file_is_read_to_change_part_of_a_page(mounter: Mounter) -> None:
    m = mounter()
    (m.source / "a").write_bytes(b"x" * 10000)
    fd = os.open(m.path / "a", os.O_WRONLY)
    os.pwrite(fd, b"yy", 5000)
    os.close(fd)
    assert (m.source / "a").read_bytes() == b"x" * 5000 + b"yy" + b"x" * 4998


def test_03_a_short_read_is_a_hole_and_not_a_shrunken_file(mounter: Mounter) -> None:
    m = mounter(*BACKGROUND)
    fd = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"start", 0)
    os.ftruncate(fd, 3 * MIB)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, 100, MIB) == bytes(100)
    assert os.fstat(fd).st_size == 3 * MIB
    os.close(fd)


def test_04_small_writes_leave_in_large_pieces(mounter: Mounter) -> None:
    m = mounter("--log-size", "512MiB")
    block = os.urandom(4096)
    with open(m.path / "a", "wb", buffering=0) as f:
        f.writelines(block for _ in range(64 * MIB // 4096))
    store = m.status()["store"]
    assert store["bytes_written"] == 64 * MIB
    assert store["bytes_written"] / store["writes"] >= 4 * MIB
    assert (m.source / "a").read_bytes() == block * (64 * MIB // 4096)


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "off"])
def test_05_only_the_option_turns_the_kernels_write_back_on(mounter: Mounter, cache: str) -> None:
    m = mounter("--kernel-cache", cache)
    assert ("WRITEBACK_CACHE" in m.status()["negotiated"]["capabilities"]) == (cache == "writeback")


def test_06_the_kernel_owns_the_size_and_asks_nobody_while_it_writes(mounter: Mounter) -> None:
    m = mounter(*BACKGROUND)
    with open(m.path / "a", "wb", buffering=0) as f:
        before = m.status()["requests"].get("GETATTR", 0)
        for i in range(2000):
            f.write(b"x" * 1000)
            assert os.fstat(f.fileno()).st_size == (i + 1) * 1000
        asked = m.status()["requests"].get("GETATTR", 0) - before
    assert asked < 100
    assert (m.path / "a").stat().st_size == 2_000_000


def test_07_times_are_kept_exactly_and_with_their_data(mounter: Mounter) -> None:
    m = mounter()
    with open(m.path / "a", "wb") as f:
        f.write(b"data")
    seen = (m.path / "a").stat().st_mtime_ns
    assert (m.source / "a").stat().st_mtime_ns == seen
    os.utime(m.path / "a", ns=(1_000_000_001, 2_000_000_003))
    m.umount()
    assert (m.source / "a").stat().st_mtime_ns == 2_000_000_003
    again = mounter(source=m.source)
    assert (again.path / "a").stat().st_mtime_ns == 2_000_000_003


def test_08_close_makes_the_file_durable_in_the_store(mounter: Mounter) -> None:
    m = mounter()
    data = os.urandom(5 * MIB + 123)
    (m.path / "a").write_bytes(data)
    assert (m.source / "a").read_bytes() == data
    assert m.status()["dirty_bytes"] == 0


def test_08_close_in_the_background_returns_at_once(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    make, script = faulty
    m = make(*BACKGROUND)
    script({"stall": True})
    (m.path / "a").write_bytes(b"not yet")  # would wait for ever if close waited
    assert (m.source / "a").read_bytes() == b""
    assert (m.path / "a").read_bytes() == b"not yet"
    script({})
    m.umount()
    assert (m.source / "a").read_bytes() == b"not yet"


def test_09_single_bytes_across_page_and_block_edges(mounter: Mounter) -> None:
    m = mounter()
    model = bytearray(os.urandom(3 * MIB))
    (m.path / "a").write_bytes(model)
    fd = os.open(m.path / "a", os.O_WRONLY)
    for edge in (0, 4096, 65536, MIB, 2 * MIB, 3 * MIB):
        for at in (edge - 1, edge, edge + 1):
            if at >= 0:
                os.pwrite(fd, b"!", at)
                model.extend(bytes(max(0, at + 1 - len(model))))
                model[at] = ord("!")
    os.close(fd)
    assert (m.source / "a").read_bytes() == model
    assert (m.path / "a").read_bytes() == model


def test_10_a_rewrite_during_write_back_neither_waits_nor_is_overtaken(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    make, script = faulty
    m = make(*BACKGROUND, "--kernel-cache", "off", "--dirty-expire", "10ms")
    fd = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    script({"stall": True})
    for n in range(5):
        os.pwrite(fd, bytes([n]) * 8192, 0)
        assert wait_until(lambda: m.status()["writeback_bytes"] > 0)
        assert os.pread(fd, 8192, 0) == bytes([n]) * 8192
    os.pwrite(fd, b"last", 100)
    script({})
    os.fsync(fd)
    os.close(fd)
    assert (m.source / "a").read_bytes() == b"\x04" * 100 + b"last" + b"\x04" * 8088


def test_11_a_failing_store_is_reported_once_to_each_open_file_and_nothing_is_lost(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    make, script = faulty
    m = make(*BACKGROUND)
    a = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    b = os.open(m.path / "a", os.O_RDWR)
    os.pwrite(a, b"precious", 0)
    script({"commit": "EIO"})
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(a)
    script({})
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(b)
    os.fsync(a)
    os.fsync(b)
    os.close(a)
    os.close(b)
    assert (m.source / "a").read_bytes() == b"precious"


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS"])
def test_11_close_waits_and_reports_the_errno_of_the_store(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]], code: str
) -> None:
    make, script = faulty
    m = make()
    fd = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"precious", 0)
    script({"commit": code})
    with pytest.raises(OSError, match=os.strerror(getattr(errno, code))):
        os.close(fd)
    assert m.status()["last_error"]
    script({})
    assert wbfuse("sync", str(m.path)).returncode == 0
    assert (m.source / "a").read_bytes() == b"precious"


def test_11_errors_that_pass_are_waited_out(faulty: tuple[Mounter, Callable[[dict[str, object]], None]]) -> None:
    make, script = faulty
    m = make(*BACKGROUND)
    fd = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"patience", 0)
    script({"commit": "ETIMEDOUT"})
    result: list[object] = []

    def sync() -> None:
        try:
            os.fsync(fd)
            result.append("durable")
        except OSError as e:
            result.append(e)

    thread = threading.Thread(target=sync)
    thread.start()
    assert wait_until(lambda: m.status()["failing_files"] == 1)
    script({})
    thread.join(30)
    assert result == ["durable"]
    os.close(fd)


def test_12_direct_and_cached_writes_keep_their_order(mounter: Mounter) -> None:
    import mmap

    m = mounter(*BACKGROUND)
    cached = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    direct = os.open(m.path / "a", os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    for n in range(60):
        os.pwrite(cached, bytes([n]) * 4096, 0)
        page[:] = bytes([n + 100]) * 4096
        os.pwritev(direct, [page], 0)
        assert os.pread(cached, 4096, 0) == bytes([n + 100]) * 4096
        os.pwrite(cached, bytes([n]) * 10, 20)
        os.preadv(direct, [page], 0)
        assert page[20:30] == bytes([n]) * 10
    os.close(cached)
    os.close(direct)
    m.umount()
    assert (m.source / "a").read_bytes() == bytes([159]) * 20 + bytes([59]) * 10 + bytes([159]) * 4066


def test_14_memory_is_bounded_and_readers_do_not_starve(mounter: Mounter) -> None:
    m = mounter("--bwlimit", "20MB/s", *BACKGROUND)
    (m.source / "other").write_bytes(b"read me")
    size = 120 * MIB
    done = threading.Event()

    def fill() -> None:
        with open(m.path / "a", "wb", buffering=0) as f:
            f.writelines(bytes(MIB) for _ in range(size // MIB))
        done.set()

    thread = threading.Thread(target=fill)
    thread.start()
    most, reads, throttled = 0, 0, False
    while not done.is_set():
        state = m.status()
        most = max(most, state["log"]["used"])
        throttled |= state["parked_writes"] > 0
        assert (m.path / "other").read_bytes() == b"read me"
        assert "a" in os.listdir(m.path)
        reads += 1
    thread.join()
    assert most <= m.status()["log"]["size"]
    assert throttled
    assert reads > 5


def test_14_direct_writes_that_find_no_room_are_refused_after_a_time_where_that_was_asked_for(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    """The log is full and its store down: what was taken waits and is written in the end, the rest says ENOSPC."""
    import mmap

    make, script = faulty
    m = make(*BACKGROUND, "--kernel-cache", "off", "--log-size", "32MiB", "--full-timeout", "200ms")
    results: dict[int, object] = {}

    def write(n: int) -> None:
        page = mmap.mmap(-1, MIB)
        page.write(bytes([n + 1]) * MIB)
        fd = os.open(m.path / f"f{n}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        try:
            results[n] = os.pwritev(fd, [page], 0)
        except OSError as e:
            results[n] = e.errno
        os.close(fd)

    threads = [threading.Thread(target=write, args=(n,), daemon=True) for n in range(64)]
    script({"stall": True})
    try:
        for t in threads:
            t.start()
        refused = wait_until(lambda: errno.ENOSPC in results.values())
    finally:
        script({})
    for t in threads:
        t.join(60)
    assert refused
    assert set(results.values()) == {errno.ENOSPC, MIB}
    m.umount()
    for n, result in results.items():
        assert (m.source / f"f{n}").read_bytes() == (bytes([n + 1]) * MIB if result == MIB else b"")


def test_14_a_full_store_refuses_direct_writes_and_keeps_cached_ones(workdir: Path, mounter: Mounter) -> None:
    small = workdir / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small)], check=True)
    try:
        m = mounter(*BACKGROUND, source=small)
        fd = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
        (m.source / "filler").write_bytes(bytes(4 * MIB))
        data = os.urandom(6 * MIB)
        os.pwrite(fd, data, 0)
        with pytest.raises(OSError, match="No space left"):
            os.fsync(fd)
        direct = os.open(m.path / "a", os.O_RDWR | os.O_DIRECT)
        import mmap

        page = mmap.mmap(-1, 4096)
        with pytest.raises(OSError, match="No space left"):
            os.pwritev(direct, [page], 6 * MIB)
        os.close(direct)
        assert os.pread(fd, len(data), 0) == data
        (m.source / "filler").unlink()
        os.fsync(fd)
        os.close(fd)
        assert (m.source / "a").read_bytes() == data
        m.umount()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_size_extension_and_allocation_do_not_race(mounter: Mounter) -> None:
    """Also promised there: fallocate against growing writes never cuts what was written."""
    m = mounter(*BACKGROUND)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    fd = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    stop = threading.Event()

    def allocate() -> None:
        while not stop.is_set():
            assert libc.fallocate(fd, 0, 0, 100_000) == 0

    thread = threading.Thread(target=allocate)
    thread.start()
    for i in range(300):
        os.pwrite(fd, bytes([i % 251 + 1]) * 1000, i * 1000)
    stop.set()
    thread.join()
    os.close(fd)
    m.umount()
    found = (m.source / "a").read_bytes()
    assert found == b"".join(bytes([i % 251 + 1]) * 1000 for i in range(300))


def test_seek_data_sees_what_the_kernel_has_not_handed_over(mounter: Mounter) -> None:
    """`cp --sparse` of a file that was just written must not take dirty pages for holes."""
    m = mounter(*BACKGROUND)
    fd = os.open(m.path / "a", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 4 * MIB)
    os.pwrite(fd, b"x" * 4096, 2 * MIB)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * MIB
    assert os.lseek(fd, 2 * MIB, os.SEEK_HOLE) == 2 * MIB + 4096
    subprocess.run(["cp", "--sparse=always", m.path / "a", m.path / "b"], check=True)
    assert (m.path / "b").read_bytes() == bytes(2 * MIB) + b"x" * 4096 + bytes(2 * MIB - 4096)
    os.close(fd)


def test_unlink_of_a_dirty_file_drops_its_data(faulty: tuple[Mounter, Callable[[dict[str, object]], None]]) -> None:
    make, script = faulty
    m = make(*BACKGROUND)
    script({"stall": True})
    (m.path / "a").write_bytes(bytes(8 * MIB))
    (m.path / "a").unlink()
    script({})
    assert wait_until(lambda: m.status()["dirty_bytes"] == 0)
    m.umount()
    assert not list(m.source.iterdir())


def test_an_interrupted_fsync_ends_at_once_and_loses_nothing(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    make, script = faulty
    m = make(*BACKGROUND)
    script({"stall": True})
    code = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR);"
        "os.write(fd, b'kept'); print('!', flush=True); os.fsync(fd)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(m.path / "a")], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            assert wait_until(lambda: m.status()["requests"].get("FSYNC", 0) == 1)
            child.terminate()
            child.wait(20)
        finally:
            script({})
    script({})
    assert wbfuse("sync", str(m.path)).returncode == 0
    assert (m.source / "a").read_bytes() == b"kept"


def test_a_set_user_id_file_loses_the_bit_when_written(mounter: Mounter) -> None:
    m = mounter()
    (m.path / "a").write_bytes(b"x")
    os.chown(m.path / "a", 65534, 65534)
    os.chmod(m.path / "a", 0o4777)
    script = "import os; fd = os.open('a', os.O_WRONLY); os.write(fd, b'y'); os.close(fd)"
    os.chmod(m.source, 0o755)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", script],
        cwd=m.path,
        check=False,
    )
    if done.returncode == 0:
        assert not (m.source / "a").stat().st_mode & stat.S_ISUID
    else:
        assert not (m.source / "a").stat().st_mode & stat.S_ISGID


def test_a_dirty_file_is_written_though_the_kernel_has_forgotten_its_directory(mounter: Mounter) -> None:
    m = mounter(*BACKGROUND, "--dirty-expire", "1h")
    (m.path / "d/e").mkdir(parents=True)
    (m.path / "d/e/f").write_bytes(b"found again")
    Path("/proc/sys/vm/drop_caches").write_text("2")
    assert wait_until(lambda: {"FORGET", "BATCH_FORGET"} & set(m.status()["requests"]) != set())
    m.umount()
    assert (m.source / "d/e/f").read_bytes() == b"found again"


def test_sync_ends_beside_writers_that_do_not(mounter: Mounter) -> None:
    m = mounter("--bwlimit", "30MB/s", "--kernel-cache", "off", *BACKGROUND)
    stop = threading.Event()

    def write() -> None:
        fd = os.open(m.path / "endless", os.O_CREAT | os.O_RDWR)
        while not stop.is_set():
            os.pwrite(fd, bytes(65536), os.fstat(fd).st_size % (64 * MIB))
        os.close(fd)

    thread = threading.Thread(target=write)
    thread.start()
    (m.path / "a").write_bytes(b"before the sync")
    try:
        assert wbfuse("sync", str(m.path)).returncode == 0
        assert (m.source / "a").read_bytes() == b"before the sync"
    finally:
        stop.set()
        thread.join()


def test_a_store_that_cannot_make_durable_is_not_called_durable(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    make, script = faulty
    m = make(*BACKGROUND)
    (m.path / "a").write_bytes(b"x")
    script({"sync_all": "EIO"})
    failed = wbfuse("sync", str(m.path))
    assert failed.returncode == 1
    assert "sync_all" in failed.stderr
    script({})
    assert wbfuse("sync", str(m.path)).returncode == 0


def test_a_reopened_file_is_not_taken_for_durable(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    make, script = faulty
    m = make(*BACKGROUND, "--dirty-expire", "10ms")
    (m.path / "a").write_bytes(b"committed, not synced")
    assert wait_until(lambda: m.status()["dirty_files"] == 0)
    script({"sync": "EIO"})
    fd = os.open(m.path / "a", os.O_RDWR)
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(fd)
    script({})
    os.fsync(fd)
    os.close(fd)


def test_direct_writes_beyond_the_log_leave_names_quick_and_arrive(mounter: Mounter) -> None:
    """128 MiB in flight at once against a log of 64: the kernel is asked to send again what found no room."""
    import mmap

    m = mounter("--bwlimit", "40MB/s", *BACKGROUND)
    size = 128 * MIB
    with open(m.source / "a", "wb") as f:
        f.truncate(size)
    fd = os.open(m.path / "a", os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, size)
    for i in range(0, size, MIB):
        buffer[i : i + 8] = i.to_bytes(8, "little")
    written: list[int] = []
    thread = threading.Thread(target=lambda: written.append(os.pwritev(fd, [buffer], 0)))
    thread.start()
    looked = 0
    while thread.is_alive():
        with pytest.raises(FileNotFoundError):
            os.stat(m.path / f"none{looked}")
        looked += 1
    thread.join()
    os.close(fd)
    assert written == [size]
    assert looked > 20
    m.umount()
    with open(m.source / "a", "rb") as f:
        for i in range(0, size, MIB):
            f.seek(i)
            assert f.read(8) == i.to_bytes(8, "little")


def test_sigterm_ends_a_mount_whose_store_fails_once_it_heals(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    make, script = faulty
    m = make(*BACKGROUND)
    pid = m.status()["keeper"]["pid"]
    script({"commit": "EIO"})
    (m.path / "a").write_bytes(b"patience")
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not mounted_here(m.path))
    assert Path(f"/proc/{pid}").exists()
    script({})
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert (m.source / "a").read_bytes() == b"patience"


def test_a_second_signal_ends_it_all_the_same(faulty: tuple[Mounter, Callable[[dict[str, object]], None]]) -> None:
    make, script = faulty
    m = make(*BACKGROUND)
    pid = m.status()["keeper"]["pid"]
    script({"commit": "EIO"})
    (m.path / "a").write_bytes(b"lost, and said so")
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not mounted_here(m.path))
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_attributes_set_during_a_commit_stay(faulty: tuple[Mounter, Callable[[dict[str, object]], None]]) -> None:
    make, script = faulty
    m = make(*BACKGROUND, "--dirty-expire", "10ms")
    script({"stall": True})
    (m.path / "a").write_bytes(b"x")
    os.utime(m.path / "a", ns=(1_000_000_000, 2_000_000_000))
    os.chmod(m.path / "a", 0o600)
    script({})
    m.umount()
    found = (m.source / "a").stat()
    assert (found.st_atime_ns, found.st_mtime_ns, found.st_mode & 0o777) == (1_000_000_000, 2_000_000_000, 0o600)


CHANGES_WITHOUT_PAYLOAD = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(sys.argv[1], os.O_RDWR)
for i in range(20_000):
    os.ftruncate(fd, 1 << 20 | i)
    os.utime(fd, ns=(i, i))
for i in range(20_000):  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    if libc.fallocate(fd, 3, ctypes.c_long(i % 256 * 4096), ctypes.c_long(4096)):
        sys.exit(os.strerror(ctypes.get_errno()))
print("done", flush=True)
"""


def test_changes_without_payload_fill_the_log_and_leave_names_quick(
    faulty: tuple[Mounter, Callable[[dict[str, object]], None]],
) -> None:
    mount, script = faulty
    m = mount("--log-size", "16MiB", "--on-close", "background")
    (m.path / "f").write_bytes(b"x")
    script({"commit": "EIO"})
    with subprocess.Popen(
        [sys.executable, "-c", CHANGES_WITHOUT_PAYLOAD, str(m.path / "f")], stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout is not None
            assert wait_until(lambda: m.status()["log"]["used"] > 6 * MIB)
            for n in range(200):
                assert not (m.path / f"no{n}").exists()
            assert child.poll() is None
        finally:
            script({})
        assert child.stdout.readline() == b"done\n"
    m.umount()
    assert (m.source / "f").stat().st_size == 1 << 20 | 19_999


@needs_mount
def test_syncfs_meets_no_error_of_a_file_that_is_gone(mounter: Mounter) -> None:
    """The kernel writes the time of an unlink back when the node is forgotten here already."""
    m = mounter()
    for n in range(20):
        (m.path / f"f{n}").write_bytes(b"x")
        (m.path / f"f{n}").unlink()
        subprocess.run(["sync", "-f", str(m.path)], check=True)
