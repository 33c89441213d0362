"""What a moefied model carries beside its modules: `of(model)`, or `model.moefy`, and the context of a pass.

The first is an ordinary attribute of the model, so that a copy of the model has its own. The second is one
object for all layers, filled before every forward pass. Where the routing depends on whether a pass is a
prompt, what is not found is refused (`moefy.models.library.cached`): a token that went for a prompt would give
wrong numbers and no error.

Shapes: N neurons of a layer in expert order, L layers.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.errors import MoefyError
from moefy.experts.placement import offloaded
from moefy.experts.routed import Turn
from moefy.experts.sparse_heads import SparseHeads, sparse_heads
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.base import Context
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.families import Kind
from moefy.models.heads import HeadSite
from moefy.models.library import (
    attending,
    cache_argument,
    cached,
    find_mask,
    find_tokens,
    given_to,
    is_empty,
    positions,
)
from moefy.models.locate import Site

NAME = "moefy"
"""The attribute of a model that holds its `Moefied`."""


@dataclass(frozen=True)
class ExpertStatistics:
    """What the neurons of every layer add on some text, in expert order: `r_e h_j`."""

    mean_LN: list[Tensor]
    """Mean over tokens, one `[N]` per layer, in fp32."""
    peak_LN: list[Tensor]
    """Most frequent value: exactly zero, or the top of a histogram with bins IQR / cbrt(n) wide, half of
    what Freedman and Diaconis (1981) advise, smoothed, for the n values other than zero of the first
    1024 tokens."""
    tokens_L: list[int]
    """Tokens that every layer saw, padding left out."""
    dense: bool
    """Whether every expert was on (`all_experts`)."""


@dataclass
class Moefied:
    """One moefied model: what it was made by, and where its experts are."""

    artefact: Artefact
    """The side files, as they were when the model was made."""
    sites: list[Site]
    """Its MLPs, in the order in which they run."""
    heads: list[HeadSite]
    """Its attention blocks, where heads are routed; else empty."""
    mlps: dict[int, SparseMlp]
    """The MLPs in experts by layer."""
    blocks: dict[int, SparseHeads]
    """The output projections of heads in experts, by attention block."""
    stored: Checkpoint | None = None
    """What it was loaded from; None for a model that was made in memory."""
    settings: tuple[dict[str, Any], dict[str, Any] | None] = ({}, None)
    """What its config and its generation config said then."""
    means: dict[bool, ExpertStatistics] = field(default_factory=dict)
    """Statistics on the bundled corpus that were asked for, by whether every expert was on."""

    @property
    def kind(self) -> Kind:
        """What the model reads and writes."""
        return self.sites[0].family.kind

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that it was loaded from; `MoefyError` if it was made in memory."""
        if self.stored is None:
            raise MoefyError(
                "this model was not loaded from a folder; save it and give what moefy.load returns"
            )
        return self.stored


def of(model: nn.Module) -> Moefied:
    """What a moefied model carries; `MoefyError` for any other model."""
    found = vars(model).get(NAME)
    if not isinstance(found, Moefied):
        raise MoefyError(f"{type(model).__name__}: has no experts; give what moefy.load returns")
    return found


def share_context(model: PreTrainedModel) -> None:
    """Give all layers one context and one turn, and have them kept by what the model is called with.

    Raises `MoefyError` where a selection depends on the prompt and the model could not show it.
    """
    modules = sparse_mlps(model).values()
    context = Context()
    for module in modules:
        module.context = context
    turn = Turn()
    turn.single = any(offloaded(module) is not None for module in model.modules())
    for routed in (*modules, *sparse_heads(model).values()):
        routed.turn = turn
    reads = any(not module.selection.by_score for module in modules)
    ahead = any(module.look_ahead for module in modules)
    roots: list[Any] = [model]
    if model.config.is_encoder_decoder:
        # Generation runs the encoder by itself; each side has tokens and a cache of its own.
        roots = [model.get_encoder(), model.get_decoder()]
    for root in roots:
        decodes = reads and model.can_generate() and root is roots[-1]
        if decodes:
            cache_argument(root)
        root.register_forward_pre_hook(functools.partial(_enter, turn))
        root.register_forward_hook(functools.partial(_leave, turn), always_call=True)
        # Bound to the hook, which is copied with the model: a copy fills a context of its own.
        hook = functools.partial(_fill, context, positions(root.forward), reads, ahead, decodes)
        root.register_forward_pre_hook(hook, with_kwargs=True)


def _enter(turn: Turn, *_: Any) -> None:
    # A trace has no threads: whoever compiles a model runs it in one.
    if not torch.compiler.is_compiling():
        turn.enter()


def _leave(turn: Turn, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        turn.leave()


def _fill(
    context: Context,
    names: tuple[str, ...],
    reads: bool,
    ahead: bool,
    decodes: bool,
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Take down what a pass is given.

    The routing itself `reads` it, or looks `ahead` from the layer before; `decodes` says that a pass
    may go on behind others.
    """
    if not reads and torch.compiler.is_compiling():
        if ahead:
            context.previous_TD = None
        return
    given = given_to(names, args, kwargs)
    tokens = find_tokens(given)
    if tokens is None and reads:
        raise MoefyError(
            f"{type(root).__name__}: the routing of this model depends on the prompt, and no ids, "
            f"embeddings or images are among the arguments ({', '.join(given)})"
        )
    mask_BS = None if tokens is None else find_mask(given, tokens, surely=reads)
    context.batch = 1 if tokens is None else len(tokens)
    context.previous_TD = None
    context.mask_BT = None
    if tokens is not None and mask_BS is not None:
        context.mask_BT = mask_BS[:, -tokens.shape[1] :].bool()
    if reads and tokens is not None:  # else the cache would live on for nothing
        context.cache = cache = cached(given, tokens, mask_BS) if decodes else None
        context.prompt = cache is None or is_empty(cache)
        if context.prompt and mask_BS is None:
            context.mask_BT = attending(given, tokens)
