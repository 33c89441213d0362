"""From a checkpoint folder and a corpus to the batches its model can run."""

import reprlib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer

from moefy.data.corpus import Batch, Corpus, Sample, make_batches
from moefy.errors import CheckpointError, CorpusError
from moefy.models.answers import answer_of_class
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import meta_model, model_class
from moefy.models.refusals import refuse_pointer
from moefy.run.arguments import checked
from moefy.run.reading import reading

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


_SENTENCES = ("tokenizer.model", "spiece.model")
"""Tokenizers that only sentencepiece reads; transformers prefers a `tokenizer.json`."""
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_FIXED_SIZE = ("vit", "deit")
"""Types of models that take images of one size alone."""


@checked
def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder, or None where it has none.

    Raises `CheckpointError` where it has one that cannot be read.
    """
    folder = Path(folder)
    there = [name for name in _TOKENIZER_FILES if (folder / name).exists()]
    if not there:
        return None
    for name in (*there, "tokenizer_config.json"):
        refuse_pointer(folder / name)
    remedy = "copy or download the tokenizer again"
    if all(name in _SENTENCES for name in there):
        missing = [n for n in ("sentencepiece", "google.protobuf") if not _is_installed(n)]
        remedy = (
            f"{there[0]} alone is read by sentencepiece: pip install sentencepiece protobuf, or have "
            "transformers save the tokenizer once, which writes tokenizer.json"
        )
        if missing:
            raise CheckpointError(f"{folder / there[0]}: cannot be read here; {remedy}")
    with reading(folder / there[0], remedy):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: model_max_length: got "
            f"{reprlib.repr(tokenizer.model_max_length)}, must be a number; {remedy}"
        )
    return tokenizer


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not
        return False


def load_processor(folder: Path) -> Callable[[Tensor], Tensor] | None:
    """What makes `pixel_values` of a picture `[3, H, W]` (uint8) for a model folder; None where it does
    not say.

    Raises `CheckpointError` where it does in a way that cannot be read.
    """
    there = [name for name in _PROCESSOR_FILES if (folder / name).exists()]
    if not there:
        return None
    from transformers import AutoImageProcessor

    refuse_pointer(folder / there[0])
    with reading(folder / there[0], "copy or download the image processor again"):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)

    def process(picture: Tensor) -> Tensor:
        with reading(folder / there[0], "it does not take this picture", CorpusError):
            images = processor(
                images=picture.numpy(), return_tensors="pt", input_data_format="channels_first"
            )
            pixels: Tensor = images["pixel_values"][0]
        return pixels

    return process


def read_batches(
    checkpoint: Checkpoint, kind: str, corpus: Corpus, context: int, limit: int | None = None
) -> list[Batch]:
    """Batches of the corpus for a model of this kind (`Family.kind`).

    Documents are cut to `context` tokens, or to what the model's positions allow; `limit` stops
    after about so many tokens, taking domains in turn. Raises `CorpusError` where nothing is left.
    """
    config = read_config(checkpoint)
    # Documents of token ids need no tokenizer, a broken one included; images that are pixel_values
    # already no processor.
    textual = any(doc.text for doc in corpus.documents)
    pictures = any(doc.is_picture for doc in corpus.documents)
    reader: Any = load_tokenizer(checkpoint.folder) if textual and kind != "image" else None
    if pictures and kind == "image":
        reader = load_processor(checkpoint.folder)
    everything = corpus.take(len(corpus.documents))
    samples = everything.samples(reader, kind, min(context, _positions(config, kind)))
    samples = _for_class(config, samples)
    if limit is not None:
        size, count = 0, 0
        while count < len(samples) and size < limit:
            size += max(len(value) for value in samples[count].inputs.values())
            count += 1
        samples = samples[:count] if kind != "image" else samples
    if not samples:
        raise CorpusError(f"corpus {corpus.name}: no document has two tokens or more")
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 1
    if kind == "image":
        _require_size(samples, config, corpus.name)
    else:
        _require_known(samples, vocabulary, reader, corpus.name)
    # Logits are the largest thing in memory: about half a gigabyte of them at a time.
    return make_batches(samples, tokens=min(4096, max(512, 2**27 // vocabulary)))


TRIED = 8
"""Documents that a plan reads."""


def try_reading(checkpoint: Checkpoint, kind: str, corpus: Corpus, context: int) -> list[str]:
    """Read a few documents as a run would; returns what a plan should say of it.

    Raises what `read_batches` raises, but for a folder that holds no tokenizer or a corpus without images,
    which a plan can do without.
    """
    few = corpus.take(TRIED)
    if kind == "image":
        if all(document.image is None for document in few.documents):
            return [
                f"note: the model reads images, and corpus {corpus.name} has none; give --corpus"
            ]
        read_batches(checkpoint, kind, few, context)
        return []
    reader = load_tokenizer(checkpoint.folder) if any(doc.text for doc in few.documents) else None
    if reader is None and any(doc.text for doc in few.documents):
        return ["note: the folder has no tokenizer; a corpus has to be given as token ids"]
    read_batches(checkpoint, kind, few, context)
    known = getattr(read_config(checkpoint).get_text_config(), "vocab_size", None) or 0
    if reader is None or len(reader) <= known:
        return []
    return [
        f"note: the tokenizer has {len(reader)} tokens, the model knows {known}; a text with one of the "
        "others is refused"
    ]


def _for_class(config: Any, samples: list[Sample]) -> list[Sample]:
    """Samples as the class of the model takes them: without targets where it predicts no next token,
    padded by its own padding token where that says which token is a text's last."""
    answer = answer_of_class(model_class(config), config)
    pad = getattr(config.get_text_config(), "pad_token_id", None) if answer.pooled else None
    predicts = answer.form == "next"
    return [
        replace(sample, targets_T=sample.targets_T if predicts else None, pad=pad or 0)
        for sample in samples
    ]


def _require_known(samples: list[Sample], vocabulary: int, tokenizer: Any, corpus: str) -> None:
    """Raise `CorpusError` for token ids that the model does not have."""
    ids = [v for s in samples for n, v in s.inputs.items() if n.endswith("input_ids")]
    largest = max(int(v.max()) for v in ids)
    if largest < vocabulary:
        return
    if tokenizer is None:
        raise CorpusError(
            f"corpus {corpus}: token id {largest}, the model knows {vocabulary}; tokenize with the "
            "model's own tokenizer"
        )
    raise CorpusError(
        f"corpus {corpus}: the folder's tokenizer has {len(tokenizer)} tokens and gave {largest}, the "
        f"model knows {vocabulary}; it is not the tokenizer of this model: put that one in its place, "
        "or give the model after resize_token_embeddings and training"
    )


def _require_size(samples: list[Sample], config: Any, corpus: str) -> None:
    """Raise `CorpusError` for images of several sizes, or of one that the model does not take."""
    shapes = sorted({tuple(sample.inputs["pixel_values"].shape) for sample in samples})
    size = getattr(config, "image_size", None)
    wanted = tuple(size) if isinstance(size, list | tuple) else (size, size)
    fixed = config.model_type in _FIXED_SIZE and size is not None
    channels = getattr(config, "num_channels", None) or shapes[0][0]
    if len(shapes) == 1 and shapes[0][0] == channels and (not fixed or shapes[0][1:] == wanted):
        return
    got = ", ".join("x".join(map(str, shape)) for shape in shapes[:3])
    takes = f"{channels}x{wanted[0]}x{wanted[1]}" if size is not None else "one size"
    raise CorpusError(
        f"corpus {corpus}: images of {got}{', ...' if shapes[3:] else ''}, the model takes {takes}; "
        f"resize them, or put the model's own {_PROCESSOR_FILES[0]} into its folder for pictures"
    )


def _positions(config: Any, kind: str) -> int:
    """Tokens that the model has positions for."""
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    found = [int(limit) for limit in limits if limit]
    if kind == "encoder":
        # RoBERTa and its kin number positions from the padding id + 1 on; their tables say so.
        found += [
            table.num_embeddings - table.padding_idx - 1
            for name, table in meta_model(config).named_modules()
            if isinstance(table, nn.Embedding) and table.padding_idx is not None
            and name.rpartition(".")[2] == "position_embeddings"
        ]  # fmt: skip
    return min(found, default=1 << 30)
