"""The command line: `wbfuse mount | umount | sync | status`."""
