"""Layers stored in codes, computed from those: what `moefy.native_codes` switches on."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import moefy
from moefy.experts.backends.codes import InCodes
from moefy.experts.routed import all_experts
from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.base import RoughCodes, Router
from moefy.methods.selections import Threshold, TopK
from moefy.methods.tables import COMPENSATIONS, ROUTERS
from moefy.models.mlp import DenseMlp
from moefy.models.quantised import QuantisedMlp
from moefy_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C++ compiler")
D, N = 96, 128
ROUNDED = 3e-2
"""Inputs and activations in 8 bits: a 254th of the largest of 32 each, which is three times their root mean square."""


class PlanesRouter(Router):
    """Scores by the rough gate and up, in plain torch."""

    reads_gate = True

    def __init__(self, stored: QuantisedMlp, planes: int) -> None:
        super().__init__()
        self.planes, self.matrices = planes, {name: stored.matrix(name) for name in ("gate", "up")}
        self.register_buffer("size_N", torch.rand(N))
        self.register_buffer("errors", torch.rand(2, 2, N) * 0.05)

    def rough_codes(self) -> RoughCodes:
        errors = {name: tuple(pair) for name, pair in zip(self.matrices, self.errors, strict=True)}
        return RoughCodes(self.planes, self.matrices, errors, self.size_N)

    def forward(self, x_TD, mlp):
        gate, up = (
            linear(x_TD.float(), self.matrices[name].rough(self.planes)) + self.errors[i, 0]
            for i, name in enumerate(self.matrices)
        )
        act = nn.functional.silu
        slope = (act(gate + 0.01) - act(gate - 0.01)) / 0.02
        square = (act(gate) ** 2 + slope**2 * self.errors[0, 1]) * (up**2 + self.errors[1, 1])
        return square.sqrt() * self.size_N


def layer(
    *, bits=4, scales=8, experts=N, shared=0, planes=2, selection=None, dtype=torch.float32, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    rows = {n: torch.randn(N, D, generator=generator) / D**0.5 for n in ("gate", "up", "down")}
    stored = QuantisedMlp.of(rows, bits, scales)
    values = {f"{name}_ND": stored.matrix(name).values(dtype) for name in rows}
    values["down_bias_D"] = torch.randn(D, generator=generator).to(dtype) * 0.1
    torch.manual_seed(seed)
    router = (
        PlanesRouter(stored, planes) if experts == N else ROUTERS["linear"](D, experts - shared)
    )
    for weight in router.parameters():
        nn.init.normal_(weight, generator=generator)
    module = SparseMlp(
        DenseMlp(activation="silu", stored=stored, **values), experts=experts, shared=shared, router=router,
        selection=selection or Threshold(0.4), compensation=COMPENSATIONS["none"](D, experts - shared, 0),
    )  # fmt: skip
    return module.eval()


def tokens(count=1, dtype=torch.float32, seed=1):
    return torch.randn(1, count, D, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2


@torch.no_grad()
def both(module, x):
    """By the codes and by their values, and the backend of the first."""
    want = moefy.native_codes(module, on=False)(x)
    got = moefy.native_codes(module)(x)
    return got, want, module.chosen


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def chosen_apart(module, x):
    """How many neurons a token runs if it runs those above the widest gap between scores, and the middle of it."""
    scores = module.router(x[0], module.weights)[0].sort(descending=True).values[20:80]
    at = int((scores[:-1] / scores[1:]).argmax())
    return 21 + at, float((scores[at] * scores[at + 1]).sqrt())


@pytest.mark.parametrize("kind", ["threshold", "most", "topk"])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_the_planes_choose_as_the_router_does(kind, planes):
    module, x = layer(planes=planes), tokens()
    k, level = chosen_apart(module, x)
    module.selection = {
        "threshold": Threshold(level), "most": Threshold(level / 2, most=k), "topk": TopK(k)
    }[kind]  # fmt: skip
    got, want, chosen = both(module, x)
    assert chosen == "codes" and int(module.mask(x[0]).sum()) == k
    assert error(got, want) < ROUNDED
    with torch.no_grad(), all_experts(module):
        assert error(module(x), want) > 2 * ROUNDED
    five = torch.cat([x, tokens(4, seed=9)], 1)
    with torch.no_grad():
        assert error(module(five)[:, :1], got) < 1e-5
        assert error(module(five)[:, 3:4], module(five[:, 3:4])) < 1e-5


@pytest.mark.parametrize("scales", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shared", [0, 1])
def test_experts_of_any_router(bits, scales, shared):
    module = layer(bits=bits, scales=scales, experts=8, shared=shared, selection=TopK(3))
    got, want, chosen = both(module, tokens(3))
    assert chosen == "codes" and error(got, want) < ROUNDED
    with torch.no_grad(), all_experts(module):
        got, want, chosen = both(module, tokens(3))
    assert chosen == "codes" and error(got, want) < ROUNDED


@pytest.mark.parametrize("planes", [0, 2])
@torch.no_grad()
def test_bf16_is_rounded_at_the_end(planes):
    module = layer(dtype=torch.bfloat16, **({} if planes else {"experts": 8, "selection": TopK(3)}))
    x = tokens(dtype=torch.bfloat16)
    if planes:
        module.selection = Threshold(chosen_apart(module, x)[1])
    got, want, chosen = both(module, x)
    assert got.dtype == torch.bfloat16 and chosen == "codes"
    assert error(got, want) < ROUNDED + 2**-7  # of both: weights' values and outputs in 8 bits each
    assert error(got, moefy.native_codes(module, on=False)(x * 1.1)) > ROUNDED + 2**-7


@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_what_compensates_is_added(kind):
    module, x = layer(), tokens()
    k, level = chosen_apart(module, x)
    module.selection = Threshold(level) if kind == "threshold" else TopK(k)
    bare, _, _ = both(module, x)
    module.compensation = COMPENSATIONS["residual"](D, N, 2)
    for parameter in module.compensation.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
    got, want, chosen = both(module, x)
    assert chosen == "codes" and error(got, want) < ROUNDED < error(bare, want)


def write_to_weights(module):
    module.up_ND.data[:1].mul_(2)
    module.up_ND.mul_(1)


def write_to_router(module):
    module.router.size_N.copy_(module.router.size_N.flip(0) * 2)


def write_to_bias(module):
    module.down_bias_D.mul_(3)


def store_others(module):
    module.store(layer(seed=7).stored)


@pytest.mark.parametrize("change", [write_to_weights, write_to_bias, write_to_router, store_others])
@torch.no_grad()
def test_what_is_written_to_is_read_anew(change):
    module, x = layer(), tokens()
    before, _, _ = both(module, x)
    change(module)
    got, chosen = module(x), module.chosen
    anew, _, _ = both(module, x)  # `native_codes` forgets what was laid out
    assert torch.equal(got, anew) and not torch.equal(got, before)
    assert (chosen == "codes") == (change is not write_to_weights)


def test_copies_and_pickles_compute_the_same():
    module, x = layer(), tokens()
    got, _, _ = both(module, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            assert torch.equal(other(x), got) and other.chosen == "codes"


def test_training_many_tokens_and_listeners_stay_with_the_values():
    module = moefy.native_codes(layer())
    module(tokens()).sum().backward()
    assert module.chosen != "codes" and module.up_ND.grad is not None
    with torch.no_grad():
        module(tokens(17))
        assert module.chosen != "codes"
        module.observer = lambda *_: None
        module(tokens())
        assert module.chosen != "codes"
        module.observer = None
        module(tokens(16))
        assert module.chosen == "codes"


@pytest.mark.parametrize("planes", [5, 8])
def test_planes_that_no_kernel_reads_are_left_to_the_router(planes):
    module, x = layer(bits=8, planes=planes), tokens()
    module.selection = Threshold(chosen_apart(module, x)[1])
    got, want, chosen = both(module, x)
    assert chosen == "codes" and error(got, want) < ROUNDED


def test_a_layer_without_codes_decodes_as_before():
    module = layer(experts=8, selection=TopK(3))
    with torch.no_grad():
        module.store(None)
        want = module(tokens())
        moefy.native_codes(module)
        module._one_token = None
        assert torch.equal(module(tokens()), want) and module._one_token is not None


def test_weights_that_come_and_go_are_laid_out_once():
    module, x = layer(), tokens()
    both(module, x)
    held = module._in_codes
    for name in ("up_ND", "gate_ND", "down_ND"):  # as accelerate does before a layer runs
        setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
    with torch.no_grad():
        module(x)
    assert module.chosen == "codes" and module._in_codes is held


def test_another_router_is_seen_wherever_it_lies():
    module, x = layer(), tokens()
    moefy.native_codes(module)
    for seed in range(20):
        # Freed first: the next one may lie where this one did.
        module.router = None
        torch.manual_seed(seed)
        module.router = PlanesRouter(module.stored, 2)
        with torch.no_grad():
            assert torch.equal(module(x), copy.deepcopy(module)(x))


def test_nothing_does_so_unasked():
    module = layer()
    with torch.no_grad():
        module(tokens())
    assert module.chosen != "codes"


@pytest.mark.parametrize("scales", [8, 16])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_bit_planes_score_as_their_router_does(scales, activation):
    module = layer(scales=scales)
    router = ROUTERS["bit_planes"].make(
        D, N, N, {"bits": 2, "settings": {"gated": True, "codes": 4}}
    )
    mlp = dataclasses.replace(module.weights, activation=activation)
    router.initialise(mlp, tokens(50, seed=3)[0], mlp)
    held, x = InCodes(mlp, router, []), tokens(5)[0]
    assert held.judges
    # Codes with 16-bit scales have planes of their own, with 8-bit ones those of the weights.
    assert held.packed.numbers[6] == (scales == 8)
    with torch.no_grad():
        assert error(held.packed.scores(x), router(x, mlp)) < ROUNDED
        assert error(held.packed.scores(x), router(x, mlp).roll(1, 1)) > 0.3
