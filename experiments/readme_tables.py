"""Write the tables of README.md from the records in benchmarks/records.

python experiments/readme_tables.py            # rewrite
python experiments/readme_tables.py --check    # exit 1 where README.md is out of date
"""

import argparse
import json
import sys
from pathlib import Path

from pages import filled
from pareto_report import CONTROLS, OURS, best_size, load, mean

from moefy.run.tables import markdown

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
    """Ours beside the best peer, from the records of experiments/pareto.py."""
    rows = []
    known = [*KINDS]
    for model, found in sorted(load().items(), key=lambda item: known.index(item[0])):
        for budget in (0.25, 0.5):
            peers = {
                name: mean(best_size(sizes))
                for (name, at), sizes in found.items()
                if at == budget and name not in (*OURS, *CONTROLS)
            }
            if not peers or ("largest_inputs", budget) not in found:
                continue
            best = min(peers, key=lambda name: peers[name])
            cells = []
            for name in ("fast", "largest_inputs", "best"):
                mine = found.get((name, budget))
                cells.append(f"{mean(best_size(mine)):.4f}" if mine else "not run")
            chosen = best_size(found["largest_inputs", budget])
            rows.append(
                [
                    KINDS[model], f"{budget}", f"{peers[best]:.4f} ({best})", *cells,
                    f"{mean(chosen, lambda r: r['ffn_density']):.2f}",
                    f"{mean(chosen, lambda r: r['active_compute']):.2f}",
                    f"{mean(chosen, lambda r: r['ce_increase']):.4f}" if "ce_increase" in chosen[0] else "",
                    str(min(len(best_size(found[n, budget])) for n in ("largest_inputs", best))),
                ]
            )  # fmt: skip
    header = [
        "model", "active budget", "best peer", "`fast`", "`largest_inputs`", "`best`", "FFN density",
        "computed", "CE increase", "seeds",
    ]  # fmt: skip
    return markdown(header, rows)


def speed() -> str:
    """What `auto` takes, and a whole model compiled, beside the fastest dense engine; `none` is a difference
    within the noise."""
    rows = []
    names = sorted(p.stem for p in RECORDS.glob("layer_*.json"))
    for name in [*names, "bench_llama", "bench_opt"]:
        found = record(name)
        what = f"{found['dtype']}, {found['what'].split(' experts')[0].split()[-1]} experts"
        if found["level"] == "model":
            what = f"demo {name.removeprefix('bench_')}, whole model, MLP router"
        for cell in found["cells"]:
            layer = found["level"] == "layer"
            for engine, how in (
                ("auto", ""),
                ("auto+compiled+linears", ", compiled, its linear maps"),
            ):
                if engine not in cell["engines"] or cell["baseline"] is None:
                    continue
                ours = cell["engines"][engine]
                rows.append(
                    [
                        what if layer else f"{what}, {cell['phase']}",
                        f"{cell['density']:.2f}",
                        str(cell["tokens"]),
                        "none" if ours["speedup"] is None else f"{ours['speedup']:.2f}x",
                        cell["baseline"],
                        found["machine"].get("instructions", found["machine"]["cpu"]),
                        ours["computed_by"].split(" ")[0] + how,
                    ]
                )
    header = [
        "layer or model",
        "density",
        "tokens",
        "speed over dense",
        "dense by",
        "instructions",
        "computed by",
    ]
    return markdown(header, rows)


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
        sys.exit("README.md is out of date: run experiments/readme_tables.py")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
