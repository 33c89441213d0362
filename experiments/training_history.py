"""How the experts of a demo model come about: its checkpoints, moefied into the same neurons each.

    python experiments/train_demo.py llama ../shared/data/corpora runs/history/llama --keep 6
    python experiments/training_history.py llama runs/history/llama
    # writes benchmarks/records/history_llama.json

The last checkpoint is moefied as `experiments/reproduce` does it. Every earlier one gets the same neurons in
every expert, and a router of its own, fitted anew. What is compared is then which of the same groups of
neurons a token runs: router saturation (Muennighoff et al. 2024, OLMoE) beside what loads and chance give.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from demo_experts import RECIPE

import moefy
from moefy.inspection.record import rows
from moefy.models.artefact import Artefact, read_artefact
from moefy.models.checkpoint import Checkpoint, copy_folder
from moefy.models.config import read_config
from moefy.models.locate import meta_model, sites
from moefy.models.reorder import reorder
from moefy.recipe import override
from moefy.run.computing import machine, versions
from moefy.run.console import Reporter

RECORDS = Path("benchmarks/records")
TOKENS = 20_000
FIGURES = ("share_token", "share_domain", "lexical_recall", "constant_recall")


def checkpoints(trained: Path) -> dict[int, Path]:
    """Kept checkpoints by training step, the last one included."""
    kept = {int(folder.name.split("-")[1]): folder for folder in trained.glob("step-*")}
    steps = json.loads((trained / "record.json").read_text())["settings"]["phases"][-1]["steps"]
    return dict(sorted(kept.items())) | {steps: trained / "model"}


def alike(step: int, source: Path, work: Path, last: Artefact) -> Path:
    """A checkpoint with the neurons of every expert of the last one, and a router of its own."""
    out = work / f"moefied-{step}"
    if out.exists():
        return out
    ordered, checkpoint = work / f"ordered-{step}", Checkpoint.open(source)
    ordered.mkdir(exist_ok=True)
    # Kept checkpoints have no tokenizer of their own.
    copy_folder(work.parent / "model", ordered, skip={file.name for file in checkpoint.files})
    copy_folder(source, ordered, skip={file.name for file in checkpoint.files})
    found = sites(meta_model(read_config(checkpoint)))
    reorder(checkpoint, ordered, found, last, Reporter(quiet=True))
    moefy.convert(
        ordered, out, recipe=override(RECIPE, {"partition.method": "contiguous"}), quiet=True
    )
    return out


def measured(name: str, trained: Path) -> dict[str, Any]:
    """Every checkpoint beside the last one."""
    work, found = trained / "work", checkpoints(trained)
    work.mkdir(exist_ok=True)
    if not (work / "last").exists():
        moefy.convert(trained / "model", work / "last", recipe=RECIPE, quiet=True)
    last = read_artefact(work / "last")
    folders = {step: alike(step, source, work, last) for step, source in found.items()}
    end = folders[max(folders)]
    steps = []
    for step, folder in folders.items():
        alone = moefy.inspect(folder, tokens=TOKENS, skip=["controls", "causal"], quiet=True)
        beside = moefy.diff(folder, end, tokens=TOKENS, quiet=True)
        routing = rows(alone.table("routing"))[0]
        steps.append(
            {
                "step": step,
                "ce_dense": alone.honesty["ce_dense"]["value"],
                "ce": alone.honesty["ce"]["value"],
                "recall": [row["recall"] for row in rows(alone.table("layers"))],
                "saturation": rows(beside.table("saturation")),
                "delta": rows(beside.table("hunt_summary"))[0],
                "routing": {
                    key: value for key, value in routing.items() if key.startswith(FIGURES)
                },
            }
        )
        print(
            step, steps[-1]["ce"], [round(row["saturation"], 3) for row in steps[-1]["saturation"]]
        )
    return {
        "kind": "training_history", "model": name, "tokens": TOKENS, "steps": steps,
        "machine": machine(), "versions": versions(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("llama", "opt"))
    parser.add_argument("trained", type=Path, help="run folder of train_demo.py --keep")
    args = parser.parse_args()
    record = measured(args.model, args.trained)
    file = RECORDS / f"history_{args.model}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
