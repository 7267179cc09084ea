"""What the steps of a round pass to each other: tensors under one name, and the numbers all of them agree on.

Every op takes these and nothing that is packed otherwise. Buffers are static, so that a CUDA graph can record
the ops: a round writes into them, it never replaces them.

Shapes: bs requests in a batch; a request has `lens` committed tokens, its *context*, at positions [0, L), and
a *tail* of tokens behind them that are not committed yet. A *channel* is a row of scores that one or several
(target layer, KV head) pairs select by. A *slot* is a row of a KV pool.
"""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple

import torch

# Scores of a request start at a multiple of this many columns: a kernel's block of positions has one
# request's alone, and scores are read 16 bytes at a time.
ALIGN = 64
# Draft KV is shifted by one token in every algorithm: the draft's key at index p is about the target's token
# p + 1, and no draft key is about token 0.
SHIFT = 1
# Importance is stored as float16 probability * 2**14: relative precision 2**-11 down to 4e-9, below
# what a token among 128K can get on average by three orders of magnitude.
IMPORTANCE_SCALE = 2.0**14
# What is remembered of a slot whose token was never scored. Below every score, so that a maximum never keeps
# it, and never zero: a token that was not scored is not an unimportant one.
UNKNOWN = -1.0
# Dtypes of keys and values besides that of the queries. Every value of one is a value of float16 and of
# bfloat16 too, so that kernels read it as one of either without a rounding.
FP8 = (torch.float8_e4m3fn,)
# In place of the length of a list: the whole context is attended to, and nothing is listed.
WHOLE = -1
# Positions that share a sketch of their keys: page p of a request is its positions from PAGE * p on. A sketch
# is as wide as two keys and lies in PAGE equal slices beside the keys, one a slot.
PAGE = 16
# A sketch of a token has as many values as a key's dimensions, divided by this: half a byte each.
SKETCHED = 2
# Bits of a float16 score that its rank in a list of tokens does not depend on: all but the exponent and four
# of the mantissa. A sketch tells a score no better.
UNRANKED_BITS = 6
RANKS = 1 << (15 - UNRANKED_BITS)  # of scores that are not negative
# Rows of scores that are longer than one program can hold are listed in parts: about so many of all rows
# together, and of at least so many scores each.
PARTS, SEGMENT = 1056, 4096
# Query rows of a KV head from which on sketches of tokens are read twice, and no logits are kept in between.
AGAIN = 12
MOST_STEPS = 7  # of a value of a sketch, either way
# Two values share a byte, v and w as 16 * w + v + LOW_ZERO: so either half is had by a mask alone.
LOW_ZERO = 8
QUERY_STEPS = 127  # of a query that sketches are multiplied with, in int8, either way
# New tokens of a prefill that have one selection, and keys that are selected together: neighbours.
QUERY_BLOCK = KEY_BLOCK = 128
# Tokens that a token's importance is passed on to, at most.
MOST_OVER = 64
# Tokens that may come before a selection that is kept is made anew, whatever else says when.
KEPT_TOKENS = 256
# In place of the slot that ends a slot's page: the slice that lies there belongs to none.
NO_PAGE = -1

PoolName = Literal["max", "mean"]


def pages_of(positions: int) -> int:
    """Pages of so many positions, the last of them maybe not complete."""
    return -(-positions // PAGE)


def parts_of_rows(rows: int, width: int, *, parts: int = PARTS, least: int = SEGMENT) -> tuple[int, int]:
    """Parts of each of so many rows of up to `width` scores, and scores of a part, `least` or a multiple; all
    rows together have `parts + rows` at most."""
    segment = max(1, -(-rows * width // (parts * least))) * least
    return -(-width // segment), segment


def part_bytes(rows: int) -> int:
    """Of the counts of so many rows in parts: an int32 for every rank, and for those within one."""
    return (PARTS + rows) * 4 * (RANKS + (1 << UNRANKED_BITS))


def sketch_bytes(head_dim: int) -> int:
    """Of a token's sketch for one KV head."""
    return head_dim // SKETCHED // 2


def blocks_of(positions: int) -> int:
    """Blocks of so many keys, the last of them maybe not complete."""
    return -(-positions // KEY_BLOCK)


class Count(enum.IntEnum):
    """Places of the running totals in the int64 tensor that the ops of a round add to.

    A verify is one request in one round; tokens are counted per (layer, KV head). Request 0 is never counted:
    SGLang pads the batches of CUDA graphs with it.
    """

    SPARSE_VERIFIES = 0
    DENSE_VERIFIES = 1  # of the whole context because its importance is not known
    SELECTED_TOKENS = 2
    AVAILABLE_TOKENS = 3
    FULL_VERIFIES = 4  # of the whole context because the configuration says so
    CLIPPED_TOKENS = 5  # that the lists of FlashInfer had no room for
    DRAFT_SELECTED_TOKENS = 6  # in sparse passes of the draft
    DRAFT_AVAILABLE_TOKENS = 7
    ASIDE_VERIFIES = 8  # of the sparse ones: of contexts within their budget, where nothing is selected
    PREFILL_SELECTED_BLOCKS = 9  # of keys that blocks of new tokens select, or attend to unasked beside them
    PREFILL_AVAILABLE_BLOCKS = 10  # that they could
    SCORED_ROUNDS = 11  # of requests whose context was scored, where selections may be kept
    KEPT_ROUNDS = 12  # of requests that went by a selection of an earlier round
    DRAFT_PREFILL_SELECTED_BLOCKS = 13  # as the two above, of a draft that is prefilled sparsely itself
    DRAFT_PREFILL_AVAILABLE_BLOCKS = 14


class Part(enum.IntFlag):
    """What a piece of work in a `Plan` is of its list."""

    OF_CONTEXT = 1  # no list: positions of the request's whole context
    FIRST = 2
    LAST = 4  # the tail of the request is read with this one


class Contexts(NamedTuple):
    """The requests of a batch and where their tokens are.

    table: int32 [requests, width], the slot of every position of every request (SGLang's req_to_token).
    reqs: int [bs], rows of `table`; row 0 pads the batches of CUDA graphs. lens: int [bs], committed tokens.
    """

    table: torch.Tensor
    reqs: torch.Tensor
    lens: torch.Tensor


class KvPool(NamedTuple):
    """Keys and values of one layer, [slots, H_kv, D] each, with the same strides [.., .., 1], in the dtype of
    the queries or in one of FP8.

    k_scale, v_scale: by which a stored key, or value, is multiplied to be the one that was meant; 1 but for
    FP8. Numbers, not tensors: they are known when a model is loaded, and a CUDA graph may record them.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0


class Scores(NamedTuple):
    """Importance of every context token of a batch, by channel.

    importance: float16 [channels, columns], probability * IMPORTANCE_SCALE (the torch ops take float32 too,
    where a rounding must not decide between near-equal scores). starts: int64 [bs], the first column of each
    request, a multiple of ALIGN; its position p is at column start + p. -1: the request has no columns, or
    its importance is not known.
    """

    importance: torch.Tensor
    starts: torch.Tensor


class Lists(NamedTuple):
    """The slots that each (request, channel) attends to, in any order.

    indices: int32, lists of slots one behind the other. starts: int64 [bs, channels], the first entry of
    each. counts: int32 [bs, channels], its length, or WHOLE.
    """

    indices: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    def whole(self) -> Lists:
        """The same with everybody attending to everything."""
        return self._replace(counts=torch.full_like(self.counts, WHOLE))


class Carried(NamedTuple):
    """The row of each request's last accepted token, kept from the pass of the draft that saw it.

    q: its query, [requests, H_q, D] by row of the table, of one draft layer; None where it has been scored
    already. lens: int64 [requests], the committed length that the row was made for: with another length it is
    a leftover of the slot's last owner, and scores nothing.
    """

    q: torch.Tensor | None
    lens: torch.Tensor


class Members(NamedTuple):
    """The channels that one draft layer feeds.

    channels: int32 [n], rows of `importance`. heads: int32 [n, most], query heads of this layer, -1
    padded. scale: float32 [n], 1 / number of heads of the channel in all layers (for the mean over heads).
    fresh: bool [n], this is the first layer to feed the channel.
    """

    channels: torch.Tensor
    heads: torch.Tensor
    scale: torch.Tensor
    fresh: torch.Tensor


class Pooling(NamedTuple):
    """How the draft's rows and heads become one score a token.

    rows, heads: "max" or "mean". total_rows: rows that a request has in a round, the divisor of the mean.
    """

    rows: PoolName
    heads: PoolName
    total_rows: int


class Rule(NamedTuple):
    """How many tokens are selected of a context.

    keep: share of the context, None for `budget` tokens. least: tokens that a budget has at least; forced:
    the sink and recent among them, which every list has. guard: taken off keep * length before it is rounded
    up, so that a float error above a whole number does not add a token.
    """

    keep: float | None
    budget: int
    least: int
    forced: int
    guard: float


class Room(NamedTuple):
    """What the buffers of a round hold of each request. It has a part of them to itself, by its place in the
    batch: however many requests there are and whatever their contexts are together.

    channels: of the head map. columns: of scores, a multiple of ALIGN and no less than a context can have.
    budget: tokens of a list before a head map splits them; who wants more attends to everything. entries: of
    all its lists together.
    """

    channels: int
    columns: int
    budget: int
    entries: int


class Sizes(NamedTuple):
    """Where the scores and lists of a batch lie and how long the lists are, see `size_lists`.

    known: int64 [bs], first column of the requests whose importance is known, else -1. sparse: the same of
    those among them that attend to less than everything. budgets: int64 [bs], tokens of a list before a head
    map splits them. starts: int64 and counts: int32 [bs, channels], of `Lists`.
    """

    known: torch.Tensor
    sparse: torch.Tensor
    budgets: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor


class Kept(NamedTuple):
    """Selections that outlive their round, by row of the table: whoever else is in the batch, a request finds
    its own. Kept are positions, for a running request may be given other slots of the same tokens (SGLang
    lets a prompt that somebody else had cached first share that one's, when its first round has begun
    already).

    positions: int32 [rows * Room.entries], what was selected. starts: int64 and counts: int32 [rows,
    channels], of its lists, or WHOLE. lens: int64 [rows], tokens of the context then; 0: nothing is kept.
    rounds: int64 [rows], since then, that one included. last: int64 [rows], tokens of the context in the
    latest round. accepted: int64 [rows, 4]: tokens that came by rounds which scored, and such rounds; the
    same of rounds since the latest of them.
    """

    positions: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    lens: torch.Tensor
    rounds: torch.Tensor
    last: torch.Tensor
    accepted: torch.Tensor


class KeptSizes(NamedTuple):
    """Who is scored in a round, and the lists that are kept, see `size_kept`.

    sizes: of those that are scored; the others are neither known nor sparse there, and have no lists. starts:
    int64 and counts: int32 [bs, channels], of the lists that are kept, or WHOLE. scored, kept: int [bs],
    tokens of the contexts of those that are scored, and of those that go by what is kept, 0 for the others.
    goes: bool [bs], the latter. keep_at: int64 [bs, channels], where in Kept.positions the lists of those
    that are scored start, as sizes.starts says it of the round's own.
    """

    sizes: Sizes
    starts: torch.Tensor
    counts: torch.Tensor
    scored: torch.Tensor
    kept: torch.Tensor
    goes: torch.Tensor
    keep_at: torch.Tensor


class PageSizes(NamedTuple):
    """What the layers of a step share of the selection of pages, see `size_pages`.

    known: uint8 [bs, pages], whether a page's sketch is the request's own. unknown: int32 [bs], of a request
    that wanted a list the pages without one, where pages are chosen (not among sink and recent). contexts:
    the pages as `select_tokens` takes positions: the slot of a page is its number, and a request that has no
    list has no pages. counts: int32 [bs, channels], tokens of the lists, or WHOLE. starts: int64 [bs, H_kv],
    where the page numbers of a list start, and pages: int32 [layers, bs, H_kv], how many there are, or WHOLE.
    """

    known: torch.Tensor
    unknown: torch.Tensor
    contexts: Contexts
    counts: torch.Tensor
    starts: torch.Tensor
    pages: torch.Tensor

    def some(self, few: slice) -> PageSizes:
        """Of some neighbours of the batch."""
        own = self.contexts._replace(reqs=self.contexts.reqs[few], lens=self.contexts.lens[few])
        by_request = [part[few] for part in (self.counts, self.starts)]
        return PageSizes(self.known[few], self.unknown[few], own, *by_request, self.pages[:, few])

    def lists(self, layer: int) -> Lists:
        """Room for the lists of page numbers of one layer."""
        room = self.starts.numel() * self.known.shape[1]
        indices = torch.empty(room, dtype=torch.int32, device=self.starts.device)
        return Lists(indices, self.starts, self.pages[layer])


class Directions(NamedTuple):
    """What the keys of one layer are projected on, to be sketched token by token.

    onto: [H_kv, D, R], orthonormal directions divided by their steps, in the dtype of keys; R is even.
    centre: float32 [H_kv, R], the mean of keys on them, in steps. back: [H_kv, D, R], the directions times
    their steps, which a query is projected on.
    """

    onto: torch.Tensor
    centre: torch.Tensor
    back: torch.Tensor


class QueryBlocks(NamedTuple):
    """Neighbouring new tokens of a prefill, up to QUERY_BLOCK of one request, which have one selection.

    Blocks of keys are counted from a request's first token on. A query block may select among those that lie
    wholly before it, and always attends to what is between them and itself, and causally to itself.

    int32 [blocks] each. requests: places in the batch. rows: of the query of the first token. numbers: of
    tokens. before: tokens before the first. counts: blocks of keys that are selected, or WHOLE for all of
    them. Blocks that are not WHOLE stand last, those of a request side by side. most: blocks of keys that any
    of them sees, those of its own tokens as well; known on the host.
    """

    requests: torch.Tensor
    rows: torch.Tensor
    numbers: torch.Tensor
    before: torch.Tensor
    counts: torch.Tensor
    most: int


class History(NamedTuple):
    """What KV slots remember of the importance of their tokens.

    scores: [slots, channels] of importance's dtype, by the slot of the target's token; UNKNOWN where nothing
    is remembered. owner: int64 [slots], zero at first: in which round a slot was touched and, in a kernel, by
    whom. round: int64 [1], this round, above all before it.
    """

    scores: torch.Tensor
    owner: torch.Tensor
    round: torch.Tensor


class Plan(NamedTuple):
    """How attention over lists is parted among the programs of a kernel, for one layer or for several.

    work: int64 [layers, work, 4], a part of a list each: the pair b * H_kv + h; its first entry in the lists,
    or position where the pair attends to its whole context; its tokens; and its `Part` flags. ends: int32
    [layers, bs * H_kv + 1], where each pair's parts end in `work`, after a zero; what `work` has beyond the
    last end is undefined. most: parts that a list has at most. `of(layer)` is one layer's, without the first
    dimension.
    """

    work: torch.Tensor
    ends: torch.Tensor
    most: int

    @classmethod
    def empty(cls, layers: int, pairs: int, programs: int, most: int, device: torch.device) -> Plan:
        work = torch.empty(layers, programs, 4, dtype=torch.int64, device=device)
        return cls(work, torch.empty(layers, pairs + 1, dtype=torch.int32, device=device), most)

    def of(self, layer: int) -> Plan:
        """One layer's."""
        return Plan(self.work[layer], self.ends[layer], self.most)


class PagedLists(NamedTuple):
    """Lists for a paged attention that takes every (request, KV head) pair b * H_kv + h as a request.

    indptr: int32 [pairs + 1 or more], where lists start. mask_indptr: int32 [pairs + 1 or more], at which
    byte of `mask` a pair's bits start. indices: int32, slot * H_kv + h of every entry. mask: uint8, bit
    row * list length + entry, from the lowest of a byte up, rounded up to bytes a pair (FlashInfer's packed
    custom mask).
    """

    indptr: torch.Tensor
    mask_indptr: torch.Tensor
    indices: torch.Tensor
    mask: torch.Tensor
