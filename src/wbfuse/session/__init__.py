"""The live connection to the kernel: mount, receive, reply, notify. It knows the protocol and no file system."""
