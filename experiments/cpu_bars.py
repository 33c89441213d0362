"""What the native CPU kernels reach, and whether `auto` chooses well: records for docs/cpu.md.

    python experiments/cpu_bars.py layers     # a 7B-shaped layer, batches 1 to 16, both dtypes, router included
    python experiments/cpu_bars.py prefill    # 512 tokens of it in fp32
    python experiments/cpu_bars.py dispatch   # calibrates, then every path over batches and densities
    python experiments/cpu_bars.py table      # docs/cpu.md from the records; `models`: its last table alone

`--tiny` rehearses on small layers and writes no records. Nothing else should run beside these.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pages import fill

from moefy.benchmark.bench import calibrate
from moefy.benchmark.engines import choose
from moefy.benchmark.layers import Shape, synthetic
from moefy.benchmark.levels import Sweep, bench_kernel, bench_layer
from moefy.run.console import Reporter

RECORDS = Path("benchmarks/records")
PAGE = Path("docs/cpu.md")
WIDTH, NEURONS = 4096, 11008
EXPERTS = (64, 344)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENGINES = ("eager", "compiled", "views", "native", "auto")
PATHS = ("masked", "views", "native")
REPORT = Reporter()


def layers(
    tiny: bool, dtypes: Sequence[str] = tuple(DTYPES), many: Sequence[int] = EXPERTS
) -> None:
    """Decoding, router included; 4 layers in turn."""
    for dtype in dtypes:
        for experts in many:
            shape = _shape(experts, tiny)
            found = synthetic(shape, dtype=DTYPES[dtype], tokens=16)
            # Dense does not depend on the experts: compiling it once will do.
            engines = [name for name in ENGINES if name != "compiled" or experts == EXPERTS[0]]
            sweep = Sweep(
                engines=choose(engines), batches=(1, 2, 4, 8, 16), densities=(0.25, 1.0),
                samples=5 if tiny else 7, report=REPORT,
            )  # fmt: skip
            record = bench_layer(found, sweep)
            _save(record, f"cpu_layer_{dtype}_{experts}", tiny)


def prefill(tiny: bool) -> None:
    """A prompt, in fp32: torch has no product in bf16 that is worth comparing with on every machine."""
    for experts in EXPERTS:
        found = synthetic(_shape(experts, tiny), dtype=torch.float32, tokens=512)
        sweep = Sweep(
            engines=choose(ENGINES), batches=(512,), densities=(0.25,), samples=5, report=REPORT
        )
        record = bench_kernel(found, sweep)
        _save(record, f"cpu_prefill_{experts}", tiny)


def dispatch(tiny: bool) -> None:
    """Calibrate for a layer, then time every path and `auto` over the whole range."""
    shape = Shape(64, 256, 8, 2) if tiny else Shape(512, 2048, 64, 16)
    many = (64,) if tiny else (64, 256, 1024, 4096)
    found = synthetic(shape, dtype=torch.float32, tokens=many[-1])
    calibrate(found, report=REPORT)
    # With many tokens arithmetic decides, so that one layer need not make room for the next.
    one = replace(found, modules=found.modules[:1], inputs_TD=found.inputs_TD[:1])
    sweep = Sweep(
        engines=choose(["eager", *PATHS, "auto"]), batches=(1, 2, 4, 8, 16), samples=5, report=REPORT,
        densities=(0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
    )  # fmt: skip
    record = bench_kernel(found, sweep)
    rest = bench_kernel(one, replace(sweep, batches=many))
    record["cells"] += rest["cells"]
    del record["break_even"]
    record["choices"] = [_choice(cell) for cell in record["cells"]]
    _save(record, "cpu_dispatch", tiny)


def _choice(cell: dict[str, Any]) -> dict[str, Any]:
    """What `auto` took, and how its path does beside the best one and beside plain dense."""
    rows = cell["engines"]
    taken = rows["auto"]["computed_by"]
    best = min(rows[path]["p50"] for path in PATHS if path in rows)
    return {
        "batch": cell["batch"],
        "density": cell["asked_density"],
        "taken": taken,
        "of_best": best / rows[taken]["p50"],
        "of_dense": rows["eager"]["p50"] / rows[taken]["p50"],
        "auto_of_best": best / rows["auto"]["p50"],
    }


def _shape(experts: int, tiny: bool) -> Shape:
    if tiny:
        return Shape(64, 344, 8, 2)
    return Shape(WIDTH, NEURONS, experts, round(experts / 4))


def _save(record: dict[str, Any], name: str, tiny: bool) -> None:
    print(
        name,
        [
            (
                c["batch"],
                c["asked_density"],
                {n: round(r["ratio"], 2) for n, r in c["engines"].items()},
            )
            for c in record["cells"]
        ][:3],
    )
    if not tiny:
        for cell in record["cells"]:
            for row in cell["engines"].values():
                del row["seconds"]  # medians and intervals stay
        (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def table() -> None:
    """Fill the tables of the page whose records are there; the others stay as they are."""
    names = [f"cpu_layer_{dtype}_{experts}" for dtype in DTYPES for experts in EXPERTS]
    if found := [name for name in names if _recorded(name)]:
        fill(PAGE, "layers", _layers_table(found))
    if all(_recorded(f"cpu_prefill_{experts}") for experts in EXPERTS):
        fill(PAGE, "prefill", _prefill_table())
    if _recorded("cpu_dispatch"):
        fill(PAGE, "dispatch", _dispatch_table())
    models()


def _layers_table(names: Sequence[str]) -> str:
    lines = [
        "| dtype | experts | batch | density | baseline | native, times faster | auto | of the bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        *_, dtype, experts = name.split("_")
        for cell in _record(name)["cells"]:
            row, auto = cell["engines"]["native"], cell["engines"]["auto"]
            lines.append(
                f"| {dtype} | {experts} | {cell['batch']} | {cell['density']:.2f} | "
                f"{cell['baseline']} | {_times(row)} | {_times(auto)} | {row['of_bandwidth']:.0%} |"
            )
    return "\n".join(lines)


def _prefill_table() -> str:
    lines = ["| experts | native | views | auto |", "| --- | --- | --- | --- |"]
    for experts in EXPERTS:
        rows = _record(f"cpu_prefill_{experts}")["cells"][0]["engines"]
        times = " | ".join(_times(rows[name]) for name in ("native", "views", "auto"))
        lines.append(f"| {experts} | {times} |")
    return "\n".join(lines)


def _dispatch_table() -> str:
    choices = _record("cpu_dispatch")["choices"]
    densities = sorted({choice["density"] for choice in choices})
    lines = [
        "| batch | " + " | ".join(f"{density:g}" for density in densities) + " |",
        "| --- |" + " --- |" * len(densities),
    ]
    for batch in sorted({choice["batch"] for choice in choices}):
        cells = {c["density"]: c for c in choices if c["batch"] == batch}
        told = (
            f"{c['taken']} {c['of_best']:.2f} / {c['of_dense']:.2f}"
            for c in map(cells.get, densities)
            if c
        )
        lines.append(f"| {batch} | " + " | ".join(told) + " |")
    worst = min(choices, key=lambda c: float(c["of_best"]))
    lines.append(
        f"\nThe path taken reaches {worst['of_best']:.2f} of the best at worst (batch {worst['batch']}, density "
        f"{worst['density']:g}), {sum(c['of_best'] >= 0.95 for c in choices)} of {len(choices)} cells reach "
        f"0.95, and {min(c['of_dense'] for c in choices):.2f} of plain dense at worst."
    )
    return "\n".join(lines)


def _recorded(name: str) -> bool:
    return (RECORDS / f"{name}.json").exists()


NAMES = {
    "eager": "torch dense",
    "compiled": "torch dense, compiled",
    "eager+linears": "torch dense, moefy's linear maps",
    "compiled+linears": "torch dense, moefy's linear maps, compiled",
    "masked": "moefy, masked dense",
    "views": "moefy, views of the experts in torch",
    "auto": "moefy",
    "auto+linears": "moefy, its linear maps too",
    "auto+compiled+linears": "moefy, its linear maps too, compiled",
    "dense.gguf": "llama.cpp dense",
    "dense-q8_0.gguf": "llama.cpp dense, Q8_0",
    "export-{}.gguf": "llama.cpp on moefy's export",
    "export-{}-q8_0.gguf": "llama.cpp on moefy's export, Q8_0",
}
MODEL_DENSITIES = ("0.1", "0.25", "0.5")


def models() -> None:
    """The table and the picture of whole models (`cpu_model.py`)."""
    found = [d for d in MODEL_DENSITIES if _recorded(f"cpu_model_{d}")]
    records = {density: _record(f"cpu_model_{density}") for density in found}
    lines = [
        "| engine | "
        + " | ".join(f"decode at {d}" for d in records)
        + " | of the bandwidth at 0.25 | "
        "prefill at 0.25 |",
        "| --- |" + " --- |" * (len(records) + 2),
    ]
    drawn: dict[str, dict[str, float]] = {}
    for key, name in NAMES.items():
        rows = {d: _phases(record, key.format(d)) for d, record in records.items()}
        if not all(rows.values()):
            continue
        rates = {d: row["decode"]["tokens_per_second"] for d, row in rows.items()}
        drawn[name] = rates
        of, prefill = (
            rows["0.25"]["decode"]["of_bandwidth"],
            rows["0.25"]["prefill"]["tokens_per_second"],
        )
        lines.append(
            f"| {name} | " + " | ".join(f"{rate:.1f}" for rate in rates.values())
            + f" | {'' if of is None else f'{of:.0%}'} | {prefill:.0f} |"
        )  # fmt: skip
    table = "\n".join(lines)
    fill(PAGE, "against", _against(records))
    for page in (PAGE, Path("README.md")):
        fill(page, "model", table)
    _draw(drawn, Path("docs/cpu_model.png"))


def _against(records: dict[str, dict[str, Any]]) -> str:
    """What moefy reaches of what could be hoped for, in decoding."""
    lines = [
        "| density | MLPs of dense time | Amdahl allows | moefy over torch dense | of Amdahl | bytes allow | "
        "moefy at its fastest over torch dense | over llama.cpp on the export | over llama.cpp dense |",
        "| --- |" + " --- |" * 8,
    ]
    for density, record in records.items():
        cell = next(c for c in record["cells"] if c["phase"] == "decode")
        rate = {name: row["tokens_per_second"] for name, row in cell["engines"].items()}
        mine, best = (
            rate["auto"] / rate["eager"],
            max(r for name, r in rate.items() if name.startswith("auto")),
        )
        others = [best / rate[name] if name in rate else None
                  for name in ("eager", f"export-{density}.gguf", "dense.gguf")]  # fmt: skip
        told = ["not run" if ratio is None else f"{ratio:.2f}" for ratio in others]
        lines.append(
            f"| {density} | {cell['mlp_share']:.0%} | {cell['amdahl']:.2f} | {mine:.2f} | "
            f"{mine / cell['amdahl']:.0%} | {cell['ideal']:.2f} | {' | '.join(told)} |"
        )
    return "\n".join(lines)


def _phases(record: dict[str, Any], engine: str) -> dict[str, Any]:
    """The rows of an engine by phase; empty where it did not run."""
    return {c["phase"]: c["engines"][engine] for c in record["cells"] if engine in c["engines"]}


def _draw(rates: dict[str, dict[str, float]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(rates) + 1.2), layout="constrained")
    colours = {"0.1": "#0072b2", "0.25": "#56b4e9", "0.5": "#cccccc"}
    densities = list(next(iter(rates.values())))
    for offset, density in enumerate(densities):
        at = [n + 0.27 * (offset - (len(densities) - 1) / 2) for n in range(len(rates))]
        values = [found[density] for found in rates.values()]
        axes.barh(at, values, 0.25, color=colours[density], label=f"density {density}")
    axes.set_yticks(range(len(rates)), list(rates))
    axes.invert_yaxis()
    axes.set_xlabel("tokens decoded a second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)


def _times(row: dict[str, Any]) -> str:
    """A speedup with its interval; none where it is within the noise."""
    if row["interval"] is None:
        return "baseline"
    low, high = row["interval"]
    value = "none" if row["speedup"] is None else f"{row['ratio']:.2f}"
    return f"{value} ({low:.2f} to {high:.2f})"


def _record(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{name}.json").read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["layers", "prefill", "dispatch", "models", "table"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=[*DTYPES], help="of layers")
    parser.add_argument("--experts", type=int, choices=EXPERTS, nargs="*", default=[*EXPERTS])
    given = parser.parse_args()
    if given.what == "layers":
        layers(given.tiny, given.dtype, given.experts)
    elif given.what in ("models", "table"):
        {"models": models, "table": table}[given.what]()
    else:
        {"prefill": prefill, "dispatch": dispatch}[given.what](given.tiny)


if __name__ == "__main__":
    main()
