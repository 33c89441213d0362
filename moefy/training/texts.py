"""What training reads: documents to train on, to check on and to evaluate on, none of them twice."""

from dataclasses import dataclass

from moefy.data.corpus import Batch, Corpus, Sample, sample_length
from moefy.data.inputs import read_batches
from moefy.data.shards import EVALUATED_DOCUMENTS, HELD_OUT_TOKENS, by_role
from moefy.errors import CorpusError
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import meta_model, sites
from moefy.training.recipe import TrainingRecipe


@dataclass(frozen=True)
class Texts:
    """Tokenized documents."""

    train: list[Sample]
    held: list[Batch]
    """For the checks while it trains."""
    evaluated: list[Batch]
    """For the figures before and after."""


def read_texts(source: Checkpoint, text: Corpus, recipe: TrainingRecipe, seed: int) -> Texts:
    """Split a corpus as conversion with this seed splits it: training reads what that fits on.

    Raises `CorpusError` where that is less than one step.
    """
    texts = by_role(text, seed)
    kind = sites(meta_model(read_config(source)))[0].family.kind
    read = read_batches(source, kind, texts["training"], recipe.context)
    samples = [sample for batch in read for sample in batch.samples]
    tokens = sum(map(sample_length, samples))
    if tokens < recipe.batch_tokens:
        raise CorpusError(
            f"corpus {text.name}: {tokens} tokens to train on, one step takes "
            f"{recipe.batch_tokens}; give more text or a smaller batch_tokens"
        )
    evaluated = texts["evaluation"].take(EVALUATED_DOCUMENTS)
    return Texts(
        samples,
        read_batches(source, kind, texts["held-out"], recipe.context, HELD_OUT_TOKENS),
        read_batches(source, kind, evaluated, recipe.context),
    )
