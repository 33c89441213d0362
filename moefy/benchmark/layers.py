"""The MLPs that the levels `kernel` and `layer` time: random ones of a given shape, or a model's own.

A few layers are walked through in turn, so that what one call leaves in the caches does not serve the
next. Which experts run is drawn at random (kernel) or comes from router and selection (layer). A moefied
model's own layers have the inputs that they have within it.

Shapes: T tokens, D width, N neurons, E experts, K experts that run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moefy.data.corpus import load_corpus
from moefy.data.inputs import load_tokenizer
from moefy.errors import MoefyError
from moefy.experts.passes import watching
from moefy.experts.placement import device_of
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.mlp import DenseMlp
from moefy.run.computing import now
from moefy.run.memory import free_memory

COPIES = 4
"""Layers that take turns."""
LENGTH = 64
"""Tokens of the sequences that inputs are taken from."""
FORMS = 3
"""Layouts of its weights that a layer may be needed in: moefy's, the dense one, that of stock experts."""


@dataclass(frozen=True)
class Prompt:
    """Ids, and what they are in words."""

    ids_BT: Tensor
    what: str


def prompt(folder: Path, vocabulary: int, batch: int, length: int, seed: int = 0) -> Prompt:
    """`batch` sequences of `length` tokens for the model in `folder`, which has `vocabulary` tokens."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(vocabulary, (batch, length), generator=generator)
        return Prompt(ids_BT, "random token ids")
    corpus = load_corpus()
    ids: list[int] = []
    for document in corpus.take(len(corpus.documents)).documents:
        ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) >= batch * length:
            break
    ids *= -(-batch * length // len(ids))  # a batch larger than the corpus reads it again
    ids_BT = torch.tensor(ids[: batch * length]).view(batch, length)
    return Prompt(ids_BT, "text of the bundled corpus")


@dataclass(frozen=True)
class Shape:
    """D, N, E and K of a synthetic layer."""

    width: int
    neurons: int
    experts: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """`D,N,E,k`; raises `MoefyError` where this is no layer."""
        numbers = text.split(",")
        if len(numbers) != 4 or not all(part.strip().isdigit() for part in numbers):
            raise MoefyError(f"--layer {text}: expected D,N,E,k, such as 4096,11008,64,16")
        shape = cls(*map(int, numbers))
        if not (shape.width and shape.neurons and shape.experts):
            raise MoefyError(f"--layer {text}: D, N and E must be 1 or more")
        if shape.neurons % shape.experts or not 0 < shape.k <= shape.experts:
            raise MoefyError(f"--layer {text}: N must be a multiple of E, and k from 1 to E")
        return shape


@dataclass
class Layers:
    """MLPs of one width that are timed in turn, and the same weights in the layouts of others."""

    what: str
    """In words, for tables."""
    modules: list[SparseMlp]
    inputs_TD: list[Tensor]
    """Inputs of each of them, as many tokens as the largest batch has."""
    synthetic: bool

    @property
    def first(self) -> SparseMlp:
        """One that stands for all: device, dtype, kind of router."""
        return self.modules[0]

    def inputs(self, batch: int) -> list[Tensor]:
        """Inputs `[batch, D]` of each layer."""
        return [x_TD[:batch] for x_TD in self.inputs_TD]

    @cached_property
    def stock(self) -> list[DenseMlp]:
        """The dense MLPs; their down projection lies as stock models have it, `[D, N]` row by row."""
        mlps = [module.weights for module in self.modules]
        return [replace(mlp, down_ND=mlp.down_ND.T.contiguous().T) for mlp in mlps]

    @cached_property
    def experts(self) -> list[Any]:
        """The experts as transformers' modules of stock mixtures of experts (copies of the weights)."""
        return [_stock_experts(module) for module in self.modules]


def synthetic(
    shape: Shape, *, dtype: torch.dtype, tokens: int, router: str = "linear", seed: int = 0
) -> Layers:
    """Random SwiGLU layers (speed only, they say nothing of quality), and inputs of `tokens` tokens.

    On the GPU, if any. Fewer than `COPIES` if memory does not hold as many.
    """
    device = now().where
    one = 3 * shape.width * shape.neurons * dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free_memory()
    copies = max(1, min(COPIES, free // 2 // (FORMS * one)))
    generator = torch.Generator().manual_seed(seed)

    topk: Any = SELECTIONS["topk"]

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).div_(shape.width**0.5).to(device, dtype)

    def layer() -> SparseMlp:
        gate_ND, up_ND, down_ND = (random(shape.neurons, shape.width) for _ in range(3))
        scorer = ROUTERS[router].make(shape.width, shape.experts, shape.neurons, {})
        for parameter in scorer.parameters():
            nn.init.normal_(parameter, std=shape.width**-0.5, generator=generator)
        module = SparseMlp(
            DenseMlp(gate_ND=gate_ND, up_ND=up_ND, down_ND=down_ND, activation="silu"),
            experts=shape.experts, shared=0, router=scorer.to(device), selection=topk(k=shape.k),
            compensation=COMPENSATIONS["none"](shape.width, shape.experts, 0),
        )  # fmt: skip
        module.density = shape.k / shape.experts
        return module.eval().requires_grad_(False)

    modules = [layer() for _ in range(copies)]
    inputs = [random(tokens, shape.width) * shape.width**0.5 for _ in modules]
    what = (
        f"synthetic SwiGLU layer, random weights: D {shape.width}, N {shape.neurons}, "
        f"{shape.experts} experts, {router} router"
    )
    return Layers(what, modules, inputs, synthetic=True)


def drawn_masks(
    modules: Sequence[SparseMlp], batch: int, density: float | None = None
) -> list[Tensor]:
    """Masks `[T, E]` of the same number of experts for every token, drawn at random.

    No density is that of each layer. At least one expert runs, and every shared one.
    """
    generator = torch.Generator().manual_seed(batch)
    masks = []
    for module in modules:
        share = module.density if density is None else density
        k = max(1, module.shared, round(share * module.experts))
        scores_TE = torch.rand(batch, module.experts, generator=generator)
        scores_TE[:, : module.shared] = 2
        mask_TE = torch.zeros(batch, module.experts, dtype=torch.bool)
        mask_TE.scatter_(1, scores_TE.topk(k, dim=1).indices, True)
        masks.append(mask_TE.to(module.device))
    return masks


def _stock_experts(module: SparseMlp) -> Any:
    """transformers' own module of gated experts, holding a copy of the weights."""
    mlp, experts, size = module.weights, module.experts, module.expert_size
    assert mlp.gate_ND is not None
    config = MixtralConfig(
        hidden_size=mlp.width, intermediate_size=size, num_local_experts=experts,
        hidden_act=mlp.activation,
    )  # fmt: skip
    with torch.device("meta"):
        stock = MixtralExperts(config)
    halves = (rows_ND.view(experts, size, -1) for rows_ND in (mlp.gate_ND, mlp.up_ND))
    down_EFD = mlp.down_ND.view(experts, size, -1)
    stock.gate_up_proj = nn.Parameter(torch.cat([*halves], 1), requires_grad=False)
    stock.down_proj = nn.Parameter(down_EFD.transpose(1, 2).contiguous(), requires_grad=False)
    return stock


@torch.no_grad()
def own_layers(
    model: PreTrainedModel, what: str, prompt: Prompt, *, tokens: int, seed: int = 0
) -> Layers:
    """Up to `COPIES` MLPs, spread over the depth of the model, and `tokens` inputs of each.

    The tokens are drawn from everywhere in the prompt. Raises `MoefyError` where weights are offloaded
    and for models that take more than ids.
    """
    if model.config.is_encoder_decoder:
        raise MoefyError(
            f"{what}: a {type(model).__name__} takes more than token ids; use --layer D,N,E,k"
        )
    modules = list(sparse_mlps(model).values())
    if any(module.device.type == "meta" for module in modules):
        raise MoefyError(
            f"{what}: its layers are offloaded, so that reading them from disk would be what is timed; "
            "use --level model"
        )
    count = min(COPIES, len(modules))
    chosen = [modules[i * len(modules) // count] for i in range(count)]
    inputs: dict[int, Tensor] = {}
    observed = dict(enumerate(chosen))
    with watching(observed, lambda n, x_TD, _: inputs.update({n: x_TD.clone()})):
        model(input_ids=prompt.ids_BT.to(device_of(model)))
    drawn_T = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))[:tokens]
    inputs_TD = [inputs[n][drawn_T.to(inputs[n].device)] for n in range(count)]
    first = chosen[0]
    text = (
        f"layers of {what}: D {first.weights.width}, N {first.weights.neurons}, {first.experts} experts, "
        f"{type(first.router).__name__}; inputs from {prompt.what}"
    )
    for module in chosen:
        module.requires_grad_(False)
    return Layers(text, chosen, inputs_TD, synthetic=False)


@dataclass(frozen=True)
class Case:
    """What every engine has to compute: some layers, the inputs of each, and which experts run."""

    layers: Layers
    inputs: list[Tensor]
    """`[T, D]` of each layer."""
    masks: list[Tensor]
    """`[T, E]` of each layer."""
    routed: bool
    """Whether the engine has to find the masks itself (level `layer`)."""
    asked: float | None = None
    """The density that the masks were made for; None where layers have their own."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.inputs[0])
