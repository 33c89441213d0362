"""What of a moefied language model to train, and how fast: KL won by short runs of `moefy recover`.

python experiments/recover_scopes.py FOLDER --scopes lora norms,routers,compensations all --rates 0.003 0.01

All runs begin with the model of FOLDER and see the same documents in the same order. Each is added to
benchmarks/records/recover_scopes.json: KL and cross-entropy on the evaluation shard, before and after, the
held-out KL of every check, and the seconds that its steps took.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moefy.run.computing import machine
from moefy.training.recipe import RecoverRecipe
from moefy.training.recover import recover

RECORD = Path("benchmarks/records/recover_scopes.json")


def run(folder: Path, recipe: RecoverRecipe, against: str | None) -> dict[str, Any]:
    """One run, of whose result nothing but figures stays."""
    with TemporaryDirectory() as work:
        record = recover(folder, Path(work) / "out", recipe=recipe, against=against, quiet=True)
        log = (Path(work) / "out" / "log.jsonl").read_text().splitlines()
    rows, training = [json.loads(line) for line in log], record["training"]
    first, last = record["before"], record["after"]
    steps = zip([0, *(row["tokens"] for row in rows)], rows, strict=False)
    return {
        "recipe": record["recipe"],
        **{f"{name}_before": first[name]["mean"] for name in ("kl", "ce")},
        **{f"{name}_after": last[name]["mean"] for name in ("kl", "ce")},
        "held_before": training["before"]["held_out_kl"],
        "held_after": training["after"]["held_out_kl"],
        "curve": [(row["tokens"], row["held_out_kl"]) for row in rows if "held_out_kl" in row],
        "density": training["after"]["density"],
        "tokens": training["tokens"],
        "seconds": sum((row["tokens"] - t) / row["tokens_per_second"] for t, row in steps),
        "stopped": training["stopped"],
        "peak_memory": record["peak_memory"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scopes", nargs="+", default=[RecoverRecipe.train])
    parser.add_argument("--rates", nargs="+", type=float, default=[RecoverRecipe.learning_rate])
    parser.add_argument("--distil", nargs="+", type=float, default=[RecoverRecipe.distil])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--check-every", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--against", help="the dense model, where weights of FOLDER are rounded")
    parser.add_argument("--name", help="what the record calls the model; the folder's name")
    args = parser.parse_args()
    for scope, rate, distil in product(args.scopes, args.rates, args.distil):
        recipe = RecoverRecipe(
            train=scope, learning_rate=rate, distil=distil, tokens=args.tokens,
            batch_tokens=args.batch, check_every=args.check_every, precision=args.precision,
        )  # fmt: skip
        row = {"model": args.name or args.folder.name} | run(args.folder, recipe, args.against)
        rows = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else []
        RECORD.write_text(json.dumps({"runs": [*rows, row], "machine": machine()}, indent=1) + "\n")
        print(
            f"{row['model']} {scope}, rate {rate:g}, distil {distil:g}: KL {row['kl_before']:.4f} -> "
            f"{row['kl_after']:.4f}, cross-entropy {row['ce_before']:.4f} -> {row['ce_after']:.4f}, "
            f"{row['tokens']} tokens in {row['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
