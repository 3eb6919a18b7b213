"""The POSIX table: on tmpfs first, so that a check is known to be right, then on mounts of each kind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Mounted, Mounter, needs_mount, wbfuse
from wbfuse.testing import posix

pytestmark = needs_mount
KINDS = {
    "writeback": ("--kernel-cache", "writeback"),
    "kernel-writethrough": ("--kernel-cache", "writethrough"),
    "kernel-off": ("--kernel-cache", "off"),
    "writethrough": ("--policy", "writethrough"),
}


@pytest.fixture(scope="module")
def tmpfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("name", posix.CHECKS)
def test_tmpfs_passes(tmpfs: Path, name: str) -> None:
    posix.run(str(tmpfs), name)
    assert not list(tmpfs.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_mount_passes_the_whole_table(mounter: Mounter, kind: str) -> None:
    mounted: Mounted = mounter(*KINDS[kind])
    failed = {}
    for name in posix.CHECKS:
        try:
            posix.run(str(mounted.path), name)
        except (AssertionError, OSError) as e:
            failed[name] = str(e)
    assert not failed
    mounted.umount()
    assert not list(mounted.source.iterdir()), "something was left in the store"


VOLUMES = {
    "writeback": (),
    "kernel-off": ("--kernel-cache", "off"),
    "writethrough": ("--policy", "writethrough"),
    "shared": ("--shared",),
}


@pytest.mark.parametrize("kind", VOLUMES)
def test_volume_passes_the_whole_table(mounter: Mounter, volume: str, kind: str) -> None:
    mounted = mounter(*VOLUMES[kind], source=volume)
    failed = {}
    for name in posix.CHECKS:
        try:
            posix.run(str(mounted.path), name)
        except (AssertionError, OSError) as e:
            failed[name] = str(e)
    assert not failed
    mounted.umount()
    assert wbfuse("check", volume, "--data").stdout == "0 problems\n"
