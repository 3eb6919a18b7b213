"""The worker: the process that serves a mount, started by the keeper, with what a dead one left to it.

python -m wbfuse.control.worker FD        FD: the channel to the keeper
"""

from __future__ import annotations

import contextlib
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
    ending: list[threading.Thread] = []

    def listen() -> None:
        """Do what the keeper says, until it is gone."""
        while channel.recv(64) == keeper.STOP:
            if ending:
                served.hurry()
                continue
            ending.append(threading.Thread(target=served.stop, name="stop", daemon=True))
            ending[0].start()
        served.alone.set()
        log.error("the keeper is gone: nobody follows if this process dies")

    channel.send(json.dumps({"ready": True}).encode())
    threading.Thread(target=listen, name="keeper", daemon=True).start()
    served.wait()
    for thread in ending:
        thread.join()
    code = keeper.LEFT if served.left else 0
    with contextlib.suppress(OSError):  # the keeper is gone
        channel.send(json.dumps({"over": code}).encode())
    return code


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    code = keeper.GIVEN_UP
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the keeper hears them
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
