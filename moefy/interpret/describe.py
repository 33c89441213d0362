"""What one pass tells: contributions, examples, direct effects, the statistics of routing, and how all
that compares with random partitions and other texts."""

from transformers import PreTrainedModel

from moefy.console import Reporter
from moefy.interpret.controls.corpora import replication
from moefy.interpret.controls.random_partition import RandomPartitions
from moefy.interpret.description import Description, merged
from moefy.interpret.gather import Shared, gather
from moefy.interpret.observe import Listener, observe
from moefy.interpret.reading import Reading
from moefy.interpret.routing_sample import TOKENS, RoutingSample, RoutingSampler, drawn_documents
from moefy.interpret.routing_statistics import routing_statistics
from moefy.interpret.table import Table
from moefy.interpret.unembedding import find_unembedding
from moefy.processes import ALONE, Processes
from moefy.sparse_mlp import sparse_mlps


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
