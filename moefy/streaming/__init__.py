"""Convert a checkpoint that is larger than memory: one layer at a time, and all tokens through it."""
