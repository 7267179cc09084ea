"""Ops of sparse prefill, both implementations, against their definitions written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sts_kernels import ops, prefill
from sts_kernels.layout import (
    KEY_BLOCK,
    QUERY_BLOCK,
    SHIFT,
    WHOLE,
    Contexts,
    KvPool,
    Members,
    Pooling,
    QueryBlocks,
    blocks_of,
)
from tests.test_kernels import KERNELS, on_device, skip_bf16_in_the_interpreter, tune
from tests.tolerances import assert_close

GROUPS = [1, 2, 4, 5, 7, 8]
# (tokens before, new tokens) of each request: a chunk behind a prefix that no block ends with, a short one
# with nothing before it, one that fills its blocks, a single token.
CHUNKS = [(300, 200), (0, 150), (256, 256), (390, 1)]
SINK, RECENT = 1, 1


class Prefill:
    """New tokens of some requests, with permuted slots; what nobody may read or write is NaN."""

    def __init__(
        self,
        chunks=CHUNKS,
        *,
        group: int = 2,
        kv_heads: int = 2,
        dim: int = 32,
        dtype=torch.float32,
        stored=None,
        scales=(1.0, 1.0),
        count: int | None = 2,
    ):
        self.chunks, self.group, self.kv_heads, self.dim = chunks, group, kv_heads, dim
        self.stored, self.scale = stored or dtype, dim**-0.5
        lens = [before + new for before, new in chunks]
        requests, width = len(chunks) + 3, max([*lens, 1]) + 5
        order = (torch.randperm(requests * width) + 1).view(requests, width)
        self.reqs = torch.randperm(requests - 1)[: len(chunks)] + 1
        k, v = (torch.full((2 * requests * width, kv_heads, dim), math.nan) for _ in range(2))
        for req, length in zip(self.reqs.tolist(), lens, strict=True):
            for pool in (k, v):
                pool[order[req, :length]] = torch.randn(length, kv_heads, dim)
        self.contexts = Contexts(order.int(), self.reqs, torch.tensor(lens, dtype=torch.int64))
        self.pool = KvPool(k.to(self.stored), v.to(self.stored), *scales)
        # A slice of a fused projection, as models have it.
        fused = torch.full((sum(new for _, new in chunks), kv_heads * group + 1, dim), math.nan, dtype=dtype)
        fused[:, :-1] = torch.randn(fused.shape[0], kv_heads * group, dim)
        self.q = fused[:, :-1]
        self.blocks = self.parted(count)

    def parted(self, count: int | None) -> QueryBlocks:
        """Blocks of queries that select `count` blocks of keys where there are more; None: nobody selects."""
        found, row = [], 0
        for request, (before, new) in enumerate(self.chunks):
            for first in range(0, new, QUERY_BLOCK):
                choices = (before + first) // KEY_BLOCK
                listed = WHOLE if count is None or choices <= count else count
                number = min(QUERY_BLOCK, new - first)
                found.append((request, row + first, number, before + first, listed))
            row += new
        found.sort(key=lambda block: block[4] != WHOLE)
        columns = torch.tensor(found, dtype=torch.int32).view(-1, 5).T.contiguous()
        most = max((blocks_of(before + number) for _, _, number, before, _ in found), default=0)
        return QueryBlocks(*columns, most)

    def listing(self) -> list[tuple[int, int, int, int, int, int]]:
        """(block, request, first row, tokens, tokens before, count), of blocks that select."""
        columns = zip(*(part.tolist() for part in self.blocks[:5]), strict=True)
        return [(i, *block) for i, block in enumerate(columns) if block[4] != WHOLE]

    def slots(self, request: int, end: int) -> torch.Tensor:
        return self.contexts.table[self.reqs[request], :end].long()

    def logits(self, request: int, row: int, head: int, end: int, shift: int = 0) -> torch.Tensor:
        """float64 [end] of a row of q; with a shift -inf for the first token, which has no key."""
        keys = self.pool.k[self.slots(request, end - shift), head // self.group].double() * self.pool.k_scale
        return torch.cat(
            [torch.full((shift,), -math.inf).double(), keys @ self.q[row, head].double() * self.scale]
        )

    def score(self, kernel: str, sampled: int = 8, shift: int = 0) -> torch.Tensor:
        moved = [on_device(part) for part in (self.q, self.pool, self.contexts, self.blocks)]
        found = ops(kernel).score_blocks(*moved, scale=self.scale, sampled=sampled, shift=shift)
        assert tuple(found.shape[:3]) == (self.blocks.counts.numel(), self.kv_heads, self.blocks.most)
        return found.cpu()

    def list(self, kernel: str, sums: torch.Tensor) -> torch.Tensor:
        return (
            ops(kernel).list_blocks(on_device(sums), on_device(self.blocks), sink=SINK, recent=RECENT).cpu()
        )

    def attend(self, kernel: str, listed: torch.Tensor) -> torch.Tensor:
        out = on_device(torch.full(self.q.shape, math.nan, dtype=self.q.dtype))
        moved = [on_device(part) for part in (self.q, self.pool, self.contexts, self.blocks, listed)]
        ops(kernel).block_attention(*moved, out, scale=self.scale)
        return out.cpu()


def drawn_lists(made: Prefill) -> torch.Tensor:
    """Any blocks, ascending, another choice for every query block and head."""
    listed = torch.full((made.blocks.counts.numel(), made.kv_heads, made.blocks.most), 10**6).int()
    for i, _, _, _, before, count in made.listing():
        for h in range(made.kv_heads):
            listed[i, h, :count] = torch.randperm(before // KEY_BLOCK)[:count].sort().values.int()
    return listed


def expected_attention(made: Prefill, listed: torch.Tensor) -> torch.Tensor:
    expected = torch.empty(made.q.shape, dtype=torch.float64)
    columns = zip(*(part.tolist() for part in made.blocks[:5]), strict=True)
    for i, (request, row, number, before, count) in enumerate(columns):
        for place in range(number):
            end = before + place + 1
            block = torch.arange(end) // KEY_BLOCK
            for head in range(made.q.shape[1]):
                h = head // made.group
                seen = block >= before // KEY_BLOCK
                seen |= torch.isin(block, listed[i, h, :count]) if count != WHOLE else True
                logits = made.logits(request, row + place, head, end)
                probs = logits.masked_fill(~seen, -math.inf).softmax(0)
                values = made.pool.v[made.slots(request, end), h].double() * made.pool.v_scale
                expected[row + place, head] = probs @ values
    return expected


def check_attention(made: Prefill, kernel: str) -> None:
    listed = drawn_lists(made)
    assert_close(made.attend(kernel, listed), expected_attention(made, listed))


def check_sums(made: Prefill, kernel: str, sampled: int, shift: int = 0) -> None:
    found = made.score(kernel, sampled, shift)
    for i, request, row, number, before, _ in made.listing():
        for s in range(sampled):
            place = max((s + 1) * number // sampled - 1, 0)
            for head in range(made.q.shape[1]):
                h, g = divmod(head, made.group)
                logits = made.logits(request, row + place, head, before + place + 1, shift)
                own = found[i, h, : blocks_of(before + number), s * made.group + g]
                expected = torch.full(own.shape, -math.inf, dtype=torch.float64)
                for j, part in enumerate(logits.split(KEY_BLOCK)):
                    expected[j] = part.logsumexp(0) / math.log(2)
                # Products of halves are summed in float32.
                torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sampled", [1, 8])
@pytest.mark.parametrize("group", GROUPS)
def test_sums_are_those_of_the_rows_that_are_asked(kernel: str, group: int, sampled: int) -> None:
    check_sums(Prefill(group=group), kernel, sampled)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [16, 96])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision(kernel: str, dim: int, dtype: torch.dtype) -> None:
    skip_bf16_in_the_interpreter(kernel, dtype)
    check_sums(Prefill(dim=dim, dtype=dtype), kernel, 8)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [32, 96])
def test_sums_over_the_keys_of_a_draft(monkeypatch, kernel: str, dim: int) -> None:
    """They lie a position before their tokens, and the first token has none."""
    tune(monkeypatch, prefill, span=2)
    check_sums(Prefill(dim=dim, group=3), kernel, 8, SHIFT)


def test_programs_share_the_keys_and_several_blocks_a_program(monkeypatch) -> None:
    tune(monkeypatch, prefill, span=1, score_rows=64)
    check_sums(Prefill([(0, 900), (513, 390), (260, 128)], group=2), "triton", 4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("group", GROUPS)
def test_attention_over_lists(kernel: str, group: int) -> None:
    check_attention(Prefill(group=group), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("dim", [64, 96])
def test_attention_of_halves_whole_and_over_lists(kernel: str, count: int | None, dim: int) -> None:
    check_attention(Prefill(count=count, dim=dim, dtype=torch.float16), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fp8_keys_and_values_are_what_they_mean(kernel: str) -> None:
    made = Prefill(dtype=torch.float16, stored=torch.float8_e4m3fn, scales=(2.5, 0.3))
    check_sums(made, kernel, 8)
    check_attention(made, kernel)


@pytest.mark.parametrize(("tile", "heads"), [(32, 2), (64, 4), (128, 2)])
def test_tiles_and_heads_of_a_program(monkeypatch, tile: int, heads: int) -> None:
    tune(monkeypatch, prefill, tile=tile, heads=heads)
    check_attention(Prefill([(300, 140), (513, 30)], group=4), "triton")


def drawn_sums(made: Prefill, kinds: int | None) -> torch.Tensor:
    """float32 [blocks, H_kv, most, R] of few values, or of many; NaN behind the last block of keys."""
    shape = (made.blocks.counts.numel(), made.kv_heads, made.blocks.most, 8 * made.group)
    sums = torch.full(shape, math.nan)
    for i, _, _, number, before, _ in made.listing():
        end = blocks_of(before + number)
        own = torch.randn(made.kv_heads, end, shape[3]) * 4
        if kinds:  # every row says the same, so that blocks of keys have equal scores to the bit
            own = torch.randint(kinds, own.shape[:2]).float()[..., None].expand_as(own)
        sums[i, :, :end] = own
    return sums


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kinds", [None, 1, 3])
@pytest.mark.parametrize("cells", [64, 8192])
def test_lists_have_the_highest_shares_and_of_equals_the_later(monkeypatch, kernel, kinds, cells) -> None:
    tune(monkeypatch, prefill, cells=cells)
    made = Prefill([(2000, 300), (0, 900), (1500, 7)], group=3, count=4)
    sums = drawn_sums(made, kinds)
    listed = made.list(kernel, sums)
    for i, _, _, number, before, count in made.listing():
        choices, seen = before // KEY_BLOCK, blocks_of(before + number)
        for h in range(made.kv_heads):
            own = sums[i, h, :seen].double() * math.log(2)
            scores = own.softmax(0).amax(1) if not kinds else sums[i, h, :seen, 0]
            free = range(SINK, choices - RECENT)
            best = sorted(free, key=lambda j, scores=scores: (-float(scores[j]), -j))[: count - SINK - RECENT]
            expected = sorted([*range(SINK), *range(choices - RECENT, choices), *best])
            assert listed[i, h, :count].tolist() == expected


POOLINGS = [("max", "max"), ("mean", "mean"), ("max", "mean"), ("mean", "max")]
MEMBERS = Members(
    channels=torch.tensor([3, 0, 1], dtype=torch.int32),
    heads=torch.tensor([[0, 1, -1], [5, -1, -1], [2, 3, 4]], dtype=torch.int32),
    scale=torch.tensor([1 / 2, 1 / 4, 1 / 3]),
    fresh=torch.tensor([True, False, True]),
)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cells", [64, 8192])
@pytest.mark.parametrize(("rows", "heads"), POOLINGS)
def test_scores_of_channels_are_pooled_shares(monkeypatch, kernel: str, cells: int, rows, heads) -> None:
    """Of heads, then of rows, then with what a layer before has found; what nobody feeds or sees is left."""
    tune(monkeypatch, prefill, cells=cells)
    made = Prefill([(2000, 300), (0, 900), (1500, 7)], group=3, count=4)
    sums, pooling = drawn_sums(made, None), Pooling(rows, heads, 8)
    earlier = torch.rand(made.blocks.counts.numel(), 4, made.blocks.most)
    found = on_device(earlier.clone())
    ops(kernel).pool_blocks(
        on_device(sums), on_device(made.blocks), on_device(MEMBERS), found, pooling=pooling
    )
    expected = earlier.double()
    for i, _, _, number, before, _ in made.listing():
        seen = blocks_of(before + number)
        shares = (sums[i, :, :seen].double() * math.log(2)).softmax(1)  # [H_kv, seen, rows * group]
        for channel, members, scale, fresh in zip(*(part.tolist() for part in MEMBERS), strict=True):
            spoken = [shares[h // 3, :, h % 3 :: 3] for h in members if h >= 0]  # [seen, rows] each
            row = torch.stack(spoken).amax(0) if heads == "max" else sum(spoken) * scale
            score = row.amax(1) if rows == "max" else row.mean(1)
            if not fresh:
                both = score, expected[i, channel, :seen]
                score = torch.maximum(*both) if rows == "max" else sum(both)
            expected[i, channel, :seen] = score
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_planted_key_is_found(kernel: str) -> None:
    """By one row of one head of its group, and by no other KV head."""
    made = Prefill([(1300, 140)], group=4, dim=64, count=3)
    slot, (i, _, row, number, _, count) = made.slots(0, 400)[399], made.listing()[0]
    made.pool.k[slot, 1] = 30 * made.q[row + number * 3 // 8 - 1, 4 + 2]
    listed = made.list(kernel, made.score(kernel))
    assert 399 // KEY_BLOCK in listed[i, 1, :count].tolist()
    assert 399 // KEY_BLOCK not in listed[i, 0, :count].tolist()


def test_kernels_select_and_attend_as_the_twins_do() -> None:
    made = Prefill([(1300, 300), (700, 129)], group=4, dim=64, dtype=torch.float16, count=4)
    lists = [made.list(kernel, made.score(kernel)) for kernel in KERNELS]
    for i, *_, count in made.listing():
        assert torch.equal(lists[0][i, :, :count], lists[1][i, :, :count])
    assert_close(made.attend("triton", lists[1]), made.attend("torch", lists[0]).double())


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_batch_is_nothing_to_do(kernel: str) -> None:
    made = Prefill([])
    sums = made.score(kernel)
    assert made.attend(kernel, made.list(kernel, sums)).numel() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_prefill_refuses_shapes_that_do_not_fit(kernel: str) -> None:
    made = Prefill([(300, 100)])
    q, pool, contexts, blocks = (on_device(part) for part in (made.q, made.pool, made.contexts, made.blocks))
    op = ops(kernel)
    with pytest.raises(ValueError, match="score_blocks: q must be"):
        op.score_blocks(q[..., :3], pool, contexts, blocks, scale=1.0, sampled=8)
    with pytest.raises(ValueError, match=r"score_blocks: blocks.rows must be"):
        op.score_blocks(q, pool, contexts, blocks._replace(rows=blocks.rows.long()), scale=1.0, sampled=8)
    with pytest.raises(ValueError, match="score_blocks: sampled"):
        op.score_blocks(q, pool, contexts, blocks, scale=1.0, sampled=0)
    with pytest.raises(ValueError, match="score_blocks: shift"):
        op.score_blocks(q, pool, contexts, blocks, scale=1.0, sampled=8, shift=2)
    with pytest.raises(ValueError, match="score_blocks: pools"):
        op.score_blocks(q.half(), pool, contexts, blocks, scale=1.0, sampled=8)
    sums = op.score_blocks(q, pool, contexts, blocks, scale=1.0, sampled=8)
    scores = torch.zeros(*sums.shape[:3], device=q.device)
    for wrong in ({"scores": scores.half()}, {"sums": sums[..., 1:]}, {"pooling": Pooling("max", "max", 3)}):
        given = {"sums": sums, "scores": scores, "pooling": Pooling("max", "max", 8), **wrong}
        with pytest.raises(ValueError, match=f"pool_blocks: {'total_rows' if 'pooling' in wrong else ''}"):
            op.pool_blocks(
                given["sums"], blocks, on_device(MEMBERS), given["scores"], pooling=given["pooling"]
            )
    with pytest.raises(ValueError, match="list_blocks: sums"):
        op.list_blocks(sums.half(), blocks, sink=1, recent=1)
    listed, out = op.list_blocks(sums, blocks, sink=1, recent=1), torch.empty_like(q).contiguous()
    with pytest.raises(ValueError, match="block_attention: listed"):
        op.block_attention(q, pool, contexts, blocks, listed[:, :1], out, scale=1.0)
    with pytest.raises(ValueError, match="block_attention: out"):
        op.block_attention(q, pool, contexts, blocks, listed, out[:3], scale=1.0)
