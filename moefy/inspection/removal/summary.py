"""A record of a removal as tables, lines, a page and a picture."""

from pathlib import Path
from typing import Any

from moefy.inspection.removal.sets import CONTROLS
from moefy.run.tables import COLOURS, INK, SOFT, figure, markdown, pyplot

Rows = tuple[list[str], list[list[str]]]

_CARD = """# {name}, without {forget}

Made from `{name}` by moefy {version}: {removed} of {total} {unit}s ({neurons} of {all_neurons} MLP neurons,
{share:.1%}) were removed that do most for the domain `{forget}` and least for {retain}. Their rows of the
down projections are zero; every other byte of the weights is that of the source. Plain `transformers`
loads this folder.

## Measured

On {forget_documents} documents of the domain and {retain_documents} of the others, of the corpus
`{corpus}`. Other documents ranked the {unit}s, others again decided how many go.

{curve}

At what was removed, beside controls:

{controls}

{lines}
"""


def curve_rows(record: dict[str, Any]) -> Rows:
    """Header and rows of the curve: what every share costs; what was written is marked."""
    header = ["removed", "CE forget", "CE retain", "forget loss", "retain loss", "top-1 forget",
              "top-1 retain"]  # fmt: skip
    rows = []
    for row in record["curve"]:
        mark = " (written)" if row["units"] == record["removed"]["units"] else ""
        rows.append(
            [
                f"{row['share']:.1%}{mark}", f"{row['ce_forget']:.3f}", f"{row['ce_retain']:.3f}",
                figure(row["forget_loss"], ".1%"), figure(row["retain_loss"], ".1%"),
                f"{row['accuracy_forget']:.3f}", f"{row['accuracy_retain']:.3f}",
            ]
        )  # fmt: skip
    return header, rows


def words(name: str, record: dict[str, Any]) -> str:
    """What the removal, or a control, takes out."""
    if name == "removal":
        return "this removal"
    return CONTROLS[name].words.format(unit=record["unit"])


def control_rows(record: dict[str, Any]) -> Rows:
    """Header and rows of the removal and its controls."""
    header = ["what goes", "neurons", "forget rise, nats", "forget loss", "retain loss"]
    rows = []
    for name, row in record["at"].items():
        label = words(name, record)
        if row.get("draws", 1) > 1:
            label += f" ({row['draws']} draws)"
        rows.append(
            [
                label, str(record["removed"]["neurons"]), figure(row["forget_rise"]),
                figure(row["forget_loss"], ".1%"), figure(row["retain_loss"], ".1%"),
            ]
        )  # fmt: skip
    return header, rows


def lines(record: dict[str, Any]) -> list[str]:
    """What the tables cannot say, a line each."""
    text = [
        f"area under the way of accuracies: {way(record)} (1 = unselective, lower = separable)",
        f"forget rise over that of energy-matched random neurons: {ratio(record)}; "
        + ("selective" if record["against_energy"]["selective"] else "not selective")
        + " (more than 3 times, interval excludes 1)",
    ]
    if not record["energy"]["close"]:
        off = max(record["energy"]["ratio"], key=lambda value: abs(value - 1))
        text.append(
            f"WARNING: the random sets do not reach the energy that was removed; of the layers the "
            f"furthest has {off:.2f} of it"
        )
    return [*text, relearned(record["relearning"])]


def relearned(test: dict[str, Any]) -> str:
    """The relearning test in a sentence."""
    if test["removal"] is None:
        return f"relearning: {test['verdict']}"

    def steps(run: dict[str, Any] | None) -> str:
        if run is None:
            return "none"
        return f"over {test['steps_tried']}" if run["steps"] is None else str(run["steps"])

    return (
        f"relearning half of what was lost from {test['tokens']} tokens: {steps(test['removal'])} steps; "
        f"after random removal of the same cost: {steps(test['control'])}. {MEANING[test['verdict']]}"
        if test["verdict"] in MEANING
        else f"relearning: {steps(test['removal'])} steps; {test['verdict']}"
    )


MEANING = {
    "hiding": "It comes back sooner than after random removal: what went was hidden rather than removed.",
    "removal": "It comes back later than after random removal, which speaks for removal; that it is "
    "nowhere else in the weights this cannot say.",
    "no difference": "It comes back as after random removal: no sign of hiding, none of removal beyond "
    "the loss.",
}


def way(record: dict[str, Any]) -> str:
    """The area, if any."""
    return "none" if record["area"] is None else f"{record['area']:.2f}"


def ratio(record: dict[str, Any]) -> str:
    """The ratio of rises with its interval, or why there is none."""
    against = record["against_energy"]
    if against["ratio"] is None:
        return "none, they cost the domain nothing"
    unsure = against["ratio"]["ci95"] is None
    return figure(against["ratio"], ".1f") + (
        " (no interval: their rise is within chance of 0)" if unsure else ""
    )


def card(record: dict[str, Any]) -> str:
    """The README.md of what was written."""
    removed, parts = record["removed"], record["parts"]["measure"]
    return _CARD.format(
        name=record["source"]["name"],
        version=record["machine"]["versions"]["moefy"],
        forget=record["forget"],
        retain=", ".join(f"`{name}`" for name in record["retain"]),
        removed=removed["units"],
        total=removed["of_units"],
        unit=record["unit"],
        neurons=removed["neurons"],
        all_neurons=removed["of_neurons"],
        share=removed["neurons"] / removed["of_neurons"],
        forget_documents=parts["forget_documents"],
        retain_documents=parts["retain_documents"],
        corpus=record["corpus"]["name"],
        curve=markdown(*curve_rows(record)),
        controls=markdown(*control_rows(record)),
        lines="\n".join(f"* {line}" for line in lines(record)),
    )


RETAIN, FORGET, RANDOM = COLOURS[:3]


def draw(record: dict[str, Any], picture: Path) -> None:
    """Write a PNG of the curve."""
    with pyplot() as plt:
        drawn, axes = plt.subplots(1, 2, figsize=(10, 4))
        _draw_curve(axes[0], record)
        _draw_way(axes[1], record)
        for axis in axes:
            axis.grid()
            axis.legend(fontsize=8)
        drawn.tight_layout()
        drawn.savefig(picture, dpi=110)


def _draw_curve(axis: Any, record: dict[str, Any]) -> None:
    """Rise of cross-entropy over the share that is removed."""
    curve = record["curve"]
    share = [100 * row["share"] for row in curve]
    for name, colour in (("forget", FORGET), ("retain", RETAIN)):
        rise = [100 * row[f"{name}_loss"]["mean"] for row in curve]
        low, high = ([100 * row[f"{name}_loss"]["ci95"][i] for row in curve] for i in (0, 1))
        axis.plot(share, rise, "o-", color=colour, markersize=4, label=name)
        axis.fill_between(share, low, high, color=colour, alpha=0.2, lw=0)
    axis.axvline(100 * record["removed"]["share"], color=SOFT, ls=":", lw=1, label="written")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=-0.5)
    axis.set_xlabel(f"{record['unit']}s removed, %")
    axis.set_ylabel("rise of cross-entropy, %")


def _draw_way(axis: Any, record: dict[str, Any]) -> None:
    """Accuracy on the domain to forget over that on the others."""
    path = [(row["accuracy_retain"], row["accuracy_forget"]) for row in record["curve"]]
    axis.plot(*zip(*path, strict=True), "o-", color=INK, markersize=4, label="this removal")
    axis.plot([path[0][0], 0], [path[0][1], 0], ":", color=SOFT, label="unselective")
    looks = zip(CONTROLS, ("s", "^", "D"), (RETAIN, FORGET, RANDOM), strict=False)
    for name, mark, colour in looks:
        if name in record["at"]:
            row = record["at"][name]
            place = row["accuracy_retain"], row["accuracy_forget"]
            label = words(name, record)
            axis.plot(*place, mark, color=colour, ls="", label=label)
    axis.set_xlabel("top-1 accuracy, retain")
    axis.set_ylabel(f"top-1 accuracy, {record['forget']}")
