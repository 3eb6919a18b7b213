"""An ext4 on a loop device whose power can be cut: what was not synced is gone, as the file system itself sees it."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN: nothing more goes to the device, and not the journal either (flag 2)."""


class Disk:
    def __init__(self, image: Path, path: Path) -> None:
        self._image, self.path = image, path
        self.up()

    def up(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self._image), str(self.path)], check=True)

    def cut(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", 2))
        finally:
            os.close(fd)

    def down(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)


@contextmanager
def disk(home: Path, mib: int) -> Iterator[Disk]:
    """Mounted below `home`; taken down in every case."""
    image, path = home / "disk.img", home / "disk"
    path.mkdir()
    with open(image, "wb") as f:
        f.truncate(mib << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    made = Disk(image, path)
    try:
        yield made
    finally:
        if os.path.ismount(path):
            subprocess.run(["umount", "-l", str(path)], check=True)
