"""Training a model on text: one loop on accelerate, for recovery, sparsifying and their dense control.

Everything that makes a step is a function of the step's number and the seed, so that a run that was
killed goes on from its last checkpoint and ends with the same bytes.
"""
