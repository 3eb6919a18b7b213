"""The directory store: the contract of every store, and what is its own: escapes, identity, descriptors, orphans."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import needs_mount
from wbfuse.journal import Journal
from wbfuse.store.contract import ROOT_INO
from wbfuse.store.directory import DirectoryStore
from wbfuse.store.directory.data import slice_buffers, split_direct
from wbfuse.store.directory.store import SourceError
from wbfuse.testing.store import ME, StoreContract, fails_with, put, read_all


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


class TestDirectoryStore(StoreContract):
    @pytest.fixture
    def store(self, source: Path) -> Iterator[DirectoryStore]:
        store = DirectoryStore(str(source))
        yield store
        store.close()
        assert not (source / ".wbfuse").exists()


@pytest.fixture
def store(source: Path) -> Iterator[DirectoryStore]:
    store = DirectoryStore(str(source))
    yield store
    store.close()


def test_a_symlink_never_leads_out(store: DirectoryStore, source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    (source / "way").symlink_to(tmp_path / "outside")
    way, _ = store.lookup(ROOT_INO, b"way")
    assert fails_with(errno.ESTALE, lambda: store.lookup(way, b"secret"))
    d, _ = store.mkdir(ROOT_INO, b"d", 0o755, ME)
    store._dirs.clear()
    (source / "d").rmdir()
    (source / "d").symlink_to(tmp_path / "outside")
    assert fails_with(errno.ESTALE, lambda: store.lookup(d, b"secret"))


def test_another_file_in_the_same_place_is_stale(store: DirectoryStore, source: Path) -> None:
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    put(store, ino, b"mine")
    store.forget_data(ino)
    (source / "a").unlink()
    (source / "a").write_text("another's")
    assert fails_with(errno.ESTALE, lambda: read_all(store, ino))
    again, _ = store.lookup(ROOT_INO, b"a")
    assert again != ino
    assert read_all(store, again) == b"another's"


def test_the_private_directory_is_not_there(store: DirectoryStore) -> None:
    ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
    store.hold(ino)
    store.unlink(ROOT_INO, b"a")
    assert {e.name for e in store.readdir(ROOT_INO, 0)} == {b".", b".."}
    assert fails_with(errno.ENOENT, lambda: store.lookup(ROOT_INO, b".wbfuse"))
    assert fails_with(errno.EPERM, lambda: store.mkdir(ROOT_INO, b".wbfuse", 0o755, ME))
    store.drop(ino)


def test_a_listing_that_goes_on_at_its_end_may_begin_again(source: Path) -> None:
    """As after the death of a server: the kernel asks the next one for what comes after the last entry."""
    (source / "file").touch()
    store = DirectoryStore(str(source))
    *_, last = store.readdir(ROOT_INO, 0)
    store.close()
    store = DirectoryStore(str(source))
    assert list(store.readdir(ROOT_INO, last.offset)) == []
    assert "file" in [os.fsdecode(e.name) for e in store.readdir(ROOT_INO, 0)]
    store.close()


def test_orphans_of_a_store_that_died_are_removed(source: Path) -> None:
    script = (
        "import os, sys; from wbfuse.store.directory import DirectoryStore; from wbfuse.testing.store import ME\n"
        "s = DirectoryStore(sys.argv[1]); i, _ = s.create(1, b'a', 0o644, ME); s.hold(i);"
        "s.unlink(1, b'a'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(source)], check=True)
    assert len(list((source / ".wbfuse/orphans").iterdir())) == 1
    DirectoryStore(str(source)).close()
    assert not (source / ".wbfuse").exists()


def test_an_older_journal_finds_what_was_removed_after_it(source: Path) -> None:
    """The journal on disk lags. What is replayed into the file is to end with it, not to be an error."""
    script = (
        "import os, sys; from wbfuse.store.directory import DirectoryStore; from wbfuse.testing.store import ME\n"
        "from wbfuse.journal import Journal; j = Journal(int(sys.argv[2]))\n"
        "s = DirectoryStore(sys.argv[1], journal=j); i, _ = s.create(1, b'a', 0o644, ME); s.hold(i)\n"
        "os.pwrite(int(sys.argv[3]), os.pread(j.fd, 1 << 20, 0), 0); s.unlink(1, b'a'); print(i); os._exit(0)"
    )
    fds = [os.memfd_create("journal", 0) for _ in range(2)]
    command = [sys.executable, "-c", script, str(source), *map(str, fds)]
    ino = int(subprocess.run(command, check=True, pass_fds=fds, stdout=subprocess.PIPE).stdout)
    os.close(fds[0])
    store = DirectoryStore(str(source), journal=Journal(fds[1]), logged=True, revived=True)
    store.hold(ino)
    store.taken_over()
    assert store.getattr(ino).nlink == 0
    store.drop(ino)
    store.close()
    assert not (source / ".wbfuse").exists()


def test_two_stores_do_not_write_to_one_directory(store: DirectoryStore, source: Path) -> None:
    with pytest.raises(SourceError, match="another wbfuse mount"):
        DirectoryStore(str(source))
    DirectoryStore(str(source), read_only=True).close()


@pytest.mark.parametrize(("make", "text"), [(None, "no such directory"), ("file", "not a directory")])
def test_unusable_sources_say_what_is_wrong(tmp_path: Path, make: str | None, text: str) -> None:
    path = tmp_path / "x"
    if make:
        path.write_text("")
    with pytest.raises(SourceError, match=text):
        DirectoryStore(str(path))


def test_files_up_to_the_descriptor_limit_do_not_exhaust_it(source: Path) -> None:
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
from wbfuse.store.directory import DirectoryStore
from wbfuse.testing.store import ME, put, read_all
s = DirectoryStore(sys.argv[1])
inos = []
for i in range(1500):
    d, _ = s.mkdir(1, b'd%d' % i, 0o755, ME)
    ino, _ = s.create(d, b'f', 0o644, ME)
    s.hold(ino)
    put(s, ino, b'%d' % i)
    if i % 3 == 0:
        s.unlink(d, b'f')
    inos.append(ino)
for i, ino in enumerate(inos):
    assert read_all(s, ino) == b'%d' % i
    list(s.readdir(s.lookup(1, b'd%d' % i)[0], 0))
for ino in inos:
    s.drop(ino)
s.close()
"""
    done = subprocess.run([sys.executable, "-c", script, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
    assert not (source / ".wbfuse").exists()


def test_direct_runs_are_aligned_and_large() -> None:
    assert split_direct(0, 1 << 20) == (0, 1 << 20)
    assert split_direct(1, 1 << 20) == (4096, 1 << 20)
    assert split_direct(0, 4096) == (0, 0)
    assert split_direct(100, 65536 + 4096) == (4096, 69632)


def test_slices_of_vectors_are_the_bytes() -> None:
    parts = [b"abc", b"", b"defg", b"h"]
    whole = b"".join(parts)
    for start in range(9):
        for end in range(start, 9):
            assert b"".join(slice_buffers(parts, start, end)) == whole[start:end]


def test_a_new_file_belongs_to_who_asked(store: DirectoryStore, source: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    from wbfuse.store.contract import Owner

    store.create(ROOT_INO, b"a", 0o104755, Owner(1234, 4321))
    found = os.stat(source / "a")
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 4321, 0o4755)
    os.chmod(source, 0o2775)
    os.chown(source, 0, 77)
    store.mkdir(ROOT_INO, b"d", 0o755, Owner(1234, 4321))
    assert os.stat(source / "d").st_gid == 77


@needs_mount
def test_a_file_system_mounted_inside_the_source_is_refused(store: DirectoryStore, source: Path) -> None:
    """Neither orphans nor sync could reach it."""
    (source / "inside").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(source / "inside")], check=True)
    try:
        assert fails_with(errno.EXDEV, lambda: store.lookup(ROOT_INO, b"inside"))
    finally:
        subprocess.run(["umount", str(source / "inside")], check=True)
    assert store.lookup(ROOT_INO, b"inside")[0] != ROOT_INO
