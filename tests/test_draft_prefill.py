"""A draft whose own prefill attends to selections, through its real backend over a small pool: what its rows
attend to, when, and what is counted, against the method written out in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sts_kernels.layout import FP8, KEY_BLOCK, Count
from sts_sglang.backends.torch_dense import TorchBackend
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core.block_selectors import SAMPLED
from sts_sglang.core.request import Request
from tests.test_backends import DIM, KV_HEADS, LAYERS, Q_HEADS, SCALE, Rig
from tests.tolerances import assert_close

GROUP = Q_HEADS // KV_HEADS
BEFORE, NUMBER, PROMPT = 700, 330, 1200
FLOOR, KEEP = 850, 0.4
CONFIG = {"prefill": "sparse", "prefill_keep": KEEP, "prefill_floor": FLOOR, "prefill_draft": "sparse"}


class Fp8Rig(Rig):
    fp8 = (0.05, 0.5)


def rig_of(by: str, cls: type[Rig] = Rig, **config) -> Rig:
    return cls({**CONFIG, "prefill_by": by, **config}, width=PROMPT)


def prefill_batch(rig: Rig, before: int, number: int) -> SimpleNamespace:
    return rig.batch(
        ForwardMode.EXTEND,
        before + number,
        extend_prefix_lens=torch.tensor([before]),
        extend_seq_lens=torch.tensor([number]),
        extend_prefix_lens_cpu=[before],
        extend_seq_lens_cpu=[number],
        spec_info=None,
    )


def admit(rig: Rig, tokens: int = PROMPT, **asked) -> None:
    params = {"sts": asked} if asked else None
    rig.runtime.admit([Request("rid", rig.REQ, range(tokens), [], params)])


def ask_draft(rig: Rig, before: int, number: int) -> bool:
    fb = prefill_batch(rig, before, number)
    contexts = SimpleNamespace(reqs=fb.req_pool_indices, lens=fb.seq_lens)
    contexts = rig.runtime.contexts(contexts.reqs, contexts.lens)
    return rig.runtime.prefill.ask_draft(contexts, [before], [number])


def forward(rig: Rig, queries: list[torch.Tensor], before: int) -> list[torch.Tensor]:
    """[N, H_q, D] of every layer, of a pass of the draft."""
    fb = prefill_batch(rig, before, queries[0].shape[0])
    rig.extend.init_forward_metadata(fb)
    return [
        rig.extend.forward_extend(q.flatten(1), None, None, rig.layer(i), fb).view(-1, Q_HEADS, DIM)
        for i, q in enumerate(queries)
    ]


def read(rig: Rig, by: str, queries: list[torch.Tensor], before: int = BEFORE) -> list[torch.Tensor]:
    """The same as the draft's worker has it: after the target, or before."""
    if by == "target":
        return forward(rig, queries, before)
    assert ask_draft(rig, before, queries[0].shape[0])
    with rig.runtime.prefill.listening():
        return forward(rig, queries, before)


def drawn(number: int = NUMBER) -> list[torch.Tensor]:
    return [torch.randn(number, Q_HEADS, DIM) * 8 for _ in range(LAYERS)]


def seen_by(rig: Rig, q: torch.Tensor, layer: int, before: int, shift: int) -> torch.Tensor:
    """bool [H_q, N, tokens]: what rows of a chunk attend to. shift: that blocks ask a position before."""
    keys, number = meant(rig, layer)[0], q.shape[0]
    end = before + number
    positions = torch.arange(end)
    seen = (positions <= before + torch.arange(number)[:, None]).repeat(Q_HEADS, 1, 1)
    first = before
    while first < end:
        last = min((first // KEY_BLOCK + 1) * KEY_BLOCK, end)
        begins, choices = first + (shift if first == before else 0), first // KEY_BLOCK
        count = max(-int(-KEEP * choices // 1), 2)
        if last > FLOOR and last < PROMPT and begins < last and count < choices:
            rows = [begins + max((i + 1) * (last - begins) // SAMPLED - 1, 0) - shift for i in range(SAMPLED)]
            for kv_head in range(KV_HEADS):
                heads = slice(kv_head * GROUP, (kv_head + 1) * GROUP)
                shares = torch.zeros(GROUP * SAMPLED, end + KEY_BLOCK, dtype=torch.float64)
                for place, (row, head) in enumerate((r, h) for r in rows for h in range(GROUP)):
                    query = q[row - before, kv_head * GROUP + head].double()
                    logits = query @ keys[: row + 1, kv_head].T * SCALE
                    shares[place, shift : row + 1 + shift] = logits.softmax(0)
                score = shares[:, : choices * KEY_BLOCK].unflatten(1, (choices, KEY_BLOCK)).sum(2).amax(0)
                free = sorted(range(1, choices - 1), key=lambda j: (-float(score[j]), -j))
                for block in free[count - 2 :]:
                    own = slice(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
                    seen[heads, first - before : last - before, own] = False
        first = last
    return seen


def meant(rig: Rig, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [tokens, H_kv, D]: keys and values of the request."""
    pool = rig.runtime.draft.pools.layer(layer)
    scales = pool.k_scale, pool.v_scale
    return tuple(
        part[rig.slots].double() * scale for part, scale in zip((pool.k, pool.v), scales, strict=True)
    )


def expected(rig: Rig, q: torch.Tensor, layer: int, seen: torch.Tensor) -> torch.Tensor:
    keys, values = (part[: seen.shape[2]] for part in meant(rig, layer))
    found = torch.empty(q.shape, dtype=torch.float64)
    for h in range(Q_HEADS):
        logits = q[:, h].double() @ keys[:, h // GROUP].T * SCALE
        found[:, h] = logits.masked_fill(~seen[h], -torch.inf).softmax(1) @ values[:, h // GROUP]
    return found


@pytest.mark.parametrize("cls", [Rig, Fp8Rig])
@pytest.mark.parametrize("by", ["draft", "target"])
def test_rows_of_the_draft_attend_to_what_their_block_asks_for(by: str, cls: type[Rig]) -> None:
    """Behind a prefix that ends within a block, below and beyond the floor; another choice in every head."""
    rig, queries = rig_of(by, cls), drawn()
    admit(rig)
    assert (rig.runtime.draft.kv_dtype in FP8) == (cls is Fp8Rig)
    found = read(rig, by, queries)
    dense = TorchBackend.forward_extend
    for layer, q in enumerate(queries):
        seen = seen_by(rig, q, layer, BEFORE, shift=1 if by == "draft" else 0)
        lists = {tuple(seen[h, -1, ::KEY_BLOCK].tolist()) for h in range(Q_HEADS)}
        assert len(lists) == KV_HEADS
        assert_close(found[layer], expected(rig, q, layer, seen))
        fb = prefill_batch(rig, BEFORE, NUMBER)
        whole = dense(rig.extend, q.flatten(1), None, None, rig.layer(layer), fb)
        below = FLOOR // KEY_BLOCK * KEY_BLOCK - BEFORE
        whole = whole.view(found[layer].shape)
        assert_close(found[layer][:below], whole[:below].double())
        assert not torch.allclose(found[layer][below:], whole[below:], atol=1e-2)


@pytest.mark.parametrize("by", ["draft", "target"])
def test_the_last_block_of_a_prompt_and_who_asks_for_it_are_dense(by: str) -> None:
    """The prompt ends with this chunk, whose last block is 1024 to 1030; a request that wants everything."""
    for tokens, asked, selects in ((BEFORE + NUMBER, {}, True), (PROMPT, {"prefill": "dense"}, False)):
        rig, queries = rig_of(by), drawn()
        admit(rig, tokens, **asked)
        if by == "draft" and not selects:
            assert not ask_draft(rig, BEFORE, NUMBER)
            found = forward(rig, queries, BEFORE)
        else:
            found = read(rig, by, queries)
        causal = torch.arange(BEFORE + NUMBER) <= BEFORE + torch.arange(NUMBER)[:, None]
        for layer, q in enumerate(queries):
            whole = expected(rig, q, layer, causal.expand(Q_HEADS, -1, -1))
            rows = slice(1024 - BEFORE, None) if selects else slice(None)
            assert_close(found[layer][rows], whole[rows])
            assert torch.allclose(found[layer].double(), whole, atol=1e-2) != selects


def test_a_last_row_that_runs_again_attends_to_everything() -> None:
    """Once the target has sampled, nobody listens to the draft."""
    rig, queries = rig_of("draft"), drawn()
    admit(rig)
    read(rig, "draft", queries)
    rig.runtime.prefill.end()
    again, end = drawn(1), BEFORE + NUMBER
    counts = rig.runtime.state.totals.tolist()
    for layer, found in enumerate(forward(rig, again, end - 1)):
        whole = torch.ones(Q_HEADS, 1, end, dtype=torch.bool)
        assert_close(found, expected(rig, again[layer], layer, whole))
    assert rig.runtime.state.totals.tolist() == counts


@pytest.mark.parametrize("by", ["draft", "target"])
def test_blocks_of_the_draft_are_counted_by_themselves(by: str) -> None:
    rig = rig_of(by)
    admit(rig)
    read(rig, by, drawn())
    totals = rig.runtime.state.totals
    own = totals[Count.DRAFT_PREFILL_SELECTED_BLOCKS : Count.DRAFT_PREFILL_AVAILABLE_BLOCKS + 1].tolist()
    # Behind 700, 768, 896 and 1,024 tokens: the first two end below the floor or at 896, beyond it.
    there, attended = [5, 6, 7, 8], [5, 3, 3, 4]
    assert own == [LAYERS * KV_HEADS * sum(attended), LAYERS * KV_HEADS * sum(there)]
    of_target = totals[Count.PREFILL_SELECTED_BLOCKS : Count.PREFILL_AVAILABLE_BLOCKS + 1].tolist()
    assert of_target == (own if by == "draft" else [0, 0])


def test_the_target_s_lists_are_of_the_same_scores_whether_the_draft_goes_by_them_or_not() -> None:
    lists, queries = [], drawn()
    for mode in ("dense", "sparse"):
        rig = rig_of("draft", prefill_draft=mode)
        admit(rig)
        read(rig, "draft", queries)
        lists.append(rig.runtime.prefill.selector._lists)
        assert (rig.runtime.draft_prefill is None) == (mode == "dense")
    assert len(lists[0]) == len(lists[1]) > 0
    for blocks, dense, sparse in zip(rig.runtime.prefill._parts, *lists, strict=True):
        for i, count in enumerate(blocks.counts.tolist()):
            assert torch.equal(dense[i, :, :count], sparse[i, :, :count])


def test_what_is_served_is_said() -> None:
    for by in ("draft", "target"):
        runtime = rig_of(by).runtime
        assert runtime.draft_prefills == "0.4 of the blocks of keys, by its own queries"
        assert runtime.draft_prefill.reader.attention.name == "torch"
    assert Rig({}).runtime.draft_prefills == "dense"


def test_it_needs_a_sparse_prefill_and_a_draft() -> None:
    with pytest.raises(ConfigError, match="sts_config.prefill_draft: got 'sparse' with prefill 'dense'"):
        StsConfig(prefill_draft="sparse")
    config = StsConfig(prefill="sparse", prefill_draft="sparse")
    with pytest.raises(ConfigError, match="sts_config.prefill_draft: got 'sparse' without --speculative"):
        config.for_launch(drafts=False)
    assert config.for_launch(drafts=True).prefills_draft
