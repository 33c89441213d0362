"""What a moefied model carries beside its modules, and the one way to open a model."""

import copy

import pytest
import torch
from moefied_models import inputs_for

import moefy
from moefy.errors import CheckpointError, MoefyError
from moefy.experts.loading import load_dense, open_model
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.models.checkpoint import Checkpoint


def test_a_model_without_experts_is_refused_in_one_line(made):
    dense = load_dense(Checkpoint.open(made("demo_llama")))
    with pytest.raises(MoefyError) as error:
        of(dense)
    assert str(error.value) == ("LlamaForCausalLM: has no experts; give what moefy.load returns")


def test_a_copy_of_a_model_has_its_own(made):
    model = moefy.load(made("demo_llama"))
    again = copy.deepcopy(model)
    assert of(again).artefact == of(model).artefact and of(again).sites == of(model).sites
    assert list(of(again).mlps.values()) == list(sparse_mlps(again).values())
    assert of(again).mlps[0] is not of(model).mlps[0]


def test_a_copy_of_a_model_fills_a_context_of_its_own(made):
    model = moefy.load(made("demo_llama"))
    again = copy.deepcopy(model)
    again(**inputs_for("demo_llama"))
    contexts = {id(module.context) for module in sparse_mlps(again).values()}
    assert len(contexts) == 1
    first = next(iter(sparse_mlps(model).values())).context
    assert id(first) not in contexts and first.previous_TD is None
    assert next(iter(sparse_mlps(again).values())).context.previous_TD is not None


def test_what_opens_is_moefied_or_dense_as_the_folder_says(made, tmp_path):
    folder = made("demo_llama")
    sparse = open_model(folder, dtype=torch.float64)
    assert of(sparse).checkpoint.folder == folder and sparse.dtype == torch.float64
    assert open_model(sparse) is sparse and not sparse_mlps(open_model(folder, dense=True))
    sparse.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "moefy.json").unlink()
    assert not sparse_mlps(open_model(tmp_path / "again"))
    with pytest.raises(CheckpointError, match="not a moefied model, convert it first"):
        open_model(tmp_path / "again", dense=False)
