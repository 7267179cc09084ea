"""Llama in plain PyTorch. Parameters carry Hugging Face names, so state_dict() is the checkpoint.

Compute runs in bf16 (without a GPU in float32) on master weights of any type. Everything but attention sees
the tokens as one flat axis of a constant size, so one compilation serves every sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

COMPUTE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # bf16 is slow on most CPUs
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Config:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 2048
    head_dim: int = 64
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40960
    rms_norm_eps: float = 1e-5


TARGET = Config(256, 8, 4, 2, 768)
DRAFT = Config(128, 4, 4, 2, 320)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(COMPUTE) * weight.to(COMPUTE)


def matmul(x: Tensor, *weights: Tensor) -> Tensor:
    return F.linear(x, torch.cat(weights).to(COMPUTE) if len(weights) > 1 else weights[0].to(COMPUTE))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [T, heads, D], cos and sin [T, 1, D/2]
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(COMPUTE)


def project(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    D = 2 * cos.shape[-1]
    qkv = matmul(x, wq, wk, wv)
    q, k, v = (t.unflatten(-1, (-1, D)) for t in qkv.split([wq.shape[0], wk.shape[0], wv.shape[0]], -1))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g, u = matmul(x, gate, up).chunk(2, -1)
    return matmul(F.silu(g) * u, down)


def before_attention(x, weight, wq, wk, wv, cos, sin, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return project(norm(x, weight, eps), wq, wk, wv, cos, sin)


def after_attention(x, attended, wo, weight, gate, up, down, eps: float) -> Tensor:
    x = x + matmul(attended, wo)
    return x + feed_forward(norm(x, weight, eps), gate, up, down)


def token_losses(
    x: Tensor, weight: Tensor, embed: Tensor, labels: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy and whether the top token is right, per token."""
    logits = matmul(norm(x, weight, eps), embed).float()
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels


def soft_losses(
    x, weight, embed, teacher, teacher_weight, teacher_embed, eps: float
) -> tuple[Tensor, Tensor]:
    """KL divergence of a student from its teacher and whether their top tokens agree, per token."""
    wanted = matmul(norm(teacher, teacher_weight, eps), teacher_embed).float().log_softmax(-1)
    given = matmul(norm(x, weight, eps), embed).float().log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1), wanted.argmax(-1) == given.argmax(-1)


class Fused(NamedTuple):
    """The functions that `compiled` replaces."""

    before: callable = before_attention
    after: callable = after_attention
    losses: callable = token_losses
    soft: callable = soft_losses


def compiled() -> Fused:
    return Fused(*(torch.compile(f, dynamic=False) for f in Fused()))


class Attention(nn.Module):
    def __init__(self, c: Config, width: int):
        super().__init__()
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, n, bias=False) for n in (q, kv, kv))
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False)

    def qkv_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj.weight, self.k_proj.weight, self.v_proj.weight


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, c.hidden_size), FeedForward(c)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(c.hidden_size) for _ in range(2))


class Body(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size)


def attend(q: Tensor, k: Tensor, v: Tensor, B: int) -> Tensor:
    """Causal attention of flat [B*L, heads, D] tensors."""
    q, k, v = (t.unflatten(0, (B, -1)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def initialise(module: nn.Module, layers: int) -> None:
    for name, p in module.named_parameters():
        if p.ndim == 2:
            scale = (2 * layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            nn.init.normal_(p, std=0.02 * scale if "embed" in name else scale * p.shape[1] ** -0.5)


class Trace(NamedTuple):
    """What a forward pass leaves for distillation: residual states after each layer, and queries and keys."""

    states: list[Tensor]  # [T, H] each
    queries: list[Tensor]  # [T, heads, D] each
    keys: list[Tensor]


class Llama(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config, self.model = c, Body(c)
        self.fused = Fused()
        initialise(self, c.num_hidden_layers)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        D, theta = self.config.head_dim, self.config.rope_theta
        frequency = theta ** -(torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
        angle = positions[:, None, None].float() * frequency
        return angle.cos(), angle.sin()

    def forward(self, ids: Tensor, trace: Trace | None = None) -> Tensor:
        """ids [B, L] -> residual states [B*L, H] before the final norm."""
        B, L = ids.shape
        cos, sin = self.rope(torch.arange(L, device=ids.device).repeat(B))
        x = self.model.embed_tokens(ids.flatten()).to(COMPUTE)
        for layer in self.model.layers:
            q, k, v = self.before(layer, x, cos, sin)
            x = self.after(layer, x, attend(q, k, v, B))
            if trace is not None:
                trace.states.append(x), trace.queries.append(q), trace.keys.append(k)
        return x

    def before(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = layer.self_attn.qkv_weights()
        return self.fused.before(
            x, layer.input_layernorm.weight, *weights, cos, sin, self.config.rms_norm_eps
        )

    def after(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        wo, scale = layer.self_attn.o_proj.weight, layer.post_attention_layernorm.weight
        return self.fused.after(x, attended, wo, scale, *layer.mlp.weights(), self.config.rms_norm_eps)

    def losses(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.fused.losses(
            x, self.model.norm.weight, self.model.embed_tokens.weight, labels, self.config.rms_norm_eps
        )

    def logits(self, x: Tensor) -> Tensor:
        return matmul(
            norm(x, self.model.norm.weight, self.config.rms_norm_eps), self.model.embed_tokens.weight
        )

    @torch.no_grad()
    def generate(self, ids: Tensor, steps: int, stop: int | None = None) -> Tensor:
        """Greedy continuation [B, steps] of prompts of one length; ends once every row has `stop`."""
        B, L = ids.shape
        cache: list[tuple[Tensor, Tensor]] = []
        positions, out = torch.arange(L, device=ids.device).repeat(B), []
        for step in range(steps):
            x = self.extend(ids, positions, cache, B)
            ids = self.logits(x.unflatten(0, (B, -1))[:, -1]).argmax(-1)[:, None]
            positions = torch.full((B,), L + step, device=ids.device)
            out.append(ids)
            if stop is not None and (torch.cat(out, 1) == stop).any(1).all():
                break
        return torch.cat(out, 1)

    def extend(self, ids: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]], B: int) -> Tensor:
        """Run `ids` after what `cache` holds (first call: nothing), and add to it."""
        prefill = not cache
        cos, sin = self.rope(positions)
        x = self.model.embed_tokens(ids.flatten()).to(COMPUTE)
        for i, layer in enumerate(self.model.layers):
            q, k, v = self.before(layer, x, cos, sin)
            if prefill:
                attended = attend(q, k, v, B)
                cache.append((k.unflatten(0, (B, -1)), v.unflatten(0, (B, -1))))
            else:
                cache[i] = tuple(
                    torch.cat([old, new[:, None]], 1) for old, new in zip(cache[i], (k, v), strict=True)
                )
                keys, values = (t.transpose(1, 2) for t in cache[i])
                attended = F.scaled_dot_product_attention(
                    q[:, :, None], keys, values, enable_gqa=True
                ).flatten(1)
            x = self.after(layer, x, attended)
        return x
