"""Which weights of a layer become zero, and in which order its inputs stand for that."""
