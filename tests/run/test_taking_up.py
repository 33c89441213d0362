"""A run that was killed is taken up only where nothing that decides it has changed, tokenizers included."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_conversion import convert_tiny, corpus_for
from tiny_models import build

import moefy
from moefy.conversion import convert as conversion
from moefy.conversion.layer import Captured
from moefy.errors import CheckpointError, OutputError
from moefy.inspection.inspect import _decided_by
from moefy.inspection.record import FILE, Inspection
from moefy.inspection.removal import prune as removal
from moefy.inspection.texts import read
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import meta_model, sites
from moefy.training import recover as recovery
from moefy.training import sparsify as sparsifying
from moefy.training.curves import Log, draw_curves
from moefy.training.recipe import RecoverRecipe, SparsifyRecipe

SMALL: dict[str, Any] = {"tokens": 400, "batch_tokens": 200, "context": 32}
IDS = corpus_for("llama") * 4
DOMAINS = [
    {"input_ids": [i % 80 + 3, *ids], "domain": "ab"[i % 2]} for i, ids in enumerate(IDS * 2)
]
VERBS: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "convert": (lambda m, o, **k: convert_tiny("llama", m, o, **k), conversion, "_in_memory"),
    "recover": (
        lambda m, o, **k: moefy.recover(
            m, o, recipe=RecoverRecipe(**SMALL), corpus=IDS, quiet=True, **k
        ),
        recovery._Recovery,
        "run",
    ),
    "sparsify": (
        lambda m, o, **k: moefy.sparsify(
            m, o, recipe=SparsifyRecipe(**SMALL), corpus=IDS, quiet=True, **k
        ),
        sparsifying._Sparsifying,
        "run",
    ),
    "prune": (
        lambda m, o, **k: moefy.prune(
            m, o, forget="a", corpus=DOMAINS, tokens=500, quiet=True, **k
        ),
        removal._Removal,
        "count",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` and `out` made from it, with a tokenizer that documents of ids do not need."""
    root = tmp_path_factory.mktemp("verbs")
    source = build("llama", root / "source")
    (source / "tokenizer.json").write_text("{}")
    convert_tiny("llama", source, root / "out")
    return root


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("verb", VERBS)
def test_another_tokenizer_is_another_run(
    verb: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, home, step = VERBS[verb]
    model = tmp_path / "model"
    shutil.copytree(folders / ("out" if verb in ("recover", "prune") else "source"), model)

    def killed(*_: Any) -> Any:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(home, step, killed)
        for _ in range(2):  # the second takes up what the first has left
            with pytest.raises(_Killed):
                run(model, tmp_path / "to", resume=True)
    (model / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(OutputError, match="started with another model, recipe or corpus"):
        run(model, tmp_path / "to", resume=True)


def test_parts_of_an_inspection_are_of_one_tokenizer(folders: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders / "out", model)
    (model / "tokenizer.json").unlink()  # inspect reads it, and needs a sound one

    def decided() -> dict[str, Any]:
        loaded = moefy.load(model)
        return _decided_by(loaded, read(loaded, IDS, tokens=500), 0)

    before = decided()
    assert decided() == before
    (model / "special_tokens_map.json").write_text('{"other": 1}')
    assert decided() != before


@pytest.mark.parametrize("damage", ["{", "[]", '{"tokens": []}'])
def test_a_damaged_capture_is_one_line(damage: str, folders: Path, tmp_path: Path) -> None:
    site = sites(meta_model(read_config(Checkpoint.open(folders / "source"))))[0]
    (tmp_path / "router.json").write_text(damage)
    with pytest.raises(OutputError, match=r"router\.json: .*pass --overwrite to start anew"):
        Captured(tmp_path, "router").inputs(site)
    with pytest.raises(OutputError, match=r"router\.json: .*pass --overwrite to start anew"):
        Captured(tmp_path, "router").domains(site)


def test_a_capture_that_is_cut_short_is_one_line(folders: Path, tmp_path: Path) -> None:
    site = sites(meta_model(read_config(Checkpoint.open(folders / "source"))))[0]
    (tmp_path / "router.json").write_text('{"tokens": [9], "dtype": "float32", "domains": {}}')
    (tmp_path / "router-0.bin").write_bytes(b"\0" * 8)
    with pytest.raises(OutputError, match=r"router-0\.bin: .*pass --overwrite to start anew"):
        Captured(tmp_path, "router").inputs(site)


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": null}', '{"st', "[" * 5000])
def test_a_line_of_a_log_that_says_no_step_is_dropped(line: str, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n' + line + "\n")
    Log(file, 5, writes=True)
    assert file.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["[]", "{", '{"step": 1}'])
def test_curves_of_a_damaged_log_are_one_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"log\.jsonl: cannot be read"):
        draw_curves(file, tmp_path / "curves.png")


@pytest.mark.parametrize("damage", ["{", "[]", '"text"'])
def test_damaged_records_of_a_conversion_are_one_line(
    damage: str, folders: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders / "out", model)
    (model / "records.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"records\.json: cannot be read"):
        VERBS["recover"][0](model, tmp_path / "to")


def test_an_inspection_without_its_parts_is_one_line(tmp_path: Path) -> None:
    for values in ({"kind": "inspection"}, {"kind": "inspection", "format": 1}):
        (tmp_path / FILE).write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="inspect again"):
            Inspection.load(tmp_path)
