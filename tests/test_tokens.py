"""Sketches of single tokens and scores by them; both implementations, against their definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sts_kernels import ops, select, tokens
from sts_kernels.layout import (
    IMPORTANCE_SCALE,
    MOST_STEPS,
    QUERY_STEPS,
    SKETCHED,
    UNRANKED_BITS,
    WHOLE,
    Contexts,
    Directions,
    Lists,
    Pooling,
    Scores,
)
from tests.test_kernels import DEVICE, KERNELS, on_device, skip_bf16_in_the_interpreter, tune

POOLS = [("max", "max"), ("mean", "mean"), ("mean", "max"), ("max", "mean")]
UNWRITTEN = -128  # no step of a sketch is


class Pool:
    """Requests with permuted slots; keys of unused slots are NaN, their sketches UNWRITTEN."""

    def __init__(self, lens: list[int], *, kv_heads: int = 2, dim: int = 32, dtype=torch.float32):
        self.lens, self.dim, self.kv_heads, self.dtype = torch.tensor(lens), dim, kv_heads, dtype
        slots, width = sum(lens) + 40, max(lens, default=1) + 7
        order = torch.randperm(slots - 1) + 1
        self.table = torch.zeros(len(lens) + 1, width, dtype=torch.int32)
        self.keys = torch.full((slots, kv_heads, dim), math.nan, dtype=dtype)
        taken = 0
        for row, length in enumerate(lens, 1):
            own = order[taken : taken + length]
            self.table[row, :length] = own.int()
            self.keys[own] = (torch.randn(length, kv_heads, dim) + 0.5).to(dtype)
            taken += length
        number = dim // SKETCHED
        turned = torch.linalg.qr(torch.randn(kv_heads, dim, dim)).Q[..., :number].contiguous()
        steps = torch.rand(kv_heads, number) * 0.3 + 0.2
        self.directions = Directions(
            (turned / steps[:, None]).to(dtype),
            torch.randn(kv_heads, number),
            (turned * steps[:, None]).to(dtype),
        )
        self.sketches = torch.full((slots, kv_heads, number // 2), UNWRITTEN, dtype=torch.int8)
        self.rows, self.k_scale = torch.arange(1, len(lens) + 1), 1.0

    @property
    def contexts(self) -> Contexts:
        return Contexts(self.table, self.rows, self.lens)

    def exact(self) -> torch.Tensor:
        """float64 [slots, H_kv, R]: steps before they are rounded."""
        onto, keys = self.directions.onto.double(), self.keys.double() * self.k_scale
        return torch.einsum("lhd,hdr->lhr", keys, onto) - self.directions.centre.double()

    def sketch(self, kernel: str, before: list[int] | None = None, most: int | None = None) -> torch.Tensor:
        before = torch.zeros_like(self.lens) if before is None else torch.tensor(before)
        sketches = on_device(self.sketches)
        ops(kernel).sketch_tokens(
            on_device(self.keys),
            sketches,
            Directions(*map(on_device, self.directions)),
            on_device(self.contexts),
            on_device(before),
            most=int((self.lens - before).max()) if most is None else most,
            k_scale=self.k_scale,
        )
        self.sketches = sketches.cpu()
        return self.sketches

    def score(self, kernel: str, q: torch.Tensor, pools=("max", "max"), plan: bool = False):
        """(importance on the CPU, first columns), a block of columns a request."""
        (bs, rows), columns = q.shape[:2], -(-self.table.shape[1] // 64) * 64
        importance = torch.full((self.kv_heads, bs * columns + 64), -5.0).half().to(DEVICE)
        starts, contexts = torch.arange(bs) * columns, on_device(self.contexts)
        ops(kernel).score_tokens(
            on_device(q),
            on_device(self.sketches),
            Directions(*map(on_device, self.directions)),
            contexts,
            Scores(importance, on_device(starts)),
            scale=self.dim**-0.5,
            pooling=Pooling(*pools, rows),
            plan=ops(kernel).plan_scores(contexts, kv_heads=self.kv_heads) if plan else None,
        )
        return importance.cpu(), starts


def draw_queries(pool: Pool, rows: int, group: int) -> torch.Tensor:
    """A slice of a fused projection, as models have it: rows lie apart, with NaN between them."""
    heads, bs = pool.kv_heads * group, pool.lens.numel()
    fused = torch.full((bs, rows, heads + 1, pool.dim), math.nan, dtype=pool.dtype)
    fused[:, :, :heads] = torch.randn(bs, rows, heads, pool.dim).to(pool.dtype)
    return fused[:, :, :heads]


def expected_scores(pool: Pool, q: torch.Tensor, pools, like: torch.Tensor, starts) -> torch.Tensor:
    """float64, by definition."""
    expected = torch.full_like(like, -5.0).double()
    bs, rows, heads, _ = q.shape
    group = heads // pool.kv_heads
    for b, (row, length) in enumerate(zip(pool.rows.tolist(), pool.lens.tolist(), strict=True)):
        for h in range(pool.kv_heads if length else 0):
            own = values_of(pool.sketches[pool.table[row, :length].long(), h]).double()
            of_rows = []
            for t in range(rows):
                probs = []
                for g in range(group):
                    query = q[b, t, h * group + g].double() @ pool.directions.back[h].double()
                    step = query.abs().max() / QUERY_STEPS
                    query = torch.floor(query / step + 0.5) * step
                    probs.append((own @ query * pool.dim**-0.5).softmax(0))
                probs = torch.stack(probs)
                of_rows.append(probs.amax(0) if pools[1] == "max" else probs.mean(0))
            of_rows = torch.stack(of_rows)
            pooled = of_rows.amax(0) if pools[0] == "max" else of_rows.mean(0)
            expected[h, starts[b] : starts[b] + length] = pooled * IMPORTANCE_SCALE
    return expected


def values_of(sketches: torch.Tensor) -> torch.Tensor:
    """int32 [.., R]: what the halves of bytes say, by arithmetic."""
    whole = sketches.int()
    low = whole % 16
    return torch.cat([low - 8, (whole - low) // 16], -1)


def check_sketches(pool: Pool, found: torch.Tensor) -> None:
    """Written ones are what is nearest, where rounding is no matter of float error; others are untouched."""
    exact, written = pool.exact(), torch.zeros(len(found), dtype=torch.bool)
    for row, length in zip(pool.rows.tolist(), pool.lens.tolist(), strict=True):
        written[pool.table[row, :length].long()] = True
    assert (found[~written] == UNWRITTEN).all() and (found[written] > UNWRITTEN).all()
    apart = (values_of(found[written]).double() - exact[written].clamp(-MOST_STEPS, MOST_STEPS)).abs()
    # Half a step, and what sums of D products of the keys' dtype are off by.
    assert apart.max() <= 0.5 + 1e-3


def check_scores(pool: Pool, kernel: str, rows: int, group: int, pools=("max", "max")) -> None:
    q = draw_queries(pool, rows, group)
    found, starts = pool.score(kernel, q, pools)
    expected = expected_scores(pool, q, pools, found, starts)
    # Queries and directions have the dtype of keys, so that a query's rounding to steps may go the other way,
    # and logits are rounded to float16: logits of a few are off by a few hundredths.
    rtol = 4e-2 if pool.dtype == torch.bfloat16 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=2e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [32, 64, 80, 96])
def test_a_sketch_is_the_key_on_its_directions(kernel: str, dim: int) -> None:
    pool = Pool([130, 1, 0, 70], dim=dim)
    check_sketches(pool, pool.sketch(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sketches_of_half_precision_keys(kernel: str, dtype: torch.dtype) -> None:
    skip_bf16_in_the_interpreter(kernel, dtype)
    pool = Pool([130, 20], dtype=dtype)
    check_sketches(pool, pool.sketch(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k_scale", [1.0, 0.37])
def test_sketches_of_fp8_keys_are_of_what_they_mean(kernel: str, k_scale: float) -> None:
    pool = Pool([130, 20], dim=64, dtype=torch.float16)
    pool.keys, pool.k_scale = pool.keys.to(torch.float8_e4m3fn), k_scale
    check_sketches(pool, pool.sketch(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_what_a_forward_wrote_is_sketched(kernel: str) -> None:
    pool = Pool([90, 40, 70])
    pool.rows[1] = 0  # pads a graph
    found = pool.sketch(kernel, [85, 0, 70], most=5)
    written = (found != UNWRITTEN).flatten(1).all(1).nonzero().flatten()
    assert sorted(written.tolist()) == sorted(pool.table[1, 85:90].tolist())


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_far_away_is_the_last_step(kernel: str) -> None:
    pool = Pool([50])
    pool.keys *= 100
    found = values_of(pool.sketch(kernel)[pool.table[1, :50].long()])
    assert found.min() == -MOST_STEPS and found.max() == MOST_STEPS


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_scores_by_definition(kernel: str, rows: int, pools) -> None:
    pool = Pool([150, 3, 0, 90])
    pool.sketch(kernel)
    check_scores(pool, kernel, rows, 2, pools)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8])
def test_scores_of_every_group(kernel: str, group: int) -> None:
    pool = Pool([100, 60], dim=80 if group == 3 else 32)
    pool.sketch(kernel)
    check_scores(pool, kernel, 2, group)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision(kernel: str, dtype: torch.dtype) -> None:
    skip_bf16_in_the_interpreter(kernel, dtype)
    pool = Pool([200, 30], dim=64, dtype=dtype)
    pool.sketch(kernel)
    check_scores(pool, kernel, 1, 4)


@pytest.mark.parametrize("again", [1, 1000])  # query rows: sketches are read again, logits are kept
@pytest.mark.parametrize("rows, group", [(1, 1), (1, 4), (3, 2), (4, 4), (5, 7)])
def test_scores_by_logits_and_by_a_second_reading(monkeypatch, again: int, rows: int, group: int) -> None:
    """In parts of less than a block, of one and of more."""
    tune(monkeypatch, tokens, again=again, programs=12, least=16, block=64, pooled=64, pool_programs=12)
    pool = Pool([700, 1, 0, 64, 130])
    pool.sketch("triton")
    check_scores(pool, "triton", rows, group)


def check_lists(pool: Pool, kernel: str, importance: torch.Tensor, counts, sink=4, recent=20) -> None:
    """Against a sort in Python."""
    (heads, _), bs, columns = importance.shape, len(counts), -(-pool.table.shape[1] // 64) * 64
    starts = torch.arange(bs * heads).view(bs, heads) * 500
    indices = torch.full((bs * heads * 500,), -7, dtype=torch.int32)
    lists = on_device(Lists(indices, starts, torch.tensor(counts, dtype=torch.int32)))
    scores = on_device(Scores(importance, torch.arange(bs) * columns))
    ops(kernel).list_tokens(scores, on_device(pool.contexts), lists, sink=sink, recent=recent)
    found, written = lists.indices.cpu(), 0
    for b, (row, length) in enumerate(zip(pool.rows.tolist(), pool.lens.tolist(), strict=True)):
        for h in range(heads):
            count, start = counts[b][h], int(starts[b, h])
            if count == WHOLE:
                continue
            ranks = importance[h, b * columns : b * columns + length].view(torch.int16) >> UNRANKED_BITS
            free = range(sink, length - recent)
            best = sorted(free, key=lambda p, ranks=ranks: (-int(ranks[p]), -p))[: count - sink - recent]
            expected = pool.table[row, [*range(sink), *range(length - recent, length), *best]]
            entries = found[start : start + count]
            assert entries.sort().values.tolist() == expected.sort().values.tolist(), (b, h)
            written += count
    assert int((found != -7).sum()) == written


def drawn_scores(pool: Pool, kinds: int | None = None) -> torch.Tensor:
    """float16 [H_kv, columns], of so many values; NaN where no request has a column."""
    width = pool.table.shape[1]
    columns = -(-width // 64) * 64
    found = torch.full((pool.kv_heads, len(pool.lens) * columns), math.nan).half()
    for b, length in enumerate(pool.lens.tolist()):
        own = torch.rand(pool.kv_heads, length) ** 8 * IMPORTANCE_SCALE
        if kinds:
            own = torch.randint(kinds, own.shape).float()
        found[:, b * columns : b * columns + length] = own.half()
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kinds", [None, 1, 5])
@pytest.mark.parametrize("segment", [32, 256])  # whose counts are read in several goes, in one
@pytest.mark.parametrize("alone", [0, 250, 32768])  # scores: all rows in parts, some, none
def test_lists_have_the_highest_ranks_and_of_equals_the_later(
    monkeypatch, kernel, kinds, segment, alone
) -> None:
    tune(monkeypatch, select, segment=segment, listed=128, counted=64, alone=alone)
    pool = Pool([400, 90, 300, 40])
    counts = [[100, 24], [60, WHOLE], [25, 299], [WHOLE, WHOLE]]
    check_lists(pool, kernel, drawn_scores(pool, kinds), counts)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lists_of_little_sink_and_much_recent(monkeypatch, kernel) -> None:
    tune(monkeypatch, select, segment=64, listed=64, alone=0)
    pool = Pool([400, 330])
    check_lists(pool, kernel, drawn_scores(pool), [[200, 181], [190, 182]], sink=1, recent=180)


def test_programs_that_share_a_request_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tune(monkeypatch, tokens, programs=12, least=16, block=16, pooled=64, pool_programs=12, sketch_block=16)
    pool = Pool([230, 17, 100])
    check_sketches(pool, pool.sketch("triton"))
    check_scores(pool, "triton", 1, 4)
    q = draw_queries(pool, 1, 4)
    assert torch.equal(pool.score("triton", q)[0], pool.score("triton", q, plan=True)[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_batch_is_nothing_to_do(kernel: str) -> None:
    pool = Pool([5])
    pool.lens, pool.rows = pool.lens[:0], pool.rows[:0]
    assert (pool.sketch(kernel, [], most=1) == UNWRITTEN).all()
    found, _ = pool.score(kernel, draw_queries(pool, 1, 2))
    assert (found == -5).all()


def test_kernels_sketch_and_rank_as_the_twins_do() -> None:
    pool, other = Pool([300, 50], dim=64, dtype=torch.float16), None
    other = pool.sketch("torch").clone()
    assert (values_of(pool.sketch("triton")) - values_of(other)).abs().max() <= 1
    q = draw_queries(pool, 1, 4)
    (a, starts), (b, _) = pool.score("triton", q), pool.score("torch", q)
    for h in range(2):
        best = [set(x[h, starts[0] : starts[0] + 300].float().topk(30).indices.tolist()) for x in (a, b)]
        assert len(best[0] & best[1]) >= 29


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_refuse_shapes_that_do_not_fit(kernel: str) -> None:
    pool = Pool([40])
    op, before, directions = ops(kernel), torch.tensor([0]), pool.directions
    made = {"contexts": on_device(pool.contexts), "most": 40}
    keys, sketches = on_device(pool.keys), on_device(pool.sketches)
    ours = Directions(*map(on_device, directions))
    with pytest.raises(ValueError, match="sketch_tokens: before"):
        op.sketch_tokens(keys, sketches, ours, before=on_device(before[:0]), **made)
    with pytest.raises(ValueError, match="sketch_tokens: sketches"):
        op.sketch_tokens(keys, sketches.int(), ours, before=on_device(before), **made)
    with pytest.raises(ValueError, match="directions.centre"):
        wrong = ours._replace(centre=ours.centre[:, :2])
        op.sketch_tokens(keys, sketches, wrong, before=on_device(before), **made)
    with pytest.raises(ValueError, match="directions.onto"):
        wrong = ours._replace(onto=ours.onto.half())
        op.sketch_tokens(keys, sketches, wrong, before=on_device(before), **made)
    q = on_device(draw_queries(pool, 1, 2))
    scores = on_device(Scores(torch.zeros(2, 64).half(), torch.tensor([0])))
    rest = {"contexts": on_device(pool.contexts), "scores": scores, "scale": 1.0}
    with pytest.raises(ValueError, match="score_tokens: q"):
        op.score_tokens(q[:, :, :3], sketches, ours, pooling=Pooling("max", "max", 1), **rest)
    with pytest.raises(ValueError, match="pooling.heads"):
        op.score_tokens(q, sketches, ours, pooling=Pooling("max", "best", 1), **rest)
