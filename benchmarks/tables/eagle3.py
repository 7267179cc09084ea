"""Tokens per second of servers with an EAGLE-3 head, from serving.jsonl."""

from __future__ import annotations

import statistics

from benchmarks.bound import times_bound
from benchmarks.quality.report import table
from benchmarks.shapes import Shape
from benchmarks.tables import MISSING, card, commits, gpus, rows, serving, spread
from benchmarks.tables.serving import columns, gain, newest, null_result, of_an_8b

ARMS = {
    "stock": "stock FA3, no speculation",
    "stock-spec-captured": "stock FA3 + EAGLE-3, draft-extend captured",
    "stock-fp8": "the same, KV in FP8",
    "sts-draft": "sts, `keep` 0.1",
    "sts": "sts, dense draft",
    "sts-draft-kv": "sts, dense draft, its KV in FP8",
    "sts-tokens": "sts, token scores",
}
GAINS = {
    "sts-draft": "gain",
    "sts": "gain, dense draft",
    "sts-tokens": "gain, token scores",
    "sts-draft-kv": "gain, head's KV in FP8",
}
FRONT_ARMS = ("sts-draft", "sts", "sts-tokens")  # whose gains the README shows


def measured(tp: int = 1, kv: str = "auto") -> list[dict]:
    """What was measured of targets with an EAGLE-3 head, mixed lengths too. kv: of every arm but stock-fp8,
    which is an opponent of those with "auto"."""
    found = [r for r in rows("serving.jsonl") if r.get("algorithm") == "EAGLE3" and r.get("tp", 1) == tp]
    return [r for r in found if ("auto" if r["arm"] == "stock-fp8" else r["kv"]) == kv]


def eagle3() -> str:
    """On one GPU, KV in the model's dtype."""
    return by_kind(measured())


def two_gpus() -> str:
    """The same at --tp 2."""
    return by_kind(measured(tp=2))


def fp8_kv() -> str:
    """The same where KV is in FP8."""
    return by_kind(measured(kv="fp8_e4m3"))


def by_kind(found: list[dict]) -> str:
    """Tokens per second with an EAGLE-3 head, by model and what it drafts."""
    kinds: dict[tuple, list[dict]] = {}
    for r in found:
        kinds.setdefault((r["target"]["layers"], r["topk"] if r["drafts"] else None), []).append(r)
    parts = []
    for (layers, topk), own in kinds.items():
        if topk is not None:
            alone = kinds.get((layers, None), [])
            parts.append(f"{title(own[0])}\n\n{by_shape(own, alone)}")
    return "\n\n".join([*parts, note(found)]) if parts else MISSING


def title(row: dict) -> str:
    drafts = f"a tree of {row['topk']} branches a step" if row["topk"] > 1 else "a chain"
    target = row["target"]
    return (
        f"*{drafts[0].upper()}{drafts[1:]}, {row['steps']} steps and {row['draft_tokens']} tokens a verify; "
        f"a target of {target['layers']} layers with {target['heads']} query and {target['kv_heads']} KV "
        f"heads of {target['head_dim']}.*"
    )


def by_shape(found: list[dict], alone: list[dict]) -> str:
    """By shape: arms, what sts keeps, gains over captured stock, and how near sts is to its bytes.

    alone: rows of the target without a draft."""
    there = {r["arm"] for r in (*found, *alone)}
    arms = {arm: name for arm, name in columns(ARMS, found).items() if arm in there}
    gains, lines = {arm: name for arm, name in GAINS.items() if arm in there}, []
    default = "sts-draft" if "sts-draft" in there else "sts"  # trees draft densely
    shapes = sorted({Shape.of(r) for r in found}, key=lambda s: (s.shortest or 0, -s.context, -s.requests))
    for shape in shapes:
        of_shape = [r for r in (*found, *alone) if Shape.of(r) == shape]
        key = (shape.context, shape.requests)
        own = {arm: newest(of_shape, key, arm)[0] for arm in arms}
        cells = [spread([r["tokens_per_s"] for r in some]) if some else "–" for some in own.values()]
        kept = {r["keep_ratio"] for r in own[default]}
        cells.append(f"{100 * max(kept):.0f} %" if kept else "–")
        for arm in gains:
            gained = gain(of_shape, arm, key, "stock-spec-captured")
            cells.append(f"**{gained:.2f}x**" if gained else "–")
        for arm in ("stock-spec-captured", default):
            times = times_bound(own[arm])
            cells.append(f"{times:.2f}x" if times else "–")
        lines.append([shape.shown(), *cells])
    head = ["context x requests", *arms.values(), "kept", *gains.values(), "stock, bytes", "sts, bytes"]
    return table(head, lines)


def note(found: list[dict]) -> str:
    first = found[0]
    rates = ", ".join(dict.fromkeys(f"{r['read_gbps']:,}" for r in found if r["read_gbps"]))
    simulated = ", ".join(dict.fromkeys(f"{r['simulated']:g}" for r in found if r["simulated"]))
    return (
        f"Tokens per second, median ± half the spread, {first['new_tokens']} new tokens a request. "
        f"{gpus(found)}, SGLang {first['sglang']}, commit {commits(found)}; dummy weights, a head of one "
        f"layer with the target's heads, simulated accept length {simulated} (the output is meaningless, the "
        f"work is not), prefix cached. Gains are over stock with its draft-extend captured. *Bytes*: how "
        f"many times the least time of a round it takes, that of reading weights, KV that is attended to and "
        f"scored by, and sketches at the {rates} GB/s at which a plain sum reads ([bound.py](bound.py))."
    )


def chains() -> list[dict]:
    """Of `measured`, those that draft a chain for an 8B, at contexts of one length."""
    found = [r for r in measured() if r.get("topk", 1) == 1 and of_an_8b(r)]
    return [r for r in found if Shape.of(r).shortest is None]


def gain_cell(found: list[dict], arm: str, shape: tuple[int, int], gpu: str) -> str:
    """Over captured stock, with the card that it was measured on where that is not `gpu`."""
    gained = gain(found, arm, shape, "stock-spec-captured")
    if not gained:
        return "–"
    own = newest(found, shape, arm, "stock-spec-captured")[0][0]["gpu"]
    return f"**{gained:.2f}x**" + ("" if own == gpu else f" ({card(own)})")


def front() -> str:
    """The README's few rows: captured stock and sts with an EAGLE-3 head, where one was measured, and what
    a dense draft, token scores and a STANDALONE draft bring."""
    heads, drafts = chains(), serving.drafted()
    if not heads:
        return serving.front()
    lines, shown = [], []
    for shape in serving.FRONT:
        own = newest(heads, shape, "stock-spec-captured", "sts-draft")
        shown += [r for of_arm in own for r in of_arm]
        speeds = [f"{statistics.median(r['tokens_per_s'] for r in some):,.0f}" for some in own if some]
        cells = [
            *(speeds or ["–", "–"]),
            *(gain_cell(heads, arm, shape, heads[0]["gpu"]) for arm in FRONT_ARMS),
        ]
        cells += [gain_cell(drafts, arm, shape, heads[0]["gpu"]) for arm in ("sts-draft", "sts")]
        if set(cells) != {"–"}:
            lines.append([f"{shape[0]:,} x {shape[1]}", *cells])
    note = (
        f"Tokens per second, and gains over stock: shapes of Llama-3.1-8B, with an EAGLE-3 head of one layer "
        f"or a 1B STANDALONE draft, chains of {shown[0].get('steps', 3)} steps ({gpus(heads)}, unless a cell "
        f"names another card), dummy weights, "
        f"simulated accept length {shown[0]['simulated']:g}, prefix cached. Stock is SGLang "
        f"{shown[0]['sglang']} with FA3 and its draft-extend in a CUDA graph (as shipped it has none); a "
        "gain is of a run that had both."
    )
    ends = [*null_result(heads, FRONT_ARMS), *null_result(drafts)]
    low, high = min(ends), max(ends)
    if low == low:
        note += f" **At 2,000 tokens sts brings next to nothing: {low:.2f}x to {high:.2f}x over all runs.**"
    dense, tokens = '`"draft": "dense"`', '`"selector": "tokens"`'
    head = ["context x requests", "EAGLE-3: stock", "sts", "gain", dense, tokens]
    return table([*head, "STANDALONE: gain", dense], lines) + "\n\n" + note
