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
from moefy.models.quantised import QuantisedMlp
from moefy_kernels.cpu.packing import BITS, PLANES
from moefy_kernels.cpu.quantised import MOST as MOST
from moefy_kernels.cpu.quantised import Biases, Judge, PackedMlp, pack_mlp, serves


class InCodes:
    """A layer whose codes were laid out once, as long as nothing that it is made of was written to."""

    def __init__(self, weights: DenseMlp, router: Router | None, made_of: Sequence[Tensor]) -> None:
        """`router` is one whose scores the kernel may make itself; `made_of` are the tensors that are copied beside
        the codes."""
        stored = weights.stored
        assert stored is not None
        # Held, so that nothing else can come to lie where they do.
        self.stored, self._made_of, self._versions = stored, tuple(made_of), _versions(made_of)
        own = {name: stored.matrix(name) for name in stored.names}
        judge = None if router is None else judge_of(router)
        self.judges = judge is not None
        self.packed: PackedMlp = pack_mlp(
            own.get("gate"), own["up"], own["down"], activation=ACTIVATIONS[weights.activation],
            judge=judge,
            biases=Biases(weights.gate_bias_N, weights.up_bias_N, weights.down_bias_D),
        )  # fmt: skip

    @staticmethod
    def able(stored: QuantisedMlp, activation: str, x: Tensor) -> bool:
        """Whether the kernels compute a layer, whose neurons are not centred, for such inputs."""
        return stored.bits in BITS and activation in ACTIVATIONS and serves(x)

    def follows(self, stored: QuantisedMlp, made_of: Sequence[Tensor]) -> bool:
        """Whether it is a copy of what these are now."""
        return stored is self.stored and _versions(made_of) == self._versions


def judge_of(router: Router) -> Judge | None:
    """What the kernel scores by, if it makes the scores of this router."""
    rough = router.rough_codes()
    if rough is None or rough.planes not in PLANES:
        return None
    if any(matrix.bits not in BITS for matrix in rough.matrices.values()):
        return None
    return Judge(
        planes=rough.planes, up=rough.matrices["up"], size_N=rough.size_N, up_error_N=rough.errors["up"],
        gate=rough.matrices.get("gate"), gate_error_N=rough.errors.get("gate"),
    )  # fmt: skip


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
