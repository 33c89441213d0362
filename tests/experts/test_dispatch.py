"""Which kernel is chosen: the fastest that is expected to serve, by what is known without asking the GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moefy.experts.backends import fastest, on_gpu
from moefy.experts.backends.base import Request, Workload
from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.mlp import DecidedMlp, DenseMlp
from moefy_kernels import dispatch
from moefy_kernels.dispatch import MOST, seconds
from moefy_kernels.roofline import Layer

LLAMA = Layer(4096, 14336, 128)
DEVICE = "NVIDIA H200"
PATHS = ("masked", "decode", "union", "grouped")


def choose(device, layer, tokens, density, share=None):
    return fastest(PATHS, Workload(device, layer, tokens, density, share))


def test_every_regime_has_its_kernel():
    assert choose(DEVICE, LLAMA, 1, 0.25) == "decode"
    assert choose(DEVICE, LLAMA, 4, 0.25) == "union"
    assert choose(DEVICE, LLAMA, 4096, 0.25) == "grouped"
    assert choose(DEVICE, LLAMA, 1, 1.0) == "masked"
    # At 64 tokens a quarter of the experts each is nearly all of them, unless tokens agree.
    assert choose(DEVICE, LLAMA, 64, 0.25) == "masked"
    assert choose(DEVICE, LLAMA, 64, 0.25, share=0.4) == "union"
    # Every small expert adds to the whole width of its tokens' outputs.
    assert choose(DEVICE, LLAMA._replace(size=16), 4096, 0.5) == "masked"


@given(
    tokens=st.integers(1, 5000),
    density=st.floats(0.01, 1.0),
    size=st.sampled_from([1, 16, 32, 128, 512]),
    device=st.sampled_from(["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X", "none"]),
)
def test_what_is_chosen_serves_and_is_the_fastest(tokens, density, size, device):
    layer = LLAMA._replace(size=size)
    path = choose(device, layer, tokens, density)
    assert tokens <= MOST.get(path, tokens)
    times = {p: seconds(p, device, layer, tokens, density) for p in PATHS}
    assert times[path] == min(times.values())


def test_known_devices_are_found_by_the_names_that_torch_gives():
    assert dispatch.known_device("NVIDIA H200").bandwidth == 4.3e12  # measured before published
    assert dispatch.known_device("NVIDIA A100-SXM4-80GB").name == "A100-80GB"
    assert dispatch.known_device("NVIDIA H100 80GB HBM3").name == "H100 SXM"
    assert dispatch.known_device("a device of tomorrow").name == "H100 SXM"


def test_what_was_measured_on_a_device_decides(monkeypatch):
    tables = {"kernels": {}, "reached": {"decode": 0.01}}
    monkeypatch.setattr(dispatch, "table", lambda device: tables)
    fastest.cache_clear()
    assert choose(DEVICE, LLAMA, 1, 0.25) != "decode"
    fastest.cache_clear()


@pytest.fixture
def module():
    mlp = DenseMlp(
        up_ND=torch.randn(64, 16), gate_ND=torch.randn(64, 16), down_ND=torch.randn(64, 16),
        activation="silu",
    )  # fmt: skip
    return SparseMlp(
        mlp, experts=8, shared=0, router=ROUTERS["linear"](16, 8),
        selection=SELECTIONS["topk"](k=2), compensation=COMPENSATIONS["none"](16, 8, 0),
    )  # fmt: skip


def test_a_layer_takes_what_computes_it(module):
    x, mask = torch.randn(1, 16), torch.ones(1, 8, dtype=torch.bool)
    with torch.no_grad():
        assert on_gpu(Request(x, module.weights, mask), 0.25) == "decode"
        assert on_gpu(Request(x.half(), module.weights, mask), 0.25) == "masked"
        odd = DenseMlp(**{**vars(module.weights), "activation": "tanh"})
        assert on_gpu(Request(x, odd, mask), 0.25) == "masked"
        decided = DecidedMlp(module.weights, torch.randn(1, 64))
        assert on_gpu(Request(x, decided, mask), 0.25) == "decode"
    # With gradients: masked or grouped, and masked alone where the mask carries one.
    assert on_gpu(Request(x, module.weights, mask), 0.25) in ("masked", "grouped")
    assert on_gpu(Request(x, module.weights, mask.float()), 0.25) == "masked"


def test_deterministic_algorithms_do_without_atomic_sums(module):
    many, mask = torch.randn(2**20, 16), torch.ones(2**20, 8, dtype=torch.bool)
    with torch.no_grad():
        assert on_gpu(Request(many, module.weights, mask), 0.01) == "grouped"
        torch.use_deterministic_algorithms(True)
        try:
            assert on_gpu(Request(many, module.weights, mask), 0.01) == "masked"
        finally:
            torch.use_deterministic_algorithms(False)
