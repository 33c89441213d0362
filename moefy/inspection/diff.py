"""Where two models differ, over a lot of text: what `moefy diff` runs.

    found = moefy.diff("dense", "out", out="diff")      # diff/report.html, diff/inspection.json

Any two language models with one tokenizer: dense and moefied, before and after training, a checkpoint
and a later one, a model and one with a layer more. Two moefied ones with the same neurons in the same
experts (before and after recovery, say) also show how much of their routing they share.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moefy.data.inputs import load_tokenizer
from moefy.data.shards import CONTEXT, HELD_OUT, SELECT_SHARE
from moefy.errors import CheckpointError, MoefyError
from moefy.experts.loading import open_model
from moefy.inspection.causal.token_losses import TOKENS, token_losses
from moefy.inspection.inspect import Inspected, inspected, report_folder
from moefy.inspection.record import Table
from moefy.inspection.routing.statistics import router_saturation, routing_sample
from moefy.inspection.texts import Reading, read_texts
from moefy.models.artefact import Artefact, open_folder
from moefy.run.computing import asked
from moefy.run.console import Reporter


@asked
def diff(
    base: str | Path,
    other: str | Path,
    *,
    corpora: Any = None,
    out: str | Path | None = None,
    tokens: int = TOKENS,
    command: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
) -> Inspected:
    """Compare the log-probabilities that two checkpoints give to about `tokens` tokens of text.

    Either is a folder that `convert` wrote, which runs moefied, or any dense checkpoint. Texts are as
    for `inspect`; with the text of a conversion only documents are read that nothing was fitted on.
    `delta = log p_base - log p_other`: positive where the other is worse. Tables `hunt` (both tails in
    context), `hunt_domains`, `hunt_classes` and `hunt_summary`, with intervals over documents. Where
    both are moefied into the same experts, `saturation` is `router_saturation` of every layer.

    Raises `MoefyError` for models with different tokenizers, or without next-token probabilities.
    """
    with report_folder(out, base, other):
        reading, shared = _read(base, other, corpora, tokens)
        tables = _tables(base, other, reading, shared, tokens, Reporter(quiet=quiet))
        about: dict[str, Any] = {
            "model": f"{Path(base).name} and {Path(other).name}",
            "base": str(base),
            "other": str(other),
            "command": command,
            "settings": {"tokens": tokens},
            "corpora": reading.corpora,
            "documents": int(reading.documents.of_shard(HELD_OUT).sum()),
        }
        return inspected(reading, tables, about, out=out)


def _tables(
    base: str | Path,
    other: str | Path,
    reading: Reading,
    shared: bool,
    tokens: int,
    report: Reporter,
) -> dict[str, Table]:
    models = [_language_model(name) for name in (base, other)]
    tables = token_losses(models[0], models[1], reading, tokens=tokens, report=report)
    if shared:
        first, second = (routing_sample(model, reading, tokens, report) for model in models)
        tables["saturation"] = router_saturation(first, second)
    return tables


def _read(base: str | Path, other: str | Path, corpora: Any, tokens: int) -> tuple[Reading, bool]:
    """Texts that neither was fitted on, and whether both have the same experts."""
    artefacts, weights = zip(*(open_folder(n, verify=False) for n in (base, other)), strict=True)
    first, second = (load_tokenizer(checkpoint.folder) for checkpoint in weights)
    if first is not None and second is not None and first.get_vocab() != second.get_vocab():
        raise CheckpointError(
            f"{weights[0].folder} and {weights[1].folder}: have different tokenizers; only models with "
            "one tokenizer can be compared token by token"
        )
    fitted = next((artefact for artefact in artefacts if artefact is not None), None)
    enough = round(tokens / (1 - SELECT_SHARE))
    reading = read_texts(weights[0], "decoder", CONTEXT, fitted, corpora, tokens=enough)
    return reading, same_experts(*artefacts)


def _language_model(name: str | Path) -> PreTrainedModel:
    model = open_model(name, verify=True)
    if not model.can_generate():
        raise MoefyError(f"{name}: a {type(model).__name__} gives no next-token probabilities")
    return model


def same_experts(first: Artefact | None, second: Artefact | None) -> bool:
    """Whether both are moefied and every expert of one is that of the other, neuron by neuron."""
    if first is None or second is None or len(first.layers) != len(second.layers):
        return False
    return all(
        (one.layer, one.experts, one.shared) == (other.layer, other.experts, other.shared)
        and torch.equal(first.permutation(index), second.permutation(index))
        for index, (one, other) in enumerate(zip(first.layers, second.layers, strict=True))
    )
