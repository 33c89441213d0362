"""Distillation and densities per layer: what they improve, and all that they must leave alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_conversion import RECIPE, convert_tiny, corpus_for
from tiny_models import build, example_inputs
from torch import Tensor
from transformers import PreTrainedModel

import moefy
from moefy.conversion import allocate as tuning
from moefy.conversion.backward import distil_layer, distil_model
from moefy.conversion.fit import LayerTokens
from moefy.data.corpus import IGNORED, Batch, load_corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import by_role, tokens_of_roles
from moefy.errors import MoefyError, RecipeError
from moefy.evaluation.outputs import distance, run_outputs, values_of
from moefy.experts.loading import load_dense
from moefy.experts.passes import run
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.methods.tables import COMPENSATIONS
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.models.locate import read_mlp, sites
from moefy.recipe import DistilRecipe
from moefy.run.console import Reporter

QUIET = Reporter(quiet=True)
NAMES = ["llama", "opt", "bert", "t5", "vit"]


def batches_for(name: str, model: PreTrainedModel, checkpoint: Checkpoint) -> list[Batch]:
    kind = sites(load_dense(checkpoint))[0].family.kind
    return read_batches(checkpoint, kind, load_corpus(corpus_for(name)), 32)


def converted(name: str, folder: Path, **settings: str) -> PreTrainedModel:
    source = build(name, folder / "source")
    base = {"router.name": "mlp", "router.hidden": "16", "density": "0.25"}
    convert_tiny(name, source, folder / "out", settings=base | settings)
    return moefy.load(folder / "out")


def everything(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained(name: str) -> bool:
    return ".router." in name or ".compensation." in name


def whole(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What a model gives at every judged position, in one piece."""
    result = run(model, batch)
    if batch.targets_BT is not None:
        return result.logits[batch.targets_BT != IGNORED].double()
    if "pixel_values" in batch.inputs:
        return result.logits.double()
    return getattr(result, "logits", result.get("last_hidden_state"))[batch.mask()].double()


@torch.no_grad()
def naive_distance(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Mean KL over predicted tokens (hidden states: relative error), one position at a time."""
    total, count = 0.0, 0
    for batch in batches:
        with all_experts(model):
            dense = whole(model, batch)
        sparse = whole(model, batch)
        for p, q in zip(dense, sparse, strict=True):
            if batch.targets_BT is None and "pixel_values" not in batch.inputs:
                total += float(((p - q) ** 2).sum() / (p**2).sum())
            else:
                p, q = p.softmax(-1), q.softmax(-1)
                total += float((p * (p / q).log()).sum())
            count += 1
    return total / count


@pytest.mark.parametrize(
    "name,selection", [("llama", "topk"), ("t5", "topk"), ("opt", "threshold")]
)
@pytest.mark.parametrize("compensation", ["conditional_mean", "mean_residual"])
def test_distil_model_comes_nearer_to_dense_and_leaves_the_rest(
    name: str, selection: str, compensation: str, tmp_path: Path
) -> None:
    settings = {"selection.name": selection, "compensation.name": compensation}
    model = converted(name, tmp_path, **settings, **{"compensation.rank": "4"})
    batches = batches_for(name, model, Checkpoint.open(tmp_path / "source"))
    before, start = everything(model), naive_distance(model, batches)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    recipe = DistilRecipe(steps=30, tokens=150, learning_rate=0.2)
    losses = distil_model(model, batches, recipe, report=QUIET)
    assert len(losses) == 30
    assert sum(losses[-8:]) < 0.97 * sum(losses[:8])
    assert naive_distance(model, batches) < 0.97 * start
    for key, value in everything(model).items():
        assert torch.equal(value, before[key]) != trained(key), key
    # Nothing of training is left behind, least of all gradients of what is frozen.
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None for n, p in model.named_parameters() if not trained(n))
    for module in sparse_mlps(model).values():
        assert not module.straight_through
        assert module.scores_TE is None
        assert module.mask(torch.randn(3, module.up_ND.shape[1])).dtype == torch.bool


def test_the_distance_is_kl_over_predicted_positions(tmp_path: Path) -> None:
    model = converted("llama", tmp_path)
    batch = batches_for("llama", model, Checkpoint.open(tmp_path / "source"))[0]
    with torch.no_grad():
        with all_experts(model):
            dense = run_outputs(model, batch)
        sparse = run_outputs(model, batch)
    assert distance(dense, sparse).item() == pytest.approx(naive_distance(model, [batch]), rel=1e-4)
    assert distance(dense, dense).item() == 0
    assert len(dense) == sum(len(sample.inputs["input_ids"]) - 1 for sample in batch.samples)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_distil_layer_comes_nearer_to_the_layer_and_leaves_the_rest(
    name: str, tmp_path: Path
) -> None:
    model = converted(name, tmp_path, **{"router.look_ahead": "true"})
    module = sparse_mlps(model)[1]
    g = torch.Generator().manual_seed(0)
    x_TD, read_TD = (torch.randn(400, module.up_ND.shape[1], generator=g) for _ in range(2))
    before = everything(model)

    @torch.no_grad()
    def error() -> float:
        module.context.previous_TD = read_TD
        return float((module(x_TD) - module.weights(x_TD)).square().sum())

    start = error()
    recipe = DistilRecipe(steps=40, tokens=128, learning_rate=0.4)
    losses = distil_layer(module, LayerTokens(x_TD, read_TD), recipe, report=QUIET)
    assert sum(losses[-8:]) < 0.97 * sum(losses[:8])
    assert error() < 0.97 * start
    owned = next(n for n, m in model.named_modules() if m is module)
    for key, value in everything(model).items():
        changed = trained(key) and key.startswith(owned + ".")
        assert torch.equal(value, before[key]) != changed, key


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_same_seed_same_bytes(scope: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "source")
    settings = {"distil.steps": "4", "distil.tokens": "100", "distil.scope": scope}
    digests = []
    for run_name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / run_name
        convert_tiny("llama", source, out, settings=settings | {"seed": seed})
        digests.append(bytes_of(out))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    plain = tmp_path / "plain"
    convert_tiny("llama", source, plain)
    assert bytes_of(plain) != digests[0]
    assert bytes_of(plain)["model.safetensors"] == digests[0]["model.safetensors"]


def bytes_of(folder: Path) -> dict[str, str]:
    names = [f for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "moefy.json"]
    return {f.name: sha256(f) for f in names}


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    model = converted(
        "llama", tmp_path / "a", **{"compensation.name": "none", "router.name": "random"}
    )
    batches = batches_for("llama", model, Checkpoint.open(tmp_path / "a" / "source"))
    with pytest.raises(MoefyError, match="nothing to train"):
        distil_model(model, batches, DistilRecipe(steps=2), report=QUIET)
    settings = {"selection.name": "prompt_static", "distil.steps": "2"}
    with pytest.raises(RecipeError, match="does not decide by one token's scores"):
        converted("llama", tmp_path / "b", **settings)


# ---- densities per layer, end to end


@torch.no_grad()
def held_out(model: PreTrainedModel, source: Path, name: str) -> list[Batch]:
    """The very documents that a conversion holds out."""
    held = by_role(load_corpus(corpus_for(name)), 0)["held-out"]
    checkpoint = Checkpoint.open(source)
    kind = sites(load_dense(checkpoint))[0].family.kind
    return read_batches(checkpoint, kind, held, RECIPE.context, tokens_of_roles(RECIPE)["held-out"])


@torch.no_grad()
def check_invariant(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Every expert on is the dense model: the whole in fp32, each MLP in fp64."""
    source = Checkpoint.open(folder / "source")
    stock = load_dense(source)
    with all_experts(model):
        got, want = (values_of(one, one(**example_inputs(name))) for one in (model, stock))
    assert ((got - want).norm() / want.norm()) < 1e-5
    sparse, dense = (
        moefy.load(folder / "out", dtype=torch.float64),
        load_dense(source, dtype=torch.float64),
    )
    with all_experts(sparse):
        for module, site in zip(sparse_mlps(sparse).values(), sites(dense), strict=True):
            x_TD = torch.randn(9, site.width, dtype=torch.float64)
            error = module(x_TD) - read_mlp(site, dense.get_parameter)(x_TD)
            assert error.abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_solver_and_distillation_end_to_end(name: str, tmp_path: Path) -> None:
    settings = {
        "budget.name": "solver",
        "distil.steps": "3",
        "distil.tokens": "100",
        "router.name": "mlp",
        "router.hidden": "8",
        "partition.expert_size": "4",
    }
    source = build(name, tmp_path / "source")
    record = convert_tiny(name, source, tmp_path / "out", settings=settings)
    tuning = record["conversion"]["tuning"]
    model = moefy.load(tmp_path / "out")
    modules = sparse_mlps(model)
    active = tuning["budget"]["active"]
    assert [m.selection.k for m in modules.values()] == active
    # The mean density is that of the recipe, or a little less.
    assert sum(active) <= 8 * len(active)
    assert sum(active) >= 0.6 * 8 * len(active)
    assert tuning["budget"]["held_out_kl"] <= tuning["budget"]["held_out_kl_uniform"]
    assert tuning["distillation"]["steps"] == 3
    assert record["evaluation"]["ffn_density"] == pytest.approx(
        sum(active) / (16 * len(active)), abs=1e-6
    )
    check_invariant(model, tmp_path, name)


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_target_kl_is_met_on_held_out_documents_with_no_more_than_it_takes(
    name: str, selection: str, tmp_path: Path
) -> None:
    source = build(name, tmp_path / "source")
    densities = []
    for target in ("1.0", "0.05", "0.001"):
        out = tmp_path / target
        settings = {"budget.target_kl": target, "budget.name": "solver", "density": "0.3"}
        settings["selection.name"] = selection
        record = convert_tiny(name, source, out, settings=settings)
        tuning = record["conversion"]["tuning"]
        assert tuning["budget"]["held_out_kl"] <= float(target)
        model = moefy.load(out)
        measured = naive_distance(model, held_out(model, source, name))
        assert measured == pytest.approx(tuning["held_out_kl"], rel=0.02, abs=1e-5)
        # Thresholds that are set once more move it a little.
        assert measured <= float(target) * (1.02 if selection == "topk" else 1.2)
        densities.append(record["evaluation"]["ffn_density"])
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]


def test_greedy_keeps_the_mean_density(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "source")
    settings = {"budget.name": "greedy", "partition.shared": "2", "partition.expert_size": "4"}
    record = convert_tiny("llama", source, tmp_path / "out", settings=settings)
    active = record["conversion"]["tuning"]["budget"]["active"]
    assert sum(active) <= 2 * (8 - 2)
    assert record["evaluation"]["ffn_density"] <= 0.5 + 1e-6


@pytest.mark.parametrize("compensation", list(COMPENSATIONS))
def test_every_compensation_leaves_the_dense_function_alone(
    compensation: str, tmp_path: Path
) -> None:
    source = build("opt", tmp_path / "source")
    settings = {"compensation.name": compensation, "compensation.rank": "4"}
    settings |= {"distil.steps": "2", "distil.tokens": "60"}
    convert_tiny("opt", source, tmp_path / "out", settings=settings)
    check_invariant(moefy.load(tmp_path / "out"), tmp_path, "opt")


def test_a_choice_that_measures_worse_than_uniform_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build("llama", tmp_path / "source")
    monkeypatch.setattr(tuning, "solve", lambda costs, *_: [0] * len(costs))
    settings = {"budget.name": "solver"}
    record = convert_tiny("llama", source, tmp_path / "out", settings=settings)
    budget = record["conversion"]["tuning"]["budget"]
    assert budget["kept"] == "uniform"
    assert budget["active"] == [4, 4]
    assert budget["held_out_kl"] == budget["held_out_kl_uniform"]


class Killed(BaseException):
    """What no handler of errors takes for an error."""


@pytest.mark.parametrize("where", ["within", "after"])
def test_a_run_killed_while_tuning_resumes_to_the_same_bytes(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    converting: Any = sys.modules["moefy.conversion.convert"]
    fitting: Any = sys.modules["moefy.conversion.in_memory"]
    source = build("llama", tmp_path / "source")
    settings = {"budget.name": "solver", "distil.steps": "3", "distil.tokens": "60"}
    convert_tiny("llama", source, tmp_path / "whole", settings=settings)
    tune, write = fitting.tune, converting._write

    def killed(*args: Any) -> None:
        if where == "within":
            tune(*args)
        raise Killed

    module, name = (fitting, "tune") if where == "within" else (converting, "_write")
    monkeypatch.setattr(module, name, killed)
    with pytest.raises(Killed):
        convert_tiny("llama", source, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(converting, "_write", write)
    # What was tuned is not tuned again.
    monkeypatch.setattr(fitting, "tune", tune if where == "within" else killed)
    with pytest.raises(MoefyError, match="--resume"):
        convert_tiny("llama", source, tmp_path / "out", settings=settings)
    convert_tiny("llama", source, tmp_path / "out", settings=settings, resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    records = [(tmp_path / n / "records.json").read_text() for n in ("out", "whole")]
    assert '"tuning": {}' not in records[0]


def test_an_unknown_budget_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "source")
    for settings, message in (
        ({"budget.name": "solve"}, "did you mean 'solver'"),
        ({"budget.per": "tokens"}, "budget.per"),
        ({"distil.scope": "modle"}, "did you mean 'model'"),
    ):
        with pytest.raises(RecipeError, match=message):
            convert_tiny("llama", source, tmp_path / "out", settings=settings)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]
