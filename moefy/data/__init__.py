"""Corpora, disjoint shards, and batches a model can run."""
