"""Run the public code of CMoE and MoEfication beside moefy's on the same weights and tokens.

    git clone https://github.com/JarvisPei/CMoE
    git clone https://github.com/thunlp/MoEfication
    python experiments/validate_peers.py --cmoe CMoE --moefication MoEfication

Their functions are imported from the clones as they are; nothing of them is kept here. Calls to CUDA
run on the CPU, plotting is left out, and `lap` is scipy's solver where that package is missing. The
weights and tokens are those of the bundled demo models (SwiGLU for CMoE, ReLU for MoEfication).

What is deterministic must be the same: markers, shared neurons, cost of the assignment,
representatives, scores, outputs; centres, first router, its targets. Where ties leave a choice, what
is compared is what both must agree on. The record goes to benchmarks/records/peers_validated.json.

Shapes: T tokens, D width, N neurons, E routed experts.
"""

import argparse
import builtins
import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import normalize

import moefy
from moefy.data.corpus import load_corpus
from moefy.data.inputs import read_batches
from moefy.experts.loading import load_dense
from moefy.experts.passes import listen, run
from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.partition import partition
from moefy.methods.partition.balanced import inertia
from moefy.methods.partition.clusters import MARKS, cmoe, marker_table
from moefy.methods.selections import top_mask
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.methods.targets import TARGETS
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import read_mlp, sites
from moefy.models.mlp import DenseMlp
from moefy.run.computing import versions

EXPERTS, SHARED, ACTIVE = 16, 2, 2
DEMO = Path(moefy.__file__).parent / "demo"
RECORD = Path(__file__).parents[1] / "benchmarks" / "records" / "peers_validated.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cmoe", type=Path, help="clone of github.com/JarvisPei/CMoE")
    parser.add_argument("--moefication", type=Path, help="clone of github.com/thunlp/MoEfication")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--clustered", type=int, default=2, help="layers for their slow k-means")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"kind": "peers", "tokens": options.tokens, "versions": versions()}
    if options.cmoe is not None:
        record["cmoe"] = validate_cmoe(options.cmoe, options.tokens)
    if options.moefication is not None:
        record["moefication"] = validate_moefication(
            options.moefication, options.tokens, options.clustered
        )
    options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {options.record}")


# ---- the demo models


def layers_of(name: str, tokens: int) -> list[tuple[DenseMlp, Tensor]]:
    """Every MLP of a demo model, and the first `tokens` of what it reads of the bundled corpus."""
    checkpoint = Checkpoint.open(DEMO / name)
    model = load_dense(checkpoint, dtype=torch.float32)
    found = sites(model)
    seen: dict[int, list[Tensor]] = {site.index: [] for site in found}
    handles = listen(model, found, lambda site, x_TD: seen[site.index].append(x_TD))
    with torch.no_grad():
        for batch in read_batches(checkpoint, "decoder", load_corpus(), 512, tokens):
            mask = batch.mask()
            run(model, batch)
            if mask is not None:
                for parts in seen.values():
                    parts[-1] = parts[-1][mask.flatten()]
    for handle in handles:
        handle.remove()
    return [
        (
            read_mlp(site, lambda name: model.get_parameter(name).detach()).contiguous(),
            torch.cat(seen[site.index])[:tokens].clone(),
        )
        for site in found
    ]


# ---- their code


def digest(*files: Path) -> dict[str, str]:
    """Which code it was."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """What asks for CUDA gets the CPU, and nothing is printed."""
    to, zeros = torch.Tensor.to, torch.zeros

    def where(value: Any) -> Any:
        return "cpu" if str(value).startswith("cuda") else value

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {key: where(value) for key, value in kwargs.items()}
        return to(self, *(where(a) if isinstance(a, str) else a for a in args), **kwargs)

    def made(*args: Any, **kwargs: Any) -> Tensor:
        return zeros(*args, **{key: where(value) for key, value in kwargs.items()})

    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    with (
        mock.patch.object(torch.Tensor, "to", moved),
        mock.patch.object(torch.Tensor, "cuda", stay),
        mock.patch.object(nn.Module, "cuda", stay),
        mock.patch.object(torch, "zeros", made),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def load_module(folder: Path, name: str, stubs: dict[str, ModuleType]) -> Any:
    """The module `name` of a clone; what is missing on this machine is replaced by a stub."""
    for stub, module in stubs.items():
        if importlib.util.find_spec(stub) is None:
            sys.modules[stub] = module
    sys.path.insert(0, str(folder.resolve()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def stub(name: str, **values: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(values)
    return module


def lapjv(cost: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The interface of `lap.lapjv` over scipy's exact solver."""
    row, column = linear_sum_assignment(cost)
    return float(cost[row, column].sum()), column, np.argsort(column)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


# ---- CMoE


def validate_cmoe(clone: Path, tokens: int) -> dict[str, Any]:
    """Their `construct_moe` on every layer of the demo llama, and moefy's recipe `cmoe`."""
    solver = "lap" if importlib.util.find_spec("lap") is not None else "scipy in the place of lap"
    plots = stub("matplotlib.pyplot")
    stubs = {
        "lap": stub("lap", lapjv=lapjv),
        "matplotlib": stub("matplotlib", pyplot=plots),
        "matplotlib.pyplot": plots,
    }
    if importlib.util.find_spec("matplotlib") is not None:
        del stubs["matplotlib.pyplot"]
    theirs = load_module_cmoe(clone, stubs)
    rows = []
    for index, (mlp, x_TD) in enumerate(layers_of("llama", tokens)):
        row = {"layer": index, **compare_cmoe(theirs, mlp, x_TD)}
        rows.append(row)
        print("CMoE", json.dumps(row))
    return {
        "files": digest(clone / "CMoE_utils.py", clone / "CMoE_model.py"),
        "assignment_solver": solver,
        "experts": EXPERTS,
        "shared": SHARED,
        "layers": rows,
    }


def load_module_cmoe(clone: Path, stubs: dict[str, ModuleType]) -> Any:
    if "matplotlib.pyplot" in stubs:
        sys.modules["matplotlib.pyplot"] = stubs.pop("matplotlib.pyplot")
    return load_module(clone, "CMoE_utils", stubs)


@torch.no_grad()
def run_cmoe(theirs: Any, mlp: DenseMlp, x_TD: Tensor) -> dict[str, Any]:
    """What their code makes of one MLP, whose input is `x_TD`, and what it computed on the way."""
    kept: dict[str, Any] = {}
    analyse, construct = theirs.analyze_neuron_activations, theirs.construct_experts_k_means

    def analysed(*args: Any, **kwargs: Any) -> Any:
        kept["rates"], kept["markers"] = (found := analyse(*args, **kwargs))[1:]
        return found

    def constructed(*args: Any, **kwargs: Any) -> Any:
        kept["groups"], _, kept["representatives"] = (found := construct(*args, **kwargs))
        return found

    assert mlp.gate_ND is not None

    def linear(weight: Tensor) -> nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight.data = weight.clone()
        return made

    same = nn.Identity()
    dense = SimpleNamespace(
        act_fn=nn.functional.silu,
        gate_proj=linear(mlp.gate_ND),
        up_proj=linear(mlp.up_ND),
        down_proj=linear(mlp.down_ND.T.contiguous()),
        hidden_size=mlp.width,
        intermediate_size=mlp.neurons,
    )

    class Attention:
        """Adds nothing, so that the MLP's input is the layer's."""

        layer_idx = 0

        def __call__(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
            return (torch.zeros_like(hidden_states),)

    layer = SimpleNamespace(
        input_layernorm=same, self_attn=Attention(), post_attention_layernorm=same, mlp=dense
    )
    settings = SimpleNamespace(k_act=MARKS, bias_speed=0.001)
    with (
        on_the_cpu(),
        mock.patch.object(theirs, "analyze_neuron_activations", analysed),
        mock.patch.object(theirs, "construct_experts_k_means", constructed),
    ):
        out = theirs.construct_moe(layer, x_TD[None], None, None, EXPERTS, ACTIVE, SHARED, settings)
        kept["output"] = out[0] - x_TD
        kept["indices"] = layer.mlp.gate(x_TD)[1]
    gate = layer.mlp.gate
    kept["scores"] = (gate.classifier(x_TD) * nn.functional.silu(gate.gate(x_TD))).abs()
    return kept


def owner_of(groups: list[list[int]], neurons: int) -> Tensor:
    owner_N = torch.empty(neurons, dtype=torch.int64)
    for expert, members in enumerate(groups):
        owner_N[torch.tensor(members)] = expert
    return owner_N


@torch.no_grad()
def compare_cmoe(theirs: Any, mlp: DenseMlp, x_TD: Tensor) -> dict[str, Any]:
    kept = run_cmoe(theirs, mlp, x_TD)
    marker_NT, rate_N = kept["markers"].T, kept["rates"]
    ours_NT = marker_table(mlp, x_TD)
    found = partition(
        mlp, x_TD, experts=EXPERTS, method="cmoe", shared=SHARED, shared_by="activation_rate"
    )
    their_N = owner_of(kept["groups"], mlp.neurons)
    our_shared_N, their_shared_N = found.owner_N < SHARED, their_N < 1
    row: dict[str, Any] = {
        "markers_that_differ": int((ours_NT != marker_NT).sum()),
        "shared_that_differ": int((our_shared_N & ~their_shared_N).sum()),
        "shared_rate_difference": abs(
            float(rate_N[our_shared_N].double().sum() - rate_N[their_shared_N].double().sum())
        ),
    }
    # Neurons marked equally often may be shared or not, and seed an expert or not, at will. Given the
    # neurons that they route, in their order, the seeds are the same, and so must be the least cost.
    experts = EXPERTS - SHARED
    routed_N = (their_N > 0).nonzero()[:, 0]
    seeds = routed_N[rate_N[routed_N].topk(experts).indices]
    last = rate_N[seeds].min()
    row["neurons_marked_as_often_as_the_last_seed"] = int((rate_N[routed_N] == last).sum())
    far_NE = torch.cdist(marker_NT[routed_N], marker_NT[seeds], p=1)
    ours_N, theirs_N = cmoe(mlp, x_TD, experts, 0, routed_N), their_N[routed_N] - 1
    row["assignment_cost_ours"] = float(far_NE.gather(1, ours_N[:, None]).sum())
    row["assignment_cost_theirs"] = float(far_NE.gather(1, theirs_N[:, None]).sum())
    row["assignment_cost_of_chance"] = float(far_NE.mean() * len(routed_N))
    row["routed_in_the_same_expert"] = int((ours_N == theirs_N).sum())
    row["routed"] = len(routed_N)

    # Given their experts, so that ties before do not matter any more: representatives, scores, output.
    members = [torch.tensor(group).sort().values for group in kept["groups"]]
    whole = mlp.take(torch.cat(members))
    shared = len(members[0])
    routed = whole.take(slice(shared, None))
    router = ROUTERS["representative"](mlp.width, experts)
    router.initialise(routed, x_TD, whole)
    row["representatives_as_near"], same = representatives(kept, marker_NT, members, router, mlp)
    row["representatives_the_same"] = int(same.sum())
    got_TE = router(x_TD, routed)
    row["scores_relative_difference"] = relative(got_TE[:, same], kept["scores"][:, same])
    row["scores_relative_difference_of_a_swap"] = relative(
        got_TE[:, same].roll(1, 1), kept["scores"][:, same]
    )
    # Of equally near representatives ours may be another: theirs, to compare what follows.
    theirs_E = torch.tensor(kept["representatives"])
    router.load_state_dict(
        {
            "up_ED": normalize(mlp.up_ND[theirs_E], dim=-1),
            "gate_ED": normalize(mlp.gate_ND[theirs_E], dim=-1),  # type: ignore[index]
        }
    )
    mask_TE = top_mask(router(x_TD, routed), ACTIVE)
    their_TE = torch.zeros_like(mask_TE).scatter_(1, kept["indices"], True)
    agree_T = (mask_TE == their_TE).all(1)
    row["tokens_with_the_same_experts"], row["tokens"] = int(agree_T.sum()), len(x_TD)
    module = SparseMlp(
        whole,
        experts=EXPERTS,
        shared=SHARED,
        router=router,
        selection=SELECTIONS["topk"](ACTIVE),
        compensation=COMPENSATIONS["none"](mlp.width, experts, 0),
    )
    got = module(x_TD)
    row["output_relative_difference"] = relative(got[agree_T], kept["output"][agree_T])
    row["output_relative_difference_to_dense"] = relative(mlp(x_TD), kept["output"])
    return row


def representatives(
    kept: dict[str, Any], marker_NT: Tensor, members: list[Tensor], router: Any, mlp: DenseMlp
) -> tuple[int, Tensor]:
    """How many of moefy's representatives lie as near as theirs, and which are the very same."""
    near, same = 0, []
    for expert, group in enumerate(members[1:]):
        rows = normalize(mlp.up_ND[group], dim=-1)
        ours = int(group[(rows - router.up_ED[expert]).norm(dim=1).argmin()])
        marker_FT = marker_NT[group]
        far_F = (marker_FT - marker_FT.mean(0)).abs().sum(1)
        distance = {int(n): float(f) for n, f in zip(group, far_F, strict=True)}
        other = kept["representatives"][expert]
        near += abs(distance[ours] - distance[other]) <= 1e-3
        same.append(ours == other)
    return near, torch.tensor(same)


# ---- MoEfication


def validate_moefication(clone: Path, tokens: int, clustered: int) -> dict[str, Any]:
    """Their splitting and router code on the layers of the demo OPT, and moefy's `moefication`."""
    have = importlib.util.find_spec("k_means_constrained") is not None
    stubs = {"k_means_constrained": stub("k_means_constrained", KMeansConstrained=None)}
    theirs = load_module(clone / "moefication", "utils", stubs)
    rows = []
    for index, (mlp, x_TD) in enumerate(layers_of("opt", tokens)):
        row: dict[str, Any] = {"layer": index}
        experts = mlp.neurons // 32
        found = partition(mlp, x_TD[:0], experts=experts, method="kmeans")
        if have and index < clustered:
            row |= compare_clusters(theirs, mlp, found.owner_N, experts)
        row |= compare_router(theirs, mlp, x_TD, found.owner_N, experts)
        rows.append(row)
        print("MoEfication", json.dumps(row))
    return {
        "files": digest(clone / "moefication" / "utils.py"),
        "k_means_constrained": "run" if have else "not installed: clusters were not compared",
        "layers": rows,
    }


def compare_clusters(theirs: Any, mlp: DenseMlp, owner_N: Tensor, experts: int) -> dict[str, Any]:
    """Sum of squared distances of their balanced k-means and of ours, on the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights"
        torch.save({"rows.0": mlp.up_ND.clone()}, file)
        split = theirs.ParamSplit(theirs.ModelConfig(str(file), folder, experts), "rows.{}", 0)
        began = time.perf_counter()
        with on_the_cpu():
            split.split()
        seconds = time.perf_counter() - began
    rows_ND = normalize(mlp.up_ND, dim=1)
    labels_N = torch.tensor(np.array(split.labels)).long()
    began = time.perf_counter()
    partition(mlp, torch.zeros(0, mlp.width), experts=experts, method="kmeans")
    ours_seconds = time.perf_counter() - began
    random_N = owner_N[torch.randperm(len(owner_N), generator=torch.Generator().manual_seed(0))]
    return {
        "sizes_theirs": sorted(set(torch.bincount(labels_N).tolist())),
        "inertia_theirs": inertia(rows_ND, labels_N, experts),
        "inertia_ours": inertia(rows_ND, owner_N, experts),
        "inertia_random": inertia(rows_ND, random_N, experts),
        "seconds_theirs": round(seconds, 1),
        "seconds_ours": round(ours_seconds, 1),
    }


def run_router(theirs: Any, mlp: DenseMlp, x_TD: Tensor, owner_N: Tensor) -> dict[str, Tensor]:
    """Their `MLPCenter` up to its first step: first weights, and scores and targets of a batch."""
    kept: dict[str, Tensor] = {}

    class Loss:
        """Keeps what it is given first."""

        def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
            if not kept:
                kept["scores"], kept["targets"] = predicted.detach(), wanted.detach()
            return (predicted * 0).sum()

    def once(*bounds: int) -> range:
        return builtins.range(1) if bounds == (30,) else builtins.range(*bounds)

    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        torch.save({"rows.0": mlp.up_ND.clone()}, where / "weights")
        torch.save(owner_N.tolist(), where / "labels")
        torch.save(x_TD, where / "rows.0")
        config = theirs.ModelConfig(str(where / "weights"), folder, 0)
        center = theirs.MLPCenter(config, "rows.{}", str(where / "labels"), 0)
        quiet = SimpleNamespace(system=lambda _: 0, path=os.path, makedirs=os.makedirs)
        with (
            on_the_cpu(),
            mock.patch.object(torch.nn, "BCEWithLogitsLoss", Loss),
            mock.patch.object(torch, "randperm", torch.arange),
            mock.patch.object(theirs, "os", quiet),
            mock.patch.object(theirs, "range", once, create=True),
            mock.patch.object(theirs.MLPCenter, "save", lambda *_: None),
        ):
            center.cal_center()
    kept["first"], kept["second"] = (center.centers[i].weight.data for i in (0, 2))
    return kept


def run_similarity(theirs: Any, mlp: DenseMlp, x_TD: Tensor, owner_N: Tensor) -> Tensor:
    """Scores of their `ParamCenter`, whose constructor and loader do not fit its own calls."""
    center = theirs.ParamCenter.__new__(theirs.ParamCenter)
    vars(center).update(
        config=SimpleNamespace(filename="", folder=""),
        layer=0,
        is_encoder=True,
        labels=owner_N.tolist(),
        template="{}",
    )
    ranked: list[Tensor] = []
    topk = torch.topk

    def kept(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranked.append(values)
        return topk(values, *args, **kwargs)

    with (
        on_the_cpu(),
        mock.patch.object(theirs, "load_ffn_weight", lambda *_: mlp.up_ND.numpy().copy()),
        mock.patch.object(theirs, "load_hidden_states", lambda *_: [x_TD]),
        mock.patch.object(torch, "topk", kept),
    ):
        center.cal_center()
    return torch.cat(ranked[1::2])


@torch.no_grad()
def compare_router(
    theirs: Any, mlp: DenseMlp, x_TD: Tensor, owner_N: Tensor, experts: int
) -> dict[str, Any]:
    with torch.enable_grad():
        kept = run_router(theirs, mlp, x_TD, owner_N)
    routed = mlp.take(owner_N.argsort(stable=True))
    router = ROUTERS["tanh_mlp"](mlp.width, experts)
    router.initialise(routed, x_TD[:0], routed)
    first, second = router.state_dict().values()
    row: dict[str, Any] = {
        "first_layer_relative_difference": relative(first, kept["first"]),
        "second_layer_relative_difference": relative(second, kept["second"]),
    }
    batch = len(kept["scores"]) // experts
    scores_TE, target_TE = (kept[name].view(batch, experts) for name in ("scores", "targets"))
    row["scores_relative_difference"] = relative(router(x_TD[:batch], routed), scores_TE)
    # Their targets are those of normalised tokens without biases, over the largest of the batch.
    bare = DenseMlp(up_ND=routed.up_ND, down_ND=routed.down_ND, activation=routed.activation)
    unit_TD = normalize(x_TD[:batch], dim=-1)
    ours_TE = TARGETS["activation"](bare.hidden(unit_TD), bare, experts)
    row["targets_relative_difference"] = relative(ours_TE / ours_TE.max(), target_TE)
    row["targets_relative_difference_of_a_swap"] = relative(
        (ours_TE / ours_TE.max()).roll(1, 1), target_TE
    )
    # What moefy fits on: the activations as they are. A deviation, and how much it matters.
    real_TE = TARGETS["activation"](routed.hidden(x_TD[:batch]), routed, experts)
    row["targets_relative_difference_as_fitted"] = relative(real_TE / real_TE.max(), target_TE)
    k = max(1, experts // 5)
    common = (top_mask(real_TE, k) & top_mask(target_TE, k)).sum()
    row["share_of_top_fifth_in_common_as_fitted"] = float(common) / (k * batch)

    centroid = ROUTERS["centroid"](mlp.width, experts)
    centroid.initialise(routed, x_TD[:0], routed)
    similar_TE = run_similarity(theirs, mlp, x_TD, owner_N)
    tail_TD = x_TD[len(x_TD) // 10 * 9 :]
    row["similarity_relative_difference"] = relative(centroid(tail_TD, routed), similar_TE)
    return row


if __name__ == "__main__":
    main()
