"""A tiny model of every architecture that is served, and of some that nobody has seen run: configurations,
for random weights (tests/random_weights.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sts_sglang import checkpoints
from sts_sglang.tools import tiny_pair

LAYERS = 4  # an EAGLE-3 head reads three of them
COMMON = {
    "vocab_size": tiny_pair.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": tiny_pair.CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "dtype": "float32",
    "torch_dtype": "float32",
}
ALL_HEADS = {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
OWN_LAYER = {"num_nextn_predict_layers": 1}  # for the next token but one
SHARED = {**EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1}
GLM = {
    **SHARED,
    **OWN_LAYER,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
}
GPT = {"n_embd": 64, "n_head": 4, "n_layer": LAYERS, "n_positions": 8192, "n_inner": 128, **ALL_HEADS}
BAILING = {
    **SHARED,
    "use_qkv_bias": False,
    "use_bias": False,
    "embedding_dropout": 0.0,
    "norm_head": False,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
MUP = {"mup_scale_factor": 2.0, "input_mult": 1.0, "output_mult": 1.0, "use_mup": True}

# Name -> (the model's type, what its configuration has besides, or instead).
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "ApertusForCausalLM": ("apertus", {"hidden_act": "xielu"}),
    "ArceeForCausalLM": ("arcee", {"hidden_act": "relu2"}),
    "BailingMoEForCausalLM": ("bailing_moe", BAILING),
    "BailingMoeForCausalLM": ("bailing_moe", BAILING),
    "BailingMoeV2ForCausalLM": (
        "bailing_moe_v2",
        {**BAILING, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    ),
    "ChatGLMModel": (
        "chatglm",
        {
            "num_layers": LAYERS,
            "padded_vocab_size": tiny_pair.VOCAB,
            "ffn_hidden_size": 128,
            "kv_channels": 16,
            "seq_length": tiny_pair.CONTEXT,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "add_qkv_bias": True,
        },
    ),
    "CohereForCausalLM": ("cohere", {"use_qk_norm": True, "logit_scale": 0.25, "layer_norm_eps": 1e-5}),
    "Ernie4_5_ForCausalLM": ("ernie4_5", {"use_bias": False}),
    "Ernie4_5_MoeForCausalLM": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
            "use_bias": False,
            **OWN_LAYER,
        },
    ),
    "ExaoneForCausalLM": (
        "exaone",
        {"num_layers": LAYERS, "activation_function": "silu", "layer_norm_epsilon": 1e-5},
    ),
    "GPT2LMHeadModel": ("gpt2", GPT),
    "GPTBigCodeForCausalLM": ("gpt_bigcode", {**GPT, "multi_query": True}),
    "GPTJForCausalLM": ("gptj", {**GPT, "rotary_dim": 16}),
    "GemmaForCausalLM": (
        "gemma",
        {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "Glm4ForCausalLM": ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "Glm4MoeForCausalLM": ("glm4_moe", GLM),
    "GraniteForCausalLM": (
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "GraniteMoeForCausalLM": (
        "granitemoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "GraniteMoeSharedForCausalLM": (
        "granitemoeshared",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "HYV3ForCausalLM": ("hy_v3", {**SHARED, "use_qk_norm": True, "route_norm": True}),
    "IQuestCoderForCausalLM": ("iquestcoder", {}),
    "InternLM2ForCausalLM": ("internlm2", {"bias": False}),
    "InternLM3ForCausalLM": ("internlm3", {"bias": False, "qkv_bias": False}),
    "MiMoForCausalLM": ("mimo", {"attention_bias": True, **OWN_LAYER}),
    "MiniCPMForCausalLM": ("minicpm", {"scale_emb": 2.0, "scale_depth": 1.4, "dim_model_base": 32}),
    "MiniMaxM2ForCausalLM": (
        "minimax_m2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "use_routing_bias": True,
            "scoring_func": "sigmoid",
            "rotary_dim": 8,
        },
    ),
    "Ministral3ForCausalLM": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16384,
            }
        },
    ),
    "MixtralForCausalLM": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "OPTForCausalLM": (
        "opt",
        {
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "do_layer_norm_before": True,
            "activation_function": "relu",
            **ALL_HEADS,
        },
    ),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "OlmoForCausalLM": ("olmo", {"clip_qkv": None, **ALL_HEADS}),
    "OlmoeForCausalLM": ("olmoe", {**EXPERTS, **ALL_HEADS, "intermediate_size": 32}),
    "OrionForCausalLM": ("orion", {}),
    "PersimmonForCausalLM": ("persimmon", {"hidden_act": "relu2", "partial_rotary_factor": 0.5, **ALL_HEADS}),
    "Phi3ForCausalLM": ("phi3", {"sliding_window": None}),
    "PhiForCausalLM": ("phi", {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, **ALL_HEADS}),
    "PhiMoEForCausalLM": (
        "phimoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": None},
    ),
    "QWenLMHeadModel": ("qwen", {"layer_norm_epsilon": 1e-5, "intermediate_size": 256, **ALL_HEADS}),
    "QuantMixtralForCausalLM": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Qwen2MoeForCausalLM": (
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
    ),
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"sliding_window": None}),
    "Qwen2ForCausalLM": ("qwen2", {"use_sliding_window": False}),
    "Qwen3ForCausalLM": ("qwen3", {"use_sliding_window": False}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 1, "use_sliding_window": False}),
    "SarvamMoEForCausalLM": ("sarvam_moe", {**BAILING, "use_qk_norm": True, "n_group": 1, "topk_group": 1}),
    "StableLmForCausalLM": (
        "stablelm",
        {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "use_qkv_bias": True},
    ),
    "Starcoder2ForCausalLM": (
        "starcoder2",
        {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "sliding_window": None, "use_bias": True},
    ),
    "TeleFLMForCausalLM": ("teleflm", MUP),
    "TorchNativeLlamaForCausalLM": ("llama", {}),
    "TorchNativePhi3ForCausalLM": ("phi3", {"sliding_window": None}),
    "XverseForCausalLM": ("xverse", {**ALL_HEADS}),
    "DbrxForCausalLM": (
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": LAYERS,
            "max_seq_len": tiny_pair.CONTEXT,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "DeepseekForCausalLM": (
        "deepseek",
        {
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
        },
    ),
    "HunYuanDenseV1ForCausalLM": ("hunyuan_v1_dense", {"use_qk_norm": True}),
    "HunYuanMoEV1ForCausalLM": (
        "hunyuan_v1_moe",
        {
            "use_qk_norm": True,
            "num_experts": 4,
            "moe_topk": 2,
            "num_shared_expert": 1,
            "moe_intermediate_size": 32,
            "use_mixed_mlp_moe": True,
        },
    ),
    "XverseMoeForCausalLM": (
        "xverse",
        {**ALL_HEADS, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1, "intermediate_size": 32},
    ),
}
# Types that transformers does not know: such checkpoints bring a class along, and so do these.
REMOTE = {
    *(
        "bailing_moe",
        "bailing_moe_v2",
        "deepseek",
        "internlm2",
        "internlm3",
        "iquestcoder",
        "mimo",
        "minicpm",
    ),
    *("orion", "qwen", "sarvam_moe", "teleflm", "xverse"),
}
_CLASS = """from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "{}"
"""


WIDE = 4  # times as many dimensions: heads of 64
# Fields that count dimensions.
WIDTHS = {
    *("hidden_size", "intermediate_size", "head_dim", "moe_intermediate_size", "rotary_dim", "kv_channels"),
    *("n_embd", "n_inner", "ffn_hidden_size", "ffn_dim", "word_embed_proj_dim", "d_model", "dim_model_base"),
    *("shared_intermediate_size", "shared_expert_intermediate_size"),
}
CHOSEN = {"num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k"}  # fields that count a token's experts


def make(folder: Path, name: str, change: dict[str, Any] | None = None, wide: bool = False) -> Path:
    """Its configuration and tokenizer in a folder below this one. change: fields that are otherwise.

    wide: for a GPU, where SGLang has no rotary kernel for heads of 16 dimensions. A token goes to all
    experts: to choose among them is to decide near ties, which half precision does by chance.
    """
    model_type, own = TINY[name]
    config = {"architectures": [name], "model_type": model_type, **COMMON, **own, **(change or {})}
    if wide:
        config = _widened(config)
    if model_type in REMOTE:
        config["auto_map"] = {"AutoConfig": "configuration_tiny.TinyConfig"}
    path = write(folder / name, config)
    (path / "configuration_tiny.py").write_text(_CLASS.format(model_type))
    return path


def _widened(config: dict[str, Any]) -> dict[str, Any]:
    changed = {key: _widened(value) for key, value in config.items() if isinstance(value, dict)}
    changed |= {key: WIDE * config[key] for key in WIDTHS & config.keys()}
    return {**config, **changed, **dict.fromkeys(CHOSEN & config.keys(), 4)}


_MLP = ("gate_proj", "up_proj", "down_proj")
_ROUTED = tuple(f"experts.{i}.{name}" for i in range(4) for name in _MLP)
_SHARED = tuple(f"shared_experts.{name}" for name in _MLP)
# Of a model's own layer for the next token but one: its MLP's matrices, and its vectors, in its block.
_BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
_QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_OF_BLOCK: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Ernie4_5_MoeForCausalLM": (_MLP, ()),
    "Glm4MoeForCausalLM": (("gate", *_ROUTED, *_SHARED), (*_QK_NORMS, "mlp.gate.e_score_correction_bias")),
    "HYV3ForCausalLM": (
        ("router.gate", *_ROUTED, *(f"shared_mlp.{name}" for name in _MLP)),
        (*_QK_NORMS, "mlp.expert_bias"),
    ),
    "MiMoForCausalLM": (_MLP, _BIASES),
    "Qwen3MoeForCausalLM": (("gate", *_ROUTED), _QK_NORMS),
}


def own_layer(folder: Path, name: str, change: dict[str, Any] | None = None, wide: bool = False) -> Path:
    """A checkpoint of its own layer for the next token but one alone, in a folder below this one. change,
    wide: as in make."""
    path = make(folder, name, change, wide)
    config = json.loads((path / "config.json").read_text())
    layer = checkpoints.OWN_LAYERS[name]
    shapes = dict(checkpoints._of_own_layer(config, layer))
    block, (matrices, vectors) = layer.block.format(n=LAYERS), _OF_BLOCK[name]
    hidden, dim = config["hidden_size"], config["head_dim"]
    for matrix in matrices:
        routed = "experts." in matrix or "shared_mlp." in matrix
        inner = config["moe_intermediate_size" if routed else "intermediate_size"]
        rows = 4 if matrix.endswith("gate") else inner
        shape = (hidden, inner) if matrix.endswith("down_proj") else (rows, hidden)
        shapes[f"{block}.mlp.{matrix}.weight"] = shape
    sizes = {"norm.weight": dim, "q_proj.bias": 4 * dim, "k_proj.bias": 2 * dim, "v_proj.bias": 2 * dim}
    for vector in vectors:
        shapes[f"{block}.{vector}"] = (next((n for end, n in sizes.items() if vector.endswith(end)), 4),)
    generator, scale = torch.Generator().manual_seed(0), 12.8 / hidden
    tensors = {
        key: scale * torch.randn(shape, generator=generator) + (len(shape) == 1 and "weight" in key)
        for key, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    return path


def write(path: Path, config: dict[str, Any]) -> Path:
    """A folder with a configuration and the tokenizer of the tiny pair."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    tiny_pair._write_tokenizer(path)
    return path
