"""The main flow, plan, capture, fit, tune, write, verify: read `convert.py` first."""
