"""What experts contribute, in one pass: the listeners of this part, and their tables together.

found = Description(model, reading, unembedding)
observe(model, reading, found.listeners, unembedding=unembedding)
tables = found.tables()
"""

from collections.abc import Iterable

from transformers import PreTrainedModel

from moefy.interpret.contributions import Contributions
from moefy.interpret.direct import DirectEffects
from moefy.interpret.enrichment import enrichment
from moefy.interpret.examples import Examples, sizes
from moefy.interpret.gather import Shared
from moefy.interpret.neuron_families import neuron_families
from moefy.interpret.predictivity import Predictivity
from moefy.interpret.reading import Reading
from moefy.interpret.router import RouterQualityOfExperts
from moefy.interpret.spectrum import Spectrum
from moefy.interpret.table import Table
from moefy.interpret.unembedding import Unembedding
from moefy.sparse_mlp import sparse_mlps

KEYS = {"layers": ("layer",), "experts": ("layer", "expert")}
"""Tables of which every part gives columns, and the columns that name a row."""


class Description:
    """Everything about contributions, examples, direct effects and neurons of one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        reading: Reading,
        unembedding: Unembedding | None,
        *,
        seed: int = 0,
    ) -> None:
        self.modules, self.seed = sparse_mlps(model), seed
        kept, sampled = sizes(sum(module.experts for module in self.modules.values()))
        self.contributions = Contributions(reading.documents)
        self.router = RouterQualityOfExperts(reading, seed=seed)
        self.examples = Examples(reading.documents, kept=kept, sampled=sampled, seed=seed)
        self.spectrum = Spectrum()
        self.direct = DirectEffects(reading, unembedding, self.spectrum, seed=seed)
        self.predictivity = Predictivity(reading, seed=seed)

    @property
    def listeners(self) -> list[Shared]:
        """What `observe` hands ledgers to."""
        return [
            self.contributions,
            self.router,
            self.examples,
            self.spectrum,
            self.direct,
            self.predictivity,
        ]

    def tables(self) -> dict[str, Table]:
        """All tables, once the pass is over."""
        return merged(
            [
                self.contributions.tables(),
                self.router.tables(),
                self.examples.tables(),
                self.spectrum.tables(),
                self.direct.tables(),
                enrichment(self.predictivity, seed=self.seed),
                neuron_families(self.modules),
            ]
        )


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
