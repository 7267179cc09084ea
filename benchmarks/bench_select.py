"""Selection, and the sizes of its lists: Triton against its twins (gate, exact), then time.

Shapes of a 1B draft and an 8B target: 128 channels (16 draft layers x 8 KV heads), and the 8 of an EAGLE-3
head or of a layer whose own queries score. `width`: of the table of slots, where it is not the context's.
`sizes` is the one launch that says how long every list is, of a budget that is split between heads;
`sizes-torch` is its twin; `spread` passes importance on to the next tokens before selection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.harness import (
    DEVICE,
    Results,
    Shape,
    compile_ahead,
    compile_only,
    microseconds,
    parser,
    settings,
    tune,
    using,
)
from sts_kernels import ops
from sts_kernels import select as select_kernel
from sts_kernels.layout import Contexts, Count, Lists, Room, Rule, Scores

CHANNELS, SINK, RECENT = 128, 4, 64
FULL = settings({"context": [8192, 32768, 131072], "batch": [1, 4, 16], "keep": [0.05, 0.1, 0.25]})
QUICK = [
    {"context": c, "batch": b, "keep": 0.1}
    for c, b in (
        (8192, 16),
        (32768, 1),
        (32768, 4),
        (32768, 8),
        (32768, 16),
        (131072, 1),
        (131072, 4),
        (131072, 16),
    )
]
FEW = 8  # channels
OVER = 4  # tokens that importance is passed on to, as a model that drafts sparsely has it
QUICK += [
    {"context": c, "batch": b, "keep": 0.1, "channels": FEW, "width": w}
    for c, b, w in ((32768, 8, 32768), (32768, 8, 131072), (65536, 4, 131072), (131072, 1, 131072))
]
GRID = settings({"words": [512, 1024, 2048], "num_warps": [8, 16], "maxnreg": [80, 96, 128]})
GRID += [{"many": 1}]  # no row in parts, and then all that are longer than a tile
GRID += settings({"many": [10**9], "segment": [4096, 8192, 16384], "parts": [528, 1056]})
GRID += settings({"many": [10**9], "part_warps": [2, 4], "listed": [1024, 2048], "counted": [2048, 4096]})


class Arguments(NamedTuple):
    """Of select_tokens."""

    scores: Scores
    contexts: Contexts
    budgets: torch.Tensor
    lists: Lists

    def select(self, kernel: str = "triton") -> None:
        ops(kernel).select_tokens(*self, sink=SINK, recent=RECENT)


def draw(shape: Shape, device: str = DEVICE) -> Arguments:
    """Scores are as peaked as attention probabilities are."""
    torch.manual_seed(0)
    context, batch, channels = shape["context"], shape["batch"], shape.get("channels", CHANNELS)
    count = int(context * shape["keep"])
    scores = torch.randn(channels, batch * context, dtype=torch.float16, device=device)
    importance = scores.mul_(3).exp_().mul_(100 / context)
    columns = torch.arange(batch, device=device) * context
    table = (torch.randperm((batch + 1) * context, device=device).int() + 1).view(batch + 1, context)
    table = torch.nn.functional.pad(table, (0, shape.get("width", context) - context))
    indices = torch.zeros(batch * channels * count, dtype=torch.int32, device=device)
    starts = torch.arange(batch * channels, device=device).view(batch, channels) * count
    counts = torch.full((batch, channels), count, dtype=torch.int32, device=device)
    return Arguments(
        Scores(importance, columns),
        contexts_of(shape, table, device),
        torch.full((batch,), count, device=device),
        Lists(indices, starts, counts),
    )


def contexts_of(shape: Shape, table: torch.Tensor, device: str = DEVICE) -> Contexts:
    """Requests 1 and on, all of one length."""
    reqs = torch.arange(1, shape["batch"] + 1, device=device)
    return Contexts(table, reqs, torch.full((shape["batch"],), shape["context"], device=device))


def selected(args: Arguments, kernel: str = "triton") -> torch.Tensor:
    """The lists it writes, [request * channel, count], in order of slots."""
    args.select(kernel)
    return args.lists.indices.view(-1, int(args.lists.counts[0, 0])).sort(1).values


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found, expected), f"{int((found != expected).sum())} slots differ"


def prepare(shape: Shape):
    """What `tune` times."""
    args = draw(shape)
    expected, written = selected(args, "torch"), args.lists.indices
    nbytes = args.scores.importance.nbytes + 2 * written.nbytes

    def check() -> None:
        written.zero_()
        equal(selected(args), expected)

    return [args.select], check, nbytes


def draw_sizes(shape: Shape) -> dict[str, Any]:
    """Arguments of size_lists: no request has a keep of its own."""
    context, batch, device = shape["context"], shape["batch"], DEVICE
    table = torch.zeros(batch + 1, 1, dtype=torch.int32, device=device)  # which nothing reads
    bends = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64, device=device)
    return {
        "contexts": contexts_of(shape, table),
        "carried_lens": torch.full((batch + 1,), context, device=device),
        "keeps": torch.full((batch + 1,), torch.nan, dtype=torch.float64, device=device),
        "rule": Rule(shape["keep"], 0, SINK + RECENT, SINK + RECENT, 1e-6),
        "room": Room(CHANNELS, context, context, CHANNELS * context),
        "totals": torch.zeros(len(Count), dtype=torch.int64, device=device),
        "split": torch.linspace(0, 1, 65, dtype=torch.float64, device=device)[:, None] ** bends,
    }


def same_sizes(args: dict[str, Any]) -> None:
    found, expected = (ops(kernel).size_lists(**args) for kernel in ("triton", "torch"))
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert torch.equal(a, b), f"{name} differ"


def bench_sizes(results: Results, shape: Shape) -> None:
    args = draw_sizes(shape)
    nbytes = 12 * shape["batch"] * CHANNELS  # starts and counts
    if results.gate("sizes", shape, lambda: same_sizes(args)):
        for name, kernel in (("sizes", "triton"), ("sizes-torch", "torch")):
            call = ops(kernel).size_lists
            results.add(name, shape, microseconds([lambda call=call: call(**args)]), nbytes)


def bench_spread(results: Results, shape: Shape) -> None:
    scores, (_, _, lens), *_ = draw(shape)
    importance, spread = scores.importance, ops("triton").spread_importance

    def check() -> None:
        twin = scores._replace(importance=importance.clone())
        ops("torch").spread_importance(twin, lens, factor=0.5, over=OVER)
        spread(scores, lens, factor=0.5, over=OVER)
        assert torch.equal(importance, twin.importance), "importance differs"

    if results.gate("spread", shape, check):
        fresh = draw(shape).scores.importance

        def restored() -> None:  # once spread there is ever less to pass on
            importance.copy_(fresh)
            spread(scores, lens, factor=0.5, over=OVER)

        alone = microseconds([lambda: importance.copy_(fresh)])
        results.add("spread", shape, microseconds([restored]) - alone, importance.nbytes)


def compile_one(shape: Shape, knobs: dict) -> None:
    """The op on tensors that are only shapes."""
    with compile_only(), using(select_kernel, knobs):
        draw(shape, device="meta").select()


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes = QUICK if args.quick or args.tune else FULL
    grid = GRID if args.tune else [{}]
    # The longest rows: where they are many, listed by a program each, and where they are few, in parts.
    longest = sorted(shapes, key=lambda shape: (shape["context"], "channels" in shape))[-2:]
    compile_ahead(compile_one, [shapes[0], *longest], grid)
    results = Results("select", args.out)
    for shape in shapes:
        if args.tune:
            tune(results, select_kernel, GRID, shape, prepare)
            continue
        calls, check, nbytes = prepare(shape)
        if results.gate("triton", shape, check):
            results.add("triton", shape, microseconds(calls), nbytes)
        if "channels" not in shape:
            bench_sizes(results, shape)
            bench_spread(results, shape)
    results.finish()


if __name__ == "__main__":
    main()
