"""What several processes have heard, each of its own batches, made into what one would have heard.

    observe(model, reading, listeners, batches=processes.mine(range(len(reading.batches))))
    gather(listeners, layers, processes)        # the first process now knows of all batches

Counts, records and samples are then exactly those of one process; sums are in fp64 and differ in their
last digits, because they are added up in another order. Nothing goes through a file.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from moefy.interpret.observe import Listener
from moefy.processes import Processes


class Shared(Listener, Protocol):
    """A listener whose state can be sent and added to that of another, layer by layer."""

    def part(self, layer: int) -> Any:
        """What was heard of a layer, without model and texts; None where nothing was."""

    def merge(self, layer: int, part: Any) -> None:
        """Take in what another heard of a layer, of other documents."""


def gather(listeners: Sequence[Shared], layers: Iterable[int], processes: Processes) -> None:
    """Merge what all have heard into the listeners of the first process, one layer at a time so that no
    more is held twice. All processes call it with the same listeners and layers."""
    if processes.count == 1:
        return
    for layer in layers:
        for listener in listeners:
            parts = processes.all([listener.part(layer)])
            for part in parts[1:] if processes.main else ():
                if part is not None:
                    listener.merge(layer, part)
