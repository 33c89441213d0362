"""Files of a corpus as they lie on disk: text, records (plain, packed, JSON, CSV, parquet), images.

    text = read_text(path)                       # UTF-8, packed or not
    for place, row in read_records(path): ...    # place: "line 3", what an error is said to be at
    read_stacks(path), read_picture(path)        # `pixel_values` and pictures

Lines end at `\\n` (or `\\r\\n`, `\\r`) alone: U+2028, U+0085 and their like are part of a text. What cannot be
read is a `CorpusError` that names the file, the line and the remedy.

Shapes: C channels, H height, W width.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moefy.errors import CorpusError

PIECE_BYTES = 2000
"""UTF-8 bytes of the longest document; longer texts are cut."""
Records = Iterator[tuple[str, Any]]

UNPACK = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_FOREIGN = {
    b"\x1f\x8b": "gzip; let its name end in .gz",
    b"BZh": "bzip2; let its name end in .bz2",
    b"\xfd7zXZ": "xz; let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "zstandard; unpack it, with zstd -d",
    b"PK\x03\x04": "a zip archive or office document; unpack it, or save it as text",
    b"%PDF": "a PDF; save it as text",
    b"PAR1": "parquet; let its name end in .parquet",
    b"ARROW1": "Arrow; save it as parquet",
    b"SQLite": "a database; export its text as .jsonl or .csv",
    b"\xff\xfe": "UTF-16; re-encode it, with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; re-encode it, with iconv -f UTF-16 -t UTF-8",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; fetch it, with git lfs pull",
}
"""What a file that is no text begins with, and what to do about it."""


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, without that of its packing: `.jsonl` of `a.jsonl.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in UNPACK else suffix


def read_text(path: Path) -> str:
    """A whole file as text, a byte-order mark left out. Raises `CorpusError`."""
    raw = _content(path)
    for start, what in _FOREIGN.items():
        if raw.startswith(start):
            raise CorpusError(f"corpus {path}: is {what}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"corpus {path}: not UTF-8 (byte {error.start}); re-encode it, for example with iconv"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_records(path: Path) -> Records:
    """The rows of a file of `RECORDS`, each with its place in the file. Raises `CorpusError`."""
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if kind in (".csv", ".tsv"):
        return _table(text, path, "\t" if kind == ".tsv" else ",")
    if kind == ".json" and text.lstrip()[:1] == "[":
        rows = _parse(text, f"corpus {path}")
        return ((f"record {number}", row) for number, row in enumerate(rows, 1))
    return json_lines(text, str(path))


def json_lines(text: str, where: str) -> Records:
    """One JSON value a line; empty lines are left out."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(line, f"corpus {where}: line {number}")


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        unpack = UNPACK.get(path.suffix.lower())
        return raw if unpack is None or not raw else unpack(raw)
    except (zlib.error, lzma.LZMAError, EOFError, ValueError, gzip.BadGzipFile) as error:
        raise CorpusError(
            f"corpus {path}: cannot be unpacked ({error}); copy or download it again"
        ) from None
    except OSError as error:
        raise CorpusError(
            f"corpus {path}: cannot be read ({error.strerror or error}); see its permissions, or leave "
            "it out"
        ) from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise CorpusError(
            f"{where} is not a document ({reason}); expected JSON with one record a line in .jsonl, "
            "an array of records in .json"
        ) from None


def _table(text: str, path: Path, delimiter: str) -> Records:
    before = csv.field_size_limit(len(text) + 1)  # by default a text ends at 131,072 characters
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            # An empty cell is no label; an empty text is an empty text.
            given = {name: value for name, value in row.items() if value or name == "text"}
            yield f"line {rows.line_num}", given
    except csv.Error as error:
        raise CorpusError(
            f"corpus {path}: what follows line {rows.line_num} is not a row ({error}); expected a header with a "
            f"column 'text', cells with a quote or '{delimiter}' in quotes"
        ) from None
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Records:
    try:
        from pyarrow import lib, parquet
    except ImportError:
        raise CorpusError(
            f"corpus {path}: reading parquet needs pip install moefy[datasets]"
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (lib.ArrowException, OSError) as error:
        raise CorpusError(
            f"corpus {path}: truncated or corrupt parquet file ({' '.join(str(error).split())[:120]}); "
            "copy or download it again"
        ) from None


def checked(row: Any, domain: str, source: str) -> tuple[str, str, str, tuple[int, ...]]:
    """The domain, source, text and token ids of a record; those labels are for one that has none.

    A string stands for its text. Raises `ValueError` or `TypeError` that say what is wrong with it.
    """
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise TypeError(f"it is {_said(row)}, expected an object with 'text' or 'input_ids'")
    labels = {"domain": row.get("domain", domain), "source_id": row.get("source_id", source)}
    for name, value in labels.items():
        if not isinstance(value, str | int | float):
            raise TypeError(f"'{name}' is {_said(value)}, expected text")
    domain, source = (sound(str(value)) for value in labels.values())
    ids, text = row.get("input_ids"), row.get("text")
    if "text" not in row and (ids is None or not len(ids)):
        raise ValueError(f"neither 'text' nor 'input_ids' in {', '.join(map(str, row)) or 'it'}")
    if ids is not None:
        return domain, source, "" if text is None else _text(text), token_ids(ids)
    return domain, source, _text(text), ()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"'text' is {_said(value)}, expected text")
    return sound(value)


def sound(text: str) -> str:
    """The same text; `ValueError` where it is none that can be written down."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a lone surrogate {text[error.start]!a} at character {error.start}, half of a character"
        ) from None
    return text


def token_ids(values: Any) -> tuple[int, ...]:
    """A list of whole numbers from 0; `ValueError` or `TypeError` for anything else."""
    values = getattr(values, "tolist", lambda: values)()  # of numpy and torch
    if not isinstance(values, list | tuple | range):
        raise TypeError(f"'input_ids' is {_said(values)}, expected a list of whole numbers")
    for place, value in enumerate(values):
        whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if not whole or not 0 <= value < 2**31:
            raise ValueError(
                f"'input_ids' has {_said(value)} at {place}, expected whole numbers from 0"
            )
    return tuple(map(int, values))


def _said(value: Any) -> str:
    """A value as JSON calls it, cut short."""
    kinds = {type(None): "null", list: "a list", dict: "an object", bool: "a truth value"}
    return kinds.get(type(value), repr(value)[:40])


def cut_text(text: str) -> list[str]:
    """Pieces of at most `PIECE_BYTES`, cut at line ends if there are any."""
    pieces, piece = [], ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text.strip("\n")):
        raw, at = line.encode(), 0
        while len(raw) - at > PIECE_BYTES:
            head = raw[at : at + PIECE_BYTES].decode(errors="ignore")
            pieces += [piece, head]
            piece, at = "", at + len(head.encode())
        line = raw[at:].decode()
        if len((piece + line).encode()) > PIECE_BYTES:
            pieces.append(piece)
            piece = ""
        piece += line
    return [p for p in [*pieces, piece] if p.strip()]


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STACKS = (".npy", ".safetensors")


def read_stacks(path: Path) -> list[Tensor]:
    """The stacks `[images, C, H, W]` of a file of `STACKS`. Raises `CorpusError`."""
    try:
        if path.suffix == ".npy":
            stacks = [torch.from_numpy(np.load(path, allow_pickle=False))]
        else:
            stacks = list(load_file(path).values())
    except (ValueError, TypeError, EOFError, OSError, SafetensorError) as error:
        raise CorpusError(
            f"corpus {path}: truncated or no stack of numbers ({error}); write it again"
        ) from None
    for stack in stacks:
        if stack.ndim != 4:
            raise CorpusError(
                f"corpus {path}: pixel_values of shape {list(stack.shape)}; expected [images, C, H, W]"
            )
        if not stack.isfinite().all():
            raise CorpusError(f"corpus {path}: pixel_values with NaN or infinity; write it again")
    return stacks


def read_picture(path: Path) -> Tensor:
    """The colours of a picture `[3, H, W]` (uint8). Raises `CorpusError`."""
    try:
        from PIL import Image
    except ImportError:
        raise CorpusError(
            f"corpus {path}: reading images needs pip install moefy[images]"
        ) from None
    try:
        with Image.open(path) as picture:
            rgb = np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CorpusError(
            f"corpus {path}: not an image that can be read ({error}); leave it out"
        ) from None
    return torch.from_numpy(rgb).permute(2, 0, 1).contiguous()
