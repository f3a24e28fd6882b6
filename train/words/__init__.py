"""Word vectors: train, look up, evaluate."""
