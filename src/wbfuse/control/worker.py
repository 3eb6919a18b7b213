"""The worker: the process that serves a mount, started by the keeper, with what a dead one left to it.

python -m wbfuse.control.worker FD        FD: the channel to the keeper
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial

from wbfuse.control import keeper
from wbfuse.control.mount import Mount, Spec
from wbfuse.control.paths import ControlError
from wbfuse.session.mount import MountError
from wbfuse.store.contract import SourceError
from wbfuse.writeback.log import LogError

log = logging.getLogger(__name__)

KNOWN = (MountError, SourceError, LogError, ControlError)
"""What may stand in the way of a mount: one line for the person who asked."""


def run(channel: socket.socket) -> int:
    """Serve until unmounted or told to end. Answers the exit status."""
    said, kept = keeper.fds_of(channel)
    spec = Spec.decode(said["spec"])
    os.umask(0o077 if spec.is_volume else 0)  # modes are the kernel's to cut; packs are nobody's business
    try:
        served = Mount(spec, kept, partial(keeper.keep, channel), said["deaths"])
    except KNOWN as e:
        if kept:  # it worked once: whatever is missing will be there again
            log.warning("%s; trying again", e)
            return keeper.NOT_YET
        channel.send(json.dumps({"failed": str(e)}).encode())
        return keeper.FAILED
    told = threading.Event()
    ending: list[threading.Thread] = []

    def on_signal(_number: int, _frame: object) -> None:
        if told.is_set():
            served.hurry()
            return
        told.set()
        thread = threading.Thread(target=served.stop, name="stop", daemon=True)
        ending.append(thread)
        thread.start()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    channel.send(json.dumps({"ready": True}).encode())
    served.wait()
    for thread in ending:
        thread.join()
    return keeper.LOST if served.lost else 0


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    code = keeper.GIVEN_UP
    try:
        with socket.socket(fileno=int(sys.argv[-1])) as channel:
            channel.set_inheritable(False)
            code = run(channel)
    except BaseException:
        logging.exception("the worker failed")
    finally:
        logging.shutdown()
        os._exit(code)


if __name__ == "__main__":
    main()
