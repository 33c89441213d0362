"""The whole of `moefy inspect` on a few thousand tokens of a demo model, as a user would call it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import build
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moefy
from moefy import Recipe
from moefy.cli.verbs import app
from moefy.data.corpus import load_corpus
from moefy.data.shards import HELD_OUT, SELECT, split_shards
from moefy.errors import CheckpointError, CorpusError, MoefyError, UnsupportedModel
from moefy.inspection.account.prompt import prompt_record
from moefy.inspection.record import FILE, Inspection, rows
from moefy.inspection.texts import read

DEMO = Path(__file__).parents[2] / "moefy" / "demo"
RECIPE = Recipe.named(
    "random",
    {
        "partition.method": "contribution",
        "partition.expert_size": 128,
        "router.name": "mlp",
        "router.epochs": 1,
        "router.tokens": 2048,
        "partition.tokens": 512,
    },
    density=0.5,
)
PROMPT = "The <b>cat</b> \U0001f642 sat"


@pytest.fixture(scope="module")
def text():
    """Twelve documents of every domain: a tenth of the bundled corpus."""
    return load_corpus().take(132)


@pytest.fixture(scope="module")
def moefied(text, tmp_path_factory):
    """The demo, stored in fp32: in which it then runs on every machine."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("moefied") / "out"
    AutoModelForCausalLM.from_pretrained(DEMO / "llama", dtype=torch.float32).save_pretrained(
        source
    )
    AutoTokenizer.from_pretrained(DEMO / "llama").save_pretrained(source)
    moefy.convert(source, out, recipe=RECIPE, corpus=text, quiet=True)
    return out


@pytest.fixture(scope="module")
def settings(text):
    """Of the run that is looked at, and of the one that takes it up."""
    return {"corpora": text, "tokens": 6000, "skip": ["controls", "causal"], "quiet": True}


@pytest.fixture(scope="module")
def found(moefied, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("inspected")
    return moefy.inspect(moefied, out=out, prompts=[PROMPT], **settings), out


def test_all_descriptive_tables_are_there_and_cover_every_expert(found):
    inspection, _ = found
    keys = [(layer, expert) for layer in range(6) for expert in range(8)]
    experts = inspection.table("experts")
    assert list(zip(experts["layer"], experts["expert"], strict=True)) == keys
    assert inspection.table("layers")["layer"] == list(range(6))
    for name in ("domains", "tokens", "examples", "logits", "enrichment", "documents", "energy"):
        assert rows(inspection.table(name)), name


def test_loads_sum_to_the_active_experts_and_shares_to_one(found):
    inspection, _ = found
    frame = inspection.to_frame("experts").groupby("layer")
    np.testing.assert_allclose(frame["load"].sum(), 4.0, rtol=1e-4)
    np.testing.assert_allclose(frame["share"].sum(), 1.0, rtol=1e-4)
    np.testing.assert_allclose(frame["energy"].sum(), 1.0, rtol=1e-4)


def test_an_expert_has_its_own_rows_alone(found):
    inspection, _ = found
    mine = inspection.expert(2, 5)
    assert {(row["layer"], row["expert"]) for row in mine["domains"]} == {(2, 5)}
    assert len(mine["domains"]) == len(inspection.domains)
    with pytest.raises(MoefyError, match="experts 0 to 7"):
        inspection.expert(2, 8)


def test_page_one_says_how_good_the_model_is(found):
    inspection, _ = found
    page = inspection.honesty
    assert page["ce"]["value"] - page["ce_dense"]["value"] == pytest.approx(
        page["ce_increase"]["value"], rel=1e-6
    )
    assert page["perfect"]["value"] < 1e-3
    assert 0 < page["bigram_skill"]["value"] < 1
    assert "not measured" in page["stability"]["what"]


def test_the_select_and_the_held_out_shard_share_no_document(found):
    documents = found[0].to_frame("documents")
    select = set(documents[documents["shard"] == SELECT]["sha256"])
    held_out = set(documents[documents["shard"] == HELD_OUT]["sha256"])
    assert select and held_out and not select & held_out


def test_nothing_was_seen_by_partition_or_router(moefied, text):
    shards = split_shards(text, RECIPE.seed)
    fitted = {doc.sha256 for name in ("partition", "router") for doc in shards[name].documents}
    reading = read(moefy.load(moefied, dtype=torch.float32), text, tokens=3000)
    assert not fitted & {doc.sha256 for doc in reading.documents.documents}


def test_the_text_of_every_example_is_where_the_token_says(found):
    inspection, _ = found
    some = rows(inspection.table("examples"))[
        :: max(1, len(inspection.table("examples")["layer"]) // 50)
    ]
    for row in some:
        text = inspection.texts[str(row["document"])]
        assert 0 <= row["position"] < len(text["ends"])
        assert text["ends"] == sorted(text["ends"]) and text["ends"][-1] <= len(text["text"])


@pytest.fixture(params=["float32", "bfloat16"])
def prompt(request, found, moefied):
    """What is said of a prompt, by the run and by the same model in bf16."""
    if request.param == "float32":
        return found[0].prompts[0]
    model = moefy.load(moefied, dtype=torch.bfloat16)
    return prompt_record(model, AutoTokenizer.from_pretrained(moefied), PROMPT)


def test_a_prompt_is_accounted_for_token_by_token(prompt):
    assert prompt["text"] == PROMPT and prompt["accounted"]
    assert prompt["largest_gap"] <= prompt["tolerance"] <= 0.05
    for layer in prompt["layers"]:
        np.testing.assert_allclose(np.sum(layer["share"], axis=1), 1.0, atol=1e-4)
    account = prompt["account"]
    parts = ("embedding", "attention", "experts", "bias", "error", "constant")
    total = np.sum([account[name] for name in parts], axis=0)
    # What the dtype of the model leaves, and the six digits of every term.
    most = max(np.abs(account[name]).max() for name in (*parts, "logit"))
    gap = prompt["tolerance"] * np.abs(account["logit"]).max() + 1e-5 * most
    np.testing.assert_allclose(total, account["logit"], rtol=0, atol=gap)


def test_what_was_saved_is_read_again(found, tmp_path):
    inspection, out = found
    again = Inspection.load(out)
    assert again.to_dict() == json.loads(json.dumps(inspection.to_dict()))
    assert (out / "report.html").stat().st_size > 100_000
    (tmp_path / FILE).write_text((out / FILE).read_text()[:1000])
    with pytest.raises(CheckpointError, match="inspect again"):
        Inspection.load(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="no inspection"):
        Inspection.load(tmp_path / FILE)


def test_a_run_takes_up_what_is_finished(found, moefied, settings, monkeypatch):
    _, out = found
    monkeypatch.setattr(
        "moefy.inspection.inspect.describe", lambda *_, **__: pytest.fail("done before")
    )
    again = moefy.inspect(moefied, out=out, **settings)
    assert again.tables["experts"] == found[0].tables["experts"]
    assert again.prompts == []


def test_an_encoder_is_inspected_where_a_metric_means_something(tmp_path):
    out = _tiny("bert", tmp_path)
    found = moefy.inspect(out, corpora=_ids(), skip=["controls", "causal"], quiet=True)
    assert "logits" not in found.tables and "energy" in found.tables
    assert "cosine" in found.honesty and "ce" not in found.honesty


def _tiny(family, folder):
    source = build(family, folder / family)
    recipe = Recipe.named("random", {"partition.experts": 4})
    moefy.convert(source, folder / "out", recipe=recipe, corpus=_ids(), quiet=True)
    return folder / "out"


def _ids():
    random = np.random.default_rng(0)
    return [random.integers(5, 60, 30).tolist() for _ in range(60)]


def test_the_verb_prints_page_one_and_bad_input_says_what_to_do(moefied, text, tmp_path):
    run, file = CliRunner().invoke, tmp_path / "text.jsonl"
    given = [{"text": doc.text, "domain": doc.domain} for doc in text.take(44).documents]
    file.write_text("\n".join(map(json.dumps, given)))
    skipped = ["--skip", "controls", "--skip", "causal", "-q"]
    few = ["--corpus", str(file), "--tokens", "1000"]
    shown = run(app, ["inspect", str(moefied), *few, *skipped])
    assert shown.exit_code == 0, shown.output
    assert "before you believe the rest" in shown.stdout and "bigram skill" in shown.stdout
    wrong = run(app, ["inspect", str(moefied), "--skip", "contrls"])
    assert wrong.exit_code == 1 and "controls" in wrong.stderr
    mode = run(app, ["inspect", str(moefied), "--mode", "men"])
    assert mode.exit_code == 1 and "did you mean 'mean'" in mode.stderr
    none = run(app, ["inspect", str(moefied), "--tokens", "0"])
    assert none.exit_code == 1 and "at least 1" in none.stderr
    nowhere = run(app, ["inspect", str(tmp_path / "nothing")])
    assert nowhere.exit_code == 1 and len(nowhere.stderr.strip().splitlines()) == 1


def test_what_cannot_be_inspected_is_refused(moefied, tmp_path):
    with pytest.raises(MoefyError, match="has no experts"):
        moefy.inspect(AutoModelForCausalLM.from_pretrained(DEMO / "llama"))
    one = tmp_path / "one.txt"
    one.write_text("only one document")
    with pytest.raises(CorpusError, match="two disjoint"):
        moefy.inspect(moefied, corpora=one, quiet=True)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        moefy.inspect(_tiny("t5", tmp_path), corpora=_ids(), quiet=True)
