"""Servers under load, from load.jsonl."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.quality.report import table
from benchmarks.tables import MISSING, commits, gpus, rows

STOCK = "stock-spec-captured"
ARMS = {STOCK: "stock", "sts-draft": "sts", "sts": "sts, dense draft"}
BOUNDS = (10, 20)  # ms a token, of goodput
LOADS = {"generated-shared-prefix": "prefixes that are shared", "random-ids": "prompts nobody has seen"}
# What a row says under each head; of some rows not all of it is known.
MEASURES: dict[str, Callable[[dict], str | None]] = {
    "tokens/s": lambda row: f"{row['output_throughput']:,.0f}",
    "ms a token": lambda row: f"{row['median_tpot_ms']:,.2f}",
    "ms to the first, 99 %": lambda row: f"{row['p99_ttft_ms']:,.0f}",
    "ms to the first, mean": lambda row: f"{row['mean_ttft_ms']:,.0f}" if "mean_ttft_ms" in row else None,
    # From a request's arrival in the scheduler to its first token there.
    "of which in the scheduler": lambda row: (
        f"{row['waits_ms'] + row['prefill_ms']:,.0f}" if "prefill_ms" in row else None
    ),
    **{f"goodput, {bound} ms": lambda row, bound=bound: f"{served(row, bound):.2f}" for bound in BOUNDS},
}


def load() -> str:
    """Of stock and sts at every rate of the newest run (commit) of a load that had stock and another arm."""
    found = rows("load.jsonl")
    keys = dict.fromkeys(map(load_of, found))
    runs = [(key, own) for key in keys if (own := newest([r for r in found if load_of(r) == key]))]
    shown = [row for _, own in runs for row in own.values()]
    if not shown:
        return MISSING
    arms = {arm: name for arm, name in ARMS.items() if any(arm in own for _, own in runs)}
    said = {head: of for head, of in MEASURES.items() if any(map(of, shown))}
    lines = []
    for key, own in runs:
        cells = [of(own[arm]) if arm in own else None for of in said.values() for arm in arms]
        lines.append([*_load(key), *(cell or "–" for cell in cells)])
    head = ["load", "requests/s", *(f"{what}: {name}" for what in said for name in arms.values())]
    note = (
        f"SGLang's own serving client, Poisson arrivals, so many requests (agents) with so many new tokens "
        f"(a turn). Goodput: requests a second whose tokens after the first took at most "
        f"{' and '.join(map(str, BOUNDS))} ms each, in the mean of the request. "
        f"{gpus(shown)}, SGLang {shown[0]['sglang']}, commit {commits(shown)}; dummy weights, stock with FA3 "
        f"and its draft-extend captured."
    )
    return table(head, lines) + "\n\n" + note


def _load(key: tuple) -> tuple[str, str]:
    """A load in words, and its rate."""
    dataset, context, algorithm, turns, rate, requests, new_tokens, *_ = key
    loads = LOADS[dataset] if turns == 1 else f"agents of {turns} turns over {LOADS[dataset]}"
    return f"{context:,} tokens, {loads}, {algorithm}, {requests} x {new_tokens} tokens", f"{rate:g}"


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
