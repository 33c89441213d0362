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

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.capture import Captured, capture
from moefy.data.corpus import Batch, make_batches
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, joined, of_experts, table
from moefy.methods.partition import partition
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
        tables = processes.in_order(rows)
    return {
        "experts": joined(experts for experts, _ in tables),
        "layers": joined(layers for _, layers in tables),
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
    if module.expert_size == 1:
        nothing = dict.fromkeys(("stability", "stability_chance"), [None] * module.experts)
        return of_experts(layer, nothing), table({"layer": [layer], **{n: [None] for n in _NAMES}})
    # In the order of the source, which is what methods that are not invariant go by.
    source_N = of(model).artefact.permutation(layer).argsort()
    own_N = (source_N // module.expert_size).numpy()
    partitions = _partitions(model, layer, module, source_N, samples, count, seed)
    jaccard_PE = np.stack([matched(own_N, other_N) for other_N in partitions.values()])
    draw = np.random.default_rng([seed, layer])
    # From the sizes alone, so that the order of neurons decides no draw.
    sized_N = np.sort(own_N)
    chance_PE = np.stack([matched(sized_N, draw.permutation(sized_N)) for _ in range(CHANCE)])
    columns = {
        "stability": jaccard_PE.mean(0),
        "stability_chance": np.full(module.experts, chance_PE.mean()),
    }
    read = min(len(sample.inputs(of(model).sites[layer])) for sample in samples)
    agreement = _agreement(partitions, own_N, read)
    return of_experts(layer, columns), table({"layer": [layer], **agreement})


def _partitions(
    model: PreTrainedModel,
    layer: int,
    module: SparseMlp,
    source_N: Tensor,
    samples: list[Captured],
    count: int,
    seed: int,
) -> dict[tuple[int, int], Ints]:
    """The layer split anew: the expert of every neuron `[N]` by shard and number of the seed."""
    recipe, site = from_dict(of(model).artefact.recipe).partition, of(model).sites[layer]
    mlp = module.weights.on_cpu().take(source_N).to(torch.float32)

    def split(shard: int, number: int) -> Ints:
        sample = samples[shard]
        owner_N = partition(
            mlp, sample.inputs(site).float(), experts=module.experts, method=recipe.method,
            shared=module.shared, shared_by=recipe.shared_by, domain_T=sample.domains(site),
            seed=seed + 1 + number, where=f"layer {layer}",
        ).owner_N  # fmt: skip
        return np.asarray(owner_N.numpy())

    split_anew = {(shard, 0): split(shard, 0) for shard in range(len(samples))}
    other_seed_N = split(0, 1)
    if adjusted_rand_score(split_anew[0, 0], other_seed_N) < 1:
        split_anew[0, 1] = other_seed_N
        for shard in range(len(samples)):
            for number in range(1, count):
                if (shard, number) not in split_anew:
                    split_anew[shard, number] = split(shard, number)
    return split_anew


_NAMES = (
    "stability_ari", "stability_ari_low", "stability_ari_high", "stability_ari_own",
    "stability_ari_texts", "stability_ari_seeds", "stability_ami", "stability_partitions",
    "stability_tokens",
)  # fmt: skip


def _agreement(
    partitions: dict[tuple[int, int], Ints], own_N: Ints, tokens: int
) -> dict[str, list[float]]:
    """`_NAMES` of one layer; partitions by shard and seed."""
    pairs = list(combinations(partitions, 2))
    ari = {
        pair: float(adjusted_rand_score(partitions[pair[0]], partitions[pair[1]])) for pair in pairs
    }
    ami = [adjusted_mutual_info_score(partitions[a], partitions[b]) for a, b in pairs]
    values = (
        _mean(ari.values()),
        min(ari.values()),
        max(ari.values()),
        _mean(float(adjusted_rand_score(own_N, other_N)) for other_N in partitions.values()),
        _mean(value for (a, b), value in ari.items() if a[1] == b[1]),
        _mean(value for (a, b), value in ari.items() if a[0] == b[0]),
        _mean(ami),
        len(partitions),
        tokens,
    )
    return {name: [value] for name, value in zip(_NAMES, values, strict=True)}


def _mean(values: Iterable[float]) -> float:
    """NaN of nothing: a method that does not depend on the seed has no pairs of seeds."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")


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
    matched_E = np.zeros(experts)
    matched_E[row] = jaccard_EE[row, column]
    return matched_E
