"""The command line: each verb calls one function and shows what it returned.

`moefy.cli.command` says what all verbs share.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefy.cli import running as running
from moefy.cli.command import (
    RUNS,
    Control,
    Documents,
    Model,
    Moefied,
    Out,
    Overwrite,
    RecipeSeed,
    Report,
    Resume,
    Seed,
    Settings,
    Shown,
    Text,
    Texts,
    TrainDtype,
    TrainTokens,
    app,
    is_file,
    settings_of,
    training_settings,
    verb,
    write,
)

if TYPE_CHECKING:
    from moefy.recipe import Recipe


Density = Annotated[float | None, typer.Option(help="FFN density, 0 to 1: the mean over layers.")]
TargetKl = Annotated[float | None, typer.Option(help="KL to dense to reach, instead of a density.")]
Bits = Annotated[int | None, typer.Option(help="Bits of a stored MLP weight: 16, 8, 4, 3 or 2.")]
SideFiles = Annotated[bool, typer.Option("--adapter", help="Write the side files only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="One layer in memory at a time, for large models.")
]


@verb(*RUNS)
def convert(
    model: Model,
    out: Out,
    recipe: Annotated[str, typer.Option(help="Shipped recipe or YAML file.")] = "default",
    density: Density = None,
    target_kl: TargetKl = None,
    expert_size: Annotated[int | None, typer.Option(help="Neurons per expert.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts per layer.")] = None,
    bits: Bits = None,
    adapter: SideFiles = False,
    stream: Stream = False,
    corpus: Text = None,
    set_: Settings = None,
    seed: RecipeSeed = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
) -> Shown:
    """Convert a checkpoint: partition, router, verified output.

    Example: moefy convert ./llama ./llama-moefied --density 0.25
    """
    sizes = {"partition.expert_size": expert_size, "partition.experts": experts}
    options = {
        "density": density,
        "budget.target_kl": target_kl,
        "storage.bits": bits,
        "seed": seed,
    }
    chosen = _chosen(recipe, options, sizes, set_ or [], stream=stream)
    if dry_run:
        return _plan(model, chosen, corpus, adapter, stream)
    from moefy.conversion.convert import convert as run

    records = run(
        model, out, recipe=chosen, corpus=corpus, adapter=adapter, stream=stream, resume=resume,
        overwrite=overwrite, quiet=quiet,
    )  # fmt: skip
    return _converted(records, out)


def _converted(records: dict[str, Any], out: Path) -> Shown:
    """The record of a conversion; of many processes only the first has one."""
    from moefy.evaluation.tables import domain_rows
    from moefy.run.tables import terminal

    if not records:
        return Shown(None)
    measured = records["evaluation"]
    view = [terminal(*domain_rows(measured)), _budgets(measured), f"wrote {out}"]
    return Shown({**records, "out": str(out)}, view)


def _chosen(
    name: str, options: dict[str, Any], sizes: dict[str, Any], pairs: list[str], *, stream: bool
) -> "Recipe":
    """The recipe called `name` with what options and `--set` change."""
    from moefy import recipe as recipes

    changes = {key: value for key, value in options.items() if value is not None}
    if any(value is not None for value in sizes.values()):
        # One of them replaces whichever the recipe has; of both the recipe says what is wrong.
        changes |= sizes
    named = recipes.for_stream(name) if stream else name
    return recipes.override(recipes.load(named), {**changes, **settings_of(pairs)})


def _plan(model: str, recipe: "Recipe", corpus: str | None, adapter: bool, stream: bool) -> Shown:
    from dataclasses import asdict, replace

    from moefy.conversion.plan import describe, plan
    from moefy.data.corpus import load_corpus
    from moefy.data.inputs import try_reading
    from moefy.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open_config(model)
    planned = plan(checkpoint, recipe, corpus or "bundled", adapter=adapter)
    notes = try_reading(checkpoint, planned.kind, load_corpus(corpus), recipe.context)
    planned = replace(planned, notes=[*planned.notes, *notes])
    data = {
        key: value for key, value in asdict(planned).items() if key not in ("sites", "head_sites")
    }
    return Shown(data, [describe(planned, recipe, stream=stream)])


@verb(*RUNS)
def eval_(
    model: Annotated[
        str, typer.Argument(help="Folder that moefy convert wrote; of a dense model, CE alone.")
    ],
    against: Annotated[
        str | None,
        typer.Option(help="Dense checkpoint; left out, the same weights, all experts on."),
    ] = None,
    corpus: Text = None,
    documents: Documents = 1 << 30,
    router: Annotated[
        str | None, typer.Option(help="Replace the router, for example by 'oracle'.")
    ] = None,
    seed: Seed = 0,
    out: Report = None,
    quiet: bool = False,
    verbose: bool = False,
) -> Shown:
    """Measure quality against the dense model, per domain, with intervals; -v adds every layer."""
    from moefy.evaluation.folder import evaluate as evaluate_folder
    from moefy.evaluation.tables import domain_rows, layer_rows, sample_lines
    from moefy.run.tables import terminal

    record = evaluate_folder(
        model, against=against, corpus=corpus, documents=documents, router=router, seed=seed,
        quiet=quiet,
    )  # fmt: skip
    write(record, out, "evaluation.json")
    view: list[Any] = [terminal(*domain_rows(record)), *sample_lines(record)]
    if "active_budget" not in record:
        return Shown(record, view)
    view += [_budgets(record), *_rounding(record), *_groups(record)]
    if verbose:
        view.append(terminal(*layer_rows(record), title="by layer"))
    return Shown(record, view)


def _groups(record: dict[str, Any]) -> list[Any]:
    """What some tokens cost that are looked at by themselves."""
    from moefy.evaluation.tables import group_lines, group_rows
    from moefy.run.tables import terminal

    some = (
        [terminal(*group_rows(record), title="some tokens only")] if "positions" in record else []
    )
    return [*some, *group_lines(record)]


def _rounding(record: dict[str, Any]) -> list[str]:
    if "rounding_kl" not in record:
        return []
    return [
        f"against {record['dense']}; that is KL {record['rounding_kl']:.4g} from the source, measured when it "
        "was converted"
    ]


def _budgets(record: dict[str, Any]) -> str:
    names = {
        "ffn_density": "FFN density", "bits_read": "bits read per MLP weight (of 16)",
        "active_compute": "MLP multiplications", "active_parameters": "active parameters",
        "head_density": "head density", "attention_budget": "attention budget",
    }  # fmt: skip
    return ", ".join(f"{what} {record[name]:.3f}" for name, what in names.items() if name in record)


def _trained(record: dict[str, Any], rows: Callable[..., Any], out: Path) -> Shown:
    """The record of a training run; of many processes only the first has one."""
    from moefy.run.tables import terminal

    if not record:
        return Shown(None)
    return Shown(record, [terminal(*rows(record)), f"written to {out}"])


Trained = Annotated[
    str | None,
    typer.Option(help="By comma: experts, routers, compensations, rest (all but rest)."),
]
Rank = Annotated[int | None, typer.Option(help="Train through adapters of this rank (0: in full).")]
Teacher = Annotated[
    str | None, typer.Option(help="Dense model that teaches, if MODEL was trained before.")
]


@verb("device", "batch_size")
def recover(
    model: Moefied,
    out: Out,
    train_tokens: TrainTokens = None,
    train: Trained = None,
    lora_rank: Rank = None,
    dtype: TrainDtype = None,
    seed: RecipeSeed = None,
    corpus: Text = None,
    against: Teacher = None,
    control: Control = False,
    set_: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
) -> Shown:
    """Train a moefied model towards its dense model; `accelerate launch -m moefy recover` on many.

    Example: moefy recover ./llama-moefied ./llama-recovered --train-tokens 2000000 --corpus ./text
    """
    from moefy import recipe as recipes
    from moefy.training.curves import recovery_rows
    from moefy.training.recipe import RecoverRecipe
    from moefy.training.recover import recover as run

    options = training_settings(
        dtype, tokens=train_tokens, train=train, lora_rank=lora_rank, seed=seed
    )
    record = run(
        model, out, recipe=recipes.override(RecoverRecipe(), settings_of(set_ or [], options)),
        corpus=corpus, against=against, control=control, resume=resume, overwrite=overwrite,
        quiet=quiet,
    )  # fmt: skip
    return _trained(record, recovery_rows, out)


@verb("device", "batch_size")
def sparsify(
    model: Model,
    out: Out,
    relu: Annotated[bool, typer.Option("--relu", help="Replace the activation by ReLU.")] = False,
    penalty: Annotated[str | None, typer.Option(help="hoyer, l1 or none (hoyer).")] = None,
    weight: Annotated[float | None, typer.Option(help="Weight of the penalty (0.3).")] = None,
    train_tokens: TrainTokens = None,
    dtype: TrainDtype = None,
    seed: RecipeSeed = None,
    corpus: Text = None,
    control: Control = False,
    set_: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
) -> Shown:
    """Train a dense model towards sparse activations, before it is converted.

    Example: moefy sparsify ./llama ./llama-relu --relu --train-tokens 2000000 --corpus ./text
    """
    from moefy import recipe as recipes
    from moefy.training.curves import sparsify_rows
    from moefy.training.recipe import SparsifyRecipe
    from moefy.training.sparsify import sparsify as run

    options = training_settings(
        dtype, relu=relu or None, penalty=penalty, weight=weight, tokens=train_tokens, seed=seed
    )
    record = run(
        model, out, recipe=recipes.override(SparsifyRecipe(), settings_of(set_ or [], options)),
        corpus=corpus, control=control, resume=resume, overwrite=overwrite, quiet=quiet,
    )  # fmt: skip
    return _trained(record, sparsify_rows, out)


Retained = Annotated[
    list[str] | None,
    typer.Option(help="Domain that is to stay as it is; may be repeated (all others)."),
]
RetainLoss = Annotated[
    float | None, typer.Option(help="Rise of the cross-entropy to retain that is allowed (0.01).")
]
Share = Annotated[
    float | None, typer.Option(help="Share of the experts that goes instead, 0 to 1.")
]


@verb("device", "batch_size")
def prune(
    model: Model,
    out: Out,
    forget: Annotated[str, typer.Option(help="Domain whose experts go.")],
    retain: Retained = None,
    unit: Annotated[str, typer.Option(help="What is removed: expert or neuron.")] = "expert",
    retain_loss: RetainLoss = None,
    share: Share = None,
    corpus: Text = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to read for each of ranking, deciding and measuring.")
    ] = 20_000,
    seed: Seed = 0,
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
        corpus=corpus, tokens=tokens, seed=seed, resume=resume, overwrite=overwrite, quiet=quiet,
    )  # fmt: skip
    view = [
        terminal(*curve_rows(record), title=f"without the {unit}s of {forget}"),
        terminal(*control_rows(record), title="what was removed, beside controls"),
        *lines(record),
        f"written to {out}",
    ]
    return Shown(record, view)


@verb(*RUNS)
def inspect_(
    model: Moefied,
    out: Report = None,
    corpus: Texts = None,
    tokens: Annotated[int, typer.Option(help="Tokens to describe on.")] = 200_000,
    causal_tokens: Annotated[int, typer.Option(help="Tokens to ablate on.")] = 20_000,
    mode: Annotated[str, typer.Option(help="Ablation: mean, zero, peak or resample.")] = "mean",
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out controls or causal; may be repeated.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to look at token by token; may be repeated.")
    ] = None,
    seed: Seed = 0,
    quiet: bool = False,
) -> Shown:
    """Show what every expert does: descriptions, causes, controls; writes an offline report."""
    from moefy.inspection.inspect import inspect
    from moefy.inspection.terminal import explained, quality_summary, strongest
    from moefy.run.tables import terminal

    inspection = inspect(
        model, **_reading(corpus, out), tokens=tokens, causal_tokens=causal_tokens, mode=mode,
        skip=skip or (), prompts=prompt or (), seed=seed, quiet=quiet,
    )  # fmt: skip
    if not inspection.tables:  # of many processes only the first has something to show
        return Shown(None)
    view: list[Any] = [
        terminal(*quality_summary(inspection), title="before you believe the rest"),
        terminal(*explained(inspection), title="what predicts which experts run, in bits"),
    ]
    if "causal" in inspection.tables:
        view.append(terminal(*strongest(inspection), title="experts that one domain needs most"))
    return _inspected(inspection, view, out)


def _reading(corpus: list[str] | None, out: Path | None) -> dict[str, Any]:
    """Arguments of `inspect` and `diff`; the report goes into a folder, one file is written at the end."""
    return {
        "corpora": {name: name for name in corpus} if corpus else None,
        "out": None if out is None or is_file(out) else out,
        "command": " ".join(["moefy", *sys.argv[1:]]),
    }


def _inspected(result: Any, view: list[Any], out: Path | None) -> Shown:
    from moefy.inspection.inspect import REPORT

    data = result.to_dict()
    if out is not None and is_file(out):
        write(data, out, "")
    where = out if out is None or is_file(out) else out / REPORT
    return Shown(data, [*view, f"written to {where}" if where else "-o FOLDER writes the report"])


@verb(*RUNS)
def diff(
    base: Annotated[str, typer.Argument(help="Checkpoint, dense or moefied.")],
    other: Annotated[str, typer.Argument(help="Another one with the same tokenizer.")],
    out: Report = None,
    corpus: Texts = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare on.")] = 50_000,
    quiet: bool = False,
) -> Shown:
    """Show where two models differ: tokens in context, domains, classes of tokens, with intervals."""
    from moefy.inspection.diff import diff
    from moefy.inspection.terminal import differences, saturated, tails
    from moefy.run.tables import terminal

    result = diff(base, other, **_reading(corpus, out), tokens=tokens, quiet=quiet)
    view: list[Any] = [
        terminal(*differences(result), title="log p(base) - log p(other)"),
        terminal(*tails(result), title="tokens that lose and gain most"),
    ]
    if "saturation" in result.tables:
        view.append(terminal(*saturated(result), title="router saturation"))
    return _inspected(result, view, out)


Rounded = Annotated[
    bool, typer.Option("--quantised", help="Dense models of 8 to 2 bits beside them.")
]


@verb(*RUNS)
def compare(
    model: Model,
    recipe_names: Annotated[
        str,
        typer.Option("--recipes", help="Recipes, YAML files or roundings, by comma; '' is none."),
    ] = "fast,default,moefication,cmoe,teal",
    budgets: Annotated[
        str, typer.Option(help="Budgets, by comma: above 1 bits per MLP weight, else share of 16.")
    ] = "4,8",
    quantised: Rounded = False,
    corpus: Text = None,
    documents: Documents = 44,
    seed: Seed = 0,
    work: Annotated[
        Path | None, typer.Option(help="Folder of finished rows, which another run takes up.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: .svg or .png.")] = None,
    out: Report = None,
    quiet: bool = False,
) -> Shown:
    """Run recipes on one model at equal budgets of bits read, in memory, and compare them.

    Example: moefy compare ./llama --recipes fast,teal,cats --budgets 4,8
    """
    from moefy.benchmark.pareto import QUANTISED, check_plot, comparison_rows, draw_pareto
    from moefy.benchmark.pareto import compare as run
    from moefy.run.tables import terminal

    if plot is not None:
        check_plot(plot)
    names = [name for name in recipe_names.split(",") if name] + list(QUANTISED * quantised)
    record = run(
        model, names, [float(b) for b in budgets.split(",")], corpus=corpus, documents=documents,
        seed=seed, work=work, quiet=quiet,
    )  # fmt: skip
    write(record, out, "comparison.json")
    if plot is not None:
        draw_pareto(record, plot)
    return Shown(record, [terminal(*comparison_rows(record))])


@verb()
def revert(model: Moefied, out: Out, overwrite: Overwrite = False) -> Shown:
    """Give back the dense checkpoint, every tensor byte for byte."""
    from moefy.models.reorder import revert as run

    run(model, out, overwrite=overwrite)
    return Shown({"out": str(out)}, [f"wrote {out}: the tensors of the source, byte for byte"])


@verb()
def permute_adapter(
    adapter: Annotated[Path, typer.Argument(help="LoRA adapter of the dense model.")],
    model: Moefied,
    out: Out,
    overwrite: Overwrite = False,
) -> Shown:
    """Write a LoRA adapter of the dense model for the moefied one, where its neurons lie otherwise.

    Example: moefy permute-adapter ./lora ./llama-moefied ./lora-moefied
    """
    from moefy.models.lora import permute_adapter as run

    record = run(adapter, model, out, overwrite=overwrite)
    moved = f"{record['moved']} of {record['tensors']} tensors have neurons and were moved"
    return Shown(record, [f"wrote {out}: {moved}", *(f"note: {n}" for n in record["notes"])])


@verb()
def export(
    model: Annotated[
        Path, typer.Argument(help="Folder that moefy convert wrote; for gguf, a stock model too.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; a file for gguf.")],
    to: Annotated[str, typer.Option(help="mixtral, qwen2_moe, qwen3_moe, dense or gguf.")],
    quantize: Annotated[
        str | None,
        typer.Option(help="Of gguf: q8_0, matrices in 8 bits; q4_1, those of MLPs in 4."),
    ] = None,
    overwrite: Overwrite = False,
) -> Shown:
    """Write a stock mixture-of-experts checkpoint that needs no moefy.

    Example: moefy export ./llama-moefied ./llama.gguf --to gguf
    """
    from moefy.exporting.export import export as run

    record = run(model, out, to=to, quantize=quantize, overwrite=overwrite)
    return Shown(record, [f"wrote {out}: {record['architecture']}", *record["warnings"]])


@verb()
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of a report with an index.html.")],
    port: Annotated[int, typer.Option(help="Port; 0 is any that is free.")] = 8000,
) -> Shown:
    """Show a report that is too large for one file, to this machine only; Ctrl-C ends it."""
    from moefy.inspection.report import serve as run

    run(folder, port, typer.echo)
    return Shown(None)


@verb()
def ls(
    what: Annotated[
        str | None,
        typer.Argument(
            help="recipes, methods, routers, selections, compensations, backends, families."
        ),
    ] = None,
) -> Shown:
    """List what there is to choose from."""
    from moefy.experts.backends import BACKENDS
    from moefy.methods.tables import listing
    from moefy.run.tables import terminal

    tables = listing(what, backends=BACKENDS)
    view = [
        terminal([name, "what it is"], [[k, v] for k, v in rows.items()])
        for name, rows in tables.items()
    ]
    return Shown(tables, view)


@verb()
def env() -> Shown:
    """Versions and machine, for a bug report."""
    import platform

    from moefy.models.library import ROWS, moved
    from moefy.run.computing import machine
    from moefy.run.tables import terminal

    facts = {"python": platform.python_version(), **machine(), "moved": moved()}
    flat = {**{k: v for k, v in facts.items() if k != "versions"}, **facts["versions"]}
    flat["moved"] = "; ".join(facts["moved"]) or f"nothing of {len(ROWS)} things relied on"
    return Shown(facts, [terminal(["", "value"], [[k, str(v)] for k, v in flat.items()])])


@verb()
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


def main() -> None:
    """Entry point of the `moefy` command."""
    app()


if __name__ == "__main__":
    main()
