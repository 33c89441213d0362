"""Every domain of the bundled corpus removed from the demo models, one at a time: docs/removal.md.

python experiments/removal_bars.py run            # both models, 11 domains each; goes on where it stopped
python experiments/removal_bars.py run --models llama --domains novels,science
python experiments/removal_bars.py table          # docs/removal.md and its picture, from the records

A record holds what `moefy prune` returned for each domain, but for the lists of neurons; it is written anew
after every domain. The bar: at +1 % mean cross-entropy of the other domains, the loss of the one to forget
rises by more than 3 times what random neurons of the same number and energy cost it, beyond doubt more
(the interval of the ratio excludes 1), for at least 6 of the 11 domains.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from demo_experts import moefied
from pages import fill

import moefy
from moefy.data.corpus import load_corpus
from moefy.errors import MoefyError
from moefy.inspection.removal.summary import MEANING, ratio, way
from moefy.run.computing import machine
from moefy.run.tables import figure, markdown

RECORDS = Path("benchmarks/records")
PAGE, PICTURE = Path("docs/removal.md"), Path("docs/removal.png")
MODELS = ("llama", "opt")
WANTED = 6


def measure(name: str, domains: list[str], tokens: int, seed: int, work: Path) -> None:
    """Remove every domain in turn; what the record holds already is left out."""
    file = RECORDS / f"removal_{name}.json"
    model = moefied(name, work)
    record: dict[str, Any] = {
        "model": f"{name} demo",
        "seed": seed,
        "tokens": tokens,
        "domains": {},
    }
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if (before["seed"], before["tokens"]) == (seed, tokens):
            record = before
    for domain in domains:
        if domain in record["domains"]:
            continue
        began, out = time.perf_counter(), work / f"{name}-without-{domain}"
        try:
            found = moefy.prune(
                model, out, forget=domain, tokens=tokens, seed=seed, resume=True, overwrite=True
            )
            found = {key: found[key] for key in found if key not in ("neurons", "machine")}
        except MoefyError as error:
            found = {"refused": str(error)}
        found["seconds"] = round(time.perf_counter() - began, 1)
        record["domains"][domain] = found
        record["machine"] = machine()
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def selective(record: dict[str, Any]) -> list[str]:
    """The domains that meet the bar."""
    return [
        name
        for name, found in record["domains"].items()
        if "refused" not in found and found["against_energy"]["selective"]
    ]


def rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one model."""
    header = [
        "forgotten", "experts removed", "retain loss", "forget loss", "forget rise, nats",
        "random energy-matched", "ratio", "selective", "area", "relearned (random)", "reads as",
    ]  # fmt: skip
    found = []
    for name, one in sorted(record["domains"].items()):
        if "refused" in one:
            found.append([name, f"none: {one['refused']}", *[""] * (len(header) - 2)])
            continue
        at, relearned = one["at"], one["relearning"]
        again = relearned["verdict"]
        found.append(
            [
                name, f"{one['removed']['units']} of {one['removed']['of_units']}",
                figure(at["removal"]["retain_loss"], ".1%"), figure(at["removal"]["forget_loss"], ".1%"),
                figure(at["removal"]["forget_rise"]), figure(at["energy"]["forget_rise"]),
                ratio(one), "yes" if one["against_energy"]["selective"] else "no",
                way(one), f"{_steps(relearned, 'removal')} ({_steps(relearned, 'control')})",
                again if again in MEANING else "-",
            ]
        )  # fmt: skip
    return header, found


def _steps(found: dict[str, Any], which: str) -> str:
    if found[which] is None:
        return "-"
    steps = found[which]["steps"]
    return f">{found['steps_tried']}" if steps is None else str(steps)


def table() -> str:
    """What the records say."""
    text = []
    for name in MODELS:
        file = RECORDS / f"removal_{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        good, count = selective(record), len(record["domains"])
        others = sorted(set(record["domains"]) - set(good))
        seconds = [found["seconds"] for found in record["domains"].values()]
        met = "met" if len(good) >= WANTED else "not met"
        text += [
            f"**{name} demo**, {record['tokens']} tokens for each part, seed {record['seed']}. {len(good)} of "
            f"{count} domains pass: the bar of {WANTED} is {met}."
            + (f" Not selective: {', '.join(others)}." if others else ""),
            "", markdown(*rows(record)), "",
            f"Seconds a domain, on {record['machine']['threads']} thread(s) of a shared machine: "
            f"{min(seconds):.0f} to {max(seconds):.0f}.", "",
        ]  # fmt: skip
    return "\n".join([*text, "![removal of every domain](removal.png)"])


def picture() -> None:
    """Forget rise of every domain beside that of random neurons, one panel for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    files = [RECORDS / f"removal_{name}.json" for name in MODELS]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    figure, axes = plt.subplots(
        1, len(records), figsize=(6 * len(records), 4.2), squeeze=False, sharex=True
    )
    for axis, record in zip(axes[0], records, strict=True):
        done = {n: f for n, f in sorted(record["domains"].items()) if "refused" not in f}
        for place, (what, colour, label) in enumerate(
            (
                ("removal", "#d55e00", "experts of the domain"),
                ("experts", "#0072b2", "random experts, as many"),
                ("energy", "#009e73", "random neurons, same number and energy"),
            )
        ):
            rises = [found["at"][what]["forget_loss"] for found in done.values()]
            height = [index + 0.22 * (place - 1) for index in range(len(rises))]
            mean = [100 * rise["mean"] for rise in rises]
            ends = [
                [abs(m - 100 * r["ci95"][i]) for m, r in zip(mean, rises, strict=True)]
                for i in (0, 1)
            ]
            axis.errorbar(
                mean, height, xerr=ends, fmt="o", color=colour, markersize=4, lw=1.2, label=label
            )
        axis.axvline(1, color="#6b6b6b", ls=":", lw=1)
        axis.set_yticks(range(len(done)), list(done))
        axis.invert_yaxis()
        axis.set_xlabel("rise of the forgotten domain's cross-entropy, %")
        axis.set_title(record["model"], loc="left")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--domains", help="by comma; all of the bundled corpus")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="runs/removal")
    args = parser.parse_args()
    if args.what == "table":
        fill(PAGE, "removal", table())
        picture()
        return
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    domains = args.domains.split(",") if args.domains else load_corpus().domains
    for name in args.models.split(","):
        measure(name, domains, args.tokens, args.seed, work)


if __name__ == "__main__":
    main()
