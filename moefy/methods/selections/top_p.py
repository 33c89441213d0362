"""Top-p: the fewest experts that hold a share `p` of the token's softmax (nucleus selection).

Shapes: T tokens, E routed experts.
"""

import torch
from torch import Tensor

from moefy.methods.base import Context, Selection
from moefy.methods.selections.bisect import bisect
from moefy.methods.selections.topk import capped
from moefy.models.schema import Field, number, optional, whole

WIDEST = 4.0
"""Spread of the scores beyond which they are scaled down: a softmax of wider ones is 0 or 1."""


class TopP(Selection):
    """The experts of highest probability until their sum reaches `p`; at least one, at 1 all."""

    varies = True

    def __init__(self, p: float, most: int | None = None, scale: float = 1.0) -> None:
        self.p = p
        self.most = most
        self.scale = scale

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"p": number(0, 1), "most": optional(whole(0)), "scale": number(0, above=True)}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "TopP":
        """The `p` with which `active` experts a token run on average."""
        scores_TE = scores_TE.double()
        spread = (scores_TE - scores_TE.mean(1, keepdim=True)).square().mean().sqrt().item()
        scale = min(1.0, WIDEST / spread) if spread else 1.0
        return cls(bisect(lambda p: cls(p, most, scale)(scores_TE), active), most, scale)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`."""
        ranked_TE, ids_TE = (scores_TE.double() * self.scale).sort(dim=-1, descending=True)
        p_TE = torch.softmax(ranked_TE, -1)
        before_TE = p_TE.cumsum(-1) - p_TE
        kept_TE = (before_TE < self.p) | (self.p >= 1)
        mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TE, kept_TE)
        return capped(mask_TE, scores_TE, self.most)
