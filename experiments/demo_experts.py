"""The demo models in experts of 32 neurons, 8 of 32 a token: what `experiments/reproduce` makes and the case
study looks into."""

from pathlib import Path

import moefy
from moefy.recipe import Recipe, override

DEMO = Path("moefy/demo")
SETTINGS = {
    "partition.expert_size": 32,
    "router.name": "mlp",
    "selection.name": "topk",
    "compensation.name": "conditional_mean",
    "budget.name": "uniform",
}
RECIPE = override(Recipe.named("largest_inputs"), SETTINGS)


def moefied(name: str, work: Path) -> Path:
    """The folder of a moefied demo model: that of `experiments/reproduce`, or made here."""
    reproduced, made = Path("runs/reproduce") / name, work / f"{name}-moefied"
    if (reproduced / "moefy.json").exists():
        return reproduced
    if not made.exists():
        moefy.convert(DEMO / name, made, recipe=RECIPE, resume=True)
    return made
