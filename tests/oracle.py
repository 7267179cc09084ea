"""Speculative decoding with draft-guided sparse verify, in plain Hugging Face attention.

An independent statement of the method for STANDALONE chains: no KV cache, no slots, no batches. Every
round runs the whole sequence through the models. The target's layers get one mask a head, whose row i
is what token i attended to when it was processed, so the keys and values of earlier tokens are those
that the sparse server would have cached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Rule:
    """What the server is told, and the ways in which a negative control deviates from it."""

    keep: float = 1.0
    floor: int = 0
    sink: int = 4
    recent: int = 64
    num_steps: int = 3
    shift: int = 1  # draft index p is target position p + shift
    swap_heads: bool = False  # KV heads read each other's draft heads
    drop_tail: bool = False  # draft tokens do not see the ones before them
    drop_carried: bool = False  # the previous draft-extend's row is not pooled

    def budget(self, context: int) -> int:
        return min(context, max(self.floor, self.sink + self.recent, math.ceil(self.keep * context - 1e-9)))


@dataclass
class Trace:
    """Output tokens, verify rounds, and selections whose k-th score has a neighbour within 1e-5."""

    tokens: list[int] = field(default_factory=list)
    rounds: int = 0
    near_ties: int = 0
    selected: int = 0
    available: int = 0


class Oracle:
    """A target and a draft from folders, float32, eager attention."""

    def __init__(self, target: Path, draft: Path):
        self.target = _load(target)
        self.draft = _load(draft)
        self._masks: list[torch.Tensor] = []
        for i, layer in enumerate(self.target.model.layers):
            layer.self_attn.register_forward_pre_hook(self._mask_hook(i), with_kwargs=True)

    def generate(self, prompt: list[int], new_tokens: int, rule: Rule) -> Trace:
        """Greedy continuation of `prompt` by exactly `new_tokens` (EOS ignored)."""
        trace = Trace()
        tokens = list(prompt)
        rows = _Rows(self.target.config, len(prompt) + new_tokens + rule.num_steps + 1)
        tokens.append(self._target_argmax(tokens, rows, len(prompt))[-1])  # prefill is dense
        while len(tokens) - len(prompt) < new_tokens:
            length = len(tokens) - 1  # committed; the last token is the bonus, verify row 0
            drafted, attention = self._draft_round(tokens, rule)
            self._select(rows, attention, length, rule, trace)
            predicted = self._target_argmax(tokens + drafted, rows, length)
            accepted = 0
            while accepted < rule.num_steps and drafted[accepted] == predicted[accepted]:
                accepted += 1
            tokens += predicted[: accepted + 1]
            trace.rounds += 1
        trace.tokens = tokens[len(prompt) :][:new_tokens]
        return trace

    @torch.no_grad()
    def _draft_round(self, tokens: list[int], rule: Rule) -> tuple[list[int], list[torch.Tensor]]:
        """Draft tokens, and per draft layer the attention [heads, rows, keys] of the round's rows.

        A draft does not see token 0. The first row is the bonus token's (from draft-extend), then one
        for every draft token that runs, which the last does not.
        """
        length, drafted = len(tokens) - 1, []
        for _ in range(rule.num_steps):
            out = self.draft(torch.tensor([tokens[1:] + drafted]), output_attentions=True)
            drafted.append(int(out.logits[0, -1].argmax()))
        first = length - 1 + (1 if rule.drop_carried else 0)
        return drafted, [a[0][:, first:] for a in out.attentions]

    def _select(self, rows: _Rows, attention, length: int, rule: Rule, trace: Trace) -> None:
        """Fill the mask rows [length, length + T) of every layer and head."""
        config, draft = self.target.config, self.draft.config
        kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        for layer in range(config.num_hidden_layers):
            source = attention[layer * draft.num_hidden_layers // config.num_hidden_layers]
            for h in range(kv_heads):
                speaker = kv_heads - 1 - h if rule.swap_heads else h
                first = speaker * draft.num_attention_heads // kv_heads
                last = -(-(speaker + 1) * draft.num_attention_heads // kv_heads)
                score = source[first:last].amax(dim=(0, 1))
                chosen = self._top(score, length, rule, trace)
                trace.selected += len(chosen)
                trace.available += length
                rows.allow(layer, slice(h * group, (h + 1) * group), length, chosen, rule)

    @staticmethod
    def _top(score: torch.Tensor, length: int, rule: Rule, trace: Trace) -> list[int]:
        forced = set(range(min(rule.sink, length))) | set(range(max(length - rule.recent, 0), length))
        free = [p for p in range(length) if p not in forced]
        value = {p: float(score[p - rule.shift]) for p in free}
        ranked = sorted(free, key=lambda p: (-value[p], -p))
        count = rule.budget(length) - len(forced)
        if 0 < count < len(ranked):
            inside, outside = value[ranked[count - 1]], value[ranked[count]]
            trace.near_ties += inside - outside <= 1e-5 * inside
        return sorted(forced | set(ranked[: max(count, 0)]))

    @torch.no_grad()
    def _target_argmax(self, tokens: list[int], rows: _Rows, start: int) -> list[int]:
        """Greedy predictions after the tokens from `start - (prefill: 1)` on."""
        self._masks = rows.masks(len(tokens))
        logits = self.target(torch.tensor([tokens])).logits[0]
        return logits[min(start, len(tokens) - 1) :].argmax(-1).tolist()

    def _mask_hook(self, layer: int):
        def hook(module, args, kwargs):
            return args, {**kwargs, "attention_mask": self._masks[layer]}

        return hook


class _Rows:
    """allowed[layer, head, i, j]: token i attended to token j when it was processed."""

    def __init__(self, config, size: int):
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        self.allowed = causal.repeat(config.num_hidden_layers, config.num_attention_heads, 1, 1)

    def allow(self, layer: int, heads: slice, length: int, chosen: list[int], rule: Rule) -> None:
        for row in range(length, length + rule.num_steps + 1):
            allowed = torch.zeros(self.allowed.shape[-1], dtype=torch.bool)
            allowed[chosen] = True
            allowed[row if rule.drop_tail else length : row + 1] = True
            self.allowed[layer, heads, row] = allowed

    def masks(self, size: int) -> list[torch.Tensor]:
        """Additive masks [1, heads, size, size] per layer."""
        floor = torch.finfo(torch.float32).min
        return [torch.where(a[None, :, :size, :size], 0.0, floor) for a in self.allowed]


def _load(path: Path):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
