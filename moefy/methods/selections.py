"""Selections turn scores into the experts that run; `tables.py` has the table.

`TopK` and `SoftmaxTopK` run the same number for every token. `Threshold`, `DynamicK` and `TopP` run those
that reach a level, found by `bisect`, so that tokens differ in cost.

`PromptStatic` runs the prompt densely, which decides once what runs after it (GRIFFIN, Dong et al. 2024):
every token's scores are normalised, the norm over the prompt ranks the experts, and the best `k` serve the
whole generation. The choice is kept beside the key-value cache it belongs to and dies with it. In a pass
without a cache (evaluation, encoders) the first half of every sequence is the prompt.

Shapes: B sequences, T tokens, E routed experts, K experts that run.
"""

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moefy.errors import MoefyError, RecipeError
from moefy.methods.base import Context, Selection
from moefy.models.schema import Field, number, optional, whole


class TopK(Selection):
    """Static top-k: the same number of experts for every token.

    The `k` experts of highest score.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"k": whole(1, experts)}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "TopK":
        """`active` rounded is `k`; the scores are not looked at."""
        return cls(round(active) if most is None else min(round(active), most))

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]` with exactly `k` experts a token."""
        return top_mask(scores_TE, self.k)


def top_mask(scores_TE: Tensor, k: int) -> Tensor:
    """Mask `[T, E]` of the `k` highest scores of each token."""
    ids_TK = scores_TE.topk(k, dim=-1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TK, True)


def capped(mask_TE: Tensor, scores_TE: Tensor, most: int | None) -> Tensor:
    """The mask with at most the `most` highest scores of each token on."""
    if most is None or most >= mask_TE.shape[1]:
        return mask_TE
    return mask_TE & top_mask(scores_TE, most)


_SPREAD = 2.0**-16
"""Spread of a token's scaled scores.

A larger one bends the weights, which moves the inputs of later layers, where experts of like score
then swap places. Other sets than weight-1 routing, of all tokens and layers, in fp32: six random
layers, E = 64, k = 16: 2 % at 2**-10, 1 % at 2**-13, none at 2**-16; E = 256, k = 64: 10 %, 6 %, 1 %;
a trained model of six layers, E = 32, k = 8: 0.9 %, 0.4 %, none. A smaller one loses scores: fp32
tells apart those that differ by about 2**-8 of their spread, as finely as bf16 holds them. On the
trained model sets in bf16 begin to suffer at 2**-17 (other sets than in fp32: 7.6 % from 2**-10 to
2**-14, 8.2 % at 2**-16, 11 % at 2**-17). Cross-entropy is the same at all of these.
"""


class SoftmaxTopK(Selection):
    """Top-k of an almost flat softmax: exactly what a stock top-k-softmax architecture computes.

    A stock mixture of experts weighs its experts by the softmax of the router; with the router scaled
    by a small `eps` the chosen weights are all `1/k` up to `eps`, so that experts cut from a dense MLP
    add up as they should. In fp32 such a softmax has ties, and its top-k is not always that of the
    scores: a model meant for export is therefore fitted and evaluated with this selection itself.

    The `k` experts of highest `softmax(eps * score)` in fp32.
    """

    def __init__(self, k: int, eps: float) -> None:
        self.k = k
        self.eps = eps

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"k": whole(1, experts), "eps": number(0, above=True)}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "SoftmaxTopK":
        """`k` is `active` rounded; `eps` is a power of two: a token's scores come nearest to `_SPREAD`.

        What all scores of a token have in common changes no softmax and does not count. A power of
        two keeps the scaled router exact in bf16 and fp32.
        """
        scores_TE = scores_TE.float()
        spread = (scores_TE - scores_TE.mean(1, keepdim=True)).square().mean().sqrt().item()
        return cls(round(active), 2.0 ** round(math.log2(_SPREAD / spread)) if spread else _SPREAD)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]` with exactly `k` experts a token."""
        return top_mask(torch.softmax(scores_TE.float() * self.eps, dim=-1), self.k)


STEPS = 50
SLACK = 1.0005
"""How far the mean may exceed what is wanted."""


def bisect(mask_of: Callable[[float], Tensor], active: float) -> float:
    """The share in [0, 1] whose mask `[T, E]` has nearest to `active` experts on per token, not more.

    `mask_of` turns on more experts the larger the share. Scores that tie (of ReLU neurons that are off)
    come and go together: they then stay off. Where every share turns on more, the least does.
    """
    low, high = 0.0, 1.0
    if _mean(mask_of(1.0)) <= active * SLACK:
        return 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _mean(mask_of(middle)) <= active * SLACK:
            low = middle
        else:
            high = middle
    return low if _mean(mask_of(low)) > 0 else high


def _mean(mask_TE: Tensor) -> float:
    return mask_TE.sum().item() / len(mask_TE)


class Threshold(Selection):
    """Threshold: an expert runs where its score is above a fixed value, so tokens differ in cost.

    Experts with a score above `threshold`: from none of them to `most` for one token.
    """

    varies = True

    def __init__(self, threshold: float, most: int | None = None) -> None:
        self.threshold = threshold
        self.most = most

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"threshold": number(), "most": optional(whole(1))}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "Threshold":
        """The value with which `active` experts a token run on average over these scores."""
        scores_TE = scores_TE.detach().float().cpu()
        # Below every score, so that all run where all should; a cap leaves some of them no chance.
        lowest = scores_TE.min().item() - 1
        score_N = scores_TE.flatten().clone()
        if most is not None:
            able_TE = torch.ones_like(scores_TE, dtype=torch.bool)
            score_N[~capped(able_TE, scores_TE, most).flatten()] = lowest
        wanted = int(active * SLACK * len(scores_TE))
        if wanted >= len(score_N):
            return cls(lowest, most)
        # Strictly above the next lower score: those that tie with it come and go together. In place:
        # the scores of a sample are the largest thing in memory.
        value_N = score_N.numpy()
        at = len(value_N) - wanted - 1
        value_N.partition(at)
        highest, threshold = float(value_N[at:].max()), float(value_N[at])
        if threshold == highest:
            below_N = value_N[value_N < highest]
            return cls(float(below_N.max()) if len(below_N) else lowest, most)
        return cls(threshold, most)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`."""
        return capped(scores_TE > self.threshold, scores_TE, self.most)


class DynamicK(Selection):
    """Dynamic k: experts whose score comes near to the token's best (D2DMoE, Szatkowski et al. 2024).

    Expert `e` runs where `s_e >= (1 - tau) max s`; for scores that are never negative.
    """

    varies = True

    def __init__(self, tau: float, most: int | None = None) -> None:
        self.tau = tau
        self.most = most

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"tau": number(0, 1), "most": optional(whole(1))}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "DynamicK":
        """The `tau` with which `active` experts a token run on average.

        Raises `RecipeError` for scores below zero, whose sizes mean nothing.
        """
        scores_TE = scores_TE.float()
        if (scores_TE < 0).any():
            raise RecipeError(
                "selection 'dynamic_k' compares sizes of scores that are never negative, and this "
                "router's are; choose router norm_regression, or selection threshold or top_p"
            )
        return cls(bisect(lambda tau: cls(tau, most)(scores_TE), active), most)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`; the best expert always runs."""
        scores_TE = scores_TE.float()
        least_T1 = (1 - self.tau) * scores_TE.amax(1, keepdim=True)
        return capped(scores_TE >= least_T1, scores_TE, self.most)


WIDEST = 4.0
"""Spread of the scores beyond which they are scaled down: a softmax of wider ones is 0 or 1."""


class TopP(Selection):
    """Top-p: the fewest experts that hold a share `p` of the token's softmax (nucleus selection).

    The experts of highest probability until their sum reaches `p`; at least one, at 1 all.
    """

    varies = True

    def __init__(self, p: float, most: int | None = None, scale: float = 1.0) -> None:
        self.p = p
        self.most = most
        self.scale = scale

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {
            "p": number(0, 1, above=True),
            "most": optional(whole(1)),
            "scale": number(0, above=True),
        }

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
        return {"k": whole(1, experts)}

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
