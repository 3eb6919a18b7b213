"""Run as a script: writes notifications to the kernel for a server that may die meanwhile (see notifier).

    python notify_process.py FUSE CHANNEL       both are descriptors; CHANNEL is a SEQPACKET socket

Each message on the channel is written to FUSE, and answered with its errno, 0 where the kernel took it. Ends with the
channel. It imports nothing of wbfuse, to be there soon and small.
"""

import os
import socket
import sys


def main(fuse: int, channel: int) -> None:
    with socket.socket(fileno=channel) as ours:
        while message := ours.recv(1 << 16):
            error = 0
            try:
                os.write(fuse, message)
            except OSError as e:
                error = e.errno or 5
            try:
                ours.send(error.to_bytes(4, "little"))
            except BrokenPipeError:
                return  # the server died


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
