"""Servers under load, from load.jsonl."""

from __future__ import annotations

from benchmarks.quality.report import table
from benchmarks.tables import MISSING, commits, gpus, rows

STOCK = "stock-spec-captured"
ARMS = {STOCK: "stock", "sts-draft": "sts", "sts": "sts, dense draft"}
BOUNDS = (10, 20)  # ms a token, of goodput
LOADS = {"generated-shared-prefix": "prefixes that are shared", "random-ids": "prompts nobody has seen"}


def load() -> str:
    """Of stock and sts at every rate of the newest run (commit) of a load that had stock and another arm."""
    found = rows("load.jsonl")
    arms = {arm: name for arm, name in ARMS.items() if any(r["arm"] == arm for r in found)}
    lines, shown = [], []
    for key in dict.fromkeys(map(load_of, found)):
        own = newest([r for r in found if load_of(r) == key])
        if own is None:
            continue
        dataset, context, algorithm, turns, rate, requests, new_tokens, *_ = key
        loads = LOADS[dataset] if turns == 1 else f"agents of {turns} turns over {LOADS[dataset]}"
        asked = f"{requests} x {new_tokens} tokens"
        cells = [f"{context:,} tokens, {loads}, {algorithm}, {asked}", f"{rate:g}"]
        for what, digits in (("output_throughput", 0), ("median_tpot_ms", 2), ("p99_ttft_ms", 0)):
            cells += [f"{own[arm][what]:,.{digits}f}" if arm in own else "–" for arm in arms]
        for bound in BOUNDS:
            cells += [f"{served(own[arm], bound):.2f}" if arm in own else "–" for arm in arms]
        lines.append(cells)
        shown += own.values()
    if not lines:
        return MISSING
    head = ["load", "requests/s"]
    measures = ("tokens/s", "ms a token", "ms to the first, 99 %", *(f"goodput, {b} ms" for b in BOUNDS))
    head += [f"{what}: {name}" for what in measures for name in arms.values()]
    first = shown[0]
    note = (
        f"SGLang's own serving client, Poisson arrivals, so many requests (agents) with so many new tokens "
        f"(a turn). Goodput: requests a second whose tokens after the first took at most "
        f"{' and '.join(map(str, BOUNDS))} ms each, in the mean of the request. "
        f"{gpus(shown)}, SGLang {first['sglang']}, commit {commits(shown)}; dummy weights, stock with FA3 "
        f"and its draft-extend captured."
    )
    return table(head, lines) + "\n\n" + note


def goodput(tpots_ms: list[float], seconds: float, bound_ms: float) -> float:
    """Requests a second whose mean time a token is within the bound."""
    return sum(tpot <= bound_ms for tpot in tpots_ms) / seconds


def served(row: dict, bound_ms: float) -> float:
    """Goodput of a row."""
    return goodput(row["tpots_ms"], row["duration"], bound_ms)


def load_of(row: dict) -> tuple:
    """What a row is of."""
    asked = ("dataset", "context", "algorithm", "turns", "rate", "requests", "new_tokens", "groups")
    return tuple(row[name] for name in (*asked, "gpu"))


def newest(found: list[dict]) -> dict[str, dict] | None:
    """The last row of each arm, of the newest run (commit) that has stock and another one."""
    for run in reversed(dict.fromkeys(r["commit"] for r in found)):
        own = {r["arm"]: r for r in found if r["commit"] == run}
        if STOCK in own and len(own) > 1:
            return own
    return None
