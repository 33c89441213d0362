"""Corpora with domain and source labels, and batches a model can run.

A *document* is one piece of text, its *domain* the label of its corpus, its *source* the work it was
cut from.

    corpus = load_corpus()                       # the bundled one; or a path, or a dataset's name
    batches = make_batches(corpus.samples(tokenizer, "decoder", context=512))

It knows nothing of experts. Shapes: B documents of a batch, T tokens, D model width.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.data.files import (
    PICTURES,
    PIECE_BYTES,
    RECORDS,
    STACKS,
    Records,
    checked,
    cut_text,
    json_lines,
    kind_of,
    read_picture,
    read_records,
    read_stacks,
    read_text,
    sound,
    token_ids,
)
from moefy.errors import CorpusError
from moefy.run.computing import now

SEPARATOR = "<|endoftext|>"
MANY_SOURCES = 20
BATCH_TOKENS = 4096
"""Positions of a batch, about."""
IGNORED = -100
"""Target of a position that predicts nothing, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Document:
    """One document: text, or token ids, or an image `[C, H, W]`: `pixel_values`, or a picture (uint8)."""

    domain: str
    source_id: str
    text: str = ""
    ids: tuple[int, ...] = ()
    image: Tensor | None = None

    @property
    def is_picture(self) -> bool:
        """Whether a model's image processor has yet to make `pixel_values` of its image."""
        return self.image is not None and self.image.dtype == torch.uint8

    @property
    def sha256(self) -> str:
        """Digest of the content alone: the same text under another label is the same document."""
        digest = hashlib.sha256(f"{self.text}\0{self.ids}\0".encode())
        if self.image is not None:
            digest.update(str(tuple(self.image.shape)).encode())
            digest.update(self.image.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Sample:
    """What a model reads of one document and should predict: 1-D tensors, or one image."""

    document: Document
    inputs: dict[str, Tensor]
    targets_T: Tensor | None
    """Token to predict at each position, `IGNORED` if there is none."""
    bytes: int
    """UTF-8 bytes of the predicted tokens; 0 where the document has no text."""
    pad: int = 0
    """Token that fills up ids behind it."""


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to one length."""

    samples: list[Sample]
    inputs: dict[str, Tensor]
    targets_BT: Tensor | None

    def mask(self, side: str = "decoder") -> Tensor | None:
        """Positions that hold tokens `[B, T]` (bool); None if there is no padding at all."""
        name = "decoder_attention_mask" if side == "decoder" else "attention_mask"
        mask = self.inputs.get(name, self.inputs.get("attention_mask"))
        return None if mask is None else mask.bool()


@dataclass(frozen=True)
class Corpus:
    """Documents with labels; `name` is what a record calls them."""

    name: str
    documents: list[Document] = field(repr=False)

    @property
    def domains(self) -> list[str]:
        """The domains, sorted."""
        return sorted({doc.domain for doc in self.documents})

    @property
    def sha256(self) -> str:
        """Digest of every document and label, in order."""
        digest = hashlib.sha256()
        for doc in self.documents:
            digest.update(f"{doc.domain}\0{doc.source_id}\0{doc.text}\0{doc.ids}\0".encode())
            if doc.image is not None:
                digest.update(doc.image.numpy().tobytes())
        return digest.hexdigest()

    def without(self, other: "Corpus") -> "Corpus":
        """The documents whose content is in no document of `other`."""
        known = {doc.sha256 for doc in other.documents}
        return replace(self, documents=[d for d in self.documents if d.sha256 not in known])

    def overlap(self, other: "Corpus") -> int:
        """How many documents have the content of some document of `other`."""
        return len(self.documents) - len(self.without(other).documents)

    def take(self, documents: int) -> "Corpus":
        """At most this many documents, the same number of every domain as far as they reach."""
        by_domain: dict[str, list[Document]] = defaultdict(list)
        for doc in self.documents:
            by_domain[doc.domain].append(doc)
        rounds = range(max(map(len, by_domain.values()), default=0))
        ordered = [docs[r] for r in rounds for docs in by_domain.values() if r < len(docs)]
        return replace(self, documents=ordered[:documents])

    def samples(self, tokenizer: Any, kind: str, context: int) -> list[Sample]:
        """Tokenize every document for a model of this kind; those of under two tokens are left out.

        `kind` is `decoder`, `encoder`, `encoder-decoder` or `image`; for images `tokenizer` makes
        `pixel_values` of pictures, which stand between -1 and 1 where it is None. Raises
        `CorpusError` where the documents are text and there is no tokenizer, or are not what the
        kind needs.
        """
        found = [_sample(doc, tokenizer, kind, context) for doc in self.documents]
        return [sample for sample in found if sample is not None]


def load_corpus(source: str | Path | Corpus | Sequence[Any] | None = None) -> Corpus:
    """Read a corpus.

    `None` is the bundled one. `.jsonl` has one record a line, `{"text"` or `"input_ids"`, `"domain"`,
    `"source_id"}`; `.json` an array of such, `.csv`, `.tsv` and `.parquet` rows; any other file is
    text, its documents separated by `<|endoftext|>` lines; all may end in `.gz`, `.bz2` or `.xz`.
    Texts longer than `PIECE_BYTES` are cut, at line ends if there are any. A folder has one
    sub-folder per domain with such files in it, or such files, or images; hidden ones are left out.
    `.npy` or `.safetensors` is a stack of `pixel_values`. A name that is no path is given to
    `datasets`. A list holds texts, lists of token ids, records, or images `[C, H, W]`.

    Raises `CorpusError` for anything empty or unreadable.
    """
    if isinstance(source, Corpus):
        return source
    if source is None:
        text = (resources.files("moefy") / "demo" / "corpus.jsonl").read_text(encoding="utf-8")
        records = json_lines(text, "bundled corpus")
        return Corpus("bundled", _documents(records, "bundled corpus", "text"))
    if not isinstance(source, str | Path):
        corpus = Corpus(
            "in memory", [d for i, item in enumerate(source) for d in _in_memory(i, item)]
        )
    else:
        corpus = Corpus(Path(source).name, _from_path(source))
    if not corpus.documents:
        raise CorpusError(f"corpus {source}: holds no text; give files with some")
    return corpus


def _from_path(source: str | Path) -> list[Document]:
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path, path.stem)
    if kind_of(path) in (".txt", *STACKS, *RECORDS):
        raise CorpusError(f"corpus {path}: no such file")
    return _dataset(str(source))


def _folder(path: Path) -> list[Document]:
    documents = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        # What a tool keeps for itself (.git, .ipynb_checkpoints) is no text.
        if file.is_file() and not any(part.startswith(".") for part in parts):
            documents += _file(file, parts[0] if len(parts) > 1 else path.name)
    return documents


def _file(path: Path, domain: str) -> list[Document]:
    kind = kind_of(path)
    if kind in PICTURES:
        return [Document(domain, path.name, image=read_picture(path))]
    if kind in STACKS:
        images = [image for stack in read_stacks(path) for image in stack]
        return [Document(domain, str(i), image=image.float()) for i, image in enumerate(images)]
    if kind in RECORDS:
        return _documents(read_records(path), str(path), domain)
    pieces = [piece for part in read_text(path).split(SEPARATOR) for piece in cut_text(part)]
    return [Document(domain, path.name, piece) for piece in pieces]


def _documents(records: Records, where: str, domain: str) -> list[Document]:
    found = []
    for place, row in records:
        source = f"{where}:{place.rpartition(' ')[2]}"
        try:
            found += _record(row, domain, source)
        except (ValueError, TypeError) as error:
            raise CorpusError(
                f"corpus {where}: {place} is not a document ({error}); mend it or leave it out"
            ) from None
    return found


def _record(row: Any, domain: str, source: str) -> list[Document]:
    """The documents of one record, cut as texts are. Raises what `checked` raises."""
    domain, source, text, ids = checked(row, domain, source)
    if ids or len(text.encode()) <= PIECE_BYTES:
        return [Document(domain, source, text, ids)] if ids or text.strip() else []
    return [Document(domain, source, piece) for piece in cut_text(text)]


def _dataset(name: str) -> list[Document]:
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            f"corpus {name}: no such file or folder; if it is a dataset's name, pip install moefy[datasets]"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise CorpusError(f"corpus {name}: datasets cannot load it ({error})") from error
    if "text" not in rows.column_names:
        raise CorpusError(f"corpus {name}: no column 'text'; it has {', '.join(rows.column_names)}")
    records = ((f"row {number}", row) for number, row in enumerate(rows))
    return _documents(records, name, name)


def _in_memory(index: int, item: Any) -> list[Document]:
    picture = isinstance(item, Tensor) and item.ndim == 3 and item.dtype == torch.uint8
    if picture or (isinstance(item, Tensor) and item.is_floating_point()):
        return [Document("images", str(index), image=item)]
    try:
        if isinstance(item, str):
            return [Document("text", str(index), sound(item))]
        if isinstance(item, dict):
            return _record(item, "text", str(index))
        return [Document("tokens", str(index), ids=token_ids(item))]
    except (ValueError, TypeError) as error:
        raise CorpusError(
            f"corpus in memory: item {index} is not a document ({error}); give texts, lists of token "
            "ids, records or images [C, H, W]"
        ) from None


def _sample(doc: Document, tokenizer: Any, kind: str, context: int) -> Sample | None:
    if kind == "image":
        if doc.image is None:
            raise CorpusError(
                f"document {doc.source_id}: not an image; give pixel_values [C, H, W], a .npy of "
                "them, or a folder of image files as the corpus"
            )
        pixels = doc.image
        if doc.is_picture:
            pixels = pixels / 127.5 - 1 if tokenizer is None else tokenizer(pixels)
        return Sample(doc, {"pixel_values": pixels}, None, 0)
    ids, ends = _tokenize(doc, tokenizer, kind)
    if kind == "encoder":
        ids_T = torch.tensor(ids[:context])
        return Sample(doc, {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)}, None, 0)
    if kind == "encoder-decoder":
        ids, ends = ids[: 2 * context], ends[: 2 * context]
        half = len(ids) // 2
        if half < 1:
            return None
        start = getattr(tokenizer, "pad_token_id", None) or 0
        read_T, target_T = torch.tensor(ids[:half]), torch.tensor(ids[half:])
        decoder_T = torch.cat([torch.tensor([start]), target_T[:-1]])
        inputs = {
            "input_ids": read_T,
            "attention_mask": torch.ones_like(read_T),
            "decoder_input_ids": decoder_T,
            "decoder_attention_mask": torch.ones_like(decoder_T),
        }
        return Sample(doc, inputs, target_T, _span(doc, ends, half))
    ids, ends = ids[:context], ends[:context]
    if len(ids) < 2:
        return None
    ids_T = torch.tensor(ids)
    targets_T = torch.cat([ids_T[1:], torch.tensor([IGNORED])])
    inputs = {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)}
    return Sample(doc, inputs, targets_T, _span(doc, ends, 1))


def _tokenize(doc: Document, tokenizer: Any, kind: str) -> tuple[list[int], list[int]]:
    """Token ids, and where in the text each token ends (empty for documents of ids)."""
    if doc.ids:
        return list(doc.ids), []
    if tokenizer is None:
        raise CorpusError(
            "the model folder has no tokenizer; give the corpus as token ids: .jsonl lines with "
            '"input_ids", or lists of ids from Python'
        )
    encoded = tokenizer(
        doc.text, return_offsets_mapping=tokenizer.is_fast, truncation=False, verbose=False
    )
    ids = list(encoded["input_ids"])
    ends = [int(end) for _, end in encoded["offset_mapping"]] if tokenizer.is_fast else []
    bos = tokenizer.bos_token_id
    if kind == "decoder" and bos is not None and ids[:1] != [bos]:
        # The first token of the text is predicted too, from the token the model saw at starts.
        ids, ends = [bos, *ids], [0, *ends] if ends else []
    return ids, ends


def _span(doc: Document, ends: list[int], first: int) -> int:
    """Bytes of text that the tokens from position `first` on cover."""
    if not ends:
        return 0
    return len(doc.text[ends[first - 1] : max(ends)].encode())


def make_batches(samples: Iterable[Sample], tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Pad samples of like length together, about this many positions (or 8 images) a batch, and no more
    documents than the caller asks for (`moefy.run.computing`)."""
    ordered, most = sorted(samples, key=sample_length), now().batch_size or BATCH_DOCUMENTS
    batches: list[Batch] = []
    group: list[Sample] = []
    for sample in ordered:
        size = (len(group) + 1) * sample_length(sample)
        if group and (size > tokens or len(group) >= most):
            batches.append(_pad(group))
            group = []
        group.append(sample)
    return [*batches, _pad(group)] if group else batches


def sampler(
    samples: list[Sample], tokens: int, seed: int, least: int = 1
) -> Iterator[list[Sample]]:
    """The documents of one training step after the other, without end: about `tokens` positions each,
    and at least `least` documents. They are drawn anew in every round, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    group: list[Sample] = []
    size = 0
    while True:
        for index in torch.randperm(len(samples), generator=generator).tolist():
            group.append(samples[index])
            size += sample_length(samples[index])
            if size >= tokens and len(group) >= least:
                yield group
                group, size = [], 0


def sample_length(sample: Sample) -> int:
    """Positions that a sample takes in a batch; an image counts as 512."""
    image = sample.inputs.get("pixel_values")
    return 512 if image is not None else max(len(v) for v in sample.inputs.values())


def _pad(samples: list[Sample]) -> Batch:
    inputs = {}
    for name, first in samples[0].inputs.items():
        rows = [sample.inputs[name] for sample in samples]
        fill = samples[0].pad if name.endswith("input_ids") else 0
        inputs[name] = torch.stack(rows) if first.ndim > 1 else _stack(rows, fill)
    if samples[0].targets_T is None:
        return Batch(samples, inputs, None)
    targets = _stack([s.targets_T for s in samples if s.targets_T is not None], IGNORED)
    return Batch(samples, inputs, targets)


def _stack(rows: list[Tensor], fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


BATCH_DOCUMENTS = 64
"""Most documents that run together where the caller does not say."""
