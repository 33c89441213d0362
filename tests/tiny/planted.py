"""A tiny real transformer whose experts do what is known: the domain is carried, the block is gated.

A document begins with a marker of its domain. One attention head carries it to every token; the MLP
has a block of neurons for each domain that is silent in all others and, after token t, raises the logit
of `successor[domain, t]`. Texts follow that successor with `FOLLOW` and are else drawn from the
unigram of their domain. A block of neurons is an expert, so that

    routed by domain    exactly the block that does something runs; ablating it costs its domain alone
    routed by token     P(token | domain) differs, and so does the use of experts, but nothing beyond
    routed by a coin    that nothing tells

    folder, corpus = build(tmp_path, "domain")
    model, reading = load(folder), read(model, corpus)

Shapes: T tokens, D width, N neurons, C domains, V content tokens.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from plain_bigram import plain_bigram
from transformers import OPTConfig, OPTForCausalLM

from moefy import recipe as recipes
from moefy.data.corpus import Corpus, Document
from moefy.evaluation.bigram import Bigram
from moefy.methods.base import Router
from moefy.models.artefact import FULL, Artefact, write_side_files
from moefy.models.checkpoint import Checkpoint
from moefy.models.entries import LayerEntry
from moefy.recipe import PartitionRecipe, Recipe

DOMAINS, CONTENT = 4, 48
VOCABULARY = CONTENT + DOMAINS
"""Content tokens, then a marker for each domain."""
FOLLOW = 0.75
DOCUMENTS, LENGTH = 100, 40
"""Documents of every domain, and their tokens."""
EMBEDDED, FLAG, READ = 0, VOCABULARY, VOCABULARY + 1
PAD = READ + DOMAINS
CARRIED = PAD + 2
"""Where the head writes the domain."""
OUT = CARRIED + DOMAINS
"""Where the MLP writes the token to come."""
WIDTH = OUT + CONTENT
GATE, PEAK, BOOST = 6.0, 2.0, 12.0


def successors() -> np.ndarray:
    """The token that follows each in each domain `[C, V]`: permutations that share no pair."""
    draw = np.random.default_rng(0)
    shift = draw.permutation(np.arange(1, CONTENT))[:DOMAINS]
    return (np.arange(CONTENT)[None] + shift[:, None]) % CONTENT


def unigrams() -> np.ndarray:
    """P(token | domain) of the tokens that are drawn `[C, V]`: some are common in each domain only."""
    weight = np.ones((DOMAINS, CONTENT))
    for domain in range(DOMAINS):
        weight[domain, domain::DOMAINS] += 6
    return weight / weight.sum(1, keepdims=True)


def corpus(documents: int = DOCUMENTS, seed: int = 1) -> Corpus:
    """Documents of token ids, as many of each domain."""
    draw, follow, drawn = np.random.default_rng(seed), successors(), unigrams()
    found = []
    for number in range(documents):
        for domain in range(DOMAINS):
            ids = [CONTENT + domain]
            for _ in range(LENGTH - 1):
                usual = len(ids) > 1 and draw.random() < FOLLOW
                new = draw.choice(CONTENT, p=drawn[domain])
                ids.append(int(follow[domain, ids[-1]]) if usual else int(new))
            found.append(Document(f"d{domain}", f"{domain}-{number}", ids=tuple(ids)))
    return Corpus("planted", found)


@torch.no_grad()
def dense_model() -> OPTForCausalLM:
    """The model as it was described, all experts on."""
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=1,
        num_attention_heads=1, ffn_dim=DOMAINS * CONTENT, max_position_embeddings=2 * LENGTH,
        dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.zero_()
    decoder, layer = model.model.decoder, model.model.decoder.layers[0]
    rows_VD = decoder.embed_tokens.weight
    for token in range(VOCABULARY):
        rows_VD[token, EMBEDDED + token] = 1
        marker = token >= CONTENT
        # Three ones each, so that the norms scale all tokens alike.
        rows_VD[token, [FLAG, READ + token - CONTENT] if marker else [PAD, PAD + 1]] = 1
    usual_D = rows_VD[0].clone()
    _undo(layer.self_attn_layer_norm, usual_D)
    attention = layer.self_attn
    attention.q_proj.bias[0] = 8
    attention.k_proj.weight[0, FLAG] = 8 * WIDTH**0.5
    for domain in range(DOMAINS):
        attention.v_proj.weight[domain, READ + domain] = 1
        attention.out_proj.weight[CARRIED + domain, domain] = 1
    usual_D[CARRIED] = 1
    _undo(layer.final_layer_norm, usual_D)
    follow = torch.from_numpy(successors())
    # What the neurons of a block do at each token of its domain, and what they must write for it.
    fire_VV = 1 + PEAK * torch.eye(CONTENT)
    for domain in range(DOMAINS):
        block = slice(domain * CONTENT, (domain + 1) * CONTENT)
        layer.fc1.weight[block, EMBEDDED : EMBEDDED + CONTENT] = PEAK * torch.eye(CONTENT)
        layer.fc1.weight[block, CARRIED + domain] = GATE
        layer.fc1.bias[block] = 1 - GATE
        wanted_VV = torch.nn.functional.one_hot(follow[domain], CONTENT).float()
        layer.fc2.weight[OUT : OUT + CONTENT, block] = torch.linalg.solve(fire_VV, wanted_VV).T
    usual_D[OUT] = 1
    _undo(decoder.final_layer_norm, usual_D)
    model.lm_head.weight[:CONTENT, OUT : OUT + CONTENT] = 5.0 * torch.eye(CONTENT)
    # Markers are never to come.
    model.lm_head.weight[CONTENT:, PAD : PAD + 2] = -BOOST
    return model


def _undo(norm: torch.nn.LayerNorm, usual_D: torch.Tensor) -> None:
    """Make a norm the identity for vectors with the mean and spread of this one."""
    norm.weight.fill_(float((usual_D.var(correction=0) + norm.eps).sqrt()))
    norm.bias.fill_(float(usual_D.mean()))


@torch.no_grad()
def bigram_model(bigram: Bigram, documents: list[Document]) -> OPTForCausalLM:
    """A transformer that is this bigram, which was fitted on these documents: every token writes the
    logits of its row, and the MLP nothing."""
    model = dense_model()
    for parameter in model.model.decoder.layers[0].fc2.parameters():
        parameter.zero_()
    usual_D = model.model.decoder.embed_tokens.weight[0].clone()
    usual_D[CARRIED] = 1
    _undo(model.model.decoder.final_layer_norm, usual_D)
    given = plain_bigram([list(doc.ids) for doc in documents], VOCABULARY, bigram.k, bigram.m)
    model.lm_head.weight.zero_()
    for token in range(VOCABULARY):
        model.lm_head.weight[:, EMBEDDED + token] = torch.tensor(given(token)).log()
    return model


class Coin(Router):
    """Scores that nothing tells."""

    trainable = False

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x_TD: torch.Tensor, mlp: object) -> torch.Tensor:
        return torch.rand(len(x_TD), self.experts, generator=self.generator)


def router_rows(kind: str) -> torch.Tensor:
    """Rows of a linear router `[C, D]`."""
    rows_CD = torch.zeros(DOMAINS, WIDTH)
    for expert in range(DOMAINS):
        if kind == "domain":
            rows_CD[expert, CARRIED + expert] = 1
        elif kind == "token":
            rows_CD[expert, EMBEDDED + expert : EMBEDDED + VOCABULARY : DOMAINS] = 1
    return rows_CD


def build(folder: Path, kind: str, model: OPTForCausalLM | None = None) -> tuple[Path, Corpus]:
    """A moefied checkpoint routed by `domain`, `token` or `coin`, and texts that it was not fitted on."""
    out = folder / f"planted-{kind}"
    (model or dense_model()).save_pretrained(out)
    router = "planted:Coin" if kind == "coin" else "linear"
    entry = LayerEntry(
        width=WIDTH, experts=DOMAINS, layer="model.decoder.layers.0", neurons=DOMAINS * CONTENT,
        shared=0, router={"name": router, "hidden": 0, "bits": 2, "inputs": 1, "look_ahead": False},
        selection={"name": "topk", "k": 1}, compensation={"name": "none", "rank": 0},
    )  # fmt: skip
    recipe = Recipe(
        density=1 / DOMAINS, context=2 * LENGTH,
        partition=PartitionRecipe(method="coactivation", experts=DOMAINS),
    )  # fmt: skip
    order = torch.arange(DOMAINS * CONTENT, dtype=torch.int32)
    tensors = {"layers.0.permutation": order}
    if router == "linear":
        tensors["layers.0.router.weight"] = router_rows(kind)
    artefact = Artefact(
        form=FULL, source={"name": "planted", "sha256": {}}, recipe=recipes.to_dict(recipe),
        corpus={"name": "none", "sha256": ""}, layers=[entry], tensors=tensors,
    )  # fmt: skip
    write_side_files(out, replace(artefact, sha256=Checkpoint.open(out).hashes()))
    return out, corpus()
