"""What keeps a volume: check, gc, compaction, dump and load. Each works on a volume that is mounted as well."""
