"""Two hosts on one volume: two mounts, each with a network of its own, on one PostgreSQL and one S3 server."""

from __future__ import annotations

import errno
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import servers
from tests.conftest import WBFUSE, force_down, needs_mount, wbfuse
from tests.test_promises import wait_until

pytestmark = needs_mount
BLOCK = 4096
TIMEOUT = "3s"


@dataclass
class Host:
    """A network namespace with one link to the servers, and a mount made in it."""

    name: str
    address: str
    path: Path
    meta: str
    endpoint: str
    state: Path
    shell: subprocess.Popen[bytes]

    def mount(self, *options: str) -> None:
        self.path.mkdir(exist_ok=True)
        environment = os.environ | {"XDG_STATE_HOME": str(self.state)}
        command = [WBFUSE, "mount", self.meta, str(self.path), "--endpoint", self.endpoint, "--log-size", "64MiB"]
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.name}", *command, "--session-timeout", TIMEOUT, *options],
            capture_output=True, text=True, timeout=60, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def link(self, state: str) -> None:
        """Cut the host off, or let it back.

        By a shell that was there before: a new child would close its copies of files on the mount, and wait for it.
        """
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        self.shell.stdin.write(f"ip link set {self.name}r {state}; echo done\n".encode())
        self.shell.stdin.flush()
        assert self.shell.stdout.readline() == b"done\n"

    def recover(self, *words: str) -> str:
        return wbfuse("recover", *words, env=os.environ | {"XDG_STATE_HOME": str(self.state)}, check=True).stdout


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts(workdir: Path, s3: servers.S3, postgres: servers.Postgres, s3_url: str) -> Iterator[list[Host]]:
    database = f"h{secrets.token_hex(4)}"
    wbfuse("format", postgres.create(database), "--data", s3_url, check=True)
    made: list[Host] = []
    proxies: list[subprocess.Popen[bytes]] = []
    tag, base = secrets.token_hex(2), secrets.randbelow(120)
    try:
        for i in (1, 2):
            name, net = f"wb{tag}{i}", f"10.213.{2 * base + i}"
            ip("netns", "add", name)
            shell = subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            made.append(Host(name, f"{net}.1", workdir / f"host{i}", "", "", workdir / f"state{i}", shell))
            ip("link", "add", f"{name}r", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("addr", "add", f"{net}.1/24", "dev", f"{name}r")
            ip("link", "set", f"{name}r", "up")
            ip("-n", name, "addr", "add", f"{net}.2/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            to_s3 = int(s3.endpoint.rsplit(":", 1)[1])
            for port in (to_s3, postgres.port):
                command = [sys.executable, "-m", "bench.slowlink", f"{net}.1:{port}", str(port), "10000", "0"]
                proxies.append(subprocess.Popen(command, cwd=Path(__file__).parent.parent))
                servers.wait_for_port(port, proxies[-1], f"{net}.1")
            made[-1].meta = f"postgresql://app@{net}.1:{postgres.port}/{database}"
            made[-1].endpoint = f"http://{net}.1:{to_s3}"
        yield made
    finally:
        for host in made:
            host.link("up")
            force_down(host.path)
            host.shell.communicate()
        for proxy in proxies:
            proxy.kill()
            proxy.wait()
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], check=False)


def numbered(n: int) -> bytes:
    return n.to_bytes(8, "big") * (BLOCK // 8)


def test_another_host_sees_a_commit_at_its_next_open(hosts: list[Host]) -> None:
    a, b = hosts
    for host in hosts:
        host.mount("--shared")
    (a.path / "f").write_bytes(b"first")
    assert (b.path / "f").read_bytes() == b"first"
    with open(b.path / "f", "rb") as reader:
        (a.path / "f").write_bytes(b"second, longer")
        assert (b.path / "f").read_bytes() == b"second, longer"
        assert wait_until(lambda: os.pread(reader.fileno(), 100, 0) == b"second, longer")
    (a.path / "f").write_bytes(b"second, LONGER")
    os.stat(b.path / "f")
    assert (b.path / "f").read_bytes() == b"second, LONGER", "also where only the bytes have changed"
    os.rename(a.path / "f", a.path / "g")
    assert wait_until(lambda: not (b.path / "f").exists())
    assert (b.path / "g").read_bytes() == b"second, LONGER"


def test_a_file_has_one_writer(hosts: list[Host]) -> None:
    a, b = hosts
    a.mount("--shared")
    b.mount("--shared")
    with open(a.path / "f", "wb") as writer:
        writer.write(b"a" * 100)
        writer.flush()
        os.fsync(writer.fileno())
        with pytest.raises(OSError, match="busy") as caught:
            os.open(b.path / "f", os.O_RDWR)
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(OSError, match="busy"):
            os.truncate(b.path / "f", 3)
        with pytest.raises(OSError, match="busy"):
            os.chmod(b.path / "f", 0o600)
        assert (b.path / "f").read_bytes() == b"a" * 100

    def free() -> bool:
        try:
            with open(b.path / "f", "r+b"):
                return True
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            return False

    assert wait_until(free)
    os.truncate(b.path / "f", 3)
    assert (a.path / "f").read_bytes() == b"aaa"


def test_a_file_that_another_host_removes_lives_until_its_writer_closes_it(hosts: list[Host]) -> None:
    a, b = hosts
    a.mount("--shared")
    b.mount("--shared")
    with open(a.path / "f", "w+b", buffering=0) as writer:
        writer.write(b"before")
        os.fsync(writer.fileno())
        os.unlink(b.path / "f")
        writer.write(b" and after")
        os.fsync(writer.fileno())
        assert os.pread(writer.fileno(), 100, 0) == b"before and after"
    assert wait_until(lambda: not (a.path / "f").exists())


def test_a_mount_without_shared_has_the_volume_alone(hosts: list[Host]) -> None:
    a, b = hosts
    a.mount()
    b.path.mkdir()
    refused = wbfuse("mount", b.meta, str(b.path), "--endpoint", b.endpoint, "--session-timeout", TIMEOUT)
    assert refused.returncode == 2
    assert "in use by" in refused.stderr


def test_a_host_that_is_cut_off_is_fenced_and_nothing_is_mixed(hosts: list[Host]) -> None:
    """It writes numbered blocks; the survivor takes over, finds the history cut at one point, and writes on."""
    a, b = hosts
    a.mount("--shared", "--dirty-expire", "50ms")
    b.mount("--shared", "--lease-wait", "60s")
    fd = os.open(a.path / "f", os.O_WRONLY | os.O_CREAT, 0o644)
    slots = 16
    for n in range(1, 65):
        os.pwrite(fd, numbered(n), n % slots * BLOCK)
    os.fsync(fd)
    a.link("down")
    for n in range(65, 129):
        os.pwrite(fd, numbered(n), n % slots * BLOCK)
    with open(b.path / "f", "r+b", buffering=0) as survivor:
        found = survivor.read()
        got = [int.from_bytes(found[i * BLOCK : i * BLOCK + 8], "big") for i in range(slots)]
        assert all(found[i * BLOCK : (i + 1) * BLOCK] == numbered(got[i]) for i in range(slots))
        last = max(got)
        assert last >= 64, "what was acknowledged by fsync is there"
        assert got == [n for i in range(slots) for n in [max(k for k in range(1, last + 1) if k % slots == i)]]
        survivor.seek(0)
        survivor.write(b"S" * BLOCK)
        os.fsync(survivor.fileno())
        a.link("up")
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(fd)
        with pytest.raises(OSError, match="Input/output"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)
        assert (b.path / "f").read_bytes()[:BLOCK] == b"S" * BLOCK
    assert wait_until(lambda: "in postgresql://" in a.recover())
    told = wbfuse("sync", str(a.path))
    assert told.returncode == 1
    assert "wbfuse recover" in told.stderr
    assert wbfuse("sync", str(a.path)).returncode == 0, "once is enough"
    export = a.path.parent / "exported"
    name = a.recover().split()[0]
    a.recover(name, "--export", str(export))
    assert numbered(128) in export.read_bytes()


def test_a_mount_in_another_pid_namespace_is_not_taken_for_dead(hosts: list[Host]) -> None:
    a, b = hosts
    a.mount()
    (a.path / "f").write_bytes(b"mine")
    b.path.mkdir()
    words = ["mount", b.meta, str(b.path), "--endpoint", b.endpoint, "--session-timeout", TIMEOUT]
    refused = subprocess.run(
        ["unshare", "-p", "-f", "--mount-proc", WBFUSE, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 2
    assert "in use by" in refused.stderr
    (a.path / "f").write_bytes(b"still mine")
    a_again = (a.path / "f").read_bytes()
    assert a_again == b"still mine"


def test_lines_that_two_hosts_append_in_turn_are_all_there(hosts: list[Host]) -> None:
    """The kernel of each appends where it believes the end to be, which the other has moved."""
    for host in hosts:
        host.mount("--shared", "--lease-wait", "5s", "--attr-timeout", "30s")
    wanted = b""
    for n in range(12):
        line = f"line {n} {'x' * (n * 500)}\n".encode()
        fd = os.open(hosts[n % 2].path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, line)
        os.close(fd)
        wanted += line
    for host in hosts:
        assert (host.path / "log").read_bytes() == wanted
