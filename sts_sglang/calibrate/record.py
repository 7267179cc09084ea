"""Runs both models over a text and keeps the attention of a few verify windows.

A *window* is one round as the server sees it: `t` committed tokens, target rows t..t+3, and the draft rows
of tokens t, t+1, t+2 (the last draft token never runs through the draft). It is teacher-forced: the
text's own tokens stand for the draft's proposals.

Memory: attention is computed for the windows' rows only, one window of one layer at a time. Of one text
stay [target layers x KV heads + draft heads, windows, tokens] float32: for Llama-3.1-8B with a 1B draft
(256 + 512 rows), 16 windows and 4,096 tokens, 200 MB.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm

from sts_sglang.config import ConfigError
from sts_sglang.headmap import SHIFT, HeadCounts

VERIFY_ROWS = 4
DRAFT_ROWS = 3
ATTENTION = "sts_calibrate"

Collector = Callable[[int, torch.Tensor, torch.Tensor, float], None]  # layer, q, k [heads, T, D], scaling


@dataclass
class Record:
    """Attention of one text's windows.

    Attributes:
        domain: what the text is a sample of.
        windows: committed lengths t.
        tokens: length of the text.
        mass: per window float32 [layers * KV heads, t], the target's attention to committed positions,
            mean over the verify rows and the query heads of the group.
        scores: per window float32 [draft layers * query heads, t], importance by target position.
    """

    domain: str
    windows: list[int]
    tokens: int
    mass: list[torch.Tensor]
    scores: list[torch.Tensor]


def choose_windows(tokens: int, count: int, least: int, seed: int) -> list[int]:
    """`count` different committed lengths from max(least, tokens / 4), one at random in each equal part.

    Raises:
        ConfigError: the text is too short for that.
    """
    low, high = max(least, tokens // 4), tokens - VERIFY_ROWS
    if high - low < count:
        raise ConfigError(
            f"--text: a text of {tokens} tokens is too short for {count} windows beyond {least} tokens; "
            "allowed: a longer text, or fewer --windows"
        )
    part = (high - low) / count
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [int(low + (i + share) * part) for i, share in enumerate(draw)]


class Pair:
    """A target and its draft, a whole model (STANDALONE) or an EAGLE or EAGLE-3 head: folders or hub names.

    Raises:
        ConfigError: a model that cannot be read or that calibration does not know.
    """

    def __init__(self, target: str, draft: str, device: str = "cpu", dtype: str = "float32"):
        self.device, self.dtype = device, getattr(torch, dtype)
        config = read_config("--draft", draft)
        self.target = _load("--model", target, device, self.dtype)
        if config.get("vocab_size") != self.target.config.vocab_size:
            raise ConfigError(
                f"--draft {draft}: vocabulary of {config.get('vocab_size')}, the target's is "
                f"{self.target.config.vocab_size}; allowed: a draft with the target's tokenizer"
            )
        architecture = (config.get("architectures") or [""])[0]
        self.head = None
        if architecture.endswith(("Eagle", "Eagle3")):
            self.head = EagleHead(draft, config, self.target)
            self.draft_counts = self.head.counts
        else:
            self.draft_model = _load("--draft", draft, device, self.dtype)
            self.draft_counts = head_counts(self.draft_model.config)
        self.target_counts = head_counts(self.target.config)

    @torch.no_grad()
    def record(self, domain: str, tokens: list[int], windows: list[int]) -> Record:
        """Run both models over `tokens` and keep what the windows need; see Record."""
        draft, target = self.draft_counts, self.target_counts
        scores = [torch.zeros(draft.layers, draft.q_heads, t) for t in windows]
        mass = [torch.zeros(target.layers, target.kv_heads, t) for t in windows]

        def score(layer, q, k, scaling):
            for i, t in enumerate(windows):
                rows = _attention(q, k, range(t - SHIFT, t - SHIFT + DRAFT_ROWS), scaling)
                scores[i][layer, :, SHIFT:] = rows[:, :, : t - SHIFT].amax(1).cpu()

        def weigh(layer, q, k, scaling):
            for i, t in enumerate(windows):
                rows = _attention(q, k, range(t, t + VERIFY_ROWS), scaling)[:, :, :t].mean(1)
                mass[i][layer] = rows.view(target.kv_heads, -1, t).mean(1).cpu()

        ids = torch.tensor([tokens], device=self.device)
        hidden = _run(self.target, ids, weigh, hidden=self.head is not None)
        if self.head is None:
            _run(self.draft_model, ids[:, SHIFT:], score)
        else:
            score(0, *self.head(ids[0, SHIFT:], [h[0, :-SHIFT] for h in hidden]))
        return Record(
            domain, windows, len(tokens), [m.flatten(0, 1) for m in mass], [s.flatten(0, 1) for s in scores]
        )


class EagleHead:
    """Queries and keys of a one-layer EAGLE or EAGLE-3 head over (token embedding, target hidden state).

    As SGLang's models/llama_eagle.py and llama_eagle3.py compute them.
    """

    def __init__(self, path: str, config: dict[str, Any], target: Any):
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = {"num_key_value_heads": config["num_attention_heads"], "rms_norm_eps": 1e-6, **config}
        if config["num_hidden_layers"] != 1:
            raise ConfigError(f"--draft: the head has {config['num_hidden_layers']} layers; allowed: 1")
        if config.get("fc_norm") or config.get("use_aux_norm"):
            raise ConfigError("--draft: the head norms its hidden states (fc_norm); allowed: heads without")
        self.config, self.target = config, target
        self.eagle3 = config["architectures"][0].endswith("Eagle3")
        like = target.get_input_embeddings().weight
        self.w = {name: w.to(like) for name, w in _weights(path).items() if w.is_floating_point()}
        self.dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self.rotary = LlamaRotaryEmbedding(LlamaConfig(**config)).to(like.device)
        self.counts = HeadCounts(1, config["num_attention_heads"], config["num_key_value_heads"])

    def __call__(self, tokens: torch.Tensor, hidden: list[torch.Tensor]):
        """(q, k, scaling) from tokens [T] and the target's hidden states, embeddings first, [T, H] each."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        embed = self.target.get_input_embeddings()(tokens)
        if (own := self.w.get("embed_tokens.weight")) is not None:
            embed = own[tokens]
        if self.eagle3:
            prefix = "midlayer" if "midlayer.self_attn.q_proj.weight" in self.w else "layers.0"
            state = self._linear("fc", torch.cat([hidden[i] for i in self._aux(len(hidden) - 1)], -1))
            x = torch.cat(
                [
                    self._norm(f"{prefix}.input_layernorm", embed),
                    self._norm(f"{prefix}.hidden_norm", state),
                ],
                -1,
            )
        else:
            prefix = "layers.0"
            x = self._linear("fc", torch.cat([embed, hidden[-1]], -1))
        q, k = (
            self._linear(f"{prefix}.self_attn.{n}_proj", x).view(len(tokens), -1, self.dim).transpose(0, 1)
            for n in "qk"
        )
        cos, sin = self.rotary(x, torch.arange(len(tokens), device=x.device)[None])
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        return q[0], k[0], self.dim**-0.5

    def _aux(self, layers: int) -> list[int]:
        """Indices into hidden states: SGLang captures before layers [2, n / 2, n - 3] by default."""
        ids = (self.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        chosen = [i + 1 for i in ids] if ids else [2, layers // 2, layers - 3]
        # The last hidden state that transformers returns is normed, which SGLang's is not.
        if not all(0 <= i < layers for i in chosen):
            raise ConfigError(f"--draft: reads the target after layers {ids}; allowed: 0..{layers - 2}")
        return chosen

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.config["rms_norm_eps"])


def head_counts(config: Any) -> HeadCounts:
    """Attention shape of a transformers config."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return HeadCounts(config.num_hidden_layers, config.num_attention_heads, kv_heads)


def _attention(q: torch.Tensor, k: torch.Tensor, rows: range, scaling: float) -> torch.Tensor:
    """Causal attention probabilities float32 [H_q, rows, last row + 1] of q [H_q, T, D], k [H_kv, T, D]."""
    keys = k[:, : rows[-1] + 1].repeat_interleave(q.shape[0] // k.shape[0], 0)
    logits = (q[:, rows[0] : rows[-1] + 1] @ keys.transpose(1, 2)).float() * scaling
    later = torch.arange(rows[-1] + 1, device=q.device) > torch.tensor(list(rows), device=q.device)[:, None]
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def _run(model: Any, ids: torch.Tensor, collect: Collector, hidden: bool = False):
    """The decoder without its output matrix, whose logits would be the largest tensor of all."""
    model.sts_collect[0] = collect
    return model.base_model(ids, use_cache=False, output_hidden_states=hidden).hidden_states


def _load(flag: str, path: str, device: str, dtype: torch.dtype):
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _collecting_attention)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{flag} {path}: {_line(error)}; allowed: a folder or hub name that transformers loads"
        ) from None
    model.sts_collect = [None]
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.sts_collect = model.sts_collect
    return model.eval().to(device)


def _collecting_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention function: plain causal attention of one sequence, shown to the collector."""
    module.sts_collect[0](module.layer_idx, query[0], key[0], scaling)
    group = query.shape[1] // key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(group, 1),
        value.repeat_interleave(group, 1),
        scale=scaling,
        is_causal=True,
    )
    return out.transpose(1, 2).contiguous(), None


def read_config(flag: str, path: str) -> dict[str, Any]:
    """config.json of a folder or of a model in the hub's cache, fetched if need be."""
    from transformers.utils import cached_file

    try:
        return json.loads(Path(cached_file(path, "config.json")).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {path}: {_line(error)}; allowed: a model folder or hub name") from None


def _weights(path: str) -> dict[str, torch.Tensor]:
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"--draft {path}: holds no safetensors files; allowed: a head saved as safetensors")
    weights = {name: w for file in files for name, w in load_file(file).items()}
    return {name.removeprefix("model."): w for name, w in weights.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
