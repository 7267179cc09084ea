"""Many requests over one prefix, from shared_prefix.jsonl, and the soak, from soak.jsonl."""

from __future__ import annotations

import statistics

from benchmarks.quality.report import table
from benchmarks.tables import MISSING, commits, rows, spread

ARMS = {"stock-spec": "stock FA3 + EAGLE-3", "sts": "sts, `keep` 0.1"}


def shared_prefix() -> str:
    """Tokens per second and verifies of both arms, over one prefix."""
    found = rows("shared_prefix.jsonl")
    if not found:
        return MISSING
    first, medians, lines = found[0], {}, []
    for arm, name in ARMS.items():
        own = [r for r in found if r["arm"] == arm]
        speeds = [r["tokens_per_s"] for r in own]
        medians[arm] = statistics.median(speeds)
        sparse = f"{own[0]['sparse_verifies']:,}, none dense" if arm == "sts" else "–"
        lines.append([name, spread(speeds), sparse, f"{medians[arm] / medians['stock-spec']:.2f}x"])
    total = first["requests"] * first["context"]
    note = (
        f"{first['requests']} requests whose prompts of {first['context']:,} tokens share their first "
        f"{first['shared']:,}: {total / 1e6:.1f} million context tokens in a pool of {_pool(first):,}, "
        f"{total / _pool(first):.0f} times as many. {first['gpu']}, SGLang {first['sglang']}, commit "
        f"{commits(found)}; shapes of Llama-3.1-8B and a one-layer EAGLE-3 head, dummy weights, simulated "
        f"accept length {first['simulated']:g}. Verifies are those of all passes."
    )
    return table(["arm", "tokens per second", "sparse verifies", "gain"], lines) + "\n\n" + note


def _pool(row: dict) -> int:
    words = row["server"].split()
    return int(words[words.index("--max-total-tokens") + 1])


def soak() -> str:
    """What the last row of a soak says, whose every part was checked."""
    found = rows("soak.jsonl")
    if not found:
        return MISSING
    last, first = found[-1], found[0]
    sparse, dense = (sum(r[name] for r in found) for name in ("sparse_verifies", "dense_verifies"))
    return (
        f"{last['requests']:,} requests in {last['seconds']:.0f} s on one {last['gpu']} (commit "
        f"{commits(found)}): {last['aborted']} aborted, {last['retractions']} forced retractions, {sparse:,} "
        f"sparse verifies and {dense} dense ones. After each of {len(found)} parts the counters agreed with "
        f"the account kept of what was asked, the probe was answered as at first, and SGLang's strict leak "
        f"check was silent. Memory of the processes went from {first['memory_mb']:,.0f} to "
        f"{last['memory_mb']:,.0f} MB."
    )
