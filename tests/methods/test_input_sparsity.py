"""TEAL and WINA against masks made one entry at a time, and the weights they say they read.

Shapes: T tokens, D width, N neurons, I inputs of one matrix.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import build, example_inputs
from torch import Tensor

from moefy.evaluation.outputs import values_of
from moefy.experts.loading import load_dense, replace_module
from moefy.methods.input_sparsity import BASELINES, STEP, InputSparseMlp
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import read_mlp, sites
from moefy.models.mlp import DenseMlp

T, D, N = 200, 10, 24
KINDS = {"silu": ("silu", True), "relu": ("relu", False)}


def make_mlp(kind: str = "silu", seed: int = 0) -> DenseMlp:
    activation, gated = KINDS[kind]
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return DenseMlp(
        up_ND=draw(N, D) * draw(D).exp(),
        down_ND=draw(N, D) * draw(N, 1).exp(),
        gate_ND=draw(N, D) * draw(D).exp() if gated else None,
        up_bias_N=draw(N),
        gate_bias_N=draw(N) if gated else None,
        down_bias_D=draw(D),
        activation=activation,
    )


def inputs(tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def naive(module: InputSparseMlp, x_TD: Tensor) -> tuple[np.ndarray, dict[str, float]]:
    """Output and entries read per matrix, from the shares and thresholds alone."""
    mlp, read = module.mlp, dict.fromkeys(module.roles, 0.0)

    def keep(role: str, x: np.ndarray, weight_OI: np.ndarray) -> np.ndarray:
        if module.method == "teal":
            kept = [i for i, v in enumerate(x) if abs(v) > module.shares.threshold[role]]
        else:
            size = [abs(v) * np.sqrt((weight_OI[:, i] ** 2).sum()) for i, v in enumerate(x)]
            count = round(module.shares.kept[role] * len(x))
            kept = np.argsort(-np.array(size), kind="stable")[:count].tolist()
        read[role] += len(kept) / len(x)
        return np.array([v if i in kept else 0.0 for i, v in enumerate(x)])

    def numbers(value: Tensor | None) -> np.ndarray:
        return np.zeros(1) if value is None else value.double().numpy()

    rows = []
    for x in x_TD.double().numpy():
        up = numbers(mlp.up_ND) @ keep("up", x, numbers(mlp.up_ND)) + numbers(mlp.up_bias_N)
        if mlp.gate_ND is None:
            h = np.maximum(up, 0)
        else:
            gate = keep("gate", x, numbers(mlp.gate_ND))
            gate = numbers(mlp.gate_ND) @ gate + numbers(mlp.gate_bias_N)
            h = gate / (1 + np.exp(-gate)) * up
        down = numbers(mlp.down_ND).T
        rows.append(down @ keep("down", h, down) + numbers(mlp.down_bias_D))
    return np.array(rows), read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("density", [0.25, 0.5, 0.8])
def test_output_and_budget_are_those_of_a_plain_loop(
    method: str, kind: str, density: float
) -> None:
    module = InputSparseMlp(make_mlp(kind), method)
    module.calibrate(inputs(), density)
    shares = module.shares.kept.values()
    assert sum(shares) / len(module.roles) == pytest.approx(density)
    x_TD = inputs(90, 2)
    got = module(x_TD.view(3, 30, D))
    want, read = naive(module, x_TD)
    assert got.shape == (3, 30, D)
    error = np.linalg.norm(got.reshape(-1, D).double().numpy() - want) / np.linalg.norm(want)
    assert error < 1e-4
    dense = module.mlp(x_TD).double().numpy()
    if density < 0.8:
        assert np.linalg.norm(dense - want) > 1e-3 * np.linalg.norm(want)
    assert module.tokens == 90
    for role in module.roles:
        assert module.read[role] == pytest.approx(read[role], rel=1e-5)
    budget = sum(read.values()) / (90 * len(module.roles))
    assert module.active_budget() == pytest.approx(budget, rel=1e-5)
    # WINA keeps a number, TEAL what is above a value that fits the sample.
    assert budget == pytest.approx(density, abs=0.03 if method == "wina" else 0.15)


@pytest.mark.parametrize("method", BASELINES)
def test_teal_thresholds_are_quantiles_and_density_one_is_dense(method: str) -> None:
    mlp, x_TD = make_mlp(), inputs()
    module = InputSparseMlp(mlp, method)
    module.calibrate(x_TD, 1.0)
    assert torch.allclose(module(x_TD), mlp(x_TD), rtol=1e-4, atol=1e-4)
    assert module.active_budget() == 1
    module.calibrate(x_TD, 0.4)
    if method == "teal":
        parts = {"up": x_TD, "gate": x_TD, "down": mlp.hidden(x_TD)}
        for role, share in module.shares.kept.items():
            above = (parts[role].abs() > module.shares.threshold[role]).float().mean().item()
            assert above == pytest.approx(share, abs=2 / parts[role].numel() + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", BASELINES)
def test_shares_are_the_greedy_ones(method: str, kind: str) -> None:
    """Each step lowers the share of the matrix for which the output error is then least."""
    mlp, x_TD = make_mlp(kind), inputs(60)
    module, trial = InputSparseMlp(mlp, method), InputSparseMlp(mlp, method)
    module.calibrate(x_TD, 0.6)
    want_TD = mlp(x_TD).double().numpy()
    parts = {"up": x_TD, "gate": x_TD, "down": mlp.hidden(x_TD)}
    kept = dict.fromkeys(module.roles, 1.0)
    count, steps = len(module.roles), 0
    while sum(kept.values()) / count > 0.6 + 1e-9:
        step = min(STEP * count, sum(kept.values()) - 0.6 * count)
        errors = {}
        for role in module.roles:
            trial.shares.kept = {**kept, role: max(0.0, kept[role] - step)}
            for name, share in trial.shares.kept.items():
                ranked = parts[name].abs().flatten().sort().values
                place = round((1 - share) * (len(ranked) - 1))
                trial.shares.threshold[name] = -1.0 if share == 1 else ranked[place].item()
            errors[role] = ((naive(trial, x_TD)[0] - want_TD) ** 2).sum()
        best = min(errors, key=lambda role: errors[role])
        kept[best], steps = max(0.0, kept[best] - step), steps + 1
    assert steps == 8
    assert module.shares.kept == pytest.approx(kept)
    assert len(set(kept.values())) > 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "t5", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_stand_in_for_the_mlps_of_a_model(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(build(name, tmp_path / "source", dtype))
    model, dense = (load_dense(checkpoint) for _ in range(2))
    assert model.dtype == dtype
    for site in sites(dense):
        mlp = read_mlp(site, lambda n: dense.get_parameter(n).detach()).to(torch.float32)
        replace_module(model, site, InputSparseMlp(mlp.contiguous(), "wina"))
    want = values_of(dense, dense(**example_inputs(name))).float()
    got = values_of(model, model(**example_inputs(name))).float()
    assert got.dtype == want.dtype
    assert ((got - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 0.05)
    for module in model.modules():
        if isinstance(module, InputSparseMlp):
            module.calibrate(torch.randn(64, module.mlp.width), 0.3)
    sparse = values_of(model, model(**example_inputs(name))).float()
    assert sparse.isfinite().all()
    assert ((sparse - want).norm() / want.norm()) > 0.05
