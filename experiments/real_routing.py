"""Routing of real text for shapes that no model at hand has: neighbouring tokens agree on their experts.

A bundled model is converted with the recipe `export`, and the linear router of its middle layer scores the
tokens of held-out documents in the order in which they stand there, one document after the other. T tokens
of a benchmark are the first T of them.

To have as many experts as a shape, the model's experts, in an order drawn once, are dealt out to those of
the shape in turn until each has one. A token runs the K experts whose model's expert it scores highest,
of equal ones those with the lowest numbers. Where a shape has more experts than the model, copies of one run
together, as if it had been cut into smaller ones; where it has fewer, some of the model's are left out. How
popular experts are, and how far tokens agree, is the model's own, at the density of the benchmark: so is
the share of all experts that T tokens run together.

Shapes: T tokens, E experts, M experts of the model, K experts that a token runs.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from moefy.cli.quickstart import demo_models
from moefy.conversion.convert import convert
from moefy.data.corpus import load_corpus
from moefy.data.inputs import load_tokenizer
from moefy.data.shards import split_shards
from moefy.experts.loading import load
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.recipe import Recipe

MODEL, EXPERT_SIZE, CONTEXT = "llama", 16, 512
"""64 experts a layer."""


def text_scores(tokens: int, documents: int) -> Tensor:
    """Scores `[T, M]` of the first tokens, by a conversion that reads so many bundled documents.

    A quarter of them are held out; `ValueError` where they have fewer tokens.
    """
    corpus = load_corpus().take(documents)
    settings = {"partition.expert_size": EXPERT_SIZE, "router.tokens": 64 * documents}
    recipe = Recipe.named("export", settings)
    with TemporaryDirectory() as folder:
        out = Path(folder) / MODEL
        convert(demo_models()[MODEL], out, recipe=recipe, corpus=corpus, quiet=True)
        model = load(out, dtype=torch.float32)
        layers = sparse_mlps(model)
        layer: SparseMlp = layers[len(layers) // 2]
        found: list[Tensor] = []
        layer.observer = lambda x_TD, mask_TE: found.append(layer.router(x_TD, layer.routed))
        held_out = split_shards(corpus, recipe.seed)["evaluation"]
        with torch.inference_mode():
            for sample in held_out.samples(load_tokenizer(out), "decoder", CONTEXT):
                model(sample.inputs["input_ids"][None])
                if sum(map(len, found)) >= tokens:
                    return torch.cat(found)[:tokens]
    raise ValueError(f"{len(torch.cat(found))} tokens are held out, {tokens} were asked for")


def text_lists(score_TM: Tensor, experts: int, k: int) -> Tensor:
    """The K experts `[T, K]` of each token, of so many, in rising order."""
    of_model = score_TM.shape[1]
    order_M = torch.randperm(of_model, generator=torch.Generator().manual_seed(0))
    score_TE = score_TM[:, order_M[torch.arange(experts) % of_model]]
    best_TE = score_TE.sort(dim=1, descending=True, stable=True).indices
    return best_TE[:, :k].sort(1).values
