"""Draft attention that leaves importance behind: against its twin (gate), then time with and without.

Shapes of a 1B draft: 32 query and 8 KV heads of 64, every query head mapped; the first step of a round,
with the carried row.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Results, microseconds, parser
from sts_kernels import Members, ops

Q_HEADS, KV_HEADS, DIM = 32, 8, 64
SHAPES = [
    {"context": c, "batch": b} for c, b in ((8192, 16), (32768, 1), (32768, 4), (32768, 8), (131072, 1))
]


def members(speak: bool) -> Members:
    """Each KV head's four query heads are a channel; or nobody speaks."""
    heads = torch.arange(Q_HEADS, dtype=torch.int32, device="cuda").view(KV_HEADS, -1)
    channels = torch.arange(KV_HEADS, dtype=torch.int32, device="cuda")
    scale = torch.full((KV_HEADS,), KV_HEADS / Q_HEADS, device="cuda")
    fresh = torch.ones(KV_HEADS, dtype=torch.bool, device="cuda")
    everyone = Members(channels, heads, scale, fresh)
    return everyone if speak else Members(*(t[:0] for t in everyone))


def draw(shape: dict, speak: bool) -> list:
    torch.manual_seed(0)
    context, batch = shape["context"], shape["batch"]
    width = context + 4
    slots = batch * width + 1
    table = torch.randperm(slots - 1, device="cuda")[: batch * width].view(batch, width).int() + 1
    table = torch.cat([torch.zeros(1, width, dtype=torch.int32, device="cuda"), table])
    k, v = (torch.randn(slots, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q = torch.randn(batch, Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    carried = torch.randn(batch + 1, Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    lens = torch.full((batch,), context, device="cuda")
    carried_len = torch.full((batch + 1,), context, device="cuda")
    reqs = torch.arange(1, batch + 1, device="cuda")
    start = torch.arange(batch, device="cuda") * context
    importance = torch.zeros(KV_HEADS, batch * context, dtype=torch.float16, device="cuda")
    first = carried if speak else None
    places = [table, reqs, lens, start, 0, 3, DIM**-0.5, members(speak), importance, 3]
    return [q, first, carried_len, k, v, *places]


def gate() -> None:
    found = []
    for kernel in ("torch", "triton"):
        args = draw({"context": 4096, "batch": 2}, True)
        found.append((ops(kernel).draft_attention(*args).float(), args[13].float()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1.6e-2, atol=8e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-3, atol=2e-3)


def main() -> None:
    args = parser(__doc__).parse_args()
    results = Results("draft_attention", args.out)
    gate()
    for shape in SHAPES:
        nbytes = shape["batch"] * shape["context"] * KV_HEADS * DIM * 2 * 2
        for name, speak in (("triton", False), ("triton+importance", True)):
            inputs = draw(shape, speak)
            us = microseconds([lambda i=inputs: ops("triton").draft_attention(*i)])
            results.add(name, shape, us, nbytes)


if __name__ == "__main__":
    main()
