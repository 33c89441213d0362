"""What a model folder says about its own inputs is what its inputs are made by."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_models import build
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from moefy.cli.verbs import app
from moefy.data.corpus import load_corpus
from moefy.data.inputs import load_tokenizer, read_batches
from moefy.errors import CheckpointError, CorpusError
from moefy.models.checkpoint import Checkpoint

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 24,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "pad", "limit"),
    [
        ("Roberta", 1, 22), ("Roberta", 5, 18), ("Roberta", 0, 23), ("XLMRoberta", 1, 22),
        ("Camembert", 3, 20), ("MPNet", 1, 22), ("RobertaPreLayerNorm", 1, 22), ("Bert", 0, 24),
        ("Electra", 0, 24),
    ],
)  # fmt: skip
def test_documents_are_as_long_as_the_table_of_positions(tmp_path, name, pad, limit):
    config = getattr(transformers, f"{name}Config")(**SMALL, pad_token_id=pad)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(tmp_path)
    corpus = load_corpus([list(range(10, 90))])
    (batch,) = read_batches(Checkpoint.open(tmp_path), "encoder", corpus, 512)
    assert batch.inputs["input_ids"].shape == (1, limit)
    model(**batch.inputs)
    longer = torch.arange(10, 10 + limit + 1).view(1, -1)
    with pytest.raises((IndexError, RuntimeError)):
        model(longer, attention_mask=torch.ones_like(longer))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return build("vit", tmp_path_factory.mktemp("inputs") / "vit")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(20, 30), (16, 16), (64, 5)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def processor_of(folder: Path, size: int = 16):
    made = transformers.ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    made.save_pretrained(folder)
    return made


def test_pictures_go_through_the_folders_own_processor(vit, pictures, tmp_path):
    source = Path(shutil.copytree(vit, tmp_path / "vit"))
    processor = processor_of(source)
    (batch,) = read_batches(Checkpoint.open(source), "image", load_corpus(pictures), 512)
    got = {s.document.source_id: s.inputs["pixel_values"] for s in batch.samples}
    for name, pixels in got.items():
        want = processor(images=Image.open(pictures / name), return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(pixels, want, atol=1e-6)
    # What is pixel_values already stays as it is.
    given = torch.randn(3, 16, 16)
    (batch,) = read_batches(Checkpoint.open(source), "image", load_corpus([given]), 512)
    assert torch.equal(batch.inputs["pixel_values"][0], given)


def test_pictures_without_a_processor(vit, pictures):
    with pytest.raises(
        CorpusError, match=r"images of 3x16x16, .* takes 3x16x16; .*preprocessor_config"
    ):
        read_batches(Checkpoint.open(vit), "image", load_corpus(pictures), 512)
    (batch,) = read_batches(Checkpoint.open(vit), "image", load_corpus(pictures / "1.png"), 512)
    want = np.asarray(Image.open(pictures / "1.png")).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(batch.inputs["pixel_values"][0], want, atol=1e-6)


def test_images_that_the_model_does_not_take(vit, pictures, tmp_path):
    for image in (torch.zeros(3, 8, 8), torch.zeros(1, 16, 16)):
        with pytest.raises(CorpusError, match="the model takes 3x16x16"):
            read_batches(Checkpoint.open(vit), "image", load_corpus([image]), 512)
    source = Path(shutil.copytree(vit, tmp_path / "vit"))
    processor_of(source, 8)
    with pytest.raises(CorpusError, match="images of 3x8x8, the model takes 3x16x16"):
        read_batches(Checkpoint.open(source), "image", load_corpus(pictures), 512)
    for damaged in (
        "{",
        '{"image_processor_type": "NoSuch"}',
        "version https://git-lfs.github.com/",
    ):
        (source / "preprocessor_config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: (cannot be|is a)"):
            read_batches(Checkpoint.open(source), "image", load_corpus(pictures), 512)


@pytest.fixture
def llama(tmp_path):
    return build("llama", tmp_path / "llama")


def words(count: int) -> Tokenizer:
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.json": POINTER}, r"tokenizer\.json: is a git-lfs pointer, .* git lfs pull"),
        ({"tokenizer.model": POINTER}, r"tokenizer\.model: is a git-lfs pointer"),
        ({"tokenizer.model": b"x"}, "pip install sentencepiece protobuf, or .* tokenizer.json"),
        (
            {
                "tokenizer.model": b"x",
                "tokenizer_config.json": b'{"tokenizer_class": "LLaMATokenizer"}',
            },
            r"tokenizer\.model: .* pip install sentencepiece",
        ),
        ({"spiece.model": b"x"}, "pip install sentencepiece"),
        (
            {"tokenizer.json": b"{"},
            r"tokenizer\.json: cannot be read .* download the tokenizer again",
        ),
        ({"tokenizer.json": b"{}"}, "cannot be read .* download the tokenizer again"),
        (
            {"tokenizer_config.json": b'{"tokenizer_class": 3}', "tokenizer.json": b"{}"},
            "cannot be read",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(llama, files, expected):
    for name, content in files.items():
        (llama / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_tokenizer(llama)
    assert "\n" not in str(caught.value) and "tiktoken" not in str(caught.value)
    # Token ids need none.
    assert read_batches(Checkpoint.open(llama), "decoder", load_corpus([[1, 2, 3]]), 16)


def test_an_old_class_of_tokenizers_with_its_json_is_read(llama):
    words(96).save(str(llama / "tokenizer.json"))
    settings = {"tokenizer_class": "LLaMATokenizer"}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(llama)("w3 w4")["input_ids"][-2:] == [3, 4]


def test_a_tokenizer_larger_than_the_model(llama):
    words(120).save(str(llama / "tokenizer.json"))
    checkpoint = Checkpoint.open(llama)
    assert read_batches(checkpoint, "decoder", load_corpus(["w3 w95"]), 16)
    expected = (
        "tokenizer has 120 tokens and gave 110, the model knows 96; .* resize_token_embeddings"
    )
    with pytest.raises(CorpusError, match=expected):
        read_batches(checkpoint, "decoder", load_corpus(["w3 w110"]), 16)
    with pytest.raises(CorpusError, match="token id 110, the model knows 96; tokenize with"):
        read_batches(checkpoint, "decoder", load_corpus([[3, 110]]), 16)


def dry_run(source: Path, corpus: Path) -> Any:
    words = ["convert", str(source), "out", "--dry-run", "--corpus", str(corpus)]
    return CliRunner().invoke(app, words)


@pytest.mark.parametrize("content", [POINTER, b"{", b"{}"])
def test_a_plan_reads_the_tokenizer_where_texts_need_it(llama, tmp_path, content):
    (llama / "tokenizer.json").write_bytes(content)
    (tmp_path / "text.txt").write_text("w3 w4 w5")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}')
    said = dry_run(llama, tmp_path / "text.txt")
    assert said.exit_code == 1
    assert said.stderr.startswith("moefy: ") and "tokenizer.json: " in said.stderr
    assert said.stderr.count("\n") == 1
    assert dry_run(llama, tmp_path / "ids.jsonl").exit_code == 0


def test_a_plan_tells_of_a_tokenizer_larger_than_the_model(llama, tmp_path):
    words(120).save(str(llama / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w3 w4 w5")
    said = dry_run(llama, tmp_path / "text.txt")
    assert said.exit_code == 0
    assert "the tokenizer has 120 tokens, the model knows 96" in said.stdout.replace("\n", " ")
    (tmp_path / "text.txt").write_text("w3 w110 w5")
    said = dry_run(llama, tmp_path / "text.txt")
    assert said.exit_code == 1 and "gave 110, the model knows 96" in said.stderr


def test_a_plan_does_without_a_tokenizer_and_without_images(llama, vit, tmp_path):
    (tmp_path / "text.txt").write_text("w3 w4 w5")
    for source, words_ in ((llama, "has no tokenizer"), (vit, "give --corpus")):
        said = dry_run(source, tmp_path / "text.txt")
        assert said.exit_code == 0 and words_ in said.stdout.replace("\n", " ")
