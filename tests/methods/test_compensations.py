"""Compensations against plain loops and numpy; what stands in for experts that are off.

Shapes: T tokens, D width, N neurons, E experts, F neurons per expert, R rank.
"""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from moefy.methods.base import Compensation
from moefy.methods.compensations import RIDGE
from moefy.methods.tables import COMPENSATIONS
from moefy.models.mlp import DenseMlp

T, D, N, E, R = 900, 10, 48, 6, 3
F = N // E
Chunks = list[tuple[Tensor, Tensor, Tensor]]


def make_mlp(seed: int = 0, *, gated: bool = True) -> DenseMlp:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / 3

    return DenseMlp(
        up_ND=draw(N, D),
        down_ND=draw(N, D),
        gate_ND=draw(N, D) if gated else None,
        up_bias_N=draw(N),
        activation="silu" if gated else "relu",
    )


def sample(mlp: DenseMlp, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a mean far from zero, activations, and masks that depend on the input."""
    g = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=g) + 2 * torch.randn(D, generator=g)
    h_TN = mlp.hidden(x_TD)
    score_TE = torch.stack([h_TN[:, e * F : (e + 1) * F].norm(dim=1) for e in range(E)], 1)
    return x_TD, h_TN, score_TE > score_TE.median() * (0.4 + torch.rand(E, generator=g))


def chunks(x_TD: Tensor, h_TN: Tensor, mask_TE: Tensor) -> Chunks:
    """Unequal chunks of tokens: a fit must not depend on how the sample is cut."""
    sizes = [400, 1, 350, T - 751]
    return list(zip(x_TD.split(sizes), h_TN.split(sizes), mask_TE.split(sizes), strict=True))


def outputs(mlp: DenseMlp, h_TN: Tensor) -> np.ndarray:
    """What every expert adds `[T, E, D]`, one at a time, in fp64."""
    h, down = h_TN.double().numpy(), mlp.down_ND.double().numpy()
    return np.stack([h[:, e * F : (e + 1) * F] @ down[e * F : (e + 1) * F] for e in range(E)], 1)


def fitted(name: str, mlp: DenseMlp, made: Chunks) -> Compensation:
    compensation = COMPENSATIONS[name].make(D, E, N, R)
    compensation.fit(made, mlp)
    return compensation


def relative(got: Tensor | np.ndarray, want: np.ndarray) -> float:
    got = got.double().numpy() if isinstance(got, Tensor) else got
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def naive_means(y_TED: np.ndarray, mask_TE: Tensor, *, conditional: bool) -> np.ndarray:
    rows = []
    for e in range(E):
        kept = [y_TED[t, e] for t in range(T) if not (conditional and mask_TE[t, e])]
        rows.append(np.mean(kept, axis=0) if kept else np.zeros(D))
    return np.array(rows)


def naive_regression(
    x_TD: np.ndarray, share_T: np.ndarray, target_TD: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The best rank-`rank` ridge map and bias, by centring and an SVD of the augmented problem.

    Minimises `sum |s (W'x + b) - y|^2 + ridge |W|^2` over W of the rank and any b.
    """
    z = share_T[:, None]
    inputs = x_TD * z
    ridge = RIDGE * np.mean((inputs**2).sum(0))
    along = z / (z.T @ z)
    left = inputs - z @ (along.T @ inputs)
    wanted = target_TD - z @ (along.T @ target_TD)
    a = np.concatenate([left, np.sqrt(ridge) * np.eye(x_TD.shape[1])])
    b = np.concatenate([wanted, np.zeros((x_TD.shape[1], target_TD.shape[1]))])
    full = np.linalg.lstsq(a, b, rcond=None)[0]
    _, _, directions = np.linalg.svd(a @ full, full_matrices=False)
    weight = full @ directions[:rank].T @ directions[:rank]
    bias = (along.T @ (target_TD - inputs @ weight))[0]
    loss = ((z * (x_TD @ weight + bias) - target_TD) ** 2).sum() + ridge * (weight**2).sum()
    return weight, bias, float(loss)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["mean", "conditional_mean"])
def test_means_are_those_of_a_plain_loop(name: str, gated: bool) -> None:
    mlp = make_mlp(gated=gated)
    x_TD, h_TN, mask_TE = sample(mlp)
    assert 0.2 < mask_TE.float().mean() < 0.9
    compensation = fitted(name, mlp, chunks(x_TD, h_TN, mask_TE))
    y_TED = outputs(mlp, h_TN)
    want_ED = naive_means(y_TED, mask_TE, conditional=name == "conditional_mean")
    other_ED = naive_means(y_TED, mask_TE, conditional=name != "conditional_mean")
    assert relative(compensation.mean_ED, want_ED) < 1e-5
    assert relative(other_ED, want_ED) > 1e-2
    added = compensation(x_TD, mask_TE)
    naive = np.zeros((T, D))
    for t in range(T):
        for e in range(E):
            naive[t] += 0 if mask_TE[t, e] else want_ED[e]
    assert relative(added, naive) < 1e-5


def test_residual_is_reduced_rank_regression() -> None:
    mlp = make_mlp()
    x_TD, h_TN, mask_TE = sample(mlp)
    compensation = fitted("residual", mlp, chunks(x_TD, h_TN, mask_TE))
    off_TE = ~mask_TE.numpy()
    target_TD = (outputs(mlp, h_TN) * off_TE[..., None]).sum(1)
    x, share_T = x_TD.double().numpy(), off_TE.mean(1)
    weight, bias, best = naive_regression(x, share_T, target_TD, R)
    got = (compensation.up_RD.T @ compensation.down_RD).T.double().numpy()
    assert np.linalg.matrix_rank(got, tol=1e-4) == R
    assert relative(got, weight) < 1e-3
    assert relative(compensation.bias_D, bias) < 1e-3
    naive = share_T[:, None] * (x @ weight + bias)
    assert relative(compensation(x_TD, mask_TE), naive) < 1e-4
    # Neither another share nor the best map without a bias comes near.
    assert relative(compensation(x_TD, ~mask_TE), naive) > 0.1
    _, _, worse = naive_regression(x, share_T, target_TD, R - 1)
    assert best < 0.95 * worse


def test_mean_residual_fits_the_residual_to_what_the_means_leave() -> None:
    mlp = make_mlp()
    x_TD, h_TN, mask_TE = sample(mlp)
    compensation = fitted("mean_residual", mlp, chunks(x_TD, h_TN, mask_TE))
    y_TED, off_TE = outputs(mlp, h_TN), ~mask_TE.numpy()
    mean_ED = naive_means(y_TED, mask_TE, conditional=True)
    left_TD = ((y_TED - mean_ED) * off_TE[..., None]).sum(1)
    x, share_T = x_TD.double().numpy(), off_TE.mean(1)
    weight, bias, _ = naive_regression(x, share_T, left_TD, R)
    naive = off_TE @ mean_ED + share_T[:, None] * (x @ weight + bias)
    assert relative(compensation(x_TD, mask_TE), naive) < 1e-4
    assert relative(off_TE @ mean_ED, naive) > 0.05


def test_each_richer_compensation_leaves_less_error() -> None:
    mlp = make_mlp()
    x_TD, h_TN, mask_TE = sample(mlp)
    want_TD = (outputs(mlp, h_TN) * ~mask_TE.numpy()[..., None]).sum(1)
    left = {}
    for name in COMPENSATIONS:
        added = fitted(name, mlp, chunks(x_TD, h_TN, mask_TE))(x_TD, mask_TE)
        left[name] = 1.0 if added is None else relative(added, want_TD)
    assert left["mean_residual"] < left["conditional_mean"] < left["none"]
    assert left["residual"] < left["none"]
    assert left["conditional_mean"] <= left["mean"]


@pytest.mark.parametrize("name", list(COMPENSATIONS))
def test_nothing_is_added_where_every_expert_runs(name: str) -> None:
    mlp = make_mlp()
    x_TD, h_TN, mask_TE = sample(mlp)
    compensation = fitted(name, mlp, chunks(x_TD, h_TN, mask_TE))
    for tokens in (1, 7):
        for dtype in (torch.bool, torch.float32):
            every = torch.ones(tokens, E, dtype=dtype)
            added = compensation(x_TD[:tokens], every)
            assert added is None or torch.equal(added, torch.zeros(tokens, D))


@pytest.mark.parametrize("name", list(COMPENSATIONS))
def test_fitting_where_every_expert_runs_adds_nothing(name: str) -> None:
    mlp = make_mlp()
    x_TD, h_TN, mask_TE = sample(mlp)
    compensation = fitted(name, mlp, chunks(x_TD, h_TN, torch.ones_like(mask_TE)))
    assert all(value.isfinite().all() for value in compensation.state_dict().values())
    if name in ("conditional_mean", "residual", "mean_residual"):
        assert not any(value.any() for value in compensation.state_dict().values())


def one_by_one(compensation: Compensation, x_TD: Tensor, mask_TE: Tensor) -> Tensor:
    rows = [compensation(x_TD[t : t + 1], mask_TE[t : t + 1]) for t in range(len(x_TD))]
    return torch.cat([row for row in rows if row is not None])


@pytest.mark.parametrize("name", sorted(set(COMPENSATIONS) - {"none", "centred"}))
def test_one_token_equals_many_after_every_kind_of_change(name: str) -> None:
    """One token may read the sum of all means, which is kept: it must never be an old one."""
    mlp = make_mlp()
    x_TD, h_TN, mask_TE = sample(mlp)
    made = chunks(x_TD, h_TN, mask_TE)
    compensation = fitted(name, mlp, made)
    x_TD = x_TD[: 2**E]
    # Every subset of experts, so that both ways of adding rows are taken.
    mask_TE = torch.tensor([[bool(t >> e & 1) for e in range(E)] for t in range(2**E)])

    def check(compensation: Compensation) -> None:
        x = x_TD.to(next(iter(compensation.state_dict().values())).dtype)
        many = compensation(x, mask_TE).double().numpy()
        assert relative(one_by_one(compensation, x, mask_TE), many) < 1e-5
        assert torch.equal(
            compensation(x[:1], mask_TE[-1:]), torch.zeros(1, D, dtype=x.dtype)
        )  # all of them run

    check(compensation)
    state = {key: 3 * value + 1 for key, value in compensation.state_dict().items()}
    compensation.load_state_dict(state)
    check(compensation)
    # A fit in the same place, as it happens for every candidate of a budget.
    other = make_mlp(5)
    compensation.fit([(x, other.hidden(x), m) for x, _, m in made], other)
    check(compensation)
    # Training.
    for parameter in compensation.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(compensation.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        compensation(x_TD, mask_TE.float()).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            check(compensation)
    # A copy that goes another way, and another dtype.
    twin = copy.deepcopy(compensation)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-2)
        check(twin)
        check(compensation)
        # Other tensors in the place of the old ones.
        for parameter in twin.parameters():
            parameter.data = torch.randn(parameter.shape)
        check(twin)
        check(compensation.to(torch.float64))


def test_one_token_gives_the_means_the_same_gradient_as_many() -> None:
    mlp = make_mlp()
    x_TD, h_TN, mask_TE = sample(mlp)
    compensation = fitted("conditional_mean", mlp, chunks(x_TD, h_TN, mask_TE))
    compensation.mean_ED.requires_grad_(True)
    mask_TE = torch.tensor([[False] * (E - 1) + [True]])
    compensation(x_TD[:1], mask_TE).sum().backward()
    assert torch.equal(compensation.mean_ED.grad, (~mask_TE).float().T.expand(E, D))


def test_means_made_in_inference_mode_can_be_used() -> None:
    with torch.inference_mode():
        compensation = COMPENSATIONS["conditional_mean"](D, E, R)
        compensation.mean_ED.data.copy_(torch.arange(E * D).view(E, D))
        few = torch.tensor([[True] + [False] * (E - 1)])
        got = compensation(torch.zeros(1, D), few)
        assert torch.equal(got[0], compensation.mean_ED[1:].sum(0))


def test_weights_read_is_what_is_read() -> None:
    mean = COMPENSATIONS["mean"](D, E, R)
    assert [mean.weights_read(a) for a in range(E + 1)] == [
        D * min(E - a, a + 1) for a in range(E + 1)
    ]
    assert COMPENSATIONS["residual"](D, E, R).weights_read(2) == 2 * R * D + D
    assert COMPENSATIONS["mean_residual"](D, E, R).weights_read(2) == 2 * R * D + D + 3 * D
    assert COMPENSATIONS["none"](D, E, R).weights_read(2) == 0
