import pytest
import torch
from tiny_conversion import corpus_for
from tiny_models import build

from moefy.conversion.layer import Captured, capture
from moefy.data.corpus import load_corpus
from moefy.data.inputs import read_batches
from moefy.experts.loading import load_dense
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import side_of, sites
from moefy.run.console import Reporter

KINDS = {
    "llama": "decoder",
    "opt": "decoder",
    "t5": "encoder-decoder",
    "vit": "image",
    "bert": "encoder",
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_every_real_token_is_captured_once_and_no_padding(name, tmp_path):
    checkpoint = Checkpoint.open(build(name, tmp_path / "m"))
    model = load_dense(checkpoint)
    corpus = load_corpus(corpus_for(name))
    batches = read_batches(checkpoint, KINDS[name], corpus, 32)
    found = sites(model)
    captured = Captured(tmp_path, "all")
    assert not captured.complete
    capture(model, found, batches, captured, limit=10**6, seed=0, report=Reporter(quiet=True))
    assert captured.complete

    # Documents one by one, without padding, give the same multiset of inputs.
    single: dict[int, list[torch.Tensor]] = {site.index: [] for site in found}
    hooks = [
        model.get_submodule(site.module).register_forward_pre_hook(
            lambda _, args, i=site.index, d=site.width: single[i].append(args[0].reshape(-1, d))
        )
        for site in found
    ]
    for batch in batches:
        for sample in batch.samples:
            model(**{n: v[None] for n, v in sample.inputs.items()})
    for hook in hooks:
        hook.remove()
    for site in found:
        got, want = captured.inputs(site), torch.cat(single[site.index])
        assert got.shape == want.shape, (name, side_of(site))
        assert torch.allclose(got.sum(0), want.sum(0), rtol=1e-3, atol=1e-3 * len(want))
        assert torch.allclose(
            got.norm(dim=1).sort().values, want.norm(dim=1).sort().values, rtol=1e-3
        )


def test_a_limit_draws_evenly_and_reproducibly(tmp_path):
    checkpoint = Checkpoint.open(build("llama", tmp_path / "m"))
    model = load_dense(checkpoint)
    batches = read_batches(checkpoint, "decoder", load_corpus(corpus_for("llama")), 32)
    taken = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sample = Captured(tmp_path, name)
        capture(
            model, sites(model), batches, sample, limit=100, seed=seed, report=Reporter(quiet=True)
        )
        taken[name] = sample.inputs(sites(model)[0])
    assert taken["a"].shape == (100, 32)
    assert torch.equal(taken["a"], taken["b"])
    assert not torch.equal(taken["a"], taken["c"])
