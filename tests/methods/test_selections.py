"""Selections against plain loops over tokens, and what fitting one promises.

Shapes: B sequences, T tokens, E experts.
"""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_conversion import convert_tiny
from tiny_models import build
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import moefy
from moefy.errors import MoefyError, RecipeError
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.methods.base import Context
from moefy.methods.selections import DynamicK, PromptStatic, Threshold, TopP
from moefy.methods.tables import SELECTIONS
from moefy.models.library import passing

VARYING = ["threshold", "dynamic_k", "top_p"]
properties = settings(deadline=None, max_examples=40, derandomize=True)


def draw(seed: int, tokens: int, experts: int, spread: float = 1.0) -> Tensor:
    """Scores that are never negative, with a token and an expert that stand out."""
    g = torch.Generator().manual_seed(seed)
    scores_TE = torch.randn(tokens, experts, generator=g).exp() * spread
    scores_TE[0] *= 3
    scores_TE[:, -1] *= 2
    return scores_TE


def naive_mask(name: str, scores_TE: Tensor, value: float, most: int | None) -> Tensor:
    """One token at a time, in Python's own numbers."""
    rows = []
    for row in scores_TE.tolist():
        ranked = sorted(range(len(row)), key=lambda e: -row[e])
        if name == "threshold":
            chosen = [e for e in ranked if row[e] > value]
        elif name == "dynamic_k":
            chosen = [e for e in ranked if row[e] >= (1 - value) * row[ranked[0]]]
        else:
            top = row[ranked[0]]
            weight = {e: math.exp(row[e] - top) for e in ranked}
            total, chosen, seen = math.fsum(weight.values()), [], 0.0
            for e in ranked:
                if seen < value * total:
                    chosen.append(e)
                seen += weight[e]
        rows.append([e in chosen[:most] for e in range(len(row))])
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "name,key", [("threshold", "threshold"), ("dynamic_k", "tau"), ("top_p", "p")]
)
@properties
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(2, 30),
    experts=st.integers(2, 20),
    value=st.floats(0.05, 0.95),
    most=st.none() | st.integers(1, 20),
)
def test_masks_are_those_of_a_plain_loop(
    name: str, key: str, seed: int, tokens: int, experts: int, value: float, most: int | None
) -> None:
    scores_TE = draw(seed, tokens, experts)
    mask_TE = SELECTIONS[name](**{key: value, "most": most})(scores_TE)
    assert mask_TE.dtype == torch.bool
    assert torch.equal(mask_TE, naive_mask(name, scores_TE, value, most))


@pytest.mark.parametrize("name", VARYING)
@properties
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(64, 200),
    experts=st.integers(4, 24),
    share=st.floats(0.2, 0.8),
    most=st.none() | st.floats(1.0, 2.5),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_the_fitted_mean_is_the_wanted_number_and_the_cap_holds(
    name: str,
    seed: int,
    tokens: int,
    experts: int,
    share: float,
    most: float | None,
    spread: float,
) -> None:
    active = max(1.0, share * experts)
    cap = None if most is None else round(most * active)
    scores_TE = draw(seed, tokens, experts, spread)
    made = SELECTIONS[name].fit(scores_TE, active, cap)
    count_T = made(scores_TE).sum(1)
    if cap is not None:
        assert count_T.max() <= cap
    # Scores of their own are fitted; a cap at the mean or below can only be met from below.
    if cap is None or cap > active + 1:
        # One expert of one token more or less is the resolution; a softmax of wide scores has ties.
        assert abs(count_T.float().mean().item() - active) < 0.03 * experts + 2 / tokens
    else:
        assert count_T.float().mean() <= cap
    settings = json.loads(json.dumps(made.settings()))
    again = SELECTIONS[name](**settings)
    assert torch.equal(again(scores_TE), made(scores_TE))
    assert again.settings() == made.settings()
    # Scores decide, and nothing else does: a lower score never runs where a higher one does not.
    lowest = scores_TE.masked_fill(~made(scores_TE), torch.inf).amin(1)
    highest = scores_TE.masked_fill(made(scores_TE), -torch.inf).amax(1)
    assert (lowest >= highest).all()


@pytest.mark.parametrize("name", VARYING)
def test_every_expert_runs_where_all_should(name: str) -> None:
    scores_TE = draw(0, 50, 12, spread=20.0)
    scores_TE[:, 0] = 0
    assert SELECTIONS[name].fit(scores_TE, 12)(scores_TE).all()


@pytest.mark.parametrize("name", [*VARYING, "topk", "softmax_topk", "prompt_static"])
def test_more_experts_are_a_superset(name: str) -> None:
    scores_TE = draw(1, 80, 10)
    context = Context(batch=1)
    masks = [SELECTIONS[name].fit(scores_TE, k)(scores_TE, context) for k in range(1, 10)]
    counts = [mask.sum().item() for mask in masks]
    assert counts == sorted(set(counts))
    for fewer, more in itertools.pairwise(masks):
        assert not (fewer & ~more).any()


def test_threshold_is_one_value_for_all_tokens_and_dynamic_k_is_not() -> None:
    scores_TE = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    assert Threshold(2.5)(scores_TE).tolist() == [[False, False, True], [True, True, True]]
    assert DynamicK(0.5)(scores_TE).tolist() == [[False, True, True]] * 2
    assert DynamicK(0.0)(scores_TE).sum(1).tolist() == [1, 1]
    assert TopP(0.6)(scores_TE).tolist() == [[False, False, True]] * 2
    assert TopP(0.7)(scores_TE).tolist() == [[False, True, True], [False, False, True]]
    assert TopP(0.99, most=1)(scores_TE).sum(1).tolist() == [1, 1]


def test_dynamic_k_refuses_scores_it_cannot_compare() -> None:
    with pytest.raises(RecipeError, match="never negative"):
        DynamicK.fit(torch.tensor([[-3.0, -1.0], [2.0, 1.0]]), 1)


# ---- prompt_static without a model


def naive_prompt_choice(scores_TE: Tensor, kept: list[int], k: int) -> list[int]:
    """GRIFFIN's statistic: normalise every token's scores, then the norm over the prompt."""
    totals = [0.0] * scores_TE.shape[1]
    for t in kept:
        length = math.sqrt(sum(s * s for s in scores_TE[t].tolist()))
        for e, s in enumerate(scores_TE[t].tolist()):
            totals[e] += (s / length) ** 2
    return sorted(sorted(range(len(totals)), key=lambda e: -totals[e])[:k])


class Cache:
    """Something that lives, dies and can be referred to weakly, as a key-value cache."""


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prompt_chooses_for_every_sequence_and_ignores_padding(side: str) -> None:
    lengths, length, k = [6, 3, 5], 6, 3
    scores_BTE = draw(2, 18, 8).view(3, 6, 8)
    mask_BT = torch.zeros(3, length, dtype=torch.bool)
    for b, n in enumerate(lengths):
        mask_BT[b, length - n :] = side == "left"
        mask_BT[b, :n] |= side == "right"
    scores_BTE[~mask_BT] *= torch.tensor([100.0] + [0.0] * 7)  # what padding holds must not count
    places = [row.nonzero()[:, 0].tolist() for row in mask_BT]
    selection, cache = PromptStatic(k), Cache()
    context = Context(mask_BT=mask_BT, batch=3, cache=cache)
    assert selection.remembered(context) is None
    assert selection(scores_BTE.view(18, 8), context).all()
    context.prompt = False
    chosen_BE = selection.remembered(context)
    assert chosen_BE is not None
    for b in range(3):
        want = naive_prompt_choice(scores_BTE[b], places[b], k)
        assert chosen_BE[b].nonzero()[:, 0].tolist() == want

    # Without a cache: the first half of the tokens is the prompt, padding left out.
    context = Context(mask_BT=mask_BT, batch=3)
    ran_BTE = selection(scores_BTE.view(18, 8), context).view(3, 6, 8)
    for b in range(3):
        half = places[b][: len(places[b]) // 2]
        want = naive_prompt_choice(scores_BTE[b], half, k)
        for t in places[b]:
            ran = ran_BTE[b, t].nonzero()[:, 0].tolist()
            assert ran == (list(range(8)) if t in half else want), (b, t)


def test_a_choice_dies_with_its_cache() -> None:
    selection, cache = PromptStatic(2), Cache()
    selection(draw(0, 4, 5), Context(cache=cache))
    assert len(selection._chosen) == 1
    del cache
    assert len(selection._chosen) == 0
    assert selection.settings() == {"k": 2}


def test_a_prompt_of_another_batch_or_of_nowhere_is_refused() -> None:
    selection, cache = PromptStatic(2), Cache()
    selection(draw(0, 4, 5), Context(cache=cache, batch=2))
    with pytest.raises(MoefyError, match="the prompt had 2 sequences, now there are 3"):
        selection.remembered(Context(cache=cache, batch=3, prompt=False))
    with pytest.raises(MoefyError, match="not the prompt of this cache"):
        selection.remembered(Context(cache=Cache(), batch=2, prompt=False))


# ---- prompt_static in models


def prompt_static(name: str, folder: Path) -> Path:
    settings = {
        "router.name": "activation",
        "selection.name": "prompt_static",
        "compensation.name": "none",
        "partition.expert_size": 4,
    }
    convert_tiny(name, build(name, folder / "source"), folder / "out", settings=settings)
    return folder / "out"


@pytest.fixture(scope="module")
def griffin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_static("llama", tmp_path_factory.mktemp("griffin"))


class Watch:
    """The masks of every layer and pass, as they ran."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.masks: list[list[Tensor]] = [[] for _ in sparse_mlps(model)]
        for index, module in sparse_mlps(model).items():
            module.observer = lambda x_TD, mask_TE, at=index: self.masks[at].append(mask_TE)


IDS = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_generation_runs_the_prompt_densely_and_then_what_it_chose(griffin: Path) -> None:
    model = moefy.load(griffin)
    watch = Watch(model)
    model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for layer, masks in enumerate(watch.masks):
        assert [len(mask) for mask in masks] == [20, 2, 2, 2]
        assert masks[0].all()
        assert (masks[1].sum(1) == sparse_mlps(model)[layer].experts // 2).all()
        assert torch.equal(masks[1], masks[2])
        assert torch.equal(masks[1], masks[3])
    assert any(not torch.equal(masks[1][0], masks[1][1]) for masks in watch.masks)
    # What it chose is what the statistic says of the dense model's own prompt.
    scores: list[Tensor] = []
    for module in sparse_mlps(model).values():
        module.observer = lambda x_TD, _, m=module: scores.append(m.router(x_TD, m.routed))
    with all_experts(model):
        model(IDS)
    for layer, scores_TE in enumerate(scores):
        module = sparse_mlps(model)[layer]
        for b, rows in enumerate(scores_TE.view(2, 10, -1)):
            want = naive_prompt_choice(rows, list(range(10)), module.experts // 2)
            assert watch.masks[layer][1][b].nonzero()[:, 0].tolist() == want


@torch.no_grad()
def test_without_a_cache_every_layer_takes_half_of_every_document(griffin: Path) -> None:
    model = moefy.load(griffin)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    watch = Watch(model)
    model(IDS, attention_mask=mask, use_cache=False)
    for masks in watch.masks:
        ran_BT = masks[0].view(2, 10, -1).sum(-1)
        assert ran_BT[0].tolist() == [16] * 5 + [8] * 5
        assert ran_BT[1, :6].tolist() == [16] * 3 + [8] * 3


@torch.no_grad()
def test_left_padding_changes_neither_choice_nor_text(griffin: Path) -> None:
    model = moefy.load(griffin)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[1:, :7]], 1)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    both = Watch(model)
    text = model.generate(torch.cat([IDS[:1], padded]), attention_mask=mask, **options)
    alone = Watch(model)
    want = model.generate(IDS[1:, :7], attention_mask=mask[1:, 3:], **options)
    for masks, single in zip(both.masks, alone.masks, strict=True):
        assert torch.equal(masks[1][1], single[1][0])
    assert torch.equal(text[1, 10:], want[0, 7:])


@torch.no_grad()
def test_a_cache_that_no_prompt_filled_is_refused(griffin: Path) -> None:
    model = moefy.load(griffin)
    # A call without a cache is an evaluation; that it returns one does not make it a prompt.
    result = model(IDS, use_cache=True)
    returned = next(value for value in result.values() if isinstance(value, transformers.Cache))
    with pytest.raises(MoefyError, match="not the prompt of this cache"):
        model(IDS[:, :1], **passing(model, returned))
    cache = DynamicCache(config=model.config)
    model(IDS, **passing(model, cache))
    model(IDS[:, :1], **passing(model, cache))
    with pytest.raises(MoefyError, match="not the prompt of this cache"):
        model(IDS[:, :1], **passing(model, copy.deepcopy(cache)))


@torch.no_grad()
def test_several_new_tokens_at_once_equal_one_by_one(griffin: Path) -> None:
    model = moefy.load(griffin)
    new = IDS.flip(0)[:, :3]
    together, single = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(IDS, **passing(model, together))
    model(IDS, **passing(model, single))
    got = model(new, **passing(model, together)).logits
    want = torch.cat(
        [model(new[:, t : t + 1], **passing(model, single)).logits for t in range(3)], 1
    )
    assert ((got - want).norm() / want.norm()) < 1e-5
    with all_experts(model):
        cache = DynamicCache(config=model.config)
        model(IDS, **passing(model, cache))
        dense = model(new, **passing(model, cache)).logits
    assert ((got - dense).norm() / dense.norm()) > 1e-2


@torch.no_grad()
def test_beams_share_the_choice_of_their_prompt(griffin: Path) -> None:
    model = moefy.load(griffin)
    watch = Watch(model)
    model.generate(IDS, max_new_tokens=4, num_beams=2, do_sample=False, eos_token_id=None)
    for masks in watch.masks:
        assert torch.equal(masks[1][0], masks[1][1])
        assert torch.equal(masks[1], masks[-1])


@torch.no_grad()
def test_compiling_is_refused(griffin: Path) -> None:
    model = moefy.load(griffin)
    with pytest.raises(Exception, match="prompt_static keeps a choice per cache"):
        torch.compile(model, backend="eager", fullgraph=True)(IDS)


@pytest.fixture(scope="module")
def griffin_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_static("t5", tmp_path_factory.mktemp("griffin_t5"))


@torch.no_grad()
def test_encoder_and_decoder_have_prompts_of_their_own(griffin_t5: Path) -> None:
    model = moefy.load(griffin_t5)
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 1}
    options |= {"eos_token_id": None}
    both = Watch(model)
    text = model.generate(IDS, attention_mask=mask, **options)
    alone = Watch(model)
    want = model.generate(IDS[1:, :7], attention_mask=mask[1:, :7], **options)
    assert torch.equal(text[1], want[0])
    encoder, decoder = both.masks[:2], both.masks[2:]
    for masks, single in zip(encoder, alone.masks[:2], strict=True):
        assert len(masks) == 1
        ran_BTE = masks[0].view(2, 10, -1)
        assert ran_BTE[0, :5].all()
        assert (ran_BTE[0, 5:].sum(1) == 8).all()
        assert torch.equal(ran_BTE[1, :7], single[0])
    for masks in decoder:
        assert [len(mask) for mask in masks] == [2, 2, 2, 2]
        assert masks[0].all()
        assert (masks[1].sum(1) == 8).all()
        assert torch.equal(masks[1], masks[3])
    # A pass through the whole model says the same of the encoder.
    whole = Watch(model)
    model(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS[:, :4])
    for masks, generated in zip(whole.masks[:2], encoder, strict=True):
        real = mask.bool().flatten()
        assert torch.equal(masks[0][real], generated[0][real])
    for masks in whole.masks[2:]:
        assert masks[0].view(2, 4, -1)[:, :2].all()
        assert (masks[0].view(2, 4, -1)[:, 2:].sum(-1) == 8).all()
