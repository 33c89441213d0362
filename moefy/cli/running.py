"""The verbs that run a model on what one gives it: `moefy generate`, `moefy bench`, `moefy calibrate`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.command import DTYPE, Moefied, Report, Seed, Shown, verb, write
from moefy.errors import MoefyError

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
NoCalibration = Annotated[
    bool, typer.Option("--no-calibrate", help="Time no layers first that are new to this machine.")
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
    no_calibrate: NoCalibration = False,
    seed: Seed = 0,
    out: Report = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (PNG) of speedups to write.")] = None,
    quiet: bool = False,
) -> Shown:
    """Time engines beside the fastest dense one: the experts alone, the layer, or the whole model.

    Example: moefy bench ./out --level layer --batches 1,4,16 --plot layer.png
    """
    from moefy.benchmark.bench import bench as run
    from moefy.benchmark.plot import check_plot

    if plot is not None:
        check_plot(plot)
    record = run(
        model, level=level, layer=layer, against=against, engines=engine or (), compiled=compiled,
        linears=linears, experts=dict(one.partition("=")[::2] for one in experts or []),
        gguf=gguf or [], batches=batches, densities=densities, dtype=dtype,
        prompt_tokens=prompt_tokens, generated=new_tokens, samples=samples, calibrated=not no_calibrate,
        seed=seed, quiet=quiet,
    )  # fmt: skip
    write(record, out, "speed.json")
    return _speed(record, plot)


def _speed(record: dict[str, Any], plot: Path | None) -> Shown:
    """The table of a speed record, and its picture where one is asked for."""
    from moefy.benchmark.plot import draw_speed
    from moefy.benchmark.record import speed_lines, speed_rows
    from moefy.run.tables import terminal

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


@verb("device", "dtype")
def generate(
    model: Moefied,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample instead of the likeliest.")
    ] = False,
    seed: Seed = 0,
    dense: Annotated[bool, typer.Option("--dense", help="Run every expert.")] = False,
) -> Shown:
    """Continue a prompt with the moefied model."""
    text = _continued(model, prompt, tokens=new_tokens, seed=seed if sample else None, dense=dense)
    return Shown({"prompt": prompt, "text": text}, [text])


def _continued(folder: Path, prompt: str, *, tokens: int, seed: int | None, dense: bool) -> str:
    """Prompt and continuation. With a `seed` tokens are drawn, else the likeliest are taken."""
    import torch

    from moefy.data.inputs import load_tokenizer
    from moefy.experts.loading import open_model
    from moefy.experts.moefied import of
    from moefy.experts.placement import device_of
    from moefy.experts.sparse_mlp import all_experts

    model: Any = open_model(folder, verify=True, dense=False)
    if not model.can_generate():
        raise MoefyError(f"{folder}: a {type(model).__name__} does not generate text")
    tokenizer = load_tokenizer(of(model).checkpoint.folder)
    if tokenizer is None:
        raise MoefyError(f"{folder}: has no tokenizer; use moefy.load and token ids from Python")
    encoded = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    encoded.pop("token_type_ids", None)
    if seed is not None:
        torch.manual_seed(seed)
    with all_experts(model) if dense else nullcontext():
        ids = model.generate(**encoded, max_new_tokens=tokens, do_sample=seed is not None)
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text
