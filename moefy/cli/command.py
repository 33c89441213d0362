"""What every verb of the command line shares: its registration, what it shows, and common parameters.

Results go to stdout, as tables or with `--json` as one document; progress and errors to stderr. An
error of the user's is one line and exit code 1, a usage error exit code 2.
"""

import functools
import inspect
import io
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from moefy.errors import MoefyError, RecipeError

app = typer.Typer(
    help="Turn the MLPs of a trained transformer into experts.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)

Model = Annotated[str, typer.Argument(help="Model folder or Hugging Face Hub id.")]
Moefied = Annotated[Path, typer.Argument(help="Folder that moefy convert wrote.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
Text = Annotated[
    str | None,
    typer.Option(help="Text: file, folder with a sub-folder per domain, .jsonl, or dataset name."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Take up an interrupted run.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens to train on (1000000).")]
Precision = Annotated[str | None, typer.Option(help="fp32 or bf16, mixed (fp32).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Setting a=b of the training; may be repeated.")
]
READERS = {
    "bench", "diff", "eval", "export", "generate", "inspect", "prune", "recover", "revert",
}  # fmt: skip
"""Verbs that read folders which moefy convert wrote."""
PLUGINS = "Import code that the folder names; only for folders that you trust."
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the way.")]


@dataclass
class Shown:
    """What a verb gives back: JSON values, and what a person sees instead."""

    data: Any
    view: list[Any] = field(default_factory=list)
    error: MoefyError | None = None
    """What ended the verb early, after what is shown; its cause is what `--debug` shows."""


def verb(run: Callable[..., Shown]) -> None:
    """Register a verb; adds `--json`, `--quiet`, `--verbose` and `--debug`, and reports errors."""
    extra = {
        "as_json": Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")],
        "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")],
        "verbose": Annotated[
            bool, typer.Option("--verbose", "-v", help="More detail, and messages of libraries.")
        ],
        "debug": Annotated[bool, typer.Option("--debug", help="Traceback of errors.")],
    }
    if run.__name__.rstrip("_") in READERS:
        extra["plugins"] = Annotated[bool, typer.Option("--allow-plugins", help=PLUGINS)]
    signature = inspect.signature(run, eval_str=True)
    takes = signature.parameters.keys()

    @functools.wraps(run)
    def command(
        as_json: bool,
        quiet: bool,
        verbose: bool,
        debug: bool,
        plugins: bool = False,
        **arguments: Any,
    ) -> None:
        common = {"quiet": quiet, "verbose": verbose}
        arguments |= {name: value for name, value in common.items() if name in takes}
        _hush(verbose)
        _say_anything()
        try:
            with _plugins() if plugins else nullcontext():
                shown = run(**arguments)
        except MoefyError as error:
            _fail(error, debug)
        except KeyboardInterrupt:
            again = "run the same command again" + (" with --resume" if "resume" in takes else "")
            typer.echo(f"moefy: interrupted; nothing is lost, {again}", err=True)
            raise typer.Exit(130) from None
        _show(shown, as_json)
        if shown.error is not None:
            _fail(shown.error, debug)

    own = [p for p in signature.parameters.values() if p.name not in ("quiet", "verbose")]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in extra.items()
    ]
    command.__signature__ = signature.replace(parameters=[*own, *added], return_annotation=None)  # type: ignore[attr-defined]
    app.command(run.__name__.rstrip("_"))(command)


def _plugins() -> AbstractContextManager[None]:
    from moefy.models.artefact import allow_plugins

    return allow_plugins()


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


def settings_given(pairs: list[str], given: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `--set` says, and the options of their own that were given."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set {pair}: expected key=value, such as router.name=linear")
        found[key] = value
    return found | {key: value for key, value in (given or {}).items() if value is not None}
