"""Conversion in two processes: the same partition and routers as in one, and what happens when one dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import LAUNCH, run_two
from safetensors.torch import load_file
from tiny_conversion import convert_tiny, corpus_for
from tiny_models import build

from moefy.errors import MoefyError
from moefy.models.artefact import read_artefact
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.run.processes import launched

GREEDY = {
    "partition.expert_size": 1, "router.name": "largest_inputs", "selection.name": "threshold",
    "budget.name": "greedy", "density": 0.3,
}  # fmt: skip

CODE = """
import os, signal
from pathlib import Path
from moefy.conversion.task import Conversion
from tiny_conversion import convert_tiny, corpus_for
keep = Conversion.keep

def dying(*args):
    if {dies} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    keep(*args)

Conversion.keep = dying
convert_tiny("llama", Path({source!r}), Path({out!r}), settings={settings!r}, resume={resume})
"""


def launch(
    source: Path, out: Path, *, settings=None, dies=False, resume=False
) -> list[subprocess.CompletedProcess[str]]:
    """A conversion in two processes, of which the second may die."""
    code = CODE.format(
        source=str(source), out=str(out), settings=settings or {}, dies=dies, resume=resume
    )
    return run_two(code)


@pytest.mark.parametrize("settings", [{}, GREEDY], ids=["fitted", "allocated"])
def test_two_processes_find_what_one_finds(settings, tmp_path):
    source = build("llama", tmp_path / "source")
    one = convert_tiny("llama", source, tmp_path / "one", settings=settings)
    for done in launch(source, tmp_path / "two", settings=settings):
        assert done.returncode == 0, done.stderr
    first, second = read_artefact(tmp_path / "one"), read_artefact(tmp_path / "two")
    for name, value in first.tensors.items():
        if name.endswith("permutation"):
            assert torch.equal(value, second.tensors[name])
        else:
            error = (value - second.tensors[name]).norm() / value.norm().clamp_min(1e-30)
            assert error < 1e-6, name
    assert [e.selection for e in first.layers] == [e.selection for e in second.layers]
    for file in Checkpoint.open(tmp_path / "one").files:
        assert sha256(file) == sha256(tmp_path / "two" / file.name)
    assert one["evaluation"]["total"]["kl"]["mean"] > 0


def test_a_process_that_dies_ends_the_run_and_it_resumes(tmp_path):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "whole")
    first, second = launch(source, tmp_path / "out", dies=True)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1 and "another process of this run has ended" in first.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(MoefyError, match="--resume"):
        convert_tiny("llama", source, tmp_path / "out")
    for done in launch(source, tmp_path / "out", resume=True):
        assert done.returncode == 0, done.stderr
    want, got = (load_file(tmp_path / n / "moefy.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_command_line_in_two_processes(tmp_path):
    source = build("llama", tmp_path / "source")
    text = tmp_path / "text.jsonl"
    rows = (json.dumps({"input_ids": ids}) for ids in corpus_for("llama"))
    text.write_text("\n".join(rows))
    command = [
        sys.executable, *LAUNCH, "-m", "moefy", "convert", str(source), str(tmp_path / "out"),
        "--recipe", "fast", "--corpus", str(text), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["conversion"]["kind"] == "conversion"
    assert not list(tmp_path.glob(".out*"))


def test_an_error_of_the_user_is_told_by_all(tmp_path):
    source = build("llama", tmp_path / "source")
    (tmp_path / "out").mkdir()
    first, second = launch(source, tmp_path / "out")
    assert first.returncode != 0 and second.returncode != 0
    assert "exists already" in first.stderr
    assert "Elsewhere" in second.stderr or "OutputError" in second.stderr


def test_alone_there_is_nobody_to_wait_for():
    assert "RANK" not in os.environ
    processes = launched()
    assert (processes.rank, processes.count, processes.main) == (0, 1, True)
    assert processes.mine([1, 2, 3]) == [1, 2, 3]
    assert processes.all([1, 2]) == [1, 2]
    assert processes.once(lambda: 5) == 5
    processes.wait()
