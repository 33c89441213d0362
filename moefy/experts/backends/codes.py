"""Few tokens through MLPs that are stored in codes, by the native kernels that read nothing else.

    moefy.native_codes(model)      # opt in: decoding reads the codes, not their values

The kernels round inputs, and the activations that meet down, to 8 bits with one scale for every 32, as llama.cpp
does: outputs differ by about a hundredth of their size from what `SparseMlp` computes with the values of the
codes, which is why nothing does so by itself. The layout is a copy of the codes in main memory.

Shapes: T tokens, D width, N neurons, E experts.
"""

from collections.abc import Sequence

from torch import Tensor

from moefy.experts.backends.base import ACTIVATIONS
from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp
from moefy_kernels.cpu.quantised import MOST as MOST
from moefy_kernels.cpu.quantised import Biases, Judge, PackedMlp, pack_mlp, serves


class InCodes:
    """A layer whose codes were laid out once, as long as nothing that it is made of was written to."""

    def __init__(self, weights: DenseMlp, router: Router | None, made_of: Sequence[Tensor]) -> None:
        """`router` is one whose scores the kernel makes itself; `made_of` are the tensors that are copied."""
        stored = weights.stored
        assert stored is not None
        self.stored, self._versions = stored, _versions(made_of)
        own = {name: stored.matrix(name) for name in stored.names}
        judge = None if router is None else judge_of(router)
        self.judges = judge is not None
        self.packed: PackedMlp = pack_mlp(
            own.get("gate"), own["up"], own["down"], activation=ACTIVATIONS[weights.activation],
            judge=judge,
            biases=Biases(weights.gate_bias_N, weights.up_bias_N, weights.down_bias_D),
        )  # fmt: skip

    @staticmethod
    def able(weights: DenseMlp, x: Tensor) -> bool:
        """Whether the kernels compute this layer."""
        stored = weights.stored
        return (
            stored is not None
            and stored.bits in (2, 3, 4, 8)
            and weights.activation in ACTIVATIONS
            and weights.centre_N is None
            and serves(x)
        )

    def follows(self, weights: DenseMlp, made_of: Sequence[Tensor]) -> bool:
        """Whether it is a copy of what these are now."""
        return weights.stored is self.stored and _versions(made_of) == self._versions


def judge_of(router: Router) -> Judge | None:
    """What the kernel scores by, if it makes the scores of this router."""
    rough = router.rough_codes()
    if rough is None:
        return None
    return Judge(
        planes=rough.planes, up=rough.matrices["up"], size_N=rough.size_N, up_error_N=rough.errors["up"],
        gate=rough.matrices.get("gate"), gate_error_N=rough.errors.get("gate"),
    )  # fmt: skip


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
