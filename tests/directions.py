"""Directions of keys for maps that tests write."""

from __future__ import annotations

import base64

import torch

from sts_kernels.layout import SKETCHED
from sts_sglang.headmap import HeadCounts


def drawn(counts: HeadCounts, dim: int, step: float = 0.02, whole: bool = False, seed: int = 0) -> dict:
    """The field `directions` of a map file: random ones, orthonormal; the same with a first axis among them
    where `whole` is asked for, so that keys along it are not missed."""
    generator, number = torch.Generator().manual_seed(seed), dim // SKETCHED
    heads = []
    for _ in range(counts.layers):
        own = []
        for _ in range(counts.kv_heads):
            start = torch.randn(dim, dim, generator=generator)
            if whole:
                start[:, 0] = torch.eye(dim)[0]
            turned = torch.linalg.qr(start).Q[:, :number]
            centre, steps = torch.randn(1, number, generator=generator) * step, torch.full((1, number), step)
            values = torch.cat([turned, centre, steps]).half().contiguous()
            own.append(base64.b64encode(values.numpy().tobytes()).decode())
        heads.append(own)
    return {"head_dim": dim, "number": number, "heads": heads}


def of_target(counts: HeadCounts, dim: int, **more) -> dict:
    """A map file of a target alone."""
    head_map = {"version": 1, "tp": 1, "target": counts._asdict(), "draft": None}
    return {**head_map, "directions": drawn(counts, dim, **more)}


def of_pair(counts: HeadCounts, draft: HeadCounts, dim: int, **more) -> dict:
    """One of a pair whose heads are in equal numbers."""
    head_map = {"version": 1, "shift": 1, "tp": 1, "target": counts._asdict(), "draft": draft._asdict()}
    head_map["sources"] = [[[[0, kv]] for kv in range(counts.kv_heads)] for _ in range(counts.layers)]
    return {**head_map, "directions": drawn(counts, dim, **more)}
