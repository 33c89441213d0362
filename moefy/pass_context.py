"""The context of a moefied model: one object for all layers, filled before every forward pass."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.routing.base import Context
from moefy.sparse_mlp import sparse_mlps


def share_context(model: PreTrainedModel) -> None:
    """Give all layers one context, and have it filled from what the model is called with."""
    modules = sparse_mlps(model).values()
    context = Context()
    for module in modules:
        module.context = context
    read = any(not module.selection.by_score or module.look_ahead for module in modules)
    roots: list[Any] = [model]
    if model.config.is_encoder_decoder:
        # Generation runs the encoder by itself; each side has tokens and a cache of its own.
        roots = [model.get_encoder(), model.get_decoder()]
    for root in roots:
        # Found there by the hook, so that a copy of the model fills a context of its own.
        root.moefy_context = context
        names = tuple(inspect.signature(root.forward).parameters)
        hook = functools.partial(_fill, names, read)
        root.register_forward_pre_hook(hook, with_kwargs=True)


def _fill(
    names: tuple[str, ...],
    read: bool,
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Take down what a pass is given; `read` says whether the routing itself depends on it."""
    if not read and torch.compiler.is_compiling():
        return
    context: Context = root.moefy_context  # type: ignore[assignment]
    given = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
    tokens = next(
        (
            given[n]
            for n in ("input_ids", "inputs_embeds", "pixel_values")
            if given.get(n) is not None
        ),
        None,
    )
    cache, mask_BT = given.get("past_key_values"), given.get("attention_mask")
    context.batch = 1 if tokens is None else len(tokens)
    context.previous_TD = None
    context.mask_BT = None
    if read:  # else the cache would live on for nothing
        context.cache = cache
        context.prompt = cache is None or int(cache.get_seq_length()) == 0
    if isinstance(mask_BT, Tensor) and mask_BT.ndim == 2 and tokens is not None:
        context.mask_BT = mask_BT[:, -tokens.shape[1] :].bool()
