"""The directions in which an expert writes, and what it does to the logits directly.

`Spectrum` finds the right-singular vectors of an expert's contributions from the second moment `[F, F]` of
its activations over the tokens that were routed to it: with the rows `d_j` of the expert as `D_e [F, D]` and
`M = sum_t h h^T`, the contributions have the Gram matrix `D_e^T M D_e`, whose eigenvectors are found in
the span of `D_e`. The contributions themselves `[T, E, D]` are never formed. The moment is not centred: an
expert that always writes one vector has one direction of share 1.

`DirectEffects` looks past every later layer, with the final norm's scale kept:

    dla_e(t, v) = <(y_e - centre(y_e)) gamma / sigma_t, W_U[v] - mean_v W_U>

Tables say, for every expert, which logits it raises more where it is routed than on average, which
logits its first singular directions raise, and by how much it raises the token that comes next. Later
layers may change or undo all of it: what is far from the end is marked `direct_only`.

First tokens are left out: in many models their norms would decide everything.

Shapes: T tokens, N neurons, E experts, F neurons per expert, K directions, V vocabulary, J judged tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefy.experts.sparse_mlp import SparseMlp
from moefy.inspection.account import Ledger, bare
from moefy.inspection.part import BlockSums, Pass, PassPart, SeenDocuments, State, Sum
from moefy.inspection.record import Table, joined, of_experts, table
from moefy.inspection.texts.tokens import NONE, uniforms

DIRECTIONS = 3
KEPT = 15
"""Tokens at either end."""
DEEP = 2 / 3
"""Layers up to this share of the depth are marked: much comes after them."""
TOKENS = 20_000
"""About the most tokens of each layer whose own next token is looked at."""
_VOCABULARY = 8192
"""Output embeddings at a time."""


@dataclass(frozen=True)
class Directions:
    """The first K directions of every expert of a layer, by falling share."""

    axis_EKD: Tensor
    """Unit vectors, each turned so that the mean contribution lies on its positive side."""
    share_EK: Tensor
    """Share of the energy of the expert's contributions."""
    size_EK: Tensor
    """Root mean square of the contributions along the direction."""
    dimension_E: Tensor
    """Participation ratio of all directions: 1 for a single one, F for F of the same energy."""


@dataclass
class _Moments(State):
    """Of one layer, over routed tokens: second moments `[E, F, F]`, sums `[E, F]`, and tokens `[E]`."""

    module: SparseMlp
    moment: Sum[Tensor]
    mean: Sum[Tensor]
    tokens: Sum[Tensor]


class Spectrum(PassPart[_Moments]):
    """Memory is `8 L (N F + N + E)` bytes."""

    def begin(self, ledger: Ledger) -> _Moments:
        """No moments yet."""
        experts, size = ledger.experts, ledger.module.expert_size
        shapes = ((experts, size, size), (experts, size), (experts,))
        return _Moments(ledger.module, *(Sum(torch.zeros(s, dtype=torch.float64)) for s in shapes))

    def take(self, state: _Moments, ledger: Ledger) -> None:
        """Moments of the activations of routed tokens."""
        on_TE = (ledger.mask_TE & ledger.later_T[:, None]).float()
        h_TEF = ledger.h_TN.view(len(on_TE), ledger.experts, -1) * on_TE[:, :, None]
        h_ETF = h_TEF.transpose(0, 1)
        state.moment.add((h_ETF.mT @ h_ETF).cpu())
        state.mean.add(h_TEF.sum(0).cpu())
        state.tokens.add(on_TE.sum(0).cpu())

    @torch.no_grad()
    def directions(self, layer: int, count: int = DIRECTIONS) -> Directions:
        """The first directions of every expert, at most F of them; zeros where none was routed."""
        state = self.layers[layer]
        moment_EFF, tokens_E = state.moment.total, state.tokens.total.clamp_min(1)
        experts, size = moment_EFF.shape[:2]
        down_EFD = bare(state.module).down_ND.cpu().double().view(experts, size, -1)
        basis_EDF, triangle_EFF = torch.linalg.qr(down_EFD.mT)
        gram = triangle_EFF @ (moment_EFF / tokens_E[:, None, None]) @ triangle_EFF.mT
        power_EF, vector_EFF = torch.linalg.eigh((gram + gram.mT) / 2)
        power_EF, vector_EFF = power_EF.clamp_min(0).flip(1), vector_EFF.flip(2)
        axis_EKD = (basis_EDF @ vector_EFF[:, :, :count]).mT
        mean_ED = (state.mean.total[:, None] @ down_EFD)[:, 0]
        along_EK = (axis_EKD @ mean_ED[:, :, None])[:, :, 0]
        axis_EKD = axis_EKD * torch.where(along_EK < 0, -1.0, 1.0)[:, :, None]
        total_E1 = power_EF.sum(1, keepdim=True)
        share_EF = power_EF / total_E1.clamp_min(1e-300)
        return Directions(
            axis_EKD.float(),
            share_EF[:, :count],
            power_EF[:, :count].sqrt(),
            total_E1[:, 0].square() / power_EF.square().sum(1).clamp_min(1e-300),
        )

    def rows(self, layer: int) -> dict[str, Table]:
        """Columns of `experts`: the share of each of the first directions, and how many there are."""
        found, tokens_E = self.directions(layer), self.layers[layer].tokens.total.numpy()
        share_EK = np.zeros((len(tokens_E), DIRECTIONS))
        share_EK[:, : found.share_EK.shape[1]] = found.share_EK.numpy()
        columns = {f"direction_{k + 1}_share": share_EK[:, k] for k in range(DIRECTIONS)}
        columns["dimension"] = found.dimension_E.numpy()
        known = {name: np.where(tokens_E > 0, values, np.nan) for name, values in columns.items()}
        return {"experts": of_experts(layer, known)}


@dataclass
class _Effects(State):
    """Of one layer."""

    module: SparseMlp
    scaled: Sum[Tensor]
    """Sums of `h / sigma`, over all tokens and over routed ones `[2, N]`."""
    inverse: Sum[Tensor]
    """Sums of 1 / sigma over routed tokens, and routed tokens `[2, E]`."""
    tokens: Sum[Tensor]
    """All tokens."""
    sums: BlockSums
    """Of every expert its effects on next tokens where it ran, tokens it ran, effects; and tokens."""
    seen: SeenDocuments


class DirectEffects(PassPart[_Effects]):
    """Memory is `8 L (2 N + 2 E + 1)` bytes, `48 L G E` of sums over documents and, once, `4 E V`. There are
    no tables where no logit can be traced."""

    def __init__(self, work: Pass, *, tokens: int = TOKENS) -> None:
        super().__init__(work)
        self.spectrum, self.depth = work.part(Spectrum), len(work.modules)
        self.unembedding = work.unembedding
        self.share = tokens / max(1, int(work.reading.tokens_Q.sum()))

    def begin(self, ledger: Ledger) -> _Effects | None:
        """Nothing where sigma or the map to logits is not known."""
        if self.unembedding is None or ledger.scale_T is None:
            return None
        experts, f64 = ledger.experts, torch.float64
        return _Effects(
            ledger.module,
            Sum(torch.zeros(2, ledger.mlp.neurons, dtype=f64)),
            Sum(torch.zeros(2, experts, dtype=f64)),
            Sum(torch.zeros((), dtype=f64)),
            BlockSums(self.work.blocks, 3 * experts + 1),
            SeenDocuments(len(self.work.reading.documents), experts),
        )

    def take(self, state: _Effects, ledger: Ledger) -> None:
        """Mean contributions over sigma, and effects on next tokens."""
        assert ledger.scale_T is not None
        later_T = ledger.later_T
        inverse_T = later_T / ledger.scale_T.float()
        on_TE = ledger.mask_TE & later_T[:, None]
        weight_TE = inverse_T[:, None] * on_TE
        h_ETF = ledger.h_TN.view(len(on_TE), ledger.experts, -1).transpose(0, 1)
        routed_N = (weight_TE.T[:, None] @ h_ETF).flatten()
        state.scaled.add(torch.stack([inverse_T @ ledger.h_TN, routed_N]).cpu())
        state.inverse.add(torch.stack([weight_TE.sum(0), on_TE.float().sum(0)]).cpu())
        state.tokens.add(later_T.sum().cpu())
        self._targets(state, ledger)

    def _targets(self, state: _Effects, ledger: Ledger) -> None:
        """Direct effects on the token that comes next, of some tokens."""
        assert self.unembedding is not None and ledger.scale_T is not None
        tokens = ledger.tokens
        drawn_T = uniforms(tokens, self.work.seed) < self.share
        at_J = np.flatnonzero(drawn_T & (tokens.target_T != NONE) & (tokens.position_T > 0))
        if not len(at_J):
            return
        target_J = torch.from_numpy(tokens.target_T[at_J]).to(self.unembedding.weight_VD.device)
        direction_JD = self.unembedding.directions(target_J).to(ledger.x_TD.device)
        index_J = ledger.here(at_J)
        effect_JE = ledger.inner(direction_JD, index_J)
        effect_JE = effect_JE / ledger.scale_T[index_J].float()[:, None]
        ran_JE = ledger.mask_TE[index_J]
        one_J1 = torch.ones_like(effect_JE[:, :1])
        sums = torch.cat([effect_JE * ran_JE, ran_JE.float(), effect_JE, one_J1], dim=1)
        chosen = tokens.take(at_J)
        state.sums.add(chosen, sums)
        state.seen.add(chosen.document_T, ran_JE.cpu().numpy())

    @torch.no_grad()
    def rows(self, layer: int) -> dict[str, Table]:
        """`logits`, and columns of `experts` and `layers`."""
        early = {"layer": [layer], "direct_only": [self._early(layer)]}
        return {
            "logits": joined(self._logits(layer)),
            "experts": self._experts(layer),
            "layers": table(early),
        }

    def _early(self, layer: int) -> bool:
        return layer + 1 <= DEEP * self.depth

    @torch.no_grad()
    def mean_difference(self, layer: int) -> Tensor:
        """Mean of `y_e / sigma` over routed tokens less that over all tokens `[E, D]`; NaN where no token
        was routed."""
        state = self.layers[layer]
        tokens_E, down_ND = state.inverse.total[1], bare(state.module).down_ND
        experts = len(tokens_E)
        all_EF, routed_EF = state.scaled.total.view(2, experts, -1)
        mean_EF = routed_EF / tokens_E[:, None] - all_EF / state.tokens.total.clamp_min(1)
        down_EFD = down_ND.double().view(experts, -1, down_ND.shape[1])
        mean_ED: Tensor = (mean_EF[:, None].to(down_EFD.device) @ down_EFD)[:, 0]
        return mean_ED.float()

    def _logits(self, layer: int) -> list[Table]:
        found = self.spectrum.directions(layer)
        inverse_E, routed_E = self.layers[layer].inverse.total
        inverse_E = inverse_E / routed_E.clamp_min(1)
        share_E = torch.full_like(routed_E, torch.nan)
        parts = [self._ends(layer, "mean", self.mean_difference(layer), share_E, routed_E)]
        for index in range(found.axis_EKD.shape[1]):
            # In logits: a contribution of the usual size along the direction, at the usual scale.
            size_E1 = (found.size_EK[:, index] * inverse_E)[:, None].float()
            axis_ED, share_E = found.axis_EKD[:, index] * size_E1, found.share_EK[:, index]
            parts.append(self._ends(layer, f"direction_{index + 1}", axis_ED, share_E, routed_E))
        return parts

    def _ends(
        self, layer: int, kind: str, vector_ED: Tensor, share_E: Tensor, routed_E: Tensor
    ) -> Table:
        """Tokens whose logits the vectors raise most, and lower most."""
        effect_EV = self._effects(vector_ED)
        count = min(KEPT, effect_EV.shape[1] // 2)
        top, bottom = effect_EV.topk(count, dim=1), effect_EV.topk(count, dim=1, largest=False)
        token = torch.cat([top.indices, bottom.indices], dim=1).numpy()
        value = torch.cat([top.values, bottom.values], dim=1).numpy()
        rank = [*range(1, count + 1), *range(-1, -count - 1, -1)]
        expert = np.flatnonzero(routed_E.numpy() > 0)
        rows, each = len(expert) * 2 * count, 2 * count
        return table(
            {
                "layer": [layer] * rows,
                "expert": np.repeat(expert, each),
                "kind": [kind] * rows,
                "rank": rank * len(expert),
                "token": token[expert].ravel(),
                "value": value[expert].ravel(),
                "share": np.repeat(share_E.numpy()[expert], each),
                "direct_only": [self._early(layer)] * rows,
            }
        )

    def _effects(self, vector_ED: Tensor) -> Tensor:
        """Effects of vectors on every logit `[E, V]`."""
        assert self.unembedding is not None
        weight = self.unembedding.weight_VD
        vector_ED = torch.nan_to_num(vector_ED).to(weight.device)
        parts = [
            vector_ED @ self.unembedding.directions(slice(at, at + _VOCABULARY)).T
            for at in range(0, len(weight), _VOCABULARY)
        ]
        return torch.cat(parts, dim=1).cpu()

    def _experts(self, layer: int) -> Table:
        state = self.layers[layer]
        sums_GX = state.sums.later_GX
        routed, ran, every = np.split(sums_GX[:, :-1], 3, axis=1)
        figures = {"dla_target": (routed, ran), "dla_target_all": (every, sums_GX[:, -1])}
        columns: dict[str, Any] = {**self.work.blocks.columns(figures)}
        columns["dla_documents"] = state.seen.count_X
        columns["dla_tokens"] = ran.sum(0).astype(int)
        return of_experts(layer, columns)
