"""Directions along which a target's keys differ most, and the scores that sketches on them give.

A token's sketch is its key on many directions, half a byte each: what selects tokens by the target's own
queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sts_kernels.layout import MOST_STEPS
from sts_sglang.headmap import Directions, HeadCounts, directions_of

if TYPE_CHECKING:
    from sts_sglang.calibrate.record import Seen

# Standard deviations that the steps of a sketch reach over, to either side. With so few steps, values of a
# normal distribution are off by least at about this.
SPREAD = 2.5
LEAST_STEP = torch.finfo(torch.float16).tiny
LARGEST = torch.finfo(torch.float16).max


class Keys:
    """Sums over the keys of every (layer, KV head) of a target while it runs over texts.

    float64 [layers, KV heads, head_dim, head_dim] on `device`: 34 MB for Llama-3.1-8B. In float32 keys with
    a large mean would leave little of how they differ.
    """

    def __init__(self, counts: HeadCounts, head_dim: int, device: str):
        shape = (counts.layers, counts.kv_heads, head_dim)
        self.number = 0
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.products = torch.zeros(*shape, head_dim, dtype=torch.float64, device=device)

    def add(self, seen: Seen) -> None:
        """Those of a layer's attention over a text."""
        self.number += seen.k.shape[1] if seen.layer == 0 else 0
        for h, own in enumerate(seen.k):  # one head at a time, for a long text's keys in float64 are large
            keys = own.double()
            self.sums[seen.layer, h] += keys.sum(0)
            self.products[seen.layer, h] += keys.T @ keys

    def directions(self) -> tuple[Directions, float]:
        """Of every head, and the part of how its keys differ that lies along them, in the mean of heads.

        The float16 that directions are rounded to are those that centres are for.
        """
        head_dim = self.sums.shape[2]
        number = directions_of(head_dim)
        mean = self.sums.cpu() / self.number
        apart = self.products.cpu() / self.number - mean[..., :, None] * mean[..., None, :]
        variances, vectors = torch.linalg.eigh(apart)  # lowest first
        variances = variances.clamp(min=0).flip(-1)
        basis = vectors.flip(-1)[..., :number].half()
        centre = mean[..., None, :] @ basis.double()
        steps = (SPREAD / MOST_STEPS * variances[..., None, :number].sqrt()).clamp(min=LEAST_STEP)
        packed = torch.cat([basis, _half(centre), _half(steps)], -2).numpy().astype("<f2")
        heads = tuple(tuple(own.tobytes() for own in layer) for layer in packed)
        held = variances[..., :number].sum(-1) / variances.sum(-1).clamp(min=1e-30)
        return Directions(head_dim, number, heads), float(held.mean())


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-LARGEST, LARGEST).half()


class Sketched:
    """Directions as tensors, on whatever device the keys are."""

    def __init__(self, directions: Directions):
        shape = (len(directions.heads), -1, directions.head_dim + 2, directions.number)
        content = bytearray(b"".join(own for layer in directions.heads for own in layer))
        self._packed = torch.frombuffer(content, dtype=torch.float16).view(shape)

    def scores(self, seen: Seen, t: int) -> torch.Tensor:
        """float32 [H_kv, t]: attention of the row at position t to the tokens before it as their sketches
        have it, the most of the group's."""
        packed = self._packed[seen.layer].to(seen.k.device).float()
        basis, centre, step = packed[:, :-2], packed[:, -2, None], packed[:, -1, None]
        sketches = ((seen.k[:, :t].float() @ basis - centre) / step).round().clamp(-MOST_STEPS, MOST_STEPS)
        rows = seen.q[:, t].float().unflatten(0, (seen.k.shape[0], -1))  # [H_kv, G, D]
        logits = rows @ (basis * step) @ sketches.mT
        return (logits * seen.scaling).softmax(-1).amax(1)
