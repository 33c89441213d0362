"""The command line: each verb calls one function and shows what it returned.

`moefy.cli.command` says what all verbs share.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.command import (
    Model,
    Moefied,
    Out,
    Overwrite,
    Precision,
    Resume,
    Settings,
    Shown,
    Text,
    Tokens,
    app,
    settings_given,
    verb,
)


@verb
def convert(
    model: Model,
    out: Out,
    recipe: Annotated[str, typer.Option(help="Shipped recipe or YAML file.")] = "default",
    density: Annotated[
        float | None, typer.Option(help="FFN density, 0 to 1: the mean over layers.")
    ] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="KL to dense to reach, instead of a density.")
    ] = None,
    expert_size: Annotated[int | None, typer.Option(help="Neurons per expert.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts per layer.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the side files only.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="One layer in memory at a time, for large models.")
    ] = False,
    corpus: Text = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe setting a.b=c; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
) -> Shown:
    """Convert a checkpoint: partition, router, verified output.

    Example: moefy convert ./llama ./llama-moefied --density 0.25
    """
    from moefy import recipe as recipes

    flags = {
        "density": density,
        "budget.target_kl": target_kl,
        "partition.expert_size": expert_size,
        "partition.experts": experts,
    }
    given: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if (experts is None) != (expert_size is None):
        # One of them replaces whichever the recipe has.
        given |= {"partition.expert_size": expert_size, "partition.experts": experts}
    chosen = recipes.override(recipes.load(recipe), {**given, **settings_given(set_ or [])})
    if dry_run:
        return _plan(model, chosen, corpus, adapter, stream)
    from moefy.conversion.convert import convert as run
    from moefy.evaluation.tables import domain_rows
    from moefy.run.tables import terminal

    records = run(
        model, out, recipe=chosen, corpus=corpus, adapter=adapter, stream=stream, resume=resume,
        overwrite=overwrite, quiet=quiet,
    )  # fmt: skip
    if not records:  # of many processes only the first has something to show
        return Shown(None)
    table = terminal(*domain_rows(records["evaluation"]))
    return Shown({**records, "out": str(out)}, [table, f"wrote {out}"])


def _plan(model: str, recipe: Any, corpus: str | None, adapter: bool, stream: bool) -> Shown:
    from dataclasses import asdict

    from moefy.conversion.plan import describe, plan
    from moefy.models.checkpoint import Checkpoint

    found = plan(Checkpoint.open_config(model), recipe, corpus or "bundled", adapter=adapter)
    data = {
        key: value for key, value in asdict(found).items() if key not in ("sites", "head_sites")
    }
    return Shown(data, [describe(found, recipe, stream=stream)])


@verb
def eval_(
    model: Moefied,
    against: Annotated[
        str | None,
        typer.Option(help="Dense checkpoint; left out, the same weights, all experts on."),
    ] = None,
    corpus: Text = None,
    documents: Annotated[int, typer.Option(help="Most documents to read.")] = 1 << 30,
    router: Annotated[
        str | None, typer.Option(help="Replace the router, for example by 'oracle'.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Record to write.")] = None,
    quiet: bool = False,
    verbose: bool = False,
) -> Shown:
    """Measure quality against the dense model, per domain, with intervals; -v adds every layer."""
    from moefy.evaluation.folder import evaluate_folder
    from moefy.evaluation.tables import domain_rows, layer_rows, sceptic_lines, sceptic_rows
    from moefy.run.tables import terminal

    record = evaluate_folder(
        model, against=against, corpus=corpus, documents=documents, router=router, quiet=quiet
    )
    _write(record, output)
    summary = (
        f"FFN density {record['ffn_density']:.3f}, active budget {record['active_budget']:.3f}, "
        f"active parameters {record['active_parameters']:.3f}"
    )
    if "head_density" in record:
        summary += (
            f", head density {record['head_density']:.3f}, attention budget "
            f"{record['attention_budget']:.3f}"
        )
    view = [terminal(*domain_rows(record)), summary]
    if "positions" in record:
        view.append(terminal(*sceptic_rows(record), title="the sceptic's box"))
    view += sceptic_lines(record)
    if verbose:
        view.append(terminal(*layer_rows(record), title="by layer"))
    return Shown(record, view)


def _trained(record: dict[str, Any], rows: Callable[..., Any], out: Path) -> Shown:
    """The record of a training run; of many processes only the first has one."""
    from moefy.run.tables import terminal

    if not record:
        return Shown(None)
    return Shown(record, [terminal(*rows(record)), f"written to {out}"])


@verb
def recover(
    model: Moefied,
    out: Out,
    tokens: Tokens = None,
    train: Annotated[
        str | None,
        typer.Option(help="By comma: experts, routers, compensations, rest (all but rest)."),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train through adapters of this rank (0: in full).")
    ] = None,
    precision: Precision = None,
    corpus: Text = None,
    against: Annotated[
        str | None, typer.Option(help="Dense model that teaches, if MODEL was trained before.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Train the dense model on the same tokens too.")
    ] = False,
    set_: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
) -> Shown:
    """Train a moefied model towards its dense model; `accelerate launch -m moefy recover` on many.

    Example: moefy recover ./llama-moefied ./llama-recovered --tokens 2000000 --corpus ./text
    """
    from moefy import recipe as recipes
    from moefy.training.recipe import RecoverRecipe
    from moefy.training.recover import recover as run
    from moefy.training.tables import recovery_rows

    given = {"tokens": tokens, "train": train, "lora_rank": lora_rank, "precision": precision}
    record = run(
        model,
        out,
        recipe=recipes.override(RecoverRecipe(), settings_given(set_ or [], given)),
        corpus=corpus,
        against=against,
        control=control,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    return _trained(record, recovery_rows, out)


@verb
def sparsify(
    model: Model,
    out: Out,
    relu: Annotated[bool, typer.Option("--relu", help="Replace the activation by ReLU.")] = False,
    penalty: Annotated[str | None, typer.Option(help="hoyer, l1 or none (hoyer).")] = None,
    weight: Annotated[float | None, typer.Option(help="Weight of the penalty (0.3).")] = None,
    tokens: Tokens = None,
    precision: Precision = None,
    corpus: Text = None,
    control: Annotated[
        bool, typer.Option("--control", help="Train the unchanged model on the same tokens too.")
    ] = False,
    set_: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
) -> Shown:
    """Train a dense model towards sparse activations, before it is converted.

    Example: moefy sparsify ./llama ./llama-relu --relu --tokens 2000000 --corpus ./text
    """
    from moefy import recipe as recipes
    from moefy.training.recipe import SparsifyRecipe
    from moefy.training.sparsify import sparsify as run
    from moefy.training.tables import sparsify_rows

    given = {
        "relu": relu or None, "penalty": penalty, "weight": weight, "tokens": tokens,
        "precision": precision,
    }  # fmt: skip
    record = run(
        model,
        out,
        recipe=recipes.override(SparsifyRecipe(), settings_given(set_ or [], given)),
        corpus=corpus,
        control=control,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    return _trained(record, sparsify_rows, out)


@verb
def prune(
    model: Model,
    out: Out,
    forget: Annotated[str, typer.Option(help="Domain whose experts go.")],
    retain: Annotated[
        list[str] | None,
        typer.Option(help="Domain that is to stay as it is; may be repeated (all others)."),
    ] = None,
    unit: Annotated[str, typer.Option(help="What is removed: expert or neuron.")] = "expert",
    retain_loss: Annotated[
        float | None,
        typer.Option(help="Rise of the cross-entropy to retain that is allowed (0.01)."),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Share of the experts that goes instead, 0 to 1.")
    ] = None,
    corpus: Text = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to read for each of ranking, deciding and measuring.")
    ] = 20_000,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
) -> Shown:
    """Remove the experts that one domain needs, measure what that costs and whether it comes back.

    Example: moefy prune ./llama-moefied ./llama-no-code --forget python_code
    """
    from moefy.inspection.removal.prune import prune as run
    from moefy.inspection.removal.summary import control_rows, curve_rows, lines
    from moefy.run.tables import terminal

    record = run(
        model, out, forget=forget, retain=retain, unit=unit, retain_loss=retain_loss, share=share,
        corpus=corpus, tokens=tokens, resume=resume, overwrite=overwrite, quiet=quiet,
    )  # fmt: skip
    view = [
        terminal(*curve_rows(record), title=f"without the {unit}s of {forget}"),
        terminal(*control_rows(record), title="what was removed, beside controls"),
        *lines(record),
        f"written to {out}",
    ]
    return Shown(record, view)


@verb
def inspect_(
    model: Moefied,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the report.")] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Text to read, as of convert; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to describe on.")] = 200_000,
    causal_tokens: Annotated[int, typer.Option(help="Tokens to ablate on.")] = 20_000,
    mode: Annotated[str, typer.Option(help="Ablation: mean, zero, peak or resample.")] = "mean",
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out controls or causal; may be repeated.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to look at token by token; may be repeated.")
    ] = None,
    quiet: bool = False,
) -> Shown:
    """Show what every expert does: descriptions, causes, controls; writes an offline report."""
    from moefy.inspection.inspect import REPORT, inspect
    from moefy.inspection.terminal import explained, page_one, strongest
    from moefy.run.tables import terminal

    found = inspect(
        model, corpora={name: name for name in corpus} if corpus else None, out=out, tokens=tokens,
        causal_tokens=causal_tokens, mode=mode, skip=skip or (), prompts=prompt or (),
        command=" ".join(["moefy", *sys.argv[1:]]), quiet=quiet,
    )  # fmt: skip
    if not found.tables:  # of many processes only the first has something to show
        return Shown(None)
    view: list[Any] = [
        terminal(*page_one(found), title="before you believe the rest"),
        terminal(*explained(found), title="what predicts which experts run, in bits"),
    ]
    if "causal" in found.tables:
        view.append(terminal(*strongest(found), title="experts that one domain needs most"))
    view.append(f"written to {out / REPORT}" if out else "-o FOLDER writes the report")
    return Shown(found.to_dict(), view)


@verb
def diff(
    base: Annotated[str, typer.Argument(help="Checkpoint, dense or moefied.")],
    other: Annotated[str, typer.Argument(help="Another one with the same tokenizer.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the report.")] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option("--text", "--corpus", help="As the corpus of convert; may be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare on.")] = 50_000,
    quiet: bool = False,
) -> Shown:
    """Show where two models differ: tokens in context, domains, classes of tokens, with intervals."""
    from moefy.inspection.diff import diff
    from moefy.inspection.inspect import REPORT
    from moefy.inspection.terminal import differences, saturated, tails
    from moefy.run.tables import terminal

    found = diff(
        base, other, corpora={name: name for name in corpus} if corpus else None, out=out,
        tokens=tokens, command=" ".join(["moefy", *sys.argv[1:]]), quiet=quiet,
    )  # fmt: skip
    view: list[Any] = [
        terminal(*differences(found), title="log p(base) - log p(other)"),
        terminal(*tails(found), title="tokens that lose and gain most"),
    ]
    if "saturation" in found.tables:
        view.append(terminal(*saturated(found), title="router saturation"))
    view.append(f"written to {out / REPORT}" if out else "-o FOLDER writes the report")
    return Shown(found.to_dict(), view)


@verb
def compare(
    model: Model,
    recipe_names: Annotated[
        str, typer.Option("--recipes", help="Recipes or YAML files, by comma.")
    ] = "fast,default,moefication,cmoe,teal",
    budgets: Annotated[str, typer.Option(help="Active budgets, by comma.")] = "0.25,0.5",
    corpus: Text = None,
    documents: Annotated[int, typer.Option(help="Most documents to evaluate on.")] = 44,
    seed: Annotated[int, typer.Option(help="Seed of shards and recipes.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Record to write.")] = None,
    quiet: bool = False,
) -> Shown:
    """Run recipes on one model at equal active budgets, in memory, and compare them.

    Example: moefy compare ./llama --recipes fast,teal,cats --budgets 0.5
    """
    from moefy.conversion.compare import compare as run
    from moefy.conversion.compare import comparison_rows
    from moefy.run.tables import terminal

    record = run(
        model, recipe_names.split(","), [float(b) for b in budgets.split(",")], corpus=corpus,
        documents=documents, seed=seed, quiet=quiet,
    )  # fmt: skip
    _write(record, output)
    return Shown(record, [terminal(*comparison_rows(record))])


@verb
def bench(
    model: Annotated[
        Path | None, typer.Argument(help="Folder that moefy convert wrote; none: --layer.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="A synthetic SwiGLU layer instead: D,N,E,k such as 4096,11008,64,16."),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(help="kernel, layer or model (model; with --layer: layer)."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Dense checkpoint to compare with; left out, the source.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="eager, auto, a backend, experts, llama.cpp ... (all); may be repeated."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Beside each engine its graph of torch.compile.")
    ] = False,
    linears: Annotated[
        bool, typer.Option("--linears", help="And its moefy.native_linears.")
    ] = False,
    experts: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER: an export by transformers' NAME, or all.")
    ] = None,
    gguf: Annotated[list[Path] | None, typer.Option(help="File for llama.cpp to run.")] = None,
    batches: Annotated[
        str | None, typer.Option(help="By comma (1,2,4,8,16; of a model: 1).")
    ] = None,
    densities: Annotated[
        str | None, typer.Option(help="By comma, of masks that are drawn and of synthetic layers.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (what the machine runs best).")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Prompt tokens, of a model.")] = 128,
    generated: Annotated[int, typer.Option(help="Tokens decoded with the cache.")] = 32,
    samples: Annotated[int | None, typer.Option(help="Samples (15; of a model: 7).")] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Only measure, in full, what auto chooses by on this CPU (layers new to it: for seconds).",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Record to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (PNG) of speedups to write.")] = None,
    quiet: bool = False,
) -> Shown:
    """Time engines beside the fastest dense one: the experts alone, the layer, or the whole model.

    Example: moefy bench ./out --level layer --batches 1,4,16 --plot layer.png
    """
    from moefy.benchmark.bench import bench as run
    from moefy.benchmark.bench import calibrate_machine
    from moefy.benchmark.plot import check_plot, draw_speed
    from moefy.benchmark.record import calibration_rows, speed_lines, speed_rows
    from moefy.run.tables import terminal

    if calibrate:
        record = calibrate_machine(model, layer=layer, dtype=dtype, quiet=quiet)
        _write(record, output)
        return Shown(record, [terminal(*calibration_rows(record)), f"wrote {record['file']}"])
    if plot is not None:
        check_plot(plot)
    record = run(
        model, level=level, layer=layer, against=against, engines=engine or (), compiled=compiled,
        linears=linears, experts=dict(one.partition("=")[::2] for one in experts or ()), gguf=gguf or (),
        batches=batches,
        densities=densities, dtype=dtype, prompt_tokens=prompt, generated=generated, samples=samples,
        calibrated=calibrate is not False, quiet=quiet,
    )  # fmt: skip
    _write(record, output)
    lines = speed_lines(record)
    if plot is not None:
        draw_speed(record, plot)
        lines.append(f"wrote {plot}")
    return Shown(record, [terminal(*speed_rows(record)), *lines])


@verb
def generate(
    model: Moefied,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample instead of the likeliest.")
    ] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Run every expert.")] = False,
) -> Shown:
    """Continue a prompt with the moefied model."""
    from moefy.cli.generate import generate_text

    text = generate_text(model, prompt, tokens=tokens, sample=sample, dense=dense)
    return Shown({"prompt": prompt, "text": text}, [text])


@verb
def revert(model: Moefied, out: Out, overwrite: Overwrite = False) -> Shown:
    """Give back the dense checkpoint, every tensor byte for byte."""
    from moefy.models.reorder import revert as run

    run(model, out, overwrite=overwrite)
    return Shown({"out": str(out)}, [f"wrote {out}: the tensors of the source, byte for byte"])


@verb
def export(
    model: Annotated[
        Path, typer.Argument(help="Folder that moefy convert wrote; for gguf, a stock model too.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; a file for gguf.")],
    to: Annotated[str, typer.Option(help="mixtral, qwen2_moe, qwen3_moe, dense or gguf.")],
    quantize: Annotated[
        str | None, typer.Option(help="q8_0: 8 bits, for matrices of gguf.")
    ] = None,
    overwrite: Overwrite = False,
) -> Shown:
    """Write a stock mixture-of-experts checkpoint that needs no moefy.

    Example: moefy export ./llama-moefied ./llama.gguf --to gguf
    """
    from moefy.exporting.export import export as run

    record = run(model, out, to=to, quantize=quantize, overwrite=overwrite)
    return Shown(record, [f"wrote {out}: {record['architecture']}", *record["warnings"]])


@verb
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of a report with an index.html.")],
    port: Annotated[int, typer.Option(help="Port; 0 is any that is free.")] = 8000,
) -> Shown:
    """Show a report that is too large for one file, to this machine only; Ctrl-C ends it."""
    from moefy.inspection.report.serve import serve as run

    run(folder, port, typer.echo)
    return Shown(None)


@verb
def ls(
    what: Annotated[
        str | None,
        typer.Argument(help="recipes, methods, routers, selections, compensations, families."),
    ] = None,
) -> Shown:
    """List what there is to choose from."""
    from moefy.methods.listing import listing
    from moefy.run.tables import terminal

    tables = listing(what)
    view = [
        terminal([name, "what it is"], [[k, v] for k, v in rows.items()])
        for name, rows in tables.items()
    ]
    return Shown(tables, view)


@verb
def env() -> Shown:
    """Versions and machine, for a bug report."""
    from moefy.models.library import ROWS, moved
    from moefy.run.provenance import machine
    from moefy.run.tables import terminal

    found = {**machine(), "moved": moved()}
    flat = {**{k: v for k, v in found.items() if k != "versions"}, **found["versions"]}
    flat["moved"] = "; ".join(found["moved"]) or f"nothing of {len(ROWS)} things relied on"
    return Shown(found, [terminal(["", "value"], [[k, str(v)] for k, v in flat.items()])])


@verb
def quickstart(
    out: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("moefy-quickstart"),
    calibrate: Annotated[
        bool, typer.Option(help="Time first, on a machine that is new, what auto chooses by.")
    ] = True,
    quiet: bool = False,
) -> Shown:
    """Convert, evaluate and time the demo models; what fails is named below the table, exit code 1."""
    from moefy.cli.quickstart import quickstart as run
    from moefy.run.tables import terminal

    record = run(out, calibrated=calibrate, quiet=quiet)
    view = [*(terminal(*table) for table in record["tables"]), *record["notes"]]
    return Shown(record["data"], view, record["error"])


def _write(record: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point of the `moefy` command."""
    app()


if __name__ == "__main__":
    main()
