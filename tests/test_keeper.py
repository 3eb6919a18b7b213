"""Workers that die: applications notice a pause and no error, everything happens once, nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WBFUSE, Mounted, Mounter, mounted_here, needs_mount, wbfuse
from tests.test_promises import wait_until
from wbfuse import cli as package

pytestmark = needs_mount
KILLS = int(os.environ.get("WBFUSE_KILLS", "8"))
MANY = ("--max-deaths", "100000", "--log-size", "128MiB")
KINDS: dict[str, tuple[str, ...]] = {
    "writeback": (),
    "background close": ("--on-close", "background", "--dirty-expire", "50ms"),
    "kernel writethrough": ("--kernel-cache", "writethrough"),
    "kernel off": ("--kernel-cache", "off"),
    "writethrough": ("--policy", "writethrough"),
}


def worker(m: Mounted) -> int:
    return int(m.status()["worker"]["pid"])


def keeper_of(m: Mounted) -> int:
    return int(m.status()["keeper"]["pid"])


def kill_worker(m: Mounted) -> None:
    """SIGKILL, and wait until the process is gone."""
    pid = worker(m)
    ended = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([ended], [], [])
    os.close(ended)


@contextmanager
def writing(m: Mounted, seed: int) -> Iterator[dict[str, Any]]:
    """Writers on the mount while the block runs; what they say in the end is in the dict then."""
    command = [sys.executable, "-m", "tests.writers", str(m.path), str(seed)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    said: dict[str, Any] = {}
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        yield said
        said |= json.loads(process.communicate(timeout=120)[0])
    finally:
        process.kill()
        process.wait()


def kill_while_writing(m: Mounted, seed: int, kills: int) -> dict[str, Any]:
    rng = random.Random(seed)
    with writing(m, seed) as said:
        for _ in range(kills):
            time.sleep(rng.random() * 0.5)  # any moment will do
            kill_worker(m)
    return said


def right(home: Path, contents: dict[str, str]) -> None:
    for name, digits in contents.items():
        assert (home / name).read_bytes() == bytes.fromhex(digits), name


@pytest.mark.parametrize("kind", KINDS)
def test_writers_notice_no_death_of_the_worker(mounter: Mounter, kind: str) -> None:
    m = mounter(*MANY, *KINDS[kind])
    keeper = m.status()["keeper"]["pid"]
    before = len(os.listdir(f"/proc/{keeper}/fd"))
    said = kill_while_writing(m, KILLS, KILLS)
    assert said["wrong"] == []
    assert min(said["counts"].values()) > 0
    right(m.path, said["contents"])
    assert len(os.listdir(f"/proc/{keeper}/fd")) == before
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    assert children == [str(worker(m))]
    m.umount()
    right(m.source, said["contents"])
    assert not (m.source / ".wbfuse").exists()
    assert wait_until(lambda: not Path(f"/proc/{keeper}").exists())


def test_writers_on_a_volume_notice_no_death_of_the_worker(mounter: Mounter, volume: str) -> None:
    m = mounter(*MANY, source=volume)
    said = kill_while_writing(m, KILLS, KILLS)
    assert said["wrong"] == []
    right(m.path, said["contents"])
    m.umount()
    assert wbfuse("check", volume, "--data").stdout == "0 problems\n"
    m = mounter(source=volume)
    right(m.path, said["contents"])


def test_writers_on_s3_and_postgres_notice_no_death_of_the_worker(
    mounter: Mounter, s3_url: str, postgres_meta: str
) -> None:
    wbfuse("format", postgres_meta, "--data", s3_url, check=True)
    m = mounter(*MANY, source=postgres_meta)
    said = kill_while_writing(m, KILLS, KILLS // 2)
    assert said["wrong"] == []
    right(m.path, said["contents"])
    m.umount()
    assert wbfuse("check", postgres_meta, "--data").stdout == "0 problems\n"


@pytest.mark.parametrize("how", ["restart", "SIGKILL"])
def test_what_is_open_stays_open(mounter: Mounter, how: str) -> None:
    m = mounter(*MANY)
    for n in range(3000):
        (m.path / f"name{n}").touch()
    held = os.open(m.path / "held", os.O_RDWR | os.O_CREAT)
    os.write(held, b"before ")
    gone = os.open(m.path / "gone", os.O_RDWR | os.O_CREAT)
    os.write(gone, b"no name")
    os.unlink(m.path / "gone")
    listing = os.scandir(m.path)
    names = [next(listing).name for _ in range(100)]
    pid = worker(m)
    if how == "restart":
        assert "served by process" in wbfuse("restart", str(m.path), check=True).stdout
    else:
        kill_worker(m)
    os.write(held, b"after")
    assert os.pread(held, 100, 0) == b"before after"
    assert os.pread(gone, 100, 0) == b"no name"
    names += [e.name for e in listing]
    assert sorted(names) == sorted(["held", *(f"name{n}" for n in range(3000))])
    assert worker(m) != pid
    os.close(held)
    os.close(gone)
    m.umount()
    assert (m.source / "held").read_bytes() == b"before after"
    assert not (m.source / ".wbfuse").exists()


def test_a_log_full_of_dirty_data_is_taken_over(mounter: Mounter) -> None:
    """Nothing could be written back before the death; the log is nearly full, and writers wait for room."""
    m = mounter(*MANY, "--on-close", "background", "--bwlimit", "4MB/s")
    data = os.urandom(24 << 20)
    (m.path / "big").write_bytes(data)
    kill_worker(m)
    assert (m.path / "big").read_bytes() == data
    status = m.status()
    assert status["dirty_bytes"] > 0
    assert status["worker"]["deaths"] == 1
    kill_worker(m)
    assert (m.path / "big").read_bytes() == data
    m.umount()
    assert (m.source / "big").read_bytes() == data


def test_a_worker_that_dies_too_often_ends_the_mount_and_its_log_is_kept(
    mounter: Mounter, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(workdir / "state"))
    m = mounter("--max-deaths", "3", "--on-close", "background", "--dirty-expire", "1h")
    keeper = m.status()["keeper"]["pid"]
    (m.path / "a").write_bytes(b"kept")
    for _ in range(3):
        kill_worker(m)
    assert wait_until(lambda: not Path(f"/proc/{keeper}").exists())
    assert not mounted_here(m.path)
    assert "the log of a mount" in wbfuse("recover", check=True).stdout
    (entry,) = (workdir / "state/wbfuse/quarantine").iterdir()
    said = wbfuse("recover", entry.name, "--export", str(workdir / "out"), check=True).stdout
    assert "4 B of /a\n" in said
    assert (workdir / "out/a").read_bytes() == b"kept"
    assert "said last: " in wbfuse("status", str(m.path)).stderr
    again = wbfuse("mount", str(m.source), str(m.path), "--log-size", "64MiB", check=True)
    assert "1 in quarantine" in again.stderr
    m.umount()
    assert wbfuse("recover", entry.name, "--discard", input="y\n").returncode == 0
    assert not entry.exists()


def test_another_version_misreads_nothing_and_the_right_one_goes_on(
    mounter: Mounter, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update and its undoing, under a mount."""
    installed = workdir / "lib/wbfuse"
    shutil.copytree(Path(package.__file__).parent.parent, installed)
    monkeypatch.setenv("PYTHONPATH", str(installed.parent))
    journal = installed / "journal.py"
    ours = journal.read_text()
    assert "\nVERSION = 1\n" in ours
    m = mounter("--on-close", "background", command=[sys.executable, "-m", "wbfuse", "mount"])
    (m.path / "a").write_bytes(b"kept")
    keeper = keeper_of(m)
    journal.write_text(ours.replace("\nVERSION = 1\n", "\nVERSION = 99\n"))
    words = [sys.executable, "-m", "wbfuse", "restart", str(m.path)]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "unmount it, and mount it again" in refused.stderr
    assert (m.path / "a").read_bytes() == b"kept"
    kill_worker(m)
    messages = Path(f"/proc/{keeper}/fd/2")
    assert wait_until(lambda: "another version of wbfuse" in messages.read_text())
    journal.write_text(ours)
    assert (m.path / "a").read_bytes() == b"kept"
    m.umount()
    assert (m.source / "a").read_bytes() == b"kept"


def test_a_store_that_is_away_when_the_next_worker_starts_is_waited_for(
    mounter: Mounter, postgres_meta: str, s3_url: str, postgres: Any
) -> None:
    wbfuse("format", postgres_meta, "--data", s3_url, check=True)
    m = mounter("--on-close", "background", source=postgres_meta)
    (m.path / "a").write_bytes(b"patience")
    pid = worker(m)
    postgres.stop()
    try:
        os.kill(pid, signal.SIGKILL)
    finally:
        postgres.start()
    assert (m.path / "a").read_bytes() == b"patience"
    m.umount()
    m = mounter(source=postgres_meta)
    assert (m.path / "a").read_bytes() == b"patience"


def test_signals_to_the_keeper_reach_a_worker_that_follows(mounter: Mounter) -> None:
    m = mounter("--on-close", "background")
    (m.path / "a").write_bytes(b"all")
    keeper, pid = m.status()["keeper"]["pid"], worker(m)
    os.kill(pid, signal.SIGKILL)
    os.kill(keeper, signal.SIGTERM)
    assert wait_until(lambda: not Path(f"/proc/{keeper}").exists())
    assert (m.source / "a").read_bytes() == b"all"


def test_a_signal_to_keeper_and_worker_at_once_is_one(mounter: Mounter) -> None:
    """As the end of a service or of the machine sends it."""
    m = mounter("--on-close", "background", "--bwlimit", "8MB/s")
    data = os.urandom(8 << 20)
    (m.path / "a").write_bytes(data)
    pids = [m.status()["keeper"]["pid"], worker(m)]
    for pid in reversed(pids):
        os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert (m.source / "a").read_bytes() == data


def test_while_no_worker_lives_nobody_else_takes_the_source(mounter: Mounter, workdir: Path) -> None:
    m = mounter()
    (workdir / "other").mkdir()
    os.kill(worker(m), signal.SIGKILL)
    refused = wbfuse("mount", str(m.source), str(workdir / "other"))
    assert refused.returncode == 2
    assert "another wbfuse mount" in refused.stderr


def test_sync_goes_on_where_the_worker_died_over_it(mounter: Mounter) -> None:
    m = mounter("--on-close", "background", "--bwlimit", "8MB/s")
    data = os.urandom(12 << 20)
    (m.path / "a").write_bytes(data)
    pid = worker(m)
    syncing = subprocess.Popen([WBFUSE, "sync", str(m.path)])
    assert wait_until(lambda: (m.source / "a").stat().st_size > 0)
    os.kill(pid, signal.SIGKILL)
    assert syncing.wait(60) == 0
    assert (m.source / "a").read_bytes() == data


def test_without_its_keeper_a_worker_goes_on_and_says_so(mounter: Mounter) -> None:
    m = mounter("--on-close", "background")
    keeper, pid = keeper_of(m), worker(m)
    os.kill(keeper, signal.SIGKILL)
    assert wait_until(lambda: m.status()["keeper"]["pid"] == 0)
    refused = wbfuse("restart", str(m.path))
    assert refused.returncode == 1
    assert "keeper is gone" in refused.stderr
    (m.path / "a").write_bytes(b"still served")
    m.umount()
    assert (m.source / "a").read_bytes() == b"still served"
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize("kernel_cache", ["writeback", "writethrough"])
def test_without_resend_what_a_dead_worker_left_unanswered_ends_in_an_error(
    mounter: Mounter, workdir: Path, monkeypatch: pytest.MonkeyPatch, kernel_cache: str
) -> None:
    """As before Linux 6.9: whoever waited hears of it, the rest holds, and nothing hangs."""
    monkeypatch.setenv("WBFUSE_NO_RESEND", "1")
    script = workdir / "script.json"
    command = [sys.executable, "-m", "wbfuse.testing.faults", str(script)]
    m = mounter("--on-close", "background", "--kernel-cache", kernel_cache, command=command)
    assert "HAS_RESEND" not in m.status()["negotiated"]["capabilities"]
    kept = os.open(m.path / "kept", os.O_RDWR | os.O_CREAT)
    os.write(kept, b"kept")
    script.write_text('{"stall": true}')
    errors: list[int] = []

    def wait() -> None:
        with open(m.path / "waited", "wb", buffering=0) as f:
            f.write(b"written")
            try:
                os.fsync(f.fileno())
            except OSError as e:
                errors.append(e.errno or 0)

    waiting = threading.Thread(target=wait, daemon=True)
    try:
        waiting.start()
        assert wait_until(lambda: m.status()["requests"].get("FSYNC", 0) > 0)
        kill_worker(m)
        waiting.join(20)
        assert not waiting.is_alive()
    finally:
        script.unlink()
    assert errors == [errno.ECONNABORTED]
    os.write(kept, b" and more")
    assert os.pread(kept, 100, 0) == b"kept and more"
    os.close(kept)
    assert (m.path / "waited").read_bytes() == b"written"
    m.umount()
    assert (m.source / "kept").read_bytes() == b"kept and more"
    assert (m.source / "waited").read_bytes() == b"written"


@needs_mount
def test_a_worker_dies_though_the_kernel_was_asked_to_write_back(mounter: Mounter) -> None:
    """NOTIFY_INVAL_INODE waits where no signal comes through, for replies that only the next worker gives."""
    m = mounter("--max-deaths", "1000")
    data, rng = bytearray(4 << 20), random.Random(5)
    with open(m.path / "file", "w+b", buffering=0) as f, ThreadPoolExecutor(1) as pool:
        f.truncate(len(data))
        for _ in range(max(8, KILLS // 10)):
            server = worker(m)
            for at in range(0, len(data), 8192):  # each page is a request of its own, one after the other
                data[at : at + 4096] = rng.randbytes(4096)
                os.pwrite(f.fileno(), data[at : at + 4096], at)
            asked = pool.submit(os.lseek, f.fileno(), 0, os.SEEK_HOLE)
            time.sleep(rng.random() * 0.02)  # any moment will do
            os.kill(server, signal.SIGKILL)
            assert asked.result(60) == 4096
        assert os.pread(f.fileno(), len(data), 0) == data
    m.umount()
    assert (m.source / "file").read_bytes() == data


def children(process: int) -> list[int]:
    return [
        int(pid) for task in Path(f"/proc/{process}/task").iterdir() for pid in (task / "children").read_text().split()
    ]


def kill_whoever_serves(keeper: int) -> None:
    """SIGKILL to a worker that may not have come to serve yet, as its store is away."""
    for pid in children(keeper):
        os.kill(pid, signal.SIGKILL)


def notifying(server: int) -> list[int]:
    """The processes of a server that write notifications, where they wait in the kernel."""
    found = []
    for pid in children(server):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "D":
            found.append(pid)
    return found


@needs_mount
def test_nothing_hangs_where_everybody_dies_while_the_kernel_was_asked_to_write_back(mounter: Mounter) -> None:
    """Who asked waits where no signal comes through, and holds the connection."""
    m = mounter()
    servers = m.servers()
    fd = os.open(m.path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 64 << 20)
    pool = ThreadPoolExecutor(1)

    def ask() -> Future[int]:
        for at in range(0, 64 << 20, 8192):  # each page is a request of its own
            os.pwrite(fd, b"dirty", at)
        return pool.submit(os.lseek, fd, 0, os.SEEK_HOLE)

    def waits(asked: Future[int]) -> list[int]:
        wait_until(lambda: asked.done() or bool(notifying(servers[1])))
        os.kill(servers[1], signal.SIGSTOP)
        return notifying(servers[1])

    while not (left := waits(asked := ask())):  # it was too quick
        os.kill(servers[1], signal.SIGCONT)
        asked.result(60)
    ended = os.pidfd_open(left[0])
    m.kill(servers)
    assert isinstance(asked.exception(60), OSError)
    assert select.select([ended], [], [], 60)[0]
    os.close(ended)
    pool.shutdown()
    with pytest.raises(OSError, match="Input/output"):  # what could not be written
        os.close(fd)
    with pytest.raises(OSError, match="not connected"):
        os.stat(m.path / "file")
