"""A moefied model under `torch.compile` on a CPU: one graph a token, with the native kernels in it."""

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build
from transformers import CompileConfig, StaticCache

import moefy
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.models.library import passing
from moefy_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C++ compiler")

IDS = torch.arange(3, 19).view(1, 16)
PROMPT = 6


@pytest.fixture(params=["shared", "conditional"])
def model(made, request, tmp_path):
    """With a linear router and nothing for what is off; with a mean for each expert that is off."""
    torch.compiler.reset()
    if request.param == "shared":
        folder = made("shared")
    else:
        folder = tmp_path / "out"
        settings = {"compensation.name": "conditional_mean", "partition.shared": 2}
        convert_tiny("qwen2", build("qwen2", tmp_path / "in"), folder, settings=settings)
    yield moefy.native_linears(moefy.load(folder))
    torch.compiler.reset()


def decode(model, forward):
    """Logits of every token behind the prompt, with a cache of fixed size."""
    cache = passing(model, StaticCache(config=model.config, max_cache_len=IDS.shape[1]))
    with torch.no_grad():
        logits = [model(input_ids=IDS[:, :PROMPT], **cache).logits[:, -1]]
        for at in range(PROMPT, IDS.shape[1]):
            step = forward(input_ids=IDS[:, at, None], **cache)
            logits.append(step.logits[:, -1])
    return torch.stack(logits)


def test_a_token_is_one_graph_of_native_operations(model):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    want = decode(model, model)
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=count)
    got = decode(model, compiled)
    assert float((got - want).norm() / want.norm()) < 1e-5
    # Whether a token is the first behind the prompt may be known to a graph; no more than that.
    assert 1 <= len(graphs) <= 2
    called = [str(node.target) for node in graphs[-1].graph.nodes]
    layers = len(sparse_mlps(model))
    assert sum("native_experts" in name for name in called) == layers
    # q, k, v, o and the router of every layer, and the head.
    assert sum("native_linear" in name for name in called) == 5 * layers + 1
    assert {module.chosen for module in sparse_mlps(model).values()} == {"native"}


@pytest.mark.slow
def test_generation_with_a_compiled_step_gives_the_same_tokens(model):
    step = CompileConfig(mode="default", dynamic=False)
    step._compile_all_devices = True
    options = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(IDS, **options)
    got = model.generate(IDS, cache_implementation="static", compile_config=step, **options)
    assert torch.equal(got, want)
