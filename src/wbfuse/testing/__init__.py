"""What ships for testing: an exerciser for any mounted file system, a POSIX table, a contract suite for stores."""
