"""What the tree is: the interface that a file system implements, its dispatch, and the cached file system over a store."""
