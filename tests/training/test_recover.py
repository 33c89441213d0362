"""Recovery: what learns, what stays, and that a run is the same however it is cut up."""

import errno
import json
import math
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from children import run_two, start
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_conversion import convert_tiny, corpus_for, much_text
from tiny_models import build, example_inputs
from torch import Tensor

import moefy
from moefy import recipe as recipes
from moefy.errors import CheckpointError, CorpusError, MoefyError, OutputError, RecipeError
from moefy.evaluation.outputs import distance, run_outputs, values_of
from moefy.experts.loading import load_dense
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.models.artefact import read_artefact
from moefy.models.checkpoint import Checkpoint
from moefy.training import loop
from moefy.training.learning import RecoveryCheck
from moefy.training.loop import Diverged
from moefy.training.recipe import RecoverRecipe
from moefy.training.recover import recover

RECIPE = RecoverRecipe(
    tokens=1200,
    batch_tokens=200,
    micro_tokens=200,
    context=32,
    check_every=2,
    learning_rate=0.03,
    distil=1.0,
    precision="fp32",
)


def run(moefied: Path, out: Path, **options: Any) -> dict[str, Any]:
    recipe = replace(RECIPE, **options.pop("settings", {}))
    corpus = options.pop("corpus", corpus_for("llama"))
    return recover(moefied, out, recipe=recipe, corpus=corpus, quiet=True, **options)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a folder holds: weights and side file."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def kind(name: str) -> str:
    if ".mlp." in name:
        return "experts"
    if name.startswith("layers."):
        return name.split(".")[2] + "s"
    return "rest"


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {kind(name) for name in old if not torch.equal(old[name], new[name])}


def test_training_closes_the_gap_and_says_so(moefied: Path, tmp_path: Path) -> None:
    settings = {"tokens": 20000, "learning_rate": 0.01}
    record = run(moefied, tmp_path / "out", settings=settings, corpus=much_text(), control=True)
    assert record["after"]["kl"]["mean"] < 0.8 * record["before"]["kl"]["mean"]
    assert record["training"]["tokens"] >= 20000
    assert record["training"]["stopped"] is None
    first, last = record["before"]["ce"]["mean"], record["after"]["ce"]["mean"]
    # On random tokens the moefied model is the better one: then there is no gap to speak of.
    assert first < record["before"]["ce_dense"]["mean"]
    assert record["gap_closed"] is None
    goal = record["control"]["ce"]
    assert goal < first
    assert record["gap_closed_of_control"] == pytest.approx((first - last) / (first - goal))
    kept = json.loads((tmp_path / "out" / "records.json").read_text())
    assert kept["recovery"] == json.loads(json.dumps(record))
    assert kept["evaluation"]["dense"] == "another checkpoint"
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {"loss", "kl", "ce", "tokens_per_second", "gradient_norm"} <= rows[0].keys()
    assert {"held_out_kl", "density", "effective_experts", "dead_experts"} <= rows[-1].keys()
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    # The density is that of before: thresholds follow the weights.
    before = record["training"]["before"]["density"]
    assert record["training"]["after"]["density"] == pytest.approx(before, abs=0.02)
    # The folder loads, and knows that its weights are no longer the source's.
    assert read_artefact(tmp_path / "out").weights_modified
    model = moefy.load(tmp_path / "out")
    assert values_of(model, model(**example_inputs("llama"))).isfinite().all()


@pytest.mark.parametrize("steps", [1, 6, 60])
def test_every_step_has_a_learning_rate(steps: int) -> None:
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5}])
    schedule, found = loop._schedule(optimizer, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rising = max(1, round(0.05 * steps))
    want = [0.5 * k / rising for k in range(1, rising + 1)]
    falling = steps + 1 - rising
    want += [0.25 * (1 + math.cos(math.pi * k / falling)) for k in range(1, falling)]
    assert found == pytest.approx(want)
    assert min(found) > 0


@pytest.mark.parametrize("train", ["experts", "routers", "compensations", "rest", "routers,rest"])
def test_only_what_is_named_learns(train: str, moefied: Path, tmp_path: Path) -> None:
    run(moefied, tmp_path / "out", settings={"train": train})
    assert changed(moefied, tmp_path / "out") == set(train.split(","))


@pytest.mark.parametrize("train", ["experts", "rest", "experts,routers,compensations,rest"])
def test_adapters_are_of_low_rank_and_merged(train: str, moefied: Path, tmp_path: Path) -> None:
    run(moefied, tmp_path / "out", settings={"train": train, "lora_rank": 2})
    assert changed(moefied, tmp_path / "out") == set(train.split(","))
    old, new = tensors(moefied), tensors(tmp_path / "out")
    moved = [n for n in old if not n.startswith("layers.") and not torch.equal(old[n], new[n])]
    vectors = [name for name in moved if old[name].ndim == 1]
    assert bool(vectors) == ("rest" in train)  # norms need no adapter
    moved = [name for name in moved if name not in vectors]
    for name in moved:
        assert torch.linalg.matrix_rank(new[name] - old[name], rtol=1e-3) <= 2
    assert len(moved) == 2 * (3 * ("experts" in train) + 4 * ("rest" in train))


def test_cutting_a_step_up_or_computing_it_twice_changes_nothing(
    moefied: Path, tmp_path: Path
) -> None:
    run(moefied, tmp_path / "whole")
    want = tensors(tmp_path / "whole")
    for name, settings in {
        "pieces": {"micro_tokens": 40},
        "checkpointing": {"gradient_checkpointing": True},
    }.items():
        run(moefied, tmp_path / name, settings=settings)
        got = tensors(tmp_path / name)
        moved = torch.cat([(want[n] - v).flatten() for n, v in tensors(moefied).items()])
        error = torch.cat([(got[n] - want[n]).flatten() for n in want])
        assert error.float().norm() < 2e-2 * moved.float().norm()
    run(moefied, tmp_path / "seed", settings={"seed": 1})
    other = torch.cat([(v - want[n]).flatten() for n, v in tensors(tmp_path / "seed").items()])
    assert other.float().norm() > 0.2 * moved.float().norm()


def test_sixteen_bits(moefied: Path, tmp_path: Path) -> None:
    settings = {"precision": "bf16", "tokens": 20000, "learning_rate": 0.01}
    record = run(moefied, tmp_path / "out", settings=settings, corpus=much_text())
    assert record["after"]["kl"]["mean"] < 0.8 * record["before"]["kl"]["mean"]
    assert {v.dtype for v in tensors(tmp_path / "out").values()} <= {torch.float32, torch.int32}


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[5])
import test_recover as t
from moefy.training import loop
die, add = int(sys.argv[3]), loop.Log.add
def add_or_die(self, row):
    add(self, row)
    if row["step"] == die and os.environ.get("RANK", "0") == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
loop.Log.add = add_or_die
t.run(Path(sys.argv[1]), Path(sys.argv[2]), resume=True)
"""


def launch(moefied: Path, out: Path, die: int = 0) -> subprocess.CompletedProcess[str]:
    """A run in another process, killed when it has logged step `die`."""
    return start(SCRIPT, moefied, out, die, 0, Path(__file__).parent).end()


def launch_two(moefied: Path, out: Path, die: int = 0) -> list[subprocess.CompletedProcess[str]]:
    """A run in two processes, of which the second is killed when it has logged step `die`."""
    return run_two(SCRIPT, moefied, out, die, 1, Path(__file__).parent)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(moefied: Path, tmp_path: Path) -> None:
    for name, deaths in {"whole": [], "killed": [1, 5]}.items():
        for step in deaths:
            assert launch(moefied, tmp_path / name, step).returncode == -signal.SIGKILL
            assert not (tmp_path / name).exists()
        done = launch(moefied, tmp_path / name)
        assert done.returncode == 0, done.stderr
    want, got = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(want[name], got[name]) for name in want)
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("whole", "killed")
    ]
    for log in logs:
        for row in log:
            row.pop("tokens_per_second")
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def of_two(moefied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train."""
    out = tmp_path_factory.mktemp("two") / "out"
    for done in launch_two(moefied, out):
        assert done.returncode == 0, done.stderr
    return out


def test_two_processes_train_as_one(moefied: Path, of_two: Path, tmp_path: Path) -> None:
    assert launch(moefied, tmp_path / "one").returncode == 0
    record = json.loads((of_two / "records.json").read_text())["recovery"]
    assert record["processes"] == 2
    start, one, two = tensors(moefied), tensors(tmp_path / "one"), tensors(of_two)
    moved = torch.cat([(one[n] - start[n]).flatten() for n in start]).float().norm()
    apart = torch.cat([(one[n] - two[n]).flatten() for n in start]).float().norm()
    assert apart < 2e-2 * moved


def test_a_process_that_dies_ends_the_run_and_it_goes_on(
    moefied: Path, of_two: Path, tmp_path: Path
) -> None:
    first, second = launch_two(moefied, tmp_path / "out", die=3)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1
    last = first.stderr.strip().splitlines()[-1]
    assert "Elsewhere: process 0: another process of this run has ended" in last, first.stderr
    assert "nothing is lost, run again" in last
    assert not (tmp_path / "out").exists()
    assert [done.returncode for done in launch_two(moefied, tmp_path / "out")] == [0, 0]
    want, got = tensors(of_two), tensors(tmp_path / "out")
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_run_that_goes_wrong_at_once_leaves_nothing(moefied: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="before there was a checkpoint to go back to; lower"):
        run(moefied, tmp_path / "out", settings={"learning_rate": 30.0})
    assert list(tmp_path.iterdir()) == []
    run(moefied, tmp_path / "out")


@pytest.mark.parametrize("how", ["nan", "worse"])
def test_a_run_that_goes_wrong_later_gives_the_last_good_model(
    how: str, moefied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = run(moefied, tmp_path / "good", settings={"tokens": 800})
    assert good["training"]["steps"] == 4
    passes, calls = loop._passes, []

    def spoilt(*given: Any) -> dict[str, float]:
        calls.append(1)
        row = backward(*given)
        return row | {"loss": float("nan")} if how == "nan" and len(calls) == 6 else row

    backward = loop._Stepping._backward
    monkeypatch.setattr(loop._Stepping, "_backward", spoilt)
    if how == "worse":
        monkeypatch.setattr(loop, "_passes", lambda *a: len(calls) < 5 and passes(*a))
    # The same schedule for the first four steps, of a longer run.
    record = run(moefied, tmp_path / "out", settings={"tokens": 2400})
    assert record["training"]["steps"] == 4
    reason = "not finite at step 6" if how == "nan" else "the held-out loss rose to"
    assert reason in record["training"]["stopped"]
    assert (
        record["training"]["after"]["held_out_loss"] < record["training"]["before"]["held_out_loss"]
    )
    model = moefy.load(tmp_path / "out")
    assert values_of(model, model(**example_inputs("llama"))).isfinite().all()


def test_what_cannot_be_trained_is_said_before_anything_is_made(
    moefied: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CorpusError, match="tokens to train on, one step takes 100000"):
        run(moefied, out, settings={"batch_tokens": 100_000})
    with pytest.raises(RecipeError, match="did you mean 'experts'"):
        run(moefied, out, settings={"train": "expert"})
    run(moefied, tmp_path / "first")
    with pytest.raises(MoefyError, match="trained already, the dense model is no longer in it"):
        run(tmp_path / "first", out)
    again = run(tmp_path / "first", out, against=moefied)
    first = json.loads((tmp_path / "first" / "records.json").read_text())["recovery"]
    assert again["before"]["kl"]["mean"] == pytest.approx(first["after"]["kl"]["mean"], rel=1e-3)
    with pytest.raises(OutputError, match="exists already"):
        run(moefied, out)


def test_a_killed_run_is_not_resumed_with_other_settings(moefied: Path, tmp_path: Path) -> None:
    assert launch(moefied, tmp_path / "out", die=3).returncode == -signal.SIGKILL
    with pytest.raises(OutputError, match="started with another model, recipe or corpus"):
        run(moefied, tmp_path / "out", settings={"learning_rate": 0.01}, resume=True)
    with pytest.raises(OutputError, match="pass --resume"):
        run(moefied, tmp_path / "out")


def test_a_killed_run_is_not_resumed_with_the_checkpoint_of_another(
    moefied: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.moefy-unfinished"
    assert launch(moefied, out, die=3).returncode == -signal.SIGKILL
    # Another model altogether, then another model's checkpoint, then one that is cut short.
    convert_tiny("opt", build("opt", tmp_path / "source"), tmp_path / "moefied")
    with pytest.raises(OutputError, match="started with another model, recipe or corpus"):
        run(tmp_path / "moefied", out, resume=True)
    other = tmp_path / ".other.moefy-unfinished" / "checkpoint"
    assert launch(tmp_path / "moefied", tmp_path / "other", die=3).returncode == -signal.SIGKILL
    (work / "checkpoint").rename(work / "own")
    shutil.copytree(other, work / "checkpoint")
    with pytest.raises(CheckpointError, match=r"damaged or of another run.*--overwrite"):
        run(moefied, out, resume=True)
    shutil.rmtree(work / "checkpoint")
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_1.pkl"):
        shutil.copytree(work / "own", work / "checkpoint")
        file = work / "checkpoint" / name
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(CheckpointError, match="damaged or of another run"):
            run(moefied, out, resume=True)
        shutil.rmtree(work / "checkpoint")
    (work / "own").rename(work / "checkpoint")
    run(moefied, out, resume=True)
    run(moefied, tmp_path / "whole")
    want, got = tensors(tmp_path / "whole"), tensors(out)
    assert all(torch.equal(want[name], got[name]) for name in want)


FULL = {
    "moefy.training.curves.Log.add": OSError(errno.ENOSPC, "No space left on device"),
    "accelerate.utils.other.safe_save_file": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    "torch.save": RuntimeError(
        "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"
    ),
}
"""What Python, safetensors and torch raise on a file system that is full."""


@pytest.mark.parametrize("writer", list(FULL))
def test_a_disk_that_fills_up_loses_nothing(
    writer: str, moefied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(moefied, tmp_path / "whole")
    passes, checks = loop._passes, []

    def full(*_: Any, **__: Any) -> None:
        raise FULL[writer]

    def filling(*given: Any) -> bool:
        checks.append(given)
        if len(checks) == 2:  # step 4; step 2 has left a checkpoint
            patch.setattr(writer, full)
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        return passes(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_passes", filling)
        with pytest.raises(OutputError, match="disk is full; free some room and pass --resume"):
            run(moefied, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(moefied, tmp_path / "out", resume=True)
    want, got = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(want[name], got[name]) for name in want)


@torch.no_grad()
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("model", ["gpt2", "phi3", "t5", "bert", "vit", "bloom"])
def test_what_was_checked_is_what_is_saved(model: str, lora_rank: int, tmp_path: Path) -> None:
    """Thresholds, centres and weights belong together; single neurons chosen by their own weights."""
    settings = {"context": 32, "partition.tokens": 128, "router.tokens": 256, "density": 0.5}
    wanted = recipes.override(recipes.load("largest_inputs"), settings)
    moefy.convert(
        build(model, tmp_path / "source"), tmp_path / "moefied", recipe=wanted,
        corpus=corpus_for(model), quiet=True,
    )  # fmt: skip
    rate = 1.0 if lora_rank else 0.1
    recipe = replace(RECIPE, lora_rank=lora_rank, learning_rate=rate, batch_tokens=100)
    found: list[dict[str, Any]] = []
    figures = RecoveryCheck._figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RecoveryCheck, "_figures", lambda self: found.append(figures(self)) or found[-1]
        )
        patch.setattr(loop, "WORSE", float("inf"))  # whether it is better is not asked here
        checks: list[RecoveryCheck] = []
        begin = RecoveryCheck.__init__
        patch.setattr(
            RecoveryCheck, "__init__", lambda self, *a: checks.append(self) or begin(self, *a)
        )
        recover(
            tmp_path / "moefied",
            tmp_path / "out",
            recipe=recipe,
            corpus=corpus_for(model),
            quiet=True,
        )
    (check,) = checks
    loaded = moefy.load(tmp_path / "out", dtype=torch.float32)
    kl = tokens = 0.0
    for batch, want in zip(check.batches, check.want, strict=True):
        got = run_outputs(loaded, batch)
        kl, tokens = kl + float(distance(want, got)) * len(got), tokens + len(got)
    assert kl / tokens == pytest.approx(found[-1]["held_out_kl"], rel=1e-3)
    assert abs(found[-1]["held_out_kl"] / found[0]["held_out_kl"] - 1) > 0.01
    for module in sparse_mlps(loaded).values():
        if module.compensation.centres:
            constant = module.compensation.centre_N @ module.weights.down_ND
            assert torch.allclose(module.compensation.constant_D, constant, atol=1e-4)


def test_all_experts_of_a_trained_model_are_the_trained_dense_model(
    moefied: Path, tmp_path: Path
) -> None:
    run(moefied, tmp_path / "out")
    model, given = moefy.load(tmp_path / "out"), example_inputs("llama")
    for module in sparse_mlps(model).values():
        module.all_on = True
    stock = load_dense(Checkpoint.open(tmp_path / "out"))
    dense = values_of(stock, stock(**given))
    got = values_of(model, model(**given))
    assert (got - dense).norm() < 1e-5 * dense.norm()
