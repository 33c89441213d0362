"""Compiled kernels on a GPU: parity at real sizes, CUDA graphs, no wait for the host, torch.compile."""

import pytest
import torch
from expert_cases import TF32, case, error, run, tf32

from moefy_kernels import reference
from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ACTIVATIONS, ExpertMlp
from moefy_kernels.grouped import grouped
from moefy_kernels.neuron import neuron
from moefy_kernels.routing import listed, route, select
from moefy_kernels.union import union

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def on_gpu(c):
    mlp = ExpertMlp(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in c.mlp))
    bias = None if c.bias is None else c.bias.cuda()
    return c.without(
        x=c.x.cuda(), mlp=mlp, expert=c.expert.cuda(), weight=c.weight.cuda(), bias=bias
    )


OPERATIONS = [("decode", 1), ("decode", 7), ("union", 2), ("union", 37), ("grouped", 300)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "tokens"), OPERATIONS)
@pytest.mark.parametrize("size", [1, 12, 32, 128])
def test_parity_at_real_sizes(name, tokens, size, dtype):
    c = on_gpu(case(0, tokens, 1024, 24, size, 6, dtype, biased=True, centred=True))
    assert error(run(name, c), c.wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "tokens"), OPERATIONS)
@pytest.mark.parametrize("size", [16, 128])
def test_fp32_is_exact_unless_tf32_is_allowed(name, tokens, size):
    c = on_gpu(case(10, tokens, 1024, 24, size, 6, torch.float32, biased=True))
    with tf32():
        found = error(run(name, c), c.wanted)
    units = name != "decode" and torch.cuda.get_device_capability() >= (8, 0)
    assert 1e-5 < found < TF32 if units else found < 1e-5
    assert error(run(name, c), c.wanted) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("name", "tokens"), OPERATIONS)
def test_parity_of_every_activation(name, tokens, activation, gated):
    c = on_gpu(case(1, tokens, 200, 9, 20, 3, torch.float32, activation, gated))
    assert error(run(name, c), c.wanted) < 1e-5


@pytest.mark.parametrize(("name", "tokens"), OPERATIONS)
def test_the_same_bits_twice_where_nothing_is_added_atomically(name, tokens):
    c = on_gpu(case(2, tokens, 2048, 64, 32, 16, torch.bfloat16))
    first, second = run(name, c), run(name, c)
    if name == "grouped":
        assert error(first, second.double()) < 1e-2
    else:
        assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "tokens"), OPERATIONS)
def test_a_cuda_graph_sees_new_inputs_and_new_routing(name, tokens):
    c = on_gpu(case(3, tokens, 512, 16, 32, 4, torch.bfloat16))
    matrix, ids = c.matrix.clone(), c.expert.clone()
    x = c.x.clone()

    def call():
        if name == "decode":
            return decode(x, c.mlp, ids, c.weight)
        return {"union": union, "grouped": grouped}[name](x, c.mlp, matrix)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    other = on_gpu(case(4, tokens, 512, 16, 32, 4, torch.bfloat16))
    x.copy_(other.x)
    ids.copy_(other.expert)
    moved = c.without(x=other.x, expert=other.expert)
    matrix.copy_(moved.matrix)
    for _ in range(2):
        graph.replay()
        assert error(y, moved.wanted) < 1e-2


def test_nothing_waits_for_the_host():
    c = on_gpu(case(5, 4, 512, 16, 32, 4, torch.bfloat16))
    matrix, router = c.matrix, torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)

    def everything():
        expert, count = route(c.x, router, k=4)
        decode(c.x, c.mlp, expert, None, count)
        decode(c.x, c.mlp, *listed(matrix)[:1])
        union(c.x, c.mlp, matrix)
        grouped(c.x, c.mlp, matrix)
        select(matrix, threshold=0.1)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_of_grouped():
    c = on_gpu(case(6, 200, 256, 8, 32, 3, torch.float32))
    x, weight = c.x.requires_grad_(), c.matrix.requires_grad_()
    grouped(x, c.mlp, weight).square().sum().backward()
    wide = [v.double() if isinstance(v, torch.Tensor) else v for v in c.mlp]
    x64, w64 = (v.detach().double().requires_grad_() for v in (x, weight))
    reference.weighted(x64, ExpertMlp(*wide), w64).square().sum().backward()
    assert error(x.grad, x64.grad) < 1e-5
    on = weight.detach() != 0
    assert error(weight.grad * on, w64.grad * on) < 1e-5


@pytest.mark.parametrize(("name", "tokens"), OPERATIONS)
def test_inductor_compiles_it_whole(name, tokens):
    c = on_gpu(case(7, tokens, 256, 8, 32, 3, torch.bfloat16))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: run(name, c) * 2, fullgraph=True)
    assert error(compiled(), 2 * c.wanted) < 1e-2


def test_routes_and_selects_as_on_the_cpu():
    g = torch.Generator().manual_seed(8)
    x, router = torch.randn(9, 512, generator=g), torch.randn(448, 512, generator=g)
    for given in ({"k": 112}, {"threshold": 8.0}, {"tau": 0.4, "most": 50}):
        score = x @ router.T
        score = score.abs() if "tau" in given else score
        want = select(score, **given)
        got = select(score.cuda(), **given)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
    expert, count = route(x.cuda(), router.cuda(), k=112)
    chosen = torch.zeros(9, 448, dtype=torch.bool).scatter(1, expert.cpu().long(), True)
    best = (x @ router.T).topk(113, 1).values
    assert bool((count == 112).all())
    # Scores are added up in another order: only one next to the last may change places.
    assert bool(((x @ router.T)[chosen].view(9, 112).amin(1) >= best[:, -1] - 1e-3).all())


def test_single_neurons():
    c = on_gpu(case(9, 3, 1024, 3000, 1, 3000, torch.bfloat16))
    score = torch.rand(3, 3000, device="cuda")
    on = c.without(
        expert=torch.arange(3000, device="cuda").expand(3, -1), weight=(score > 0.75).float()
    )
    assert error(neuron(c.x, c.mlp, score, 0.75), on.wanted) < 1e-2
