"""Batches that stand aside: attended to whole by the dense backend, with nothing scored or selected."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sts_kernels.layout import NO_PAGE, Count
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core import request
from sts_sglang.core.aside import StandAside, limit_of
from sts_sglang.core.verifier import TargetShape
from sts_sglang.host import bind, hooks
from sts_sglang.host.releases import release
from tests.oracle import Oracle, Rule
from tests.server import Server, random_ids
from tests.test_alone import HEAD_MAP, RULES, SPARSE, alone
from tests.test_backends import DIM, KV_HEADS, LAYERS, Q_HEADS, TOKENS, Rig
from tests.test_page_selectors import GROUP, PROMPT, Request
from tests.test_serving import CHAIN, SHAPES, sts_server
from tests.test_token_selector import Tokens, head_map

__all__ = ["head_map"]  # a fixture

LLAMA_8B = TargetShape(4, 32, 32, 8, 128, torch.bfloat16, torch.bfloat16, 131072, 64, 64)
LIMIT = PROMPT + 60


def asked(row: int, tokens: int, output: int = 0) -> request.Request:
    return request.Request(f"r{row}", row, range(tokens - output), range(output), None)


@pytest.mark.parametrize(
    ("config", "device", "more", "limit"),
    [
        ({"selector": "tokens"}, "cuda", {}, 65536),
        ({"selector": "pages"}, "cuda", {"kv_dtype": torch.float8_e4m3fn}, 131072),
        ({"selector": "joined"}, "cuda", {"kv_heads": 1}, 524288),
        ({"selector": "draft"}, "cuda", {}, 0),
        ({"selector": "oracle"}, "cuda", {}, 0),
        ({"selector": "tokens"}, "cpu", {}, 0),
        ({"selector": "tokens", "verify": "dense"}, "cuda", {}, 0),
        ({"selector": "joined", "history": "warm"}, "cuda", {}, 0),
        ({"selector": "joined", "draft": "all"}, "cuda", {}, 0),
        ({"selector": "tokens", "inspect_dir": "d"}, "cuda", {}, 0),
        ({"selector": "draft", "stand_aside": 7}, "cuda", {}, 7),
        ({"selector": "tokens", "stand_aside": 7}, "cpu", {}, 7),
        ({"selector": "tokens", "stand_aside": 0}, "cuda", {}, 0),
    ],
    ids=str,
)
def test_auto_is_256_mib_of_a_layer_where_the_targets_queries_select(config, device, more, limit) -> None:
    assert limit_of(StsConfig(**config), LLAMA_8B._replace(**more), device) == limit


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"verify": "dense"}, "verify 'dense'"),
        ({"history": "blend"}, "history 'blend'"),
        ({"draft": "steps"}, "draft 'steps'"),
        ({"draft": "extend"}, "draft 'extend'"),
        ({"inspect_dir": "d"}, "inspect_dir 'd'"),
    ],
)
def test_what_wants_scores_in_every_round_is_refused_beside_it(config, named) -> None:
    message = rf"^sts_config\.stand_aside: got 9 with {named}.*allowed: 'auto', 0"
    with pytest.raises(ConfigError, match=message):
        StsConfig(stand_aside=9, **config)
    for stand_aside in ("auto", 0):
        StsConfig(stand_aside=stand_aside, **config)


def test_a_batch_stands_aside_by_the_sum_of_what_the_host_knows() -> None:
    aside = StandAside(100, a_round=4)
    for lengths, now in (([100], True), ([60, 40], True), ([60, 41], False), ([101], False), ([], True)):
        aside.begin([asked(row, n, output=n // 3) for row, n in enumerate(lengths, 1)])
        assert aside.now == now
    assert StandAside(0, 1).said == "never"


def test_whoever_stood_aside_is_due_once_by_what_came_since_the_last_sketch() -> None:
    aside = StandAside(100, a_round=4)
    aside.begin([asked(1, 50)])
    aside.begin([asked(1, 50), asked(2, 50)])
    aside.begin([asked(1, 50), asked(2, 50)])
    assert aside.take_due() == 0 and aside.waits(1) and aside.waits(2) and not aside.waits(3)
    aside.begin([asked(2, 60), asked(3, 60)])
    # What came, and three verifies: one before, and one that the host has not heard of at either end.
    assert not aside.now and (aside.take_due(), aside.take_due()) == (10 + 3 * 4, 0)
    assert aside.waits(1) and not aside.waits(2)
    aside.admit([asked(1, 50)])  # a prefill has sketched it, or its row has another owner
    aside.begin([asked(1, 101)])
    assert aside.take_due() == 0


# ---- through the backends


def step(rig: Request, length: int, queries: list[torch.Tensor], others: int = 0) -> list[torch.Tensor]:
    """A decode step behind `length` tokens, in a batch with `others` more of somebody else, or a verify."""
    rig.runtime.begin_round([asked(rig.REQ, length, output=length - PROMPT), asked(1, others)])
    return rig.step(length, queries) if rig.runtime.draft is None else rig.round(length, queries)


def drawn(rig: Request) -> list[torch.Tensor]:
    rows = 1 if rig.runtime.draft is None else TOKENS
    return [torch.randn(rows, Q_HEADS * DIM) for _ in range(LAYERS)]


def counted(rig: Request) -> dict[str, int]:
    totals = zip(Count, rig.runtime.state.totals.tolist(), strict=True)
    return {count.name: total for count, total in totals if total}


KINDS = [("tokens", False), ("tokens", True), ("pages", False), ("joined", True), ("draft", True)]


@pytest.mark.parametrize(("selector", "drafts"), KINDS)
def test_a_batch_that_stands_aside_is_attended_to_whole_and_nothing_is_scored(
    head_map, selector, drafts
) -> None:
    config = {"selector": selector, "head_map": head_map(drafts), "stand_aside": LIMIT, "dense_layers": [1]}
    rig = Tokens(config, drafts=drafts)
    runtime, queries = rig.runtime, drawn(rig)
    runtime.selector = runtime.verifier = SimpleNamespace(channels=runtime.selector.channels, on_host=False)
    for layer, out in enumerate(step(rig, PROMPT, queries)):
        for kv in range(KV_HEADS):
            expected = rig.attended(layer, queries[layer], kv, [*range(PROMPT)], PROMPT)
            found = out[:, kv * GROUP : (kv + 1) * GROUP].double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    all_of_it = PROMPT * LAYERS * KV_HEADS
    assert counted(rig) == {
        "SPARSE_VERIFIES": 1,
        "ASIDE_VERIFIES": 1,
        "SELECTED_TOKENS": all_of_it,
        "AVAILABLE_TOKENS": all_of_it,
    }


@pytest.mark.parametrize(("selector", "drafts"), KINDS)
def test_a_batch_that_grows_and_shrinks_selects_as_if_it_had_never_stood_aside(
    head_map, selector, drafts
) -> None:
    """Sketches of what came meanwhile are caught up with, however much it is."""
    made = {"selector": selector, "head_map": head_map(drafts)}
    rigs = [Tokens({**made, "stand_aside": n}, drafts=drafts) for n in (LIMIT, 0)]
    others = [0] * 3 + [LIMIT] * 2 + [0] * 25 + [LIMIT] * 2
    for i, more in enumerate(others):
        length, queries = PROMPT + i, drawn(rigs[0])
        found = []
        for rig in rigs:
            torch.manual_seed(i)  # of the draft's own queries
            found.append(step(rig, length, queries, more))
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert same == bool(more), i
    totals = [rig.runtime.state.totals for rig in rigs]
    assert [int(t[Count.ASIDE_VERIFIES]) for t in totals] == [28, 0]
    assert [int(t[Count.SPARSE_VERIFIES]) for t in totals] == [len(others)] * 2
    assert not totals[0][Count.DENSE_VERIFIES] and totals[0][Count.SELECTED_TOKENS] > totals[1][2]
    sketches = [rig.runtime.sketches for rig in rigs]
    if sketches[0] is not None:
        marks = "written" if selector == "tokens" else "tags"
        assert torch.equal(*(vars(own)[marks] for own in sketches))
        for layer, stored in sketches[0].of_layer.items():
            assert torch.equal(stored, sketches[1].of_layer[layer])


def test_slots_are_forgotten_while_a_batch_stands_aside(head_map) -> None:
    """They have the sketches of earlier occupants."""
    rig = Tokens({"head_map": head_map(False), "stand_aside": LIMIT}, drafts=False)
    sketches = rig.runtime.sketches
    sketches.written[rig.slots[PROMPT:]] = True
    for length in range(PROMPT, PROMPT + 5):
        step(rig, length, drawn(rig))
    assert sketches.written[rig.slots].nonzero().flatten().tolist() == [
        *range(PROMPT),
        *range(PROMPT + 5, len(rig.slots)),
    ]


MARKS = {"tokens": ("written", False), "pages": ("tags", NO_PAGE)}


@pytest.mark.parametrize("selector", MARKS)
def test_a_request_that_ends_leaves_slots_with_sketches(monkeypatch, head_map, selector) -> None:
    """SGLang may give them at once to another that has the same text and has been prefilled already."""
    config = {"selector": selector, "head_map": head_map(False), "stand_aside": LIMIT}
    rig = Tokens(config, drafts=False)
    sketches, ended, (marks, unknown) = rig.runtime.sketches, PROMPT + 33, MARKS[selector]
    for length in range(PROMPT, ended):
        step(rig, length, drawn(rig))
    monkeypatch.setattr(bind, "_bound", bind.Bound(rig.runtime, rig.target, 1, {}))
    monkeypatch.setattr(release, "pool_row", lambda req: req.row)
    monkeypatch.setattr(release, "committed", lambda req: req.committed)
    hooks.release_kv(SimpleNamespace(row=rig.REQ + 1, committed=ended), None)  # of somebody else
    whole = rig.slots[: ended // 16 * 16 if selector == "pages" else ended]
    assert (vars(sketches)[marks][whole] == unknown).any()
    hooks.release_kv(SimpleNamespace(row=rig.REQ, committed=ended), None)
    assert (vars(sketches)[marks][whole] != unknown).all()
    once = Tokens(config, (100, ended), drafts=False)
    for layer, stored in sketches.of_layer.items():
        assert torch.equal(stored[whole], once.runtime.sketches.of_layer[layer][whole])
    assert not rig.runtime.aside.waits(rig.REQ)


def test_what_the_dense_backend_cannot_verify_is_attended_to_whole_by_the_ops(head_map) -> None:
    """As trees are, or the torch backend in a graph."""
    rig = Tokens({"selector": "joined", "head_map": head_map(True), "stand_aside": LIMIT})
    rig.target.tree_mask_buffer = torch.ones(8 * TOKENS * TOKENS, dtype=torch.bool)
    rig.target.dense = SimpleNamespace()
    queries = drawn(rig)
    for layer, out in enumerate(step(rig, PROMPT, queries)):
        for kv in range(KV_HEADS):
            expected = rig.attended(layer, queries[layer], kv, [*range(PROMPT)], PROMPT)
            found = out[:, kv * GROUP : (kv + 1) * GROUP].double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    totals, all_of_it = counted(rig), PROMPT * LAYERS * KV_HEADS
    assert (totals["SELECTED_TOKENS"], totals["AVAILABLE_TOKENS"]) == (all_of_it, all_of_it)
    assert (totals["SPARSE_VERIFIES"], totals["ASIDE_VERIFIES"]) == (1, 1)


def test_padding_of_a_graph_is_not_counted() -> None:
    rig = Rig({"stand_aside": 10}, drafts=False)
    fb = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=2,
        req_pool_indices=torch.tensor([rig.REQ, 0]),
        seq_lens=torch.tensor([8, 1]),
        out_cache_loc=rig.slots[7:8],
        spec_info=None,
    )
    rig.runtime.begin_round([asked(rig.REQ, 8)])
    rig.target.init_forward_metadata_in_graph(fb)
    assert counted(rig)["ASIDE_VERIFIES"] == 1 and rig.runtime.state.attended.tolist() == [7 * 4] * 2


# ---- under CUDA graphs


class Planned:
    """A dense backend that notes what it is asked to plan."""

    def __init__(self):
        self.calls = []

    def init_forward_metadata_out_graph(self, fb, in_capture):
        self.calls.append(("replayed", "captured")[in_capture])

    def init_forward_metadata_in_graph(self, fb):
        self.calls.append("in graph")


class Graphs:
    """DecodeCudaGraphRunner as far as the hooks know it: what it records, by label."""

    def __init__(self, backend, draft: bool = False):
        self.model_runner = SimpleNamespace(attn_backend=backend, is_draft_worker=draft)
        self.recorded = []

    def capture_one_shape(self, size, forward, stream_idx=None, variant_label=None, *rest):
        aside = self.model_runner.attn_backend.runtime.aside
        self.recorded.append((size, variant_label, *rest, aside.now))

    def resolve(self, forward_batch):
        return "lora"


@pytest.fixture
def bound(monkeypatch, head_map):
    def make(stand_aside: int, **more) -> Tokens:
        config = {"head_map": head_map(False), "stand_aside": stand_aside, **more}
        rig = Tokens(config, drafts=False)
        monkeypatch.setattr(bind, "_bound", bind.Bound(rig.runtime, rig.target, 1, {}))
        return rig

    return make


def record(graphs: Graphs, *more) -> list:
    hooks.capture_shape(Graphs.capture_one_shape, graphs, 8, None, *more)
    return graphs.recorded


def test_two_graphs_of_every_size_are_recorded_and_one_is_replayed(bound) -> None:
    rig = bound(LIMIT)
    graphs, aside = Graphs(rig.target), rig.runtime.aside
    aside.begin([asked(1, 5)])  # SGLang may record anew while it serves
    assert record(graphs) == [(8, None, False), (8, hooks.ASIDE, True)]
    graphs.recorded.clear()
    assert record(graphs, None, "nolora", "attention") == [
        (8, "nolora", "attention", False),
        (8, hooks.ASIDE, "attention", True),
    ]
    assert aside.now
    for tokens, label in ((LIMIT, hooks.ASIDE), (LIMIT + 1, "lora")):
        aside.begin([asked(1, tokens)])
        assert hooks.graph_variant(Graphs.resolve, graphs, None) == label


def test_graphs_of_others_and_of_a_server_that_never_stands_aside_are_as_ever(bound, monkeypatch) -> None:
    rig = bound(0)
    assert record(Graphs(rig.target)) == [(8, None, False)]
    rig = bound(LIMIT)
    rig.runtime.aside.now = True
    other = Graphs(SimpleNamespace(runtime=rig.runtime))  # as a draft's has
    assert record(other) == [(8, None, True)]
    assert hooks.graph_variant(Graphs.resolve, other, None) == "lora"
    monkeypatch.setattr(bind, "_bound", None)
    assert record(Graphs(rig.target)) == [(8, None, True)]


@pytest.mark.parametrize(
    ("dense_layers", "recorded"),
    [([], [[], ["captured", "in graph"]]), ([0], [["captured", "in graph"], ["replayed", "in graph"]])],
)
def test_the_dense_backend_binds_one_metadata_for_both_graphs(bound, dense_layers, recorded) -> None:
    """What it binds anew would no longer be what the first graph reads."""
    rig = bound(LIMIT, dense_layers=dense_layers)
    target, found = rig.target, []
    target.dense_name = "fa3"
    fb = rig.batch(ForwardMode.DECODE, PROMPT + 1, spec_info=None)
    fb.out_cache_loc = rig.slots[PROMPT : PROMPT + 1]
    for now in (False, True):
        target.dense = Planned()
        with rig.runtime.aside.recorded(now):
            target.init_forward_metadata_out_graph(fb, in_capture=True)
            target.init_forward_metadata_in_graph(fb)
        found.append(target.dense.calls)
    assert found == recorded
    target.dense = Planned()
    rig.runtime.begin_round([asked(rig.REQ, PROMPT)])
    target.init_forward_metadata_out_graph(fb)
    assert target.dense.calls == ["replayed"]


def test_a_replay_that_selects_again_catches_up_before_its_graph(bound) -> None:
    rig = bound(LIMIT)
    target, sketches = rig.target, rig.runtime.sketches
    target.dense, target.dense_name = Planned(), "fa3"
    for length in range(PROMPT, PROMPT + 20):
        rig.runtime.begin_round([asked(rig.REQ, length)])
        fb = rig.batch(ForwardMode.DECODE, length + 1, spec_info=None)
        fb.out_cache_loc = rig.slots[length : length + 1]
        target.init_forward_metadata_out_graph(fb)
        target.init_forward_metadata_in_graph(fb)
    assert not target.reads_table
    rig.runtime.begin_round([asked(rig.REQ, length + 1), asked(1, LIMIT)])
    fb.seq_lens += 1
    target.init_forward_metadata_out_graph(fb)
    assert target.reads_table
    assert sketches.written[rig.slots[: length + 1]].all()
    for layer, stored in sketches.of_layer.items():
        once = Tokens({"head_map": rig.runtime.config.head_map}, (100, length + 1), drafts=False)
        own = rig.slots[: length + 1]
        assert torch.equal(stored[own], once.runtime.sketches.of_layer[layer][own])


def test_the_launch_line_says_it(bound) -> None:
    rig = bound(LIMIT)
    rig.runtime.ranks = SimpleNamespace(size=1, whole=lambda totals: totals)
    said = bind.current().describe()
    assert said["stands_aside"] == f"up to {LIMIT} context tokens in a batch"
    assert said["config"]["stand_aside"] == LIMIT


# ---- a server

SMALL, LONG = 400, 40  # tokens up to which a batch stands aside, and of an answer


def added(server: Server, before: dict) -> dict:
    return {name: count - before[name] for name, count in server.counters().items()}


def answered(server: Server, ids: list[int]) -> tuple[list[int], dict]:
    """An answer to a request that is alone, and what it added to the counters."""
    before = server.counters()
    tokens = server.generate(ids, LONG)["output_ids"]
    return tokens, added(server, before)


def check_small(server: Server, oracle: Oracle, rule: Rule, ids: list[int]) -> list[int]:
    """Whole, as stock has it."""
    tokens, counted = answered(server, ids)
    oracle.agree(tokens, ids, replace(rule, keep=1.0))
    assert counted["aside_verifies"] == counted["sparse_verifies"] > 0 == counted["dense_verifies"]
    assert counted["selected_tokens"] == counted["available_tokens"] > 0
    return tokens


def check_growing(server: Server, oracle: Oracle, rule: Rule, ids: list[int]) -> tuple[list[int], int]:
    """Whole as long as it is small, and not always; the answer, and verifies that stood aside."""
    tokens, counted = answered(server, ids)
    assert 0 < counted["aside_verifies"] < counted["sparse_verifies"] and not counted["dense_verifies"]
    assert counted["selected_tokens"] < counted["available_tokens"]
    oracle.agree(tokens[: SMALL - len(ids)], ids, replace(rule, keep=1.0))
    return tokens, counted["aside_verifies"]


def check_turn(server: Server, oracle: Oracle, rule: Rule, before: list[int]) -> None:
    """A batch that is too large goes on from one that was not."""
    ids = [*before, *random_ids(250, 9)]
    answer = server.generate(ids, LONG)
    assert answer["meta_info"]["cached_tokens"] >= len(before) - 2
    oracle.agree(answer["output_ids"], ids, rule)


@pytest.fixture(scope="module")
def config(logs) -> dict:
    path = logs / "aside.json"
    path.write_text(json.dumps(HEAD_MAP))
    return {**SPARSE, "selector": "tokens", "head_map": str(path), "stand_aside": SMALL}


@pytest.mark.server
def test_a_server_without_a_draft_stands_aside_and_comes_back(pair, logs, config) -> None:
    oracle, rule = Oracle(pair["target"]), RULES["tokens"]
    with alone(pair, logs, "aside", config) as server:
        ids = random_ids(250, 1)
        tokens = check_small(server, oracle, rule, ids)
        check_turn(server, oracle, rule, ids + tokens)
        check_small(server, oracle, rule, random_ids(300, 3))
        ids = random_ids(SMALL - 15, 2)
        tokens, aside = check_growing(server, oracle, rule, ids)
        assert aside in (16, 17)  # a step later where results come a step late
        # As if all that stood aside had been its prompt.
        oracle.agree(tokens[aside:], ids + tokens[:aside], rule)
        assert oracle.disagrees([tokens], [ids], rule), "the test does not notice where it begins"
        server.generate_all([random_ids(n, n) for n in (250, 330, 290)], LONG)
        assert not server.counters()["dense_verifies"]


@pytest.mark.server
def test_a_server_with_a_draft_stands_aside_and_comes_back(pair, logs, config) -> None:
    oracle, rule = Oracle(pair["target"], pair["draft"]), replace(RULES["tokens"], **SHAPES[CHAIN])
    arguments = (pair, logs, "aside-draft", "STANDALONE", "draft", config, *CHAIN)
    with sts_server(*arguments) as server:
        check_small(server, oracle, rule, random_ids(250, 1))
        check_growing(server, oracle, rule, random_ids(SMALL - 15, 2))
        check_small(server, oracle, rule, random_ids(300, 3))
