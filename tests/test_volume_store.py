"""The contract suite on volumes, and what only volumes promise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from wbfuse.store.volume import VolumeStore, format_volume
from wbfuse.testing.store import StoreContract


class TestVolumeOnSqlite(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[VolumeStore]:
        meta = f"sqlite:///{tmp_path}/meta.db"
        format_volume(meta, f"file://{tmp_path}/data", {})
        store = VolumeStore(meta)
        yield store
        store.close()


class TestVolumeOnPostgresAndS3(StoreContract):
    @pytest.fixture
    def store(self, postgres_meta: str, s3_url: str) -> Iterator[VolumeStore]:
        format_volume(postgres_meta, s3_url, {}, compress="zstd")
        store = VolumeStore(postgres_meta)
        yield store
        store.close()
