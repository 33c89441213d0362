"""What of a moefied language model to train: KL won per token and per minute, for each scope, on short runs.

python experiments/recover_scopes.py FOLDER --tokens 16384 --scopes lora norms,routers,compensations all
python experiments/recover_scopes.py FOLDER --tokens 65536 --scopes lora --rates 0.02 --curve 8192   # a curve

Each run begins with the model of FOLDER and sees the same documents in the same order; thresholds are set anew
on held-out text before the figure is taken, on the first documents of the evaluation shard. Writes
benchmarks/records/recover_scopes.json, run by run; what is there already with the same settings stays.
"""

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import moefy
from moefy import recipe as recipes
from moefy.data.corpus import load_corpus, make_batches, sampler
from moefy.evaluation.outputs import judge, run_outputs
from moefy.experts.loading import load_dense
from moefy.experts.routed import Routed
from moefy.experts.sparse_mlp import use_backend
from moefy.models.artefact import open_artefact
from moefy.models.checkpoint import Checkpoint
from moefy.run.computing import machine
from moefy.run.memory import map_large_blocks, peak_memory
from moefy.training.learning import RecoveryCheck, in_training, towards, trained
from moefy.training.loop import _Stepping, make_accelerator, read_texts
from moefy.training.recipe import RecoverRecipe, for_this_machine
from moefy.training.teacher import another, sixteen_bits

RECORD = Path("benchmarks/records/recover_scopes.json")


def run(
    folder: Path, recipe: RecoverRecipe, documents: int, every: int, against: str | None
) -> dict[str, Any]:
    """Train for a while; KL to the dense model before and after, and what it took."""
    artefact, source = open_artefact(folder, verify=False)
    converted = recipes.from_dict(artefact.recipe)
    texts = read_texts(source, load_corpus(None), recipe, converted.seed)
    student = moefy.load(folder, dtype=torch.float32, verify=False)
    accelerator = make_accelerator(recipe)
    in_training(student, recipe.gradient_checkpointing)
    use_backend(student, "masked")
    samples = [s for b in texts.evaluated for s in b.samples][:documents]
    batches = make_batches(samples, tokens=512)
    held = make_batches([s for b in texts.held for s in b.samples][:documents], tokens=512)
    half = recipe.precision == "bf16"
    with trained(student, recipe) as learning:
        with (
            sixteen_bits(student, learning.adapted) if half else nullcontext(),
            accelerator.autocast(),
        ):
            teacher = learning.teacher
            if against is not None:
                dense = load_dense(Checkpoint.open(against), dtype=torch.float32).requires_grad_(
                    False
                )
                teacher = another(dense)
            want = [teacher(batch) for batch in batches]

            def kl() -> float:
                with learning.merged():
                    return judge(lambda b: run_outputs(student, b), batches, want).mean("kl")

            for module in student.modules():
                if isinstance(module, Routed):
                    learns = "routers" in recipe.parts and any(
                        True for _ in module.router.parameters()
                    )
                    module.straight_through = learns
            check = RecoveryCheck(student, teacher, held, converted, 1.0)
            check.merged = learning.merged
            first, before = check(), kl()
        with sixteen_bits(student, learning.adapted) if half else nullcontext():
            objective = towards(student, teacher, recipe.distil)
            steps = _Stepping.prepared(
                learning.wrapped, learning.groups, objective, recipe, accelerator
            )
            steps.outcome.before = first
            seconds, losses, curve = 0.0, [], [(0, before)]
            drawn = sampler(texts.train, recipe.step_tokens, recipe.seed)
            began_cpu = time.process_time()
            for _ in range(recipe.steps):
                began = time.perf_counter()
                row = steps.take(next(drawn), lambda: first)
                seconds += time.perf_counter() - began
                losses.append(None if row is None else round(row["kl"], 4))
                print(losses[-1], end=" ", flush=True)
                if every and steps.outcome.tokens >= curve[-1][0] + every:
                    with accelerator.autocast():
                        check()  # sets thresholds anew
                        curve.append((steps.outcome.tokens, kl()))
                    print(f"\n{curve[-1]}, {seconds:.0f} s", flush=True)
            cpu = time.process_time() - began_cpu
            with accelerator.autocast():
                last, after = check(), kl()
    return {
        "recipe": asdict(recipe), "kl_before": before, "kl_after": after, "held_before": first["held_out_kl"],
        "held_after": last["held_out_kl"], "density": last["density"], "tokens": steps.outcome.tokens,
        "seconds": seconds, "cpu_seconds": cpu, "losses": losses, "curve": curve, "peak_memory": peak_memory(),
        "evaluated_documents": documents, "parameters": sum(p.numel() for p in steps.parameters),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scopes", nargs="+", default=["lora"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--against", help="the dense model, where weights of FOLDER are rounded")
    parser.add_argument("--name", default="", help="what the record calls the model")
    parser.add_argument("--curve", type=int, default=0, help="tokens between points of a curve")
    args = parser.parse_args()
    map_large_blocks()
    for scope in args.scopes:
        for rank in args.ranks:
            for rate in args.rates:
                recipe = for_this_machine(RecoverRecipe(
                    train=scope, lora_rank=rank, learning_rate=rate, tokens=args.tokens, batch_tokens=args.batch,
                    distil=1.0,
                ))  # fmt: skip
                found = run(args.folder, recipe, args.documents, args.curve, args.against) | {
                    "model": args.name
                }
                rows = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else []
                rows.append(found)
                RECORD.write_text(json.dumps({"runs": rows, "machine": machine()}, indent=1) + "\n")
                print(
                    f"\n{args.name} {scope} rank {recipe.rank} rate {rate:g}: KL {found['kl_before']:.4f} -> "
                    f"{found['kl_after']:.4f}, held-out {found['held_before']:.4f} -> {found['held_after']:.4f}, "
                    f"{found['tokens']} tokens, {found['cpu_seconds']:.0f} cpu s, "
                    f"{found['tokens'] / found['cpu_seconds']:.0f} tokens/cpu s, density {found['density']:.3f}, "
                    f"peak {found['peak_memory'] / 1e9:.2f} GB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
