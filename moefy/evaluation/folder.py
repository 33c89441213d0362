"""Evaluate a folder that `convert` wrote, or a dense checkpoint: what `moefy eval` calls."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import Batch, Corpus, load_corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import BIGRAM_TOKENS, of_conversion
from moefy.errors import CorpusError, MoefyError, RecipeError, UnsupportedModel
from moefy.evaluation.bigram import Bigram
from moefy.evaluation.evaluate import evaluate as evaluate_batches
from moefy.evaluation.evaluate import evaluate_dense
from moefy.experts.loading import open_model
from moefy.experts.moefied import of
from moefy.experts.passes import walk, watching
from moefy.experts.sparse_mlp import all_experts
from moefy.methods.tables import ROUTERS, choose
from moefy.models.artefact import Artefact, is_artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import sites
from moefy.recipe import Recipe, from_dict
from moefy.run.computing import asked
from moefy.run.console import Reporter
from moefy.run.memory import peak_memory
from moefy.run.reading import read_json

BITS = 2
"""Bits a weight of a `low_bit` router that takes the place of another."""

RECORDS = "records.json"
"""What was measured when a folder was made."""

INPUTS = 0.25
"""Share of the inputs that a `largest_inputs` router reads which takes the place of another."""


@asked
def evaluate(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    corpus: Any = None,
    documents: int = 1 << 30,
    router: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """`moefy.evaluation.evaluate.evaluate` for a folder, on its evaluation shard.

    The corpus it was converted with is split as conversion split it; any other corpus is read
    whole. The bigram of language models is fitted on the other shards, or on the bundled corpus
    where another one is evaluated. `router` puts another router that needs no fitting in the place
    of the fitted one. `seed` draws the resamples of intervals. A dense checkpoint, folder or Hub id, has
    its cross-entropy alone. Weights that were rounded are compared with themselves, all experts on, unless
    `against` names the source; `rounding_kl` is what the conversion measured between the two.
    """
    if documents < 1:
        raise MoefyError(f"--documents {documents}: expected 1 or more")
    if not is_artefact(Path(folder)):
        if against is not None or router is not None:
            option = "--against" if against is not None else "--router"
            raise MoefyError(f"{folder}: a dense model, without experts; {option} needs them")
        return _evaluate_dense(folder, load_corpus(corpus), documents, seed, quiet)
    model = open_model(folder, verify=True, dense=False)
    dense = None if against is None else open_model(against, dense=True)
    record = _evaluate_moefied(model, dense, load_corpus(corpus), documents, router, seed, quiet)
    bits = of(model).artefact.rounded
    if bits is None or against is not None:
        return record
    dense_is = f"{record['dense']}, its MLP weights rounded to {bits} bits"
    return {**record, "dense": dense_is, **_rounding(Path(folder))}


def _rounding(folder: Path) -> dict[str, float]:
    """What rounding alone costs, where the records of a folder say so."""
    file = folder / RECORDS
    records = read_json(file) if file.is_file() else {}
    conversion = records.get("conversion") if isinstance(records, dict) else None
    value = conversion.get("rounding_kl") if isinstance(conversion, dict) else None
    return {"rounding_kl": value} if isinstance(value, float) else {}


def _evaluate_moefied(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    text: Corpus,
    documents: int,
    router: str | None,
    seed: int,
    quiet: bool,
) -> dict[str, Any]:
    moefied = of(model)
    artefact, weights, kind = moefied.artefact, moefied.checkpoint, moefied.kind
    context = from_dict(artefact.recipe).context
    texts = _texts(text, artefact)
    evaluated = texts.evaluated.take(documents)
    batches = read_batches(weights, kind, evaluated, context)
    bigram, of_bigram = _bigram(model, batches, texts.bigram, context)
    if router is not None:
        _replace_routers(model, router, batches)
    record = evaluate_batches(
        model, batches, against=dense, bigram=bigram, report=Reporter(quiet=quiet), seed=seed
    )
    return {
        **record,
        "domains_left_out": _left_out(texts.evaluated, record),
        "bigram": record.get("bigram", {}) | of_bigram,
        "overlap": evaluated.overlap(texts.not_evaluated),
        "overlap_with": texts.compared,
        "model": artefact.source["name"],
        "peak_memory": peak_memory(),
        "router": router or artefact.layers[0].router["name"],
        "corpus": {"name": texts.evaluated.name, "sha256": texts.corpus_sha256},
        "recipe": artefact.recipe,
    }


def _left_out(corpus: Corpus, record: dict[str, Any]) -> list[str]:
    """Domains of which no document was evaluated: too few were asked for, or theirs are too short."""
    return sorted(set(corpus.domains) - set(record["domains"]))


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


def _evaluate_dense(
    where: str | Path, text: Corpus, documents: int, seed: int, quiet: bool
) -> dict[str, Any]:
    """What the text alone says of a dense model, read whole."""
    weights, model = Checkpoint.open(where), open_model(where, dense=True)
    kind = sites(model)[0].family.kind
    batches = read_batches(weights, kind, text.take(documents), Recipe().context)
    if batches[0].targets_BT is None:
        raise UnsupportedModel(
            f"{where}: a dense {type(model).__name__}, which predicts no tokens; there is nothing to measure"
        )
    record = evaluate_dense(model, batches, report=Reporter(quiet=quiet), seed=seed)
    return {
        **record,
        "domains_left_out": _left_out(text, record),
        "model": str(where),
        "peak_memory": peak_memory(),
        "corpus": {"name": text.name, "sha256": text.sha256},
    }


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
