"""Selection by single tokens: the queries that a layer has now, against short forms of all its keys.

A key on half of its dimensions, those along which keys differ most, half a byte each, tells nearly as well as
the whole key how much attention its token gets (low-rank keys, arXiv 2406.02542). To read them is to read an
eighth of a layer's keys, as the sketches of pages are, whose mean and deviation tell little of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sts_kernels import Ops
from sts_kernels.layout import (
    AGAIN,
    UNKNOWN,
    Contexts,
    Directions,
    Lists,
    Plan,
    Pooling,
    Scores,
    Sizes,
    part_bytes,
)
from sts_sglang.config import StsConfig
from sts_sglang.core import sketches
from sts_sglang.core.round import RoundState
from sts_sglang.core.selectors.base import HeadLists, LayerCall, Scored, list_bytes
from sts_sglang.core.sizes import SCRATCH, Capacity, Need, parted
from sts_sglang.core.sketches import TokenSketches
from sts_sglang.core.verifier import TargetShape
from sts_sglang.headmap import Directions as HeadDirections


class Share(NamedTuple):
    """Neighbours of a batch whose tokens are scored at once, and how their work is parted."""

    requests: slice
    contexts: Contexts
    plan: Plan | None


class TokensSelector:
    """The tokens of the best scores.

    Args:
        config: what to keep. state: of the round. ops: the ops in use. sketches: of the target.
        lists: of every (request, KV head). capacity: of the buffers of a round. dtype: of importance.
    """

    def __init__(
        self,
        config: StsConfig,
        state: RoundState,
        ops: Ops,
        sketches: TokenSketches,
        lists: HeadLists,
        capacity: Capacity,
        dtype: torch.dtype,
    ):
        self.config, self.state, self.ops, self.sketches, self.lists = config, state, ops, sketches, lists
        self.channels, device = lists.channels, lists.channels.device
        shape = (lists.kv_heads, capacity.requests * capacity.context)
        # One buffer for all layers, unless what they scored is to be told later.
        told = sketches.of_layer if config.inspect_dir is not None else ()
        self.kept = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in told}
        self.scores = torch.zeros(shape if not told else (0, 0), dtype=dtype, device=device)
        self.starts = torch.arange(capacity.requests, device=device) * capacity.context
        self.columns = capacity.context  # of a request
        self._scored: Contexts | None = None  # of the running verify: 0 tokens where there is no list
        self._shares: list[Share] | None = None

    def admit(self, rows: torch.Tensor, prompts: list[Sequence[int]]) -> None:
        """What keys hold needs no prompt."""

    def select(self, sizes: Sizes, contexts: Contexts) -> Lists:
        """Lengths alone: what is on the lists depends on the queries of each layer."""
        return Lists(self.lists.indices, sizes.starts, sizes.counts)

    def begin(self, lists: Lists, contexts: Contexts) -> Lists:
        some = (lists.counts >= 0).any(1)
        self._scored = contexts._replace(lens=torch.where(some, contexts.lens, 0))
        self._shares = None  # how large they may be, the queries say
        first = self.state.first_columns[: contexts.lens.numel()]
        self.state.note_scores(torch.where(some, first, -1), contexts)
        return self.lists.sized(lists)

    def list_layer(self, lists: Lists, call: LayerCall) -> None:
        self.sketches.write(call.layer, call.pool)  # of what earlier verifies added
        (bs, tokens, q_heads, _), kv_heads = call.q.shape, self.lists.kv_heads
        buffer = self.kept.get(call.layer, self.scores)
        if self._shares is None:
            self._shares = self._shared_out(bs, tokens * q_heads // kv_heads)
        for few, contexts, plan in self._shares:
            own = buffer[:, few.start * self.columns : few.stop * self.columns]
            self.ops.score_tokens(
                call.q[few],
                self.sketches.of_layer[call.layer],
                self.sketches.directions[call.layer],
                contexts,
                Scores(own, self.starts[: few.stop - few.start]),
                scale=call.scale,
                # The pool of the configuration, or of a head map, is what suits the draft's heads.
                pooling=Pooling("max", "max", tokens),
                plan=plan,
            )
        listed, _ = self.lists.of_layer(call.layer)
        scored, sink, recent = Scores(buffer, self.starts[:bs]), self.config.sink, self.config.recent
        self.ops.list_tokens(scored, call.contexts, listed, sink=sink, recent=recent)

    def scored(self, row: int, slots: torch.Tensor) -> Scored:
        """What tokens were worth to every head in the last step; nothing is known of dense layers."""
        layers, kv_heads = self.channels.shape
        found = torch.full((layers, kv_heads, slots.numel()), UNKNOWN)
        if (last := self.state.last_round(row)) is not None:
            number, start = min(last.length, slots.numel()), int(self.starts[last.place])
            for layer, buffer in self.kept.items():
                found[layer, :, :number] = buffer[:, start : start + number].float().cpu()
        return Scored(found.flatten(0, 1), self.channels.cpu(), "token scores")

    def nbytes(self) -> int:
        own = sum(t.nbytes for t in self.kept.values())
        return own + self.scores.nbytes + self.starts.nbytes + self.lists.nbytes()

    def _shared_out(self, bs: int, rows: int) -> list[Share]:
        """Alike in all layers of a step: as many requests at a time as there is scratch for."""
        (table, reqs, lens), kv_heads = self._scored, self.lists.kv_heads
        some = parted(bs, at_once(self.columns, kv_heads, rows))
        parts = [(few, Contexts(table, reqs[few], lens[few])) for few in some]
        return [Share(few, own, self.ops.plan_scores(own, kv_heads=kv_heads)) for few, own in parts]


def directions(found: HeadDirections, device: torch.device | str, dtype: torch.dtype) -> list[Directions]:
    """Of every layer, from a head map: see `sts_kernels.layout.Directions`. dtype: of keys."""
    shape, largest = (found.head_dim + 2, found.number), torch.finfo(dtype).max
    made = []
    for heads in found.heads:
        values = torch.stack([torch.frombuffer(bytearray(head), dtype=torch.float16) for head in heads])
        values = values.view(-1, *shape).float()
        turned, centre, step = values[:, :-2], values[:, -2], values[:, -1]
        onto = (turned / step[:, None]).clamp(-largest, largest).to(dtype)
        back = (turned * step[:, None]).to(dtype)
        parts = (onto, centre / step, back)
        made.append(Directions(*(part.to(device).contiguous() for part in parts)))
    return made


def need(config: StsConfig, target: TargetShape, longest: int) -> Need:
    """Of the selector beside the buffers of a round: scores and their logits, lists, sketches."""
    capacity = Capacity.of(target.requests, target.context_len)
    rows = target.tokens * target.q_heads // target.kv_heads
    layers = sum(not config.dense_verify(layer) for layer in range(target.layers))
    kept = layers if config.inspect_dir is not None else 1
    fixed = 2 * kept * target.kv_heads * target.requests * capacity.context
    some = min(target.requests, at_once(capacity.context, target.kv_heads, rows))
    fixed += some * logit_bytes(capacity.context, target.kv_heads, rows)
    fixed += list_bytes(target.kv_heads, target.requests, longest) + sketches.SCRATCH
    fixed += part_bytes(target.requests * target.kv_heads)
    of_heads = layers, target.kv_heads, target.head_dim
    fixed += sketches.direction_bytes(*of_heads, target.dtype.itemsize)
    return Need(fixed, sketches.token_bytes(*of_heads))


def logit_bytes(columns: int, kv_heads: int, rows: int) -> int:
    """Of one request, while a layer's tokens are scored: a float16 for each of a KV head's query rows, unless
    they are so many that the kernel keeps none."""
    return 2 * kv_heads * columns * rows if rows < AGAIN else 0


def at_once(columns: int, kv_heads: int, rows: int) -> int:
    """Requests whose tokens are scored within sizes.SCRATCH bytes, and at least one."""
    return max(1, SCRATCH // max(1, logit_bytes(columns, kv_heads, rows)))
