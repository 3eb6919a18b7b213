"""The command line: what it refuses and how it says so, what status shows, who may ask, how things end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import WBFUSE, Mounter, mounted_here, needs_mount, wbfuse
from tests.test_promises import wait_until
from wbfuse.cli import policy, units
from wbfuse.control import paths
from wbfuse.store.shaped import Shape


@pytest.mark.parametrize(
    ("text", "value"), [("1GiB", 1 << 30), ("64M", 64 << 20), ("20MB", 20_000_000), ("1.5k", 1536), ("7", 7)]
)
def test_sizes(text: str, value: int) -> None:
    assert units.parse_size(text) == value


@pytest.mark.parametrize("text", ["", "x", "1XB", "-1", "1 2", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        units.parse_size(text)


def test_rates_times_and_slowness() -> None:
    assert units.parse_rate("20MB/s") == 2e7
    assert units.parse_time("20ms") == 0.02
    assert units.parse_slow("50MB/s,20ms") == Shape(rate=5e7, delay=0.02)
    assert units.parse_slow("20ms") == Shape(delay=0.02)
    with pytest.raises(ValueError, match="20MB/s"):
        units.parse_rate("20")
    with pytest.raises(ValueError, match="above zero"):
        units.parse_rate("0MB/s")
    assert units.show_size(1536) == "1.5 KiB"


def config(path: Path, text: str, mode: int = 0o644) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="the configuration must be root's")
def test_users_get_the_kernels_write_back_only_where_the_administrator_allows_it(tmp_path: Path) -> None:
    yes = config(tmp_path / "yes.toml", "allow_wbcache = true")
    no = config(tmp_path / "no.toml", "allow_wbcache = false")
    missing = str(tmp_path / "missing.toml")
    assert policy.choose("writeback", None, False, yes) == ("writeback", None)
    for path in (no, missing):
        cache, message = policy.choose("writeback", None, False, path)
        assert cache == "writethrough"
        assert "allow_wbcache" in str(message)
        with pytest.raises(policy.PolicyError, match="not allowed"):
            policy.choose("writeback", "writeback", False, path)
        assert policy.choose("writeback", None, True, path) == ("writeback", None)
    for bad in (config(tmp_path / "open.toml", "allow_wbcache = true", 0o666), config(tmp_path / "bad.toml", "a = [")):
        with pytest.raises(policy.PolicyError, match="toml"):
            policy.choose("writeback", None, False, bad)


def test_policies_that_contradict_each_other_are_refused() -> None:
    assert policy.choose("writethrough", None, True) == ("writethrough", None)
    with pytest.raises(policy.PolicyError, match="contradict"):
        policy.choose("writethrough", "writeback", True)


@pytest.mark.parametrize("command", [(), ("mount",), ("umount",), ("sync",), ("status",)])
def test_help_teaches(command: tuple[str, ...]) -> None:
    done = wbfuse(*command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 5


BAD = {
    "no source": (["{w}/none", "{w}/m"], "no such directory"),
    "source is a file": (["{w}/file", "{w}/m"], "not a directory"),
    "no mount point": (["{w}/s", "{w}/none"], "no such directory"),
    "mount point is a file": (["{w}/s", "{w}/file"], "not a directory"),
    "mount point is the root": (["{w}/s", "/"], "empty directory"),
    "inside itself": (["{w}/s", "{w}/s/inside"], "lies inside"),
    "bad size": (["{w}/s", "{w}/m", "--log-size", "many"], "not understood"),
    "small log": (["{w}/s", "{w}/m", "--log-size", "1MiB"], "too small"),
    "huge log": (["{w}/s", "{w}/m", "--log-size", "4096GiB"], "does not fit"),
    "bad policy": (["{w}/s", "{w}/m", "--policy", "hope"], "hope"),
    "bad option": (["{w}/s", "{w}/m", "-o", "nonsense"], "no such mount option"),
    "bad rate": (["{w}/s", "{w}/m", "--bwlimit", "fast"], "not understood"),
    "contradiction": (["{w}/s", "{w}/m", "--policy", "writethrough", "--kernel-cache", "writeback"], "contradict"),
}


@needs_mount
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_mounted(workdir: Path, case: str) -> None:
    for name in ("s", "m", "s/inside"):
        (workdir / name).mkdir()
    (workdir / "file").touch()
    words, text = BAD[case]

    def mounts() -> list[str]:
        """Of this test: on the root, or anywhere below its directory."""
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [line for line in lines if line.split()[1] == "/" or str(workdir) in line]

    before = mounts()
    done = wbfuse("mount", *(w.format(w=workdir) for w in words))
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert mounts() == before


@needs_mount
def test_a_mount_point_or_source_in_use_is_refused(mounter: Mounter, workdir: Path) -> None:
    m = mounter()
    other = workdir / "other"
    other.mkdir()
    again = wbfuse("mount", str(other), str(m.path))
    assert again.returncode == 2
    assert "already a mount point" in again.stderr
    twice = wbfuse("mount", str(m.source), str(other))
    assert twice.returncode == 2
    assert "another wbfuse mount" in twice.stderr


@needs_mount
def test_a_dead_mount_is_named_and_removed(mounter: Mounter) -> None:
    m = mounter()
    m.kill()
    assert wait_until(lambda: wbfuse("status", str(m.path)).returncode == 2)
    refused = wbfuse("mount", str(m.source), str(m.path))
    assert refused.returncode == 2
    assert "wbfuse umount" in refused.stderr
    gone = wbfuse("umount", str(m.path))
    assert gone.returncode == 0, gone.stderr
    assert not mounted_here(m.path)
    assert wbfuse("umount", str(m.path)).returncode == 2


@needs_mount
def test_status_shows_what_the_issue_names(mounter: Mounter) -> None:
    m = mounter("--on-close", "background")
    (m.path / "a").write_bytes(bytes(100_000))
    s = m.status()
    assert s["policy"] == "writeback"
    assert s["kernel_cache"] == "writeback"
    assert "WRITEBACK_CACHE" in s["negotiated"]["capabilities"]
    assert s["dirty_bytes"] + s["writeback_bytes"] + s["store"]["bytes_written"] >= 100_000
    assert s["log"]["size"] == 64 << 20
    assert s["requests"]["WRITE"] >= 1
    assert {"bytes_written", "writes"} <= set(s["store"])
    assert Path(f"/proc/{s['worker']['pid']}").exists()
    listed = json.loads(wbfuse("status", "--json", check=True).stdout)
    assert str(m.path) in {one["mountpoint"] for one in listed}
    assert str(m.path) in wbfuse("status", str(m.path)).stdout.replace("\n", "")


@needs_mount
def test_sync_makes_a_file_and_a_whole_mount_durable(mounter: Mounter) -> None:
    m = mounter("--on-close", "background", "--dirty-expire", "1h")
    for name in ("a", "b"):
        (m.path / name).write_bytes(name.encode() * 1000)
    assert wbfuse("sync", str(m.path / "a")).returncode == 0
    assert (m.source / "a").read_bytes() == b"a" * 1000
    with open(m.path / "open", "wb", buffering=0) as f:
        f.write(b"still open")
        assert wbfuse("sync", str(m.path)).returncode == 0
        assert (m.source / "b").read_bytes() == b"b" * 1000
        assert (m.source / "open").read_bytes() == b"still open"
    missing = wbfuse("sync", str(m.path / "none"))
    assert missing.returncode == 1
    assert "none" in missing.stderr


@needs_mount
def test_a_busy_mount_is_not_unmounted_but_may_be_detached(mounter: Mounter) -> None:
    m = mounter("--on-close", "background")
    pid = m.status()["keeper"]["pid"]
    with open(m.path / "a", "wb", buffering=0) as f:
        f.write(b"before")
        busy = wbfuse("umount", str(m.path))
        assert busy.returncode == 1
        assert "in use" in busy.stderr
        assert mounted_here(m.path)
        os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: not mounted_here(m.path))
        f.write(b" and after")
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert (m.source / "a").read_bytes() == b"before and after"


@needs_mount
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_write_everything_and_unmount(workdir: Path, number: signal.Signals) -> None:
    for name in ("s", "m"):
        (workdir / name).mkdir()
    words = [
        WBFUSE,
        "mount",
        "-f",
        str(workdir / "s"),
        str(workdir / "m"),
        "--log-size",
        "64MiB",
        "--on-close=background",
    ]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "mounted" in process.stderr.readline()
        (workdir / "m/a").write_bytes(b"x" * 3_000_000)
        process.send_signal(number)
        assert process.wait(30) == 0
    assert not mounted_here(workdir / "m")
    assert (workdir / "s/a").read_bytes() == b"x" * 3_000_000


@needs_mount
def test_debug_wire_prints_a_line_a_request_and_reply(workdir: Path) -> None:
    for name in ("s", "m"):
        (workdir / name).mkdir()
    words = [WBFUSE, "mount", "-f", "--debug-wire", str(workdir / "s"), str(workdir / "m"), "--log-size", "64MiB"]
    with open(workdir / "log", "w") as log, subprocess.Popen(words, stderr=log) as process:
        assert wait_until(lambda: mounted_here(workdir / "m"))
        (workdir / "m/named").write_bytes(b"content")
        assert wbfuse("umount", str(workdir / "m")).returncode == 0
        assert process.wait(30) == 0
    text = (workdir / "log").read_text()
    assert "CREATE node=1" in text
    assert "name=b'named'" in text
    assert "data=b'content'" in text
    assert " ok " in text


@needs_mount
def test_read_only_refuses_changes(mounter: Mounter) -> None:
    m = mounter("--read-only")
    (m.source / "a").write_text("x")
    assert (m.path / "a").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (m.path / "b").touch()
    m.umount()
    assert not (m.source / ".wbfuse").exists()


@needs_mount
def test_13_an_unprivileged_mount_gets_write_through_and_a_message(workdir: Path, user: list[str]) -> None:
    if os.path.exists(policy.CONFIG):
        pytest.skip("this machine has a configuration of its own")
    for name in ("s", "m"):
        (workdir / name).mkdir()
        os.chown(workdir / name, 65534, 65534)
    where = [str(workdir / "s"), str(workdir / "m"), "--log-size", "64MiB"]
    refused = subprocess.run(
        [*user, "mount", *where, "--kernel-cache", "writeback"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "allow_wbcache" in refused.stderr
    done = subprocess.run([*user, "mount", *where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "write-through" in done.stderr
    try:
        script = f"open('{workdir}/m/a', 'w').write('as nobody'); print(open('{workdir}/m/a').read())"
        words = [*user[: user.index("-m")], "-c", script]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "as nobody\n"
        with pytest.raises(PermissionError):  # without allow_other not even root gets in
            os.listdir(workdir / "m")
        state = json.loads(
            subprocess.run([*user, "status", "--json", where[1]], capture_output=True, check=True).stdout
        )
        assert "WRITEBACK_CACHE" not in state["negotiated"]["capabilities"]
        assert state["policy"] == "writeback"
        mount = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if where[1] in line)
        assert "nosuid,nodev" in mount
    finally:
        ended = subprocess.run([*user, "umount", where[1]], capture_output=True, text=True, check=False)
        if mounted_here(workdir / "m"):
            subprocess.run(["umount", "-l", where[1]], check=True)
    assert ended.returncode == 0, ended.stderr
    assert (workdir / "s/a").read_text() == "as nobody"


@needs_mount
def test_a_users_read_only_files_beyond_the_descriptor_limit_are_written(workdir: Path, user: list[str]) -> None:
    """Created 0444 and open for writing: the descriptor that create gave has gone, and the mode denies another."""
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
from wbfuse.store.directory import DirectoryStore
from wbfuse.testing.store import ME, put, read_all
s = DirectoryStore(sys.argv[1])
inos = [s.create(1, b"%d" % i, 0o444, ME)[0] for i in range(1000)]
for i, ino in enumerate(inos):
    s.hold(ino)
    put(s, ino, b"%d" % i)
for i, ino in enumerate(inos):
    assert read_all(s, ino) == b"%d" % i
    assert s.getattr(ino).mode & 0o777 == 0o444
"""
    source = workdir / "s"
    source.mkdir()
    os.chown(source, 65534, 65534)
    words = [*user[: user.index("-m")], "-c", script, str(source)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_mount
def test_a_mount_works_where_the_kernels_settings_are_read_only(workdir: Path) -> None:
    """In containers /sys often is: the mount goes on with the kernel's own share and read-ahead."""
    for name in ("s", "m"):
        (workdir / name).mkdir()
    script = f"""
mount -o bind /sys /sys && mount -o remount,ro,bind /sys || exit 3
"{WBFUSE}" mount s m --log-size 64MiB || exit 4
echo kept > m/a && "{WBFUSE}" status --json m > status && "{WBFUSE}" umount m
"""
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        cwd=workdir, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (workdir / "s/a").read_text() == "kept\n"
    assert json.loads((workdir / "status").read_text())["bdi"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("s", "."), "would hide"),
        (("s", "m", "--log", "m/log"), "lies inside"),
        (("s", "m", "--cache", "c"), "--cache is for volumes"),
        (("s", "m", "--store-option", "region=x"), "--store-option is for volumes"),
        (("s", "m", "--log-size", "0"), "is too small"),
    ],
)
def test_what_would_do_harm_or_nothing_is_refused(workdir: Path, words: tuple[str, ...], said: str) -> None:
    for name in ("s", "m"):
        (workdir / name).mkdir()
    refused = wbfuse("mount", *words, cwd=workdir)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert not mounted_here(workdir / "m")


def test_messages_of_mounts_that_ended_long_ago_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "runtime_dir", lambda: str(tmp_path))
    for name in ("old.log", "new.log", "served.log", "served.sock"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (0, 900 if name == "new.log" else 100))
    paths.forget_old(now=1000, age=500)
    assert sorted(os.listdir(tmp_path)) == ["new.log", "served.log", "served.sock"]
