"""From recorded windows to a map: score every candidate, join those that help, see who gains by recency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sts_sglang.calibrate.record import VERIFY_ROWS, Record, Table
from sts_sglang.config import CEIL_GUARD, StsConfig
from sts_sglang.headmap import POOLS, HeadCounts, HeadMap, Source

SHORTLIST = 16  # candidates tried as members of a target head's sources
# Parts of the context that a head may be given when the budget is split, in budgets.
PARTS = (0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
LEAST_GAIN = 0.001  # recall that a further member must add: each costs the draft's scoring kernel time


@dataclass(frozen=True)
class Scores:
    """float32 [target layers * KV heads, candidates], means over all windows."""

    recall: torch.Tensor
    jaccard: torch.Tensor


@dataclass(frozen=True)
class Calibrated:
    """A map, and the recall it has on the windows it was found on: float32 [target layers, KV heads]."""

    head_map: HeadMap
    recall: torch.Tensor
    singles: Scores


class Window:
    """One window's positions outside sink and recent, and how many of them the budget selects.

    table: of what its tokens are worth, `Record.mass` or `Record.change`. whole: float32 [rows], what the
    tokens of a window are worth together, in the mean of all windows; None: in each by itself, so that every
    window counts the same.
    """

    def __init__(
        self,
        record: Record,
        i: int,
        config: StsConfig,
        table: Table | None = None,
        whole: torch.Tensor | None = None,
    ):
        t = record.windows[i]
        self.record, self.i, self.domain = record, i, record.domain
        self.table, self.whole = record.mass if table is None else table, whole
        self.span = slice(config.sink, t - config.recent)
        self.count = config.budget_for(t) - config.sink - config.recent
        self.positions = t - config.recent - config.sink

    def worth(self, rows: Sequence[int]) -> torch.Tensor:
        """[rows, positions] of the target's tokens."""
        return self.table.read(self.i, rows)[:, self.span]

    def shares(self, rows: Sequence[int]) -> torch.Tensor:
        """The same as parts of all."""
        worth = self.worth(rows)
        whole = worth.sum(1, keepdim=True) if self.whole is None else self.whole[list(rows), None]
        return worth / whole.clamp(min=1e-30)

    def scores(self, pool: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """[rows, positions] of the draft's, None for every draft head."""
        return self.record.scores[pool].read(self.i, rows)[:, self.span]

    def top(self, values: torch.Tensor) -> torch.Tensor:
        """Indices [..., count] of the highest `values` [..., positions]."""
        return values.topk(self.count, -1, sorted=False).indices

    def recall(self, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Sum [...] of `shares` [..., positions] on the `chosen` [..., count]."""
        return shares.gather(-1, chosen).sum(-1)

    def latest(self, shares: torch.Tensor) -> torch.Tensor:
        """Sum [...] of `shares` on the last positions, as many as the budget selects."""
        return shares[..., -self.count :].sum(-1)


def working_bytes(target: HeadCounts, draft: HeadCounts, tokens: int, windows: int, head_dim: int) -> int:
    """Most bytes that recording and searching take, beside the models and their activations.

    `windows` of all texts of a part together, none longer than `tokens`. Independent of the target's layers.
    """
    # One window of one layer: logits, mask, probabilities and a temporary; the keys in float32. Then one
    # head's values, twice, and what is worked out of them by row.
    recording = 4 * tokens * (4 * VERIFY_ROWS * max(target.q_heads, draft.q_heads))
    recording += 2 * 4 * tokens * max(target.kv_heads, draft.kv_heads) * head_dim
    recording += 4 * tokens * (2 * head_dim + target.kv_heads)
    # One window of the draft: values, mask, the top's values and indices; of one target layer as many.
    scoring = 4 * tokens * 4 * (draft.layers * draft.q_heads + target.kv_heads)
    # All windows of one target layer, the shortlist of one of its heads, and what joins it.
    joining = 4 * tokens * windows * (target.kv_heads + SHORTLIST + 1) + 4 * tokens * 4 * SHORTLIST
    # Their sum, for the allocator keeps what one has freed from the next.
    return recording + scoring + joining


def windows_of(records: Sequence[Record], config: StsConfig, measure: str = "mass") -> list[Window]:
    """All windows of all texts, whose tokens are worth their mass, or by measure "output" what leaving them
    out changes. There a window in which nothing much would change says little, and counts little."""
    tables = [record.mass if measure == "mass" else record.change for record in records]
    windows = [
        Window(record, i, config, table)
        for record, table in zip(records, tables, strict=True)
        for i in range(len(record.windows))
    ]
    if measure == "output":
        rows = range(tables[0].rows)
        whole = torch.stack([window.worth(rows).sum(1) for window in windows]).mean(0)
        for window in windows:
            window.whole = whole
    return windows


def score(windows: list[Window], target: HeadCounts, pool: str = "max") -> Scores:
    """Every candidate draft head for every target (layer, KV head).

    Recall is what the tokens outside sink and recent that the candidate selects are worth; Jaccard (the
    paper's criterion) compares its selection with the target's own top of the same size.
    """
    total: torch.Tensor | float = 0.0
    for window in windows:
        values = window.scores(pool)
        speaks = _mask(window.top(values), window.positions)
        del values
        layers = []
        for layer in range(target.layers):
            shares = window.shares(_rows(layer, target))
            recall = shares @ speaks.T
            common = _mask(window.top(shares), window.positions) @ speaks.T
            layers.append(torch.stack([recall, common / (2 * window.count - common)]))
        total = total + torch.cat(layers, 1)
    recall, jaccard = total / len(windows)
    return Scores(recall, jaccard)


def best_map(
    windows: list[Window],
    target: HeadCounts,
    draft: HeadCounts,
    band: int | None = None,
    heads: int = 6,
    pools: Sequence[str] = POOLS,
    tp: int = 1,
) -> Calibrated:
    """The map whose pool has the highest recall on these windows."""
    found = [
        search(windows, score(windows, target, pool), target, draft, band, heads, pool, tp) for pool in pools
    ]
    return max(found, key=lambda f: float(f.recall.mean()))


def search(
    windows: list[Window],
    scores: Scores,
    target: HeadCounts,
    draft: HeadCounts,
    band: int | None,
    heads: int,
    pool: str = "max",
    tp: int = 1,
) -> Calibrated:
    """For each target head, what greedy forward selection over the best candidates gives, at most `heads`.

    Under the mean a head may be taken again, to weigh more. A head that the latest tokens serve better, in
    every domain, gets no sources: where they are better on average only, what they lose is what is far away.

    `band`: how far a draft layer may lie from the proportional one, None for all layers. `tp`: ranks of the
    launch; a head can listen to the draft heads of its own rank. One that several ranks have gets some of
    each, and is judged by all of them, although each rank selects by its own.
    """
    rank_of = torch.arange(draft.layers * draft.q_heads) % draft.q_heads // (draft.q_heads // tp)
    sources: list[list[tuple[Source, ...]]] = []
    recall = torch.zeros(target.layers, target.kv_heads)
    spared: list[tuple[float, int, int, tuple[Source, ...]]] = []
    for layer in range(target.layers):
        near = layer * draft.layers // target.layers
        allowed = torch.tensor(
            [band is None or abs(d - near) <= band for d in range(draft.layers) for _ in range(draft.q_heads)]
        )
        shares = [window.shares(_rows(layer, target)) for window in windows]
        sources.append([])
        for h in range(target.kv_heads):
            row, ranks = scores.recall[layer * target.kv_heads + h], target.ranks_of(h, tp)
            most, found = max(1, heads // len(ranks)), []
            for rank in ranks:
                ranked = _shortlist(row, allowed & (rank_of == rank))
                found.append(_forward(windows, [s[h] for s in shares], ranked, most, pool))
            own = tuple(sorted(divmod(c, draft.q_heads) for picks, _ in found for c in picks))
            held = torch.stack([recalls for _, recalls in found]).mean(0)
            latest = torch.stack([window.latest(s[h]) for window, s in zip(windows, shares, strict=True)])
            if min(by_domain(windows, latest - held).values()) > LEAST_GAIN:
                spared.append((float((latest - held).mean()), layer, h, own))
                own, held = (), latest
            sources[layer].append(own)
            recall[layer, h] = held.mean()
    if not any(own for row in sources for own in row):  # a map without a draft head is none
        gain, layer, h, own = min(spared)
        sources[layer][h] = own
        recall[layer, h] -= gain
    head_map = HeadMap(tuple(map(tuple, sources)), "calibrated", pool)
    return Calibrated(head_map, recall, scores)


def _shortlist(recall: torch.Tensor, allowed: torch.Tensor) -> list[int]:
    """The best candidates of those allowed, in order of their numbers."""
    ranked = recall.masked_fill(~allowed, -1).argsort(descending=True, stable=True)
    return ranked[: min(SHORTLIST, int(allowed.sum()))].sort().values.tolist()


class Sample(Protocol):
    """A window or a text."""

    domain: str


def by_domain(windows: Sequence[Sample], values: torch.Tensor) -> dict[str, float]:
    """Means of `values` [windows] over each domain, of windows or of whole texts."""
    return {domain: float(mean) for domain, mean in _means(windows, values).items()}


def over_domains(windows: Sequence[Sample], values: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [windows, ..] over windows, where every domain counts the same."""
    return torch.stack([*_means(windows, values).values()]).mean(0)


def _means(windows: Sequence[Sample], values: torch.Tensor) -> dict[str, torch.Tensor]:
    domains = dict.fromkeys(window.domain for window in windows)
    return {
        domain: values[[i for i, window in enumerate(windows) if window.domain == domain]].mean(0)
        for domain in domains
    }


def _forward(
    windows: list[Window], worth: list[torch.Tensor], ranked: list[int], heads: int, pool: str
) -> tuple[list[int], torch.Tensor]:
    """Draft heads out of `ranked`, and the recall [windows] they have together."""
    candidates = [window.scores(pool, ranked) for window in windows]
    joined: list[torch.Tensor] = [torch.zeros(window.positions) for window in windows]
    chosen: list[int] = []
    best = torch.zeros(len(windows))
    open_ = torch.ones(len(ranked), dtype=torch.bool)
    while len(chosen) < heads and bool(open_.any()):
        shares = torch.stack(
            [
                window.recall(own.expand(len(ranked), -1), window.top(_join(pool, values, so_far)))
                for window, own, values, so_far in zip(windows, worth, candidates, joined, strict=True)
            ]
        )
        gains = (shares.mean(0) - best.mean()).masked_fill(~open_, -torch.inf)
        pick = int(gains.argmax())
        if chosen and float(gains[pick]) < LEAST_GAIN:
            break
        best = shares[:, pick]
        chosen.append(ranked[pick])
        joined = [_join(pool, v[pick], j) for v, j in zip(candidates, joined, strict=True)]
        open_[pick] = pool == "mean"
    return chosen, best


def _join(pool: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.maximum(a, b) if pool == "max" else a + b


def selected(head_map: HeadMap, window: Window, layer: int, draft: HeadCounts, pool: str) -> torch.Tensor:
    """Indices [KV heads, count] that each head of a target layer selects."""
    return ranked(head_map, window, layer, draft, pool)[:, : window.count]


def ranked(head_map: HeadMap, window: Window, layer: int, draft: HeadCounts, pool: str) -> torch.Tensor:
    """Indices [KV heads, positions] in the order in which each head of a target layer would select them."""
    rows = []
    for own in head_map.sources[layer]:
        if not own:
            rows.append(torch.arange(window.positions - 1, -1, -1))
            continue
        heads = [d * draft.q_heads + q for d, q in own]
        different = sorted(set(heads))
        values = window.scores(pool, different)[[different.index(c) for c in heads]]
        joined = values.amax(0) if pool == "max" else values.sum(0)
        rows.append(joined.argsort(descending=True))
    return torch.stack(rows)


def recall_of(
    head_map: HeadMap, windows: list[Window], target: HeadCounts, draft: HeadCounts
) -> torch.Tensor:
    """float32 [windows, target layers, KV heads] of a map's selections; a map without a pool: "max"."""
    pool = head_map.pool or "max"
    return _by_layer(
        windows,
        target,
        lambda window, layer, rows: window.recall(
            window.shares(rows), selected(head_map, window, layer, draft, pool)
        ),
    )


def parts_of(keep: float) -> list[float]:
    """Parts of the context that a head may be given."""
    return sorted({min(1.0, keep * part) for part in PARTS})


def split_budget(
    head_map: HeadMap,
    windows: list[Window],
    target: HeadCounts,
    draft: HeadCounts,
    keep: float,
    lost: torch.Tensor | None = None,
) -> HeadMap:
    """The map with shares: what each target head gets of the budget, so that least is lost.

    A head whose attention outside sink and recent is little, or gathered in few tokens that its sources
    find, gives up what serves it least to one that loses much. Every domain counts the same.

    Args:
        lost: [layers, KV heads, parts] at each of `parts_of`; None: what the tokens are worth that a list of
            that part misses.
    """
    parts = parts_of(keep)
    lost = _lost(head_map, windows, target, draft, parts) if lost is None else lost
    return replace(head_map, shares=split_shares(lost, parts, keep))


def split_shares(lost: torch.Tensor, parts: list[float], keep: float) -> tuple[tuple[float, ...], ...]:
    """[layer][KV head] of a budget of `keep` so that least is lost, of what is lost, [layers, KV heads,
    parts], at each of these parts of the context."""
    layers, kv_heads, _ = lost.shape
    by_head = lost.tolist()
    level = [[0] * kv_heads for _ in range(layers)]
    left = (keep - parts[0]) * layers * kv_heads
    while (step := _best_step(by_head, level, parts, left)) is not None:
        t, h, further = step
        left -= parts[further] - parts[level[t][h]]
        level[t][h] = further
    return tuple(tuple(round(parts[i] / keep, 4) for i in row) for row in level)


def _best_step(lost: list, level: list[list[int]], parts: list[float], left: float):
    """(layer, head, further level) that saves most attention for what it costs, None if `left` buys none."""
    best, found = 0.0, None
    for t, row in enumerate(level):
        for h, now in enumerate(row):
            for further in range(now + 1, len(parts)):
                cost = parts[further] - parts[now]
                gain = (lost[t][h][now] - lost[t][h][further]) / cost
                if cost <= left + 1e-9 and gain > best:
                    best, found = gain, (t, h, further)
    return found


def kept_by_part(
    head_map: HeadMap, window: Window, layer: int, draft: HeadCounts, parts: torch.Tensor
) -> torch.Tensor:
    """bool [KV heads, ways, t]: sink, recent and what each head of a layer selects for a list of these parts
    of the context, float64 [KV heads, ways]."""
    context = window.record.windows[window.i]
    order = ranked(head_map, window, layer, draft, head_map.pool or "max")
    place = torch.empty_like(order).scatter_(1, order, torch.arange(window.positions).expand_as(order))
    wanted = torch.ceil(parts * context - CEIL_GUARD) - (context - window.positions)
    kept = torch.ones(*parts.shape, context, dtype=torch.bool)
    kept[..., window.span] = place[:, None] < wanted[..., None]
    return kept


def _lost(head_map, windows: list[Window], target: HeadCounts, draft: HeadCounts, parts) -> torch.Tensor:
    """[layers, KV heads, parts] of attention outside sink and recent that a list of that part misses."""
    pool = head_map.pool or "max"
    domains = list(dict.fromkeys(window.domain for window in windows))
    total = torch.zeros(len(domains), target.layers, target.kv_heads, len(parts))
    for window in windows:
        context = window.record.windows[window.i]
        wanted = [math.ceil(part * context - CEIL_GUARD) - (context - window.positions) for part in parts]
        counts = [min(window.positions, max(0, k)) for k in wanted]
        for layer in range(target.layers):
            worth = window.worth(_rows(layer, target))
            order = ranked(head_map, window, layer, draft, pool)
            kept = worth.gather(1, order).cumsum(1)
            kept = torch.nn.functional.pad(kept, (1, 0))[:, counts]
            total[domains.index(window.domain), layer] += worth.sum(1, keepdim=True) - kept
    number = torch.tensor([sum(window.domain == d for window in windows) for d in domains])
    return (total / number[:, None, None, None]).mean(0)


def lost(
    head_map: HeadMap, windows: list[Window], target: HeadCounts, draft: HeadCounts, keep: float
) -> dict[str, float]:
    """Mean over heads of what the tokens are worth that are not selected, with one budget for all and then,
    where the map has them, with shares."""
    shares = head_map.shares or [[1.0] * target.kv_heads] * target.layers
    parts = sorted({keep, *(min(1.0, share * keep) for row in shares for share in row)})
    by_part = _lost(head_map, windows, target, draft, parts)
    found = {"uniform budget": float(by_part[..., parts.index(keep)].mean())}
    if head_map.shares:
        index = torch.tensor([[parts.index(min(1.0, share * keep)) for share in row] for row in shares])
        found["split budget"] = float(by_part.gather(-1, index[..., None]).mean())
    return found


def oracle(windows: list[Window], target: HeadCounts) -> torch.Tensor:
    """[windows, layers, KV heads]: recall of the target's own top at the same budget, the most there is."""
    return _by_layer(windows, target, lambda window, layer, rows: _best(window, rows))


def _best(window: Window, rows: range) -> torch.Tensor:
    shares = window.shares(rows)
    return window.recall(shares, window.top(shares))


def latest(windows: list[Window], target: HeadCounts) -> torch.Tensor:
    """[windows, layers, KV heads]: recall of sink and a recent part as large as the budget."""
    return _by_layer(windows, target, lambda window, layer, rows: window.latest(window.shares(rows)))


def outside(windows: list[Window], target: HeadCounts) -> torch.Tensor:
    """[windows, layers, KV heads]: the target's attention outside sink and recent."""
    return _by_layer(windows, target, lambda window, layer, rows: window.worth(rows).sum(-1))


def best_single(windows: list[Window], target: HeadCounts) -> torch.Tensor:
    """[windows, layers, KV heads]: recall of the draft head that is best in that very window.

    No map can choose so: it bounds what one draft head for each target head can give.
    """
    found = []
    for window in windows:
        best = torch.zeros(target.layers, target.kv_heads)
        for pool in POOLS:
            speaks = _mask(window.top(window.scores(pool)), window.positions)
            for layer in range(target.layers):
                held = (window.shares(_rows(layer, target)) @ speaks.T).amax(1)
                best[layer] = torch.maximum(best[layer], held)
        found.append(best)
    return torch.stack(found)


def random(windows: list[Window]) -> float:
    """The recall that choosing at random has in expectation."""
    return sum(window.count / window.positions for window in windows) / len(windows)


def _by_layer(windows: list[Window], target: HeadCounts, rule) -> torch.Tensor:
    return torch.stack(
        [torch.stack([rule(window, t, _rows(t, target)) for t in range(target.layers)]) for window in windows]
    )


def _rows(layer: int, target: HeadCounts) -> range:
    return range(layer * target.kv_heads, (layer + 1) * target.kv_heads)


def _mask(indices: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(len(indices), size).scatter_(1, indices, 1.0)
