"""Ways in which a file can be wrong: damaged, half written, edited by hand, or made to do harm.

what = mutate(folder, random.Random(7))     # one file of the folder is another now
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2.5, 2**31, 2**40, 10**12, 1e300, float("nan"), float("inf"), "", "x",
    "7", "../x", "/etc/passwd", "os:system", "subprocess:Popen", "a" * 5000, "\u202e\x00", [], {}, [None],
    [[1, 2], [3]], {"name": "os:system"}, {"a": {"b": None}},
    {"name": "subprocess:Popen", "args": ["touch", "moefy-was-made-to-run-this"]},
)  # fmt: skip
"""What a field may hold that it should not."""
DEEP = "[" * 100_000 + "]" * 100_000


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one file of a folder, and say which and how."""
    file = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kinds: list[Callable[[Path, random.Random], str]] = [_bytes, _place]
    if file.suffix in (".json", ".yaml", ".yml"):
        kinds += [_field] * 6
    if file.suffix == ".jsonl":
        kinds += [_line] * 4
    if file.suffix == ".safetensors":
        kinds += [_tensors] * 4
    how = draw.choice(kinds)(file, draw)
    return f"{file.relative_to(folder)}: {how}"


def _bytes(file: Path, draw: random.Random) -> str:
    """Damage that knows nothing of what the file holds."""
    raw = bytearray(file.read_bytes())
    at = draw.randrange(len(raw) or 1)
    kind = draw.choice(["empty", "cut", "flip", "zeros", "before", "behind", "text", "pointer"])
    if kind == "empty":
        raw = bytearray()
    elif kind == "cut":
        del raw[at:]
    elif kind == "flip":
        for _ in range(draw.randint(1, 16)):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    elif kind == "before":
        raw[:0] = draw.choice([b"\xef\xbb\xbf", b"\x00", b"PK\x03\x04", b"\x80\x04"])
    elif kind == "behind":
        raw += draw.randbytes(draw.randint(1, 64))
    elif kind == "text":
        raw = bytearray(
            draw.choice(["{}", "[]", "null", "7", DEEP, '{"a": NaN}', "a: &a [*a]"]).encode()
        )
    else:
        raw = bytearray(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
        )
    file.write_bytes(raw)
    return kind


def _place(file: Path, draw: random.Random) -> str:
    """The file is not there, or is another kind of thing."""
    kind = draw.choice(
        ["gone", "folder", "broken link", "link out", "loop", "unreadable name", "twice"]
    )
    if kind == "twice":
        shutil.copy(file, file.with_name(f"{file.stem}-00001-of-00002{file.suffix}"))
        return kind
    raw = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "broken link":
        file.symlink_to("nothing")
    elif kind == "link out":
        file.symlink_to("/etc/hostname")
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "unreadable name":
        (file.parent / os.fsdecode(b"\xff\xfe" + file.name.encode())).write_bytes(raw)
    return kind


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _field(file: Path, draw: random.Random) -> str:
    """A field is gone, unknown, of another type, out of range, or in another order."""
    read = json.loads if file.suffix == ".json" else yaml.safe_load
    data = read(file.read_text(encoding="utf-8"))
    places = list(_places(data))
    if not places:
        return _bytes(file, draw)
    path = draw.choice(places)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    kind = draw.choice(
        ["value", "value", "value", "gone", "renamed", "unknown", "order", "wrapped"]
    )
    if kind == "value":
        holder[path[-1]] = draw.choice(VALUES)
        kind = f"value {str(holder[path[-1]])[:40]!r}"
    elif kind == "gone":
        del holder[path[-1]]
    elif kind == "wrapped":
        holder[path[-1]] = [holder[path[-1]]]
    elif kind == "order":
        swapped = (
            list(reversed(holder)) if isinstance(holder, list) else dict(reversed(holder.items()))
        )
        holder.clear()
        holder.extend(swapped) if isinstance(holder, list) else holder.update(swapped)
    elif isinstance(holder, list):
        holder.insert(path[-1], holder[path[-1]])
        kind = "repeated"
    else:
        holder[f"{path[-1]}_" if kind == "renamed" else "unknown"] = draw.choice(VALUES)
        if kind == "renamed":
            holder[f"{path[-1]}_"] = holder.pop(path[-1])
    dump = json.dumps if file.suffix == ".json" else yaml.safe_dump
    file.write_text(dump(data), encoding="utf-8")
    return f"{'.'.join(map(str, path))}: {kind}"


def _line(file: Path, draw: random.Random) -> str:
    """One record of many is wrong."""
    lines = file.read_text(encoding="utf-8").split("\n")
    at = draw.randrange(len(lines))
    bad = [
        "{", "null", "7", '"text"', "[1]", '{"text": null}', '{"text": ["a"]}', '{"text": 7}', "{}", DEEP,
        '{"text": "\\ud800"}', '{"text": "a\u2028b"}', '{"text": "' + "a " * 70_000 + '"}', "\x00",
        '{"text": "a", "text": 7}', '{"input_ids": [-1]}', '{"input_ids": [1e9]}', '{"input_ids": "1"}',
        '{"text": "a", "domain": null}', '{"text": "a", "source_id": {}}',
    ]  # fmt: skip
    lines[at] = draw.choice(bad)
    file.write_text("\n".join(lines), encoding="utf-8")
    return f"line {at + 1}: {lines[at][:40]!r}"


def _tensors(file: Path, draw: random.Random) -> str:
    """A tensor is gone, unknown, of another shape or type, or not finite; hashes are made to fit."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError):
        return _bytes(file, draw)
    name = draw.choice(sorted(tensors))
    value = tensors.pop(name)
    kind = draw.choice(["gone", "renamed", "dtype", "flat", "shorter", "wider", "nan", "inf"])
    changed = {
        "renamed": lambda: {f"{name}_": value},
        "dtype": lambda: {name: value.to(draw.choice([torch.int8, torch.float64, torch.bool]))},
        "flat": lambda: {name: value.reshape(-1)},
        "shorter": lambda: {name: value[:-1].clone()},
        "wider": lambda: {name: torch.cat([value, value])},
        "nan": lambda: {name: _set(value, float("nan"))},
        "inf": lambda: {name: _set(value, float("inf"))},
    }
    tensors |= changed[kind]() if kind in changed else {}
    file.write_bytes(
        save({key: held.contiguous() for key, held in tensors.items()}, {"format": "pt"})
    )
    if kind not in ("nan", "inf") or file.name == "moefy.safetensors":
        _sign(file)  # weights with other values are another model, whoever signed it
    return f"{name}: {kind}"


def _set(value: torch.Tensor, bad: float) -> torch.Tensor:
    changed = value.clone()
    changed.view(-1)[0] = bad if value.is_floating_point() else -1
    return changed


def _sign(file: Path) -> None:
    """Whoever changes a file can change its hash as well."""
    side = file.parent / "moefy.json"
    if not side.is_file():
        return
    data = json.loads(side.read_text(encoding="utf-8"))
    if file.name in data.get("sha256", {}):
        data["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        side.write_text(json.dumps(data), encoding="utf-8")
