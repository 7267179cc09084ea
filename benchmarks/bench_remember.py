"""What slots' memory costs a round (`history`): Triton against its twin (gate), then time.

Shapes of a 1B draft and an 8B target: 128 channels (16 draft layers x 8 KV heads); slots in random order.
`warm` reads and writes the memory alone, as all verifies but a request's first do under `warm`; `blend` mixes
it into importance besides; `-shared` the same where requests share the first half of their contexts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.harness import DEVICE, Results, Shape, microseconds, parser, settings, tune
from sts_kernels import history, ops
from sts_kernels.layout import UNKNOWN, Contexts, History, Scores

CHANNELS, DECAY, WEIGHT = 128, 0.9, 0.05
ARMS = {  # weight, shared
    "warm": (0.0, False),
    "warm-shared": (0.0, True),
    "blend": (WEIGHT, False),
    "blend-shared": (WEIGHT, True),
}
FULL = settings({"context": [8192, 32768, 131072], "batch": [1, 4, 16]})
QUICK = [{"context": c, "batch": b} for c, b in ((8192, 16), (32768, 8), (131072, 1))]
GRID = settings({"programs": [128, 256, 512], "tile": [4096, 8192, 16384], "num_warps": [4, 8]})
GRID = [{**knobs, "tile_alone": knobs["tile"]} for knobs in GRID]


class Arguments(NamedTuple):
    """Of blend_history."""

    scores: Scores
    contexts: Contexts
    memory: History
    weight: torch.Tensor

    def blend(self, kernel: str = "triton") -> None:
        ops(kernel).blend_history(*self, decay=DECAY)


def draw(shape: Shape, weight: float, shared: bool) -> Arguments:
    """A tenth of the slots remembers nothing."""
    torch.manual_seed(0)
    context, batch = shape["context"], shape["batch"]
    slots = (batch + 1) * context + 1
    table = 1 + torch.randperm(slots - 1, device=DEVICE).view(batch + 1, context).int()
    if shared:
        table[1:, : context // 2] = table[1, : context // 2].clone()
    importance = (torch.rand(CHANNELS, batch * context, device=DEVICE) * 100).half()
    remembered = (torch.rand(slots, CHANNELS, device=DEVICE) * 100).half()
    remembered[torch.rand(slots, device=DEVICE) < 0.1] = UNKNOWN
    columns = torch.arange(batch, device=DEVICE) * context
    lens = torch.full((batch,), context, device=DEVICE)
    reqs = torch.arange(1, batch + 1, device=DEVICE)
    owner = torch.zeros(slots, dtype=torch.int64, device=DEVICE)
    round_ = torch.ones(1, dtype=torch.int64, device=DEVICE)
    return Arguments(
        Scores(importance, columns),
        Contexts(table, reqs, lens),
        History(remembered, owner, round_),
        torch.full((batch,), weight, device=DEVICE),
    )


def check(shape: Shape, weight: float, shared: bool) -> None:
    found, expected = draw(shape, weight, shared), draw(shape, weight, shared)
    found.blend("triton")
    expected.blend("torch")
    # One rounding to float16.
    torch.testing.assert_close(found.scores.importance, expected.scores.importance, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.memory.scores, expected.memory.scores)


def prepare(shape: Shape, weight: float, shared: bool):
    """A call in a round of its own, its check, and the bytes that it must read and write."""
    args = draw(shape, weight, shared)

    def call() -> None:
        args.memory.round.add_(1)  # a round whose slots were not touched yet
        args.blend()

    scores = CHANNELS * shape["batch"] * shape["context"]
    slots = int(scores * (0.5 + 0.5 / shape["batch"] if shared else 1))
    return [call], lambda: check(shape, weight, shared), 4 * slots + (4 if weight else 2) * scores


def bench(results: Results, shape: Shape) -> None:
    for name, arm in ARMS.items():
        calls, gate, nbytes = prepare(shape, *arm)
        if results.gate(name, shape, gate):
            results.add(name, shape, microseconds(calls), nbytes)


def main() -> None:
    args = parser(__doc__).parse_args()
    results = Results("remember", args.out)
    for shape in QUICK if args.quick or args.tune else FULL:
        if args.tune:
            for name, arm in ARMS.items():
                named = {**shape, "arm": name}  # rows of a search are told apart by their shapes
                tune(results, history, GRID, named, lambda s, arm=arm: prepare(s, *arm))
        else:
            bench(results, shape)
    results.finish()


if __name__ == "__main__":
    main()
