"""The examples, tokens and logit effects of an inspection as files that Neuronpedia imports.

    folder/<model>/<layer>-<set>/{release,model,sourceset,source}.jsonl
    folder/<model>/<layer>-<set>/{features,activations}/batch-0.jsonl.gz

An expert is a feature, its contribution norm the activation. Names and types are those of the tables
of Neuronpedia's `schema.prisma`, laid out as SAEDashboard's `neuronpedia_export.py` does (2026).
"""

import base64
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import moefy
from moefy.errors import MoefyError
from moefy.inspection.record import NOTHING, Inspection, rows, write_file

CREATOR = "moefy"
SET = "moefy"
_BINS = 20
_DATE = "1970-01-01T00:00:00.000Z"
"""The same inspection gives the same bytes; Neuronpedia shows its own time of import."""
_MEAN_KINDS = ("mean", "effect", "routed_minus_all")


def export_neuronpedia(
    inspection: Inspection, folder: str | Path, *, creator: str = CREATOR, release: str = SET
) -> Path:
    """Write the import files of all layers and return the model's folder.

    `creator` is the id of a user of the Neuronpedia that imports. Raises `MoefyError` for an inspection
    without examples or texts, `OutputError` where the folder cannot be written.
    """
    if not inspection.tables.get("examples") or not inspection.texts:
        raise MoefyError("this inspection has no examples in context; run moefy inspect again")
    model = _identifier(str(inspection.meta.get("model", "model")))
    examples, logits, figures = (
        _by_expert(inspection, name) for name in ("examples", "logits", "experts")
    )
    for layer, described in enumerate(inspection.meta["layers"]):
        source = f"{layer}-{release}"
        features, activations = [], []
        for expert in range(described["experts"]):
            place = {"modelId": model, "layer": source, "index": str(expert), "creatorId": creator}
            key = layer, expert
            own = figures[key][0] if figures[key] else {}
            shown = list(_activations(inspection, examples[key], place, own.get("norm_max")))
            activations += shown
            features.append(_feature(inspection, place, own, logits[key], shown, release))
        files = _catalogue(inspection, model, source, creator, release)
        files["features/batch-0.jsonl.gz"] = features
        files["activations/batch-0.jsonl.gz"] = activations
        for name, lines in files.items():
            _write(Path(folder) / model / source / name, lines)
    return Path(folder) / model


def _catalogue(
    inspection: Inspection, model: str, source: str, creator: str, release: str
) -> dict[str, list[dict[str, Any]]]:
    """The files that say what a layer's features belong to."""
    layers = inspection.meta["layers"]
    common: dict[str, Any] = {"creatorId": creator, "createdAt": _DATE, "visibility": "PRIVATE"}
    of_release = {
        **common, "name": release, "creatorName": creator,
        "description": f"Experts of {model}, by moefy {moefy.__version__}", "urls": [],
    }  # fmt: skip
    of_model = {
        **common, "id": model, "displayName": model, "displayNameShort": model,
        "instruct": False, "layers": len(layers), "owner": creator, "updatedAt": _DATE,
        "neuronsPerLayer": max(len(one.get("owner", ())) for one in layers),
    }  # fmt: skip
    of_set = {
        **common, "modelId": model, "name": release, "creatorName": creator, "urls": [],
        "releaseName": release, "type": "experts", "hasDashboards": True,
        "description": "Experts of the MLPs; the activation is the contribution norm",
    }  # fmt: skip
    of_source = {
        **common, "id": source, "modelId": model, "setName": release,
        "hasDashboards": True, "num_prompts": len(inspection.texts),
        "dataset": ", ".join(inspection.meta.get("corpora", ())) or None,
    }  # fmt: skip
    rows_of = {"release": of_release, "model": of_model, "sourceset": of_set, "source": of_source}
    return {f"{name}.jsonl": [row] for name, row in rows_of.items()}


def _by_expert(inspection: Inspection, name: str) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows(inspection.tables.get(name, {})):
        found[row["layer"], row["expert"]].append(row)
    return found


def _activations(
    inspection: Inspection,
    examples: Iterable[dict[str, Any]],
    place: dict[str, Any],
    largest: float | None,
) -> Iterator[dict[str, Any]]:
    """A row for every example whose window was kept, in the order of the table.

    A window holds a byte for each token around the example: 254 is the expert's largest norm, 255
    no token.
    """
    seen = set()
    for row in examples:
        text = inspection.texts.get(str(row["document"]))
        where = (row["document"], row["position"])
        if not text or not row["window"] or largest is None or where in seen:
            continue
        seen.add(where)
        window = base64.b64decode(row["window"])
        at = range(row["position"] - len(window) // 2, row["position"] + len(window) // 2 + 1)
        known = {i: byte for i, byte in zip(at, window, strict=True) if byte != NOTHING}
        first = min(known)
        values = [round(byte / (NOTHING - 1) * largest, 4) for byte in known.values()]
        name = "/".join(map(str, (*place.values(), *where)))
        yield {
            **place, "id": "c" + hashlib.sha256(name.encode()).hexdigest()[:24],
            "tokens": _pieces(text, first, first + len(values)), "values": values,
            "maxValue": max(values), "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values), "qualifyingTokenIndex": row["position"] - first,
            "createdAt": _DATE, "dataIndex": str(row["document"]),
            "dataSource": f"{row['panel']}, {row['shard']} @{row['position']}",
        }  # fmt: skip


def _pieces(text: dict[str, Any], first: int, last: int) -> list[str]:
    """Tokens by offset into the text: a character that was split stands at its first token."""
    ends = [0, *text["ends"]]
    return [text["text"][ends[i] : ends[i + 1]] for i in range(first, last)]


def _feature(
    inspection: Inspection,
    place: dict[str, Any],
    figures: dict[str, Any],
    logits: list[dict[str, Any]],
    shown: list[dict[str, Any]],
    release: str,
) -> dict[str, Any]:
    kinds = [row["kind"] for row in logits]
    kind = next((k for k in (*_MEAN_KINDS, *kinds) if k in kinds), None)
    effect = sorted((r for r in logits if r["kind"] == kind), key=lambda row: -row["value"])
    above = [row for row in effect if row["value"] > 0]
    below = [row for row in reversed(effect) if row["value"] <= 0]
    names = inspection.meta.get("vocabulary", {})
    values = [value for one in shown for value in one["values"]]
    heights, edges = _histogram(values)
    return {
        **place, "createdAt": _DATE, "sourceSetName": release, "hasVector": False,
        "hookName": f"blocks.{place['layer'].split('-')[0]}.mlp.hook_expert_norm",
        "maxActApprox": max((one["maxValue"] for one in shown), default=0.0),
        "frac_nonzero": figures.get("load") or 0.0,
        "pos_str": [names.get(str(row["token"]), f"#{row['token']}") for row in above],
        "pos_values": [row["value"] for row in above],
        "neg_str": [names.get(str(row["token"]), f"#{row['token']}") for row in below],
        "neg_values": [row["value"] for row in below],
        "freq_hist_data_bar_heights": heights, "freq_hist_data_bar_values": edges,
    }  # fmt: skip


def _histogram(values: list[float]) -> tuple[list[int], list[float]]:
    """Counts of the shown values, and the middle of every bin."""
    largest = max(values, default=0.0)
    if largest <= 0:
        return [], []
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int(value / largest * _BINS))] += 1
    return counts, [round((i + 0.5) * largest / _BINS, 4) for i in range(_BINS)]


def _identifier(name: str) -> str:
    """What Neuronpedia takes for the name of a model: letters, digits, dashes, underscores."""
    return re.sub(r"[^a-z0-9_-]+", "-", Path(name).name.lower()).strip("-") or "model"


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines).encode("utf-8")
    write_file(path, gzip.compress(text, 9, mtime=0) if path.suffix == ".gz" else text)
