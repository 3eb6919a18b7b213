"""What other users of the machine cannot do. `user` runs a command as nobody."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Mounter, mounted_here, needs_mount, wbfuse
from wbfuse.control import paths

pytestmark = needs_mount
NOBODY = 65534


def as_user(user: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*user, *words], capture_output=True, text=True, check=False, timeout=60)


def python_as(user: list[str], script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*user[: user.index("-m")], "-c", script], capture_output=True, text=True, check=False, timeout=60
    )


def test_another_user_cannot_ask_stop_sync_or_restart_a_mount(mounter: Mounter, user: list[str]) -> None:
    m = mounter("-o", "allow_other")
    (m.path / "a").write_bytes(b"a")
    pid = m.status()["worker"]["pid"]
    for command in ("status", "umount", "sync", "restart"):
        refused = as_user(user, command, str(m.path))
        assert refused.returncode != 0, command
        assert refused.stderr.startswith("wbfuse: "), refused.stderr
    assert mounted_here(m.path)
    assert m.status()["worker"]["pid"] == pid
    socket_path = Path(paths.socket_path(str(m.path)))
    assert socket_path.stat().st_mode & 0o777 == 0o600
    assert socket_path.parent.stat().st_mode & 0o077 == 0


def test_another_user_cannot_mount_over_a_mount(mounter: Mounter, user: list[str], workdir: Path) -> None:
    m = mounter("-o", "allow_other")
    (m.path / "a").write_bytes(b"a")
    own = workdir / "own"
    own.mkdir()
    os.chown(own, NOBODY, NOBODY)
    assert as_user(user, "mount", str(own), str(m.path)).returncode == 2
    assert (m.path / "a").read_bytes() == b"a"


def test_another_user_cannot_read_the_log_or_the_connection(mounter: Mounter, user: list[str], workdir: Path) -> None:
    log = workdir / "log"
    m = mounter("--log", str(log), "--on-close", "background", "--dirty-expire", "1h")
    (m.path / "a").write_bytes(b"secret")
    state = m.status()
    for pid in (state["worker"]["pid"], state["keeper"]["pid"]):
        for what in ("fd", "mem", "map_files"):
            place = f"/proc/{pid}/{what}"
            script = f"import os; os.listdir({place!r}) if os.path.isdir({place!r}) else open({place!r}).read(1)"
            assert "PermissionError" in python_as(user, script).stderr, place
    assert "PermissionError" in python_as(user, f"import os; os.listdir({str(log)!r})").stderr
    message_file = paths.log_path(str(m.path))
    assert os.stat(message_file).st_mode & 0o077 == 0


def test_without_allow_other_nobody_else_gets_in_and_with_it_modes_count(mounter: Mounter, user: list[str]) -> None:
    m = mounter()
    (m.path / "a").write_bytes(b"a")
    assert "PermissionError" in python_as(user, f"open('{m.path}/a')").stderr
    m.umount()
    m = mounter("-o", "allow_other", source=m.source)
    (m.path / "a").chmod(0o604)
    (m.path / "b").touch(0o600)
    assert python_as(user, f"print(open('{m.path}/a').read())").stdout == "a\n"
    for script in (f"open('{m.path}/a', 'w')", f"open('{m.path}/b')", f"open('{m.path}/c', 'w')"):
        assert "PermissionError" in python_as(user, script).stderr, script


def test_a_runtime_directory_that_somebody_else_made_is_not_used(user: list[str], workdir: Path) -> None:
    without = [w for w in user if not w.startswith("XDG_RUNTIME_DIR")]
    for name in ("s", "m"):
        (workdir / name).mkdir()
        os.chown(workdir / name, NOBODY, NOBODY)
    place = Path(f"/tmp/wbfuse-{NOBODY}")
    if place.exists():
        pytest.skip(f"{place} is in use on this machine")
    place.mkdir()
    try:
        refused = as_user(without, "mount", str(workdir / "s"), str(workdir / "m"))
        assert refused.returncode == 2
        assert "not a private directory of yours" in refused.stderr
    finally:
        place.rmdir()


def test_root_asks_no_socket_that_another_user_has_put_up(workdir: Path) -> None:
    """In a directory that has another user's number in its name, or that anybody may write to."""
    for name, owner, mode in (("wbfuse-1234567", NOBODY, 0o700), (f"wbfuse-{NOBODY}9", NOBODY, 0o777)):
        place = Path("/tmp") / name
        place.mkdir()
        try:
            os.chown(place, owner, owner)
            place.chmod(mode)
            with socket.socket(socket.AF_UNIX) as trap:
                trap.bind(str(place / "trap.sock"))
                trap.listen()
                assert str(place / "trap.sock") not in paths.sockets()
        finally:
            (place / "trap.sock").unlink(missing_ok=True)
            place.rmdir()


def test_a_socket_that_does_not_answer_does_not_keep_the_others_from_being_shown(
    mounter: Mounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = mounter()
    monkeypatch.setattr("wbfuse.cli.status._PATIENCE", 0.1)
    silent = Path(paths.runtime_dir()) / "silent.sock"
    with socket.socket(socket.AF_UNIX) as trap:
        try:
            trap.bind(str(silent))
            trap.listen()
            from click.testing import CliRunner

            from wbfuse.cli.status import status

            said = CliRunner().invoke(status, ["--json"])
            assert str(m.path) in said.output
            assert "does not answer now" in said.output
        finally:
            silent.unlink(missing_ok=True)


def test_a_users_mount_is_nosuid_and_nodev(user: list[str], workdir: Path) -> None:
    for name in ("s", "m"):
        (workdir / name).mkdir()
        os.chown(workdir / name, NOBODY, NOBODY)
    where = str(workdir / "m")
    done = as_user(user, "mount", str(workdir / "s"), where, "--log-size", "64MiB", "-o", "suid,dev")
    try:
        if done.returncode == 0:  # fusermount3 may also refuse to hear of them
            line = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {where} " in line)
            assert "nosuid" in line
            assert "nodev" in line
        else:
            assert not mounted_here(Path(where))
    finally:
        as_user(user, "umount", where)
        if mounted_here(Path(where)):
            subprocess.run(["umount", "-l", where], check=True)
    assert not mounted_here(Path(where))


def test_nothing_of_a_volume_is_for_others(mounter: Mounter, volume: str, workdir: Path) -> None:
    m = mounter(source=volume)
    (m.path / "a").write_bytes(os.urandom(100_000))
    m.umount()
    wbfuse("check", volume, check=True)
    files = list((workdir / "objects").rglob("packs/*/*"))
    assert files
    assert all(p.stat().st_mode & 0o077 == 0 for p in files)
