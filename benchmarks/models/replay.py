"""The last rows of a text once more, in verifies of four, with what each target head may attend to chosen.

The tokens before those rows are as a dense pass left them; the rows' own keys and values are those of the
replay. All verifies of a window run in one forward: a verify's rows see its selection of the context, and
the tail, which is the verify's earlier rows. Dense is the same code with nothing left out, so that a loss of
zero is zero.

H is the target's KV heads, G query heads of each, V verifies, T rows of each, L tokens, C draft heads.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import model
import torch
from model import Llama, Trace
from predict import attention
from pretrained import export, load_target
from safetensors.torch import load_file
from students import RECENT, SINK, EagleHead
from torch import Tensor

from sts_sglang.headmap import HeadCounts

T = 4  # rows of a verify: three drafted tokens and the one before them
GUARD = 1e-9  # so that a float error above a whole number adds no token


class Rows:
    """Masks of the last `rows` positions of `length`, which are `rows / T` verifies."""

    def __init__(self, length: int, rows: int, device: str, sink: int = SINK, recent: int = RECENT):
        self.length, self.number, self.verifies = length, rows, rows // T
        self.place = torch.arange(length, device=device)
        self.own = self.place[length - rows :]
        self.lengths = self.own[::T]  # of the verifies' contexts, [V]
        self.context = self.place < self.lengths[:, None]  # [V, L]
        self.forced = self.context & ((self.place < sink) | (self.place >= self.lengths[:, None] - recent))
        self.far = self.context & ~self.forced
        self.causal = (self.place <= self.own[:, None]).unflatten(0, (-1, T))  # [V, T, L]
        self.tail = self.causal & ~self.context[:, None]
        self.least = sink + recent

    def counts(self, parts: Tensor | float) -> Tensor:
        """int64 [..., V]: tokens that such parts [...] of each context are, sink and recent among them."""
        parts = torch.as_tensor(parts, dtype=torch.float64, device=self.place.device)[..., None]
        wanted = torch.ceil(parts * self.lengths - GUARD).long()
        return wanted.clamp(min=self.least).minimum(self.lengths)

    def select(self, scores: Tensor, counts: Tensor) -> Tensor:
        """bool [..., V, L]: sink, recent and the top of scores [..., V, L], counts [..., V] in all."""
        ranked = scores.masked_fill(~self.context, -torch.inf).masked_fill(self.forced, torch.inf)
        most = int(counts.max())
        order = ranked.topk(most, -1).indices
        taken = (torch.arange(most, device=order.device) < counts[..., None]).expand_as(order)
        return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, taken)


class Window(NamedTuple):
    """A text and what both models made of it densely.

    ids: int64 [L + 1]. inputs: of every target layer, residual states of the last rows. keys, values: of
    every target layer, [L, H, D]. heard: float32 [C, T, V, L], what each draft head attended to in the row
    of each verified token, at the target's positions; 0 outside the context. Of these rows a round with three
    drafted tokens has the first three: the last of them never runs through the draft.
    """

    index: int
    ids: Tensor
    inputs: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    heard: Tensor


class Pair:
    """A target and its draft, in plain torch."""

    def __init__(self, target: Llama, draft: Llama | EagleHead):
        self.target, self.draft = target, draft
        self.device = str(target.model.norm.weight.device)

    def head_counts(self) -> tuple[HeadCounts, HeadCounts]:
        """Of target and draft."""
        own, draft = (
            HeadCounts(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
            for c in (self.target.config, self.draft.config)
        )
        return own, draft._replace(layers=1) if isinstance(self.draft, EagleHead) else draft

    @cached_property
    def projections(self) -> list[Tensor]:
        """Of every target layer, float32 [H, G, D, hidden]: what a head's output adds to the residual."""
        c = self.target.config
        shape = (c.num_key_value_heads, -1, c.head_dim)
        return [
            layer.self_attn.o_proj.weight.float().t().unflatten(0, shape)
            for layer in self.target.model.layers
        ]

    @torch.no_grad()
    def window(self, index: int, ids: Tensor, rows: Rows) -> Window:
        """Dense passes of both over ids [L + 1], whose last token is a label only."""
        ids = ids.to(self.device)
        trace, target = Trace([], [], []), self.target
        target(ids[None, :-1], trace)
        inputs = [target.model.embed_tokens(ids[:-1]).to(model.COMPUTE), *trace.states[:-1]]
        rope = target.rope(rows.place)
        kept = [
            target.before(layer, x, *rope)[1:] for layer, x in zip(target.model.layers, inputs, strict=True)
        ]
        keys, values = map(list, zip(*kept, strict=True))
        own = [x[-rows.number :].clone() for x in inputs]
        return Window(index, ids, own, keys, values, self.hear(ids[:-1], trace.states, rows))

    def hear(self, ids: Tensor, states: list[Tensor], rows: Rows) -> Tensor:
        """`Window.heard`, under teacher forcing: drafted tokens are those of the text.

        A STANDALONE draft's rows are of its own dense pass. An EAGLE-3 head's are those of a round: the
        first of a verify reads the target's states, later ones the head's own outputs.
        """
        if isinstance(self.draft, EagleHead):
            seen: list[Tensor] = []
            self.draft.chains(self.target, ids[None], states, rows.lengths[None] - 1, T, seen)
            found = torch.stack(seen, 3)[0, ..., :-1].flatten(0, 1)  # [C, T, V, L - 1]
        else:
            trace = Trace([], [], [])
            self.draft(ids[None, 1:], trace)
            found = attention(trace, rows.own - 1).flatten(0, 2).unflatten(1, (-1, T)).transpose(1, 2)
        heard = torch.zeros(*found.shape[:-1], rows.length, device=found.device)
        heard[..., 1:] = found  # the draft's key at index p is about the target's token p + 1
        return heard.mul_(rows.context)


def load_pair(target: Path, draft: Path, algorithm: str | None, device: str) -> Pair:
    """From folders as they are served; a checkpoint FILE.safetensors of pretrained.py is exported first."""
    if draft.suffix == ".safetensors":
        with tempfile.TemporaryDirectory() as made:
            export(target, draft.parent, Path(made))
            return load_pair(target, Path(made) / draft.stem, algorithm, device)
    if not (draft / "config.json").is_file():
        raise SystemExit(f"--draft: {draft} has no config.json; give a folder of `pretrained.py export`")
    own = load_target(target, device)
    settings = json.loads((draft / "config.json").read_text())
    found = "EAGLE3" if "Eagle3" in settings["architectures"][0] else "STANDALONE"
    if algorithm not in (None, found):
        raise SystemExit(f"--algorithm: {draft} is {found}, not {algorithm}")
    if found == "STANDALONE":
        return Pair(own, load_target(draft, device))
    aux = settings["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    head = EagleHead(replace(own.config, vocab_size=settings["draft_vocab_size"]), tuple(aux))
    weights = load_file(draft / "model.safetensors")
    head.load_state_dict({name: w for name, w in weights.items() if name not in ("d2t", "t2d")})
    return Pair(own, head.to(device).requires_grad_(False))


class Look(NamedTuple):
    """One target layer of a replay, as its attention sees it.

    q: float32 [H, G, V, T, D]. keys, values: float32 [L, H, D]. logits: float32 [H, G, V, T, L], -inf after
    each row. full: their softmax. projection: [H, G, D, hidden].
    """

    window: int
    layer: int
    q: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    full: Tensor
    projection: Tensor
    rows: Rows

    def weigh(self, probabilities: Tensor) -> Tensor:
        """Values [H, G, V, T, D] under probabilities [H, G, V, T, L]."""
        return torch.einsum("hgvtl,lhd->hgvtd", probabilities, self.values)

    def attended(self, chosen: Tensor) -> Tensor:
        """Exact attention [H, G, V, T, D] to the chosen context, bool [H, V, L], and the tail."""
        seen = chosen[:, None, :, None] | self.rows.tail
        return self.weigh(self.logits.masked_fill(~seen, -torch.inf).softmax(-1))

    def project(self, output: Tensor) -> Tensor:
        """What attention outputs [H, G, V, T, D] add to the residual, by KV head: [H, V, T, hidden]."""
        return torch.einsum("hgvtd,hgdn->hvtn", output, self.projection)


def look(pair: Pair, window: Window, rows: Rows, layer: int, q: Tensor, keys: Tensor, values: Tensor) -> Look:
    """From q [R, heads, D], keys and values [L, H, D] of any dtype."""
    keys, values = keys.float(), values.float()
    q = q.float().unflatten(0, (-1, T)).unflatten(2, (keys.shape[1], -1)).permute(2, 3, 0, 1, 4)
    logits = torch.einsum("hgvtd,lhd->hgvtl", q, keys).mul_(q.shape[-1] ** -0.5)
    logits = logits.masked_fill(~rows.causal, -torch.inf)
    full, projection = logits.softmax(-1), pair.projections[layer]
    return Look(window.index, layer, q, keys, values, logits, full, projection, rows)


def replay(pair: Pair, window: Window, rows: Rows, attend: Callable[[Look], Tensor]) -> Tensor:
    """Logits [R, vocabulary] of the rows, where `attend` gives each layer's outputs [H, G, V, T, D]."""
    target, first = pair.target, rows.length - rows.number
    rope, x = target.rope(rows.own), window.inputs[0]
    for i, layer in enumerate(target.model.layers):
        q, k, v = target.before(layer, x, *rope)
        keys, values = (
            torch.cat([old[i][:first], new]) for old, new in ((window.keys, k), (window.values, v))
        )
        out = attend(look(pair, window, rows, i, q, keys, values))
        x = target.after(layer, x, out.permute(2, 3, 0, 1, 4).flatten(2).flatten(0, 1).to(x.dtype))
    return target.logits(x).float()


def loss(logits: Tensor, window: Window, rows: Rows) -> float:
    """Mean nats of the tokens after the rows."""
    return float(torch.nn.functional.cross_entropy(logits, window.ids[rows.own + 1]))


class Replayed(NamedTuple):
    """loss: nats a token. kept: share of the contexts. held: share of the attention outside sink and recent
    that the selections hold, by mass. By layer: held_by_layer; error, the relative L2 distance of what
    attention adds to the residual from what it would add with the same queries densely.
    """

    loss: float
    kept: float
    held: float
    held_by_layer: list[float]
    error: list[float]


@torch.no_grad()
def sparse(
    pair: Pair, window: Window, rows: Rows, choose: Callable[[Look, Tensor], Tensor], counts: Tensor
) -> Replayed:
    """A replay where every layer attends to what `choose` gives: bool [H, V, L], by counts [layers, H, V]."""
    notes = []

    def attend(at: Look) -> Tensor:
        chosen = choose(at, counts[at.layer])
        out, dense = at.attended(chosen), at.weigh(at.full)
        far = at.full * rows.far[:, None]
        apart, whole = (at.project(x).sum(0).square().sum() for x in (out - dense, dense))
        kept = chosen.sum() / rows.lengths.sum() / chosen.shape[0]
        held = (far * chosen[:, None, :, None]).sum()
        notes.append(torch.stack([kept, held, far.sum(), (apart / whole).sqrt()]))
        return out

    found = loss(replay(pair, window, rows, attend), window, rows)
    kept, held, far, error = torch.stack(notes).double().t().cpu()
    if not math.isfinite(found):
        raise SystemExit(f"window {window.index}: the loss is {found}")
    return Replayed(
        found, float(kept.mean()), float(held.sum() / far.sum()), (held / far).tolist(), error.tolist()
    )


def dense(pair: Pair, window: Window, rows: Rows) -> float:
    """Nats a token with nothing left out, by the same replay."""
    heads = (len(window.keys), window.keys[0].shape[1])
    return sparse(pair, window, rows, everything, rows.lengths.expand(*heads, -1)).loss


def everything(at: Look, counts: Tensor) -> Tensor:
    return at.rows.context.expand(*counts.shape, -1)
