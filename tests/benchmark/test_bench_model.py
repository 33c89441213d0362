"""`moefy bench` as a user types it, on a conversion of the bundled demo model and on bad options."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build
from typer.testing import CliRunner

from moefy.benchmark.costs import model_bytes, model_parameters
from moefy.benchmark.engines import choose
from moefy.benchmark.engines.base import Models
from moefy.benchmark.layers import Prompt, prompt
from moefy.benchmark.levels import Sweep
from moefy.benchmark.levels.model import bench_model
from moefy.cli.quickstart import demo_models
from moefy.cli.verbs import app
from moefy.conversion.convert import convert
from moefy.errors import MoefyError
from moefy.experts.backends import BACKENDS
from moefy.experts.loading import load, load_dense
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.exporting.export import export
from moefy.models.checkpoint import Checkpoint
from moefy.recipe import load as named
from moefy.recipe import override
from moefy_kernels import masked_mlp

SMALL = {
    "partition.expert_size": 64, "partition.tokens": 512, "router.tokens": 1024,
    "router.epochs": 1, "density": 0.25,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 4 << 20)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo model in experts, and beside it the same as a stock mixture of experts."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = override(named("export"), SMALL)
    convert(demo_models()["llama"], folder / "out", recipe=recipe, quiet=True)
    export(folder / "out", folder / "mixtral", to="mixtral")
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny moefied model and its dense one."""
    folder = tmp_path_factory.mktemp("pair")
    source = build("llama", folder / "source")
    convert_tiny("llama", source, folder / "out", settings={"selection.name": "topk"})
    return load_dense(Checkpoint.open(source)), load(folder / "out")


def say(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["bench", *(str(a) for a in arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


QUICK = ("--samples", 5, "--no-calibrate", "-q")
TINY = ("--prompt-tokens", 12, "--new-tokens", 3, *QUICK)


def test_a_model_with_all_that_runs_it(demo, tmp_path):
    named = ("masked", "views", "auto")
    own = [f"{name}{ending}" for name in ("eager", *named) for ending in ("", "+linears")]
    options = [word for name in (*named, "llama.cpp") for word in ("--engine", name)]
    text = say(
        demo / "out", *TINY, *options, "--linears", "--experts", f"all={demo / 'mixtral'}",
        "--batches", "1,3", "-o", tmp_path / "record.json", "--plot", tmp_path / "picture.png",
    )  # fmt: skip
    for words in ("prefill", "decode", "best dense", "tokens/s", "--gguf FILE", "text of"):
        assert words in text
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(c["phase"], c["batch"], c["tokens"]) for c in record["cells"]] == [
        ("prefill", 1, 12), ("decode", 1, 1), ("prefill", 3, 36), ("decode", 3, 3)
    ]  # fmt: skip
    stock = {f"experts:{name}" for name in ("eager", "batched_mm", "grouped_mm")}
    for cell in record["cells"]:
        assert set(cell["engines"]) == {*own, *stock}
        assert cell["density"] == pytest.approx(0.25)
        assert all(row["relative_error"] < 0.05 for row in cell["engines"].values())
        steps = 3 if cell["phase"] == "decode" else 1
        for row in cell["engines"].values():
            assert np.shape(row["seconds"]) == (5, steps)
        rows = cell["engines"]
        assert rows["views"]["bytes"] < rows["masked"]["bytes"]
        assert rows["views"]["active_parameters"] < rows["eager"]["active_parameters"]
    assert (tmp_path / "picture.png").stat().st_size > 20_000


@pytest.mark.parametrize("level", ["kernel", "layer"])
def test_the_layers_of_a_model(demo, level):
    options = ["--densities", ".25,.5"] if level == "kernel" else []
    engines = [word for name in ("views", "auto", "experts") for word in ("--engine", name)]
    record = json.loads(
        say(
            demo / "out", "--level", level, "--batches", "1,5", *options, *engines, *QUICK, "--json"
        )
    )
    assert record["level"] == level
    assert len(record["cells"]) == (4 if level == "kernel" else 2)
    assert "layers of llama: D 192, N 1024, 16 experts" in record["what"]
    for cell in record["cells"]:
        assert {"eager", "views", "auto", "experts:eager"} <= set(cell["engines"])
        assert cell["refused"].keys() == {"experts:moefy"}
        assert (cell["router"] is None) == (level == "kernel")
    text = say(demo / "out", "--level", level, "--batches", 1, "--engine", "views", *QUICK)
    assert ("router alone" in text) == (level == "layer")


def test_a_layer_of_any_shape():
    text = say("--layer", "32,64,8,2", "--batches", "1,2", "--engine", "views", *QUICK)
    assert "synthetic SwiGLU layer, random weights: D 32, N 64, 8 experts" in text
    data = json.loads(say("--layer", "32,64,8,2", "--level", "kernel", *QUICK, "--json",
                          "--engine", "masked", "--densities", ".5"))  # fmt: skip
    assert [cell["batch"] for cell in data["cells"]] == [1, 2, 4, 8, 16]
    assert {cell["density"] for cell in data["cells"]} == {0.5}


def test_against_another_dense_model(demo):
    source = demo_models()["llama"]
    engines = ("--engine", "masked", "--against", source)
    cell = json.loads(say(demo / "out", *TINY, *engines, "--json"))["cells"][1]
    assert cell["engines"].keys() == {"eager", "masked"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "neither of a model folder and --layer"),
        (["OUT", "--layer", "32,64,8,2"], "both of a model folder and --layer"),
        (["--layer", "32,64,8"], "expected D,N,E,k"),
        (["--layer", "32,64,7,2"], "N must be a multiple of E"),
        (["--layer", "0,64,8,2"], "1 or more"),
        (["--layer", "32,64,8,9"], "k from 1 to E"),
        (["--layer", "32,64,8,2", "--level", "model"], "does not go with --level model"),
        (["--layer", "32,64,8,2", "--against", "x"], "--against goes with --level model"),
        (["--layer", "32,64,8,2", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["--layer", "32,64,8,2", "--batches", "1,x"], "--batches 1,x: expected numbers"),
        (["--layer", "32,64,8,2", "--densities", "a"], "--densities a: expected numbers"),
        (["--layer", "32,64,8,2", "--densities", "0"], "above 0, at most 1"),
        (["--layer", "32,64,8,2", "--samples", "2"], "fewer than 5"),
        (["--layer", "32,64,8,2", "--engine", "view"], "did you mean 'views'"),
        (["--layer", "32,64,8,2", "--plot", "x.pdf"], "a picture is a .png file"),
        (["OUT", "--level", "modle"], "did you mean 'model'"),
        (["OUT", "--densities", ".5"], "--densities does not go with --level model"),
        (
            ["OUT", "--level", "layer", "--densities", ".5"],
            "the layers of a model choose their own",
        ),
        (["OUT", "--prompt-tokens", "0"], "--prompt-tokens 0: expected 1 or more"),
        (["OUT", "--new-tokens", "0"], "--new-tokens 0: expected 1 or more"),
        (
            ["OUT", "--prompt-tokens", "1020"],
            "1052 tokens of prompt and decode, but 1024 positions",
        ),
        (["OUT", "--gguf", "absent.gguf"], "absent.gguf: no such file"),
        (["OUT", "--experts", "all=absent"], "not a model folder"),
        (["OUT", "--experts", "all=OUT"], "is no mixture of experts"),
        (["OUT", "--against", "absent/x"], "absent"),
        (["absent"], "absent"),
    ],
)
def test_every_bad_option_is_one_line(demo, options, words):
    given = [option.replace("OUT", str(demo / "out")) for option in options]
    result = CliRunner().invoke(app, ["bench", *given, "-q"])
    assert result.exit_code == 1, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("moefy: ")]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]


def ids(batch=2, length=12):
    return Prompt(torch.randint(3, 90, (batch, length)), "random token ids")


def timed(dense, sparse, given, engines=(), **settings):
    sweep = {"batches": settings.pop("batches", (1,)), "samples": 5}
    return bench_model(
        Models(dense, sparse), given, Sweep(engines=choose(engines, **settings), **sweep),
        what="tiny", generated=3,
    )  # fmt: skip


def test_a_backend_that_computes_another_model_is_refused(pair, monkeypatch):
    def swapped(x_TD, weights, mask_TE):
        return masked_mlp(x_TD, weights, mask_TE.roll(1, 1))

    monkeypatch.setitem(BACKENDS, "wrong", replace(BACKENDS["masked"], compute=swapped))
    record = timed(*pair, ids(), ["wrong", "masked"])
    for cell in record["cells"]:
        assert set(cell["engines"]) == {"eager", "masked"}
        assert "layer 0 computes something else: relative" in cell["refused"]["wrong"]


def test_cached_decoding_gives_the_logits_of_a_pass_without_a_cache(pair):
    dense, sparse = pair
    given = ids(batch=3)
    for choice in choose(["masked", "views", "auto"], linears=True):
        session = choice.begin(Models(dense, sparse), given.ids_BT, 8)
        with torch.no_grad():
            for _ in range(2):  # again after a reset
                session.reset()
                got = [session.prefill(), *(session.step(position) for position in range(8, 12))]
            whole = (dense if choice.dense else sparse)(given.ids_BT, use_cache=False).logits
        want = whole[:, 7:].transpose(0, 1)
        assert float((torch.stack(got) - want).norm() / want.norm()) < 1e-4


def test_bytes_and_parameters_of_a_model_against_sums_over_its_tensors(pair):
    dense, sparse = pair
    layers = list(sparse_mlps(sparse).values())
    masks = []
    for module in layers:
        mask_TE = torch.zeros(2, module.experts, dtype=torch.bool)
        mask_TE[0, 1] = mask_TE[1, 3] = True
        masks.append(mask_TE)
    # Two rows of the embeddings are looked up, the output projection is a tensor of its own.
    names = dict(dense.named_parameters())
    embeddings = names["model.embed_tokens.weight"]
    assert dense.get_output_embeddings().weight is not embeddings
    everything = sum(value.numel() for value in names.values())
    read = everything - embeddings.numel() + 2 * embeddings.shape[1]
    assert model_bytes(dense, 2) == 4 * read
    mlps = sum(value.numel() for name, value in names.items() if ".mlp." in name)
    routers = sum(value.numel() for m in layers for value in m.router.parameters())
    compensation = sum(m.compensation.weights_read(1) for m in layers)
    ran = 2 * mlps / layers[0].experts
    assert model_bytes(sparse, 2, masks) == pytest.approx(
        4 * (read - mlps + ran + routers + compensation)
    )
    assert model_parameters(dense) == everything
    assert model_parameters(sparse, masks) == pytest.approx(
        everything - mlps + ran / 2 + routers + compensation
    )


def test_models_that_do_not_fit_are_refused(pair, tmp_path):
    dense, sparse = pair
    with pytest.raises(MoefyError, match="65 tokens of prompt and decode, but 64 positions"):
        timed(dense, sparse, ids(length=65))
    large = Prompt(torch.full((1, 12), 96), "ids")
    with pytest.raises(MoefyError, match="has token 96, the model knows 96"):
        timed(dense, sparse, large)
    source = build("bert", tmp_path / "source")
    convert_tiny("bert", source, tmp_path / "out")
    result = CliRunner().invoke(app, ["bench", str(tmp_path / "out"), *map(str, TINY)])
    assert result.exit_code == 1
    assert "no cached decoding to time" in result.stderr


def test_prompts_are_text_where_there_is_a_tokenizer(tmp_path):
    found = prompt(demo_models()["llama"], 3072, 3, 50)
    assert found.ids_BT.shape == (3, 50)
    assert found.what.startswith("text of")
    assert len(found.ids_BT.unique()) > 30
    other = prompt(tmp_path, 10, 2, 30)
    assert other.what == "random token ids"
    assert int(other.ids_BT.max()) < 10


GRAPHS = ("auto+compiled", "auto+compiled+linears")


@pytest.mark.slow
def test_the_compiled_model(pair):
    dense, sparse = pair
    record = timed(dense, sparse, ids(), ["auto"], compiled=True, linears=True, batches=[1, 2])
    for cell in record["cells"]:
        assert cell["refused"] == {}
        for name in ("compiled", *GRAPHS):
            row = cell["engines"][name]
            assert row["relative_error"] < 1e-4
            # Nothing is compiled again while it is timed, though the model is switched to and fro.
            assert np.max(row["seconds"]) < 1


@pytest.mark.slow
def test_llama_cpp_runs_the_dense_and_the_exported_model(demo):
    pytest.importorskip("llama_cpp", reason="a build of minutes: pip install moefy[llama-cpp]")
    from moefy.exporting.gguf import write_gguf

    write_gguf(demo_models()["llama"], demo / "dense.gguf")
    write_gguf(demo / "mixtral", demo / "mixtral.gguf")
    files = (demo / f"{name}.gguf" for name in ("dense", "mixtral"))
    options = [word for file in files for word in ("--gguf", file)]
    cells = json.loads(say(demo / "out", *TINY, *options, "--json"))["cells"]
    for cell in cells:
        assert set(cell["engines"]) == {"eager", "dense.gguf", "mixtral.gguf"}
        assert cell["engines"]["dense.gguf"]["dense"]
        assert not cell["engines"]["mixtral.gguf"]["dense"]
