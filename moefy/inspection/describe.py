"""The one pass: its parts, as rows, and the tables that they give.

contributions, examples, directions and direct effects, concepts, near duplicates     of experts
routing                                        which experts run for what, and what explains it
random partitions, other texts                 how all that compares, with `controls`
"""

from collections.abc import Callable, Iterable
from typing import Any

from moefy.inspection.account import observe
from moefy.inspection.controls.random_partition import RandomPartitions
from moefy.inspection.experts import Contributions, RouterQualityOfExperts
from moefy.inspection.experts.concepts import Predictivity
from moefy.inspection.experts.direct import DirectEffects, Spectrum
from moefy.inspection.experts.examples import Examples
from moefy.inspection.experts.near_duplicates import NearDuplicates
from moefy.inspection.part import Pass, PassPart, gather
from moefy.inspection.record import Table
from moefy.inspection.routing.statistics import Routing

PARTS: dict[str, Callable[[Pass], PassPart[Any]]] = {
    "contributions": Contributions,
    "router": RouterQualityOfExperts,
    "examples": Examples,
    "spectrum": Spectrum,
    "direct": DirectEffects,  # after the spectrum, whose directions it follows
    "predictivity": Predictivity,
    "near_duplicates": NearDuplicates,
    "routing": Routing,
}
"""What is heard in one pass, in the order in which their columns stand."""
CONTROLS: dict[str, Callable[[Pass], PassPart[Any]]] = {"random_partitions": RandomPartitions}
"""Parts that are made with `controls` alone."""
KEYS = {"layers": ("layer",), "experts": ("layer", "expert")}
"""Tables of which every part gives columns, and the columns that name a row."""


def describe(work: Pass) -> dict[str, Table]:
    """All descriptive tables of a moefied model, from one pass over what is read.

    With several processes, all of which call this, each runs some of the batches and makes some of the
    layers' random partitions; the first makes the tables, and in the others there are none.
    """
    main = work.processes.main
    parts = listened(work, (PARTS | CONTROLS if work.controls else PARTS).values())
    gather(parts, work.modules, work.processes)
    tables = [part.tables() for part in parts if main or part.everywhere]
    return merged(tables) if main else {}


def listened(
    work: Pass, makers: Iterable[Callable[[Pass], PassPart[Any]]], batches: list[int] | None = None
) -> list[PassPart[Any]]:
    """Parts that have heard these batches, or this process's share of all."""
    for make in makers:
        work.parts.append(make(work))
    before = [part.before for part in work.parts if part.before is not None]
    if batches is None:
        batches = list(work.processes.mine(range(len(work.reading.batches))))
    if 0 not in batches:
        observe(work.model, work.reading, before, batches=[0])
    observe(
        work.model, work.reading, work.parts,
        unembedding=work.unembedding, batches=batches, report=work.report,
    )  # fmt: skip
    return work.parts


def merged(parts: Iterable[dict[str, Table]]) -> dict[str, Table]:
    """Tables of several parts as one set: those of `KEYS` side by side, all others by name."""
    found: dict[str, Table] = {}
    for part in parts:
        for name, given in part.items():
            if name not in found:
                found[name] = dict(given)
                continue
            have = found[name]
            assert name in KEYS, f"two parts give the table {name}"
            assert all(have[key] == given[key] for key in KEYS[name]), f"rows of {name} differ"
            twice = have.keys() & given.keys() - set(KEYS[name])
            assert not twice, f"two parts give {sorted(twice)} of {name}"
            have |= given
    return found
