"""The prefill of a batch: which blocks of new tokens select how much, what is counted, what is shared."""

from __future__ import annotations

import pytest
import torch

from sts_kernels import ops
from sts_kernels.layout import KEY_BLOCK, WHOLE, Count
from sts_sglang.config import StsConfig
from sts_sglang.core import prefill
from sts_sglang.core.block_attention import ByOps
from sts_sglang.core.prefill import SparsePrefill
from sts_sglang.core.request import Request
from tests.test_kernels import DEVICE, KERNELS, on_device
from tests.test_prefill import Prefill
from tests.tolerances import assert_close

LAYERS = 3


def request(tokens: int, output: int = 0, **asked) -> Request:
    return Request("rid", 1, range(tokens), range(output), {"sts": asked} if asked else None)


def made_of(made: Prefill, kernel: str = "torch", **config) -> SparsePrefill:
    config = StsConfig(prefill="sparse", **{"prefill_floor": 0, **config})
    totals = torch.zeros(len(Count), dtype=torch.int64, device=DEVICE)
    own = ops(kernel)
    attention = ByOps(own, kernel)
    return SparsePrefill(config, own, attention, LAYERS, made.kv_heads, made.group, DEVICE, totals)


def begun(sparse: SparsePrefill, made: Prefill, requests: list[Request]) -> list[tuple]:
    """(request, first row, tokens, tokens before, count) of all blocks, in the order of their rows."""
    sparse.admit(requests)
    sparse.begin(on_device(made.contexts), *map(list, zip(*made.chunks, strict=True)))
    parts = [part for blocks in sparse._parts for part in zip(*(c.tolist() for c in blocks[:5]), strict=True)]
    return sorted(parts, key=lambda block: block[1])


def test_blocks_begin_where_those_of_the_whole_prompt_do() -> None:
    made = Prefill([(1000, 200), (0, 300)])
    found = begun(made_of(made), made, [request(5000), request(5000)])
    assert [block[:4] for block in found] == [
        (0, 0, 24, 1000),
        (0, 24, 128, 1024),
        (0, 152, 48, 1152),
        (1, 200, 128, 0),
        (1, 328, 128, 128),
        (1, 456, 44, 256),
    ]
    # A quarter of the seven, eight and nine before them, rounded up; sink and recent where there are no more.
    assert [block[4] for block in found] == [2, 2, 3, WHOLE, WHOLE, WHOLE]


def test_what_attends_to_everything() -> None:
    """The prompt's last block, what is below the floor, and who asks for it."""
    made = Prefill([(1900, 200), (1900, 200), (1900, 200), (900, 100)])
    requests = [request(2100), request(2090, 10), request(2101, prefill="dense"), request(9000)]
    found = begun(made_of(made, prefill_floor=1000), made, requests)
    counts = [[block[4] for block in found if block[0] == i] for i in range(4)]
    assert counts == [[4, 4, WHOLE], [4, 4, WHOLE], [WHOLE] * 3, [WHOLE]]


def test_keeps_of_requests() -> None:
    made = Prefill([(2560, 128)] * 3)
    requests = [request(9000), request(9000, prefill_keep=0.5), request(9000, prefill_keep=0)]
    assert [block[4] for block in begun(made_of(made), made, requests)] == [5, 10, 5]


def test_what_attends_to_everything_begins_and_requests_stand_together() -> None:
    made = Prefill([(1024, 300), (1024, 256), (1024, 300)])
    sparse = made_of(made)
    begun(sparse, made, [request(9000), request(9000, prefill="dense"), request(9000)])
    blocks = sparse._parts[0]
    assert blocks.requests.tolist() == [1, 1, 0, 0, 0, 2, 2, 2]
    assert blocks.most == 11


def test_counts_are_of_what_may_be_sparse() -> None:
    made = Prefill([(1024, 128), (1024, 128)])
    sparse = made_of(made, dense_layers=(1,))
    begun(sparse, made, [request(9000), request(9000, prefill="dense")])
    heads = (LAYERS - 1) * made.kv_heads
    assert int(sparse._selected) == 2 * heads and int(sparse._available) == 8 * heads
    assert sparse.attends(0) and not sparse.attends(1) and sparse.attends(2)


@pytest.mark.parametrize(
    "requests",
    [
        [],  # SGLang captures a graph, or warms up
        [request(9000, prefill="dense")],
        [request(9000, prefill_keep=1.0)],
        [request(1152)],
    ],
)
def test_where_nobody_selects_the_dense_backend_attends(requests) -> None:
    made = Prefill([(1024, 128)])
    sparse = made_of(made)
    assert begun(sparse, made, [request(9000)]) and sparse.attends(0)
    assert not begun(sparse, made, requests) and not sparse.attends(0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scratch", [prefill.SCRATCH, 5_000])
def test_a_batch_attends_as_it_would_one_by_one(monkeypatch, kernel: str, scratch: int) -> None:
    """However many blocks there is room for at a time, and whoever else is in the batch."""
    monkeypatch.setattr(prefill, "SCRATCH", scratch)
    made = Prefill([(1000, 300), (0, 200), (700, 140)], group=2)
    requests = [request(9000), request(200), request(9000, prefill="dense")]
    sparse = made_of(made, kernel, prefill_keep=0.4)
    begun(sparse, made, requests)
    assert (len(sparse._parts) > 1) == (scratch == 5_000)
    found = sparse.attend(on_device(made.q), on_device(made.pool), made.scale).cpu()
    row = 0
    for i, (before, new) in enumerate(made.chunks):
        rows = slice(row, row + new)
        alone = made_of(made, "torch", prefill_keep=0.4)
        alone.admit([requests[i]])
        contexts = on_device(
            made.contexts._replace(reqs=made.reqs[i : i + 1], lens=made.contexts.lens[i : i + 1])
        )
        alone.begin(contexts, [before], [new])
        if alone.attends(0):
            expected = alone.attend(on_device(made.q[rows]), on_device(made.pool), made.scale).cpu()
        else:
            expected = whole(made, i, rows)
        assert_close(found[rows], expected.double())
        row += new
    assert not torch.isnan(found).any()


def whole(made: Prefill, request_: int, rows: slice) -> torch.Tensor:
    before, found = made.chunks[request_][0], torch.empty(made.q[rows].shape)
    for place, row in enumerate(range(rows.start, rows.stop)):
        slots = made.slots(request_, before + place + 1)
        for head in range(made.q.shape[1]):
            probs = made.logits(request_, row, head, before + place + 1).softmax(0)
            found[place, head] = (probs @ made.pool.v[slots, head // made.group].double()).float()
    return found


def test_counts_are_the_same_however_a_prompt_is_cut() -> None:
    """At ends of blocks: one that is cut is two."""
    found = []
    for chunks in ([(0, 4000)], [(0, 512), (512, 1152), (1664, 2336)]):
        made = Prefill([(0, 4000)])
        sparse = made_of(made, prefill_floor=1000)
        for before, number in chunks:
            sparse.admit([request(4000)])
            sparse.begin(on_device(made.contexts), [before], [number])
        found.append((int(sparse._available), int(sparse._selected)))
    assert found[0] == found[1]
    assert found[0][0] == LAYERS * made.kv_heads * sum(range(32)) > found[0][1]


def test_queries_that_do_not_fit_the_batch_are_an_error() -> None:
    made = Prefill([(1024, 128)])
    sparse = made_of(made)
    begun(sparse, made, [request(9000)])
    with pytest.raises(RuntimeError, match="127 queries of a prefill of 128 tokens"):
        sparse.attend(on_device(made.q[1:]), on_device(made.pool), made.scale)


def test_marks_are_of_what_keys_and_values_become() -> None:
    sparse = made_of(Prefill([(0, 1)]))
    marks = [
        sparse.mark(params)
        for params in (
            None,
            {"sts": {"keep": 0.5}},
            {"sts": {"prefill": "sparse"}},
            {"sts": {"prefill_keep": 0.25}},
            {"sts": {"prefill_keep": 0.5}},
            {"sts": {"prefill_keep": 1.0}},
            {"sts": {"prefill": "dense"}},
        )
    ]
    assert len(set(marks[:4])) == 1 and marks[4] not in ("", marks[0]) and marks[5:] == ["", ""]


def test_a_block_of_keys_is_one_of_queries() -> None:
    """Blocks begin where blocks of keys do."""
    assert prefill.QUERY_BLOCK == KEY_BLOCK


def test_need_is_what_a_forward_has_at_a_time() -> None:
    assert prefill.need(StsConfig()).fixed == 0
    assert prefill.need(StsConfig(prefill="sparse")).fixed == prefill.SCRATCH
    made = Prefill([(100_000, 3000)], kv_heads=2, dim=16)
    sparse = made_of(made)
    begun(sparse, made, [request(200_000)])
    each = prefill.SAMPLED * made.group + 1  # sums, and a place in a list
    for blocks in sparse._parts:
        assert 4 * blocks.counts.numel() * made.kv_heads * blocks.most * each <= prefill.SCRATCH
