"""The native CPU kernels against fp64: every shape, every part of a layer, every instruction set there is."""

import ctypes
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

import moefy
from moefy.experts.backends.base import ACTIVATIONS, Request
from moefy.experts.backends.cpu import native_backend, native_linears, serves
from moefy.experts.loading import load_dense
from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.checkpoint import Checkpoint
from moefy.models.mlp import DecidedMlp, DenseMlp, activation_function
from moefy_kernels import masked_mlp
from moefy_kernels.cpu import library
from moefy_kernels.cpu.experts import native_experts
from moefy_kernels.cpu.linear import linear as few_tokens
from moefy_kernels.cpu.linear import native_linear

DEMO = Path(moefy.__file__).parent / "demo" / "llama"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Relative Frobenius error. In bf16 only the output is rounded: 2**-9 of each number at most."""
pytestmark = pytest.mark.skipif(library.library() is None, reason="no C++ compiler")


def draw(seed, *shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)


def layer(
    tokens=4, width=40, experts=5, size=7, dtype=torch.float32, activation="silu", gated=True,
    biased=True, centred=True, active=0.5, seed=0,
):  # fmt: skip
    neurons = experts * size
    names = ["up_ND", "down_ND", *(["gate_ND"] if gated else [])]
    rows = {name: draw(seed + i, neurons, width, dtype=dtype) for i, name in enumerate(names)}
    vectors = {}
    if biased:
        vectors |= {"up_bias_N": neurons, "down_bias_D": width}
        vectors |= {"gate_bias_N": neurons} if gated else {}
    if centred:
        vectors["centre_N"] = neurons
    held = {n: draw(seed + 9, 1, size, dtype=dtype)[0] for n, size in vectors.items()}
    mlp = DenseMlp(activation=activation, **rows, **held)
    mask = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < active
    return draw(seed + 20, 1, tokens * width, dtype=dtype).mul(20).view(tokens, width), mlp, mask


def wanted(x, mlp, mask):
    return masked_mlp(x.double(), mlp.to(torch.float64), mask)


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 3, 5, 6, 7, 16, 49, 100, 515]),
    width=st.sampled_from([1, 3, 8, 16, 40, 48, 130, 304, 1027]),
    count=st.integers(1, 9),
    size=st.sampled_from([1, 3, 4, 32, 33, 130]),
    dtype=st.sampled_from(list(TOLERANCE)),
    activation=st.sampled_from(sorted(set(ACTIVATIONS) - {"gelu_python", "gelu_fast"})),
    gated=st.booleans(),
    biased=st.booleans(),
    centred=st.booleans(),
    active=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_any_layer_is_what_fp64_gives(dtype, count, **shape):
    x, mlp, mask = layer(dtype=dtype, experts=count, **shape)
    got = native_backend(x, mlp, mask)
    assert got.dtype == dtype
    want = wanted(x, mlp, mask)
    if want.abs().max() == 0:
        assert not got.any()
    else:
        # What cancels in the sum is counted by the size of what is added.
        parts = wanted(x, mlp, torch.ones_like(mask)).norm() / mask.shape[1] ** 0.5
        bound = TOLERANCE[dtype] * max(want.norm(), parts if dtype == torch.float32 else 0)
        assert (got.double() - want).norm() <= bound


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_mutations_are_seen(tokens, dtype):
    x, mlp, mask = layer(tokens=tokens, dtype=dtype)
    mask[:, 0], mask[:, 1] = True, False
    want, got = wanted(x, mlp, mask), native_backend(x, mlp, mask)
    swapped = mask[:, [1, 0, 2, 3, 4]]
    dropped = got.clone()
    dropped[-1] = 0
    assert error(got, want) < TOLERANCE[dtype]
    for wrong in (torch.zeros_like(got), dropped, native_backend(x, mlp, swapped)):
        assert error(wrong, want) > 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 9])
def test_gates_that_a_router_has_computed_are_not_computed_again(tokens, gated):
    x, mlp, mask = layer(tokens=tokens, gated=gated)
    active = activation_function("silu")(mlp.deciding(x))
    want = wanted(x, mlp, mask)
    assert error(native_backend(x, DecidedMlp(mlp, active), mask), want) < 1e-5
    assert error(native_backend(x, DecidedMlp(mlp, 2 * active), mask), want) > 0.1


def test_experts_are_weighed():
    x, mlp, mask = layer(biased=False, centred=False)
    weight = torch.rand(mask.shape)
    got = native_experts(x, weight * mask, mlp.down_ND, "silu", mlp.gate_ND, mlp.up_ND)
    h = mlp.hidden(x).double() * (weight * mask).double().repeat_interleave(7, 1)
    assert error(got, h @ mlp.down_ND.double()) < 1e-5


def test_the_number_of_threads_changes_no_bit():
    threads = torch.get_num_threads()
    try:
        for tokens, dtype in itertools.product((1, 5, 70), TOLERANCE):
            # Columns are shared out in stretches that are no multiples of a cache line.
            x, mlp, mask = layer(tokens=tokens, width=304, size=33, dtype=dtype)
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append(native_backend(x, mlp, mask))
            assert all(torch.equal(results[0], other) for other in results[1:])
            assert error(results[0], wanted(x, mlp, mask)) < TOLERANCE[dtype]
    finally:
        torch.set_num_threads(threads)


def test_rows_may_lie_apart_and_inputs_anyhow():
    x, mlp, mask = layer(tokens=6, biased=False, centred=False)
    fused = torch.cat([mlp.gate_ND, mlp.up_ND], 1)
    strided = torch.stack([x, x], 2)[..., 0]
    got = native_experts(strided, mask, mlp.down_ND, "silu", fused[:, :40], fused[:, 40:])
    assert error(got, wanted(x, mlp, mask)) < 1e-5


def test_nan_and_infinity_are_passed_on():
    x, mlp, mask = layer(tokens=3, activation="relu", centred=False)
    mask[:] = True
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    got = native_backend(x, mlp, mask)
    assert got[0].isnan().all() and not got[1].isfinite().all() and got[2].isfinite().all()


def test_what_the_kernel_does_not_compute_is_refused():
    x, mlp, mask = layer()

    def fits(x_TD, weights):
        return serves(Request(x_TD, weights, mask)) is None

    assert fits(x, mlp)
    assert not fits(x.half(), mlp.to(torch.float16))
    assert not fits(x, mlp.to(torch.bfloat16))
    assert not fits(x.requires_grad_(), mlp)
    assert not fits(x.detach(), layer(activation="tanh")[1])
    module = SparseMlp(
        layer(activation="tanh")[1], experts=5, shared=0, router=ROUTERS["linear"](40, 5),
        selection=SELECTIONS["topk"](k=2), compensation=COMPENSATIONS["none"](40, 5, 0),
    ).requires_grad_(False)  # fmt: skip
    module.backend = "native"
    got = module.compute(x.detach(), mask, module.weights)
    assert module.chosen == "views" and error(got, wanted(x.detach(), module.weights, mask)) < 1e-5
    with pytest.raises(ValueError, match="fp32 or bf16"):
        native_experts(x.detach().half(), mask, mlp.down_ND, "silu", mlp.gate_ND, mlp.up_ND)
    with pytest.raises(ValueError, match="either"):
        native_experts(x.detach(), mask, mlp.down_ND, "silu")


def test_it_compiles_without_a_break():
    x, mlp, mask = layer(tokens=2)
    args = (x, mask, mlp.down_ND, "silu", mlp.gate_ND, mlp.up_ND)
    compiled = torch.compile(native_experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), native_experts(*args))
    tensors = (x, mask, mlp.down_ND, mlp.gate_ND, mlp.up_ND, None, None, None, None, None, "silu")
    torch.library.opcheck(torch.ops.moefy.native_experts.default, tensors)
    weight_ND, bias_N = draw(1, 5, x.shape[1]), draw(2, 5)
    torch.library.opcheck(torch.ops.moefy.native_linear.default, (x, weight_ND, bias_N))
    straight = torch.compile(few_tokens, fullgraph=True, backend="aot_eager")
    assert torch.equal(straight(x, weight_ND, bias_N), native_linear(x, weight_ND, bias_N))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 60),
    width=st.sampled_from([1, 7, 64, 1100]),
    rows=st.integers(1, 70),
    dtype=st.sampled_from(list(TOLERANCE)),
    biased=st.booleans(),
)
def test_a_linear_map_is_what_fp64_gives(tokens, width, rows, dtype, biased):
    x, w = draw(0, tokens, width, dtype=dtype), draw(1, rows, width, dtype=dtype)
    bias = draw(2, 1, rows, dtype=dtype)[0] if biased else None
    want = linear(x.double(), w.double(), None if bias is None else bias.double())
    got = native_linear(x, w, bias)
    size = x.double().norm() * w.double().norm()
    assert (got.double() - want).norm() < TOLERANCE[dtype] * (want.norm() + 0.1 * size)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86")
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_every_instruction_set_is_built_and_used(name, tmp_path):
    path = library.build(name, tmp_path)
    assert ctypes.CDLL(str(path)).moefy_experts is not None
    assert library.build(name, tmp_path) == path and len(list(tmp_path.iterdir())) == 1
    listing = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True).stdout
    if listing:
        register = {"avx512": "zmm", "avx2": "ymm", "portable": "xmm"}[name]
        fused = ["vfmadd"] if name != "portable" else ["mulps"]
        assert all(f"%{register}" in listing and word in listing for word in fused)
        assert ("zmm" in listing) == (name == "avx512")


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="no cross compiler for 64-bit ARM"
)
def test_it_compiles_for_arm(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    built = library.build("neon", tmp_path).read_bytes()
    assert built[:4] == b"\x7fELF" and built[18] == 183  # the number of 64-bit ARM


def test_one_source_in_one_form_serves_every_instruction_set():
    """What runs with 16 lanes is what runs with 8 and 4: only their number depends on the set.

    But for integers.h, which is there to hold what no compiler makes of its own vector types.
    """
    files = [file for file in (*library.SOURCES, *library.HEADERS) if file.name != "integers.h"]
    assert {file.name for file in files} == {"experts.cpp", "quantised.cpp", "rows.h"}
    source = "".join(file.read_text() for file in files)
    assert not re.search(r"\b_mm\d*_|\bv\w+q_[fsu]\d+|__builtin_ia32|intrin\.h|arm_neon\.h", source)
    conditions = re.findall(r"#(?:if|elif|ifdef|ifndef)\b.*?#endif", source, flags=re.DOTALL)
    lanes = [text for text in conditions if "__AVX" in text or "__ARM" in text]
    assert len(lanes) == 1
    chosen = [line for line in lanes[0].splitlines() if not line.startswith("#")]
    assert [re.sub(r"\d+", "N", line) for line in chosen] == ["constexpr int LANES = N;"] * 3


def test_sources_ask_for_nothing_that_gcc_or_clang_lacks():
    source = "".join(file.read_text() for file in (*library.SOURCES, *library.HEADERS))
    assert set(re.findall(r"__builtin_\w+", source)) == {
        "__builtin_convertvector", "__builtin_prefetch"
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no Clang")
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_it_compiles_with_clang(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "clang++")
    assert library.build(name, tmp_path).is_file()


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


PROBE = """
import torch
from moefy_kernels.cpu import library
from moefy_kernels.cpu.experts import native_experts, serves
w = torch.randn(4, 8); x = torch.randn(2, 8)
print(library.instruction_set(), serves(x, w), serves(x, w))
if serves(x, w):
    y = native_experts(x, torch.ones(2, 1), w, "relu", w)
    print(torch.allclose(y, (x @ w.T).relu() @ w, atol=1e-5))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86")
def test_a_smaller_instruction_set_can_be_asked_for(tmp_path):
    done = run_python(PROBE, ATEN_CPU_CAPABILITY="default", XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["portable", "True", "True", "True"], done.stderr


def test_without_a_compiler_torch_computes_and_says_so_once(tmp_path):
    done = run_python(PROBE, CXX="/no/such/compiler", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0 and "False False" in done.stdout
    assert done.stderr.count("Install a C++ compiler") == 1, done.stderr


def test_a_model_with_native_linears_gives_the_same_logits():
    model = load_dense(Checkpoint.open(DEMO)).float().eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        want, few = model(ids).logits, model(ids[:, :5]).logits
        assert native_linears(model) is model
        used = [m for m in model.modules() if "forward" in vars(m)]
        assert len(used) == sum(type(m) is nn.Linear for m in model.modules()) > 0
        assert torch.equal(model(ids).logits, want)  # more tokens than the kernel takes
        got = model(ids[:, :5]).logits
        assert 0 < error(got, few.double()) < 1e-5
    # Training is torch's.
    model(ids[:, :5]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    native_linears(model, on=False)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :5]).logits, few)
