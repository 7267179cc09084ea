"""On a GPU: FP8 keys and values with a checkpoint's scales (tests/test_gpu.py has them without), and
quantized weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.dummy_models import COMMON
from sts_sglang.tools.demo import MODELS
from sts_sglang.tools.local_server import LocalServer
from tests.server import random_ids
from tests.test_fp8 import with_scales
from tests.test_gpu import CHAIN, SPARSE, ask_all, assert_ties_alone, was_sparse
from tests.tolerances import NEAR_TIES

pytestmark = [pytest.mark.gpu, pytest.mark.server]

FP8 = ("--kv-cache-dtype", "fp8_e4m3")
SIZES = ("--context-length", "8192", "--max-total-tokens", "40000", "--max-running-requests", "8")
SIZES += ("--cuda-graph-max-bs", "8", "--mem-fraction-static", "0.6", "--skip-server-warmup")
SIZES += ("--cuda-graph-backend-prefill", "disabled", "--random-seed", "0")


def sts(draft: Path, **config) -> list[str]:
    args = ["--attention-backend", "sts", "--sts-config", json.dumps({**SPARSE, **config})]
    return [
        *args,
        "--speculative-algorithm",
        "STANDALONE",
        "--speculative-draft-model-path",
        str(draft),
        *CHAIN,
    ]


# ---- scales of FP8 KV


@pytest.mark.parametrize(
    "config",
    [
        {"dense_layers": [1]},
        {"draft": "dense", "dense": "flashinfer"},
        {"kernel": "flashinfer"},
        {"selector": "pages"},
    ],
    ids=str,
)
def test_scales_of_a_checkpoint_are_stocks_but_for_near_ties(tmp_path, config):
    """No powers of two, and others in the draft: at full budget FA3 and sts read the same keys."""
    target = with_scales(MODELS / "target", tmp_path / "target", 0.21, 0.11)
    draft = with_scales(MODELS / "draft", tmp_path / "draft", 0.3, 0.17)
    prompts = [random_ids(n, n) for n in (40, 700, 5000)]
    with LocalServer(target, tmp_path / "stock.log", *SIZES, *FP8, "--attention-backend", "fa3") as server:
        stock = ask_all(server, prompts)
    own = sts(draft, **config)
    with LocalServer(target, tmp_path / "sts.log", *SIZES, *FP8, *own, start_seconds=300) as server:
        before, whole = server.counters(), {"custom_params": {"sts": {"keep": 1.0}}}
        assert_ties_alone(server, prompts, stock, NEAR_TIES[torch.float8_e4m3fn], **whole)
        assert was_sparse(server, before) == 1.0
        before = server.counters()
        ask_all(server, prompts[1:])
        assert was_sparse(server, before) < 0.6


# ---- quantized weights

LINEAR = {"targets": ["Linear"], "output_activations": None}
EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}
# What SGLang compiles at its first use takes minutes: Marlin's product, the same for AWQ and GPTQ
# (sglang.jit_kernel). For FP8 in blocks it would compile DeepGEMM for every number of rows.
COMPILE_SECONDS = 900
OWN_FLAGS = {"fp8": ("--fp8-gemm-backend", "triton")}
# As their tools write them into config.json.
QUANTIZED = {
    "fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                **LINEAR,
                "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
                "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
            }
        },
    },
}


def small(folder: Path, layers: int, **more) -> Path:
    """A Llama of 1,024 dimensions, without weights."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4096}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**COMMON, **sizes, **heads, **tokens, **more}))
    return folder


@pytest.mark.parametrize(
    "name, kv", [*((name, ()) for name in QUANTIZED), ("compressed-tensors", FP8)], ids=str
)
def test_a_target_of_quantized_weights_is_verified_sparsely(tmp_path, name, kv):
    """Its draft is not quantized. Dummy weights: what is seen is that everything runs, and stays finite."""
    target = small(tmp_path / "target", 4, quantization_config=QUANTIZED[name])
    draft = small(tmp_path / "draft", 2)
    args = [*SIZES, *kv, "--load-format", "dummy", "--dtype", "bfloat16", "--skip-tokenizer-init"]
    args += [*OWN_FLAGS.get(name, ()), *sts(draft)]
    prompts = [random_ids(n, n) for n in (40, 700, 3000)]
    with LocalServer(target, tmp_path / "sts.log", *args, start_seconds=COMPILE_SECONDS) as server:
        before = server.counters()
        answers = ask_all(server, prompts)
        assert was_sparse(server, before) < 0.5
    for answer in answers:
        assert len(answer["output_ids"]) == 48
        found = [best[0] for best, _ in answer["meta_info"]["output_top_logprobs"]]
        assert all(math.isfinite(logprob) for logprob in found) and len(found) == 48
