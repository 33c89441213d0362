"""Tables between two marks of a page, which the scripts that measure fill from their records."""

from pathlib import Path

BEGIN, END = "<!-- table: {} -->", "<!-- end -->"


def filled(text: str, name: str, table: str) -> str:
    """The text of a page with what stands at the mark `name` replaced."""
    begin = BEGIN.format(name)
    before, found, rest = text.partition(begin)
    if not found:
        raise SystemExit(f"no mark {begin}")
    return f"{before}{begin}\n{table.strip()}\n{END}{rest.partition(END)[2]}"


def fill(page: Path, name: str, table: str) -> None:
    """The same in the file of the page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(filled(text, name, table), encoding="utf-8")
