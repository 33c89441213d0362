"""What a record looks like: numbers with their intervals, tables (Markdown, terminal), the style of pictures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from moefy.errors import MoefyError

INK, SOFT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5fa8", "#a0522d")
"""Told apart by colour-blind people: Okabe and Ito, https://jfly.uni-koeln.de/color."""
NO_PLOTS = "plots need matplotlib: pip install 'moefy[plots]'"
_STYLE: Any = {
    "font.size": 9, "text.color": INK, "axes.edgecolor": SOFT, "axes.labelcolor": SOFT,
    "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": 10, "grid.color": GRID,
    "axes.axisbelow": True, "text.parse_math": False,  # names of domains are no formulas
}  # fmt: skip


def number(
    value: float, ends: Sequence[float | None] | None = None, form: str = ".3f", of_ends: str = ""
) -> str:
    """`0.123 [0.100, 0.150]`, without ends `0.123`; `form` as in format strings, of the ends too unless given."""
    text = format(value, form)
    if ends is None or None in ends:
        return text
    low, high = (format(end, of_ends or form) for end in ends)
    return f"{text} [{low}, {high}]"


def figure(entry: dict[str, Any], form: str = ".3f") -> str:
    """The same of an entry of a record: its `mean`, and `ci95` if there is one."""
    return number(entry["mean"], entry["ci95"], form)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar inside a cell does not end it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def terminal(header: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """The same as a rich table: numbers to the right, nothing cut off."""
    # Texts of users are shown as they are: brackets are no markup.
    table = Table(
        title=None if title is None else Text(title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    for index, name in enumerate(header):
        numbers = all(row[index][:1].isdigit() or row[index][:1] in ("", "-") for row in rows)
        table.add_column(
            Text(name), justify="right" if numbers and index else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def has_plots() -> bool:
    """Whether pictures can be drawn."""
    return find_spec("matplotlib") is not None


@contextmanager
def pyplot() -> Iterator[Any]:
    """matplotlib.pyplot in moefy's style, without a display; figures are closed at the end.

    Raises `MoefyError` where matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise MoefyError(NO_PLOTS) from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        yield plt
        plt.close("all")
