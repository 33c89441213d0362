"""Verbs killed at any moment: what they wrote is whole or not there, and a resumed run ends with the same bytes.

    python experiments/kills.py                  # 1,000 kills: benchmarks/records/kills.json
    python experiments/kills.py --kills 40 --show

Every case runs a verb as the command line does, on small models, in a process of its own, kills it with SIGKILL
after a time drawn up to what an unbroken run takes, and runs it again. Half of them replace an older result
(`--overwrite`): after the kill, the old folder or the new one must stand there, or the next run must say so.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "kills.json"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "transformers.models.llama.modeling_llama", "accelerate", "typer"]
)
TIMES = {
    "seconds", "bytes_read", "bytes_written", "peak_memory", "peak_memory_after", "tokens_per_second", "when",
    "machine", "command",
}  # fmt: skip
"""Keys of records that no two runs share."""
SMALL = ["--set", "partition.tokens=256", "--set", "router.tokens=256", "--set", "context=32"]
LINEAR = [
    "--recipe",
    "fast",
    "--expert-size",
    "4",
    "--set",
    "router.name=linear",
    "--set",
    "selection.name=topk",
]


@dataclass(frozen=True)
class Kill:
    """One killed run and what came of it."""

    number: int
    verb: str
    overwrite: bool
    after: float
    """Seconds until it was killed."""
    outcome: str
    detail: str = ""


def verbs(root: Path) -> dict[str, list[str]]:
    """Command lines by name; `OUT` stands for where they write."""
    dense, made, text = str(root / "dense"), str(root / "made"), str(root / "texts.jsonl")
    convert = ["convert", dense, "OUT", "--corpus", text, *SMALL, *LINEAR]
    return {
        "convert": convert,
        "convert --adapter": [*convert, "--adapter"],
        "convert --stream": [*convert, "--stream"],
        "convert --bits": [*convert, "--bits", "4"],
        "recover": [
            "recover",
            made,
            "OUT",
            "--corpus",
            text,
            "--train-tokens",
            "3000",
            "--set",
            "batch_tokens=512",
        ],
        "sparsify": [
            "sparsify",
            dense,
            "OUT",
            "--corpus",
            text,
            "--train-tokens",
            "3000",
            "--set",
            "batch_tokens=512",
        ],
        "prune": ["prune", made, "OUT", "--forget", "a", "--corpus", text, "--tokens", "1500"],
        "revert": ["revert", made, "OUT"],
        "export": ["export", str(root / "stock"), "OUT", "--to", "mixtral"],
    }


RESUMES = {
    "convert",
    "convert --adapter",
    "convert --stream",
    "convert --bits",
    "recover",
    "sparsify",
    "prune",
}


def main_of(words: list[str], said: Path) -> None:
    """Run the command line in this process, output to a file."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["moefy", *words]
    from moefy.cli.verbs import main

    main()


def run(words: list[str], said: Path, after: float | None = None) -> int | None:
    """The exit code; a run is killed after so many seconds."""
    process = CONTEXT.Process(target=main_of, args=(words, said), daemon=True)
    process.start()
    process.join(after)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def digest(folder: Path) -> dict[str, str]:
    """What every file holds, times left out of records."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = file.read_bytes()
        if file.suffix in (".png", ".md"):
            continue
        if file.suffix in (".json", ".jsonl"):
            raw = json.dumps([_timeless(json.loads(line)) for line in _documents(file)]).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(raw).hexdigest()
    return found


def _documents(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    return text.splitlines() if file.suffix == ".jsonl" else [text]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def prepare(root: Path) -> None:
    """A small model, texts of two domains, and conversions of it."""
    from small_llama import small_llama

    small_llama(root / "dense", words=90, width=32, heads=4)
    draw = random.Random(0)
    with (root / "texts.jsonl").open("w") as file:
        for number in range(320):
            words_of = (f"w{draw.randrange(45) + 45 * (number % 2)}" for _ in range(30))
            row = {"domain": "ab"[number % 2], "source_id": str(number), "text": " ".join(words_of)}
            file.write(json.dumps(row) + "\n")
    lines, said = verbs(root), root / "said"
    for name, words in (
        ("made", lines["convert"]),
        ("stock", ["convert", str(root / "dense"), "OUT", "--corpus", str(root / "texts.jsonl"), *SMALL,
                   "--recipe", "export", "--expert-size", "16"]),
    ):  # fmt: skip
        if run([str(root / name) if word == "OUT" else word for word in words], said) != 0:
            raise RuntimeError(said.read_text())


def case(number: int, root: Path, whole: dict[str, tuple[dict[str, str], float]]) -> Kill:
    """Kill one run, look, run it again, compare."""
    draw = random.Random(number)
    verb = draw.choice(sorted(whole))
    right, seconds = whole[verb]
    overwrite, after = draw.random() < 0.5, draw.uniform(0, 1.1 * seconds)
    with tempfile.TemporaryDirectory(dir=root) as place:
        out, said = Path(place) / "out", Path(place) / "said"
        words = [str(out) if word == "OUT" else word for word in verbs(root)[verb]]
        kill = partial(Kill, number, verb, overwrite, round(after, 3))
        if overwrite:
            shutil.copytree(root / "whole" / verb, out)
            words.append("--overwrite")
        code = run(words, said, after)
        if code == 0:
            outcome = "ended before the kill"
        elif code != -9:
            return kill("FAILURE", f"ended with {code}: {said.read_text()[-500:]}")
        else:
            outcome = "same bytes"
        if out.exists() and digest(out) != right:
            return kill("FAILURE", f"killed, it left part of a result: {_differences(out, right)}")
        if overwrite and not out.exists():
            old = out.with_name(f".{out.name}.moefy-old")
            if not old.exists() or digest(old) != right:
                return kill("FAILURE", f"killed, it lost the old result: {_names(place)}")
            if (
                run([word for word in words if word != "--overwrite"], said) != 1
                or not out.exists()
            ):
                return kill("FAILURE", f"the old result did not come back: {_names(place)}")
            outcome = "same bytes, the old result was away until the next run"
        if not out.exists() or code != 0:
            if out.exists() and not overwrite:  # killed after it had its name: what is left goes
                words.append("--overwrite")
            again = [*words, "--resume"] if verb in RESUMES else words
            code = run(again, said)
            if code != 0 and verb in RESUMES and "--resume" in said.read_text()[-1000:]:
                code = run(words, said)
            if code != 0:
                return kill("FAILURE", f"the next run ended with {code}: {said.read_text()[-500:]}")
        if digest(out) != right:
            return kill("FAILURE", f"other bytes: {_differences(out, right)}")
        left = _names(place)
        if left != ["out", "said"]:
            return kill("FAILURE", f"left behind: {left}")
        return kill(outcome)


def _names(place: str) -> list[str]:
    return sorted(path.name for path in Path(place).iterdir())


def _differences(out: Path, right: dict[str, str]) -> list[str]:
    got = digest(out)
    return sorted(name for name in {*got, *right} if got.get(name) != right.get(name))


def unbroken(root: Path) -> dict[str, tuple[dict[str, str], float]]:
    """What every verb writes when nobody kills it, and how long it takes."""
    found = {}
    for verb, words in verbs(root).items():
        out, said = root / "whole" / verb, root / "said"
        out.parent.mkdir(exist_ok=True)
        began = time.monotonic()
        if run([str(out) if word == "OUT" else word for word in words], said) != 0:
            raise RuntimeError(f"{verb}: {said.read_text()[-2000:]}")
        found[verb] = digest(out), time.monotonic() - began
    return found


def campaign(kills: range, workers: int) -> Iterator[Kill]:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        prepare(root)
        whole = unbroken(root)
        print({verb: round(seconds, 1) for verb, (_, seconds) in whole.items()}, flush=True)
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(partial(case, root=root, whole=whole), kills)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="write no record")
    options = parser.parse_args()
    began, counts, failures = time.monotonic(), Counter[str](), []
    for number, kill in enumerate(
        campaign(range(options.seed, options.seed + options.kills), options.workers)
    ):
        counts[f"{kill.verb}: {kill.outcome}"] += 1
        if kill.outcome == "FAILURE":
            failures.append(kill)
            print(kill, flush=True)
        if number % 50 == 49:
            print(
                f"{number + 1} kills, {len(failures)} failures, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    if not options.show:
        from moefy.run.computing import versions

        record = {
            "kills": options.kills, "seed": options.seed, "seconds": round(time.monotonic() - began),
            "counts": dict(sorted(counts.items())), "failures": [asdict(kill) for kill in failures],
            "versions": versions(),
        }  # fmt: skip
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
