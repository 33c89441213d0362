"""Random experts of the same sizes: which figures does the partition itself deserve (control C1).

A random partition has no router, so both sides are routed by the oracle: for every token the experts
of the largest contribution, as many as the model ran. All figures of `oracle_*` are made in the same
way for the model's experts and for every random draw, on the same tokens. The shared experts of a
model stay as they are, and figures are over its routed neurons alone.

    figures of an expert    domain_lift   largest |log2 P(runs | domain) / P(runs)| over domains
                            domain_share  I(runs; domain) / H(runs)
                            token_share   I(runs; token) / H(runs)
                            energy        share of sum_e E||y_e||^2 that is its own
    figures of a layer      the means of the first three over its experts
                            top_energy    share of sum_e ||y_e||^2 in the experts that run
                            captured      1 - E||sum of the others||^2 / E||y||^2
                            cross_terms   1 - sum_e E||y_e||^2 / E||y||^2

Neurons are drawn in their canonical order, so that how a checkpoint orders and scales them changes
nothing here.

Shapes: T tokens, D width, N routed neurons, E routed experts, F per expert, C domains, V kinds of
tokens, R draws.
"""

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse, stats
from torch import Tensor

from moefy.evaluation.statistics import Floats
from moefy.inspection.account import Ledger, bare
from moefy.inspection.part import Pass, PassPart, State
from moefy.inspection.record import Table, joined, table
from moefy.inspection.routing import drawn_documents
from moefy.inspection.texts.tokens import Tokens
from moefy.methods.partition.canonical import canonical_order
from moefy.models.mlp import DenseMlp
from moefy.run.console import Reporter
from moefy.run.processes import Processes

DRAWS = 200
TOKENS = 12_000
"""Most tokens that every draw is looked at on."""
ENERGY_TOKENS = 1024
"""Of them, how many `captured` is measured on: it takes a product with the whole down projection."""
LEAST_COUNT = 10
"""A kind of token counts for `token_share` where it occurs so often."""
ENTRIES = 2**28
"""Most activations of one layer that are held: 1 GiB in fp32."""
INPUTS = 2**30
"""Most numbers of all layers' inputs in the scratch file: 4 GiB."""
_CHUNK = 1024

EXPERT_FIGURES = ("domain_lift", "domain_share", "token_share", "energy")
LAYER_FIGURES = (
    "domain_lift", "domain_share", "token_share", "top_energy", "captured", "cross_terms"
)  # fmt: skip


@dataclass(frozen=True)
class _Figures:
    """What one partition of one layer gives."""

    experts: dict[str, Floats]
    """`EXPERT_FIGURES`, each `[E]`."""
    layer: dict[str, float]
    """`LAYER_FIGURES`."""


class RandomPartitions(PassPart[State]):
    """Keeps the inputs of a fixed set of documents during the pass; then draws."""

    everywhere = True

    def __init__(self, work: Pass, *, draws: int = DRAWS, tokens: int = TOKENS) -> None:
        super().__init__(work)
        reading, seed = work.reading, work.seed
        self.modules, self.draws, self.seed = work.modules, draws, seed
        self.domain_Q = reading.documents.domain_Q
        width = max(module.weights.width for module in self.modules.values())
        neurons = max(module.weights.neurons for module in self.modules.values())
        limit = min(tokens, ENTRIES // neurons, INPUTS // (width * len(self.modules)))
        self.chosen_Q = drawn_documents(reading.tokens_Q, limit, seed)
        size = int(reading.tokens_Q[self.chosen_Q].sum())
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this listener
        shape = (len(self.modules), size, width)
        self.x_LTD = np.memmap(self.file, dtype=np.float32, mode="w+", shape=shape)
        self.k_LT = np.zeros(shape[:2], dtype=np.int32)
        self.filled = dict.fromkeys(self.modules, 0)
        self.tokens: list[Tokens] = []

    def hear(self, ledger: Ledger) -> None:
        """Take in one layer and chunk of tokens."""
        keep_T = self.chosen_Q[ledger.tokens.document_T]
        if not keep_T.any():
            return
        if ledger.layer == 0:
            self.tokens.append(ledger.tokens.take(keep_T))
        first = self.filled[ledger.layer]
        at = slice(first, first + int(keep_T.sum()))
        x_TD = ledger.x_TD.float().cpu().numpy()[keep_T]
        self.x_LTD[ledger.layer, at, : x_TD.shape[1]] = x_TD
        ran_TE = ledger.mask_TE[:, ledger.module.shared :]
        self.k_LT[ledger.layer, at] = ran_TE.sum(1).cpu().numpy()[keep_T]
        self.filled[ledger.layer] = at.stop

    @torch.no_grad()
    def tables(self) -> dict[str, Table]:
        """Columns `oracle_*` of `experts` and `layers`, once the pass is over: layers are shared out over
        the processes, all of which call this after each has heard its batches."""
        report, processes = self.work.report or Reporter(quiet=True), self.work.processes
        tokens = Tokens.join(processes.all([Tokens.join(self.tokens)]))
        order_T = np.argsort(tokens.document_T, kind="stable")
        ways = _Ways.of(tokens.take(order_T), self.domain_Q)
        layers = list(self.modules)
        rows: list[tuple[int, tuple[Table, Table]]] = []
        for first in report.track(range(0, len(layers), processes.count), "random partitions"):
            mine = None
            for place, layer in enumerate(layers[first : first + processes.count]):
                inputs = self._inputs(layer, order_T, processes)
                if place == processes.rank:
                    mine = (layer, *inputs)
            if mine is not None:
                rows.append((mine[0], self._layer(*mine, ways)))
        made = processes.in_order(rows)
        return {
            "experts": joined(experts for experts, _ in made),
            "layers": joined(layers for _, layers in made),
        }

    def _inputs(
        self, layer: int, order_T: NDArray[np.int64], processes: Processes
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """What a layer read and how many experts ran, heard by all processes, in this order."""
        filled, width = self.filled[layer], self.modules[layer].weights.width
        mine = (np.array(self.x_LTD[layer, :filled, :width]), self.k_LT[layer, :filled])
        if processes.count == 1:
            return mine
        parts = processes.all([mine])
        return (
            np.concatenate([x_TD for x_TD, _ in parts])[order_T],
            np.concatenate([k_T for _, k_T in parts])[order_T],
        )

    def _layer(
        self, layer: int, inputs_TD: NDArray[np.float32], k_T: NDArray[np.int32], ways: "_Ways"
    ) -> tuple[Table, Table]:
        module = self.modules[layer]
        mlp = bare(module).take(slice(module.shared * module.expert_size, None))
        experts = module.experts - module.shared
        x_TD = torch.from_numpy(inputs_TD).to(mlp.up_ND.device)
        held = _Held.of(mlp, x_TD, k_T, experts, ways)
        real = held.figures(torch.arange(mlp.neurons))
        order_N = canonical_order(mlp.on_cpu())
        random = [
            held.figures(order_N[torch.from_numpy(draw.permutation(mlp.neurons))])
            for draw in (np.random.default_rng([self.seed, layer, r]) for r in range(self.draws))
        ]
        columns: dict[str, Any] = {"layer": [layer] * module.experts}
        columns["expert"] = list(range(module.experts))
        none = np.full(module.shared, np.nan)
        for name in EXPERT_FIGURES:
            null = np.concatenate([figures.experts[name] for figures in random])
            for key, values in _beside(real.experts[name], null).items():
                columns[f"oracle_{name}{key}"] = np.concatenate([none, values])
        row: dict[str, Any] = {"layer": [layer]}
        for name in LAYER_FIGURES:
            null = np.array([figures.layer[name] for figures in random])
            for key, values in _beside(np.array([real.layer[name]]), null).items():
                row[f"oracle_{name}{key}"] = values
        row |= {"oracle_draws": [self.draws], "oracle_tokens": [len(x_TD)]}
        row["oracle_documents"] = [int(self.chosen_Q.sum())]
        return table(columns), table(row)


def _beside(observed_C: Floats, null_R: Floats) -> dict[str, Floats]:
    """The observed figures, the mean of the null, their percentile in it, and z."""
    null_R = null_R[~np.isnan(null_R)]
    if not len(null_R):
        nothing = np.full_like(observed_C, np.nan)
        return {"": observed_C, "_random": nothing, "_percentile": nothing, "_z": nothing}
    spread = null_R.std(ddof=1) if len(null_R) > 1 else 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        z_C = (observed_C - null_R.mean()) / (spread if spread > 0 else np.nan)
    percentile_C = stats.percentileofscore(null_R, observed_C, kind="mean", nan_policy="propagate")
    return {
        "": observed_C,
        "_random": np.full_like(observed_C, null_R.mean()),
        "_percentile": np.asarray(percentile_C, dtype=float),
        "_z": np.asarray(z_C, dtype=float),
    }


@dataclass(frozen=True)
class _Ways:
    """How tokens are grouped: the same for every layer and draw."""

    domain_CT: Tensor
    """1 where a token is of a domain, fp32."""
    kinds_VT: sparse.csr_array
    """1 where a token is of a kind that occurs often enough, fp32."""
    size_C: Floats
    size_V: Floats
    """Tokens of every domain and kind."""
    energy_T: Tensor
    """Tokens whose energies are summed: all but those at position 0, which are many times larger."""

    @classmethod
    def of(cls, tokens: Tokens, domain_Q: NDArray[np.int64]) -> "_Ways":
        domain_T = np.unique(domain_Q[tokens.document_T], return_inverse=True)[1]
        domain_CT = torch.nn.functional.one_hot(torch.from_numpy(domain_T)).T.float()
        _, kind_T, count_V = np.unique(tokens.ids_T, return_inverse=True, return_counts=True)
        number_V = np.where(count_V >= LEAST_COUNT, np.cumsum(count_V >= LEAST_COUNT) - 1, -1)
        kind_T = number_V[kind_T]
        at_T = np.flatnonzero(kind_T >= 0)
        kinds_VT = sparse.csr_array(
            (np.ones(len(at_T), dtype=np.float32), (kind_T[at_T], at_T)),
            shape=(int((count_V >= LEAST_COUNT).sum()), len(tokens)),
        )
        size_C, size_V = np.bincount(domain_T), np.bincount(kind_T[at_T])
        counted_T = torch.from_numpy(tokens.position_T > 0)
        return cls(
            domain_CT.contiguous(), kinds_VT, size_C.astype(float), size_V.astype(float), counted_T
        )


@dataclass(frozen=True)
class _Held:
    """One layer on the fixed tokens: what every partition of it is measured on."""

    parts: list[Tensor]
    """Activations `[N, T of a chunk]`, neuron-major so that the neurons of an expert are rows."""
    down_ND: Tensor
    k_T: Tensor
    experts: int
    some_NS: Tensor
    """Activations of the tokens that `captured` is measured on, neuron-major too."""
    some_S: Tensor
    """Their numbers."""
    some_energy: float
    """Sum of ||y||^2 over them."""
    energy: float
    """The same over all tokens but those at position 0."""
    ways: _Ways

    @classmethod
    def of(
        cls, mlp: DenseMlp, x_TD: Tensor, k_T: NDArray[np.int32], experts: int, ways: _Ways
    ) -> "_Held":
        at_T = torch.nonzero(ways.energy_T)[:, 0]
        some_S = at_T[:: max(1, len(at_T) // ENERGY_TOKENS)][:ENERGY_TOKENS]
        parts, energy_T = [], []
        for x in x_TD.split(_CHUNK):
            h_TN = mlp.hidden(x)
            parts.append(h_TN.T.contiguous())
            energy_T.append((h_TN @ mlp.down_ND).double().square().sum(1).cpu())
        square_T = torch.cat(energy_T)
        some_NS = mlp.hidden(x_TD[some_S.to(x_TD.device)]).T.contiguous()
        return cls(
            parts, mlp.down_ND, torch.from_numpy(k_T.astype(np.int64)), experts, some_NS, some_S,
            float(square_T[some_S].sum()), float(square_T[ways.energy_T].sum()), ways,
        )  # fmt: skip

    def figures(self, neurons_N: Tensor) -> _Figures:
        """Figures of the partition whose experts are runs of F of these neurons."""
        neurons_N = neurons_N.to(self.down_ND.device)
        square_TE = self._squares(neurons_N)
        mask_TE = oracle_mask(square_TE, self.k_T)
        ran_TE = mask_TE.float()
        load_E = ran_TE.mean(0).double().numpy()
        ran_CE = (self.ways.domain_CT @ ran_TE).double().numpy()
        ran_VE = (self.ways.kinds_VT @ ran_TE.numpy()).astype(float)
        counted_TE = square_TE.double() * self.ways.energy_T[:, None]
        energy_E = counted_TE.sum(0).numpy()
        total = float(energy_E.sum()) or np.nan
        experts = {
            "domain_lift": _domain_lift(ran_CE, self.ways.size_C, load_E),
            "domain_share": explained(ran_CE, self.ways.size_C),
            "token_share": explained(ran_VE, self.ways.size_V),
            "energy": energy_E / total,
        }
        layer = {name: _mean(experts[name]) for name in EXPERT_FIGURES if name in LAYER_FIGURES}
        layer["top_energy"] = float((counted_TE * mask_TE).sum()) / total
        layer["captured"] = self._captured(neurons_N, mask_TE[self.some_S])
        layer["cross_terms"] = 1 - total / (self.energy or np.nan)
        return _Figures(experts, layer)

    def _squares(self, neurons_N: Tensor) -> Tensor:
        """`||y_e||^2` `[T, E]`, by the Gram matrix of every expert as in `routing.expert_norms`, but
        neuron-major and in chunks that stay in cache: three times as fast."""
        down_EFD = self.down_ND[neurons_N].view(self.experts, -1, self.down_ND.shape[1])
        gram_EFF = down_EFD @ down_EFD.mT
        parts = []
        for h_NT in self.parts:
            h_EFT = h_NT[neurons_N].view(self.experts, -1, h_NT.shape[1])
            parts.append((gram_EFF @ h_EFT).mul_(h_EFT).sum(1))
        return torch.cat(parts, dim=1).clamp_min_(0).T.contiguous().cpu()

    def _captured(self, neurons_N: Tensor, on_SE: Tensor) -> float:
        off_ES = (~on_SE).T.to(self.down_ND.device)
        off_NS = off_ES.repeat_interleave(len(neurons_N) // self.experts, 0)
        missed_DS = self.down_ND[neurons_N].T @ (self.some_NS[neurons_N] * off_NS)
        return 1 - float(missed_DS.double().square().sum()) / (self.some_energy or np.nan)


def oracle_mask(square_TE: Tensor, k_T: Tensor) -> Tensor:
    """The `k_T` experts of the largest contribution for every token `[T, E]` (bool).

    An expert that contributes nothing at all does not run, so that ties at zero decide nothing.
    """
    ordered_TE = np.sort(square_TE.numpy(), axis=1)
    last_T1 = (square_TE.shape[1] - k_T.numpy())[:, None].clip(0, square_TE.shape[1] - 1)
    least_T1 = torch.from_numpy(np.take_along_axis(ordered_TE, last_T1, axis=1))
    return (square_TE >= least_T1) & (square_TE > 0) & (k_T[:, None] > 0)


def _domain_lift(ran_CE: Floats, size_C: Floats, load_E: Floats) -> Floats:
    """Largest |log2 lift| over domains `[E]`; each domain has one token at the load added, so that it is
    finite. NaN for an expert that never runs."""
    rate_CE = (ran_CE + load_E) / (size_C[:, None] + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift_E = np.abs(np.log2(rate_CE / load_E)).max(0)
    return np.where(load_E > 0, lift_E, np.nan)


def explained(ran_VE: Floats, size_V: Floats) -> Floats:
    """I(runs; V) / H(runs) of every expert `[E]`, from how often it ran and could have run in each V.

    Both entropies have Miller and Madow's correction: 0 on average where V says nothing.
    NaN where an expert always or never runs.
    """
    total = size_V.sum()
    inside_E = _entropy(ran_VE, size_V[:, None]).sum(0)
    count_E = ran_VE.sum(0)
    whole_E = _entropy(count_E, total)
    varied_E = ((ran_VE > 0) & (ran_VE < size_V[:, None])).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share_E = (whole_E + 0.5 - inside_E - varied_E / 2) / (whole_E + 0.5)
    return np.where((count_E > 0) & (count_E < total), share_E, np.nan)


def _entropy(count: Floats, size: Floats) -> Floats:
    """`size` times the entropy (nats) of running `count` times out of `size`."""
    rate = count / np.maximum(size, 1)
    return np.asarray(size * stats.entropy(np.stack([rate, 1 - rate]), axis=0))


def _mean(values_E: Floats) -> float:
    return float(np.nanmean(values_E)) if not np.isnan(values_E).all() else np.nan
