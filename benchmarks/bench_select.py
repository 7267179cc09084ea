"""Selection: Triton against its twin (gate, exact sets), then time.

Shapes of a 1B draft and an 8B target: 128 channels (16 draft layers x 8 KV heads).
"""

from __future__ import annotations

import torch

from benchmarks.harness import Results, microseconds, parser
from sts_kernels import ops

CHANNELS, SINK, RECENT = 128, 4, 64
SHAPES = [
    {"context": c, "batch": b, "keep": k}
    for c, b in ((8192, 16), (32768, 1), (32768, 4), (32768, 8), (32768, 16), (131072, 1), (131072, 4))
    for k in (0.05, 0.1, 0.25)
]


def draw(shape: dict) -> list:
    """Arguments of select_tokens; scores are as peaked as attention probabilities are."""
    torch.manual_seed(0)
    context, batch = shape["context"], shape["batch"]
    count = int(context * shape["keep"])
    importance = ((torch.randn(CHANNELS, batch * context, device="cuda") * 3).exp() / context * 100).half()
    start = torch.arange(batch, device="cuda") * context
    lens = torch.full((batch,), context, device="cuda")
    table = (torch.randperm((batch + 1) * context, device="cuda").int() + 1).view(batch + 1, context)
    lists = torch.zeros(batch * CHANNELS * count, dtype=torch.int32, device="cuda")
    kv_start = torch.arange(batch * CHANNELS, device="cuda").view(batch, CHANNELS) * count
    kv_count = torch.full((batch, CHANNELS), count, dtype=torch.int32, device="cuda")
    budgets = torch.full((batch,), count, device="cuda")
    reqs = torch.arange(1, batch + 1, device="cuda")
    return [importance, start, lens, budgets, SINK, RECENT, table, reqs, lists, kv_start, kv_count]


def gate(shape: dict) -> None:
    found = []
    for kernel in ("torch", "triton"):
        args = draw(shape)
        ops(kernel).select_tokens(*args)
        found.append(args[8].view(-1, int(args[10][0, 0])).sort(1).values)
    assert torch.equal(*found), f"selection differs from its twin at {shape}"


def main() -> None:
    args = parser(__doc__).parse_args()
    results = Results("select", args.out)
    gate({"context": 8192, "batch": 2, "keep": 0.1})
    for shape in SHAPES if not args.quick else [s for s in SHAPES if s["keep"] == 0.1]:
        inputs = draw(shape)
        scores = inputs[0].nbytes
        us = microseconds([lambda i=inputs: ops("triton").select_tokens(*i)])
        results.add("triton", shape, us, scores + 2 * inputs[8].nbytes)


if __name__ == "__main__":
    main()
