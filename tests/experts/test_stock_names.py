"""What goes by the stock names of a model finds its MLPs, or an error."""

import copy
import pickle

import peft
import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs
from transformers import Trainer, TrainingArguments

import moefy
from moefy.errors import MoefyError
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.experts.stock_names import InExperts


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    place = tmp_path_factory.mktemp("names")
    convert_tiny("llama", build("llama", place / "source"), place / "out")
    return place / "out"


def trainer(model, folder, **options):
    ids = torch.randint(3, 90, (8, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    settings = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, save_strategy="steps",
        eval_strategy="steps", save_steps=2, eval_steps=2, report_to=[], disable_tqdm=True,
        use_cpu=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=data, eval_dataset=data)


def test_the_best_model_of_a_run_is_handed_back_whole(out, tmp_path):
    # The loss explodes: the first check is the best one.
    model = moefy.load(out)
    run = trainer(model, tmp_path, learning_rate=0.5, max_steps=4, load_best_model_at_end=True)
    run.train()
    best = moefy.load(run.state.best_model_checkpoint)
    assert not run.state.best_model_checkpoint.endswith("-4")
    assert all(torch.equal(v, best.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_run_that_is_taken_up_ends_as_one_that_was_not(out, tmp_path):
    whole, first, second = (moefy.load(out) for _ in range(3))
    trainer(whole, tmp_path / "a", learning_rate=1e-2, max_steps=4).train()
    trainer(first, tmp_path / "b", learning_rate=1e-2, max_steps=2).train()
    run = trainer(second, tmp_path / "b", learning_rate=1e-2, max_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert all(torch.equal(v, second.state_dict()[n]) for n, v in whole.state_dict().items())
    assert not torch.equal(sparse_mlps(whole)[0].up_ND, sparse_mlps(first)[0].up_ND)


def test_stock_tensors_that_do_not_say_all_are_refused(out):
    model, stock = moefy.load(out), moefy.open_model(out, dense=True).state_dict()
    model.load_state_dict(stock)
    part = {n: v for n, v in stock.items() if "layers.1.mlp.up" not in n}
    with pytest.raises(MoefyError, match=r"layers\.1\.mlp\.up_proj\.weight: not among"):
        model.load_state_dict(part, strict=False)
    with torch.no_grad():
        next(sparse_mlps(model)[0].router.parameters()).add_(1)
    with pytest.raises(MoefyError, match=r"layers\.0: its routing learns or has changed"):
        model.load_state_dict(stock, strict=False)


def test_the_usual_target_names_are_refused_loudly(out):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(MoefyError, match=r"layers\.0\.mlp\.\w+_proj: is in experts"):
        peft.get_peft_model(moefy.load(out), peft.LoraConfig(r=2, target_modules=names))
    peft.get_peft_model(moefy.load(out), peft.LoraConfig(r=2, target_modules=names[:4]))(
        **example_inputs("llama")
    )


METHODS = {
    "lora": peft.LoraConfig(r=2, target_modules="all-linear"),
    "adalora": peft.AdaLoraConfig(target_modules="all-linear", total_step=3),
    "ia3": peft.IA3Config(target_modules="all-linear", feedforward_modules=[]),
    "loha": peft.LoHaConfig(target_modules="all-linear"),
    "oft": peft.OFTConfig(target_modules="all-linear"),
    "vera": peft.VeraConfig(target_modules="all-linear"),
}


@pytest.mark.parametrize("method", METHODS)
def test_all_linear_maps_include_those_in_experts(method, out):
    """Without their places peft would train attention alone, and say nothing."""
    with pytest.raises(MoefyError, match=r"\.mlp\.\w+_proj: is in experts.*name its projections"):
        peft.get_peft_model(moefy.load(out), copy.deepcopy(METHODS[method]))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "phi3", "t5_gated"])
def test_all_linear_maps_of_other_families(name, tmp_path):
    convert_tiny(name, build(name, tmp_path / "source"), tmp_path / "out")
    model = moefy.load(tmp_path / "out")
    want = model(**example_inputs(name)).logits
    with pytest.raises(MoefyError, match="is in experts"):
        peft.get_peft_model(
            moefy.load(tmp_path / "out"), peft.LoraConfig(target_modules="all-linear")
        )
    # Whoever looks for linear maps to do something else finds nothing there.
    places = [m for m in model.modules() if isinstance(m, InExperts)]
    assert places and not any(hasattr(m, "weight") or [*m.parameters()] for m in places)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy.deepcopy(again)(**example_inputs(name)).logits, want)
