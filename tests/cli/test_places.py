"""Every verb that writes, told to write where it reads: refused, and not a byte has changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_conversion import convert_tiny
from tiny_models import build
from typer.testing import CliRunner

import moefy
from moefy.cli import command
from moefy.cli.quickstart import demo_models, quickstart
from moefy.cli.verbs import app
from moefy.conversion.convert import convert
from moefy.errors import OutputError
from moefy.experts.loading import load_dense
from moefy.exporting.export import export
from moefy.inspection.diff import diff
from moefy.inspection.inspect import REPORT, Inspected, inspect
from moefy.inspection.record import FILE
from moefy.inspection.removal.prune import prune
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.models.reorder import revert
from moefy.run.folder import OutputFolder, refuse_stranger
from moefy.training.recover import recover
from moefy.training.sparsify import sparsify

Verb = Callable[[Path, Path], Any]
OF_DENSE: dict[str, Verb] = {
    "convert": lambda model, out: convert(model, out, overwrite=True, quiet=True),
    "convert --adapter": lambda model, out: convert(model, out, adapter=True, overwrite=True),
    "convert --stream": lambda model, out: convert(model, out, stream=True, overwrite=True),
    "convert in memory": lambda model, out: convert(
        load_dense(Checkpoint.open(model)), out, overwrite=True, quiet=True
    ),
    "sparsify": lambda model, out: sparsify(model, out, overwrite=True),
    "prune neurons": lambda model, out: prune(
        model, out, forget="a", unit="neuron", overwrite=True
    ),
    "export --to gguf": lambda model, out: export(model, out, to="gguf", overwrite=True),
}
OF_MOEFIED: dict[str, Verb] = {
    "recover": lambda model, out: recover(model, out, overwrite=True),
    "prune": lambda model, out: prune(model, out, forget="a", overwrite=True),
    "export --to dense": lambda model, out: export(model, out, to="dense", overwrite=True),
    "export --to mixtral": lambda model, out: export(model, out, to="mixtral", overwrite=True),
    "revert": lambda model, out: revert(model, out, overwrite=True),
}
REPORTS: dict[str, Verb] = {
    "inspect": lambda model, out: inspect(model, out=out, quiet=True),
    "diff": lambda model, out: diff(model, "elsewhere", out=out, quiet=True),
    "diff with": lambda model, out: diff("elsewhere", model, out=out, quiet=True),
}
OF_ADAPTER = {name: OF_MOEFIED[name] for name in ("prune", "export --to dense")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, `out` made from it, `adapter` on it, and links to them."""
    root = tmp_path_factory.mktemp("places")
    build("llama", root / "source")
    convert_tiny("llama", root / "source", root / "out")
    convert_tiny("llama", root / "source", root / "adapter", adapter=True)
    for name in ("source", "out", "adapter"):
        (root / f"link to {name}").symlink_to(root / name)
    return root


def held(root: Path) -> dict[str, str]:
    return {str(p): sha256(p) for p in sorted(root.rglob("*")) if p.is_file()}


def refused(verb: Verb, model: Path, out: Path, root: Path) -> None:
    before = held(root)
    with pytest.raises(OutputError, match=r"which is read; choose a place|no run of moefy wrote"):
        verb(model, out)
    assert held(root) == before


PLACES = ["{}", "{}/new", "link to {}", "link to {}/new", "."]
"""Of which a GGUF, which is a file, may be the two that are not there yet."""


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (name, place)
        for name in (*OF_DENSE, *OF_MOEFIED)
        for place in PLACES
        if place.endswith("new") or not name.endswith("gguf")
    ],
)
def test_a_verb_does_not_write_where_it_reads(name: str, place: str, folders: Path) -> None:
    model = "source" if name in OF_DENSE else "out"
    verb = (OF_DENSE | OF_MOEFIED)[name]
    refused(verb, folders / model, folders / place.format(model), folders)
    refused(verb, folders / f"link to {model}", folders / place.format(model), folders)


@pytest.mark.parametrize("name", OF_ADAPTER)
@pytest.mark.parametrize("place", ["source", "link to source/new", "adapter", "."])
def test_the_base_of_an_adapter_is_read_too(name: str, place: str, folders: Path) -> None:
    refused(OF_ADAPTER[name], folders / "adapter", folders / place, folders)


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("place", ["out", "link to out/report"])
def test_a_report_is_not_written_into_a_model(name: str, place: str, folders: Path) -> None:
    refused(REPORTS[name], folders / "out", folders / place, folders)


@pytest.mark.parametrize("verb", ["eval", "inspect", "bench", "compare", "diff"])
def test_a_record_does_not_replace_a_file_of_a_model(verb: str, folders: Path) -> None:
    before, out = held(folders), folders / "out"
    words = [verb, out, *([out] if verb == "diff" else []), "-o", out / "config.json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1 and "which is read; choose a place" in result.output
    assert held(folders) == before


RESULTS = {
    "eval": "evaluation.json", "inspect": "report.html", "diff": "inspection.json",
    "bench": "speed.json", "compare": "comparison.json",
}  # fmt: skip


@pytest.mark.parametrize("verb", RESULTS)
@pytest.mark.parametrize("one", [True, False], ids=["file", "folder"])
def test_a_result_does_not_replace_a_file_of_somebody_else(
    verb: str, one: bool, folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "notes.json" if one else tmp_path
    file = out if one else tmp_path / RESULTS[verb]
    file.write_text('{"mine": 1}')
    model = folders / "out"
    words = [verb, model, *([model] if verb == "diff" else []), "-o", out]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1 and f"{file}: no record or report" in result.output
    assert file.read_text() == '{"mine": 1}'
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("content", ["", '{"kind": "evaluation"}', '{\n "kind": "speed"\n}\n'])
def test_a_result_replaces_one_of_its_own(content: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(content)
    command.write({"kind": "evaluation"}, file, "")
    assert json.loads(file.read_text()) == {"kind": "evaluation"}
    command.write({"kind": "evaluation"}, file, "")


def test_a_report_replaces_a_report(tmp_path: Path) -> None:
    found = Inspected({"layers": []}, {}, {})
    for _ in range(2):
        found.save(tmp_path)
        for name in (FILE, REPORT):
            refuse_stranger(tmp_path / name)


@pytest.mark.parametrize("verb", ["inspect", "diff"])
def test_two_runs_do_not_write_one_report(verb: str, folders: Path, tmp_path: Path) -> None:
    model, out = folders / "out", tmp_path / "report"
    words = [verb, model, *([model] if verb == "diff" else []), "-o", out]
    with OutputFolder(out).held():
        result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1 and "another run is writing it (process" in result.output
    assert [*tmp_path.iterdir()] == []  # neither has left anything behind
    with OutputFolder(out).held():  # and the next one may
        pass


def test_quickstart_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    name, model = next(iter(demo_models().items()))
    moefied = tmp_path / name
    shutil.copytree(model, moefied)
    before = held(tmp_path)
    assert "is not a moefied model" in str(
        quickstart(tmp_path, calibrated=False, quiet=True)["notes"]
    )
    assert {k: v for k, v in held(tmp_path).items() if k in before} == before


def test_a_model_in_memory_that_came_from_nowhere_is_converted(
    folders: Path, tmp_path: Path
) -> None:
    model = load_dense(Checkpoint.open(folders / "source"))
    model.name_or_path = ""
    convert_tiny("llama", model, tmp_path / "out")
    assert moefy.load(tmp_path / "out")
