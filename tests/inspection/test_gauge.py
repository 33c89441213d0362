"""A rescale of neurons that leaves the function alone, or another order of them, changes no number."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build

from moefy.data.corpus import Corpus, Document
from moefy.experts.loading import load, load_dense, moefied
from moefy.inspection.controls import seeds
from moefy.inspection.inspect import describe
from moefy.inspection.part import Pass
from moefy.inspection.texts import read
from moefy.models.artefact import read_artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import permute, read_mlp, sites

OF_NEURONS = ("families",)
"""Tables whose rows name neurons by their place."""
ORDERED = ("examples", "tokens", "logits", "pairs", "enrichment")
"""Tables that are cut off at a rank, where what is almost equal may change places."""
CASES = ("llama", "opt")


def texts():
    """Two domains that use other tokens."""
    g = torch.Generator().manual_seed(4)
    found = []
    for i in range(60):
        low, high = ((3, 60), (30, 90))[i % 2]
        ids = torch.randint(low, high, (20 + i % 9,), generator=g).tolist()
        found.append(Document(f"d{i % 2}", str(i), ids=tuple(ids)))
    return Corpus("two", found)


@torch.no_grad()
def transformed(name, folder, *, exact):
    """The same function and experts from a checkpoint with other scales, signs and order."""
    model = load_dense(Checkpoint.open(folder / "source"))
    artefact = read_artefact(folder / "out")
    g = torch.Generator().manual_seed(7)
    tensors = dict(artefact.tensors)
    for site in sites(model):
        mlp = read_mlp(site, lambda n: model.get_parameter(n).detach())
        power_N = torch.randint(-3, 4, (mlp.neurons,), generator=g).float()
        scale_N = power_N.exp2() if exact else torch.randn(mlp.neurons, generator=g).exp()
        if mlp.gate_ND is not None:
            scale_N *= torch.randint(0, 2, (mlp.neurons,), generator=g) * 2 - 1
        mlp.up_ND.mul_(scale_N[:, None])
        mlp.down_ND.div_(scale_N[:, None])
        if mlp.up_bias_N is not None:
            mlp.up_bias_N.mul_(scale_N)
        if exact:
            continue
        mixed_N = torch.randperm(mlp.neurons, generator=g)
        for key in site.neuron_axes:
            parameter = model.get_parameter(key)
            parameter.copy_(permute(site, key, parameter.clone(), mixed_N))
        size = mlp.neurons // artefact.layers[site.index].experts
        within_N = torch.cat(
            [first + torch.randperm(size, generator=g) for first in range(0, mlp.neurons, size)]
        )
        order_N = mixed_N.argsort()[artefact.permutation(site.index)[within_N]]
        tensors[f"layers.{site.index}.permutation"] = order_N.to(torch.int32)
    moefied(model, replace(artefact, tensors=tensors), permute=True)
    return model


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """Name, folder, reading and tables of a converted model."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder / "source")
    convert_tiny(request.param, folder / "source", folder / "out")
    model = load(folder / "out")
    reading = read(model, texts())
    return request.param, folder, reading, tables_of(model, reading)


def tables_of(model, reading):
    found = describe(Pass(model, reading))
    for name, given in seeds(model, reading, count=2).items():
        found[name] = found[name] | given
    return found


def same(a, b, tolerance):
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    return a == b


def differences(want, got, tolerance, skip=()):
    assert want.keys() == got.keys()
    found = []
    for name in want.keys() - set(skip):
        assert want[name].keys() == got[name].keys()
        for column, values in want[name].items():
            others = got[name][column]
            if len(values) != len(others):
                found.append((name, column, len(values), len(others)))
            pairs = zip(values, others, strict=False)
            found += [(name, column, a, b) for a, b in pairs if not same(a, b, tolerance)]
    return found


def test_powers_of_two_and_signs_change_nothing_at_all(made):
    name, folder, reading, want = made
    got = tables_of(transformed(name, folder, exact=True), reading)
    assert differences(want, got, 0.0) == []
    assert len(want["experts"]["expert"]) == 16
    assert {"oracle_energy", "stability"} < want["experts"].keys()


def test_other_scales_and_another_order_change_no_number(made):
    name, folder, reading, want = made
    got = tables_of(transformed(name, folder, exact=False), reading)
    found = differences(want, got, 2e-3, (*OF_NEURONS, *ORDERED))
    assert found == []
    for cut in ORDERED:
        assert want[cut].keys() == got[cut].keys()


def test_a_rescale_that_changes_the_function_is_seen(made):
    name, folder, reading, want = made
    model = transformed(name, folder, exact=True)
    with torch.no_grad():
        model.get_parameter(next(n for n, _ in model.named_parameters() if "down_ND" in n))[:8] *= (
            1.5
        )
    got = tables_of(model, reading)
    assert any(row[0] == "experts" for row in differences(want, got, 2e-3))
