"""How new tokens attend to the blocks of keys that they listed: by the ops of this package, or by FA3."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple, Protocol

import torch

from sts_kernels import Ops
from sts_kernels.layout import FP8, KEY_BLOCK, QUERY_BLOCK, WHOLE, Contexts, KvPool, QueryBlocks, blocks_of
from sts_sglang.config import StsConfig, not_allowed
from sts_sglang.core.sizes import Need, parted

# Bytes that FA3 may take for pages, and for queries and results by KV head: so many blocks of new tokens at a
# time.
SCRATCH = 256 << 20
# What FA3 was seen to attend to lists with exactly, on a GPU: dtypes of queries, keys and values, and
# dimensions of heads. It is made for others too.
SEEN = {(torch.bfloat16, 64), (torch.bfloat16, 128)}

Fa3 = Callable[..., torch.Tensor]
"""`flash_attn_with_kvcache` of sgl_kernel: paged, requests of any lengths, causal up to the last key."""


class Block(NamedTuple):
    """A block of new tokens, as `QueryBlocks` has it."""

    request: int
    row: int
    number: int
    before: int
    count: int

    @property
    def choices(self) -> int:
        """Blocks of keys that it may select among."""
        return self.before // KEY_BLOCK

    @property
    def end(self) -> int:
        """Tokens up to its last."""
        return self.before + self.number

    @property
    def attended(self) -> int:
        """Tokens that it attends to, causality aside."""
        listed = self.choices if self.count == WHOLE else self.count
        return self.end - (self.choices - listed) * KEY_BLOCK


class Heads(Protocol):
    """The attention of a model on this rank, and what its keys and values are kept as. slots: rows of the KV
    pool's buffers."""

    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    slots: int


class BlockAttention(Protocol):
    """Attends to what blocks of new tokens have listed, exactly: softmax over the listed blocks of keys, what
    is between those that could be and the new tokens, and causally these.

    name: what does it, in the line `STS serves`.
    """

    name: str

    def room(self, blocks: list[Block]) -> int:
        """How many of these there is room for at a time, at least 1."""

    def begin(self, contexts: Contexts, whole: list[Block], parts: list[list[Block]]) -> None:
        """Before the layers of a forward. whole: its blocks that attend to everything. parts: the others, no
        more in each than there is `room` for, which are listed and attended to one part after the other. All
        in the order of their rows."""

    def attend(
        self,
        part: int,
        blocks: QueryBlocks,
        listed: torch.Tensor,
        q: torch.Tensor,
        pool: KvPool,
        out: torch.Tensor,
        *,
        scale: float,
    ) -> None:
        """Writes the rows of the blocks of a part into out. q, out: [N, H_q, D], of all new tokens. blocks:
        these, as `columns`."""

    def attend_whole(self, q: torch.Tensor, pool: KvPool, out: torch.Tensor, *, scale: float) -> None:
        """The same of the blocks that attend to everything, unless the first part takes them along."""


def columns(blocks: list[Block], device: str | torch.device) -> QueryBlocks:
    """Blocks as the ops take them."""
    parts = torch.tensor(blocks, dtype=torch.int32).view(-1, 5).T.contiguous()
    most = max((blocks_of(block.end) for block in blocks), default=0)
    return QueryBlocks(*parts.to(device, non_blocking=True), most)


class ByOps:
    """By `block_attention`, one program after the other, for everybody: blocks that attend to everything are
    attended to with the first part.

    Args:
        ops: the ops in use, and their name. device: where they run.
    """

    def __init__(self, ops: Ops, name: str, device: str):
        self.ops, self.name, self.device = ops, name, device
        self._contexts: Contexts | None = None
        self._first: QueryBlocks | None = None

    def room(self, blocks: list[Block]) -> int:
        return max(1, len(blocks))

    def begin(self, contexts: Contexts, whole: list[Block], parts: list[list[Block]]) -> None:
        self._contexts, self._first = contexts, None
        if whole and parts:
            # They take longest, and so begin.
            whole = sorted(whole, key=lambda block: -block.before)
            self._first = columns([*whole, *parts[0]], self.device)

    def attend(
        self,
        part: int,
        blocks: QueryBlocks,
        listed: torch.Tensor,
        q: torch.Tensor,
        pool: KvPool,
        out: torch.Tensor,
        *,
        scale: float,
    ) -> None:
        if part == 0 and self._first is not None:
            own, blocks = listed, self._first
            number, heads, most = own.shape
            listed = own.new_empty(blocks.counts.numel(), heads, blocks.most)
            listed[-number:, :, :most] = own
        self.ops.block_attention(q, pool, self._contexts, blocks, listed, out, scale=scale)

    def attend_whole(self, q: torch.Tensor, pool: KvPool, out: torch.Tensor, *, scale: float) -> None:
        """The first part takes them along."""


class _Call(NamedTuple):
    """Queries that one call of FA3 is for, known before the layers of a forward.

    rows: of them, in stretches. requests: int32, places in the batch of those that attend to everything.
    options: lengths and where they start. width: pages of the longest.
    """

    rows: list[slice]
    requests: torch.Tensor
    options: dict[str, torch.Tensor | int]
    width: int


class ByFa3:
    """By FA3's paged attention: every (KV head, block) is a request whose pages are the tokens on its list,
    of pools that are seen as one head and pages of one token, so that slots may lie anywhere. Blocks that
    attend to everything are requests over all heads, in calls of their own: nobody lists what they read.

    Args:
        ops: the ops in use; block_slots is called. fa3: what attends. heads: for whom. device: where it runs.
    """

    name = "fa3"

    def __init__(self, ops: Ops, fa3: Fa3, heads: Heads, device: str):
        self.ops, self.fa3, self.device, self.kv_heads = ops, fa3, device, heads.kv_heads
        row = heads.q_heads * heads.head_dim * heads.dtype.itemsize
        self._block_bytes = 2 * QUERY_BLOCK * row  # queries and results by KV head
        self._contexts: Contexts | None = None
        self._whole: list[_Call] = []
        self._listed: list[_Call] = []

    def room(self, blocks: list[Block]) -> int:
        width = max((block.attended for block in blocks), default=0)
        return max(1, SCRATCH // (4 * self.kv_heads * width + self._block_bytes))

    def begin(self, contexts: Contexts, whole: list[Block], parts: list[list[Block]]) -> None:
        self._contexts = contexts
        self._whole = [self._call_whole(few) for run in _runs(whole) for few in _tables(_joined(run))]
        self._listed = [self._call_listed(part) for part in parts]

    @property
    def widths(self) -> list[int]:
        """Tokens that the blocks of each part attend to at most."""
        return [call.width for call in self._listed]

    def attend(
        self,
        part: int,
        blocks: QueryBlocks,
        listed: torch.Tensor,
        q: torch.Tensor,
        pool: KvPool,
        out: torch.Tensor,
        *,
        scale: float,
    ) -> None:
        call, (kv_heads, dim) = self._listed[part], pool.k.shape[1:]
        # Views, [H_kv, N, group, D].
        turned_q, turned_out = (rows.unflatten(1, (kv_heads, -1)).transpose(0, 1) for rows in (q, out))
        packed = torch.cat([turned_q[:, rows] for rows in call.rows], 1)
        pages = self.ops.block_slots(self._contexts, blocks, listed, width=call.width)
        found = torch.empty_like(packed)
        self.fa3(
            packed.flatten(0, 1),
            pool.k.view(-1, 1, 1, dim),
            pool.v.view(-1, 1, 1, dim),
            page_table=pages.flatten(0, 1),
            softmax_scale=scale,
            causal=True,
            out=found.flatten(0, 1),
            **call.options,
        )
        first = 0
        for rows in call.rows:
            number = rows.stop - rows.start
            turned_out[:, rows].copy_(found[:, first : first + number])
            first += number

    def attend_whole(self, q: torch.Tensor, pool: KvPool, out: torch.Tensor, *, scale: float) -> None:
        table, reqs, _ = self._contexts
        for call in self._whole:
            (rows,) = call.rows
            self.fa3(
                q[rows].contiguous(),
                pool.k[:, None],
                pool.v[:, None],
                page_table=table[:, : call.width].index_select(0, reqs.index_select(0, call.requests)),
                softmax_scale=scale,
                causal=True,
                out=out[rows],
                **call.options,
            )

    def _call_whole(self, blocks: list[Block]) -> _Call:
        """Of neighbours, each all that a request has of them."""
        rows = slice(blocks[0].row, blocks[-1].row + blocks[-1].number)
        requests = [block.request for block in blocks]
        return self._call([rows], blocks, requests, max(block.end for block in blocks))

    def _call_listed(self, blocks: list[Block]) -> _Call:
        """Of blocks in the order of their rows, for every KV head."""
        rows = [slice(run[0].row, run[-1].row + run[-1].number) for run in _runs(blocks)]
        call = self._call(rows, blocks * self.kv_heads, [], max(block.attended for block in blocks))
        # FA3 would split keys as if there were one request, and allocate results of every split.
        call.options["num_splits"] = 1
        return call

    def _call(self, rows: list[slice], blocks: list[Block], requests: list[int], width: int) -> _Call:
        lens, starts = [block.attended for block in blocks], [0]
        for block in blocks:
            starts.append(starts[-1] + block.number)
        numbers = torch.tensor([*requests, *lens, *starts], dtype=torch.int32)
        numbers = numbers.to(self.device, non_blocking=True)
        of_requests, lens, starts = numbers.split([len(requests), len(lens), len(starts)])
        longest = max(block.number for block in blocks)
        options = {"cache_seqlens": lens, "cu_seqlens_q": starts, "max_seqlen_q": longest}
        return _Call(rows, of_requests, options, width)


def _runs(blocks: list[Block]) -> list[list[Block]]:
    """Blocks in the order of their rows, parted where other rows are between them."""
    runs: list[list[Block]] = []
    for block in blocks:
        if not runs or runs[-1][-1].row + runs[-1][-1].number != block.row:
            runs.append([])
        runs[-1].append(block)
    return runs


def _joined(run: list[Block]) -> list[Block]:
    """Neighbours that are WHOLE, those of a request as one."""
    found = []
    for _, group in groupby(run, key=lambda block: block.request):
        own = list(group)
        found.append(own[0]._replace(number=own[-1].end - own[0].before))
    return found


def _tables(blocks: list[Block]) -> list[list[Block]]:
    """So many at a time that their tables of slots are within SCRATCH."""
    width = max(block.end for block in blocks)
    return [blocks[few] for few in parted(len(blocks), max(1, SCRATCH // (4 * width)))]


def why_not_fa3(heads: Heads | None, fa3: Fa3 | None) -> str | None:
    """Why FA3 cannot attend to lists of a model in this launch, or None. fa3: None where it does not serve
    what is dense, or the GPU is not the one that its kernels are made for."""
    if fa3 is None or heads is None:
        return "it needs dense 'fa3' too, and a GPU of compute capability 9"
    if heads.dtype not in (torch.bfloat16, torch.float16):
        return "FA3 computes in half precision alone"
    if heads.kv_dtype in FP8:
        return "FA3 rounds queries to FP8 where KV, or the draft's by draft_kv, is kept so"
    if heads.slots * heads.kv_heads >= 2**31:
        return "FA3 numbers slots of all KV heads by int32, and there are too many"
    return None


class Kept(NamedTuple):
    """Of a model whose prefill may be sparse: the dtype of its queries, what its keys are kept as, and the
    dimensions of a head."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dim: int


def need(config: StsConfig, target: Kept, draft: Kept | None) -> Need:
    """What attending takes besides what a dense prefill does, where FA3 may do it on a GPU that it is made
    for. draft: None without one."""
    models = [target, draft] if draft is not None and config.prefills_draft else [target]
    sparse = config.prefill == "sparse" and config.kernel != "torch"
    fa3 = sparse and any(one.kv_dtype not in FP8 and _wanted(config, one) for one in models)
    return Need(SCRATCH if fa3 else 0)


def _wanted(config: StsConfig, model: Kept | Heads) -> bool:
    """Whether FA3 is to attend to lists of a model, where it can."""
    seen = (model.dtype, model.head_dim) in SEEN
    return config.prefill_attend == "fa3" or (config.prefill_attend == "auto" and seen)


def make(
    config: StsConfig, ops: Ops, kernel: str, heads: Heads | None, fa3: Fa3 | None, device: str
) -> BlockAttention:
    """What attends in this launch.

    Args:
        ops: in use, and `kernel` their name. heads: of whom, None where nobody knows. fa3: as of
            `why_not_fa3`.

    Raises:
        ConfigError: prefill_attend is 'fa3', which cannot be.
    """
    asked = config.prefill_attend
    why = why_not_fa3(heads, fa3)
    if asked == "fa3" and why is not None:
        raise not_allowed("sts_config.prefill_attend", f"got 'fa3', but {why}", "'auto' or 'ops'")
    if why is None and _wanted(config, heads) and (asked == "fa3" or kernel != "torch"):
        return ByFa3(ops, fa3, heads, device)
    return ByOps(ops, kernel, device)
