"""Files that no library reads are one line with their name, whatever is wrong with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_conversion import convert_tiny
from tiny_models import build

import moefy
from moefy.conversion.plan import plan
from moefy.data.inputs import load_tokenizer
from moefy.errors import MoefyError, OutputError, RecipeError
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.heads import head_sites
from moefy.models.locate import meta_model
from moefy.recipe import Recipe, load, override
from moefy.run.output import Stages
from moefy.run.reading import reading

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2.5, 10**12, 1e300, "", "x", "a" * 5000, "\u202e\x00", [], {}, [None], {"a": {"b": 1}},
)  # fmt: skip
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("damaged") / "llama")


def one_line(error: BaseException) -> None:
    assert isinstance(error, MoefyError)
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


def test_every_field_of_a_config_may_be_anything(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    refused = 0
    for key in config:
        for value in VALUES:
            (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                plan(Checkpoint.open_config(tmp_path), Recipe(), "none")
                head_sites(meta_model(read_config(Checkpoint.open_config(tmp_path))))
            except MoefyError as error:
                one_line(error)
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", DEEP.encode(), b'{"a": NaN}', b"9" * 5000],
)
def test_json_beside_a_model_may_be_anything(
    llama: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / name).write_bytes(content)
    try:
        convert_tiny("llama", folder, tmp_path / "out")
    except MoefyError as error:
        one_line(error)
        assert name in str(error) or folder.name in str(error)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", DEEP, '{"model": {"type": "BPE"}}', "\0"])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"])
def test_a_tokenizer_may_be_anything(llama: Path, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / name).write_text(content)
    try:
        load_tokenizer(tmp_path)
    except MoefyError as error:
        one_line(error)


def test_recipes_may_be_anything(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for content in (
        b"\xff\xfe", b"a: [", DEEP.encode(), b"!!python/object/apply:os.system [id]", b"density: .nan",
        b"router: {learning_rate: .inf}", b"router: {learning_rate: 1.0e+999}", b"- 1", b"density: 5",
        bomb.encode() + b"density: *i\n", b"density: 2026-01-01", b"{{a: 1}: 2}",
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            load(file)
        one_line(caught.value)
    for value in ("[", "'", "{{", "!!python/name:os.system", DEEP, ".nan"):
        with pytest.raises(RecipeError) as caught:
            override(Recipe(), {"density": value})
        one_line(caught.value)


def test_parts_of_an_unfinished_run_may_be_anything(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    (tmp_path / "layers").mkdir()
    for content in ("", "{", DEEP):
        (tmp_path / "layers" / "0.json").write_text(content)
        (tmp_path / "layers" / "0.safetensors").write_text(content)
        for read in (stages.read, stages.tensors):
            with pytest.raises(OutputError, match="--overwrite"):
                read("layers/0")


class Panic(BaseException):
    """As code in Rust panics."""


@pytest.mark.parametrize(
    "error", [Panic, RecursionError, MemoryError, KeyError, OSError, StopIteration]
)
def test_the_boundary_takes_whatever_a_library_raises(error: type[BaseException]) -> None:
    with pytest.raises(MoefyError, match="some/file: cannot be read"), reading("some/file"):
        raise error("two\nlines")
    for passing in (KeyboardInterrupt, SystemExit, OutputError):
        with pytest.raises(passing), reading("some/file"):
            raise passing("as it was")


def test_a_moefied_model_reads_nothing_that_it_was_not_given(llama: Path, tmp_path: Path) -> None:
    convert_tiny("llama", llama, tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text('{"max_length": "x", "_a": [[[')
    try:
        moefy.load(tmp_path / "out")
    except MoefyError as error:
        one_line(error)
