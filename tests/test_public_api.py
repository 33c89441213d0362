"""What users rely on, as files in tests/golden: names, signatures, the command line, keys of what is written.

A change of one of them is a change for users. Where it is meant, write the files again, read their diff and
name it in CHANGELOG.md:

    python tests/test_public_api.py
"""

import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
import typer
from tiny_conversion import convert_tiny, corpus_for
from tiny_models import build, example_inputs
from typer.testing import CliRunner

import moefy
from moefy.cli.verbs import app

GOLDEN = Path(__file__).parent / "golden"
METHODS = ("experts", "hooks", "run_with_cache", "run_with_hooks", "save_pretrained")
NAMED = r"model\.(decoder\.)?layers\.\d+|d\d|[\w-]+\.safetensors|[0-9a-f]{40,}|layers\.\d+"
"""Keys that are names of layers, domains and files: one star stands for all."""
LEAVES = ("machine", "versions", "recipe", "seconds")
"""Keys whose values hang on the machine, or are told elsewhere."""


def signature(called: Any) -> str:
    """Parameters and defaults, without annotations: those name modules, which are nobody's business."""
    try:
        found = inspect.signature(called)
    except ValueError:
        return "(...)"
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<factory>|<object object at \w+>", "...", text)


def api(model: Any) -> str:
    """Public names of moefy and their members, what a loaded model has beside its class, hook names."""
    lines = []
    for name in sorted(moefy.__all__):
        value = getattr(moefy, name)
        if not callable(value):
            lines.append(f"moefy.{name}")
            continue
        lines.append(f"moefy.{name}{signature(value)}")
        if isinstance(value, type):
            members = {n: m for n, m in vars(value).items() if not n.startswith("_")}
            lines += [
                f"moefy.{name}.{n}"
                + (signature(getattr(value, n)) if callable(getattr(value, n)) else "")
                for n in sorted(members)
            ]
    lines += [f"model.{name}{signature(getattr(model, name))}" for name in METHODS]
    with torch.no_grad():
        _, cache = model.run_with_cache(**example_inputs("llama"))
    return "\n".join([*lines, *(f"hook {name}" for name in sorted(cache))]) + "\n"


def command_line() -> str:
    """Every verb with its arguments and options as they are declared: no width, no colour of the help."""
    lines = []
    for command in sorted(app.registered_commands, key=lambda command: str(command.name)):
        text = inspect.cleandoc(str(command.callback.__doc__))
        lines += [f"moefy {command.name}", *(f"    {line}" for line in text.splitlines())]
        for name, parameter in inspect.signature(command.callback).parameters.items():
            kind, declared = parameter.annotation.__origin__, parameter.annotation.__metadata__[0]
            own = isinstance(declared, typer.models.OptionInfo)
            # The first name stands where a default would, were the option not in `Annotated`.
            called = [
                n for n in (declared.default, *(declared.param_decls or ())) if isinstance(n, str)
            ]
            called = called or [f"--{name.replace('_', '-')}" if own else name.upper()]
            # Python 3.13 has moved Path.
            kind = (
                str(kind).replace("pathlib._local", "pathlib") if get_args(kind) else kind.__name__
            )
            empty = parameter.default is inspect.Parameter.empty
            default = "required" if empty else f"default {parameter.default}"
            lines.append(f"  {' '.join(called)} ({kind}, {default}): {declared.help}")
        lines.append("")
    return "\n".join(lines)


def keys(value: Any, path: str) -> set[str]:
    """Every path of keys in JSON; lists are one step, named layers, domains and files one key."""
    if isinstance(value, dict) and value and path.rpartition(".")[2] not in LEAVES:
        steps = {f"{path}.{'*' if re.fullmatch(NAMED, k) else k}": v for k, v in value.items()}
        return {line for step, inner in steps.items() for line in keys(inner, step)}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {line for item in value for line in keys(item, f"{path}[]")}
    return {path}


def say(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def converted(folder: Path) -> Path:
    """A tiny Llama in experts, and its texts in `ids.jsonl`."""
    rows = [
        {"input_ids": ids, "source_id": str(i), "domain": f"d{i % 2}"}
        for i, ids in enumerate(corpus_for("llama"))
    ]
    (folder / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    convert_tiny("llama", build("llama", folder / "source"), folder / "out")
    return folder / "out"


def written(model: Path) -> str:
    """Keys of the files of a moefied checkpoint, of an inspection, of records of eval and bench."""
    corpus = model.parent / "ids.jsonl"
    found = {
        name: json.loads((model / name).read_text()) for name in ("moefy.json", "records.json")
    }
    inspected = moefy.inspect(
        model, corpora=str(corpus), tokens=300, skip=["controls", "causal"], quiet=True
    )
    found["inspection.json"] = inspected.to_dict() | {"texts": None}
    found["eval"] = say("eval", model, "--corpus", corpus, "-q", "--json")
    with patch("moefy.benchmark.costs.BYTES", 1 << 20):
        found["bench"] = say(
            "bench", "--layer", "32,64,8,2", "--batches", 1, "--engine", "eager", "--engine", "masked",
            "--samples", 5, "-q", "--json",
        )  # fmt: skip
    return (
        "\n".join(sorted({line for name, value in found.items() for line in keys(value, name)}))
        + "\n"
    )


def golden() -> dict[str, str]:
    """The content of every file as it is now."""
    with tempfile.TemporaryDirectory() as folder:
        model = converted(Path(folder))
        return {
            "api.txt": api(moefy.load(model)),
            "cli.txt": command_line(),
            "keys.txt": written(model),
        }


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return golden()


@pytest.mark.parametrize("name", ["api.txt", "cli.txt", "keys.txt"])
def test_what_users_rely_on_has_not_changed(now, name):
    assert now[name].splitlines() == (GOLDEN / name).read_text(encoding="utf-8").splitlines()


def test_every_verb_answers_with_help():
    for command in app.registered_commands:
        assert CliRunner().invoke(app, [str(command.name), "--help"]).exit_code == 0


def test_a_key_a_parameter_and_an_option_that_go_are_seen():
    assert keys({"a": {"b": 1}, "c": [{"d": 2}]}, "f") == {"f.a.b", "f.c[].d"}
    assert keys({"d0": {"ce": 1.0}, "d1": {"ce": 2.0}}, "f") == {"f.*.ce"}
    assert signature(lambda a, *, b=2: None) == "(a, *, b=2)"
    assert "  --density (float | None, default None): FFN density, 0 to 1" in command_line()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file, text in golden().items():
        (GOLDEN / file).write_text(text, encoding="utf-8")
