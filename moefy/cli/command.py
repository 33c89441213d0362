"""What verbs of the command line share: options, registration, what is shown, errors.

An option has one name, one meaning, one help text in all verbs, and knows its old names.

Results go to stdout, as tables or with `--json` as one document; progress and errors to stderr. An
error of the user's is one line and exit code 1, a usage error exit code 2.
"""

import errno
import functools
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand

import moefy
from moefy.errors import CheckpointError, MoefyError, OutputError, RecipeError
from moefy.run.folder import refuse_inside, refuse_stranger, write_whole

app = typer.Typer(
    help="Turn the MLPs of a trained transformer into experts.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)


@dataclass
class Shown:
    """What a verb gives back: JSON values, and what a person sees instead."""

    data: Any
    view: list[Any] = field(default_factory=list)
    error: MoefyError | None = None
    """What ended the verb early, after what is shown; its cause is what `--debug` shows."""


class _Verb(TyperCommand):
    """A verb; an option's old name is answered by its new one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises `typer.Exit` after one line for an old name."""
        for argument in args[: args.index("--") if "--" in args else None]:
            name = argument.partition("=")[0]
            if name in OLD.get(str(self.name), {}):
                typer.echo(f"moefy: {name} is {OLD[str(self.name)][name]} now", err=True)
                raise typer.Exit(2)
        return super().parse_args(ctx, args)


EXTRA = {
    "as_json": Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")],
    "verbose": Annotated[
        bool, typer.Option("--verbose", "-v", help="More detail, and messages of libraries.")
    ],
    "debug": Annotated[bool, typer.Option("--debug", help="Traceback of errors.")],
}
READERS = {
    "bench", "calibrate", "diff", "eval", "export", "generate", "inspect", "permute_adapter", "prune",
    "recover", "revert",
}  # fmt: skip
"""Verbs that read folders which moefy convert wrote."""
_BASED = READERS - {"permute_adapter", "recover", "revert"}
"""Of these, verbs that take the adapter form, whose weights lie somewhere else."""
BASE = "Folder of the dense model, for an adapter whose base has moved."
_WRITE = "choose a place that may be read and written"
_ROOM = "free some room and run again"
_REMEDIES = {
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _WRITE),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
}
PLUGINS = "Import code that the folder names; only for folders that you trust."


def verb(*runs: str) -> Callable[[Callable[..., Shown]], None]:
    """Register a verb; adds `--json`, `--quiet`, `--verbose` and `--debug`, and reports errors.

    `runs` are those of `RUNS` that it has too: all that it loads and runs obeys them.
    """

    def register(run: Callable[..., Shown]) -> None:
        signature = inspect.signature(run, eval_str=True)
        takes, called = signature.parameters.keys(), run.__name__.rstrip("_")
        name = called.replace("_", "-")

        @functools.wraps(run)
        def command(
            as_json: bool,
            quiet: bool,
            verbose: bool,
            debug: bool,
            plugins: bool = False,
            moved_base: Path | None = None,
            **arguments: Any,
        ) -> None:
            common = {"quiet": quiet, "verbose": verbose}
            arguments |= {name: value for name, value in common.items() if name in takes}
            asked = {name: arguments.pop(name) for name in runs}
            _hush(verbose)
            _say_anything()
            with _errors(debug=debug, resumes="resume" in takes):
                paths = arguments | {"moved_base": moved_base}
                check_paths(paths, overwrite=_overwrites(arguments))
                check_results(arguments.get("out"), RESULTS.get(name, ()))
                with _computing(asked), _plugins(plugins), _based(moved_base, arguments):
                    shown = run(**arguments)
            _show(shown, as_json)
            if shown.error is not None:
                _fail(shown.error, debug)

        command.__dict__["__signature__"] = _with_options(signature, runs, _extra(called))
        app.command(name, cls=_Verb)(command)

    return register


def _extra(verb: str) -> dict[str, Any]:
    """The options that a verb has besides its own and those of `RUNS`."""
    extra = dict(EXTRA)
    if verb in READERS:
        extra["plugins"] = Annotated[bool, typer.Option("--allow-plugins", help=PLUGINS)]
    if verb in _BASED:
        extra["moved_base"] = Annotated[Path | None, typer.Option("--base", help=BASE)]
    return extra


def _with_options(
    signature: inspect.Signature, runs: tuple[str, ...], extra: dict[str, Any]
) -> inspect.Signature:
    """The signature of a verb with the options that it shares with others."""
    own = [p for p in signature.parameters.values() if p.name not in ("quiet", "verbose")]
    added = [_option(name, RUNS[name], None) for name in runs]
    added += [_option(n, kind, None if n == "moved_base" else False) for n, kind in extra.items()]
    return signature.replace(parameters=[*own, *added], return_annotation=None)


def _option(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _overwrites(arguments: dict[str, Any]) -> bool | None:
    """Whether what is in the way may go; None where nothing is written over, or not now."""
    return None if arguments.get("dry_run") else arguments.get("overwrite")


def _computing(asked: dict[str, Any]) -> AbstractContextManager[None]:
    if all(value is None for value in asked.values()):
        return nullcontext()
    from moefy.run.computing import computing  # torch: seconds

    return computing(**asked)


@contextmanager
def _errors(*, debug: bool, resumes: bool) -> Iterator[None]:
    """An error of the user's is one line, and so are one of the operating system's and Ctrl-C."""
    try:
        yield
    except MoefyError as error:
        _fail(error, debug)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        remedy = _REMEDIES.get(error.errno, "--debug shows where")
        failed = MoefyError(f"{error.filename or 'a file'}: {error.strerror}; {remedy}")
        failed.__cause__ = error
        _fail(failed, debug)
    except KeyboardInterrupt:
        again = "run the same command again" + (" with --resume" if resumes else "")
        typer.echo(f"moefy: interrupted; nothing is lost, {again}", err=True)
        raise typer.Exit(130) from None


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moefy {moefy.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Turn the MLPs of a trained transformer into experts."""


def _plugins(allowed: bool) -> AbstractContextManager[None]:
    if not allowed:
        return nullcontext()
    from moefy.models.artefact import allow_plugins

    return allow_plugins()


def _based(base: Path | None, arguments: dict[str, Any]) -> AbstractContextManager[None]:
    """Raise `MoefyError` where no model that is named has its weights somewhere else."""
    if base is None:
        return nullcontext()
    from moefy.models.artefact import ADAPTER, base_at, is_artefact, read_artefact

    named = [
        arguments[name] for name in ("model", "base", "other", "against") if arguments.get(name)
    ]
    for folder in named:
        if is_artefact(folder) and read_artefact(folder, verify=False).form == ADAPTER:
            return base_at(base)
    raise MoefyError(f"--base {base}: no model here is an adapter on a base; leave --base out")


def _show(shown: Shown, as_json: bool) -> None:
    if as_json and shown.data is not None:
        plain = not (sys.stdout.encoding or "").lower().startswith("utf")
        typer.echo(json.dumps(shown.data, indent=1, ensure_ascii=plain))
        return
    width = None if sys.stdout.isatty() else 160
    # Paths and domains have brackets and colons of their own.
    console = Console(width=width, highlight=False, soft_wrap=True, markup=False, emoji=False)
    for item in shown.view:
        console.print(item)


def _fail(error: MoefyError, debug: bool) -> NoReturn:
    """One line and exit code 1, or the traceback."""
    if debug:
        raise error
    typer.echo(f"moefy: {error}", err=True)
    raise typer.Exit(1) from None


def _say_anything() -> None:
    """What a terminal has no letters for is shown as `?` on it; no result is lost at the last line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def _hush(verbose: bool) -> None:
    """Libraries say what they have to say only when asked."""
    import logging
    import os

    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        logging.getLogger("transformers").setLevel(logging.ERROR)


def write(record: dict[str, Any], out: Path | None, name: str) -> None:
    """Where `-o` says: FILE.json, or the file `name` in a folder."""
    file = file_of(out, name)
    if file is not None:
        refuse_stranger(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(record, indent=1) + "\n")


def settings_of(pairs: list[str], options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `--set` says, and settings that have options of their own, of these only those in use."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set {pair}: expected key=value, such as router.name=linear")
        settings[key] = value
    return settings | {key: value for key, value in (options or {}).items() if value is not None}


Model = Annotated[str, typer.Argument(help="Model folder or Hugging Face Hub id.")]
Moefied = Annotated[Path, typer.Argument(help="Folder that moefy convert wrote.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
Report = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder to write, or one FILE.json.")
]
Text = Annotated[
    str | None,
    typer.Option(help="Text: file, folder with a sub-folder per domain, .jsonl, or dataset name."),
]
Texts = Annotated[
    list[str] | None, typer.Option("--corpus", help="Text, as of convert; may be repeated.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Take up an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the way.")]
Documents = Annotated[int, typer.Option(min=1, help="Most documents to evaluate on.")]
TrainTokens = Annotated[int | None, typer.Option(help="Tokens to train on (what 90 minutes take).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Setting a.b=c; may be repeated.")
]
Control = Annotated[
    bool, typer.Option("--control", help="Train the dense model on the same tokens too.")
]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn.")]
RecipeSeed = Annotated[int | None, typer.Option(help="Seed of all that is drawn (the recipe's).")]

DTYPE = "float32, bfloat16 or float16 (what the machine runs best)."
RUNS = {
    "device": Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (the GPUs there are).")],
    "dtype": Annotated[str | None, typer.Option(help=DTYPE)],
    "batch_size": Annotated[
        int | None, typer.Option(help="Most documents that run together (what fits).")
    ],
}
"""On what a verb computes: `moefy.run.computing`."""
TrainDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, or bfloat16 for mixed precision (what is fast)."),
]

OLD = {
    "eval": {"--output": "--out"},
    "compare": {"--output": "--out"},
    "bench": {
        "--output": "--out", "--calibrate": "moefy calibrate", "--prompt": "--prompt-tokens",
        "--generated": "--new-tokens",
    },
    "recover": {"--tokens": "--train-tokens", "--precision": "--dtype"},
    "sparsify": {"--tokens": "--train-tokens", "--precision": "--dtype"},
    "generate": {"--tokens": "--new-tokens"},
    "diff": {"--text": "--corpus"},
}  # fmt: skip
"""What options of a verb were called before, and are called now."""


def check_paths(arguments: dict[str, Any], *, overwrite: bool | None) -> None:
    """Raise for a folder that is not there or in the way before seconds of imports.

    `overwrite` is None for a verb that does not ask. What may be a Hub id is looked for later.
    """
    out = arguments.get("out")
    for name in ("model", "base", "other", "against", "adapter", "moved_base"):
        model = arguments.get(name)
        if not isinstance(model, str | Path):  # none, or convert's flag of that name
            continue
        if Path(model).exists():
            if out is not None:
                refuse_inside(out, Path(model))
            continue
        if isinstance(model, Path):
            raise CheckpointError(f"{model}: no such folder; give one that moefy convert wrote")
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise CheckpointError(f"{model}: no such folder, and not a Hugging Face Hub id")
    if overwrite is False and out is not None and out.exists():
        raise OutputError(f"{out}: exists already; choose another name or pass --overwrite")


RESULTS = {
    "eval": ("evaluation.json",),
    "compare": ("comparison.json",),
    "bench": ("speed.json",),
    "calibrate": ("calibration.json",),
    "inspect": ("inspection.json", "report.html"),
    "diff": ("inspection.json", "report.html"),
}
"""What verbs with `-o` write into a folder."""


def check_results(out: Path | None, names: Sequence[str]) -> None:
    """Raise `OutputError` for what lies where `-o` puts results and is no result, before hours of work."""
    if out is None or not names:
        return
    if out.is_file() and not is_file(out):
        raise OutputError(f"{out}: is a file; give a folder, or a name that ends in .json")
    for file in {file_of(out, name) for name in names}:
        assert file is not None
        refuse_stranger(file)


def file_of(out: Path | None, name: str) -> Path | None:
    """The file that `-o` asks for: itself where it ends in .json, else this name in the folder."""
    return out if out is None or is_file(out) else out / name


def is_file(out: Path) -> bool:
    """Whether `-o` names one file and not a folder."""
    return out.suffix == ".json"


def training_settings(dtype: str | None, **options: Any) -> dict[str, Any]:
    """Settings of a training recipe; it calls the dtypes fp32 and bf16."""
    names = {"float32": "fp32", "bfloat16": "bf16"}
    return {"precision": None if dtype is None else names.get(dtype, dtype), **options}
