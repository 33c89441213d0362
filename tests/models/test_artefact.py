"""What a folder says is data: nothing that it names is run, and every field is what it may be."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversion import convert_tiny
from tiny_models import build
from torch import Tensor

import moefy
from moefy.errors import CheckpointError, MoefyError
from moefy.models.artefact import META, SIDE, allow_plugins, open_artefact, read_artefact
from moefy.models.checkpoint import sha256
from moefy.models.reorder import revert

ROOT = Path(__file__).parents[2]
HEADS = {"attention.density": 0.5, "attention.router": "linear"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    convert_tiny("llama", build("llama", folder / "source"), folder / "made", settings=HEADS)
    return folder / "made"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def put(folder: Path, path: str, value: Any) -> None:
    """Change one value of `moefy.json`; `DROP` takes it out."""
    meta = json.loads((folder / META).read_text())
    *parents, last = path.split("/")
    node = meta
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    key = int(last) if isinstance(node, list) else last
    if value is DROP:
        del node[key]
    else:
        node[key] = value
    (folder / META).write_text(json.dumps(meta))


DROP = object()


def put_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the side file, and its hash with it."""
    tensors = load_file(folder / SIDE)
    change(tensors)
    save_file(tensors, folder / SIDE)
    put(folder, f"sha256/{SIDE}", sha256(folder / SIDE))


NAMES = [
    "layers/0/router/name", "layers/1/selection/name", "layers/0/compensation/name",
    "heads/0/router/name", "heads/0/selection/name", "heads/1/compensation/name",
    "recipe/partition/method", "recipe/partition/shared_by", "recipe/router/name",
    "recipe/router/target", "recipe/router/loss", "recipe/selection/name",
    "recipe/compensation/name", "recipe/attention/router", "recipe/attention/selection",
    "recipe/attention/compensation", "recipe/attention/loss",
]  # fmt: skip


@pytest.mark.parametrize("path", NAMES)
def test_nothing_that_a_folder_names_is_imported(
    folder: Path, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it ran"
    (tmp_path / "planted_code.py").write_text(f"open({str(mark)!r}, 'w')\nThing = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    put(folder, path, "planted_code:Thing")
    for opens in (moefy.load, read_artefact, lambda f: revert(f, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"--allow-plugins"):
            opens(folder)
    with pytest.raises(CheckpointError, match=r"--allow-plugins"):
        moefy.load(folder, verify=False)
    assert not mark.exists()


def test_a_command_as_a_selection_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    attack = {"name": "subprocess:Popen", "args": f"touch '{mark}'", "shell": True}
    put(folder, "layers/0/selection", attack)
    for options in ({}, {"verify": False}, {"plugins": True}):
        with pytest.raises(CheckpointError, match=r"layers\[0\]"):
            moefy.load(folder, **options)
    assert not mark.exists()


def test_plugins_load_where_they_are_asked_for(folder: Path) -> None:
    put(folder, "layers/0/router/name", "moefy.methods.routers.learned:LinearRouter")
    moefy.load(folder, plugins=True)
    with allow_plugins():
        open_artefact(folder)
    with pytest.raises(CheckpointError, match="plugins=True"):
        moefy.load(folder)


WRONG = [
    ("format", 3.0, "format"), ("format", True, "format"), ("form", "bogus", "form"),
    ("form", ["full"], "form"), ("surprise", 1, "'surprise' is unknown"),
    ("recipe/surprise", 1, "surprise"), ("recipe/router/surprise", 1, "surprise"),
    ("recipe/density", 7.0, "density"), ("recipe/density", "x", "density"),
    ("source/surprise", 1, "'surprise' is unknown"), ("source/name", 3, "name"),
    ("source/revision", "main", "revision"), ("corpus", [], "corpus"), ("layers", {}, "layers"),
    ("layers/0/surprise", 1, "'surprise' is unknown"), ("layers/0/layer", DROP, "is missing"),
    ("layers/0/layer", "model.layers.1", "is there twice"),
    ("layers/0/layer", "model.layers.7", "the model has 'model.layers.0'"),
    ("layers/0/experts", 10**12, "experts"), ("layers/0/experts", 7, "do not divide"),
    ("layers/0/experts", True, "experts"), ("layers/0/experts", 8.0, "experts"),
    ("layers/0/neurons", 2**40, "neurons"), ("layers/0/neurons", 2**20, "permutation"),
    ("layers/0/width", 64, "width: got 64, the model has 32"), ("layers/0/shared", 8, "none is left"),
    ("layers/0/shared", -1, "shared"), ("layers/0/router", "linear", "router"),
    ("layers/0/router/name", "linaer", "did you mean 'linear'"),
    ("layers/0/router/name", None, "name"), ("layers/0/router/hidden", 2**40, "hidden"),
    ("layers/0/router/hidden", "128", "hidden"), ("layers/0/router/surprise", 1, "surprise"),
    ("layers/0/router/look_ahead", 1, "look_ahead"), ("layers/0/router/inputs", 10**6, "inputs"),
    ("layers/0/selection/k", 99, "selection: k"), ("layers/0/selection/k", -1, "selection: k"),
    ("layers/0/selection/k", 0, "a whole number from 1 to 8"), ("heads/0/selection/k", 0, "from 1"),
    ("layers/0/selection", {"name": "softmax_topk", "k": 0, "eps": 1.0}, "from 1"),
    ("layers/0/selection", {"name": "prompt_static", "k": 0}, "from 1"),
    ("layers/0/selection", {"name": "threshold", "threshold": 1, "most": 0}, "most"),
    ("layers/0/selection", {"name": "dynamic_k", "tau": 0.5, "most": 0}, "most"),
    ("layers/0/selection", {"name": "dynamic_k", "tau": -0.1}, "tau"),
    ("layers/0/selection", {"name": "top_p", "p": 0.0, "scale": 1.0}, "selection: p"),
    ("layers/0/router", {"name": "low_bit", "hidden": 0, "bits": 3, "inputs": 0, "look_ahead": False},
     "must be one of 1, 2, 4"),
    ("layers/0/selection/k", 2.5, "selection: k"), ("layers/0/selection/k", True, "k"),
    ("layers/0/selection/k", DROP, "'k' is missing"), ("layers/0/selection/k", [2], "k"),
    ("layers/0/selection/shell", 1, "'shell' is unknown"),
    ("layers/0/selection", {"name": "softmax_topk", "k": 2, "eps": 0.0}, "eps"),
    ("layers/0/selection", {"name": "softmax_topk", "k": 2, "eps": -1.0}, "eps"),
    ("layers/0/selection", {"name": "threshold", "threshold": None}, "threshold"),
    ("layers/0/selection", {"name": "threshold", "threshold": 1, "most": -1}, "most"),
    ("layers/0/selection", {"name": "dynamic_k", "tau": 2.0}, "tau"),
    ("layers/0/selection", {"name": "top_p", "p": 1.5, "scale": 1.0}, "selection: p"),
    ("layers/0/selection", {"name": "top_p", "p": 0.5, "scale": 0.0}, "scale"),
    ("layers/0/compensation/rank", -1, "rank"), ("layers/0/compensation/rank", 2**50, "rank"),
    ("layers/0/compensation/surprise", 1, "surprise"),
    ("heads/0/heads", 3, "do not divide"), ("heads/0/head_dim", 5, "heads"),
    ("heads/0/experts", 10**12, "experts"), ("heads/0/router/bits", 2, "'bits' is unknown"),
    ("heads/0", DROP, "heads"), ("layers/1", DROP, "layers"),
    ("sha256", {}, "sha256 has no"), (f"sha256/{SIDE}", DROP, "sha256 has no 'moefy"),
    ("sha256/model.safetensors", DROP, "sha256 has no 'model.safetensors'"),
    ("sha256/model.safetensors", "x", "64 hexadecimal"),
    ("sha256/..\\x", "0" * 64, "within the folder"), ("sha256/..", "0" * 64, "within the folder"),
    ("weights_modified", 1, "weights_modified"), ("versions", {"moefy": 1}, "versions"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "word"), WRONG)
def test_every_field_is_what_it_may_be(folder: Path, path: str, value: Any, word: str) -> None:
    put(folder, path, value)
    with pytest.raises(CheckpointError) as caught:
        moefy.load(folder)
    assert word in str(caught.value)
    assert META in str(caught.value) or SIDE in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("setting", ["threshold", "eps"])
def test_numbers_are_finite(folder: Path, number: str, setting: str) -> None:
    name = {"threshold": "threshold", "eps": "softmax_topk"}[setting]
    put(folder, "layers/0/selection", {"name": name, "k": 2, setting: "here"})
    text = (folder / META).read_text()
    (folder / META).write_text(text.replace('"here"', number))
    with pytest.raises(CheckpointError, match="no finite number"):
        moefy.load(folder)


def test_json_that_cannot_be_read_is_named(folder: Path) -> None:
    good = (folder / META).read_bytes()
    for bad in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[]", b"null", b'{"format": 3}',
                b'{"format": 3, "format": 3}', b"9" * 5000):  # fmt: skip
        (folder / META).write_bytes(bad)
        with pytest.raises(CheckpointError, match=META):
            moefy.load(folder)
    (folder / META).write_bytes(good)
    moefy.load(folder)


def test_layers_stand_in_their_order(folder: Path) -> None:
    meta = json.loads((folder / META).read_text())
    put(folder, "layers", meta["layers"][::-1])
    with pytest.raises(CheckpointError, match=r"the model has 'model\.layers\.0' there"):
        moefy.load(folder)


def _set(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.pop(name) if value is None else t.update({name: value})


ROUTER, ORDER = "layers.0.router.weight", "layers.0.permutation"
TENSORS: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (_set(ROUTER, None), "layers.0.router.weight is missing"),
    (_set(ROUTER, torch.zeros(3, 3)), "got float32 [3, 3]"),
    (_set(ROUTER, torch.zeros(8, 32, dtype=torch.int64)), "got int64"),
    (lambda t: t[ROUTER].view(-1)[3:4].fill_(torch.nan), "NaN or infinity"),
    (lambda t: t[ROUTER].view(-1)[3:4].fill_(torch.inf), "NaN or infinity"),
    (_set("layers.0.router.surprise", torch.zeros(2)), "surprise is unknown"),
    (_set("layers.9.router.weight", torch.zeros(2)), "belongs to no layer"),
    (_set("layers.00.permutation", torch.zeros(2)), "belongs to no layer"),
    (_set("surprise", torch.zeros(2)), "belongs to no layer"),
    (_set("heads.0.permutation", torch.arange(4)), "no permutation"),
    (_set(ORDER, None), "permutation is missing"),
    (lambda t: t.update({ORDER: t[ORDER].long()}), "not a permutation"),
    (lambda t: t.update({ORDER: t[ORDER] * 0}), "not a permutation"),
    (lambda t: t.update({ORDER: t[ORDER][:-1].clone()}), "not a permutation"),
    (lambda t: t.update({ORDER: t[ORDER] - 1}), "not a permutation"),
    (lambda t: t.update({"heads.0.router.weight": torch.zeros(1, 1)}), "heads.0.router.weight"),
]


@pytest.mark.parametrize(("change", "word"), TENSORS)
def test_every_tensor_is_what_it_may_be(
    folder: Path, change: Callable[[dict[str, Tensor]], object], word: str
) -> None:
    put_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        moefy.load(folder, verify=False)
    assert word in str(caught.value)


def test_config_and_weights_are_those_that_were_written(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match=r"config\.json: its SHA-256"):
        moefy.load(folder)
    put(folder, "sha256/config.json", DROP)  # as folders were before
    with pytest.raises(CheckpointError, match=r"config\.json: its SHA-256"):
        moefy.load(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    moefy.load(folder, verify=False)


def calls(file: Path) -> list[ast.Call]:
    return [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]


def test_no_call_of_transformers_trusts_remote_code() -> None:
    found = 0
    for room in ("moefy", "experiments", "benchmarks", "scripts"):
        for file in (ROOT / room).rglob("*.py"):
            for call in calls(file):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                partial = name == "partial" and "from_config" in ast.unparse(call)
                if name not in ("from_pretrained", "from_config", "pipeline") and not partial:
                    continue
                found += 1
                trusted = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
                constant = isinstance(trusted[0], ast.Constant) if trusted else False
                where = f"{file.relative_to(ROOT)}:{call.lineno}"
                assert constant and ast.literal_eval(trusted[0]) is False, where
    assert found >= 8


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    source, mark = build("llama", tmp_path / "source"), tmp_path / "it ran"
    config = json.loads((source / "config.json").read_text())
    names = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    (source / "planted.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for change in ({"model_type": "planted", "auto_map": names}, {"auto_map": names}):
        (source / "config.json").write_text(json.dumps({**config, **change}))
        try:
            convert_tiny("llama", source, tmp_path / f"out{len(change)}")
        except MoefyError:
            assert "model_type" in change
        assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_not_fetched(tmp_path: Path, key: str) -> None:
    source = build("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: "somebody/kernel"}))
    with pytest.raises(CheckpointError, match="code to be fetched"):
        convert_tiny("llama", source, tmp_path / "out")
