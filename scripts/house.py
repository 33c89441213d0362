"""Print how moefy is laid out, for a look and for `docs/architecture.md`: `python scripts/house.py`.

Rooms are the packages and modules at the top of `moefy/`; a floor is a room's longest chain of imports below it.
`tests/test_architecture.py` holds the bounds.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOEFY = ROOT / "moefy"
LONG, TOO_LONG = 40, 60


def sources(root: Path = MOEFY) -> dict[Path, ast.Module]:
    """Every Python file below, parsed."""
    return {
        file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(root.rglob("*.py"))
    }


def floors(files: dict[Path, ast.Module]) -> dict[str, int]:
    """The floor of every room."""
    below: dict[str, set[str]] = {}
    for file, tree in files.items():
        first = file.relative_to(MOEFY).parts[0]
        if first == "__init__.py":  # lazy: it imports for type checkers alone
            continue
        room = first.removesuffix(".py")
        targets = (name.split(".") for name in imported(tree))
        rooms = {parts[1] for parts in targets if parts[0] == "moefy" and len(parts) > 1}
        below.setdefault(room, set()).update(rooms - {room, "__version__"})
    level: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        level[room] = 1 + max((level[other] for other in below.get(room, ())), default=0)
    return level


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of what a file imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "moefy":
            yield from (f"moefy.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def functions(files: dict[Path, ast.Module]) -> list[tuple[int, str]]:
    """Lines and place of every function, the longest first."""
    found = [
        (node.end_lineno - node.lineno + 1, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
        for file, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    return sorted(found, reverse=True)


def repeated_classes(files: dict[Path, ast.Module]) -> dict[str, int]:
    """Names of classes that stand for more than one thing."""
    names = Counter(
        node.name for tree in files.values() for node in tree.body if isinstance(node, ast.ClassDef)
    )
    return {name: count for name, count in names.items() if count > 1}


def ignored(root: Path) -> int:
    """How many times a type checker is told to look away."""
    text = "".join(file.read_text(encoding="utf-8") for file in root.rglob("*.py"))
    return len(re.findall(r"# type: ignore", text))


def main() -> None:
    files = sources()
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    top = [path for path in MOEFY.iterdir() if path.name != "__pycache__"]
    packages = [path for path in top if (path / "__init__.py").is_file()]
    long = functions(files)
    level = floors(files)
    rows = {
        "packages, Python files at the top": f"{len(packages)}, {sum(p.suffix == '.py' for p in top)}",
        "floors (errors at the bottom, __main__ aside)": max(
            n for r, n in level.items() if r != "__main__"
        ),
        "Python files, lines": f"{len(files)}, {lines}",
        f"functions over {LONG} lines, over {TOO_LONG}": ", ".join(
            str(sum(n > bound for n, _ in long)) for bound in (LONG, TOO_LONG)
        ),
        "class names that stand for two things": len(repeated_classes(files)),
        "type: ignore in moefy/, kernels/": f"{ignored(MOEFY)}, {ignored(ROOT / 'kernels')}",
    }
    for name, value in rows.items():
        print(f"{name:<50} {value}")
    for floor in range(max(level.values()), 0, -1):
        print(
            f"floor {floor:<3}",
            ", ".join(sorted(room for room, at in level.items() if at == floor)),
        )
    for room in sorted(packages):
        own = [file for file in files if room in file.parents]
        print(
            f"{room.name:<12} {len(own):>4} files {sum(len(f.read_text().splitlines()) for f in own):>6} lines"
        )
    for count, where in [pair for pair in long if pair[0] > LONG]:
        print(f"{count:>4} lines  {where}")
    for name, count in repeated_classes(files).items():
        print(f"class {name}: {count} times")


if __name__ == "__main__":
    main()
