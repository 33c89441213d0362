"""Which figures would a network have that has learnt nothing in its MLPs (control C2)?

Two controls, each converted by the same recipe from the same text, clustered and fitted anew:

    permuted        the entries of every matrix and bias of an MLP permuted within it (Filan et al. 2021)
    reinitialised   drawn anew from a normal distribution of the same mean and standard deviation

Embeddings, attention and norms stay as they were trained. Entries are mixed in a balanced gauge
(`balanced`), so that the control belongs to the function and not to how it was stored. A figure
that is the same for trained and for random weights is no evidence of anything learnt.

Shapes: N neurons, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.conversion.in_memory import in_memory
from moefy.conversion.task import Conversion
from moefy.data.corpus import Corpus, load_corpus
from moefy.errors import CorpusError
from moefy.experts.loading import load_dense
from moefy.experts.moefied import of
from moefy.experts.placement import running_dtype
from moefy.inspection.controls import figures
from moefy.inspection.record import Table, rows
from moefy.inspection.texts import Reading
from moefy.methods.partition.canonical import HOMOGENEOUS, canonical_gauge, canonical_order
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import read_mlp, sites
from moefy.models.mlp import DenseMlp
from moefy.recipe import from_dict
from moefy.run.computing import versions
from moefy.run.console import Reporter
from moefy.run.output import Stages

CONTROLS = ("permuted", "reinitialised")
P = 0.05

Describe = Callable[[PreTrainedModel, Reading], Mapping[str, Table]]
"""What makes the tables of a moefied model; the control's are made by the same function."""


def random_weights(
    model: PreTrainedModel,
    reading: Reading,
    describe: Describe,
    trained: Mapping[str, Table],
    *,
    corpus: Any = None,
    stages: Stages | None = None,
    seed: int = 0,
    report: Reporter | None = None,
) -> dict[str, Table]:
    """Table `random_weights`: layer, figure, trained, permuted, reinitialised, separates.

    `model` is from `moefy.load`, `trained` is what `describe(model, reading)` gave; every column of
    numbers of its table `layers` is a figure. `corpus` is what the model was converted with; left out,
    it is the bundled one, and a model that was converted with another has no such table. `stages` keeps
    the controls' tables: they are made once for a checkpoint, recipe, corpus, reading and versions. All
    its processes call this; the table is the first one's.

    Raises `CorpusError` where a corpus is given and is not that of the conversion.
    """
    report, stages = report or Reporter(quiet=True), stages or Stages(None, None)
    text = _text_of_conversion(of(model).artefact, corpus, report)
    if text is None:
        return {}
    decided = _decided(model, reading, describe, text, seed)
    made: dict[str, Mapping[str, Table]] = {}
    for control in CONTROLS:

        def describe_control(control: str = control) -> dict[str, Any]:
            moefied = converted(model, control, text, seed, report, stages)
            return dict(describe(moefied, reading))

        name, settings = f"random-weights-{control}", {"control": control, **decided}
        made[control] = stages.run(name, settings, describe_control)
    if not stages.processes.main:
        return {}
    return {"random_weights": compared(trained["layers"], {n: made[n]["layers"] for n in CONTROLS})}


def _decided(
    model: PreTrainedModel, reading: Reading, describe: Describe, text: Corpus, seed: int
) -> dict[str, Any]:
    """What decides the tables of a control."""
    return {
        "checkpoint": of(model).checkpoint.all_hashes(),
        "recipe": of(model).artefact.recipe,
        "corpus": text.sha256,
        "reading": [doc.sha256 for doc in reading.documents.documents],
        "describe": getattr(describe, "__qualname__", type(describe).__qualname__),
        "versions": versions(),
        "seed": seed,
    }


def _text_of_conversion(artefact: Artefact, corpus: Any, report: Reporter) -> Corpus | None:
    """What the model was converted with; None where nobody gave it and it is not the bundled one."""
    text = load_corpus(corpus)
    if text.sha256 == artefact.corpus["sha256"]:
        return text
    reason = (
        f"random weights: the model was converted with corpus '{artefact.corpus['name']}', which "
        f"'{text.name}' is not"
    )
    if corpus is not None:
        raise CorpusError(f"{reason}; give that one")
    report.say(f"{reason}: this control is left out")
    return None


def converted(
    model: PreTrainedModel,
    control: str,
    corpus: Corpus,
    seed: int,
    report: Reporter,
    stages: Stages,
) -> PreTrainedModel:
    """The control of a moefied model, converted in memory by the same recipe; the processes of the
    stages convert it together, in a folder that is gone afterwards."""
    artefact, checkpoint = of(model).artefact, of(model).checkpoint
    report.say(f"random weights: {control}")
    if stages.folder is not None:
        stages.folder.mkdir(parents=True, exist_ok=True)
    with stages.processes.folder(stages.folder) as folder:
        task = Conversion.planned(
            checkpoint, from_dict(artefact.recipe), corpus, folder, report=report,
            processes=stages.processes, dense=partial(random_model, checkpoint, control, seed),
        )  # fmt: skip
        return in_memory(task)[0]


def random_model(checkpoint: Checkpoint, control: str, seed: int) -> PreTrainedModel:
    """The dense model, its MLPs random in one of the two ways, where and as this machine runs it."""
    model = load_dense(checkpoint, dtype="auto")
    randomise(model, control, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = running_dtype(checkpoint)
    return nn.Module.to(model, device=device, dtype=dtype)


def balanced(mlp: DenseMlp) -> DenseMlp:
    """The MLP in fp32 and canonical order, what is free in each neuron's scale shared out evenly.

    Where the scale of a neuron's up row `u_j` is free (a gated MLP, or a homogeneous activation), it is
    set so that `||u_j|| = ||d_j||`, biases included in `u_j`; its sign is that of `canonical_gauge`.
    """
    mlp = mlp.on_cpu()
    same = canonical_gauge(mlp, canonical_order(mlp))
    degree = 1 if mlp.gate_ND is not None else HOMOGENEOUS.get(mlp.activation, 0)
    if not degree:
        return same
    square_N = same.up_ND.square().sum(1)
    if same.up_bias_N is not None:
        square_N = square_N + same.up_bias_N.square()
    up_N, down_N = square_N.sqrt(), same.down_ND.norm(dim=1)
    scale_N = (down_N / up_N).pow(1 / (1 + degree))
    # A neuron that reads or writes nothing stays as it is.
    scale_N = torch.where((up_N > 0) & (down_N > 0), scale_N, torch.ones_like(scale_N))
    return replace(
        same,
        up_ND=same.up_ND * scale_N[:, None],
        down_ND=same.down_ND / scale_N[:, None] ** degree,
        up_bias_N=None if same.up_bias_N is None else same.up_bias_N * scale_N,
    )


@torch.no_grad()
def randomise(model: PreTrainedModel, control: str, seed: int) -> None:
    """Take away what the MLPs of a dense model have learnt, in place, in one of the two ways."""
    for site in sites(model):
        views = read_mlp(site, lambda name: model.get_parameter(name).detach())
        generator = torch.Generator().manual_seed(seed * 10_007 + site.index)
        drawn = balanced(views)
        for name in _WEIGHTS:
            value, into = getattr(drawn, name), getattr(views, name)
            if value is not None:
                into.copy_(_drawn(value, control, generator))


_WEIGHTS = tuple(field.name for field in fields(DenseMlp) if field.name != "activation")


def _drawn(value: Tensor, control: str, generator: torch.Generator) -> Tensor:
    if control == "permuted":
        order = torch.randperm(value.numel(), generator=generator)
        return value.flatten()[order].view(value.shape)
    noise = torch.randn(value.shape, generator=generator)
    return noise * value.std(correction=0) + value.mean()


def compared(trained: Table, random: Mapping[str, Table]) -> Table:
    """The `layers` of the trained model beside those of its controls, a row for a figure and layer.

    `separates` of a row: where the figure has an interval, that of the trained model and those of both
    controls do not meet. Where it has none: over all layers the trained figures lie on one side of both
    controls' (Wilcoxon's signed ranks, p < .05), the same verdict for every layer; None below six
    layers, which cannot say so.
    """
    every = {"trained": trained, **random}
    by_layer = {who: {row["layer"]: row for row in rows(t)} for who, t in every.items()}
    names = [name for name in figures(trained) if all(name in t for t in every.values())]
    found = []
    for name in names:
        all_ = {who: [row[name] for row in layers.values()] for who, layers in by_layer.items()}
        over_layers = _ordered(all_)
        for layer in by_layer["trained"]:
            here = {who: layers[layer] for who, layers in by_layer.items()}
            apart = _apart(here, name)
            separates = over_layers if apart is None else apart
            found.append((layer, name, *(row[name] for row in here.values()), separates))
    columns = ("layer", "figure", *every, "separates")
    return {name: [row[at] for row in found] for at, name in enumerate(columns)}


def _apart(here: dict[str, dict[str, Any]], name: str) -> bool | None:
    """Whether the trained interval meets none of the controls'; None without intervals."""
    ends = {who: [row.get(f"{name}_{end}") for end in ("low", "high")] for who, row in here.items()}
    if any(end is None for pair in ends.values() for end in pair):
        return None
    spans = {who: np.array(pair, dtype=float) for who, pair in ends.items()}
    low, high = spans.pop("trained")
    return all(bool(high < span[0] or low > span[1]) for span in spans.values())


def _ordered(values: dict[str, list[Any]]) -> bool | None:
    """Whether the trained figures differ from both controls' in one direction over layers."""
    signs = set()
    trained = np.array(values.pop("trained"), dtype=float)
    for control in values.values():
        away = trained - np.array(control, dtype=float)
        away = away[~np.isnan(away)]
        if len(away) < 6:
            return None
        if not away.any() or stats.wilcoxon(away).pvalue >= P:
            return False
        signs.add(bool(np.median(away) > 0))
    return len(signs) == 1
