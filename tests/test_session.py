"""The server by itself: the examples on real mounts, handlers that fail, unknown requests, the wire log, the end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import force_down, mounted_here, needs_mount
from tests.test_promises import wait_until
from wbfuse.filesystem.dispatch import pack_dir, pack_dirplus, routes, wishes_of
from wbfuse.session.notifier import Notifier
from wbfuse.session.session import HELPERS
from wbfuse.testing import posix
from wbfuse.wire.constants import Cap, Opcode
from wbfuse.wire.types import Attr, Dirent, Entry

EXAMPLES = Path(__file__).parent.parent / "examples"

FAILING = """
import errno, os, stat, sys, time, wbfuse
class Failing(wbfuse.FileSystem):
    inline = wbfuse.FileSystem.inline | {"mkdir", "fsync"}
    def getattr(self, request, fh):
        return wbfuse.Attr(1, stat.S_IFDIR | 0o755, nlink=2)
    def lookup(self, request, name):
        if name == b"defect": raise KeyError("a defect of the handler")
        if name == b"odd": raise OSError("no errno at all")
        if name == b"file": return wbfuse.Entry(2, wbfuse.Attr(2, stat.S_IFREG | 0o644))
        raise OSError(errno.ENOENT, "")
    def mkdir(self, request, name, mode, umask):
        if not request.blocking: raise wbfuse.WouldBlock
        raise OSError(errno.EDQUOT, "only where it may block")
    def fsync(self, request, fh, datasync):
        return request.park(lambda: request.fail(errno.EINTR))
    def statfs(self, request):
        return "not a Statfs"
wbfuse.serve(Failing(), sys.argv[1], wbfuse.Options(debug=lambda line: print(line, file=sys.stderr, flush=True)))
"""


READERS = """
import errno, os, stat, sys, time, wbfuse
class Readers(wbfuse.FileSystem):
    def getattr(self, request, fh):
        if request.nodeid == 1:
            return wbfuse.Attr(1, stat.S_IFDIR | 0o755, nlink=2)
        return wbfuse.Attr(request.nodeid, stat.S_IFREG | 0o644, 4096)
    def lookup(self, request, name):
        if name.startswith(b"wait"): open(sys.argv[1]).close()
        if not name.startswith(b"f"): raise OSError(errno.ENOENT, "")
        nodeid = 2 + int(name[1:])
        return wbfuse.Entry(nodeid, wbfuse.Attr(nodeid, stat.S_IFREG | 0o644, 4096))
    def read(self, request, fh, offset, size, flags):
        if not request.blocking: raise wbfuse.WouldBlock
        open(sys.argv[1]).close()  # a FIFO: waits until somebody has it open for writing
        return bytes(size)
wbfuse.serve(Readers(), sys.argv[2], wbfuse.Options(debug=lambda line: print(line, file=sys.stderr, flush=True)))
"""


class Served:
    def __init__(self, path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.path, self.process, self.log = path, process, log

    def text(self) -> str:
        return self.log.read_text()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[object]:
    made: list[Served] = []

    def start(*words: str) -> Served:
        path = tmp_path / f"m{len(made)}"
        path.mkdir()
        log = tmp_path / f"log{len(made)}"
        with log.open("wb") as out:
            process = subprocess.Popen([sys.executable, *words, str(path)], stderr=out)
        made.append(Served(path, process, log))
        while not mounted_here(path):
            assert process.poll() is None, log.read_text()
        os.stat(path)
        return made[-1]

    yield start
    for served in made:
        force_down(served.path)
        try:
            served.process.wait(20)
        except subprocess.TimeoutExpired:
            served.process.kill()
            served.process.wait()


@needs_mount
def test_hello_reads_and_refuses_to_write(serve) -> None:  # type: ignore[no-untyped-def]
    s = serve(str(EXAMPLES / "hello.py"))
    assert (s.path / "hello").read_text() == "hello from Python\n"
    assert os.listdir(s.path) == ["hello"]
    with pytest.raises(OSError, match="Read-only"):
        (s.path / "x").touch()
    subprocess.run(["umount", str(s.path)], check=True)
    assert s.process.wait(20) == 0


@needs_mount
def test_memory_is_a_file_system(serve) -> None:  # type: ignore[no-untyped-def]
    s = serve(str(EXAMPLES / "memory.py"))
    wanted = {
        "create_exclusive", "mkdir_and_rmdir", "symlinks", "hard_links", "rename_replaces", "unlinked_open_file_lives",
        "times_to_the_nanosecond", "append_goes_to_the_end", "truncate_cuts_and_grows_with_zeros", "shared_mappings",
        "listing_a_large_directory_gives_each_name_once", "write_only_files_take_partial_pages",
    }  # fmt: skip
    assert wanted <= set(posix.CHECKS)
    for name in sorted(wanted):
        posix.run(str(s.path), name)


@needs_mount
def test_ctrl_c_unmounts(serve) -> None:  # type: ignore[no-untyped-def]
    s = serve(str(EXAMPLES / "memory.py"))
    s.process.send_signal(signal.SIGINT)
    assert s.process.wait(20) == 0
    assert not mounted_here(s.path)


@needs_mount
def test_a_handler_that_fails_is_logged_with_its_request_and_the_mount_lives(serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    s = serve(str(script))
    for name, code in (("defect", errno.EIO), ("odd", errno.EIO), ("none", errno.ENOENT)):
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            os.stat(s.path / name)
        assert caught.value.errno == code
    with pytest.raises(OSError, match="quota"):
        os.mkdir(s.path / "d")
    with pytest.raises(OSError, match="Input/output"):
        os.statvfs(s.path)
    assert os.stat(s.path).st_nlink == 2
    text = s.text()
    assert "a handler failed: > " in text
    assert "LOOKUP node=1" in text
    assert "KeyError: 'a defect of the handler'" in text
    assert "name=b'defect'" in text
    assert "EDQUOT" in text


@needs_mount
def test_a_parked_request_is_interrupted_by_a_signal(serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    s = serve(str(script))
    code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); print('!', flush=True); os.fsync(fd)"
    with subprocess.Popen([sys.executable, "-c", code, str(s.path / "file")], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        while "FSYNC" not in s.text():
            assert child.poll() is None
        child.terminate()
        assert child.wait(20) == -signal.SIGTERM
    assert "INTERRUPT" in s.text()
    assert "EINTR" in s.text()


@needs_mount
def test_reads_that_wait_leave_names_alone(serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    script, gate = tmp_path / "readers.py", tmp_path / "gate"
    script.write_text(READERS)
    os.mkfifo(gate)
    served = serve(str(script), str(gate))
    readers = [subprocess.Popen(["cat", str(served.path / f"f{n}")], stdout=subprocess.PIPE) for n in range(40)]
    try:
        for n in range(100):  # all of these need a thread that may block, and a new name each
            with pytest.raises(FileNotFoundError):
                os.stat(served.path / f"no{n}")
        assert all(reader.poll() is None for reader in readers)
    finally:
        with open(gate, "w"):  # opens for all that wait; those that come later find it open as well
            outs = [reader.communicate(timeout=60)[0] for reader in readers]
    assert outs == [bytes(4096)] * 40


@needs_mount
def test_a_signal_does_not_fail_what_waits_for_a_thread(serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """INTERRUPT comes for any signal that is caught; stat(2) of a program with a timer must not see EINTR."""
    script, gate = tmp_path / "readers.py", tmp_path / "gate"
    script.write_text(READERS)
    os.mkfifo(gate)
    served = serve(str(script), str(gate))
    busy = [subprocess.Popen(["test", "-e", str(served.path / f"wait{n}")]) for n in range(HELPERS)]
    code = (
        "import ctypes, signal, sys; signal.signal(signal.SIGALRM, lambda *_: None); "
        "signal.siginterrupt(signal.SIGALRM, False); signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01); "
        "libc = ctypes.CDLL(None, use_errno=True); libc.access(sys.argv[1].encode(), 0); print(ctypes.get_errno())"
    )
    try:
        assert wait_until(lambda: served.text().count("wait") >= HELPERS)
        late = subprocess.Popen(
            [sys.executable, "-c", code, str(served.path / "wait-late")], stdout=subprocess.PIPE, text=True
        )
        assert wait_until(lambda: "INTERRUPT" in served.text())
    finally:
        with open(gate, "w"):
            assert [child.wait(60) for child in busy] == [1] * HELPERS
            assert late.communicate(timeout=60)[0].strip() == str(errno.ENOENT)


def test_what_is_not_overridden_is_not_promised() -> None:
    import wbfuse

    class Plus(wbfuse.FileSystem):
        def readdirplus(self, request, fh, offset):  # type: ignore[no-untyped-def]
            return iter(())

    assert not wishes_of(wbfuse.FileSystem()) & Cap.DO_READDIRPLUS
    assert wishes_of(Plus()) & Cap.DO_READDIRPLUS
    assert not wishes_of(wbfuse.FileSystem()) & Cap.WRITEBACK_CACHE


def test_every_opcode_has_a_route_or_is_the_sessions_own() -> None:
    import wbfuse
    from wbfuse.wire.requests import OPS

    own = {Opcode.INIT, Opcode.DESTROY, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY}
    assert set(OPS) == set(routes(wbfuse.FileSystem())) | own
    assert set(OPS) == set(Opcode)


def test_a_directory_answer_stops_where_the_buffer_ends_and_looks_nothing_up_in_vain() -> None:
    entries = [Dirent(b"n%d" % i, i + 1, 8, i + 1) for i in range(10)]
    assert len(pack_dir(entries, 100)) == 96
    asked = []

    def look_up(i: int) -> Entry:
        asked.append(i)
        return Entry(i + 1, Attr(i + 1, 0o100644))

    raw = pack_dirplus(((e, lambda i=i: look_up(i)) for i, e in enumerate(entries)), 500)  # type: ignore[misc]
    assert len(raw) == 480
    assert asked == [0, 1, 2]


def test_notifications_go_on_where_their_process_dies_and_none_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with ExitStack() as stack:
        ends = [stack.enter_context(os.fdopen(fd, mode, buffering=0)) for pair in (os.pipe(), os.pipe())
                for fd, mode in zip(pair, ("rb", "wb"), strict=True)]  # fmt: skip
        kernel, fuse, _, lifeline = ends
        notifier = Notifier(fuse.fileno(), lifeline.fileno())
        stack.callback(notifier.close)

        def arrives(message: bytes) -> bool:
            notifier.send([message]).result(60)
            return kernel.read(100) == message

        assert arrives(b"by a process")
        first = notifier._apart
        assert first is not None
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "Popen", no_process)
            first._process.kill()
            assert arrives(b"by this one")
            assert arrives(b"again")
        assert arrives(b"by another process")
        assert notifier._apart is not first
