"""Thousands of damaged and hostile files: every one is read as what it was, or refused in one line.

    python experiments/fuzz.py                    # 10,000 cases: benchmarks/records/fuzz.json
    python experiments/fuzz.py --cases 500 --seed 3 --show

A case is a folder with one file mutated (`mutations.py`), and what is done with it: a moefied folder is loaded
and run, a dense one planned, a recipe and a corpus read. Whatever is neither a `MoefyError` of one line nor what
the unharmed files give is a failure: a traceback, another model, a file that something left, a dead or hanging
process. Numbers of a router or a selection may be edited to others that are in range: a folder does not say who
set them, and such cases are counted by themselves.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "fuzz.json"
SECONDS, MEMORY = 60, 12 * 2**30
"""What a case may take before it counts as hanging, and as a bomb."""
RAN = "moefy-was-made-to-run-this"
"""A file that a command named in a mutated file would leave."""
ERROR, SAME, SETTING, FAILURE = "clean error", "same", "another setting", "FAILURE"


@dataclass(frozen=True)
class Case:
    """How one case went."""

    seed: int
    target: str
    mutation: str
    outcome: str
    detail: str = ""


def originals(root: Path) -> dict[str, Path]:
    """Unharmed folders by target."""
    from small_llama import small_llama

    import moefy
    from moefy.recipe import override

    dense = root / "plan"
    small_llama(dense, words=60, width=16, heads=2, max_shard_size="20KB")
    draw = random.Random(0)
    texts = [
        {
            "domain": "ab"[i % 2],
            "source_id": str(i),
            "text": " ".join(f"w{draw.randrange(60)}" for _ in range(40)),
        }
        for i in range(40)
    ]
    corpus = root / "corpus"
    corpus.mkdir()
    (corpus / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    recipe = root / "recipe"
    recipe.mkdir()
    shutil.copy(ROOT / "moefy" / "recipes" / "default.yaml", recipe / "recipe.yaml")
    small = {"partition.tokens": 64, "router.tokens": 64, "context": 32}
    todo = override(moefy.Recipe.named("largest_inputs", density=0.5), small)
    linear = {"router.name": "linear", "selection.name": "topk", "partition.expert_size": 4}
    for name, one, adapter in (
        ("load full", todo, False),
        ("load adapter", override(todo, linear | {"router.epochs": 1}), True),
        ("load bits", override(todo, {"storage.bits": 4}), True),
    ):
        base = root / name / "base"
        shutil.copytree(dense, base)
        moefy.convert(
            base,
            root / name / "model",
            recipe=one,
            corpus=corpus / "texts.jsonl",
            adapter=adapter,
            quiet=True,
        )
        if not adapter:
            shutil.rmtree(base)
    return {path.name: path for path in sorted(root.iterdir())}


def loaded(folder: Path) -> list[Any]:
    """Logits of a moefied folder, with experts as routed and with all of them."""
    import torch

    import moefy
    from moefy.experts.sparse_mlp import all_experts

    ids = torch.arange(24).reshape(2, 12) % 60
    model = moefy.load(
        folder / "model", base=folder / "base" if (folder / "base").exists() else None
    )
    with torch.no_grad():
        routed = model(ids).logits
        with all_experts(model):
            return [routed, model(ids).logits]


def planned(folder: Path) -> str:
    """What `moefy convert --dry-run` says."""
    from typer.testing import CliRunner

    from moefy.cli.verbs import app

    words = ["convert", str(folder), str(folder.parent / "out"), "--dry-run", "-q"]
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, SystemExit) and result.exit_code == 1:
        raise Refused(result.stderr.removeprefix("moefy: ").strip())
    if result.exception is not None:
        raise result.exception
    notes = [line for line in result.stdout.splitlines() if line.startswith("note: the ")]
    if (
        notes
    ):  # of a tokenizer that is not the model's, or gone: the run itself may have no use for it
        raise Refused(notes[0])
    return result.stdout.replace(str(folder), "MODEL").replace(str(folder.parent), "")


def recipe(folder: Path) -> Any:
    """What a recipe says."""
    from moefy.recipe import load, to_dict

    return to_dict(load(folder / "recipe.yaml"))


def corpus(folder: Path) -> Any:
    """Texts of a corpus."""
    from moefy.data.corpus import load_corpus

    return [doc.text for doc in load_corpus(folder / "texts.jsonl").documents]


class Refused(Exception):
    """A verb ended with exit code 1 and this on stderr."""


TARGETS: dict[str, Callable[[Path], Any]] = {
    "load full": loaded, "load bits": loaded, "load adapter": loaded, "plan": planned, "recipe": recipe,
    "corpus": corpus,
}  # fmt: skip
SHARES = {"load full": 3, "load bits": 1, "load adapter": 2, "plan": 2, "recipe": 1, "corpus": 1}


def run_case(seed: int, bases: dict[str, Path], right: dict[str, Any]) -> Case:
    """Mutate, use, judge."""
    from mutations import mutate

    from moefy.errors import MoefyError

    draw = random.Random(seed)
    (target,) = draw.choices(list(SHARES), list(SHARES.values()))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "x"
        shutil.copytree(bases[target], folder)
        mutation = mutate(folder, draw)
        case = partial(Case, seed, target, mutation)
        try:
            outcome = TARGETS[target](folder)
        except (MoefyError, Refused) as error:
            text = str(error)
            lines = len(text.splitlines())
            return (
                case(ERROR, text)
                if lines == 1
                else case(FAILURE, f"an error of {lines} lines: {text}")
            )
        except BaseException as error:
            return case(FAILURE, f"{type(error).__name__}: {error} at {_where(error)}")
        if Path(RAN).exists():
            Path(RAN).unlink()
            return case(FAILURE, "a command of the folder was run")
        if _equal(outcome, right[target], target, mutation):
            return case(SAME)
        numbers = any(word in mutation for word in (".selection.", ".router.", ".compensation."))
        tied = (
            "tie_word_embeddings" in mutation
        )  # a dense model's own choice: transformers ties the head
        if (
            target == "recipe"
            or tied
            or ("moefy.json" in mutation and "value" in mutation and numbers)
        ):
            return case(SETTING)
        return case(FAILURE, "another result, and nothing said")


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    place = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/moefy" in file or "moefy_kernels" in file:
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _equal(got: Any, want: Any, target: str, mutation: str) -> bool:
    if target.startswith("load"):
        return all(
            a.shape == b.shape and bool((a - b).abs().max() < 1e-5)
            for a, b in zip(got, want, strict=True)
        )
    if target == "corpus":  # lines that were changed may say something else
        return len(set(want) - set(got)) <= (16 if mutation.endswith("flip") else 1)
    return bool(got == want)


def _work(pipe: Connection, bases: dict[str, Path]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    import torch

    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())
    try:
        right = {target: TARGETS[target](bases[target]) for target in SHARES}
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
    pipe.send("ready")
    while (seed := pipe.recv()) is not None:
        pipe.send(run_case(seed, bases, right))


class Worker:
    """A process that runs cases, and another when it dies."""

    def __init__(self, bases: dict[str, Path]) -> None:
        self.bases = bases
        self.seed: int | None = None
        self.begin()

    def begin(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_work, args=(theirs, self.bases), daemon=True)
        self.process.start()
        theirs.close()
        if (said := self.pipe.recv()) != "ready":
            raise RuntimeError(f"the unharmed folders fail: {said}")

    def start(self, seed: int) -> None:
        self.seed, self.since = seed, time.monotonic()
        self.pipe.send(seed)

    def result(self) -> Case | None:
        """The case when it is over."""
        assert self.seed is not None
        try:
            if self.pipe.poll(0.01):
                case: Case = self.pipe.recv()
                self.seed = None
                return case
        except (EOFError, ConnectionResetError):
            pass
        else:
            if self.process.is_alive() and time.monotonic() - self.since < SECONDS:
                return None
        why = "the process died" if not self.process.is_alive() else f"not done after {SECONDS} s"
        case = Case(self.seed, "?", "?", FAILURE, why)
        self.process.kill()
        self.seed = None
        self.begin()
        return case


def campaign(seeds: range, workers: int) -> Iterator[Case]:
    """Run all cases in processes of their own."""
    with tempfile.TemporaryDirectory() as place:
        bases = originals(Path(place))
        pool = [Worker(bases) for _ in range(workers)]
        waiting = iter(seeds)
        for worker in pool:
            worker.start(next(waiting))
        busy = list(pool)
        while busy:
            for worker in list(busy):
                case = worker.result()
                if case is None:
                    continue
                yield case
                seed = next(waiting, None)
                if seed is None:
                    busy.remove(worker)
                else:
                    worker.start(seed)
        for worker in pool:
            worker.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print failures; write no record")
    options = parser.parse_args()
    began, counts = time.monotonic(), Counter[str]()
    failures: list[Case] = []
    for number, case in enumerate(
        campaign(range(options.seed, options.seed + options.cases), options.workers)
    ):
        counts[f"{case.target}: {case.outcome}"] += 1
        if case.outcome == FAILURE:
            failures.append(case)
            print(f"{case.seed} {case.target} | {case.mutation} | {case.detail[:300]}", flush=True)
        if number % 500 == 499:
            print(
                f"{number + 1} cases, {len(failures)} failures, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    if not options.show:
        from moefy.run.computing import versions

        record = {
            "cases": options.cases, "seed": options.seed, "seconds": round(time.monotonic() - began),
            "counts": dict(sorted(counts.items())), "failures": [asdict(case) for case in failures],
            "versions": versions(),
        }  # fmt: skip
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
