"""The ops in plain torch: what the kernels compute, on any device, request by request.

They say what each op means, and serve where there are no kernels. They loop on the host and wait for the
device, so a CUDA graph cannot record them. `sts_kernels.layout` describes the types.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from sts_kernels.checks import (
    check_attention,
    check_block_attention,
    check_block_lists,
    check_block_pooling,
    check_block_scores,
    check_block_slots,
    check_columns,
    check_draft,
    check_headwise,
    check_history,
    check_join,
    check_kept,
    check_kept_lists,
    check_kept_selected,
    check_page_lists,
    check_page_scores,
    check_page_sizes,
    check_plan,
    check_select,
    check_sizes,
    check_sketches,
    check_spread,
    check_tags,
    check_token_scores,
    check_token_sketches,
)
from sts_kernels.layout import (
    IMPORTANCE_SCALE,
    KEPT_TOKENS,
    KEY_BLOCK,
    LOW_ZERO,
    MOST_STEPS,
    NO_PAGE,
    PAGE,
    QUERY_STEPS,
    SHIFT,
    UNKNOWN,
    UNRANKED_BITS,
    WHOLE,
    Carried,
    Contexts,
    Count,
    Directions,
    History,
    Kept,
    KeptSizes,
    KvPool,
    Lists,
    Members,
    PagedLists,
    PageSizes,
    Part,
    Plan,
    Pooling,
    QueryBlocks,
    Room,
    Rule,
    Scores,
    Sizes,
    blocks_of,
    pages_of,
)


def _requests(contexts: Contexts) -> Iterator[tuple[int, int, int]]:
    """(place in the batch, row of the table, committed length) of each request."""
    rows = zip(contexts.reqs.tolist(), contexts.lens.tolist(), strict=True)
    return ((b, req, length) for b, (req, length) in enumerate(rows))


# ---- draft attention, which scores


def draft_attention(
    q: torch.Tensor | None,
    pool: KvPool,
    contexts: Contexts,
    scores: Scores,
    members: Members,
    carried: Carried,
    *,
    step: int,
    num_steps: int,
    scale: float,
    pooling: Pooling,
    elsewhere: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor | None:
    """One draft decode step of one layer: its attention, and its rows' importance pooled in.

    Row w of request b (a branch) attends to the committed tokens [0, L) and to its own scratch slots at
    L + w * num_steps + [0, step]. With `carried.q` the request's carried row is scored too, over [0, L), in
    the same read of the keys.

    Args:
        q: [bs * W, H_q, D] queries of this step, request-major and with contiguous heads, or None to score
            the carried rows only.
        pool: of this draft layer.
        scores: written at positions [SHIFT, L) of every request with columns; the draft's key at index p
            scores position p + SHIFT. A fresh member overwrites when this call scores the first rows of the
            round (`carried.q` is given), else scores are combined with those that are there by pooling.rows
            (maximum or sum). A channel with heads in several layers therefore needs pooling.heads to be
            pooling.rows.
        members: channels that this layer feeds, none of them to attend only.
        carried: a row that is a leftover scores 0.
        step, num_steps: this decode step, from 0, and the steps of a round.
        scale: of the logits.
        elsewhere: bool [bs] or None, requests whose rows attend by another op: here they are scored and no
            more, as all are without q. No value of theirs is read, and no key of a head that feeds no
            channel; their rows of the output are undefined.
        plan: of `plan_contexts`.

    Returns:
        [bs * W, H_q, D] in the dtype of q, None without q.

    Raises:
        ValueError: neither q nor carried.q is given, shapes or strides do not fit each other, or pooling is
            not of "max" and "mean".
    """
    check_draft(q, pool, scores, members, carried, pooling)
    table, starts = contexts.table, scores.starts.tolist()
    moved = [False] * len(starts) if elsewhere is None else elsewhere.tolist()
    branches = 0 if q is None else q.shape[0] // max(1, contexts.lens.numel())
    out = None if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b, req, length in _requests(contexts):
        probs = []
        if carried.q is not None:
            row = _probabilities(carried.q[req], pool, table[req, :length], scale)
            probs.append(row if int(carried.lens[req]) == length else torch.zeros_like(row))
        for w in range(branches):
            scratch = length + w * num_steps
            slots = torch.cat([table[req, :length], table[req, scratch : scratch + step + 1]])
            query = q[b * branches + w]
            row = _probabilities(query, pool, slots, scale)
            if not moved[b]:
                seen = torch.einsum("hn,nhd->hd", row, _of_query_heads(pool.v, slots, query))
                out[b * branches + w] = seen * pool.v_scale
            probs.append(row[:, :length])
        if starts[b] >= 0 and members.channels.numel():
            place = scores.importance[:, starts[b] + SHIFT : starts[b] + length]
            pooled = _pool(torch.stack(probs), members, pooling)[:, : length - SHIFT]
            _combine(place, pooled, members, pooling, first_rows=carried.q is not None)
    return out


def plan_contexts(lens: torch.Tensor, pool: KvPool, *, max_context: int) -> Plan | None:
    """None: plain torch needs no plan of its work."""
    return None


def _of_query_heads(buffer: torch.Tensor, slots: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """float32 [n, H_q, D]: keys or values [slots, H_kv, D] of n slots, as each head of `query` sees them."""
    group = query.shape[0] // buffer.shape[1]
    return buffer[slots.long()].float().repeat_interleave(group, 1)


def _probabilities(query: torch.Tensor, pool: KvPool, slots: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 [H_q, n] of one row [H_q, D] over n slots of a pool's keys."""
    keys = _of_query_heads(pool.k, slots, query)
    return torch.softmax(torch.einsum("hd,nhd->hn", query.float(), keys) * (scale * pool.k_scale), dim=-1)


def _pool(probs: torch.Tensor, members: Members, pooling: Pooling) -> torch.Tensor:
    """[rows, H_q, n] to [members, n]: over the heads of a channel first, then over rows."""
    pooled = []
    for heads, scale in zip(members.heads.tolist(), members.scale.tolist(), strict=True):
        spoken = probs[:, [h for h in heads if h >= 0]]
        row = spoken.amax(1) if pooling.heads == "max" else spoken.sum(1) * scale
        pooled.append(row.amax(0) if pooling.rows == "max" else row.sum(0) / pooling.total_rows)
    return torch.stack(pooled)


def _combine(
    place: torch.Tensor, pooled: torch.Tensor, members: Members, pooling: Pooling, *, first_rows: bool
) -> None:
    """Put scores [members, n] into `place` [channels, n], the columns of the positions they are about."""
    scaled = (pooled * IMPORTANCE_SCALE).to(place.dtype)
    for i, channel in enumerate(members.channels.tolist()):
        target = place[channel]
        if first_rows and bool(members.fresh[i]):
            target.copy_(scaled[i])
        elif pooling.rows == "max":
            torch.maximum(target, scaled[i], out=target)
        else:
            target.add_(scaled[i])


# ---- sizes of lists


def score_columns(contexts: Contexts, keeps: torch.Tensor, rule: Rule, room: Room) -> torch.Tensor:
    """int64 [bs]: where the importance of a request starts, as in `Scores`; -1 where its budget is the whole
    context, so that whatever its scores were, nothing would be selected by them. No host sync.

    Args:
        keeps: float64 [requests], NaN where the request has none of its own.

    Raises:
        ValueError: a dtype or shape is not the one above.
    """
    check_columns("score_columns", contexts, keeps, room)
    columns = torch.arange(contexts.lens.numel(), device=contexts.lens.device) * room.columns
    return torch.where(_budgets(contexts, keeps, rule, room) < contexts.lens, columns, -1)


def size_lists(
    contexts: Contexts,
    carried_lens: torch.Tensor,
    keeps: torch.Tensor,
    rule: Rule,
    room: Room,
    totals: torch.Tensor,
    *,
    split: torch.Tensor | None = None,
    full: torch.Tensor | None = None,
    list_full: bool = False,
) -> Sizes:
    """Where the scores and lists of a verify batch lie and how long the lists are; no host sync.

    Requests whose carried row is of another length attend to everything: their importance is not known. Each
    request has a part of the buffers to itself, so what it attends to depends on no other.

    Args:
        carried_lens: int64 [requests], of `Carried`.
        keeps: float64 [requests], NaN where the request has none of its own.
        totals: int64 [len(Count)], added to: SPARSE_VERIFIES, DENSE_VERIFIES, FULL_VERIFIES and
            ASIDE_VERIFIES.
        split: float64 [steps + 1, channels] or None: parts of the context that the channels keep when their
            mean is i / steps; in between they are interpolated.
        full: bool [bs] or None, who is to attend to everything.
        list_full: they have lists all the same (a sparse draft goes by them).

    Raises:
        ValueError: a dtype or shape is not the one above.
    """
    check_sizes(contexts, carried_lens, keeps, split, room)
    reqs, lens = contexts.reqs, contexts.lens
    places = torch.arange(lens.numel(), device=lens.device)
    columns, budgets = places * room.columns, _budgets(contexts, keeps, rule, room)
    full = torch.zeros_like(lens, dtype=torch.bool) if full is None else full
    lengths = budgets[:, None].expand(-1, room.channels)
    if split is not None:
        lengths = _split_lengths(budgets, lens, split, rule)
    known = carried_lens[reqs] == lens
    sparse = known & (budgets < lens)
    aside = known & (budgets >= lens)
    if not list_full:
        sparse &= ~full
    listed = sparse[:, None] & (lengths < lens[:, None])
    entries = torch.where(listed, lengths, 0)
    real = reqs > 0  # row 0 pads the batches of CUDA graphs
    totals[Count.SPARSE_VERIFIES] += (known & real & ~full).sum()
    totals[Count.DENSE_VERIFIES] += (~known & real & ~full).sum()
    totals[Count.FULL_VERIFIES] += (full & real).sum()
    totals[Count.ASIDE_VERIFIES] += (aside & real & ~full).sum()
    return Sizes(
        known=torch.where(known, columns, -1),
        sparse=torch.where(sparse, columns, -1),
        budgets=budgets,
        starts=(places * room.entries)[:, None] + entries.cumsum(1) - entries,
        counts=torch.where(listed, lengths, WHOLE).to(torch.int32),
    )


def _budgets(contexts: Contexts, keeps: torch.Tensor, rule: Rule, room: Room) -> torch.Tensor:
    """int64 [bs], before a head map splits them; who wants more than a list can have has the whole
    context."""
    budgets = budget_tokens(contexts.lens, keeps[contexts.reqs], rule)
    return torch.where(budgets > room.budget, contexts.lens, budgets)


def budget_tokens(lens: torch.Tensor, keeps: torch.Tensor, rule: Rule) -> torch.Tensor:
    """int64 [bs] tokens to select from contexts of these lengths; keeps: float64 [bs], NaN for the rule's own
    (0.1 is too coarse in float32 to be rounded up reliably). No host sync."""
    context = lens.to(torch.float64)
    if rule.keep is None:
        wanted = torch.full_like(context, rule.budget)
    else:
        wanted = torch.ceil(rule.keep * context - rule.guard)
    wanted = torch.where(keeps.isnan(), wanted, torch.ceil(keeps * context - rule.guard))
    return torch.minimum(wanted.clamp(min=rule.least), context).to(torch.int64)


def _split_lengths(
    budgets: torch.Tensor, lens: torch.Tensor, split: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """int64 [bs, channels]: tokens that each list may have, their mean over heads being the budget."""
    context, last = lens.to(torch.float64), split.shape[0] - 1
    steps = budgets / context.clamp(min=1) * last
    low = steps.long().clamp(max=last - 1)
    parts = torch.lerp(split[low], split[low + 1], (steps - low)[:, None])
    lengths = torch.ceil(parts * context[:, None] - rule.guard).long()
    return lengths.clamp(min=rule.forced).minimum(lens[:, None])


# ---- selections that are kept


def size_kept(
    contexts: Contexts,
    sizes: Sizes,
    kept: Kept,
    room: Room,
    totals: torch.Tensor,
    *,
    every: int,
    percent: int | None = None,
    first_too: bool = False,
) -> KeptSizes:
    """Who is scored in this round, and how long the lists of the others are, which have what was selected and
    all that came since; no host sync. To be called once a round.

    A request keeps its selection for a round if there is one (`kept.lens`), its importance would be known, no
    more than KEPT_TOKENS came since, fewer than `every` rounds went by it, that which made it included, and,
    given `percent`, the tokens that a round since then brought are on average no less than so much of what
    rounds that score have brought. Row 0 of the table, which pads batches, keeps none.

    Args:
        sizes: of `size_lists`.
        kept: `lens` becomes the context of who is scored and has a list, 0 of who is scored and has none;
            rounds, last and accepted are written of all.
        first_too: who is scored in a round with a list has that of the rounds before it in its first step, if
            there is one: it is `kept` then as well as `scored`.
        totals: int64 [len(Count)], added to: SCORED_ROUNDS and KEPT_ROUNDS, of requests that want less than
            everything.

    Raises:
        ValueError: a dtype or shape is not the one in `Kept`.
    """
    check_kept(kept, sizes, room)
    (_, reqs, lens), real = contexts, contexts.reqs > 0
    made, rounds, last = kept.lens[reqs], kept.rounds[reqs], kept.last[reqs]
    since, came = lens - made, lens - last
    there = real & (made > 0) & (sizes.known >= 0) & (since >= 0) & (since <= KEPT_TOKENS)
    fresh, fresh_rounds, old, old_rounds = kept.accepted[reqs].unbind(1)
    by_scored, by_kept = there & (rounds == 1), there & (rounds > 1)
    fresh, fresh_rounds = fresh + came * by_scored, fresh_rounds + by_scored
    old, old_rounds = (old + came) * by_kept, (old_rounds + 1) * by_kept
    stays = there & (rounds < every)
    if percent is not None:
        stays &= 100 * old * fresh_rounds >= percent * fresh * old_rounds
    kept.rounds[reqs] = torch.where(stays, rounds + 1, 1)
    kept.last[reqs] = lens.long()
    kept.lens[reqs] = torch.where(stays, made, torch.where(sizes.sparse >= 0, lens, 0)).long()
    kept.accepted[reqs] = torch.stack([fresh, fresh_rounds, old, old_rounds], 1)
    wanted = real & (sizes.known >= 0) & (sizes.budgets < lens)
    totals[Count.SCORED_ROUNDS] += (wanted & ~stays).sum()
    totals[Count.KEPT_ROUNDS] += (stays & (sizes.sparse >= 0)).sum()

    selected, goes = kept.counts[reqs], stays
    if first_too:
        goes = stays | (there & (sizes.sparse >= 0))
    listed = (goes & (sizes.sparse >= 0))[:, None] & (selected != WHOLE)
    counts = torch.where(listed, selected + since[:, None], WHOLE).to(torch.int32)
    entries = counts.clamp(min=0).long()
    places = torch.arange(lens.numel(), device=lens.device)
    starts = (places * room.entries)[:, None] + entries.cumsum(1) - entries
    of_scored = Sizes(
        known=torch.where(stays, -1, sizes.known),
        sparse=torch.where(stays, -1, sizes.sparse),
        budgets=sizes.budgets,
        starts=sizes.starts,
        counts=torch.where(stays[:, None], WHOLE, sizes.counts),
    )
    scored, of_kept = torch.where(stays, 0, lens), torch.where(goes, lens, 0)
    # Lists lie in Kept.positions as they do in the buffers of a round, by row in place of place.
    keep_at = sizes.starts + ((reqs.long() - places) * room.entries)[:, None]
    return KeptSizes(of_scored, starts, counts, scored, of_kept, goes, keep_at)


def list_kept(kept: Kept, contexts: Contexts, lists: Lists, draft_indices: torch.Tensor) -> None:
    """List the slots of what is kept, and of all tokens that came since, for every (request, channel) but
    WHOLE ones.

    Args:
        lists: indices are written; a count is that of the kept list and of what came since.
        draft_indices: int32, written as lists.indices is: slots of the draft's keys about the same tokens, as
            `select_tokens` has them.

    Raises:
        ValueError: a dtype or shape is not the one in `Kept` or `Lists`.
    """
    check_kept_lists(kept, contexts, lists)
    for b, req, length in _requests(contexts):
        for c in range(lists.counts.shape[1]):
            count, start = int(lists.counts[b, c]), int(lists.starts[b, c])
            if count == WHOLE:
                continue
            first, number = int(kept.starts[req, c]), int(kept.counts[req, c])
            positions = kept.positions[first : first + number].long()
            since = torch.arange(length - (count - number), length, device=positions.device)
            chosen, slots = torch.cat([positions, since]), contexts.table[req]
            entries = slice(start, start + count)
            lists.indices[entries] = slots[chosen].to(lists.indices.dtype)
            keys = torch.where(chosen > 0, chosen, length) - SHIFT
            draft_indices[entries] = slots[keys].to(draft_indices.dtype)


def keep_selected(kept: Kept, contexts: Contexts, found: KeptSizes, lists: Lists) -> None:
    """Note where the selections of those that were scored are kept and how long they are, and put the lists
    of the whole batch together.

    Args:
        kept: starts and counts are written of those that were scored: found.keep_at and found.sizes.counts.
        found: of `size_kept`, after `select_tokens` listed at found.keep_at and maybe cut found.sizes.counts.
        lists: starts and counts are written: of those that were scored what found.sizes has, of the others
            what found itself has.

    Raises:
        ValueError: a dtype or shape is not the one in `Kept`, `KeptSizes` or `Lists`.
    """
    check_kept_selected(kept, contexts, found, lists)
    scored = found.scored > 0
    rows, own = contexts.reqs[scored], found.sizes
    kept.starts[rows], kept.counts[rows] = found.keep_at[scored], own.counts[scored]
    lists.starts.copy_(torch.where(scored[:, None], own.starts, found.starts))
    lists.counts.copy_(torch.where(scored[:, None], own.counts, found.counts))


# ---- what is done to scores before they select


def blend_history(
    scores: Scores, contexts: Contexts, history: History, weight: torch.Tensor, *, decay: float
) -> None:
    """Mix what slots remember into this round's importance, then let them remember this round.

    Request b's importance at a position becomes (1 - weight[b]) * fresh + weight[b] * remembered where
    its slot remembers something, and stays fresh where it does not. All requests read what slots
    remembered before the round. Then each slot the batch touches decays once, and takes the maximum of
    what it remembers and what each request that shares it found.

    Args:
        scores: read and written at positions [SHIFT, L) of every request with columns.
        history: read and written. Requests that share a slot have it at the same position.
        weight: float32 [bs].
        decay: factor a round.

    Raises:
        ValueError: a dtype or shape is not the one above or in `History`.
    """
    check_history(scores, history, weight)
    this_round, rows = int(history.round), []
    for b, req, length in _requests(contexts):
        column = int(scores.starts[b])
        if column < 0 or length <= SHIFT:
            continue
        place = scores.importance[:, column + SHIFT : column + length].T
        slots = contexts.table[req, SHIFT:length].long()
        fresh = place.to(torch.float32, copy=True)
        rows.append((slots, fresh, history.scores[slots].float(), place, float(weight[b])))
    for slots, fresh, remembered, place, w in rows:
        if w:
            place.copy_(torch.where(remembered == UNKNOWN, fresh, (1 - w) * fresh + w * remembered))
        first = history.owner[slots] != this_round  # not touched yet by another request of this round
        held = remembered[first]
        decayed = torch.where(held == UNKNOWN, held, held * decay)
        history.scores[slots[first]] = decayed.to(history.scores.dtype)
        history.owner[slots] = this_round
    for slots, fresh, *_ in rows:
        history.scores[slots] = torch.maximum(history.scores[slots], fresh.to(history.scores.dtype))


def spread_importance(scores: Scores, lens: torch.Tensor, *, factor: float, over: int) -> None:
    """Every token's importance becomes at least `factor ** k` times that of the token k before it, k <= over.

    Verify has more rows than the draft scores: the last draft token never runs through the draft, and with
    sparse draft steps only the carried row and the first step score. Attention that follows a text moves on
    by one token from row to row, so a token that no row scored high is given a part of the scores before it.

    Args:
        scores: read and written at positions [SHIFT + 1, L) of every request with columns; the first position
            with a score is SHIFT. A score that is NaN stays NaN and is passed on to nobody.
        lens: int [bs], committed lengths.
        factor: above 0, at most 1.
        over: from 1 to MOST_OVER.

    Raises:
        ValueError: importance is not [channels, columns], or factor or over is out of its range.
    """
    check_spread(scores, factor, over)
    for start, length in zip(scores.starts.tolist(), lens.tolist(), strict=True):
        if start < 0:
            continue
        own = scores.importance[:, start + SHIFT : start + length]
        before, weight = own.to(torch.float32, copy=True), torch.tensor(1.0)
        for k in range(1, min(over, max(length - SHIFT - 1, 0)) + 1):
            weight = weight * factor  # float32, as the kernel has it
            passed, later = (before[:, :-k] * weight).to(own.dtype), own[:, k:]
            later.copy_(torch.where(passed > later, passed, later))


# ---- selection


def select_tokens(
    scores: Scores,
    contexts: Contexts,
    budgets: torch.Tensor,
    lists: Lists,
    *,
    sink: int,
    recent: int,
    top_p: torch.Tensor | None = None,
    draft_indices: torch.Tensor | None = None,
) -> None:
    """List the slots of sink, recent and the top of importance for every (request, channel) but WHOLE ones.

    Of equal importance the later position wins. NaN is no score and ranks above every score, so that no token
    is lost for want of a score. The first `sink` and last `recent` positions are taken whatever their
    importance holds.

    Args:
        scores: a request that has a list has columns.
        budgets: int [bs], at least sink + recent, and below the context where there is a list.
        lists: starts and counts say where the lists are and how long. indices are written, in no specified
            order within a list, and not for one that is WHOLE.
        top_p: float32 [bs] or None. A finite entry cuts each list of the request to the smallest one
            that holds this part of the importance at positions [SHIFT, L), and writes its length to
            lists.counts. Scores that are NaN have no mass and stay in.
        draft_indices: int32 or None, written as lists.indices is: slots of the draft's keys about the same
            tokens. No draft key is about position 0; the bonus token's, which every draft row may attend to,
            takes its place.

    Raises:
        ValueError: lists.starts or lists.counts is not [bs, channels].
    """
    check_select(scores, budgets, lists)
    for b, req, length in _requests(contexts):
        for c in range(scores.importance.shape[0]):
            count, start = int(lists.counts[b, c]), int(lists.starts[b, c])
            if count == WHOLE:
                continue
            column = int(scores.starts[b])
            row = scores.importance[c, column : column + length].float()
            chosen = _top(row, count, sink, recent)
            if top_p is not None and bool(top_p[b].isfinite()):
                count = _top_p_count(row, chosen, sink + recent, float(top_p[b]))
                lists.counts[b, c], chosen = count, chosen[:count]
            entries, slots = slice(start, start + count), contexts.table[req]
            lists.indices[entries] = slots[chosen].to(lists.indices.dtype)
            if draft_indices is not None:
                keys = torch.where(chosen > 0, chosen, length) - SHIFT
                draft_indices[entries] = slots[keys].to(draft_indices.dtype)


def _top(row: torch.Tensor, count: int, sink: int, recent: int) -> torch.Tensor:
    """Positions of one list: sink, recent, then by rank."""
    length = row.numel()
    free = row[sink : length - recent].nan_to_num(nan=torch.inf)
    # A stable sort of the reversed row puts the later of two equal positions first.
    order = free.numel() - 1 - torch.argsort(free.flip(0), descending=True, stable=True)
    forced = [*range(sink), *range(length - recent, length)]
    chosen = order[: count - sink - recent] + sink
    return torch.cat([torch.tensor(forced, device=chosen.device, dtype=chosen.dtype), chosen])


def _top_p_count(row: torch.Tensor, chosen: torch.Tensor, forced: int, top_p: float) -> int:
    """Entries of `chosen` up to the first at which `top_p` of the mass is held."""
    mass = row.double().nan_to_num(nan=0.0)
    mass[:SHIFT] = 0
    held = mass[chosen].cumsum(0)
    must = forced + int(row[chosen[forced:]].isnan().sum())
    reached = int(torch.searchsorted(held, top_p * mass.sum())) + 1
    return min(max(must, reached), chosen.numel())


# ---- pages: sketches of keys, which fresh queries choose by


def tag_pages(contexts: Contexts, before: torch.Tensor, tags: torch.Tensor, *, most: int) -> None:
    """Say whose sketch the slices beside slots belong to, of what one forward writes; before its layers run.

    A page's sketch is a request's own if the tags of all its slots are the slot of its last position.
    Requests that share a prefix share slots: where they part within a page, whoever completes the page takes
    the slices beside the shared slots, and the page of the other has no sketch any more. Slots that are
    written lose their tag first: what they held was about another token.

    Args:
        contexts: lens are the lengths after the forward.
        before: int [bs], the lengths before it: positions [before, lens) are written, some of them maybe
            in slots that other requests of the batch write too. Pages whose last position is among them are
            completed, and get tags.
        tags: int32 [slots], NO_PAGE at first; one for all layers. Of requests of one batch that complete a
            page over shared slots, the later in the batch has them. Row 0 of the table writes nothing.
        most: positions that a request writes at most, about; the work is parted by it.

    Raises:
        ValueError: a dtype or shape is not the one above.
    """
    check_tags("tag_pages", contexts, before, tags)
    for b, req, length in _requests(contexts):
        if req > 0:
            tags[contexts.table[req, int(before[b]) : length].long()] = NO_PAGE
    for _, slots in _completed(contexts, before):
        tags[slots] = slots[-1].to(tags.dtype)


def _completed(contexts: Contexts, before: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(row of the table, int64 [PAGE] slots) of every page whose last position is in [before, lens)."""
    for b, req, length in _requests(contexts):
        for page in range(int(before[b]) // PAGE, length // PAGE if req > 0 else 0):
            yield req, contexts.table[req, page * PAGE : (page + 1) * PAGE].long()


def sketch_pages(
    keys: torch.Tensor,
    sketches: torch.Tensor,
    contexts: Contexts,
    before: torch.Tensor,
    tags: torch.Tensor,
    *,
    most: int,
) -> None:
    """Write the sketches of one layer of the pages that a forward has completed, once their keys are there.

    A sketch is the mean and the standard deviation (of the PAGE keys themselves, not of a larger population)
    of each dimension. It lies in slices: beside slot i of a page are the dimensions from i * D / PAGE on, of
    the mean and then of the deviation. So sketches need no place of their own, and live as long as keys do.

    Args:
        keys: [slots, H_kv, D] of the layer as they are stored; D is a multiple of PAGE. So a sketch is in the
            keys' own units, and whoever scores by it multiplies by their `KvPool.k_scale`.
        sketches: [slots, H_kv, 2 * D / PAGE], written. float16 keeps three bits more than bfloat16 would;
            what is out of its range becomes its largest number.
        contexts, before, most: as in tag_pages.
        tags: as tag_pages left them. A page that lost its tags to another request's is not written.

    Raises:
        ValueError: a dtype or shape is not the one above.
    """
    check_sketches(keys, sketches, contexts, before, tags)
    largest, width = torch.finfo(sketches.dtype).max, keys.shape[2] // PAGE
    for _, slots in _completed(contexts, before):
        if bool((tags[slots] == slots[-1]).all()):
            page = keys[slots].float()
            pair = torch.stack([page.mean(0), page.std(0, correction=0)], 1)  # [H_kv, 2, D]
            slices = pair.unflatten(2, (PAGE, width)).permute(2, 0, 1, 3).flatten(2)
            sketches[slots] = slices.clamp(-largest, largest).to(sketches.dtype)


def size_pages(
    contexts: Contexts,
    tags: torch.Tensor,
    lists: Lists,
    channels: torch.Tensor,
    *,
    sink: int,
    recent: int,
) -> PageSizes:
    """Which pages have a sketch, and how many are on the lists of every layer; once a step.

    A list has whole pages, as many as fit into its length, and the positions after the last complete page.
    So it is never longer than it was to be, by less than PAGE shorter, and its length depends on no score.
    Pages with a sink position, and of the last ceil(recent / PAGE) complete ones, are on every list.

    The whole context is attended to where a list has no room for those, or for every page that has no sketch:
    nothing is known of them, so they may not be left out. Row 0 of the table has no lists.

    Args:
        contexts: lens are the committed lengths.
        tags: as tag_pages left them.
        lists: starts and counts [bs, channels] of size_lists, in tokens; they are not written.
        channels: int32 [layers, H_kv], the channel whose list a KV head attends to.

    Returns:
        Its counts are to take the place of those of `lists`.

    Raises:
        ValueError: a dtype or shape is not the one above.
    """
    check_page_sizes(contexts, tags, lists, channels)
    (table, reqs, lens), device = contexts, contexts.lens.device
    first, last, width = pages_of(sink), pages_of(recent), table.shape[1] // PAGE
    complete, rest = lens.long() // PAGE, lens.long() % PAGE
    wanted = ((lists.counts - rest[:, None]).clamp(min=0) // PAGE).int()  # pages, [bs, channels]
    fits = (lists.counts >= PAGE * (first + last) + rest[:, None]) & (wanted < complete[:, None])
    fits &= (reqs > 0)[:, None]
    known = torch.zeros(lens.numel(), width, dtype=torch.uint8, device=device)
    unknown = torch.zeros(lens.numel(), dtype=torch.int32, device=device)
    for b, req, length in _requests(contexts):
        if bool(fits[b].any()):
            pages = length // PAGE
            slots = table[req, : pages * PAGE].view(-1, PAGE)
            known[b, :pages] = (tags[slots.long()] == slots[:, -1:]).all(1)
            unknown[b] = (known[b, first : pages - last] == 0).sum()
    listed = fits & (wanted - first - last >= unknown[:, None])
    per_head = channels.long().flatten()
    shape = (lens.numel(), *channels.shape)
    of_pages = torch.where(listed, wanted, WHOLE)[:, per_head].view(shape).transpose(0, 1)
    starts = torch.arange(lens.numel() * channels.shape[1], device=device).view(shape[::2]) * width
    numbers = torch.arange(width, dtype=torch.int32, device=device)[None]
    as_tokens = Contexts(numbers, torch.zeros_like(lens), torch.where(listed.any(1), complete, 0))
    counts = torch.where(listed, wanted * PAGE + rest[:, None], WHOLE).int()
    return PageSizes(known, unknown, as_tokens, counts, starts, of_pages.int().contiguous())


def plan_pages(sizes: PageSizes, *, kv_heads: int) -> Plan | None:
    """None: plain torch needs no plan of its work."""
    return None


def score_pages(
    q: torch.Tensor,
    sketches: torch.Tensor,
    contexts: Contexts,
    sizes: PageSizes,
    scores: Scores,
    *,
    scale: float,
    pooling: Pooling,
    plan: Plan | None = None,
) -> None:
    """Importance of the pages of one layer to its own queries, by their sketches (arXiv 2605.27740).

    A page's logit is q . mean + |q| . deviation. A row's logits become probabilities among the pages of the
    request that have a sketch, which makes rows comparable; then they are pooled over the rows and heads that
    share a KV head. A page without a sketch gets NaN, which ranks above every score.

    Args:
        q: [bs, T, H_q, D] queries of the step. Heads are contiguous; tokens may lie apart, as in a slice of a
            fused projection.
        sketches: of this layer, as sketch_pages left them.
        sizes: of size_pages; a request without a list is not scored.
        scores: written, for page p at column start + p, a row for every KV head: [H_kv, columns] and [bs].
        scale: of the logits, times the scale of the keys that sketches are of.
        plan: of `plan_pages`.

    Raises:
        ValueError: shapes or strides do not fit each other, or pooling is not of "max" and "mean".
    """
    check_page_scores(q, sketches, sizes, scores, pooling)
    kv_heads, starts = sketches.shape[1], scores.starts.tolist()
    for b, req in enumerate(contexts.reqs.tolist()):
        pages = int(sizes.contexts.lens[b])
        known = sizes.known[b, :pages] != 0
        slots = contexts.table[req, : pages * PAGE].view(-1, PAGE)[known].long()
        slices = sketches[slots].float().unflatten(3, (2, -1))  # [known, PAGE, H_kv, 2, D / PAGE]
        mean, deviation = slices.permute(3, 2, 0, 1, 4).flatten(3)  # [H_kv, known, D] each
        rows = q[b].float().unflatten(1, (kv_heads, -1))  # [T, H_kv, G, D]
        logits = torch.einsum("thgd,hpd->thgp", rows, mean)
        logits += torch.einsum("thgd,hpd->thgp", rows.abs(), deviation)
        probs = torch.softmax(logits * scale, -1)
        found = torch.full((kv_heads, pages), torch.nan, device=q.device)
        found[:, known] = _importance(probs, pooling)
        scores.importance[:, starts[b] : starts[b] + pages] = found.to(scores.importance.dtype)


def _importance(probs: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """float32 [H_kv, n], of probabilities [T, H_kv, G, n] of the rows and heads that share a KV head."""
    pooled = probs.amax(2) if pooling.heads == "max" else probs.mean(2)
    pooled = pooled.amax(0) if pooling.rows == "max" else pooled.sum(0) / pooling.total_rows
    return pooled * IMPORTANCE_SCALE


def sketch_tokens(
    keys: torch.Tensor,
    sketches: torch.Tensor,
    directions: Directions,
    contexts: Contexts,
    before: torch.Tensor,
    *,
    most: int,
    k_scale: float = 1.0,
) -> None:
    """Write the sketches of one layer of the tokens that a forward has written, once their keys are there.

    A sketch is a key on R directions, from the mean of keys on them, in whole steps of each, of which four
    bits hold MOST_STEPS to either side. Keys differ from each other in few directions, so that half of the
    dimensions, half a byte each, tells which of them a query wants (the low-rank keys of Loki, arXiv
    2406.02542). A byte has the values of two directions: that of j below, that of j + R / 2 above.

    Args:
        keys: [slots, H_kv, D] of the layer, of the directions' dtype or of FP8.
        sketches: int8 [slots, H_kv, R / 2], written at the slots of positions [before, lens) of every
            request. What is more than MOST_STEPS away becomes that. Row 0 of the table writes nothing.
        directions: of this layer.
        contexts: lens are the lengths after the forward.
        before: int [bs], the first position that is written.
        most: positions that a request writes at most, about; the work is parted by it.
        k_scale: of keys as they are stored, see KvPool.

    Raises:
        ValueError: a dtype or shape is not the one above.
    """
    check_token_sketches(keys, sketches, directions, contexts, before)
    for b, req, length in _requests(contexts):
        if req > 0:
            slots = contexts.table[req, int(before[b]) : length].long()
            found = torch.einsum("lhd,hdr->lhr", keys[slots].float(), directions.onto.float())
            found = torch.floor(found * k_scale - directions.centre + 0.5).clamp(-MOST_STEPS, MOST_STEPS)
            low, high = found.chunk(2, -1)
            sketches[slots] = (16 * high + low + LOW_ZERO).to(torch.int8)


def sketch_values(sketches: torch.Tensor) -> torch.Tensor:
    """int8 [.., R], in steps, of sketches [.., R / 2]."""
    return torch.cat([(sketches & 15) - LOW_ZERO, sketches >> 4], -1)


def plan_scores(contexts: Contexts, *, kv_heads: int) -> Plan | None:
    """None: plain torch needs no plan of its work."""
    return None


def score_tokens(
    q: torch.Tensor,
    sketches: torch.Tensor,
    directions: Directions,
    contexts: Contexts,
    scores: Scores,
    *,
    scale: float,
    pooling: Pooling,
    plan: Plan | None = None,
) -> None:
    """Importance of the tokens of one layer to its own queries, by their sketches.

    A token's logit is the product of its sketch and the query on the same directions, which is rounded to
    QUERY_STEPS steps of its largest value. A row's logits become probabilities among the tokens of the
    context, which makes rows comparable; then they are pooled over the rows and heads that share a KV head.

    Args:
        q: [bs, T, H_q, D] queries of the step. Heads are contiguous; tokens may lie apart, as in a slice of a
            fused projection.
        sketches: of this layer, as sketch_tokens left them. directions: of this layer.
        contexts: whose tokens are scored; a request of length 0 is not.
        scores: written, for position p at column start + p, a row for every KV head: [H_kv, columns], [bs].
        scale: of the logits.
        plan: of `plan_scores`.

    Raises:
        ValueError: shapes or strides do not fit each other, or pooling is not of "max" and "mean".
    """
    check_token_scores(q, sketches, directions, scores, pooling)
    kv_heads, starts = sketches.shape[1], scores.starts.tolist()
    for b, req, length in _requests(contexts):
        if length == 0:
            continue
        own = sketch_values(sketches[contexts.table[req, :length].long()]).float()  # [L, H_kv, R]
        rows = q[b].float().unflatten(1, (kv_heads, -1))  # [T, H_kv, G, D]
        rows = torch.einsum("thgd,hdr->thgr", rows, directions.back.float())
        step = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / QUERY_STEPS
        rows = torch.floor(rows / step + 0.5)
        probs = torch.softmax(torch.einsum("thgr,lhr->thgl", rows, own) * step * scale, -1)
        found = _importance(probs, pooling).to(scores.importance.dtype)
        scores.importance[:, starts[b] : starts[b] + length] = found


def list_tokens(scores: Scores, contexts: Contexts, lists: Lists, *, sink: int, recent: int) -> None:
    """List the slots of sink, recent and the top of importance for every (request, KV head) but WHOLE ones.

    As `select_tokens`, but scores are float16, and those that differ in their last UNRANKED_BITS alone are
    equal: the later position wins.

    Args:
        scores: of score_tokens, at least 0. A request that has a list has columns.
        lists: starts and counts [bs, H_kv] say where the lists are and how long, at least sink + recent and
            below the context. indices are written, in no specified order within a list, and not for one that
            is WHOLE.

    Raises:
        ValueError: lists.starts or lists.counts is not [bs, H_kv].
    """
    importance = scores.importance.half()
    ranks = importance.view(torch.int16) >> UNRANKED_BITS << UNRANKED_BITS
    coarse = scores._replace(importance=ranks.view(torch.float16))
    select_tokens(coarse, contexts, contexts.lens, lists, sink=sink, recent=recent)


def list_pages(
    scores: Scores,
    contexts: Contexts,
    sizes: PageSizes,
    lists: Lists,
    channels: torch.Tensor,
    *,
    layer: int,
    sink: int,
    recent: int,
) -> None:
    """List the slots of the pages of the top of importance, for every (request, KV head) of one layer.

    Pages are chosen as `select_tokens` chooses tokens. A list has them, in any order, and then the positions
    after the last complete page.

    Args:
        scores: of score_pages, for this layer.
        sizes: of size_pages, with the same sink and recent.
        lists: of this step, with the counts of `sizes`. indices are written, not for a list that is WHOLE.
        channels: as in size_pages. KV heads of a layer have lists of their own; those of one layer may lie
            where another's did, if it has attended.
        layer: row of `channels`.

    Raises:
        ValueError: shapes do not fit each other.
    """
    check_page_lists(scores, sizes, lists, channels)
    for b, h, positions in _chosen_pages(scores, sizes, layer, sink, recent):
        length = int(contexts.lens[b])
        rest = torch.arange(length // PAGE * PAGE, length, device=positions.device)
        slots = contexts.table[int(contexts.reqs[b]), torch.cat([positions, rest])]
        start = int(lists.starts[b, int(channels[layer, h])])
        lists.indices[start : start + slots.numel()] = slots.to(lists.indices.dtype)


def _chosen_pages(
    scores: Scores, sizes: PageSizes, layer: int, sink: int, recent: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(place in the batch, KV head, int64 positions of the chosen pages) of every list of a layer."""
    chosen, own = sizes.lists(layer), sizes.contexts
    select_tokens(scores, own, own.lens, chosen, sink=pages_of(sink), recent=pages_of(recent))
    within = torch.arange(PAGE, device=chosen.indices.device)
    for b, counts in enumerate(chosen.counts.tolist()):
        for h, number in enumerate(counts):
            if number != WHOLE:
                start = int(chosen.starts[b, h])
                pages = chosen.indices[start : start + number].long()
                yield b, h, (pages[:, None] * PAGE + within).flatten()


def join_pages(
    scores: Scores,
    drafted: Scores,
    joined: torch.Tensor,
    contexts: Contexts,
    sizes: PageSizes,
    channels: torch.Tensor,
    *,
    layer: int,
    sink: int,
    recent: int,
) -> None:
    """Importance by which `select_tokens` takes the chosen pages of a layer, and then what the draft found.

    The tokens of chosen pages get NaN, which ranks above every score; other tokens keep the draft's. Lists
    that are longer than the pages' share of them therefore have all of those pages and, of the rest, the top
    of the draft's importance: no token twice, and as many as they were to have.

    Args:
        scores: of score_pages, for this layer.
        drafted: by channel, in columns of tokens; a request that has columns has lists, of pages or not.
        joined: [H_kv, columns], of drafted's dtype and in its columns; written at positions [0, L) of every
            request that has columns.
        sizes: of size_pages, for the share of the lists that pages have.
        channels: int32 [layers, H_kv], as in size_pages; the channel whose importance a KV head selects by.
        layer: row of `channels`.

    Raises:
        ValueError: a dtype or shape is not the one above.
    """
    check_join(scores, drafted, joined, sizes, channels)
    rows = channels[layer].long()
    for b, (_, _, length) in enumerate(_requests(contexts)):
        columns = slice(int(drafted.starts[b]), int(drafted.starts[b]) + length)
        if columns.start >= 0:
            joined[:, columns] = drafted.importance[rows, columns]
    for b, h, positions in _chosen_pages(scores, sizes, layer, sink, recent):
        joined[h, int(drafted.starts[b]) + positions] = torch.nan


# ---- attention over lists


def sparse_attention(
    q: torch.Tensor,
    pool: KvPool,
    lists: Lists,
    channels: torch.Tensor,
    contexts: Contexts,
    tail_mask: torch.Tensor,
    attended: torch.Tensor,
    *,
    scale: float,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Exact softmax attention of each token of a tail over (selected context + tail), per (request, KV head).

    Args:
        q: [bs, T, H_q, D] queries: in verify of the T draft tokens of each request, in a draft step of its
            branches. Heads are contiguous; tokens may lie apart, as in a slice of a fused projection.
        pool: of this layer.
        channels: int [H_kv], the channel whose list a KV head attends to.
        contexts: the tail is at positions [L, L + N).
        tail_mask: bool [bs, T, N], row i may attend to tail token j; rows are contiguous. In verify N is T
            (causal chain or tree), in a draft step the tail is what ran in the round.
        attended: int64 [2], adds the context tokens attended to and those there, per (request, KV head).
            Row 0 of the table is not counted.
        scale: of the logits.
        plan: this layer's of `plan_attention`.

    Returns:
        [bs, T, H_q, D] in the dtype of q.

    Raises:
        ValueError: shapes or strides do not fit each other.
    """
    check_attention(q, pool, lists, channels, tail_mask)
    tokens, q_heads, tail_size = q.shape[1], q.shape[2], tail_mask.shape[2]
    group = q_heads // channels.numel()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b, req, length in _requests(contexts):
        context, tail = contexts.table[req, : length + tail_size].long().tensor_split([length])
        for h, channel in enumerate(channels.tolist()):
            chosen = _chosen(lists, b, channel, context)
            slots = torch.cat([chosen, tail])
            if req > 0:
                attended += torch.tensor([chosen.numel(), length], device=attended.device)
            heads = slice(h * group, (h + 1) * group)
            mask = torch.ones(tokens, slots.numel(), dtype=torch.bool, device=q.device)
            mask[:, chosen.numel() :] = tail_mask[b]
            found = scaled_dot_product_attention(
                q[b, :, heads].transpose(0, 1)[None],  # [1, G, T, D]
                pool.k[slots, h].to(q.dtype).expand(1, group, -1, -1),
                pool.v[slots, h].to(q.dtype).expand(1, group, -1, -1),
                attn_mask=mask,
                scale=scale * pool.k_scale,
            )
            out[b, :, heads] = found[0].transpose(0, 1) * pool.v_scale
    return out


def _chosen(lists: Lists, b: int, channel: int, context: torch.Tensor) -> torch.Tensor:
    """int64 slots of the context [L] that a list has: all of them where it is WHOLE."""
    count, start = int(lists.counts[b, channel]), int(lists.starts[b, channel])
    return context if count == WHOLE else lists.indices[start : start + count].long()


def plan_attention(
    lists: Lists, channels: torch.Tensor, lens: torch.Tensor, *, max_context: int
) -> Plan | None:
    """None: plain torch needs no plan of its work."""
    return None


def plan_lists(lists: Lists, channels: torch.Tensor, lens: torch.Tensor, *, programs: int, most: int) -> Plan:
    """Part the lists of every layer, so that programs that run side by side read about as many tokens.

    All lists of a layer are parted by the smallest share of tokens at which the parts are no more than
    `programs`; a list has one part at least, and no more than `most`.

    Args:
        channels: int32 [layers, H_kv], the channel whose list a KV head attends to.
        lens: int [bs], committed lengths.
        programs: at least bs * H_kv.

    Raises:
        ValueError: lists are not [bs, channels], or channels are not int32 [layers, H_kv].
    """
    check_plan(lists, channels)
    layers, heads = channels.shape
    plan = Plan.empty(layers, lens.numel() * heads, programs, most, lists.starts.device)
    lengths = lens.repeat_interleave(heads).tolist()
    for layer, of_heads in enumerate(channels.tolist()):
        counts = lists.counts[:, of_heads].flatten().tolist()
        starts = lists.starts[:, of_heads].flatten().tolist()
        sizes = [length if n == WHOLE else n for n, length in zip(counts, lengths, strict=True)]
        parts = _even_parts(sizes, programs, most)
        plan.ends[layer] = torch.tensor([0, *itertools.accumulate(parts)])
        work = [
            [pair, *piece]
            for pair, (size, number) in enumerate(zip(sizes, parts, strict=True))
            for piece in _pieces(size, number, None if counts[pair] == WHOLE else starts[pair])
        ]
        plan.work[layer, : len(work)] = torch.tensor(work).view(-1, 4)
    return plan


def _even_parts(sizes: list[int], programs: int, most: int) -> list[int]:
    """How many parts each list of these sizes has, by the smallest share that `programs` suffice for."""
    largest = max([*sizes, 1])
    for share in range(1, largest + 1):
        parts = [min(max(-(-size // share), 1), most) for size in sizes]
        if share == largest or sum(parts) <= programs:
            return parts


def _pieces(size: int, number: int, start: int | None) -> Iterator[tuple[int, int, int]]:
    """(first, tokens, flags) of each part of a list that starts there; None: of positions of the context."""
    for i in range(number):
        first, end = size * i // number, size * (i + 1) // number
        part = Part.OF_CONTEXT if start is None else Part(0)
        part |= Part.FIRST if i == 0 else Part(0)
        part |= Part.LAST if i == number - 1 else Part(0)
        yield (start or 0) + first, end - first, int(part)


def headwise_lists(
    lists: Lists,
    channels: torch.Tensor,
    contexts: Contexts,
    paged: PagedLists,
    attended: torch.Tensor,
    clipped: torch.Tensor,
    *,
    tokens: int,
    layers: int,
) -> None:
    """Lists of one row of a head map for a paged attention over pools seen as [slots * H_kv, 1, 1, D].

    Every (request, KV head) pair b * H_kv + h has a list of a length that the host planned before it
    knew how many tokens are chosen: the chosen tokens, padding, then the T draft tokens. The mask hides
    the padding and lets a draft token see the chain up to itself. Padding repeats the request's first
    token: masked keys and values are read and multiplied by zero, so they must be finite.

    Args:
        channels: int [H_kv], the channel whose list a KV head attends to.
        contexts: the tail is at positions [L, L + T).
        paged: indptr and mask_indptr say how long lists are, each at least T, and where; indices and mask are
            written.
        attended: int64 [2], adds as sparse_attention does, once for every layer.
        clipped: int64 [1], adds the tokens that found no room in a list, for every layer; the last ones of a
            list found it.
        tokens: T.
        layers: how many layers attend to these lists.

    Raises:
        ValueError: a dtype or shape is not the one above or in the types.
    """
    check_headwise(lists, channels, paged)
    kv_heads, ends = channels.numel(), paged.indptr.tolist()
    for b, req, length in _requests(contexts):
        context, tail = contexts.table[req, : length + tokens].tensor_split([length])
        for h, channel in enumerate(channels.tolist()):
            pair = b * kv_heads + h
            chosen, width = _chosen(lists, b, channel, context), ends[pair + 1] - ends[pair]
            room = width - tokens
            kept = min(chosen.numel(), room)
            slots = contexts.table[req, :1].repeat(width)
            slots[:kept] = chosen[chosen.numel() - kept :]
            slots[room:] = tail
            paged.indices[ends[pair] : ends[pair + 1]] = slots * kv_heads + h
            packed = _packed_mask(width, tokens, kept).to(paged.mask.device)
            first = int(paged.mask_indptr[pair])
            paged.mask[first : first + packed.numel()] = packed
            if req > 0:
                attended += torch.tensor([kept, length], device=attended.device) * layers
                clipped += (chosen.numel() - kept) * layers


def _packed_mask(width: int, tokens: int, kept: int) -> torch.Tensor:
    """uint8: bits of [tokens, width] rows, which see the first `kept` entries and the chain at the end."""
    seen = torch.zeros(-(-tokens * width // 8) * 8, dtype=torch.bool)
    rows = seen[: tokens * width].view(tokens, width)
    rows[:, :kept] = True
    rows[:, width - tokens :] = torch.ones(tokens, tokens).tril().bool()
    return (seen.view(-1, 8) * (1 << torch.arange(8))).sum(1).to(torch.uint8)


# ---- prefill


def score_blocks(
    q: torch.Tensor,
    pool: KvPool,
    contexts: Contexts,
    blocks: QueryBlocks,
    *,
    scale: float,
    sampled: int,
    shift: int = 0,
) -> torch.Tensor:
    """What some rows of each query block would attend to if they attended to everything: by blocks of keys.

    Of a block of n tokens the rows (i + 1) * n // sampled - 1 are asked, evenly spaced, the last among them;
    of fewer tokens than rows some are asked twice.

    Args:
        q: [N, H_q, D] queries of the new tokens, with contiguous heads; rows may lie apart.
        pool: of this layer, the new tokens' keys among them.
        contexts: with the lengths after the new tokens.
        scale: of the logits.
        sampled: rows of a block that are asked.
        shift: 0, or 1 in a draft's pass (SHIFT): `blocks` are of tokens all the same, with the rows where
            their queries are, and the key of token p lies at position p - shift of the table; the first
            token has none.

    Returns:
        float32 [blocks, H_kv, blocks.most, sampled * group]: of row i of query head g of a KV head, at
        i * group + g, the logarithm to base 2 of the sum of exp(logit) over the keys of a block that it sees;
        -inf where it sees none. Undefined for blocks that are WHOLE, and beyond a block's own keys.

    Raises:
        ValueError: a dtype, shape or stride does not fit.
    """
    check_block_scores(q, pool, contexts, blocks, sampled, shift)
    kv_heads, group = pool.k.shape[1], q.shape[1] // pool.k.shape[1]
    shape = (blocks.counts.numel(), kv_heads, blocks.most, sampled * group)
    sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    for i, (slots, first, before, number, count) in enumerate(_query_blocks(contexts, blocks)):
        if count == WHOLE:
            continue
        asked = [max((row + 1) * number // sampled - 1, 0) for row in range(sampled)]
        places = torch.tensor(asked, device=q.device)
        rows = q[first + places].float().unflatten(1, (kv_heads, group))  # [sampled, H_kv, group, D]
        positions = torch.arange(slots.numel(), device=q.device)
        keys = pool.k[slots[(positions - shift).clamp(min=0)]].float()  # [n, H_kv, D]
        logits = torch.einsum("shgd,nhd->hnsg", rows, keys) * (scale * pool.k_scale)
        unseen = (positions[:, None] > before + places) | (positions < shift)[:, None]  # [n, sampled]
        logits = logits.masked_fill(unseen[None, :, :, None], -torch.inf).flatten(2)
        for j, part in enumerate(logits.split(KEY_BLOCK, 1)):
            sums[i, :, j] = torch.logsumexp(part, 1) / math.log(2)
    return sums


def pool_blocks(
    sums: torch.Tensor, blocks: QueryBlocks, members: Members, scores: torch.Tensor, *, pooling: Pooling
) -> None:
    """Scores of blocks of keys by channel, of what the rows of one draft layer that are asked attend to.

    A row's sums become shares of everything it sees. Heads of a channel are pooled first, then rows, and then
    the layers that feed it, by the maximum or by adding as rows are.

    Args:
        sums: of `score_blocks` in that layer. blocks: as it was given.
        members: the channels that the layer feeds.
        scores: float32 [blocks, channels, blocks.most], zero at first: written, or raised by what is found,
            for the channels of `members` as far as a block's tokens see; nothing else of it.
        pooling: with the rows that were asked of a block.

    Raises:
        ValueError: a dtype or shape does not fit.
    """
    check_block_pooling(sums, blocks, members, scores, pooling)
    sizes = (blocks.before.tolist(), blocks.numbers.tolist(), blocks.counts.tolist())
    for i, (before, number, count) in enumerate(zip(*sizes, strict=True)):
        if count == WHOLE:
            continue
        own = sums[i, :, : blocks_of(before + number)] * math.log(2)  # [H_kv, seen, rows * group]
        shares = torch.exp(own - torch.logsumexp(own, 1, keepdim=True))
        by_row = shares.unflatten(2, (pooling.total_rows, -1))  # [H_kv, seen, rows, group]
        pooled = _pool(by_row.permute(2, 0, 3, 1).flatten(1, 2), members, pooling)
        for j, channel in enumerate(members.channels.tolist()):
            found = scores[i, channel, : pooled.shape[1]]
            if bool(members.fresh[j]):
                found.copy_(pooled[j])
            elif pooling.rows == "max":
                torch.maximum(found, pooled[j], out=found)
            else:
                found.add_(pooled[j])


def list_blocks(sums: torch.Tensor, blocks: QueryBlocks, *, sink: int, recent: int) -> torch.Tensor:
    """Select blocks of keys for each query block and KV head.

    A row's sums become shares of everything it sees, a block of keys has the largest share that any row gives
    it. Selected are the first `sink` blocks, the last `recent` of those wholly before the query block, and
    those with the highest scores, of equal ones the later.

    Args:
        sums: of `score_blocks`.
        sink, recent: blocks; a query block's count has room for them, or for all that there are.

    Returns:
        int32 [blocks, H_kv, blocks.most]: as many numbers of blocks of keys as `blocks.counts` says,
        ascending; undefined behind them, and for blocks that are WHOLE.

    Raises:
        ValueError: a dtype or shape does not fit.
    """
    check_block_lists(sums, blocks, sink, recent)
    listed = torch.zeros(sums.shape[:3], dtype=torch.int32, device=sums.device)
    sizes = (blocks.before.tolist(), blocks.numbers.tolist(), blocks.counts.tolist())
    for i, (before, number, count) in enumerate(zip(*sizes, strict=True)):
        if count == WHOLE:
            continue
        choices, seen = before // KEY_BLOCK, blocks_of(before + number)
        for h, own in enumerate(sums[i, :, :seen]):  # [seen, R]
            lse = torch.logsumexp(own * math.log(2), 0) / math.log(2)
            scores = torch.exp2(own - lse).amax(1)[:choices]
            scores[:sink] = torch.inf
            scores[max(choices - recent, 0) :] = torch.inf
            best = scores.flip(0).sort(descending=True, stable=True).indices[:count]
            listed[i, h, :count] = (choices - 1 - best).sort().values
    return listed


def block_attention(
    q: torch.Tensor,
    pool: KvPool,
    contexts: Contexts,
    blocks: QueryBlocks,
    listed: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
) -> None:
    """Exact softmax attention of each query block over the blocks of keys that it selected, what is between
    those that it could select and itself, and causally itself; of a block that is WHOLE over everything.

    Args:
        q, pool, contexts, scale: as of `score_blocks`. listed: of `list_blocks`.
        out: [N, H_q, D], written at the rows of these blocks.

    Raises:
        ValueError: a dtype, shape or stride does not fit.
    """
    check_block_attention(q, pool, contexts, blocks, listed, out)
    group = q.shape[1] // pool.k.shape[1]
    for i, (slots, first, before, number, count) in enumerate(_query_blocks(contexts, blocks)):
        rows, positions = slice(first, first + number), torch.arange(slots.numel(), device=q.device)
        causal = positions <= before + torch.arange(number, device=q.device)[:, None]
        for h in range(pool.k.shape[1]):
            attended = torch.ones_like(positions, dtype=torch.bool)
            if count != WHOLE:
                chosen = torch.isin(positions // KEY_BLOCK, listed[i, h, :count])
                attended = chosen | (positions >= before // KEY_BLOCK * KEY_BLOCK)
            seen, heads = slots[attended], slice(h * group, (h + 1) * group)
            found = scaled_dot_product_attention(
                q[rows, heads].transpose(0, 1)[None],  # [1, group, number, D]
                pool.k[seen, h].to(q.dtype).expand(1, group, -1, -1),
                pool.v[seen, h].to(q.dtype).expand(1, group, -1, -1),
                attn_mask=causal[:, attended],
                scale=scale * pool.k_scale,
            )
            out[rows, heads] = found[0].transpose(0, 1) * pool.v_scale


def block_slots(contexts: Contexts, blocks: QueryBlocks, listed: torch.Tensor, *, width: int) -> torch.Tensor:
    """What `block_attention` attends to, as pages of one token, for a paged attention that takes every
    (KV head, query block) as a request, of pools that are seen as one head.

    Args:
        contexts: with the lengths after the new tokens. listed: of `list_blocks`.
        width: tokens that a query block attends to at most, causality aside.

    Returns:
        int32 [H_kv, blocks, width]: slot * H_kv + h of every token that a query block and KV head h attend
        to, in the order of positions; undefined behind them, and for blocks that are WHOLE.

    Raises:
        ValueError: a dtype or shape does not fit.
    """
    check_block_slots(contexts, blocks, listed, width)
    kv_heads = listed.shape[1]
    found = torch.zeros(kv_heads, listed.shape[0], width, dtype=torch.int32, device=listed.device)
    for i, (slots, _, before, _, count) in enumerate(_query_blocks(contexts, blocks)):
        if count == WHOLE:
            continue
        block = torch.arange(slots.numel(), device=slots.device) // KEY_BLOCK
        for h in range(kv_heads):
            own = slots[torch.isin(block, listed[i, h, :count]) | (block >= before // KEY_BLOCK)]
            found[h, i, : own.numel()] = own * kv_heads + h
    return found


def _query_blocks(
    contexts: Contexts, blocks: QueryBlocks
) -> Iterator[tuple[torch.Tensor, int, int, int, int]]:
    """(int64 slots of what it sees, first row, tokens before it, tokens, count) of each query block."""
    columns = (blocks.requests, blocks.rows, blocks.before, blocks.numbers, blocks.counts)
    for request, row, before, number, count in zip(*(part.tolist() for part in columns), strict=True):
        slots = contexts.table[contexts.reqs[request], : before + number].long()
        yield slots, row, before, number, count
