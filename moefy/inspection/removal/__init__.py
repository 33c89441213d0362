"""Selective removal: take out what a model has for one domain. Read `prune.py` first."""
