"""Prompt-static: the prompt runs densely and decides once which experts run after it (GRIFFIN).

Dong et al. 2024: every token's scores are normalised, the norm over the prompt ranks the experts,
and the best `k` serve the whole generation. The choice is kept beside the key-value cache it belongs
to and dies with it. In a pass without a cache (evaluation, encoders) the first half of every sequence
is the prompt.

Shapes: B sequences, T tokens, E routed experts.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.methods.base import Context, Selection
from moefy.methods.selections.ranked import top_mask
from moefy.models.schema import Field, whole

PROMPT_SHARE = 0.5


class PromptStatic(Selection):
    """Prompt-static: the prompt runs densely and decides once which experts run after it (GRIFFIN).

    They are the `k` experts of largest normalised score over the prompt.
    """

    by_score = False

    def __init__(self, k: int) -> None:
        self.k = k
        self._chosen: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"k": whole(0, experts)}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "PromptStatic":
        """`active` rounded is `k`; the scores are not looked at."""
        return cls(round(active) if most is None else min(round(active), most))

    def settings(self) -> dict[str, Any]:
        """`k`."""
        return {"k": self.k}

    def remembered(self, context: Context) -> Tensor | None:
        """The experts that the prompt of this cache chose, for every sequence's next tokens."""
        _refuse_compile()
        if context.prompt or context.cache is None:
            return None
        chosen_BE = self._chosen.get(context.cache)
        if chosen_BE is None:
            raise MoefyError(
                "prompt_static: it was not the prompt of this cache that chose experts; run the "
                "prompt with an empty cache (generate does; DynamicCache() is one), "
                "and go on with that very cache, not with a copy"
            )
        if len(chosen_BE) != context.batch:
            raise MoefyError(
                f"prompt_static: the prompt had {len(chosen_BE)} sequences, now there are "
                f"{context.batch}; go on with the same sequences or use another selection"
            )
        return chosen_BE

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """All experts for the prompt; without a cache, the chosen ones for the second half."""
        _refuse_compile()
        context = context or Context()
        scores_BTE = scores_TE.float().view(context.batch, -1, scores_TE.shape[1])
        mask_BT = context.mask_BT
        if mask_BT is None or mask_BT.shape != scores_BTE.shape[:2]:
            mask_BT = torch.ones(scores_BTE.shape[:2], dtype=torch.bool, device=scores_TE.device)
        is_prompt_BT = mask_BT
        if context.cache is None:
            place_BT = mask_BT.cumsum(1)
            is_prompt_BT = mask_BT & (place_BT <= PROMPT_SHARE * mask_BT.sum(1, keepdim=True))
        share_BTE = torch.nn.functional.normalize(scores_BTE, dim=-1) * is_prompt_BT[..., None]
        chosen_BE = top_mask(torch.linalg.vector_norm(share_BTE, dim=1), self.k)
        if context.cache is not None:
            self._chosen[context.cache] = chosen_BE
            return torch.ones_like(scores_TE, dtype=torch.bool)
        return (is_prompt_BT[..., None] | chosen_BE[:, None]).view(scores_TE.shape)


def _refuse_compile() -> None:
    if torch.compiler.is_compiling():
        raise MoefyError(
            "prompt_static keeps a choice per cache, which torch.compile cannot trace; use "
            "another selection or run it uncompiled"
        )
