"""Input sparsity, to compare with: TEAL and WINA leave out small inputs of every weight matrix.

They do not fit a partition of neurons: each matrix drops entries of its own input, and so columns of
its weights. Only evaluation uses them, on the MLPs alone. Every matrix keeps a share of its inputs;
the shares are found greedily, as TEAL does: the matrix whose inputs cost the least output error next
gives up a step, until the layer's mean share is the density.

* `teal` (Liu et al. 2024): drops `|x_i|` below a threshold, a quantile over the calibration tokens.
* `wina` (Chen et al. 2025): keeps the inputs of largest `|x_i| ||W_i||`, the same number per token.

Shapes: T tokens, D width, N neurons, I inputs of one matrix.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moefy.methods.base import WIDE_BITS
from moefy.models.mlp import DenseMlp, activation_function

STEP = 0.05
CALIBRATION_TOKENS = 1024


@dataclass
class Shares:
    """The share of its inputs that each matrix keeps, and the thresholds that make it so."""

    kept: dict[str, float]
    threshold: dict[str, float] = field(default_factory=dict)


class InputSparseMlp(nn.Module):
    """A dense MLP each of whose matrices reads only part of its input.

    `read` and `tokens` count what was read, for the active budget.
    """

    def __init__(
        self, mlp: DenseMlp, method: str, side: str = "decoder", bits: float = WIDE_BITS
    ) -> None:
        super().__init__()
        self.bits = bits
        """Bits of one of its weights, scales included."""
        self.mlp, self.method, self.side = mlp, method, side
        self.roles = ["gate", "up", "down"] if mlp.gate_ND is not None else ["up", "down"]
        # Norms of the weights that multiply one input: columns of up and gate, rows of down.
        self.norm = {"up": mlp.up_ND.norm(dim=0), "down": mlp.down_ND.norm(dim=1)}
        if mlp.gate_ND is not None:
            self.norm["gate"] = mlp.gate_ND.norm(dim=0)
        self.shares = Shares(dict.fromkeys(self.roles, 1.0))
        self.read = dict.fromkeys(self.roles, 0.0)
        self.tokens = 0
        self.counted: Tensor | None = None
        """Positions `[B, T]` of the next pass that hold tokens; None where all do."""

    def calibrate(self, x_TD: Tensor, density: float) -> None:
        """Spread `density` over the matrices greedily by output error on a sample of inputs."""
        x_TD = x_TD[:: max(1, len(x_TD) // CALIBRATION_TOKENS)][:CALIBRATION_TOKENS].float()
        want_TD = self.mlp(x_TD)
        inputs = {"up": x_TD, "gate": x_TD, "down": self.mlp.hidden(x_TD)}
        sorted_of = {role: inputs[role].abs().flatten().sort().values for role in self.roles}

        def thresholds(kept: dict[str, float]) -> Shares:
            found = {}
            for role, share in kept.items():
                place = round((1 - share) * (len(sorted_of[role]) - 1))
                found[role] = sorted_of[role][place].item() if share < 1 else -1.0
            return Shares(kept, found)

        kept = dict.fromkeys(self.roles, 1.0)
        while sum(kept.values()) / len(kept) > density + 1e-9:
            excess = (sum(kept.values()) / len(kept) - density) * len(kept)
            trials = []
            for role in self.roles:
                share = max(0.0, kept[role] - min(STEP * len(kept), excess))
                if kept[role] > 0:
                    self.shares = thresholds({**kept, role: share})
                    error = (self._compute(x_TD) - want_TD).square().sum().item()
                    trials.append((error, role, share))
            _, role, share = min(trials)
            kept[role] = share
        self.shares = thresholds(kept)

    def active_budget(self) -> float:
        """Weights read over all weights, over the tokens that were counted; all matrices are equal."""
        return sum(self.read.values()) / (self.tokens * len(self.roles))

    def bits_read(self) -> float:
        """Bits read per weight and token."""
        return self.bits * self.active_budget()

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """Output shaped and typed as `hidden`, computed in the dtype of the MLP; counts what was read.

        `residual` is for families whose MLP module adds it itself.
        """
        x_TD = hidden.reshape(-1, hidden.shape[-1]).to(self.mlp.up_ND.dtype)
        real_T = x_TD.new_ones(len(x_TD), dtype=torch.bool)
        if self.counted is not None:
            real_T = self.counted.flatten().to(x_TD.device)
        self.tokens += int(real_T.sum())
        y = self._compute(x_TD, real_T).view(hidden.shape).to(hidden.dtype)
        return y if residual is None else y + residual

    def _compute(self, x_TD: Tensor, real_T: Tensor | None = None) -> Tensor:
        mlp, act = self.mlp, activation_function(self.mlp.activation)
        h_TN = linear(self._keep("up", x_TD, real_T), mlp.up_ND, mlp.up_bias_N)
        if mlp.gate_ND is None:
            h_TN = act(h_TN)
        else:
            gate_TN = linear(self._keep("gate", x_TD, real_T), mlp.gate_ND, mlp.gate_bias_N)
            h_TN = act(gate_TN) * h_TN
        y_TD = self._keep("down", h_TN, real_T) @ mlp.down_ND
        return y_TD if mlp.down_bias_D is None else y_TD + mlp.down_bias_D

    def _keep(self, role: str, x_TI: Tensor, real_T: Tensor | None) -> Tensor:
        share = self.shares.kept[role]
        if share >= 1:
            self.read[role] += 0.0 if real_T is None else float(real_T.sum())
            return x_TI
        if self.method == "teal":
            mask_TI = x_TI.abs() > self.shares.threshold.get(role, -1.0)
        else:
            kept = round(share * x_TI.shape[1])
            ids = (x_TI.abs() * self.norm[role]).topk(kept, dim=1).indices
            mask_TI = torch.zeros_like(x_TI, dtype=torch.bool).scatter_(1, ids, True)
        if real_T is not None:
            self.read[role] += float(mask_TI[real_T].float().mean(1).sum())
        return x_TI * mask_TI


BASELINES = ("teal", "wina")
