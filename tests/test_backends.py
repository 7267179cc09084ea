"""Capture, selection and verify through the real backends over small pools, without a server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang.srt
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sts_kernels.layout import UNKNOWN, WHOLE, Contexts, Count
from sts_sglang.backends.carry import TorchCarry
from sts_sglang.backends.draft import DraftMultiStepBackend
from sts_sglang.backends.target import StsTargetBackend
from sts_sglang.backends.torch_dense import Segment, TorchBackend, tail_masks
from sts_sglang.config import StsConfig
from sts_sglang.core.request import Request
from sts_sglang.core.round import Cache, Draft
from sts_sglang.core.sizes import Capacity
from sts_sglang.core.verifier import TargetShape
from sts_sglang.headmap import HeadCounts
from sts_sglang.host import bind, views

DIM, LAYERS, Q_HEADS, KV_HEADS, TOKENS = 16, 2, 4, 2, 4
CONTEXT = 40
COUNTS = HeadCounts(LAYERS, Q_HEADS, KV_HEADS)
SCALE = 0.7 * DIM**-0.5  # as Granite has: not what the heads' dimensions say


class Pool:
    """MHATokenToKVPool as far as the backends use it. fp8: the scales by which keys and values are kept in
    FP8; meant: what such a pool means, in float32."""

    def __init__(self, slots: int, fp8: tuple[float, float] | None = None, meant: bool = False):
        g = torch.Generator().manual_seed(0)
        shape = (LAYERS, slots, KV_HEADS, DIM)
        self.k, self.v = torch.randn(shape, generator=g) * 0.1, torch.randn(shape, generator=g)
        self.fp8, self.meant = fp8, meant

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self._kept(self.k[layer], 0)

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self._kept(self.v[layer], 1)

    def _kept(self, values: torch.Tensor, which: int) -> torch.Tensor:
        if self.fp8 is None:
            return values
        kept = (values / self.fp8[which]).to(torch.float8_e4m3fn)
        return kept.float() * self.fp8[which] if self.meant else kept


class Rig:
    """One bound draft and target over pools of permuted slots; request 3 owns the context."""

    REQ = 3
    fp8: tuple[float, float] | None = None  # of both pools, see Pool
    meant = False

    def __init__(
        self, config: dict, topk: int = 1, num_steps: int = 3, width: int = 100, drafts: bool = True
    ):
        slots = width + 28
        table = torch.zeros(8, width, dtype=torch.int32)
        order = torch.randperm(slots - 1, generator=torch.Generator().manual_seed(1)) + 1
        table[self.REQ] = order[:width]
        self.slots = table[self.REQ].long()
        self.draft_pool, self.target_pool = (Pool(slots, self.fp8, self.meant) for _ in range(2))
        self.layers = torch.nn.ModuleList(
            RadixAttention(Q_HEADS, DIM, SCALE, KV_HEADS, i) for i in range(LAYERS)
        )
        for layer in self.layers if self.fp8 and not self.meant else ():
            layer.k_scale_float, layer.v_scale_float = self.fp8
            layer.k_scale, layer.v_scale = map(torch.tensor, self.fp8)
        runner = SimpleNamespace(
            device="cpu",
            model=self.layers,
            req_to_token_pool=SimpleNamespace(req_to_token=table),
            model_config=SimpleNamespace(context_len=width),
        )
        draft = SimpleNamespace(**{**vars(runner), "token_to_kv_pool": self.draft_pool})
        target = SimpleNamespace(**{**vars(runner), "token_to_kv_pool": self.target_pool})
        self.extend = TorchCarry(draft)
        self.steps = DraftMultiStepBackend(draft, topk, num_steps)
        self.target = StsTargetBackend(target, TorchBackend(target), "torch")
        shape = Draft(
            num_steps,
            topk,
            Q_HEADS,
            KV_HEADS,
            DIM,
            torch.float32,
            views.pools(draft),
            (SCALE,) * LAYERS,
        )
        cache = Cache(table, slots, Capacity.of(8, width))
        tokens = TOKENS if drafts else 1
        target_shape = TargetShape(
            tokens,
            *(LAYERS, Q_HEADS, KV_HEADS, DIM),
            dtype=torch.float32,
            kv_dtype=self.target_pool.get_key_buffer(0).dtype,
            context_len=width,
            requests=8,
            graph_requests=0,
            slots=slots,
        )
        pair = (COUNTS, cache, shape) if drafts else (None, cache, None)
        self.runtime = bind.assemble(StsConfig(**config), COUNTS, *pair, "cpu", shape=target_shape)
        for backend in (self.target, self.extend, self.steps):
            backend.bind(self.runtime)
        self.topk = topk

    def layer(self, i: int) -> RadixAttention:
        return self.layers[i]

    def batch(self, mode: ForwardMode, length: int, **extra) -> SimpleNamespace:
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=1,
            req_pool_indices=torch.tensor([self.REQ]),
            seq_lens=torch.tensor([length]),
            out_cache_loc=None,
            **extra,
        )

    def extend_batch(self, length: int, accepted: int) -> SimpleNamespace:
        return self.batch(
            ForwardMode.DRAFT_EXTEND_V2,
            length + TOKENS,
            extend_prefix_lens=torch.tensor([length]),
            extend_seq_lens=torch.tensor([TOKENS]),
            spec_info=SimpleNamespace(num_accept_tokens=torch.tensor([accepted]), num_tokens_per_req=TOKENS),
        )

    def draft_extend(self, length: int, accepted: int, q: torch.Tensor) -> list[torch.Tensor]:
        """A draft-extend over [length, length + T) of which `accepted` tokens count; what each layer
        answers."""
        fb = self.extend_batch(length, accepted)
        self.extend.init_forward_metadata(fb)
        return [self.extend.forward_extend(q, None, None, self.layer(i), fb) for i in range(LAYERS)]

    def draft_steps(self, length: int, queries: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """The decode steps of a round; a step without a query in `queries` attends evenly. What each layer of
        each answers."""
        fb = self.batch(ForwardMode.DECODE, length)
        self.steps.init_forward_metadata(fb)
        even = torch.zeros(self.topk, Q_HEADS * DIM)
        return [
            backend.forward_decode(queries.get(i, even), None, None, self.layer(layer), fb)
            for i, backend in enumerate(self.steps.attn_backends)
            for layer in range(LAYERS)
        ]

    def verify_batch(self, length: int) -> SimpleNamespace:
        spec_info = SimpleNamespace(draft_token_num=TOKENS, custom_mask=None, topk=1)
        fb = self.batch(ForwardMode.TARGET_VERIFY, length, spec_info=spec_info)
        fb.out_cache_loc = self.slots[length : length + TOKENS]
        return fb

    def plan(self, length: int) -> list[list[int]]:
        """What verify attends to at a committed length, as sorted positions per channel."""
        self.target.init_forward_metadata(self.verify_batch(length))
        position = {int(slot): p for p, slot in enumerate(self.slots)}
        chosen = []
        indices, starts, counts = self.target._lists
        for start, count in zip(starts[0].tolist(), counts[0].tolist(), strict=True):
            slots = self.slots[:length] if count < 0 else indices[start : start + count]
            chosen.append(sorted(position[int(s)] for s in slots))
        return chosen

    def dense_verifies(self) -> int:
        return int(self.runtime.state.totals[1])


def needle_query(rig: Rig, draft_index: int, rows: int, row: int) -> torch.Tensor:
    """[rows, H_q * D] queries of which `row` attends to one draft key in every layer and head."""
    key = torch.zeros(DIM)
    key[0] = 40.0
    rig.draft_pool.k[:, rig.slots[draft_index]] = key
    q = torch.zeros(rows, Q_HEADS, DIM)
    q[row, :, 0] = 4.0
    return q.flatten(1)


CONFIG = {"policy": "fixed", "budget": 7, "sink": 2, "recent": 4}  # forced + 1


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("accepted", [1, 3, TOKENS])
def test_needle_at_every_position_is_selected_off_by_none(accepted, num_steps):
    length = CONTEXT + accepted  # committed after the verify round that the draft-extend follows
    for position in range(1, length):
        rig = Rig(CONFIG, num_steps=num_steps)
        # Draft index p holds token p + 1, so the key of target position p is at draft index p - 1.
        rig.draft_extend(CONTEXT, accepted, needle_query(rig, position - 1, TOKENS, accepted - 1))
        rig.draft_steps(length, {})
        forced = {0, 1, *range(length - 4, length)}
        for chosen in rig.plan(length):
            assert position in chosen
            assert len(chosen) == 7
            if position not in forced:
                assert set(chosen) - forced == {position}


def test_position_zero_is_always_there():
    rig = Rig(CONFIG)
    rig.draft_extend(CONTEXT, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(CONTEXT + 1, {})
    assert all(0 in chosen for chosen in rig.plan(CONTEXT + 1))


@pytest.mark.parametrize("topk", [1, 4])
@pytest.mark.parametrize("step", [0, 1])
def test_needle_of_a_draft_step_is_pooled_in(topk, step):
    rig = Rig(CONFIG, topk=topk)
    rig.draft_extend(CONTEXT - 1, 1, torch.zeros(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(CONTEXT, {step: needle_query(rig, 20 - 1, topk, topk - 1)})
    assert all(20 in chosen for chosen in rig.plan(CONTEXT))


def test_step_rows_last_one_round():
    rig = Rig(CONFIG)
    rig.draft_extend(CONTEXT - 1, 1, torch.zeros(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(CONTEXT, {0: needle_query(rig, 20 - 1, 1, 0)})
    rig.draft_steps(CONTEXT, {})
    assert all(20 not in chosen for chosen in rig.plan(CONTEXT))


@pytest.mark.parametrize("accepted", [None, 2])
def test_every_layer_carries_its_own_row(accepted):
    """Of a prefill also where the next layer's queries lie in the same memory, as graphs have it."""
    rig = Rig(CONFIG)
    prefill = rig.batch(
        ForwardMode.EXTEND,
        TOKENS,
        extend_prefix_lens=torch.tensor([0]),
        extend_seq_lens=torch.tensor([TOKENS]),
        spec_info=None,
    )
    fb = prefill if accepted is None else rig.extend_batch(CONTEXT, accepted)
    rig.extend.init_forward_metadata(fb)
    memory, expected = torch.empty(TOKENS, Q_HEADS * DIM), []
    for i in range(LAYERS):
        q = memory if accepted is None else torch.empty_like(memory)
        expected.append(q.normal_()[(accepted or TOKENS) - 1].clone())
        rig.extend.forward_extend(q, None, None, rig.layer(i), fb)
    carried = rig.runtime.state.carried_q
    assert list(carried) == list(range(LAYERS))
    for i, row in enumerate(expected):
        assert torch.equal(carried[i][Rig.REQ].flatten(), row)
        assert not carried[i][: Rig.REQ].any()


def test_a_row_of_another_length_is_not_used():
    """A request slot's leftover: the whole context is attended to, and counted as dense."""
    rig = Rig(CONFIG)
    rig.draft_extend(CONTEXT, 2, torch.randn(TOKENS, Q_HEADS * DIM))
    for other in (CONTEXT + 3, CONTEXT - 3):
        rig.draft_steps(other, {})
        assert all(chosen == list(range(other)) for chosen in rig.plan(other))
    assert rig.dense_verifies() == 2
    rig.draft_steps(CONTEXT + 2, {})
    assert {len(chosen) for chosen in rig.plan(CONTEXT + 2)} == {7}
    assert rig.dense_verifies() == 2


def test_a_split_budget_gives_lists_of_unequal_length(tmp_path):
    """Lists of the same budget together; keep 1 is the whole context for everybody."""
    sources = [[[[layer, 2 * h], [layer, 2 * h + 1]] for h in range(KV_HEADS)] for layer in range(LAYERS)]
    counts = COUNTS._asdict()
    head_map = {"version": 1, "shift": 1, "tp": 1, "target": counts, "draft": counts, "sources": sources}
    path = tmp_path / "map.json"
    path.write_text(json.dumps({**head_map, "shares": [[0.5, 1.0], [0.5, 2.0]]}))
    config = {"keep": 0.5, "budget": 0, "sink": 1, "recent": 2, "head_map": str(path)}
    rig = Rig(config)
    length = CONTEXT
    rig.draft_extend(length - 1, 1, torch.zeros(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(length, {})
    lists = rig.plan(length)
    assert [len(positions) for positions in lists] == [10, 20, 10, 40]
    for positions in lists:
        assert {0, length - 2, length - 1} <= set(positions)
    rig.runtime.state.keeps[rig.REQ] = 1.0
    assert [len(positions) for positions in rig.plan(length)] == [length] * 4
    rig.runtime.state.keeps[rig.REQ] = 0.05  # sink + recent at least
    assert [len(positions) for positions in rig.plan(length)] == [3, 3, 3, 6]


def test_lists_of_a_full_batch_lie_apart_and_depend_on_nobody():
    """Every request at the longest context, with a keep of its own or without one."""
    rig = Rig({"keep": 0.25, "budget": 0, "sink": 1, "recent": 2})
    state, reqs = rig.runtime.state, torch.arange(1, 8)
    table = torch.arange(8 * 100, dtype=torch.int32).view(8, 100)
    keeps = torch.tensor([0.5, torch.nan, 0.9, torch.nan, 0.1, 1.0, torch.nan], dtype=torch.float64)
    lens = torch.full((7,), 100)
    state.carried_lens[reqs], state.keeps[reqs] = lens, keeps
    state.importance.uniform_()
    made = rig.runtime.begin_verify(Contexts(table, reqs, lens))
    # A list has room for twice the keep of the longest context: who wants more attends to everything.
    assert made.counts[:, 0].tolist() == [50, 25, -1, 25, 10, -1, 25]
    taken = [
        range(start, start + count)
        for starts, counts in zip(made.starts.tolist(), made.counts.tolist(), strict=True)
        for start, count in zip(starts, counts, strict=True)
        if count > 0
    ]
    places = [place for part in taken for place in part]
    assert len(set(places)) == len(places) and max(places) < state.indices.numel()
    assert rig.dense_verifies() == 0
    lists = [sorted(made.indices[part].tolist()) for part in taken]
    alone = rig.runtime.begin_verify(Contexts(table, reqs[:1], lens[:1]))
    parts = zip(alone.starts[0].tolist(), alone.counts[0].tolist(), strict=True)
    assert [sorted(alone.indices[s : s + n].tolist()) for s, n in parts] == lists[:4]


def test_a_batch_is_scored_alike_some_requests_at_a_time():
    """Scratch bounds how many: outputs and importance are those of all at once, and nobody else's columns."""
    rig = Rig(CONFIG)
    runtime, state = rig.runtime, rig.runtime.state
    lens = torch.tensor([90, 3, 64, 30, 77])
    table = torch.randint(1, 128, (8, 100), dtype=torch.int32)
    contexts = Contexts(table, torch.tensor([4, 1, 6, 2, 5]), lens)
    state.carried.normal_()
    state.carried_lens[contexts.reqs] = lens
    q, found = torch.randn(5, Q_HEADS, DIM), []
    for most in (5, 2):
        state.at_once = most
        state.importance.fill_(torch.nan)
        shares = runtime.shares(contexts)
        assert [share.requests for share in shares] == [slice(i, min(i + most, 5)) for i in range(0, 5, most)]
        out = runtime.score(1, q, contexts, shares, step=0, scale=SCALE)
        found.append((out, state.importance.clone()))
    (out, scores), (parted, parted_scores) = found
    assert torch.equal(out, parted)
    assert torch.equal(scores.nan_to_num(-1), parted_scores.nan_to_num(-1))
    scored = ~scores.isnan().view(len(scores), 8, -1)
    fed, some = scored.any(2).any(1), torch.where(lens > CONFIG["budget"], lens - 1, 0).tolist()
    assert fed.any() and scored[fed].sum(2).tolist() == [[*some, 0, 0, 0]] * int(fed.sum())


@pytest.mark.parametrize("more", [{}, {"history": "warm"}, {"inspect_dir": "dumps"}], ids=str)
def test_within_the_budget_sts_stands_aside_but_for_what_is_remembered_or_told(more):
    """Nothing is scored that nothing is selected by, and the round counts as one that stood aside."""
    rig = Rig({**CONFIG, **more})
    runtime, state = rig.runtime, rig.runtime.state
    budget = CONFIG["budget"]
    contexts = Contexts(rig.target.table, torch.tensor([2, 1]), torch.tensor([budget, budget + 1]))
    state.carried.normal_()
    state.carried_lens[contexts.reqs] = contexts.lens
    state.importance.fill_(torch.nan)
    shares = runtime.shares(contexts)
    for layer in range(LAYERS):
        runtime.score(layer, torch.randn(2, Q_HEADS, DIM), contexts, shares, step=0, scale=SCALE)
    scored = ~state.importance.isnan().all(0).view(-1, state.room.columns)
    assert scored.any(1)[:2].tolist() == [bool(more), True]
    counts = runtime.begin_verify(contexts).counts
    assert (counts[0] == WHOLE).all() and (counts[1] == budget).all()
    told = [Count.SPARSE_VERIFIES, Count.DENSE_VERIFIES, Count.ASIDE_VERIFIES]
    assert state.totals[told].tolist() == [2, 0, 1]


def test_a_round_of_one_step_scores_by_the_layers_own_scale():
    rig, length = Rig(CONFIG, num_steps=1), CONTEXT + 1
    rig.draft_extend(CONTEXT, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.plan(length)
    runtime, lens = rig.runtime, torch.tensor([length])
    found = runtime.state.importance.clone()
    contexts = Contexts(rig.target.table, torch.tensor([Rig.REQ]), lens)
    for scale, same in ((SCALE, True), (DIM**-0.5, False)):
        for layer in range(LAYERS):
            runtime.score(layer, None, contexts, runtime.shares(contexts), step=0, scale=scale)
        assert torch.equal(found.nan_to_num(-1), runtime.state.importance.nan_to_num(-1)) is same


def test_attention_that_is_asked_for_more_ends():
    """Sinks come as an argument of the call, and a kernel that knows none would leave them out."""
    rig = Rig(CONFIG)
    rig.draft_extend(CONTEXT, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    fb, q = rig.verify_batch(CONTEXT + 1), torch.randn(TOKENS, Q_HEADS * DIM)
    rig.target.init_forward_metadata(fb)
    rig.target.forward_extend(q, None, None, rig.layer(0), fb)
    with pytest.raises(RuntimeError, match="^STS: layer 0 asks its attention for sinks"):
        rig.target.forward_extend(q, None, None, rig.layer(0), fb, sinks=torch.zeros(Q_HEADS))


def test_request_keep_overrides_the_policy_and_ends_with_its_request():
    rig = Rig(CONFIG)
    rig.draft_extend(CONTEXT, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(CONTEXT + 1, {})
    rig.runtime.admit([Request("r", Rig.REQ, [], [], {"sts": {"keep": 0.5}})])
    assert {len(chosen) for chosen in rig.plan(CONTEXT + 1)} == {21}
    rig.runtime.admit([Request("r", Rig.REQ, [], [], None)])
    assert {len(chosen) for chosen in rig.plan(CONTEXT + 1)} == {7}


@pytest.mark.parametrize("mode", ["warm", "blend"])
def test_memory_counts_in_the_first_verify_or_in_all(mode):
    """A slot remembers a needle that this round's rows do not see."""
    rig = Rig({**CONFIG, "history": mode, "history_weight": 1.0, "history_decay": 1.0})
    history, length = rig.runtime.state.history, CONTEXT + 1
    rig.draft_extend(CONTEXT, 1, torch.zeros(TOKENS, Q_HEADS * DIM))
    history.fresh_request[Rig.REQ] = True  # as a prefill leaves it
    found = []
    for _ in range(2):
        rig.draft_steps(length, {})
        history.remembered[rig.slots[20]] = 1000.0
        found.append(all(20 in chosen for chosen in rig.plan(length)))
    assert found == [True, mode == "blend"]


def test_a_prefill_makes_its_request_fresh_and_the_target_makes_slots_forget():
    rig = Rig({**CONFIG, "history": "warm"})
    history = rig.runtime.state.history
    fb = rig.batch(
        ForwardMode.EXTEND,
        CONTEXT,
        extend_prefix_lens=torch.tensor([10]),
        extend_seq_lens=torch.tensor([CONTEXT - 10]),
        spec_info=None,
    )
    rig.extend.init_forward_metadata(fb)
    rig.extend.forward_extend(torch.randn(CONTEXT - 10, Q_HEADS * DIM), None, None, rig.layer(0), fb)
    assert history.fresh_request.nonzero().flatten().tolist() == [Rig.REQ]
    history.remembered[:] = 5.0
    fb.out_cache_loc = rig.slots[10:CONTEXT]
    rig.target.init_forward_metadata(fb)
    rig.target.forward_extend(torch.randn(CONTEXT - 10, Q_HEADS * DIM), None, None, rig.layer(0), fb)
    assert (history.remembered[rig.slots[10:CONTEXT]] == UNKNOWN).all()
    assert (history.remembered[rig.slots[:10]] == 5.0).all()


@pytest.mark.parametrize("spread", [0, 0.5])
def test_who_is_read_passes_importance_on(spread):
    """One free token beside sink and recent: the needle; two: its successor too, or whatever comes next."""
    for budget in (7, 8):
        config = {"policy": "fixed", "budget": budget, "sink": 2, "recent": 4, "spread": spread}
        rig = Rig(config, num_steps=1)
        rig.draft_extend(CONTEXT, 1, needle_query(rig, 19, TOKENS, 0))
        for chosen in rig.plan(CONTEXT + 1):
            assert 20 in chosen and len(chosen) == budget
            assert (21 in chosen) == (budget == 8 and spread > 0)


@pytest.mark.parametrize(
    ("draft", "num_steps", "further"), [("dense", 3, 1), ("extend", 4, 2), ("steps", 3, 4), ("all", 4, 5)]
)
def test_importance_passes_on_as_far_as_it_is_told(draft, num_steps, further):
    config = {"policy": "fixed", "budget": 12, "sink": 2, "recent": 4, "spread": 0.9, "draft": draft}
    rig = Rig({**config, "spread_over": further}, num_steps=num_steps)
    rig.draft_extend(CONTEXT, 1, needle_query(rig, 19, TOKENS, 0))
    rig.draft_steps(CONTEXT + 1, {})
    for chosen in rig.plan(CONTEXT + 1):
        # Of equal scores the later one wins: what is left of the six goes to the latest tokens.
        latest = range(CONTEXT + 1 - 4 - (5 - further), CONTEXT + 1)
        assert chosen == sorted({0, 1, *range(20, 21 + further), *latest})


def test_top_p_takes_fewer_tokens_when_attention_is_peaked():
    found = []
    for position in (None, 19):
        config = {"policy": "top_p", "top_p": 0.9, "budget": 30, "sink": 2, "recent": 4, "spread": 0}
        rig = Rig(config, num_steps=1)
        q = torch.zeros(TOKENS, Q_HEADS * DIM)
        if position is not None:
            q = needle_query(rig, position, TOKENS, 0)
        rig.draft_extend(CONTEXT, 1, q)
        found.append({len(chosen) for chosen in rig.plan(CONTEXT + 1)})
    assert found == [{30}, {7}]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_verify_attends_to_the_selection_and_counts_it(layer):
    rig = Rig(CONFIG)
    rig.draft_extend(CONTEXT, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(CONTEXT + 1, {})
    chosen = rig.plan(CONTEXT + 1)
    q = torch.randn(TOKENS, Q_HEADS * DIM)
    fb = rig.verify_batch(CONTEXT + 1)
    out = rig.target.forward_extend(q, None, None, rig.layer(layer), fb).view(TOKENS, Q_HEADS, DIM)
    for head in range(Q_HEADS):
        kv = head // (Q_HEADS // KV_HEADS)
        channel = rig.runtime.head_map.head_channels(layer)[kv]
        for row in range(TOKENS):
            positions = chosen[channel] + list(range(CONTEXT + 1, CONTEXT + 2 + row))
            keys = rig.target_pool.k[layer, rig.slots[positions], kv].double()
            values = rig.target_pool.v[layer, rig.slots[positions], kv].double()
            weights = (keys @ q.view(TOKENS, Q_HEADS, DIM)[row, head].double() * SCALE).softmax(0)
            torch.testing.assert_close(out[row, head].double(), weights @ values, rtol=1e-5, atol=1e-5)
    assert rig.runtime.state.totals.tolist() == [
        1,
        0,
        7 * KV_HEADS,
        (CONTEXT + 1) * KV_HEADS,
        *[0] * (len(Count) - 4),
    ]


class NoVerify:
    """A dense backend or verifier that must not be asked for anything but what is given."""

    def __init__(self, **given):
        vars(self).update(given)

    def __getattr__(self, name: str):
        raise AssertionError(f"{name} was asked for")


@pytest.mark.parametrize(
    "dense, graphs, topk, by_dense",
    [
        ("torch", False, 1, True),
        ("torch", False, 4, True),
        ("torch", True, 1, False),
        ("fa3", True, 1, True),
        ("fa3", True, 4, False),
        ("flashinfer", False, 1, False),
        ("flashinfer", True, 1, False),
    ],
)
def test_dense_layers_attend_whole_where_their_backend_cannot_verify(dense, graphs, topk, by_dense):
    """FlashInfer takes the verify mask for another one, and the torch backend is no part of a graph."""
    rig = Rig({**CONFIG, "dense_layers": [0]}, topk=topk)
    rig.target.dense_name = dense
    rig.runtime.verifier = NoVerify(begin=lambda lists, channels, lens: None)
    if graphs:
        rig.target.tree_mask_buffer = torch.ones(8 * TOKENS * TOKENS, dtype=torch.bool)
    fb = rig.verify_batch(CONTEXT)
    fb.spec_info.topk = topk
    assert rig.target._dense_plans(fb) == by_dense
    if by_dense:
        return
    oracle, rig.target.dense = rig.target.dense, NoVerify()
    rig.draft_extend(CONTEXT - 1, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.target._begin_verify(fb)
    q = torch.randn(TOKENS, Q_HEADS * DIM)
    out = rig.target.forward_extend(q, None, None, rig.layer(0), fb)
    full = torch.ones(TOKENS, CONTEXT + TOKENS, dtype=torch.bool)
    full[:, CONTEXT:] = rig.target._tail_mask[0]
    oracle.segments = [Segment(Rig.REQ, 0, TOKENS, rig.slots[: CONTEXT + TOKENS], full)]
    torch.testing.assert_close(out, oracle.attend(q, rig.layer(0)), rtol=1e-5, atol=1e-5)


def test_a_sparse_draft_stays_sparse_under_dense_verify():
    rig = Rig({**CONFIG, "keep": 0.3, "draft": "steps", "verify": "dense"})
    rig.draft_extend(CONTEXT, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(CONTEXT + 1, {})
    state = rig.runtime.state
    assert 0 < state.counts[0].max() < CONTEXT + 1
    selected, available = state.draft_attended.tolist()
    assert 0 < selected < available
    rig.target.init_forward_metadata(rig.verify_batch(CONTEXT + 1))
    assert state.totals[[0, 1, 4]].tolist() == [0, 0, 1]


def test_draft_steps_attend_to_their_own_branch():
    """Each branch sees the committed tokens and its own scratch slots, nobody else's."""
    topk, num_steps, step = 2, 3, 1
    rig = Rig(CONFIG, topk=topk, num_steps=num_steps)
    q = torch.randn(topk, Q_HEADS * DIM)
    fb = rig.batch(ForwardMode.DECODE, CONTEXT)
    rig.steps.init_forward_metadata(fb)
    out = rig.steps.attn_backends[step].forward_decode(q, None, None, rig.layer(0), fb)
    for branch in range(topk):
        scratch = CONTEXT + branch * num_steps
        positions = [*range(CONTEXT), *range(scratch, scratch + step + 1)]
        for head in range(Q_HEADS):
            keys = rig.draft_pool.k[0, rig.slots[positions], head // 2].double()
            values = rig.draft_pool.v[0, rig.slots[positions], head // 2].double()
            weights = (keys @ q.view(topk, Q_HEADS, DIM)[branch, head].double() * SCALE).softmax(0)
            found = out.view(topk, Q_HEADS, DIM)[branch, head].double()
            torch.testing.assert_close(found, weights @ values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draft", ["all", "extend"])
def test_a_sparse_draft_extend_attends_to_the_selection_and_to_itself(draft: str):
    """Rows of a request, and those that pad a CUDA graph, whose length is below the rows they have."""
    rig = Rig({"keep": 0.3, "budget": 0, "sink": 2, "recent": 4, "draft": draft})
    rig.draft_extend(CONTEXT - TOKENS, TOKENS, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(CONTEXT, {0: torch.randn(1, Q_HEADS * DIM)})
    if draft == "extend":  # all steps score, and verify selects
        assert rig.runtime.scoring_steps == 2 and rig.runtime.state.counts[0].max() < 0
        rig.target.init_forward_metadata(rig.verify_batch(CONTEXT))
    state, layer = rig.runtime.state, rig.layer(0)
    for length in (CONTEXT, 1 - TOKENS):
        if length < 0:
            state.counts.fill_(-1)
        q = torch.randn(TOKENS, Q_HEADS * DIM)
        out = rig.extend.forward_extend(q, None, None, layer, rig.extend_batch(length, 2))
        for head in range(Q_HEADS):
            channel = int(rig.runtime.channels.of_draft[0, head // (Q_HEADS // KV_HEADS)])
            start, count = int(state.starts[0, channel]), int(state.counts[0, channel])
            chosen = state.draft_indices[start : start + max(count, 0)].long()
            assert count == (12 if length > 0 else -1)
            for row in range(TOKENS):
                tail = rig.slots[max(length, 0) : max(length, 0) + row + 1]
                slots = torch.cat([chosen, tail])
                keys = rig.draft_pool.k[0, slots, head // (Q_HEADS // KV_HEADS)].double()
                values = rig.draft_pool.v[0, slots, head // (Q_HEADS // KV_HEADS)].double()
                query = q.view(TOKENS, Q_HEADS, DIM)[row, head].double()
                expected = (keys @ query * SCALE).softmax(0) @ values
                found = out.view(TOKENS, Q_HEADS, DIM)[row, head].double()
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_queries_of_a_row_a_head_are_those_of_their_tokens():
    """HunYuan's, once they are normed."""

    def answers(*row: int) -> list[torch.Tensor]:
        rig = Rig({"keep": 0.3, "budget": 0, "sink": 2, "recent": 4, "draft": "all", "dense_layers": [0]})
        g = torch.Generator().manual_seed(0)
        step, rows = (torch.randn(n, Q_HEADS * DIM, generator=g).view(*row) for n in (1, TOKENS))
        found = rig.draft_extend(CONTEXT - TOKENS, TOKENS, rows)
        found += rig.draft_steps(CONTEXT, {0: step, 1: step, 2: step})
        found += rig.draft_extend(CONTEXT, 2, rows)
        fb = rig.verify_batch(CONTEXT)
        rig.target.init_forward_metadata(fb)
        return found + [rig.target.forward_extend(rows, None, None, rig.layer(i), fb) for i in range(LAYERS)]

    for of_tokens, of_heads in zip(answers(-1, Q_HEADS * DIM), answers(-1, DIM), strict=True):
        torch.testing.assert_close(of_heads, of_tokens, rtol=0, atol=0)


def test_both_tree_mask_layouts_give_the_same_tail():
    lengths, tokens = [5, 9], 3
    tails = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]).bool()
    rows = [torch.cat([torch.ones(tokens, n).bool(), t], 1) for n, t in zip(lengths, tails, strict=True)]
    full = torch.cat([r.flatten() for r in rows])
    spare = torch.ones(50, dtype=torch.bool)  # CUDA preallocates more than a batch needs
    for mask in (tails.flatten(), full, torch.cat([full, spare])):
        fb = SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            spec_info=SimpleNamespace(draft_token_num=tokens, custom_mask=mask, topk=2),
            batch_size=2,
            req_pool_indices=torch.tensor([1, 2]),
            seq_lens=torch.tensor(lengths),
        )
        assert torch.equal(tail_masks(fb), tails)


# What SGLang reads of other backends only: of recurrent models, of CPU graphs, of prefill graphs that hold
# the metadata of their backend, of DeepSeek's, or where it has asked whether they have it.
OF_OTHERS = {
    "update_mamba_state_after_mtp_verify",
    "init_forward_metadata_capture_cpu_graph",
    "init_cpu_graph_state",
    "get_cpu_graph_seq_len_fill_value",
    "forward_metadata",
    "enable_early_verify_metadata",
    "extend_attention_block_m",
    "tail_forward_metadata",
    "attn_backends",  # of the draft's steps, which has it
}


def test_backends_have_whatever_sglang_reads_of_them():
    """Some of it in eager mode on a GPU only, where no test on a CPU would miss it."""
    root = Path(sglang.srt.__path__[0])
    files = [*root.glob("speculative/eagle*.py"), *root.glob("speculative/base*.py")]
    files += [*root.glob("model_executor/**/*.py"), *root.glob("managers/*.py")]
    read = {
        name
        for file in files
        for name in re.findall(r"\b(?:draft_)?(?:extend_)?attn_backend\.([a-z_]+)", file.read_text())
    } - OF_OTHERS
    assert {"max_context_len", "init_forward_metadata"} <= read
    rig = Rig(CONFIG)
    for backend in (rig.target, rig.extend):
        assert not {name for name in read if not hasattr(backend, name)}
