"""Several processes on one job, as `accelerate launch` starts them; or this one alone.

They share a file system: what one writes the others read after `wait`. Nothing is decided by who is
first, so that many processes find what one would.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import DistError

from moefy.errors import MoefyError
from moefy.run.computing import now

T = TypeVar("T")


class Elsewhere(MoefyError):
    """Another process of the same run has failed, and says why itself."""


def launched() -> "Processes":
    """All processes of this run, as accelerate finds them."""
    # One may wait for another for as long as an evaluation takes.
    state = PartialState(cpu=not now().on_gpu, timeout=timedelta(days=7))
    return Processes(state.num_processes, state.process_index)


@dataclass(frozen=True)
class Processes:
    """The processes that work together, seen from one of them; by itself there is only this one."""

    count: int = 1
    rank: int = 0
    """The number of this one."""

    @property
    def main(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of the items: every n-th of n processes, so that like ones spread evenly."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.count > 1:
            with self.together():
                PartialState().wait_for_everyone()

    def all(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of their ranks."""
        if self.count == 1:
            return items
        with self.together():
            gathered: list[T] = gather_object(items)
        return gathered

    def in_order(self, numbered: list[tuple[int, T]]) -> list[T]:
        """What all processes have made, in the order of its numbers."""
        return [item for _, item in sorted(self.all(numbered), key=lambda pair: pair[0])]

    @contextmanager
    def folder(self, where: Path | None = None) -> Iterator[Path]:
        """A temporary folder, in `where`, that all work in; it is gone when all are done with it."""
        path = Path(self.once(lambda: tempfile.mkdtemp(dir=where)))
        try:
            yield path
            self.wait()
        finally:
            if self.main:
                shutil.rmtree(path, ignore_errors=True)

    def once(self, run: Callable[[], T]) -> T:
        """What `run` gives on the main process, for all; its error is the error of all."""
        if self.count == 1:
            return run()
        outcome: list[Any] = [None, None]
        failed: MoefyError | None = None
        if self.main:
            try:
                outcome[0] = run()
            except MoefyError as error:
                failed, outcome[1] = error, str(error)
        with self.together():
            value, reason = broadcast_object_list(outcome)
        if failed is not None:
            raise failed
        if reason is not None:
            raise Elsewhere(reason)
        result: T = value
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn what torch says where another process has ended meanwhile into `Elsewhere`."""
        try:
            yield
        except RuntimeError as error:
            # Gloo, which connects processes without GPUs, has no error of its own.
            if not (isinstance(error, DistError) or "gloo" in str(error)):
                raise
            raise Elsewhere(
                f"process {self.rank}: another process of this run has ended "
                f"({str(error).splitlines()[0][:120]}); nothing is lost, run again (with --resume, if the verb has it)"
            ) from None


ALONE = Processes()
