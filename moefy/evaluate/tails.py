"""How unevenly the damage is spread over tokens: a mean hides the few that are ruined."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOP = 0.01
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


def tail(values_T: NDArray[Any]) -> dict[str, float]:
    """Quantiles of a quantity over tokens, and the share of its sum in the top 1 % of tokens.

    The quantiles are interpolated linearly; the top 1 % is rounded up to whole tokens. The share
    is zero where the sum is.
    """
    top = np.sort(values_T)[-math.ceil(TOP * len(values_T)) :].sum(dtype=float)
    total = values_T.sum(dtype=float)
    found = {name: float(np.quantile(values_T, q)) for name, q in _QUANTILES.items()}
    return {**found, "top_1_percent_share": float(top / total) if total else 0.0}
