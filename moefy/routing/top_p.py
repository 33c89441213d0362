"""Top-p: the fewest experts that hold a share `p` of the token's softmax (nucleus selection).

Shapes: T tokens, E routed experts.
"""

import torch
from torch import Tensor

from moefy.routing.base import Context, Selection
from moefy.routing.bisect import bisect
from moefy.routing.topk import capped


class TopP(Selection):
    """The experts of highest probability until their sum reaches `p`; at least one."""

    def __init__(self, p: float, most: int | None = None) -> None:
        self.p = p
        self.most = most

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "TopP":
        """The `p` with which `active` experts a token run on average."""
        return cls(bisect(lambda p: cls(p, most)(scores_TE), active), most)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`."""
        p_TE, ids_TE = torch.softmax(scores_TE.double(), -1).sort(dim=-1, descending=True)
        before_TE = p_TE.cumsum(-1) - p_TE
        mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        return capped(mask_TE.scatter_(-1, ids_TE, before_TE < self.p), scores_TE, self.most)
