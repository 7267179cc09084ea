"""Checks of an op's arguments, the same for both implementations.

A ValueError names the op and says in one line what was expected and what came.
"""

from __future__ import annotations

import torch

from sts_kernels.layout import (
    ALIGN,
    FP8,
    MOST_OVER,
    PAGE,
    SHIFT,
    Carried,
    Contexts,
    Directions,
    History,
    Kept,
    KeptSizes,
    KvPool,
    Lists,
    Members,
    PagedLists,
    PageSizes,
    Pooling,
    QueryBlocks,
    Room,
    Scores,
    Sizes,
)


def expect(op: str, ok: bool, message: str) -> None:
    """Raise ValueError `op: message` unless `ok`."""
    if not ok:
        raise ValueError(f"{op}: {message}")


def expect_half(op: str, scores: Scores) -> None:
    """Kernels take scores of float16 only."""
    dtype = scores.importance.dtype
    expect(op, dtype == torch.float16, f"importance is {dtype}, not float16")


def check_draft(
    q: torch.Tensor | None,
    pool: KvPool,
    scores: Scores,
    members: Members,
    carried: Carried,
    pooling: Pooling,
) -> None:
    """Arguments of draft_attention."""
    op = "draft_attention"
    expect(op, q is not None or carried.q is not None, "neither q nor carried.q is given")
    for name, rows in (("q", q), ("carried.q", carried.q)):
        if rows is not None:
            _check_queries(op, name, rows, pool)
    expect(op, carried.q is None or carried.q.is_contiguous(), "carried.q must be contiguous")
    shapes = tuple(pool.k.shape), tuple(pool.v.shape)
    expect(op, shapes[0] == shapes[1], f"pools {shapes[0]} and {shapes[1]} differ")
    _check_stored(op, carried.q if q is None else q, pool)
    _check_importance(op, scores)
    _check_members(op, members)
    _check_pooling(op, pooling)


def check_columns(op: str, contexts: Contexts, keeps: torch.Tensor, room: Room) -> None:
    """What score_columns and size_lists go by."""
    expect(op, contexts.lens.dim() == 1, f"lens must be [bs], got {tuple(contexts.lens.shape)}")
    expect(op, room.columns % ALIGN == 0, f"{room.columns} columns a request are no multiple of {ALIGN}")
    expect(op, keeps.dtype == torch.float64, f"keeps must be float64, got {keeps.dtype}")


def check_sizes(
    contexts: Contexts,
    carried_lens: torch.Tensor,
    keeps: torch.Tensor,
    split: torch.Tensor | None,
    room: Room,
) -> None:
    """Arguments of size_lists."""
    op = "size_lists"
    check_columns(op, contexts, keeps, room)
    ok = carried_lens.dtype == torch.int64 and carried_lens.shape == keeps.shape
    expect(op, ok, f"carried_lens must be int64 {tuple(keeps.shape)}, got {carried_lens.dtype}")
    if split is not None:
        ok = split.dtype == torch.float64 and split.dim() == 2 and split.shape[1] == room.channels
        expect(op, ok, f"split must be float64 [steps + 1, {room.channels}], got {tuple(split.shape)}")
        ok = split.shape[0] > 1 and split.is_contiguous()
        expect(op, ok, "split must be contiguous, of 2 rows or more")


def check_kept(kept: Kept, sizes: Sizes, room: Room) -> None:
    """Arguments of size_kept."""
    _check_kept("size_kept", kept, room.channels)
    bs = sizes.budgets.numel()
    ok = sizes.counts.shape == (bs, room.channels) == sizes.starts.shape
    expect("size_kept", ok, f"sizes must be of {bs} requests and {room.channels} channels")
    ok = kept.positions.numel() >= kept.lens.numel() * room.entries
    expect("size_kept", ok, f"positions must have {room.entries} entries of each row")


def check_kept_lists(kept: Kept, contexts: Contexts, lists: Lists) -> None:
    """Arguments of list_kept."""
    op, channels = "list_kept", kept.counts.shape[1]
    _check_kept(op, kept, channels)
    _check_lists(op, lists, (contexts.lens.numel(), channels))


def check_kept_selected(kept: Kept, contexts: Contexts, found: KeptSizes, lists: Lists) -> None:
    """Arguments of keep_selected."""
    op, channels = "keep_selected", kept.counts.shape[1]
    _check_kept(op, kept, channels)
    shape = contexts.lens.numel(), channels
    _check_lists(op, lists, shape)
    own = found.sizes
    for name, dtype, parts in (
        ("starts", torch.int64, (lists.starts, found.starts, found.keep_at, own.starts)),
        ("counts", torch.int32, (lists.counts, found.counts, own.counts)),
    ):
        ok = all(p.shape == shape and p.dtype == dtype and p.is_contiguous() for p in parts)
        expect(op, ok, f"{name} of lists and found must be contiguous {dtype} {shape}")


def _check_kept(op: str, kept: Kept, channels: int) -> None:
    rows = kept.lens.numel()
    for name, shape, dtype in (
        ("positions", kept.positions.shape, torch.int32),
        ("starts", (rows, channels), torch.int64),
        ("counts", (rows, channels), torch.int32),
        ("lens", (rows,), torch.int64),
        ("rounds", (rows,), torch.int64),
        ("last", (rows,), torch.int64),
        ("accepted", (rows, 4), torch.int64),
    ):
        part = getattr(kept, name)
        ok = part.shape == shape and part.dtype == dtype and part.is_contiguous()
        got = f"{part.dtype} {tuple(part.shape)}"
        expect(op, ok, f"kept.{name} must be contiguous {dtype} {tuple(shape)}, got {got}")


def check_history(scores: Scores, history: History, weight: torch.Tensor) -> None:
    """Arguments of blend_history."""
    op, importance, held = "blend_history", scores.importance, history.scores
    _check_importance(op, scores)
    got = f"{held.dtype} {tuple(held.shape)}"
    ok = held.dim() == 2 and held.is_contiguous() and held.shape[1] == importance.shape[0]
    expect(op, ok, f"history.scores must be contiguous [slots, channels], got {got}")
    expect(op, held.dtype == importance.dtype, f"history.scores must be {importance.dtype}, got {got}")
    ok = history.owner.shape == held.shape[:1] and history.owner.dtype == torch.int64
    expect(op, ok, "history.owner must be int64 [slots]")
    ok = history.round.shape == (1,) and history.round.dtype == torch.int64
    expect(op, ok, "history.round must be int64 [1]")
    expect(op, weight.dtype == torch.float32, f"weight must be float32 [bs], got {weight.dtype}")


def check_spread(scores: Scores, factor: float, over: int) -> None:
    """Arguments of spread_importance."""
    op = "spread_importance"
    _check_importance(op, scores)
    expect(op, 0 < factor <= 1, f"factor must be above 0 and at most 1, got {factor}")
    expect(op, 1 <= over <= MOST_OVER, f"over must be from 1 to {MOST_OVER}, got {over}")


def check_select(scores: Scores, budgets: torch.Tensor, lists: Lists) -> None:
    """Arguments of select_tokens."""
    _check_importance("select_tokens", scores)
    _check_lists("select_tokens", lists, (budgets.numel(), scores.importance.shape[0]))


def check_plan(lists: Lists, channels: torch.Tensor) -> None:
    """Arguments of plan_lists."""
    op = "plan_lists"
    _check_lists(op, lists)
    ok = channels.dim() == 2 and channels.dtype == torch.int32
    expect(op, ok, f"channels must be int32 [layers, H_kv], got {channels.dtype} {tuple(channels.shape)}")


def check_attention(
    q: torch.Tensor, pool: KvPool, lists: Lists, channels: torch.Tensor, tail_mask: torch.Tensor
) -> None:
    """Arguments of sparse_attention."""
    op = "sparse_attention"
    expect(op, q.dim() == 4, f"q must be [bs, T, H_q, D], got {tuple(q.shape)}")
    bs, tokens, q_heads, dim = q.shape
    _check_distance(op, q)
    k, v = pool.k, pool.v
    ok = k.dim() == 3 and k.shape == v.shape and k.shape[2] == dim
    expect(op, ok, f"pools {tuple(k.shape)} and {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    ok = k.stride() == v.stride() and k.stride(2) == 1
    expect(op, ok, "pools must share strides [.., .., 1]")
    _check_stored(op, q, pool)
    kv_heads = k.shape[1]
    expect(op, q_heads % kv_heads == 0, f"{q_heads} query heads for {kv_heads} KV heads")
    expect(op, channels.numel() == kv_heads, f"channels must be [{kv_heads}], got {tuple(channels.shape)}")
    _check_lists(op, lists)
    expect(op, lists.counts.shape[0] == bs, f"{lists.counts.shape[0]} lists a channel for {bs} requests")
    ok = tail_mask.shape[:2] == (bs, tokens) and tail_mask.stride(2) == 1
    ok = ok and (tokens == 1 or tail_mask.stride(1) == tail_mask.shape[2])
    expect(op, ok, f"tail_mask must be [bs, T, N] with contiguous rows, got {tuple(tail_mask.shape)}")


def check_headwise(lists: Lists, channels: torch.Tensor, paged: PagedLists) -> None:
    """Arguments of headwise_lists."""
    op = "headwise_lists"
    _check_lists(op, lists)
    pairs = lists.counts.shape[0] * channels.numel()
    for name, ends in (("indptr", paged.indptr), ("mask_indptr", paged.mask_indptr)):
        ok = ends.dtype == torch.int32 and ends.dim() == 1 and ends.numel() > pairs
        expect(op, ok, f"{name} must be int32 [{pairs} + 1 or more], got {ends.dtype} {tuple(ends.shape)}")
    expect(op, paged.indices.dtype == torch.int32, f"indices must be int32, got {paged.indices.dtype}")
    expect(op, paged.mask.dtype == torch.uint8, f"mask must be uint8, got {paged.mask.dtype}")


def check_tags(op: str, contexts: Contexts, before: torch.Tensor, tags: torch.Tensor) -> None:
    """Arguments of tag_pages, and of others that read tags."""
    _check_before(op, contexts, before)
    ok = tags.dtype == torch.int32 and tags.dim() == 1 and tags.is_contiguous()
    expect(op, ok, f"tags must be contiguous int32 [slots], got {tags.dtype} {tuple(tags.shape)}")


def check_sketches(
    keys: torch.Tensor,
    sketches: torch.Tensor,
    contexts: Contexts,
    before: torch.Tensor,
    tags: torch.Tensor,
) -> None:
    """Arguments of sketch_pages."""
    op = "sketch_pages"
    check_tags(op, contexts, before, tags)
    _check_keys(op, keys)
    _check_sketches(op, sketches, keys.shape[1], keys.shape[2])


def check_page_sizes(contexts: Contexts, tags: torch.Tensor, lists: Lists, channels: torch.Tensor) -> None:
    """Arguments of size_pages."""
    op = "size_pages"
    check_tags(op, contexts, contexts.lens, tags)
    _check_lists(op, lists)
    bs = contexts.lens.numel()
    expect(op, lists.counts.shape[0] == bs, f"{lists.counts.shape[0]} lists a channel for {bs} requests")
    _check_layers(op, channels)


def check_page_scores(
    q: torch.Tensor, sketches: torch.Tensor, sizes: PageSizes, scores: Scores, pooling: Pooling
) -> None:
    """Arguments of score_pages."""
    op = "score_pages"
    _check_importance(op, scores)
    kv_heads, bs = scores.importance.shape[0], sizes.contexts.lens.numel()
    _check_rows(op, q, bs, kv_heads)
    _check_sketches(op, sketches, kv_heads, q.shape[3])
    _check_pooling(op, pooling)


def check_token_sketches(
    keys: torch.Tensor,
    sketches: torch.Tensor,
    directions: Directions,
    contexts: Contexts,
    before: torch.Tensor,
) -> None:
    """Arguments of sketch_tokens."""
    op = "sketch_tokens"
    _check_before(op, contexts, before)
    _check_keys(op, keys)
    _check_directions(op, sketches, directions, keys.shape[1], keys.shape[2])
    got = directions.onto.dtype
    ok = got == keys.dtype or keys.dtype in FP8
    expect(op, ok, f"directions.onto must be {keys.dtype} as keys are, got {got}")


def check_token_scores(
    q: torch.Tensor, sketches: torch.Tensor, directions: Directions, scores: Scores, pooling: Pooling
) -> None:
    """Arguments of score_tokens."""
    op = "score_tokens"
    _check_importance(op, scores)
    kv_heads, bs = scores.importance.shape[0], scores.starts.numel()
    _check_rows(op, q, bs, kv_heads)
    _check_directions(op, sketches, directions, kv_heads, q.shape[3])
    _check_pooling(op, pooling)


def check_block_scores(
    q: torch.Tensor, pool: KvPool, contexts: Contexts, blocks: QueryBlocks, sampled: int, shift: int
) -> None:
    """Arguments of score_blocks."""
    op = "score_blocks"
    _check_prefill(op, q, pool, contexts, blocks)
    expect(op, sampled >= 1, f"sampled must be 1 or more, got {sampled}")
    expect(op, shift in (0, SHIFT), f"shift must be 0 or {SHIFT}, got {shift}")


def check_block_pooling(
    sums: torch.Tensor, blocks: QueryBlocks, members: Members, scores: torch.Tensor, pooling: Pooling
) -> None:
    """Arguments of pool_blocks."""
    op = "pool_blocks"
    _check_sums(op, sums, blocks)
    rows = pooling.total_rows
    expect(op, rows >= 1 and sums.shape[3] % rows == 0, f"total_rows must divide {sums.shape[3]}, got {rows}")
    _check_members(op, members)
    _check_pooling(op, pooling)
    wanted, got = (
        f"[{blocks.counts.numel()}, channels, {blocks.most}]",
        f"{scores.dtype} {tuple(scores.shape)}",
    )
    ok = scores.dim() == 3 and scores.shape[0] == blocks.counts.numel() and scores.shape[2] == blocks.most
    ok = ok and scores.dtype == torch.float32 and scores.is_contiguous()
    expect(op, ok, f"scores must be contiguous float32 {wanted}, got {got}")


def check_block_lists(sums: torch.Tensor, blocks: QueryBlocks, sink: int, recent: int) -> None:
    """Arguments of list_blocks."""
    op = "list_blocks"
    _check_sums(op, sums, blocks)
    expect(op, sink >= 0 and recent >= 0, f"sink {sink} and recent {recent} must not be negative")


def check_block_attention(
    q: torch.Tensor,
    pool: KvPool,
    contexts: Contexts,
    blocks: QueryBlocks,
    listed: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Arguments of block_attention."""
    op = "block_attention"
    _check_prefill(op, q, pool, contexts, blocks)
    _check_listed(op, listed, blocks, pool.k.shape[1])
    ok = out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    got = f"{out.dtype} {tuple(out.shape)}"
    expect(op, ok, f"out must be contiguous {q.dtype} {tuple(q.shape)} as q is, got {got}")


def check_block_slots(contexts: Contexts, blocks: QueryBlocks, listed: torch.Tensor, width: int) -> None:
    """Arguments of block_slots."""
    op = "block_slots"
    expect(op, contexts.lens.dim() == 1, f"lens must be [bs], got {tuple(contexts.lens.shape)}")
    _check_blocks(op, blocks)
    _check_listed(op, listed, blocks, listed.shape[1] if listed.dim() == 3 else 1)
    expect(op, width >= 0, f"width must not be negative, got {width}")


def _check_listed(op: str, listed: torch.Tensor, blocks: QueryBlocks, kv_heads: int) -> None:
    """What list_blocks answers."""
    wanted = (blocks.counts.numel(), kv_heads, blocks.most)
    ok = tuple(listed.shape) == wanted and listed.dtype == torch.int32 and listed.is_contiguous()
    got = f"{listed.dtype} {tuple(listed.shape)}"
    expect(op, ok, f"listed must be contiguous int32 {wanted}, got {got}")


def _check_sums(op: str, sums: torch.Tensor, blocks: QueryBlocks) -> None:
    """What score_blocks answers."""
    _check_blocks(op, blocks)
    wanted, got = f"[{blocks.counts.numel()}, H_kv, {blocks.most}, R]", f"{sums.dtype} {tuple(sums.shape)}"
    ok = sums.dim() == 4 and sums.shape[0] == blocks.counts.numel() and sums.shape[2] == blocks.most
    ok = ok and sums.dtype == torch.float32 and sums.is_contiguous()
    expect(op, ok, f"sums must be contiguous float32 {wanted}, got {got}")


def _check_prefill(op: str, q: torch.Tensor, pool: KvPool, contexts: Contexts, blocks: QueryBlocks) -> None:
    """New tokens of a prefill, whose keys and values are in the pool."""
    _check_queries(op, "q", q, pool)
    _check_stored(op, q, pool)
    ok = pool.k.shape == pool.v.shape and pool.k.stride() == pool.v.stride() and pool.k.stride(2) == 1
    expect(op, ok, "pools must be of one shape and share strides [.., .., 1]")
    expect(op, contexts.lens.dim() == 1, f"lens must be [bs], got {tuple(contexts.lens.shape)}")
    _check_blocks(op, blocks)


def _check_blocks(op: str, blocks: QueryBlocks) -> None:
    number = blocks.counts.numel()
    for name in ("requests", "rows", "numbers", "before", "counts"):
        own = getattr(blocks, name)
        ok = own.dtype == torch.int32 and tuple(own.shape) == (number,) and own.is_contiguous()
        got = f"{own.dtype} {tuple(own.shape)}"
        expect(op, ok, f"blocks.{name} must be contiguous int32 [{number}], got {got}")


def _check_before(op: str, contexts: Contexts, before: torch.Tensor) -> None:
    """What is written of every request begins there."""
    lens = tuple(contexts.lens.shape)
    expect(op, len(lens) == 1, f"lens must be [bs], got {lens}")
    expect(op, tuple(before.shape) == lens, f"before must be {lens} as lens are, got {tuple(before.shape)}")


def _check_keys(op: str, keys: torch.Tensor) -> None:
    ok = keys.dim() == 3 and keys.stride(2) == 1
    expect(op, ok, f"keys must be [slots, H_kv, D] with stride 1 in D, got {tuple(keys.shape)}")


def _check_rows(op: str, q: torch.Tensor, bs: int, kv_heads: int) -> None:
    """Queries of a step or verify, which score."""
    ok = q.dim() == 4 and q.shape[0] == bs and q.shape[2] % kv_heads == 0
    expect(op, ok, f"q must be [{bs}, T, H_q, D] for {kv_heads} KV heads, got {tuple(q.shape)}")
    _check_distance(op, q)


def _check_directions(
    op: str, sketches: torch.Tensor, directions: Directions, kv_heads: int, dim: int
) -> None:
    """Of sketches int8 [slots, H_kv, R / 2]."""
    ok = sketches.dim() == 3 and sketches.shape[1] == kv_heads and sketches.dtype == torch.int8
    got = f"{sketches.dtype} {tuple(sketches.shape)}"
    expect(
        op,
        ok and sketches.is_contiguous(),
        f"sketches must be contiguous int8 [slots, {kv_heads}, R / 2], got {got}",
    )
    number = 2 * sketches.shape[2]
    wanted = {"onto": (kv_heads, dim, number), "centre": (kv_heads, number), "back": (kv_heads, dim, number)}
    for name, shape in wanted.items():
        own = getattr(directions, name)
        ok = tuple(own.shape) == shape and own.is_contiguous()
        expect(op, ok, f"directions.{name} must be contiguous {shape}, got {tuple(own.shape)}")


def check_page_lists(scores: Scores, sizes: PageSizes, lists: Lists, channels: torch.Tensor) -> None:
    """Arguments of list_pages."""
    _check_lists("list_pages", lists, tuple(sizes.counts.shape))
    _check_pages_of_layers("list_pages", scores, sizes, channels)


def check_join(
    scores: Scores, drafted: Scores, joined: torch.Tensor, sizes: PageSizes, channels: torch.Tensor
) -> None:
    """Arguments of join_pages."""
    op, importance = "join_pages", drafted.importance
    _check_pages_of_layers(op, scores, sizes, channels)
    _check_importance(op, drafted)
    wanted = (channels.shape[1], importance.shape[1])
    ok = tuple(joined.shape) == wanted and joined.dtype == importance.dtype and joined.stride(1) == 1
    got = f"{joined.dtype} {tuple(joined.shape)}"
    expect(op, ok, f"joined must be {importance.dtype} {wanted}, a row without gaps, got {got}")


def _check_pages_of_layers(op: str, scores: Scores, sizes: PageSizes, channels: torch.Tensor) -> None:
    """Scores of the pages of one layer, of those that sizes are about."""
    _check_importance(op, scores)
    _check_layers(op, channels)
    layers, kv_heads = channels.shape
    wanted = (layers, sizes.counts.shape[0], kv_heads)
    expect(op, sizes.pages.shape == wanted, f"sizes.pages must be {wanted}, got {tuple(sizes.pages.shape)}")
    rows = scores.importance.shape[0]
    expect(op, rows == kv_heads, f"{rows} rows of importance for {kv_heads} KV heads")


def _check_sketches(op: str, sketches: torch.Tensor, kv_heads: int, dim: int) -> None:
    """A slice of a mean and of a deviation a slot and KV head."""
    expect(op, dim % PAGE == 0, f"heads of {dim} dimensions are not sliced evenly among {PAGE} slots")
    ok = sketches.dim() == 3 and tuple(sketches.shape[1:]) == (kv_heads, 2 * dim // PAGE)
    ok = ok and sketches.is_contiguous() and sketches.dtype in (torch.float16, torch.float32)
    got = f"{sketches.dtype} {tuple(sketches.shape)}"
    wanted = f"[slots, {kv_heads}, {2 * dim // PAGE}]"
    expect(op, ok, f"sketches must be contiguous {wanted} of float16 or float32, got {got}")


def _check_layers(op: str, channels: torch.Tensor) -> None:
    """int32 [layers, H_kv]."""
    ok = channels.dim() == 2 and channels.dtype == torch.int32 and channels.is_contiguous()
    got = f"{channels.dtype} {tuple(channels.shape)}"
    expect(op, ok, f"channels must be contiguous int32 [layers, H_kv], got {got}")


def _check_members(op: str, members: Members) -> None:
    agree = members.heads.shape[0] == members.channels.numel() == members.scale.numel()
    expect(op, agree, "members do not agree")


def _check_pooling(op: str, pooling: Pooling) -> None:
    for name, how in (("rows", pooling.rows), ("heads", pooling.heads)):
        expect(op, how in ("max", "mean"), f"pooling.{name} must be 'max' or 'mean', got {how!r}")


def _check_distance(op: str, q: torch.Tensor) -> None:
    """Rows of [bs, T, H_q, D] lie at one distance, each of contiguous heads."""
    bs, tokens, _, dim = q.shape
    # The stride of a dimension of one says nothing.
    ok = (tokens == 1 or q.stride(0) == tokens * q.stride(1)) and q.stride()[2:] == (dim, 1)
    expect(op, ok or bs == 0, f"q must be rows of contiguous heads at one distance, got strides {q.stride()}")


def _check_queries(op: str, name: str, rows: torch.Tensor, pool: KvPool) -> None:
    """Rows [n, H_q, D] of contiguous heads that fit the pool."""
    kv_heads, dim = pool.k.shape[1:]
    ok = rows.dim() == 3 and rows.shape[2] == dim
    expect(op, ok, f"{name} must be [rows, H_q, {dim}], got {tuple(rows.shape)}")
    expect(
        op,
        rows.stride()[1:] == (dim, 1),
        f"{name} must have contiguous heads, got strides {rows.stride()}",
    )
    expect(op, rows.shape[1] % kv_heads == 0, f"{rows.shape[1]} query heads for {kv_heads} KV heads")


def _check_stored(op: str, q: torch.Tensor, pool: KvPool) -> None:
    """Keys and values have the dtype of the queries, or are scaled."""
    k, v = pool.k.dtype, pool.v.dtype
    ok = k == v and (k == q.dtype or k in FP8)
    expect(op, ok, f"pools must be {q.dtype} as q is, or {' or '.join(map(str, FP8))}, got {k} and {v}")
    ok = k in FP8 or (pool.k_scale, pool.v_scale) == (1, 1)
    expect(op, ok, f"pools of {k} have scales {pool.k_scale} and {pool.v_scale}, not 1")


def _check_importance(op: str, scores: Scores) -> None:
    """float16, or float32, which the server takes that others are compared with."""
    importance = scores.importance
    ok = importance.dim() == 2 and importance.dtype in (torch.float16, torch.float32)
    got = f"{importance.dtype} {tuple(importance.shape)}"
    expect(op, ok, f"importance must be [channels, columns] of float16 or float32, got {got}")


def _check_lists(op: str, lists: Lists, shape: tuple[int, int] | None = None) -> None:
    """Starts and counts by request and channel, of `shape` where it is known."""
    starts, counts = tuple(lists.starts.shape), tuple(lists.counts.shape)
    ok = starts == counts and len(counts) == 2 and shape in (None, counts)
    wanted = "[bs, channels]" if shape is None else shape
    expect(op, ok, f"lists.starts {starts} and lists.counts {counts} must be {wanted}")
