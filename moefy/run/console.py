"""What a person sees while a long job runs: progress on stderr, silent where nobody looks."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_COLUMNS = (
    TextColumn("{task.description:28}", markup=False),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(elapsed_when_finished=True),
)


class Reporter:
    """Stages and bars on stderr; bars only where stderr is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        # Paths have brackets and colons of their own.
        self.console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, total: int, what: str, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A bar that says something at every step; off a terminal, a line every tenth of the way."""
        if not self.console.is_terminal:
            every, step = max(1, total // 10), done

            def line(text: str) -> None:
                nonlocal step
                step += 1
                if step % every == 0 or step == total:
                    self.say(f"{what} {step}/{total}: {text}")

            yield line
            return
        with Progress(
            *_COLUMNS, TextColumn("{task.fields[text]}", markup=False), console=self.console
        ) as bar:
            task = bar.add_task(what, total=total, completed=done, text="")
            yield lambda text: bar.update(task, advance=1, text=text)

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Yield the items with a bar called `what`; off a terminal, one line at the start."""
        total = len(items) if isinstance(items, Sized) else None
        if not self.console.is_terminal:
            self.say(f"{what} ({total})" if total else what)
            yield from items
            return
        with Progress(*_COLUMNS, console=self.console) as progress:
            yield from progress.track(items, total=total, description=what)
