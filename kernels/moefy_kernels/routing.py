"""Routing on the device: scores, which experts they choose, and lists of those, without a host in between.

A list of a token has a fixed length; behind its last expert stands E, which is no expert, and counts say
how many are real. `route` computes a linear router and chooses in one launch: the program that comes last
of those that score a token chooses for it. `select` chooses by scores that are there already, `listed`
turns a mask into lists. Experts are listed by rising number; of equal scores the lower number wins.

Shapes: T tokens, D width, E experts, K length of a list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefy_kernels import reference
from moefy_kernels.configs import chosen
from moefy_kernels.launching import launches, runs_kernels

WIDEST = 32768
"""Most experts that one program can choose among."""
FUSED = 4096
"""Most experts that are scored and chosen in one launch: four warps hold the scores of so many."""


@triton.jit
def scores_at(score, at_P, score_e, E):
    """Scores in fp32, lowest where there is no expert; past L1, another program may have written them."""
    at = score + at_P * score_e
    return tl.load(at, mask=at_P < E, other=float("-inf"), cache_modifier=".cg").to(tl.float32)


@triton.jit
def ordered(score_P):
    """Integers in the order of the scores; minus zero is zero."""
    bits_P = (score_P + 0.0).to(tl.int32, bitcast=True)
    return bits_P ^ ((bits_P >> 31) & 0x7FFFFFFF)


@triton.jit
def put(on_C, at_C, expert, listed, K):
    """Append the numbers `at_C` that are on to a list of `listed`; gives its new length."""
    place_C = listed + tl.cumsum(on_C.to(tl.int32), 0) - 1
    tl.store(expert + place_C, at_C, mask=on_C & (place_C < K))
    return listed + tl.sum(on_C.to(tl.int32))


@triton.jit
def end(expert, count, listed, E, K, CHUNK: tl.constexpr):
    """Fill the rest of a list with E, and say how long it is."""
    for begin in range(listed // CHUNK * CHUNK, K, CHUNK):
        at_C = begin + tl.arange(0, CHUNK)
        tl.store(expert + at_C, at_C * 0 + E, mask=(at_C >= listed) & (at_C < K))
    tl.store(count, tl.minimum(listed, K))


@triton.jit
def choose(
    score, score_e, expert, count, value, E, K,
    NEAR: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """List the scores of a token above `value`, or within `value` of its best: the K best of them."""
    at_P = tl.arange(0, P)
    score_P = scores_at(score, at_P, score_e, E)
    key_P = ordered(score_P)
    if NEAR:
        least = ordered((1 - value) * tl.max(score_P, 0)) - 1
    else:
        least = ordered(tl.zeros((), tl.float32) + value)
    ties = 0
    if tl.sum((key_P > least).to(tl.int32)) > K:
        # The K-th highest key, bit by bit from the lowest integer up: a bit is added if enough keys
        # are as high with it.
        one = tl.full((), 1, tl.int32)
        least = one << 31
        for step in range(32):
            tried = least ^ (one << (31 - step))
            least = tl.where(tl.sum((key_P >= tried).to(tl.int32)) >= K, tried, least)
        ties = K - tl.sum((key_P > least).to(tl.int32))
    # Once more, piece by piece: places in the list of all at once would not fit into a processor.
    listed, tied = 0, 0
    for begin in range(0, E, CHUNK):
        at_C = begin + tl.arange(0, CHUNK)
        key_C = ordered(scores_at(score, at_C, score_e, E))
        tie_C = (key_C == least).to(tl.int32)
        early_C = (tie_C != 0) & (tied + tl.cumsum(tie_C, 0) <= ties)
        listed = put((at_C < E) & ((key_C > least) | early_C), at_C, expert, listed, K)
        tied += tl.sum(tie_C)
    end(expert, count, listed, E, K, CHUNK)


@triton.jit
def routing_route(
    x, router, bias, score, ticket, expert, count, x_t, x_d, router_e, router_d, value, E, K,
    D: tl.constexpr, NEAR: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a block of experts for one token; the last block of a token chooses."""
    block, token = tl.program_id(0), tl.program_id(1)
    row_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
    x += token.to(tl.int64) * x_t
    score_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        at_D = begin + tl.arange(0, BLOCK_D)
        inside_RD = (row_R < E)[:, None] & (at_D < D)[None, :]
        x_D = tl.load(x + at_D * x_d, mask=at_D < D, other=0).to(tl.float32)
        at_RD = router + row_R[:, None] * router_e + at_D[None, :] * router_d
        score_RD += tl.load(at_RD, mask=inside_RD, other=0).to(tl.float32) * x_D[None, :]
    score_R = tl.sum(score_RD, 1)
    if bias is not None:
        score_R += tl.load(bias + row_R, mask=row_R < E, other=0).to(tl.float32)
    score += token.to(tl.int64) * E
    tl.store(score + row_R, score_R, mask=row_R < E)
    # As in `rows.finish`: the ticket releases what all threads have written.
    tl.debug_barrier()
    if tl.atomic_add(ticket + token, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        expert += token.to(tl.int64) * K
        choose(score, 1, expert, count + token, value, E, K, NEAR, P, CHUNK)


@triton.jit
def routing_select(
    score, expert, count, score_t, score_e, value, E, K,
    NEAR: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Choose for one token by scores that are known."""
    token = tl.program_id(0).to(tl.int64)
    choose(
        score + token * score_t, score_e, expert + token * K, count + token, value, E, K,
        NEAR, P, CHUNK,
    )  # fmt: skip


@triton.jit
def routing_list(mask, expert, count, mask_t, mask_e, rows, E, K, CHUNK: tl.constexpr):
    """List what is on in any of `rows` rows of a mask (bool, or weights other than zero)."""
    group = tl.program_id(0).to(tl.int64)
    expert += group * K
    listed = 0
    for begin in range(0, E, CHUNK):
        at_C = begin + tl.arange(0, CHUNK)
        on_C = tl.zeros((CHUNK,), tl.int1)
        for row in range(rows):
            at = mask + (group * rows + row) * mask_t + at_C * mask_e
            on_C = on_C | (tl.load(at, mask=at_C < E, other=0) != 0)
        listed = put(on_C, at_C, expert, listed, K)
    end(expert, count + group, listed, E, K, CHUNK)


def _lists(x: Tensor, tokens: int, length: int) -> tuple[Tensor, Tensor]:
    expert_TK = torch.empty((tokens, length), dtype=torch.int32, device=x.device)
    return expert_TK, torch.empty((tokens,), dtype=torch.int32, device=x.device)


@torch.library.custom_op("moefy::route", mutates_args=())
def _route(
    x_TD: Tensor, router_ED: Tensor, bias_E: Tensor | None, value: float, most: int, near: bool
) -> tuple[Tensor, Tensor]:
    (T, D), E = x_TD.shape, len(router_ED)
    if not runs_kernels(x_TD) or E > FUSED:
        result: tuple[Tensor, Tensor] = _select(
            reference.scores(x_TD, router_ED, bias_E), value, most, near
        )
        return result
    config = chosen("routing_route", x_TD, 1)
    expert_TK, count_T = _lists(x_TD, T, most)
    score_TE = torch.empty((T, E), dtype=torch.float32, device=x_TD.device)
    ticket_T = torch.zeros((T,), dtype=torch.int32, device=x_TD.device)
    routing_route[(triton.cdiv(E, config["BLOCK_R"]), T)](
        x_TD, router_ED, bias_E, score_TE, ticket_T, expert_TK, count_T, *x_TD.stride(),
        *router_ED.stride(), value, E, most, D=D, NEAR=near, **_pieces(E), **config,
    )  # fmt: skip
    return expert_TK, count_T


@_route.register_fake
def _(
    x_TD: Tensor, router_ED: Tensor, bias_E: Tensor | None, value: float, most: int, near: bool
) -> tuple[Tensor, Tensor]:
    return _lists(x_TD, len(x_TD), most)


@torch.library.custom_op("moefy::select", mutates_args=())
def _select(score_TE: Tensor, value: float, most: int, near: bool) -> tuple[Tensor, Tensor]:
    T, E = score_TE.shape
    if not runs_kernels(score_TE) or E > WIDEST:
        return reference.select(score_TE, value, most, near)
    expert_TK, count_T = _lists(score_TE, T, most)
    routing_select[(T,)](
        score_TE, expert_TK, count_T, *score_TE.stride(), value, E, most, NEAR=near,
        **_pieces(E), num_warps=_warps(E),
    )  # fmt: skip
    return expert_TK, count_T


@_select.register_fake
def _(score_TE: Tensor, value: float, most: int, near: bool) -> tuple[Tensor, Tensor]:
    return _lists(score_TE, len(score_TE), most)


@torch.library.custom_op("moefy::listed", mutates_args=())
def _listed(mask_TE: Tensor, most: int, together: bool) -> tuple[Tensor, Tensor]:
    T, E = mask_TE.shape
    lists = 1 if together else T
    if not launches(mask_TE) or E > WIDEST:
        return reference.listed(mask_TE, most, together)
    expert_TK, count_T = _lists(mask_TE, lists, most)
    routing_list[(lists,)](
        mask_TE, expert_TK, count_T, *mask_TE.stride(), T // lists, E, most,
        CHUNK=_pieces(E)["CHUNK"], num_warps=4,
    )  # fmt: skip
    return expert_TK, count_T


@_listed.register_fake
def _(mask_TE: Tensor, most: int, together: bool) -> tuple[Tensor, Tensor]:
    return _lists(mask_TE, 1 if together else len(mask_TE), most)


def _pieces(experts: int) -> dict[str, int]:
    """All experts, and how many are listed at a time."""
    whole = triton.next_power_of_2(experts)
    return {"P": whole, "CHUNK": min(whole, 1024)}


def _warps(experts: int) -> int:
    return int(min(16, max(1, triton.next_power_of_2(experts) // 512)))


def route(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor | None = None,
    *,
    k: int | None = None,
    threshold: float | None = None,
    tau: float | None = None,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Lists `[T, K]` (int32) and counts `[T]` of the experts that a linear router chooses.

    Of `k` (the highest scores), `threshold` (scores above it) and `tau` (scores of at least
    `(1 - tau)` of the token's highest, D2DMoE) one is given; `most` caps the last two. K is `k`, or
    `most`, or E. Scores are added up in fp32.
    """
    value, near, most = _settings(k, threshold, tau, most, len(router_ED))
    result: tuple[Tensor, Tensor] = _route(x_TD, router_ED, bias_E, value, most, near)
    return result


def select(
    score_TE: Tensor,
    *,
    k: int | None = None,
    threshold: float | None = None,
    tau: float | None = None,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Lists and counts by scores `[T, E]`, as `route` makes them."""
    value, near, most = _settings(k, threshold, tau, most, score_TE.shape[1])
    result: tuple[Tensor, Tensor] = _select(score_TE, value, most, near)
    return result


def listed(
    mask_TE: Tensor, most: int | None = None, *, together: bool = False
) -> tuple[Tensor, Tensor]:
    """Lists and counts of what is on in every row of a mask, or `together` in any of them.

    The mask is bool, or weights of which zero is off. A row has `most` experts at most.
    """
    result: tuple[Tensor, Tensor] = _listed(
        mask_TE, min(most or mask_TE.shape[1], mask_TE.shape[1]), together
    )
    return result


def _settings(
    k: int | None, threshold: float | None, tau: float | None, most: int | None, experts: int
) -> tuple[float, bool, int]:
    if sum(one is not None for one in (k, threshold, tau)) != 1:
        raise ValueError("one of k, threshold and tau is to be given")
    if k is not None:
        return float("-inf"), False, min(k, experts)
    value = threshold if tau is None else tau
    assert value is not None
    return value, tau is not None, min(most or experts, experts)
