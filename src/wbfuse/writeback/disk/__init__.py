"""The log on disk: a copy of log and journal that outlives the machine's memory. docs/design/disk-log.md."""
