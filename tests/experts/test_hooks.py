"""Hook points against loops over experts in fp64, and what writing to them does.

Shapes: b documents, p positions, T = b * p tokens, E experts (the shared ones first), D width.
"""

import copy
import warnings

import pytest
import torch
from moefied_models import KINDS, inputs_for
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from moefy.errors import MoefyError
from moefy.evaluation.outputs import values_of
from moefy.experts.routed import OF_ALL, POINTS, say_once
from moefy.experts.sparse_mlp import all_experts, sparse_mlps, use_backend
from moefy.models.library import passing

MASK, OUT = "blocks.1.mlp.hook_expert_mask", "blocks.1.mlp.hook_out"


@torch.no_grad()
def run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return values_of(model, model(**inputs))


def point(name: str, layer: int = 1) -> str:
    return f"blocks.{layer}.mlp.{name}"


def everything(name: str) -> bool:
    return True


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_point_holds_what_its_name_says(kind, load):
    model, inputs = load(kind), inputs_for(kind)
    logits, cache = model.run_with_cache(**inputs, names_filter=everything)
    assert (logits - run(model, inputs)).abs().max() < 1e-9 * logits.abs().max()
    modules = sparse_mlps(model)
    assert list(cache) == [point(name, layer) for layer in modules for name in POINTS]
    for layer, module in modules.items():
        decoding = kind == "seq2seq" and layer >= 2
        b, p = inputs["decoder_input_ids" if decoding else "input_ids"].shape
        D, E = module.weights.width, module.experts
        at = {name: cache[point(name, layer)] for name in POINTS}
        assert {name: tuple(value.shape) for name, value in at.items()} == {
            "hook_in": (b, p, D),
            "hook_router_scores": (b, p, E - module.shared),
            "hook_expert_mask": (b, p, E),
            "hook_expert_norm": (b, p, E),
            "hook_expert_out": (b, p, E, D),
            "hook_moe_error": (b, p, D),
            "hook_out": (b, p, D),
        }
        x_TD = at["hook_in"].reshape(-1, D)
        read_TD = cache[point("hook_in", layer - 1)].view(-1, D) if module.look_ahead else x_TD
        scores_TE = module.router(read_TD, module.routed)
        assert torch.allclose(at["hook_router_scores"].view(scores_TE.shape), scores_TE)
        mask_TE = at["hook_expert_mask"].view(-1, E)
        assert mask_TE.dtype == torch.bool and mask_TE[:, : module.shared].all()
        assert 0.2 < mask_TE.double().mean() < 0.8
        # Expert by expert, from its own rows.
        sum_TD, running = torch.zeros_like(x_TD), module.running
        for e in range(E):
            rows = slice(e * module.expert_size, (e + 1) * module.expert_size)
            y_TD = running.hidden(x_TD, rows) @ running.down_ND[rows]
            assert torch.allclose(at["hook_expert_out"].view(-1, E, D)[:, e], y_TD, atol=1e-10)
            norm_T = at["hook_expert_norm"].view(-1, E)[:, e]
            assert torch.allclose(norm_T, y_TD.norm(dim=1), rtol=1e-5, atol=1e-7)
            sum_TD += mask_TE[:, e, None] * y_TD
        if running.down_bias_D is not None:
            sum_TD += running.down_bias_D
        extra_TD = module.compensation(x_TD, mask_TE[:, module.shared :])
        sum_TD = sum_TD if extra_TD is None else sum_TD + extra_TD
        out_TD, error_TD = (at[name].view(-1, D) for name in ("hook_out", "hook_moe_error"))
        assert torch.allclose(out_TD, sum_TD, atol=1e-6)
        dense_TD = module.weights(x_TD)
        # The sum of centres is kept in fp32.
        tolerance = 1e-5 if kind == "centred" else 1e-9
        assert (out_TD + error_TD - dense_TD).abs().max() < tolerance * dense_TD.abs().max()
        assert error_TD.norm() > 1e-2 * dense_TD.norm()


@pytest.mark.parametrize("backend", ["auto", "masked", "views"])
@pytest.mark.parametrize("kind", ["demo_llama", "demo_opt", "shared", "encoder", "look_ahead"])
def test_to_look_changes_no_bit(kind, backend, load):
    model, inputs = load(kind, dtype=torch.float32), inputs_for(kind)
    use_backend(model, backend)
    want, seen = run(model, inputs), []

    def look(value: Tensor, hook) -> None:
        seen.append(hook.name)

    with model.hooks([(lambda name: name.rpartition(".")[2] not in OF_ALL, look)]):
        assert torch.equal(run(model, inputs), want)
        assert len(seen) == 4 * len(sparse_mlps(model))
    with model.hooks([(everything, look)]):
        assert (run(model, inputs) - want).abs().max() < 1e-4 * want.abs().max()
        assert {m.chosen for m in sparse_mlps(model).values()} == {"masked"}
    seen.clear()
    assert torch.equal(run(model, inputs), want) and seen == []


@pytest.mark.parametrize("kind", ["demo_llama", "demo_opt", "shared", "encoder"])
def test_the_mask_that_is_returned_is_what_runs(kind, load):
    model, inputs = load(kind), inputs_for(kind)
    plain = run(model, inputs)

    def without(mask: Tensor, hook) -> Tensor:
        mask = mask.clone()
        mask[..., :3] = False
        return mask

    def edit(mask: Tensor, hook) -> None:
        mask[..., :3] = False

    with model.experts(ablate=[(1, e) for e in range(3)], mode="zero"):
        want = run(model, inputs)
    for function in (without, edit):
        with model.hooks([(MASK, function)]):
            assert (run(model, inputs) - want).abs().max() < 1e-9 * want.abs().max()
    with model.hooks([(lambda name: name.endswith("mask"), lambda mask, hook: mask | True)]):
        got = run(model, inputs)
    with all_experts(model):
        assert (run(model, inputs) - got).abs().max() < 1e-9 * got.abs().max()

    def second(mask: Tensor, hook) -> Tensor:
        mask = mask.clone()
        mask[1] = ~mask[1]
        return mask

    with model.hooks([(MASK, second)]):
        got = run(model, inputs)
    assert torch.allclose(got[0], plain[0]) and not torch.allclose(got[1], plain[1])


@pytest.mark.parametrize("kind", ["demo_llama", "demo_opt", "shared", "gates"])
def test_writing_to_the_other_points(kind, load):
    model, inputs = load(kind), inputs_for(kind)
    plain, shared = run(model, inputs), sparse_mlps(model)[1].shared

    def favour(scores: Tensor, hook) -> Tensor:
        scores = scores.clone()
        scores[..., 2] = 1e9
        return scores

    named = [(point("hook_router_scores"), favour)]
    with model.hooks(named):
        _, cache = model.run_with_cache(**inputs, names_filter=MASK)
    assert cache[MASK][..., shared + 2].all() and list(cache) == [MASK]

    def double(out: Tensor, hook) -> Tensor:
        return torch.cat([out[..., :4, :], 2 * out[..., 4:5, :], out[..., 5:, :]], -2)

    with model.experts(scale={(1, 4): 2.0}):
        want = run(model, inputs)
    got = model.run_with_hooks(**inputs, fwd_hooks=[(point("hook_expert_out"), double)]).detach()
    assert (got - want).abs().max() < 1e-9 * want.abs().max()
    assert (got - plain).abs().max() > 1e-4

    with all_experts(model):
        want = run(model, inputs)
    with model.hooks([(lambda name: name.endswith("error"), lambda error, _: 0 * error)]):
        assert (run(model, inputs) - want).abs().max() < 1e-6 * want.abs().max()

    module = sparse_mlps(model)[1]
    for name in ("hook_in", "hook_out"):
        with torch.no_grad(), model.hooks([(point(name), lambda value, hook: value * 0)]):
            _, cache = model.run_with_cache(**inputs, names_filter=[point("hook_in"), OUT])
            x_TD = cache[point("hook_in")].reshape(-1, module.weights.width)
        if name == "hook_in":
            assert not x_TD.any()
            want_TD = module(x_TD)
            assert torch.allclose(cache[OUT].reshape(want_TD.shape), want_TD)
        else:
            assert not cache[OUT].any() and x_TD.any()


def test_the_error_closes_the_account_under_interventions_and_writes(load):
    model, inputs = load("demo_opt"), inputs_for("demo_opt")
    names = [point(n) for n in ("hook_in", "hook_out", "hook_moe_error")]
    writes = [
        (point("hook_expert_out"), lambda out, hook: out.flip(-2)),
        (MASK, lambda mask, hook: mask.roll(1, -1)),
    ]
    for hooks in ([], writes[:1], writes):
        with torch.no_grad(), model.experts(ablate=[(1, 2)], scale={(1, 3): 3.0}, mode="zero"):
            with model.hooks(hooks):
                _, cache = model.run_with_cache(**inputs, names_filter=names)
            x, out, error = (cache[name].reshape(-1, 192) for name in names)
            dense = sparse_mlps(model)[1].weights(x)
            assert (out + error - dense).abs().max() < 1e-9 * dense.abs().max()


def test_hooks_run_in_turn_and_are_taken_away(load):
    model, inputs = load("shared"), inputs_for("shared")
    want, seen = run(model, inputs), []

    def flip(mask: Tensor, hook) -> Tensor:
        seen.append((hook.name, hook.layer(), mask))
        return ~mask

    with model.hooks([(MASK, flip), (MASK, flip)]) as same:
        assert same is model and torch.equal(run(model, inputs), want)
    assert [(name, layer) for name, layer, _ in seen] == [(MASK, 1)] * 2
    assert torch.equal(seen[0][2], ~seen[1][2])
    with pytest.raises(ZeroDivisionError), model.hooks([(MASK, flip)]):
        raise ZeroDivisionError
    with pytest.raises(MoefyError), model.hooks([(MASK, flip), ("blocks.1.mlp.hook_mask", flip)]):
        pass
    assert torch.equal(run(model, inputs), want) and len(seen) == 2
    assert not any(module.hooked for module in sparse_mlps(model).values())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["demo_llama", "demo_opt"])
def test_hooks_of_torch_and_generation(kind, load):
    model = load(kind)
    path = next(p for p, m in model.named_modules() if m is sparse_mlps(model)[1])
    shapes: list[tuple[int, ...]] = []
    handle = model.get_submodule(f"{path}.hook_expert_mask").register_forward_hook(
        lambda _, __, mask: shapes.append(tuple(mask.shape))
    )
    ids = inputs_for(kind)["input_ids"][:, :5]
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    handle.remove()
    experts = sparse_mlps(model)[1].experts
    assert shapes == [(2, 5, experts), (2, 1, experts), (2, 1, experts)]


def test_what_cannot_be_had_is_refused(load):
    model, inputs = load("shared"), inputs_for("shared")
    keep = [(MASK, lambda value, hook: value)]
    with pytest.raises(
        MoefyError, match=r"did you mean 'blocks\.1\.mlp\.hook_expert_mask'\? known"
    ):
        model.run_with_cache(**inputs, names_filter="blocks.1.mlp.hook_experts_mask")
    with pytest.raises(
        MoefyError, match=r"chose none of the hook points; known: blocks\.0 to blocks\.1"
    ):
        model.run_with_hooks(**inputs, fwd_hooks=[(lambda name: "resid" in name, keep[0][1])])
    for value, message in (
        (lambda mask: mask[..., 1:], r"returned \[2, 12, 7\] torch.bool; return \[2, 12, 8\]"),
        (lambda mask: mask.float(), r"returned \[2, 12, 8\] torch.float32; return .* torch.bool"),
        (lambda mask: 3, "hook_expert_mask returned int"),
    ):
        with pytest.raises(MoefyError, match=message):
            model.run_with_hooks(**inputs, fwd_hooks=[(MASK, lambda mask, hook, v=value: v(mask))])
    with pytest.raises(MoefyError, match="returned other norms"):
        model.run_with_hooks(
            **inputs, fwd_hooks=[(point("hook_expert_norm"), lambda norm, hook: 2 * norm)]
        )
    with all_experts(model):
        with pytest.raises(MoefyError, match="all_experts was on"):
            model.run_with_cache(**inputs, names_filter=point("hook_router_scores"))
        _, cache = model.run_with_cache(**inputs)
        assert cache[MASK].all() and not cache[point("hook_moe_error")].any()
        assert point("hook_router_scores") not in cache and point("hook_expert_out") not in cache


@torch.no_grad()
def test_a_choice_of_the_prompt_is_not_scored_again(load):
    model, ids = load("static"), inputs_for("static")["input_ids"][:, :8]
    cache = passing(model, DynamicCache(config=model.config))
    _, prompt = model.run_with_cache(ids, **cache)
    assert prompt[MASK].all() and point("hook_router_scores") in prompt

    def forget(mask: Tensor, hook) -> None:
        mask[:] = False  # in place: the choice itself must not be lost

    with pytest.raises(MoefyError, match="prompt_static"):
        model.run_with_cache(ids[:, :1], **cache, names_filter=point("hook_router_scores"))
    _, before = model.run_with_cache(ids[:, :1], **cache, names_filter=MASK)
    model.run_with_hooks(ids[:, :1], **cache, fwd_hooks=[(MASK, forget)])
    _, after = model.run_with_cache(ids[:, :1], **cache, names_filter=MASK)
    assert torch.equal(after[MASK], before[MASK]) and before[MASK].any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["demo_opt", "static"])
def test_a_copy_has_hooks_and_a_context_of_its_own(kind, load):
    model, inputs = load(kind), inputs_for(kind)
    want = run(model, inputs)
    twin = copy.deepcopy(model)
    seen: list[tuple[int, ...]] = []
    with model.hooks([(MASK, lambda mask, hook: ~mask)]):
        assert torch.equal(run(twin, inputs), want)
        assert not torch.equal(run(model, inputs), want)
    with twin.hooks([(MASK, lambda mask, hook: seen.append(tuple(mask.shape)))]):
        first = run(model, {"input_ids": inputs["input_ids"][:1]})[0, :4]
        assert torch.allclose(first, want[0, :4])
        assert seen == []
        run(twin, inputs)
    assert [shape[:2] for shape in seen] == [tuple(inputs["input_ids"].shape)]


@pytest.mark.parametrize("kind", ["shared", "demo_opt"])
def test_a_compiled_model_computes_the_same(kind, load):
    model, inputs = load(kind), inputs_for(kind)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    want = run(model, inputs)
    assert (run(compiled, inputs) - want).abs().max() < 1e-9 * want.abs().max()


def test_the_price_of_all_experts_is_told_once(load):
    model, inputs = load("shared"), inputs_for("shared")
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="hook_moe_error need every expert") as said:
        for _ in range(2):
            model.run_with_cache(**inputs)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say_once.cache_clear()
        model.run_with_cache(**inputs, names_filter=[MASK, OUT, point("hook_in")])


@pytest.mark.parametrize("kind", ["demo_llama", "demo_opt"])
def test_nnsight_reaches_the_points(kind, load):
    import nnsight  # of the dev extra

    model, inputs = load(kind), inputs_for(kind)
    ids = inputs["input_ids"]
    want, cache = model.run_with_cache(ids)
    with model.experts(ablate=[(1, 2)], mode="zero"):
        ablated = run(model, inputs)
    path = next(p for p, m in model.named_modules() if m is sparse_mlps(model)[1])
    traced = nnsight.NNsight(model)
    mlp = traced.get(path)
    # What needs every expert is computed where a hook asks for it.
    with torch.no_grad(), model.hooks([(point("hook_expert_norm"), lambda norm, hook: None)]):  # noqa: SIM117
        with traced.trace(ids):
            scores = mlp.hook_router_scores.output.save()
            mask = mlp.hook_expert_mask.output.save()
            norm = mlp.hook_expert_norm.output.save()
            logits = traced.output.logits.save()
    assert torch.allclose(logits, want)
    for name, got in (("scores", scores), ("mask", mask), ("norm", norm)):
        stored = next(v for k, v in cache.items() if k.startswith("blocks.1.") and k.endswith(name))
        assert got.shape == stored.shape and torch.allclose(got.double(), stored.double())
    with torch.no_grad(), traced.trace(ids):
        mlp.hook_expert_mask.output[..., 2] = False
        logits = traced.output.logits.save()
    assert (logits - ablated).abs().max() < 1e-9 * want.abs().max()
    assert (logits - want).abs().max() > 1e-4
