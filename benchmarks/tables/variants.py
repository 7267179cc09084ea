"""Ways to select, compared by loss of text: variants/*.summary.jsonl, of benchmarks/models/variants.py."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.quality.report import table
from benchmarks.tables import MISSING, commits, rows


def pair(name: str) -> str:
    """Every variant of one pair, by family; those of a family by loss at the middle keep."""
    found = rows(f"variants/{name}.summary.jsonl")
    if not found:
        return MISSING
    keeps = sorted({r["keep"] for r in found})
    by_name: dict[str, dict[float, dict]] = {}
    for row in found:
        by_name.setdefault(row["variant"], {})[row["keep"]] = row
    families = list(dict.fromkeys(r["family"] for r in found))
    middle = keeps[len(keeps) // 2]

    def place(own: dict[float, dict]) -> tuple[int, float]:
        family = next(iter(own.values()))["family"]
        return families.index(family), own[middle]["loss"] if middle in own else float("inf")

    lines = []
    for variant, own in sorted(by_name.items(), key=lambda item: place(item[1])):
        one = own.get(middle)
        losses = [_loss(own[keep]) if keep in own else "–" for keep in keeps]
        rest = [f"{one[key]:.2f}" for key in ("worst", "held", "held_worst_layer")] if one else ["–"] * 3
        lines.append([variant, *losses, *rest, next(iter(own.values()))["cost"]])
    head = ["variant", *(f"keep {100 * keep:g} %" for keep in keeps)]
    at = f"at {100 * middle:g} %"
    head += [f"worst window {at}", f"attention held {at}", "of the worst layer", "cost of a round"]
    first = found[0]
    note = (
        f"Loss of text in percent of dense ± standard error, teacher forced, no server: {first['windows']} "
        f"windows of {first['length']:,} tokens, their last {first['rows']} in verifies of four, "
        f"{first['dtype']}; maps and budgets fitted to {first['calibration']} other windows. Attention held "
        f"is of that outside sink and recent. –: cannot keep so little. {first['device']}, commit "
        f"{commits(found)}."
    )
    return table(head, lines) + "\n\n" + note


PAIRS = {
    "smollm2-plain": "SmolLM2, draft (a)",
    "smollm2-eagle3": "SmolLM2, EAGLE-3",
    "shipped-standalone": "shipped, STANDALONE",
    "shipped-eagle3": "shipped, EAGLE-3",
}


def compared(keep: float = 0.1) -> str:
    """Every variant at one keep, a column a pair."""
    found = {name: rows(f"variants/{name}.summary.jsonl") for name in PAIRS}
    if not any(found.values()):
        return MISSING
    at = {name: {r["variant"]: r for r in own if r["keep"] == keep} for name, own in found.items()}
    every = {r["variant"]: r for own in found.values() for r in own}
    lines = []
    for variant, row in every.items():
        cells = [_loss(own[variant]) if variant in own else "–" for own in at.values()]
        if set(cells) != {"–"}:
            lines.append([variant, *cells, row["cost"]])
    used = [own for own in found.values() if own]
    first = used[0][0]
    windows = sorted({own[0]["windows"] for own in used})
    note = (
        f"Loss of text in percent of dense ± standard error at keep {100 * keep:g} % of "
        f"{first['length']:,} tokens, teacher forced, no server: the last {first['rows']} tokens of "
        f"{windows[0]} to {windows[-1]} windows, in verifies of four. Maps and budgets were fitted to other "
        f"windows of the same kind of text, `served map` is the package's. {first['device']}, "
        f"{first['dtype']}, commit {commits(used[0])}."
    )
    return table(["variant", *PAIRS.values(), "cost of a round"], lines) + "\n\n" + note


def _loss(row: dict) -> str:
    """With the share that was kept, where it is not the one that was asked for."""
    other = abs(row["kept"] - row["keep"]) > 0.1 * row["keep"]
    kept = f" (keeps {100 * row['kept']:.0f} %)" if other else ""
    return f"{row['loss']:+.2f} ± {row['standard_error']:.2f}{kept}"


def main() -> None:
    """Print the tables of all pairs that were measured."""
    for path in sorted((tables.RESULTS / "variants").glob("*.summary.jsonl")):
        name = path.name.removesuffix(".summary.jsonl")
        print(f"## {name}\n\n{pair(name)}\n")


if __name__ == "__main__":
    main()
