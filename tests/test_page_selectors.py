"""Selection by pages through the real backends, alone and joined with the draft, without a server."""

from __future__ import annotations

import json

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sts_kernels.layout import IMPORTANCE_SCALE, NO_PAGE, PAGE, UNKNOWN, WHOLE, Contexts, Count, KvPool
from sts_sglang.calibrate import alone
from sts_sglang.calibrate.record import Seen
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core.selectors import pages
from sts_sglang.core.selectors.base import LayerCall
from sts_sglang.core.selectors.pages import page_columns
from sts_sglang.core.verifier import TargetShape
from sts_sglang.headmap import HeadCounts
from sts_sglang.host import bind
from tests.test_backends import COUNTS, DIM, KV_HEADS, LAYERS, Q_HEADS, SCALE, TOKENS, Rig

SINK, RECENT, WIDTH, PROMPT = 2, 4, 400, 250
CONFIG = {"policy": "fixed", "budget": 100, "sink": SINK, "recent": RECENT, "spread": 0}
GROUP = Q_HEADS // KV_HEADS


class Request(Rig):
    """One request whose prompt ran through the target, in two chunks."""

    def __init__(self, config: dict, chunks=(100, PROMPT), width: int = WIDTH, drafts: bool = True):
        super().__init__({**CONFIG, **config}, width=width, drafts=drafts)
        self.target_pool.k *= 3
        before = 0
        for end in chunks:
            self.prefill(before, end)
            before = end

    def prefill(self, before: int, end: int) -> None:
        fb = self.batch(
            ForwardMode.EXTEND,
            end,
            extend_prefix_lens=torch.tensor([before]),
            extend_seq_lens=torch.tensor([end - before]),
            spec_info=None,
        )
        fb.out_cache_loc = self.slots[before:end]
        self.target.init_forward_metadata(fb)
        for layer in range(LAYERS):
            q = torch.randn(end - before, Q_HEADS * DIM)
            self.target.forward_extend(q, None, None, self.layer(layer), fb)

    def round(self, length: int, queries: list[torch.Tensor]) -> list[torch.Tensor]:
        """[T, H_q, D] of every layer of a verify at this length."""
        self.draft_extend(length - 1, 1, torch.randn(TOKENS, Q_HEADS * DIM))
        self.draft_steps(length, {0: torch.randn(1, Q_HEADS * DIM) * 4})
        fb = self.verify_batch(length)
        self.target.init_forward_metadata(fb)
        return [
            self.target.forward_extend(q, None, None, self.layer(i), fb).view(TOKENS, Q_HEADS, DIM)
            for i, q in enumerate(queries)
        ]

    def step(self, length: int, queries: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same of a decode step without a draft, of one token behind so many."""
        fb = self.batch(ForwardMode.DECODE, length + 1, spec_info=None)
        fb.out_cache_loc = self.slots[length : length + 1]
        self.target.init_forward_metadata(fb)
        return [
            self.target.forward_decode(q, None, None, self.layer(i), fb).view(1, Q_HEADS, DIM)
            for i, q in enumerate(queries)
        ]

    def attended(self, layer: int, q: torch.Tensor, kv: int, positions: list[int], length: int):
        """[T, GROUP, D] by definition, over these positions and the tail."""
        pool, rows = self.target_pool, q.view(-1, Q_HEADS, DIM)[:, kv * GROUP : (kv + 1) * GROUP]
        out = torch.zeros(len(rows), GROUP, DIM, dtype=torch.float64)
        for t in range(len(rows)):
            slots = self.slots[[*positions, *range(length, length + t + 1)]]
            keys, values = pool.k[layer, slots, kv].double(), pool.v[layer, slots, kv].double()
            out[t] = (rows[t].double() @ keys.T * SCALE).softmax(-1) @ values
        return out

    def best_pages(self, layer: int, q: torch.Tensor, kv: int, length: int, number: int) -> list[int]:
        """By definition: the sink's, the last and the best of the others."""
        score = self.page_scores(layer, q, kv, length)
        last = length // PAGE - 1
        score[0] = score[last] = torch.inf
        return score.topk(number).indices.tolist()

    def page_scores(self, layer: int, q: torch.Tensor, kv: int, length: int) -> torch.Tensor:
        """float64 [pages] by definition."""
        keys = self.target_pool.k[layer, self.slots[: length // PAGE * PAGE], kv].double().view(-1, PAGE, DIM)
        mean, deviation = keys.mean(1), keys.std(1, correction=0)
        rows = q.view(-1, Q_HEADS, DIM)[:, kv * GROUP : (kv + 1) * GROUP].double()
        return ((rows @ mean.T + rows.abs() @ deviation.T) * SCALE).softmax(-1).amax((0, 1))


def tokens_of(pages: list[int], length: int) -> list[int]:
    rest = range(length // PAGE * PAGE, length)
    return [*(page * PAGE + i for page in pages for i in range(PAGE)), *rest]


def counted(rig: Rig) -> list[int]:
    return rig.runtime.state.totals[[Count.SPARSE_VERIFIES, Count.DENSE_VERIFIES]].tolist()


@pytest.mark.parametrize("chunks", [(PROMPT,), (100, PROMPT), (16, 33, 34, PROMPT)])
def test_pages_alone(chunks) -> None:
    rig = Request({"selector": "pages"}, chunks)
    for length in (PROMPT, PROMPT + 3, PROMPT + 7, PROMPT + 8):  # a round completes a page
        queries = [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)]
        outs = rig.round(length, queries)
        number = (100 - length % PAGE) // PAGE
        for layer, (q, out) in enumerate(zip(queries, outs, strict=True)):
            for kv in range(KV_HEADS):
                chosen = tokens_of(rig.best_pages(layer, q, kv, length, number), length)
                expected = rig.attended(layer, q, kv, chosen, length)
                found = out[:, kv * GROUP : (kv + 1) * GROUP].double()
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counted(rig) == [4, 0]


@pytest.mark.parametrize("more", [{}, {"draft": "steps"}, {"draft": "extend"}], ids=str)
def test_pages_joined_with_the_draft(more) -> None:
    rig = Request({"selector": "joined", "page_share": 0.8, **more})
    length = PROMPT
    queries = [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)]
    outs = rig.round(length, queries)
    number = (80 - length % PAGE) // PAGE
    for layer, (q, out) in enumerate(zip(queries, outs, strict=True)):
        for kv in range(KV_HEADS):
            score = rig.runtime.state.importance[int(rig.runtime.channels.of_target[layer, kv]), :length]
            score = score.clone()
            pages = rig.best_pages(layer, q, kv, length, number)
            forced = [*range(SINK), *range(length - RECENT, length)]
            score[[*forced, *(p for p in tokens_of(pages, length) if p < length // PAGE * PAGE)]] = torch.inf
            expected = rig.attended(layer, q, kv, score.topk(100).indices.tolist(), length)
            found = out[:, kv * GROUP : (kv + 1) * GROUP].double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counted(rig) == [1, 0]


def test_a_needle_that_the_draft_does_not_see_is_found_by_its_page() -> None:
    """The value at one position is far from all others; only queries of the target point at its key."""
    found = {}
    for selector in ("draft", "joined", "pages"):
        torch.manual_seed(0)
        rig = Request({"selector": selector, "page_share": 0.6})
        slot = rig.slots[121]
        rig.target_pool.k[:, slot] = torch.eye(DIM)[0] * 60
        rig.target_pool.v[:, slot] = 100
        rig.prefill(100, PROMPT)  # writes the sketches of what has changed
        q = torch.zeros(TOKENS, Q_HEADS, DIM)
        q[..., 0] = 2
        outs = rig.round(PROMPT, [q.flatten(1)] * LAYERS)
        found[selector] = min(float(out.min()) for out in outs) > 90
    assert found == {"draft": False, "joined": True, "pages": True}


@pytest.mark.parametrize("selector", ["pages", "joined"])
def test_slots_that_were_loaded_have_no_sketch_until_a_prefill_writes_it(selector) -> None:
    rig = Request({"selector": selector})
    queries = [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)]
    rig.runtime.loaded(rig.slots[:200])
    assert (rig.runtime.sketches.tags[rig.slots[:200]] != NO_PAGE).all()  # not before the next forward
    rig.runtime.forget_loaded()
    assert (rig.runtime.sketches.tags[rig.slots[:200]] == NO_PAGE).all()
    rig.round(PROMPT, queries)
    # Nobody knows what 12 pages hold: pages alone attend to all, joined the draft has the lists.
    assert counted(rig) == ([0, 1] if selector == "pages" else [1, 0])
    rig.prefill(240, PROMPT)
    known = rig.runtime.sketches.tags[rig.slots[:240].view(-1, PAGE)]
    assert (known == rig.slots[:240].view(-1, PAGE)[:, -1:]).all()
    rig.round(PROMPT, queries)
    assert counted(rig) == ([1, 1] if selector == "pages" else [2, 0])


@pytest.mark.parametrize("selector", ["pages", "joined"])
def test_lists_of_a_map_with_shares_have_room(selector, tmp_path) -> None:
    """One head has most of the budget: its list is longer than the mean, and no other's is written over."""
    shares = [[5.0, 0.5], [0.5, 5.0]]
    counts = COUNTS._asdict()
    head_map = {"version": 1, "shift": 1, "tp": 1, "target": counts, "draft": counts, "shares": shares}
    head_map["sources"] = [[[[layer, kv * GROUP]] for kv in range(KV_HEADS)] for layer in range(LAYERS)]
    (tmp_path / "map.json").write_text(json.dumps(head_map))
    config = {"policy": "ratio", "keep": 0.4, "budget": 0, "request_keep": "off"}
    rig = Request({"selector": selector, "head_map": str(tmp_path / "map.json"), **config}, width=PROMPT + 10)
    queries = [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)]
    seen = []
    attend = rig.runtime.verifier.attend

    def watched(call, lists, channels, attended):
        for channel in channels.tolist():
            start, count = int(lists.starts[0, channel]), int(lists.counts[0, channel])
            seen.append((count, set(lists.indices[start : start + count].tolist())))
        return attend(call, lists, channels, attended)

    rig.runtime.verifier.attend = watched
    rig.round(PROMPT, queries)
    assert max(count for count, _ in seen) > 1.5 * 0.4 * PROMPT
    assert all(len(chosen) == count for count, chosen in seen)
    assert all(chosen <= set(rig.slots[:PROMPT].tolist()) for _, chosen in seen)


def test_a_prompt_that_repeats_another_leaves_its_sketches_alone() -> None:
    """All but its last token is there: the page in which that ends is not taken from who completed it."""
    rig = Request({"selector": "pages"})
    tags = rig.runtime.sketches.tags.clone()
    table = rig.target.req_to_token_pool.req_to_token
    table[5, :99], table[5, 99] = table[rig.REQ, :99], table[rig.REQ, 399]
    fb = rig.batch(
        ForwardMode.EXTEND,
        100,
        extend_prefix_lens=torch.tensor([99]),
        extend_seq_lens=torch.tensor([1]),
        spec_info=None,
    )
    fb.req_pool_indices, fb.out_cache_loc = torch.tensor([5]), table[5, 99:100].long()
    rig.target.init_forward_metadata(fb)
    assert torch.equal(rig.runtime.sketches.tags, tags)


@pytest.mark.parametrize("lost, whole", [(2, False), (3, True)])
def test_the_shortest_list_has_room_for_pages_that_other_branches_took(lost, whole) -> None:
    budget = StsConfig(selector="pages", sink=SINK, recent=RECENT).forced
    rig = Request({"selector": "pages", "budget": budget})
    rig.runtime.sketches.tags[rig.slots[[50, 100, 150][:lost]]] = NO_PAGE
    rig.round(PROMPT, [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)])
    assert counted(rig) == ([0, 1] if whole else [1, 0])


@pytest.mark.parametrize("selector", ["pages", "joined"])
def test_a_context_within_its_budget_is_attended_to_whole(selector) -> None:
    rig = Request({"selector": selector, "budget": 300})
    queries = [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)]
    for layer, out in enumerate(rig.round(PROMPT, queries)):
        for kv in range(KV_HEADS):
            expected = rig.attended(layer, queries[layer], kv, [*range(PROMPT)], PROMPT)
            found = out[:, kv * GROUP : (kv + 1) * GROUP].double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counted(rig) == [1, 0]


def test_dense_layers_have_no_sketches() -> None:
    rig = Request({"selector": "joined", "dense_layers": [0]})
    assert list(rig.runtime.sketches.of_layer) == [1]
    rig.round(PROMPT, [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)])
    assert counted(rig) == [1, 0]


def test_heads_that_do_not_divide_are_refused() -> None:
    rig = Rig(CONFIG, width=WIDTH)
    shape = TargetShape(TOKENS, LAYERS, Q_HEADS, KV_HEADS, 24, torch.float32, torch.float32, WIDTH, 8, 0, 500)
    config = StsConfig(**{**CONFIG, "selector": "joined"})
    with pytest.raises(ConfigError, match="head of 24 dimensions"):
        bind.assemble(
            config, COUNTS, HeadCounts(2, 4, 2), rig.runtime.cache, rig.runtime.draft, "cpu", shape=shape
        )


def test_columns_of_pages_are_whole_blocks() -> None:
    assert [page_columns(tokens) for tokens in (1, 1024, 1025)] == [64, 64, 128]


class Alone(Request):
    """The same without a draft."""

    def __init__(self, config: dict, **more):
        super().__init__(config, drafts=False, **more)

    def check(self, length: int, number: int | dict[int, int]) -> list[torch.Tensor]:
        """A step at this length attends to so many pages, by KV head if they differ; its queries."""
        queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
        outs = self.step(length, queries)
        for layer, (q, out) in enumerate(zip(queries, outs, strict=True)):
            for kv in range(KV_HEADS):
                pages = number if isinstance(number, int) else number[kv]
                chosen = tokens_of(self.best_pages(layer, q, kv, length, pages), length)
                expected = self.attended(layer, q, kv, chosen, length)
                found = out[:, kv * GROUP : (kv + 1) * GROUP].double()
                assert torch.allclose(found, expected, atol=1e-5), (length, layer, kv)
        return queries


def test_a_decode_step_selects_by_its_own_queries() -> None:
    rig = Alone({})
    lengths = range(PROMPT, PROMPT + 20)
    for length in lengths:  # two pages are completed on the way
        rig.check(length, (100 - length % PAGE) // PAGE)
    assert counted(rig) == [len(lengths), 0]
    attended = rig.runtime.state.attended.tolist()
    listed = sum((100 - n % PAGE) // PAGE * PAGE + n % PAGE for n in lengths)
    assert attended == [LAYERS * KV_HEADS * listed, LAYERS * KV_HEADS * sum(lengths)]


@pytest.mark.parametrize("selector", ["auto", "oracle", "quest", "recent", "random"])
def test_a_step_within_its_budget_is_dense_attention(selector) -> None:
    rig = Alone({"selector": selector, "budget": PROMPT + 8})
    queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
    outs = rig.step(PROMPT, queries)
    for layer, (q, out) in enumerate(zip(queries, outs, strict=True)):
        for kv in range(KV_HEADS):
            expected = rig.attended(layer, q, kv, list(range(PROMPT)), PROMPT)
            assert torch.allclose(out[:, kv * GROUP : (kv + 1) * GROUP].double(), expected, atol=1e-5)
    assert counted(rig) == [1, 0]
    assert rig.runtime.state.attended.tolist() == [LAYERS * KV_HEADS * PROMPT] * 2


def test_a_map_of_the_target_alone_splits_the_budget(tmp_path) -> None:
    shares = [[0.8, 1.2]] * LAYERS
    head_map = {"version": 1, "tp": 1, "target": COUNTS._asdict(), "draft": None, "shares": shares}
    (tmp_path / "map.json").write_text(json.dumps(head_map))
    config = {"policy": "ratio", "keep": 0.5, "budget": 0, "head_map": str(tmp_path / "map.json")}
    rig = Alone(config)
    assert rig.runtime.head_map.origin == "map.json"
    for length in (PROMPT, PROMPT + 6):
        own = [-(-length * share // 10) for share in (4, 6)]
        rig.check(length, {kv: (own[kv] - length % PAGE) // PAGE for kv in range(KV_HEADS)})
    assert counted(rig) == [2, 0]


@pytest.mark.parametrize("shares", [None, [[0.8, 1.2]] * LAYERS, [[0.4, 3.0], [0.6, 0.2]]])
def test_calibration_measures_the_pages_that_the_server_lists(tmp_path, shares) -> None:
    """At every place within a page, with lists that a map splits; some are as short as they may be."""
    config = {"policy": "ratio", "keep": 0.45, "budget": 0}
    if shares:
        head_map = {"version": 1, "tp": 1, "target": COUNTS._asdict(), "draft": None, "shares": shares}
        (tmp_path / "map.json").write_text(json.dumps(head_map))
        config["head_map"] = str(tmp_path / "map.json")
    rig, seen = Alone(config), []
    attend = rig.runtime.verifier.attend

    def watched(call, lists, channels, attended):
        for kv, channel in enumerate(channels.tolist()):
            start, count = int(lists.starts[0, channel]), int(lists.counts[0, channel])
            seen.append((call.layer, kv, set(lists.indices[start : start + count].tolist()), count))
        return attend(call, lists, channels, attended)

    rig.runtime.verifier.attend = watched
    for length in range(PROMPT, PROMPT + PAGE + 1):
        queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
        seen.clear()
        rig.step(length, queries)
        lengths = alone.served_lengths(rig.runtime.head_map, length, rig.runtime.config)
        for layer, kv, listed, count in seen:
            slots = rig.slots[: length + 1]
            keys = rig.target_pool.k[layer, slots].transpose(0, 1)
            q = torch.zeros(Q_HEADS, length + 1, DIM)
            q[:, length] = queries[layer].view(Q_HEADS, DIM)
            at = Seen(layer, q, keys, keys, SCALE)
            chosen = alone.page_reach(rig.runtime.config)(at, length)[kv] <= lengths[layer, kv]
            assert count == WHOLE and chosen.all() or listed == set(slots[:-1][chosen].tolist())
        assert len(seen) == LAYERS * KV_HEADS
    if shares and shares[0][1] == 3:
        assert {count == WHOLE for *_, count in seen} == {True, False}


def test_every_third_step_attends_to_everything_from_the_prefill_on() -> None:
    rig = Alone({"full_verify_every": 3})
    queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
    for _ in range(2):
        rig.prefill(0, PROMPT)
        rig.runtime.state.totals.zero_()
        for length in range(PROMPT, PROMPT + 7):
            rig.step(length, queries)
        assert rig.runtime.state.totals[[Count.SPARSE_VERIFIES, Count.FULL_VERIFIES]].tolist() == [5, 2]


def test_dense_layers_attend_by_the_dense_backend() -> None:
    rig = Alone({"dense_layers": [0]})
    queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
    outs = rig.step(PROMPT, queries)
    for kv in range(KV_HEADS):
        expected = rig.attended(0, queries[0], kv, list(range(PROMPT)), PROMPT)
        assert torch.allclose(outs[0][:, kv * GROUP : (kv + 1) * GROUP].double(), expected, atol=1e-5)
    assert list(rig.runtime.sketches.of_layer) == [1]
    assert rig.runtime.state.attended.tolist()[1] == LAYERS * KV_HEADS * PROMPT


def test_a_dump_says_what_pages_were_worth(tmp_path) -> None:
    """To every head in the last step: in equal parts of a page, unknown behind the last complete one."""
    rig = Alone({"inspect_dir": str(tmp_path), "dense_layers": [0]})
    rig.step(PROMPT, [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)])
    length = PROMPT + 1
    queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
    rig.step(length, queries)
    importance, channels, signal = rig.runtime.selector.scored(rig.REQ, rig.slots[: length + 1])
    assert signal == "page scores" and channels.tolist() == [[0, 1], [2, 3]]
    complete = length // PAGE * PAGE
    assert (importance[channels[0]] == UNKNOWN).all() and (importance[:, complete:] == UNKNOWN).all()
    for kv in range(KV_HEADS):
        found = importance[channels[1, kv], :complete] / IMPORTANCE_SCALE * PAGE
        expected = rig.page_scores(1, queries[1], kv, length).repeat_interleave(PAGE)
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-7)
    other = rig.runtime.selector.scored(rig.REQ - 1, rig.slots[:20])
    assert (other.importance == UNKNOWN).all()


def test_what_nobody_scores_takes_no_room() -> None:
    state = Alone({}).runtime.state
    assert state.importance.numel() == state.indices.numel() == state.carried.numel() == 0


@pytest.mark.parametrize("drafts", [False, True])
def test_a_batch_is_scored_alike_some_requests_at_a_time(monkeypatch, drafts) -> None:
    """Scratch bounds how many: outputs and scores are those of all at once."""
    rig = Request({"selector": "pages"}, drafts=drafts, chunks=())
    runtime, lens, tokens = rig.runtime, torch.tensor([250, 90, 180, 160, 300]), TOKENS if drafts else 1
    order = torch.randperm(428, generator=torch.Generator().manual_seed(3)).int()
    table = torch.stack([order.roll(3 * PAGE * b)[:WIDTH] for b in range(8)])
    contexts = Contexts(table, torch.tensor([4, 1, 6, 2, 5]), lens)
    runtime.sketches.begin_prefill(contexts, torch.zeros(5, dtype=torch.int64))
    pool = KvPool(rig.target_pool.k[0], rig.target_pool.v[0])
    runtime.sketches.write(0, pool)
    q, mask = torch.randn(5, tokens, Q_HEADS, DIM), torch.ones(5, tokens, tokens, dtype=torch.bool).tril()
    found = []
    for most in (5, 2):
        monkeypatch.setattr(pages, "at_once", lambda *_, most=most: most)
        runtime.state.carried_lens[contexts.reqs] = lens
        lists = runtime.begin_verify(contexts)
        out = runtime.verify(LayerCall(0, q, pool, contexts, mask, SCALE), lists)
        shares = runtime.selector.scores._shares
        assert [few for few, _, _ in shares] == [slice(i, min(i + most, 5)) for i in range(0, 5, most)]
        found.append((out, runtime.selector.scores.scores.clone(), lists.counts))
    (whole, scores, counts), (parted, parted_scores, parted_counts) = found
    assert (counts >= 0).sum(1).bool().tolist() == [True, False, True, True, True]
    assert torch.equal(whole, parted) and torch.equal(counts, parted_counts)
    assert torch.equal(scores.nan_to_num(-1), parted_scores.nan_to_num(-1)) and scores.any()


def test_lists_are_no_longer_than_a_head_can_want(tmp_path) -> None:
    """A quarter of the longest context or twice the keep; with shares as much more as a head has."""
    shares = [[0.5, 1.5]] * LAYERS
    head_map = {"version": 1, "tp": 1, "target": COUNTS._asdict(), "draft": None, "shares": shares}
    (tmp_path / "map.json").write_text(json.dumps(head_map))
    config = {"policy": "ratio", "keep": 0.3, "budget": 0}
    for more, longest in (({}, 0.6), ({"request_keep": "off"}, 0.3), ({"head_map": "map"}, 0.9)):
        own = {**more, "head_map": str(tmp_path / "map.json")} if "head_map" in more else more
        rig = Alone({**config, **own}, chunks=())
        capacity, lists = rig.runtime.cache.capacity, rig.runtime.selector.lists
        entries = lists.indices.numel() // (capacity.requests * KV_HEADS)
        assert entries == pytest.approx(longest * capacity.context, abs=4)
        assert torch.equal(
            lists.starts.flatten().diff(), torch.full((capacity.requests * KV_HEADS - 1,), entries)
        )
