"""Selective removal: take out of a model what it has for one domain, and measure what that costs.

    record = prune("moefied", "out", forget="python_code")       # experts of a moefied folder
    record = prune("model", "out", forget="python_code", unit="neuron")

Units are ranked, as many go as are allowed, the causal engine measures what that costs beside controls, and
what comes out is an ordinary checkpoint: the source's, with zeros in the place of the rows that the removed
neurons have in the down projections. docs/removal.md says how to read the figures.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.data.corpus import Corpus, load_corpus
from moefy.errors import MoefyError
from moefy.inspection.causal.engine import Neurons
from moefy.inspection.removal import (
    EXPERT,
    NEURON,
    README,
    Source,
    neurons_of_units,
    open_source,
    units_of,
)
from moefy.inspection.removal.figures import Judge, Pair, against, area, largest, mean_row, row
from moefy.inspection.removal.parts import Parts, choose_domains, read_parts
from moefy.inspection.removal.relearning import relearning
from moefy.inspection.removal.sets import CONTROLS, ENERGY, Removal, ranked
from moefy.inspection.removal.summary import card, draw
from moefy.run.computing import asked, machine
from moefy.run.console import Reporter
from moefy.run.job import Job
from moefy.run.tables import NO_PLOTS, has_plots

TOKENS = 20_000
"""Tokens that are read for each part, of the domain to forget and the others together."""
RETAIN_LOSS = 0.01
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Shares of the units at which the curve is measured."""
RECORD, PICTURE = "removal.json", "removal.png"


@asked
def prune(
    model: str | Path,
    out: str | Path,
    *,
    forget: str,
    retain: Sequence[str] | None = None,
    unit: str = EXPERT,
    retain_loss: float | None = None,
    share: float | None = None,
    corpus: Any = None,
    tokens: int = TOKENS,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Remove the experts, or with `unit` "neuron" single neurons, that a domain needs most and the
    others least; the result is the folder `out`.

    `model` is a folder that `convert` wrote, or for neurons any checkpoint of a decoder. `retain` names
    the domains that are to stay as they are; None is all others. As much goes as raises their mean
    cross-entropy by `retain_loss` (0.01 where neither is given), or a `share` of the units.

    Returns the record, which is also in `out/removal.json`. Raises `MoefyError` for anything that is
    the user's to mend; `out` then is as it was.
    """
    allowed = _allowed(share, retain_loss)
    job = Job("prune", out, resume=resume, overwrite=overwrite, quiet=quiet, reads=[model])
    source, text = open_source(model, unit), load_corpus(corpus)
    job.output.apart_from(source.checkpoint.folder)
    domains = choose_domains(text, forget, None if retain is None else list(retain))
    parts = read_parts(source, text, domains, tokens, seed=seed)
    about = {"forget": forget, "retain": list(domains.retain), "unit": unit, "allowed": allowed}
    decided = [source.decided, text.sha256, about, tokens, seed]
    with job.running(decided, disk=source.checkpoint.bytes, worthless=(MoefyError,)):
        removal = _Removal(
            source, parts, Judge(source.engine(), job.stages), unit, seed, job.report
        )
        record = removal.written(removal.count(allowed), text, about, job.finished)
    job.commit()
    return record


def _allowed(share: float | None, retain_loss: float | None) -> dict[str, float]:
    """How much may go."""
    if share is not None and retain_loss is not None:
        raise MoefyError("--share and --retain-loss both say how much goes; give one of them")
    if share is not None:
        if not 0 < share <= 1:
            raise MoefyError(f"--share {share:g}: must be above 0 and at most 1")
        return {"share": share}
    loss = RETAIN_LOSS if retain_loss is None else retain_loss
    if loss <= 0:
        raise MoefyError(f"--retain-loss {loss:g}: must be above 0, such as 0.01 for 1 %")
    return {"retain_loss": loss}


@dataclass(frozen=True)
class _Removal:
    """One ranking of the units, and what removing its first ones does."""

    source: Source
    parts: Parts
    judge: Judge
    unit: str
    seed: int
    report: Reporter

    @cached_property
    def order(self) -> Tensor:
        """Numbers of the units, those to go first in front."""
        return ranked(self.judge.engine, self.parts.rank, self.unit, self.report)

    def first(self, count: int) -> Neurons:
        """The neurons of the first units."""
        return neurons_of_units(self.judge.engine, self.unit, self.order[:count])

    def count(self, allowed: dict[str, float]) -> int:
        """How many units go. Raises `MoefyError` where one alone costs too much."""
        if "share" in allowed:
            return max(1, round(allowed["share"] * len(self.order)))
        loss, texts = allowed["retain_loss"], self.parts.decide.retain
        base = self.judge("base-decide-retain", {}, texts).ce(texts)

        def rise(count: int) -> float:
            point = self.judge(f"{count}-decide-retain", self.first(count), texts)
            rise = point.ce(texts) / base - 1
            self.report.say(f"without {count} {self.unit}s: retain loss {rise:+.2%}")
            return rise

        count = largest(len(self.order), lambda count: rise(count) <= loss)
        if not count:
            smaller = ", or remove single neurons with --unit neuron" if self.unit == EXPERT else ""
            raise MoefyError(
                f"--retain-loss {loss:g}: the first {self.unit} alone raises the cross-entropy of the "
                f"domains to retain by {rise(1):.2%}; allow more{smaller}"
            )
        return count

    def written(
        self, count: int, text: Corpus, about: dict[str, Any], folder: Path
    ) -> dict[str, Any]:
        """Remove `count` units: the checkpoint, its record, a card and a picture; returns the record."""
        record = {
            "kind": "removal",
            "source": {"name": self.source.name, "sha256": self.source.checkpoint.hashes()},
            "corpus": {"name": text.name, "sha256": text.sha256},
            **about,
            "seed": self.seed,
            "parts": self.parts.counts(),
            **self.figures(count),
            "machine": machine(),
            "neurons": self.source.write(self.first(count), folder, self.report),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / README).write_text(card(record), encoding="utf-8")
        if has_plots():
            draw(record, folder / PICTURE)
        else:
            self.report.say(f"no picture of the curve: {NO_PLOTS}")
        return record

    def figures(self, count: int) -> dict[str, Any]:
        """The curve, the removal of `count` units beside its controls, and relearning."""
        engine, removed = self.judge.engine, self.first(count)
        removal = Removal(
            engine, self.unit, count, removed, self.parts.rank, self.seed, self.report
        )
        part, total = self.parts.measure, len(self.order)
        base, chosen = (self.judge.pair(n, g, part) for n, g in (("base", {}), ("chosen", removed)))
        curve = self.curve({0: base, count: chosen})
        drawn = {name: control.draw(removal) for name, control in CONTROLS.items()}
        pairs = {name: self.pairs(name, some.sets) for name, some in drawn.items() if some.sets}
        at = {name: mean_row(some, base, part) for name, some in pairs.items()}
        others = [pair[0] for pair in pairs[ENERGY]]
        self.report.say("relearn")
        return {
            "removed": {
                "units": count, "of_units": total, "share": count / total,
                "neurons": removal.size, "of_neurons": sum(units_of(engine, NEURON).values()),
            },
            "curve": curve,
            "area": area([(point["accuracy_retain"], point["accuracy_forget"]) for point in curve]),
            "at": {"removal": row(chosen, base, part)} | at,
            "energy": {"ratio": drawn[ENERGY].ratio, "close": drawn[ENERGY].close},
            "against_energy": against(chosen[0], base[0], others, part.forget),
            "relearning": self.relearned(removed),
        }  # fmt: skip

    def curve(self, pairs: dict[int, Pair]) -> list[dict[str, Any]]:
        """The figures at `SHARES` of the units, and at the numbers of which there are points already."""
        total, part, base = len(self.order), self.parts.measure, pairs[0]
        wanted = {max(1, round(share * total)) for share in SHARES} - set(pairs)
        for count in self.report.track(sorted(wanted), "curve"):
            pairs[count] = self.judge.pair(str(count), self.first(count), part)
        return [
            {"units": n, "share": n / total, **row(pairs[n], base, part)} for n in sorted(pairs)
        ]

    def pairs(self, name: str, sets: list[Neurons]) -> list[Pair]:
        """Every set of a control, judged."""
        return [
            self.judge.pair(f"{name}-{draw}", removed, self.parts.measure)
            for draw, removed in enumerate(self.report.track(sets, f"control: {name}"))
        ]

    def relearned(self, removed: Neurons) -> dict[str, Any]:
        """What the relearning test says, kept when it is done."""
        stages = self.judge.stages
        if not stages.has("relearning"):
            record = relearning(self.source, self.judge, removed, self.parts, seed=self.seed)
            stages.keep("relearning", record)
        return dict(stages.read("relearning"))
