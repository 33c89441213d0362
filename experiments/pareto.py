"""Every recipe on one model at equal active budgets: records for `experiments/pareto_report.py`.

python experiments/pareto.py moefy/demo/llama --name llama --seed 0            # about an hour a seed
python experiments/pareto.py moefy/demo/llama --name llama --seed 0 --only largest_inputs,teal --budgets 0.25

Each run is kept as it ends in benchmarks/records/pareto_{name}_seed{seed}.json; what is there already
is not run again unless --again is given.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from moefy import recipe as recipes
from moefy.benchmark.compare import Comparison
from moefy.run.computing import machine

BUDGETS = (0.1, 0.2, 0.25, 0.5, 0.75)

# Recipes, each at the expert sizes among which its best is looked for; None is the recipe's own.
SIZES: dict[str, tuple[int | None, ...]] = {
    "teal": (None,),
    "wina": (None,),
    "cats": (None,),
    "griffin": (None,),
    "pruning": (None,),
    "random": (32,),
    "oracle": (None,),
    "cmoe": (None, 32, 8),
    "expertweaver": (None, 8),
    "moefication": (32, 8),
    "g_moefication": (32, 8),
    "d2dmoe": (32, 8),
    "deja_vu": (None,),
    "fast": (None,),
    "largest_inputs": (None,),
    "export": (None, 8),
    "best": (None,),
    "low_bit": (None,),
}
# Shared experts that cover about an eighth of the neurons, as CMoE's own 2 of 16 do.
CMOE_SHARED = 1 / 8


def settings(name: str, size: int | None, neurons: int) -> dict[str, Any]:
    if size is None:
        return {}
    chosen: dict[str, Any] = {"partition.expert_size": size, "partition.experts": None}
    if name == "cmoe":
        chosen["partition.shared"] = max(1, round(CMOE_SHARED * neurons / size))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True, help="what the records call the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SIZES), help="recipes, by comma")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--documents", type=int, default=44)
    parser.add_argument("--corpus")
    parser.add_argument("--set", action="append", default=[], help="recipe setting for all")
    parser.add_argument("--work", default="runs/pareto")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()

    file = Path(f"benchmarks/records/pareto_{args.name}_seed{args.seed}.json")
    record = json.loads(file.read_text()) if file.exists() else {"rows": []}
    bench = Comparison(
        args.model,
        Path(args.work) / args.name,
        corpus=args.corpus,
        seed=args.seed,
        documents=args.documents,
    )
    neurons = bench.neurons()
    for name in args.only.split(","):
        for size in SIZES[name]:
            for budget in map(float, args.budgets.split(",")):
                key = {"recipe": name, "expert_size": size, "budget": budget}
                old = [row for row in record["rows"] if key.items() <= row.items()]
                if old and not args.again:
                    continue
                began = time.perf_counter()
                row = {**key, **one(bench, name, settings(name, size, neurons), budget, args.set)}
                record["rows"] = [row for row in record["rows"] if row not in old] + [row]
                record |= {
                    "kind": "pareto",
                    "model": args.name,
                    "seed": args.seed,
                    "documents": args.documents,
                    "corpus": bench.corpus,
                    "machine": machine(),
                }
                file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                shown = {k: row[k] for k in ("kl", "cosine", "active_budget", "n/a") if k in row}
                print(*key.values(), shown, f"{time.perf_counter() - began:.0f} s", flush=True)


def one(
    bench: Comparison, name: str, chosen: dict[str, Any], budget: float, extra: list[str]
) -> dict[str, Any]:
    if name == "oracle":
        return bench.oracle(budget)
    recipe = recipes.override(
        recipes.load(name), {**chosen, **dict(pair.split("=", 1) for pair in extra)}
    )
    row = bench.at(recipe, budget)
    if "n/a" in row:
        return row
    row.pop("settings")
    fits = row.pop("routers", [])
    if fits:
        row["gap_closed"] = sum(fit["gap_closed"] for fit in fits) / len(fits)
        row["recall"] = sum(fit["recall"] for fit in fits) / len(fits)
    return row


if __name__ == "__main__":
    main()
