"""Selection by single tokens through the real backends, with a draft and without, without a server."""

from __future__ import annotations

import json

import pytest
import torch

from sts_kernels import tokens as kernels
from sts_kernels.layout import (
    AGAIN,
    IMPORTANCE_SCALE,
    MOST_STEPS,
    QUERY_STEPS,
    SKETCHED,
    UNKNOWN,
    UNRANKED_BITS,
    Contexts,
    KvPool,
    part_bytes,
)
from sts_kernels.torch_ops import sketch_values
from sts_sglang import headmap
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core.selectors import tokens
from sts_sglang.core.sizes import SCRATCH
from sts_sglang.core.verifier import TargetShape
from tests import directions
from tests.test_backends import COUNTS, DIM, KV_HEADS, LAYERS, Q_HEADS, SCALE, TOKENS
from tests.test_page_selectors import GROUP, PROMPT, RECENT, SINK, WIDTH, Request, counted


@pytest.fixture
def head_map(tmp_path):
    """Writes a map file with directions; its path."""

    def write(drafts: bool, **more) -> str:
        made = directions.of_target(COUNTS, DIM, **more)
        if drafts:
            made = directions.of_pair(COUNTS, COUNTS, DIM, **more)
        path = tmp_path / f"{drafts}.json"
        path.write_text(json.dumps(made))
        return str(path)

    return write


class Tokens(Request):
    """One request whose tokens are selected by their sketches."""

    def sketch(self, layer: int, kv: int, length: int) -> torch.Tensor:
        """float64 [length, R], by definition."""
        own = self.runtime.sketches.directions[layer]
        keys = self.target_pool.k[layer, self.slots[:length], kv].double()
        found = torch.floor(keys @ own.onto[kv].double() - own.centre[kv].double() + 0.5)
        return found.clamp(-MOST_STEPS, MOST_STEPS)

    def scores(self, layer: int, q: torch.Tensor, kv: int, length: int) -> torch.Tensor:
        """float64 [length], by definition."""
        rows = q.view(-1, Q_HEADS, DIM)[:, kv * GROUP : (kv + 1) * GROUP].double()
        rows = rows @ self.runtime.sketches.directions[layer].back[kv].double()
        step = rows.abs().amax(-1, keepdim=True) / QUERY_STEPS
        rows = torch.floor(rows / step + 0.5) * step
        return (rows @ self.sketch(layer, kv, length).T * SCALE).softmax(-1).amax((0, 1))

    def check(self, length: int, queries, outs, budget: int = 100) -> None:
        for layer, (q, out) in enumerate(zip(queries, outs, strict=True)):
            for kv in range(KV_HEADS):
                score = self.scores(layer, q, kv, length)
                score = ((score * IMPORTANCE_SCALE).half().view(torch.int16) >> UNRANKED_BITS).double()
                score += torch.arange(length) / (2 * length)  # of equal ranks the later wins
                score[:SINK] = score[length - RECENT :] = torch.inf
                expected = self.attended(layer, q, kv, score.topk(budget).indices.tolist(), length)
                found = out[:, kv * GROUP : (kv + 1) * GROUP].double()
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [(PROMPT,), (100, PROMPT), (16, 33, 34, PROMPT)])
def test_a_verify_selects_by_its_own_queries(head_map, chunks) -> None:
    rig = Tokens({"selector": "tokens", "head_map": head_map(True)}, chunks)
    for length in (PROMPT, PROMPT + 3, PROMPT + 7, PROMPT + 8):
        queries = [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)]
        rig.check(length, queries, rig.round(length, queries))
    assert counted(rig) == [4, 0]


def test_a_decode_step_selects_by_its_own_queries(head_map) -> None:
    rig = Tokens({"head_map": head_map(False)}, drafts=False)
    assert rig.runtime.config.selector == "tokens" and "token scores" in rig.runtime.selects_by
    for length in range(PROMPT, PROMPT + 20):
        queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
        rig.check(length, queries, rig.step(length, queries))
    assert counted(rig) == [20, 0]
    assert rig.runtime.state.attended.tolist()[0] == 20 * LAYERS * KV_HEADS * 100


@pytest.mark.parametrize("selector", ["tokens", "pages", "joined"])
def test_what_nobody_goes_by_is_not_scored(head_map, selector) -> None:
    rig = Tokens({"selector": selector, "head_map": head_map(True)})
    rig.round(PROMPT, [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)])
    assert bool(rig.runtime.state.importance.any()) == (selector == "joined")
    assert counted(rig) == [1, 0]


def test_a_map_of_the_target_alone_serves_with_any_draft(head_map) -> None:
    """Where nothing goes by what that attends to."""
    rig = Tokens({"selector": "tokens", "head_map": head_map(False)})
    queries = [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)]
    rig.check(PROMPT, queries, rig.round(PROMPT, queries))
    with pytest.raises(ConfigError, match=r"head_map\.draft: a map of the target alone"):
        Tokens({"selector": "draft", "head_map": head_map(False)})


def test_a_needle_is_found_by_its_own_sketch(head_map) -> None:
    """The value at one position is far from all others; only queries of the target point at its key."""
    found = {}
    for selector in ("draft", "tokens"):
        torch.manual_seed(0)
        rig = Tokens({"selector": selector, "head_map": head_map(True, whole=True)})
        slot = rig.slots[121]
        rig.target_pool.k[:, slot] = torch.eye(DIM)[0] * 60
        rig.target_pool.v[:, slot] = 100
        rig.prefill(100, PROMPT)  # writes the sketches of what has changed
        q = torch.zeros(TOKENS, Q_HEADS, DIM)
        q[..., 0] = 2
        outs = rig.round(PROMPT, [q.flatten(1)] * LAYERS)
        found[selector] = min(float(out.min()) for out in outs) > 90
    assert found == {"draft": False, "tokens": True}


def test_slots_that_were_loaded_are_sketched_by_the_next_prefill(head_map) -> None:
    rig = Tokens({"selector": "tokens", "head_map": head_map(True)})
    sketches, slots = rig.runtime.sketches, rig.slots
    rig.runtime.loaded(slots[50:200])
    assert sketches.written[slots[:PROMPT]].all()  # not before the next forward
    rig.runtime.forget_loaded()
    assert sketches.written[slots[:PROMPT]].nonzero().flatten().tolist() == [*range(50), *range(200, PROMPT)]
    for stored in sketches.of_layer.values():
        stored[slots[:PROMPT]] = 99  # what an earlier occupant left
    rig.prefill(240, PROMPT)
    assert sketches.written[slots[:PROMPT]].all()
    for layer, stored in sketches.of_layer.items():
        assert (stored[slots[:50]] == 99).all()  # known, so not written again
        for kv in range(KV_HEADS):
            expected = rig.sketch(layer, kv, PROMPT)[50:]
            assert torch.equal(sketch_values(stored[slots[50:PROMPT], kv]).double(), expected)


def test_what_a_last_verify_added_is_sketched_for_who_shares_it(head_map) -> None:
    """Tokens of the last verify of a request have no sketch yet when another takes them for its prefix."""
    rig = Tokens({"selector": "tokens", "head_map": head_map(True)})
    sketches, slots = rig.runtime.sketches, rig.slots
    sketches.written[slots[PROMPT:]] = True  # of earlier occupants
    rig.round(PROMPT, [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)])
    assert not sketches.written[slots[PROMPT : PROMPT + TOKENS]].any()
    rig.prefill(PROMPT + TOKENS, PROMPT + 10)
    assert sketches.written[slots[: PROMPT + 10]].all()
    for layer, stored in sketches.of_layer.items():
        for kv in range(KV_HEADS):
            expected = rig.sketch(layer, kv, PROMPT + 10)[PROMPT:]
            assert torch.equal(sketch_values(stored[slots[PROMPT : PROMPT + 10], kv]).double(), expected)


@pytest.mark.parametrize("drafts", [True, False])
def test_a_verify_sketches_its_own_tokens(head_map, drafts) -> None:
    """A request that has the same text may get the slots of one that ends with this verify."""
    rig = Tokens({"selector": "tokens", "head_map": head_map(drafts)}, drafts=drafts)
    rows = TOKENS if drafts else 1
    queries = [torch.randn(rows, Q_HEADS * DIM) for _ in range(LAYERS)]
    (rig.round if drafts else rig.step)(PROMPT, queries)
    for layer, stored in rig.runtime.sketches.of_layer.items():
        for kv in range(KV_HEADS):
            expected = rig.sketch(layer, kv, PROMPT + rows)
            assert torch.equal(sketch_values(stored[rig.slots[: PROMPT + rows], kv]).double(), expected)


def test_a_context_within_its_budget_is_attended_to_whole(head_map) -> None:
    rig = Tokens({"budget": PROMPT + 8, "head_map": head_map(False)}, drafts=False)
    queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
    for layer, out in enumerate(rig.step(PROMPT, queries)):
        for kv in range(KV_HEADS):
            expected = rig.attended(layer, queries[layer], kv, [*range(PROMPT)], PROMPT)
            found = out[:, kv * GROUP : (kv + 1) * GROUP].double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dense_layers_have_no_sketches(head_map) -> None:
    rig = Tokens({"dense_layers": [0], "head_map": head_map(False)}, drafts=False)
    assert list(rig.runtime.sketches.of_layer) == [1]


@pytest.mark.parametrize("drafts", [False, True])
def test_a_batch_is_scored_alike_some_requests_at_a_time(monkeypatch, head_map, drafts) -> None:
    """Scratch bounds how many: lists are those of all at once, and those of no other request."""
    config = {"selector": "tokens", "head_map": head_map(drafts)}
    rig = Tokens(config, drafts=drafts, chunks=())
    runtime, lens, rows = rig.runtime, torch.tensor([250, 90, 180, 160, 300]), TOKENS if drafts else 1
    order = torch.randperm(428, generator=torch.Generator().manual_seed(3)).int()
    table = torch.stack([order.roll(30 * b)[:WIDTH] for b in range(8)])
    contexts = Contexts(table, torch.tensor([4, 1, 6, 2, 5]), lens)
    runtime.sketches.begin_prefill(contexts, torch.zeros(5, dtype=torch.int64))
    pool = KvPool(rig.target_pool.k[0], rig.target_pool.v[0])
    runtime.sketches.write(0, pool)
    q = torch.randn(5, rows, Q_HEADS, DIM)
    mask, found = torch.ones(5, rows, rows, dtype=torch.bool).tril(), []
    for most in (5, 2):
        monkeypatch.setattr(tokens, "at_once", lambda *_, most=most: most)
        runtime.state.carried_lens[contexts.reqs] = lens
        lists = runtime.begin_verify(contexts)
        call = tokens.LayerCall(0, q, pool, contexts, mask, SCALE)
        runtime.selector.list_layer(lists, call)
        own, _ = runtime.selector.lists.of_layer(0)
        ends = zip(own.starts.flatten().tolist(), own.counts.flatten().tolist(), strict=True)
        found.append([sorted(own.indices[start : start + max(0, count)].tolist()) for start, count in ends])
    assert found[0] == found[1] and sum(map(len, found[0])) == 4 * KV_HEADS * 100


def test_memory_for_logits_is_what_the_kernel_keeps() -> None:
    few, again = AGAIN - 1, AGAIN
    assert kernels.KNOBS.again == AGAIN
    assert tokens.logit_bytes(4096, 8, few) == 2 * 8 * 4096 * few and tokens.logit_bytes(4096, 8, again) == 0
    assert tokens.at_once(131072, 8, few) == SCRATCH // (2 * 8 * 131072 * few)
    assert tokens.at_once(131072, 8, again) >= 1024  # more than a batch has


def test_counts_of_rows_in_parts_are_reserved(monkeypatch) -> None:
    target = TargetShape(1, 2, 8, 4, 64, torch.float16, torch.float16, 4096, 3, 0)
    before = tokens.need(StsConfig(), target, 400).fixed
    monkeypatch.setattr(tokens, "part_bytes", lambda rows: 1000 * rows + part_bytes(rows))
    assert tokens.need(StsConfig(), target, 400).fixed - before == 1000 * 3 * 4


def test_a_dump_says_what_tokens_were_worth(tmp_path, head_map) -> None:
    config = {"inspect_dir": str(tmp_path), "dense_layers": [0], "head_map": head_map(False)}
    rig = Tokens(config, drafts=False)
    queries = [torch.randn(1, Q_HEADS * DIM) for _ in range(LAYERS)]
    rig.step(PROMPT, queries)
    importance, channels, signal = rig.runtime.selector.scored(rig.REQ, rig.slots[: PROMPT + 1])
    assert signal == "token scores" and channels.tolist() == [[0, 1], [2, 3]]
    assert (importance[channels[0]] == UNKNOWN).all() and (importance[:, PROMPT:] == UNKNOWN).all()
    for kv in range(KV_HEADS):
        found = importance[channels[1, kv], :PROMPT] / IMPORTANCE_SCALE
        expected = rig.scores(1, queries[1], kv, PROMPT)
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_without_directions_tokens_are_refused_and_auto_selects_pages() -> None:
    with pytest.raises(ConfigError, match=r"sts_config\.selector: got 'tokens'.*no directions"):
        Request({"selector": "tokens"})
    assert Request({}, drafts=False).runtime.config.selector == "pages"


def test_maps_and_sketches_have_as_many_directions() -> None:
    """The launcher reads maps without torch, which the kernels' layout imports."""
    assert headmap.DIMS_EACH == SKETCHED


def test_directions_of_other_heads_are_refused(tmp_path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(directions.of_target(COUNTS, 2 * DIM)))
    with pytest.raises(ConfigError, match=r"head_map: directions in 32 dimensions.*have 16"):
        Request({"head_map": str(path)}, drafts=False)
