"""The exact account of one MLP: what every expert adds to each token, and what was left out.

    y(x) = b + sum_e y_e,   y_e = sum_{j in S_e} h_j d_j          dense
    y^(x) = b + sum_e r_e y_e + compensation                      moefied
    error = y - y^                                                the experts that are dark

Everything is a function of contribution vectors `h_j d_j`, so that no rescale of a neuron that
leaves the function alone changes a number here.

Shapes: T tokens of one chunk, D width, N neurons, E experts (the shared ones first), F per expert.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moefy.data.documents import Ints
from moefy.experts.sparse_mlp import SparseMlp
from moefy.inspection.texts.tokens import Tokens
from moefy.methods.routers.baselines import expert_norms
from moefy.models.mlp import DenseMlp


@dataclass(frozen=True)
class Ledger:
    """One layer and a chunk of tokens; what is dear is computed when it is first asked for."""

    layer: int
    module: SparseMlp
    mlp: DenseMlp
    """All neurons in expert order, in fp32, without the output bias."""
    x_TD: Tensor
    """Inputs of the layer in the moefied model, errors of earlier layers included."""
    mask_TE: Tensor
    """Which experts ran (bool), shared ones included."""
    scores_TE: Tensor | None
    """Scores of the routed experts; None where nothing was scored (prompt-static decoding)."""
    tokens: Tokens
    scale_T: Tensor | None
    """sigma of the final norm; None where there is no `Unembedding`."""

    @property
    def experts(self) -> int:
        """E, the shared ones included."""
        return self.module.experts

    def here(self, chosen_T: NDArray[np.bool_] | Ints) -> Tensor:
        """A mask or numbers of tokens, on the device of the inputs."""
        return torch.from_numpy(chosen_T).to(self.x_TD.device)

    @property
    def later_T(self) -> Tensor:
        """All tokens but the first of a document (bool)."""
        return self.here(self.tokens.position_T > 0)

    @cached_property
    def h_TN(self) -> Tensor:
        """Activations of every neuron, those that did not run included."""
        return self.mlp.hidden(self.x_TD.float())

    @cached_property
    def y_TD(self) -> Tensor:
        """Dense output without its bias: the sum of all experts."""
        return self.h_TN @ self.mlp.down_ND

    @cached_property
    def norm_TE(self) -> Tensor:
        """Contribution norm `||y_e||` of every expert, run or not."""
        return expert_norms(self.h_TN, self.mlp.down_ND, self.experts)

    def inner(self, direction_TD: Tensor) -> Tensor:
        """`<y_e, direction>` of every expert and token `[T, E]`."""
        along_TN = self.h_TN * (direction_TD @ self.mlp.down_ND.T)
        return along_TN.view(len(along_TN), self.experts, -1).sum(-1)

    @cached_property
    def share_TE(self) -> Tensor:
        """Signed share `<y_e, y> / ||y||^2`: sums to 1 over experts; negative is cancellation."""
        energy_T1 = self.y_TD.square().sum(1, keepdim=True)
        share_TE = self.inner(self.y_TD)
        return torch.where(energy_T1 > 0, share_TE / energy_T1, 1 / self.experts)

    @cached_property
    def error_TD(self) -> Tensor:
        """Dense minus moefied output of the layer at this input."""
        compensation, shared = self.module.compensation, self.module.shared
        centred = compensation.centred(self.mlp)
        h_TN = self.h_TN if centred.centre_N is None else self.h_TN - centred.centre_N
        off_TN = (~self.mask_TE).repeat_interleave(h_TN.shape[1] // self.experts, dim=1)
        error_TD = (h_TN * off_TN) @ self.mlp.down_ND
        extra_TD = compensation(self.x_TD, self.mask_TE[:, shared:])
        return error_TD if extra_TD is None else error_TD - extra_TD.float()

    @property
    def margin_TE(self) -> Tensor | None:
        """How far each routed expert's score is from the middle of the token's threshold `[T, E - S]`:
        positive where it ran. None without scores."""
        if self.scores_TE is None:
            return None
        ran_TE, scores_TE = self.mask_TE[:, self.module.shared :], self.scores_TE.float()
        lowest_T = scores_TE.masked_fill(~ran_TE, torch.inf).amin(1)
        highest_T = scores_TE.masked_fill(ran_TE, -torch.inf).amax(1)
        middle_T = torch.nan_to_num((lowest_T + highest_T) / 2, 0.0, 0.0, 0.0)
        return scores_TE - middle_T[:, None]


def bare(module: SparseMlp) -> DenseMlp:
    """The neurons of a layer in expert order, in fp32, without the output bias, as they were stored."""
    return replace(module.weights, down_bias_D=None).to(torch.float32)
