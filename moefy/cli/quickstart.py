"""The first thing a new user runs: bundled models converted, measured and timed, in one table."""

from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from moefy.benchmark.bench import bench
from moefy.conversion.convert import convert
from moefy.errors import MoefyError, OutputError
from moefy.models.artefact import is_artefact
from moefy.run.console import Reporter

RECIPE = "fast"
ENGINES, SAMPLES = ("eager", "auto"), 5
"""What a first look needs; `moefy bench` times all there is."""
PROMPT, GENERATED = 128, 16
LAYER = "4096,11008,64,16"
HEADER = [
    "model", "", "FFN density", "bits read", "active parameters", "cross-entropy", "KL to dense",
    "decode tokens/s",
]  # fmt: skip


def demo_models() -> dict[str, Path]:
    """The bundled demo models by name."""
    folder = Path(str(resources.files("moefy") / "demo"))
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").exists()}


class _Steps:
    """What is done one after the other, each whatever became of the one before."""

    def __init__(self, report: Reporter) -> None:
        self.report = report
        self.failed: list[tuple[str, Exception]] = []

    def run(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What a step returns; None where it fails, which is told at the end."""
        self.report.say(f"\n[bold]{name}[/bold]")
        try:
            return step()
        except Exception as error:
            self.failed.append((name, error))
            return None

    def lines(self) -> list[str]:
        """A line for every step that failed, with what to do."""
        return [f"failed: {name}: {_why(error)}" for name, error in self.failed]

    def error(self) -> MoefyError | None:
        """What the verb ends with, caused by the first failure; None where there was none."""
        if not self.failed:
            return None
        names = ", ".join(name for name, _ in self.failed)
        error = MoefyError(f"quickstart: {names} failed, the reason is above; --debug shows where")
        error.__cause__ = self.failed[0][1]
        return error


def _why(error: Exception) -> str:
    if isinstance(error, MoefyError):
        return str(error)
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}; --debug shows where, please report it with that"


def quickstart(out: Path, *, calibrated: bool = True, quiet: bool = False) -> dict[str, Any]:
    """Convert, evaluate and time every bundled model, and time one synthetic 7B-shaped layer.

    Writes into `out`, over what an earlier run left there. `calibrated` as of `bench`. Returns `data` (JSON
    values), `tables` (header and rows), `notes`, and `error`: None, or what to end with after they are
    shown.
    """
    steps = _Steps(Reporter(quiet=quiet))
    settings: dict[str, Any] = {
        "engines": ENGINES, "samples": SAMPLES, "calibrated": calibrated, "quiet": quiet,
    }  # fmt: skip
    rows: list[list[str]] = []
    notes: list[str] = []
    data: dict[str, Any] = {}
    for name, model in demo_models().items():
        target = out / name
        records = steps.run(f"convert {name}", partial(_converted, model, target, quiet))
        if records is None:
            continue
        speed = steps.run(f"time {name}", partial(_timed, target, settings))
        rows += _rows(name, records["evaluation"], speed)
        notes += [] if speed is None else _refused(name, speed)
        data[name] = {**records, "speed": speed, "out": str(target)}
    name = "time one 7B-shaped layer (synthetic weights)"
    layer = steps.run(name, partial(bench, layer=LAYER, batches="1", **settings))
    if layer is not None:
        data["layer"] = layer
        notes += [*_layer_line(layer), *_refused("the layer", layer)]
    notes += [
        "The demo models are too small to show speed; cross-entropy and KL are in nats per token.",
        *(f"wrote {entry['out']}" for entry in data.values() if "out" in entry),
        *steps.lines(),
    ]
    return {"data": data, "tables": [(HEADER, rows)], "notes": notes, "error": steps.error()}


def _converted(model: Path, target: Path, quiet: bool) -> dict[str, Any]:
    if target.exists() and not is_artefact(target):
        raise OutputError(f"{target}: exists and is not a moefied model; choose another folder")
    return convert(model, target, recipe=RECIPE, overwrite=True, quiet=quiet)


def _timed(target: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return bench(target, prompt_tokens=PROMPT, generated=GENERATED, **settings)


def _rows(name: str, quality: dict[str, Any], speed: dict[str, Any] | None) -> list[list[str]]:
    """The dense model and the moefied one."""
    total = quality["total"]
    dense = [name, "dense", "1.000", "16.000", "1.000", f"{total['ce_dense']['mean']:.3f}", "0"]
    shares = (quality[key] for key in ("ffn_density", "bits_read", "active_parameters"))
    figures = (*shares, total["ce"]["mean"], total["kl"]["mean"])
    moefied = ["", "moefied", *(f"{figure:.3f}" for figure in figures)]
    return [[*dense, _decode(speed, "eager")], [*moefied, _decode(speed, "auto")]]


def _decode(speed: dict[str, Any] | None, engine: str) -> str:
    """Tokens per second of cached decoding."""
    cells = [] if speed is None else [c for c in speed["cells"] if c["phase"] == "decode"]
    for cell in cells:
        if engine in cell["engines"]:
            return f"{cell['engines'][engine]['tokens_per_second']:.0f}"
    return "not timed"


def _refused(what: str, speed: dict[str, Any]) -> list[str]:
    """Engines that were not timed, each with its reason."""
    reasons = {item: None for cell in speed["cells"] for item in cell["refused"].items()}
    return [f"not timed: {what}, {engine}: {reason}" for engine, reason in reasons]


def _layer_line(layer: dict[str, Any]) -> list[str]:
    row = layer["cells"][0]["engines"].get("auto")
    if row is None or row["ratio"] is None:
        return []
    return [
        f"One synthetic 7B-shaped layer (D 4096, N 11008, 16 of 64 experts, batch 1, {layer['dtype']}, "
        f"router included): {row['ratio']:.2f}x the speed of dense ({layer['machine']['instructions']})."
    ]
