"""Attention over lists of blocks by FA3: which requests it is given, and that they say the same as the ops.

FA3 itself runs on a GPU of compute capability 9; everywhere else a stand-in of the same semantics does.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import pytest
import torch

from sts_kernels import ops
from sts_kernels.layout import FP8, KEY_BLOCK, WHOLE, QueryBlocks
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core import block_attention
from sts_sglang.core.block_attention import SEEN, Block, BlockAttention, ByFa3, ByOps, Kept, columns
from sts_sglang.core.block_selectors import BlockCall, ByOwnQueries
from sts_sglang.core.prefill import Reader, SparsePrefill
from sts_sglang.core.sizes import parted
from sts_sglang.core.verifier import TargetShape
from tests.paged_fa3 import paged_fa3
from tests.test_kernels import DEVICE, GROUPS, KERNELS, on_device
from tests.test_prefill import Prefill, drawn_lists, expected_attention
from tests.test_sparse_prefill import LAYERS, request
from tests.tolerances import assert_close

HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9


def target_of(made: Prefill, **other) -> TargetShape:
    shape = TargetShape(
        tokens=1,
        layers=LAYERS,
        q_heads=made.q.shape[1],
        kv_heads=made.kv_heads,
        head_dim=made.dim,
        dtype=made.q.dtype,
        kv_dtype=made.pool.k.dtype,
        context_len=10**6,
        requests=8,
        graph_requests=0,
        slots=made.pool.k.shape[0],
    )
    return shape._replace(**other)


class Counting:
    """A stand-in that remembers what it was asked."""

    def __init__(self, fa3=paged_fa3):
        self.fa3, self.calls = fa3, []

    def __call__(self, q, k_cache, v_cache, **options):
        self.calls.append((q.shape, k_cache.shape, options))
        return self.fa3(q, k_cache, v_cache, **options)


def by_fa3(made: Prefill, kernel: str = "torch", fa3=paged_fa3) -> ByFa3:
    return ByFa3(ops(kernel), fa3, target_of(made), DEVICE)


def blocks_of_batch(made: Prefill) -> list[Block]:
    return [Block(*block) for block in zip(*(part.tolist() for part in made.blocks[:5]), strict=True)]


def in_parts(blocks: list[Block], at_once: int) -> tuple[list[Block], list[list[Block]]]:
    """Those that attend to everything, and the others so many at a time, in the order of their rows."""
    blocks = sorted(blocks, key=lambda block: block.row)
    whole, listed = ([b for b in blocks if (b.count == WHOLE) == of_whole] for of_whole in (True, False))
    return whole, [listed[few] for few in parted(len(listed), at_once)]


def attend(made: Prefill, attention: BlockAttention, listed: torch.Tensor, at_once: int = 99) -> torch.Tensor:
    """By parts; lists go with their blocks."""
    blocks, q, pool = blocks_of_batch(made), on_device(made.q), on_device(made.pool)
    out = on_device(torch.full(made.q.shape, math.nan, dtype=made.q.dtype))
    at_once = min(at_once, attention.room([block for block in blocks if block.count != WHOLE]))
    whole, parts = in_parts(blocks, at_once)
    attention.begin(on_device(made.contexts), whole, parts)
    attention.attend_whole(q, pool, out, scale=made.scale)
    for i, part in enumerate(parts):
        few = columns(part, DEVICE)
        own = listed[[blocks.index(block) for block in part], :, : few.most]
        attention.attend(i, few, on_device(own.contiguous()), q, pool, out, scale=made.scale)
    return out.cpu()


def check(made: Prefill, attention: BlockAttention, at_once: int = 99) -> None:
    listed = drawn_lists(made)
    assert_close(attend(made, attention, listed, at_once), expected_attention(made, listed))


# ---- the table of slots


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_slots_are_those_that_are_attended_to(kernel: str, count: int, kv_heads: int) -> None:
    """In the order of positions, and no others are touched; more blocks than a program writes."""
    made = Prefill([(300, 200), (0, 150), (2990, 140), (390, 1)], kv_heads=kv_heads, dim=16, count=count)
    made.contexts = made.contexts._replace(table=made.contexts.table.clone())
    for request_, (before, new) in enumerate(made.chunks):
        made.contexts.table[made.reqs[request_], before + new :] = 10**6
    listed, blocks = drawn_lists(made), blocks_of_batch(made)
    width = max(block.attended for block in blocks)
    moved = [on_device(part) for part in (made.contexts, made.blocks, listed)]
    found = ops(kernel).block_slots(*moved, width=width).cpu()
    assert found.shape == (kv_heads, len(blocks), width) and found.dtype == torch.int32
    for i, block in enumerate(blocks):
        if block.count == WHOLE:
            continue
        for h in range(kv_heads):
            positions = [j * KEY_BLOCK + p for j in listed[i, h, : block.count] for p in range(KEY_BLOCK)]
            positions += range(block.choices * KEY_BLOCK, block.end)
            assert len(positions) == block.attended
            expected = made.slots(block.request, block.end)[positions] * kv_heads + h
            assert torch.equal(found[h, i, : len(positions)].long(), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_blocks_of_keys_are_written_by_several_programs(kernel: str) -> None:
    made = Prefill([(128 * 40 + 7, 100)], kv_heads=2, dim=16, count=33)
    check(made, by_fa3(made, kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_slots_of_nobody(kernel: str) -> None:
    made = Prefill([])
    empty = on_device(torch.zeros(0, 2, 0, dtype=torch.int32))
    found = ops(kernel).block_slots(on_device(made.contexts), on_device(made.blocks), empty, width=0)
    assert found.shape == (2, 0, 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_slots_of_lists_that_do_not_fit_are_refused(kernel: str) -> None:
    made = Prefill([(300, 100)])
    contexts, blocks = on_device(made.contexts), on_device(made.blocks)
    listed = on_device(drawn_lists(made))
    for wrong in (listed.long(), listed[:, :, :1], listed[0]):
        with pytest.raises(ValueError, match="block_slots: listed must be contiguous int32"):
            ops(kernel).block_slots(contexts, blocks, wrong, width=400)
    with pytest.raises(ValueError, match="block_slots: width"):
        ops(kernel).block_slots(contexts, blocks, listed, width=-1)


# ---- attention


@pytest.mark.parametrize(("group", "kernel"), zip(GROUPS, KERNELS * 3, strict=True))
def test_lists_whole_and_ragged_are_attended_to_exactly(kernel: str, group: int) -> None:
    """A chunk behind a prefix that no block ends with, a prompt without one, a single token; poison."""
    made = Prefill(group=group)
    assert any(block.count == WHOLE for block in blocks_of_batch(made)) and made.listing()
    check(made, by_fa3(made, kernel))


@pytest.mark.parametrize("at_once", [1, 2, 99])
@pytest.mark.parametrize("count", [1, 3, None])
def test_dense_and_sparse_requests_in_any_order(at_once: int, count: int | None) -> None:
    made = Prefill([(0, 200), (700, 300), (0, 90), (0, 60), (512, 256), (130, 1)], count=count)
    check(made, by_fa3(made), at_once)
    if count is not None:  # else no list is made, and SGLang's own backend attends
        check(made, ByOps(ops("torch"), "torch", DEVICE), at_once)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_attends_to_everything_goes_with_the_first_part(kernel: str) -> None:
    """Longest first, by the ops; and it may see more keys than that part, or fewer."""
    for chunks in ([(1000, 60), (0, 40)], [(530, 60), (900, 100), (0, 40)]):
        made = Prefill(chunks, count=3)
        counts = made.blocks.counts.clone()
        if len(chunks) == 3:  # who is asked for everything has the longest context
            counts[made.blocks.requests == 1] = WHOLE
            order = (counts != WHOLE).int().argsort(stable=True)
            made.blocks = QueryBlocks(*(part[order] for part in (*made.blocks[:4], counts)), made.blocks.most)
        attention = ByOps(ops(kernel), kernel, DEVICE)
        check(made, attention, at_once=1)
        before = attention._first.before[attention._first.counts == WHOLE].tolist()
        assert before == sorted(before, reverse=True) and before


def test_several_parts_are_what_scratch_holds(monkeypatch) -> None:
    made = Prefill([(1000, 300), (900, 260)], group=2)
    attention, blocks = by_fa3(made), blocks_of_batch(made)
    room = 2 * (4 * made.kv_heads * max(b.attended for b in blocks) + attention._block_bytes)
    monkeypatch.setattr(block_attention, "SCRATCH", room)
    assert attention.room(blocks) == 2
    counting = Counting(attention.fa3)
    attention.fa3 = counting
    check(made, attention)
    assert [len(options["cache_seqlens"]) for _, _, options in counting.calls] == [4, 4, 4]


def test_tables_of_many_dense_requests_are_within_scratch(monkeypatch) -> None:
    made = Prefill([(0, 40)] * 5 + [(600, 128)])
    monkeypatch.setattr(block_attention, "SCRATCH", 4 * 40 * 2)
    counting = Counting()
    check(made, by_fa3(made, fa3=counting))
    tables = [options["page_table"].shape for _, _, options in counting.calls]
    assert tables[:3] == [(2, 40), (2, 40), (1, 40)]


def test_nobody_lists_what_attends_to_everything() -> None:
    """One request over all heads where blocks of a request adjoin, one call where requests do."""
    made = Prefill([(0, 300), (0, 40), (1000, 280), (0, 7)], group=2, count=3)
    counting = Counting()
    check(made, by_fa3(made, fa3=counting))
    whole = [options for _, shape, options in counting.calls if shape[2] == made.kv_heads]
    assert [options["cu_seqlens_q"].tolist() for options in whole] == [[0, 300, 340], [0, 7]]
    assert [options["cache_seqlens"].tolist() for options in whole] == [[300, 40], [7]]
    (listed,) = (options for _, shape, options in counting.calls if shape[2] == 1)
    own = [b.attended for b in blocks_of_batch(made) if b.count != WHOLE]
    assert listed["cache_seqlens"].tolist() == own * made.kv_heads
    assert listed["page_table"].shape == (len(own) * made.kv_heads, max(own))


def test_a_batch_of_nobody_calls_nobody() -> None:
    made, counting = Prefill([]), Counting()
    assert attend(made, by_fa3(made, fa3=counting), drawn_lists(made)).numel() == 0
    assert not counting.calls


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_prefill_says_the_same_by_fa3(kernel: str) -> None:
    """Below the floor, at the end of a prompt, densely asked for, cut within a block; keeps of requests."""
    made = Prefill([(1000, 300), (0, 200), (700, 140), (900, 200), (40, 50)], group=2)
    requests = [
        request(9000),
        request(200),
        request(9000, prefill="dense"),
        request(1100, prefill_keep=0.6),
        request(9000),
    ]
    found = []
    for attention in (ByOps(ops(kernel), kernel, DEVICE), by_fa3(made, kernel)):
        config = StsConfig(prefill="sparse", prefill_floor=300, prefill_keep=0.4)
        counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        selector = ByOwnQueries(config, ops(kernel), made.kv_heads, made.group)
        reader = Reader(attention, frozenset(range(LAYERS)), made.kv_heads, counts)
        sparse = SparsePrefill(config, selector, reader, DEVICE)
        sparse.admit(requests)
        sparse.begin(on_device(made.contexts), *map(list, zip(*made.chunks, strict=True)))
        assert sparse.attends(0)
        call = BlockCall(0, on_device(made.q), on_device(made.pool), made.scale)
        found.append(sparse.attend(call).cpu())
    assert not torch.isnan(found[1]).any()
    assert_close(found[1], found[0].double())


def test_the_stand_in_does_not_see_later_tokens() -> None:
    """What the tests above stand on: the last row sees all keys, the one before it one less."""
    q = torch.randn(2, 1, 8)
    k = torch.randn(5, 1, 1, 8)
    starts, lens = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    table = torch.tensor([[4, 0, 2, 1]], dtype=torch.int32)
    out = torch.empty_like(q)
    options = {"page_table": table, "cache_seqlens": lens, "cu_seqlens_q": starts, "max_seqlen_q": 2}
    paged_fa3(q, k, k, **options, softmax_scale=1.0, causal=True, out=out)
    for row, seen in ((0, [4, 0, 2]), (1, [4, 0, 2, 1])):
        keys = k[seen, 0, 0]
        torch.testing.assert_close(out[row, 0], (keys @ q[row, 0]).softmax(0) @ keys)


# ---- FA3 itself

# Of one token, as SGLang calls it for whatever is dense. What a build has no kernel for ends the process.
PROBE = """
import sys, torch
from sgl_kernel.flash_attn import flash_attn_with_kvcache
dtype, dim = getattr(torch, sys.argv[1]), int(sys.argv[2])
q = torch.zeros(1, 2, dim, dtype=dtype, device="cuda")
starts = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
pool, table = q[:, None, :1], starts[None, :1]
for splits in (0, 1):
    flash_attn_with_kvcache(q, pool, pool, page_table=table, cache_seqlens=starts[1:], cu_seqlens_q=starts,
                            max_seqlen_q=1, causal=True, num_splits=splits)
torch.cuda.synchronize()
"""


@functools.cache
def fa3_has(dtype: torch.dtype, dim: int) -> bool:
    """Whether this build of sgl_kernel has FA3's kernels for a dtype and heads of so many dimensions."""
    command = [sys.executable, "-c", PROBE, str(dtype).removeprefix("torch."), str(dim)]
    return subprocess.run(command, capture_output=True, timeout=300).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="FA3 is made for compute capability 9")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("group", "dim"), [(1, 64), (2, 128), (4, 128), (5, 64), (7, 128), (8, 96), (4, 256)]
)
def test_fa3_attends_as_the_stand_in(dtype: torch.dtype, group: int, dim: int) -> None:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    if not fa3_has(dtype, dim):
        assert (dtype, dim) not in SEEN
        pytest.skip(f"this build of sgl_kernel has no FA3 of {dtype} with heads of {dim}, of any kind")
    chunks = [(0, 200), (1300, 300), (0, 90), (513, 256), (130, 1)]
    for kernel in KERNELS:
        made = Prefill(chunks, group=group, dim=dim, dtype=dtype, kv_heads=3)
        made.pool = made.pool._replace(k=made.pool.k.nan_to_num(7.0), v=made.pool.v.nan_to_num(7.0))
        check(made, by_fa3(made, kernel, flash_attn_with_kvcache))


# ---- who attends


def test_fa3_attends_where_it_can_and_nobody_asks_for_another() -> None:
    made = Prefill([(0, 1)], dtype=torch.bfloat16, dim=64)
    target = target_of(made)

    def name(kernel: str = "triton", fa3=paged_fa3, shape=target, **config) -> str:
        config = StsConfig(prefill="sparse", **config)
        return block_attention.make(config, ops("torch"), kernel, shape, fa3, "cpu").name

    assert name() == name(prefill_attend="auto") == name(prefill_attend="fa3") == "fa3"
    assert name(prefill_attend="ops") == "triton" and name("torch") == name("torch", fa3=None) == "torch"
    assert name("torch", prefill_attend="fa3") == "fa3"
    for fa3, shape, why in (
        (None, target, "dense 'fa3'"),
        (paged_fa3, None, "dense 'fa3'"),
        (paged_fa3, target._replace(dtype=torch.float32), "half precision"),
        (paged_fa3, target._replace(kv_dtype=FP8[0]), "FP8"),
        (paged_fa3, target._replace(slots=2**30), "int32"),
    ):
        assert name(fa3=fa3, shape=shape) == "triton"
        with pytest.raises(ConfigError, match=r"sts_config.prefill_attend: got 'fa3', but .*" + why):
            name(fa3=fa3, shape=shape, prefill_attend="fa3")


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 64), (torch.bfloat16, 96), (torch.bfloat16, 256)])
def test_what_fa3_was_never_seen_to_do_is_for_those_who_ask(dtype: torch.dtype, dim: int) -> None:
    target = target_of(Prefill([(0, 1)], dtype=dtype, dim=dim))
    for asked, expected in (("auto", "triton"), ("fa3", "fa3"), ("ops", "triton")):
        config = StsConfig(prefill="sparse", prefill_attend=asked)
        made = block_attention.make(config, ops("torch"), "triton", target, paged_fa3, "cpu")
        assert made.name == expected


def test_what_fa3_takes_is_reserved_where_it_may_attend() -> None:
    half, fp8 = Kept(torch.bfloat16, torch.bfloat16, 128), Kept(torch.bfloat16, FP8[0], 128)
    single, odd = Kept(torch.float32, torch.float32, 128), half._replace(head_dim=96)
    sparse_draft = {"prefill": "sparse", "prefill_draft": "sparse"}
    taken = [
        block_attention.need(StsConfig(**config), target, draft).fixed
        for config, target, draft in (
            ({"prefill": "sparse"}, half, None),
            (sparse_draft, fp8, half),
            ({"prefill": "sparse", "prefill_attend": "fa3"}, odd, None),
            ({"prefill": "sparse"}, fp8, half),
            ({"prefill": "sparse"}, odd, half),
            ({"prefill": "sparse"}, single, None),
            (sparse_draft, fp8, fp8),
            ({"prefill": "sparse", "prefill_attend": "ops"}, half, half),
            ({"prefill": "sparse", "kernel": "torch"}, half, half),
            ({}, half, half),
        )
    ]
    assert taken == [block_attention.SCRATCH] * 3 + [0] * 7
