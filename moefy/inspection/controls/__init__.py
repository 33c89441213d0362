"""What every description is held against: random partitions and weights, and here other texts and seeds.

`replication`: does what one text says of the experts hold on another (control C8)? A figure replicates
where the order of the experts of a layer by it is much the same on two corpora, or, with one corpus, on
two halves of its sources. On one corpus alone many a thing looks monosemantic (the BERT illusion,
Bolukbasi et al. 2021).

`seeds`: is the partition found, or is it one of many? The model's own method again, on other seeds and
texts (control C6).

    ARI, AMI    agreement of two partitions: 1 the same, 0 as two random ones
    stability   of an expert: how much of it each of the new partitions has in one expert, as the
                Jaccard index of the two under the best matching of all (Hungarian); the mean of them

Every layer is split anew from its inputs in the dense model, on two disjoint sets of documents that
the conversion did not split it by. A method that gives the same for two seeds is taken not to depend
on the seed and is run once for each text.

Shapes: T tokens, Q documents, N neurons, E experts, P partitions.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.layer import Captured, capture
from moefy.data.corpus import Batch, make_batches
from moefy.data.shards import Documents, Ints
from moefy.evaluation.statistics import q_values, units
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps
from moefy.inspection.record import Table, joined, of_experts, table
from moefy.inspection.routing import RoutingSample, drawn_documents
from moefy.inspection.texts import Reading
from moefy.methods.partition import partition
from moefy.recipe import PartitionRecipe, from_dict
from moefy.run.console import Reporter
from moefy.run.processes import ALONE, Processes

Q = 0.05
TEXT_TOKENS = 60_000
"""Most tokens of a text that figures are made from."""
LEAST_EXPERTS = 5
"""Fewer experts than this have no order worth a correlation."""

Tables = Mapping[str, Table]


def replication(
    sample: RoutingSample, describe: Callable[[RoutingSample], Tables], *, seed: int = 0
) -> dict[str, Table]:
    """Table `replication`: figure, layer, the two texts, experts, rank correlation, p, q, `replicates`.

    `describe` makes tables of a sample; every column of numbers of its table `experts` is a figure,
    intervals, p and q aside. p is one-sided (Spearman); `replicates` is q < .05 over the table.
    """
    parts = texts(sample.documents, seed)
    made = {
        name: describe(sample.take(some_T))["experts"]
        for name, chosen_Q in parts.items()
        if (some_T := _some(sample, chosen_Q, seed)).any()
    }
    rows: list[dict[str, Any]] = []
    for first, second in combinations(made, 2):
        for figure in figures(made[first]):
            if figure in made[second]:
                rows += _correlations(made[first], made[second], figure, (first, second))
    names = ("figure", "layer", "text_a", "text_b", "experts")
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in names}
    for name in ("correlation", "p"):
        columns[name] = np.array([row[name] for row in rows], dtype=float)
    columns["q"] = q_values(columns["p"])
    columns["replicates"] = [None if np.isnan(q) else bool(q < Q) for q in columns["q"]]
    return {"replication": table(columns)}


def _some(sample: RoutingSample, chosen_Q: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """Tokens `[T]` of the sample in documents drawn from the chosen ones."""
    document_T = sample.tokens.document_T
    tokens_Q = np.bincount(document_T, minlength=len(chosen_Q))
    return drawn_documents(tokens_Q, TEXT_TOKENS, seed, chosen_Q & (tokens_Q > 0))[document_T]


def texts(documents: Documents, seed: int) -> dict[str, NDArray[np.bool_]]:
    """Which documents `[Q]` each corpus has; of one corpus two halves, of the sources of every domain,
    or of its documents if there are few sources."""
    names = sorted(set(documents.corpora))
    if len(names) > 1:
        return {name: np.array([c == name for c in documents.corpora]) for name in names}
    unit_Q = units(documents)
    order_G = np.random.default_rng(seed).permutation(int(unit_Q.max()) + 1)
    first_Q = np.zeros(len(documents), dtype=bool)
    for domain in range(len(documents.domains)):
        here_Q = documents.domain_Q == domain
        mine_G = order_G[np.isin(order_G, unit_Q[here_Q])]
        first_Q |= here_Q & np.isin(unit_Q, mine_G[::2])
    name = names[0]
    return {f"{name}, one half": first_Q, f"{name}, other half": ~first_Q}


def figures(experts: Table) -> list[str]:
    """Columns of a table that are figures: numbers, no keys, intervals, p or q, and neither what a figure
    is compared with nor out of how many it is counted."""
    beside = (
        "_low", "_high", "_p", "_q", "_z", "_percentile", "_documents", "_tokens", "_draws", "_random",
        "_chance", "_null", "_of", "_types", "_compared",
    )  # fmt: skip
    keys = (
        "layer", "expert", "documents", "tokens", "p", "q", "units", "routed_experts", "active",
        "chance_recall", "constant_recall", "load_recall", "share_sum_error",
    )  # fmt: skip
    return [
        name
        for name, column in experts.items()
        if name not in keys
        and not name.endswith(beside)
        and all(v is None or (isinstance(v, int | float) and type(v) is not bool) for v in column)
    ]


def _correlations(
    first: Table, second: Table, figure: str, of: tuple[str, str]
) -> list[dict[str, Any]]:
    layer = np.array(first["layer"])
    a, b = (np.array(t[figure], dtype=float) for t in (first, second))
    rows = []
    for number in np.unique(layer):
        known = (layer == number) & ~np.isnan(a) & ~np.isnan(b)
        row: dict[str, Any] = {"figure": figure, "layer": int(number), "experts": int(known.sum())}
        row |= {"text_a": of[0], "text_b": of[1], "correlation": np.nan, "p": np.nan}
        varied = known.sum() >= LEAST_EXPERTS and all(len(set(v[known])) > 1 for v in (a, b))
        if varied:
            rank = stats.spearmanr(a[known], b[known], alternative="greater")
            row |= {"correlation": float(rank.statistic), "p": float(rank.pvalue)}
        rows.append(row)
    return rows


SEEDS = 5
SHARDS = 2
SPLIT_TOKENS = 4096
"""Most tokens of each shard that a method sees; fewer where the recipe says so."""
CHANCE = 20
"""Random partitions that the stability of chance is the mean of."""


@torch.no_grad()
def seeds(
    model: PreTrainedModel,
    reading: Reading,
    *,
    count: int = SEEDS,
    seed: int = 0,
    report: Reporter | None = None,
    processes: Processes = ALONE,
) -> dict[str, Table]:
    """Columns `stability*` of `experts` and `layers`.

    `model` is from `moefy.load`; its recipe says how it was split. Experts of single neurons leave
    nothing to cluster: their columns are None. `processes`, all of which call this, share out the
    batches and then the layers.
    """
    report, modules = report or Reporter(quiet=True), sparse_mlps(model)
    recipe = from_dict(of(model).artefact.recipe).partition
    rows = []
    with processes.folder() as folder:
        samples = [Captured(folder, f"shard-{number}") for number in range(SHARDS)]
        if any(module.expert_size > 1 for module in modules.values()):
            for batches, sample in zip(halves(reading, seed), samples, strict=True):
                with all_experts(model):
                    capture(
                        model, of(model).sites, batches, sample, seed=seed, report=report,
                        limit=min(SPLIT_TOKENS, recipe.tokens), processes=processes,
                    )  # fmt: skip
        anew = _Anew(model, recipe, samples, count, seed)
        for layer in report.track(processes.mine(list(modules)), "partitions again"):
            rows.append((layer, anew.tables(layer, modules[layer])))
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


@dataclass(frozen=True)
class _Anew:
    """What splits layers anew, by the recipe of the model."""

    model: PreTrainedModel
    recipe: PartitionRecipe
    samples: list[Captured]
    count: int
    seed: int

    def tables(self, layer: int, module: SparseMlp) -> tuple[Table, Table]:
        """The rows of one layer's experts, and its own."""
        experts = module.experts
        if module.expert_size == 1:
            nothing = dict.fromkeys(("stability", "stability_chance"), [None] * experts)
            return of_experts(layer, nothing), table(
                {"layer": [layer], **{n: [None] for n in _NAMES}}
            )
        # In the order of the source, which is what methods that are not invariant go by.
        source_N = of(self.model).artefact.permutation(layer).argsort()
        own_N = (source_N // module.expert_size).numpy()
        partitions = self._partitions(layer, module, source_N)
        jaccard_PE = np.stack([matched(own_N, other_N) for other_N in partitions.values()])
        draw = np.random.default_rng([self.seed, layer])
        # From the sizes alone, so that the order of neurons decides no draw.
        sized_N = np.sort(own_N)
        chance_PE = np.stack([matched(sized_N, draw.permutation(sized_N)) for _ in range(CHANCE)])
        chance_E = np.full(experts, chance_PE.mean())
        columns = {"stability": jaccard_PE.mean(0), "stability_chance": chance_E}
        read = min(len(sample.inputs(of(self.model).sites[layer])) for sample in self.samples)
        agreement = _agreement(partitions, own_N, read)
        return of_experts(layer, columns), table({"layer": [layer], **agreement})

    def _partitions(
        self, layer: int, module: SparseMlp, source_N: Tensor
    ) -> dict[tuple[int, int], Ints]:
        """The layer split anew: the expert of every neuron `[N]` by shard and number of the seed."""
        site, shards = of(self.model).sites[layer], range(len(self.samples))
        mlp = module.weights.on_cpu().take(source_N).to(torch.float32)

        def split(shard: int, number: int) -> Ints:
            sample = self.samples[shard]
            owner_N = partition(
                mlp, sample.inputs(site).float(), experts=module.experts, method=self.recipe.method,
                shared=module.shared, shared_by=self.recipe.shared_by, domain_T=sample.domains(site),
                seed=self.seed + 1 + number, where=f"layer {layer}",
            ).owner_N  # fmt: skip
            return np.asarray(owner_N.numpy())

        anew = {(shard, 0): split(shard, 0) for shard in shards}
        other_seed_N = split(0, 1)
        if adjusted_rand_score(anew[0, 0], other_seed_N) < 1:
            anew[0, 1] = other_seed_N
            for key in itertools.product(shards, range(1, self.count)):
                if key not in anew:
                    anew[key] = split(*key)
        return anew


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
    ari, ami = (
        {(a, b): float(score(partitions[a], partitions[b])) for a, b in pairs}
        for score in (adjusted_rand_score, adjusted_mutual_info_score)
    )
    values = (
        _mean(ari.values()),
        min(ari.values()),
        max(ari.values()),
        _mean(float(adjusted_rand_score(own_N, other_N)) for other_N in partitions.values()),
        _mean(value for (a, b), value in ari.items() if a[1] == b[1]),
        _mean(value for (a, b), value in ari.items() if a[0] == b[0]),
        _mean(ami.values()),
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
