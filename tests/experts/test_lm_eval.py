"""lm-eval runs a moefied model as it runs any transformers model: a task of the test's own, offline."""

import json
from importlib.resources import files

import lm_eval
import pytest

import moefy
from moefy.conversion.convert import convert
from moefy.data.corpus import load_corpus
from moefy.experts.loading import load_dense
from moefy.experts.sparse_mlp import all_experts
from moefy.models.checkpoint import Checkpoint
from moefy.recipe import override

TASK = """
task: next_line
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo model in experts that nothing was fitted for, and a multiple-choice task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    documents = load_corpus().take(60).documents
    recipe = moefy.Recipe(density=0.25)
    settings = {
        "context": 64, "partition.method": "contiguous", "router.name": "centroid",
        "partition.tokens": 256, "router.tokens": 256,
    }  # fmt: skip
    convert(
        files("moefy") / "demo" / "llama", folder / "out",
        recipe=override(recipe, settings), corpus=[d.text[:200] for d in documents],
        quiet=True,
    )  # fmt: skip
    rows = []
    for index, doc in enumerate(documents[:24]):
        # The true continuation among those of other documents, of unlike lengths.
        wrong = [documents[(index + step) % 24].text[80 : 90 + 10 * step] for step in (5, 11, 17)]
        choices = [*wrong[: index % 4], doc.text[80:130], *wrong[index % 4 :]]
        rows.append({"question": doc.text[:80], "choices": choices, "answer": index % 4})
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "next_line.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture
def score(folder, monkeypatch, tmp_path):
    """Log-likelihoods of every choice of every question, and the scores of a model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def run(model):
        result = lm_eval.simple_evaluate(
            HFLM(pretrained=model, batch_size=4),
            tasks=["next_line"],
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        samples = sorted(result["samples"]["next_line"], key=lambda sample: sample["doc_id"])
        likelihoods = [[float(r[0]) for r in sample["filtered_resps"]] for sample in samples]
        return likelihoods, result["results"]["next_line"]

    return run


def test_lm_eval_scores_a_moefied_model(folder, score):
    stock, stock_scores = score(load_dense(Checkpoint.open(folder / "out"), dtype="float32"))
    model = moefy.load(folder / "out", dtype="float32")
    with all_experts(model):
        whole, whole_scores = score(model)
    sparse, sparse_scores = score(model)
    assert len(stock) == 24
    assert all(len(choices) == 4 for choices in stock)
    for ours, theirs, other in zip(whole, stock, sparse, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert other != pytest.approx(theirs, rel=1e-2)
    for name in ("acc,none", "acc_norm,none"):
        assert whole_scores[name] == stock_scores[name]
        assert 0 <= sparse_scores[name] <= 1
    assert stock_scores["acc_norm,none"] > 0.25
