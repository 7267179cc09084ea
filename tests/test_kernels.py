"""The ops of sts_kernels, both implementations, against their definitions written out in float64.

The Triton kernels run in Triton's interpreter where there is no GPU (see conftest.py).
"""

from __future__ import annotations

import ast
import inspect
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import sts_kernels
from sts_kernels import Ops, draft_attention, ops, select, split_kv, spread, torch_ops, triton_ops, verify
from sts_kernels import history as history_kernels
from sts_kernels.layout import (
    IMPORTANCE_SCALE,
    RANKS,
    SEGMENT,
    UNKNOWN,
    Carried,
    Contexts,
    History,
    KvPool,
    Lists,
    Members,
    Part,
    Pooling,
    Scores,
    part_bytes,
    parts_of_rows,
)
from tests.paged_fa3 import paged_fa3
from tests.tolerances import assert_close

KERNELS = ["torch", "triton"]
GROUPS = [1, 2, 4, 5, 7, 8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of FP8: none, and such that each would be missed, or taken for the other.
SCALES = [(1.0, 1.0), (2.5, 0.3)]
LENGTHS = [13, 1, 70, 130]  # below every budget, one token, over one block of keys, over two
KV_HEADS, DIM, TOKENS = 2, 16, 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Batch:
    """Requests with permuted slots; pools are NaN wherever an op has no business reading."""

    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    group: int = 2
    dtype: torch.dtype = torch.float32
    tail: int = 16  # positions after the committed ones: draft tokens and scratch
    stored: torch.dtype | None = None  # of keys and values, where it is another
    scales: tuple[float, float] = (1.0, 1.0)  # of keys and values

    def __post_init__(self) -> None:
        requests, width = len(self.lengths) + 3, max([*self.lengths, 1]) + self.tail
        order = torch.randperm(requests * width) + 1
        self.table = order.view(requests, width).int()
        self.reqs = torch.randperm(requests - 1)[: len(self.lengths)] + 1
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int64)
        wide = (self.seq_lens + 63) // 64 * 64
        self.ctx_start = wide.cumsum(0) - wide
        self.columns = int(wide.sum()) + 64
        self.k, self.v = (self._pool(2 * requests * width) for _ in range(2))

    @property
    def pool(self) -> KvPool:
        return KvPool(self.k, self.v, *self.scales)

    @property
    def contexts(self) -> Contexts:
        return Contexts(self.table, self.reqs, self.seq_lens)

    def _pool(self, slots: int) -> torch.Tensor:
        pool = torch.full((slots, KV_HEADS, DIM), math.nan)
        for req, length in zip(self.reqs.tolist(), self.lengths, strict=True):
            used = self.table[req, : length + self.tail].long()
            pool[used] = torch.randn(used.numel(), KV_HEADS, DIM)
        return pool.to(self.stored or self.dtype)

    def queries(self, *shape: int) -> torch.Tensor:
        """A slice of a fused projection, as models have it: rows lie apart, with NaN between them."""
        heads = KV_HEADS * self.group
        fused = torch.full((*shape, heads + 1, DIM), math.nan, dtype=self.dtype)
        fused[..., :heads, :] = torch.randn(*shape, heads, DIM)
        return fused[..., :heads, :]

    def slots(self, b: int, positions) -> torch.Tensor:
        return self.table[self.reqs[b], torch.tensor(positions, dtype=torch.int64)].long()

    def probability(self, query: torch.Tensor, head: int, slots: torch.Tensor) -> torch.Tensor:
        """float64 softmax of one query head over slots."""
        keys = self.k[slots, head // self.group].double() * self.scales[0]
        return (keys @ query[head].double() * DIM**-0.5).softmax(0)

    def attend(self, query: torch.Tensor, head: int, slots: torch.Tensor) -> torch.Tensor:
        values = self.v[slots, head // self.group].double() * self.scales[1]
        return self.probability(query, head, slots) @ values


def skip_bf16_in_the_interpreter(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16, not their values")


def on_device(value):
    """A tensor, or a noun of tensors, on the device under test."""
    if isinstance(value, tuple):
        return type(value)(*map(on_device, value))
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def tune(monkeypatch, module, **knobs) -> None:
    """Set some of a kernel's knobs for the rest of a test."""
    monkeypatch.setattr(module, "KNOBS", replace(module.KNOBS, **knobs))


# ---- the interface


@pytest.mark.parametrize("module", [torch_ops, triton_ops], ids=KERNELS)
@pytest.mark.parametrize("name", [name for name in vars(Ops) if not name.startswith("_")])
def test_an_implementation_has_every_op_with_the_signature_of_the_protocol(module, name: str) -> None:
    op = inspect.signature(getattr(Ops, name))
    _, *parameters = op.parameters.values()  # self
    assert inspect.signature(getattr(module, name)) == op.replace(parameters=parameters)


def test_no_function_takes_more_than_eight_positional_arguments() -> None:
    """But for kernels and what is compiled into them."""
    for path in Path(sts_kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                jit = any(ast.unparse(d) == "triton.jit" for d in getattr(node, "decorator_list", []))
                assert jit or len(node.args.posonlyargs + node.args.args) <= 8, (path.name, node.lineno)


# ---- draft attention


def members(q_heads: int) -> Members:
    """Channel 1 is two heads of this layer and fresh; channel 3 is one head, the rest is elsewhere."""
    heads = torch.tensor([[0, q_heads - 1], [q_heads // 2, -1]], dtype=torch.int32)
    return Members(
        torch.tensor([1, 3], dtype=torch.int32),
        heads,
        torch.tensor([0.5, 1 / 3]),
        torch.tensor([True, False]),
    )


def run_draft(
    kernel: str, batch: Batch, branches: int, step: int, pools=("max", "max"), carried=True, elsewhere=None
):
    """(queries, carried queries, carried lengths, base importance), then what the op returned and wrote."""
    q = batch.queries(len(batch.lengths) * branches) if branches else None
    carried_q = batch.queries(batch.table.shape[0]).contiguous() if carried else None
    carried_len = torch.zeros(batch.table.shape[0], dtype=torch.int64)
    carried_len[batch.reqs] = batch.seq_lens
    if len(batch.lengths) > 1:
        carried_len[batch.reqs[-1]] += 1  # the last request's row is a leftover
    base = (torch.rand(4, batch.columns) * 1000).half()
    written = base.clone().to(DEVICE)
    out = ops(kernel).draft_attention(
        on_device(q),
        on_device(batch.pool),
        on_device(batch.contexts),
        on_device(Scores(written, batch.ctx_start)),
        on_device(members(KV_HEADS * batch.group)),
        on_device(Carried(carried_q, carried_len)),
        step=step,
        num_steps=3,
        scale=DIM**-0.5,
        pooling=Pooling(pools[1], pools[0], 7),
        elsewhere=on_device(elsewhere),
    )
    return q, carried_q, carried_len, base, None if out is None else out.cpu(), written.cpu()


def branch_slots(batch: Batch, b: int, branch: int, step: int) -> torch.Tensor:
    length = batch.lengths[b]
    scratch = length + branch * 3
    return batch.slots(b, [*range(length), *range(scratch, scratch + step + 1)])


def pooled_by_definition(batch: Batch, q, carried_q, carried_len, branches, step, pools) -> dict:
    """(b, member) -> float64 [L] importance of the call's rows by draft index."""
    found, speakers = {}, members(KV_HEADS * batch.group)
    for b, length in enumerate(batch.lengths):
        for m in range(2):
            heads = [h for h in speakers.heads[m].tolist() if h >= 0]
            rows = []
            if carried_q is not None:
                probs = torch.stack(
                    [
                        batch.probability(carried_q[batch.reqs[b]], h, batch.slots(b, range(length)))
                        for h in heads
                    ]
                )
                rows.append(probs * (int(carried_len[batch.reqs[b]]) == length))
            for w in range(branches):
                query = q[b * branches + w]
                slots = branch_slots(batch, b, w, step)
                rows.append(torch.stack([batch.probability(query, h, slots)[:length] for h in heads]))
            stacked = torch.stack(rows)  # [rows, heads, L]
            row = stacked.amax(1) if pools[0] == "max" else stacked.sum(1) * speakers.scale[m].double()
            found[b, m] = row.amax(0) if pools[1] == "max" else row.sum(0) / 7
    return found


def check_importance(batch: Batch, base, written, found: dict, pools, carried: bool) -> None:
    """Draft index p is written at position p + 1; what is not the batch's stays as it was."""
    expected = base.double()
    for (b, m), score in found.items():
        column, length = int(batch.ctx_start[b]), batch.lengths[b]
        if column < 0:
            continue
        place = expected[[1, 3][m], column + 1 : column + length]
        score = score[: length - 1] * IMPORTANCE_SCALE
        if carried and m == 0:
            place.copy_(score)
        elif pools[1] == "max":
            place.copy_(torch.maximum(place, score))
        else:
            place.add_(score)
    # One rounding of the score to float16, in the kernel one more of the stored exponential.
    torch.testing.assert_close(written.double(), expected, rtol=2e-3, atol=2e-3)
    untouched = expected == base.double()
    assert torch.equal(written[untouched], base[untouched])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("group", GROUPS)
def test_draft_attention_first_step_scores_the_carried_row_too(kernel: str, group: int) -> None:
    batch = Batch(group=group)
    check_draft(kernel, batch, branches=1, step=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [8, 24, 96])
def test_heads_whose_dimensions_are_no_power_of_two(monkeypatch, kernel: str, dim: int) -> None:
    """Tiles are padded; a pool's next head, or what is no head at all, is not read."""
    monkeypatch.setattr(f"{__name__}.DIM", dim)
    check_draft(kernel, Batch(lengths=[70, 9]), branches=2, step=1, carried=False)
    check_draft(kernel, Batch(lengths=[70, 9], group=5), branches=1, step=0)
    batch = Batch(lengths=[70, 9])
    q, lists, out, _ = run_verify(kernel, batch, [65, -1])
    check_verify(batch, q, lists, out, chain(4))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("branches, step", [(1, 1), (4, 0), (4, 1)])
@pytest.mark.parametrize(
    "pools", [("max", "max"), ("mean", "mean"), ("mean", "max"), ("max", "mean")], ids="-".join
)
def test_draft_attention_pools_rows_and_heads(kernel: str, branches: int, step: int, pools) -> None:
    check_draft(kernel, Batch(lengths=[70, 9]), branches, step, pools, carried=step == 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("branches, step", [(0, 0), (1, 0), (2, 0), (2, 1)])
def test_who_is_only_scored_needs_no_values_and_no_keys_of_silent_heads(
    monkeypatch, kernel: str, branches: int, step: int
) -> None:
    """Requests that attend elsewhere beside one that does not, in parts, and all of them without branches."""
    tune(monkeypatch, draft_attention, narrow=0, programs=24, least=64)
    batch, pools = Batch(lengths=[70, 9, 300, 1], group=2), ("max", "max")
    here = [False, True, False, True] if branches else [False] * 4
    speaking = Members(
        torch.tensor([1, 3], dtype=torch.int32),
        torch.tensor([[2, 3], [3, -1]], dtype=torch.int32),  # those of the second KV head
        torch.tensor([0.5, 1.0]),
        torch.tensor([True, False]),
    )
    monkeypatch.setattr(f"{__name__}.members", lambda _: speaking)
    whole = replace(batch)
    whole.table, whole.reqs, whole.k, whole.v = batch.table, batch.reqs, batch.k.clone(), batch.v.clone()
    for b, attends in enumerate(here):
        if not attends:
            slots = batch.slots(b, range(batch.lengths[b] + batch.tail))
            batch.v[slots], batch.k[slots, 0] = math.nan, math.nan
    elsewhere = None if not branches else ~torch.tensor(here)
    q, carried_q, carried_len, base, out, written = run_draft(
        kernel, batch, branches, step, pools, carried=step == 0, elsewhere=elsewhere
    )
    found = pooled_by_definition(whole, q, carried_q, carried_len, branches, step, pools)
    check_importance(batch, base, written, found, pools, carried=step == 0)
    for b, w in ((b, w) for b in range(4) for w in range(branches) if here[b]):
        slots = branch_slots(batch, b, w, step)
        expected = [whole.attend(q[b * branches + w], h, slots) for h in range(KV_HEADS * batch.group)]
        assert_close(out[b * branches + w], torch.stack(expected))


def check_draft(kernel, batch, branches, step, pools=("max", "max"), carried=True) -> None:
    q, carried_q, carried_len, base, out, written = run_draft(kernel, batch, branches, step, pools, carried)
    for b in range(len(batch.lengths)):
        for w in range(branches):
            slots = branch_slots(batch, b, w, step)
            heads = range(KV_HEADS * batch.group)
            expected = torch.stack([batch.attend(q[b * branches + w], h, slots) for h in heads])
            assert_close(out[b * branches + w], expected)
    found = pooled_by_definition(batch, q, carried_q, carried_len, branches, step, pools)
    check_importance(batch, base, written, found, pools, carried)


@pytest.mark.parametrize("kernel", KERNELS)
def test_draft_attention_of_the_carried_row_alone(kernel: str) -> None:
    batch = Batch(lengths=[70, 9])
    _, carried_q, carried_len, base, out, written = run_draft(kernel, batch, 0, 0)
    assert out is None
    found = pooled_by_definition(batch, None, carried_q, carried_len, 0, 0, ("max", "max"))
    check_importance(batch, base, written, found, ("max", "max"), True)


# A context, or its share of a split, ends within, at and after a block; one split gets no token.
@pytest.mark.parametrize("lengths", [[330, 64, 9], [127, 128, 129]], ids=str)
@pytest.mark.parametrize("splits", [3, 5])
def test_draft_attention_in_any_number_of_splits(monkeypatch, lengths: list[int], splits: int) -> None:
    tune(monkeypatch, draft_attention, narrow=0, programs=6 * splits, least=8)
    check_draft("triton", Batch(lengths=lengths), branches=2, step=1, carried=False)
    check_draft("triton", Batch(lengths=lengths), branches=1, step=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_full_block_leaves_the_columns_after_it_alone(kernel: str) -> None:
    """The second request's bonus token is where the first request's columns start."""
    batch = Batch(lengths=[70, 64])
    batch.ctx_start = torch.tensor([64, 0])
    check_draft(kernel, batch, branches=1, step=0)


def test_columns_that_are_no_whole_blocks_are_refused() -> None:
    batch = Batch(lengths=[9])
    batch.columns += 1
    with pytest.raises(ValueError, match="129 columns"):
        run_draft("triton", batch, 1, 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_request_without_columns_is_attended_but_not_scored(kernel: str) -> None:
    batch = Batch(lengths=[9, 70])
    batch.ctx_start[1] = -1
    check_draft(kernel, batch, branches=1, step=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_draft_attention_in_half_precision(kernel: str, dtype: torch.dtype) -> None:
    skip_bf16_in_the_interpreter(kernel, dtype)
    batch = Batch(lengths=[70, 9], dtype=dtype)
    q, *_, out, _ = run_draft(kernel, batch, 1, 0)
    expected = torch.stack([batch.attend(q[1], h, branch_slots(batch, 1, 0, 0)) for h in range(4)])
    assert_close(out[1], expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draft_attention_to_fp8(kernel: str, dtype: torch.dtype, scales: tuple[float, float]) -> None:
    """Context and scratch are read as what was stored, and scores know the scale of the keys."""
    batch = Batch(lengths=[70, 9], dtype=dtype, stored=torch.float8_e4m3fn, scales=scales)
    check_draft(kernel, batch, branches=2, step=1, carried=False)
    check_draft(kernel, batch, branches=1, step=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_draft_attention_of_an_empty_batch(kernel: str) -> None:
    *_, out, _ = run_draft(kernel, Batch(lengths=[]), 1, 0)
    assert out.shape[0] == 0


# ---- spread


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("factor", [0.75, 1.0])
@pytest.mark.parametrize(
    ("programs", "dtype"),
    [(1, torch.float16), (30, torch.float16), (1000, torch.float16), (1000, torch.float32)],
)
@pytest.mark.parametrize("over", [1, 8])
def test_importance_passes_on(monkeypatch, kernel: str, factor: float, programs: int, dtype, over) -> None:
    """Over several blocks and parts, exactly; other requests' columns stay as they are."""
    tune(monkeypatch, spread, programs=programs)
    batch = Batch(lengths=[9, 1, 2, 9000, 70])
    batch.ctx_start[4] = -1
    before = scores_like("unknown", batch).to(dtype)
    found = before.clone().to(DEVICE)
    scores = on_device(Scores(found, batch.ctx_start))
    ops(kernel).spread_importance(scores, on_device(batch.seq_lens), factor=factor, over=over)
    expected = before.clone()
    for start, length in zip(batch.ctx_start.tolist(), batch.lengths, strict=True):
        for p in range(2, length if start >= 0 else 0):
            for k in range(1, min(over, p - 1) + 1):  # the first position with a score is 1
                own, last = expected[:, start + p], before[:, start + p - k] * factor**k
                expected[:, start + p] = torch.where(last > own, last, own)
    assert torch.equal(found.cpu().view(torch.int16), expected.view(torch.int16))  # NaN too
    assert (found.cpu().nan_to_num(0) != before.nan_to_num(0)).sum() > 1000


# ---- selection


def run_select(kernel, batch: Batch, importance, counts: list[int], sink, recent, top_p=None):
    """[b][channel] -> sorted positions, None for the whole context."""
    channels, bs = importance.shape[0], len(batch.lengths)
    kv_count = torch.tensor(counts, dtype=torch.int32)[:, None].expand(bs, channels).contiguous().to(DEVICE)
    width = max([*batch.lengths, 1])
    kv_start = (torch.arange(bs * channels).view(bs, channels) * width).to(DEVICE)
    kv_indices = torch.full((bs * channels * width + 8,), -7, dtype=torch.int32, device=DEVICE)
    budgets = torch.tensor(counts).clamp(min=0)
    limits = None if top_p is None else torch.tensor(top_p, dtype=torch.float32, device=DEVICE)
    draft_indices = torch.full_like(kv_indices, -7)
    ops(kernel).select_tokens(
        on_device(Scores(importance, batch.ctx_start)),
        on_device(batch.contexts),
        on_device(budgets),
        Lists(kv_indices, kv_start, kv_count),
        sink=sink,
        recent=recent,
        top_p=limits,
        draft_indices=draft_indices,
    )
    found, used = [], 0
    for b in range(bs):
        position = {int(slot): p for p, slot in enumerate(batch.table[batch.reqs[b]])}
        lists = []
        for c in range(channels):
            start, count = int(kv_start[b, c]), int(kv_count[b, c])
            entries = kv_indices[start : start + max(count, 0)].tolist()
            used += len(entries)
            # A draft key stands one position before its token; the bonus token's stands in for none.
            keys = [p - 1 if p else batch.lengths[b] - 1 for p in (position[slot] for slot in entries)]
            shifted = draft_indices[start : start + max(count, 0)].tolist()
            assert shifted == batch.table[batch.reqs[b], keys].tolist()
            lists.append(None if count < 0 else sorted(position[slot] for slot in entries))
        found.append(lists)
    if top_p is None:
        assert int((kv_indices != -7).sum()) == int((draft_indices != -7).sum()) == used  # and no more
    return found


def top_by_definition(scores: torch.Tensor, count: int, sink: int, recent: int) -> list[int]:
    length = len(scores)
    forced = set(range(sink)) | set(range(length - recent, length))
    rank = [math.inf if math.isnan(s) else s for s in scores.tolist()]
    free = sorted((p for p in range(length) if p not in forced), key=lambda p: (-rank[p], -p))
    return sorted(forced | set(free[: count - len(forced)]))


def scores_like(kind: str, batch: Batch) -> torch.Tensor:
    scores = (torch.rand(3, batch.columns) ** 6 * 16384).half()
    if kind == "tied":
        scores = (torch.randint(0, 3, scores.shape) * 5).half()
    elif kind == "tiny":  # float16 subnormals
        scores = (torch.rand(scores.shape) * 6e-5).half()
    elif kind == "unknown":
        scores[:, 5::7] = math.nan
        scores.view(torch.int16)[:, 6::14] = 0x7FFF  # NaN as CUDA writes it
    return scores


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["distinct", "tied", "tiny", "unknown"])
@pytest.mark.parametrize("counts", [[12, -1, 40, 13], [-1, -1, 11, 129], [10, -1, 10, 10]], ids=str)
def test_selection_follows_the_definition(kernel: str, kind: str, counts: list[int]) -> None:
    batch, sink, recent = Batch(), 3, 7
    importance = scores_like(kind, batch)
    found = run_select(kernel, batch, importance, counts, sink, recent)
    for b, (length, count) in enumerate(zip(batch.lengths, counts, strict=True)):
        for c in range(3):
            row = importance[c, int(batch.ctx_start[b]) :][:length]
            assert found[b][c] == (None if count < 0 else top_by_definition(row, count, sink, recent))


@pytest.mark.parametrize("many", [0, 3], ids=["alone", "parts"])
@pytest.mark.parametrize("words", [64, 256, 1024])
def test_selection_in_tiles_of_any_size(monkeypatch, words: int, many: int) -> None:
    """Rows of several tiles, of one and of a small one, where two rows are many and where they are few."""
    tune(monkeypatch, select, words=words, many=many, segment=1024, listed=1024, counted=1024)
    batch = Batch(lengths=[5000, 2048 + 64])
    for kind in ("distinct", "tied", "unknown"):
        importance = scores_like(kind, batch)[:1]
        found = run_select("triton", batch, importance, [700, 300], 4, 64)
        for b, (length, count) in enumerate(((5000, 700), (2048 + 64, 300))):
            row = importance[0, int(batch.ctx_start[b]) :][:length]
            assert found[b][0] == top_by_definition(row, count, 4, 64)


@pytest.mark.parametrize("many", [0, 3], ids=["alone", "parts"])
def test_selection_behind_a_sink_of_several_tiles(monkeypatch, many: int) -> None:
    tune(monkeypatch, select, words=64, many=many, segment=1024, listed=1024, counted=1024)
    batch, sink, recent = Batch(lengths=[9000, 5000]), 4500, 10
    importance = scores_like("distinct", batch)[:1]
    found = run_select("triton", batch, importance, [4710, 4600], sink, recent)
    for b, (length, count) in enumerate(((9000, 4710), (5000, 4600))):
        row = importance[0, int(batch.ctx_start[b]) :][:length]
        assert found[b][0] == top_by_definition(row, count, sink, recent)


@pytest.mark.parametrize("alone, parts, segment", [(0, 1056, 16), (60, 1, 32)])
@pytest.mark.parametrize(
    "kind, counts",
    [("distinct", [10, -1, 11, 129]), ("tied", [12, -1, 40, 13]), ("unknown", [12, -1, 40, 13])],
)
def test_selection_of_rows_in_parts(monkeypatch, kind, counts, alone: int, parts: int, segment: int) -> None:
    """All rows in parts of a few scores, whose counts are read in several goes; rows of one part, beside such
    as one program lists."""
    tune(monkeypatch, select, alone=alone, parts=parts, segment=segment, counted=32, listed=16)
    test_selection_follows_the_definition("triton", kind, counts)


def test_top_p_of_rows_in_parts(monkeypatch) -> None:
    tune(monkeypatch, select, alone=0, segment=32, counted=32, listed=16)
    test_top_p_is_the_smallest_set_that_holds_it("triton", 0.5)


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 1000, 1056, 5000])
@pytest.mark.parametrize("width", [1, 4096, 32_769, 131_072, 1_000_001])
def test_parts_cover_a_row_and_have_room(rows: int, width: int) -> None:
    parts, segment = parts_of_rows(rows, width)
    assert (parts - 1) * segment < width <= parts * segment and segment % SEGMENT == 0
    assert rows * parts * 4 * (RANKS + 64) <= part_bytes(rows)


@pytest.mark.parametrize("many", [0, 2], ids=["alone", "parts"])
def test_selection_over_several_full_tiles(monkeypatch, many: int) -> None:
    """As tuned, with ties in every tile: where compiling has gone wrong, and the interpreter was right."""
    tune(monkeypatch, select, many=many)
    batch = Batch(lengths=[80_000])
    importance = scores_like("tied", batch)[:1]
    found = run_select("triton", batch, importance, [30_000], 4, 64)
    assert found[0][0] == top_by_definition(importance[0, :80_000], 30_000, 4, 64)


@pytest.mark.parametrize("kernel", KERNELS)
def test_selection_with_more_recent_tokens_than_a_block(kernel: str) -> None:
    batch, sink, recent = Batch(lengths=[5000, 2700]), 4, 2600
    importance = scores_like("distinct", batch)[:1]
    found = run_select(kernel, batch, importance, [2900, 2604], sink, recent)
    for b, (length, count) in enumerate(((5000, 2900), (2700, 2604))):
        row = importance[0, int(batch.ctx_start[b]) :][:length]
        assert found[b][0] == top_by_definition(row, count, sink, recent)


@pytest.mark.parametrize("kernel", KERNELS)
def test_selection_of_columns_that_are_not_aligned(kernel: str) -> None:
    """Request 1 starts at column 70, after request 0's last: no 16-byte accesses then."""
    batch = Batch(lengths=[70, 130])
    batch.ctx_start, batch.columns = torch.tensor([0, 70]), 201
    importance = scores_like("distinct", batch)
    found = run_select(kernel, batch, importance, [60, 100], 3, 7)
    for b, (start, count) in enumerate([(0, 60), (70, 100)]):
        row = importance[1, start : start + batch.lengths[b]]
        assert found[b][1] == top_by_definition(row, count, 3, 7)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_top_p_is_the_smallest_set_that_holds_it(kernel: str, top_p: float) -> None:
    batch, sink, recent = Batch(lengths=[70, 130]), 2, 5
    importance = scores_like("distinct", batch)
    found = run_select(kernel, batch, importance, [60, 100], sink, recent, [top_p, math.inf])
    for c in range(3):
        row = importance[c, :70].double()
        row[0] = 0  # no draft score
        chosen = found[0][c]
        assert chosen == top_by_definition(importance[c, :70], len(chosen), sink, recent)
        free = [p for p in chosen if sink <= p < 65]
        held, least = row[chosen].sum() / row.sum(), min((float(row[p]) for p in free), default=0.0)
        # float32 sums may be a rounding off, never a token that matters.
        assert len(chosen) == 60 or held >= top_p - 1e-5
        assert not free or held - least / row.sum() < top_p + 1e-5
        assert len(found[1][c]) == 100  # plain budgets share the batch


@pytest.mark.parametrize("kernel", KERNELS)
def test_selection_of_an_empty_batch(kernel: str) -> None:
    assert run_select(kernel, Batch(lengths=[]), torch.zeros(3, 64).half(), [], 4, 8) == []


# ---- history


@pytest.mark.parametrize("weights", [(0.5, 0.25), (0.0, 0.25), (0.5, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("lengths", [(70, 90, 40, 1, 60), (70,)])
@pytest.mark.parametrize("channels", [3, 150])
@pytest.mark.parametrize("kernel", KERNELS)
def test_history_is_mixed_decayed_once_and_kept_at_its_maximum(
    monkeypatch, kernel, channels, lengths, weights
) -> None:
    """Requests 0, 1 and 4 share a prefix, 0 and 1 more of it; request 2 has no columns and is left alone."""
    sizes = {"claim_block": 16, "claim_programs": 3, "programs": 3, "tile": 2048, "tile_alone": 2048}
    tune(monkeypatch, history_kernels, **sizes)
    batch = Batch(lengths=list(lengths))
    if several := len(lengths) > 1:
        batch.table[batch.reqs[1], :50] = batch.table[batch.reqs[0], :50]
        batch.table[batch.reqs[4], :30] = batch.table[batch.reqs[0], :30]
        batch.ctx_start[2] = -1
    slots = int(batch.table.max()) + 1
    known = torch.rand(slots, channels) < 0.5
    history = torch.where(known, torch.rand(slots, channels) * 100, UNKNOWN).half()
    owner, now = torch.zeros(slots, dtype=torch.int64), torch.tensor([2**30 + 7])
    owner[::2] = (2**30 + 6) * 2**32 if kernel == "triton" else 2**30 + 6  # touched in the round before
    weight, decay = torch.tensor([*weights, 0.5, 1.0, 0.125])[: len(lengths)], 0.8
    importance = (torch.rand(channels, batch.columns) * 100).half()
    mixed, kept, found = importance.double(), history.double(), {}
    for b in (0, 1, 4) if several else (0,):
        for position in range(1, batch.lengths[b]):
            column, slot = int(batch.ctx_start[b]) + position, int(batch.slots(b, [position]))
            fresh, w = importance[:, column].double(), float(weight[b])
            blend = (1 - w) * fresh + w * history[slot].double()
            mixed[:, column] = torch.where(known[slot], blend, fresh)
            found[slot] = torch.maximum(fresh, found.get(slot, torch.zeros(channels).double()))
    for slot, fresh in found.items():
        kept[slot] = torch.maximum(fresh, torch.where(known[slot], decay * kept[slot], UNKNOWN))
    scores, memory = on_device(Scores(importance, batch.ctx_start)), on_device(History(history, owner, now))
    ops(kernel).blend_history(scores, on_device(batch.contexts), memory, on_device(weight), decay=decay)
    # One rounding to float16.
    torch.testing.assert_close(scores.importance.cpu().double(), mixed, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(memory.scores.cpu(), kept.half(), rtol=1e-3, atol=0)


# ---- verify


def chain(bs: int) -> torch.Tensor:
    return torch.ones(TOKENS, TOKENS).tril().bool().expand(bs, -1, -1).contiguous()


def run_verify(kernel: str, batch: Batch, counts: list[int], tail_mask=None):
    """(queries, lists, output, attended); channel 1 takes the latest positions, channel 0 the earliest."""
    bs, width = len(batch.lengths), max([*batch.lengths, 1])
    mask = chain(bs) if tail_mask is None else tail_mask
    q = batch.queries(bs * mask.shape[1])
    q = q.view(bs, mask.shape[1], *q.shape[1:])
    kv_start = torch.arange(bs * 2).view(bs, 2) * width
    kv_indices = torch.full((bs * 2 * width + 8,), 10**6, dtype=torch.int32)
    lists = []
    for b, (length, count) in enumerate(zip(batch.lengths, counts, strict=True)):
        whole = list(range(length))
        picks = [whole, whole] if count < 0 else [whole[:count], whole[length - count :]]
        for c, picked in enumerate(picks):
            kv_indices[kv_start[b, c] : kv_start[b, c] + len(picked)] = batch.slots(b, picked).int()
        lists.append(picks)
    kv_count = torch.tensor(counts, dtype=torch.int32)[:, None].expand(bs, 2).contiguous()
    attended = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    heads = torch.tensor([1, 0], dtype=torch.int32)
    out = ops(kernel).sparse_attention(
        on_device(q),
        on_device(batch.pool),
        on_device(Lists(kv_indices, kv_start, kv_count)),
        on_device(heads),
        on_device(batch.contexts),
        on_device(mask),
        attended,
        scale=DIM**-0.5,
    )
    return q, lists, out.cpu(), attended.tolist()


def check_verify(batch: Batch, q, lists, out, mask) -> None:
    for b, length in enumerate(batch.lengths):
        for row in range(mask.shape[1]):
            tail = [length + j for j in range(mask.shape[2]) if mask[b, row, j]]
            expected = [
                batch.attend(q[b, row], h, batch.slots(b, lists[b][[1, 0][h // batch.group]] + tail))
                for h in range(KV_HEADS * batch.group)
            ]
            assert_close(out[b, row], torch.stack(expected))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("group", GROUPS)
def test_verify_is_softmax_over_selection_and_tail(kernel: str, group: int) -> None:
    batch, counts = Batch(group=group), [5, -1, 66, -1]
    q, lists, out, attended = run_verify(kernel, batch, counts)
    check_verify(batch, q, lists, out, chain(4))
    assert attended == [2 * (5 + 1 + 66 + 130), 2 * sum(LENGTHS)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_verify_in_half_precision(kernel: str, dtype: torch.dtype) -> None:
    skip_bf16_in_the_interpreter(kernel, dtype)
    batch = Batch(lengths=[70, 9], dtype=dtype)
    q, lists, out, _ = run_verify(kernel, batch, [65, 4])
    check_verify(batch, q, lists, out, chain(2))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verify_of_fp8(monkeypatch, kernel: str, dtype: torch.dtype, scales: tuple[float, float]) -> None:
    """Lists, whole contexts and tails, in several splits; a head's values are scaled once."""
    tune(monkeypatch, verify, programs=24, least=8)
    batch = Batch(dtype=dtype, stored=torch.float8_e4m3fn, scales=scales)
    q, lists, out, _ = run_verify(kernel, batch, [5, -1, 66, -1])
    check_verify(batch, q, lists, out, chain(4))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1e5, 1e8, 1e-3])
def test_queries_of_any_size_meet_keys_of_fp8(monkeypatch, kernel: str, size: float) -> None:
    """Those of bfloat16 become float16 there, and what is beyond a million becomes a million. Keys are such
    that the logits of small ones matter."""
    scales = (max(1.0, 2 / size), 1.0)
    batch = Batch(lengths=[70], dtype=torch.bfloat16, stored=torch.float8_e4m3fn, scales=scales)

    def queries(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, 4, DIM) * size).bfloat16()

    monkeypatch.setattr(Batch, "queries", queries)
    q, lists, out, _ = run_verify(kernel, batch, [66])
    if size > 1e6:
        assert not out.isnan().any()
    else:
        check_verify(batch, q, lists, out, chain(1))


@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize("block", [16, 64])
def test_verify_in_any_number_of_splits(monkeypatch, splits: int, block: int) -> None:
    """Some splits of the short lists hold nothing, those of the long ones several blocks."""
    tune(monkeypatch, verify, programs=8 * splits, least=8, block=block)
    batch = Batch()
    q, lists, out, attended = run_verify("triton", batch, [5, -1, 66, -1])
    check_verify(batch, q, lists, out, chain(4))
    assert attended == [2 * (5 + 1 + 66 + 130), 2 * sum(LENGTHS)]


@pytest.mark.parametrize("pairs", [8, 64, 192, 512])
def test_long_lists_are_parted_in_batches_of_any_size(pairs: int) -> None:
    """Lists of one length have as many parts each; of unequal ones, no part is longer than their mean."""
    programs, most = split_kv.splits(pairs, 32768, verify.KNOBS)
    channels = torch.zeros(1, 1, dtype=torch.int32)
    lens = torch.full((pairs,), 32768)
    for shares in ([1.0] * 8, [0.3, 0.3, 0.5, 0.5, 0.9, 1.0, 1.5, 3.0]):
        counts = (torch.tensor(shares).repeat(pairs // 8) * 3200).int()[:, None]
        lists = Lists(torch.empty(0), torch.zeros(pairs, 1, dtype=torch.int64), counts)
        plan = ops("torch").plan_lists(lists, channels, lens, programs=programs, most=most).of(0)
        parts = int(plan.ends[-1])
        assert plan.work[:parts, 2].max() <= 3200 and (parts % pairs == 0 or len(set(shares)) > 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("programs, most", [(24, 64), (40, 3), (500, 64)])
def test_a_plan_parts_every_list_evenly(kernel: str, programs: int, most: int) -> None:
    """Three requests of four heads, two layers; the lists of the channels stand 1,000 entries apart."""
    counts = torch.tensor([[700, 3, 40], [-1, 0, 16], [5, 5, 5]], dtype=torch.int32)
    starts, lens = torch.arange(9).view(3, 3) * 1000, torch.tensor([900, 450, 9])
    heads = torch.tensor([[0, 1, 2, 0], [1, 1, 2, 2]], dtype=torch.int32)
    args = on_device(Lists(torch.empty(0), starts, counts)), on_device(heads), on_device(lens)
    plan = ops(kernel).plan_lists(*args, programs=programs, most=most)
    twin = ops("torch").plan_lists(*args, programs=programs, most=most)
    assert torch.equal(plan.ends, twin.ends) and plan.work.shape == (2, programs, 4)
    for layer in range(2):
        used = int(plan.ends[layer, -1])
        assert 12 <= used <= programs
        work = plan.work[layer, :used].tolist()
        assert work == twin.work[layer, :used].tolist()
        for pair in range(12):
            b, channel = pair // 4, int(heads[layer, pair % 4])
            count, kinds = int(counts[b, channel]), [kind for p, *_, kind in work if p == pair]
            read = [i for p, first, n, _ in work if p == pair for i in range(first, first + n)]
            begin, total = (0, int(lens[b])) if count < 0 else (int(starts[b, channel]), count)
            assert read == list(range(begin, begin + total)) and len(kinds) <= most
            assert kinds[0] & Part.FIRST and kinds[-1] & Part.LAST
            assert all(bool(kind & Part.OF_CONTEXT) == (count < 0) for kind in kinds)
    if programs == 24:  # no list of the first layer holds anybody up
        assert max(tokens for *_, tokens, _ in plan.work[0, : int(plan.ends[0, -1])].tolist()) < 200


@pytest.mark.parametrize(
    ("dim", "stored", "parts"),
    [
        (128, torch.bfloat16, 49),
        (96, torch.bfloat16, 49),
        (64, torch.bfloat16, 64),
        (128, torch.float8_e4m3fn, 64),
    ],
)
def test_contexts_of_small_keys_are_parted_among_more_programs(dim: int, stored, parts: int) -> None:
    """Of 396 and 528 programs eight KV heads share one request; a list has 64 parts at most."""
    keys = torch.empty(1, 8, dim, dtype=stored, device=DEVICE)
    lens = torch.tensor([65536], device=DEVICE)
    plan = ops("triton").plan_contexts(lens, KvPool(keys, keys), max_context=65536)
    assert int(plan.ends[-1]) == parts


@pytest.mark.parametrize("kernel", KERNELS)
def test_verify_of_a_tree(kernel: str) -> None:
    batch = Batch(lengths=[70, 9])
    mask = (
        torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])
        .bool()
        .expand(2, -1, -1)
        .contiguous()
    )
    q, lists, out, _ = run_verify(kernel, batch, [20, 4], mask)
    check_verify(batch, q, lists, out, mask)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("branches", [1, 2])
def test_verify_of_a_draft_step(kernel: str, branches: int) -> None:
    """The tail is the branches' scratch cells, three each; the mask is one for all requests."""
    batch = Batch(lengths=[70, 9])
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]])[:branches, : 3 * branches].bool()
    mask = mask.expand(2, -1, -1)
    q, lists, out, _ = run_verify(kernel, batch, [20, -1], mask)
    check_verify(batch, q, lists, out, mask)


@pytest.mark.parametrize("kernel", KERNELS)
def test_verify_does_not_count_the_padding_slot(kernel: str) -> None:
    batch = Batch(lengths=[9, 70])
    padding = replace(batch)
    padding.table[0] = padding.table[padding.reqs[0]]
    padding.k[:] = padding.v[:] = 0.0
    padding.reqs[0] = 0
    *_, attended = run_verify(kernel, padding, [-1, 20])
    assert attended == [2 * 20, 2 * 70]


@pytest.mark.parametrize("kernel", KERNELS)
def test_verify_of_an_empty_batch(kernel: str) -> None:
    assert run_verify(kernel, Batch(lengths=[]), [])[2].shape == (0, TOKENS, 4, DIM)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_needle_at_any_position_is_selected_and_seen(kernel: str) -> None:
    """Draft scores a needle, selection keeps it, verify's output shows it: off by none."""
    length, sink, recent = 30, 2, 4
    for position in range(1, length):
        batch = Batch(lengths=[length], group=1)
        batch.k[:] = batch.v[:] = 0.0
        batch.k[batch.slots(0, [position - 1])] = 20.0  # draft index p is position p + 1
        importance = torch.zeros(1, batch.columns).half().to(DEVICE)
        speakers = Members(
            torch.tensor([0], dtype=torch.int32),
            torch.tensor([[0, 1]], dtype=torch.int32),
            torch.tensor([0.5]),
            torch.tensor([True]),
        )
        carried_len = torch.full((batch.table.shape[0],), length)
        carried = torch.ones(batch.table.shape[0], KV_HEADS, DIM)
        ops(kernel).draft_attention(
            None,
            on_device(batch.pool),
            on_device(batch.contexts),
            on_device(Scores(importance, batch.ctx_start)),
            on_device(speakers),
            on_device(Carried(carried, carried_len)),
            step=0,
            num_steps=1,
            scale=1.0,
            pooling=Pooling("max", "max", 1),
        )
        found = run_select(kernel, batch, importance.cpu(), [7], sink, recent)[0][0]
        assert position in found
        assert len(found) == 7
        if sink <= position < length - recent:
            assert set(found) == {0, 1, 26, 27, 28, 29, position}


# ---- refusals


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(1, TOKENS, 3, DIM)},
        {"q": torch.zeros(1, TOKENS, 4, DIM + 1)},
        {"channels": torch.zeros(3)},
        {"counts": torch.zeros(2, 1)},
        {"tail_mask": torch.ones(1, TOKENS + 1, TOKENS)},
    ],
    ids=["heads", "dim", "channels", "counts", "mask"],
)
def test_verify_refuses_shapes_that_do_not_fit(kernel: str, change: dict) -> None:
    batch = Batch(lengths=[9])
    args = {
        "q": batch.queries(1, TOKENS),
        "counts": torch.zeros(1, 1, dtype=torch.int32),
        "channels": torch.zeros(KV_HEADS, dtype=torch.int32),
        "tail_mask": chain(1),
        **change,
    }
    starts = torch.zeros(1, 1, dtype=torch.int64)
    lists = Lists(torch.zeros(8, dtype=torch.int32), starts, args.pop("counts"))
    attended = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="sparse_attention: "):
        ops(kernel).sparse_attention(
            pool=batch.pool, lists=lists, contexts=batch.contexts, attended=attended, scale=1.0, **args
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "pool, named",
    [
        ({"stored": torch.uint8}, "torch.uint8 and torch.uint8"),  # SGLang's FP8 before it is viewed as such
        ({"stored": torch.float16}, "torch.float16 and torch.float16"),
        ({"scales": (1.0, 0.5)}, "scales 1.0 and 0.5"),
    ],
)
def test_keys_that_would_be_misread_are_refused(kernel: str, pool: dict, named: str) -> None:
    batch = Batch(lengths=[9], **pool)
    with pytest.raises(ValueError, match=f"sparse_attention: .*{named}"):
        run_verify(kernel, batch, [-1])
    with pytest.raises(ValueError, match=f"draft_attention: .*{named}"):
        run_draft(kernel, batch, 1, 0)


def test_unknown_implementations_and_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="'cuda'"):
        ops("cuda")
    with pytest.raises(ValueError, match="pooling.heads"):
        run_draft("torch", Batch(lengths=[9]), 1, 0, ("median", "max"))


# ---- benchmarks and the compiler


def test_what_is_tuned_is_parted_by_the_knobs_as_they_are() -> None:
    from benchmarks.bench_draft_attention import Case
    from benchmarks.harness import using

    case, found = Case.draw({"context": 4096, "batch": 1, "dim": 16, "group": 1, "step": 1}), []
    for programs in (16, 32, 16):
        with using(draft_attention, {"narrow": 0, "programs": programs}):
            found.append(int(case.plan().ends[-1]))
    assert found[1] > found[0] == found[2] and len(case.plans) == 2


def test_benches_gate_what_they_time(monkeypatch) -> None:
    """At sizes the interpreter can do."""
    from benchmarks import (
        bench_draft_attention,
        bench_pages,
        bench_prefill,
        bench_remember,
        bench_select,
        bench_tokens,
        bench_verify,
    )

    monkeypatch.setattr(bench_select, "CHANNELS", 4)
    monkeypatch.setattr(bench_remember, "CHANNELS", 4)
    for batch in (1, 2):
        for weight, shared in bench_remember.ARMS.values():
            bench_remember.check({"context": 320, "batch": batch}, weight, shared)
    shape = {"context": 320, "batch": 2, "keep": 0.3}
    for prepare, more in (
        (bench_verify.prepare, {"dim": 16, "rows": 4, "group": 4}),
        (bench_verify.prepare, {"dim": 16, "rows": 1, "group": 2, "stored": "float8_e4m3fn"}),
        (bench_select.prepare, {}),
        (bench_draft_attention.prepare, {"step": 0, "dim": 16, "group": 4}),
        (bench_draft_attention.prepare, {"step": 1, "dim": 16, "group": 2, "stored": "float8_e4m3fn"}),
        (bench_pages.prepare, {"dim": 16, "rows": 2, "group": 4}),
        (bench_tokens.prepare, {"dim": 32, "rows": 2, "group": 4}),
    ):
        _, check, nbytes = prepare(shape | more)
        check()
        assert nbytes > 0
    bench_select.same_sizes(bench_select.draw_sizes(shape))
    step = bench_pages.Step.draw(shape | {"dim": 16, "rows": 1, "group": 2})
    bench_pages.same_tags(step)
    step.prepare()
    bench_pages.same_sizes(step)
    step.layer(0)
    bench_pages.same_lists(step)
    bench_pages.same_joined(step, *step.draft())
    bench_pages.same_sketches(step, torch.randn(2 * 320 + 1, bench_pages.KV_HEADS, 16).to(DEVICE), 40)()
    step = bench_tokens.Step.draw(shape | {"dim": 32, "rows": 1, "group": 2})
    step.layer(0)
    bench_tokens.same_lists(step)
    bench_tokens.same_sketches(
        step, torch.randn(2 * 320 + 1, bench_tokens.KV_HEADS, 32).to(DEVICE, bench_tokens.DTYPE), 40
    )()
    split = bench_verify.cases_of(
        shape | {"dim": 16, "rows": 4, "group": 4}, [bench_verify.Pool.draw(shape | {"dim": 16}, 0)]
    )[0].split()
    counts = split.lists.counts
    assert counts.sum() == split.lists.indices.numel() and counts.min() < counts.max()
    bench_verify.close(split.run(), split.run("torch"))
    shape = {"cached": 1000, "new": 300, "keep": 0.4, "group": 2, "dim": 16}
    for prepare in (prepare for _, prepare in bench_prefill.GRIDS):
        _, check, nbytes = prepare(shape)
        check()
        assert nbytes > 0
    chunk = bench_prefill.Chunk.draw(shape)
    listed, lists = chunk.list(chunk.score()), bench_prefill.Fa3Lists.make(chunk, paged_fa3)
    bench_prefill.same_pages(chunk, lists)
    bench_prefill.same_attention(chunk, listed, lambda: lists.attend(listed))


def test_groups_and_heads_stand_beside_the_powers_of_two_that_they_are_padded_to(capsys) -> None:
    from benchmarks import bench_draft_attention, bench_verify, harness

    shapes = harness.heads_of(bench_verify.QUICK)
    assert len(shapes) == 24 and {(s["context"], s["batch"]) for s in shapes} == {(32768, 8)}
    results = object.__new__(harness.Results)
    results.rows = [(s, "triton", 12.5 if s["group"] == 5 else 5.0) for s in shapes]
    results.beside_powers("triton", bench_draft_attention.nbytes)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 24 and sum("0.40 of the powers" in line for line in shown) == 2
    (odd,) = (line for line in shown if line.startswith("triton: 5 x 96:"))
    assert odd.endswith("0.30 of the powers of two")  # in 2.5 times the time, three quarters of the bytes


COMPILE = """
import torch
from benchmarks import (
    bench_draft_attention, bench_pages, bench_prefill, bench_select, bench_tokens, bench_verify
)
from benchmarks.harness import compile_only
from sts_kernels import draft_attention, ops, tokens, verify
from sts_kernels.layout import (
    Contexts, History, Kept, KvPool, Lists, Members, PagedLists, Pooling, QueryBlocks, Room, Rule, Scores
)

def like(*size, dtype=torch.int32):
    return torch.empty(size, dtype=dtype, device="meta")

def i(*size):
    return like(*size, dtype=torch.int64)

shape = {"context": 32768, "batch": 8, "keep": 0.1, "rows": 4, "group": 4, "dim": 128}
f16, f32 = torch.float16, torch.float32
with compile_only() as compiled:
    def shared(bench, odd, *of):  # bytes of the kernels of a call, or of those that are named
        before = len(compiled)
        bench.compile_one(shape | odd, {})
        return max(kernel.metadata.shared for name, kernel in compiled[before:] if not of or name in of)

    for queries, group, dim in ((4, 4, 128), (8, 4, 64), (8, 8, 128)):
        held = shared(bench_verify, {"rows": queries, "group": group, "dim": dim})
        assert held <= verify.shared_bytes(queries * group, dim) <= held + 512, (queries, group, dim)
    bench_verify.compile_one(shape | {"rows": 1, "dtype": f32}, {})
    for step, group, dim in ((0, 4, 64), (1, 4, 64), (0, 8, 128), (0, 32, 128)):
        held = shared(bench_draft_attention, {"step": step, "group": group, "dim": dim})
        assert held <= draft_attention.shared_bytes((2 - step) * group, dim) <= held + 512, (group, dim)
    for odd in ({"dim": 96, "group": 5}, {"dim": 64, "group": 7}, {"stored": "float8_e4m3fn"}):
        bench_verify.compile_one(shape | odd, {})
        bench_draft_attention.compile_one(shape | {"step": 0} | odd, {})
    for many in (1, 10**9):  # a program for each long row, and parts
        bench_select.compile_one(shape | {"context": 65536}, {"many": many})
    ops("triton").sketch_pages(
        like(100, 8, 128, dtype=torch.float8_e4m3fn), like(100, 8, 16, dtype=f16),
        Contexts(like(3, 4096), i(2), i(2)), i(2), like(100), most=64,
    )
    odds = [{}, {"rows": 1}, {"rows": 1, "group": 8}, {"dim": 64, "group": 8}]
    for odd in (*odds, {"dim": 96, "group": 5}, {"dim": 256, "group": 7}):
        bench_pages.compile_one(shape | odd, {})
        of_tokens = shape | odd | {"context": 65536}
        most = shared(bench_tokens, of_tokens, "_score_tokens_kernel", "_weigh_tokens_kernel")
        assert most <= tokens.shared_bytes(of_tokens["rows"] * of_tokens["group"], of_tokens["dim"]), odd
        chunk = {"cached": 32768, "new": 8192, "keep": 0.25, "group": 4, "dim": 128}
        bench_prefill.compile_one(chunk | odd, {})
    bench_prefill.compile_one(chunk | {"dim": 256, "group": 4}, {})
    ops("triton").block_slots(
        Contexts(like(3, 4096), i(2), i(2)), QueryBlocks(*(like(9) for _ in range(5)), 32), like(9, 8, 32),
        width=1000,
    )
    eight, two = Contexts(like(9, 4096), i(8), i(8)), Contexts(like(3, 4096), i(2), i(2))
    blocks, drafted = QueryBlocks(*(like(64) for _ in range(5)), 1024), like(4096, 8, 128, dtype=f16)
    sums = ops("triton").score_blocks(
        like(8192, 16, 128, dtype=f16), KvPool(drafted, drafted), two, blocks, scale=1.0, sampled=8, shift=1
    )
    members = Members(like(8), like(8, 2), like(8, dtype=f32), like(8, dtype=torch.bool))
    for rows, heads in (("max", "max"), ("mean", "mean"), ("max", "mean")):
        scores = like(64, 288, 1024, dtype=f32)
        ops("triton").pool_blocks(sums, blocks, members, scores, pooling=Pooling(rows, heads, 8))
    ops("triton").list_blocks(like(64, 288, 1024, 1, dtype=f32), blocks, sink=1, recent=1)
    split, full = like(65, 128, dtype=torch.float64), like(8, dtype=torch.bool)
    for keep, *more in ((0.1, split, None), (0.1, None, full), (None, split, full)):
        rule, room = Rule(keep, 1024, 1024, 68, 1e-6), Room(128, 4096, 4096, 9000)
        keeps = like(9, dtype=torch.float64)
        ops("triton").score_columns(eight, keeps, rule, room)
        sizes = ops("triton").size_lists(eight, i(9), keeps, rule, room, i(9), split=more[0], full=more[1])
    kept = Kept(like(9 * 9000), i(9, 128), like(9, 128), i(9), i(9), i(9), i(9, 4))
    found = ops("triton").size_kept(eight, sizes, kept, room, i(13), every=16, percent=80)
    ops("triton").list_kept(kept, eight, Lists(like(9000), sizes.starts, sizes.counts), like(9000))
    ops("triton").keep_selected(kept, eight, found, Lists(like(9000), i(8, 128), like(8, 128)))
    for channels, columns, bs, over in ((128, 65536, 8, 1), (8, 4096, 2, 8)):
        scores = Scores(like(channels, columns, dtype=f16), i(bs))
        ops("triton").spread_importance(scores, i(bs), factor=0.75, over=over)
    ops("triton").blend_history(
        Scores(like(128, 4096, dtype=f16), i(2)), two, History(like(8192, 128, dtype=f16), i(8192), i(1)),
        like(2, dtype=f32), decay=0.9,
    )
    ops("triton").headwise_lists(
        Lists(like(4096), i(2, 16), like(2, 16)), like(8), two,
        PagedLists(like(17), like(17), like(9000), like(5000, dtype=torch.uint8)), i(2), i(1),
        tokens=4, layers=1,
    )
for name, kernel in compiled:
    if kernel:
        ptx = kernel.asm["ptx"]
        print(name, kernel.metadata.shared, "cp.async" in ptx, "st.global.b16" in ptx)
"""


def test_every_kernel_compiles_for_hopper(tmp_path) -> None:
    """What the interpreter accepts the compiler may not. Keys, values and sketches are loaded asynchronously,
    stored exponentials and importance are not written one by one, and shared memory suffices."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f".:{env.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in kernels} == {
        *("_draft_kernel", "_draft_merge_kernel", "_pool_kernel", "_select_kernel"),
        *("_verify_kernel", "_verify_merge_kernel"),
        *("_claim_kernel", "_remember_kernel"),
        *("_lists_kernel", "_plan_kernel"),
        *("_size_kept_kernel", "_list_kept_kernel", "_keep_selected_kernel"),
        *("_edges_kernel", "_spread_kernel", "_sizes_kernel", "_columns_kernel"),
        *("_claim_pages_kernel", "_tag_kernel", "_sketch_kernel"),
        *("_known_kernel", "_page_sizes_kernel", "_list_pages_kernel"),
        *("_score_kernel", "pool_logits_kernel"),
        *("_sketch_tokens_kernel", "_score_tokens_kernel", "_weigh_tokens_kernel"),
        *("_count_kernel", "_refine_kernel", "_list_kernel"),
        *("_copy_scores_kernel", "_mark_pages_kernel"),
        *("_score_blocks_kernel", "_pool_blocks_kernel", "_list_blocks_kernel", "_block_attention_kernel"),
        "_block_slots_kernel",
    }
    for name, shared, asynchronous, single in kernels:
        assert int(shared) <= 232448
        reads = "_draft_kernel", "_score_kernel", "_verify_kernel", "_score_tokens_kernel"
        reads += ("_weigh_tokens_kernel",)
        reads += "_sketch_tokens_kernel", "_score_blocks_kernel", "_block_attention_kernel"
        assert (asynchronous == "True") == (name in reads)
        assert name not in ("_draft_kernel", "_pool_kernel") or single == "False"
