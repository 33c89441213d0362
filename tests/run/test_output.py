"""What is written appears when it is whole; what is finished is not made again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moefy.errors import MoefyError, OutputError
from moefy.run.job import Job
from moefy.run.output import Stages, digest, put_in_place, whole, write_whole


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old ü")
    with pytest.raises(ZeroDivisionError), whole(file) as part:
        part.write_bytes(b"half")
        raise ZeroDivisionError
    assert file.read_bytes() == "old ü".encode()
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    assert names(tmp_path) == ["a.json"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    new, place, old = (tmp_path / name for name in ("new", "place", "old"))
    for folder in (new, place, old):
        folder.mkdir()
        (folder / folder.name).touch()
    put_in_place(new, place, old)
    assert names(tmp_path) == ["place", "place/new"]


def test_a_part_is_made_once_for_what_decides_it(tmp_path: Path) -> None:
    made: list[Any] = []

    def make(what: Any) -> dict[str, Any]:
        made.append(what)
        return {"what": what}

    for seed in (0, 1, 0):
        stages = Stages(tmp_path, {"seed": seed})
        for settings in ([1], [2], [1]):
            found = stages.run("part", settings, lambda n=(seed, *settings): make(list(n)))  # type: ignore[misc]
            assert found == {"what": [seed, *settings]}
    assert made == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert Stages(None).run("part", None, lambda: make("x")) == {"what": "x"}


def test_a_part_is_there_when_its_values_are(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    tensors = {"a": torch.arange(3)}
    with pytest.raises(TypeError):
        stages.keep("layers/0", {"not": object()}, tensors)
    assert not stages.has("layers/0")
    stages.keep("layers/0", [1, "ü"], tensors)
    assert stages.has("layers/0")
    assert stages.read("layers/0") == [1, "ü"]
    assert torch.equal(stages.tensors("layers/0")["a"], tensors["a"])
    assert names(tmp_path) == ["layers", "layers/0.json", "layers/0.safetensors"]


def test_a_part_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MoefyError, match="cannot be written"):
        Stages(tmp_path / "file").run("part", None, dict)


def test_a_digest_is_of_values_in_any_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def job(out: Path, *, resume: bool | None = False, overwrite: bool = False) -> Job:
    return Job("test", out, resume=resume, overwrite=overwrite, quiet=True)


def finish(run: Job, decided: Any = None) -> None:
    with run.running(decided):
        run.finished.mkdir(exist_ok=True)
        (run.finished / "result").write_text(json.dumps(decided))
    run.commit()


def test_a_run_that_goes_on_is_the_same_one(tmp_path: Path) -> None:
    out, first = tmp_path / "out", job(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), first.running([1]):
        first.stages.keep("part", 7)
        raise ZeroDivisionError
    with pytest.raises(OutputError, match="--resume"):
        finish(job(out), [1])
    with pytest.raises(OutputError, match="another model, recipe or corpus"):
        finish(job(out, resume=True), [2])
    again = job(out, resume=True)
    assert again.stages.read("part") == 7
    finish(again, [1])
    assert names(tmp_path) == ["out", "out/result"]


def test_an_error_that_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        job(tmp_path / "out").running(worthless=(ArithmeticError,)),
    ):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), job(tmp_path / "out", resume=None).running():
        raise KeyboardInterrupt
    assert not names(tmp_path)


def test_a_verb_that_does_not_resume_begins_anew(tmp_path: Path) -> None:
    left = job(tmp_path / "out", resume=None)
    killed = left.running()
    killed.__enter__()
    left.finished.mkdir()
    (left.finished / "junk").touch()
    finish(job(tmp_path / "out", resume=None))
    assert names(tmp_path) == ["out", "out/result"]
    del killed


def test_what_is_in_the_way_is_told_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"exists already; .* --overwrite"):
        job(tmp_path)
    (tmp_path / "old").touch()
    finish(job(tmp_path, overwrite=True))
    assert names(tmp_path) == ["result"]
