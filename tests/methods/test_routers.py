"""Routers, targets and losses against plain loops in fp64; self-gating in modules.

Shapes: T tokens, D width, N neurons, S shared and E routed experts, F neurons per expert.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs
from torch import Tensor
from torch.nn.functional import silu

import moefy
from moefy.conversion.fit import LayerTokens, predicted
from moefy.errors import MoefyError, RecipeError
from moefy.evaluation.outputs import values_of
from moefy.experts.backends import BACKENDS
from moefy.experts.routed import straight_through
from moefy.experts.sparse_mlp import SparseMlp, all_experts, use_backend
from moefy.methods.base import Router
from moefy.methods.selections import top_mask
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.methods.targets import LOSSES, TARGETS
from moefy.models.mlp import DecidedMlp, DenseMlp
from moefy.models.quantised import QuantisedMlp

T, D, F, E, S = 40, 9, 5, 6, 2
N = E * F
KINDS = {"silu": ("silu", True), "relu": ("relu", False), "gelu": ("gelu", False)}


def make_mlp(kind: str = "silu", neurons: int = N, seed: int = 0) -> DenseMlp:
    activation, gated = KINDS[kind]
    g = torch.Generator().manual_seed(seed)
    return DenseMlp(
        up_ND=torch.randn(neurons, D, generator=g),
        down_ND=torch.randn(neurons, D, generator=g),
        gate_ND=torch.randn(neurons, D, generator=g) if gated else None,
        activation=activation,
    )


def inputs(tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def act(kind: str, value: float) -> float:
    if kind == "silu":
        return value / (1 + math.exp(-value))
    if kind == "gelu":
        return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))
    return max(value, 0.0)


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in row))
    return [v / length for v in row]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def made(name: str, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp | None = None) -> Router:
    torch.manual_seed(7)
    router = ROUTERS[name].make(D, mlp.neurons // F, mlp.neurons, {"hidden": 4})
    router.initialise(mlp, x_TD, whole or mlp)
    return router


def check(got_TE: Tensor, want: list[list[float]], tolerance: float = 1e-5) -> None:
    """Near to the reference; a swap of two experts or a token left out would not be."""
    want_TE = torch.tensor(want, dtype=torch.float64)
    assert got_TE.shape == want_TE.shape
    error = ((got_TE.detach().double() - want_TE).norm() / want_TE.norm()).item()
    assert error < tolerance
    assert (want_TE.roll(1, 1) - want_TE).norm() > 0.02 * want_TE.norm()


# ---- each router by a plain loop


def rows_of(mlp: DenseMlp) -> tuple[list[list[float]], list[list[float]]]:
    gate = mlp.up_ND if mlp.gate_ND is None else mlp.gate_ND
    return gate.double().tolist(), mlp.up_ND.double().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_mean_gate_is_the_product_with_the_mean_row(kind: str) -> None:
    mlp, x_TD = make_mlp(kind), inputs()
    gate, _ = rows_of(mlp)
    want = []
    for x in x_TD.double().tolist():
        each = [dot(x, row) for row in gate]
        want.append([sum(each[e * F : (e + 1) * F]) / F for e in range(E)])
    check(made("mean_gate", mlp, x_TD)(x_TD, mlp), want)


@pytest.mark.parametrize("kind", KINDS)
def test_tanh_mlp_starts_at_the_mean_of_normalised_rows(kind: str) -> None:
    mlp, x_TD = make_mlp(kind), inputs()
    gate = [unit(row) for row in rows_of(mlp)[0]]
    router = made("tanh_mlp", mlp, x_TD)

    def layer(x: list[float]) -> list[float]:
        each = [dot(unit(x), row) for row in gate]
        return [math.tanh(sum(each[e * F : (e + 1) * F]) / F) for e in range(E)]

    want = [layer(x) for x in x_TD.double().tolist()]
    check(router(x_TD, mlp), want)
    second = torch.randn(E, E)
    router.output.weight.data.copy_(second)  # type: ignore[union-attr, operator]
    want = [[dot(h, row) for row in second.double().tolist()] for h in want]
    check(router(3 * x_TD, mlp), want)  # tokens are normalised
    assert not any(name.endswith("bias") for name in router.state_dict())


@pytest.mark.parametrize("name", ["low_rank", "mlp", "norm_regression"])
def test_fitted_routers_by_a_plain_loop(name: str) -> None:
    mlp, x_TD = make_mlp(), inputs()
    router = made(name, mlp, x_TD)
    weight = {key: value.double().tolist() for key, value in router.state_dict().items()}
    want = []
    for x in x_TD.double().tolist():
        if name == "low_rank":
            h = [dot(x, row) for row in weight["down.weight"]]
            want.append([dot(h, row) for row in weight["up.weight"]])
            continue
        pairs = zip(weight["hidden.weight"], weight["hidden.bias"], strict=True)
        h = [max(dot(x, row) + b, 0.0) for row, b in pairs]
        pairs = zip(weight["output.weight"], weight["output.bias"], strict=True)
        y = [dot(h, row) + b for row, b in pairs]
        want.append([abs(v) for v in y] if name == "norm_regression" else y)
    check(router(x_TD, mlp), want)
    assert router.weights_read(mlp) == sum(v.numel() for v in router.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_activation_is_the_norm_of_the_activations(kind: str) -> None:
    mlp, x_TD = make_mlp(kind), inputs()
    gate, up = rows_of(mlp)
    want = []
    for x in x_TD.double().tolist():
        h = [act(kind, dot(x, g)) for g in gate]
        if mlp.gate_ND is not None:
            h = [a * dot(x, u) for a, u in zip(h, up, strict=True)]
        want.append([math.sqrt(sum(v * v for v in h[e * F : (e + 1) * F])) for e in range(E)])
    check(made("activation", mlp, x_TD)(x_TD, mlp), want)
    assert not ROUTERS["activation"].deployable


def test_self_gating_is_the_norm_of_the_gates_and_needs_one() -> None:
    mlp, x_TD = make_mlp(), inputs()
    gate, _ = rows_of(mlp)
    want = []
    for x in x_TD.double().tolist():
        h = [act("silu", dot(x, g)) for g in gate]
        want.append([math.sqrt(sum(v * v for v in h[e * F : (e + 1) * F])) for e in range(E)])
    router = made("self_gating", mlp, x_TD)
    check(router(x_TD, mlp), want)
    assert router.weights_read(mlp) == N * D
    with pytest.raises(RecipeError, match="choose another router"):
        made("self_gating", make_mlp("relu"), x_TD)


def test_static_is_the_root_mean_square_contribution() -> None:
    mlp, x_TD = make_mlp(), inputs()
    h, down = mlp.hidden(x_TD).double(), mlp.down_ND.double()
    want = []
    for e in range(E):
        y_TD = torch.stack(
            [h[t, e * F : (e + 1) * F] @ down[e * F : (e + 1) * F] for t in range(T)]
        )
        want.append(math.sqrt(y_TD.square().sum(1).mean()))
    router = made("static", mlp, x_TD)
    check(router(inputs(3, 9), mlp), [want] * 3)
    assert router.weights_read(mlp) == 0


def test_random_is_standardised_and_drawn_once() -> None:
    mlp, x_TD = make_mlp(), inputs(400)
    router = made("random", mlp, x_TD)
    score_TE = router(x_TD, mlp)
    assert score_TE.mean(0).abs().max() < 1e-5
    assert (score_TE.std(0) - 1).abs().max() < 1e-5
    # Linear in the token: nothing but a projection.
    check(router(x_TD[:1] + x_TD[1:2], mlp) + router(x_TD[:1] * 0, mlp),
          (router(x_TD[:1], mlp) + router(x_TD[1:2], mlp)).tolist())  # fmt: skip
    other = ROUTERS["random"](D, E)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(x_TD, mlp), score_TE)
    counts = top_mask(score_TE, 2).sum(0)
    assert counts.min() > 60


def naive_markers(kind: str, mlp: DenseMlp, x_TD: Tensor) -> list[list[int]]:
    """CMoE's markers `[T][N]`: the ten largest activations of normalised rows and tokens."""
    gate, up = rows_of(mlp)
    table = []
    for x in x_TD.double().tolist():
        strength = []
        for g, u in zip(gate, up, strict=True):
            h = act(kind, dot(unit(x), unit(g)))
            strength.append(abs(h * dot(unit(x), unit(u)) if mlp.gate_ND is not None else h))
        first = sorted(range(len(strength)), key=lambda n: -strength[n])[:10]
        table.append([int(n in first) for n in range(len(strength))])
    return table


@pytest.mark.parametrize("shared", [0, S])
@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_representative_is_the_neuron_nearest_to_its_experts_markers(
    kind: str, shared: int
) -> None:
    whole, x_TD = make_mlp(kind, neurons=(shared + E) * F), inputs()
    routed = whole.take(slice(shared * F, None))
    markers = naive_markers(kind, whole, x_TD)  # among all neurons, the shared ones too
    gate, up = rows_of(routed)
    chosen = []
    for e in range(E):
        columns = [[row[(shared + e) * F + f] for row in markers] for f in range(F)]
        mean = [sum(c[t] for c in columns) / F for t in range(T)]
        far = [sum(abs(c[t] - mean[t]) for t in range(T)) for c in columns]
        nearest = [f for f in range(F) if far[f] < min(far) + 1e-9]
        chosen.append([e * F + f for f in nearest])
    router = made("representative", routed, x_TD, whole)

    def score(x: list[float], n: int) -> float:
        h = act(kind, dot(x, unit(gate[n])))
        return abs(h * dot(x, unit(up[n])) if routed.gate_ND is not None else h)

    got = router(x_TD, routed)
    picked = []
    for e in range(E):  # of equally near neurons any will do, but it must be one of them
        columns = [[score(x, n) for x in x_TD.double().tolist()] for n in chosen[e]]
        away = [(torch.tensor(c) - got[:, e]).norm().item() for c in columns]
        picked.append(columns[away.index(min(away))])
    check(got, [list(row) for row in zip(*picked, strict=True)])
    assert router.weights_read(routed) == E * D * (1 if routed.gate_ND is None else 2)


def naive_quantised(row: list[float], bits: int) -> list[float]:
    """One group of weights on the odd multiples of half the scale that errs least."""
    top, best = (2**bits - 1) / 2, None
    largest = max(abs(v) for v in row)
    trials = [largest * clip / top for clip in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)]
    if bits == 1:
        trials.insert(0, 2 * sum(abs(v) for v in row) / len(row))
    for trial in trials:
        scale = torch.tensor(trial).half().item()
        levels = [(n + 0.5) * scale for n in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
        rough = [min(levels, key=lambda level, v=v: abs(level - v)) for v in row]
        error = sum((a - b) ** 2 for a, b in zip(rough, row, strict=True))
        if best is None or error < best[0]:
            best = (error, rough)
    assert best is not None
    return best[1]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 70, 130])
def test_low_bit_is_the_contribution_that_a_rough_gate_foretells(
    bits: int, kind: str, width: int
) -> None:
    activation, gated = KINDS[kind]
    g = torch.Generator().manual_seed(width)
    rows = [torch.randn(N, width, generator=g) for _ in range(3)]
    mlp = DenseMlp(
        up_ND=rows[0],
        down_ND=rows[1] * torch.rand(N, 1, generator=g),
        gate_ND=rows[2] if gated else None,
        activation=activation,
    )
    x_TD = torch.randn(30, width, generator=g)
    router = ROUTERS["low_bit"].make(width, E, N, {"bits": bits})
    router.initialise(mlp, x_TD, mlp)
    gate, up = rows_of(mlp)
    rough = [
        [v for at in range(0, width, 64) for v in naive_quantised(row[at : at + 64], bits)]
        for row in gate
    ]
    size = [d.norm().item() for d in mlp.down_ND.double()]
    if gated:
        for n in range(N):
            squares = [dot(x, up[n]) ** 2 for x in x_TD.double().tolist()]
            size[n] *= math.sqrt(sum(squares) / len(squares))
    want = []
    for x in x_TD.double().tolist():
        each = [(act(kind, dot(x, row)) * c) ** 2 for row, c in zip(rough, size, strict=True)]
        want.append([math.sqrt(sum(each[e * F : (e + 1) * F])) for e in range(E)])
    check(router(x_TD, mlp), want, 1e-4)
    groups = -(-width // 64)
    assert router.weights_read(mlp) == N * groups * 64 * bits // 16 + N * groups + N


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", [1, 4, D])
def test_largest_inputs_is_the_contribution_that_a_part_of_the_gate_foretells(
    reads: int, kind: str
) -> None:
    mlp, x_TD = make_mlp(kind), inputs()
    router = ROUTERS["largest_inputs"].make(D, E, N, {"inputs": reads})
    router.initialise(mlp, x_TD, mlp)
    gate, up = rows_of(mlp)
    tokens = x_TD.double().tolist()
    column = [math.sqrt(sum(row[d] ** 2 for row in gate)) for d in range(D)]
    size = [d.norm().item() for d in mlp.down_ND.double()]
    if mlp.gate_ND is not None:
        for n in range(N):
            size[n] *= math.sqrt(sum(dot(x, up[n]) ** 2 for x in tokens) / len(tokens))
    want = []
    for x in tokens:
        largest = sorted(range(D), key=lambda d, x=x: -abs(x[d]) * column[d])[:reads]
        kept = [x[d] if d in largest else 0.0 for d in range(D)]
        each = [(act(kind, dot(kept, row)) * c) ** 2 for row, c in zip(gate, size, strict=True)]
        want.append([math.sqrt(sum(each[e * F : (e + 1) * F])) for e in range(E)])
    check(router(x_TD, mlp), want, 1e-4)
    assert router.computes_gate == (reads == D)
    others = N + (0 if reads == D else D)
    assert router.weights_read(mlp) == N * reads + others
    assert router.bits_read(mlp) == 16 * router.weights_read(mlp)
    matrices = {"gate": mlp.gate_ND, "up": mlp.up_ND, "down": mlp.down_ND}
    stored = QuantisedMlp.of({k: v for k, v in matrices.items() if v is not None}, 4, 8)
    rounded = replace(mlp, stored=stored)
    # A code of 4 bits; of every row one group of 8-bit scale and offset, and two fp16 for the row.
    columns = N * reads * (4 + (2 * 8 + 2 * 16) / D)
    assert router.bits_read(rounded) == pytest.approx(columns + 16 * others)
    assert router.bits_reused(rounded) == pytest.approx(columns if reads == D else 0)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_single_neurons_that_are_off_score_by_how_far_they_are(activation: str) -> None:
    mlp = replace(make_mlp("relu"), activation=activation)
    x_TD = inputs()
    router = ROUTERS["largest_inputs"].make(D, N, N, {"inputs": D})
    router.initialise(mlp, x_TD, mlp)
    gate_TN, size_N = x_TD.double() @ mlp.up_ND.double().T, mlp.down_ND.double().norm(dim=1)
    power = 2 if activation == "relu2" else 1
    want_TN = gate_TN.sign() * gate_TN.abs() ** power * size_N
    got_TN = router(x_TD, mlp).double()
    assert ((got_TN - want_TN).norm() / want_TN.norm()) < 1e-5
    assert (got_TN < 0).any()


# ---- self-gating inside a module


def sparse_module(mlp: DenseMlp, shared: int = 0) -> SparseMlp:
    experts = mlp.neurons // F
    router = ROUTERS["self_gating"](D, experts - shared)
    module = SparseMlp(
        mlp,
        experts=experts,
        shared=shared,
        router=router,
        selection=SELECTIONS["topk"](3),
        compensation=COMPENSATIONS["none"](D, experts - shared, 0),
    )
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(("tokens", "shared"), [(1, S), (3, 0), (17, S)])
def test_self_gating_makes_gates_once_and_the_output_is_that_of_masking(
    backend: str, tokens: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp, x_TD = make_mlp(neurons=(shared + E) * F), inputs(tokens)
    module = sparse_module(mlp, shared)
    module.backend = backend
    calls = []
    gates = DenseMlp.deciding
    monkeypatch.setattr(DenseMlp, "deciding", lambda *a: calls.append(a[1].shape) or gates(*a))
    got = module(x_TD)
    assert calls[0] == (tokens, D)
    # `auto` measures both backends, on gates that are known all the same.
    assert len(calls) == 1
    x, down = x_TD.double(), mlp.down_ND.double()
    gate_TN = silu(x @ mlp.gate_ND.double().T)  # type: ignore[union-attr]
    h_TN = gate_TN * (x @ mlp.up_ND.double().T)
    want = torch.zeros(tokens, D, dtype=torch.float64)
    for t in range(tokens):
        norms = [gate_TN[t, (shared + e) * F : (shared + e + 1) * F].norm() for e in range(E)]
        best = sorted(range(E), key=lambda e: -norms[e])[:3]
        for e in [*range(shared), *(shared + e for e in best)]:
            want[t] += h_TN[t, e * F : (e + 1) * F] @ down[e * F : (e + 1) * F]
    assert ((got.double() - want).norm() / want.norm()) < 1e-5
    with all_experts(module):
        dense = module(x_TD).double()
        assert ((dense - h_TN @ down).norm() / dense.norm()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [0, S])
def test_an_exact_gate_is_handed_on_with_and_without_up(
    backend: str, kind: str, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp, x_TD = make_mlp(kind, neurons=(shared + E) * F), inputs(5)
    routed = mlp.take(slice(shared * F, None))
    router = ROUTERS["largest_inputs"].make(D, E, E * F, {"inputs": D})
    router.initialise(routed, inputs(), mlp)
    module = SparseMlp(
        mlp, experts=shared + E, shared=shared, router=router,
        selection=SELECTIONS["topk"](3), compensation=COMPENSATIONS["none"](D, E, 0),
    ).eval()  # fmt: skip
    module.backend = backend
    calls: list[int] = []
    deciding = DenseMlp.deciding
    monkeypatch.setattr(DenseMlp, "deciding", lambda *a: calls.append(1) or deciding(*a))
    got = module(x_TD)
    assert len(calls) == 1
    mask_TE = top_mask(router(x_TD, routed), 3)
    mask_TN = torch.cat([mask_TE.new_ones(5, shared), mask_TE], 1).repeat_interleave(F, 1)
    want = (mlp.hidden(x_TD) * mask_TN).double() @ mlp.down_ND.double()
    assert ((got.double() - want).norm() / want.norm()) < 1e-5
    dense = mlp(x_TD).double()
    assert ((got.double() - dense).norm() / dense.norm()) > 0.05


@torch.no_grad()
def test_known_gates_go_with_their_tokens() -> None:
    mlp, x_TD = make_mlp(), inputs(6)
    known = DecidedMlp(mlp, silu(mlp.deciding(x_TD)))
    token_C = torch.tensor([4, 1])
    got = known.at(token_C).hidden(x_TD[token_C], slice(3, 11))
    assert torch.allclose(got, mlp.hidden(x_TD)[token_C, 3:11])
    assert mlp.at(token_C) is mlp


@torch.no_grad()
def test_look_ahead_by_itself_says_what_it_needs() -> None:
    module = sparse_module(make_mlp())
    module.router = made("linear", make_mlp(), inputs())
    module.look_ahead = True
    with pytest.raises(MoefyError, match="needs the MLP before it"):
        module(inputs())


@torch.no_grad()
def test_self_gating_in_a_model_is_the_same_with_every_backend(tmp_path: Path) -> None:
    settings = {"router.name": "self_gating", "selection.name": "threshold", "seed": "1"}
    convert_tiny("llama", build("llama", tmp_path / "s"), tmp_path / "o", settings=settings)
    model, results = moefy.load(tmp_path / "o"), []
    ids = example_inputs("llama")["input_ids"][:, :3]
    for backend in [*BACKENDS, "auto"]:
        use_backend(model, backend)
        results.append(values_of(model, model(ids)))
    for other in results[1:]:
        assert ((other - results[0]).norm() / results[0].norm()) < 1e-5


# ---- targets and losses


def test_targets_by_a_plain_loop() -> None:
    mlp, x_TD = make_mlp(), inputs()
    h, down = mlp.hidden(x_TD).double(), mlp.down_ND.double()
    mean = [sum(h[t, n].item() for t in range(T)) / T for n in range(N)]
    want: dict[str, list[list[float]]] = {name: [] for name in TARGETS}
    for t in range(T):
        each = [h[t, e * F : (e + 1) * F] for e in range(E)]
        want["contribution"].append(
            [(each[e] @ down[e * F : (e + 1) * F]).norm().item() for e in range(E)]
        )
        want["activation"].append([each[e].abs().sum().item() for e in range(E)])
        want["deviation"].append(
            [sum((each[e][f].item() - mean[e * F + f]) ** 2 for f in range(F)) for e in range(E)]
        )
    for name, target in TARGETS.items():
        check(target(mlp.hidden(x_TD), mlp, E), want[name])
        check(predicted(target, mlp, LayerTokens(x_TD, x_TD), E), want[name])


def test_targets_do_not_depend_on_how_the_sample_is_cut() -> None:
    """The last chunk of a sample may hold a single token, whose own mean it is."""
    mlp, x_TD = make_mlp(), inputs(4097)
    for target in TARGETS.values():
        got = predicted(target, mlp, LayerTokens(x_TD, x_TD), E)
        want = target(mlp.hidden(x_TD), mlp, E)
        assert ((got - want).norm() / want.norm()) < 1e-5
        assert got[-1].norm() > 0.1 * want[-1].norm()


def cross_entropy(score: float, probability: float) -> float:
    p = 1 / (1 + math.exp(-score))
    return -(probability * math.log(p) + (1 - probability) * math.log(1 - p))


@pytest.mark.parametrize("dead", [0.0, 0.6])
def test_losses_by_a_plain_loop(dead: float) -> None:
    g = torch.Generator().manual_seed(3)
    k, rows = 2, 12
    scores_BE = torch.randn(rows, E, generator=g)
    target_BE = torch.randn(rows, E, generator=g).abs()
    target_BE *= torch.rand(rows, E, generator=g) >= dead
    scores, target = scores_BE.double().tolist(), target_BE.double().tolist()
    top = [sorted(range(E), key=lambda e: -row[e])[:k] for row in target]
    pairs = [(b, e) for b in range(rows) for e in range(E)]

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    largest = max(max(row) for row in target)
    weight = [[v * v / max(mean([w * w for w in row]), 1e-30) for v in row] for row in target]
    alive = mean([float(target[b][e] > 0) for b, e in pairs])
    if alive > 0.9:
        on = {(b, e): float(e in top[b]) for b, e in pairs}
    else:
        on = {(b, e): float(target[b][e] > 0) for b, e in pairs}
    share = mean(list(on.values())) + 0.005
    want = {
        "weighted_topk": mean(
            [weight[b][e] * cross_entropy(scores[b][e], float(e in top[b])) for b, e in pairs]
        ),
        "share_of_largest": mean(
            [cross_entropy(scores[b][e], target[b][e] / largest) for b, e in pairs]
        ),
        "norm_mse": mean([(scores[b][e] - target[b][e]) ** 2 for b, e in pairs]),
        "any_active": mean(
            [(1.0 if on[b, e] else share) * cross_entropy(scores[b][e], on[b, e]) for b, e in pairs]
        ),
    }
    assert set(want) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert loss(scores_BE, target_BE, k).item() == pytest.approx(want[name], rel=1e-5)


# ---- straight-through


def test_straight_through_is_the_hard_mask_with_the_gradient_of_a_sigmoid() -> None:
    g = torch.Generator().manual_seed(0)
    scores_TE = torch.randn(T, E, generator=g, requires_grad=True)
    hard_TE = top_mask(scores_TE.detach(), 2)
    hard_TE[0], hard_TE[1] = True, False
    mask_TE = straight_through(scores_TE, hard_TE)
    assert torch.equal(mask_TE, hard_TE.float())
    weight_TE = torch.randn(T, E, generator=g)
    (mask_TE * weight_TE).sum().backward()
    for t in range(T):
        on = [s for s, m in zip(scores_TE[t].tolist(), hard_TE[t].tolist(), strict=True) if m]
        away = [s for s, m in zip(scores_TE[t].tolist(), hard_TE[t].tolist(), strict=True) if not m]
        middle = (min(on) + max(away)) / 2 if on and away else 0.0
        for e in range(E):
            p = 1 / (1 + math.exp(middle - scores_TE[t, e].item()))
            want = p * (1 - p) * weight_TE[t, e].item()
            assert scores_TE.grad[t, e].item() == pytest.approx(want, rel=1e-4, abs=1e-7)  # type: ignore[index]
