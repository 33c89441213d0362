"""What a pass says: the same as its whole logits in any family, and never all of them in memory.

Shapes: B documents, T positions, V vocabulary, J judged positions.
"""

import json
from typing import Any

import pytest
import torch
from tiny_conversion import RECIPE
from tiny_models import (
    FAMILIES_TINY,
    SEARCHED_TINY,
    example_inputs,
    random_model,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moefy
from moefy.benchmark.compare import Comparison
from moefy.data.corpus import IGNORED, Batch, Document, Sample
from moefy.evaluation import outputs
from moefy.evaluation.folder import evaluate as evaluate_folder
from moefy.evaluation.outputs import (
    ce_per_token,
    compared,
    distance,
    first_choices,
    kl_per_token,
    run_outputs,
)
from moefy.experts.passes import run
from moefy.experts.routed import say_once
from moefy.recipe import override
from moefy.training.recipe import RecoverRecipe, SparsifyRecipe

TEXT = [name for name in (*FAMILIES_TINY, *SEARCHED_TINY) if tiny_model(name).family != "vit"]
VOCABULARY = 9000
TOKENS = 60
"""Of every document, so that no batch has fewer."""
LIMIT = TOKENS * VOCABULARY
ROOM = override(RECIPE, {"context": 64})


def model_of(name: str, **changes: Any) -> Any:
    tiny = tiny_model(name)
    config = tiny.make_config()
    for key, value in changes.items():
        setattr(config, key, value)
    return random_model(tiny.auto, config)


def batch_of(name: str, model: Any) -> Batch:
    """Two documents of the family; a language model predicts the tokens after the first."""
    inputs = example_inputs(name)
    read = inputs.get("decoder_input_ids", inputs["input_ids"])
    targets = torch.cat([read[:, 1:], torch.full((2, 1), IGNORED)], 1)
    samples = [Sample(Document("d", str(i)), {}, None, 0) for i in range(2)]
    return Batch(samples, inputs, targets if model.can_generate() else None)


@pytest.mark.parametrize("name", TEXT)
def test_logits_of_chunks_are_those_of_the_whole_pass(name, monkeypatch):
    model = model_of(name).double()
    batch = batch_of(name, model)
    with torch.no_grad():
        result, said = run(model, batch), run_outputs(model, batch)
    assert (said.head is not None) == (model.get_output_embeddings() is not None)
    monkeypatch.setattr(outputs, "LOGITS_BYTES", 4 * said.size * 3)
    whole = getattr(result, "logits", result.get("last_hidden_state"))[said.keep_BT]
    parts = [said.logits(said.rows_JD[at]) for at in said.chunks()]
    assert [len(part) for part in parts[:-1]] == [3] * (len(parts) - 1)
    assert len(parts) > 2
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-10)
    assert float(distance(said, said)) == 0
    if batch.targets_BT is not None:
        target = batch.targets_BT[said.keep_BT]
        want = torch.nn.functional.cross_entropy(whole, target, reduction="none")
        torch.testing.assert_close(ce_per_token(said), want, rtol=1e-10, atol=1e-10)
        assert torch.equal(first_choices(said), whole.argmax(-1))


def test_gradients_of_chunks_are_those_of_the_whole_pass(monkeypatch):
    model = model_of("gemma2").double()
    batch = batch_of("gemma2", model)
    other = run_outputs(model_of("gemma2", final_logit_softcapping=5.0).double(), batch).detach()
    kl_per_token(other, run_outputs(model, batch)).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(outputs, "LOGITS_BYTES", 4 * 96 * 2)
    said = run_outputs(model, batch)
    assert len(said.chunks()) > 3
    kl_per_token(other, said).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-9, atol=1e-12)


def test_figures_of_two_models_are_those_of_their_whole_logits():
    first, second = model_of("llama"), model_of("llama", rms_norm_eps=0.5)
    batch = batch_of("llama", first)
    with torch.no_grad():
        found = compared(run_outputs(first, batch), run_outputs(second, batch))
        p, q = (run(m, batch).logits[batch.targets_BT != IGNORED].double() for m in (first, second))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    target = batch.targets_BT[batch.targets_BT != IGNORED][:, None]
    want = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "ce_dense": -log_p.gather(1, target)[:, 0],
        "ce": -log_q.gather(1, target)[:, 0],
    }
    assert want["kl"].min() > 1e-6
    for name, value in want.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-6)


def test_a_head_that_mixes_positions_is_left_to_make_all_logits():
    say_once.cache_clear()
    model = model_of("llama")
    batch = batch_of("llama", model)

    class Mixing(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x + x.mean(1, keepdim=True))

    model.lm_head.__class__ = Mixing
    with torch.no_grad(), pytest.warns(UserWarning, match="logits of single positions"):
        said = run_outputs(model, batch)
    assert said.head is None
    whole = run(model, batch).logits[batch.targets_BT != IGNORED]
    torch.testing.assert_close(said.rows_JD, whole)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor of floats had which an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.numbers = max(self.numbers, leaf.numel())
        return result


def texts(domains: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(3, VOCABULARY, (96, TOKENS + 1), generator=generator).tolist()
    return [
        {"domain": f"d{i % domains}", "source_id": str(i), "input_ids": ids}
        for i, ids in enumerate(drawn)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model whose vocabulary is its largest part, texts, and both forms of it."""
    path = tmp_path_factory.mktemp("vocabulary")
    model_of("llama", vocab_size=VOCABULARY).save_pretrained(path / "dense")
    lines = "\n".join(json.dumps(row) for row in texts())
    (path / "corpus.jsonl").write_text(lines)
    moefy.convert(
        path / "dense", path / "moefied", recipe=ROOM, corpus=path / "corpus.jsonl", quiet=True
    )
    return path


def convert(path, out, **options):
    settings = {"distil.steps": 2, "distil.tokens": 100, "budget.name": "greedy"}
    recipe = override(ROOM, settings if not options else {"budget.name": "greedy"})
    moefy.convert(
        path / "dense", out, recipe=recipe, corpus=path / "corpus.jsonl", quiet=True, **options
    )


def compare(path, out):
    bench = Comparison(path / "dense", out, corpus=path / "corpus.jsonl", documents=6)
    bench.run(ROOM)


TRAINING = {"tokens": 120, "batch_tokens": 120, "context": 64}
VERBS = {
    "convert": convert,
    "convert --stream": lambda path, out: convert(path, out, stream=True),
    "eval": lambda path, out: evaluate_folder(
        path / "moefied", corpus=path / "corpus.jsonl", documents=4, quiet=True
    ),
    "compare": compare,
    "diff": lambda path, out: moefy.diff(
        path / "dense", path / "moefied", corpora=path / "corpus.jsonl", tokens=200, quiet=True
    ),
    "inspect": lambda path, out: moefy.inspect(
        path / "moefied", corpora=path / "corpus.jsonl", tokens=400, causal_tokens=100,
        skip=["controls"], quiet=True,
    ),
    "prune": lambda path, out: moefy.prune(
        path / "moefied", out, forget="d0", share=0.1, corpus=path / "corpus.jsonl", tokens=200,
        quiet=True,
    ),
    "recover": lambda path, out: moefy.recover(
        path / "moefied", out, recipe=RecoverRecipe(**TRAINING), corpus=path / "corpus.jsonl",
        quiet=True,
    ),
    "sparsify": lambda path, out: moefy.sparsify(
        path / "dense", out, recipe=SparsifyRecipe(**TRAINING), corpus=path / "corpus.jsonl",
        quiet=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_holds_the_logits_of_a_document(verb, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "LOGITS_BYTES", 4 * VOCABULARY * 4)
    with Largest() as largest:
        VERBS[verb](folder, tmp_path / "out")
    assert VOCABULARY <= largest.numbers < LIMIT
