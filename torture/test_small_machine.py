"""A machine of 256 MiB that copies an image of 1 GiB through a mount: daemon, cp and both page caches in it together.

Its kernel is Debian 12's, which has no RESEND, so half way through the worker is killed for that as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import markdown_it
import mdurl
import pygments
import pytest
import rich
import xxhash

import wbfuse

MACHINE = Path(sys.prefix) / "machine"
MIB = 1 << 20
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONPATH=/opt/python HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run
modprobe fuse
mount /dev/nvme1n1 /srv
mkdir -p /srv/store /mnt/wb
grep MemTotal /proc/meminfo
off() { sync; echo 1 > /proc/sys/kernel/sysrq; echo o > /proc/sysrq-trigger; sleep 60; }
wb() { python3 -P -m wbfuse "$@"; }
wb mount /srv/store /mnt/wb --log-size 64MiB --on-close background || off
dd if=/dev/urandom of=/srv/image bs=1M count=SIZE status=none
sync
cp /srv/image /mnt/wb/image && echo COPIED
wb status /mnt/wb | grep -a worker
wb umount /mnt/wb && echo UNMOUNTED
cmp /srv/image /srv/store/image && echo SAME
wb mount /srv/store /mnt/wb --log-size 64MiB --kernel-cache off
pid=$(wb status --json /mnt/wb | sed -n 's/.*"worker": {//;/"pid"/p' | tail -1 | tr -dc 0-9)
echo before > /mnt/wb/small; kill -9 "$pid"; echo after > /mnt/wb/small2; cat /mnt/wb/small
wb umount /mnt/wb && echo UNMOUNTED AGAIN
echo "killed for want of memory: $(dmesg | grep -c 'Out of memory')"
umount /srv; sync; off
"""


def built(home: Path) -> tuple[Path, Path]:
    """The machine's two disks: its system with wbfuse in it, and an empty one."""
    root = home / "root"
    subprocess.run(["cp", "-a", str(MACHINE / "root"), str(root)], check=True)  # devices as devices
    python = root / "opt/python"
    for package in (wbfuse, click, rich, markdown_it, mdurl, pygments, xxhash):
        source = Path(package.__file__ or "").parent
        shutil.copytree(source, python / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "init").write_text(INIT.replace("SIZE", os.environ.get("WBFUSE_IMAGE_MIB", "1024")))
    (root / "init").chmod(0o755)
    system, data = home / "system.img", home / "data.img"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(system), "1G"], check=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(data), "3G"], check=True)
    return system, data


def test_a_machine_of_256_mib_copies_an_image_of_1_gib(tmp_path: Path) -> None:
    kernels = sorted(MACHINE.glob("root/usr/boot/vmlinuz-*"))
    if not kernels:
        pytest.skip("NO MACHINE: make torture builds it")
    system, data = built(tmp_path)
    drives = [
        word
        for n, image in enumerate((system, data))
        for word in (
            "-drive", f"file={image},if=none,id=d{n},format=raw,cache=none,aio=threads",
            "-device", f"nvme,drive=d{n},serial=wbfuse{n}",
        )
    ]  # fmt: skip
    said = subprocess.run(
        ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "256", "-nographic", "-nodefaults",
         "-no-reboot", "-serial", "stdio", "-kernel", str(kernels[-1]), *drives,
         "-append", "root=/dev/nvme0n1 rw console=ttyS0 quiet init=/init panic=-1"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=3000, check=False,
    ).stdout  # fmt: skip
    print(said)
    for wanted in ("COPIED", "UNMOUNTED", "SAME", "before", "UNMOUNTED AGAIN", "killed for want of memory: 0"):
        assert wanted in said, said
