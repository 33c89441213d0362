"""Router saturation: how much of a layer's routing two checkpoints share, token by token.

    mean over tokens of |experts of the first & experts of the second| / k of the second

OLMoE's measure, with the two lines that it needs: what even chance and what the loads alone give.

Shapes: T tokens, D documents, E routed experts.
"""

import numpy as np
from transformers import PreTrainedModel

from moefy.data.documents import HELD_OUT
from moefy.errors import MoefyError
from moefy.inspection.account.observe import observe
from moefy.inspection.part import Pass
from moefy.inspection.routing.frame import RoutingFrame, Totals, ratio_columns
from moefy.inspection.routing.sample import RoutingSample, RoutingSampler, drawn_documents
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, joined, table
from moefy.run.console import Reporter


def routing_sample(
    model: PreTrainedModel,
    reading: Reading,
    tokens: int,
    report: Reporter | None = None,
    *,
    seed: int = 0,
) -> RoutingSample:
    """How a moefied model routes about `tokens` held-out tokens, whole documents drawn evenly.

    Two models of one tokenizer and one `seed` get the same documents, as `router_saturation` needs.
    """
    held_D = reading.documents.of_shard(HELD_OUT)
    chosen_D = drawn_documents(reading.tokens_D, tokens, seed, held_D)
    sampler = RoutingSampler(Pass(model, reading, seed), chosen_D)
    sizes = [len(batch.samples) for batch in reading.batches]
    firsts = enumerate(zip(reading.first_B, sizes, strict=True))
    batches = [number for number, (at, size) in firsts if chosen_D[at : at + size].any()]
    observe(model, reading, [sampler], batches=batches, report=report, what="routing")
    return sampler.sample()


def router_saturation(first: RoutingSample, second: RoutingSample, *, seed: int = 0) -> Table:
    """One row per layer: `saturation`, `saturation_chance` (k / E of the first), `saturation_load`
    (routing of the first dealt anew to tokens by load alone, `sum_e f_e f'_e / k`), with intervals.

    Raises `MoefyError` where the samples are not of the same tokens or experts.
    """
    _check(first, second)
    frame = RoutingFrame(second, seed)
    if len(frame) != len(first.tokens):
        first = first.take(np.isin(first.tokens.document_T, frame.sample.tokens.document_T))
    before = RoutingFrame(first, seed)
    parts = []
    for layer in range(len(second.packed)):
        one, other = before.routed(layer), frame.routed(layer)
        k_T = np.maximum(other.active_T, 1)
        runs_T = (other.active_T > 0).astype(np.float64)
        shared_T = {
            "saturation": (one.mask_TE * other.mask_TE).sum(1),
            "saturation_chance": one.active_T * other.active_T / max(one.experts, 1),
            "saturation_load": other.mask_TE @ one.load_E,
        }
        top_DX = frame.by_document(
            np.stack([runs_T * values_T / k_T for values_T in shared_T.values()], axis=1)
        )
        bottom_D = frame.by_document(runs_T[:, None])[:, 0]
        totals: Totals = {name: (top_DX[:, at], bottom_D) for at, name in enumerate(shared_T)}
        parts.append(table({"layer": [layer], **ratio_columns(frame, totals)}))
    return joined(parts)


def _check(first: RoutingSample, second: RoutingSample) -> None:
    one, other = first.tokens, second.tokens
    if len(one) != len(other) or not (
        np.array_equal(one.ids_T, other.ids_T) and np.array_equal(one.position_T, other.position_T)
    ):
        raise MoefyError(
            f"router saturation: the samples are of {len(one)} and {len(other)} tokens that are not "
            "the same; inspect both checkpoints on the same texts with the same seed"
        )
    if (first.experts, first.shared) != (second.experts, second.shared):
        raise MoefyError(
            f"router saturation: experts by layer {first.experts} and {second.experts}, shared "
            f"{first.shared} and {second.shared}; compare checkpoints of the same conversion"
        )
