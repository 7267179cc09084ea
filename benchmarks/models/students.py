"""The draft and the EAGLE-3 head, distilled from the target while it trains or after.

SGLang runs a draft on the tokens from the second on, so the draft's row i is the target's row i + 1, and
its slot i holds what the target holds at position i + 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from model import (
    DRAFT,
    TARGET,
    Attention,
    Config,
    FeedForward,
    Llama,
    Trace,
    feed_forward,
    initialise,
    matmul,
    norm,
    project,
    soft_losses,
)
from tasks import ANSWER, TEXT
from torch import Tensor, nn

AUX_LAYERS = (1, 4, 6)  # target layers whose output the EAGLE-3 head reads
STEPS = 3  # tokens the head is trained to draft in a row
SINK, RECENT = 4, 64  # always kept by the sparse attention, so not worth predicting
ANSWER_WEIGHT = 1.5
CONCENTRATED = 0.03  # share of the context that a head of the target may look at for free
EAGLE_STEP_WEIGHTS = (1.0, 0.8, 0.6)


class EagleLayer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, 2 * c.hidden_size), FeedForward(c)
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(c.hidden_size) for _ in range(3)
        )


class EagleHead(nn.Module):
    def __init__(self, c: Config = TARGET, aux: tuple[int, ...] = AUX_LAYERS):
        super().__init__()
        self.config, self.aux, self.midlayer = c, aux, EagleLayer(c)
        self.fc = nn.Linear(len(aux) * c.hidden_size, c.hidden_size, bias=False)
        self.norm = nn.RMSNorm(c.hidden_size)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        initialise(self, 1)

    def qkv(
        self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer, eps = self.midlayer, self.config.rms_norm_eps
        x = torch.cat(
            [norm(embedded, layer.input_layernorm.weight, eps), norm(hidden, layer.hidden_norm.weight, eps)],
            -1,
        )
        return project(x, *layer.self_attn.qkv_weights(), cos, sin)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        layer = self.midlayer
        x = hidden + matmul(attended, layer.self_attn.o_proj.weight)
        return x + feed_forward(
            norm(x, layer.post_attention_layernorm.weight, self.config.rms_norm_eps), *layer.mlp.weights()
        )

    def chains(
        self,
        target: Llama,
        ids: Tensor,
        states: list[Tensor],
        roots: Tensor,
        steps: int = STEPS,
        seen: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """From each root position p [B, r]: states [B*r, H] that predict tokens p+2, p+3, ... of `ids`.

        To `seen` each step adds what it attended to: float32 [B, kv, group, r, L] of the keys up to the root.
        """
        B, L = ids.shape
        embedded = F.embedding(ids.roll(-1, 1).flatten(), target.model.embed_tokens.weight.detach()).to(
            states[0].dtype
        )
        hidden = matmul(torch.cat([states[i] for i in self.aux], -1).detach(), self.fc.weight)
        q, k, v = self.qkv(embedded, hidden, *target.rope(torch.arange(L, device=ids.device).repeat(B)))
        keys, values = (t.unflatten(0, (B, L)) for t in (k, v))
        q, hidden = take(q, roots), take(hidden, roots).flatten(0, 1)
        after = torch.arange(L, device=ids.device) > roots[..., None]  # [B, r, L]
        extra: list[tuple[Tensor, Tensor]] = []
        chain = []
        for step in range(steps):
            p = chain_probabilities(q, keys, after, extra)
            if seen is not None:
                seen.append(p[..., :L])
            hidden = self.finish(hidden, attend_chain(p.to(values.dtype), values, extra))
            chain.append(hidden)
            if step + 1 < steps:
                token = take(ids.flatten(), roots + step + 2, B).flatten()
                embedded = F.embedding(token, target.model.embed_tokens.weight.detach()).to(hidden.dtype)
                q, k, v = self.qkv(embedded, hidden, *target.rope((roots + step + 1).flatten()))
                q, k, v = (t.unflatten(0, roots.shape) for t in (q, k, v))
                extra.append((k, v))
        return chain


def take(x: Tensor, index: Tensor, rows: int | None = None) -> Tensor:
    """x [B*L, ...] at positions index [B, r] of each row."""
    B = rows or index.shape[0]
    return x.unflatten(0, (B, -1))[torch.arange(B, device=index.device)[:, None], index]


def grouped(q: Tensor, kv_heads: int) -> Tensor:  # [B, r, heads, D] -> [B, r, kv, group, D]
    return q.unflatten(2, (kv_heads, -1))


def chain_probabilities(q: Tensor, keys: Tensor, after: Tensor, extra: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of queries [B, r, heads, D] over what precedes their root and n drafted tokens: float32
    [B, kv, group, r, L + n]."""
    q = grouped(q, keys.shape[2]) * q.shape[-1] ** -0.5
    scores = torch.einsum("brhgd,blhd->bhgrl", q, keys).masked_fill(after[:, None, None], -torch.inf)
    own = [torch.einsum("brhgd,brhd->bhgr", q, k)[..., None] for k, _ in extra]
    return torch.cat([scores, *own], -1).softmax(-1, dtype=torch.float32)


def attend_chain(p: Tensor, values: Tensor, extra: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What those probabilities make of the values: [B*r, heads*D]."""
    L = values.shape[1]
    out = torch.einsum("bhgrl,blhd->brhgd", p[..., :L], values)
    for i, (_, v) in enumerate(extra):
        out = out + p[..., L + i].permute(0, 3, 1, 2)[..., None] * v[:, :, :, None]
    return out.flatten(2).flatten(0, 1)


def sample_rows(kinds: Tensor, r: int) -> Tensor:
    """r positions of each row, sorted, mostly those that predict answers; kinds [B, L] of the labels."""
    weight = torch.full(kinds.shape, 0.05, device=kinds.device)
    weight[kinds == TEXT], weight[kinds == ANSWER] = 1.0, 20.0
    weight[:, 0], weight[:, -STEPS - 3 :] = 0.0, 0.0
    return torch.multinomial(weight, r).sort(1).values


def probabilities(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Attention of the given rows [B, r], mean of each KV head's group: [B, kv, r, L]."""
    B, L = rows.shape[0], k.shape[0] // rows.shape[0]
    k = k.unflatten(0, (B, L))
    scores = torch.einsum(
        "brhgd,blhd->bhgrl", grouped(take(q, rows), k.shape[2]).float() * q.shape[-1] ** -0.5, k.float()
    )
    after = torch.arange(L, device=rows.device) > rows[..., None]
    return scores.masked_fill(after[:, None, None], -torch.inf).softmax(-1).mean(2)


def attention_loss(target: Trace, draft: Trace, rows: Tensor) -> Tensor:
    """Cross entropy, outside sink and recent, of the draft's attention to that of the target heads it serves.

    The map is the proportional one: layer t reads draft layer t * L_draft // L_target, KV head by KV head.
    """
    L = target.keys[0].shape[0] // rows.shape[0]
    place = torch.arange(1, L, device=rows.device)
    far = ((place >= SINK) & (place <= rows[..., None] - RECENT))[:, None]  # [B, 1, r, L-1]
    total, mass = 0.0, 0.0
    ratio = len(target.keys) // len(draft.keys)
    for d in range(len(draft.keys)):
        with torch.no_grad():
            layers = range(d * ratio, (d + 1) * ratio)
            wanted = sum(
                probabilities(target.queries[t], target.keys[t], rows)[..., 1:] * far for t in layers
            )
        given = probabilities(draft.queries[d], draft.keys[d], rows - 1)[..., :-1] * far
        share = given / given.sum(-1, keepdim=True).clamp(min=1e-6)
        total = total - (wanted * (share + 1e-6).log()).sum()
        mass = mass + wanted.sum()
    return total / mass.clamp(min=1.0)


def tail_loss(trace: Trace, rows: Tensor) -> Tensor:
    """The target's attention outside sink and recent that its heads' top CONCENTRATED tokens do not hold.

    Without this, heads spread over so many tokens that no selection of a tenth of them could serve them."""
    L = trace.keys[0].shape[0] // rows.shape[0]
    place = torch.arange(L, device=rows.device)
    far = ((place >= SINK) & (place <= rows[..., None] - RECENT))[:, None]
    total = rows.new_zeros((), dtype=torch.float32)
    for q, k in zip(trace.queries, trace.keys, strict=True):
        p = probabilities(q, k, rows) * far
        total = total + (p.sum(-1) - p.topk(max(8, int(CONCENTRATED * L)), -1).values.sum(-1)).mean()
    return total / len(trace.keys)


def weighed(loss: Tensor, kinds: Tensor) -> Tensor:
    text, answer = (
        (loss * (kinds == kind)).sum() / (kinds == kind).sum().clamp(min=1) for kind in (TEXT, ANSWER)
    )
    return text + ANSWER_WEIGHT * answer


class Students(nn.Module):
    attention_rows = 16  # of a sequence, whose attention the draft learns

    def __init__(self, attention_weight: float = 0.3):
        super().__init__()
        self.draft, self.eagle = Llama(DRAFT), EagleHead()
        self.attention_weight = attention_weight

    def losses(
        self, target: Llama, ids: Tensor, kinds: Tensor, trace: Trace
    ) -> tuple[Tensor, dict[str, Tensor]]:
        trace = Trace(*([t.detach() for t in part] for part in trace))
        draft, values = self.draft_loss(target, ids, kinds, trace)
        eagle, more = self.eagle_loss(target, ids, kinds, trace)
        return draft + eagle, values | more

    def draft_loss(
        self, target: Llama, ids: Tensor, kinds: Tensor, trace: Trace
    ) -> tuple[Tensor, dict[str, Tensor]]:
        B, L = ids.shape
        label_kinds = kinds.roll(-2, 1)
        label_kinds[:, -2:] = 0
        own = Trace([], [], [])
        x = self.draft(ids.roll(-1, 1), own)
        teacher = trace.states[-1].unflatten(0, (B, L)).roll(-1, 1).flatten(0, 1)
        head = (target.model.norm.weight.detach(), target.model.embed_tokens.weight.detach())
        weights = (self.draft.model.norm.weight, self.draft.model.embed_tokens.weight)
        kl, agree = self.draft.fused.soft(x, *weights, teacher, *head, TARGET.rms_norm_eps)
        flat = label_kinds.flatten()
        attention = kl.new_zeros(())
        if self.attention_weight and L >= 512:
            next_kinds = kinds.roll(-1, 1)
            attention = attention_loss(trace, own, sample_rows(next_kinds, self.attention_rows))
        loss = weighed(kl, flat) + self.attention_weight * attention
        return loss, {"kl": kl[flat > 0].mean(), "attention": attention, **agreement("draft", agree, flat)}

    def eagle_loss(
        self, target: Llama, ids: Tensor, kinds: Tensor, trace: Trace
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return head_loss(self.eagle, target, ids, kinds, trace)


def head_loss(
    head: EagleHead, target: Llama, ids: Tensor, kinds: Tensor, trace: Trace, words: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of an EAGLE-3 head, unrolled over STEPS tokens.

    words: int64, the target's ids that the head can draft, None for all. The teacher's distribution is that
    over `words`, and where its first choice is none of them there is nothing to learn (SpecForge).
    """
    eps = target.config.rms_norm_eps
    roots = sample_rows(kinds.roll(-2, 1), min(256, max(32, ids.shape[1] // 16)))
    chain = head.chains(target, ids, trace.states, roots)
    scale, embedding = target.model.norm.weight.detach(), target.model.embed_tokens.weight.detach()
    own = embedding if words is None else embedding[words]
    loss, values = 0.0, {}
    for step, (x, weight) in enumerate(zip(chain, EAGLE_STEP_WEIGHTS, strict=True)):
        teacher = take(trace.states[-1], roots + step + 1).flatten(0, 1)
        kl, agree = soft_losses(x, head.norm.weight, head.lm_head.weight, teacher, scale, own, eps)
        flat = take(kinds.flatten(), roots + step + 2).flatten()
        learnt = flat
        if words is not None:
            known = torch.isin(target.logits(teacher).argmax(-1), words)
            learnt, agree = flat * known, agree & known
        loss = loss + weight * weighed(kl, learnt)
        values |= agreement(f"eagle{step + 1}", agree, flat)
    return loss, values


def agreement(name: str, agree: Tensor, kinds: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}_{n}": (agree & (kinds == k)).sum() / (kinds == k).sum().clamp(min=1)
        for n, k in (("text", TEXT), ("answer", ANSWER))
    }
