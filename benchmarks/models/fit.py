"""Head maps and budgets by what a selection does, measured on windows that nothing else is measured on.

Three measures of one selection, for one target KV head, mean over rows:
  mass    attention outside sink and recent that it misses
  output  squared distance of what the head adds to the residual from what it adds densely, over the squared
          norm of the residual after it
  logits  (g . d)^2, where d is the distance of the head's output and g the gradient, by that output, of the
          surprise of tokens drawn from the model itself: to second order the divergence of the logits

The last two weigh sharp heads above diffuse ones, because what a diffuse head misses changes its mean little.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from replay import Look, Pair, Rows, T, Window, look, replay
from torch import Tensor

from sts_sglang.headmap import HeadMap, proportional

MEASURES = ("mass", "output", "logits")
HEADS, SHORTLIST = 4, 8  # draft heads of a target head, and how many singles the search for them tries
SOURCES = 8  # draft heads that a regressed map keeps
PARTS = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0)  # of the context, at which budgets are measured
SPREAD = 0.5  # as served by default
DRAFTED = T - 1  # rows that a round with three drafted tokens has


class Map(NamedTuple):
    """Draft heads of every target head: int64 [layers, H, n], flat, and their weights under pool "mean"; a
    head of weight 0 is none, and a target head with none selects the latest tokens."""

    heads: Tensor
    weights: Tensor

    @classmethod
    def of(cls, heads: Tensor) -> Map:
        return cls(heads, torch.full(heads.shape, 1 / heads.shape[-1], device=heads.device))

    @classmethod
    def served(cls, head_map: HeadMap, draft_heads: int, device: str) -> Map:
        """A map as the server has it; `draft_heads` in each draft layer."""
        most = max(len(own) for row in head_map.sources for own in row)
        heads, weights = torch.zeros(2, len(head_map.sources), len(head_map.sources[0]), most)
        for t, row in enumerate(head_map.sources):
            for h, own in enumerate(row):
                for i, (layer, head) in enumerate(own):
                    heads[t, h, i], weights[t, h, i] = layer * draft_heads + head, 1 / len(own)
        return cls(heads.long().to(device), weights.to(device))


def pool(values: Tensor, how: str, dim: int) -> Tensor:
    return values.amax(dim) if how == "max" else values.mean(dim)


def spread(scores: Tensor, factor: float, over: int = 1) -> Tensor:
    """Scores [..., L] of which each is at least `factor` times that of any of the `over` tokens before it."""
    out = scores.clone()
    for step in range(1, over + 1) if factor else ():
        out[..., step:] = torch.maximum(out[..., step:], scores[..., :-step] * factor)
    return out


def importance(
    window: Window,
    head_map: Map,
    *,
    rows: int = DRAFTED,
    heads_pool: str = "max",
    rows_pool: str = "max",
    factor: float = SPREAD,
    over: int = 1,
) -> Tensor:
    """float32 [layers, H, V, L] by the first `rows` draft rows of each verify: pooled, then spread."""
    heard, found = window.heard[:, :rows], []
    latest = 1e-20 * torch.arange(heard.shape[-1], device=heard.device)  # of equal scores the later wins
    for heads, weights in zip(*head_map, strict=True):
        own = heard[heads]  # [H, n, rows, V, L]
        if heads_pool == "max":
            own = (own * (weights > 0)[..., None, None, None]).amax(1)
        else:
            own = torch.einsum("hn,hnrvl->hrvl", weights, own)
        found.append(spread(pool(own, rows_pool, 1), factor, over) + latest)
    return torch.stack(found)


def gradients(pair: Pair, window: Window, rows: Rows) -> list[Tensor]:
    """Of every layer [H, G, V, T, D]: how the surprise of tokens drawn from the model changes by outputs."""
    outputs: list[Tensor] = []

    def attend(at: Look) -> Tensor:
        out = at.weigh(at.full)
        outputs.append(out if out.requires_grad else out.requires_grad_())
        return outputs[-1]

    with torch.enable_grad():
        logits = replay(pair, window, rows, attend)
        drawn = logits.detach().softmax(-1).multinomial(1)
        surprise = -logits.log_softmax(-1).gather(1, drawn).sum()
        return list(torch.autograd.grad(surprise, outputs))


class Fit:
    """Everything fitted to calibration windows; worked out when it is first asked for.

    keep: the part of the context at which maps are compared.
    """

    def __init__(self, pair: Pair, windows: list[Window], rows: Rows, keep: float):
        self.pair, self.windows, self.rows = pair, windows, rows
        self.count = rows.counts(keep)
        config = pair.target.config
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads
        self._joined: dict[str, Map] = {}

    @cached_property
    def slopes(self) -> list[list[Tensor]]:
        """`gradients` of every window."""
        return [gradients(self.pair, window, self.rows) for window in self.windows]

    def heard(self, window: Window) -> Tensor:
        """float32 [C, V, L]: each draft head by itself, as it would select."""
        return spread(window.heard[:, :DRAFTED].amax(1), SPREAD)

    def look(self, i: int, layer: int) -> Look:
        """A layer of the i-th calibration window, with dense queries."""
        window, target = self.windows[i], self.pair.target
        rope = target.rope(self.rows.own)
        q = target.before(target.model.layers[layer], window.inputs[layer], *rope)[0]
        return look(self.pair, window, self.rows, layer, q, window.keys[layer], window.values[layer])

    def measured(self, i: int, at: Look, selections: Tensor) -> Tensor:
        """float32 [measures, H, N] of selections, bool [N, H or 1, V, L], in the i-th window."""
        dense, far = at.weigh(at.full), at.full * self.rows.far[:, None]
        states = self.windows[i].inputs[at.layer].float().unflatten(0, (-1, T)) + at.project(dense).sum(0)
        residual = states.square().sum(-1)  # [V, T]
        found = []
        for chosen in selections:
            apart = at.attended(chosen) - dense
            mass = (far * ~chosen[:, None, :, None]).sum(-1).mean((1, 2, 3))
            output = (at.project(apart).square().sum(-1) / residual).mean((1, 2))
            logits = (apart * self.slopes[i][at.layer]).sum((1, 4)).square().mean((1, 2))
            found.append(torch.stack([mass, output, logits]))
        return torch.stack(found, -1)

    @cached_property
    def singles(self) -> Tensor:
        """float32 [measures, layers, H, C] of every draft head as the only one."""
        found = 0
        for i, window in enumerate(self.windows):
            chosen = self.rows.select(self.heard(window), self.count)[:, None]
            by_layer = [self.measured(i, self.look(i, layer), chosen) for layer in range(self.layers)]
            found = found + torch.stack(by_layer, 1)
        return found / len(self.windows)

    @cached_property
    def proportional(self) -> Map:
        """The default of the server."""
        target, draft = self.pair.head_counts()
        return Map.served(proportional(target, draft), draft.q_heads, self.pair.device)

    def single(self, measure: str) -> Map:
        """The draft head that loses least."""
        return Map.of(self.singles[MEASURES.index(measure)].argmin(-1, keepdim=True))

    def four_singles(self) -> Map:
        """The four draft heads that each hold most."""
        lost = self.singles[MEASURES.index("mass")]
        return Map.of(lost.topk(min(HEADS, lost.shape[-1]), largest=False).indices)

    def joined(self, measure: str) -> Map:
        """Up to four draft heads, pooled by their maximum: each the one that then loses least."""
        if measure not in self._joined:
            found = [self._search(layer, MEASURES.index(measure)) for layer in range(self.layers)]
            self._joined[measure] = Map.of(torch.stack(found))
        return self._joined[measure]

    def _search(self, layer: int, which: int) -> Tensor:
        """int64 [H, HEADS] of one layer; where no head more makes it better, the first stands again."""
        single = self.singles[which, layer]
        least, shortlist = single.topk(min(SHORTLIST, single.shape[-1]), largest=False)  # [H, n]
        picks, best = shortlist[:, :1], least[:, 0]
        looks = [self.look(i, layer) for i in range(len(self.windows))]
        by_window = [self.heard(window) for window in self.windows]
        for _ in range(HEADS - 1):
            lost = 0
            for i, (at, heard) in enumerate(zip(looks, by_window, strict=True)):
                tried = torch.maximum(heard[picks].amax(1)[:, None], heard[shortlist]).transpose(0, 1)
                lost = lost + self.measured(i, at, self.rows.select(tried, self.count))[which]
            found, place = (lost / len(looks)).min(-1)
            better = found < best
            pick = torch.where(better, shortlist.gather(1, place[:, None])[:, 0], picks[:, 0])
            picks, best = torch.cat([picks, pick[:, None]], 1), torch.minimum(best, found)
        return picks

    @cached_property
    def regressed(self) -> Map:
        """Non-negative weights by which draft heads' probabilities come nearest to each token's contribution
        to the output; the largest few of them."""
        gram, onto = 0, 0
        for i, window in enumerate(self.windows):
            x = window.heard[:, :DRAFTED].mean(1).flatten(1)  # [C, V * L]
            far = self.rows.far.flatten()
            gram = gram + (x * far) @ x.t()
            wanted = [contribution(self.look(i, layer)).mean((1, 3)) for layer in range(self.layers)]
            onto = onto + torch.stack(wanted).flatten(2) @ (x * far).t()
        weights = not_negative(gram, onto)
        largest, heads = weights.topk(min(SOURCES, weights.shape[-1]), -1)
        return Map(heads, largest / largest.sum(-1, keepdim=True).clamp(min=1e-9))

    @cached_property
    def by_part(self) -> Tensor:
        """float32 [measures, layers, H, PARTS] of selections of so large a part of the context, by the map
        that is joined by output."""
        found, head_map = 0, self.joined("output")
        for i, window in enumerate(self.windows):
            scores, own = importance(window, head_map), []
            for layer in range(self.layers):
                chosen = [self.rows.select(scores[layer], self.rows.counts(part)) for part in PARTS]
                own.append(self.measured(i, self.look(i, layer), torch.stack(chosen)))
            found = found + torch.stack(own, 1)
        return found / len(self.windows)


def contribution(at: Look) -> Tensor:
    """float32 [H, G, V, T, L]: attention times how far the token's value, as added to the residual, is from
    the head's output; what dropping that token alone changes."""
    out = at.weigh(at.full)
    metric = torch.einsum("hgdn,hgen->hgde", at.projection, at.projection)
    through = torch.einsum("hgde,lhe->hgld", metric, at.values)
    values = torch.einsum("hgld,lhd->hgl", through, at.values)[:, :, None, None]
    both = torch.einsum("hgvtd,hgld->hgvtl", out, through)
    own = torch.einsum("hgvtd,hgde,hgvte->hgvt", out, metric, out)[..., None]
    return at.full * (values - 2 * both + own).clamp(min=0).sqrt()


def not_negative(gram: Tensor, onto: Tensor, rounds: int = 500) -> Tensor:
    """Least squares [..., C] with no weight below zero, of gram [C, C] and onto [..., C], none below zero
    either: multiplicative updates."""
    weights = torch.full_like(onto, 1 / onto.shape[-1])
    for _ in range(rounds):
        weights = weights * onto / (weights @ gram).clamp(min=1e-20)
    return weights


def split(lost: Tensor, keep: float, least: float) -> Tensor:
    """float64 [layers, H]: parts of the context, `keep` in the mean, by losses [layers, H, PARTS].

    Whoever saves most for what it costs goes on to one of the larger PARTS, until all is spent. least: of any
    head.
    """
    parts = torch.tensor(PARTS, dtype=torch.float64).clamp(min=least)
    lost, level = lost.double().cpu(), torch.zeros(lost.shape[:2], dtype=torch.long)
    left = (keep - float(parts[0])) * level.numel()
    while True:
        now = level[..., None]
        cost = parts - parts[now]
        gain = (lost.gather(-1, now) - lost) / cost.clamp(min=1e-12)
        gain = gain.masked_fill((cost <= 0) | (cost > left + 1e-9), 0)
        if gain.max() <= 0:
            break
        at = torch.unravel_index(gain.argmax(), gain.shape)
        left -= float(cost[at])
        level[at[:2]] = at[2]
    own = parts[level]
    return (own + left / (own < 1).sum().clamp(min=1) * (own < 1)).clamp(max=1)
