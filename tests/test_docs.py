"""Documents say what is there: maps name everything, paths and names exist, code and commands would run."""

import ast
import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer

from moefy.cli.verbs import app

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(ROOT / name / "README.md" for name in ("kernels", "scripts", "experiments")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""What speaks of today; a change log names what there was."""


def blocks(page: Path, *languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^ *```(?:{'|'.join(languages)})\n(.*?)```", text, re.S | re.M)
    return [textwrap.dedent(block) for block in found]


def named(file: str, *patterns: str) -> set[str]:
    """Names that a page should have and has not."""
    text = (ROOT / file).read_text(encoding="utf-8")
    parts = Path(file).parent
    wanted = {p.name for pattern in patterns for p in (ROOT / parts).glob(pattern)}
    return {name for name in wanted if name not in text}


def test_every_room_is_on_the_map():
    rooms = {p.name for p in (ROOT / "moefy").iterdir() if (p / "__init__.py").exists()}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```\n(moefy/\n.*?)```", text, re.S)
    assert {room for room in rooms if f"  {room}/" not in tree} == set()


def test_every_script_experiment_and_kernel_is_named():
    assert named("scripts/README.md", "*[a-z]") - {"README.md", "__pycache__"} == set()
    assert named("experiments/README.md", "*[a-z]") - {"README.md", "__pycache__"} == set()
    assert named("kernels/README.md", "moefy_kernels/*.py") - {"__init__.py"} == set()
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    moefy = ROOT / "moefy"
    callers = {
        str(file.relative_to(moefy))
        for file in moefy.rglob("*.py")
        if re.search(r"^ *(from|import) moefy_kernels", file.read_text(encoding="utf-8"), re.M)
    }
    assert {
        name for name in callers if name not in text and f"{Path(name).parent}/" not in text
    } == set()


PATH = re.compile(r"\b(?:moefy|kernels|scripts|experiments|tests|docs|benchmarks)/[\w./-]*\w")


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    text = re.sub(r"https?://\S+", "", page.read_text(encoding="utf-8"))
    places = {match for match in PATH.findall(text) if not match.startswith("moefy/moefy")}
    gone = {
        place
        for place in places
        if not (ROOT / place).exists()
        and not list(ROOT.glob(f"{place}*" if place.endswith("_") else f"{place}.*"))
    }
    assert gone == set()


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles_and_what_it_takes_from_moefy_exists(page):
    text = page.read_text(encoding="utf-8")
    wanted = set(re.findall(r"`((?:moefy|moefy_kernels)(?:\.\w+)+)[`(]", text))
    for block in blocks(page, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moefy"):
                wanted |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                wanted |= {a.name for a in node.names if a.name.startswith("moefy")}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "moefy":
                wanted.add(f"moefy.{node.attr}")
    files = {"moefy.json", "moefy.safetensors", "moefy.yaml"}
    assert {name for name in wanted - files if not resolves(name)} == set()


def commands() -> list[tuple[str, str]]:
    """Every command line of moefy in a shell block, with its page."""
    lines = []
    for page in NOW:
        for block in blocks(page, "sh", "bash", "console"):
            text = block.replace("\\\n", " ")
            lines += [
                (str(page.relative_to(ROOT)), line.split("|")[0].strip())
                for line in text.splitlines()
                if line.startswith("moefy ")
            ]
    return lines


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_have_the_options_they_use(page, line):
    words = shlex.split(line, comments=True)
    command = typer.main.get_command(app)
    verb = command.commands[words[1]]
    known = {name for option in verb.params for name in (*option.opts, *option.secondary_opts)}
    used = {word.split("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
    assert used - known - {"--help"} == set()
