"""Buffers of a round follow the KV pool, are counted before it is sized, and stay small beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig

from sts_sglang.backends import dense
from sts_sglang.config import StsConfig
from sts_sglang.core import sizes as memory
from sts_sglang.core.channels import Channels
from sts_sglang.core.round import Draft, RoundState
from sts_sglang.core.selectors import compare as selectors
from sts_sglang.headmap import HeadCounts, proportional
from sts_sglang.host import reserve, serves
from sts_sglang.host.bind import _simulated, check_graphs

TARGET, DRAFT = HeadCounts(32, 32, 8), HeadCounts(16, 32, 8)  # Llama 8B and 1B
KV_BYTES = 32 * 8 * 128 * 2 * 2 + 16 * 8 * 64 * 2 * 2


@pytest.mark.parametrize("config", [{}, {"keep": 0.25}, {"policy": "fixed", "budget": 4096}])
def test_an_8b_pair_pays_at_most_two_percent(config):
    channels = len(proportional(TARGET, DRAFT).channels)
    state = memory.bytes_per_token(StsConfig(**config), channels, DRAFT.kv_heads, 2 * 4)
    assert 0 < state <= 0.02 * KV_BYTES


def test_pool_and_buffers_fit_what_was_there():
    config, available = StsConfig(), 60 << 30
    channels = len(proportional(TARGET, DRAFT).channels)
    state = memory.bytes_per_token(config, channels, DRAFT.kv_heads, 8)
    pool = (available - memory.reserve(available, KV_BYTES, state)) // KV_BYTES
    sizes = memory.capacity(config, pool, requests=48, context_len=131072)
    taken = pool * KV_BYTES + channels * (2 * sizes.columns + 4 * sizes.indices)
    assert 0.98 * available < taken <= available


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"budget": 8192},
        {"budget": 16384, "draft": "all"},
        {"history": "blend"},
        {"policy": "fixed", "budget": 4096},
    ],
)
def test_what_is_allocated_is_reserved(config):
    """Also the least lists of many short contexts, and what updating memory notes."""
    config, pool, requests = StsConfig(**config), 400_000, 4096
    head_map = proportional(TARGET, DRAFT)
    channels = len(head_map.channels)
    per_token = memory.bytes_per_token(config, channels, DRAFT.kv_heads, 2 * 4)
    reserved = pool * per_token + memory.floor_bytes(config, requests, channels)
    sizes = memory.capacity(config, pool, requests, context_len=131072)
    table = torch.zeros(requests, 1, device="meta")
    draft = Draft(3, 1, 32, 8, 64, torch.bfloat16, None, pool + 1, table, sizes)
    channels = Channels.of(head_map, "meta")
    state = RoundState(config, head_map, channels, draft, "meta", torch.float16)
    taken = state.nbytes()
    carried = taken.pop("carried_rows")
    shared = 4 * sizes.columns if config.history != "off" else 0  # who holds a column's slot too
    stored = 2 * DRAFT.kv_heads * 2 * 4 * sizes.columns  # what draft attention keeps of a layer's step
    assert 0 < carried < 0.02 * pool * KV_BYTES
    assert 0.95 * reserved < sum(taken.values()) + shared + stored <= 1.001 * reserved


@pytest.fixture
def model():
    """Makes what SGLang's ModelConfig says of a model."""

    def make(counts: HeadCounts, dim: int, context_len: int = 8192) -> SimpleNamespace:
        return SimpleNamespace(
            num_hidden_layers=counts.layers,
            num_attention_heads=counts.q_heads,
            head_dim=dim,
            dtype=torch.bfloat16,
            context_len=context_len,
            get_total_num_kv_heads=lambda: counts.kv_heads,
        )

    return make


def server_args(graphs: int = 0) -> SimpleNamespace:
    decode = PhaseConfig(backend="full" if graphs else "disabled", bs=[graphs] if graphs else None)
    return SimpleNamespace(
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=4,
        max_running_requests=64,
        cuda_graph_config=CudaGraphConfig(decode=decode, prefill=PhaseConfig()),
    )


@pytest.mark.parametrize("kernel", ["triton", "flashinfer"])
def test_the_least_lists_are_reserved_beside_what_a_kernel_needs(monkeypatch, model, kernel):
    """FlashInfer's workspaces come on top of them."""

    monkeypatch.setattr(serves, "draft_config", lambda *_: model(DRAFT, 64))
    args = server_args(graphs=8)

    def reserved(budget: int) -> int:
        config = StsConfig(kernel=kernel, budget=budget)
        return reserve.reserved_bytes(config, args, model(TARGET, 128), 60 << 30)

    channels = len(proportional(TARGET, DRAFT).channels)
    assert reserved(16384) - reserved(1024) > 0.95 * 64 * (16384 - 1024) * channels * 4


def test_what_another_selector_takes_is_reserved(monkeypatch, model):
    """Its scores and lists by the pool's tokens, and the layer it scores: of one long context at least."""
    monkeypatch.setattr(serves, "draft_config", lambda *_: model(DRAFT, 64))
    args = server_args()

    def reserved(selector: str, context: int) -> int:
        target = model(TARGET, 128, context)
        return reserve.reserved_bytes(StsConfig(selector=selector), args, target, 60 << 30)

    growth = [reserved("quest", context) - reserved("draft", context) for context in (8192, 131072)]
    scoring = selectors.request_bytes(131072, 8, 128, 2, 16)
    assert growth[0] > selectors.SCRATCH
    assert growth[1] - growth[0] == pytest.approx(scoring - selectors.SCRATCH, rel=0.01)


def test_the_state_allocates_what_was_counted():
    config = StsConfig(budget=0)
    head_map = proportional(HeadCounts(4, 4, 2), HeadCounts(2, 4, 2))
    sizes = memory.capacity(config, pool_tokens=1000, requests=4, context_len=10_000)
    draft = Draft(3, 1, 4, 2, 8, torch.float32, None, 1001, torch.zeros(5, 1), sizes)
    state = RoundState(config, head_map, Channels.of(head_map, "cpu"), draft, "cpu", torch.float16)
    assert sizes.columns == memory.OVERSUBSCRIBED * 1000
    assert state.importance.shape == (len(head_map.channels), 3008)  # whole blocks of 64
    assert state.indices.numel() == len(head_map.channels) * sizes.indices


def test_few_short_requests_need_no_more_than_they_can_have():
    assert memory.capacity(StsConfig(), 1_000_000, requests=2, context_len=500).columns == 1000
    fixed = StsConfig(policy="fixed", budget=100)
    assert memory.capacity(fixed, 1_000_000, requests=2, context_len=500).indices == 200


@pytest.mark.parametrize(
    "config, device, dtype, capability, expected",
    [
        ({}, "cpu", "torch.bfloat16", None, "torch"),
        ({}, "cuda", "torch.bfloat16", (9, 0), "fa3"),
        ({}, "cuda", "torch.bfloat16", (8, 0), "fa3"),
        ({}, "cuda", "torch.bfloat16", (10, 0), "flashinfer"),
        ({}, "cuda", "torch.float32", (9, 0), "torch"),
        ({"kernel": "torch"}, "cuda", "torch.bfloat16", (9, 0), "torch"),
        ({"dense": "flashinfer"}, "cuda", "torch.bfloat16", (9, 0), "flashinfer"),
    ],
)
def test_dense_backend_of_a_device(config, device, dtype, capability, expected):
    assert dense.choose(StsConfig(**config), device, dtype, capability) == expected


def test_a_pass_without_its_graph_ends_the_launch():
    everything = {"verify": True, "draft_decode": True, "draft_extend": True}
    assert check_graphs(everything, "FlashAttentionBackend") == everything
    assert check_graphs({}, "FlashAttentionBackend") == {}
    with pytest.raises(RuntimeError, match="draft_extend"):
        check_graphs({**everything, "draft_extend": False}, "FlashAttentionBackend")
    check_graphs({**everything, "draft_extend": False}, "TorchBackend")
    with pytest.raises(RuntimeError, match="verify"):
        check_graphs({**everything, "verify": False}, "TorchBackend")


def test_the_start_up_line_says_that_accepting_is_simulated(monkeypatch):
    monkeypatch.delenv("SGLANG_SIMULATE_ACC_LEN", raising=False)
    assert _simulated() == {}
    monkeypatch.setenv("SGLANG_SIMULATE_ACC_LEN", "3")
    assert _simulated() == {"simulated_accept_length": 3}
