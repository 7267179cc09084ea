"""Folders of models that have the shapes of well-known ones and no weights (--load-format dummy)."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

import torch

from sts_kernels.layout import SKETCHED
from sts_sglang import headmap

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
    "qwen3-32b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "qwen3-32b-eagle3": {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 1,
        "num_attention_heads": 64,
        "head_dim": 128,
        "vocab_size": 151936,
        "draft_vocab_size": 32000,
        "tie_word_embeddings": False,
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
QWEN3 = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6}
SHAPES |= {
    # Five query heads a KV head.
    "qwen3-14b": {
        **QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "qwen3-0.6b": {
        **QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-14b-eagle3": {
        **SHAPES["llama-8b-eagle3"],
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_attention_heads": 40,
        "vocab_size": 151936,
    },
}
# What drafts for a target, by algorithm.
DRAFTS = {
    "llama-8b": {"STANDALONE": "llama-1b", "EAGLE3": "llama-8b-eagle3"},
    "qwen3-14b": {"STANDALONE": "qwen3-0.6b", "EAGLE3": "qwen3-14b-eagle3"},
}


def write(name: str, folder: Path) -> Path:
    """The config.json of a shape in `folder`/`name`, which is returned."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**COMMON, **SHAPES[name]}, indent=2))
    return path


def write_tokenizer(model: Path) -> None:
    """One word a token of the model's vocabulary, so that a text of n words has n tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    words = models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**6}
    # A conversation is its messages one behind the other: an answer that is read again has the tokens it had.
    known["chat_template"] = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(known))


@cache
def directions(target: Path, draft: Path | None) -> Path:
    """A head map beside the target with directions drawn at random, which cost what calibrated ones do; with
    a draft it is proportional."""
    own, drafts = counts(target), draft and counts(draft)
    dim = json.loads((target / "config.json").read_text())["head_dim"]
    number, generator = dim // SKETCHED, torch.Generator().manual_seed(0)
    heads = []
    for _ in range(own.layers):
        turned = torch.linalg.qr(torch.randn(own.kv_heads, dim, dim, generator=generator)).Q[..., :number]
        rest = torch.tensor([0.0, 0.5])[:, None].expand(own.kv_heads, 2, number)  # centre and step
        values = torch.cat([turned, rest], 1).half().contiguous()
        heads.append([base64.b64encode(head.numpy().tobytes()).decode() for head in values])
    found = {"version": headmap.MAP_VERSION, "tp": 1, "target": own._asdict(), "draft": None}
    if drafts:
        found |= {"shift": headmap.MAP_SHIFT, "draft": drafts._asdict()}
        found["sources"] = headmap.proportional(own, drafts).sources
    found["directions"] = {"head_dim": dim, "number": number, "heads": heads}
    path = target.parent / f"directions-{draft.name if draft else 'alone'}.json"
    path.write_text(json.dumps(found))
    return path


def counts(model: Path) -> headmap.HeadCounts:
    config = json.loads((model / "config.json").read_text())
    fields = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return headmap.HeadCounts(*(config[field] for field in fields))
