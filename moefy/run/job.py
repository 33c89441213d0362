"""The frame of a verb that writes a folder: convert, recover, sparsify, prune, export, revert; and its clock.

    job = Job("prune", out, resume=resume, overwrite=overwrite, quiet=quiet)    # refuses an OUT in the way
    ...                                             # what is asked for is checked; job.report and job.clock serve
    with job.running(decided, disk=source.bytes):   # work folder, stamp, room on the disk
        ...                                         # parts are kept in job.stages, the result in job.finished
    job.commit()                                    # the result gets its name

A run that is killed leaves its work folder, and the next one with `resume` takes it up where `decided` is the
same. A verb that does not go on with what is there (`resume=None`) leaves nothing and begins anew.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moefy.run.computing import now, read_and_written, versions
from moefy.run.console import Reporter
from moefy.run.folder import OutputFolder
from moefy.run.memory import peak_memory
from moefy.run.output import Stages, digest
from moefy.run.processes import ALONE, Processes


class Job:
    """One run of a verb; `processes` is `launched()` for a verb that shares its work out.

    `reads` are the folders that the run reads (what is no folder is left out); `apart_from` of `output` takes
    those that are found out later. Raises `OutputError` where `out` is in the way, or in or around one of them.
    """

    def __init__(
        self,
        verb: str,
        out: str | Path,
        *,
        resume: bool | None,
        overwrite: bool,
        quiet: bool = False,
        processes: Processes = ALONE,
        reads: Sequence[str | Path] = (),
    ) -> None:
        self.verb, self.processes, self.clock = verb, processes, Clock()
        self.report = Reporter(quiet=quiet or not processes.main)
        self.output = OutputFolder(Path(out))
        self.resume, self.overwrite = resume, overwrite
        self.output.apart_from(*reads)
        processes.once(lambda: self.output.check(overwrite=overwrite))

    @property
    def work(self) -> Path:
        """Where the run works."""
        return self.output.work

    @property
    def finished(self) -> Path:
        """Where the result is put together."""
        return self.output.work / "model"

    @property
    def stages(self) -> Stages:
        """What of the run is finished."""
        return Stages(self.output.work)

    @contextmanager
    def running(
        self,
        decided: Any = None,
        *,
        disk: int = 0,
        worthless: tuple[type[BaseException], ...] = (),
    ) -> Iterator[None]:
        """Work in the folder that JSON values `decided`, with `disk` bytes free for it.

        Versions and what is computed on are added to what decides.

        After an error of the types `worthless` nothing is left to go on with. Raises `OutputError` where
        something is in the way or the disk is too small or fills up.
        """
        self.processes.once(lambda: self._begin(decided, disk))
        if self.resume is None:
            worthless = (BaseException,)
        with self.output.full_disk(), self.processes.together():
            try:
                yield
            except worthless:
                if self.processes.main:
                    self.output.discard()
                raise
            except BaseException:
                self.output.release()
                raise

    def _begin(self, decided: Any, disk: int) -> None:
        """On the first process; what a run left that cannot go on is made anew."""
        again = self.resume is None
        stamp = digest([self.verb] if again else [self.verb, decided, versions(), now().record()])
        resume = not self.overwrite if self.resume is None else self.resume
        if not self.output.begin(stamp, resume=resume, overwrite=self.overwrite):
            self.output.need(disk)
        elif again:
            shutil.rmtree(self.finished, ignore_errors=True)

    def commit(self) -> None:
        """Put the finished folder in its place; for the first process."""
        self.output.commit(self.finished)


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
