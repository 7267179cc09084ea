"""Answers, text and conversations, from quality/ and multi_turn.jsonl."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

from benchmarks import tables
from benchmarks.quality.report import DENSE, Results, percent, points, signed, table
from benchmarks.tables import MISSING, commits, rows

QUALITY = {
    "sts": "sts",
    "sts-proportional": "sts without a calibrated map",
    "sts-warm": "sts, history `warm`",
    "sts-blend": "sts, history `blend`",
    "sts-draft": "sts, draft sparse too",
    "sts-draft-refresh-2": "that, scored in every other round",
    "sts-draft-refresh": "that, scored in every 4th round",
    "sts-draft-adaptive": "that, scored when fewer tokens are accepted",
    "sts-draft-every": "sts, every pass of the draft sparse",
    "sts-draft-blend": "sts, draft sparse too, history `blend`",
    "sts-full4": "sts, every 4th verify full",
    "oracle": "oracle",
    "quest": "Quest",
    "pages": "page mean + deviation",
    "recent": "sink + recent",
    "random": "chance",
    "tokens": "token scores",
    "tokens-split": "token scores, budget split by a map",
    "joined": "joined",
    "joined-75": "joined, three quarters to pages",
    "joined-prop": "joined, without a calibrated map",
    "map": "sts, calibrated map",
    "joined-map": "joined, calibrated map",
    "joined-map-u": "joined, calibrated map, the same budget for every head",
    "prefill": "sparse prefill, by the target's queries",
    "prefill-draft": "sparse prefill, by the draft's",
    "prefill-draft-sparse": "the same, the draft's own prefill as sparse",
    "prefill-verify": "sparse prefill by the target's queries, verify at 10 %",
}


@cache
def answers(folder: Path) -> Results | None:
    """What was asked and answered; intervals are worked out once, whoever shows them."""
    return Results(folder) if folder.exists() else None


def quality() -> str:
    """What each selector and budget changes against dense, by context: answers, and the loss of text."""
    return asked(["quality"], "the shipped pair")


def eagle3() -> str:
    """The same with the shipped EAGLE-3 head."""
    return asked(["quality_eagle3", "quality_eagle3_16k"], "the shipped target and EAGLE-3 head")


def tokens() -> str:
    """Token scores of the target's own queries beside the draft's choice, EAGLE-3, the shipped pair."""
    return asked(["quality_eagle3_tokens"], "the shipped target and EAGLE-3 head")


def alone() -> str:
    """Without a draft: the shipped target, by its packaged map."""
    named = {**QUALITY, "sts": "token scores, packaged map"}
    return asked(["quality_alone"], "the shipped target alone", named)


def pretrained_tokens() -> str:
    """Token scores on SmolLM2: alone, and with the drafts of `pretrained`."""
    parts = [asked(["quality_smollm2_alone"], "SmolLM2-135M-Instruct alone")]
    parts += [
        asked([f"quality_smollm2_{draft}_tokens"], f"SmolLM2-135M-Instruct with {name}")
        for draft, name in (DRAFTS[0], ("looking", "its STANDALONE draft (b)"), DRAFTS[1])
    ]
    return "\n\n".join(parts)


# What is passed on by default, by a model that drafts and by a head.
HALF, FURTHER = "`all`, `spread` 0.5 over 4", "`all`, `spread` 0.75 over 8"
OF_SMOLLM2 = {HALF: "map-all", FURTHER: "map-all-75-8"}
KEPT = {
    "`every`": "sts-draft-every",
    "`all`, `draft_refresh` 2, `spread` 0.75 over 8": "r2-75-8",
    "`all`, `draft_refresh` 4, `spread` 0.84 over 16": "r4-84-16",
    "`all`, `draft_refresh` adaptive, `spread` 0.958 over 64": "ad-958-64",
}
KEPT_BY_HEADS = {
    "`every`": "sts-draft-every",
    "`all`, `draft_refresh` 2, `spread` 0.9 over 16": "r2-90-16",
    "`all`, `draft_refresh` 4, `spread` 0.93 over 32": "r4-93-32",
    "`all`, `draft_refresh` adaptive, `spread` 0.965 over 64": "ad-965-64",
}
SPARSE_DRAFTS = {  # by folder: whose, the arm with a dense draft, and those with a sparse one
    "quality_sparse": ("shipped pair, STANDALONE", "sts", {HALF: "sts-draft"}),
    "quality_smollm2_plain_draft": ("SmolLM2, STANDALONE (a)", "map-dense", OF_SMOLLM2),
    "quality_eagle3_sparse": (
        "shipped target, EAGLE-3 head",
        "sts",
        {FURTHER: "all-75-8", HALF: "sts-draft", "`extend`": "sts-extend"},
    ),
    "quality_smollm2_eagle3_draft": ("SmolLM2, EAGLE-3 head (c)", "map-dense", OF_SMOLLM2),
    "quality_kept": ("shipped pair, on a CPU", "sts", KEPT),
    "quality_eagle3_kept": ("shipped target and head, on a CPU", "sts", KEPT_BY_HEADS),
}


def sparse_drafts() -> str:
    """What a sparse draft changes against a dense one, at the same keep of verify."""
    each = {name: found for name in SPARSE_DRAFTS if (found := answers(tables.RESULTS / name)) is not None}
    if not each:
        return MISSING
    asked = sorted({n for found in each.values() for n in found.lengths()})
    texts = sorted({n for found in each.values() for n in found.lengths(loss=True)})
    lines, notes = [], []
    for name, found in each.items():
        whose, dense, sparse = SPARSE_DRAFTS[name]
        for keep, (mode, arm) in itertools.product([k for k in found.keeps if k <= 0.25], sparse.items()):
            arms = (arm, keep), (dense, keep)
            cells = [signed(found.difference(*arms, n)) for n in asked]
            cells += [signed(found.loss_change(*arms, n), digits=2) for n in texts]
            cells.append(", ".join(accepted_share(found, arm, dense, keep, n) for n in found.lengths()))
            lines.append([whose, percent(keep), mode, *cells])
        first = found.headers[dense]
        run = f"{first['device']}, commit {commits(found.headers.values())}"
        notes.append(f"{whose}: {first['items']} items a task, {run}")
    head = [
        "drafts",
        "keep",
        "`draft`",
        *(f"answers, {n:,}" for n in asked),
        *(f"text, {n:,}" for n in texts),
        "tokens a round",
    ]
    note = (
        "Points of accuracy, mean over tasks, and percent of the loss, against the same keep with a dense "
        "draft, item by item; 95 % intervals, bold excludes 0 over 20 documents a task or more. Tokens a "
        f"round accepts, in answers, are in percent of the dense draft's, by length. {'; '.join(notes)}; "
        "calibrated maps."
    )
    return table(head, lines) + "\n\n" + note


def accepted_share(found: Results, arm: str, dense: str, keep: float, length: int) -> str:
    """In percent, what a round of `arm` accepts of what one of `dense` does."""
    own, beside = (found.accept_length(name, keep, length, found.tasks) for name in (arm, dense))
    return f"{100 * own / beside:.1f} %"


def prefill() -> str:
    """What a sparse prefill changes: the shipped pair, and SmolLM2 alone."""
    parts = [
        ("quality_prefill", "the shipped pair"),
        ("quality_prefill_16k", "the shipped pair, more items"),
        ("quality_smollm2_prefill", "SmolLM2-135M-Instruct alone"),
    ]
    return "\n\n".join(asked([folder], whose, over="prefill") for folder, whose in parts)


def pretrained() -> str:
    """The same of SmolLM2 with a STANDALONE draft, and then with an EAGLE-3 head, asked for text alone."""
    parts = [
        asked([f"quality_smollm2_{draft}"], f"SmolLM2-135M-Instruct with {name}") for draft, name in DRAFTS
    ]
    return "\n\n".join(parts)


DRAFTS = (("plain", "its STANDALONE draft (a)"), ("eagle3", "its EAGLE-3 head (c)"))


def asked(folders: list[str], whose: str, named: dict[str, str] = QUALITY, over: str = "verify") -> str:
    """Changes against dense in these folders of results, whose arms may differ. named: arms, in words.
    over: what is dense in what they are compared with."""
    each = [found for name in folders if (found := answers(tables.RESULTS / name)) is not None]
    if not each:
        return MISSING
    parts, losses = [], []
    keeps = sorted({keep for found in each for keep in found.keeps if keep <= 0.25})
    for found in each:
        for length in found.lengths():
            # Of an arm that was asked all tasks, where one was.
            order = sorted(found.arms, key=lambda arm: bool(found.part(arm, length)))
            scores = (found.mean(arm, DENSE, length) for arm in order)
            dense = points(next((score for score in scores if score is not None), None))
            head = [f"{length:,} tokens (dense: {dense})", *map(percent, keeps)]
            lines = changes(found, found.difference, length, keeps, digits=1)
            parts.append(
                table(head, [[named[arm] + found.part(arm, length), *cells] for arm, *cells in lines])
            )
        losses += [
            [f"{named[arm]}, {length:,}", *cells]
            for length in found.lengths(loss=True)
            for arm, *cells in changes(found, found.loss_change, length, keeps, digits=2)
        ]
    parts.append(table(["loss of text, tokens", *map(percent, keeps)], losses))
    heads = [next(iter(found.headers.values())) for found in each]
    commits = ", ".join(sorted({h["commit"] for found in each for h in found.headers.values()}))
    items = " and ".join(dict.fromkeys(str(h["items"]) for h in heads))
    parts.append(
        f"Points of accuracy, mean over tasks, and percent of the loss, against the same server's dense "
        f"{over}, 95 % intervals; bold excludes 0 over 20 documents a task or more. {heads[0]['device']}, "
        f"{items} items a task, commit {commits}, {whose}."
    )
    return "\n\n".join(parts)


def changes(
    found: Results, change: Callable, length: int, keeps: list[float], digits: int
) -> list[list[str]]:
    """[arm, a cell a keep] against dense, of the arms that are shown and were asked."""
    over = {arm: [change((arm, k), (arm, DENSE), length) for k in keeps] for arm in QUALITY}
    return [[arm, *(signed(f, digits=digits) for f in own)] for arm, own in over.items() if any(own)]


def multi_turn() -> str:
    """Answers, speculation and speed of agents by turn."""
    found = rows("multi_turn.jsonl")
    if not found:
        return MISSING
    turns = sorted({r["turn"] for r in found})
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in found):
        mine = [r for r in found if r["arm"] == arm]
        right = [sum(r["right"] for r in mine if r["turn"] == turn) for turn in turns]
        asked = [sum(r["agents"] for r in mine if r["turn"] == turn) for turn in turns]
        rate = [f"{100 * n / of:.1f}" for n, of in zip(right, asked, strict=True)]
        later = [r for r in mine if r["turn"] > 1]
        speculated = [r["accept_length"] for r in later if "accept_length" in r]
        speed = [statistics.median(r[key] for r in later) for key in ("ttft_s", "tpot_s", "tokens_per_s")]
        accept = f"{statistics.mean(speculated):.3f}" if speculated else "–"
        ttft, tpot, rate_s = speed
        lines.append(
            [f"`{arm}`", *rate, accept, f"{1000 * ttft:.0f}", f"{1000 * tpot:.1f}", f"{rate_s:,.0f}"]
        )
    first = found[0]
    tokens = [round(statistics.median(r["prompt_tokens"] for r in found if r["turn"] == t)) for t in turns]
    head = ["server", *(f"turn {t}, {n:,} tokens" for t, n in zip(turns, tokens, strict=True))]
    note = (
        f"Right answers of {first['agents']} agents by turn, percent; accept length, time to the first token "
        f"and per token (ms) and tokens/s of turns 2 to {turns[-1]}, medians over turns. {first['device']}, "
        f"commit {first['commit']}, the shipped pair, keep 10 %."
    )
    return table([*head, "accept length", "TTFT", "TPOT", "tokens/s"], lines) + "\n\n" + note
