"""The first thing a new user runs: bundled models converted, measured and timed, in one table."""

from importlib import resources
from pathlib import Path
from typing import Any

from moefy.artefact import is_artefact
from moefy.bench import bench
from moefy.console import Reporter
from moefy.convert import convert
from moefy.errors import OutputError

RECIPE = "fast"
ENGINES, SAMPLES = ("eager", "auto"), 5
"""What a first look needs; `moefy bench` times all there is."""


def demo_models() -> dict[str, Path]:
    """The bundled demo models by name."""
    folder = Path(str(resources.files("moefy") / "demo"))
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").exists()}


def quickstart(out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Convert, evaluate and time every bundled model, and time one synthetic 7B-shaped layer.

    Writes into `out`, over what an earlier run left there. Returns `data` (JSON values), `tables`
    (header and rows) and `notes`.
    """
    report = Reporter(quiet=quiet)
    rows, data = [], {}
    for name, model in demo_models().items():
        target = out / name
        if target.exists() and not is_artefact(target):
            raise OutputError(f"{target}: exists and is not a moefied model; choose another folder")
        report.say(f"\n[bold]{name}[/bold]")
        records = convert(model, target, recipe=RECIPE, overwrite=True, quiet=quiet)
        speed = bench(target, generated=16, engines=ENGINES, samples=SAMPLES, quiet=quiet)
        quality = records["evaluation"]
        total, rates = quality["total"], _decode(speed)
        dense = [name, "dense", "1.000", "1.000", "1.000", f"{total['ce_dense']['mean']:.3f}", "0"]
        moefied = [
            "",
            "moefied",
            f"{quality['ffn_density']:.3f}",
            f"{quality['active_budget']:.3f}",
            f"{quality['active_parameters']:.3f}",
            f"{total['ce']['mean']:.3f}",
            f"{total['kl']['mean']:.3f}",
        ]
        rows += [[*dense, f"{rates['eager']:.0f}"], [*moefied, f"{rates['auto']:.0f}"]]
        data[name] = {**records, "speed": speed, "out": str(target)}
    report.say("\ntime one 7B-shaped layer (synthetic weights)")
    layer = bench(
        layer="4096,11008,64,16", batches="1", engines=ENGINES, samples=SAMPLES, quiet=quiet
    )
    data["layer"] = layer
    header = [
        "model", "", "FFN density", "active budget", "active parameters", "cross-entropy",
        "KL to dense", "decode tokens/s",
    ]  # fmt: skip
    notes = [
        f"One synthetic 7B-shaped layer (D 4096, N 11008, 16 of 64 experts, batch 1, {layer['dtype']}, "
        f"router included): {layer['cells'][0]['engines']['auto']['ratio']:.2f}x the speed of dense.",
        "The demo models are too small to show speed; cross-entropy and KL are in nats per token.",
        *(f"wrote {entry['out']}" for entry in data.values() if "out" in entry),
    ]
    return {"data": data, "tables": [(header, rows)], "notes": notes}


def _decode(speed: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of cached decoding by engine."""
    cell = next(cell for cell in speed["cells"] if cell["phase"] == "decode")
    return {name: row["tokens_per_second"] for name, row in cell["engines"].items()}
