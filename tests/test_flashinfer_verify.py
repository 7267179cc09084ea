"""Verify by FlashInfer: what is planned and when, and its attention against the twin's.

Without a GPU a stand-in for FlashInfer's wrapper runs: it reads the same buffers, checks the sizes that
the real planner would need, and attends by the definition. On a GPU the real one runs besides.
"""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sts_kernels import ops
from sts_kernels.layout import Contexts, Count, KvPool, Lists, Room
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core.request import Request
from sts_sglang.core.selectors.base import LayerCall
from sts_sglang.core.verifier import TargetShape
from sts_sglang.headmap import HeadCounts, proportional
from sts_sglang.host import bind, hooks, views
from sts_sglang.host.metrics import _HELP, Exporter
from sts_sglang.verifiers.flashinfer import (
    PLAN_GRID,
    FlashInferVerifier,
    HostRequest,
    HostView,
    Limits,
    Shape,
    layer_runs,
    make,
    planned_contexts,
)
from tests.test_backends import CONTEXT, COUNTS, DIM, KV_HEADS, LAYERS, Q_HEADS, Rig
from tests.tolerances import assert_close

TOKENS, LIMIT, REQUESTS = 4, 1500, 6
NO_LIMIT = 10**9
UNLIMITED = Limits(NO_LIMIT, NO_LIMIT)
RATIO = StsConfig(keep=0.1, budget=0, sink=2, recent=8)
FIXED = StsConfig(policy="fixed", budget=71, sink=2, recent=8)  # masks of no whole bytes


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper as far as it is used."""

    def __init__(self, workspace, layout, use_cuda_graph=False, backend="auto", **buffers):
        assert (layout, backend) == ("NHD", "fa2")
        self.workspace, self.graph, self.pins = workspace, use_cuda_graph, []
        for name, buffer in buffers.items():
            setattr(self, f"_{name}", buffer)

    def reset_workspace_buffer(self, workspace, int_workspace):
        assert workspace is self.workspace
        self.int_workspace = self._pin_memory_int_workspace_buffer = int_workspace

    def plan(self, qo_indptr, kv_indptr, indices, last, heads, kv_heads, dim, page, **options):
        assert (kv_heads, page, options["sm_scale"]) == (1, 1, 1.0)
        self.heads, self.dim, self.last_row = heads, dim, int(qo_indptr[-1])
        self.kv_dtype = options["kv_data_type"]
        assert int(options["seq_lens"][0]) == int(kv_indptr.diff().max())
        self._check_sizes(qo_indptr, kv_indptr, options["max_token_per_sequence"])
        self.pins.append(self._pin_memory_int_workspace_buffer)
        if self.graph:
            assert options["packed_custom_mask"] is None and indices.numel() == 0
            for buffer, values in ((self._qo_indptr_buf, qo_indptr), (self._paged_kv_indptr_buf, kv_indptr)):
                assert buffer.shape == values.shape
                buffer.copy_(values)
        else:
            self._qo_indptr_buf, self._paged_kv_indptr_buf = qo_indptr, kv_indptr
            self._paged_kv_indices_buf, self._custom_mask_buf = indices, options["packed_custom_mask"]
            self._mask_indptr_buf = None  # FlashInfer's own, in bits

    def _check_sizes(self, qo_indptr, kv_indptr, tokens):
        """PrefillPlan and PrefillSplitQOKVIndptr of FlashInfer's scheduler.cuh, on 132 multiprocessors."""
        batch, rows, grid = qo_indptr.numel() - 1, int(qo_indptr[-1]), 264
        longest = rows - batch + 1 if self.graph else tokens
        tile = next(t for t in (16, 64, 128) if longest * self.heads <= t or t == 128)
        assert tile == next(t for t in (16, 64, 128) if tokens * self.heads <= t or t == 128)
        per_request = -(-tokens * self.heads // tile)
        blocks = int((kv_indptr.diff() > 0).sum()) * per_request
        padded = max(grid, -(-rows * self.heads // tile) + batch - 1) if self.graph else max(grid, blocks)
        assert blocks <= padded
        ints = 13 * padded + 4 * (batch + 1) + 4 * (rows + 1) + 16 * 8
        assert self.int_workspace.numel() == self._pin_memory_int_workspace_buffer.numel() >= ints
        if self.graph or blocks < grid:
            assert self.workspace.numel() >= self.heads * padded * tile * (self.dim + 1) * 4

    def run(self, q, kv, out, q_scale, k_scale, v_scale):
        assert q.shape == (self.last_row, self.heads, self.dim) and q.is_contiguous()
        assert self.kv_dtype == kv[0].dtype
        keys, values = (t.reshape(-1, self.dim).to(q.dtype) for t in kv)
        rows, lists = self._qo_indptr_buf.tolist(), self._paged_kv_indptr_buf.tolist()
        for i, start in enumerate(self._mask_indptr_buf.tolist()[: len(rows) - 1]):
            count, width = rows[i + 1] - rows[i], lists[i + 1] - lists[i]
            if count == 0:
                continue
            entries = self._paged_kv_indices_buf[lists[i] : lists[i + 1]].long()
            packed = self._custom_mask_buf[start : start + (count * width + 7) // 8]
            bits = (packed[:, None] >> torch.arange(8)) & 1
            seen = bits.flatten()[: count * width].view(count, 1, width).bool()
            logits = torch.einsum("qhd,kd->qhk", q[rows[i] : rows[i + 1]], keys[entries]) * q_scale * k_scale
            # As FlashInfer does: what is masked is read and multiplied by zero.
            weights = logits.masked_fill(~seen, -5e4).softmax(-1)
            out[rows[i] : rows[i + 1]] = torch.einsum("qhk,kd->qhd", weights, values[entries]) * v_scale


class Verify:
    """A target's pools and a batch over them in static buffers, as CUDA graphs need it. fp8: with scales."""

    def __init__(
        self,
        config: StsConfig,
        wrapper,
        kv_heads=2,
        group=2,
        dim=16,
        dtype=torch.float32,
        graph=0,
        *,
        fp8=False,
    ):
        self.config, self.device = config, "cpu" if wrapper else "cuda"
        self.dtype, kept = dtype, torch.float8_e4m3fn if fp8 else dtype
        self.scales = (2.5, 0.3) if fp8 else (1.0, 1.0)
        self.shape = Shape(TOKENS, kv_heads * group, kv_heads, dim, REQUESTS, graph)
        self.channels, width = kv_heads + 1, LIMIT + TOKENS
        self.table = (torch.randperm(REQUESTS * width) + 1).view(REQUESTS, width).int()
        self.table = torch.cat([torch.zeros(1, width, dtype=torch.int32), self.table]).to(self.device)
        pools = (torch.randn(REQUESTS * width + 1, kv_heads, dim) for _ in range(2))
        pools = [
            pool.index_fill_(0, torch.tensor([0]), 400) for pool in pools
        ]  # anything finite may be there
        self.k, self.v = (pool.to(self.device, kept) for pool in pools)
        self.heads = torch.randint(self.channels, (kv_heads,), dtype=torch.int32, device=self.device)
        self.lists = torch.zeros(self.channels * REQUESTS * LIMIT, dtype=torch.int32, device=self.device)
        self.attended, self.clipped = (torch.zeros(n, dtype=torch.int64, device=self.device) for n in (2, 1))
        self.path = FlashInferVerifier(
            config,
            self.shape,
            self.shape.entries(config, LIMIT),
            {0: 2, 2: 1},
            Limits(NO_LIMIT, LIMIT),
            ops("torch" if wrapper else "triton"),
            dtype,
            kept,
            clipped=self.clipped,
            wrapper_class=wrapper,
        )

    def batch(self, bs: int) -> None:
        """Static inputs of so many rows."""
        heads, dim = self.shape.q_heads, self.shape.head_dim
        self.q = torch.zeros(bs, TOKENS, heads, dim, dtype=self.dtype, device=self.device)
        self.reqs, self.lens = (torch.zeros(bs, dtype=torch.int64, device=self.device) for _ in range(2))
        self.start = torch.zeros(bs, self.channels, dtype=torch.int64, device=self.device)
        self.count = torch.full((bs, self.channels), -1, dtype=torch.int32, device=self.device)
        self.mask = torch.ones(TOKENS, TOKENS, device=self.device).tril().bool().expand(bs, -1, -1)
        self.fill([])

    def fill(self, requests: list[tuple[int, float | None]]) -> None:
        """Draw a round of requests, by length and own keep; the rows after them pad."""
        self.q.copy_(torch.randn(self.q.shape))
        self.reqs.zero_(), self.lens.fill_(1), self.count.fill_(-1), self.start.zero_()
        self.reqs[: len(requests)] = torch.randperm(REQUESTS)[: len(requests)].to(self.device) + 1
        host, end = [], 0
        for b, (length, keep) in enumerate(requests):
            self.lens[b] = length
            if (budget := self.config.budget_for(length, keep)) < length:
                for c in range(self.channels):
                    chosen = torch.randperm(length)[:budget].to(self.device)
                    self.lists[end : end + budget] = self.table[self.reqs[b]][chosen]
                    self.start[b, c], self.count[b, c], end = end, budget, end + budget
            host.append(HostRequest(min(length + random.randint(0, 2 * TOKENS), LIMIT), keep, True))
        self.path.host.batch = host

    def call(self, layer: int) -> LayerCall:
        contexts = Contexts(self.table, self.reqs, self.lens)
        pool = KvPool(self.k, self.v, *self.scales)
        return LayerCall(layer, self.q, pool, contexts, self.mask, 0.3)

    def attend(self) -> list[torch.Tensor]:
        """Three layers, of which two share lists."""
        lists = Lists(self.lists, self.start, self.count)
        calls = [self.call(layer) for layer in range(3)]
        return [self.path.attend(call, lists, self.heads, self.attended) for call in calls]

    def check(self, outputs: list[torch.Tensor], requests: int) -> None:
        attended = torch.zeros(2, dtype=torch.int64, device=self.device)
        expected = ops("torch").sparse_attention(
            self.q.float(),
            KvPool(self.k.float() * self.scales[0], self.v.float() * self.scales[1]),
            Lists(self.lists, self.start, self.count),
            self.heads,
            Contexts(self.table, self.reqs, self.lens),
            self.mask,
            attended,
            scale=0.3,
        )
        for out in outputs:
            assert out.isfinite().all()
            assert_close(out[:requests], expected[:requests].double())
        assert self.attended.tolist() == [3 * n for n in attended.tolist()] and self.clipped.item() == 0
        self.attended.zero_()


# Below the budget, at it, a token above, a whole context by the request's own keep, another own keep.
ROUNDS = [
    [(300, None), (5, None), (1500, None)],
    [(303, None), (9, None)],
    [(71, None), (72, None), (200, 1.0), (640, 0.5), (1, None), (1200, None)],
    [(260, 1.0)],
]


@pytest.mark.parametrize("config", [RATIO, FIXED], ids=["ratio", "fixed"])
@pytest.mark.parametrize("group, kv_heads, fp8", [(1, 2, False), (2, 3, True), (4, 1, False), (8, 2, False)])
def test_eager_attention_is_the_twins(config, group, kv_heads, fp8):
    verify = Verify(config, Wrapper, kv_heads, group, fp8=fp8)
    for requests in ROUNDS:
        verify.batch(len(requests))
        verify.fill(requests)
        verify.path.before_eager(len(requests))
        verify.check(verify.attend(), len(requests))


@pytest.mark.parametrize("config", [RATIO, FIXED], ids=["ratio", "fixed"])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_padded_graph_rows_are_harmless(config, group):
    verify = Verify(config, Wrapper, group=group, graph=REQUESTS)
    for bs in (REQUESTS, 4):
        verify.batch(bs)
        verify.path.before_graph(bs, capturing=True)
        verify.check(verify.attend(), 0)
        for requests in ROUNDS:
            if len(requests) <= bs:
                verify.fill(requests)
                verify.path.before_graph(bs, capturing=False)
                verify.check(verify.attend(), len(requests))


def test_a_full_batch_of_whole_contexts_has_room():
    """Also at the rounding of what the host has not seen: nothing is clipped."""
    verify = Verify(RATIO, Wrapper)
    verify.batch(REQUESTS)
    verify.fill([(LIMIT - 2 * TOKENS, 1.0)] * REQUESTS)
    verify.path.before_eager(REQUESTS)
    assert int(verify.path._active.indptr[-1]) <= verify.path.indices.numel()
    verify.check(verify.attend(), REQUESTS)
    assert verify.clipped.item() == 0


@pytest.mark.parametrize(
    "config, request_, expected",
    [
        (FIXED, (1000, None), 71),
        (FIXED, (20, None), 71),  # constant, whatever the length
        (FIXED, (1000, 0.5), 512),
        (FIXED, (1000, 1.0), 1024),
        (RATIO, (1000, None), 256),
        (RATIO, (2560, None), 256),
        (RATIO, (2561, None), 512),
        (RATIO, (30, None), 256),
        (RATIO, (1000, 0.5), 512),
    ],
)
def test_contexts_are_planned_by_the_budget_rule_at_the_bound(config, request_, expected):
    assert planned_contexts(config, [HostRequest(*request_, True)], UNLIMITED) == [expected]
    # Never scored, or more than a list can have: whole.
    whole = -(-request_[0] // 256) * 256
    assert planned_contexts(config, [HostRequest(*request_, False)], UNLIMITED) == [whole]
    budget = config.budget_for(*request_)
    if budget < request_[0]:
        no_lists = Limits(budget - 1, NO_LIMIT)
        assert planned_contexts(config, [HostRequest(*request_, True)], no_lists) == [whole]


def test_what_is_planned_holds_every_length_up_to_the_bound():
    for config in (RATIO, FIXED, StsConfig(keep=0.3, budget=100)):
        for _ in range(300):
            bound, keep = random.randint(1, 3000), random.choice([None, 0.03, 0.5, 1.0])
            limits = Limits(random.randint(1, 1000), NO_LIMIT)
            (room,) = planned_contexts(config, [HostRequest(bound, keep, True)], limits)
            length = random.randint(1, bound)
            budget = config.budget_for(length, keep)
            whole = budget == length or budget > limits.budget
            assert room >= (length if whole else budget)


def test_the_host_bounds_what_it_has_not_seen():
    view = HostView(TOKENS, limit=100)
    req = Request("a", 3, [0] * 20, [1] * 5, None)
    view.note([req])
    assert view.batch == [HostRequest(25 + 2 * TOKENS, None, False)]
    view.admit([req], [None])
    view.note([req])
    assert view.batch == [HostRequest(33, None, True)]
    req = req._replace(output=[1] * 90)
    view.admit([req], [0.5])
    view.note([req])
    assert view.batch == [HostRequest(100, 0.5, True)]
    view.note([req._replace(rid="b")])  # in the slot of another
    assert not view.batch[0].scored


def test_a_fixed_budget_is_planned_once_a_batch_size():
    verify = Verify(FIXED, Wrapper, graph=4)
    for bs in (4, 2):
        verify.path.before_graph(bs, capturing=True)
    assert verify.path.host_plans == 2
    for length in range(1, 1400, 100):
        for bs in (2, 4):
            verify.path.host.batch = [HostRequest(length, None, True)] * (bs - 1)
            verify.path.before_graph(bs, capturing=False)
    assert verify.path.host_plans == 2
    verify.path.host.batch = [HostRequest(1000, 0.5, True)]
    verify.path.before_graph(4, capturing=False)
    assert verify.path.host_plans == 3


def test_a_share_is_planned_again_only_when_a_list_outgrows_its_blocks():
    verify = Verify(RATIO, Wrapper, graph=2)
    verify.path.before_graph(2, capturing=True)
    planned = []
    for bound in [2500, 2540, 2560, 2561, 2600, 5120, 5121]:
        verify.path.host.batch = [HostRequest(bound, None, True), HostRequest(100, None, True)]
        verify.path.before_graph(2, capturing=False)
        planned.append(verify.path.host_plans)
    assert planned == [2, 2, 2, 3, 3, 3, 4]
    verify.path.host.batch = verify.path.host.batch[:1]  # one has finished
    verify.path.before_graph(2, capturing=False)
    assert verify.path.host_plans == 5
    for bs, total in ((1, 6), (1, 6), (2, 7)):  # eager has one plan for all batch sizes
        verify.path.host.batch = [HostRequest(100, None, True)] * bs
        verify.path.before_eager(bs)
        assert verify.path.host_plans == total


def test_a_plan_is_not_written_over_the_last_ones_copy():
    verify = Verify(RATIO, Wrapper)
    for bound in (100, 5000, 10_000):
        verify.path.host.batch = [HostRequest(bound, None, True)]
        verify.path.before_eager(1)
    first, second, third = verify.path._eager.wrapper.pins
    assert first is third is not second


@pytest.mark.parametrize("pairs", [1, 8, 128, 1000])
@pytest.mark.parametrize(
    "tokens, group, tile", [(4, 4, 16), (2, 1, 16), (4, 8, 64), (8, 8, 64), (8, 16, 128)]
)
def test_empty_requests_make_flashinfer_take_a_fitting_tile(pairs, tokens, group, tile):
    shape = Shape(tokens, 8 * group, 8, 128, 4096, 0)
    longest = pairs * tokens - shape.planned_requests(pairs) + 1
    assert shape.tile == tile
    assert tile == 128 or longest == tokens
    slots, planned = shape.slots(pairs), shape.planned_requests(pairs)
    assert planned >= pairs and slots >= PLAN_GRID
    # Three indices and a flag a block, two prefix sums, seven alignments.
    ints = 13 * slots + 4 * (planned + 1) + 4 * (pairs * tokens + 1) + 7 * 16
    assert ints <= shape.int_workspace(pairs, slots) <= 2 * ints + 4096


def test_an_8b_target_keeps_its_lists_small():
    shape = Shape(4, 32, 8, 128, requests=48, graph_requests=32)
    pool = 450_000
    kv = pool * (32 * 8 * 128 * 2 * 2 + 16 * 8 * 64 * 2 * 2)
    assert shape.list_bytes(shape.entries(StsConfig(), 131_072)) < 0.004 * kv
    assert shape.float_workspace() < 128 << 20


def test_layers_that_select_alike_share_lists():
    head_map = proportional(HeadCounts(8, 4, 2), HeadCounts(4, 4, 2))
    assert layer_runs(StsConfig(), head_map, 8) == {0: 2, 2: 2, 4: 2, 6: 2}
    assert layer_runs(StsConfig(dense_layers=(0, 3)), head_map, 8) == {1: 1, 2: 1, 4: 2, 6: 2}
    assert layer_runs(StsConfig(verify="dense"), head_map, 8) == {}


@pytest.mark.parametrize(
    "config, plans",
    [({"policy": "fixed", "budget": 7}, 2), ({"keep": 0.2, "budget": 0}, 1)],  # 7, then 256; 256 always
)
@pytest.mark.parametrize("graphs", [False, True])
def test_the_target_backend_attends_and_counts_as_with_the_sparse_kernel(config, plans, graphs):
    found = []
    for wrapper in (None, Wrapper):
        torch.manual_seed(0)
        rig = Rig({**config, "sink": 2, "recent": 4})
        if wrapper is not None:
            give_headwise(rig, wrapper)
        for length in (CONTEXT + 1, CONTEXT + 2, CONTEXT + 9):  # the last one is not what was carried
            rig.draft_extend(min(length, CONTEXT + 2) - 1, 1, torch.randn(TOKENS, Q_HEADS * DIM))
            rig.draft_steps(length, {})
            fb = rig.verify_batch(length)
            if wrapper is not None:
                carried = length <= CONTEXT + 2
                rig.runtime.verifier.host.batch = [HostRequest(length + 3, None, carried)]
            if graphs:
                rig.target.init_forward_metadata_out_graph(fb)
                rig.target.init_forward_metadata_in_graph(fb)
            else:
                rig.target.init_forward_metadata(fb)
            for i in range(LAYERS):
                q = torch.randn(TOKENS, Q_HEADS * DIM)
                found.append(rig.target.forward_extend(q, None, None, rig.layer(i), fb))
        found.append(rig.runtime.state.totals)
        assert rig.runtime.verifier.host_plans == (0 if wrapper is None else plans)
    half = len(found) // 2
    for plain, headwise in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(headwise, plain, rtol=1e-5, atol=1e-5)


def test_the_hook_tells_the_host_who_is_in_a_round(monkeypatch):
    rig = Rig({"policy": "fixed", "budget": 7, "sink": 2, "recent": 4})
    give_headwise(rig, Wrapper)
    bound = bind.Bound(rig.runtime, rig.target, 1, {})
    monkeypatch.setattr(bind, "_bound", bound)
    params = SimpleNamespace(custom_params={"sts": {"keep": 0.5}})
    monkeypatch.setattr(views.release, "pool_row", lambda req: req.row)
    req = SimpleNamespace(
        rid="a", row=Rig.REQ, origin_input_ids=[0] * 9, output_ids=[1], sampling_params=params
    )
    hooks.forward_batch(None, SimpleNamespace(forward_mode=ForwardMode.EXTEND, reqs=[req]))
    assert rig.runtime.verifier.host.batch == []
    hooks.forward_batch(None, SimpleNamespace(forward_mode=ForwardMode.DECODE, reqs=[req]))
    assert rig.runtime.verifier.host.batch == [HostRequest(10 + 2 * TOKENS, 0.5, True)]
    rig.target.init_forward_metadata(rig.verify_batch(10))
    assert bound.describe()["counters"]["plans_total"] == 1
    assert bound.describe()["memory_bytes"]["headwise_lists"] > 0


def test_plans_are_published_and_logged(caplog):
    caplog.set_level("INFO")
    exporter = Exporter(
        torch.tensor([3, 0, 5, 10, *[0] * (len(Count) - 4)]),
        enable_metrics=False,
        interval=1,
        plans=lambda: 2,
    )
    exporter.on_round()
    assert "3 sparse verifies, 0 dense, keep ratio 0.5000, 2 plans" in caplog.text
    exporter.on_round()
    assert "0 plans (last 1 rounds)" in caplog.text


def test_a_copy_of_the_middle_of_a_round_takes_nothing_back():
    """A verify is sparse until its pages are known; Prometheus ends a process that lowers a counter."""
    totals, added = torch.tensor([3, 0, 5, 10, *[0] * (len(Count) - 4)]), []
    exporter = Exporter(totals, enable_metrics=False, interval=9)
    metric = SimpleNamespace(inc=added.append, set=lambda value: None)
    exporter._prometheus = dict.fromkeys((*_HELP, "keep_ratio"), metric)
    for sparse in (5, 4, 6):
        totals[0] = sparse
        exporter.on_round()
    assert min(added) == 0 and sum(added) == 6 + 5 + 10


def give_headwise(rig: Rig, wrapper: type) -> None:
    """As bind.assemble does under kernel flashinfer."""
    own, shape = rig.runtime, Shape(TOKENS, Q_HEADS, KV_HEADS, DIM, 8, 8)
    own.verifier = FlashInferVerifier(
        own.config,
        shape,
        shape.entries(own.config, 100),
        layer_runs(own.config, own.head_map, COUNTS.layers),
        Limits(256, 100),
        SimpleNamespace(headwise_lists=own.ops.headwise_lists),  # no other op is called
        torch.float32,
        torch.float32,
        clipped=own.state.clipped,
        wrapper_class=wrapper,
    )


def test_the_installed_flashinfer_is_the_one_that_was_read():
    """Names and formulas that the path relies on, where no GPU would show that they changed."""
    flashinfer = pytest.importorskip("flashinfer")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    options = {"packed_custom_mask", "sm_scale", "seq_lens", "max_token_per_sequence", "kv_data_type"}
    assert options <= set(inspect.signature(wrapper.plan).parameters)
    assert {"out", "q_scale", "k_scale", "v_scale"} <= set(inspect.signature(wrapper.run).parameters)
    source = inspect.getsource(wrapper)
    for name in ("_mask_indptr_buf", "_pin_memory_int_workspace_buffer"):
        assert f"self.{name} = " in source
    folder = Path(flashinfer.__file__).parent / "data" / "include" / "flashinfer" / "attention"
    scheduler, variants = (folder / name for name in ("scheduler.cuh", "variants.cuh"))
    assert "max_seq_len = total_num_rows - batch_size + 1" in scheduler.read_text()
    assert "custom_mask_ptr[offset / 8] >> (offset % 8)" in variants.read_text()


# ---- on a GPU, with FlashInfer itself

KEPT = [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [RATIO, FIXED], ids=["ratio", "fixed"])
@pytest.mark.parametrize("dtype, fp8", KEPT)
@pytest.mark.parametrize("group, kv_heads, dim", [(2, 2, 64), (4, 8, 128), (8, 2, 64), (1, 3, 128)])
def test_flashinfer_attends_as_the_twin_in_eager(config, dtype, fp8, group, kv_heads, dim):
    verify = Verify(config, None, kv_heads, group, dim, dtype, fp8=fp8)
    for requests in ROUNDS:
        verify.batch(len(requests))
        verify.fill(requests)
        verify.path.before_eager(len(requests))
        verify.check(verify.attend(), len(requests))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [RATIO, FIXED], ids=["ratio", "fixed"])
@pytest.mark.parametrize("dtype, fp8", KEPT)
@pytest.mark.parametrize("group, kv_heads, dim", [(2, 2, 64), (4, 8, 128), (8, 2, 64)])
def test_flashinfer_attends_as_the_twin_in_replays(config, dtype, fp8, group, kv_heads, dim):
    """One graph over rounds of changing lengths, numbers of requests and plans."""
    verify = Verify(config, None, kv_heads, group, dim, dtype, graph=REQUESTS, fp8=fp8)
    verify.batch(REQUESTS)
    verify.path.before_graph(REQUESTS, capturing=True)
    for _ in range(2):
        verify.attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = verify.attend()
    verify.attended.zero_()
    for requests in [*ROUNDS, *ROUNDS[::-1]]:
        verify.fill(requests)
        verify.path.before_graph(REQUESTS, capturing=False)
        graph.replay()
        torch.cuda.synchronize()
        verify.check(outputs, len(requests))
        again = [out.clone() for out in outputs]
        verify.attended.zero_()
        graph.replay()  # the same plan, not made again
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        verify.attended.zero_()


@pytest.mark.gpu
def test_planning_does_not_wait_for_the_device():
    verify = Verify(RATIO, None, graph=2, dim=64, dtype=torch.bfloat16)
    verify.path.before_graph(2, capturing=True)
    verify.path.before_eager(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for bound in (300, 1200):
            verify.path.host.batch = [HostRequest(bound, 1.0, True)] * 2
            verify.path.before_graph(2, capturing=False)
            verify.path.before_eager(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert verify.path.host_plans == 6


@pytest.mark.parametrize("dim, slots, problem", [(96, 100, "heads of 96"), (128, 2**28, "too many")])
def test_a_target_that_flashinfer_cannot_take_is_refused(dim, slots, problem):
    target = TargetShape(4, 2, 32, 8, dim, torch.bfloat16, torch.bfloat16, 8192, 8, 8, slots)
    with pytest.raises(ConfigError, match=f"sts_config.kernel: 'flashinfer' .*{problem}.*allowed: 'triton'"):
        make(
            SimpleNamespace(
                config=StsConfig(), target=target, state=SimpleNamespace(room=Room(8, 8192, 8, 8))
            )
        )
