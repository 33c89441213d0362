"""What experts do: describe, control, ablate, judge, show. Read `inspect.py` first."""
