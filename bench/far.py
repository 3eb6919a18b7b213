"""Peers over a far store: each copies into one S3 server behind one slow link, and says when it is durable."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import servers

from bench.peers import is_mounted

MBIT, DELAY_MS = 400, 20
RATE = MBIT * 125_000
"""Bytes a second of the link."""


@dataclass
class Far:
    """A mounted peer: `durable` returns once everything that was copied is in the store."""

    name: str
    path: Path
    durable: Callable[[], None]


@dataclass
class Site:
    """The servers and the links to them."""

    root: Path
    s3: servers.S3
    endpoint: str
    """S3 behind the link."""
    near: str
    """S3 itself."""

    def directory(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        return path


def script(name: str) -> str:
    return os.path.join(sysconfig.get_path("scripts"), name)


@contextlib.contextmanager
def link(target: int, mbit: float = MBIT, delay: float = DELAY_MS) -> Iterator[int]:
    """A slow link to a port of this machine; its own port."""
    port = servers.free_ports(1)[0]
    words = [sys.executable, "-m", "bench.slowlink", str(port), str(target), str(mbit), str(delay)]
    with subprocess.Popen(words) as process:
        try:
            servers.wait_for_port(port, process)
            yield port
        finally:
            process.kill()


@contextlib.contextmanager
def site(root: Path) -> Iterator[Site]:
    os.environ |= {"AWS_ACCESS_KEY_ID": servers.S3_KEY, "AWS_SECRET_ACCESS_KEY": servers.S3_SECRET}
    with servers.s3_server(root / "s3") as s3, link(int(s3.endpoint.rsplit(":", 1)[1])) as port:
        yield Site(root, s3, f"http://127.0.0.1:{port}", s3.endpoint)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} took more than {seconds:.0f} s")
        time.sleep(0.02)  # it tells nobody when it is done


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def unmounting(path: Path) -> Iterator[None]:
    """A peer that is unmounted by umount(8), and waited for."""
    try:
        yield
    finally:
        if is_mounted(path) and subprocess.run(["umount", str(path)], check=False).returncode:
            subprocess.run(["umount", "-l", str(path)], check=False)


@contextlib.contextmanager
def wbfuse(site: Site, name: str, meta: str, endpoint: str, *options: str, fresh: bool = True) -> Iterator[Far]:
    place = site.root / name
    place.mkdir(parents=True, exist_ok=True)
    path = place / "mount"
    path.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "wbfuse"]
    if fresh:
        run(*words, "format", meta, "--data", f"s3://{site.s3.bucket}/{name}", "--endpoint", site.near)
    run(*words, "mount", meta, str(path), "--endpoint", endpoint, "--dump-interval", "0s", *options)
    try:
        yield Far("wbfuse", path, lambda: run(*words, "sync", str(path)) and None)
    finally:
        run(*words, "umount", str(path))


@contextlib.contextmanager
def juicefs(site: Site, name: str, meta: str, endpoint: str, *options: str) -> Iterator[Far]:
    place = site.directory(name)
    path, cache = place / "mount", place / "cache"
    path.mkdir()
    juice = script("juicefs")
    bucket = f"{endpoint}/{site.s3.bucket}"
    run(juice, "format", meta, name, "--storage", "s3", "--bucket", bucket, "--access-key", servers.S3_KEY,
        "--secret-key", servers.S3_SECRET, "--trash-days", "0")  # fmt: skip
    words = [juice, "mount", meta, str(path), "--no-usage-report", "--cache-dir", str(cache), *options]
    with open(place / "log", "wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        wait_until(lambda: is_mounted(path) and os.stat(path).st_ino == 1, "mounting JuiceFS", 30)

        def durable() -> None:
            wait_until(lambda: not _staging(cache), "uploading what JuiceFS has staged")

        try:
            with unmounting(path):
                yield Far("JuiceFS", path, durable)
        finally:
            process.terminate()
            process.wait(60)


def _staging(cache: Path) -> bool:
    return any(files for directory, _, files in os.walk(cache) if "rawstaging" in directory)


@contextlib.contextmanager
def rclone(site: Site, name: str, endpoint: str) -> Iterator[Far]:
    place = site.directory(name)
    path = place / "mount"
    path.mkdir()
    config = place / "rclone.conf"
    config.write_text(
        f"[r]\ntype = s3\nprovider = SeaweedFS\nendpoint = {endpoint}\naccess_key_id = {servers.S3_KEY}\n"
        f"secret_access_key = {servers.S3_SECRET}\nregion = us-east-1\nno_check_bucket = true\n"
    )
    cache = place / "cache"
    words = [
        script("rclone"), "mount", f"r:{site.s3.bucket}/{name}", str(path), "--config", str(config), "--vfs-cache-mode",
        "writes", "--cache-dir", str(cache), "--vfs-write-back", "0s", "--s3-upload-concurrency", "8",
        "--s3-chunk-size", "16M",
    ]  # fmt: skip
    with open(place / "log", "wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        wait_until(lambda: is_mounted(path), "mounting rclone", 30)
        near = config.read_text().replace(endpoint, site.near)
        (place / "near.conf").write_text(near)

        def there() -> bool:
            listed = run(script("rclone"), "lsl", f"r:{site.s3.bucket}/{name}", "--config", str(place / "near.conf"))
            return "copy" in listed

        try:
            with unmounting(path):
                yield Far("rclone", path, lambda: wait_until(there, "uploading by rclone"))
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def s3fs(site: Site, name: str, endpoint: str) -> Iterator[Far]:
    place = site.directory(name)
    path, secret = place / "mount", place / "secret"
    path.mkdir()
    secret.write_text(f"{servers.S3_KEY}:{servers.S3_SECRET}")
    secret.chmod(0o600)
    options = f"url={endpoint},use_path_request_style,passwd_file={secret},endpoint=us-east-1,parallel_count=8"
    words = ["s3fs", site.s3.bucket, str(path), "-f", "-o", options, "-o", f"tmpdir={place}"]
    with open(place / "log", "wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        wait_until(lambda: is_mounted(path), "mounting s3fs", 30)
        try:
            with unmounting(path):
                yield Far("s3fs", path, lambda: None)
        finally:
            process.terminate()
            process.wait(60)


def scp(site: Site, source: Path) -> float:
    """Seconds that scp(1) takes to an sshd behind the link."""
    place = site.directory("scp")
    keys = [place / "host", place / "user"]
    for key in keys:
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    (place / "authorized").write_text((place / "user.pub").read_text())
    port = servers.free_ports(1)[0]
    os.makedirs("/run/sshd", exist_ok=True)
    words = [
        "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", str(port), "-h", str(keys[0]), "-o",
        "ListenAddress=127.0.0.1", "-o", f"AuthorizedKeysFile={place}/authorized", "-o", "StrictModes=no", "-o",
        "PidFile=none", "-o", "PermitRootLogin=yes", "-o", "Subsystem=sftp internal-sftp",
    ]  # fmt: skip
    with open(place / "log", "wb") as log, subprocess.Popen(words, stderr=log) as server:
        try:
            servers.wait_for_port(port, server)
            with link(port) as far:
                start = time.monotonic()
                run("scp", "-q", "-P", str(far), "-i", str(keys[1]), "-o", "StrictHostKeyChecking=no", "-o",
                    "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes", str(source),
                    f"root@127.0.0.1:{place}/copy")  # fmt: skip
                return time.monotonic() - start
        finally:
            server.kill()
