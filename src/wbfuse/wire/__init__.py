"""The kernel's FUSE protocol, 7.31 to 7.45, as values: no I/O, no state, no policy.

Reference for every layout: `include/uapi/linux/fuse.h` of Linux 6.18. All integers are little-endian,
so this package serves little-endian machines (x86-64, arm64, riscv64).
"""
