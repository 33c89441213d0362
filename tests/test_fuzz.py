"""Five hundred damaged and hostile files of `experiments/fuzz.py`: refused in one line, or read as what they were."""

import random
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
CASES = 500


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import fuzz

    yield fuzz
    for name in ("fuzz", "mutations", "small_llama"):
        sys.modules.pop(name, None)


def test_no_mutation_of_a_file_ends_otherwise(fuzz):
    cases = list(fuzz.campaign(range(CASES), workers=1))
    assert len(cases) == CASES
    assert [case for case in cases if case.outcome == fuzz.FAILURE] == []
    outcomes = {case.outcome for case in cases}
    assert outcomes >= {fuzz.ERROR, fuzz.SAME}


def test_a_seed_gives_one_mutation(fuzz, tmp_path):
    from mutations import mutate

    def said(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x.json").write_text('{"layers": [{"experts": 4}], "form": "full"}')
        return mutate(folder, random.Random(int(name[1:])))

    assert [said(f"a{seed}") for seed in range(20)] == [said(f"b{seed}") for seed in range(20)]
