"""What the tree is: the interface of a file system, its dispatch, and the cached file system over a store."""
