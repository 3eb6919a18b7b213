"""A directory of any mounted file system as a store: the embedded default and the reference."""

from wbfuse.store.directory.store import DirectoryStore

__all__ = ["DirectoryStore"]
