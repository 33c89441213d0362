"""The command line: `verbs.py` has the verbs."""
