"""What `moefy inspect` prints: the quality summary, what explains routing, and the experts that matter most."""

from typing import Any

from moefy.inspection.record import Inspection, rows
from moefy.run.tables import number

STRONGEST = 10
CONTEXT = 12
"""Tokens that are shown before one."""
_SHARES = {
    "share_token": "the token",
    "share_previous": "the token before",
    "share_domain": "the domain",
    "share_position": "the position",
}

Rows = tuple[list[str], list[list[str]]]


def quality_summary(inspection: Inspection) -> Rows:
    """Header and rows of the quality summary."""
    found = []
    for entry in inspection.honesty.values():
        shown = _ranged(entry["value"], entry.get("low"), entry.get("high"))
        found.append([shown, entry["what"], entry.get("verdict") or ""])
    return ["figure", "what it is", "so"], found


def explained(inspection: Inspection) -> Rows:
    """Header and rows of what predicts which experts run, layer by layer."""
    layers = rows(inspection.tables.get("layers", {}))
    names = [name for name in _SHARES if layers and name in layers[0]]
    header = ["layer", *(_SHARES[name] for name in names), "not explained"]
    found = []
    for row in layers:
        shares = [row[name] for name in names]
        rest = None if None in shares else 1 - sum(shares)
        cells = [_share(row, name) for name in names]
        found.append([inspection.layers[row["layer"]], *cells, _percent(rest)])
    return header, found


def strongest(inspection: Inspection) -> Rows:
    """Header and rows of the experts whose ablation harms one domain most beyond the others."""
    causal = [
        row
        for row in rows(inspection.tables.get("causal", {}))
        if row["model"] == "dense" and row["mode"] == inspection.meta["settings"]["mode"]
        if row["csi"] is not None
    ]
    causal.sort(key=lambda row: row["csi"], reverse=True)
    effects = ["selectivity, nats", "CE increase, nats", "beside random sets", "q"]
    found = []
    for row in causal[:STRONGEST]:
        place = "" if row["percentile"] is None else f"percentile {row['percentile']:.0f}"
        found.append(
            [
                f"L{row['layer']}.E{row['expert']}",
                row["domain"],
                _nats(row, "csi"),
                _nats(row, "ce"),
                place + (f", z {row['z_random']:.1f}" if row["z_random"] is not None else ""),
                "" if row["q"] is None else f"{row['q']:.3f}",
            ]
        )
    return ["expert", "domain", *effects], found


def _ranged(value: Any, low: Any, high: Any) -> str:
    if value is None:
        return "not known"
    return number(value, (low, high), ".4g", ".3g") if isinstance(value, float) else str(value)


def _nats(row: dict[str, Any], name: str) -> str:
    return _ranged(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    return "" if value is None else number(value, (low, high), ".1%")


def _share(row: dict[str, Any], name: str) -> str:
    return _percent(row[name], row[f"{name}_low"], row[f"{name}_high"])


def differences(inspection: Inspection) -> Rows:
    """Header and rows of where two models differ: all tokens, domains, classes of tokens."""
    header = [
        "tokens",
        "delta, nats",
        "KL, nats",
        "share of losses",
        "share of tokens",
        "documents",
    ]
    total = rows(inspection.table("hunt_summary"))[0]
    found = [["all", _nats(total, "delta"), _nats(total, "kl"), "", "", str(total["documents"])]]
    for name, key in (("hunt_domains", "domain"), ("hunt_classes", "class")):
        # Without a tokenizer there are no classes of tokens.
        for row in rows(inspection.table(name)) if name in inspection.tables else ():
            shares = [_percent(row[column]) for column in ("share_of_losses", "share_of_tokens")]
            nats = _nats(row, "delta"), _nats(row, "kl")
            found.append([row[key], *nats, *shares, str(row["documents"])])
    return header, found


def saturated(inspection: Inspection) -> Rows:
    """Header and rows of how much routing two models with the same experts share, layer by layer."""
    names = {
        "saturation": "shared experts",
        "saturation_load": "by load alone",
        "saturation_chance": "by chance",
    }
    found = [
        [str(row["layer"]), *(_share(row, name) for name in names)]
        for row in rows(inspection.table("saturation"))
    ]
    return ["layer", *names.values()], found


def tails(inspection: Inspection) -> Rows:
    """Header and rows of the tokens that change most, either way, in context."""
    found = []
    for row in rows(inspection.table("hunt")):
        if row["rank"] < STRONGEST:
            text = inspection.texts[str(row["document"])]
            at, ends = row["position"], text["ends"]
            before = text["text"][ends[max(0, at - CONTEXT)] : ends[at]]
            after = text["text"][ends[at] : ends[min(at + 1, len(ends) - 1)]]
            shown = "".join(c if c.isprintable() else "\u00b7" for c in f"{before}[{after}]")
            found.append([row["tail"], f"{row['delta']:+.2f}", row["domain"], shown])
    return ["", "delta, nats", "domain", "context, and the token that comes next"], found
