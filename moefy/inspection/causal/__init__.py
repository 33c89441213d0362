"""Everything that is known of causes: the matrix, its chance level, attribution, sufficiency, interactions.

    tables = causal(model, reading, work=Path("work"))

Shapes: N neurons, E experts, S all experts, layer by layer, Q documents.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moefy.data.shards import HELD_OUT, SELECT
from moefy.errors import MoefyError, unknown_choice
from moefy.evaluation.statistics import Floats
from moefy.experts.interventions import MODES, ExpertStatistics, statistics
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import all_experts
from moefy.inspection.causal.attribution import attribution, attribution_table
from moefy.inspection.causal.documents import Texts, draw
from moefy.inspection.causal.engine import (
    DENSE,
    MOEFIED,
    AblationEngine,
    Effects,
    Pair,
    neurons_of,
    of_layer,
    of_sets,
)
from moefy.inspection.causal.matrix import Matrix, Measured, labelled, matrix, strongest, with_q
from moefy.inspection.causal.nulls import RandomSets, energy_matrices, random_sets
from moefy.inspection.causal.sufficiency import interactions, sufficiency
from moefy.inspection.causal.token_losses import dense_against_moefied
from moefy.inspection.record import Table, joined, table
from moefy.inspection.texts import Reading
from moefy.run.computing import versions
from moefy.run.console import Reporter
from moefy.run.output import Stages
from moefy.run.processes import ALONE, Processes

TOKENS = 20_000
NULLS = 20
_LEAST_NULLS = 3
MOST_EXACT = 256
"""Up to this many experts in all, every one is run; above, the first `ATTRIBUTED` by attribution."""
ATTRIBUTED = 64
OTHER = 20
"""Experts that are run in the other modes, and in the moefied model."""
SUFFICIENCY_SHARE = 0.5
"""Share of the tokens that `sufficiency` is judged on."""


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
    models the token losses of the moefied model beside the dense one.

    About `tokens` tokens of the held-out shard are read, as many documents of every domain. They are
    drawn from `source`, a larger `Reading` of the same corpora, or from `reading` if there is none;
    document numbers of token losses are those of `reading`. `nulls` random sets stand beside every bin
    of experts; 0 leaves them out. With `work`, a folder, a run that was broken off is taken up again
    after the last layer; another model, text or setting starts anew. `processes`, all of which call
    this, share out the batches of every step.

    Raises `MoefyError` for a mode that does not exist, and for 1 or 2 random sets.
    """
    if mode not in MODES:
        raise MoefyError(unknown_choice("mode", mode, MODES))
    if 0 < nulls < _LEAST_NULLS:
        raise MoefyError(
            f"nulls={nulls}: so few random sets have no spread to measure by; give {NULLS}, or 0 for none"
        )
    report = report or Reporter(quiet=True)
    texts = _AllTexts.of(source or reading, tokens, seed)
    stages = Stages(work, work and [_digest(model), *texts.digests, seed, versions()], processes)
    tables = _Run(model, texts, mode, nulls, seed, report, stages).tables()
    if reading.kind == "decoder":
        tables |= dense_against_moefied(model, reading, report=report, processes=processes)
    return {name: rows for name, rows in tables.items() if rows}


@dataclass(frozen=True)
class _AllTexts:
    """What is read."""

    held_out: Texts
    select: Texts
    sufficiency: Texts

    @classmethod
    def of(cls, reading: Reading, tokens: int, seed: int) -> "_AllTexts":
        held_out, select = (draw(reading, s, tokens, seed=seed) for s in (HELD_OUT, SELECT))
        share = round(SUFFICIENCY_SHARE * tokens)
        return cls(held_out, select, draw(reading, HELD_OUT, share, seed=seed))

    @property
    def digests(self) -> list[str]:
        """What tells these texts from others."""
        return [_digest_of_texts(texts) for texts in vars(self).values()]


@dataclass(frozen=True)
class _Run:
    """One call of `causal`: the model, the texts, and what is kept between runs."""

    model: PreTrainedModel
    texts: _AllTexts
    mode: str
    nulls: int
    seed: int
    report: Reporter
    stages: Stages

    @cached_property
    def means(self) -> dict[str, ExpertStatistics]:
        """Of text that no effect is judged on."""
        with all_experts(self.model):
            dense = statistics(self.model, self.texts.select.batches)
        return {DENSE: dense, MOEFIED: statistics(self.model, self.texts.select.batches)}

    @cached_property
    def engine(self) -> AblationEngine:
        """The dense model."""
        return self.started(DENSE, self.mode)

    def started(self, which: str, mode: str) -> AblationEngine:
        """An engine with its runs taken up where the first batch says, the same in all processes."""
        means, processes = self.means[which], self.stages.processes
        engine = AblationEngine(
            self.model, which=which, mode=mode, means=means, processes=processes
        )
        engine.start = engine.shortcut(self.texts.held_out.batches[0])
        return engine

    def tables(self) -> dict[str, Table]:
        """All but token losses."""
        engine, texts = self.engine, self.texts.held_out
        # Finished layers are taken from the work folder.
        measured = [
            self._measured(engine, f"{DENSE}, {self.mode}, layer {layer}", experts, self.nulls)
            for layer, experts in self.chosen().items()
        ]
        square, rows = matrix(measured, texts, seed=self.seed)
        how = "exact" if self.exact else f"exact, the first {len(square.experts)} of the screen"
        parts = [labelled(rows, which=DENSE, mode=self.mode, how=how)]
        top = strongest(square, OTHER)
        best = [square.experts[i] for i in top]
        how = f"exact, strongest {len(best)}"
        parts += [labelled(rows, which=w, mode=m, how=how) for w, m, rows in self.others(best)]
        alone = Effects.join(part.effects for part in measured).take(top)
        shown, attributed = with_q(joined(parts)), self.attribution(HELD_OUT)
        return {
            "causal": shown,
            "screen": attribution_table(engine, attributed, texts, square, seed=self.seed),
            "keep_only": self.sufficiency(),
            "non_additivity": interactions(engine, texts, best, alone, self.report),
            "experts": _experts(engine, square, shown, texts),
        }

    @property
    def exact(self) -> bool:
        """Whether every expert is run."""
        return len(self.engine.experts) <= MOST_EXACT

    def attribution(self, shard: str) -> Floats:
        """Attribution `[S, Q]` on one shard, computed once."""
        texts = self.texts.held_out if shard == HELD_OUT else self.texts.select

        def make() -> dict[str, Any]:
            values_SQ = attribution(self.engine, texts, self.report, f"attribution, {shard}")
            return {"attribution": values_SQ.tolist()}

        kept = self.stages.run(f"attribution-{shard}", self.mode, make)
        return np.array(kept["attribution"])

    def chosen(self) -> dict[int, list[Pair]]:
        """The experts that are run, by layer."""
        pairs = self.engine.experts
        if not self.exact:
            size_S = np.abs(self.attribution(SELECT)).mean(1)
            pairs = sorted(pairs[i] for i in np.argsort(-size_S, kind="stable")[:ATTRIBUTED])
        by_layer: dict[int, list[Pair]] = defaultdict(list)
        for layer, expert in pairs:
            by_layer[layer].append((layer, expert))
        return dict(by_layer)

    def others(self, best: list[Pair]) -> list[tuple[str, str, Table]]:
        """The strongest experts in the other modes, and in the moefied model."""
        parts = []
        for which, mode in [(DENSE, m) for m in MODES if m != self.mode] + [(MOEFIED, self.mode)]:
            what = f"{which}, {mode}, strongest {len(best)}"
            measured = self._measured(self.started(which, mode), what, sorted(best), 0)
            rows = matrix([measured], self.texts.held_out, seed=self.seed)[1]
            # Chosen by the same documents: a test of their selectivity would find what was looked for.
            rows["csi_p"] = [None] * len(rows["csi_p"])
            parts.append((which, mode, rows))
        return parts

    def sufficiency(self) -> Table:
        """Table `keep_only`."""
        ranked_by, texts = self.texts.select, self.texts.sufficiency

        def make() -> Table:
            attributed_SQ = self.attribution(SELECT)
            return sufficiency(
                self.engine, attributed_SQ, ranked_by, texts, self.report, seed=self.seed
            )

        return self.stages.run("sufficiency", self.mode, make)

    def _measured(
        self, engine: AblationEngine, what: str, experts: list[Pair], nulls: int
    ) -> Measured:
        """The effects of these experts, and of random sets beside them where they are of one layer."""
        texts, layer = self.texts.held_out, experts[0][0]
        numbers = [neurons_of(engine, *pair) for pair in experts]

        def draw_sets() -> RandomSets:
            energy_NN = energy_matrices(engine, texts.batches, [layer])[layer]
            return random_sets(engine, energy_NN, layer, numbers, nulls, self.seed)

        def make() -> dict[str, Any]:
            sets = [of_layer(engine, at, n) for (at, _), n in zip(experts, numbers, strict=True)]
            drawn = engine.processes.once(draw_sets) if nulls else None
            if drawn is not None:
                sets += [of_layer(engine, layer, chosen) for chosen in drawn.sets]
            effects = of_sets(engine, texts, sets, self.report, what)
            return {"effects": _json(effects), "sets": None if drawn is None else _json(drawn)}

        kept = self.stages.run(what.replace(", ", "-").replace(" ", "-"), [experts, nulls], make)
        effects = Effects(**{name: np.array(v, dtype=float) for name, v in kept["effects"].items()})
        if kept["sets"] is None:
            return Measured(experts, effects)
        of_experts, of_random = slice(len(experts)), slice(len(experts), None)
        arrays = {name: np.array(v) for name, v in kept["sets"].items() if name != "sets"}
        drawn = RandomSets([np.array(s, dtype=np.int64) for s in kept["sets"]["sets"]], **arrays)
        return Measured(experts, effects.take(of_experts), drawn, effects.take(of_random))


def _json(arrays: Effects | RandomSets) -> dict[str, Any]:
    """Arrays as lists."""
    return {
        name: [part.tolist() for part in value] if isinstance(value, list) else value.tolist()
        for name, value in vars(arrays).items()
    }


def _experts(engine: AblationEngine, square: Matrix, shown: Table, texts: Texts) -> Table:
    """Columns of `experts`: the domain that each is most selective for; None where it was not run."""
    count = len(texts.documents.domains)
    selective = np.nan_to_num(square.csi.mean_C, nan=-np.inf).argmax(1)
    best = {pair: (row, row * count + selective[row]) for row, pair in enumerate(square.experts)}
    rows = [best.get(pair) for pair in engine.experts]
    mean_E = [float(mean_C.mean()) for mean_C in square.ce.mean_C]
    return table(
        {
            "layer": [layer for layer, _ in engine.experts],
            "expert": [expert for _, expert in engine.experts],
            "causal_ce": [at and mean_E[at[0]] for at in rows],
            **{name: [at and shown[of][at[1]] for at in rows] for name, of in _OF_EXPERTS.items()},
        }
    )


_OF_EXPERTS = {
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
