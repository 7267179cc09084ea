"""Folders of models that have the shapes of well-known ones and no weights (--load-format dummy)."""

from __future__ import annotations

import json
from pathlib import Path

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # Without weights there is no map of its vocabulary: what it drafts are tokens of the target's.
    "llama-8b-eagle3": {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 1,
        "head_dim": 128,
        "draft_vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}


def write(name: str, folder: Path) -> Path:
    """The config.json of a shape in `folder`/`name`, which is returned."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**COMMON, **SHAPES[name]}, indent=2))
    return path
