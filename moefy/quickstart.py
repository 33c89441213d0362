"""The first thing a new user runs: bundled models converted, measured and timed, in one table."""

from importlib import resources
from pathlib import Path
from typing import Any

from moefy.artefact import is_artefact
from moefy.benchmark import bench_layer
from moefy.console import Reporter
from moefy.convert import convert
from moefy.errors import OutputError
from moefy.measure import bench_folder

RECIPE = "fast"


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
        speed = bench_folder(target, prompt=128, generated=16, samples=5, quiet=quiet)
        quality = records["evaluation"]
        total, decode = quality["total"], speed["decode"]["tokens_per_second"]
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
        rows += [[*dense, f"{decode['dense']:.0f}"], [*moefied, f"{decode['moefied']:.0f}"]]
        data[name] = {**records, "speed": speed, "out": str(target)}
    report.say("\ntime one 7B-shaped layer (synthetic weights)")
    layer = bench_layer(samples=5)
    data["layer"] = layer
    header = [
        "model", "", "FFN density", "active budget", "active parameters", "cross-entropy",
        "KL to dense", "decode tokens/s",
    ]  # fmt: skip
    notes = [
        f"One synthetic 7B-shaped layer (D 4096, N 11008, 16 of 64 experts, batch 1, {layer['dtype']}, "
        f"router included): {layer['speedup']['moefied']:.2f}x the speed of dense.",
        "The demo models are too small to show speed; cross-entropy and KL are in nats per token.",
        *(f"wrote {entry['out']}" for entry in data.values() if "out" in entry),
    ]
    return {"data": data, "tables": [(header, rows)], "notes": notes}
