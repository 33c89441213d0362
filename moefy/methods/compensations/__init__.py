"""Compensations stand in for experts that are off; `tables.py` has the table."""
