"""fsx-like exercise and fio with checksums on mounts of each kind. `WBFUSE_FSX_OPERATIONS` asks for more."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Mounter, needs_mount, wbfuse
from wbfuse.testing.fsx import Mismatch, exercise

OPERATIONS = int(os.environ.get("WBFUSE_FSX_OPERATIONS", "20000"))
KINDS = {
    "writeback": (),
    "writeback, small rounds": ("--dirty-expire", "10ms", "--on-close", "background"),
    "kernel writethrough": ("--kernel-cache", "writethrough"),
    "kernel off": ("--kernel-cache", "off"),
    "writethrough": ("--policy", "writethrough"),
}


def test_the_exerciser_finds_a_wrong_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread

    def wrong(fd: int, n: int, offset: int) -> bytes:
        found = real(fd, n, offset)
        return found[:-1] + bytes([found[-1] ^ 1]) if len(found) > 5000 else found

    monkeypatch.setattr(os, "pread", wrong)
    with pytest.raises(Mismatch, match="seed 1, after"):
        exercise(str(tmp_path), 200, seed=1)


@needs_mount
@pytest.mark.parametrize("kind", KINDS)
def test_exerciser(mounter: Mounter, kind: str) -> None:
    m = mounter(*KINDS[kind])
    done = exercise(str(m.path), OPERATIONS, seed=20121116)
    assert sum(done.values()) == OPERATIONS
    m.umount()
    assert not list(m.source.iterdir())


@needs_mount
@pytest.mark.parametrize("kind", ["writeback", "writeback, small rounds", "kernel off"])
def test_exerciser_on_a_volume(mounter: Mounter, volume: str, kind: str) -> None:
    m = mounter(*KINDS[kind], source=volume)
    done = exercise(str(m.path), OPERATIONS // 2, seed=20121117)
    assert sum(done.values()) == OPERATIONS // 2
    m.umount()
    assert wbfuse("check", volume, "--data").stdout == "0 problems\n"


@needs_mount
def test_exerciser_on_postgres_and_s3(mounter: Mounter, postgres_meta: str, s3_url: str) -> None:
    wbfuse("format", postgres_meta, "--data", s3_url, "--compress", "lz4", check=True)
    m = mounter("--dirty-expire", "100ms", "--on-close", "background", source=postgres_meta)
    done = exercise(str(m.path), OPERATIONS // 4, seed=20121118)
    assert sum(done.values()) == OPERATIONS // 4
    m.umount()
    assert wbfuse("check", postgres_meta, "--data").stdout == "0 problems\n"


@needs_mount
def test_two_exercisers_at_once_on_a_throttled_store(mounter: Mounter) -> None:
    m = mounter("--bwlimit", "30MB/s", "--on-close", "background")
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(exercise, str(m.path), OPERATIONS // 10, seed, 4 << 20) for seed in (1, 2)]
        assert [sum(f.result().values()) for f in futures] == [OPERATIONS // 10] * 2


@needs_mount
@pytest.mark.parametrize("engine", ["psync", "mmap", "io_uring"])
def test_fio_verifies_what_it_wrote(mounter: Mounter, engine: str) -> None:
    m = mounter("--on-close", "background")
    direct = ["--direct=1", "--iodepth=16"] if engine == "io_uring" else []
    done = subprocess.run(
        ["fio", "--name=v", f"--directory={m.path}", f"--ioengine={engine}", "--rw=randwrite", "--bs=4k-64k",
         "--size=48m", "--verify=crc32c", "--verify_state_save=0", "--do_verify=1", "--verify_fatal=1", "--numjobs=2",
         *direct],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "err= 0" in done.stdout
