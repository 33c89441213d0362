"""What a removal does to every document: cross-entropy and right first choices, kept as they are found.

A point that has been measured lies in the work folder, so that a run that was killed goes on from there.

Shapes: D documents, J judged tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.interpret.causal.texts import Texts
from moefy.interpret.statistics import Floats
from moefy.outputs import Said, nats_of, per_position, placed, say
from moefy.prune.removable import Gone, Removable


@dataclass(frozen=True)
class Point:
    """Sums over the tokens of every document."""

    ce_D: Floats
    """Cross-entropy, in nats."""
    right_D: Floats
    """Tokens that the model puts first."""

    def ce(self, texts: Texts) -> float:
        """Mean cross-entropy: of every domain over its tokens, then over domains."""
        return over_domains(self.ce_D, texts)

    def accuracy(self, texts: Texts) -> float:
        """Share of tokens that the model puts first, averaged likewise."""
        return over_domains(self.right_D, texts)


def by_domain(values_D: Floats, texts: Texts) -> Floats:
    """Mean over the tokens of every domain `[C]` of sums over documents."""
    domain_D = texts.documents.domain_D
    return np.bincount(domain_D, values_D) / np.bincount(domain_D, texts.tokens_D)


def over_domains(values_D: Floats, texts: Texts) -> float:
    """The mean of the domains' means."""
    return float(by_domain(values_D, texts).mean())


@torch.no_grad()
def judge(model: PreTrainedModel, texts: Texts) -> Point:
    """How a model predicts these texts."""
    ce: list[Floats] = []
    right: list[Floats] = []
    for batch in texts.batches:
        said = say(model, batch)
        for value_J, found in zip(_judgements(said), (ce, right), strict=True):
            found.append(placed(value_J.double(), said.keep_BT).sum(1).numpy())
    return Point(np.concatenate(ce), np.concatenate(right))


def _judgements(said: Said) -> tuple[Tensor, ...]:
    """Cross-entropy `[J]`, and whether the right token is put first."""

    def of(at: slice, logits_CV: Tensor) -> tuple[Tensor, ...]:
        assert said.targets_J is not None
        return nats_of(logits_CV, said, at), logits_CV.argmax(-1) == said.targets_J[at]

    return per_position(of, said)


class Kept:
    """Results by name, each a file of JSON in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def get(self, name: str) -> Any:
        """What was kept under this name; None where nothing was."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def put(self, name: str, value: Any) -> None:
        """Keep JSON values; the file appears when it is whole."""
        part = self.folder / f"{name}.part"
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(self.folder / f"{name}.json")


class Judge:
    """Judges removals, each once."""

    def __init__(self, removable: Removable, kept: Kept) -> None:
        self.removable, self.kept = removable, kept

    def __call__(self, name: str, gone: Gone, texts: Texts) -> Point:
        """The model without these neurons on these texts; `name` says which removal and which texts."""
        found = self.kept.get(name)
        if found is None:
            with self.removable.without(gone):
                point = judge(self.removable.model, texts)
            found = {"ce": point.ce_D.tolist(), "right": point.right_D.tolist()}
            self.kept.put(name, found)
        return Point(np.array(found["ce"]), np.array(found["right"]))
