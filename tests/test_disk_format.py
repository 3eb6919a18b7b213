"""What a log on disk says after whatever happened to its files. Without a mount."""

from __future__ import annotations

import json
import os
import random
import threading
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulated_disk import SimDirectory
from wbfuse.journal import Journal, Kind
from wbfuse.writeback.disk import format as stream
from wbfuse.writeback.disk.directory import Directory
from wbfuse.writeback.disk.load import load, restore_log
from wbfuse.writeback.disk.writer import Answer, DiskLog, State
from wbfuse.writeback.log import Log, LogError

MANIFEST = {"source": "x", "uuid": "0" * 32, "identity": [1]}


def made(directory: object, count: int = 40, seed: int = 1, trouble: str = "") -> tuple[Log, Journal]:
    """A log of `count` payloads that a writer has brought to `directory`, batch by batch."""
    rng = random.Random(seed)
    log_, journal = Log(4 << 20, 1 << 18), Journal()
    writer = DiskLog(
        directory, log_, journal, threading.Lock(), lambda _freed: None, MANIFEST,  # type: ignore[arg-type]
        lambda: False, lambda: None, lambda: None, there=False, trouble=trouble,
    )  # fmt: skip
    journal.put(Kind.LOG, 0, bytes(16))
    for n in range(count):
        data = rng.randbytes(rng.randrange(1, 60_000))
        place = log_.put(memoryview(data))
        log_.stamp(n, 5, n * 1000, len(data), place, 1)
        journal.put(Kind.NODE, n % 7, data[:40])
        if n % 3 == 0:
            writer.step(sync=n % 2 == 0)
    writer.step(sync=True)
    return log_, journal


def test_what_is_loaded_is_what_was_there(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path / "log"), make=True)
    log_, journal = made(directory)
    loaded = load(directory)
    assert loaded is not None
    again = Log(4 << 20, 1 << 18, loaded.log)
    assert again.scan() == log_.scan()
    assert all(again.view(r.place, r.length) == log_.view(r.place, r.length) for _, r in log_.scan())
    assert Journal(loaded.journal).inherited(Kind.NODE) == Journal(os.dup(journal.fd)).inherited(Kind.NODE)


def test_damage_in_what_was_durable_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wbfuse.writeback.disk.stream.chunks_of", lambda _g: (0, 1 << 18))
    directory = Directory(str(tmp_path / "log"), make=True)
    made(directory)
    chunks = directory.chunks()
    assert len(chunks) > 3
    path = tmp_path / "log" / directory._at[chunks[1]]
    raw = bytearray(path.read_bytes())
    raw[9000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(LogError, match="chunk 2 is damaged"):
        load(directory)
    path.unlink()
    with pytest.raises(LogError, match="chunk 2 is damaged"):
        load(Directory(str(tmp_path / "log"), os.dup(directory.fd)))


def test_a_newer_version_and_no_manifest_at_all(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path / "log"), make=True)
    assert load(directory) is None
    made(directory)
    (chunk,) = directory.chunks()
    path = tmp_path / "log" / directory._at[chunk]
    raw = bytearray(path.read_bytes())
    header = stream.Header.decode(raw)
    assert header is not None
    with patch.object(stream, "VERSION", stream.VERSION + 1):
        raw[: stream.PAGE] = header.encode()
    path.write_bytes(raw)
    with pytest.raises(LogError, match="newer wbfuse"):
        load(directory)
    for text in ("", "{}", "[1]", json.dumps({"epoch": "1", "source": "x"})):
        (tmp_path / "log/manifest.json").write_text(text)
        with pytest.raises(LogError, match="is damaged"):
            load(directory)


@pytest.fixture(scope="module")
def whole() -> bytes:
    directory = SimDirectory(lambda: None, lambda: None)
    made(directory, count=12)
    (raw,) = map(bytes, directory.views())
    return raw[: raw.rindex(stream.Kind.COMMIT.to_bytes(4, "little")) + 200].rstrip(b"\0") + bytes(4096)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_chunk_the_reader_misreads_nothing(whole: bytes, data: st.DataObject) -> None:
    """Bits, pieces, lengths: a reader finds a prefix of what was there, or says what is wrong."""
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(("bit", "zeros", "copy", "cut", "noise"))):
            case "bit":
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
            case "zeros":
                raw[at : at + 512] = bytes(len(raw[at : at + 512]))
            case "copy":
                piece = raw[at : at + 4096]
                to = data.draw(st.integers(0, len(raw) - len(piece)))
                raw[to : to + len(piece)] = piece
            case "cut":
                del raw[at:]
                raw += bytes(4096)
            case "noise":
                piece = data.draw(st.binary(min_size=1, max_size=100))
                raw[at : at + len(piece)] = piece[: len(raw) - at]
    before = stream.read([memoryview(whole)], 1, bytes(16))
    assert before is not None
    try:
        after = stream.read([memoryview(bytes(raw))], 1, bytes(16))
    except stream.DamagedError:
        return
    if after is None:
        return
    assert after.batches <= before.batches
    for index, segment in after.segments.items():
        for first, frame in segment.slots.items():
            assert bytes(frame.body) == bytes(before.segments[index].slots[first].body)
    os.close(restore_log(after))


def test_a_chunk_that_is_begun_again_gets_nothing_of_what_stood_there() -> None:
    """A power cut took the header of the first attempt and left its frames, so the same epoch begins again."""
    disk = SimDirectory(lambda: None, lambda: None)
    batches = []
    for count in (12, 1):
        disk.look()
        made(disk, count)  # the same bytes, of which the second attempt has only the first
        image = stream.read(disk.views(), 1, uuid.UUID(MANIFEST["uuid"]).bytes)
        assert image is not None
        batches.append(image.batches)
        disk.withdraw()
        (chunk,) = disk.files
        chunk.cached[: stream.PAGE] = bytes(stream.PAGE)
    assert batches == [5, 1]


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=300), body=st.binary(max_size=200), first=st.integers(0, 1 << 32 - 1))
def test_frames_that_are_whole_and_make_no_sense_are_refused(raw: bytes, body: bytes, first: int) -> None:
    """Somebody made them, with right checksums."""
    header = stream.Header(1, 1, 1, 0, 4 << 20, 1 << 18, bytes(16), 0)
    parts = [
        *stream.frame(header.seed, stream.Kind.JOURNAL, [raw]),
        *stream.frame(header.seed, stream.Kind.SLOTS, [body], len(raw) % 9, 1, first % 9000, len(body) % 5),
        *stream.frame(header.seed, stream.Kind.PAGES, [body], len(raw) % 9, 1, first % 9000, len(body) % 5),
        *stream.commit(header.seed, 1, 5, 0),
    ]
    image = stream.read([memoryview(header.encode() + b"".join(map(bytes, parts)))], 1, bytes(16))
    assert image is not None
    try:
        os.close(restore_log(image))
    except LogError:
        return


@pytest.mark.parametrize("last", ["removed", "cut"])
def test_files_that_are_missing_are_told_though_nothing_follows_them(tmp_path: Path, last: str) -> None:
    """The last chunk has no successor that could miss it."""
    directory = Directory(str(tmp_path / "log"), make=True)
    directory.reserve(3, 16 << 20)
    made(directory)
    name = tmp_path / "log" / directory._at[directory.chunks()[-1]]
    if last == "removed":
        name.unlink()
    else:
        os.truncate(name, 5 << 20)
    again = Directory(str(tmp_path / "log"), os.dup(directory.fd))
    with pytest.raises(LogError, match=r"missing|cut short"):
        load(again)
    loaded = load(again, lenient=True) if last == "cut" else None
    assert loaded is None or loaded.warning


def test_a_directory_that_cannot_be_read_is_trouble_for_the_next_worker_and_refused_at_a_mount(tmp_path: Path) -> None:
    path = tmp_path / "log"
    directory = Directory(str(path), make=True)
    (path / "a.chunk").mkdir()
    worker = Directory(str(path), os.dup(directory.fd))
    assert "cannot be read" in worker.trouble
    worker.close()
    directory.close()
    with pytest.raises(LogError, match="cannot be read"):
        Directory(str(path))


def test_a_file_of_the_log_that_somebody_removed_is_noticed_when_it_is_synced(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path / "log"), make=True)
    chunk = directory.create(1, 1, 1 << 20)
    chunk.sync()
    (tmp_path / "log" / directory._at[1, 1]).unlink()
    with pytest.raises(OSError, match="removed or cut"):
        chunk.sync()
    chunk.close()
    directory.remove(directory.chunks())
    directory.create(2, 1, 1 << 20).close()  # in another file


@pytest.mark.parametrize("faults", [1, 2, 5])
def test_who_waits_for_a_log_that_cannot_be_written_for_a_while_waits_no_longer(
    monkeypatch: pytest.MonkeyPatch, faults: int
) -> None:
    """Though nothing new comes that could wake the writer: the older epoch counts, so the store must wait for it."""
    monkeypatch.setattr("wbfuse.writeback.disk.writer._AGAIN", 0.01)
    left = [OSError(5, "by the test")] * faults
    publish = SimDirectory.publish

    def fail(self: SimDirectory, manifest: dict[str, Any]) -> None:
        if left:
            raise left.pop()
        publish(self, manifest)

    monkeypatch.setattr(SimDirectory, "publish", fail)
    log_, journal = Log(4 << 20, 1 << 18), Journal()
    journal.put(Kind.LOG, 0, bytes(16))
    writer = DiskLog(
        SimDirectory(lambda: None, lambda: None), log_, journal, threading.Lock(), lambda _freed: None, MANIFEST,
        lambda: True, lambda: None, lambda: None, there=True,
    )  # fmt: skip
    waits = threading.Thread(target=writer.wait, daemon=True)
    writer.start()
    waits.start()
    waits.join(20)
    assert not waits.is_alive()
    writer.stop()


@pytest.mark.parametrize("there", [True, False])
def test_a_store_that_does_not_answer_for_its_note_costs_neither_the_log_nor_its_room(there: bool) -> None:
    directory = SimDirectory(lambda: None, lambda: None)
    made(directory)
    directory.look()
    files = len(directory.files)
    left = [OSError(5, "by the test")] * 10

    def asked() -> bool:
        if left:
            raise left.pop()
        return there

    log_, journal = Log(4 << 20, 1 << 18), Journal()
    journal.put(Kind.LOG, 0, bytes(16))
    writer = DiskLog(
        directory, log_, journal, threading.Lock(), lambda _freed: None, MANIFEST, asked, lambda: asked() and None,
        directory.forget, there=there,
    )  # fmt: skip
    while left:
        writer.step(sync=True)
        assert not there or directory.manifest() is not None
    writer.step(sync=True)
    assert writer.state is State.CURRENT
    assert len(directory.files) <= files + 1


def test_an_epoch_is_not_begun_twice_where_a_directory_could_not_be_read_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(str(tmp_path / "log"), make=True)
    made(directory, seed=1)
    with monkeypatch.context() as m:
        m.setattr(Directory, "_page", lambda _self, _name: os.read(-1, 1))
        again = Directory(str(tmp_path / "log"), os.dup(directory.fd))
    assert "cannot be read" in again.trouble
    log_, _ = made(again, seed=2, trouble=again.trouble)
    assert again.newest_epoch == 1
    found = Directory(str(tmp_path / "log"), os.dup(directory.fd))
    assert found.newest_epoch == 2
    loaded = load(found)
    assert loaded is not None
    whole = Log(4 << 20, 1 << 18, loaded.log)
    assert [record for _, record in whole.scan()] == [record for _, record in log_.scan()]


def test_what_stands_behind_a_hole_is_read_where_somebody_recovers(whole: bytes) -> None:
    manifest = 1, b"\0" * 16
    sound = stream.read([memoryview(whole)], *manifest)
    assert sound is not None
    raw = bytearray(whole)
    raw[stream.PAGE + 2000] ^= 1
    with pytest.raises(stream.DamagedError, match="damaged at byte"):
        stream.read([memoryview(raw)], *manifest)
    read = stream.read([memoryview(raw)], *manifest, lenient=True)
    assert read is not None
    assert "damaged at byte" in read.warning
    assert read.batch == sound.batch
    assert read.batches == sound.batches - 1


def test_whoever_waits_for_a_log_that_is_given_up_may_go_on_though_it_begins_anew_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was decided is what he is told, not what the state is when he looks."""
    log_, journal = Log(4 << 20, 1 << 18), Journal()
    journal.put(Kind.LOG, 0, bytes(16))
    directory = SimDirectory(lambda: None, lambda: None)
    writer = DiskLog(
        directory, log_, journal, threading.Lock(), lambda _freed: None, MANIFEST, lambda: directory.note,
        directory.remember, directory.forget, there=False, trouble="by the test",
    )  # fmt: skip
    answers: list[Answer] = []
    assert writer.when_durable(answers.append) is None
    writer.step(sync=True)
    assert answers == [Answer.BROKEN]
    assert writer.state is State.CURRENT
    assert writer.when_durable(answers.append, 0) is Answer.DURABLE


def test_a_file_that_finds_no_room_does_not_stand_before_those_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(str(tmp_path / "log"), make=True)
    directory.reserve(1, 1 << 20)
    directory.create(1, 1, 1 << 20).close()

    def full(*_: object) -> None:
        raise OSError(28, "by the test")

    with monkeypatch.context() as m:
        m.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="by the test"):
            directory.create(1, 2, 1 << 20)
        directory.remove([(1, 1)])
        directory.create(2, 1, 1 << 20).close()
    assert len(list((tmp_path / "log").glob("*.chunk"))) == 1


def test_a_full_disk_keeps_the_room_of_a_manifest_that_is_withdrawn(tmp_path: Path) -> None:
    path = tmp_path / "log"
    directory = Directory(str(path), make=True)
    directory.reserve(1, 1 << 20)

    def room() -> int:
        return sum(os.stat(path / name).st_blocks for name in os.listdir(path) if name.startswith((".m", "m")))

    before = room()
    for _ in range(3):
        directory.publish(MANIFEST | {"epoch": 1})
        directory.publish(MANIFEST | {"epoch": 2})
        assert room() == before
        directory.withdraw()
        assert room() == before
    assert directory.manifest() is None
