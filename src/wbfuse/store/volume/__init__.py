"""Volumes: bytes as immutable packs in an object store, names and maps in a SQL database."""

from wbfuse.store.volume.store import Tuning, VolumeError, VolumeStore, format_volume

__all__ = ["Tuning", "VolumeError", "VolumeStore", "format_volume"]
