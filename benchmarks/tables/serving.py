"""Tokens per second of servers, from serving.jsonl."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from benchmarks.quality.report import table
from benchmarks.shapes import Shape
from benchmarks.tables import MISSING, card, commits, gpus, rows, shapes_of, spread
from sts_sglang.evaluate.pair import NONE

ARMS = {
    "stock": "stock FA3, no speculation",
    "stock-spec": "stock FA3 + STANDALONE",
    "stock-spec-captured": "the same, draft-extend captured",
    "sts-dense": "sts, verify dense",
    "sts-draft": "sts, `keep` 0.1",
    "sts": "sts, dense draft",
}
MORE = {  # shown where any was measured
    "sts-draft-refresh-2": "sts, draft sparse and scored in every other round",
    "sts-draft-refresh": "sts, draft sparse and scored in every 4th round",
    "sts-draft-every": "sts, draft sparse in every pass",
}
# Contexts and requests of the README.
FRONT = ((128_000, 1), (32_000, 24), (32_000, 8), (8_000, 8), (2_000, 8), (2_000, 1))


def columns(arms: dict[str, str], found: list[dict]) -> dict[str, str]:
    """Arms by name, those of `MORE` at the end."""
    there = {r["arm"] for r in found}
    return arms | {arm: name for arm, name in MORE.items() if arm in there}


def measured() -> list[dict]:
    """Contexts of one length, with KV in the model's dtype."""
    found = rows("serving.jsonl")
    return [r for r in found if r.get("kv", "auto") == "auto" and Shape.of(r).shortest is None]


def drafted() -> list[dict]:
    """What was measured of targets with a STANDALONE draft that drafts a chain, on one GPU."""
    found = [r for r in measured() if r.get("algorithm", "STANDALONE") == "STANDALONE"]
    return [r for r in found if r.get("tp", 1) == 1 and r.get("topk", 1) == 1 and of_an_8b(r)]


def of_an_8b(row: dict) -> bool:
    """Whether a row is of the shape that all were of before rows said which."""
    return row.get("target") is None or row["target"]["layers"] == 32


SELECTS = {"sts-tokens": "tokens", "sts-pages": "pages"}


def alone() -> str:
    """Tokens per second without a draft, of the newest run of a shape and keep that has stock and an arm of
    sts."""
    found = [r for r in measured() if r.get("algorithm") == NONE]
    lines, shown = [], []
    for tp in sorted({r["tp"] for r in found}):
        of_tp = [r for r in found if r["tp"] == tp]
        keeps = sorted({keep_of(r) for r in of_tp if r["arm"] in SELECTS})
        for shape, arm, keep in itertools.product(sorted(shapes_of(of_tp), reverse=True), SELECTS, keeps):
            comparable = [r for r in of_tp if r["arm"] == "stock" or keep_of(r) == keep]
            own = newest(comparable, shape, "stock", arm)
            if not all(own):
                continue
            stock, sts = ([r["tokens_per_s"] for r in of_arm] for of_arm in own)
            kept = max(r["keep_ratio"] for r in own[1])
            gained = f"{statistics.median(sts) / statistics.median(stock):.2f}x"
            cells = [f"{shape[0]:,} x {shape[1]}", tp, SELECTS[arm], spread(stock), spread(sts)]
            cells.append(f"{100 * kept:.1f} %")
            lines.append([*cells, gained])
            shown += [r for of_arm in own for r in of_arm]
    if not lines:
        return MISSING
    first = shown[0]
    note = (
        f"Tokens per second, median ± half the spread. {first['gpu']}, SGLang {first['sglang']}, commit "
        f"{commits(shown)}; shape of Llama-3.1-8B, dummy weights (the output is meaningless, the work is "
        f"not), prefix cached. Kept is what decode attends to."
    )
    head = ["context x requests", "GPUs", "selects by", "stock FA3", "sts", "kept", "gain"]
    return table(head, lines) + "\n\n" + note


def keep_of(row: dict) -> float:
    """What a row's server was asked to keep; before rows said it, a tenth."""
    return row.get("keep", 0.1)


def serving() -> str:
    """Tokens per second by arm; the gain of sts over stock with the same draft."""
    found = drafted()
    if not found:
        return MISSING
    lines, arms = [], columns(ARMS, found)
    for shape, gpu in dict.fromkeys((Shape.of(r), r["gpu"]) for r in found):
        key, of_gpu = (shape.context, shape.requests), [r for r in found if r["gpu"] == gpu]
        own = [speeds(of_gpu, key, arm)[0] for arm in arms]
        cells = [spread(s) if s else "–" for s in own]
        sparse = [r for r in of_gpu if r["arm"] in ("sts-draft", "sts") and Shape.of(r) == shape]
        kept = {r["keep_ratio"] for r in sparse}
        cells += [f"{100 * max(kept):.0f} %" if kept else "–"]
        cells += [gains(of_gpu, arm, key) for arm in ("sts-draft", "sts")]
        lines.append([shape.shown(), card(gpu), *cells])
    first = found[0]
    note = (
        f"Tokens per second, median ± half the spread. {gpus(found)}, SGLang {first['sglang']}, commit "
        f"{commits(found)}; shapes of Llama-3.1-8B and 3.2-1B, dummy weights, simulated accept length "
        f"{first['simulated']:g} (the output is meaningless, the work is not), prefix cached. Kept is what "
        f"verify attends to, never less than `budget`, 1,024 tokens. Gains are over stock FA3 + STANDALONE, "
        f"in brackets over the same with its draft-extend captured."
    )
    for arm, name in (("sts-draft", "sts"), ("sts", "sts with a dense draft")):
        costs = {s: g for s in shapes_of(found) if (g := gain(found, f"{arm}-blend", s, arm))}
        if costs:
            shown = ", ".join(f"{g:.3f}x at {n:,} x {r}" for (n, r), g in costs.items())
            note += f" History in every verify (`blend`) makes {name} {shown}."
    return (
        table(["context x requests", "GPU", *arms.values(), "kept", "gain", "gain, dense draft"], lines)
        + "\n\n"
        + note
    )


def front() -> str:
    """The README's few rows of `serving`: where sts gains, and where it does not."""
    found = drafted()
    if not found:
        return MISSING
    lines = []
    for shape in (s for s in FRONT if s in shapes_of(found)):
        own = {
            arm: speeds(found, shape, arm)[0]
            for arm in ("stock-spec", "stock-spec-captured", "sts-draft", "sts")
        }
        stock, captured, sparse, dense = (f"{statistics.median(s):,.0f}" if s else "–" for s in own.values())
        gained = [gain(found, arm, shape, "stock-spec-captured") for arm in ("sts-draft", "sts")]
        first, second = (f"**{g:.2f}x**" if g else "–" for g in gained)
        lines.append([f"{shape[0]:,} x {shape[1]}", stock, captured, sparse, first, dense, second])
    head = ["context x requests", "stock", "stock, draft-extend captured", "sts", "gain"]
    low, high = null_result(found)
    note = (
        f"Tokens per second on one {found[0]['gpu']}: shapes of Llama-3.1-8B with a 1B STANDALONE draft, "
        f"dummy weights, simulated accept length {found[0]['simulated']:g}, prefix cached, stock being "
        f"SGLang {found[0]['sglang']} with FA3. Gains are over the second column, a stock that also records "
        f"its draft-extend in a CUDA graph (as shipped it does not), in runs that had both. **At 2,000 "
        f"tokens sts brings nothing: {low:.2f}x to {high:.2f}x over all runs.**"
    )
    return table([*head, 'sts, `"draft": "dense"`', "gain"], lines) + "\n\n" + note


def speeds(found: list[dict], shape: tuple[int, int], *arms: str) -> list[list[float]]:
    """Tokens per second of each arm, as `newest` finds them."""
    return [[r["tokens_per_s"] for r in own] for own in newest(found, shape, *arms)]


def newest(found: list[dict], shape: tuple[int, int], *arms: str) -> list[list[dict]]:
    """Rows of each arm, of the newest run (commit) that has all of them; else empty lists."""
    for run in reversed(dict.fromkeys(r["commit"] for r in found)):
        mine = [r for r in found if (r["commit"], r["context"], r["requests"]) == (run, *shape)]
        own = [[r for r in mine if r["arm"] == arm] for arm in arms]
        if all(own):
            return own
    return [[] for _ in arms]


def gain(found: list[dict], arm: str, shape: tuple[int, int], over: str) -> float | None:
    """Over another arm of the same run; None where no run has both."""
    own, stock = speeds(found, shape, arm, over)
    return statistics.median(own) / statistics.median(stock) if own and stock else None


def gains(found: list[dict], arm: str, shape: tuple[int, int]) -> str:
    """Over stock as it is, and over stock with its draft-extend captured."""
    stock, captured = (gain(found, arm, shape, over) for over in ("stock-spec", "stock-spec-captured"))
    return (f"{stock:.2f}x" if stock else "–") + (f" ({captured:.2f}x)" if captured else "")


def null_result(found: list[dict], arms: Sequence[str] = ("sts", "sts-draft")) -> tuple[float, float]:
    """Least and most that these gained in any run at contexts so short that `keep` leaves most of them."""
    gained = []
    for run in dict.fromkeys(r["commit"] for r in found):
        mine = [r for r in found if r["commit"] == run]
        for shape in (s for s in shapes_of(mine) if s[0] <= 2000):
            gained += [gain(mine, arm, shape, "stock-spec-captured") for arm in arms]
    gained = [g for g in gained if g]
    return (min(gained), max(gained)) if gained else (float("nan"), float("nan"))
