"""Where bytes are durable: the contract of a store and its implementations. A store knows no kernel and no cache."""
