"""Selective removal: take out of a model what it has for one domain, and measure what that costs.

    record = prune("moefied", "out", forget="python_code")       # experts of a moefied folder
    record = prune("model", "out", forget="python_code", unit="neuron")

What comes out is an ordinary checkpoint: the source's, with zeros in the place of the rows that the
removed neurons have in the down projections. docs/removal.md says how to read the figures.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefy import recipe as recipes
from moefy.data.corpus import Corpus, load_corpus
from moefy.errors import MoefyError
from moefy.inspection.removal.importance import importance, ranked, relative
from moefy.inspection.removal.matched import energy_matched, random_experts, single_neurons
from moefy.inspection.removal.points import Judge, Pair, against, area, largest, mean_row, row
from moefy.inspection.removal.relearning import relearning
from moefy.inspection.removal.removable import EXPERT, Gone, Removable, Source, gone_of, open_source
from moefy.inspection.removal.shards import Parts, choose_domains, read_parts
from moefy.inspection.removal.summary import card, draw
from moefy.inspection.removal.written import README, write
from moefy.run.console import Reporter
from moefy.run.output import OutputFolder
from moefy.run.provenance import machine, versions
from moefy.run.stages import Stages, digest

TOKENS = 20_000
"""Tokens that are read for each part, of the domain to forget and the others together."""
RETAIN_LOSS = 0.01
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Shares of the units at which the curve is measured."""
RECORD, PICTURE = "removal.json", "removal.png"


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
    if share is not None and retain_loss is not None:
        raise MoefyError("--share and --retain-loss both say how much goes; give one of them")
    if share is not None and not 0 < share <= 1:
        raise MoefyError(f"--share {share:g}: must be above 0 and at most 1")
    allowed = RETAIN_LOSS if retain_loss is None else retain_loss
    if allowed <= 0:
        raise MoefyError(f"--retain-loss {allowed:g}: must be above 0, such as 0.01 for 1 %")
    source = open_source(model, unit)
    text = load_corpus(corpus)
    domains = choose_domains(text, forget, None if retain is None else list(retain))
    report = Reporter(quiet=quiet)
    removable = Removable.load(source)
    split = recipes.from_dict(source.artefact.recipe).seed if source.artefact else seed
    parts = read_parts(source.checkpoint, "decoder", text, domains, tokens, split=split, seed=seed)
    output = OutputFolder(Path(out))
    settings = [forget, domains.retain, unit, allowed, share, tokens, seed]
    output.begin(_stamp(source, text, settings), resume=resume, overwrite=overwrite)
    output.need(source.checkpoint.bytes)
    with output.full_disk():
        judge = Judge(removable, Stages(output.work / "points"))
        removal = _Removal(removable, judge, parts, unit, seed, report)
        try:
            count = removal.count(allowed, share)
        except MoefyError:
            output.discard()
            raise
        finished = output.work / "model"
        record = {
            "kind": "removal",
            "source": {"name": source.name, "sha256": source.checkpoint.hashes()},
            "corpus": {"name": text.name, "sha256": text.sha256},
            "forget": forget,
            "retain": list(domains.retain),
            "unit": unit,
            "allowed": {"share": share} if share else {"retain_loss": allowed},
            "seed": seed,
            "parts": parts.counts(),
            **removal.figures(count),
            "machine": machine(),
        }
        removed = write(source, removal.gone(count), finished, report)
        record["neurons"] = [removed_N.nonzero().flatten().tolist() for removed_N in removed]
        (finished / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (finished / README).write_text(card(record), encoding="utf-8")
        if not draw(record, finished / PICTURE):
            report.say("no picture of the curve: pip install moefy[plots]")
    output.commit(finished)
    return record


def _stamp(source: Source, text: Corpus, settings: list[Any]) -> str:
    """What decides the result: another run must not go on with these points."""
    artefact = source.artefact.sha256 if source.artefact else {}
    decided = [source.checkpoint.hashes(), artefact, settings, text.sha256, versions()]
    return digest(decided)


class _Removal:
    """One ranking of the units, and what removing its first ones does."""

    def __init__(
        self,
        removable: Removable,
        judge: Judge,
        parts: Parts,
        unit: str,
        seed: int,
        report: Reporter,
    ) -> None:
        self.removable, self.judge, self.parts = removable, judge, parts
        self.unit, self.seed, self.report = unit, seed, report
        self.units = removable.units(unit)
        self.total = sum(map(len, self.units))
        self.neurons = [site.neurons for site in removable.sites]
        self.order = ranked(relative(*importance(removable, parts.rank, unit, report)))

    def gone(self, count: int) -> list[Any]:
        """The neurons of the first units."""
        return gone_of(self.units, self.order[:count], self.neurons)

    def count(self, allowed: float, share: float | None) -> int:
        """How many units go. Raises `MoefyError` where one alone costs too much."""
        if share is not None:
            return max(1, round(share * self.total))
        texts = self.parts.decide.retain
        base = self.judge("base-decide-retain", self.removable.nothing(), texts).ce(texts)

        def rise(count: int) -> float:
            point = self.judge(f"{count}-decide-retain", self.gone(count), texts)
            found = point.ce(texts) / base - 1
            self.report.say(f"without {count} {self.unit}s: retain loss {found:+.2%}")
            return found

        count = largest(self.total, lambda count: rise(count) <= allowed)
        if not count:
            smaller = ", or remove single neurons with --unit neuron" if self.unit == EXPERT else ""
            raise MoefyError(
                f"--retain-loss {allowed:g}: the first {self.unit} alone raises the cross-entropy of the "
                f"domains to retain by {rise(1):.2%}; allow more{smaller}"
            )
        return count

    def pair(self, name: str, gone: Gone) -> Pair:
        """A removal on the texts that measure."""
        part = self.parts.measure
        return (
            self.judge(f"{name}-measure-forget", gone, part.forget),
            self.judge(f"{name}-measure-retain", gone, part.retain),
        )

    def figures(self, count: int) -> dict[str, Any]:
        """The curve, the removal of `count` units beside its controls, and relearning."""
        part, gone = self.parts.measure, self.gone(count)
        neurons = int(sum(int(gone_N.sum()) for gone_N in gone))
        base = self.pair("base", self.removable.nothing())
        chosen = self.pair("chosen", gone)
        pairs = {0: base, count: chosen}
        wanted = {max(1, round(share * self.total)) for share in SHARES} - {count}
        for other in self.report.track(sorted(wanted), "curve"):
            pairs[other] = self.pair(str(other), self.gone(other))
        curve = [
            {"units": n, "share": n / self.total, **row(pairs[n], base, part)}
            for n in sorted(pairs)
        ]
        matched = energy_matched(self.removable, self.parts.rank, gone, self.seed, self.report)
        others = self.controls(count, neurons)
        energy = [
            self.pair(f"energy-{draw}", drawn)
            for draw, drawn in enumerate(self.report.track(matched.sets, "energy-matched"))
        ]
        at = {"removal": row(chosen, base, part)}
        at |= {name: mean_row(found, base, part) for name, found in others.items()}
        at["energy"] = mean_row(energy, base, part)
        self.report.say("relearn")
        relearned = relearning(
            self.removable, self.judge, gone, self.parts.lesson,
            decide=self.parts.decide.forget, measure=part.forget, seed=self.seed,
        )  # fmt: skip
        return {
            "removed": {
                "units": count, "of_units": self.total, "share": count / self.total,
                "neurons": neurons, "of_neurons": sum(self.neurons),
            },
            "curve": curve,
            "area": area([(row_["accuracy_retain"], row_["accuracy_forget"]) for row_ in curve]),
            "at": at,
            "energy": {"ratio": matched.ratio, "close": matched.close},
            "against_energy": against(
                chosen[0], base[0], [found[0] for found in energy], part.forget
            ),
            "relearning": relearned,
        }  # fmt: skip

    def controls(self, count: int, neurons: int) -> dict[str, list[Pair]]:
        """Random units, and for experts single neurons."""
        drawn = random_experts(self.removable, self.unit, count, self.seed)
        found = {
            "experts": [
                self.pair(f"random-{draw}", gone)
                for draw, gone in enumerate(self.report.track(drawn, "random experts"))
            ]
        }
        if self.unit == EXPERT:
            gone = single_neurons(self.removable, self.parts.rank, neurons, self.report)
            found["neurons"] = [self.pair("neurons", gone)]
        return found
