"""The verbs that time: `moefy bench` and `moefy calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.command import DTYPE, Report, Shown, verb, write

Timed = Annotated[
    Path | None, typer.Argument(help="Folder that moefy convert wrote; none: --layer.")
]
Layer = Annotated[
    str | None,
    typer.Option(help="A synthetic SwiGLU layer instead: D,N,E,k such as 4096,11008,64,16."),
]

Level = Annotated[
    str | None, typer.Option(help="kernel, layer or model (model; with --layer: layer).")
]
Against = Annotated[
    str | None, typer.Option(help="Dense checkpoint to compare with; left out, the source.")
]
Engines = Annotated[
    list[str] | None,
    typer.Option(help="eager, auto, a backend, experts, llama.cpp ... (all); may be repeated."),
]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="Beside each engine its graph of torch.compile.")
]
Linears = Annotated[bool, typer.Option("--linears", help="And its moefy.native_linears.")]
Exports = Annotated[
    list[str] | None, typer.Option(help="NAME=FOLDER: an export by transformers' NAME, or all.")
]
Files = Annotated[list[Path] | None, typer.Option(help="File for llama.cpp to run.")]
Batches = Annotated[str | None, typer.Option(help="By comma (1,2,4,8,16; of a model: 1).")]
Densities = Annotated[
    str | None, typer.Option(help="By comma, of masks that are drawn and of synthetic layers.")
]


@verb("device")
def bench(
    model: Timed = None,
    layer: Layer = None,
    level: Level = None,
    against: Against = None,
    engine: Engines = None,
    compiled: Compiled = False,
    linears: Linears = False,
    experts: Exports = None,
    gguf: Files = None,
    batches: Batches = None,
    densities: Densities = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt tokens, of a model.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded with the cache.")] = 32,
    samples: Annotated[int | None, typer.Option(help="Samples (15; of a model: 7).")] = None,
    no_calibrate: Annotated[
        bool,
        typer.Option("--no-calibrate", help="Time no layers first that are new to this machine."),
    ] = False,
    out: Report = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (PNG) of speedups to write.")] = None,
    quiet: bool = False,
) -> Shown:
    """Time engines beside the fastest dense one: the experts alone, the layer, or the whole model.

    Example: moefy bench ./out --level layer --batches 1,4,16 --plot layer.png
    """
    from moefy.benchmark.bench import bench as run
    from moefy.benchmark.plot import check_plot, draw_speed
    from moefy.benchmark.record import speed_lines, speed_rows
    from moefy.run.tables import terminal

    if plot is not None:
        check_plot(plot)
    record = run(
        model, level=level, layer=layer, against=against, engines=engine or (), compiled=compiled,
        linears=linears, experts=dict(one.partition("=")[::2] for one in experts or []),
        gguf=gguf or [], batches=batches, densities=densities, dtype=dtype,
        prompt_tokens=prompt_tokens, generated=new_tokens, samples=samples, calibrated=not no_calibrate,
        quiet=quiet,
    )  # fmt: skip
    write(record, out, "speed.json")
    lines = speed_lines(record)
    if plot is not None:
        draw_speed(record, plot)
        lines.append(f"wrote {plot}")
    return Shown(record, [terminal(*speed_rows(record)), *lines])


@verb()
def calibrate(
    model: Timed = None,
    layer: Layer = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE)] = None,
    out: Report = None,
    quiet: bool = False,
) -> Shown:
    """Time in full, on this CPU, what auto chooses by for layers like these, and keep it.

    Example: moefy calibrate ./out
    """
    from moefy.benchmark.bench import calibrate_machine
    from moefy.benchmark.record import calibration_rows
    from moefy.run.tables import terminal

    record = calibrate_machine(model, layer=layer, dtype=dtype, quiet=quiet)
    write(record, out, "calibration.json")
    return Shown(record, [terminal(*calibration_rows(record)), f"wrote {record['file']}"])
