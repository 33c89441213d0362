"""What a person sees while a long job runs: progress on stderr, silent where nobody looks."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Reporter:
    """Stages and bars on stderr; bars only where stderr is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True)

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Yield the items with a bar called `what`; off a terminal, one line at the start."""
        total = len(items) if isinstance(items, Sized) else None
        if not self.console.is_terminal:
            self.say(f"{what} ({total})" if total else what)
            yield from items
            return
        columns = (
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=self.console) as progress:
            yield from progress.track(items, total=total, description=what)
