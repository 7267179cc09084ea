"""Plain-torch twins of the kernels: the same signatures and results, on any device, with host loops.

The three steps of a round share these static buffers, so that a CUDA graph can record them:

* *columns*: request b owns the columns [ctx_start[b], ctx_start[b] + seq_lens[b]) of `importance`, none
  when ctx_start[b] is -1 (no room: its rows are not scored and it attends to its whole context);
* `importance`: float16 [channels, columns], probability * IMPORTANCE_SCALE of each context position
  (the twins take float32 too, where a rounding must not decide between near-equal scores);
* `kv_indices` with `kv_start` and `kv_count`: the slots each (request, channel) attends to.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from sts_kernels.checks import (
    IMPORTANCE_SCALE,
    UNKNOWN,
    check_draft,
    check_headwise,
    check_history,
    check_plan,
    check_select,
    check_sizes,
    check_spread,
    check_verify,
)

# Columns of a request start at multiples of this: the kernels' blocks of keys have one request's alone, and
# scores are read 16 bytes at a time.
ALIGN = 64
SHIFT = 1  # the draft key at index p is the target's token p + 1


class Members(NamedTuple):
    """The channels that one draft layer feeds.

    channels: int32 [n], rows of `importance`. heads: int32 [n, most], query heads of this layer, -1
    padded. scale: float32 [n], 1 / number of heads of the channel in all layers (pool_heads "mean").
    fresh: bool [n], this is the first layer to feed the channel.
    """

    channels: torch.Tensor
    heads: torch.Tensor
    scale: torch.Tensor
    fresh: torch.Tensor


class Rule(NamedTuple):
    """How many tokens are selected of a context.

    keep: share of the context, None for `budget` tokens. least: tokens that a budget has at least; forced:
    the sink and recent among them, which every list has. guard: what a product may exceed a whole number by
    before it is rounded up.
    """

    keep: float | None
    budget: int
    least: int
    forced: int
    guard: float


class Lists(NamedTuple):
    """What `size_lists` finds of a batch.

    known: int64 [bs], first column of the requests whose importance is known, else -1; sparse: the same of
    those among them that attend to less than everything. budgets: int64 [bs]. kv_start: int64 and kv_count:
    int32 [bs, channels], see the module; kv_count is -1 where the whole context is attended to.
    """

    known: torch.Tensor
    sparse: torch.Tensor
    budgets: torch.Tensor
    kv_start: torch.Tensor
    kv_count: torch.Tensor


class Plan(NamedTuple):
    """How verify attention is parted among programs, in every layer.

    work: int64 [layers, work, 4], a part of a list each: the pair b * H_kv + h; its first entry in
    kv_indices, or position where the pair attends to its whole context; its tokens; and the sum of 1, the
    whole context, 2, the list's first part, 4, its last. ends: int32 [layers, bs * H_kv + 1], where each
    pair's parts end in `work`, after a zero; what `work` has beyond the last end is undefined.
    """

    work: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def empty(cls, layers: int, pairs: int, programs: int, device: torch.device) -> Plan:
        work = torch.empty(layers, programs, 4, dtype=torch.int64, device=device)
        return cls(work, torch.empty(layers, pairs + 1, dtype=torch.int32, device=device))

    def of(self, layer: int) -> Plan:
        """One layer's."""
        return Plan(self.work[layer], self.ends[layer])


def draft_attention(
    q: torch.Tensor | None,
    carried_q: torch.Tensor | None,
    carried_len: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    ctx_start: torch.Tensor,
    step: int,
    num_steps: int,
    sm_scale: float,
    members: Members,
    importance: torch.Tensor,
    total_rows: int,
    pool_heads: str = "max",
    pool_rows: str = "max",
    plan: Plan | None = None,
) -> torch.Tensor | None:
    """One draft decode step of one layer: its attention, and its rows' importance pooled in.

    Row w of request b (a branch) attends to the committed tokens [0, L) and to its own scratch slots at
    L + w * num_steps + [0, step]. With `carried_q` the request's carried row (the last accepted token's
    query, kept from the previous draft-extend) is scored too, over [0, L), in the same read of the keys.

    Args:
        q: [bs * W, H_q, D] queries of this step, request-major, or None to score the carried row only.
        carried_q: [requests, H_q, D] by req_pool_idx, or None when it has been scored already.
        carried_len: int [requests], the committed length a carried row was made for; a row whose length
            is not seq_lens[b] is a leftover and scores 0.
        k_buffer, v_buffer: [slots, H_kv, D] draft pools.
        req_to_token, req_pool_indices, seq_lens: slots by position; requests; committed lengths L.
        ctx_start: int64 [bs] first column of each request.
        step, num_steps: this decode step and the steps of a round.
        members: channels this layer feeds.
        importance: written. A fresh member overwrites when this call scores the round's first rows
            (`carried_q` given), else it is combined with what is there by pool_rows (maximum or sum);
            a channel with heads in several layers therefore needs pool_heads == pool_rows.
        total_rows: rows of a round per request, the divisor of pool_rows "mean".
        plan: of plan_contexts, which tells a kernel how to part its work; not needed here.

    Returns:
        [bs * W, H_q, D], None without q.
    """
    check_draft(q, carried_q, k_buffer, v_buffer, members, importance, pool_heads, pool_rows)
    group = (carried_q if q is None else q).shape[1] // k_buffer.shape[1]
    branches = 0 if q is None else q.shape[0] // max(1, seq_lens.numel())
    out = None if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b, (req, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        column, probs = int(ctx_start[b]), []
        if carried_q is not None:
            row = _probabilities(carried_q[req], k_buffer, req_to_token[req, :length], sm_scale, group)
            probs.append(row if int(carried_len[req]) == length else torch.zeros_like(row))
        for w in range(branches):
            scratch = length + w * num_steps
            slots = torch.cat([req_to_token[req, :length], req_to_token[req, scratch : scratch + step + 1]])
            row = _probabilities(q[b * branches + w], k_buffer, slots, sm_scale, group)
            values = v_buffer[slots.long()].float().repeat_interleave(group, 1)  # [n, H_q, D]
            out[b * branches + w] = torch.einsum("hn,nhd->hd", row, values).to(q.dtype)
            probs.append(row[:, :length])
        if column >= 0 and members.channels.numel():
            pooled = _pool(torch.stack(probs), members, total_rows, pool_heads, pool_rows)
            _combine(importance, pooled, members, column, length, carried_q is not None, pool_rows)
    return out


def context_columns(seq_lens: torch.Tensor, columns: int) -> torch.Tensor:
    """int64 [bs] first column of each request, -1 where its context does not fit; no sync."""
    wide = (seq_lens + ALIGN - 1) // ALIGN * ALIGN
    ends = wide.cumsum(0)
    return torch.where(ends <= columns, ends - wide, -1)


def budget_tokens(seq_lens: torch.Tensor, keeps: torch.Tensor, rule: Rule) -> torch.Tensor:
    """int64 [bs] tokens to select from contexts of these lengths; keeps: float64 [bs], NaN for the rule's own
    (0.1 is too coarse in float32 to be rounded up reliably). No sync."""
    context = seq_lens.to(torch.float64)
    if rule.keep is None:
        wanted = torch.full_like(context, rule.budget)
    else:
        wanted = torch.ceil(rule.keep * context - rule.guard)
    wanted = torch.where(keeps.isnan(), wanted, torch.ceil(keeps * context - rule.guard))
    return torch.minimum(wanted.clamp(min=rule.least), context).to(torch.int64)


def size_lists(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    carried_len: torch.Tensor,
    keeps: torch.Tensor,
    rule: Rule,
    split: torch.Tensor | None,
    channels: int,
    columns: int,
    entries: int,
    counts: torch.Tensor,
    full: torch.Tensor | None = None,
    list_full: bool = False,
) -> Lists:
    """Where the lists of a verify batch lie and how long they are; no sync.

    Requests without room for their columns or for their lists attend to everything, and so do those whose
    carried row is of another length: their importance is not known. A request with a keep of its own takes
    what room the others leave.

    Args:
        seq_lens, req_pool_indices: int [bs], committed lengths and requests; request 0 pads graphs.
        carried_len: int64 [requests], the committed length that a request's carried row was made for.
        keeps: float64 [requests], NaN where the request has none of its own.
        rule: how many tokens. split: float64 [steps + 1, channels] or None: parts of the context that the
            channels keep when their mean is i / steps; in between they are interpolated.
        channels: of the head map. columns: of importance. entries: of kv_indices.
        counts: int64 [5 or more], added to: [0] requests verified sparsely, [1] densely because their
            importance is not known, [4] to attend to everything.
        full: bool [bs] or None, who is to attend to everything. list_full: they have lists all the same (a
            sparse draft goes by them).
    """
    check_sizes(seq_lens, carried_len, keeps, split, channels)
    ctx_start, keeps = context_columns(seq_lens, columns), keeps[req_pool_indices]
    full = torch.zeros_like(seq_lens, dtype=torch.bool) if full is None else full
    budgets = budget_tokens(seq_lens, keeps, rule)
    lengths = budgets[:, None].expand(-1, channels)
    if split is not None:
        lengths = _split_lengths(budgets, seq_lens, split, rule)
    known = (carried_len[req_pool_indices] == seq_lens) & (ctx_start >= 0)
    sparse = known & (budgets < seq_lens)
    if not list_full:
        sparse &= ~full
    listed = sparse[:, None] & (lengths < seq_lens[:, None])
    room = torch.where(listed, lengths, 0)
    totals = room.sum(1)
    ends = _ends(totals, ~keeps.isnan())
    known &= ends <= entries
    chosen = (req_pool_indices > 0) & ~full
    counts[0] += (known & chosen).sum()
    counts[1] += (~known & chosen).sum()
    counts[4] += (full & (req_pool_indices > 0)).sum()
    return Lists(
        torch.where(known, ctx_start, -1),
        torch.where(known & sparse, ctx_start, -1),
        budgets,
        (ends - totals)[:, None] + room.cumsum(1) - room,
        torch.where(listed & known[:, None], lengths, -1).to(torch.int32),
    )


def _split_lengths(budgets, seq_lens, split: torch.Tensor, rule: Rule) -> torch.Tensor:
    """int64 [bs, channels]: tokens that each list may have, their mean over heads being the budget."""
    context, last = seq_lens.to(torch.float64), split.shape[0] - 1
    steps = budgets / context.clamp(min=1) * last
    low = steps.long().clamp(max=last - 1)
    parts = torch.lerp(split[low], split[low + 1], (steps - low)[:, None])
    lengths = torch.ceil(parts * context[:, None] - rule.guard).long()
    return lengths.clamp(min=rule.forced).minimum(seq_lens[:, None])


def _ends(sizes: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """int64 [bs] where parts of these sizes end, those that are `later` [bs] behind all others."""
    first = torch.where(later, 0, sizes)
    return torch.where(later, first.sum() + (sizes - first).cumsum(0), first.cumsum(0))


def spread_importance(
    importance: torch.Tensor, ctx_start: torch.Tensor, seq_lens: torch.Tensor, factor: float
) -> None:
    """Every token's importance becomes at least `factor` times that of the token before it.

    A draft row says what its position reads; the row after it reads on. The last draft token has no row, and
    with sparse draft steps only two rows have scores.

    Args:
        importance: [channels, columns], read and written at positions [2, L) of every request with columns
            (position 0 has no score to pass on). Unknown (NaN) stays unknown and passes nothing on.
        ctx_start, seq_lens: [bs]. factor: above 0, at most 1.
    """
    check_spread(importance, factor)
    for start, length in zip(ctx_start.tolist(), seq_lens.tolist(), strict=True):
        if start >= 0:
            own = importance[:, start + SHIFT + 1 : start + length]
            before = importance[:, start + SHIFT : start + length - 1]
            passed = (before.float() * factor).to(importance.dtype)
            own.copy_(torch.where(passed > own, passed, own))


def select_tokens(
    importance: torch.Tensor,
    ctx_start: torch.Tensor,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    sink: int,
    recent: int,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_start: torch.Tensor,
    kv_count: torch.Tensor,
    top_p: torch.Tensor | None = None,
    draft_indices: torch.Tensor | None = None,
) -> None:
    """Slots of sink, recent and the top of importance for every (request, channel) with kv_count >= 0.

    Of equal importance the later position wins; NaN is unknown and ranks above every score. The first
    `sink` and last `recent` positions are taken whatever their importance holds.

    Args:
        importance: [channels, columns].
        ctx_start, seq_lens: columns and lengths of the requests.
        budgets: int [bs], at least sink + recent and below the context where kv_count >= 0.
        kv_start: int64 [bs, channels] first entry of each list; kv_count: int32 [bs, channels], its
            length, or -1 to attend to the whole context (nothing is written then).
        kv_indices: int32, written; the order within a list is not specified.
        top_p: float32 [bs] or None. A finite entry cuts each list of the request to the smallest one
            that holds this part of the importance at positions [1, L) (position 0 has no score), and
            writes its length to kv_count. Unknown tokens have no mass and stay in.
        draft_indices: int32 or None, written as kv_indices is: slots of the draft's keys about the same
            tokens. No draft key is about position 0; the bonus token's, which every draft row may attend to,
            takes its place.
    """
    check_select(importance, budgets, kv_start, kv_count)
    for b, (req, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        for c in range(importance.shape[0]):
            count, start = int(kv_count[b, c]), int(kv_start[b, c])
            if count < 0:
                continue
            column = int(ctx_start[b])
            scores = importance[c, column : column + length].float()
            chosen = _top(scores, count, sink, recent)
            if top_p is not None and bool(top_p[b].isfinite()):
                count = _top_p_count(scores, chosen, sink + recent, float(top_p[b]))
                kv_count[b, c], chosen = count, chosen[:count]
            kv_indices[start : start + count] = req_to_token[req, chosen].to(kv_indices.dtype)
            if draft_indices is not None:
                keys = torch.where(chosen > 0, chosen, length) - SHIFT
                draft_indices[start : start + count] = req_to_token[req, keys].to(kv_indices.dtype)


def sparse_verify_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_start: torch.Tensor,
    kv_count: torch.Tensor,
    head_channels: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_mask: torch.Tensor,
    sm_scale: float,
    attended: torch.Tensor,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Exact softmax attention of each draft token over (selected context + tail), per (request, KV head).

    Args:
        q: [bs, T, H_q, D] queries of the T draft tokens of each request; tokens may lie apart, as in a slice
            of a fused projection.
        k_buffer, v_buffer: [slots, H_kv, D] target pools.
        kv_indices, kv_start, kv_count: the lists of select_tokens; a count of -1 is the whole context.
        head_channels: int [H_kv], the channel whose list a KV head attends to.
        req_to_token, req_pool_indices, seq_lens: slots by position; requests; committed lengths L. The
            tail is at positions [L, L + N).
        tail_mask: bool [bs, T, N], row i may attend to tail token j; rows are contiguous. In verify N is T
            (causal chain or tree), in a draft step the tail is what ran in the round.
        sm_scale: scale of the logits.
        attended: int64 [2], adds the context tokens attended to and those there, per (request, KV head).
            Request slot 0 is not counted: SGLang pads the batches of CUDA graphs with it.
        plan: this layer's of `plan_verify`, which tells a kernel how to part its work; not needed here.

    Returns:
        [bs, T, H_q, D] in the dtype of q.
    """
    check_verify(q, k_buffer, v_buffer, kv_start, kv_count, head_channels, tail_mask)
    bs, tokens, q_heads, _ = q.shape
    kv_heads = k_buffer.shape[1]
    group = q_heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    channels = head_channels.tolist()
    for b, (req, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        tail = req_to_token[req, length : length + tail_mask.shape[2]].long()
        for h, channel in enumerate(channels):
            count, start = int(kv_count[b, channel]), int(kv_start[b, channel])
            selected = req_to_token[req, :length] if count < 0 else kv_indices[start : start + count]
            slots = torch.cat([selected.long(), tail])
            if req > 0:
                attended += torch.tensor([selected.numel(), length], device=attended.device)
            heads = slice(h * group, (h + 1) * group)
            mask = torch.ones(tokens, slots.numel(), dtype=torch.bool, device=q.device)
            mask[:, selected.numel() :] = tail_mask[b]
            out[b, :, heads] = scaled_dot_product_attention(
                q[b, :, heads].transpose(0, 1)[None],  # [1, G, T, D]
                k_buffer[slots, h].to(q.dtype).expand(1, group, -1, -1),
                v_buffer[slots, h].to(q.dtype).expand(1, group, -1, -1),
                attn_mask=mask,
                scale=sm_scale,
            )[0].transpose(0, 1)
    return out


def plan_verify(
    kv_start: torch.Tensor,
    kv_count: torch.Tensor,
    head_channels: torch.Tensor,
    seq_lens: torch.Tensor,
    programs: int,
    most: int,
) -> Plan:
    """Part the lists of every layer, so that programs that run side by side read about as many tokens.

    All lists of a layer are parted by the smallest share of tokens at which the parts are no more than
    `programs`; a list has one part at least, and no more than `most`.

    Args:
        kv_start, kv_count: [bs, channels], the lists of select_tokens; a count of -1 is the whole context.
        head_channels: int32 [layers, H_kv].
        seq_lens: [bs]. programs: at least bs * H_kv. most: parts of a list.
    """
    check_plan(kv_start, kv_count, head_channels)
    layers, heads = head_channels.shape
    plan = Plan.empty(layers, seq_lens.numel() * heads, programs, kv_start.device)
    for layer, channels in enumerate(head_channels.tolist()):
        begin, count = (t[:, channels].flatten().tolist() for t in (kv_start, kv_count))
        length = seq_lens.repeat_interleave(heads).tolist()
        total = [n if c < 0 else c for c, n in zip(count, length, strict=True)]

        def parts(share: int, total: list[int] = total) -> list[int]:
            return [min(max(-(-n // share), 1), most) for n in total]

        share = next((s for s in range(1, max(total, default=1)) if sum(parts(s)) <= programs), None)
        number = parts(share or max(*total, 1))
        plan.ends[layer] = torch.tensor([0, *itertools.accumulate(number)])
        work = []
        for pair, (n, tokens) in enumerate(zip(number, total, strict=True)):
            whole, start = count[pair] < 0, 0 if count[pair] < 0 else begin[pair]
            for i in range(n):
                first, end = tokens * i // n, tokens * (i + 1) // n
                work.append([pair, start + first, end - first, whole + 2 * (i == 0) + 4 * (i == n - 1)])
        plan.work[layer, : len(work)] = torch.tensor(work).view(-1, 4)
    return plan


def headwise_lists(
    kv_indices: torch.Tensor,
    kv_start: torch.Tensor,
    kv_count: torch.Tensor,
    head_channels: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    tokens: int,
    indptr: torch.Tensor,
    mask_indptr: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor,
    layers: int,
    attended: torch.Tensor,
    clipped: torch.Tensor,
) -> None:
    """Lists of one head map row for a paged attention over pools seen as [slots * H_kv, 1, 1, D].

    Every (request, KV head) pair b * H_kv + h has a list of a length that the host planned before it
    knew how many tokens are chosen: the chosen tokens, padding, then the T draft tokens. The mask hides
    the padding and lets a draft token see the chain up to itself. Padding repeats the request's first
    token: masked keys and values are read and multiplied by zero, so they must be finite.

    Args:
        kv_indices, kv_start, kv_count, head_channels, req_to_token, req_pool_indices, seq_lens: as in
            sparse_verify_attention, for a row of the head map.
        tokens: T. The tail is at positions [L, L + T).
        indptr: int32 [pairs + 1 or more], where lists start; each at least T long.
        mask_indptr: int32 [pairs + 1 or more], at which byte of `mask` a pair's bits start.
        indices: int32, written: slot * H_kv + h of every entry.
        mask: uint8, written: bit row * list length + entry, from the lowest of a byte up, rounded up to
            bytes a pair (FlashInfer's packed custom mask).
        layers: how many layers attend to these lists, for `attended` and `clipped`.
        attended: int64 [2], adds as sparse_verify_attention does, once for every such layer.
        clipped: int64 [1], adds the tokens that found no room in a list; the last ones found it.
    """
    check_headwise(kv_start, kv_count, head_channels, indptr, mask_indptr, indices, mask)
    channels, ends, bytes_ = head_channels.tolist(), indptr.tolist(), mask_indptr.tolist()
    weights = 1 << torch.arange(8, device=mask.device)
    for b, (req, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        for h, channel in enumerate(channels):
            pair, count, start = b * len(channels) + h, int(kv_count[b, channel]), int(kv_start[b, channel])
            chosen = req_to_token[req, :length] if count < 0 else kv_indices[start : start + count]
            width = ends[pair + 1] - ends[pair]
            room = width - tokens
            kept = min(chosen.numel(), room)
            slots = req_to_token[req, :1].repeat(width)
            slots[:kept] = chosen[chosen.numel() - kept :]
            slots[room:] = req_to_token[req, length : length + tokens]
            indices[ends[pair] : ends[pair + 1]] = slots * len(channels) + h
            seen = torch.zeros(-(-tokens * width // 8) * 8, dtype=torch.bool, device=mask.device)
            rows = seen[: tokens * width].view(tokens, width)
            rows[:, :kept] = True
            rows[:, room:] = torch.ones(tokens, tokens, device=mask.device).tril().bool()
            packed = (seen.view(-1, 8) * weights).sum(1).to(torch.uint8)
            mask[bytes_[pair] : bytes_[pair] + packed.numel()] = packed
            if req > 0:
                attended += torch.tensor([kept, length], device=attended.device) * layers
                clipped += (chosen.numel() - kept) * layers


def _probabilities(q, k_buffer, slots, sm_scale, group) -> torch.Tensor:
    """float32 [H_q, n] of one row [H_q, D] over n slots."""
    keys = k_buffer[slots.long()].float().repeat_interleave(group, 1)  # [n, H_q, D]
    return torch.softmax(torch.einsum("hd,nhd->hn", q.float(), keys) * sm_scale, dim=-1)


def _pool(probs, members: Members, total_rows, pool_heads, pool_rows) -> torch.Tensor:
    """[rows, H_q, n] to [members, n]: heads of the channel first, then rows."""
    pooled = []
    for heads, scale in zip(members.heads.tolist(), members.scale.tolist(), strict=True):
        spoken = probs[:, [h for h in heads if h >= 0]]
        row = spoken.amax(1) if pool_heads == "max" else spoken.sum(1) * scale
        pooled.append(row.amax(0) if pool_rows == "max" else row.sum(0) / total_rows)
    return torch.stack(pooled)


def _combine(importance, pooled, members, column, length, first_rows, pool_rows) -> None:
    """Write [members, L] draft scores to the columns of the target positions they are about."""
    scaled = (pooled[:, : length - SHIFT] * IMPORTANCE_SCALE).to(importance.dtype)
    for i, channel in enumerate(members.channels.tolist()):
        target = importance[channel, column + SHIFT : column + length]
        if first_rows and bool(members.fresh[i]):
            target.copy_(scaled[i])
        elif pool_rows == "max":
            torch.maximum(target, scaled[i], out=target)
        else:
            target.add_(scaled[i])


def _top(scores: torch.Tensor, count: int, sink: int, recent: int) -> torch.Tensor:
    """Positions of one list: sink, recent, then by rank."""
    length = scores.numel()
    free = scores[sink : length - recent].nan_to_num(nan=torch.inf)
    # A stable sort of the reversed row puts the later of two equal positions first.
    order = free.numel() - 1 - torch.argsort(free.flip(0), descending=True, stable=True)
    forced = [*range(sink), *range(length - recent, length)]
    chosen = order[: count - sink - recent] + sink
    return torch.cat([torch.tensor(forced, device=chosen.device, dtype=chosen.dtype), chosen])


def _top_p_count(scores: torch.Tensor, chosen: torch.Tensor, forced: int, top_p: float) -> int:
    """Entries of `chosen` up to the first at which `top_p` of the mass is held."""
    mass = scores.double().nan_to_num(nan=0.0)
    mass[0] = 0
    held = mass[chosen].cumsum(0)
    must = forced + int(scores[chosen[forced:]].isnan().sum())
    reached = int(torch.searchsorted(held, top_p * mass.sum())) + 1
    return min(max(must, reached), chosen.numel())


def blend_history(
    importance: torch.Tensor,
    ctx_start: torch.Tensor,
    seq_lens: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    history: torch.Tensor,
    owner: torch.Tensor,
    round_: torch.Tensor,
    weight: torch.Tensor,
    decay: float,
) -> None:
    """Mix what slots remember into this round's importance, then let them remember this round.

    Request b's importance at a position becomes (1 - weight[b]) * fresh + weight[b] * remembered where
    its slot remembers something, and stays fresh where it does not. All requests read what slots
    remembered before the round. Then each slot the batch touches decays once, and takes the maximum of
    what it remembers and what each request that shares it found.

    Args:
        importance: [channels, columns], read and written at positions [1, L) of every request with columns.
        history: [slots, channels] of importance's dtype, by the slot of the target's token, UNKNOWN where
            nothing is remembered (never zero: a token that was never scored is not an unimportant one).
            Requests that share a slot have it at the same position.
        owner: int64 [slots], zero at first: in which round a slot was touched and, in a kernel, by whom.
        round_: int64 [1], this round, above all before it.
        weight: float32 [bs]. decay: factor a round.
    """
    check_history(importance, history, owner, round_, weight)
    rows = []
    for b, (req, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        column = int(ctx_start[b])
        if column < 0 or length <= SHIFT:
            continue
        place = importance[:, column + SHIFT : column + length].T
        slots = req_to_token[req, SHIFT:length].long()
        fresh = place.to(torch.float32, copy=True)
        rows.append((slots, fresh, history[slots].float(), place, float(weight[b])))
    for slots, fresh, remembered, place, w in rows:
        if w:
            place.copy_(torch.where(remembered == UNKNOWN, fresh, (1 - w) * fresh + w * remembered))
        first = owner[slots] != int(round_)
        held = remembered[first]
        history[slots[first]] = torch.where(held == UNKNOWN, held, held * decay).to(history.dtype)
        owner[slots] = int(round_)
    for slots, fresh, *_ in rows:
        history[slots] = torch.maximum(history[slots], fresh.to(history.dtype))
