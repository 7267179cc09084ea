"""Shares of the target's attention that a selection holds, from history_summary.jsonl and calibrate/."""

from __future__ import annotations

import json

from benchmarks import tables
from benchmarks.quality.report import table
from benchmarks.tables import MISSING, commits, rows

HISTORY = {
    "off": "`off`",
    "warm": "`warm`",
    "channel": "`blend`",
    "layer": "`blend`, one score a draft layer",
    "slot": "`blend`, one score a slot",
}
PAIRS = {"standalone": "STANDALONE", "eagle3": "EAGLE-3"}
SPLITS = {
    "sink + recent, same size": "sink + recent of the same size",
    "proportional default": "proportional default",
    "best draft head a window": "best single draft head in every window (no map can)",
    "calibrated, uniform budget": "calibrated map, the same budget for every head",
    "calibrated, split budget": "**calibrated map**",
    "oracle": "oracle, the same budget for every head: the target's own top tokens",
}


def history() -> str:
    """Attention mass that a selection holds, by what slots remember and how much it weighs."""
    found = rows("history_summary.jsonl")
    if not found:
        return MISSING
    lines = []
    for way, name in HISTORY.items():
        mine = [r for r in found if r["way"] == way]
        for r in mine[:1] if way == "off" else reversed(mine):
            weight = "–" if way == "off" else f"{r['weight']:g}"
            over = "–" if way == "off" else f"{r['over_off']:+.4f} ± {r['over_off_error']:.4f}"
            fresh = [f"{100 * r[key]:.1f} %" for key in ("first_of_fresh", "first_of_fresh_least")]
            shares = [f"{r[key]:.3f}" for key in ("by_mass", "first_by_mass", "recall")]
            lines.append([name, weight, shares[0], over, *shares[1:], *fresh])
    first = found[0]
    head = ["`history`", "`history_weight`", "all rounds", "over `off`", "first verify after a prefix hit"]
    head += ["mean over heads, whatever mass they have", "of a fresh scoring", "the least of it"]
    note = (
        f"Share of the target's attention mass outside sink and recent that a selection at keep 10 % holds, "
        f"in plain torch (no server), on {first['conversations']} conversations of up to "
        f"{first['longest']:,} tokens and {first['rounds']} rounds; ± is a standard error over "
        f"conversations. The last two columns are of the first verify after a prefix hit: the mass it holds, "
        f"sink and recent included, over what scoring the whole context afresh would hold, as a mean and in "
        f"the worst case. Commit {commits(found)}."
    )
    return table(head, lines) + "\n\n" + note


def calibrated(pair: str) -> dict | None:
    """What calibrating a draft of the shipped pair reported."""
    path = tables.RESULTS / "calibrate" / f"{pair}.split.json"
    return json.loads(path.read_text()) if path.exists() else None


def calibration() -> str:
    """Attention mass that the shipped pair's maps hold on held-out texts."""
    found = {name: own for pair, name in PAIRS.items() if (own := calibrated(pair))}
    if not found:
        return MISSING
    lines = []
    for key, name in SPLITS.items():
        cells = [f"{100 * own['recall_by_mass'][key]:.0f} %" for own in found.values()]
        lines.append([name, *(f"**{c}**" if name.startswith("**") else c for c in cells)])
    for key, name in (("gap_closed_by_mass", "so the map closes of the gap between default and oracle"),):
        lines.append([name, *(f"{100 * own[key]:.0f} %" for own in found.values())])
    header = rows("calibrate/standalone.jsonl")[0]
    share = next(iter(found.values()))["share_outside"]
    note = (
        f"Share of the target's attention outside sink and recent ({100 * share:.0f} % of all its attention) "
        f"that a selection at keep 10 % holds, on {header['windows']['texts']} windows of held-out texts. "
        f"Commit {header['commit']}."
    )
    return table(["selected by", *found], lines) + "\n\n" + note


def ways() -> str:
    """Every way to join draft heads that was tried: what it holds, and whether a map can say it."""
    found = {name: rows(f"calibrate/{pair}.jsonl")[1:] for pair, name in PAIRS.items()}
    if not all(found.values()):
        return MISSING
    by_way = {name: {r["way"]: r for r in own} for name, own in found.items()}
    lines = []
    for way, first in next(iter(by_way.values())).items():
        own = [of.get(way) for of in by_way.values()]
        cells = [
            f"{100 * r[of]['by_mass']:.1f} / {100 * r[of]['recall']:.1f}" if r else "–"
            for r in own
            for of in ("texts", "tasks")
        ]
        lines.append([way, "yes" if first["serves"] else "no", *cells])
    head = [f"{name}, {of}" for name in by_way for of in ("texts", "tasks")]
    return table(["way", "a map can", *head], lines)
