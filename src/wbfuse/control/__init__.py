"""One running mount and the socket by which its owner asks it for status, sync and unmount."""
