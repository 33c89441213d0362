"""Models that people have in memory, and what they do with the result."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_conversion import corpus_for
from tiny_models import build

import moefy
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import all_experts


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("in-memory") / "llama")


SMALL = {"partition.expert_size": 4, "partition.tokens": 256, "router.tokens": 512}


def convert(source, out):
    recipe = moefy.recipe.override(moefy.recipe.load("fast"), SMALL)
    moefy.convert(source, out, recipe=recipe, corpus=corpus_for("llama"), quiet=True)
    return moefy.load(out)


def test_a_generation_config_that_transformers_would_not_save(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.generation_config.temperature = 0.3  # without do_sample: not strictly valid
    model.generation_config.top_p = 0.2
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "stock")
    before = model.generation_config.to_dict()
    made = convert(model, tmp_path / "out")
    assert model.generation_config.to_dict() == before
    assert made.generation_config.temperature == 0.3 and made.generation_config.top_p == 0.2


def test_float64(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).double()
    made = convert(model, tmp_path / "out")
    x = torch.tensor([corpus_for("llama")[0][:12]])
    made = moefy.load(tmp_path / "out", dtype=torch.float64)
    want = model.eval()(x).logits
    with all_experts(made):
        assert made(x).logits.dtype == torch.float64
        assert torch.allclose(made(x).logits, want, rtol=1e-9, atol=1e-9)


READ = """
import sys, torch
model, want = torch.load(sys.argv[1], weights_only=False)
x = torch.arange(3, 15).view(1, -1)
assert torch.equal(model(x).logits, want)
model.save_pretrained(sys.argv[2])
with model.experts(ablate=[(0, 0)], mode="zero"):
    assert not torch.equal(model(x).logits, want)
"""


def test_a_moefied_model_is_copied_and_pickled(llama, tmp_path):
    model = convert(llama, tmp_path / "out")
    x = torch.arange(3, 15).view(1, -1)
    want = model(x).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x).logits, want)
        assert of(twin) is not of(model) and of(twin).mlps[0] is not of(model).mlps[0]
        for name in ("experts", "hooks", "run_with_cache", "run_with_hooks", "save_pretrained"):
            method = getattr(twin, name)
            assert method.__name__ == name and method.__doc__ == getattr(model, name).__doc__
        # What is done to the copy is done to the copy alone.
        with all_experts(twin):
            assert not torch.equal(twin(x).logits, want) and torch.equal(model(x).logits, want)
    torch.save((model, want), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "model.pt"), str(tmp_path / "saved")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert torch.equal(moefy.load(tmp_path / "saved")(x).logits, want)
