"""How large the house may grow: `python scripts/house.py` prints where it stands."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def house():
    return runpy.run_path(str(ROOT / "scripts" / "house.py"))


@pytest.fixture(scope="module")
def files(house):
    return house["sources"]()


def test_the_hall_holds_rooms_and_four_files():
    top = [path for path in (ROOT / "moefy").iterdir() if path.name != "__pycache__"]
    assert sum((path / "__init__.py").is_file() for path in top) <= 12
    assert sum(path.suffix == ".py" for path in top) <= 4


def test_no_room_is_higher_than_the_ninth_floor(house, files):
    level = house["floors"](files)
    assert max(floor for room, floor in level.items() if room != "__main__") <= 9


def test_functions_are_read_at_a_glance(house, files):
    lines = [count for count, _ in house["functions"](files)]
    assert max(lines) <= 60
    assert sum(count > 40 for count in lines) <= 20


def test_a_class_name_stands_for_one_thing(house, files):
    assert house["repeated_classes"](files) == {}


def test_the_type_checker_looks_everywhere(house):
    assert house["ignored"](ROOT / "moefy") + house["ignored"](ROOT / "kernels") <= 20


def test_no_package_is_a_hall_of_its_own():
    crowded = {
        str(folder): count
        for folder in (ROOT / "moefy").rglob("*")
        if folder.is_dir() and (count := len(list(folder.glob("*.py")))) > 25
    }
    assert crowded == {}
