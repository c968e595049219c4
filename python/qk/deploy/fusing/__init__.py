"""The parts of fuse: trace -> tensors (the only one that changes numbers) -> rewrite -> regions."""
