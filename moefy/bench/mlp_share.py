"""How much of a dense model's time its MLPs take, and so what Amdahl's law lets experts gain.

G. M. Amdahl, Validity of the single processor approach to achieving large scale computing capabilities,
AFIPS 1967: with a share `s` of the time that takes `d` of it afterwards, all is `1 / (1 - s + s d)` as fast.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moefy.locate import sites


def mlp_share(model: PreTrainedModel, steps: Sequence[Callable[[], object]]) -> float | None:
    """Share of the time of `steps`, passes of a dense model on a CPU, that its MLPs take.

    Their median; reading the clock around every MLP is in the time of both. None on a GPU,
    where the host does not wait for what it starts.
    """
    if model.device.type != "cpu":
        return None
    shares = []
    with _clocked(model) as spent:
        for step in steps:
            spent.clear()
            began = time.perf_counter()
            step()
            shares.append(sum(spent) / (time.perf_counter() - began))
    return median(shares)


@contextmanager
def _clocked(model: PreTrainedModel) -> Iterator[list[float]]:
    """Seconds of every pass through an MLP, as they are spent."""
    spent: list[float] = []
    began: dict[nn.Module, float] = {}

    def begin(module: nn.Module, _: Any) -> None:
        began[module] = time.perf_counter()

    def end(module: nn.Module, _: Any, __: Any) -> None:
        spent.append(time.perf_counter() - began.pop(module))

    handles = []
    for site in sites(model):
        # Families without a module for the MLP compute it in parts.
        paths = [site.module, *([site.act, site.path("down")] if site.act else [])]
        for module in map(model.get_submodule, paths):
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def amdahl(share: float, left: float) -> float:
    """How many times faster all is where a share of the time takes `left` of what it took."""
    return 1 / (1 - share + share * left)
