"""From recorded windows to a map: score every candidate, take the best, add what helps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sts_sglang.calibrate.record import Record
from sts_sglang.config import StsConfig
from sts_sglang.headmap import HeadCounts, HeadMap, Source

SHORTLIST = 8  # candidates tried as further heads
LEAST_GAIN = 0.002  # recall that a further head must add: each costs the draft's scoring kernel time


@dataclass(frozen=True)
class Scores:
    """float32 [target layers * KV heads, candidates], means over all windows."""

    recall: torch.Tensor
    jaccard: torch.Tensor


class Free:
    """One window's positions outside sink and recent, and how many of them the budget selects."""

    def __init__(self, record: Record, i: int, config: StsConfig):
        t = record.windows[i]
        span = slice(config.sink, t - config.recent)
        self.count = config.budget_for(t) - config.sink - config.recent
        self.mass = record.mass[i][:, span]
        self.scores = record.scores[i][:, span]

    def top(self, values: torch.Tensor) -> torch.Tensor:
        """Indices [..., count] of the highest `values` [..., positions]."""
        return values.topk(self.count, -1).indices

    def recall(self, mass: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Share [...] of `mass` [..., positions] on the `chosen` [..., count]."""
        return mass.gather(-1, chosen).sum(-1) / mass.sum(-1).clamp(min=1e-30)


def frees(records: list[Record], config: StsConfig) -> list[Free]:
    """All windows of all texts."""
    return [Free(record, i, config) for record in records for i in range(len(record.windows))]


def score(windows: list[Free]) -> Scores:
    """Every candidate draft head for every target (layer, KV head).

    Recall is the target's attention mass outside sink and recent on what the candidate selects; Jaccard
    (the paper's criterion) compares its selection with the target's own top of the same size.
    """
    recall = jaccard = 0.0
    for free in windows:
        speaks, wants = (_mask(free.top(v), v.shape[1]) for v in (free.scores, free.mass))
        recall = recall + free.mass @ speaks.T / free.mass.sum(1, keepdim=True).clamp(min=1e-30)
        common = wants @ speaks.T
        jaccard = jaccard + common / (2 * free.count - common)
    return Scores(recall / len(windows), jaccard / len(windows))


def search(
    windows: list[Free], scores: Scores, target: HeadCounts, draft: HeadCounts, band: int | None, heads: int
) -> HeadMap:
    """The best candidate by recall, then further ones while their union gains, at most `heads`.

    `band`: how far a draft layer may lie from the proportional one, None for all layers.
    """
    sources = []
    for layer in range(target.layers):
        near = layer * draft.layers // target.layers
        allowed = torch.tensor(
            [band is None or abs(d - near) <= band for d in range(draft.layers) for _ in range(draft.q_heads)]
        )
        picks = []
        for h in range(target.kv_heads):
            row = layer * target.kv_heads + h
            ranked = scores.recall[row].masked_fill(~allowed, -1).argsort(descending=True, stable=True)
            ranked = ranked[: min(SHORTLIST, int(allowed.sum()))].tolist()
            picks.append(_forward(windows, row, ranked, float(scores.recall[row, ranked[0]]), heads))
        sources.append(tuple(tuple(sorted(divmod(c, draft.q_heads) for c in pick)) for pick in picks))
    return HeadMap(tuple(sources), origin="calibrated")


def _forward(windows: list[Free], row: int, ranked: list[int], best: float, heads: int) -> list[int]:
    """Greedy forward selection among `ranked`; heads are joined by the maximum, as in serving."""
    chosen, others = ranked[:1], ranked[1:]
    while others and len(chosen) < heads:
        gains = torch.zeros(len(others))
        for free in windows:
            joined = torch.maximum(free.scores[others], free.scores[chosen].amax(0))
            gains += free.recall(free.mass[row].expand_as(joined), free.top(joined))
        gains = gains / len(windows) - best
        if (gain := float(gains.max())) < LEAST_GAIN:
            break
        best += gain
        chosen = [*chosen, others.pop(int(gains.argmax()))]
    return chosen


def recall_of(head_map: HeadMap, windows: list[Free], draft: HeadCounts) -> torch.Tensor:
    """float32 [target layers, KV heads], mean over the windows, of a map's selections."""
    rows: list[tuple[Source, ...]] = [heads for layer in head_map.sources for heads in layer]
    total = torch.zeros(len(rows))
    for free in windows:
        joined = torch.stack([free.scores[[d * draft.q_heads + q for d, q in r]].amax(0) for r in rows])
        total += free.recall(free.mass, free.top(joined))
    return (total / len(windows)).view(len(head_map.sources), -1)


def oracle(windows: list[Free]) -> torch.Tensor:
    """float32 [layers * KV heads]: recall of the target's own top at the same budget, the most there is."""
    return torch.stack([free.recall(free.mass, free.top(free.mass)) for free in windows]).mean(0)


def random(windows: list[Free]) -> float:
    """The recall that choosing at random has in expectation."""
    return sum(free.count / free.mass.shape[1] for free in windows) / len(windows)


def _mask(indices: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(len(indices), size).scatter_(1, indices, 1.0)
