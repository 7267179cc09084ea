"""Buffers of a round follow the KV pool, are counted before it is sized, and stay small beside it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig

from sts_sglang.backends import dense
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core import block_attention, prefill, sketches
from sts_sglang.core import sizes as memory
from sts_sglang.core.channels import Channels
from sts_sglang.core.round import Cache, Draft, RoundState
from sts_sglang.core.selectors import compare as selectors
from sts_sglang.core.verifier import TargetShape
from sts_sglang.headmap import HeadCounts, ModelPaths, of_config, proportional
from sts_sglang.host import bind, reserve, serves
from sts_sglang.host.bind import _simulated, check_graphs
from sts_sglang.tools.demo import MODELS

TARGET, DRAFT = HeadCounts(32, 32, 8), HeadCounts(16, 32, 8)  # Llama 8B and 1B
KV_BYTES = 32 * 8 * 128 * 2 * 2 + 16 * 8 * 64 * 2 * 2


def share(draft: HeadCounts, kv_bytes: int, requests: int, **config) -> float:
    """Bytes of a round's buffers, by those of a KV pool of 60 GB."""
    config, capacity = StsConfig(**config), memory.Capacity.of(requests, 131072)
    stored = memory.scratch_bytes(capacity.context, draft.kv_heads, 2 * draft.q_heads // draft.kv_heads)
    scratch = min(requests * stored, memory.SCRATCH)
    return (capacity.nbytes(config, proportional(TARGET, draft)) + scratch) / (60 << 30)


def test_what_an_8b_pair_pays_for_contexts_of_131072():
    """Whatever they share: with an EAGLE-3 head about 1 %, with a draft of 16 layers by the requests."""
    head = HeadCounts(1, 32, 8)
    assert share(head, KV_BYTES, 16) < 0.01 and share(head, KV_BYTES, 64) < 0.015
    assert share(DRAFT, KV_BYTES, 16) < 0.02 and share(DRAFT, KV_BYTES, 48) < 0.05


@pytest.mark.parametrize("gigabytes", [60, 30, 4, 1])
@pytest.mark.parametrize("requests", [48, 1024])
def test_pool_and_buffers_fit_what_was_there(gigabytes: int, requests: int):
    """Also where the pool holds less than a context may have: buffers then grow with it, in blocks."""
    config, head_map, available = StsConfig(), proportional(TARGET, DRAFT), gigabytes << 30

    def buffers(context: int) -> int:
        return memory.Capacity.of(requests, context).nbytes(config, head_map)

    left = memory.reserve(available, KV_BYTES, 131072, lambda context: memory.Need(buffers(context), 10))
    pool = (available - left) // KV_BYTES
    taken = pool * (KV_BYTES + 10) + buffers(min(pool, 131072))
    assert taken <= available
    assert taken > 0.98 * available or buffers(pool + 64) - buffers(pool) > 0.01 * available


def test_a_launch_whose_buffers_leave_nothing_for_kv_is_refused(monkeypatch, model):
    monkeypatch.setattr(serves, "draft_config", lambda *_: model(DRAFT, 64))
    args = server_args()
    args.max_running_requests = 4096
    with pytest.raises(ConfigError, match="--max-running-requests: .* none is left for KV; allowed: fewer"):
        reserve.reserved_bytes(StsConfig(), args, model(TARGET, 128), 64 << 20)


@pytest.mark.parametrize(
    "config, kv",
    [
        ({}, "auto"),
        ({"budget": 8192}, "auto"),
        ({"budget": 16384, "draft": "all"}, "auto"),
        ({"draft": "steps", "draft_refresh": 4}, "auto"),
        ({"history": "blend"}, "auto"),
        ({"history": "blend"}, "fp8_e4m3"),  # as many slots again remember
        ({"policy": "fixed", "budget": 4096}, "auto"),
    ],
)
def test_what_is_allocated_is_reserved(monkeypatch, model, config, kv):
    """And what updating memory notes, and what draft attention keeps of a layer's step."""
    config, args = StsConfig(**config), server_args(kv=kv)
    monkeypatch.setattr(serves, "draft_config", lambda *_: model(DRAFT, 64, 131072))
    available = 60 << 30
    reserved = reserve.reserved_bytes(config, args, model(TARGET, 128, 131072), available)
    kv_bytes = KV_BYTES if kv == "auto" else KV_BYTES // 2
    pool, requests = (available - reserved) // kv_bytes, args.max_running_requests + 1
    head_map = proportional(TARGET, DRAFT)
    capacity = memory.Capacity.of(requests, min(131072 + 4 + 4, pool))
    table = torch.zeros(requests, 1, device="meta")
    cache, draft = Cache(table, pool + 1, capacity), Draft(3, 1, 32, 8, 64, torch.bfloat16, None, ())
    state = RoundState(config, head_map, Channels.of(head_map, "meta"), cache, draft, "meta", torch.float16)
    taken = sum(state.nbytes().values())
    shared = 4 * requests * capacity.context if config.history != "off" else 0  # who holds a slot too
    stored = state.at_once * memory.scratch_bytes(capacity.context, DRAFT.kv_heads, 2 * 4)
    assert stored <= memory.SCRATCH
    assert 0.97 * reserved < taken + shared + stored <= reserved


def test_what_a_packaged_map_takes_is_reserved(monkeypatch, model):
    """More channels than the proportional one has, and heads that keep more than their share."""
    paths = ModelPaths(str(MODELS / "target"), str(MODELS / "draft"))
    target, draft = (
        HeadCounts(c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"])
        for c in (json.loads((Path(path) / "config.json").read_text()) for path in paths[:2])
    )
    monkeypatch.setattr(serves, "draft_config", lambda *_: model(draft, 32, 131072))
    args, available = server_args(), 60 << 30

    def reserved() -> int:
        return reserve.reserved_bytes(StsConfig(), args, model(target, 32, 131072), available)

    unknown = reserved()
    args.model_path, args.speculative_draft_model_path = paths[:2]
    head_map = of_config(StsConfig(), target, draft, paths)
    assert head_map.origin == "packaged standalone.json"
    capacity = memory.Capacity.of(args.max_running_requests + 1, 131072 + 4 + 4)
    more = capacity.nbytes(StsConfig(), head_map) - capacity.nbytes(StsConfig(), proportional(target, draft))
    assert reserved() - unknown == pytest.approx(more, rel=0.01) and more > 0


def test_a_draft_that_is_kept_in_more_bytes_than_the_target_is_reserved(monkeypatch, model):
    """SGLang counts its pool in the target's bytes: what it has above them, of every token of the pool."""
    monkeypatch.setattr(serves, "draft_config", lambda *_: model(DRAFT, 64))
    args, available = server_args(kv="fp8_e4m3"), 60 << 30
    target = model(TARGET, 128)
    own, alike = (
        reserve.reserved_bytes(StsConfig(draft_kv=kept), args, target, available)
        for kept in ("model", "auto")
    )
    above = DRAFT.layers * DRAFT.kv_heads * 2 * 64
    assert own - alike == pytest.approx((available - own) // (KV_BYTES // 2) * above, rel=0.01)


@pytest.mark.parametrize("told, kv, itemsize", [(False, "auto", 2), (True, "auto", 2), (True, "fp8_e4m3", 1)])
def test_what_a_target_alone_allocates_is_reserved(monkeypatch, model, tmp_path, told, kv, itemsize):
    """Sketches by the pool, page scores and lists by requests and contexts."""
    monkeypatch.setattr(serves, "draft_config", lambda *_: None)
    config = StsConfig(selector="pages", inspect_dir=str(tmp_path) if told else None)
    args, available, per_token = server_args(kv=kv), 60 << 30, 32 * 8 * 128 * 2 * itemsize
    args.speculative_eagle_topk = args.speculative_num_draft_tokens = None
    reserved = reserve.reserved_bytes(config, args, model(TARGET, 128, 131072), available)
    pool, requests = (available - reserved) // per_token, args.max_running_requests + 1
    table = torch.zeros(requests, 131072 + 4, device="meta", dtype=torch.int32)
    cache = Cache(table, pool + 1, memory.Capacity.of(requests, 131072 + 4 + 1))
    shape = TargetShape(1, *TARGET, 128, torch.bfloat16, torch.bfloat16, 131072, requests, 0, pool + 1)
    runtime = bind.assemble(config, TARGET, None, cache, None, "meta", shape=shape)
    taken = runtime.nbytes()
    assert taken["sketches"] == pytest.approx(pool * per_token / (8 * itemsize), rel=0.01)
    logits = 4 * 4 * 8 * requests * (131072 // 16)  # of a layer's queries, as long as its kernels run
    assert 0.97 * reserved < sum(taken.values()) + logits + sketches.SCRATCH <= reserved


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
            hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        )

    return make


def server_args(graphs: int = 0, kv: str = "auto") -> SimpleNamespace:
    decode = PhaseConfig(backend="full" if graphs else "disabled", bs=[graphs] if graphs else None)
    return SimpleNamespace(
        tp_size=1,
        model_path="/nowhere",
        revision=None,
        speculative_draft_model_path=None,
        speculative_draft_model_revision=None,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=4,
        max_running_requests=64,
        chunked_prefill_size=8192,
        max_prefill_tokens=16384,
        kv_cache_dtype=kv,
        speculative_draft_kv_cache_dtype=None,
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
    # A list has twice the least, or a quarter of the longest context.
    assert reserved(4096) - reserved(1024) > 0.95 * 64 * (8192 - 2048) * channels * 4


def test_what_another_selector_takes_is_reserved(monkeypatch, model):
    """Its scores and lists of every request, and the layer it scores: of one long context at least."""
    monkeypatch.setattr(serves, "draft_config", lambda *_: model(DRAFT, 64))
    args = server_args()

    def reserved(selector: str, context: int) -> int:
        target = model(TARGET, 128, context)
        return reserve.reserved_bytes(StsConfig(selector=selector, keep=0.1), args, target, 60 << 30)

    growth = [reserved("quest", context) - reserved("draft", context) for context in (8192, 131072)]
    scoring = selectors.request_bytes(131072, 8, 128, 2, 16)
    assert growth[0] > selectors.SCRATCH
    own = 64 * (131072 - 8192) * 3 * 8  # a score of 2 bytes, and an entry of 4 for every fourth token
    assert growth[1] - growth[0] == pytest.approx(own + scoring - selectors.SCRATCH, rel=0.01)


def test_what_a_sparse_prefill_takes_is_reserved(monkeypatch, model):
    monkeypatch.setattr(serves, "draft_config", lambda *_: None)
    reserved = [
        reserve.reserved_bytes(StsConfig(**config), server_args(), model(TARGET, 128), 60 << 30)
        for config in ({}, {"prefill": "sparse", "prefill_attend": "ops"}, {"prefill": "sparse"})
    ]
    assert reserved[1] - reserved[0] == pytest.approx(prefill.SCRATCH, rel=0.01)
    assert reserved[2] - reserved[1] == pytest.approx(block_attention.SCRATCH, rel=0.01)


@pytest.mark.parametrize("chunk", [2048, -1])
def test_what_a_draft_says_of_a_prompt_is_reserved(monkeypatch, model, chunk):
    """Of all layers at once, and of a whole prompt where none is cut."""
    monkeypatch.setattr(serves, "draft_config", lambda *_: model(DRAFT, 64))
    args, context = server_args(), 32768
    args.chunked_prefill_size = chunk
    reserved = [
        reserve.reserved_bytes(
            StsConfig(prefill="sparse", prefill_by=by), args, model(TARGET, 128, context), 60 << 30
        )
        for by in ("target", "draft")
    ]
    blocks = 2 * 64 + (chunk if chunk > 0 else 16384 + context) // 128
    lists = 4 * blocks * len(proportional(TARGET, DRAFT).channels) * context // 128
    assert reserved[1] - reserved[0] == pytest.approx(lists, rel=0.02)


def test_counts_of_rows_in_parts_are_reserved(monkeypatch, model):
    """Of every channel and request, where they are more than what scores need before them."""
    monkeypatch.setattr(serves, "draft_config", lambda *_: model(DRAFT, 64))
    rows = []
    monkeypatch.setattr(reserve, "part_bytes", lambda number: rows.append(number) or 8 << 30)
    found = reserve.reserved_bytes(StsConfig(), server_args(), model(TARGET, 128, 32768), 60 << 30)
    assert found > 8 << 30
    assert set(rows) == {(server_args().max_running_requests + 1) * len(proportional(TARGET, DRAFT).channels)}


def test_the_state_allocates_what_was_counted():
    config = StsConfig(budget=0, keep=0.1)
    head_map = proportional(HeadCounts(4, 4, 2), HeadCounts(2, 4, 2))
    capacity, channels = memory.Capacity.of(5, 1000), len(head_map.channels)
    cache = Cache(torch.zeros(5, 1), 1001, capacity)
    draft = Draft(3, 1, 4, 2, 8, torch.float32, None, ())
    state = RoundState(config, head_map, Channels.of(head_map, "cpu"), cache, draft, "cpu", torch.float16)
    assert state.importance.shape == (channels, 5 * 1024)  # whole blocks of 64
    assert state.indices.numel() == 5 * channels * 256
    bytes_ = state.importance.nbytes + state.indices.nbytes
    assert bytes_ == capacity.nbytes(config, head_map)


@pytest.mark.parametrize(
    "config, device, dtype, capability, fp8, expected",
    [
        ({}, "cpu", "torch.bfloat16", None, False, "torch"),
        ({}, "cuda", "torch.bfloat16", (9, 0), False, "fa3"),
        ({}, "cuda", "torch.bfloat16", (9, 0), True, "fa3"),
        ({}, "cuda", "torch.bfloat16", (8, 0), False, "fa3"),
        ({}, "cuda", "torch.bfloat16", (8, 9), True, "flashinfer"),
        ({}, "cuda", "torch.bfloat16", (10, 0), False, "flashinfer"),
        ({}, "cuda", "torch.float32", (9, 0), False, "torch"),
        ({"kernel": "torch"}, "cuda", "torch.bfloat16", (9, 0), True, "torch"),
        ({"dense": "flashinfer"}, "cuda", "torch.bfloat16", (9, 0), False, "flashinfer"),
    ],
)
def test_dense_backend_of_a_device(config, device, dtype, capability, fp8, expected):
    assert dense.choose(StsConfig(**config), device, dtype, capability, fp8=fp8) == expected


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
