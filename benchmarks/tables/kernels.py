"""Microseconds of kernels, from the files of their ops, and of a round, from profile.jsonl."""

from __future__ import annotations

import json
import shlex
import statistics

from benchmarks.quality.report import table
from benchmarks.shapes import Shape
from benchmarks.tables import MISSING, card, commits, gpus, rows, timings
from sts_sglang.evaluate.pair import NONE

OPS = {
    "FA3": ("draft_attention", "fa3-dense", 0),
    "sts, no importance": ("draft_attention", "triton", 0),
    "first step": ("draft_attention", "triton+importance", 0),
    "later step": ("draft_attention", "triton+importance", 1),
    "selection": ("select", "triton", None),
    "sizes": ("select", "sizes", None),
    "spread": ("select", "spread", None),
    "history": ("remember", "warm", None),
    "half shared": ("remember", "warm-shared", None),
    "history, mixed in": ("remember", "blend", None),
    "mixed, half shared": ("remember", "blend-shared", None),
}
PARTED = ("_count_kernel", "_refine_kernel", "_list_kernel")  # rows of scores in parts
CLASSES = {
    "attention of the draft, and FA3": (
        "_draft_kernel",
        "_draft_merge_kernel",
        "cutlass::device_kernel",
        "flash::",
    ),
    "matrix products": ("nvjet", "cublas"),
    "verify, and sparse steps of the draft": ("_verify_kernel", "_verify_merge_kernel", "_plan_kernel"),
    "pooling of importance": ("_pool_kernel",),
    "selection, sizes and spread": ("_select_kernel", *PARTED, "_sizes_kernel", "_spread_kernel"),
    "history": ("_remember_kernel", "_claim_kernel"),
}
HEADS = {  # provider and op
    "verify, heads of": ("triton", "verify"),
    "a draft step, heads of": ("triton+importance", "draft_attention"),
}
OTHERS = "norms, rotations and other small kernels"
# Of profile_round, which goes by the files of kernels.
STEP_PARTS = {
    "page_scores": "page scores, and pooling of any",
    "pages": "sketches and lists of pages",
    "tokens": "sketches, scores and lists of tokens",
    "select": "selection",
    "rest": "all else",
}


def verify() -> str:
    """Microseconds of one layer's verify attention by provider, the README's shapes, and the whole grid."""
    found = timings("verify")
    newest = {
        (r["provider"], *(r[k] for k in ("dim", "rows", "group", "context", "batch")), r.get("keep")): r
        for r in found
    }
    shapes = sorted({key[1:6] for key in newest if key[0] == "triton"}, reverse=True)
    lines = [verify_line(newest, shape) for shape in shapes if shape[:3] == (128, 4, 4)]
    if not lines:
        return MISSING
    head = ["context x requests", "sts (Triton)", "FlashInfer head-wise", "FA3 dense", "FlashInfer dense"]
    head += ["over FA3 dense", "at 5 %", "at 25 %", "of copy rate"]
    last = found[-1]
    note = (
        f"Microseconds of one layer (4 query tokens, 32 query and 8 KV heads of 128, keep 10 %, bf16). "
        f"{last['gpu']}, commit {commits(newest.values())}; the last "
        f"column is the selected KV over the measured copy rate ({last['copy_gbps']:,} GB/s)."
    )
    return table(head, lines) + "\n\n" + note + verify_grid(newest)


def verify_line(newest: dict[tuple, dict], shape: tuple) -> list[str]:
    def us(provider: str, keep: float | None) -> float | None:
        return newest.get((provider, *shape, keep), {}).get("us")

    own = {keep: us("triton", keep) for keep in (0.05, 0.1, 0.25)}
    dense = us("fa3-dense", None)
    shown = [own[0.1], us("fi-headwise", 0.1), dense, us("fi-dense", None)]
    gains = [f"{dense / own[k]:.1f}x" if dense and own[k] else "–" for k in (0.1, 0.05, 0.25)]
    rate = newest.get(("triton", *shape, 0.1), {}).get("of_copy_rate")
    cells = [f"{x:.0f}" if x else "–" for x in shown]
    return [f"{shape[3]:,} x {shape[4]}", *cells, *gains, f"{100 * rate:.0f} %" if rate else "–"]


def verify_grid(newest: dict[tuple, dict]) -> str:
    """How sts compares over all shapes that were measured."""
    over: dict[str, list[tuple[float, tuple]]] = {"fa3-dense": [], "fi-headwise": []}
    for (provider, *shape, keep), row in newest.items():
        for rival in over if provider == "triton" else ():
            if other := newest.get((rival, *shape, None if "dense" in rival else keep)):
                over[rival].append((other["us"] / row["us"], tuple(shape)))
    dense, headwise = (sorted(found) for found in over.values())
    if not dense or not headwise:
        return ""
    slower = [shape for gain, shape in headwise if gain < 1]
    where = ", ".join(f"{c:,} x {b}" for c, b in sorted({shape[3:] for shape in slower}))
    return (
        f" Over the whole grid of {len(dense)} shapes (8K to 128K x 1 to 16, 1 to 8 query tokens, GQA 4 and "
        f"8, heads of 64 and 128, keep 5 to 25 %) sts is {dense[0][0]:.1f}x to {dense[-1][0]:.1f}x FA3 dense "
        f"and {headwise[0][0]:.2f}x to {headwise[-1][0]:.2f}x FlashInfer head-wise, slower than it in "
        f"{len(slower)} shapes ({where})."
    )


ON_H200 = {  # providers of one shape, and what keys are stored as
    "sts": ("triton", None),
    "lists of unequal length": ("triton-split", None),
    "FlashInfer head-wise": ("fi-headwise", None),
    "FA3 dense": ("fa3-dense", None),
    "sts, FP8": ("triton", "float8_e4m3fn"),
    "FlashInfer head-wise, FP8": ("fi-headwise", "float8_e4m3fn"),
}


def verify_h200() -> str:
    """The same on an H200, of batches and of KV in FP8."""
    found = rows("verify_h200.jsonl")
    if not found:
        return MISSING
    us = {(r["context"], r["batch"], r["provider"], r.get("stored")): r for r in found}
    shapes = sorted({key[:2] for key in us}, reverse=True)
    lines = []
    for shape in shapes:
        own = [us.get((*shape, *how)) for how in ON_H200.values()]
        cells = [f"{r['us']:.0f}" if r else "–" for r in own]
        lines.append([f"{shape[0]:,} x {shape[1]}", *cells, f"{own[0]['gbps']:,}"])
    note = (
        f"Microseconds of one layer, as above. {gpus(found)}, commit {commits(found)}. *Lists of unequal "
        f"length*: as many tokens in lists of 0.3 to 3 times their mean, as a calibrated map splits a "
        f"budget. The last column is what the first reads."
    )
    return table(["context x requests", *ON_H200, "GB/s"], lines) + "\n\n" + note


DRAFT_ON_H200 = {  # providers of a shape
    "sts, silent": "triton",
    "sts, with importance": "triton+importance",
    "importance alone": "importance alone",
    "FA3 dense": "fa3-dense",
}


def draft_h200() -> str:
    """Microseconds of a draft layer's step at the shapes of the front tables, on an H200."""
    found = rows("draft_h200.jsonl")
    if not found:
        return MISSING
    us = {(r["dim"], r["context"], r["batch"], r["provider"]): r["us"] for r in found}
    lines = [
        [
            f"{context:,} x {batch}",
            dim,
            *(f"{us[dim, context, batch, p]:.0f}" for p in DRAFT_ON_H200.values()),
        ]
        for dim, context, batch in sorted({key[:3] for key in us})
    ]
    note = (
        f"Microseconds of one layer's first step of a round, 32 query and 8 KV heads. *Silent*: no head has "
        "importance to leave; *alone*: of rows that attend elsewhere, by keys without values. "
        f"{gpus(found)}, commit {commits(found)}."
    )
    return table(["context x requests", "heads of", *DRAFT_ON_H200], lines) + "\n\n" + note


def heads() -> str:
    """Microseconds of verify and of a draft step by query heads a KV head, and by head."""
    found = [*rows("verify_heads.jsonl"), *rows("draft_heads.jsonl")]
    if not found:
        return MISSING
    us = {(r["provider"], r["op"], r["dim"], r["group"]): r["us"] for r in found}
    dims, groups = (sorted({key[place] for key in us}) for place in (2, 3))
    lines = [
        [f"{name} {dim}", *(f"{us[*op, dim, group]:.0f}" for group in groups)]
        for name, op in HEADS.items()
        for dim in dims
    ]
    first = found[0]
    note = (
        f"Microseconds of one layer, {first['context']:,} x {first['batch']}, 8 KV heads; verify of "
        f"{first['rows']} tokens at a keep of 10 %, the first draft step of a round with its scores. "
        f"{first['gpu']}, commit {commits(found)}."
    )
    return table(["query heads a KV head", *map(str, groups)], lines) + "\n\n" + note


def round_ops() -> str:
    """Microseconds of what sts adds to a round: of a draft layer's step, and once a round."""
    newest = {}
    for name in dict.fromkeys(name for name, *_ in OPS.values()):
        for r in timings(name):
            of = r.get("dim", 64), r.get("group", 4), r.get("keep", 0.1), r.get("channels", 128)
            if of == (64, 4, 0.1, 128):
                newest[(name, r["provider"], r.get("step"), r["context"], r["batch"])] = r
    shapes = sorted({key[3:] for key in newest if key[0] == "select"})
    shown = {title: op for title, op in OPS.items() if any(key[:3] == op for key in newest)}
    lines = []
    for shape in shapes:
        found = [newest.get((*op, *shape), {}).get("us") for op in shown.values()]
        cells = ["–" if us is None else f"{max(us, 0):.0f}" for us in found]
        lines.append([f"{shape[0]:,} x {shape[1]}", *cells])
    if not lines:
        return MISSING
    note = (
        f"Microseconds. The first four columns: dense attention of one step of one draft layer (32 query and "
        f"8 KV heads of 64); the first step of a round scores the carried row too. The others: once a round, "
        f"128 channels, keep 10 %. {gpus(newest.values())}, commit {commits(newest.values())}."
    )
    return table(["context x requests", *shown], lines) + "\n\n" + note


def importance_cost() -> str:
    """What scoring costs the draft's attention, over all shapes that were measured with and without."""
    of = ("dim", "group", "context", "batch")
    newest = {(r["provider"], r.get("step"), *map(r.get, of)): r for r in timings("draft_attention")}
    over: dict[tuple[int, int], list[float]] = {}
    for (provider, step, *shape), row in newest.items():
        plain = newest.get(("triton", step, *shape)) or newest.get(("triton", 0, *shape))
        if provider == "triton+importance" and plain and shape[1]:
            over.setdefault((shape[1], step), []).append(row["us"] / plain["us"])
    if not over:
        return MISSING
    lines = []
    for (group, step), ratios in sorted(over.items()):
        shown = (min(ratios), statistics.median(ratios), max(ratios))
        met = f"{sum(ratio <= 1.15 for ratio in ratios)} of {len(ratios)}"
        lines.append([group, "later" if step else "first", *(f"{ratio:.2f}x" for ratio in shown), met])
    head = ["query heads a KV head", "step", "least", "median", "most", "shapes within 1.15x"]
    return table(head, lines)


def round_time() -> str:
    """Where the device spends a round, by kernels."""
    found = [r for r in rows("profile.jsonl") if r.get("algorithm") != NONE]
    if not found:
        return MISSING
    lines = []
    for r in found:
        spent = dict.fromkeys((*CLASSES, OTHERS), 0.0)
        for name, kernel in r["kernels"].items():
            own = (what for what, names in CLASSES.items() if name.startswith(names))
            spent[next(own, OTHERS)] += kernel["us"]
        cells = [f"{us / 1000:.2f}" for us in (*spent.values(), r["idle_us"])]
        cells.append(f"{r['late_us'] / 1000:.2f}" if "late_us" in r else "–")
        cells.append(f"{r['round_us'] / 1000:.2f}")
        drafts = {"EAGLE3": "EAGLE-3, "}.get(r.get("algorithm"), "")
        drafts += f"topk {r['topk']}, " if r.get("topk", 1) > 1 else ""
        named = f"`{r['arm']}`, {drafts}{Shape.of(r).shown()}, {card(r['gpu'])}, {r['commit']}"
        lines.append([named, *cells])
    note = (
        f"Milliseconds of one round, means over {found[0]['rounds']} rounds. Arms are those of "
        "[bench_serving.py](bench_serving.py): `sts` has a dense draft, `sts-draft` the default's."
    )
    head = ["server", *CLASSES, OTHERS, "idle device", "of it for a late host", "round"]
    return table(head, lines) + "\n\n" + note


def step_time() -> str:
    """Where the device spends a decode step without a draft, by the files of kernels."""
    found = [r for r in rows("profile.jsonl") if r.get("algorithm") == NONE]
    if not found:
        return MISSING
    lines = []
    for r in found:
        times = (*(r["parts"][part] for part in STEP_PARTS), r["idle_us"], r["round_us"])
        cells = [*(f"{us / 1000:.2f}" for us in times), f"{100 * r['select_share']:.1f} %"]
        lines.append([f"`{r['arm']}`, {r['context']:,} x {r['requests']}", r["tp"], *cells])
    note = (
        f"Milliseconds of one step, means over {found[0]['rounds']} steps. {found[0]['gpu']}, commit "
        f"{commits(found)}. The last column is what the first four are of a step."
    )
    head = ["server", "GPUs", *STEP_PARTS.values(), "idle device", "step", "scores and selects"]
    return table(head, lines) + "\n\n" + note


def tokens() -> str:
    """Microseconds of a layer of token scores: by shape and query tokens."""
    found = rows("tokens.jsonl")
    if not found:
        return MISSING
    providers = ("score", "list", "layer", "sketch", "chunk")
    by_shape: dict[tuple[int, int, int], dict[str, dict]] = {}
    for row in found:
        by_shape.setdefault((row["context"], row["batch"], row["rows"]), {})[row["provider"]] = row
    lines = [
        [
            f"{context:,} x {batch}, {rows_}",
            *(f"{own[name]['us']:.0f}" if name in own else "–" for name in providers),
            f"{100 * own['score']['of_copy_rate']:.0f} %",
        ]
        for (context, batch, rows_), own in by_shape.items()
    ]
    first = found[0]
    note = (
        f"8 KV heads of 128 dimensions, groups of 4, keep 10 %; {first['gpu']}, {first['commit']}. `score` "
        "and `list` (together: `layer`) run in every layer of a step or verify, `sketch` writes what a step "
        "adds, `chunk` 8,192 tokens of a prefill. The last column: what `score` must read and write over the "
        f"measured copy rate ({first['copy_gbps']:,} GB/s)."
    )
    head = ["context x requests, query tokens", *providers, "score, of copy rate"]
    return table(head, lines) + "\n\n" + note


def prefill() -> str:
    """Milliseconds of a layer of a chunk of sparse prefill, and of FA3 over everything."""
    found = rows("prefill.jsonl")
    if not found:
        return MISSING
    newest = {(row["cached"], row["new"], row["provider"]): row for row in found}
    by_shape: dict[tuple[int, int], dict[str, float]] = {}
    for (*shape, provider), row in newest.items():
        by_shape.setdefault(tuple(shape), {})[provider] = row["us"] / 1000
    providers = ("fa3-dense", "score", "list", "attend", "layer", "fa3-lists", "fa3-layer")
    lines = []
    for (cached, new), own in by_shape.items():
        gains = (f"{own['fa3-dense'] / own[name]:.2f}x" for name in ("layer", "fa3-layer"))
        lines.append([f"{new:,} behind {cached:,}", *(f"{own[name]:.2f}" for name in providers), *gains])
    first = found[0]
    note = (
        f"Milliseconds; 8 KV heads of 128 dimensions, groups of 4, {100 * first['keep']:g} % of the blocks; "
        f"{first['gpu']}, commit {commits(newest.values())}. `layer` is `score`, `list` and `attend`; "
        "`fa3-layer` has FA3 over the lists in place of `attend`."
    )
    head = ["new tokens", *providers, "layer, gain", "with FA3, gain"]
    return table(head, lines) + "\n\n" + note


def first_token() -> str:
    """Seconds of a server to the first token of a prompt, dense and sparse, by what drafts."""
    seconds: dict[tuple, dict[str, float]] = {}
    found = rows("first_token.jsonl")
    for row in found:
        key = (row["algorithm"], _prefills_by(row), row["context"], row["new"])
        seconds.setdefault(key, {})[row["kind"]] = statistics.median(row["seconds"])
    if not found:
        return MISSING
    lines = []
    for (algorithm, by, context, new), own in seconds.items():
        prompt = f"{context:,}" if new == context else f"{new:,} behind {context - new:,} cached"
        for kind in (kind for kind in own if kind != "dense"):
            share = f"{100 * float(kind.removeprefix('sparse ')):g} %"
            gained = f"**{own['dense'] / own[kind]:.2f}x**"
            lines.append([algorithm, by, prompt, share, f"{own['dense']:.2f}", f"{own[kind]:.2f}", gained])
    note = (
        f"Seconds to the first token, one request at a time, medians of {len(found[0]['seconds'])}. "
        f"{gpus(found)}, SGLang {found[0]['sglang']}, commit {commits(found)}; shapes of Llama-3.1-8B and of "
        f"a 1B draft or an EAGLE-3 head of one layer, dummy weights. Dense is FA3 in the same server, as in "
        f"stock."
    )
    head = ["draft", "selects", "new tokens", "blocks", "dense, s", "sparse, s", "gain"]
    return table(head, lines) + "\n\n" + note


def _prefills_by(row: dict) -> str:
    """Whose queries select, as the server of a row was told."""
    words = shlex.split(row["server"])
    config = json.loads(words[words.index("--sts-config") + 1])
    if config.get("prefill_by") != "draft":
        return "the target"
    return "the draft, sparse too" if config.get("prefill_draft") == "sparse" else "the draft"


def pages() -> str:
    """Microseconds of a layer (`score`, `list`, `join`) or a step (`tag`, `sizes`) of page scores."""
    found = rows("pages.jsonl")
    if not found:
        return MISSING
    providers = ("score", "list", "join", "sketch", "tag", "sizes")
    by_shape: dict[tuple[int, int], dict[str, dict]] = {}
    for row in found:
        by_shape.setdefault((row["context"], row["batch"]), {})[row["provider"]] = row
    lines = [
        [f"{context:,} x {batch}", *(f"{own[name]['us']:.0f}" if name in own else "–" for name in providers)]
        for (context, batch), own in by_shape.items()
    ]
    first = found[0]
    note = (
        f"8 KV heads of 128 dimensions, one query token, keep 10 %; {first['gpu']}, {first['commit']}. "
        "`score`, `list` (or `join` where the draft has scored too, before it selects) and `sketch` run in "
        "every layer, `tag` and `sizes` once a step."
    )
    return table(["context x requests", *providers], lines) + "\n\n" + note
