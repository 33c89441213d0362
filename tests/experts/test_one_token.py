"""One token after the other through a layer that was described once: always the weights of now."""

import copy

import pytest
import torch
from torch import nn

from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.mlp import DenseMlp
from moefy_kernels import masked_mlp
from moefy_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C++ compiler")
D, N, E = 24, 64, 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def layer(dtype=torch.float32, *, gated=True, biased=False, shared=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) / D**0.5).to(dtype)

    rows = {name: draw(N, D) for name in ("up_ND", "down_ND", *(["gate_ND"] if gated else []))}
    if biased:
        rows |= {"up_bias_N": draw(N), "down_bias_D": draw(D)}
        rows |= {"gate_bias_N": draw(N)} if gated else {}
    router = ROUTERS["linear"](D, E - shared)
    nn.init.normal_(router.weight, generator=generator)
    return SparseMlp(
        DenseMlp(activation="silu", **rows), experts=E, shared=shared, router=router,
        selection=SELECTIONS["topk"](k=2), compensation=COMPENSATIONS["none"](D, E - shared, 0),
    ).eval()  # fmt: skip


def token(dtype=torch.float32, seed=1):
    drawn = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype)


@torch.no_grad()
def wanted(module, x):
    """The definition, in fp64, from what the module holds now."""
    x = x.reshape(1, D)
    scores = x.double() @ module.router.weight.double().T
    mask = torch.zeros(1, E, dtype=torch.bool)
    mask[0, : module.shared] = True
    mask[0, module.shared + scores[0].topk(2).indices] = True
    names = ("up_ND", "down_ND", "gate_ND", "up_bias_N", "gate_bias_N", "down_bias_D")
    held = {name: getattr(module, name) for name in names}
    mlp = DenseMlp(activation="silu", **{n: v.double() for n, v in held.items() if v is not None})
    return masked_mlp(x.double(), mlp, mask).view(1, 1, D)


@torch.no_grad()
def error(module, x):
    want = wanted(module, x)
    return float((module(x).double() - want).norm() / want.norm())


def described(module):
    """The module, with its description made and used."""
    x = token(module.up_ND.dtype)
    assert error(module, x) < TOLERANCE[x.dtype]
    assert module.chosen == "native" and module._one_token is not None
    return module


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_what_fp64_gives_and_what_every_other_path_gives(dtype, gated, biased):
    module = described(layer(dtype, gated=gated, biased=biased))
    x = token(dtype, seed=2)
    with torch.no_grad():
        got = module(x)
        assert torch.equal(module(x.view(1, D)), got.view(1, D))
        for backend in ("masked", "views", "native"):
            module.backend = backend
            assert (module(x) - got).norm() <= TOLERANCE[dtype] * got.norm()


def change_in_place(module):
    module.gate_ND.mul_(2)


def replace_a_parameter(module):
    module.up_ND = nn.Parameter(module.up_ND.flip(0).clone())


def move_the_data(module):
    module.down_ND.data = module.down_ND.data.roll(1, 0).clone()


def load_a_state(module):
    module.load_state_dict(layer(module.up_ND.dtype, seed=5).state_dict())


def assign_a_state(module):
    module.load_state_dict(layer(module.up_ND.dtype, seed=5).state_dict(), assign=True)


def change_the_router(module):
    module.router.weight.neg_()


def let_a_neuron_off(module):
    # The same place, another shape: half of every expert's neurons.
    for name in ("up_ND", "down_ND", "gate_ND"):
        getattr(module, name).data = getattr(module, name).data[: N // 2]


def other_dtype(module):
    module.to(torch.bfloat16 if module.up_ND.dtype == torch.float32 else torch.float32)


CHANGES = (
    change_in_place, replace_a_parameter, move_the_data, load_a_state, assign_a_state,
    change_the_router, let_a_neuron_off, other_dtype,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_it_follows_the_weights(change, dtype):
    module = described(layer(dtype))
    before = wanted(module, token(dtype))
    with torch.no_grad():
        change(module)
    if change is not other_dtype:
        assert (wanted(module, token(dtype)) - before).norm() > TOLERANCE[dtype] * before.norm()
    described(module)


def test_a_copy_reads_its_own_weights():
    module = described(layer())
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.down_ND.mul_(3)
    assert error(described(twin), token()) < 1e-5
    assert error(module, token()) < 1e-5


def test_whoever_asks_for_more_gets_it():
    module = described(layer())
    x, seen = token(), []
    module.observer = lambda x_TD, mask_TE: seen.append(mask_TE)
    with torch.no_grad():
        module(x)
    assert seen[0].shape == (1, E) and int(seen[0].sum()) == 3
    module.observer = None
    with torch.no_grad():
        got = module(x, x)
        assert torch.allclose(got, module(x) + x)
        module.all_on = True
        assert torch.allclose(module(x), module.weights(x), atol=1e-6)
        module.all_on = False
    # Gradients are torch's.
    module(x).sum().backward()
    assert module.chosen == "masked" and module.down_ND.grad.abs().sum() > 0


def test_a_compensation_is_not_left_out():
    module = layer()
    module.compensation = COMPENSATIONS["mean"](D, E - 1, 0)
    for parameter in module.compensation.parameters():
        nn.init.normal_(parameter)
    without = layer()
    with torch.no_grad():
        assert (module(token()) - without(token())).norm() > 0.1 * without(token()).norm()
