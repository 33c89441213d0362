"""Arguments and options that several verbs have: one name, one meaning, one help text; and their old names."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.errors import CheckpointError, OutputError
from moefy.run.output import refuse_inside

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
TrainTokens = Annotated[int | None, typer.Option(help="Tokens to train on (1000000).")]
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
    str | None, typer.Option("--dtype", help="float32, or bfloat16 for mixed precision (float32).")
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
    for name in ("model", "base", "other", "against"):
        given = arguments.get(name)
        if given is None:
            continue
        if Path(given).exists():
            if out is not None:
                refuse_inside(out, Path(given))
            continue
        if isinstance(given, Path):
            raise CheckpointError(f"{given}: no such folder; give one that moefy convert wrote")
        if given.startswith(("/", ".", "~")) or given.count("/") > 1:
            raise CheckpointError(f"{given}: no such folder, and not a Hugging Face Hub id")
    if overwrite is False and out is not None and out.exists():
        raise OutputError(f"{out}: exists already; choose another name or pass --overwrite")


def file_of(out: Path | None, name: str) -> Path | None:
    """The file that `-o` asks for: itself where it ends in .json, else this name in the folder."""
    return out if out is None or is_file(out) else out / name


def is_file(out: Path) -> bool:
    """Whether `-o` names one file and not a folder."""
    return out.suffix == ".json"


def training_settings(dtype: str | None, **given: Any) -> dict[str, Any]:
    """Settings of a training recipe; it calls the dtypes fp32 and bf16."""
    names = {"float32": "fp32", "bfloat16": "bf16"}
    return {"precision": None if dtype is None else names.get(dtype, dtype), **given}
