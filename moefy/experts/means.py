"""What the neurons of a moefied model add on some text: their means and most frequent values.

One pass, and memory that does not grow with the text. A tally is kept as an intervention that changes
nothing, so that it sees exactly what an intervention replaces.

Shapes: T tokens, of b sequences at p positions each, N neurons of a layer in expert order, L layers.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.errors import MoefyError
from moefy.experts.moefied import ExpertStatistics
from moefy.experts.passes import walk
from moefy.experts.sparse_mlp import sparse_mlps

BINS = 256
_LEAST = 8
"""Values other than zero that the bins of a neuron are laid out by."""
_LAID_OUT = 1024
"""Most tokens that are."""
_ENTRIES = 2**20
"""Most values that are sorted into bins at a time."""


@torch.no_grad()
def statistics(
    model: PreTrainedModel, batches: Iterable[Batch | Mapping[str, Tensor]]
) -> ExpertStatistics:
    """Mean and most frequent value of what every neuron adds, in one pass over batches.

    A batch is one of `moefy.data.corpus.make_batches`, or what the model is called with; padding, by its
    attention mask, is left out. The model runs as it is: inside `all_experts` these are the numbers of
    the dense model; interventions in force are set aside. Memory does not grow with the text: `BINS`
    counts for each neuron.

    Raises `MoefyError` without any batch.
    """
    modules = sparse_mlps(model)
    read = [b if isinstance(b, Batch) else Batch([], dict(b), None) for b in batches]
    if not read:
        raise MoefyError(
            "statistics: no batch; give some, for example of moefy.data.corpus.make_batches"
        )
    tallies = {layer: _Tally() for layer in modules}
    before = {layer: module.intervention for layer, module in modules.items()}
    try:
        for layer, module in modules.items():
            module.intervention = tallies[layer]
        # The largest first: it says where the bins are.
        for batch in sorted(read, key=lambda b: -next(iter(b.inputs.values())).numel()):
            walk(model, batch)
    finally:
        for layer, module in modules.items():
            module.intervention = before[layer]
    return ExpertStatistics(
        mean_LN=[tally.mean_N() for tally in tallies.values()],
        peak_LN=[tally.peak_N() for tally in tallies.values()],
        tokens_L=[tally.tokens for tally in tallies.values()],
        dense=modules[0].all_on,
    )


class _Tally:
    """Sums and a histogram of every neuron of a layer, kept as an intervention that changes nothing.

    Zeros are counted by themselves: a neuron that is off, or a ReLU at rest, stands there exactly.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, run_TN: Tensor, places_BP: Tensor) -> Tensor:
        value_TN = run_TN[places_BP.flatten()]
        if not self.tokens:
            neurons, device = run_TN.shape[1], run_TN.device
            self.sum_N = torch.zeros(neurons, dtype=torch.float64, device=device)
            self.low_N = torch.full((neurons,), torch.nan, device=device)
            self.width_N = torch.full((neurons,), torch.nan, device=device)
            # One bin more for what lies in none.
            self.count_NB = torch.zeros(neurons, BINS + 1, dtype=torch.int32, device=device)
            self.zeros_N = torch.zeros(neurons, dtype=torch.int64, device=device)
        self.tokens += len(value_TN)
        self.sum_N += value_TN.sum(0, dtype=torch.float64)
        for piece_TN in value_TN.split(max(_LEAST, _ENTRIES // value_TN.shape[1])):
            self._sort(piece_TN.float())
        return run_TN

    def _sort(self, value_TN: Tensor) -> None:
        zero_TN = value_TN == 0
        self.zeros_N += zero_TN.sum(0)
        self._lay_out(value_TN[:_LAID_OUT])
        bin_TN = ((value_TN - self.low_N) / self.width_N).floor()
        outside_TN = zero_TN | ~((bin_TN >= 0) & (bin_TN < BINS))  # NaN if there are no bins
        flat_TN = bin_TN.masked_fill(outside_TN, BINS).long()
        flat_TN += torch.arange(flat_TN.shape[1], device=flat_TN.device) * (BINS + 1)
        count = torch.bincount(flat_TN.flatten(), minlength=self.count_NB.numel())
        self.count_NB += count.view(self.count_NB.shape)

    def _lay_out(self, value_TN: Tensor) -> None:
        """Bins about the median of the values that are not zero, if there are none yet."""
        new_N = self.low_N.isnan() & ((value_TN != 0).sum(0) >= _LEAST)
        if not new_N.any():
            return
        value_NT = value_TN[:, new_N].T.contiguous()
        sorted_NT = value_NT.masked_fill_(value_NT == 0, torch.nan).sort(1).values  # zeros last
        count_N = (~sorted_NT.isnan()).sum(1)
        low_N, median_N, high_N = (
            sorted_NT.gather(1, ((count_N - 1) * share).long()[:, None])[:, 0]
            for share in (0.25, 0.5, 0.75)
        )
        width_N = (high_N - low_N) / count_N ** (1 / 3)
        width_N = torch.where(width_N > 0, width_N, median_N.abs() * 1e-4)
        self.width_N[new_N] = width_N
        self.low_N[new_N] = median_N - width_N * (BINS // 2 + 0.5)

    def mean_N(self) -> Tensor:
        """The mean `[N]`, on the CPU."""
        return (self.sum_N / self.tokens).float().cpu()

    def peak_N(self) -> Tensor:
        """The most frequent value `[N]`, on the CPU."""
        count_NB = self.count_NB[:, :BINS].float()
        # Weights 1, 2, 1: one bin alone is noisy.
        smooth_NB = count_NB + pad(count_NB, (1, 1)).unfold(1, 3, 1).sum(-1)
        bin_N1 = smooth_NB.argmax(1, keepdim=True)
        about_N3 = pad(smooth_NB, (1, 1)).gather(1, bin_N1 + torch.arange(3, device=bin_N1.device))
        before_N, top_N, after_N = about_N3.T
        # The vertex of the parabola through the fullest bin and its neighbours.
        shift_N = 0.5 * (before_N - after_N) / (before_N - 2 * top_N + after_N)
        at_N = bin_N1[:, 0] + 0.5 + shift_N.nan_to_num(0.0)
        peak_N = self.low_N + at_N * self.width_N
        fullest_N = count_NB.amax(1)
        return torch.where(self.zeros_N >= fullest_N, 0.0, peak_N).cpu()
