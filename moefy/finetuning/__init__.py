"""Training a model on text: one loop on accelerate, for recovery, sparsifying and their dense control.

    outcome = fine_tune(model, objective, samples, recipe, check=check, folder=work, report=report)

Everything that makes a step is a function of the step's number and the seed, so that a run that was
killed goes on from its last checkpoint and ends with the same bytes.
"""

from moefy.finetuning.loop import Outcome, fine_tune

__all__ = ["Outcome", "fine_tune"]
