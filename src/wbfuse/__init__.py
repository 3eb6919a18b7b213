"""wbfuse: a FUSE server in pure Python, and a file system with a full write-back cache on top of it.

To write a file system: subclass `FileSystem` and call `serve(fs, mountpoint)`.
"""

from wbfuse.filesystem.api import PARKED, FileSystem, Parked, Request, WouldBlock
from wbfuse.session.mount import MountError
from wbfuse.session.serve import Options, serve
from wbfuse.wire.constants import Cap
from wbfuse.wire.types import Attr, Dirent, Entry, Lock, Opened, Statfs

__all__ = [
    "PARKED",
    "Attr",
    "Cap",
    "Dirent",
    "Entry",
    "FileSystem",
    "Lock",
    "MountError",
    "Opened",
    "Options",
    "Parked",
    "Request",
    "Statfs",
    "WouldBlock",
    "serve",
]
__version__ = "0.1.0"
