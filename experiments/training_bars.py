"""What training wins back and what it makes sparse; each writes benchmarks/records/train_{name}.json.

python experiments/training_bars.py recover     # llama demo at FFN density 0.25: share of the gap that is closed
python experiments/training_bars.py sparsify    # opt demo: sparsified, converted at density 0.1

python experiments/training_bars.py table       # docs/training.md, from the records

Learning curves go to docs/train_{name}.png. On the bundled corpus unless --corpus names more text.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from pages import fill

import moefy
from moefy import recipe as recipes
from moefy.evaluation.folder import evaluate as evaluate_folder
from moefy.run.computing import machine
from moefy.training.recipe import RecoverRecipe, SparsifyRecipe
from moefy.training.recover import recover
from moefy.training.sparsify import sparsify

DEMO, RECORDS = Path("moefy/demo"), Path("benchmarks/records")
KINDS = ("recover", "sparsify")


def recovery(
    work: Path, tokens: int, corpus: str | None, settings: dict[str, str]
) -> dict[str, Any]:
    """Convert at FFN density 0.25, recover, with the dense model trained on the same tokens beside it."""
    moefied = work / "moefied"
    if not moefied.exists():
        moefy.convert(
            DEMO / "llama", moefied, recipe=recipes.Recipe.named("largest_inputs", density=0.25)
        )
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
    if out.exists():  # trained before: only what comes after is done again
        record = json.loads((out / "sparsify.json").read_text())
    else:
        record = sparsify(
            DEMO / "opt", out, recipe=recipe, corpus=corpus, control=True, resume=True
        )
    shutil.copy(out / "curves.png", "docs/train_sparsify.png")
    # Half of the inputs tell which neurons are on; a tenth of them, as the density would have it, do not.
    wanted = recipes.override(
        recipes.Recipe.named("largest_inputs", density=0.1), {"router.inputs": 0.5}
    )
    rows = {}
    for name, source in {"sparsified": out, "as it was": DEMO / "opt"}.items():
        target = work / f"moefied {name}"
        if not target.exists():
            moefy.convert(source, target, recipe=wanted)
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


def table() -> str:
    """Markdown: what the records say."""
    found, sparse = (json.loads((RECORDS / f"train_{n}.json").read_text()) for n in KINDS)
    first, last = found["before"], found["after"]
    taught, tokens = found["control"]["ce"], found["training"]["tokens"]
    lines = [
        f"**Recovery.** Llama demo, `largest_inputs` at FFN density 0.25, {tokens / 1e6:.2f} M tokens, "
        f"`--train {found['recipe']['train']} --set distil={found['recipe']['distil']:g}`:",
        "", "| model | cross-entropy |", "| --- | --- |",
        f"| dense | {first['ce_dense']['mean']:.4f} |",
        f"| dense, trained on the same tokens (control) | {taught:.4f} |",
        f"| moefied | {first['ce']['mean']:.4f} |",
        f"| moefied, recovered | {last['ce']['mean']:.4f} |",
        "",
        f"Of the gap to the trained dense model {found['gap_closed_of_control']:.0%} is closed. Both models "
        "learn from this text, which is more of the kind that they are evaluated on; the recovered one leaves "
        f"its teacher: KL to it {first['kl']['mean']:.3f} before, {last['kl']['mean']:.3f} after.",
        "", "![learning curves](train_recover.png)", "",
        f"**Sparsifying.** OPT demo, {sparse['training']['tokens'] / 1e6:.2f} M tokens, "
        f"`--weight {sparse['recipe']['weight']:g}`, then `largest_inputs` with `--set router.inputs=0.5` at FFN "
        "density 0.1:",
        "", "| | as it was | sparsified | control |", "| --- | --- | --- | --- |",
        _row("cross-entropy, dense", "{:.4f}", [sparse[n]["ce"] for n in ("before", "after", "control")]),
        _row("share of neurons active", "{:.3f}", [sparse[n]["active"] for n in ("before", "after", "control")]),
        _row("square Hoyer over N", "{:.3f}", [sparse[n]["hoyer"] for n in ("before", "after", "control")]),
    ]  # fmt: skip
    rows = sparse["converted"]
    for label, key, form in (
        ("cross-entropy at density 0.1", "ce", "{:.4f}"),
        ("active budget", "active_budget", "{:.3f}"),
        ("increase over the dense model as it was", "increase_over_dense", "{:+.1%}"),
    ):
        lines.append(_row(label, form, [rows["as it was"][key], rows["sparsified"][key], None]))
    trained = rows["sparsified"]["ce"] / sparse["control"]["ce"] - 1
    lines.append(f"| increase over the control | | {trained:+.1%} | |")
    lines += ["", "![learning curves](train_sparsify.png)"]
    return "\n".join(lines) + "\n"


def _row(label: str, form: str, values: list[float | None]) -> str:
    cells = ["" if value is None else form.format(value) for value in values]
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*KINDS, "table"])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--corpus")
    parser.add_argument("--set", action="append", default=[], help="setting a=b of the training")
    parser.add_argument("--work", default="runs/training")
    args = parser.parse_args()
    if args.what == "table":
        fill(Path("docs/training.md"), "training", table())
        return
    work = Path(args.work) / args.what
    work.mkdir(parents=True, exist_ok=True)
    run = recovery if args.what == "recover" else sparsifying
    settings = dict(pair.split("=", 1) for pair in args.set)
    record = run(work, args.tokens, args.corpus, settings) | {"machine": machine()}
    file = RECORDS / f"train_{args.what}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: record[k] for k in record if k.startswith("gap") or k == "converted"}))


if __name__ == "__main__":
    main()
