"""A tiny target, draft, EAGLE and EAGLE-3 head from a fixed seed: random weights that serve, not answer.

They exercise every path of the server on a CPU in seconds. The attention projections are scaled up so
that attention is peaked: with the usual initialisation it is nearly uniform and a selection would
hardly change the output.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB = 384  # 256 bytes, 3 special tokens, the rest unused
SPECIAL = ("<s>", "</s>", "<pad>")
CONTEXT = 32768
AUX_LAYERS = [0, 1, 2]  # hidden states the EAGLE-3 head reads; SGLang's defaults collide in 4 layers

_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_pair(folder: str | Path) -> dict[str, Path]:
    """Write `target`, `draft`, `eagle` and `eagle3` below `folder` as bf16 safetensors, unless they exist.

    The draft is the target's first layers with noise, so it is sometimes right.

    Returns:
        name -> model folder.
    """
    paths = {name: Path(folder) / name for name in ("target", "draft", "eagle", "eagle3")}
    if not all((path / "model.safetensors").exists() for path in paths.values()):
        target = _config(layers=4)
        weights = _llama_weights(target, seed=0)
        _write(paths["target"], target, weights)
        draft = _config(layers=2)
        _write(paths["draft"], draft, _noisy_draft(weights, draft, seed=1))
        _write(paths["eagle"], _eagle_config(target), _eagle_weights(target, seed=3))
        _write(paths["eagle3"], _eagle3_config(target), _eagle3_weights(target, weights, seed=2))
    return paths


def _config(layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _eagle_config(target: dict) -> dict:
    return {**target, "architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}


def _eagle3_config(target: dict) -> dict:
    return {
        **target,
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": VOCAB,
        "target_hidden_size": target["hidden_size"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": AUX_LAYERS},
    }


def _llama_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    draw = _Normal(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    embed = draw(VOCAB, hidden, std=1.0)
    weights = {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": torch.ones(hidden),
        # A lean towards "the next id" that every layer count shares, so that drafts are often accepted.
        "lm_head.weight": draw(VOCAB, hidden) + 0.016 * embed.roll(1, 0),
    }
    for i in range(config["num_hidden_layers"]):
        # The draft is the first two layers: the later ones say less, or it would hardly ever be right.
        loud = 1.0 if i < 2 else 0.15
        weights |= {
            f"model.layers.{i}.self_attn.{name}.weight": draw(*shape, std=std)
            for name, shape, std in (
                ("q_proj", (q, hidden), 0.2),
                ("k_proj", (kv, hidden), 0.2),
                ("v_proj", (kv, hidden), 0.1),
                ("o_proj", (hidden, q), 0.1 * loud),
            )
        }
        weights |= {
            f"model.layers.{i}.mlp.gate_proj.weight": draw(inner, hidden),
            f"model.layers.{i}.mlp.up_proj.weight": draw(inner, hidden),
            f"model.layers.{i}.mlp.down_proj.weight": draw(hidden, inner, std=0.05 * loud),
            f"model.layers.{i}.input_layernorm.weight": torch.ones(hidden),
            f"model.layers.{i}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    return weights


def _noisy_draft(target: dict[str, torch.Tensor], config: dict, seed: int) -> dict[str, torch.Tensor]:
    draw = _Normal(seed)
    layers = tuple(f"model.layers.{i}." for i in range(config["num_hidden_layers"]))
    kept = {k: w for k, w in target.items() if not k.startswith("model.layers.") or k.startswith(layers)}
    return {k: w + draw(*w.shape, std=0.003) if w.dim() == 2 else w for k, w in kept.items()}


def _eagle_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """One decoder layer behind fc(token embedding, hidden state); embeddings and lm_head are the target's."""
    hidden = config["hidden_size"]
    layer = _llama_weights({**config, "num_hidden_layers": 1}, seed)
    fc = torch.cat([0.6 * torch.eye(hidden), 0.2 * torch.eye(hidden)], dim=1)
    return {
        "fc.weight": fc + _Normal(seed)(hidden, 2 * hidden, std=0.01),
        "fc.bias": torch.zeros(hidden),
        **{
            k.removeprefix("model."): w
            for k, w in layer.items()
            if k.startswith("model.layers.") and "input_layernorm" not in k
        },
    }


def _eagle3_weights(config: dict, target: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    draw = _Normal(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q = draw(heads * dim, 2 * hidden, std=0.15)
    k = draw(kv_heads * dim, 2 * hidden, std=0.15)
    v = draw(kv_heads * dim, 2 * hidden, std=0.1)
    o = draw(hidden, heads * dim, std=0.05)
    # The first query head of every group looks for its own token and copies its embedding, which is
    # what the lm_head's lean towards the next id needs: random heads would hardly ever be accepted.
    for kv in range(kv_heads):
        rows = slice(kv * dim, (kv + 1) * dim)
        head = kv * heads // kv_heads
        copier = slice(head * dim, (head + 1) * dim)
        q[copier] = k[rows]
        v[rows] = 0
        v[rows, rows] = torch.eye(dim)
        o[:, copier] = 0
        o[rows, copier] = 4 * torch.eye(dim)
    return {
        "fc.weight": draw(hidden, 3 * hidden, std=0.02),
        "norm.weight": torch.ones(hidden),
        "lm_head.weight": target["lm_head.weight"],
        "midlayer.self_attn.q_proj.weight": q,
        "midlayer.self_attn.k_proj.weight": k,
        "midlayer.self_attn.v_proj.weight": v,
        "midlayer.self_attn.o_proj.weight": o,
        "midlayer.mlp.gate_proj.weight": draw(inner, hidden),
        "midlayer.mlp.up_proj.weight": draw(inner, hidden),
        "midlayer.mlp.down_proj.weight": draw(hidden, inner, std=0.01),
        "midlayer.hidden_norm.weight": torch.ones(hidden),
        "midlayer.input_layernorm.weight": torch.ones(hidden),
        "midlayer.post_attention_layernorm.weight": torch.ones(hidden),
        "d2t": torch.zeros(VOCAB, dtype=torch.int64),
        "t2d": torch.ones(VOCAB, dtype=torch.bool),
    }


class _Normal:
    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 0.05) -> torch.Tensor:
        return std * torch.randn(*shape, generator=self._generator)


def _write(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)
    # Weights last: their presence marks a complete folder.
    stored = {k: w.bfloat16().contiguous() if w.is_floating_point() else w for k, w in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> None:
    """One token a byte, so that every text has a known length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)
