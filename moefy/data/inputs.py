"""From a checkpoint folder and a corpus to the batches its model can run."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from moefy.data.corpus import Batch, Corpus, make_batches
from moefy.errors import CorpusError
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, or None where it has none."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def read_batches(
    checkpoint: Checkpoint, kind: str, corpus: Corpus, context: int, limit: int | None = None
) -> list[Batch]:
    """Batches of the corpus for a model of this kind (`Family.kind`).

    Documents are cut to `context` tokens, or to what the model's positions allow; `limit` stops
    after about so many tokens, taking domains in turn. Raises `CorpusError` where nothing is left.
    """
    config = read_config(checkpoint)
    # Documents of token ids need no tokenizer, a broken one included.
    textual = any(doc.text for doc in corpus.documents)
    tokenizer = load_tokenizer(checkpoint.folder) if textual else None
    everything = corpus.take(len(corpus.documents))
    samples = everything.samples(tokenizer, kind, min(context, _positions(config)))
    if limit is not None:
        size, count = 0, 0
        while count < len(samples) and size < limit:
            size += max(len(value) for value in samples[count].inputs.values())
            count += 1
        samples = samples[:count] if kind != "image" else samples
    if not samples:
        raise CorpusError(f"corpus {corpus.name}: no document has two tokens or more")
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 1
    if kind != "image":
        ids = [v for s in samples for n, v in s.inputs.items() if n.endswith("input_ids")]
        largest = max(int(v.max()) for v in ids)
        if largest >= vocabulary:
            raise CorpusError(
                f"corpus {corpus.name}: token id {largest}, the model knows {vocabulary}; "
                "tokenize with the model's own tokenizer"
            )
    # Logits are the largest thing in memory: about half a gigabyte of them at a time.
    return make_batches(samples, tokens=min(4096, max(512, 2**27 // vocabulary)))


def _positions(config: Any) -> int:
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    found = min((int(limit) for limit in limits if limit), default=1 << 30)
    # RoBERTa numbers its positions from the padding id + 1 on.
    return found - 2 if config.model_type in ("roberta",) else found
