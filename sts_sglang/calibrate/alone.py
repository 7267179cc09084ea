"""A target without a draft: what its decode steps lose to the tokens or pages that they leave out, and the
split of the budget over heads that loses least.

A decode step is one row. It selects by its own queries, so one pass of the target measures every length of a
list, and nothing is kept but the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from sts_kernels import torch_ops
from sts_kernels.layout import ALIGN, PAGE, WHOLE, Contexts, Count, Room, pages_of
from sts_sglang.calibrate import search
from sts_sglang.calibrate.directions import Sketched
from sts_sglang.calibrate.record import Seen, Target, attention_at, page_scores
from sts_sglang.config import CEIL_GUARD, StsConfig
from sts_sglang.headmap import Directions, HeadMap, undrafted


class Passage(NamedTuple):
    """A text and the decode steps of it that are looked at, by the number of tokens before them."""

    domain: str
    ids: list[int]
    steps: list[int]


class Ways(NamedTuple):
    """Lists that are filled in one order.

    reach: of a layer's attention and a step, int64 [KV heads, t]: how long a list must be to have a position
    of the context. lengths: of a step and a layer, int64 [KV heads, ways].
    """

    reach: Callable[[Seen, int], torch.Tensor]
    lengths: Callable[[int, int], torch.Tensor]


def measure(
    target: Target,
    config: StsConfig,
    texts: Sequence[Passage],
    held: Sequence[Passage],
    say: Callable[[str], None],
    directions: Directions | None = None,
) -> dict[str, Any]:
    """Split the budget by `texts` and judge that on `held`; "shares" of the report is [layer][KV head].

    Args:
        config: of what selects (`lists_of`) and policy "ratio". say: is told what is being done. directions:
            of the sketches that tokens are selected by, None for pages.
    """
    counts, pages = target.target_counts, lists_of(config, "pages")
    reach = sketch_reach(config, directions) if directions else page_reach(pages)
    parts = parts_of(config, texts)

    def by_part(t: int, layer: int) -> torch.Tensor:
        return list_lengths(parts, t, config).expand(counts.kv_heads, -1)

    lost = _errors(target, texts, [Ways(reach, by_part)], len(parts), say)
    lost = search.over_domains(texts, lost)
    shares = search.split_shares(lost, parts, config.share)
    split = HeadMap(undrafted(counts).sources, "split", shares=shares)
    say("checking on held-out texts")
    # In short contexts heads of small shares have more than those; equal budgets are as much in all.
    served = {t: served_lengths(split, t, config) for text in held for t in text.steps}
    equal = {t: lengths.double().mean().ceil().long() for t, lengths in served.items()}

    def of_maps(t: int, layer: int) -> torch.Tensor:
        return torch.stack([equal[t].expand(counts.kv_heads), served[t][layer]], 1)

    def of_tokens(t: int, layer: int) -> torch.Tensor:
        return torch.stack([torch.tensor(config.sink + config.recent), equal[t]]).expand(counts.kv_heads, -1)

    def of_pages(t: int, layer: int) -> torch.Tensor:
        return equal[t].clamp(min=pages.forced).expand(counts.kv_heads, 1)

    by = "tokens by sketches" if directions else "pages"
    names = [f"{by}, equal budgets", f"{by}, split budget"]
    ways = [Ways(reach, of_maps)]
    if directions:
        names += ["pages, equal budgets"]
        ways += [Ways(page_reach(pages), of_pages)]
    names += ["sink + recent only", "best tokens, equal budgets"]
    ways += [Ways(token_reach(config), of_tokens)]
    errors = _errors(target, held, ways, len(names), say).mean((1, 2))  # [texts, ways]
    return {
        "by": by,
        "shares": split.shares,
        "error": dict(zip(names, search.over_domains(held, errors).tolist(), strict=True)),
        "error_by_domain": {name: search.by_domain(held, errors[:, i]) for i, name in enumerate(names)},
        "list_share": _mean(float(lengths.double().mean()) / t for t, lengths in served.items()),
        "parts": parts,
        "error_by_part": lost.tolist(),
    }


def lists_of(config: StsConfig, selector: str) -> StsConfig:
    """The configuration by which lists of "tokens" or "pages" have their lengths."""
    return replace(config, selector=selector)


def parts_of(config: StsConfig, texts: Sequence[Passage]) -> list[float]:
    """Parts of the context that a head may be given: no shorter lists than the server has in such texts."""
    least = config.forced / _mean(t for text in texts for t in text.steps)
    return sorted({min(1.0, max(least, config.share * part)) for part in search.PARTS})


def list_lengths(parts: list[float], t: int, config: StsConfig) -> torch.Tensor:
    """int64 [parts]: tokens of a list that may have such a part of a context of t tokens."""
    wanted = torch.tensor(parts, dtype=torch.float64) * t
    return torch.ceil(wanted - CEIL_GUARD).long().clamp(min=config.forced, max=t)


def served_lengths(head_map: HeadMap, t: int, config: StsConfig) -> torch.Tensor:
    """int64 [layers, KV heads]: tokens of the lists that a server with this map has in a context of t."""
    row, split = torch.tensor([t]), head_map.split()
    channels = len(head_map.channels)
    sizes = torch_ops.size_lists(
        Contexts(torch.zeros(1, t, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), row),
        row,
        torch.full((1,), torch.nan, dtype=torch.float64),
        config.rule(),
        Room(channels, -(-t // ALIGN) * ALIGN, t, channels * t),
        torch.zeros(len(Count), dtype=torch.int64),
        split=None if split is None else torch.tensor(split, dtype=torch.float64),
    )
    counts = sizes.counts[0].long()
    counts = torch.where(counts == WHOLE, t, counts)
    return torch.stack([counts[head_map.head_channels(layer)] for layer in range(len(head_map.sources))])


def page_reach(config: StsConfig) -> Callable[[Seen, int], torch.Tensor]:
    """Whole pages, those of sink and recent first; what is after the last complete page is on every list."""

    def reach(seen: Seen, t: int) -> torch.Tensor:
        pages = _places(page_scores(seen, t), pages_of(config.sink), pages_of(config.recent))
        return pad(pages.repeat_interleave(PAGE, 1) * PAGE + t % PAGE, (0, t % PAGE))

    return reach


def sketch_reach(config: StsConfig, directions: Directions) -> Callable[[Seen, int], torch.Tensor]:
    """The tokens of most attention as their sketches have it."""
    sketched = Sketched(directions)
    return lambda seen, t: _places(sketched.scores(seen, t), config.sink, config.recent)


def token_reach(config: StsConfig) -> Callable[[Seen, int], torch.Tensor]:
    """The tokens of most attention, which only its keys tell: the best that a list could have."""
    return lambda seen, t: _places(attention_at(seen, t), config.sink, config.recent)


def _places(scores: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """int64, as scores [H, n]: how long a list must be to have each entry. The first and the last of them are
    on all lists, then the highest; of equal ones the later, as `select_tokens` has it."""
    free = scores[:, first : scores.shape[1] - last]
    order = free.flip(1).argsort(dim=1, descending=True, stable=True)
    numbers = torch.arange(1, free.shape[1] + 1, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, numbers).flip(1)
    return pad(rank + first + last, (first, last), value=first + last)


def _errors(
    target: Target, texts: Sequence[Passage], ways: list[Ways], number: int, say: Callable[[str], None]
) -> torch.Tensor:
    """float32 [texts, layers, KV heads, number of ways]: `Target.output_errors`, the mean over the steps."""
    found = []
    for n, text in enumerate(texts, 1):
        say(f"[{n}/{len(texts)}] {text.domain}")

        def kept(i: int, seen: Seen, steps: list[int] = text.steps) -> torch.Tensor:
            t = steps[i]
            return torch.cat([_within(way, seen, t) for way in ways], 1)

        found.append(target.output_errors(text.ids, text.steps, kept, number, rows_each=1).mean(0))
    return torch.stack(found)


def _within(ways: Ways, seen: Seen, t: int) -> torch.Tensor:
    """bool [KV heads, ways, t]: what lists have."""
    reach = ways.reach(seen, t)
    return reach[:, None] <= ways.lengths(t, seen.layer).to(reach.device)[..., None]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
