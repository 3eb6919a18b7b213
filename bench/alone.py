"""The write-through file system served by one process: no keeper, no RESEND, nothing that outlives it.

python -m bench.alone SOURCE MOUNTPOINT
"""

from __future__ import annotations

import sys

from wbfuse import serve
from wbfuse.filesystem.store_fs import StoreFileSystem
from wbfuse.store.directory import DirectoryStore
from wbfuse.store.shaped import Shape, shaped
from wbfuse.wire.constants import Cap


class Alone(StoreFileSystem):
    capabilities = StoreFileSystem.capabilities & ~Cap.HAS_RESEND


if __name__ == "__main__":
    store, _ = shaped(DirectoryStore(sys.argv[1]), Shape())  # which counts, as in a mount
    serve(Alone(store, wait_on_close=False), sys.argv[2])
