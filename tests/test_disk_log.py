"""The log on disk: what was written survives keeper and worker, and comes to the store with the next mount."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import powercut
from tests.conftest import Mounted, Mounter, force_down, mounted_here, needs_mount, wbfuse
from tests.test_keeper import KILLS, kill_while_writing, kill_worker, right
from tests.test_promises import wait_until

SLOW = ("--bwlimit", "1MB/s", "--on-close", "background")
"""What is written stays in the log for a while."""


def down(m: Mounted) -> None:
    """Keeper and worker are dead, and the dead mount is removed."""
    m.kill()
    while mounted_here(m.path):
        wbfuse("umount", str(m.path))


@pytest.fixture
def log(workdir: Path) -> Path:
    return workdir / "log"


def options(log: Path, *more: str) -> tuple[str, ...]:
    return ("--log", str(log), "--fsync", "log", *more)


@needs_mount
def test_what_fsync_said_is_there_after_everybody_died(mounter: Mounter, log: Path) -> None:
    m = mounter(*options(log, *SLOW))
    data = os.urandom(12 << 20)
    (m.path / "dir").mkdir()
    with open(m.path / "dir/file", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.rename(m.path / "dir", m.path / "renamed")
    down(m)
    assert (m.source / "renamed/file").stat().st_size < len(data)
    again = mounter(*options(log), source=m.source)
    assert (again.path / "renamed/file").read_bytes() == data
    again.umount()
    assert (m.source / "renamed/file").read_bytes() == data
    assert list(log.iterdir()) == []
    assert not (m.source / ".wbfuse").exists()


@needs_mount
def test_a_volume_gets_what_its_log_has(mounter: Mounter, log: Path, volume: str) -> None:
    m = mounter(*options(log, *SLOW), source=volume)
    data = os.urandom(8 << 20)
    with open(m.path / "file", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    down(m)
    refused = wbfuse("mount", volume, str(m.path))
    assert refused.returncode == 2
    assert f"may have left data in the log {log}" in refused.stderr
    again = mounter(*options(log), source=volume)
    assert (again.path / "file").read_bytes() == data
    again.umount()
    assert wbfuse("check", volume, "--data").stdout == "0 problems\n"
    last = mounter(source=volume)
    assert (last.path / "file").read_bytes() == data


@needs_mount
def test_a_volume_that_another_host_took_over_does_not_get_it(mounter: Mounter, log: Path, volume: str) -> None:
    m = mounter(*options(log, *SLOW), source=volume)
    (m.path / "file").write_bytes(b"old" * 1000)
    wbfuse("sync", str(m.path / "file"), check=True)
    down(m)
    away = log.with_name("away")
    log.rename(away)  # as where the log is on another machine
    log.mkdir(mode=0o700)
    assert "is its disk mounted?" in wbfuse("mount", volume, str(m.path)).stderr
    assert wbfuse("recover", "--of", volume, input="y\ny\n").returncode == 0
    other = mounter(source=volume)
    (other.path / "file").write_bytes(b"new")
    other.umount()
    refused = wbfuse("mount", volume, str(m.path), "--log", str(away))
    assert refused.returncode == 2
    assert "was changed without this log" in refused.stderr
    assert wbfuse("recover", f"{away}/").returncode == 0


class Numbered:
    """Numbered writes at random places of a file, and each state that it had; some are fsynced."""

    def __init__(self, seed: int, slots: int = 64) -> None:
        self._rng, self._slots, self._number = random.Random(seed), slots, 0
        self._history, self._promised = [[0] * slots], 0

    def see(self, raw: bytes) -> None:
        """What is found now is one point of the history, not before the last fsync; it begins anew from there."""
        raw = raw.ljust(self._slots * 8, b"\0")
        found = [int.from_bytes(raw[i * 8 : i * 8 + 8], "little") for i in range(self._slots)]
        assert found in self._history[self._promised :]
        self._history, self._promised = [found], 0

    def go_on(self, fd: int) -> None:
        self.see(os.pread(fd, self._slots * 8, 0))
        for _ in range(self._rng.randrange(20, 200)):
            self._number += 1
            slot = self._rng.randrange(self._slots)
            os.pwrite(fd, self._number.to_bytes(8, "little"), slot * 8)
            self._history.append([*self._history[-1][:slot], self._number, *self._history[-1][slot + 1 :]])
            if self._rng.random() < 0.1:
                os.fsync(fd)
                self._promised = len(self._history) - 1


@needs_mount
@pytest.mark.parametrize("which", ["directory", "volume"])
def test_the_store_gets_a_prefix(mounter: Mounter, log: Path, volume: str, which: str) -> None:
    """Everybody is killed at any moment, again and again."""
    file = Numbered(7)
    source: Path | str = volume if which == "volume" else log.with_name("prefix")
    for _ in range(max(3, KILLS // 2)):
        m = mounter(*options(log, "--bwlimit", "4MB/s", "--kernel-cache", "off"), source=source)
        fd = os.open(m.path / "file", os.O_RDWR | os.O_CREAT)
        file.go_on(fd)
        m.kill()
        with pytest.raises(OSError, match="not connected"):
            os.close(fd)
        while mounted_here(m.path):
            wbfuse("umount", str(m.path))
    last = mounter(*options(log), source=source)
    file.see((last.path / "file").read_bytes())


@needs_mount
@pytest.mark.parametrize("fsync", ["store", "log"])
def test_writers_notice_no_death_of_the_worker(mounter: Mounter, log: Path, fsync: str) -> None:
    m = mounter("--log", str(log), "--fsync", fsync, "--max-deaths", "100000", "--log-size", "128MiB")
    said = kill_while_writing(m, KILLS, KILLS)
    assert said["wrong"] == []
    right(m.path, said["contents"])
    m.umount()
    right(m.source, said["contents"])
    assert list(log.iterdir()) == []


@needs_mount
def test_what_an_unmount_could_not_write_comes_with_the_next_mount(mounter: Mounter, log: Path) -> None:
    m = mounter(*options(log, *SLOW))
    data = os.urandom(16 << 20)
    (m.path / "file").write_bytes(data)
    keeper = m.status()["keeper"]["pid"]
    os.kill(keeper, signal.SIGTERM)
    assert wait_until(lambda: not mounted_here(m.path) or not Path(f"/proc/{keeper}").exists() or hurry(keeper))
    assert wait_until(lambda: not Path(f"/proc/{keeper}").exists() or hurry(keeper))
    again = mounter(*options(log), source=m.source)
    assert "that an earlier mount left in its log" in again.said
    assert (again.path / "file").read_bytes() == data


def hurry(keeper: int) -> bool:
    """Another signal; False, so that it can stand in a condition."""
    try:
        os.kill(keeper, signal.SIGTERM)
    except ProcessLookupError:
        return True
    return False


@needs_mount
def test_a_log_is_refused_elsewhere_and_a_source_without_its_log(mounter: Mounter, log: Path, workdir: Path) -> None:
    m = mounter(*options(log, *SLOW))
    (m.path / "file").write_bytes(b"x" * 3_000_000)
    wbfuse("sync", str(m.path / "file"), check=True)
    (workdir / "other").mkdir()
    (workdir / "there").mkdir()
    elsewhere = ("mount", str(workdir / "other"), str(workdir / "there"), "--log", str(log))
    assert "another mount uses it" in wbfuse(*elsewhere).stderr
    (m.path / "file2").write_bytes(os.urandom(3_000_000))
    down(m)
    assert f"holds the log of {m.source}" in wbfuse(*elsewhere).stderr
    refused = wbfuse("mount", str(m.source), str(m.path))
    assert refused.returncode == 2
    assert f"may have left data in the log {log}" in refused.stderr
    assert "file2" in wbfuse("recover", f"{log}/", check=True).stdout
    assert wbfuse("recover", f"{log}/", "--discard", input="y\nn\n").returncode == 130
    assert "file2" in wbfuse("recover", f"{log}/", "--export", str(workdir / "out"), check=True).stdout
    assert (workdir / "out/file2").stat().st_size == 3_000_000
    assert "file2" in wbfuse("recover", "log", cwd=workdir, check=True).stdout
    assert wbfuse("recover", f"{log}/", "--discard", input="y\ny\n").returncode == 0
    mounter(source=m.source).umount()
    assert not (m.source / ".wbfuse").exists()


@needs_mount
def test_what_was_unlinked_is_not_brought_back(mounter: Mounter, log: Path) -> None:
    m = mounter(*options(log, *SLOW))
    fd = os.open(m.path / "gone", os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(5_000_000))
    os.fsync(fd)
    os.unlink(m.path / "gone")
    (m.path / "kept").write_bytes(b"kept")
    wbfuse("sync", str(m.path / "kept"), check=True)
    m.kill()
    os.close(fd)
    while mounted_here(m.path):
        wbfuse("umount", str(m.path))
    again = mounter(*options(log), source=m.source)
    assert os.listdir(again.path) == ["kept"]
    again.umount()
    assert (m.source / "kept").read_bytes() == b"kept"
    assert os.listdir(m.source) == ["kept"]


@needs_mount
def test_others_cannot_get_at_it(mounter: Mounter, log: Path) -> None:
    m = mounter(*options(log))
    assert log.stat().st_mode & 0o777 == 0o700
    assert all(entry.stat().st_mode & 0o777 == 0o600 for entry in log.iterdir())
    m.umount()
    log.chmod(0o750)
    refused = wbfuse("mount", str(m.source), str(m.path), "--log", str(log))
    assert refused.returncode == 2
    assert "chmod 700" in refused.stderr


@needs_mount
def test_no_room_for_it_is_said_at_the_mount(workdir: Path, log: Path) -> None:
    for name in ("source", "mount"):
        (workdir / name).mkdir()
    log.mkdir(mode=0o700)
    wbfuse_mount = ("mount", str(workdir / "source"), str(workdir / "mount"), "--log", str(log))
    os.system(f"mount -t tmpfs -o size=64m,mode=700 none {log}")
    try:
        refused = wbfuse(*wbfuse_mount, "--log-size", "64MiB")
        assert refused.returncode == 2
        assert "MiB are needed for this log" in refused.stderr
        assert not (workdir / "source/.wbfuse").exists()
    finally:
        force_down(workdir / "mount")
        os.system(f"umount {log}")


def by_rename(home: Path, data: bytes) -> Path:
    (home / "final").write_bytes(b"what is replaced")
    with open(home / "new", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.rename(home / "new", home / "final")
    return home / "final"


def by_moved_directory(home: Path, data: bytes) -> Path:
    (home / "a/b").mkdir(parents=True)
    with open(home / "a/b/file", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.rename(home / "a", home / "moved")
    return home / "moved/b/file"


def by_second_link(home: Path, data: bytes) -> Path:
    (home / "other").touch()
    os.link(home / "other", home / "name")
    with open(home / "name", "r+b") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.unlink(home / "name")
    return home / "other"


def by_linked_temporary(home: Path, data: bytes) -> Path:
    fd = os.open(home, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, data)
    os.fsync(fd)
    os.link(f"/proc/self/fd/{fd}", home / "linked", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)
    return home / "linked"


@needs_mount
@pytest.mark.parametrize("by", [by_rename, by_moved_directory, by_second_link, by_linked_temporary])
def test_what_was_fsynced_is_found_under_any_name(
    mounter: Mounter, log: Path, by: Callable[[Path, bytes], Path]
) -> None:
    """The kill comes before the log on disk has heard of the new name."""
    m = mounter(*options(log, *SLOW))
    data = os.urandom(4 << 20)
    path = by(m.path, data)
    home = os.open(path.parent, os.O_RDONLY)
    os.fsync(home)
    os.close(home)
    down(m)
    again = mounter(*options(log), source=m.source)
    path = again.path / path.relative_to(m.path)
    assert path.read_bytes() == data
    again.umount()
    assert (again.source / path.relative_to(again.path)).read_bytes() == data
    assert not (again.source / ".wbfuse").exists()


@needs_mount
def test_users_without_privilege_get_back_what_was_fsynced(workdir: Path, user: list[str]) -> None:
    """Without file handles a name must be known to the log before the file has it."""
    for name in ("s", "m"):
        (workdir / name).mkdir()
        os.chown(workdir / name, 65534, 65534)
    os.chmod(workdir, 0o777)  # the log makes its directory itself
    words = [*user, "mount", "s", "m", "--log", "log", "--fsync", "log", *SLOW]
    script = """
import hashlib, os, sys
data = os.urandom(4 << 20)
os.mkdir("m/d")
with open("m/d/new", "wb") as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
os.rename("m/d/new", "m/d/file")
os.rename("m/d", "m/e")
print(hashlib.sha256(data).hexdigest())
"""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=workdir, text=True, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*words)
    m = Mounted(workdir / "s", workdir / "m")
    try:
        said = run(*user[: user.index("-m")], "-c", script).strip()
        state = json.loads(run(*user, "status", "--json", "m"))
        m.kill((state["keeper"]["pid"], state["worker"]["pid"]))
        run(*user, "umount", "m")
        assert hashlib.sha256((m.source / "e/file").read_bytes()).hexdigest() != said
        run(*words)
        run(*user, "umount", "m")
    finally:
        while mounted_here(m.path):
            run("umount", "-l", str(m.path))
    assert hashlib.sha256((m.source / "e/file").read_bytes()).hexdigest() == said
    assert os.stat(m.source / "e/file").st_uid == 65534


@needs_mount
def test_a_file_that_is_replaced_is_the_old_or_the_new_one(mounter: Mounter, log: Path) -> None:
    """Without any fsync: no empty file takes its place."""
    m = mounter(*options(log, "--bwlimit", "200KB/s", "--on-close", "background", "--kernel-cache", "off"))
    (m.path / "file").write_bytes(b"old")
    wbfuse("sync", str(m.path), check=True)
    data = os.urandom(2 << 20)
    (m.path / "new").write_bytes(data)
    os.rename(m.path / "new", m.path / "file")
    down(m)
    again = mounter(*options(log), source=m.source)
    assert (again.path / "file").read_bytes() in (b"old", data)


@needs_mount
@pytest.mark.parametrize("kind", ["directory", "volume"])
def test_a_file_that_is_whole_only_in_the_log_is_so_though_it_waits_to_be_replaced(
    mounter: Mounter, log: Path, volume: str, kind: str
) -> None:
    """Saved twice, fsynced by the log each time; of the first the store has a part when everybody dies."""
    m = mounter(*options(log, *SLOW), source=volume if kind == "volume" else None)
    contents = [os.urandom(4 << 20), os.urandom(4 << 20)]
    for n, data in enumerate(contents):
        with open(m.path / f"new{n}", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.rename(m.path / f"new{n}", m.path / "doc")
    down(m)
    again = mounter(*options(log), source=m.source)
    assert (again.path / "doc").read_bytes() in contents
    again.umount()
    again = mounter(source=m.source)
    assert (again.path / "doc").read_bytes() in contents


def save(home: Path, name: str, data: bytes) -> None:
    """As editors do."""
    fd = os.open(home / f".{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(fd, data)
        os.fsync(fd)
        os.rename(home / f".{name}", home / name)
    finally:
        with contextlib.suppress(OSError):  # its server is gone
            os.close(fd)


@needs_mount
@pytest.mark.parametrize("kind", ["directory", "volume"])
def test_whatever_was_saved_is_whole_after_everybody_died(
    mounter: Mounter, log: Path, volume: str, workdir: Path, kind: str
) -> None:
    """Saved again and again on a slow store; not older than what an fsync of the directory has promised."""
    rng, source = random.Random(3), volume if kind == "volume" else workdir / "docs"
    saved: dict[str, list[bytes]] = {name: [] for name in "abc"}
    promised: dict[str, int] = {}

    def go_on(home: Path) -> None:
        directory = os.open(home, os.O_RDONLY)
        with contextlib.suppress(OSError):  # until it is killed
            while True:
                name = rng.choice(list(saved))
                saved[name].append(rng.randbytes(rng.randrange(1, 1 << 20)))
                save(home, name, saved[name][-1])
                if rng.random() < 0.05:
                    os.fsync(directory)
                    promised.update({name: len(versions) - 1 for name, versions in saved.items() if versions})
        with contextlib.suppress(OSError):
            os.close(directory)

    for _ in range(max(2, KILLS // 10)):
        m = mounter(*options(log, "--bwlimit", "2MB/s", "--on-close", "background"), source=source)
        for name, versions in saved.items():
            if name in promised or (m.path / name).exists():
                found = (m.path / name).read_bytes()
                assert found in versions[promised.get(name, 0) :], f"{name}: {len(found)} bytes"
                versions[:], promised[name] = [found], 0
            else:
                versions.clear()
        saver = threading.Thread(target=go_on, args=(m.path,))
        saver.start()
        saver.join(rng.uniform(0.5, 3))  # any moment will do
        down(m)
        saver.join()


@needs_mount
@pytest.mark.parametrize("fsync", ["log", "store"])
def test_after_a_power_cut_each_file_is_at_a_point_of_its_history(mounter: Mounter, workdir: Path, fsync: str) -> None:
    """Source and log on one ext4 that loses what was not synced."""
    file = Numbered(11)
    with powercut.disk(workdir, 600) as disk:
        log, source = disk.path / "log", disk.path / "source"
        words = ("--log", str(log), "--fsync", fsync, "--kernel-cache", "off", "--dirty-expire", "100ms")
        words += ("--on-close", "background")  # else a child that closes what it inherited waits for a dead disk
        for _ in range(max(4, KILLS // 2)):
            m = mounter(*words, source=source)
            fd = os.open(m.path / "file", os.O_RDWR | os.O_CREAT)
            file.go_on(fd)
            disk.cut()
            m.kill()
            with contextlib.suppress(OSError):  # its server is gone
                os.close(fd)
            while mounted_here(m.path):
                wbfuse("umount", str(m.path))
            disk.down()
            disk.up()
        m = mounter(*words, source=source)
        file.see((m.path / "file").read_bytes())
        m.umount()


@needs_mount
@pytest.mark.parametrize("fsync", ["log", "store"])
def test_a_log_whose_disk_dies_is_gone_on_without(mounter: Mounter, workdir: Path, fsync: str) -> None:
    with powercut.disk(workdir, 400) as disk:
        m = mounter("--log", str(disk.path / "log"), "--fsync", fsync)
        (m.path / "before").write_bytes(b"before")
        disk.cut()
        with open(m.path / "after", "wb") as f:
            f.write(b"after")
            f.flush()
            os.fsync(f.fileno())
        assert m.status()["log"]["disk"]["error"]
        assert (m.source / "after").read_bytes() == b"after"
        m.umount()
    assert (m.source / "before").read_bytes() == b"before"
    again = mounter(source=m.source)
    assert (again.path / "after").read_bytes() == b"after"


def disk_dies(disk: powercut.Disk) -> None:
    disk.cut()


def directory_is_removed(disk: powercut.Disk) -> None:
    shutil.rmtree(disk.path / "log")


def files_are_cut_short(disk: powercut.Disk) -> None:
    for file in (disk.path / "log").iterdir():
        os.truncate(file, 0)


@needs_mount
@pytest.mark.parametrize("happens", [disk_dies, directory_is_removed, files_are_cut_short])
def test_a_worker_goes_on_where_the_log_on_disk_is_gone(
    mounter: Mounter, workdir: Path, happens: Callable[[powercut.Disk], None]
) -> None:
    """The memory log is there, and the store."""
    with powercut.disk(workdir, 400) as disk:
        m = mounter("--log", str(disk.path / "log"), "--fsync", "log", "--on-close", "background")
        (m.path / "before").write_bytes(b"before")
        happens(disk)
        _, worker = m.servers()
        m.kill([worker])
        with open(m.path / "after", "wb") as f:
            f.write(b"after")
            f.flush()
            os.fsync(f.fileno())
        wbfuse("restart", str(m.path), check=True)
        assert m.servers()[1] != worker
        assert (m.path / "after").read_bytes() == b"after"
        m.umount()
    assert (m.source / "before").read_bytes() == b"before"
    assert (m.source / "after").read_bytes() == b"after"


@needs_mount
def test_a_log_that_had_only_begun_is_of_nobody(mounter: Mounter, log: Path) -> None:
    """Its manifest was there and its source had no note of it yet; one that was withdrawn looks otherwise."""
    m = mounter(*options(log))
    assert wait_until(lambda: (log / "manifest.json").exists() and (m.source / ".wbfuse/log").exists())
    down(m)
    (m.source / ".wbfuse/log").unlink()
    refused = wbfuse("mount", str(m.source), str(m.path), *options(log))
    assert "was changed without this log" in refused.stderr
    manifest = json.loads((log / "manifest.json").read_text())
    (log / "manifest.json").write_text(json.dumps(manifest | {"begun": True}))
    again = mounter(*options(log), source=m.source)
    assert wait_until((m.source / ".wbfuse/log").exists)
    again.umount()


@needs_mount
def test_a_log_whose_disk_is_not_mounted_is_asked_for(mounter: Mounter, workdir: Path) -> None:
    with powercut.disk(workdir, 400) as disk:
        log = disk.path / "log"
        m = mounter(*options(log, *SLOW))
        data = os.urandom(5 << 20)
        (m.path / "file").write_bytes(data)
        wbfuse("sync", str(m.path / "file"), check=True)
        down(m)
        disk.down()
        for words in ((), ("--log", str(log))):
            refused = wbfuse("mount", str(m.source), str(m.path), *words)
            assert refused.returncode == 2
            assert "is its disk mounted?" in refused.stderr
            shutil.rmtree(log, ignore_errors=True)
        disk.up()
        again = mounter(*options(log), source=m.source)
        assert (again.path / "file").read_bytes() == data
        again.umount()


@needs_mount
def test_a_log_whose_end_was_cut_short_begins_anew(mounter: Mounter, log: Path) -> None:
    """Killed between the manifest that says "ended" and the rest: what comes later must not be taken for ended."""
    m = mounter(*options(log))
    down(m)
    manifest = log / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"ended": True}))
    m = mounter(*options(log, *SLOW), source=m.source)
    data = os.urandom(4 << 20)
    (m.path / "file").write_bytes(data)
    wbfuse("sync", str(m.path / "file"), check=True)
    down(m)
    again = mounter(*options(log), source=m.source)
    assert (again.path / "file").read_bytes() in (b"old", data)


@needs_mount
def test_times_that_were_set_are_not_undone(mounter: Mounter, log: Path) -> None:
    m = mounter(*options(log))
    (m.path / "file").write_bytes(b"data")
    wbfuse("sync", str(m.path), check=True)
    os.utime(m.path / "file", (10**9, 10**9))
    down(m)
    again = mounter(*options(log), source=m.source)
    assert (again.path / "file").stat().st_mtime == 10**9


@needs_mount
def test_a_worker_that_died_leaves_nothing_undone_on_disk(mounter: Mounter, log: Path) -> None:
    """The next one writes all of it again, in a new epoch, before anything else goes to the store."""
    m = mounter(*options(log, *SLOW))
    data = os.urandom(6 << 20)
    (m.path / "file").write_bytes(data)
    kill_worker(m)
    with open(m.path / "file", "r+b") as f:
        os.fsync(f.fileno())
    down(m)
    again = mounter(*options(log), source=m.source)
    assert (again.path / "file").read_bytes() == data
