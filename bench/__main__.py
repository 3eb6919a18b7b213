"""Run the measurements of the issue and print each beside what it should be.

    python -m bench [--rounds 5] [--only NAME ...]

Needs root (mounts, dropped caches, a memory cgroup). Numbers are medians of `--rounds`, peers taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import deaths, slow, volumes, work
from bench.far import RATE
from bench.peers import BUILD, Field, Peer, quiet

GIB = 1 << 30
Row = tuple[str, float, str, float, str]
"""(what, measured, sense, wanted, how it came about)."""
ROWS: list[Row] = []


def row(what: str, measured: float, sense: str, wanted: float, how: str) -> None:
    ROWS.append((what, measured, sense, wanted, how))
    good = measured >= wanted if sense == ">=" else measured <= wanted
    print(f"{'ok  ' if good else 'FAIL'} {what}: {measured:.2f} (wanted {sense} {wanted:g})  [{how}]", flush=True)


def medians(rounds: int, peers: list[Peer], measure: Callable[[Peer], float]) -> dict[str, float]:
    """The median of each peer, the peers taking turns."""
    found: dict[str, list[float]] = {p.name: [] for p in peers}
    for _ in range(rounds):
        for peer in peers:
            found[peer.name].append(measure(peer))
    return {name: statistics.median(values) for name, values in found.items()}


def show(found: dict[str, float], unit: str) -> str:
    return ", ".join(f"{name} {value:.2f} {unit}" for name, value in found.items())


def bench_copy(root: Path, rounds: int) -> None:
    source = root / "data"
    work.make_source(source, 2 * GIB)
    with Field(root / "copy") as field:
        peers = [field.wbfuse("wbfuse", "--log-size", "1GiB"), field.c("C", "writeback")]
        python = field.pyfuse3("pyfuse3")
        peers += [python] if python else []
        found = medians(rounds, peers, lambda p: work.copy_with_fsync(p, source))
        row("copy 2 GiB + fsync, speed against C", found["C"] / found["wbfuse"], ">=", 0.9, show(found, "s"))
        if python:
            row(
                "copy 2 GiB + fsync, speed against pyfuse3",
                found["pyfuse3"] / found["wbfuse"],
                ">=",
                2,
                show(found, "s"),
            )
    source.unlink()


def bench_small_writes(root: Path, rounds: int) -> None:
    with Field(root / "small") as field:
        peers = [
            field.wbfuse("wbfuse", "--log-size", "1GiB", "--on-close", "background"),
            field.wbfuse("through", "--policy", "writethrough", "--on-close", "background"),
            field.c("C", "writeback"),
        ]
        for name, spread in (("random in 64 MiB", 64 << 20), ("appended", 0)):
            found = medians(rounds, peers, lambda p, s=spread: work.small_buffered_writes(p, 32768 if s else 16384, s))  # type: ignore[misc]
            against = found["through"] / found["wbfuse"]
            row(f"4 KiB writes {name}, speed against write-through", against, ">=", 8, show(found, "us"))
            row(f"4 KiB writes {name}, speed against C", found["C"] / found["wbfuse"], ">=", 1.0, show(found, "us"))


def bench_read(root: Path, rounds: int) -> None:
    with Field(root / "read") as field:
        peers = [field.wbfuse("wbfuse"), field.c("C", "writeback")]
        for peer in peers:
            work.make_source(peer.source / "file", GIB)
        found = medians(rounds, peers, lambda p: work.sequential_cold_read(p, "file"))
        row("sequential cold read of 1 GiB, speed against C", found["C"] / found["wbfuse"], ">=", 0.9, show(found, "s"))


def bench_small_files(root: Path, rounds: int) -> None:
    with Field(root / "files") as field:
        peers = [field.wbfuse("wbfuse", "--log-size", "1GiB", "--on-close", "background"), field.c("C", "writeback")]
        found = medians(rounds, peers, lambda p: work.small_files(p, 10_000))
        row(
            "10,000 small files, close in background, against C",
            found["C"] / found["wbfuse"],
            ">=",
            0.5,
            show(found, "s"),
        )
    with Field(root / "files") as field:
        waits = medians(
            1, [field.wbfuse("wbfuse, close waits", "--log-size", "1GiB")], lambda p: work.small_files(p, 1000)
        )
        print(f"     1,000 small files with --on-close wait (an fsync each): {show(waits, 's')}")


def bench_processor(root: Path, rounds: int) -> None:
    with Field(root / "processor") as field:
        peers = [field.wbfuse("wbfuse", "--policy", "writethrough", "--on-close", "background"), field.c("C")]
        found = medians(rounds, peers, lambda p: work.processor_per_write(p, 30_000)[0])
        row(
            "processor time a 4 KiB WRITE in write-through, against C",
            found["wbfuse"] / found["C"],
            "<=",
            1.5,
            show(found, "us"),
        )


def bench_keeper(root: Path, rounds: int) -> None:
    with Field(root / "keeper") as field:
        peers = [field.wbfuse("kept", "--policy", "writethrough", "--on-close", "background"), field.alone("alone")]
        both: dict[str, list[tuple[float, float]]] = {p.name: [] for p in peers}
        for _ in range(rounds):
            for peer in peers:
                both[peer.name].append(work.processor_per_write(peer, 30_000))
        for i, what in enumerate(("processor", "wall")):
            found = {name: statistics.median(values[i] for values in pairs) for name, pairs in both.items()}
            against = found["kept"] / found["alone"]
            row(f"{what} time a 4 KiB WRITE, with keeper and RESEND against without", against, "<=", 1.05,
                show(found, "us"))  # fmt: skip


def bench_getattr(root: Path, rounds: int) -> None:
    with Field(root / "getattr") as field:
        found = _waits(field.wbfuse("wbfuse", "--log-size", "512MiB", "--on-close", "background"), rounds)
        idle, busy = found["answer"]
        what = "p99 of the reader's answer under saturated write-back, against idle"
        row(what, busy / idle, "<=", 2, f"{idle:.0f} us, {busy:.0f} us")
        idle, busy = found["bystander"]
        print(f"     a process that only computes, beside it: {busy / idle:.2f}  [{idle:.0f} us, {busy:.0f} us]")
        callers = {"wbfuse": found["caller"], "C": _waits(field.c("C", "writeback"), rounds)["caller"]}
        for name, (idle, busy) in callers.items():
            print(f"     a caller of {name}, behind the WRITEs in the kernel's queue: {idle:.0f} us, {busy:.0f} us")


def _waits(peer: Peer, rounds: int) -> dict[str, tuple[float, float]]:
    """name -> (idle, saturated), medians of p99 in microseconds."""
    found = [work.getattr_under_load(peer, 2.0) for _ in range(rounds)]
    return {
        name: (
            statistics.median(getattr(idle, name) for idle, _ in found),
            statistics.median(getattr(busy, name) for _, busy in found),
        )
        for name in ("caller", "answer", "bystander")
    }


def bench_slow_store(root: Path, rounds: int) -> None:
    found = [slow.run(_fresh(root / f"slow{i}")) for i in range(min(rounds, 3))]
    middle = {key: statistics.median(f[key] for f in found) for key in found[0]}
    limits = {
        "stat p99 ms": 50, "ls p99 ms": 50, "cold read p99 ms": 50, "longest pause ms": 300,
        "longest pause after warm-up ms": 300, "resident MiB": 164, "killed": 0,
    }  # fmt: skip
    for key, wanted in limits.items():
        row(f"slow store: {key}", middle[key], "<=", wanted, f"median of {len(found)} runs")


def bench_far(root: Path, _rounds: int) -> None:
    """Once: a round takes three minutes, and the link, not the machine, sets the pace."""
    size = GIB
    found = volumes.far_copies(_fresh(root / "far"), size)
    ideal = size / RATE
    others = {name: found[name] for name in ("JuiceFS", "JuiceFS --writeback", "rclone", "s3fs", "scp")}
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in others.items())
    row("far store: copy of 1 GiB until durable, against the link", found["wbfuse"] / ideal, "<=", 1.10,
        f"{found['wbfuse']:.1f} s, bytes / rate {ideal:.1f} s")  # fmt: skip
    row("far store: the same against the best peer", found["wbfuse"] / min(others.values()), "<=", 1.0, times)
    row("far store: cp returns, against C", found["returned"] / found["C returned"], "<=", 1.2,
        f"{found['returned']:.2f} s, C {found['C returned']:.2f} s")  # fmt: skip
    row("far store: sequential read, against the link", ideal / found["read"], ">=", 0.9, f"{found['read']:.1f} s")


def bench_far_random(root: Path, _rounds: int) -> None:
    found = volumes.far_random_writes(_fresh(root / "far-random"), 3200)
    row("far store: 4 KiB random writes, fsync each 32, uploaded for each byte", found["amplification"], "<=", 1.5, "")
    row("far store: the same, durable operations a second against JuiceFS", found["wbfuse"] / found["JuiceFS"], ">=", 1,
        f"{found['wbfuse']:.0f}, JuiceFS {found['JuiceFS']:.0f}")  # fmt: skip
    against = found["by log"] / found["JuiceFS wb"]
    row("far store: the same with --fsync log, against JuiceFS --writeback", against, ">=", 1,
        f"{found['by log']:.0f}, JuiceFS --writeback {found['JuiceFS wb']:.0f}")  # fmt: skip


def bench_metadata(root: Path, _rounds: int) -> None:
    for kind in ("SQLite", "PostgreSQL"):
        found = volumes.metadata_against_juicefs(_fresh(root / f"metadata-{kind}"), kind, 10_000)
        for name, (ours, theirs) in found.items():
            row(f"{name} 10,000 files on {kind}, speed against JuiceFS", theirs / ours, ">=", 1,
                f"{ours:.2f} s, JuiceFS {theirs:.2f} s")  # fmt: skip


def bench_disk_log(root: Path, rounds: int) -> None:
    source = root / "data"
    work.make_source(source, 2 * GIB)
    with Field(root / "disk-log") as field:
        memory = field.wbfuse("memory", "--log-size", "1GiB")
        disk = field.wbfuse("disk", "--log-size", "1GiB", "--log", str(field.root / "log"))
        found = medians(rounds, [memory, disk], lambda p: work.copy_with_fsync(p, source))
        against = found["memory"] / found["disk"]
        row("copy 2 GiB + fsync with the log on disk, against memory alone", against, ">=", 0.7, show(found, "s"))
    source.unlink()


def bench_deaths(root: Path, _rounds: int) -> None:
    found = deaths.away(root / "deaths")
    seconds, used = found["worker"]
    row("seconds until a worker is back with a full log of 1 GiB", seconds, "<=", 2, f"{used} MiB in it")
    seconds, used = found["log on disk"]
    row("seconds to mount with a log of 1 GiB found on disk", seconds, "<=", 4, f"{used} MiB in it, nothing cached")


def bench_clone(root: Path, _rounds: int) -> None:
    for kind in ("SQLite", "PostgreSQL"):
        seconds, memory = volumes.fragmented(root / f"clone-{kind}", kind, 500_000)
        row(f"clone of a file of 500,000 extents on {kind}, seconds", seconds, "<=", 1, "")
        row(f"the same, MiB of memory for reading all over it on {kind}", memory, "<=", 150, "")


def _fresh(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


BENCHES = {
    "copy": bench_copy, "small-writes": bench_small_writes, "read": bench_read, "small-files": bench_small_files,
    "processor": bench_processor, "getattr": bench_getattr, "slow-store": bench_slow_store,
    "keeper": bench_keeper, "disk-log": bench_disk_log, "deaths": bench_deaths,
    "clone": bench_clone, "metadata": bench_metadata, "far-random": bench_far_random, "far": bench_far,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description="Measure wbfuse against its peers.")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("the bench needs root: it mounts, drops caches and makes a memory cgroup")
    root = Path(tempfile.mkdtemp(prefix="wbfuse-bench-", dir="/var/tmp"))
    root.chmod(0o755)  # PostgreSQL runs as somebody else
    try:
        for name in arguments.only:
            quiet()
            BENCHES[name](root, arguments.rounds)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "results.json").write_text(json.dumps(ROWS, indent=1))
    missed = [
        what for what, measured, sense, wanted, _ in ROWS if (measured < wanted if sense == ">=" else measured > wanted)
    ]
    print(f"{len(ROWS) - len(missed)} of {len(ROWS)} as wanted" + (f"; not: {'; '.join(missed)}" if missed else ""))


if __name__ == "__main__":
    main()
