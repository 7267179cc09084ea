"""The torch ops of sts_kernels against their definitions, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from sts_kernels import row_importance, select_tokens, sparse_verify_attention

from tests.tolerances import assert_close

KV_HEADS = 2
HEAD_DIM = 16
LENGTHS = [13, 1, 0, 70]  # ragged, one token, nothing
GROUPS = [1, 2, 4, 8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def indptr(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def pool(slots: int, used: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A KV pool that is NaN wherever an op has no business reading."""
    buffer = torch.full((slots, KV_HEADS, dim), math.nan, dtype=dtype)
    buffer[used] = torch.randn(used.numel(), KV_HEADS, dim).to(dtype)
    return buffer


def importance_case(group: int, dtype: torch.dtype = torch.float32, lengths: list[int] = LENGTHS):
    """Queries, key pool, ragged rows over permuted slots, and channels of one head, several, none."""
    slots = torch.randperm(3 * sum(lengths) + 1)[: sum(lengths)]
    heads = KV_HEADS * group
    weights = torch.zeros(3, heads)
    weights[0, heads - 1] = 1
    weights[1] = torch.rand(heads) / heads
    q = torch.randn(len(lengths), heads, HEAD_DIM).to(dtype)
    k = pool(3 * sum(lengths) + 1, slots, HEAD_DIM, dtype)
    return q, k, indptr(lengths), slots.int(), weights


def importance_by_definition(q, k, offsets, slots, weights, scale, pool_heads) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    probs = torch.zeros(q.shape[1], len(slots), dtype=torch.float64)
    for row, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for head in range(q.shape[1]):
            probs[head, start:end] = probability(q[row, head], k[:, head // group], slots[start:end], scale)
    out = torch.zeros(len(weights), len(slots), dtype=torch.float64)
    for channel, members in enumerate(weights.double()):
        for i in range(len(slots)):
            shares = [(w, p) for w, p in zip(members.tolist(), probs[:, i].tolist(), strict=True) if w > 0]
            if shares and pool_heads == "max":
                out[channel, i] = max(p for _, p in shares)
            elif shares:
                out[channel, i] = sum(w * p for w, p in shares)
    return out


def probability(query, keys, slots, scale) -> torch.Tensor:
    logits = [float(query.double() @ keys[slot].double()) * scale for slot in slots.tolist()]
    exps = [math.exp(logit - max(logits)) for logit in logits]
    return torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64)


@pytest.mark.parametrize("pool_heads", ["max", "mean"])
@pytest.mark.parametrize("group", GROUPS)
def test_importance_is_the_pooled_probability(group: int, pool_heads: str) -> None:
    case = importance_case(group, lengths=[7, 1, 0, 12])
    actual = row_importance(*case, 0.3, pool_heads)
    assert actual.dtype == torch.float32
    assert_close(actual, importance_by_definition(*case, 0.3, pool_heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance_is_computed_in_float32(dtype: torch.dtype) -> None:
    case = importance_case(2, dtype, lengths=[9, 4])
    assert_close(row_importance(*case, 0.3), importance_by_definition(*case, 0.3, "max"))


def test_importance_of_each_row_sums_to_one() -> None:
    q, k, offsets, slots, weights = importance_case(4)
    out = row_importance(q, k, offsets, slots, weights, 0.3)[0]
    sums = [float(out[a:b].sum()) for a, b in zip(offsets[:-1], offsets[1:], strict=True) if b > a]
    assert sums == pytest.approx([1.0] * len(sums))


def test_importance_survives_extreme_logits() -> None:
    q, k, offsets, slots, weights = importance_case(1)
    out = row_importance(1e4 * q, k, offsets, slots, weights, 1.0)
    assert out.isfinite().all() and out.max() == 1


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no rows", "no keys"])
def test_importance_of_nothing(lengths: list[int]) -> None:
    assert row_importance(*importance_case(2, lengths=lengths), 1.0).shape == (3, 0)


def test_importance_of_a_layer_without_mapped_heads_is_zero() -> None:
    q, k, offsets, slots, weights = importance_case(2)
    assert not row_importance(q, k, offsets, slots, 0 * weights, 1.0).any()


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(4, 2)},
        {"q": torch.zeros(4, 3, HEAD_DIM)},
        {"k_buffer": torch.zeros(9, HEAD_DIM)},
        {"kv_indptr": indptr([1])},
        {"kv_indptr": indptr(LENGTHS).float()},
        {"channel_weights": torch.zeros(3, 5)},
        {"channel_weights": torch.zeros(4)},
        {"pool_heads": "sum"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_importance_refuses(change: dict) -> None:
    names = ("q", "k_buffer", "kv_indptr", "kv_indices", "channel_weights")
    arguments = dict(zip(names, importance_case(2), strict=True))
    with pytest.raises(ValueError, match="row_importance: "):
        row_importance(**{**arguments, "sm_scale": 1.0, **change})


def selected(importance, lengths, budgets, sink, recent, top_p=None) -> list[list[list[int]]]:
    """positions[request][channel]"""
    offsets, positions = select_tokens(
        importance, indptr(lengths), torch.tensor(budgets), sink, recent, top_p
    )
    assert offsets.dtype == positions.dtype == torch.int64
    assert offsets[0] == 0 and offsets[-1] == positions.numel()
    rows = [positions[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    channels = importance.shape[0]
    assert len(rows) == len(lengths) * channels
    return [rows[i * channels : (i + 1) * channels] for i in range(len(lengths))]


def selected_by_definition(
    scores: list[float], budget: int, sink: int, recent: int, top_p: float
) -> list[int]:
    """One (request, channel): forced, then unknown, then by score; the later of two equals first."""
    context = len(scores)
    forced = {p for p in range(context) if p < sink or p >= context - recent}
    unknown = {p for p in range(context) if math.isnan(scores[p])} - forced
    known = sorted(set(range(context)) - forced - unknown, key=lambda p: (-scores[p], -p))
    order = sorted(forced) + sorted(unknown, reverse=True) + known
    count = min(context, budget)
    if top_p < math.inf:
        must = len(forced | unknown)
        mass = [0.0 if math.isnan(scores[p]) else scores[p] for p in order]
        enough = (n for n in range(must, context + 1) if math.fsum(mass[:n]) >= top_p * math.fsum(mass))
        count = min(count, next(enough))
    return sorted(order[:count])


@pytest.mark.parametrize("top_p", [None, math.inf, 1.0, 0.6, 0.05], ids=str)
@pytest.mark.parametrize("scores", ["distinct", "tied", "unknown", "all unknown"])
def test_selection_follows_the_definition(scores: str, top_p: float | None) -> None:
    sink, recent, channels = 2, 3, 4
    lengths, budgets = [13, 1, 0, 70, 40, 5], [6, 5, 5, 21, 500, 5]
    importance = torch.rand(channels, sum(lengths))
    if scores == "tied":
        importance = (importance * 4).floor() / 4
    if scores == "unknown":
        importance[torch.rand_like(importance) < 0.3] = math.nan
    if scores == "all unknown":
        importance[:] = math.nan
    p = None if top_p is None else torch.full((len(lengths),), top_p, dtype=torch.float64)
    actual = selected(importance, lengths, budgets, sink, recent, p)
    for request, part in enumerate(importance.split(lengths, dim=1)):
        for channel, row in enumerate(part.tolist()):
            expected = selected_by_definition(row, budgets[request], sink, recent, top_p or math.inf)
            assert actual[request][channel] == expected, (request, channel)


def test_selection_by_hand() -> None:
    nan = math.nan
    scores = torch.tensor([[0.9, 0.1, 0.5, nan, 0.3, 0.5, 0.2, 0.0]])
    assert selected(scores, [8], [2], 1, 1) == [[[0, 7]]]
    assert selected(scores, [8], [3], 1, 1) == [[[0, 3, 7]]]  # unknown before any score
    assert selected(scores, [8], [4], 1, 1) == [[[0, 3, 5, 7]]]  # of equals the later
    assert selected(scores, [8], [5], 1, 1) == [[[0, 2, 3, 5, 7]]]
    assert selected(scores, [8], [8], 1, 1) == [[[*range(8)]]]


def test_top_p_and_plain_budgets_share_a_batch() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.25, 0.0] * 2])
    top_p = torch.tensor([0.75, math.inf])
    assert selected(scores, [4, 4], [4, 3], 1, 0, top_p) == [[[0, 2]], [[0, 1, 2]]]


def test_top_p_of_nothing_is_what_must_be_kept() -> None:
    assert selected(torch.zeros(1, 6), [6], [6], 1, 1, torch.tensor([0.9])) == [[[0, 5]]]


def test_top_p_keeps_all_of_a_context_shorter_than_recent() -> None:
    assert selected(torch.tensor([[0.9, 0.1]]), [2], [2], 0, 3, torch.tensor([0.1])) == [[[0, 1]]]


def test_top_p_that_is_a_whole_count_up_to_float_error() -> None:
    top_p = torch.tensor([0.1 + 0.2], dtype=torch.float64)  # 0.30000000000000004
    assert selected(torch.ones(1, 10), [10], [10], 1, 0, top_p) == [[[0, 8, 9]]]


@pytest.mark.parametrize("sink, recent, length", [(3, 3, 4), (10, 0, 4), (0, 10, 4), (2, 2, 4)])
def test_forced_tokens_may_overlap_and_exceed_the_context(sink: int, recent: int, length: int) -> None:
    assert selected(torch.rand(2, length), [length], [length], sink, recent) == [[[*range(length)]] * 2]


def test_selection_of_an_empty_batch() -> None:
    assert selected(torch.empty(3, 0), [], [], 1, 1) == []


@pytest.mark.parametrize(
    "importance, offsets, budgets",
    [
        (torch.rand(5), indptr([5]), torch.tensor([5])),
        (torch.rand(1, 5), indptr([5]), torch.tensor([[5]])),
        (torch.rand(1, 5), indptr([5, 0]), torch.tensor([5])),
        (torch.rand(1, 5), indptr([5]).float(), torch.tensor([5])),
        (torch.rand(1, 5), indptr([5]), torch.tensor([3])),
    ],
    ids=["importance", "budgets", "offsets", "offsets dtype", "budget below sink + recent"],
)
def test_selection_refuses(importance, offsets, budgets) -> None:
    with pytest.raises(ValueError, match="select_tokens: "):
        select_tokens(importance, offsets, budgets, sink=2, recent=2)


def verify_case(group: int, dtype: torch.dtype = torch.float32, bs: int = 3, value_dim: int = 8) -> dict:
    """A tree of 4 tokens per request over 3 channels of different, partly empty, selections."""
    channels, tokens, slots = 3, 4, 200
    lengths = ([5, 0, 17, 1, 9, 30, 0, 0, 2] * bs)[: bs * channels]
    order = torch.randperm(slots)
    tail = order[: bs * tokens].view(bs, tokens)
    chosen = order[bs * tokens :][torch.randint(slots - bs * tokens, (sum(lengths),))]
    used = torch.cat([tail.flatten(), chosen.unique()])
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    return {
        "q": torch.randn(bs, tokens, KV_HEADS * group, HEAD_DIM).to(dtype),
        "k_buffer": pool(slots, used, HEAD_DIM, dtype),
        "v_buffer": pool(slots, used, value_dim, dtype),
        "kv_indptr": indptr(lengths),
        "kv_indices": chosen.int(),
        "head_channels": torch.tensor([2, 0])[:KV_HEADS],
        "tail_slots": tail,
        "tail_mask": mask.repeat(bs, 1, 1),
        "sm_scale": 0.3,
    }


def verify_by_definition(
    q, k_buffer, v_buffer, kv_indptr, kv_indices, head_channels, tail_slots, tail_mask, sm_scale
) -> torch.Tensor:
    bs, tokens, heads, _ = q.shape
    channels, group = (len(kv_indptr) - 1) // bs, heads // k_buffer.shape[1]
    out = torch.zeros(bs, tokens, heads, v_buffer.shape[2], dtype=torch.float64)
    for b in range(bs):
        for head in range(heads):
            kv_head = head // group
            row = b * channels + int(head_channels[kv_head])
            context = kv_indices[kv_indptr[row] : kv_indptr[row + 1]].tolist()
            for t in range(tokens):
                slots = context + [
                    int(s) for s, seen in zip(tail_slots[b], tail_mask[b, t], strict=True) if seen
                ]
                probs = probability(q[b, t, head], k_buffer[:, kv_head], torch.tensor(slots), sm_scale)
                out[b, t, head] = probs @ v_buffer[slots, kv_head].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_verify_is_softmax_over_selection_and_tail(group: int, dtype: torch.dtype) -> None:
    case = verify_case(group, dtype)
    actual = sparse_verify_attention(**case)
    assert actual.dtype == dtype
    assert_close(actual, verify_by_definition(**case))


def test_verify_of_an_empty_batch() -> None:
    case = verify_case(2)
    empty = {
        **case,
        "q": case["q"][:0],
        "kv_indptr": indptr([]),
        "tail_slots": case["tail_slots"][:0],
        "tail_mask": case["tail_mask"][:0],
    }
    assert sparse_verify_attention(**empty).shape == (0, 4, 2 * KV_HEADS, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(3, 4, HEAD_DIM)},
        {"q": torch.zeros(3, 4, 3, HEAD_DIM)},
        {"q": torch.zeros(3, 4, 4, HEAD_DIM + 1)},
        {"k_buffer": torch.zeros(200, HEAD_DIM)},
        {"v_buffer": torch.zeros(199, KV_HEADS, 8)},
        {"kv_indptr": indptr([1] * 10)},
        {"kv_indptr": indptr([1] * 9).float()},
        {"head_channels": torch.zeros(3)},
        {"tail_slots": torch.zeros(3, 5)},
        {"tail_mask": torch.ones(3, 4, 5, dtype=torch.bool)},
        {"tail_mask": torch.ones(4, 4, dtype=torch.bool)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_verify_refuses(change: dict) -> None:
    with pytest.raises(ValueError, match="sparse_verify_attention: "):
        sparse_verify_attention(**{**verify_case(2), **change})


def test_a_needle_at_any_position_is_selected_and_seen() -> None:
    """Slots are permuted, the budget is a tenth: only the needle's own position brings its value in."""
    context, sink, recent, budget = 40, 1, 1, 4
    slots = torch.randperm(context + 1)
    weights, offsets = torch.ones(1, 2), indptr([context])
    for position in range(context):
        k, v = 0.1 * torch.randn(2, context + 1, 1, HEAD_DIM)
        q = torch.randn(1, 2, HEAD_DIM)
        q[0, 1] = q[0, 0]
        needle = slots[position]
        k[needle, 0], v[needle, 0] = 3 * q[0, 0], 7.0

        importance = row_importance(q, k, offsets, slots[:context], weights, 1.0)
        chosen = select_tokens(importance, offsets, torch.tensor([budget]), sink, recent)[1]
        assert position in chosen and len(chosen) == budget

        def verify(positions: torch.Tensor, q=q, k=k, v=v) -> torch.Tensor:
            tail, mask = slots[context:].view(1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
            return sparse_verify_attention(
                q[None], k, v, indptr([len(positions)]), slots[positions], torch.tensor([0]), tail, mask, 1.0
            )

        torch.testing.assert_close(verify(chosen), torch.full((1, 1, 2, HEAD_DIM), 7.0), rtol=0, atol=0.05)
        assert verify(chosen[chosen != position]).max() < 1
