"""SparseMlp, the module that takes the place of a dense MLP.

It owns the weights once, neuron-major and in expert order. Which backend computes it never changes
the function. It knows nothing of files, and of training only that a mask may carry a gradient.

Shapes: T tokens, D width, N neurons, E routed experts, S shared experts, F neurons per expert.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moefy.errors import MoefyError
from moefy.experts.backends import BACKENDS, able, about, choose, fastest, named
from moefy.experts.backends.base import ExpertWeights, Request, Workload
from moefy.experts.backends.codes import MOST, InCodes
from moefy.experts.backends.cpu import OneToken
from moefy.experts.routed import IN, MASK, OUT, SCORES, Hooked
from moefy.experts.routed import all_experts as all_experts
from moefy.methods.base import Compensation, Router, Selection
from moefy.methods.selections import Threshold
from moefy.models.mlp import DecidedMlp, DenseMlp, activation_function
from moefy.models.quantised import GROUPED, Quantised, QuantisedMlp, quantise

MATRICES = ("up_ND", "gate_ND", "down_ND")
"""Names of the parameters that hold the weight matrices, for what trains or counts them by name."""
_BIASES = ("up_bias_N", "gate_bias_N", "down_bias_D")
_WEIGHTS = ("up_ND", "down_ND", "gate_ND", *_BIASES)
NO_ROWS = DenseMlp(up_ND=torch.empty(0, 0), down_ND=torch.empty(0, 0), activation="linear")
"""For routers that read the input alone."""


class SparseMlp(Hooked):
    """An MLP in experts: weights in expert order, router, selection, compensation.

    The `shared` first experts always run; scores and masks cover the others.

    Where matrices are rounded, the parameters hold their values and `stored` the codes. That is no
    parameter or buffer: a copy of the module shares it, `to` leaves it in main memory, a pickle takes it along.
    """

    up_ND: nn.Parameter
    gate_ND: nn.Parameter | None

    def __init__(
        self,
        mlp: DenseMlp,
        *,
        experts: int,
        shared: int,
        router: Router,
        selection: Selection,
        compensation: Compensation,
        look_ahead: bool = False,
    ) -> None:
        super().__init__(router, selection, compensation)
        for name in _WEIGHTS:
            value = getattr(mlp, name)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.away = False
        """Whether the weights are read for every pass (`moefy.experts.placement`): nobody writes to them."""
        self.activation = mlp.activation
        self.experts, self.shared, self.look_ahead = experts, shared, look_ahead
        self.density = 0.5
        """Share of the experts that a token is expected to run: what `auto` counts with on a GPU."""
        self.backend = "auto"
        self.chosen = ""
        """The backend of the last forward pass."""
        self._one_token: OneToken | None = None
        self.reads_codes = False
        """Whether few tokens are computed from the codes (`moefy.native_codes`)."""
        self._in_codes: InCodes | None = None
        self._stored, self._versions = mlp.stored, self._written()

    @property
    def neurons(self) -> int:
        """N, the number of neurons."""
        return self.up_ND.shape[0]

    @property
    def width(self) -> int:
        """D, the width of the model."""
        return self.up_ND.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights compute in."""
        return self.up_ND.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are; `meta` where they are kept elsewhere until they are needed."""
        return self.up_ND.device

    @property
    def expert_size(self) -> int:
        """F, neurons per expert."""
        return self.neurons // self.experts

    @property
    def weight_names(self) -> list[str]:
        """Names of the parameters that it has, of matrices and biases."""
        return [name for name in _WEIGHTS if getattr(self, name) is not None]

    @property
    def weights(self) -> DenseMlp:
        """All neurons in expert order, as views of the parameters."""
        own = {n: getattr(self, n) for n in _WEIGHTS}
        return DenseMlp(activation=self.activation, **own, stored=self.stored)

    @property
    def stored(self) -> QuantisedMlp | None:
        """The codes whose values the matrices are; None where they are not rounded, or were written to since.

        What writes past autograd's count of versions, to `parameter.data`, is not seen here, but
        when the model is saved.
        """
        if self._stored is None or self.away or torch.compiler.is_compiling():
            return self._stored
        return self._stored if self._versions == self._written() else None

    def __getstate__(self) -> dict[str, Any]:
        """Copies count from their own parameters; where these were written to, no count of theirs is the one of
        the codes."""
        written = self._stored is not None and self.stored is None
        return {**self.__dict__, "_versions": [] if written else None, "_in_codes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        base: Any = super()
        base.__setstate__(state)
        self._versions = self._written() if self._versions is None else self._versions

    def _written(self) -> list[int]:
        """How often each matrix was written to."""
        own = (self._parameters[name] for name in MATRICES)
        return [0 if p is None or p.is_inference() else p._version for p in own]

    @torch.no_grad()
    def store(self, stored: QuantisedMlp | None) -> None:
        """Take these codes, and their values into the parameters; None forgets the codes that there are."""
        if stored is not None:
            for name in stored.names:
                own: Tensor = getattr(self, f"{name}_ND")
                own.copy_(stored.matrix(name).values())
        self._stored, self._versions = stored, self._written()

    @torch.no_grad()
    def rounded(self, own: DenseMlp, dtype: torch.dtype, *, bits: int, scales: int) -> QuantisedMlp:
        """The codes of the matrices of `own`: those that it was made of, as far as these are their values still,
        in their own dtype or in `dtype`; what differs is rounded anew."""
        matrices = {n: w_ND for n in GROUPED if (w_ND := getattr(own, f"{n}_ND")) is not None}
        before = self._stored
        if before is None or (before.bits, before.scale_bits) != (bits, scales):
            return QuantisedMlp.of(matrices, bits, scales)
        changed = {
            name: quantise(w_ND.cpu(), bits, along=GROUPED[name], scale_bits=scales)
            for name, w_ND in matrices.items()
            if not _is(w_ND.cpu(), before.matrix(name), dtype)
        }
        return before.with_matrices(changed) if changed else before

    @property
    def running(self) -> DenseMlp:
        """`weights` as they run under a mask: counted from the centres of the compensation, if any."""
        return self.compensation.centred(self.weights)

    @property
    def routed(self) -> DenseMlp:
        """The routed neurons in expert order, as they run."""
        return self._behind_shared(self.running)

    def _behind_shared(self, mlp: DenseMlp) -> DenseMlp:
        return mlp.take(slice(self.shared * self.expert_size, None)) if self.shared else mlp

    @property
    def computes_gate(self) -> bool:
        """Whether the router's own gates are those that the experts run with."""
        return self.router.computes_gate and not self.look_ahead

    def mask(self, x_TD: Tensor) -> Tensor:
        """Which experts run `[T, S + E]`: bool, or in training a number that carries a gradient."""
        return self._route(x_TD)[0]

    def _route(self, x_TD: Tensor, shown: torch.Size | None = None) -> tuple[Tensor, ExpertWeights]:
        """The mask, and the weights to compute it with; `shown` is the shape for hooks that listen."""
        if self.all_on:
            shape = (x_TD.shape[0], self.experts)
            return torch.ones(shape, dtype=torch.bool, device=x_TD.device), self.weights
        mlp = self.running
        weights: ExpertWeights = mlp
        routed_TE = self.selection.remembered(self.context)
        if routed_TE is None:
            if self.computes_gate:
                gate_TN = mlp.deciding(x_TD)
                routed_TN = gate_TN[:, self.shared * self.expert_size :]
                scores_TE = self.router.scores(routed_TN, self._behind_shared(mlp))
                weights = DecidedMlp(mlp, activation_function(mlp.activation)(gate_TN))
            else:
                scores_TE = self.router(self._read(x_TD), self._behind_shared(mlp))
            if shown is not None:
                scores_TE = self.show(SCORES, scores_TE, shown)
            routed_TE = self.select(scores_TE)
        elif len(routed_TE) != len(x_TD):
            routed_TE = routed_TE.repeat_interleave(len(x_TD) // len(routed_TE), 0)
        if self.shared:
            routed_TE = torch.cat([routed_TE.new_ones(len(routed_TE), self.shared), routed_TE], 1)
        return routed_TE, weights

    def _read(self, x_TD: Tensor) -> Tensor:
        """What the router reads: this layer's input, or for look-ahead that of the one before."""
        if not self.look_ahead:
            return x_TD
        before_TD = self.context.previous_TD
        if before_TD is None:
            raise MoefyError("a router that looks ahead needs the MLP before it in the same pass")
        return before_TD.to(x_TD.device)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """Output of the experts that run plus the compensation, shaped as `hidden`.

        `residual` is for families whose MLP module adds it itself.
        """
        y = self._read_codes(hidden)
        if y is None and (held := self._held(hidden)) is not None:
            y = self._decode(held, hidden)
        if y is not None:
            return y if residual is None else y + residual
        x_TD, shape = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[:-1]
        watched = self.watched
        if watched:
            x_TD = self.show(IN, x_TD.clone(), shape)
        mask_TE, weights = self._route(x_TD, shape if watched else None)
        if watched:
            mask_TE = self.show(MASK, mask_TE.clone(), shape)
        self.context.previous_TD = x_TD
        if self.observer is not None:
            self.observer(x_TD, mask_TE)
        extra_TD = self.compensation(x_TD, mask_TE[:, self.shared :])
        if self.tells_all:
            self.chosen = "masked"
            h_TN, bias_D = weights.hidden(x_TD), weights.down_bias_D
            y_TD = self.tell_all(h_TN, mask_TE, weights.down_ND, extra_TD, shape)
            y_TD = y_TD if bias_D is None else y_TD + bias_D
        else:
            y_TD = self.compute(x_TD, mask_TE, weights)
            if extra_TD is not None:
                y_TD = y_TD + extra_TD.to(y_TD.dtype)
        if watched:
            y_TD = self.show(OUT, y_TD, shape)
        y = y_TD.view(*shape, -1)
        return y if residual is None else y + residual

    def _held(self, hidden: Tensor) -> OneToken | None:
        """What decodes one token on a CPU, where nobody asks for more than the output."""
        if (
            hidden.numel() != hidden.shape[-1]
            or self.backend != "auto"
            or self.all_on
            or self.look_ahead
            or not self._unheard(hidden)
            or self.compensation.adds
            or not self.router.reads_input_alone
        ):
            return None
        own: list[Tensor | None] = [self._parameters.get(name) for name in _WEIGHTS]
        held = self._one_token
        if held is None or not held.follows(own):
            mask_1E = torch.ones(1, self.experts, dtype=torch.bool)
            request = Request(self.up_ND[:1].detach(), self.weights, mask_1E)
            self._one_token = held = OneToken.of(request, able(request), own)
        return held if held is not None and held.dtype == hidden.dtype else None

    def _unheard(self, hidden: Tensor) -> bool:
        """Whether nobody asks for more than the output, on a CPU without gradients."""
        return not (
            not hidden.is_cpu
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.observer is not None
            or self.watched
            or self.tells_all
        )

    def _read_codes(self, hidden: Tensor) -> Tensor | None:
        """Few tokens from the codes of the weights, where that was asked for and can be."""
        few = 0 < hidden.numel() <= MOST * hidden.shape[-1]
        if not self.reads_codes or not few or not self._unheard(hidden):
            return None
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        held = self._laid_out(x_TD)
        if held is None:
            return None
        self.chosen = "codes"
        selection = self.selection
        if self.all_on:
            mask_TE: Tensor | None = None
            y_TD = held.packed(x_TD)
        elif held.judges and type(selection) is Threshold and selection.most is None:
            threshold_T = torch.full((len(x_TD),), selection.threshold)
            y_TD, mask_TE = held.packed.routed(x_TD, threshold_T)
        else:
            mask_TE, _ = self._route(x_TD)
            y_TD = held.packed(x_TD, mask_TN=mask_TE.repeat_interleave(self.expert_size, 1))
        self.context.previous_TD = x_TD
        if mask_TE is not None and self.compensation.adds:
            extra_TD = self.compensation(x_TD, mask_TE[:, self.shared :])
            y_TD = y_TD if extra_TD is None else y_TD + extra_TD.to(y_TD.dtype)
        return y_TD.view(hidden.shape)

    def _laid_out(self, x_TD: Tensor) -> InCodes | None:
        """The codes as the kernels read them, laid out anew where something they are made of has changed."""
        stored, held = self.stored, self._in_codes
        centres = self.compensation.centres
        if stored is None or centres or not InCodes.able(stored, self.activation, x_TD):
            return None
        parts = [*(self._parameters[name] for name in _BIASES), *self.router._buffers.values()]
        made_of = [value for value in parts if value is not None]
        if held is None or not held.follows(stored, made_of):
            judged = not self.shared and not self.look_ahead and self.experts == self.neurons
            held = InCodes(self.weights, self.router if judged else None, made_of)
            self._in_codes = held
        return held

    def _decode(self, held: OneToken, hidden: Tensor) -> Tensor:
        """One token, as `forward` computes it, with as little around the kernel as can be."""
        x_TD = hidden.reshape(1, -1).contiguous()
        self.context.previous_TD = x_TD
        mask_TE = self.selection.remembered(self.context)
        if mask_TE is None:
            mask_TE = self.select(self.router(x_TD, NO_ROWS))
        if self.shared:
            mask_TE = torch.cat([mask_TE.new_ones(1, self.shared), mask_TE], 1)
        share = about(int(mask_TE.count_nonzero()) / self.experts)
        work = Workload("cpu", held.layer, 1, share, share, torch.get_num_threads())
        self.chosen = chosen = fastest(held.able, work)
        if chosen == "native":
            return held(x_TD, mask_TE).view(hidden.shape)
        return BACKENDS[chosen].compute(x_TD, self.weights, mask_TE).view(hidden.shape)

    def compute(self, x_TD: Tensor, mask_TE: Tensor, weights: ExpertWeights) -> Tensor:
        """Output `[T, D]` of the experts in the mask, by the backend that `backend` names."""
        request = Request(x_TD, weights, mask_TE)
        backend = self.backend
        # In a name of its own: another thread may choose another one meanwhile.
        chosen = choose(request, self.density) if backend == "auto" else named(backend, request)
        self.chosen = chosen
        return BACKENDS[chosen].compute(x_TD, weights, mask_TE)


def _is(w_ND: Tensor, stored: Quantised, dtype: torch.dtype) -> bool:
    """Whether these are the values of the codes."""
    values_ND = stored.values()
    return any(torch.equal(w_ND.to(kind), values_ND.to(kind)) for kind in (w_ND.dtype, dtype))


def sparse_mlps(model: nn.Module) -> dict[int, SparseMlp]:
    """The SparseMlps of a model by layer index; empty for a dense model."""
    found = [module for module in model.modules() if isinstance(module, SparseMlp)]
    return dict(enumerate(found))


def use_backend(model: nn.Module, name: str) -> None:
    """Compute every layer with this entry of `BACKENDS`, or with `auto`."""
    for module in sparse_mlps(model).values():
        module.backend = name


Model = TypeVar("Model", bound=nn.Module)


def native_codes(model: Model, on: bool = True) -> Model:
    """Compute few tokens of every layer that is stored in codes from those, or no longer; gives the model back.

    Inputs are then rounded to 8 bits (`moefy.experts.backends.codes`). Layers that no kernel serves stay as they are.
    """
    for module in sparse_mlps(model).values():
        module.reads_codes, module._in_codes = on, None
    return model
