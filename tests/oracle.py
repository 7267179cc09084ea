"""Speculative decoding with draft-guided sparse verify, in plain Hugging Face attention.

An independent statement of the method for STANDALONE drafts and EAGLE-3 heads, chains and trees: no KV
cache, no slots, no batches. Every round runs the whole sequence through the models. The target's layers
get one mask a head, whose row i is what token i attended to when it was processed, so the keys and
values of earlier tokens are those that the sparse server would have cached.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, rms_norm, silu
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

FLOOR = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Rule:
    """What the server is told, and the ways in which a negative control deviates from it."""

    keep: float = 1.0
    floor: int = 0
    sink: int = 4
    recent: int = 64
    num_steps: int = 3
    topk: int = 1
    num_tokens: int = 4
    pool: str = "max"
    shift: int = 1  # draft index p is target position p + shift
    swap_heads: bool = False  # KV heads read each other's draft heads
    drop_tail: bool = False  # draft tokens do not see the ones before them
    drop_carried: bool = False  # the previous draft-extend's row is not pooled
    # (draft index, token): the last draft key of a matched prefix was made for the donor's next token,
    # and SGLang's STANDALONE draft does not write it again.
    donor: tuple[int, int] | None = None
    swapped_ties: frozenset[tuple] = frozenset()  # near ties decided the other way
    history: str = "off"
    history_weight: float = 0.05
    history_decay: float = 0.9
    spread: float = 0.5  # part of a token's score that the next one has at least
    spread_over: int = 1  # times, each from what the one before made
    # "steps": draft steps after the first attend to the selection; "all": so does the draft-extend of what
    # was accepted; "every": and the first step, to the selection before. "extend": draft-extend alone.
    draft: str = "dense"
    refresh: int = 1  # rounds that go by one selection of a sparse draft, that which made it included
    # "tokens": by keys in short, on `directions`, a head map's field; "pages": by mean and deviation of the
    # keys of 16 tokens; "joined": they have `page_share` of a list.
    selector: str = "draft"
    directions: dict | None = None
    page_share: float = 0.5
    deviation: float = 1.0  # how much of it a page's score has
    # Share of the blocks of 128 keys that a block of 128 tokens of the prompt attends to; None: all of them.
    prefill_keep: float | None = None
    prefill_floor: int = 0
    # Whose: the target's in every layer, or the draft's, which reads a chunk first: without the row of its
    # first token, and with the key of its index p in the place of token p + prefill_shift.
    prefill_by: str = "target"
    prefill_shift: int = 1
    prefill_draft: bool = False  # the draft's rows attend to blocks that they ask for, too
    asked: int = 8  # rows of a block that say which
    last_block: bool = False  # the prompt's last block selects too
    cuts: tuple[int, ...] = ()  # where chunks begin within a block of the prompt; all of them for a draft
    dense_layers: tuple[int, ...] = ()

    def spreads(self, score: torch.Tensor) -> torch.Tensor:
        """Every row is a token further on than the one before it, and not all of them score."""
        for _ in range(self.spread_over):
            score = torch.maximum(score, torch.cat([score[:1], score[:-1] * self.spread]))
        return score

    def budget(self, context: int) -> int:
        forced = self.sink + self.recent
        if self.selector == "pages":
            forced = 16 * (-(-self.sink // 16) - (-self.recent // 16) + 2) + 15
        return min(context, max(self.floor, forced, math.ceil(self.keep * context - 1e-9)))


@dataclass
class Trace:
    """Output tokens, verify rounds, and the selections that rounding may have decided otherwise.

    A near tie, (round, draft layer, speaking head), is a selection whose k-th and next score are within
    1e-5 of each other.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rounds: int = 0
    near_ties: set[tuple] = field(default_factory=set)
    selected: int = 0
    available: int = 0
    memory: dict[tuple, float] = field(default_factory=dict)  # (layer, KV head, position) -> score
    kept: dict[tuple, list[int]] = field(default_factory=dict)  # (draft layer, speaking head) -> selected
    made: int = 0  # tokens of the context then; 0: nothing is kept
    used: int = 0  # rounds that went by it
    scored: int = 0  # rounds that selected anew


@dataclass
class Tree:
    """A round's draft: node 0 is the bonus token; attention[layer] is [heads, rows, draft keys]; allowed is
    bool [layers, heads, length], the draft keys that sparse rows attend to, or True."""

    tokens: list[int]
    parents: list[int]
    attention: list[torch.Tensor]
    allowed: torch.Tensor | bool
    scores: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # by layer and KV head

    def path(self, node: int) -> list[int]:
        """The node and its ancestors, root first."""
        return [0] if node == 0 else [*self.path(self.parents[node]), node]


class HFDraft:
    """A STANDALONE draft: a causal LM over tokens[1:]."""

    def __init__(self, path: Path):
        self.model = _load(path)
        self.layers = self.model.config.num_hidden_layers
        self.heads = self.model.config.num_attention_heads
        self.kv_heads = self.model.config.num_key_value_heads
        self._masks: list[torch.Tensor] = []
        self._choose = None  # of a running prompt whose layers select by their own queries
        self._inputs: dict[int, tuple] = {}  # of each layer's attention
        for i, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(_mask_hook(self, i), with_kwargs=True)

    def __call__(self, tokens, hidden, positions, mask):
        """`mask` bool [n, n], or [layers, heads, n, n]."""
        self._masks = [_additive(m)[None] for m in mask.expand(self.layers, self.heads, -1, -1)]
        out = self.model(
            torch.tensor([tokens]), position_ids=torch.tensor([positions]), output_attentions=True
        )
        return out.logits[0], None, [a[0] for a in out.attentions]

    def dense_row(self, row: int) -> list[torch.Tensor]:
        """[heads, n] a layer: what the row of the last call would attend to without its mask."""
        return [_causal_row(self.logits(i), row) for i in range(self.layers)]

    def logits(self, layer: int) -> torch.Tensor:
        """[heads, n, n] of a layer's input, its mask aside."""
        q, k, scale = _projected(self.model, self._inputs, layer)
        return q @ k.repeat_interleave(self.heads // self.kv_heads, 0).transpose(1, 2) * scale


class Eagle3Draft:
    """An EAGLE-3 head: one layer over (token embedding, hidden state); hidden states feed back."""

    def __init__(self, path: Path, target):
        self.config = json.loads((path / "config.json").read_text())
        self.w = {k: w.float() for k, w in load_file(path / "model.safetensors").items()}
        self.target = target
        self.layers, self.heads = 1, self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.aux_layers = self.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        self._choose = None

    def __call__(self, tokens, hidden, positions, mask):
        w, heads, dim = self.w, self.heads, self.config["head_dim"]
        embed = self.target.model.embed_tokens(torch.tensor(tokens))
        x = torch.cat(
            [self._norm(embed, "midlayer.input_layernorm"), self._norm(hidden, "midlayer.hidden_norm")], -1
        )
        q, k, v = (
            linear(x, w[f"midlayer.self_attn.{n}_proj.weight"]).view(len(tokens), -1, dim).transpose(0, 1)
            for n in "qkv"
        )
        cos, sin = self.target.model.rotary_emb(x, torch.tensor([positions]))
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        group = heads // k.shape[1]
        mask = mask.expand(1, heads, -1, -1)[0]
        self._logits = q[0] @ k[0].repeat_interleave(group, 0).transpose(1, 2) * dim**-0.5
        self._masks = [_additive(mask)[None]]
        if self._choose is not None:
            self._choose(0)
        attention = (self._logits + self._masks[0][0]).softmax(-1)
        mixed = (attention @ v.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)
        residual = hidden + linear(mixed, w["midlayer.self_attn.o_proj.weight"])
        x = self._norm(residual, "midlayer.post_attention_layernorm")
        gate, up = (linear(x, w[f"midlayer.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        out = residual + linear(silu(gate) * up, w["midlayer.mlp.down_proj.weight"])
        return linear(self._norm(out, "norm"), w["lm_head.weight"]), out, [attention]

    def dense_row(self, row: int) -> list[torch.Tensor]:
        return [_causal_row(self._logits, row)]

    def logits(self, layer: int) -> torch.Tensor:
        return self._logits

    def project(self, aux: list[torch.Tensor]) -> torch.Tensor:
        """The target's hidden states after the aux layers to the head's input."""
        return linear(torch.cat([aux[i + 1] for i in self.aux_layers], -1), self.w["fc.weight"])

    def _norm(self, x, name):
        return rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.config["rms_norm_eps"])


class Oracle:
    """A target from a folder and a draft (HFDraft folder, or an EAGLE-3 folder), float32. Without a draft a
    round is one token, whose queries select."""

    def __init__(self, target: Path, draft: Path | None = None):
        self.target, self.draft = _load(target), None
        if draft is not None:
            self.draft = self._load_draft(draft)
        self._masks: list[torch.Tensor] = []
        self._choose = None  # of a running verify whose layers select by their own queries
        self._read: list[torch.Tensor] = []  # [heads, n, n] a layer, what a draft attends to in a prompt
        self._inputs: dict[int, tuple] = {}
        for i, layer in enumerate(self.target.model.layers):
            layer.self_attn.register_forward_pre_hook(_mask_hook(self, i), with_kwargs=True)

    def _load_draft(self, draft: Path) -> HFDraft | Eagle3Draft:
        eagle3 = json.loads((draft / "config.json").read_text())["architectures"] == [
            "LlamaForCausalLMEagle3"
        ]
        return Eagle3Draft(draft, self.target) if eagle3 else HFDraft(draft)

    def agree(self, tokens: list[int], prompt: list[int], rule: Rule, memory: dict | None = None) -> Trace:
        """The trace that explains a server's `tokens`, which may decide near ties as it likes.

        Raises AssertionError when no decision of them does.
        """
        tried: set[frozenset] = set()
        open_ = [frozenset()]
        while open_ and len(tried) < 64:
            swapped = open_.pop()
            tried.add(swapped)
            trace = self.generate(prompt, len(tokens), replace(rule, swapped_ties=swapped), memory, tokens)
            if trace.tokens == tokens:
                return trace
            more = (swapped | {tie} for tie in sorted(trace.near_ties - swapped, key=str))
            open_ += [ties for ties in more if ties not in tried]
        raise AssertionError(
            f"the oracle says {trace.tokens}, not {tokens}; {len(tried)} decisions of near ties tried"
        )

    def disagrees(self, answers: list[list[int]], prompts: list[list[int]], rule: Rule) -> bool:
        """Whether it says something else than these tokens to any of the prompts, of which short ones are
        asked first."""
        return any(
            self.generate(ids, len(tokens), rule, until=tokens).tokens != tokens
            for ids, tokens in sorted(zip(prompts, answers, strict=True), key=lambda pair: len(pair[0]))
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        new_tokens: int,
        rule: Rule,
        memory: dict | None = None,
        until: list[int] | None = None,
    ) -> Trace:
        """Greedy continuation of `prompt` by exactly `new_tokens` (EOS ignored), or by fewer where they are
        no longer those of `until`.

        `memory` is what an earlier request over a common prefix left for the positions of the prefix.
        """
        trace, config = Trace(memory=dict(memory or {})), self.target.config
        size = len(prompt) + new_tokens + rule.num_tokens + 1
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        seen = causal.repeat(config.num_hidden_layers, config.num_attention_heads, 1, 1)
        if self.draft is not None:
            draft_seen = causal.expand(self.draft.layers, self.draft.heads, -1, -1)
            sparse = rule.draft in ("extend", "all", "every") or rule.prefill_draft
            draft_seen = draft_seen.clone() if sparse else draft_seen
        tokens = list(prompt)
        if rule.prefill_keep is not None:
            if rule.prefill_by == "draft":
                self._read_first(tokens, [], draft_seen, rule, trace)
            self._choose = lambda layer: self._choose_blocks(layer, len(prompt), seen, rule, trace)
        logits, hidden = self._run_target(tokens, list(range(len(tokens))), seen)
        self._choose = None
        tokens.append(self._emit(trace, logits[-1]))
        if rule.prefill_draft and rule.prefill_by == "target":
            self._read_first(tokens, hidden, draft_seen, rule, trace)
        while (done := len(tokens) - len(prompt)) < new_tokens:
            if until is not None and tokens[len(prompt) :] != until[:done]:
                break
            length = len(tokens) - 1  # committed; the last token is the bonus, verify row 0
            if self.draft is None:
                tree = Tree([tokens[-1]], [0], attention=[], allowed=True)
            else:
                tree = self._draft_round(tokens, hidden, rule, trace, draft_seen[..., :length, :length])
            rows = self._mask_rows(tree, length, seen, rule, trace)
            logits, hidden = self._verify(tokens, tree, rows, seen, rule, trace)
            path = self._walk(tree, logits)
            for depth, node in enumerate(path):
                tokens.append(self._emit(trace, logits[node]))
                seen[:, :, length + depth] = causal[length + depth]
                seen[:, :, length + depth, :length] = rows[:, :, node, :length]
                if rule.drop_tail:
                    seen[:, :, length + depth, length : length + depth] = False
                if self.draft is not None and draft_seen.is_contiguous():
                    draft_seen[:, :, length + depth, :length] = tree.allowed
            hidden = [torch.cat([h[:length], h[length:][path]]) for h in hidden]
            trace.rounds += 1
        trace.tokens = tokens[len(prompt) :][:new_tokens]
        trace.logprobs = trace.logprobs[:new_tokens]
        return trace

    def _read_first(
        self, tokens: list[int], hidden: list[torch.Tensor], seen: torch.Tensor, rule: Rule, trace: Trace
    ) -> None:
        """Let the draft read a prompt, before its first round or before the target does."""
        ids, draft = self._draft_ids(tokens, rule), self.draft
        states = draft.project(hidden) if isinstance(draft, Eagle3Draft) else None
        length = len(ids) + (1 if rule.prefill_by == "draft" else 0)
        self._read = []
        draft._choose = lambda layer: self._choose_of_draft(layer, length, seen, rule, trace)
        draft(ids, states, list(range(len(ids))), seen[..., : len(ids), : len(ids)])
        draft._choose = None

    def _choose_of_draft(self, layer: int, length: int, seen: torch.Tensor, rule: Rule, trace: Trace) -> None:
        """Before a layer of the draft attends to the prompt: what its rows would attend to, and what those of
        every block see of the blocks before it, by the draft's own numbers."""
        draft, by_draft = self.draft, rule.prefill_by == "draft"
        logits = draft.logits(layer)
        causal = torch.ones(logits.shape[1:], dtype=torch.bool).tril()
        dense = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        self._read.append(dense)
        if not rule.prefill_draft:
            return
        group = draft.heads // draft.kv_heads
        for first, last, asked in self._asking(length, rule):
            for h in range(draft.kv_heads):
                heads = slice(h * group, (h + 1) * group)
                said = dense[heads, [row - by_draft for row in asked]]
                if by_draft:  # asked for the target's tokens, a position before them
                    said = torch.cat([torch.zeros(*said.shape[:2], rule.prefill_shift), said], -1)
                unseen = self._unseen(_by_blocks(said, first), rule, trace, ("draft", layer, h, first))
                for block in unseen:
                    keys = slice(block * 128, block * 128 + 128)
                    seen[layer, heads, first:last, keys] = False
                    draft._masks[layer][0, heads, first:last, keys] = FLOOR

    @staticmethod
    def _draft_ids(tokens: list[int], rule: Rule) -> list[int]:
        """What the draft has read of these."""
        ids = tokens[1:]
        if rule.donor:
            ids[rule.donor[0]] = rule.donor[1]
        return ids

    def _draft_round(
        self, tokens: list[int], hidden: list[torch.Tensor], rule: Rule, trace: Trace, mask: torch.Tensor
    ) -> Tree:
        """Expand `topk` branches for `num_steps` steps and keep the best num_tokens - 1 candidates.

        A draft does not see token 0. Branch b of step i attends to the committed tokens and to what ran
        in branch b before it (its scratch slots), whichever parent it continues; the last step's tokens
        do not run. `mask` is [layers, heads, length, length], of the committed tokens.
        """
        k, length = rule.topk, len(tokens) - 1
        ids, positions = self._draft_ids(tokens, rule), list(range(length))
        states = self.draft.project(hidden) if isinstance(self.draft, Eagle3Draft) else None
        logits, out, attention = self.draft(ids, states, positions, mask)
        scores, chosen = logits[-1:].softmax(-1).topk(k)
        scores, chosen = scores[0], chosen[0]
        candidates = [(float(s), int(t), -1) for s, t in zip(scores, chosen, strict=True)]
        branch_nodes, branch_tokens = list(range(k)), chosen.tolist()
        parent_rows = [length - 1] * k
        kept, scored, allowed = length - 1 + (1 if rule.drop_carried else 0), None, True
        early = rule.draft not in ("dense", "extend")  # selects after its first step
        keeps = early and trace.made > 0 and trace.used < rule.refresh
        whole = [length - 1]  # rows that score the whole context, whatever they attended to themselves
        if keeps or (rule.draft == "every" and trace.made > 0):
            trace.used += 1
            allowed = self._allowed(None, length, rule, trace)
            assert k == 1 or keeps, "a dense row would see the branches before it"
            whole.append(length)
        if not keeps:
            trace.kept, trace.used, few = {}, 1, rule.budget(length) < length
            trace.made, trace.scored = length if few else 0, trace.scored + few
        for step in range(rule.num_steps - 1):
            first = len(ids)
            ids, positions = ids + branch_tokens, positions + [length + step] * k
            grown = torch.zeros(*mask.shape[:-2], first + k, first + k, dtype=torch.bool)
            grown[..., :first, :first] = mask
            for b in range(k):
                grown[..., first + b, :length] = allowed
                grown[..., first + b, [length + i * k + b for i in range(step + 1)]] = True
            mask = grown
            if states is not None:
                states = torch.cat([states, out[parent_rows]])
            logits, out, attention = self.draft(ids, states, positions, mask)
            if early and step == 0 and not keeps:
                for place in whole:
                    for found, row in zip(attention, self.draft.dense_row(place), strict=True):
                        found[:, place] = row
                scored = [a[:, kept:] for a in attention]
                allowed = self._allowed(scored, length, rule, trace)
            probs, nexts = logits[first:].softmax(-1).topk(k)
            expanded = scores[:, None] * probs
            base = len(candidates)
            candidates += [
                (float(expanded[b, j]), int(nexts[b, j]), branch_nodes[b]) for b in range(k) for j in range(k)
            ]
            scores, flat = expanded.flatten().topk(k)
            branch_nodes = [base + int(f) for f in flat]
            branch_tokens = nexts.flatten()[flat].tolist()
            parent_rows = [first + int(f) // k for f in flat]
        if rule.draft == "extend":
            for found, row in zip(attention, self.draft.dense_row(length - 1), strict=True):
                found[:, length - 1] = row
            allowed = self._allowed([a[:, kept:] for a in attention], length, rule, trace)
        best = sorted(sorted(range(len(candidates)), key=lambda c: -candidates[c][0])[: rule.num_tokens - 1])
        node = {-1: 0, **{c: n + 1 for n, c in enumerate(best)}}
        return Tree(
            tokens=[tokens[-1], *(candidates[c][1] for c in best)],
            parents=[0, *(node[candidates[c][2]] for c in best)],
            attention=[a[:, kept:] for a in attention] if scored is None else scored,
            allowed=allowed,
        )

    def _allowed(
        self, scored: list[torch.Tensor] | None, length: int, rule: Rule, trace: Trace
    ) -> torch.Tensor:
        """bool [layers, heads, length]: the draft keys that each draft head's later steps attend to, given
        what the rows so far attended to, or by what is kept. Tokens are chosen as for verify, by the heads of
        one KV head; the bonus token's key, the last, stands in for the one that the first token lacks."""
        group = self.draft.heads // self.draft.kv_heads
        allowed = torch.zeros(self.draft.layers, self.draft.heads, length, dtype=torch.bool)
        for layer in range(self.draft.layers):
            for h in range(self.draft.kv_heads):
                heads, score = slice(h * group, (h + 1) * group), None
                if scored is not None:
                    spoken = scored[layer][heads]
                    score = spoken.amax((0, 1)) if rule.pool == "max" else spoken.mean((0, 1))
                chosen = self._chosen(score, length, rule, trace, (layer, h))
                allowed[layer, heads, [p - 1 if p else length - 1 for p in chosen]] = True
        return allowed

    def _mask_rows(
        self, tree: Tree, length: int, seen: torch.Tensor, rule: Rule, trace: Trace
    ) -> torch.Tensor:
        """bool [layers, heads, T, length + T]: what every node of the tree attends to in verify."""
        count = len(tree.tokens)
        rows = torch.zeros(*seen.shape[:2], count, length + count, dtype=torch.bool)
        if self.draft is not None:
            self._by_draft(tree, length, rows, rule, trace)
        for node in range(count):
            path = [node] if rule.drop_tail else tree.path(node)
            rows[:, :, node, [length + n for n in path]] = True
        return rows

    def _by_draft(self, tree: Tree, length: int, rows: torch.Tensor, rule: Rule, trace: Trace) -> None:
        """Write what the draft chooses, or note its scores for what chooses by them later."""
        config, draft = self.target.config, self.draft
        kv_heads = config.num_key_value_heads
        group = config.num_attention_heads // kv_heads
        for layer in range(config.num_hidden_layers):
            draft_layer = layer * draft.layers // config.num_hidden_layers
            source = tree.attention[draft_layer]
            for h in range(kv_heads):
                speaker = kv_heads - 1 - h if rule.swap_heads else h
                first = speaker * draft.heads // kv_heads
                last = -(-(speaker + 1) * draft.heads // kv_heads)
                spoken = source[first:last]
                score = spoken.amax((0, 1)) if rule.pool == "max" else spoken.mean((0, 1))
                if trace.used == 1:
                    score = self._blend(score, (layer, h), length, rule, trace)
                if rule.selector != "draft":
                    tree.scores[layer, h] = score
                    continue
                chosen = self._chosen(score, length, rule, trace, (draft_layer, speaker))
                trace.selected += len(chosen)
                trace.available += length
                rows[layer, h * group : (h + 1) * group, :, chosen] = True

    @staticmethod
    def _blend(score: torch.Tensor, head: tuple, length: int, rule: Rule, trace: Trace) -> torch.Tensor:
        """Mix memory into the draft's scores (by draft index), then remember this round."""
        if rule.history == "off":
            return score
        weight = rule.history_weight if rule.history == "blend" or trace.rounds == 0 else 0.0
        mixed = score.clone()
        for position in range(1, length):
            key, fresh = (*head, position), float(score[position - rule.shift])
            remembered = trace.memory.get(key)
            if remembered is not None:
                mixed[position - rule.shift] = (1 - weight) * fresh + weight * remembered
            trace.memory[key] = max(fresh, (remembered or 0.0) * rule.history_decay)
        return mixed

    def _chosen(
        self, score: torch.Tensor | None, length: int, rule: Rule, trace: Trace, head: tuple
    ) -> list[int]:
        """The best, or in a round that selects nothing anew what an earlier one chose and all that came
        since."""
        if trace.used > 1:
            return sorted({*trace.kept[head], *range(trace.made, length)})
        found = self._top(score, length, rule, trace, (trace.rounds, *head))
        trace.kept[head] = found
        return found

    @staticmethod
    def _top(score: torch.Tensor, length: int, rule: Rule, trace: Trace, tie: tuple) -> list[int]:
        score = rule.spreads(score)
        forced = set(range(min(rule.sink, length))) | set(range(max(length - rule.recent, 0), length))
        free = [p for p in range(length) if p not in forced]
        scores = score.tolist()
        value = {p: scores[p - rule.shift] for p in free}
        ranked = sorted(free, key=lambda p: (-value[p], -p))
        count = rule.budget(length) - len(forced)
        if 0 < count < len(ranked):
            inside, outside = value[ranked[count - 1]], value[ranked[count]]
            if inside - outside <= 1e-5 * inside:
                trace.near_ties.add(tie)
                if tie in rule.swapped_ties:
                    ranked[count - 1], ranked[count] = ranked[count], ranked[count - 1]
        return sorted(forced | set(ranked[: max(count, 0)]))

    def _verify(self, tokens, tree: Tree, rows, seen, rule: Rule, trace: Trace):
        """Logits of the tree's nodes, and the hidden states of all tokens and nodes."""
        length, count = len(tokens) - 1, len(tree.tokens)
        mask = torch.zeros(*seen.shape[:2], length + count, length + count, dtype=torch.bool)
        mask[:, :, :length, :length] = seen[:, :, :length, :length]
        mask[:, :, length:] = rows
        positions = [*range(length), *(length + len(tree.path(n)) - 1 for n in range(count))]
        if rule.selector != "draft":
            self._choose = lambda layer: self._choose_by_keys(layer, tree, length, rows, rule, trace)
        logits, hidden = self._run_target(tokens[:-1] + tree.tokens, positions, mask)
        self._choose = None
        return logits[length:], hidden

    def _choose_by_keys(self, layer: int, tree: Tree, length: int, rows, rule: Rule, trace: Trace) -> None:
        """Before a layer attends: what its nodes see of the context, by the queries that they have there."""
        (q, k, scale), kv_heads = self._projected(layer), self.target.config.num_key_value_heads
        group = q.shape[0] // kv_heads
        for h in range(kv_heads):
            heads = slice(h * group, (h + 1) * group)
            own, keys, head = q[heads, length:], k[h, :length], (layer, h)
            tokens = rule.selector == "tokens"
            logits = _by_sketches(own, keys, head, rule, trace) if tokens else _by_pages(own, keys, rule)
            score = (logits * scale).softmax(-1).amax((0, 1))
            if tokens:
                chosen = self._with_ranks(score, length, rule, trace, head)
            else:
                chosen = self._with_pages(score, tree.scores.get(head), length, rule, trace, head)
            trace.selected += len(chosen)
            trace.available += length
            rows[layer, heads, :, chosen] = True
            self._masks[layer][0, heads, length:, chosen] = 0

    def _choose_blocks(self, layer: int, length: int, seen, rule: Rule, trace: Trace) -> None:
        """Before a layer attends to the prompt: what every block of its tokens sees of those before it."""
        if layer in rule.dense_layers:
            return
        kv_heads = self.target.config.num_key_value_heads
        group = self.target.config.num_attention_heads // kv_heads
        by_draft = rule.prefill_by == "draft"
        for first, last, asked in self._asking(length, rule):
            for h in range(kv_heads):
                heads = slice(h * group, (h + 1) * group)
                said = self._said(layer, h, asked, rule) if by_draft else self._own(layer, h, asked)
                unseen = self._unseen(_by_blocks(said, first), rule, trace, ("prefill", layer, h, first))
                for block in unseen:
                    seen[layer, heads, first:last, block * 128 : block * 128 + 128] = False
                    self._masks[layer][0, heads, first:last, block * 128 : block * 128 + 128] = FLOOR

    @staticmethod
    def _asking(length: int, rule: Rule) -> Iterator[tuple[int, int, list[int]]]:
        """Blocks [first, last) of a prompt that select, and which of their tokens are asked."""
        bounds = sorted({*range(0, length, 128), *(cut for cut in rule.cuts if cut < length), length})
        for first, last in zip(bounds, bounds[1:], strict=False):
            if last <= rule.prefill_floor or (last == length and not rule.last_block):
                continue
            begins = first + 1 if rule.prefill_by == "draft" and first in (0, *rule.cuts) else first
            if begins < last:
                steps = range(1, rule.asked + 1)
                yield first, last, [begins + max(i * (last - begins) // rule.asked - 1, 0) for i in steps]

    def _own(self, layer: int, h: int, asked: list[int]) -> torch.Tensor:
        """[heads, rows, tokens]: what some rows of a layer's KV head would attend to."""
        q, k, scale = self._projected(layer)
        group = q.shape[0] // k.shape[0]
        logits = q[h * group : (h + 1) * group, asked, :] @ k[h].T * scale
        causal = torch.arange(k.shape[1]) <= torch.tensor(asked)[:, None]
        return logits.masked_fill(~causal, -torch.inf).softmax(-1)

    def _said(self, layer: int, h: int, asked: list[int], rule: Rule) -> torch.Tensor:
        """The same of the draft's heads that speak for it, by the target's tokens."""
        config, draft = self.target.config, self.draft
        source = self._read[layer * draft.layers // config.num_hidden_layers]
        speaker = config.num_key_value_heads - 1 - h if rule.swap_heads else h
        first = speaker * draft.heads // config.num_key_value_heads
        last = -(-(speaker + 1) * draft.heads // config.num_key_value_heads)
        rows = source[first:last, [token - 1 for token in asked]]
        return torch.cat([torch.zeros(*rows.shape[:2], rule.prefill_shift), rows], -1)

    @staticmethod
    def _unseen(score: torch.Tensor, rule: Rule, trace: Trace, tie: tuple) -> list[int]:
        """Of blocks with these scores, those that are not attended to."""
        number = len(score)
        forced = {*range(-(-rule.sink // 128)), *range(number - -(-rule.recent // 128), number)}
        count = max(math.ceil(rule.prefill_keep * number - 1e-6), 1 + -(-rule.recent // 128))
        if count >= number:
            return []
        ranked = sorted(set(range(number)) - forced, key=lambda j: (-float(score[j]), -j))
        count -= len(forced)
        if count:
            inside, outside = float(score[ranked[count - 1]]), float(score[ranked[count]])
            if inside - outside <= 1e-5 * inside:
                trace.near_ties.add(tie)
                if tie in rule.swapped_ties:
                    ranked[count - 1], ranked[count] = ranked[count], ranked[count - 1]
        return ranked[count:]

    def _projected(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Queries and keys [heads, tokens, dim] of a layer's input, and the scale of their products."""
        return _projected(self.target, self._inputs, layer)

    @staticmethod
    def _with_ranks(score: torch.Tensor, length: int, rule: Rule, trace: Trace, head: tuple) -> list[int]:
        """Positions of the best ranks: float16 scores by exponent and four bits. Of a rank the later win."""
        forced = {*range(min(rule.sink, length)), *range(max(length - rule.recent, 0), length)}
        free = [p for p in range(length) if p not in forced]

        def best(ranks: list[int]) -> list[int]:
            return sorted(free, key=lambda p: (-ranks[p], -p))[: max(0, rule.budget(length) - len(forced))]

        # What rounding may have put into the next rank, where that changes the choice.
        low, ranks, high = (_ranks(score * part) for part in (1 - 1e-4, 1, 1 + 1e-4))
        near = [(p, rank) for p in free for rank in {low[p], high[p]} - {ranks[p]}]
        for p, rank in near:
            tie = (trace.rounds, "tokens", *head, p)
            if set(best([*ranks[:p], rank, *ranks[p + 1 :]])) != set(best(ranks)):
                trace.near_ties.add(tie)
            if tie in rule.swapped_ties:
                ranks[p] = rank
        chosen = best(ranks)
        return sorted(forced | set(chosen))

    def _with_pages(
        self,
        pages: torch.Tensor,
        drafted: torch.Tensor | None,
        length: int,
        rule: Rule,
        trace: Trace,
        head: tuple,
    ) -> list[int]:
        """Positions of the best pages, and of the draft's best among the others under `joined`."""
        budget, rest = rule.budget(length), length % 16
        if budget >= length:
            return list(range(length))
        part = budget if rule.selector == "pages" else int(budget * rule.page_share)
        last = -(-rule.recent // 16)
        forced = {*range(-(-rule.sink // 16)), *range(length // 16 - last, length // 16)}
        number = (part - rest) // 16
        if part < 16 * (-(-rule.sink // 16) + last) + rest:
            assert rule.selector == "joined"
            number = 0
        ranked = sorted(set(range(length // 16)) - forced, key=lambda p: (-float(pages[p]), -p))
        ranked = [*forced, *ranked] if number else []
        if number and number < len(ranked):
            inside, outside = float(pages[ranked[number - 1]]), float(pages[ranked[number]])
            if inside - outside <= 1e-4 * inside and number > len(forced):
                tie = (trace.rounds, "pages", *head)
                trace.near_ties.add(tie)
                if tie in rule.swapped_ties:
                    ranked[number - 1], ranked[number] = ranked[number], ranked[number - 1]
        positions = [page * 16 + i for page in ranked[:number] for i in range(16)]
        if rule.selector == "pages":
            return [*positions, *range(length // 16 * 16, length)]
        score = rule.spreads(drafted).clone()
        score[[p - rule.shift for p in positions if p >= rule.shift]] = 2.0  # above every probability
        return self._top(score, length, replace(rule, spread=0.0), trace, (trace.rounds, "joined", *head))

    @staticmethod
    def _walk(tree: Tree, logits: torch.Tensor) -> list[int]:
        """Accepted nodes, root first."""
        path = [0]
        while True:
            wanted = int(logits[path[-1]].argmax())
            children = [n for n in range(1, len(tree.tokens)) if tree.parents[n] == path[-1]]
            match = [n for n in children if tree.tokens[n] == wanted]
            if not match:
                return path
            path.append(match[0])

    def _run_target(self, tokens, positions, mask):
        self._masks = [_additive(m)[None, :, : len(tokens), : len(tokens)] for m in mask]
        out = self.target(
            torch.tensor([tokens]), position_ids=torch.tensor([positions]), output_hidden_states=True
        )
        return out.logits[0], [h[0] for h in out.hidden_states]

    @staticmethod
    def _emit(trace: Trace, logits: torch.Tensor) -> int:
        token = int(logits.argmax())
        trace.logprobs.append(float(logits.log_softmax(-1)[token]))
        return token


def _mask_hook(owner: Oracle | HFDraft, layer: int):
    """Gives a layer the mask that its owner holds for it."""

    def hook(module, args, kwargs):
        owner._inputs[layer] = (kwargs["hidden_states"], kwargs["position_embeddings"])
        if getattr(owner, "_choose", None) is not None:
            owner._choose(layer)
        return args, {**kwargs, "attention_mask": owner._masks[layer]}

    return hook


def _projected(model, inputs: dict[int, tuple], layer: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries and keys [heads, tokens, dim] of what a layer's attention was given, and the scale."""
    hidden, rotary = inputs[layer]
    attn = model.model.layers[layer].self_attn
    q, k = (p(hidden).view(*hidden.shape[:2], -1, attn.head_dim).transpose(1, 2) for p in
            (attn.q_proj, attn.k_proj))  # fmt: skip
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    return q[0], k[0], attn.head_dim**-0.5


def _by_blocks(said: torch.Tensor, first: int) -> torch.Tensor:
    """The largest share of the attention [heads, rows, tokens] that blocks of 128 before a token have."""
    return said[..., : first // 128 * 128].unflatten(-1, (first // 128, 128)).sum(-1).amax((0, 1))


def _by_pages(q: torch.Tensor, keys: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Products of queries [heads, nodes, dim] and complete pages of keys [tokens, dim], but for the scale."""
    pages = keys[: len(keys) // 16 * 16].view(-1, 16, keys.shape[1])
    return q @ pages.mean(1).T + q.abs() @ pages.std(1, correction=0).T * rule.deviation


def _by_sketches(
    q: torch.Tensor, keys: torch.Tensor, head: tuple[int, int], rule: Rule, trace: Trace
) -> torch.Tensor:
    """The same of single tokens, whose keys are at most seven whole steps along the directions of a head, and
    whose queries are whole steps too, of which 127 are the largest value of each."""
    layer, h = head
    own = base64.b64decode(rule.directions["heads"][layer][h])
    own = torch.frombuffer(bytearray(own), dtype=torch.float16).view(keys.shape[1] + 2, -1).float()
    turned, mean, step = own[:-2], own[-2], own[-1]
    places = torch.floor((keys @ turned - mean) / step + 0.5).clamp(-7, 7)
    wanted = q @ turned * step
    unit = wanted.abs().amax(-1, keepdim=True) / 127
    wanted = wanted / unit
    whole = torch.floor(wanted + 0.5)
    for place in (wanted - wanted.floor() - 0.5).abs().lt(1e-4).nonzero().tolist():
        tie = (trace.rounds, "query", *head, *place)
        trace.near_ties.add(tie)
        if tie in rule.swapped_ties:
            whole[tuple(place)] += 1 if whole[tuple(place)] < wanted[tuple(place)] else -1
    return (whole * unit) @ places.T


def _ranks(score: torch.Tensor) -> list[int]:
    return ((score * 2**14).half().view(torch.int16) >> 6).tolist()


def _causal_row(logits: torch.Tensor, row: int) -> torch.Tensor:
    """[heads, n] of logits [heads, n, n]: softmax of a row over the keys up to it."""
    found = torch.zeros_like(logits[:, row])
    found[:, : row + 1] = logits[:, row, : row + 1].softmax(-1)
    return found


def _additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, 0.0, FLOOR)


def _load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
