"""Every kind of head is converted, verified and judged by what its class puts out.

The reference runs the stock model and the moefied one document by document, without padding, and works the
figures out in fp64 from the tensors by their names.

Shapes: T tokens, C labels.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_conversion import RECIPE, convert_tiny, corpus_for
from tiny_models import FAMILIES_TINY, SEARCHED_TINY, random_model
from torch import Tensor

import moefy
from moefy.conversion import convert as conversion
from moefy.conversion.plan import describe, plan
from moefy.data.corpus import load_corpus
from moefy.data.shards import by_role
from moefy.errors import MoefyError, UnsupportedModel
from moefy.models.checkpoint import Checkpoint

Case = tuple[str, str, dict[str, Any], str]
_PAD = {"pad_token_id": 91}  # no document has it, and it is not the 0 that fills up other ids
CASES: dict[str, Case] = {
    "llama labels": ("llama", "LlamaForSequenceClassification", _PAD | {"num_labels": 3}, "labels"),
    "gpt2 labels": ("gpt2", "GPT2ForSequenceClassification", _PAD | {"num_labels": 3}, "labels"),
    "bert labels": ("bert", "BertForSequenceClassification", {"num_labels": 3}, "labels"),
    "bert several labels": (
        "bert",
        "BertForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        "several",
    ),
    "bert values": ("bert", "BertForSequenceClassification", {"num_labels": 1}, "values"),
    "llama values": (
        "llama",
        "LlamaForSequenceClassification",
        _PAD | {"num_labels": 2, "problem_type": "regression"},
        "values",
    ),
    "llama tokens": ("llama", "LlamaForTokenClassification", {"num_labels": 5}, "token labels"),
    "bert tokens": ("bert", "BertForTokenClassification", {"num_labels": 5}, "token labels"),
    "t5 tokens": ("t5", "T5ForTokenClassification", {"num_labels": 5}, "token labels"),
    "electra replaced": ("electra", "ElectraForPreTraining", {}, "replaced"),
    "llama spans": ("llama", "LlamaForQuestionAnswering", {}, "spans"),
    "bert spans": ("bert", "BertForQuestionAnswering", {}, "spans"),
    "electra labels": ("electra", "ElectraForSequenceClassification", {"num_labels": 3}, "labels"),
    "electra states": ("electra", "ElectraModel", {}, "states"),
    "electra masked": ("electra", "ElectraForMaskedLM", {}, "masked"),
    "bert pretraining": ("bert", "BertForPreTraining", {}, "masked"),
    "mistral states": ("mistral", "MistralModel", {}, "states"),
    "gpt2 states": ("gpt2", "GPT2Model", {}, "states"),
    "t5 encoder": ("t5", "T5EncoderModel", {}, "states"),
    "t5 states": ("t5", "T5Model", {}, "states"),
    "wide llama states": ("llama", "LlamaModel", {"hidden_size": 96}, "states"),
    "bert states": ("bert", "BertModel", {}, "states"),
}


def make(case: Case, folder: Path) -> Path:
    family, name, settings, _ = case
    tiny = (FAMILIES_TINY | SEARCHED_TINY)[family]
    config = getattr(transformers, tiny.config)(**(tiny.settings | settings))
    random_model(getattr(transformers, name), config).save_pretrained(folder)
    return folder


def log_p(logits: Tensor, form: str) -> Tensor:
    """Log-probabilities of one document, of independent distributions in rows."""
    if form in ("several", "replaced"):
        logits = torch.stack([torch.zeros_like(logits), logits], -1)
    return logits.double().log_softmax(-1)


def shown(model: Any, ids: list[int], two: bool) -> Any:
    ids_1T = torch.tensor([ids])
    if two:  # an encoder reads the first half, a decoder the second behind the start token
        half = ids_1T.shape[1] // 2
        decoder_1T = torch.cat([torch.zeros(1, 1, dtype=torch.int64), ids_1T[:, half:-1]], 1)
        return model(input_ids=ids_1T[:, :half], decoder_input_ids=decoder_1T)
    return model(input_ids=ids_1T, output_hidden_states=True)


@torch.no_grad()
def reference(dense: Any, sparse: Any, documents: list[list[int]], form: str) -> dict[str, float]:
    """Means over judged positions of all documents."""
    rows: dict[str, list[Tensor]] = {}
    for ids in documents:
        p, q = (shown(m, ids, type(dense).__name__ == "T5Model") for m in (dense, sparse))
        if form in ("states", "masked"):
            a, b = (
                (o.last_hidden_state if "last_hidden_state" in o else o.hidden_states[-1])[0]
                for o in (p, q)
            )
            new = {"cosine": torch.cosine_similarity(a.double(), b.double(), dim=-1)}
        elif form == "values":
            new = {"mse": (p.logits.double() - q.logits.double()).square().mean(-1)}
        else:
            if form == "spans":
                tensors = [torch.cat([o.start_logits, o.end_logits]) for o in (p, q)]
            else:
                tensors = [o.logits[0] for o in (p, q)]
            a, b = (log_p(t, form) for t in tensors)
            new = {"kl": (a.exp() * (a - b)).sum(-1), "agreement": a.argmax(-1) == b.argmax(-1)}
        for name, value in new.items():
            rows.setdefault(name, []).append(value.double().reshape(-1))
    return {name: float(torch.cat(parts).mean()) for name, parts in rows.items()}


def evaluated() -> list[list[int]]:
    """The documents that nothing is fitted on."""
    corpus = by_role(load_corpus(corpus_for("llama")), RECIPE.seed)["evaluation"]
    return [list(document.ids) for document in corpus.documents]


@pytest.mark.parametrize("name", CASES)
def test_a_head_is_judged_by_its_own_output(name, tmp_path):
    case = CASES[name]
    form = case[3]
    source, out = make(case, tmp_path / "source"), tmp_path / "out"
    record = convert_tiny("llama", source, out)
    assert record["conversion"]["all_experts_relative_error"] < 1e-5
    dense, sparse = getattr(transformers, case[1]).from_pretrained(source), moefy.load(out)
    assert sparse.moefy.kind == ("encoder-decoder" if case[1] == "T5Model" else "encoder")
    want = reference(dense, sparse, evaluated(), form)
    assert want.get("kl", want.get("mse", 1 - want.get("cosine", 1.0))) > 1e-6
    again = moefy.evaluate(out, corpus=corpus_for("llama"), quiet=True)
    for total in (record["evaluation"]["total"], again["total"]):
        for figure, value in want.items():
            # fp32 outputs of two passes that differ in their padding.
            assert total[figure]["mean"] == pytest.approx(value, rel=1e-3, abs=1e-6), figure
        judged = {"kl", "agreement", "cosine", "mse", "ce", "bits_per_byte", "ce_bigram"}
        assert judged & {*total} == {*want}


UP = ("up_proj.weight", "intermediate.dense.weight", "c_fc.weight", "wi.weight")
SOME = ["llama labels", "bert values", "bert tokens", "bert spans", "gpt2 states", "t5 encoder"]


@pytest.mark.parametrize("name", SOME)
def test_another_model_than_the_source_is_found(name, tmp_path, monkeypatch):
    write = conversion._write

    def wrong(task, artefact):
        write(task, artefact)
        (file,) = task.finished.glob("model*.safetensors")
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith(UP))
        tensors[key] = tensors[key].flip(-1)
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(conversion, "_write", wrong)
    with pytest.raises(MoefyError, match="verification failed"):
        convert_tiny("llama", make(CASES[name], tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama labels", "bert tokens", "bert spans", "bert values"])
def test_every_verb_that_runs_a_model_takes_a_head(name, tmp_path):
    """Streamed, tuned by its own output, compared."""
    source = make(CASES[name], tmp_path / "source")
    tuned = {"budget.name": "greedy", "distil.steps": 2, "distil.tokens": 128}
    made = convert_tiny("llama", source, tmp_path / "tuned", settings=tuned)
    assert made["conversion"]["tuning"]
    streamed = convert_tiny("llama", source, tmp_path / "streamed", stream=True)["evaluation"]
    again = moefy.evaluate(tmp_path / "streamed", corpus=corpus_for("llama"), quiet=True)
    for figure in {"kl", "mse"} & {*again["total"]}:
        mean = again["total"][figure]["mean"]
        assert streamed["total"][figure]["mean"] == pytest.approx(mean, rel=1e-3)


REFUSED = {
    "BertForMultipleChoice": ("bert", {}, "BertForMultipleChoice: .*BertModel"),
    "BartForSequenceClassification": ("bart", {}, "BartForSequenceClassification: .*BartModel"),
    "LlamaForSequenceClassification": ("llama", {"pad_token_id": None}, "pad_token_id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_judged_is_refused_in_the_plan(name, tmp_path):
    family, settings, words = REFUSED[name]
    source = make((family, name, settings, ""), tmp_path / "source")
    with pytest.raises(UnsupportedModel, match=words):
        plan(Checkpoint.open(source), RECIPE, "corpus")


def test_the_plan_says_by_what_a_model_is_judged(tmp_path):
    source = make(CASES["bert spans"], tmp_path / "source")
    todo = plan(Checkpoint.open(source), RECIPE, "corpus")
    assert todo.answer.form == "spans"
    assert "judged by where the answer starts and ends" in describe(todo, RECIPE)
