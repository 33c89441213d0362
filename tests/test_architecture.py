"""The shape of the source tree: which module may import which, what lies where, how long a file is.

The rules are plain functions of a folder, so that each is also shown to fail on a small tree that
breaks it. Imports are read from the syntax tree: those inside functions count like any other.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Rooms of moefy, from the ground up: a module imports from its own room and from strictly lower rows.
LAYERS = (
    {"errors"},
    {"recipe", "run"},
    {"models"},
    {"data", "methods"},
    {"experts"},
    {"evaluation"},
    {"conversion", "exporting"},
    {"training", "inspection", "benchmark"},
    {"cli"},
)
LAYER = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# `python -m moefy` is the door of the command line.
ROOMS = {"__main__": "cli"}
KERNEL_CALLERS = {
    "moefy.benchmark.bench",
    "moefy.experts.backends",
    "moefy.experts.backends.base",
    "moefy.experts.backends.cpu",
    "moefy.experts.backends.gpu",
    "moefy.experts.backends.stock_moe",
    "moefy.methods.routers.learned",
}
KERNEL_IMPORTS = {"torch", "triton", "moefy_kernels"} | sys.stdlib_module_names
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py"}
MAX_LINES = 600
SOURCE_ROOTS = ("moefy", "kernels", "tests", "scripts", "experiments")


class Import(NamedTuple):
    """One imported module, by its full name, and where it is imported."""

    target: str
    where: str


def sources(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def module_name(file: Path, source_root: Path) -> str:
    parts = file.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST, *, type_checking: bool) -> Iterator[ast.AST]:
    """Every node below, without the bodies of `if TYPE_CHECKING` unless asked for."""
    for child in ast.iter_child_nodes(node):
        if type_checking or not is_type_checking(child):
            yield child
            yield from walk(child, type_checking=type_checking)


def imports(file: Path, source_root: Path, *, type_checking: bool = True) -> list[Import]:
    """What a file imports: statements, and `import_module` or `__import__` of a constant."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    package = module_name(file, source_root).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in walk(tree, type_checking=type_checking):
        names: list[str] = []
        if isinstance(node, ast.Import):
            # Under another name, what is taken from the lazy package could not be followed.
            names = [
                "moefy.*" if alias.name == "moefy" and alias.asname else alias.name
                for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [_module_or_member(base, alias.name, source_root) for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        found += [Import(name, f"{file.name}:{getattr(node, 'lineno', 0)}") for name in names]
    return found


def _module_or_member(base: str, name: str, source_root: Path) -> str:
    path = source_root.joinpath(*base.split("."), name)
    is_module = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    # `from moefy import x` of a name that is no module goes through the lazy table: keep the name.
    return f"{base}.{name}" if is_module or base == "moefy" else base


def lazy_names(file: Path) -> set[str]:
    """What a file takes from the package `moefy` itself, the version aside."""
    return {
        node.attr
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "moefy"
    } - {"__version__"}


def layer_violations(root: Path) -> list[str]:
    broken = []
    for file in sources(root, "moefy"):
        own = module_name(file, root).split(".")
        if own == ["moefy"]:
            broken += [
                f"{found.where}: moefy/__init__.py must stay lazy, it imports {found.target}"
                for found in imports(file, root, type_checking=False)
                if found.target.split(".")[0] == "moefy"
            ]
            continue
        unit = ROOMS.get(own[1], own[1])
        if unit not in LAYER:
            broken.append(f"moefy/{unit}: has no layer; give it one in LAYERS")
            continue
        for found in imports(file, root):
            target = found.target.split(".")
            if target[0] != "moefy" or target[1:] in ([unit], ["__version__"]):
                continue
            if target == ["moefy"] and lazy_names(file) == set():
                continue
            if len(target) == 1 or target[1] not in LAYER:
                broken.append(f"{found.where}: {found.target} is no module with a layer")
            elif target[1] != unit and LAYER[target[1]] >= LAYER[unit]:
                broken.append(
                    f"{found.where}: {unit} (layer {LAYER[unit]}) imports {target[1]} "
                    f"(layer {LAYER[target[1]]})"
                )
    return broken


def cycle_violations(root: Path) -> list[str]:
    graph = {
        module_name(file, root): {found.target for found in imports(file, root)}
        for file in sources(root, "moefy")
        if file != root / "moefy" / "__init__.py"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"import cycle: {' -> '.join(error.args[1])}"]
    return []


def room_violations(root: Path) -> list[str]:
    """A room's `__init__` holds its docstring alone; no file name is there twice in one room."""
    broken = []
    for file in sorted((root / "moefy").glob("*/__init__.py")):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        if len(body) != 1 or not isinstance(body[0], ast.Expr):
            broken.append(f"{file}: a room holds its docstring, code goes into modules")
    for room in (path for path in (root / "moefy").iterdir() if path.is_dir()):
        names = [file.name for file in sources(room, ".") if file.name != "__init__.py"]
        broken += [
            f"{room}: {name} is there twice" for name in sorted({*names}) if names.count(name) > 1
        ]
    return broken


def kernel_violations(root: Path) -> list[str]:
    broken = []
    for file in sources(root, "moefy"):
        own = module_name(file, root)
        for found in imports(file, root):
            if found.target.split(".")[0] == "moefy_kernels" and own not in KERNEL_CALLERS:
                broken.append(f"{found.where}: {own} is none of KERNEL_CALLERS")
    for file in sources(root, "kernels"):
        for found in imports(file, root / "kernels"):
            if found.target.split(".")[0] not in KERNEL_IMPORTS:
                broken.append(f"{found.where}: a kernel imports {found.target}")
    return broken


def place_violations(root: Path) -> list[str]:
    """A top-level package `kernels` would be taken for another project's by transformers."""
    broken = []
    held = {path.name for path in (root / "kernels").iterdir()} - {"__pycache__"}
    if held != {"README.md", "moefy_kernels"}:
        broken.append(f"kernels/ holds {sorted(held)}, not exactly README.md and moefy_kernels")
    for folder in (root, root / "tests", root / "scripts", root / "experiments"):
        for name in ("kernels.py", "kernels/__init__.py"):
            if (folder / name).exists():
                broken.append(f"{folder / name}: shadows the package `kernels`")
    if any((root / folder / "kernels").exists() for folder in ("tests", "scripts", "experiments")):
        broken.append("tests/, scripts/ and experiments/ must not hold a folder named kernels")
    return broken


def address_violations(root: Path) -> list[str]:
    """Tests lie in the room they are of; what several share lies in tests/tiny."""
    rooms = {path.name for path in (root / "moefy").iterdir() if path.is_dir()} | {"moefy_kernels"}
    return [
        f"{file}: no room of moefy is called {file.parent.name}"
        for file in sources(root, "tests")
        if file.parent.name not in rooms | {"tests", "tiny", "golden"}
    ]


def file_violations(root: Path) -> list[str]:
    broken = []
    for file in sources(root, *SOURCE_ROOTS):
        if file.name in VAGUE_NAMES:
            broken.append(f"{file}: the name says nothing")
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            broken.append(f"{file}: {lines} lines, at most {MAX_LINES}")
    return broken


def pickle_violations(root: Path) -> list[str]:
    broken = []
    for file in sources(root, "moefy", "kernels"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "torch.save",
            ):
                broken.append(f"{file.name}:{node.lineno}: {ast.unparse(node)} pickles")
        for found in imports(file, root):
            if found.target.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib"):
                broken.append(f"{found.where}: imports {found.target}")
    return broken


RULES = (
    layer_violations,
    cycle_violations,
    room_violations,
    kernel_violations,
    place_violations,
    address_violations,
    file_violations,
    pickle_violations,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_tree_keeps_the_rule(rule):
    assert rule(ROOT) == []


GOOD = {
    "moefy/__init__.py": "from typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    from moefy.conversion.convert import convert\n",
    "moefy/__main__.py": "from moefy.cli.verbs import main\n",
    "moefy/errors.py": "",
    "moefy/recipe.py": "from moefy.errors import MoefyError\n",
    "moefy/cli/verbs.py": "from moefy.conversion.convert import convert\n",
    "moefy/methods/partition/__init__.py": '"""One line."""\n',
    "moefy/methods/partition/base.py": "from moefy.recipe import Recipe\n",
    "moefy/methods/partition/table.py": "from moefy.methods.partition.base import Method\n",
    "moefy/experts/backends/cpu.py": "import moefy_kernels\nfrom moefy import __version__, recipe\n",
    "moefy/experts/loading.py": "",
    "moefy/conversion/convert.py": "def convert():\n    from moefy.experts.loading import load\n",
    "kernels/README.md": "",
    "kernels/moefy_kernels/__init__.py": "import math\nimport torch\nimport triton.language as tl\n",
    "tests/test_recipe.py": "",
    "scripts/train.py": "",
}


def plant(root: Path, extra: dict[str, str]) -> Path:
    for name, text in {**GOOD, **extra}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    plant(tmp_path, {})
    assert [found for rule in RULES for found in rule(tmp_path)] == []


BREAKS = {
    "upward": (layer_violations, "moefy/recipe.py", "import moefy.conversion.convert\n"),
    "sideways": (
        layer_violations,
        "moefy/evaluation/routing.py",
        "from moefy.benchmark.costs import union\n",
    ),
    "in a function": (
        layer_violations,
        "moefy/models/mlp.py",
        "def f():\n    from moefy import conversion\n",
    ),
    "in a class": (
        layer_violations,
        "moefy/models/mlp.py",
        "class A:\n    import moefy.conversion.convert as c\n",
    ),
    "relative": (
        layer_violations,
        "moefy/models/mlp.py",
        "from ..conversion.convert import convert\n",
    ),
    "relative to a parent": (
        layer_violations,
        "moefy/methods/partition/markers.py",
        "from ...conversion.convert import convert\n",
    ),
    "from a package": (
        layer_violations,
        "moefy/methods/partition/kmeans.py",
        "from moefy.experts import loading\n",
    ),
    "by a string": (
        layer_violations,
        "moefy/models/mlp.py",
        "import importlib\nimportlib.import_module('moefy.conversion.convert')\n",
    ),
    "for types only": (
        layer_violations,
        "moefy/models/mlp.py",
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from moefy.conversion.convert import convert\n",
    ),
    "through the lazy table": (
        layer_violations,
        "moefy/models/mlp.py",
        "from moefy import load\n",
    ),
    "through the package": (
        layer_violations,
        "moefy/models/mlp.py",
        "import moefy\nmoefy.load('x')\n",
    ),
    "under a new name": (
        layer_violations,
        "moefy/models/mlp.py",
        "import moefy as m\nm.load('x')\n",
    ),
    "eager": (
        layer_violations,
        "moefy/__init__.py",
        "from moefy.conversion.convert import convert\n",
    ),
    "the door from inside": (
        layer_violations,
        "moefy/conversion/convert.py",
        "import moefy.__main__\n",
    ),
    "without a layer": (layer_violations, "moefy/session.py", ""),
    "cycle in a package": (
        cycle_violations,
        "moefy/methods/partition/base.py",
        "from moefy.methods.partition.table import METHODS\n",
    ),
    "code in a package": (
        room_violations,
        "moefy/methods/__init__.py",
        "from moefy.methods.partition.base import Method\n",
    ),
    "one name twice in a room": (room_violations, "moefy/methods/base.py", ""),
    "kernels from elsewhere": (
        kernel_violations,
        "moefy/conversion/convert.py",
        "def f():\n    import moefy_kernels.reference\n",
    ),
    "kernels from another module of that name": (
        kernel_violations,
        "moefy/conversion/linear.py",
        "import moefy_kernels\n",
    ),
    "kernels that know moefy": (
        kernel_violations,
        "kernels/moefy_kernels/decode.py",
        "def f():\n    from moefy.recipe import Recipe\n",
    ),
    "kernels that need numpy": (
        kernel_violations,
        "kernels/moefy_kernels/decode.py",
        "import numpy\n",
    ),
    "kernels as a package": (place_violations, "kernels/__init__.py", ""),
    "another kernel root": (place_violations, "kernels/other/__init__.py", ""),
    "tests/kernels.py": (place_violations, "tests/kernels.py", ""),
    "tests/kernels": (place_violations, "tests/kernels/test_decode.py", ""),
    "scripts/kernels.py": (place_violations, "scripts/kernels.py", ""),
    "experiments/kernels.py": (place_violations, "experiments/kernels.py", ""),
    "kernels.py": (place_violations, "kernels.py", ""),
    "tests of no room": (address_violations, "tests/interpret/test_rows.py", ""),
    "a vague name": (file_violations, "moefy/methods/partition/utils.py", ""),
    "too long": (file_violations, "tests/test_long.py", "x = 1\n" * (MAX_LINES + 1)),
    "pickle": (pickle_violations, "moefy/models/checkpoint.py", "def f():\n    import pickle\n"),
    "torch.load": (pickle_violations, "moefy/data/corpus.py", "import torch\ntorch.load('x')\n"),
}


@pytest.mark.parametrize(("rule", "file", "text"), BREAKS.values(), ids=BREAKS)
def test_a_tree_that_breaks_a_rule_is_caught(tmp_path, rule, file, text):
    assert rule(plant(tmp_path, {file: text})) != []


LIGHT = ("moefy", "moefy.errors", "moefy.recipe", "moefy.models.families", "moefy.cli.verbs")


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_neither_torch_nor_transformers(module):
    probe = (
        f"import sys, {module}; "
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
