"""Where memory is short: a hard limit on the mount's own control group."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import WBFUSE, Mounter, needs_mount, wbfuse
from tests.test_keeper import keeper_of, right, worker, writing
from tests.test_promises import wait_until

pytestmark = needs_mount
MIB = 1 << 20
HOG = """
import sys
block, held = bytes(1 << 20), []
print("started", flush=True)
for _ in range(int(sys.argv[1])):
    held.append(bytearray(block))
print("full", flush=True)
sys.stdin.read()
"""


class Group:
    """A memory control group, of either version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._limit = path / ("memory.max" if (path / "memory.max").exists() else "memory.limit_in_bytes")

    def limit(self, size: int) -> None:
        self._limit.write_text(str(size))

    def run(self, *words: str) -> list[str]:
        """The words that run a command in it."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh", *words]


def _made(name: str) -> Path | None:
    """A new group below this process's own; None where none can be made."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = [Path("/sys/fs/cgroup/memory" + path) for _, controllers, path in lines if controllers == "memory"]
    places += [Path("/sys/fs/cgroup" + path) for _, controllers, path in lines if controllers == ""]
    for place in places:
        try:
            (place / name).mkdir()
        except OSError:
            continue
        if any((place / name / limit).exists() for limit in ("memory.max", "memory.limit_in_bytes")):
            return place / name
        (place / name).rmdir()
    return None


@pytest.fixture
def group() -> Iterator[Group]:
    place = _made(f"wbfuse-test-{secrets.token_hex(4)}")
    if place is None:
        pytest.skip("NO MEMORY CONTROL GROUP CAN BE MADE HERE, so no limit was tested")
    yield Group(place)
    assert wait_until(lambda: not (place / "cgroup.procs").read_text())
    place.rmdir()


def test_a_log_that_leaves_no_room_for_a_worker_is_refused(group: Group, workdir: Path) -> None:
    for name in ("source", "mount"):
        (workdir / name).mkdir()
    group.limit(160 * MIB)
    words = [WBFUSE, "mount", str(workdir / "source"), str(workdir / "mount"), "--log-size"]
    for size in ("256MiB", "128MiB"):
        done = subprocess.run(group.run(*words, size), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "does not fit into memory" in done.stderr
        assert "choose a smaller --log-size" in done.stderr


def test_a_worker_at_the_limit_dies_and_comes_back_and_nothing_is_lost(group: Group, mounter: Mounter) -> None:
    group.limit(260 * MIB)
    m = mounter("--max-deaths", "1000", "--on-close", "background", command=group.run(WBFUSE, "mount"))
    keeper = keeper_of(m)
    with writing(m, 1) as said:
        for _ in range(3):
            deaths = m.status()["worker"]["deaths"]
            Path(f"/proc/{worker(m)}/oom_score_adj").write_text("1000")  # it is to be the victim, not who asks for more
            hog = subprocess.Popen(
                group.run(sys.executable, "-c", HOG, "220"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                assert hog.stdout is not None
                assert hog.stdout.readline() == "started\n"
                assert hog.stdout.readline() in ("full\n", "")  # it has what it wants, or was killed itself
            finally:
                hog.kill()
                hog.communicate()
            assert m.status()["worker"]["deaths"] > deaths
    assert said["wrong"] == []
    right(m.path, said["contents"])
    assert keeper_of(m) == keeper
    m.umount()
    right(m.source, said["contents"])
    assert wait_until(lambda: not os.path.exists(f"/proc/{keeper}"))
    assert wbfuse("recover").returncode == 0
