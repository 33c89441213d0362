"""Routers that look ahead: the choice for a layer is made of the input of the MLP before it."""

from pathlib import Path

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs
from torch import Tensor

import moefy
from moefy.evaluation.outputs import values_of
from moefy.experts.loading import load_dense
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import sites


def look_ahead(name: str, folder: Path, router: str = "mlp") -> Path:
    settings = {"router.look_ahead": "true", "router.name": router, "router.hidden": "8"}
    convert_tiny(name, build(name, folder / "source"), folder / "out", settings=settings)
    return folder / "out"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5", "opt"])
def test_look_ahead_reads_the_input_of_the_mlp_before(name: str, tmp_path: Path) -> None:
    out = look_ahead(name, tmp_path)
    model = moefy.load(out)
    modules = sparse_mlps(model)
    # The first MLP of each side has none before it and reads itself.
    sides = [m.look_ahead for m in modules.values()]
    assert sides == ([False, True] * (2 if name == "t5" else 1))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for index, module in modules.items():
        module.observer = lambda x_TD, mask_TE, at=index: seen.update({at: (x_TD, mask_TE)})
    model(**example_inputs(name))
    for index, module in modules.items():
        read_TD = seen[index - 1][0] if module.look_ahead else seen[index][0]
        want = module.selection(module.router(read_TD, module.routed))
        assert torch.equal(seen[index][1], want)
        if module.look_ahead:
            own = module.selection(module.router(seen[index][0], module.routed))
            assert not torch.equal(own, want)
    with all_experts(model):
        stock = load_dense(Checkpoint.open(tmp_path / "source"))
        got, want = (
            values_of(model, model(**example_inputs(name))),
            values_of(stock, stock(**example_inputs(name))),
        )
        assert ((got - want).norm() / want.norm()) < 1e-5
        assert len(sites(stock)) == len(modules)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_look_ahead_decodes_with_a_cache_as_without(name: str, tmp_path: Path) -> None:
    model = moefy.load(look_ahead(name, tmp_path))
    ids = example_inputs(name)["input_ids"][:1]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    if name == "t5":
        options["decoder_start_token_id"] = 1
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    if name != "t5":
        plain = values_of(model, model(cached))[0, ids.shape[1] - 1 : -1]
        assert torch.equal(plain.argmax(-1), cached[0, ids.shape[1] :])


@torch.no_grad()
def test_look_ahead_is_fitted_on_the_layer_before(tmp_path: Path) -> None:
    """The first layer, which reads itself, comes out the same; the second does not."""
    ahead = moefy.load(look_ahead("llama", tmp_path / "ahead", "linear"))
    settings = {"router.look_ahead": "false", "router.name": "linear"}
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "out", settings=settings)
    own = moefy.load(tmp_path / "out")
    weights = [[m.router.weight for m in sparse_mlps(model).values()] for model in (ahead, own)]
    assert torch.equal(weights[0][0], weights[1][0])
    assert not torch.equal(weights[0][1], weights[1][1])
