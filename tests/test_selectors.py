"""The selectors STS is compared with, against loops that say the same thing slowly."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sts_kernels import ops
from sts_kernels.layout import Contexts, KvPool, Lists
from sts_sglang.config import SelectorName, StsConfig
from sts_sglang.core.selectors import compare as selectors
from sts_sglang.core.selectors.base import HeadLists, LayerCall
from sts_sglang.core.sizes import Capacity

SINK, RECENT, PAGE = 2, 8, 16
HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 4
CHAIN = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)


class Batch:
    """Requests of given lengths in a pool with holes, padding full of NaN."""

    def __init__(self, lengths: list[int], tail: torch.Tensor = CHAIN, seed: int = 0):
        torch.manual_seed(seed)
        self.lengths, self.tail = lengths, tail.expand(len(lengths), -1, -1)
        slots = sum(lengths) + len(lengths) * TOKENS
        order = torch.randperm(slots) + 1
        self.keys = torch.randn(slots + 1, KV_HEADS, DIM)
        self.keys[0] = torch.nan
        self.table = torch.zeros(len(lengths) + 1, max(lengths) + TOKENS + 5, dtype=torch.int32)
        taken = 0
        for b, length in enumerate(lengths):
            self.table[b + 1, : length + TOKENS] = order[taken : taken + length + TOKENS].int()
            taken += length + TOKENS
        self.reqs = torch.arange(1, len(lengths) + 1)
        self.seq_lens = torch.tensor(lengths)
        self.q = torch.randn(len(lengths), TOKENS, HEADS, DIM)
        self.capacity = Capacity.of(len(lengths), max(lengths))

    def context(self, b: int, kv_head: int) -> torch.Tensor:
        return self.keys[self.table[b + 1, : self.lengths[b]].long(), kv_head]

    def after(self, b: int, kv_head: int) -> torch.Tensor:
        length = self.lengths[b]
        return self.keys[self.table[b + 1, length : length + TOKENS].long(), kv_head]

    def select(
        self,
        selector: str,
        counts: list[int],
        prompts=None,
        number: int = 3,
        kernel: str = "torch",
        dtype: torch.dtype = torch.float32,
        width: int | None = None,
        **config,
    ):
        """Sets of positions by request and KV head."""
        device = "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"
        config = StsConfig(selector=selector, sink=SINK, recent=RECENT, budget=0, **config)
        made = self.selector(config, ops(kernel), dtype, device, width)
        made.admit(self.reqs.to(device), prompts or [[b] for b in self.reqs.tolist()])
        lists, call = self.arguments(counts, number, device)
        lists = made.begin(lists, call.contexts)
        made.list_layer(lists, call)
        indices, start, count = (tensor.cpu() for tensor in made.lists.of_layer(number)[0])
        return [
            [self._positions(b, indices[start[b, h] : start[b, h] + count[b, h]]) for h in range(KV_HEADS)]
            if counts[b] >= 0
            else None
            for b in range(len(counts))
        ]

    def selector(self, config: StsConfig, kernel_ops, dtype: torch.dtype, device: str, width: int | None):
        """Layers of which every KV head has a channel of its own."""
        of_target = torch.arange(KV_HEADS, dtype=torch.int32, device=device).expand(8, -1)
        requests = len(self.lengths) + 1
        lists = HeadLists(of_target, self.capacity.requests, self.capacity.context)
        return selectors.LayerSelector(config, kernel_ops, lists, self.capacity, requests, dtype, width=width)

    def arguments(self, counts: list[int], number: int, device: str, to=None) -> tuple[Lists, LayerCall]:
        """Lists by channel, and a call; `to` stands in for moving a tensor to the device."""
        to = to or (lambda tensor: tensor.to(device))
        lists = to(torch.tensor(counts)[:, None].expand(-1, KV_HEADS))
        contexts = Contexts(to(self.table), to(self.reqs), to(self.seq_lens))
        keys = to(self.keys)
        call = LayerCall(number, to(self.q), KvPool(keys, keys), contexts, to(self.tail), DIM**-0.5)
        return Lists(lists, lists, lists), call

    def _positions(self, b: int, slots: torch.Tensor) -> set[int]:
        of_slot = {int(s): p for p, s in enumerate(self.table[b + 1, : self.lengths[b]])}
        positions = [of_slot[int(s)] for s in slots]
        assert len(set(positions)) == len(positions)
        return set(positions)


def top(score: list[float], count: int) -> set[int]:
    """Sink, recent and the best of the rest; of equals the later."""
    length = len(score)
    forced = {*range(SINK), *range(length - RECENT, length)}
    free = sorted((p for p in range(length) if p not in forced), key=lambda p: (-score[p], -p))
    return forced | set(free[: count - len(forced)])


def pooled(values: list[list[float]], how: str) -> list[float]:
    return [max(v) if how == "max" else sum(v) / len(v) for v in zip(*values, strict=True)]


def slow_oracle(batch: Batch, b: int, h: int, rows: str, heads: str) -> list[float]:
    of_rows = []
    for t in range(TOKENS):
        of_heads = []
        for g in range(HEADS // KV_HEADS):
            q = batch.q[b, t, h * (HEADS // KV_HEADS) + g]
            tail = [float(q @ k) for k, ok in zip(batch.after(b, h), batch.tail[b, t], strict=True) if ok]
            logits = [float(q @ k) for k in batch.context(b, h)]
            weights = [math.exp(x * DIM**-0.5) for x in logits + tail]
            of_heads.append([w / sum(weights) for w in weights[: len(logits)]])
        of_rows.append(pooled(of_heads, heads))
    return pooled(of_rows, rows)


def slow_quest(batch: Batch, b: int, h: int, rows: str, heads: str) -> list[float]:
    keys = batch.context(b, h)
    pages = [keys[i : i + PAGE] for i in range(0, len(keys), PAGE)]
    of_rows = []
    for t in range(TOKENS):
        of_heads = []
        for g in range(HEADS // KV_HEADS):
            q = batch.q[b, t, h * (HEADS // KV_HEADS) + g].tolist()
            bounds = [
                sum(
                    max(x * float(lo), x * float(hi))
                    for x, lo, hi in zip(q, p.amin(0), p.amax(0), strict=True)
                )
                for p in pages
            ]
            weights = [math.exp(x * DIM**-0.5) for x in bounds]
            of_heads.append([w / sum(weights) for w in weights])
        of_rows.append(pooled(of_heads, heads))
    score = pooled(of_rows, rows)
    return [score[p // PAGE] for p in range(len(keys))]


def test_every_selector_of_the_configuration_has_a_rule():
    assert set(get_args(SelectorName)) == {"auto", "draft", "tokens", "pages", "joined", *selectors.RULES}


@pytest.mark.parametrize("tail", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize(("rows", "heads"), [("max", "max"), ("mean", "mean"), ("max", "mean")])
@pytest.mark.parametrize(("selector", "slow"), [("oracle", slow_oracle), ("quest", slow_quest)])
def test_scores_against_loops(selector, slow, rows, heads, tail):
    batch = Batch([70, 161, 33], tail)
    counts = [20, 45, 12]
    found = batch.select(selector, counts, pool_rows=rows, pool_heads=heads)
    for b, count in enumerate(counts):
        for h in range(KV_HEADS):
            assert found[b][h] == top(slow(batch, b, h, rows, heads), count), (b, h)


def test_whole_pages_are_taken_and_the_last_is_cut():
    chosen = Batch([400]).select("quest", [SINK + RECENT + 40])[0]
    for positions in chosen:
        free = {p for p in positions if SINK <= p < 400 - RECENT}
        whole = [
            page for page in {p // PAGE for p in free} if len([p for p in free if p // PAGE == page]) < PAGE
        ]
        # One page is cut by the budget; the first and the last hold sink and recent tokens.
        assert len(set(whole) - {0, (400 - RECENT) // PAGE}) <= 1


def test_quest_bounds_every_key_of_a_page():
    batch = Batch([100])
    keys = torch.stack([batch.context(0, h) for h in range(KV_HEADS)], 1)[None]
    low, high = selectors.page_bounds(keys, torch.ones(1, 100, dtype=torch.bool))
    q = torch.randn(KV_HEADS, DIM)
    bound = torch.maximum(q * low, q * high).sum(-1)[0]
    exact = torch.einsum("hd,lhd->lh", q, keys[0])
    assert (exact <= bound.repeat_interleave(PAGE, 0)[:100] + 1e-5).all()


def test_bounds_of_the_last_page_are_of_its_tokens_alone():
    keys = torch.rand(2, 100, 1, DIM) + 1
    there = torch.arange(100) < torch.tensor([100, 67])[:, None]
    low, high = selectors.page_bounds(torch.where(there[..., None, None], keys, torch.nan), there)
    assert torch.equal(low[0, -1, 0], keys[0, 96:, 0].amin(0))
    assert torch.equal(low[1, 4, 0], keys[1, 64:67, 0].amin(0))
    assert torch.equal((-high)[1, 4, 0], (-keys)[1, 64:67, 0].amin(0))
    assert not low[1, 5:].any() and not high[1, 5:].any()


@pytest.mark.parametrize("selector", ["oracle", "quest"])
def test_a_planted_needle_is_found_at_every_depth(selector):
    for place in (SINK, 77, 150, 300 - RECENT - 1):
        batch = Batch([300, 90], seed=place)
        batch.keys[batch.table[1, place].long()] = 12 * batch.q[0, 1, ::2] / DIM**0.5
        for positions in batch.select(selector, [SINK + RECENT + PAGE, 40])[0]:
            assert place in positions


def test_recent_is_sink_and_the_last_tokens():
    for positions in batch_of_one(200).select("recent", [50])[0]:
        assert positions == {*range(SINK), *range(200 - 48, 200)}


def batch_of_one(length: int) -> Batch:
    return Batch([length])


def test_random_differs_by_prompt_layer_and_head_and_not_by_batch_or_round():
    batch = Batch([500, 400, 500])
    prompts = [[1, 2, 3], [4, 5], [1, 2, 4]]
    chosen = batch.select("random", [100] * 3, prompts)
    again = Batch([400, 500]).select("random", [100] * 2, [prompts[1], prompts[0]])
    assert again == [chosen[1], chosen[0]]
    other_layer = batch.select("random", [100] * 3, prompts, number=4)
    free = [frozenset(p for p in s if SINK <= p < 390) for b in (*chosen, *other_layer) for s in b]
    assert len(set(free)) == len(free)
    longer = Batch([504]).select("random", [101], [prompts[0]])[0][0]
    assert len(longer & chosen[0][0]) > 85


def test_random_hardly_ever_ties():
    batch = batch_of_one(1000)
    layer = selectors.Layer(
        0, None, batch.keys[None, 1:1001], None, None, None, 1.0, torch.tensor([7]), "", ""
    )
    assert all(row.unique().numel() > 970 for row in selectors.random(layer)[0])


def test_random_is_uniform():
    hits = torch.zeros(1000)
    for prompt in range(60):
        for positions in batch_of_one(1000).select("random", [110], [[prompt]])[0]:
            hits[list(positions)] += 1
    free = hits[SINK:-RECENT].view(-1, 90).mean(1) / 120
    assert free.min() > 0.085 and free.max() < 0.12


@pytest.mark.parametrize("selector", selectors.RULES)
def test_the_kernel_takes_the_same_tokens(selector):
    """Ranks and chance lose nothing in the float16 that the kernel sorts."""
    batch, counts = Batch([170, 330, 60]), [40, 75, -1]
    twin = batch.select(selector, counts, dtype=torch.float16)
    assert batch.select(selector, counts, kernel="triton", dtype=torch.float16) == twin
    if selector != "oracle":
        assert batch.select(selector, counts) == twin


@pytest.mark.parametrize("selector", selectors.RULES)
def test_lengths_that_are_not_read_change_nothing(selector, monkeypatch):
    """Every position of the table instead of as many as there are, and one request at a time."""
    batch, counts = Batch([170, 330, 60]), [40, 75, -1]
    twin = batch.select(selector, counts)
    width = batch.table.shape[1]
    assert batch.select(selector, counts, width=width) == twin
    monkeypatch.setattr(selectors, "SCRATCH", 1)
    assert batch.select(selector, counts, width=width) == twin
    assert batch.select(selector, counts) == twin


@pytest.mark.parametrize("selector", selectors.RULES)
def test_nothing_waits_for_the_device_where_the_width_is_given(selector):
    """A tensor without values stands for one that the device has not made yet."""
    batch = Batch([170, 330])
    config = StsConfig(selector=selector, budget=0)
    nothing = SimpleNamespace(select_tokens=lambda *_, **__: None)

    def select(width: int | None) -> None:
        with FakeTensorMode() as mode:
            made = batch.selector(config, nothing, torch.float16, "cpu", width)
            lists, call = batch.arguments([40, 75], 0, "cpu", mode.from_tensor)
            made.list_layer(made.begin(lists, call.contexts), call)

    select(batch.table.shape[1])
    with pytest.raises(DataDependentOutputException):
        select(None)


def test_as_many_requests_at_a_time_as_the_scratch_holds():
    q = torch.empty(48, 4, 32, 128, dtype=torch.bfloat16, device="meta")
    assert selectors.at_once(131072, q, 8) == 1
    assert selectors.at_once(8192, q, 8) == selectors.SCRATCH // (8192 * 8 * (128 * 6 + 16 * 16))


def test_whole_contexts_are_left_alone():
    batch = Batch([40, 200])
    found = batch.select("oracle", [-1, 30])
    assert found[0] is None
    assert found[1][0] == top(slow_oracle(batch, 1, 0, "max", "max"), 30)


def test_ranks_keep_their_order_in_float16():
    ranks = torch.arange(selectors.RANKS)
    values = selectors._nth_float(ranks)
    assert values.isfinite().all() and (values.diff() > 0).all()
    assert torch.equal(values.half().float(), values)
