"""What one pass tells: contributions, examples, direct effects, the statistics of routing, and how all
that compares with random partitions and other texts.

`Description` holds the listeners of what experts contribute, and puts their tables together.
"""

from collections.abc import Iterable

from transformers import PreTrainedModel

from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.account.observe import Listener, Shared, gather, observe
from moefy.inspection.account.unembedding import Unembedding, find_unembedding
from moefy.inspection.controls.corpora import replication
from moefy.inspection.controls.random_partition import RandomPartitions
from moefy.inspection.experts.concepts import Predictivity, enrichment
from moefy.inspection.experts.contributions import Contributions
from moefy.inspection.experts.direct import DirectEffects
from moefy.inspection.experts.examples import Examples, sizes
from moefy.inspection.experts.near_duplicates import neuron_families
from moefy.inspection.experts.router import RouterQualityOfExperts
from moefy.inspection.experts.spectrum import Spectrum
from moefy.inspection.routing.sample import TOKENS, RoutingSample, RoutingSampler, drawn_documents
from moefy.inspection.routing.statistics import routing_statistics
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table
from moefy.run.console import Reporter
from moefy.run.processes import ALONE, Processes


def describe(
    model: PreTrainedModel,
    reading: Reading,
    *,
    controls: bool = True,
    seed: int = 0,
    report: Reporter | None = None,
    processes: Processes = ALONE,
) -> dict[str, Table]:
    """All descriptive tables of a moefied model, from one pass over what is read.

    With `controls` the pass also feeds random partitions, and figures are compared between texts.
    With `processes`, all of which call this, each runs some of the batches and some of the layers'
    random partitions; the first makes the tables, and in the others there are none.
    """
    modules = sparse_mlps(model)
    unembedding = None
    if reading.kind == "decoder":
        unembedding = find_unembedding(model, reading.batches[0].inputs["input_ids"][0])
    found = Description(model, reading, unembedding, seed=seed)
    chosen_D = drawn_documents(reading.tokens_D, TOKENS, seed)
    sampler = RoutingSampler(reading.documents, chosen_D, len(modules))
    shared: list[Shared] = [*found.listeners, sampler]
    random = RandomPartitions(reading, modules, seed=seed) if controls else None
    listeners: list[Listener] = [*shared] if random is None else [*shared, random]
    if not processes.main:
        observe(model, reading, [found.predictivity.scales], batches=[0])
    mine = list(processes.mine(range(len(reading.batches))))
    observe(model, reading, listeners, unembedding=unembedding, batches=mine, report=report)
    gather(shared, modules, processes)
    drawn = {} if random is None else random.tables(report, processes)
    if not processes.main:
        return {}

    def routing(sample: RoutingSample, who: Reporter | None = None) -> dict[str, Table]:
        return routing_statistics(sample, reading.vocabulary, seed=seed, report=who)

    sample = sampler.sample()
    parts = [found.tables(), routing(sample, report)]
    if controls:
        parts += [drawn, replication(sample, routing, seed=seed)]
    return merged(parts)


KEYS = {"layers": ("layer",), "experts": ("layer", "expert")}
"""Tables of which every part gives columns, and the columns that name a row."""


class Description:
    """Everything about contributions, examples, direct effects and neurons of one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        reading: Reading,
        unembedding: Unembedding | None,
        *,
        seed: int = 0,
    ) -> None:
        self.modules, self.seed = sparse_mlps(model), seed
        kept, sampled = sizes(sum(module.experts for module in self.modules.values()))
        self.contributions = Contributions(reading.documents)
        self.router = RouterQualityOfExperts(reading, seed=seed)
        self.examples = Examples(reading.documents, kept=kept, sampled=sampled, seed=seed)
        self.spectrum = Spectrum()
        self.direct = DirectEffects(reading, unembedding, self.spectrum, seed=seed)
        self.predictivity = Predictivity(reading, seed=seed)

    @property
    def listeners(self) -> list[Shared]:
        """What `observe` hands ledgers to."""
        return [
            self.contributions,
            self.router,
            self.examples,
            self.spectrum,
            self.direct,
            self.predictivity,
        ]

    def tables(self) -> dict[str, Table]:
        """All tables, once the pass is over."""
        return merged(
            [
                self.contributions.tables(),
                self.router.tables(),
                self.examples.tables(),
                self.spectrum.tables(),
                self.direct.tables(),
                enrichment(self.predictivity, seed=self.seed),
                neuron_families(self.modules),
            ]
        )


def merged(parts: Iterable[dict[str, Table]]) -> dict[str, Table]:
    """Tables of several parts as one set: those of `KEYS` side by side, all others by name."""
    found: dict[str, Table] = {}
    for part in parts:
        for name, given in part.items():
            if name not in found:
                found[name] = dict(given)
                continue
            have = found[name]
            assert name in KEYS, f"two parts give the table {name}"
            assert all(have[key] == given[key] for key in KEYS[name]), f"rows of {name} differ"
            twice = have.keys() & given.keys() - set(KEYS[name])
            assert not twice, f"two parts give {sorted(twice)} of {name}"
            have |= given
    return found
