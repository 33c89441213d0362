"""What is written appears when it is whole; what is finished is not made again."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from moefy.errors import MoefyError, OutputError
from moefy.run.folder import MARK, OutputFolder, put_in_place, refuse_inside, whole, write_whole
from moefy.run.job import Job
from moefy.run.output import Stages, digest


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
    assert names(tmp_path) == ["out", f"out/{MARK}", "out/result"]


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
    left.output.release()  # as the end of its process does
    finish(job(tmp_path / "out", resume=None))
    assert names(tmp_path) == ["out", f"out/{MARK}", "out/result"]


def test_what_is_in_the_way_is_told_before_anything_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match=r"exists already; .* --overwrite"):
        job(out)
    finish(job(out, overwrite=True))
    finish(job(out, overwrite=True), [1])
    assert names(tmp_path) == ["out", f"out/{MARK}", "out/result"]


def stranger_file(out: Path) -> str:
    (out / "notes.txt").touch()
    return "notes.txt"


def stranger_below(out: Path) -> str:
    (out / "a" / "b").mkdir(parents=True)
    (out / "a" / "b" / "c").touch()
    return "a/b/c"


def stranger_link(out: Path) -> str:
    (out / "link").symlink_to(out.parent)
    return "link"


def stranger_all(out: Path) -> str:
    (out / "result").touch()
    (out / MARK).write_text('{"nested": [')
    return "result"


@pytest.mark.parametrize("put", [stranger_file, stranger_below, stranger_link, stranger_all])
@pytest.mark.parametrize("late", [False, True])
def test_overwrite_deletes_only_what_a_run_wrote(
    put: Callable[[Path], str], late: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finish(job(out))
    if late:  # while the run is at work
        run = job(out, overwrite=True)
        with run.running():
            run.finished.mkdir()
            name = put(out)
    else:
        name = put(out)
    before = names(out)
    with pytest.raises(OutputError, match=re.escape(name)):
        run.commit() if late else job(out, overwrite=True)
    assert names(out) == before


def test_overwrite_replaces_no_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="no run of moefy wrote"):
        job(tmp_path / "out", overwrite=True)


def around(tmp_path: Path) -> list[tuple[Path, Path]]:
    """Where a run would write, and what it would read there, under all kinds of names."""
    source, other = tmp_path / "a" / "source", tmp_path / "other"
    for folder in (source / "inner", other, tmp_path / ".x.moefy-unfinished" / "model"):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (source / "weights").symlink_to(other / "weights")
    (other / "weights").touch()
    return [
        (source, source),
        (source / "..", source),
        (tmp_path / "a" / "nothing" / ".." / "source", source),
        (tmp_path / "link", source),
        (source, tmp_path / "link"),
        (tmp_path / "a" / "up" / "a" / "source", source),
        (source / "new", source),
        (tmp_path / "link" / "inner" / "new" / "newer", source),
        (source / "inner", source),
        (tmp_path, source),
        (tmp_path / "a", tmp_path / "link"),
        (other, source),  # holds the weights
        (tmp_path / "x", tmp_path / ".x.moefy-unfinished" / "model"),
    ]


@pytest.mark.parametrize("number", range(13))
def test_nothing_is_written_where_a_run_reads(number: int, tmp_path: Path) -> None:
    out, source = around(tmp_path)[number]
    before = names(tmp_path)
    with pytest.raises(OutputError, match=r"which is read; choose a place"):
        Job("test", out, resume=False, overwrite=True, quiet=True, reads=[source])
    assert names(tmp_path) == before
    Job("test", tmp_path / "y", resume=False, overwrite=True, quiet=True, reads=[source, "gpt2"])


def test_a_folder_system_without_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are compared by what they are: a bind mount or another case has another path."""
    (tmp_path / "Source").mkdir()
    (tmp_path / "source").mkdir()
    own = Path.samefile
    monkeypatch.setattr(
        Path, "samefile", lambda a, b: own(a, b) or str(a).lower() == str(b).lower()
    )
    for out in ("source", "source/out"):
        with pytest.raises(OutputError, match="which is read"):
            refuse_inside(tmp_path / out, tmp_path / "Source")


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    out, first = tmp_path / "out", job(tmp_path / "out")
    with first.running():
        first.finished.mkdir()
        (first.finished / "result").touch()
        for late in (job(out), job(out, resume=True), job(out, overwrite=True)):
            with pytest.raises(OutputError, match=rf"another run .*process {os.getpid()} on"):
                finish(late)
        waiting = job(out)
    first.commit()
    with pytest.raises(OutputError, match="exists already"):
        finish(waiting)
    assert names(tmp_path) == ["out", f"out/{MARK}", "out/result"]


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from moefy.run.folder import OutputFolder\n"
        "OutputFolder(Path(sys.argv[1])).begin('x', resume=False, overwrite=False); os.abort()"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False)
    folder = OutputFolder(tmp_path / "out")
    assert folder.begin("x", resume=True, overwrite=False)
    folder.discard()
    assert not names(tmp_path)


class Killed(BaseException):
    """The end of a process, between two of its calls."""


@pytest.mark.parametrize("number", range(12))
def test_killed_at_any_rename(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a run that replaces a result is killed, the next one finds the old result or a new one."""
    out, calls = tmp_path / "out", iter(range(100))
    finish(job(out), "old")

    def killed(own: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise Killed
        return own(*args, **kwargs)

    run = job(out, overwrite=True)
    with run.running("new"):
        run.finished.mkdir()
        (run.finished / "result").write_text('"new"')
    with monkeypatch.context() as patch:
        for owner, name in (
            (Path, "replace"),
            (Path, "unlink"),
            (Path, "rmdir"),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, in_place_of(killed, owner, name))
        with suppress(Killed):
            run.commit()
    run.output._lock = None  # as the end of its process does
    with pytest.raises(OutputError, match="exists already"):
        job(out)
    assert json.loads((out / "result").read_text()) in ("old", "new")
    assert set(names(tmp_path)) <= {
        "out", f"out/{MARK}", "out/result", *(n for n in names(tmp_path) if n.startswith(".out.moefy-unf"))
    }  # fmt: skip
    finish(job(out, overwrite=True), "newer")
    assert names(tmp_path) == ["out", f"out/{MARK}", "out/result"]
    assert json.loads((out / "result").read_text()) == "newer"


def in_place_of(killed: Callable[..., Any], owner: Any, name: str) -> Any:
    """`killed` in the place of a method or a function."""
    own = getattr(owner, name)
    return lambda *args, **kwargs: killed(own, *args, **kwargs)


def test_all_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def renamed(path: Path, place: Path) -> Path:
        done.append(f"{path.name} -> {Path(place).name}")
        return replace(path, place)

    (tmp_path / "new" / "below").mkdir(parents=True)
    for file in ("a", "below/b"):
        (tmp_path / "new" / file).touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "replace", renamed)
        write_whole(tmp_path / "file", "x")
        put_in_place(tmp_path / "new", tmp_path / "place", tmp_path / "old")
    assert done[:2] == ["file.part", "file.part -> file"]
    assert sorted(done[2:6]) == ["a", "b", "below", "new"]
    assert done[6:] == ["new -> place", tmp_path.name]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for out in (
        tmp_path / ("x" * 250),
        tmp_path / ("y" * 300),
        tmp_path / "file" / "out",
        tmp_path / "circle" / "x",
    ):
        with pytest.raises(OutputError, match=r"cannot be written \(.*\); choose another place"):
            finish(job(out))
