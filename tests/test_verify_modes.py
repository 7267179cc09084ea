"""Other selectors, dense verify and full verifies through the real backends, without a server."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sts_kernels.layout import Contexts, Count
from sts_sglang.core.request import Request
from sts_sglang.core.selectors.compare import prompt_seed
from tests.test_backends import CONFIG, CONTEXT, DIM, KV_HEADS, LAYERS, Q_HEADS, SCALE, TOKENS, NoVerify, Rig

LENGTH = CONTEXT + 1
GROUP = Q_HEADS // KV_HEADS


def rig_after_a_draft(config: dict) -> Rig:
    rig = Rig({**CONFIG, **config})
    rig.draft_extend(CONTEXT, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(LENGTH, {})
    return rig


def verify(rig: Rig, layer: int, q: torch.Tensor) -> torch.Tensor:
    fb = rig.verify_batch(LENGTH)
    rig.target.init_forward_metadata(fb)
    return rig.target.forward_extend(q, None, None, rig.layer(layer), fb).view(TOKENS, Q_HEADS, DIM)


def attention(rig: Rig, layer: int, q: torch.Tensor, row: int, head: int, positions: list[int]):
    """(probabilities, output) of one row over context positions and its tail."""
    positions = [*positions, *range(LENGTH, LENGTH + row + 1)]
    keys = rig.target_pool.k[layer, rig.slots[positions], head // GROUP].double()
    weights = (keys @ q.view(TOKENS, Q_HEADS, DIM)[row, head].double() * SCALE).softmax(0)
    return weights, weights @ rig.target_pool.v[layer, rig.slots[positions], head // GROUP].double()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_oracle_attends_to_what_the_target_attends_to(layer):
    rig = rig_after_a_draft({"selector": "oracle"})
    rig.target_pool.k *= 20
    q = torch.randn(TOKENS, Q_HEADS * DIM)
    out = verify(rig, layer, q)
    for kv in range(KV_HEADS):
        heads = range(kv * GROUP, (kv + 1) * GROUP)
        probs = [
            attention(rig, layer, q, t, h, range(LENGTH))[0][2 : LENGTH - 4]
            for t in range(TOKENS)
            for h in heads
        ]
        best = 2 + int(torch.stack(probs).amax(0).argmax())
        for t in range(TOKENS):
            for h in heads:
                expected = attention(rig, layer, q, t, h, [0, 1, best, *range(LENGTH - 4, LENGTH)])[1]
                torch.testing.assert_close(out[t, h].double(), expected, rtol=1e-5, atol=1e-5)
    assert rig.runtime.state.totals.tolist() == [
        1,
        0,
        7 * KV_HEADS,
        LENGTH * KV_HEADS,
        *[0] * (len(Count) - 4),
    ]


def test_random_draws_by_the_prompt():
    rig = rig_after_a_draft({"selector": "random"})
    q, outs = torch.randn(TOKENS, Q_HEADS * DIM), []
    for prompt in ([5, 6], [7], [5, 6]):
        rig.runtime.admit([Request("r", Rig.REQ, prompt, [], None)])
        assert int(rig.runtime.selector.seeds[Rig.REQ]) == prompt_seed(prompt)
        outs.append(verify(rig, 0, q))
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("selector", ["draft", "oracle"])
def test_every_third_verify_attends_to_everything(selector):
    rig = rig_after_a_draft({"full_verify_every": 3, "selector": selector})
    q = torch.randn(TOKENS, Q_HEADS * DIM)
    whole = [attention(rig, 0, q, 0, h, range(LENGTH))[1] for h in range(Q_HEADS)]
    full = []
    for _ in range(7):
        out = verify(rig, 0, q)
        full.append(torch.allclose(out[0].double(), torch.stack(whole), atol=1e-5))
    assert full == [False, False, True, False, False, True, False]
    assert rig.runtime.state.totals[[0, 1, 4]].tolist() == [5, 0, 2]


def test_a_prefill_begins_the_count_of_rounds_anew():
    rig = rig_after_a_draft({"full_verify_every": 3})
    rig.plan(LENGTH)
    fb = rig.batch(
        ForwardMode.EXTEND,
        LENGTH,
        extend_prefix_lens=torch.tensor([10]),
        extend_seq_lens=torch.tensor([LENGTH - 10]),
        spec_info=None,
    )
    rig.extend.init_forward_metadata(fb)
    for layer in range(LAYERS):
        rig.extend.forward_extend(torch.randn(LENGTH - 10, Q_HEADS * DIM), None, None, rig.layer(layer), fb)
    rig.draft_steps(LENGTH, {})
    sizes = [{len(chosen) for chosen in rig.plan(LENGTH)} for _ in range(3)]
    assert sizes == [{7}, {7}, {LENGTH}]


def test_rounds_are_counted_by_request():
    rig = rig_after_a_draft({"full_verify_every": 2})
    table = rig.target.req_to_token_pool.req_to_token
    alone = torch.tensor([Rig.REQ])
    both = torch.tensor([Rig.REQ, 5])
    rig.runtime.state.carried_lens[5] = LENGTH
    rig.runtime.begin_verify(Contexts(table, alone, torch.tensor([LENGTH])))
    counts = rig.runtime.begin_verify(Contexts(table, both, torch.tensor([LENGTH, LENGTH]))).counts
    assert (counts[0] == -1).all() and (counts[1] == 7).all()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_dense_verify_attends_to_everything_and_is_counted_as_such(layer):
    rig = rig_after_a_draft({"verify": "dense"})
    # Stock's output needs stock's kernel, not the sparse one over everything.
    rig.runtime.whole = NoVerify()
    rig.runtime.verifier = NoVerify(begin=lambda lists, channels, lens: None, before_eager=lambda bs: None)
    q = torch.randn(TOKENS, Q_HEADS * DIM)
    out = verify(rig, layer, q)
    for t in range(TOKENS):
        for h in range(Q_HEADS):
            expected = attention(rig, layer, q, t, h, range(LENGTH))[1]
            torch.testing.assert_close(out[t, h].double(), expected, rtol=1e-5, atol=1e-5)
    assert rig.runtime.state.totals.tolist() == [
        0,
        0,
        LENGTH * KV_HEADS,
        LENGTH * KV_HEADS,
        1,
        *[0] * (len(Count) - 5),
    ]
