"""What a user installs: the sdist, the wheel built from it, and that the installed wheel imports."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = {"moefy": ROOT / "moefy", "moefy_kernels": ROOT / "kernels" / "moefy_kernels"}


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this tree and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def source_files() -> dict[str, bytes]:
    """Path in the wheel -> content of everything that lies in the two packages."""
    return {
        f"{package}/{file.relative_to(folder).as_posix()}": file.read_bytes()
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_wheel_holds_the_two_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert len(top) == len(PACKAGES) + 1


def test_wheel_built_from_the_sdist_holds_every_source_file_unchanged(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n}
    expected = source_files()
    assert sorted(held) == sorted(expected)
    assert [name for name in expected if held[name] != expected[name]] == []


def test_package_data_is_there(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    needed = {"moefy/py.typed", "moefy_kernels/py.typed", "moefy/demo/corpus.jsonl"}
    needed |= {f"moefy/recipes/{name}.yaml" for name in ("default", "fast", "export")}
    assert needed <= names


def test_sdist_holds_what_a_build_and_a_test_run_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "kernels/README.md"}
    needed |= {"tests/conftest.py", "scripts/setup", "scripts/lock.txt"}
    assert needed <= names
    tops = {name.split("/")[0] for name in names}
    assert not tops & {".venv", ".venv-lowest", ".venv-newest", ".git", "runs", "dist", "build"}


def test_metadata(metadata):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = (ROOT / "moefy" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    assert metadata["Name"] == "moefy"
    assert metadata["Version"] == version
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    needed = {canonicalize_name(r.name) for r in requirements if "extra" not in str(r.marker)}
    assert needed == {canonicalize_name(Requirement(t).name) for t in pyproject["dependencies"]}


def test_the_version_in_the_changelog_is_the_one_of_the_package():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    source = (ROOT / "moefy" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    headings = re.findall(r"^## (.+)$", changelog, flags=re.MULTILINE)
    assert any(version in heading for heading in headings)


def test_one_version_of_ruff_everywhere():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = {
        requirement.name: str(requirement.specifier)
        for requirement in map(Requirement, pyproject["project"]["optional-dependencies"]["dev"])
    }
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (revision,) = re.findall(r"ruff-pre-commit\n\s+rev: v(\S+)", hooks)
    assert pinned["ruff"] == f"=={revision}"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_pins_one_allowed_release_of_everything_asked_for(python, machine):
    """And tells nobody where it was made from."""
    text = (ROOT / "scripts" / "lock.txt").read_text(encoding="utf-8")
    assert "://" not in text and "--" not in text
    lines = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    place = {
        "python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine,
        "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix",
    }  # fmt: skip
    here = [line for line in lines if line.marker is None or line.marker.evaluate(place)]
    pins = {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in here}
    assert len(pins) == len(here)
    assert all(str(line.specifier).startswith("==") for line in here)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked_for = [text for name in ("dev", "test", "train", "plots") for text in extras[name]]
    for asked in map(Requirement, [*project["dependencies"], *asked_for]):
        if asked.name != "moefy":
            assert asked.specifier.contains(pins[canonicalize_name(asked.name)]), asked


def test_installed_wheel_imports_from_where_it_was_installed(wheel, tmp_path):
    """Beside the checkout, not from it: paths of the checkout are taken out of `sys.path`."""
    run(sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps",
        "--target", tmp_path, wheel)  # fmt: skip
    probe = (
        "import sys; "
        f"sys.path = [{str(tmp_path)!r}] + [p for p in sys.path if {str(ROOT)!r} not in p "
        "or 'site-packages' in p]; "
        "import moefy, moefy_kernels; from moefy import recipe; recipe.load('default'); "
        "print(moefy.__file__); print(moefy_kernels.__file__)"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    printed = run(sys.executable, "-c", probe, cwd=tmp_path, env=env).split()
    assert [Path(line).parents[1] for line in printed] == [tmp_path, tmp_path]
    assert (tmp_path / "bin" / "moefy").is_file()
