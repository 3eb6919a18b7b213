"""Stores that fail under load: what was accepted is written in the end, and nobody hears of what passes by itself."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.conftest import Mounter, needs_mount, wbfuse
from tests.flaky import FlakyProxy
from tests.test_keeper import KILLS, keeper_of, kill_whoever_serves, kill_worker, right, writing
from tests.test_promises import wait_until

pytestmark = needs_mount
MODES: list[dict[str, float]] = [
    {"reset": 0.2}, {"half": 0.2}, {"busy": 0.4}, {"late": 0.5}, {"lost": 0.15},
    {"reset": 0.1, "half": 0.1, "busy": 0.1, "late": 0.1, "lost": 0.1}, {"busy": 1.0},
]  # fmt: skip


@pytest.fixture
def proxy(s3: servers.S3, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    made = FlakyProxy(s3.endpoint, 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
    yield made
    made.close()


def test_writers_notice_nothing_of_an_s3_server_that_fails(
    mounter: Mounter, proxy: FlakyProxy, s3_url: str, workdir: Path
) -> None:
    meta = f"sqlite:///{workdir}/v.db"
    wbfuse("format", meta, "--data", s3_url, check=True)
    m = mounter("--log-size", "128MiB", "--max-deaths", "10000", "--dirty-expire", "200ms", source=meta)
    rng = random.Random(5)
    pause, keeper = threading.Event(), keeper_of(m)
    with writing(m, 9) as said:
        for n in range(max(len(MODES), KILLS)):
            proxy.faults = MODES[n % len(MODES)]
            pause.wait(rng.random())  # under load, for any time
            if n % 3 == 2:
                kill_whoever_serves(keeper)
        proxy.faults = {}
    assert said["wrong"] == []
    right(m.path, said["contents"])
    assert len(proxy.happened) >= 4
    m.umount()
    assert wbfuse("check", meta, "--data").stdout == "0 problems\n"
    m = mounter(source=meta)
    right(m.path, said["contents"])


def test_credentials_that_are_revoked_are_an_error_and_what_was_written_waits(
    mounter: Mounter, proxy: FlakyProxy, s3_url: str, workdir: Path
) -> None:
    meta = f"sqlite:///{workdir}/v.db"
    wbfuse("format", meta, "--data", s3_url, check=True)
    m = mounter("--on-close", "background", source=meta)
    data = os.urandom(3 << 20)
    proxy.faults = {"forbidden": 1.0}
    with open(m.path / "a", "wb") as f:
        f.write(data)
        f.flush()
        with pytest.raises(OSError, match=os.strerror(errno.EACCES)):
            os.fsync(f.fileno())
    assert (m.path / "a").read_bytes() == data
    assert m.status()["last_error"]
    proxy.faults = {}
    wbfuse("sync", str(m.path), check=True)
    m.umount()
    m = mounter(source=meta)
    assert (m.path / "a").read_bytes() == data


def test_writers_notice_nothing_of_a_directory_that_stalls(mounter: Mounter, workdir: Path) -> None:
    script = workdir / "script.json"

    def store(**now: object) -> None:
        making = script.with_suffix(".new")
        making.write_text(json.dumps(now))
        making.rename(script)

    store()
    command = [sys.executable, "-m", "wbfuse.testing.faults", str(script)]
    m = mounter("--max-deaths", "10000", "--dirty-expire", "100ms", "--log-size", "128MiB", command=command)
    rng = random.Random(6)
    pause = threading.Event()
    try:
        with writing(m, 4) as said:
            for n in range(max(6, KILLS)):
                store(**({"commit": "ETIMEDOUT"}, {"delay": 0.05}, {"stall": True}, {"sync": "ECONNRESET"})[n % 4])  # type: ignore[arg-type]
                pause.wait(rng.random())
                store()
                if n % 3 == 2:
                    kill_worker(m)
    finally:
        store()
    assert said["wrong"] == []
    right(m.path, said["contents"])
    m.umount()
    right(m.source, said["contents"])


def test_a_database_that_is_killed_under_load(
    mounter: Mounter, postgres: servers.Postgres, postgres_meta: str, s3_url: str
) -> None:
    """Names may fail while it is away, data may not: so one writer, on a file that is there."""
    wbfuse("format", postgres_meta, "--data", s3_url, check=True)
    m = mounter("--on-close", "background", "--dirty-expire", "100ms", source=postgres_meta)
    rng = random.Random(8)
    content = bytearray(1 << 20)
    with open(m.path / "a", "wb", buffering=0) as f:
        f.write(content)
        for _ in range(3):
            for _ in range(50):
                at = rng.randrange(len(content) - 5000)
                piece = rng.randbytes(5000)
                os.pwrite(f.fileno(), piece, at)
                content[at : at + 5000] = piece
            postgres.stop()
            try:
                os.pwrite(f.fileno(), b"while it is away", 0)
                content[:16] = b"while it is away"
                assert wait_until(lambda: m.status()["last_error"] != "", 60)
            finally:
                postgres.start()
            os.fsync(f.fileno())
    assert (m.path / "a").read_bytes() == content
    m.umount()
    m = mounter(source=postgres_meta)
    assert (m.path / "a").read_bytes() == content
