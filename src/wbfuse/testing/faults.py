"""A store that fails by script, for faults that real ones do not give on demand, and a mount over one.

    python -m wbfuse.testing.faults SCRIPT SOURCE MOUNTPOINT [options of wbfuse mount]

SCRIPT is a JSON file, read again at each call: {"commit": "EIO", "sync": "ENOSPC", "delay": 0.5, "stall": true}.
A method that it names raises that errno; `delay` sleeps before each commit; `stall` keeps commits waiting until it
is gone, which is how a test catches a round in flight. With WBFUSE_NO_RESEND in the environment the mount does not
take RESEND, as on a kernel before 6.9.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from wbfuse.cli import mount as command
from wbfuse.control import keeper, worker
from wbfuse.control import mount as control
from wbfuse.filesystem.store_fs import StoreFileSystem
from wbfuse.journal import Journal
from wbfuse.store.contract import Progress, Round, Store
from wbfuse.wire.constants import Cap


class FaultyStore:
    """Wraps `store`; the script at `path` says what fails now. A missing script is an empty one."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self._path = path

    def _script(self) -> dict[str, Any]:
        try:
            with open(self._path, encoding="utf-8") as f:
                found: dict[str, Any] = json.load(f)
                return found
        except FileNotFoundError:
            return {}

    def _maybe(self, name: str) -> None:
        error = self._script().get(name)
        if error is not None:
            raise OSError(getattr(errno, error), f"by script: {name}")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._maybe(name)
            return found(*args, **kwargs)

        return call

    def commit(self, rounds: Sequence[Round], progress: Progress) -> None:
        script = self._script()
        time.sleep(script.get("delay", 0))
        while self._script().get("stall"):
            time.sleep(0.005)  # polling is the whole channel to the test, which is another process
        self._maybe("commit")
        self._store.commit(rounds, progress)


def main() -> None:
    if sys.argv[1] != "--worker":
        script = os.path.abspath(sys.argv.pop(1))
        keeper.WORKER = ("-m", "wbfuse.testing.faults", "--worker", script)
        command.mount.main(prog_name="faults")
        return
    script = sys.argv[2]
    build: Callable[[control.Spec, Journal, dict[str, int]], Store] = control.open_store

    def faulty(spec: control.Spec, journal: Journal, kept: dict[str, int]) -> Store:
        return cast(Store, FaultyStore(build(spec, journal, kept), script))

    control.open_store = faulty
    if os.environ.get("WBFUSE_NO_RESEND"):  # as a kernel before 6.9
        StoreFileSystem.capabilities &= ~Cap.HAS_RESEND
    worker.main()


if __name__ == "__main__":
    main()
