"""What an expert does to the logits directly, past every later layer, with the final norm's scale kept.

    dla_e(t, v) = <(y_e - centre(y_e)) gamma / sigma_t, W_U[v] - mean_v W_U>

Tables say, for every expert, which logits it raises more where it is routed than on average, which
logits its first singular directions raise, and by how much it raises the token that comes next. Later
layers may change or undo all of it: what is far from the end is marked `direct_only`.

First tokens are left out.

Shapes: T tokens, D width, N neurons, E experts, F neurons per expert, V vocabulary, C chosen tokens.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moefy.experts.sparse_mlp import SparseMlp
from moefy.inspection.account.ledger import Ledger, bare
from moefy.inspection.account.sums import Blocks, BlockSums, SeenDocuments
from moefy.inspection.account.unembedding import Unembedding
from moefy.inspection.experts.spectrum import Spectrum
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, joined, table
from moefy.inspection.texts.tokens import NONE, uniforms

KEPT = 15
"""Tokens at either end."""
DEEP = 2 / 3
"""Layers up to this share of the depth are marked: much comes after them."""
TOKENS = 20_000
"""About the most tokens of each layer whose own next token is looked at."""
_VOCABULARY = 8192
"""Output embeddings at a time."""

Part = tuple[Tensor, Tensor, int, Tensor, NDArray[np.uint8]]


class DirectEffects:
    """Listens to ledgers with sigma; memory is `8 L (2 N + 2 E)` bytes, `48 L G E` of sums over documents
    and, once, `4 E V`. Without sigma (no `Unembedding`) there are no tables."""

    def __init__(
        self,
        reading: Reading,
        unembedding: Unembedding | None,
        spectrum: Spectrum,
        *,
        tokens: int = TOKENS,
        seed: int = 0,
    ) -> None:
        self.documents, self.spectrum = reading.documents, spectrum
        # An encoder's logits are made from its stream in another way, whatever norm comes last.
        self.unembedding = unembedding if reading.kind == "decoder" else None
        self.share, self.seed = tokens / max(1, int(reading.tokens_D.sum())), seed
        self.blocks = Blocks(reading.documents)
        self.modules: dict[int, SparseMlp] = {}
        self.scaled: dict[int, Tensor] = {}
        """Sums of `h / sigma`, over all tokens and over routed ones `[2, N]`."""
        self.inverse: dict[int, Tensor] = {}
        """Sums of 1 / sigma over routed tokens, and routed tokens `[2, E]`."""
        self.all_tokens: dict[int, int] = {}
        self.sums: dict[int, BlockSums] = {}
        self.seen: dict[int, SeenDocuments] = {}

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        if self.unembedding is None or ledger.scale_T is None:
            return
        layer, experts = ledger.layer, ledger.experts
        neurons = ledger.mlp.neurons
        if layer not in self.modules:
            self.modules[layer] = ledger.module
            self.scaled[layer] = torch.zeros(2, neurons, dtype=torch.float64)
            self.inverse[layer] = torch.zeros(2, experts, dtype=torch.float64)
            self.all_tokens[layer] = 0
            self.sums[layer] = BlockSums(self.blocks, 3 * experts + 1)
            self.seen[layer] = SeenDocuments(len(self.documents), experts)
        later_T = torch.from_numpy(ledger.tokens.position_T > 0).to(ledger.x_TD.device)
        inverse_T = later_T / ledger.scale_T.float()
        on_TE = ledger.mask_TE & later_T[:, None]
        weight_TE = inverse_T[:, None] * on_TE
        h_ETF = ledger.h_TN.view(len(on_TE), experts, -1).transpose(0, 1)
        routed_N = (weight_TE.T[:, None] @ h_ETF).flatten()
        self.scaled[layer] += torch.stack([inverse_T @ ledger.h_TN, routed_N]).cpu()
        self.inverse[layer] += torch.stack([weight_TE.sum(0), on_TE.float().sum(0)]).cpu()
        self.all_tokens[layer] += int(later_T.sum())
        self._targets(ledger)

    def _targets(self, ledger: Ledger) -> None:
        """Direct effects on the token that comes next, of some tokens."""
        assert self.unembedding is not None and ledger.scale_T is not None
        tokens = ledger.tokens
        drawn_T = uniforms(tokens, self.seed) < self.share
        at_C = np.flatnonzero(drawn_T & (tokens.target_T != NONE) & (tokens.position_T > 0))
        if not len(at_C):
            return
        device = ledger.x_TD.device
        target_C = torch.from_numpy(tokens.target_T[at_C]).to(self.unembedding.weight_VD.device)
        direction_CD = self.unembedding.directions(target_C).to(device)
        index_C = torch.from_numpy(at_C).to(device)
        along_CN = ledger.h_TN[index_C] * (direction_CD @ ledger.mlp.down_ND.T)
        effect_CE = along_CN.view(len(at_C), ledger.experts, -1).sum(-1)
        effect_CE = effect_CE / ledger.scale_T[index_C].float()[:, None]
        ran_CE = ledger.mask_TE[index_C]
        one_C1 = torch.ones_like(effect_CE[:, :1])
        sums = torch.cat([effect_CE * ran_CE, ran_CE.float(), effect_CE, one_C1], dim=1)
        chosen = tokens.take(at_C)
        self.sums[ledger.layer].add(chosen, sums)
        self.seen[ledger.layer].add(chosen.document_T, ran_CE)

    def part(self, layer: int) -> Part | None:
        """What was heard of a layer: what `merge` takes."""
        if layer not in self.modules:
            return None
        sums, seen = self.sums[layer].part, self.seen[layer].part
        return self.scaled[layer], self.inverse[layer], self.all_tokens[layer], sums, seen

    def merge(self, layer: int, part: Part) -> None:
        """Take in what was heard of other documents."""
        scaled, inverse, tokens, sums, seen = part
        self.scaled[layer] += scaled
        self.inverse[layer] += inverse
        self.all_tokens[layer] += tokens
        self.sums[layer].merge(sums)
        self.seen[layer].merge(seen)

    @torch.no_grad()
    def tables(self) -> dict[str, Table]:
        """`logits`, and columns of `experts` and `layers`; nothing where no logit can be traced."""
        layers = sorted(self.modules)
        if not layers:
            return {}
        return {
            "logits": joined(part for layer in layers for part in self._logits(layer)),
            "experts": joined(self._experts(layer) for layer in layers),
            "layers": table({"layer": layers, "direct_only": [self._early(n) for n in layers]}),
        }

    def _early(self, layer: int) -> bool:
        return layer + 1 <= DEEP * len(self.modules)

    @torch.no_grad()
    def mean_difference(self, layer: int) -> Tensor:
        """Mean of `y_e / sigma` over routed tokens less that over all tokens `[E, D]`; NaN where no token
        was routed."""
        inverse_2E, down_ND = self.inverse[layer], bare(self.modules[layer]).down_ND
        experts = inverse_2E.shape[1]
        all_EF, routed_EF = self.scaled[layer].view(2, experts, -1)
        mean_EF = routed_EF / inverse_2E[1][:, None] - all_EF / max(1, self.all_tokens[layer])
        down_EFD = down_ND.double().view(experts, -1, down_ND.shape[1])
        mean_ED: Tensor = (mean_EF[:, None].to(down_EFD.device) @ down_EFD)[:, 0]
        return mean_ED.float()

    def _logits(self, layer: int) -> list[Table]:
        found, (inverse_E, routed_E) = self.spectrum.directions(layer), self.inverse[layer]
        inverse_E = inverse_E / routed_E.clamp_min(1)
        parts = [self._ends(layer, "mean", self.mean_difference(layer), None, routed_E)]
        for index in range(found.axis_EKD.shape[1]):
            # In logits: a contribution of the usual size along the direction, at the usual scale.
            size_E1 = (found.size_EK[:, index] * inverse_E)[:, None].float()
            axis_ED, share_E = found.axis_EKD[:, index] * size_E1, found.share_EK[:, index]
            parts.append(
                self._ends(layer, f"direction_{index + 1}", axis_ED, share_E.numpy(), routed_E)
            )
        return parts

    def _ends(
        self, layer: int, kind: str, vector_ED: Tensor, share_E: Any, routed_E: Tensor
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
        share = np.full(len(token), np.nan) if share_E is None else share_E
        return table(
            {
                "layer": [layer] * rows,
                "expert": np.repeat(expert, each),
                "kind": [kind] * rows,
                "rank": rank * len(expert),
                "token": token[expert].ravel(),
                "value": value[expert].ravel(),
                "share": np.repeat(share[expert], each),
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
        sums_GC = self.sums[layer].later_GC
        routed, ran, every = np.split(sums_GC[:, :-1], 3, axis=1)
        count = routed.shape[1]
        tokens = np.broadcast_to(sums_GC[:, -1:], every.shape)
        found = self.blocks.interval(
            np.concatenate([routed, every], axis=1), np.concatenate([ran, tokens], axis=1)
        )
        columns: dict[str, Any] = {"layer": [layer] * count, "expert": list(range(count))}
        for end, values in found.columns("").items():
            columns[f"dla_target{end}"] = values[:count]
            columns[f"dla_target_all{end}"] = values[count:]
        columns["dla_documents"] = self.seen[layer].count_E
        columns["dla_tokens"] = ran.sum(0).astype(int)
        return table(columns)
