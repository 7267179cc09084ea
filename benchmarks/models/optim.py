"""Muon for the matrices, all of one shape in one batched step; AdamW for embeddings and norms."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

MOMENTUM, DECAY = 0.95, 0.05


def orthogonalise(g: Tensor) -> Tensor:
    """Newton-Schulz iteration on a batch of matrices [N, rows, columns]: singular values go to about 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Optimiser:
    def __init__(self, model: nn.Module, compiled: bool):
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        others = []
        for name, p in model.named_parameters():
            matrix = p.ndim == 2 and "embed" not in name and "lm_head" not in name
            by_shape[p.shape].append(p) if matrix else others.append(p)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        fused = others[0].is_cuda
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.orthogonalise = torch.compile(orthogonalise, dynamic=False) if compiled else orthogonalise

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            grad = torch.stack([p.grad for p in group])
            momentum.lerp_(grad, 1 - MOMENTUM)
            update = self.orthogonalise(grad.lerp(momentum, MOMENTUM))
            # Matches the size of an AdamW update, so both parts share one learning rate.
            scale = 0.2 * max(grad.shape[1:]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * DECAY)
            torch._foreach_add_(group, list(update.float().unbind()), alpha=-rate * scale)
        for g in self.adam.param_groups:
            g["lr"] = rate
        self.adam.step()
        for p in (*(p for group in self.groups for p in group), *self.adam.param_groups[0]["params"]):
            p.grad = None

    def moments(self) -> dict[str, Tensor]:
        found = {f"momentum.{i}": m for i, m in enumerate(self.momenta)}
        for i, p in enumerate(self.adam.param_groups[0]["params"]):
            for key, value in self.adam.state[p].items():
                found[f"adam.{i}.{key}"] = value
        return found

    def load_moments(self, found: dict[str, Tensor]) -> None:
        for i, m in enumerate(self.momenta):
            m.copy_(found[f"momentum.{i}"])
        for i, p in enumerate(self.adam.param_groups[0]["params"]):
            names = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[p] = {k: found[f"adam.{i}.{k}"].to(p.device, torch.float32) for k in names}
