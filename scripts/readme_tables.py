"""Write the tables of README.md from the records in benchmarks/records.

python scripts/readme_tables.py            # rewrite
python scripts/readme_tables.py --check    # exit 1 where README.md is out of date
"""

import argparse
import json
import sys
from pathlib import Path

from pages import filled
from pareto_report import CONTROLS, OURS, best_size, load, mean

from moefy.tables import markdown

RECORDS = Path("benchmarks/records")
KINDS = {
    "llama": "llama, SwiGLU",
    "opt": "opt, ReLU",
    "minilm": "MiniLM, GELU (1 - cosine)",
    "babyllama": "BabyLlama, SwiGLU",
    "stories260K": "stories260K, SwiGLU",
    "relu-stories": "a character GPT-2, ReLU",
    "sort": "a minGPT that sorts, GELU",
}


def record(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def quality() -> str:
    """Ours beside the best peer, from the records of scripts/pareto.py."""
    rows = []
    known = [*KINDS]
    for model, found in sorted(load().items(), key=lambda item: known.index(item[0])):
        for budget in (0.25, 0.5):
            peers = {
                name: mean(best_size(sizes))
                for (name, at), sizes in found.items()
                if at == budget and name not in (*OURS, *CONTROLS)
            }
            if not peers or ("default", budget) not in found:
                continue
            best = min(peers, key=lambda name: peers[name])
            cells = []
            for name in ("fast", "default", "best"):
                mine = found.get((name, budget))
                cells.append(f"{mean(best_size(mine)):.4f}" if mine else "not run")
            chosen = best_size(found["default", budget])
            rows.append(
                [
                    KINDS[model], f"{budget}", f"{peers[best]:.4f} ({best})", *cells,
                    f"{mean(chosen, lambda r: r['ffn_density']):.2f}",
                    f"{mean(chosen, lambda r: r['active_compute']):.2f}",
                    f"{mean(chosen, lambda r: r['ce_increase']):.4f}" if "ce_increase" in chosen[0] else "",
                    str(min(len(best_size(found[n, budget])) for n in ("default", best))),
                ]
            )  # fmt: skip
    header = [
        "model", "active budget", "best peer", "`fast`", "`default`", "`best`", "FFN density",
        "computed", "CE increase", "seeds",
    ]  # fmt: skip
    return markdown(header, rows)


def speed() -> str:
    rows = []
    for name in sorted(p.stem for p in RECORDS.glob("layer_*.json")):
        found = record(name)
        rows.append(
            [
                found["dtype"].removeprefix("torch."),
                f"{found['k']} of {found['experts']}",
                str(found["tokens"]),
                f"{found['speedup']['moefied']:.2f}x",
                found["chosen"],
            ]
        )
    for name in ("llama", "opt"):
        found = record(f"bench_{name}")
        for phase in ("prefill", "decode"):
            by = ", ".join(found["backends"][phase])
            rows.append(
                [f"demo {name}, whole model, MLP router, {phase}", "8 of 32", "1" if phase == "decode" else str(found["prompt"]),
                 f"{found[phase]['speedup']:.2f}x", by]
            )  # fmt: skip
    return markdown(
        ["layer or model", "experts on", "tokens", "speed over dense", "computed by"], rows
    )


def demo() -> str:
    llama, opt = record("demo_llama")["bits_per_byte"], record("demo_opt")["bits_per_byte"]
    rows = [
        [domain, f"{row['unigram']:.2f}", f"{row['bigram']:.2f}", f"{row['model']:.2f}",
         f"{row['fewer_than_bigram']:.0%}", f"{opt[domain]['model']:.2f}", f"{opt[domain]['fewer_than_bigram']:.0%}"]
        for domain, row in llama.items()
    ]  # fmt: skip
    return markdown(["domain", "unigram", "bigram", "llama", "fewer", "opt", "fewer"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = Path("README.md")
    text = old = readme.read_text(encoding="utf-8")
    for make in (quality, speed, demo):
        text = filled(text, make.__name__, make())
    if args.check and text != old:
        sys.exit("README.md is out of date: run scripts/readme_tables.py")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
