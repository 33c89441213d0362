"""Rows as tables: Markdown for files, the same for the terminal."""

from rich import box
from rich.table import Table
from rich.text import Text


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
