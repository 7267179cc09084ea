"""Selection, and the sizes of its lists: Triton against its twins (gate, exact), then time.

Shapes of a 1B draft and an 8B target: 128 channels (16 draft layers x 8 KV heads). `sizes` is the one launch
that says how long every list is, of a budget that is split between heads; `sizes-torch` is its twin; `spread`
passes importance on to the next tokens before selection.
"""

from __future__ import annotations

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
from sts_kernels import Rule, ops
from sts_kernels.select import KNOBS

CHANNELS, SINK, RECENT = 128, 4, 64
FULL = settings({"context": [8192, 32768, 131072], "batch": [1, 4, 16], "keep": [0.05, 0.1, 0.25]})
QUICK = [
    {"context": c, "batch": b, "keep": 0.1}
    for c, b in ((8192, 16), (32768, 1), (32768, 4), (32768, 8), (32768, 16), (131072, 1), (131072, 4))
]
GRID = settings({"WORDS": [512, 1024, 2048], "num_warps": [8, 16], "maxnreg": [80, 96, 128]})
LISTS, COUNTS = 8, 10  # places of kv_indices and kv_count among the arguments


def draw(shape: Shape, device: str = DEVICE) -> list:
    """Arguments of select_tokens; scores are as peaked as attention probabilities are."""
    torch.manual_seed(0)
    context, batch = shape["context"], shape["batch"]
    count = int(context * shape["keep"])
    scores = torch.randn(CHANNELS, batch * context, dtype=torch.float16, device=device)
    importance = scores.mul_(3).exp_().mul_(100 / context)
    start = torch.arange(batch, device=device) * context
    lens = torch.full((batch,), context, device=device)
    table = (torch.randperm((batch + 1) * context, device=device).int() + 1).view(batch + 1, context)
    lists = torch.zeros(batch * CHANNELS * count, dtype=torch.int32, device=device)
    kv_start = torch.arange(batch * CHANNELS, device=device).view(batch, CHANNELS) * count
    kv_count = torch.full((batch, CHANNELS), count, dtype=torch.int32, device=device)
    budgets = torch.full((batch,), count, device=device)
    reqs = torch.arange(1, batch + 1, device=device)
    return [importance, start, lens, budgets, SINK, RECENT, table, reqs, lists, kv_start, kv_count]


def select(args: list, kernel: str = "triton") -> torch.Tensor:
    """The lists it writes, [request * channel, count], in order of slots."""
    ops(kernel).select_tokens(*args)
    return args[LISTS].view(-1, int(args[COUNTS][0, 0])).sort(1).values


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found, expected), f"{int((found != expected).sum())} slots differ"


def prepare(shape: Shape):
    """What `tune` times."""
    args = draw(shape)
    expected = select(args, "torch")
    call, nbytes = (lambda: ops("triton").select_tokens(*args)), args[0].nbytes + 2 * args[LISTS].nbytes

    def check() -> None:
        args[LISTS].zero_()
        equal(select(args), expected)

    return [call], check, nbytes


def draw_sizes(shape: Shape) -> list:
    """Arguments of size_lists: no request has a keep of its own."""
    context, batch, keep, device = shape["context"], shape["batch"], shape["keep"], DEVICE
    reqs = torch.arange(1, batch + 1, device=device)
    lens = torch.full((batch,), context, device=device)
    carried = torch.full((batch + 1,), context, device=device)
    keeps = torch.full((batch + 1,), torch.nan, dtype=torch.float64, device=device)
    bends = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64, device=device)
    split = torch.linspace(0, 1, 65, dtype=torch.float64, device=device)[:, None] ** bends
    counts = torch.zeros(8, dtype=torch.int64, device=device)
    rule = Rule(keep, 0, SINK + RECENT, SINK + RECENT, 1e-6)
    columns = batch * context
    return [lens, reqs, carried, keeps, rule, split, CHANNELS, columns, CHANNELS * columns, counts]


def same_sizes(args: list) -> None:
    found, expected = (ops(kernel).size_lists(*args) for kernel in ("triton", "torch"))
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert torch.equal(a, b), f"{name} differ"


def bench_sizes(results: Results, shape: Shape) -> None:
    args = draw_sizes(shape)
    nbytes = 12 * shape["batch"] * CHANNELS  # kv_start and kv_count
    if results.gate("sizes", shape, lambda: same_sizes(args)):
        for name, kernel in (("sizes", "triton"), ("sizes-torch", "torch")):
            call = ops(kernel).size_lists
            results.add(name, shape, microseconds([lambda call=call: call(*args)]), nbytes)


def bench_spread(results: Results, shape: Shape) -> None:
    args = draw(shape)[:3]

    def check() -> None:
        twin = args[0].clone()
        ops("torch").spread_importance(twin, *args[1:], 0.5)
        ops("triton").spread_importance(*args, 0.5)
        assert torch.equal(args[0], twin), "importance differs"

    if results.gate("spread", shape, check):
        fresh, spread = draw(shape)[0], ops("triton").spread_importance

        def restored() -> None:  # once spread there is ever less to pass on
            args[0].copy_(fresh)
            spread(*args, 0.5)

        alone = microseconds([lambda: args[0].copy_(fresh)])
        results.add("spread", shape, microseconds([restored]) - alone, args[0].nbytes)


def compile_one(shape: Shape, knobs: dict) -> None:
    """The op on tensors that are only shapes."""
    with compile_only(), using(KNOBS, knobs):
        ops("triton").select_tokens(*draw(shape, device="meta"))


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes = QUICK if args.quick or args.tune else FULL
    grid = GRID if args.tune else [{}]
    compile_ahead(compile_one, shapes[:1], grid)
    results = Results("select", args.out)
    for shape in shapes:
        if args.tune:
            tune(results, KNOBS, GRID, shape, prepare)
            continue
        calls, check, nbytes = prepare(shape)
        if results.gate("triton", shape, check):
            results.add("triton", shape, microseconds(calls), nbytes)
        bench_sizes(results, shape)
        bench_spread(results, shape)
    results.finish()


if __name__ == "__main__":
    main()
