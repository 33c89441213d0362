"""Evaluate and run folders that `convert` wrote: what the CLI's verbs call."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import Batch, Corpus, load_corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import BIGRAM_TOKENS, of_conversion
from moefy.errors import CorpusError, RecipeError
from moefy.evaluation.bigram import Bigram
from moefy.evaluation.evaluate import evaluate
from moefy.experts.loading import open_model
from moefy.experts.moefied import of
from moefy.experts.passes import walk, watching
from moefy.experts.sparse_mlp import all_experts
from moefy.methods.tables import ROUTERS, choose
from moefy.models.artefact import Artefact
from moefy.recipe import from_dict
from moefy.run.console import Reporter
from moefy.run.memory import peak_memory

BITS = 2
"""Bits a weight of a `low_bit` router that takes the place of another."""

INPUTS = 0.25
"""Share of the inputs that a `largest_inputs` router reads which takes the place of another."""


def evaluate_folder(
    folder: Path,
    *,
    against: str | None = None,
    corpus: Any = None,
    documents: int = 1 << 30,
    router: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """`moefy.evaluation.evaluate.evaluate` for a folder, on its evaluation shard.

    The corpus it was converted with is split as conversion split it; any other corpus is read
    whole. The bigram of language models is fitted on the other shards, or on the bundled corpus
    where another one is evaluated. `router` puts another router that needs no fitting in the place
    of the fitted one.
    """
    model = open_model(folder, verify=True, dense=False)
    moefied = of(model)
    artefact, weights, kind = moefied.artefact, moefied.checkpoint, moefied.kind
    recipe = from_dict(artefact.recipe)
    texts = _texts(load_corpus(corpus), artefact)
    evaluated = texts.evaluated.take(documents)
    batches = read_batches(weights, kind, evaluated, recipe.context)
    bigram, of_bigram = _bigram(model, batches, texts.bigram, recipe.context)
    if router is not None:
        _replace_routers(model, router, batches)
    dense = None if against is None else open_model(against, dense=True)
    record = evaluate(model, batches, against=dense, bigram=bigram, report=Reporter(quiet=quiet))
    return {
        **record,
        "bigram": record.get("bigram", {}) | of_bigram,
        "overlap": evaluated.overlap(texts.not_evaluated),
        "overlap_with": texts.compared,
        "model": artefact.source["name"],
        "peak_memory": peak_memory(),
        "router": router or artefact.layers[0].router["name"],
        "corpus": {"name": texts.evaluated.name, "sha256": texts.corpus_sha256},
        "recipe": artefact.recipe,
    }


def _bigram(
    model: PreTrainedModel, batches: list[Batch], corpus: Corpus, context: int
) -> tuple[Bigram | None, dict[str, Any]]:
    """A bigram of this text for these batches, and its corpus or why there is none."""
    if batches[0].targets_BT is None:
        return None, {"tokens": 0, "why": "only language models have one"}
    moefied = of(model)
    try:
        text = read_batches(moefied.checkpoint, moefied.kind, corpus, context, BIGRAM_TOKENS)
    except CorpusError as error:
        return None, {"tokens": 0, "why": str(error)}
    return Bigram(text, model.config.get_text_config().vocab_size), {"corpus": corpus.name}


@dataclass
class _Texts:
    """What is evaluated, and what must not be in it."""

    corpus_sha256: str
    evaluated: Corpus
    bigram: Corpus
    """What the bigram is fitted on."""
    fitted: Corpus
    """What the model was fitted on, as far as it is at hand."""
    compared: str
    """With what `overlap` compares, in words."""

    @property
    def not_evaluated(self) -> Corpus:
        """All that something was fitted on."""
        return replace(self.fitted, documents=self.fitted.documents + self.bigram.documents)


def _texts(text: Corpus, artefact: Artefact) -> _Texts:
    own, bundled = of_conversion(text, artefact), load_corpus()
    if own is not None:
        fitted = replace(own["fitted"], name=artefact.corpus["name"])
        what = "the other shards of the corpus"
        return _Texts(text.sha256, own["evaluation"], fitted, fitted, what)
    own = of_conversion(bundled, artefact)
    fitted = Corpus(artefact.corpus["name"], [] if own is None else own["fitted"].documents)
    what = "the bigram's text and the fitting shards of the bundled corpus"
    if own is None:
        what = "the bigram's text alone; the corpus of the conversion is not at hand"
    return _Texts(text.sha256, text, bundled.without(text), fitted, what)


@torch.no_grad()
def _replace_routers(model: PreTrainedModel, name: str, batches: list[Batch]) -> None:
    """Put another router into every layer; those that look at tokens see the first batch, dense."""
    kind = choose(ROUTERS, "router", name)
    if kind.trainable:
        raise RecipeError(
            f"router '{name}' needs fitting: convert again with --set router.name={name}"
        )
    modules = of(model).mlps

    def put(layer: int, x_TD: Tensor, _: Tensor) -> None:
        module = modules[layer]
        routed = module.routed.to(torch.float32)
        settings = {"hidden": 0, "bits": BITS, "inputs": round(INPUTS * routed.width)}
        router = kind.make(routed.width, module.experts - module.shared, routed.neurons, settings)
        router.initialise(routed, x_TD.float(), module.weights.to(torch.float32))
        module.router = router.to(x_TD.device)

    with all_experts(model), watching(modules, put):
        walk(model, batches[0])
    for module in modules.values():
        module.look_ahead = False
