"""The router beside the oracle: which of the oracle's experts it runs, and what its misses cost.

The oracle ranks the routed experts of a token by the norm of their output and takes as many as the
router ran for that token. Shared experts always run: they count in no recall and in no error, but
they are part of the dense output.

Both see the input that the layer has in the moefied model, errors of earlier layers included.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.experts.moefied import of
from moefy.experts.passes import Heard
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.routers.baselines import expert_norms
from moefy.models.mlp import DenseMlp

TOKENS = 4096
"""Tokens of every layer that are looked at; the work is about that of two more passes over them."""

_CHUNK = 1024


class RouterQuality:
    """Sums over a sample of tokens of every layer."""

    def __init__(
        self, model: PreTrainedModel, batches: list[Batch], *, tokens: int = TOKENS, seed: int = 0
    ) -> None:
        self.found = of(model).sites
        self.modules = sparse_mlps(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.most = tokens
        self.weight = {
            side: sum(_weight(b, side) for b in batches) for side in ("encoder", "decoder")
        }
        self.passed: Counter[int] = Counter()
        self.taken: Counter[int] = Counter()
        self.sums: list[dict[str, float]] = [defaultdict(float) for _ in self.modules]

    def hear(self, heard: Heard) -> None:
        """Add a share of the tokens of one layer in one forward pass, drawn evenly."""
        layer = heard.layer
        self.passed[layer] += _weight(heard.batch, heard.side)
        due = self.most * self.passed[layer] // self.weight[heard.side] - self.taken[layer]
        self.taken[layer] += due
        x_TD, mask_TE = heard.x_TD, heard.mask_TE
        if due < len(x_TD):
            chosen = torch.randperm(len(x_TD), generator=self.generator)[:due].to(x_TD.device)
            x_TD, mask_TE = x_TD[chosen], mask_TE[chosen]
        module = self.modules[layer]
        # The output bias is no part of what experts put out, the constant of centred neurons is.
        mlp = replace(module.weights, down_bias_D=None).to(torch.float32)
        mlp = module.compensation.centred(mlp)
        for x, mask in zip(x_TD.split(_CHUNK), mask_TE.split(_CHUNK), strict=True):
            for name, value in _sums(module, mlp, x, mask).items():
                self.sums[layer][name] += value

    def record(self) -> dict[str, Any]:
        """Recall and missed energy of every layer, and their means over layers."""
        layers = [
            {"layer": site.layer, **_figures(sums)}
            for site, sums in zip(self.found, self.sums, strict=True)
        ]
        names = [name for name in layers[0] if name not in ("layer", "tokens")]
        means = {}
        for name in names:
            values = [row[name] for row in layers if row[name] is not None]
            means[name] = sum(values) / len(values) if values else None
        return {
            "tokens_per_layer": max(row["tokens"] for row in layers),
            "mean": means,
            "layers": layers,
        }


def _weight(batch: Batch, side: str) -> int:
    """Tokens of a batch, or its images, which are of one size."""
    mask = batch.mask(side)
    return len(batch.samples) if mask is None else int(mask.sum())


@dataclass(frozen=True)
class Compared:
    """The router beside the oracle, token by token."""

    ran_TE: Tensor
    """Which routed experts ran (bool)."""
    oracle_TE: Tensor
    """Which the oracle would have run, as many for each token (bool)."""
    energy_T: dict[str, Tensor]
    """Sums of squares, in fp64: `energy` of the dense output without its bias, `model` and `oracle` of
    what each leaves out, and both `bare`, without the compensation."""


def compare_with_oracle(
    module: SparseMlp, mlp: DenseMlp, x_TD: Tensor, mask_TE: Tensor
) -> Compared:
    """What one layer ran for some tokens beside the oracle's choice.

    `mlp` holds all neurons in expert order without the output bias, as they run
    (`Compensation.centred`); the mask covers shared experts too.
    """
    ran_TE = mask_TE[:, module.shared :].bool()
    first = module.shared * module.expert_size
    h_TN = mlp.hidden(x_TD.float())
    routed_TN, down_ND = h_TN[:, first:], mlp.down_ND[first:]
    norm_TE = expert_norms(routed_TN, down_ND, ran_TE.shape[1])
    rank_TE = norm_TE.argsort(dim=1, descending=True).argsort(dim=1)
    oracle_TE = rank_TE < ran_TE.sum(1, keepdim=True)
    energy_T = {"energy": _energy(mlp.output(h_TN))}
    for name, on_TE in (("model", ran_TE), ("oracle", oracle_TE)):
        off_TN = (~on_TE).repeat_interleave(module.expert_size, dim=1)
        error_TD = (routed_TN * off_TN) @ down_ND
        energy_T[f"{name} bare"] = _energy(error_TD)
        extra_TD = module.compensation(x_TD, on_TE)
        if extra_TD is not None:
            error_TD = error_TD - extra_TD.float()
        energy_T[name] = _energy(error_TD)
    return Compared(ran_TE, oracle_TE, energy_T)


def _sums(module: SparseMlp, mlp: DenseMlp, x_TD: Tensor, mask_TE: Tensor) -> dict[str, float]:
    """Hits, experts that ran, and energies of one chunk of tokens."""
    found = compare_with_oracle(module, mlp, x_TD, mask_TE)
    return {
        "tokens": float(len(x_TD)),
        "hits": float((found.oracle_TE & found.ran_TE).sum()),
        "ran": float(found.ran_TE.sum()),
        **{name: float(energy_T.sum()) for name, energy_T in found.energy_T.items()},
    }


def _energy(values_TD: Tensor) -> Tensor:
    return values_TD.double().square().sum(1)


def _figures(sums: dict[str, float]) -> dict[str, Any]:
    """The figures of one layer; a layer of all zeros misses nothing."""
    energy = sums["energy"] or 1.0
    return {
        "tokens": int(sums["tokens"]),
        "recall": sums["hits"] / sums["ran"] if sums["ran"] else None,
        **_split("", sums["model"] / energy, sums["oracle"] / energy),
        **_split("uncompensated_", sums["model bare"] / energy, sums["oracle bare"] / energy),
    }


def _split(prefix: str, missed: float, unavoidable: float) -> dict[str, float]:
    return {
        f"{prefix}missed_energy": missed,
        f"{prefix}unavoidable": unavoidable,
        f"{prefix}router_added": missed - unavoidable,
    }
