"""What training wins back and what it makes sparse; each writes benchmarks/records/train_{name}.json.

python scripts/training_bars.py recover     # llama demo at FFN density 0.25: share of the gap that is closed
python scripts/training_bars.py sparsify    # opt demo: sparsified, converted at density 0.1

Learning curves go to docs/train_{name}.png. On the bundled corpus unless --corpus names more text.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import moefy
from moefy import recipe as recipes
from moefy.measure import evaluate_folder
from moefy.provenance import machine
from moefy.recover import recover
from moefy.sparsify import sparsify
from moefy.training_recipe import RecoverRecipe, SparsifyRecipe

DEMO = Path("moefy/demo")


def recovery(
    work: Path, tokens: int, corpus: str | None, settings: dict[str, str]
) -> dict[str, Any]:
    """Convert at FFN density 0.25, recover, with the dense model trained on the same tokens beside it."""
    moefied = work / "moefied"
    if not moefied.exists():
        moefy.convert(DEMO / "llama", moefied, recipe=recipes.Recipe.named("default", density=0.25))
    recipe = recipes.override(RecoverRecipe(tokens=tokens), settings)
    out = work / "recovered"
    record = recover(moefied, out, recipe=recipe, corpus=corpus, control=True, resume=True)
    shutil.copy(out / "curves.png", "docs/train_recover.png")
    return record


def sparsifying(
    work: Path, tokens: int, corpus: str | None, settings: dict[str, str]
) -> dict[str, Any]:
    """Sparsify, convert at FFN density 0.1, compare with the dense model and with the control."""
    recipe = recipes.override(SparsifyRecipe(tokens=tokens), settings)
    out = work / "sparser"
    record = sparsify(DEMO / "opt", out, recipe=recipe, corpus=corpus, control=True, resume=True)
    shutil.copy(out / "curves.png", "docs/train_sparsify.png")
    rows = {}
    for name, source in {"sparsified": out, "as it was": DEMO / "opt"}.items():
        target = work / f"moefied {name}"
        if not target.exists():
            moefy.convert(source, target, recipe=recipes.Recipe.named("default", density=0.1))
        found = evaluate_folder(target, documents=44)
        rows[name] = {
            "ffn_density": found["ffn_density"],
            "active_budget": found["active_budget"],
            "ce": found["total"]["ce"]["mean"],
            "ce_of_its_dense": found["total"]["ce_dense"]["mean"],
        }
    dense = rows["as it was"]["ce_of_its_dense"]
    for row in rows.values():
        row["increase_over_dense"] = row["ce"] / dense - 1
    return {**record, "converted": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["recover", "sparsify"])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--corpus")
    parser.add_argument("--set", action="append", default=[], help="setting a=b of the training")
    parser.add_argument("--work", default="runs/training")
    args = parser.parse_args()
    work = Path(args.work) / args.what
    work.mkdir(parents=True, exist_ok=True)
    run = recovery if args.what == "recover" else sparsifying
    settings = dict(pair.split("=", 1) for pair in args.set)
    record = run(work, args.tokens, args.corpus, settings) | {"machine": machine()}
    file = Path(f"benchmarks/records/train_{args.what}.json")
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: record[k] for k in record if k.startswith("gap") or k == "converted"}))


if __name__ == "__main__":
    main()
