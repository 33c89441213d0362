"""What a moefied model carries beside its modules, in one place: `of(model)`, or `model.moefy`.

It is an ordinary attribute of the model, so that a copy of the model has its own.

Shapes: N neurons of a layer in expert order, L layers.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from moefy.errors import MoefyError
from moefy.experts.sparse_heads import SparseHeads
from moefy.experts.sparse_mlp import SparseMlp
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.families import Kind
from moefy.models.heads import HeadSite
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
    means: dict[bool, ExpertStatistics] = field(default_factory=dict)
    """Statistics on the bundled corpus that were asked for, by whether every expert was on."""

    @property
    def kind(self) -> Kind:
        """What the model reads and writes."""
        return self.sites[0].family.kind

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that it was loaded from; `MoefyError` where there is none."""
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
