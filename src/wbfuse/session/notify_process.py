"""Run as a script: writes notifications to the kernel for a server that may die meanwhile (see notifier).

    python notify_process.py FUSE CHANNEL LIFELINE      all are descriptors

CHANNEL is a SEQPACKET socket: each message on it is written to FUSE, and answered with its errno, 0 where the kernel
took it. Ends with the channel. LIFELINE is the end to read of a pipe; everybody who serves, or may start who does,
holds the other. It imports nothing of wbfuse, to be there soon and small.
"""

import contextlib
import errno
import os
import socket
import struct
import sys
import threading

_HEAD = struct.Struct("<IIQ")
"""fuse_in_header as far as it is of use: length, opcode, unique. fuse_out_header: length, error, unique."""
_SILENT = (2, 36, 42)
"""FORGET, INTERRUPT, BATCH_FORGET: nobody waits for a reply."""
_RESEND = struct.pack("<IiQ", 16, 7, 0)
"""NOTIFY_RESEND."""
_LONGEST = (1 << 20) + (64 << 10)
"""Bytes of a request: the kernel takes no smaller buffer than its largest WRITE needs."""


def main(fuse: int, channel: int, lifeline: int) -> None:
    threading.Thread(target=end_alone, args=(fuse, lifeline), daemon=True).start()
    with socket.socket(fileno=channel) as ours:
        while message := ours.recv(1 << 16):
            error = 0
            try:
                os.write(fuse, message)
            except OSError as e:
                error = e.errno or 5
            try:
                ours.send(error.to_bytes(4, "little"))
            except ConnectionError:
                return  # the server died


def end_alone(fuse: int, lifeline: int) -> None:
    """Where nobody is left who serves, fail what `main` may wait for; with its end the connection ends as well."""
    os.read(lifeline, 1)  # nothing is ever written to it
    with contextlib.suppress(OSError):  # a kernel before 6.9 has failed them already
        os.write(fuse, _RESEND)
    while True:
        try:
            request = os.read(fuse, _LONGEST)
        except FileNotFoundError:  # it was interrupted
            continue
        except OSError:  # unmounted, or aborted
            return
        _, opcode, unique = _HEAD.unpack_from(request)
        if opcode not in _SILENT:
            with contextlib.suppress(FileNotFoundError):  # interrupted as well
                os.write(fuse, struct.pack("<IiQ", 16, -errno.ECONNABORTED, unique))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
