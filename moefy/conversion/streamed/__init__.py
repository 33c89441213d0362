"""The same flow with one layer in memory at a time: read `stream.py` first."""
