"""What each step of a run took: seconds, memory, bytes read and written."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from moefy.run.memory import peak_memory
from moefy.run.provenance import read_and_written


class Clock:
    """Wall-clock seconds of every stage, the bytes that it read and wrote, peak memory up to its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens meanwhile to this stage."""
        began, before = time.perf_counter(), read_and_written()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)
        self.peak[name], after = peak_memory(), read_and_written()
        if before is not None and after is not None:
            self.read[name], self.written[name] = after[0] - before[0], after[1] - before[1]
