"""A checkpoint on disk, and where its MLPs and attention blocks are."""
