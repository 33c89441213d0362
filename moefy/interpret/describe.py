"""What one pass tells: contributions, examples, direct effects, the statistics of routing, and how all
that compares with random partitions and other texts."""

from transformers import PreTrainedModel

from moefy.console import Reporter
from moefy.interpret.controls.corpora import replication
from moefy.interpret.controls.random_partition import RandomPartitions
from moefy.interpret.description import Description, merged
from moefy.interpret.observe import Listener, observe
from moefy.interpret.reading import Reading
from moefy.interpret.routing_sample import TOKENS, RoutingSample, RoutingSampler, drawn_documents
from moefy.interpret.routing_statistics import routing_statistics
from moefy.interpret.table import Table
from moefy.interpret.unembedding import find_unembedding
from moefy.sparse_mlp import sparse_mlps


def describe(
    model: PreTrainedModel,
    reading: Reading,
    *,
    controls: bool = True,
    seed: int = 0,
    report: Reporter | None = None,
) -> dict[str, Table]:
    """All descriptive tables of a moefied model, from one pass over what is read.

    With `controls` the pass also feeds random partitions, and figures are compared between texts.
    """
    modules = sparse_mlps(model)
    unembedding = None
    if reading.kind == "decoder":
        unembedding = find_unembedding(model, reading.batches[0].inputs["input_ids"][0])
    found = Description(model, reading, unembedding, seed=seed)
    chosen_D = drawn_documents(reading.tokens_D, TOKENS, seed)
    sampler = RoutingSampler(reading.documents, chosen_D, len(modules))
    listeners: list[Listener] = [*found.listeners, sampler]
    random = RandomPartitions(reading, modules, seed=seed) if controls else None
    if random is not None:
        listeners.append(random)
    observe(model, reading, listeners, unembedding=unembedding, report=report)

    def routing(sample: RoutingSample, who: Reporter | None = None) -> dict[str, Table]:
        return routing_statistics(sample, reading.vocabulary, seed=seed, report=who)

    sample = sampler.sample()
    parts = [found.tables(), routing(sample, report)]
    if random is not None:
        parts += [random.tables(report), replication(sample, routing, seed=seed)]
    return merged(parts)
