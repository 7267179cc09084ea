"""What slots' memory costs a round (`history`): Triton against its twin (gate), then time.

Shapes of a 1B draft and an 8B target: 128 channels (16 draft layers x 8 KV heads). `warm` reads and writes
the memory alone, as all verifies but a request's first do under `warm`; `blend` mixes it into importance
besides; `blend-shared` the same where all requests share the first half of their contexts.
"""

from __future__ import annotations

import torch

from benchmarks.harness import DEVICE, Results, Shape, microseconds, parser, settings
from sts_kernels import UNKNOWN, ops

CHANNELS, DECAY, WEIGHT = 128, 0.9, 0.05
ARMS = {"warm": (0.0, False), "blend": (WEIGHT, False), "blend-shared": (WEIGHT, True)}  # weight, shared
FULL = settings({"context": [8192, 32768, 131072], "batch": [1, 4, 16]})
QUICK = [{"context": c, "batch": b} for c, b in ((8192, 16), (32768, 8), (131072, 1))]


def draw(shape: Shape, weight: float, shared: bool) -> list:
    """Arguments of blend_history; a tenth of the slots remembers nothing."""
    torch.manual_seed(0)
    context, batch = shape["context"], shape["batch"]
    table = torch.arange(1, (batch + 1) * context + 1, device=DEVICE).view(batch + 1, context).int()
    if shared:
        table[1:, : context // 2] = table[1, : context // 2].clone()
    slots = (batch + 1) * context + 1
    importance = (torch.rand(CHANNELS, batch * context, device=DEVICE) * 100).half()
    history = torch.rand(CHANNELS, slots, device=DEVICE) * 100
    history[:, torch.rand(slots, device=DEVICE) < 0.1] = UNKNOWN
    start = torch.arange(batch, device=DEVICE) * context
    lens = torch.full((batch,), context, device=DEVICE)
    reqs = torch.arange(1, batch + 1, device=DEVICE)
    stamp = torch.zeros(slots, dtype=torch.int32, device=DEVICE)
    round_ = torch.ones(1, dtype=torch.int32, device=DEVICE)
    weights = torch.full((batch,), weight, device=DEVICE)
    return [importance, start, lens, table, reqs, history, stamp, round_, weights, DECAY]


def check(shape: Shape, weight: float, shared: bool) -> None:
    found, expected = draw(shape, weight, shared), draw(shape, weight, shared)
    ops("triton").blend_history(*found)
    ops("torch").blend_history(*expected)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)  # one rounding to float16
    torch.testing.assert_close(found[5], expected[5], rtol=1e-6, atol=1e-6)


def bench(results: Results, shape: Shape) -> None:
    for name, (weight, shared) in ARMS.items():
        if not results.gate(name, shape, lambda w=weight, s=shared: check(shape, w, s)):
            continue
        args = draw(shape, weight, shared)

        def call(args=args) -> None:
            args[7].add_(1)  # a round whose slots were not touched yet
            ops("triton").blend_history(*args)

        touched = CHANNELS * shape["batch"] * shape["context"] * (0.5 + 0.5 / shape["batch"] if shared else 1)
        scores = CHANNELS * shape["batch"] * shape["context"] * (4 if weight else 2)
        results.add(name, shape, microseconds([call]), 8 * int(touched) + scores)


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    if args.tune:
        options.error("--tune: this kernel has no knobs")
    results = Results("remember", args.out)
    for shape in QUICK if args.quick else FULL:
        bench(results, shape)
    results.finish()


if __name__ == "__main__":
    main()
