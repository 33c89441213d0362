"""Is the partition found, or is it one of many? The model's own method again, on other seeds and
texts (control C6).

    ARI, AMI    agreement of two partitions: 1 the same, 0 as two random ones
    stability   of an expert: how much of it each of the new partitions has in one expert, as the
                Jaccard index of the two under the best matching of all (Hungarian); the mean of them

Every layer is split anew from its inputs in the dense model, on two disjoint sets of documents that
the conversion did not split it by. A method that gives the same for two seeds is taken not to depend
on the seed and is run once for each text.

Shapes: T tokens, D width, N neurons, E experts, P partitions.
"""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from transformers import PreTrainedModel

from moefy.conversion.capture import Captured, capture
from moefy.data.corpus import Batch, make_batches
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, joined, table
from moefy.methods.partition.partition import partition
from moefy.recipe import from_dict
from moefy.run.console import Reporter
from moefy.run.processes import ALONE, Processes

SEEDS = 5
SHARDS = 2
TOKENS = 4096
"""Most tokens of each shard that a method sees; fewer where the recipe says so."""
CHANCE = 20
"""Random partitions that the stability of chance is the mean of."""

Ints = NDArray[np.int64]


@torch.no_grad()
def seeds(
    model: PreTrainedModel,
    reading: Reading,
    *,
    count: int = SEEDS,
    tokens: int = TOKENS,
    seed: int = 0,
    report: Reporter | None = None,
    processes: Processes = ALONE,
) -> dict[str, Table]:
    """Columns `stability*` of `experts` and `layers`.

    `model` is from `moefy.load`; its recipe says how it was split. Experts of single neurons leave
    nothing to cluster: their columns are None. `processes`, all of which call this, share out the
    batches and then the layers.
    """
    report = report or Reporter(quiet=True)
    artefact = of(model).artefact
    modules = sparse_mlps(model)
    limit = min(tokens, from_dict(artefact.recipe).partition.tokens)
    shards = halves(reading, seed)
    rows = []
    with processes.folder() as folder:
        samples = [Captured(folder, f"shard-{number}") for number in range(SHARDS)]
        if any(module.expert_size > 1 for module in modules.values()):
            for batches, sample in zip(shards, samples, strict=True):
                with all_experts(model):
                    capture(
                        model, of(model).sites, batches, sample,
                        limit=limit, seed=seed, report=report, processes=processes,
                    )  # fmt: skip
        for layer in report.track(processes.mine(list(modules)), "partitions again"):
            rows.append((layer, _layer(model, layer, modules[layer], samples, count, seed)))
        found = processes.in_order(rows)
    return {
        "experts": joined(experts for experts, _ in found),
        "layers": joined(layers for _, layers in found),
    }


def halves(reading: Reading, seed: int) -> list[list[Batch]]:
    """The documents in two disjoint sets, each with half of every domain."""
    samples = [sample for batch in reading.batches for sample in batch.samples]
    order = np.random.default_rng(seed).permutation(len(samples))
    order = order[np.argsort(reading.documents.domain_Q[order], kind="stable")]
    return [make_batches([samples[i] for i in order[part::SHARDS]]) for part in range(SHARDS)]


def _layer(
    model: PreTrainedModel,
    layer: int,
    module: SparseMlp,
    samples: list[Captured],
    count: int,
    seed: int,
) -> tuple[Table, Table]:
    artefact = of(model).artefact
    site = of(model).sites[layer]
    columns: dict[str, Any] = {"layer": [layer] * module.experts}
    columns["expert"] = list(range(module.experts))
    if module.expert_size == 1:
        columns |= dict.fromkeys(("stability", "stability_chance"), [None] * module.experts)
        none: dict[str, Any] = {key: [None] for key in _NAMES}
        return table(columns), table({"layer": [layer], **none})
    recipe = from_dict(artefact.recipe).partition
    # In the order of the source, which is what methods that are not invariant go by.
    source_N = artefact.permutation(layer).argsort()
    mlp = module.weights.on_cpu().take(source_N).to(torch.float32)
    own_N = (source_N // module.expert_size).numpy()

    def split(sample: Captured, number: int) -> Ints:
        found = partition(
            mlp, sample.inputs(site).float(), experts=module.experts, method=recipe.method,
            shared=module.shared, shared_by=recipe.shared_by, domain_T=sample.domains(site),
            seed=seed + 1 + number, where=f"layer {layer}",
        )  # fmt: skip
        return found.owner_N.numpy()

    found = {(shard, 0): split(sample, 0) for shard, sample in enumerate(samples)}
    found[0, 1] = split(samples[0], 1)
    varies = adjusted_rand_score(found[0, 0], found[0, 1]) < 1
    for shard, sample in enumerate(samples):
        for number in range(1, count if varies else 1):
            if (shard, number) not in found:
                found[shard, number] = split(sample, number)
    if not varies:
        del found[0, 1]
    read = min(len(sample.inputs(site)) for sample in samples)
    jaccard_PE = np.stack([matched(own_N, other_N) for other_N in found.values()])
    draw = np.random.default_rng([seed, layer])
    # From the sizes alone, so that the order of neurons decides no draw.
    sized_N = np.sort(own_N)
    chance_PE = np.stack([matched(sized_N, draw.permutation(sized_N)) for _ in range(CHANCE)])
    columns["stability"] = jaccard_PE.mean(0)
    columns["stability_chance"] = np.full(module.experts, chance_PE.mean())
    return table(columns), table({"layer": [layer], **_agreement(found, own_N, read)})


_NAMES = (
    "stability_ari", "stability_ari_low", "stability_ari_high", "stability_ari_own",
    "stability_ari_texts", "stability_ari_seeds", "stability_ami", "stability_partitions",
    "stability_tokens",
)  # fmt: skip


def _agreement(
    found: dict[tuple[int, int], Ints], own_N: Ints, tokens: int
) -> dict[str, list[float]]:
    """`_NAMES` of one layer; partitions by shard and seed."""
    pairs = list(combinations(found, 2))
    ari = {pair: float(adjusted_rand_score(found[pair[0]], found[pair[1]])) for pair in pairs}
    ami = [adjusted_mutual_info_score(found[a], found[b]) for a, b in pairs]
    values = (
        _mean(ari.values()),
        min(ari.values()),
        max(ari.values()),
        _mean(float(adjusted_rand_score(own_N, other_N)) for other_N in found.values()),
        _mean(value for (a, b), value in ari.items() if a[1] == b[1]),
        _mean(value for (a, b), value in ari.items() if a[0] == b[0]),
        _mean(ami),
        len(found),
        tokens,
    )
    return {name: [value] for name, value in zip(_NAMES, values, strict=True)}


def _mean(values: Iterable[float]) -> float:
    """NaN of nothing: a method that does not depend on the seed has no pairs of seeds."""
    given = list(values)
    return sum(given) / len(given) if given else float("nan")


def matched(own_N: Ints, other_N: Ints) -> NDArray[np.float64]:
    """Jaccard index of every expert of one partition with its match in another `[E]`.

    The matching is one to one and has the largest sum over all experts (Kuhn 1955).
    """
    experts = int(own_N.max()) + 1
    common_EE = np.zeros((experts, int(other_N.max()) + 1))
    np.add.at(common_EE, (own_N, other_N), 1)
    union_EE = common_EE.sum(1)[:, None] + common_EE.sum(0)[None] - common_EE
    jaccard_EE = common_EE / union_EE
    row, column = linear_sum_assignment(jaccard_EE, maximize=True)
    found_E = np.zeros(experts)
    found_E[row] = jaccard_EE[row, column]
    return found_E
