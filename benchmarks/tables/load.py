"""Servers under load, from load.jsonl."""

from __future__ import annotations

from benchmarks.quality.report import table
from benchmarks.tables import MISSING, commits, gpus, rows

ARMS = {"stock-spec-captured": "stock", "sts": "sts"}
LOADS = {"generated-shared-prefix": "prefixes that are shared", "random-ids": "prompts nobody has seen"}


def load() -> str:
    """Of stock and sts at every rate of the newest run (commit) of a load that had both."""
    found = rows("load.jsonl")
    lines, shown = [], []
    for key in dict.fromkeys(map(load_of, found)):
        own = newest([r for r in found if load_of(r) == key])
        if own is None:
            continue
        dataset, context, algorithm, turns, rate = key
        loads = LOADS[dataset] if turns == 1 else f"agents of {turns} turns over {LOADS[dataset]}"
        cells = [f"{context:,} tokens, {loads}, {algorithm}", f"{rate:g}"]
        for what in ("output_throughput", "median_tpot_ms", "p99_ttft_ms", "goodput"):
            digits = {"output_throughput": 0, "p99_ttft_ms": 0}.get(what, 2)
            cells += [f"{row[what]:,.{digits}f}" for row in own]
        stock, sts = (row["goodput"] for row in own)
        lines.append([*cells, f"**{sts / stock:.2f}x**" if stock else "–"])
        shown += own
    if not lines:
        return MISSING
    head = ["load", "requests/s"]
    for what in ("tokens/s", "ms a token", "ms to the first, 99 %", "goodput"):
        head += [f"{what}: {name}" for name in ARMS.values()]
    first = shown[0]
    bounds = ", ".join(f"{bound:g}" for bound in dict.fromkeys(r["tpot_bound_ms"] for r in shown))
    note = (
        f"SGLang's own serving client, Poisson arrivals, {first['requests']} requests of "
        f"{first['new_tokens']} new tokens at each rate. Goodput: requests a second whose tokens after the "
        f"first took at most {bounds} ms each. {gpus(shown)}, SGLang {first['sglang']}, commit "
        f"{commits(shown)}; dummy weights, stock with FA3 and its draft-extend captured."
    )
    return table([*head, "goodput"], lines) + "\n\n" + note


def load_of(row: dict) -> tuple[str, int, str, int, float]:
    """What a row is of: dataset, context, algorithm, turns of a conversation, and rate."""
    return row["dataset"], row["context"], row["algorithm"], row.get("turns", 1), row["rate"]


def newest(found: list[dict]) -> list[dict] | None:
    """The last row of each arm, of the newest run (commit) that has both."""
    for run in reversed(dict.fromkeys(r["commit"] for r in found)):
        own = [[r for r in found if (r["commit"], r["arm"]) == (run, arm)] for arm in ARMS]
        if all(own):
            return [of_arm[-1] for of_arm in own]
    return None
