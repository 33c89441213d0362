"""Selections turn scores into the experts that run: one file each; `tables.py` has the table."""
