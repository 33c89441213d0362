"""Everything that is known of causes: the matrix, its chance level, the screen, what is kept, pairs.

    tables = causal(model, reading, work=Path("work"))

Shapes: N neurons, E experts.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moefy.data.documents import HELD_OUT, SELECT
from moefy.errors import MoefyError, unknown_choice
from moefy.experts.interventions import MODES, ExpertStatistics, statistics
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import all_experts
from moefy.inspection.causal.attribution import every_expert, screen, screen_table
from moefy.inspection.causal.documents import Texts, draw
from moefy.inspection.causal.effects import Effects, gone, neurons_of, of_sets
from moefy.inspection.causal.engine import DENSE, MOEFIED, Engine
from moefy.inspection.causal.interactions import non_additivity
from moefy.inspection.causal.matrix import (
    Matrix,
    Measured,
    Pair,
    labelled,
    matrix,
    strongest,
    with_q,
)
from moefy.inspection.causal.nulls import RandomSets, energy_matrices, random_sets
from moefy.inspection.causal.sufficiency import keep_only
from moefy.inspection.causal.token_losses import dense_against_moefied
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, joined, table
from moefy.run.console import Reporter
from moefy.run.processes import ALONE, Processes
from moefy.run.provenance import versions
from moefy.run.stages import Stages

TOKENS = 20_000
NULLS = 20
_LEAST_NULLS = 3
MOST_EXACT = 256
"""Up to so many experts in all, every one is run; above, `SCREENED` that the screen puts first."""
SCREENED = 64
OTHER = 20
"""Experts that are run in the other modes, and in the moefied model."""
KEPT_SHARE = 0.5
"""Share of the tokens that `keep_only` is judged on."""


def causal(
    model: PreTrainedModel,
    reading: Reading,
    *,
    tokens: int = TOKENS,
    mode: str = "mean",
    nulls: int = NULLS,
    source: Reading | None = None,
    seed: int = 0,
    report: Reporter | None = None,
    work: Path | None = None,
    processes: Processes = ALONE,
) -> dict[str, Table]:
    """Tables `causal`, `screen`, `keep_only`, `non_additivity`, columns of `experts`, and for language
    models the hunt between the dense and the moefied model.

    About `tokens` tokens of the held-out shard are read, as many documents of every domain. They are
    drawn from `source`, a larger `Reading` of the same corpora, or from `reading` where there is none;
    document numbers in the hunt are those of `reading`. `nulls` random sets stand beside every bin of experts; 0 leaves them out. With `work`, a folder, a run that
    was broken off is taken up again after the last layer; another model, text or setting starts anew.
    `processes`, all of which call this, share out the batches of every step.

    Raises `MoefyError` for a mode that does not exist, and for 1 or 2 random sets.
    """
    if mode not in MODES:
        raise MoefyError(unknown_choice("mode", mode, MODES))
    if 0 < nulls < _LEAST_NULLS:
        raise MoefyError(
            f"nulls={nulls}: so few random sets have no spread to measure by; give {NULLS}, or 0 for none"
        )
    run = _Run.of(model, source or reading, tokens, mode, nulls, seed, report, work, processes)
    measured = run.dense_matrix()
    found, rows = matrix(measured, run.texts, seed=seed)
    how = "exact" if run.exact else f"exact, the first {len(found.experts)} of the screen"
    parts = [labelled(rows, which=DENSE, mode=mode, how=how)]
    top = strongest(found, OTHER)
    best = [found.experts[i] for i in top]
    parts += [labelled(rows, which=w, mode=m, how=f"exact, strongest {len(best)}")
              for w, m, rows in run.others(best)]  # fmt: skip
    alone = Effects.join(part.effects for part in measured).take(top)
    shown = with_q(joined(parts))
    tables = {
        "causal": shown,
        "screen": screen_table(run.engine, run.screen(HELD_OUT), run.texts, found, seed=seed),
        "keep_only": run.keep_only(),
        "non_additivity": non_additivity(run.engine, run.texts, best, alone, run.report),
        "experts": _experts(run.engine, found, shown, run.texts),
    }
    if reading.kind == "decoder":
        tables |= dense_against_moefied(model, reading, report=run.report, processes=processes)
    return {name: given for name, given in tables.items() if given}


@dataclass(frozen=True)
class _Run:
    """One call of `causal`: the texts, the engines, and what is kept between runs."""

    model: PreTrainedModel
    texts: Texts
    select: Texts
    kept: Texts
    engine: Engine
    nulls: int
    seed: int
    report: Reporter
    stages: Stages
    means: dict[str, ExpertStatistics]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        reading: Reading,
        tokens: int,
        mode: str,
        nulls: int,
        seed: int,
        report: Reporter | None,
        work: Path | None,
        processes: Processes,
    ) -> "_Run":
        texts, select = (draw(reading, s, tokens, seed=seed) for s in (HELD_OUT, SELECT))
        kept = draw(reading, HELD_OUT, round(KEPT_SHARE * tokens), seed=seed)
        # Means are of text that no effect is judged on.
        with all_experts(model):
            dense = statistics(model, select.batches)
        means = {DENSE: dense, MOEFIED: statistics(model, select.batches)}
        engine = _engine(texts, Engine(model, mode=mode, means=dense, processes=processes))
        decided = None
        if work is not None:
            decided = [
                _digest(model),
                *map(_digest_of_texts, (texts, select, kept)),
                seed,
                versions(),
            ]
        return cls(
            model, texts, select, kept, engine, nulls, seed, report or Reporter(quiet=True),
            Stages(work, decided, processes), means,
        )  # fmt: skip

    @property
    def exact(self) -> bool:
        """Whether every expert is run."""
        return len(every_expert(self.engine)) <= MOST_EXACT

    def screen(self, shard: str) -> Any:
        """The screen of one shard, computed once."""
        texts = self.texts if shard == HELD_OUT else self.select
        engine = self.engine

        def make() -> dict[str, Any]:
            return {"screen": screen(engine, texts, self.report, f"screen, {shard}").tolist()}

        return np.array(self.stages.run(f"screen-{shard}", engine.mode, make)["screen"])

    def chosen(self) -> dict[int, list[int]]:
        """The experts that are run, by layer."""
        pairs = every_expert(self.engine)
        if not self.exact:
            size_S = np.abs(self.screen(SELECT)).mean(1)
            pairs = sorted(pairs[i] for i in np.argsort(-size_S, kind="stable")[:SCREENED])
        found: dict[int, list[int]] = defaultdict(list)
        for layer, expert in pairs:
            found[layer].append(expert)
        return dict(found)

    def dense_matrix(self) -> list[Measured]:
        """The exact effects, layer by layer; finished layers are taken from the work folder."""
        return [
            self._measured(
                self.engine,
                f"{DENSE}, {self.engine.mode}, layer {layer}",
                [(layer, expert) for expert in experts],
                self.nulls,
            )
            for layer, experts in self.chosen().items()
        ]

    def others(self, best: list[Pair]) -> list[tuple[str, str, Table]]:
        """The strongest experts in the other modes, and in the moefied model."""
        mode, found = self.engine.mode, []
        for which, other in [(DENSE, m) for m in MODES if m != mode] + [(MOEFIED, mode)]:
            given = Engine(
                self.model, which=which, mode=other, means=self.means[which],
                processes=self.engine.processes,
            )  # fmt: skip
            engine = _engine(self.texts, given)
            what = f"{which}, {other}, strongest {len(best)}"
            measured = self._measured(engine, what, sorted(best), 0)
            rows = matrix([measured], self.texts, seed=self.seed)[1]
            # Chosen by the same documents: a test of their selectivity would find what was looked for.
            rows["csi_p"] = [None] * len(rows["csi_p"])
            found.append((which, other, rows))
        return found

    def keep_only(self) -> Table:
        """Table `keep_only`."""

        def make() -> Table:
            return keep_only(
                self.engine,
                self.screen(SELECT),
                self.select,
                self.kept,
                self.report,
                seed=self.seed,
            )

        return self.stages.run("keep-only", self.engine.mode, make)

    def _measured(self, engine: Engine, what: str, experts: list[Pair], nulls: int) -> Measured:
        """The effects of these experts, and of random sets beside them where they are of one layer."""
        given = [neurons_of(engine, *pair) for pair in experts]
        layers = [layer for layer, _ in experts]

        def draw_sets() -> RandomSets:
            energy_NN = energy_matrices(engine, self.texts.batches, layers[:1])[layers[0]]
            return random_sets(engine, energy_NN, layers[0], given, nulls, self.seed)

        def make() -> dict[str, Any]:
            sets, drawn = [gone(engine, *row) for row in zip(layers, given, strict=True)], None
            if nulls:
                drawn = engine.processes.once(draw_sets)
                sets += [gone(engine, layers[0], numbers) for numbers in drawn.sets]
            effects = of_sets(engine, self.texts, sets, self.report, what)
            return {"effects": _json(effects), "sets": None if drawn is None else _json(drawn)}

        kept = self.stages.run(what.replace(", ", "-").replace(" ", "-"), [experts, nulls], make)
        effects = _effects_of(kept["effects"])
        if kept["sets"] is None:
            return Measured(experts, effects)
        of_experts, of_random = slice(len(experts)), slice(len(experts), None)
        sets = _sets_of(kept["sets"])
        return Measured(experts, effects.take(of_experts), sets, effects.take(of_random))


def _engine(texts: Texts, engine: Engine) -> Engine:
    """The engine with its runs taken up where the first batch says, the same in all processes."""
    engine.start = engine.shortcut(texts.batches[0])
    return engine


def _effects_of(kept: dict[str, Any]) -> Effects:
    return Effects(**{name: np.array(values, dtype=float) for name, values in kept.items()})


def _sets_of(kept: dict[str, Any]) -> RandomSets:
    sets = [np.array(s, dtype=np.int64) for s in kept["sets"]]
    return RandomSets(
        sets, *(np.array(kept[n]) for n in ("bin_S", "energy_S", "bin_E", "energy_E"))
    )


def _json(given: Effects | RandomSets) -> dict[str, Any]:
    """Arrays as lists."""
    return {
        name: [part.tolist() for part in value] if isinstance(value, list) else value.tolist()
        for name, value in vars(given).items()
    }


def _experts(engine: Engine, found: Matrix, shown: Table, texts: Texts) -> Table:
    """Columns of `experts`: the domain that each is most selective for; None where it was not run."""
    domains = texts.documents.domains
    at = {pair: row for row, pair in enumerate(found.experts)}
    selective = np.nan_to_num(found.csi.mean_C, nan=-np.inf).argmax(1)
    rows: dict[str, list[Any]] = {name: [] for name in ("layer", "expert", *_OF_EXPERTS)}
    for layer, expert in every_expert(engine):
        row = at.get((layer, expert))
        best = None if row is None else row * len(domains) + int(selective[row])
        rows["layer"].append(layer)
        rows["expert"].append(expert)
        rows["causal_ce"].append(None if row is None else float(found.ce.mean_C[row].mean()))
        for name, source in _OF_EXPERTS.items():
            if source:
                rows[name].append(None if best is None else shown[source][best])
    return table(rows)


_OF_EXPERTS = {
    "causal_ce": "",
    "causal_domain": "domain",
    "causal_csi": "csi",
    "causal_csi_low": "csi_low",
    "causal_csi_high": "csi_high",
    "causal_csi_q": "csi_q",
    "causal_percentile": "percentile",
}
"""Columns of `experts`, and the columns of `causal` that they show the best cell of."""


def _digest_of_texts(texts: Texts) -> str:
    digest = hashlib.sha256()
    for batch in texts.batches:
        for sample in batch.samples:
            label = (sample.document.domain, sample.document.source_id)
            values = {name: value.tolist() for name, value in sample.inputs.items()}
            digest.update(repr((label, values)).encode())
    return digest.hexdigest()


def _digest(model: PreTrainedModel) -> list[str]:
    """What tells one model from another: its routing and every weight that is in memory."""
    artefact = of(model).artefact
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        if not value.is_meta:
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
    routing = [repr(entry) for entry in artefact.layers]
    return [digest.hexdigest(), *routing, *sorted(artefact.sha256.values())]
