"""Selection of tokens by the target's own queries: Triton against its twins (gate), then time.

Shapes of an 8B target: 8 KV heads of 128 dimensions, 32 layers. In every layer of a step `score` reads the
sketches of all tokens, `list` selects and writes lists, and `layer` is both one after the other. `sketch`
writes what a decode step adds, and `chunk` a prefill chunk of 8,192 tokens. `MiB` is what an arm must read
and write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import (
    DEVICE,
    DTYPE,
    Results,
    Shape,
    compile_ahead,
    compile_only,
    copies,
    microseconds,
    parser,
    settings,
    tune,
    using,
)
from sts_kernels import ops, tokens
from sts_kernels.layout import (
    LOW_ZERO,
    MOST_STEPS,
    SKETCHED,
    Contexts,
    Directions,
    Lists,
    Plan,
    Pooling,
    Scores,
    sketch_bytes,
)
from sts_kernels.torch_ops import sketch_values

KV_HEADS, SINK, RECENT, CHUNK = 8, 4, 64, 8192
FULL = settings(
    {
        "context": [8192, 32768, 65536, 131072],
        "batch": [1, 4, 8, 16, 24],
        "keep": [0.1],
        "rows": [1, 4],
        "group": [4],
        "dim": [128],
    }
)
QUICK = [
    {"context": c, "batch": b, "keep": 0.1, "rows": r, "group": 4, "dim": 128}
    for c, b, r in (
        (8192, 1, 1),
        (8192, 24, 1),
        (32768, 1, 1),
        (32768, 8, 1),
        (32768, 24, 1),
        (131072, 1, 1),
        (32768, 8, 4),
        (131072, 1, 4),
    )
]
# Of scores, by logits and by a second reading of sketches.
WAYS = [{"again": 1000}, {"again": 1}]
GRID = [
    knobs | way
    for knobs in settings({"programs": [528, 792, 924, 1056], "block": [128, 256], "num_warps": [4, 8]})
    + [{"block": 512, "num_warps": 8}, {"maxnreg": 64}, {"maxnreg": 96}]
    + [{"num_stages": 3}, {"num_stages": 7}, {"early": False}]
    for way in WAYS
]
GRID += [{"again": 1000, "pooled": n} for n in (1024, 4096)]
GRID += [{"again": 1000, "pool_programs": n} for n in (528, 2112)]


@dataclass
class Step:
    """One decode step, or verify; `layers` are (queries [batch, rows, H_q, D], sketches) of as many layers as
    make one read of all of them pass through the cache."""

    contexts: Contexts
    lists: Lists
    scores: Scores
    directions: Directions
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    scale: float
    pooling: Pooling
    plan: Plan | None = None

    @classmethod
    def draw(cls, shape: Shape, device: str = DEVICE) -> Step:
        torch.manual_seed(0)
        context, batch, rows, dim = shape["context"], shape["batch"], shape["rows"], shape["dim"]
        slots, number, count = batch * context + 1, dim // SKETCHED, int(context * shape["keep"])
        table = (torch.randperm(slots - 1, device=device).int() + 1).view(batch, context)
        table = torch.nn.functional.pad(table, (0, 0, 1, 0))
        starts = torch.arange(batch * KV_HEADS, device=device).view(batch, KV_HEADS) * count
        counts = torch.full((batch, KV_HEADS), count, dtype=torch.int32, device=device)
        layers = []
        for _ in range(1 if device == "meta" else copies(slots * KV_HEADS * number // 2)):
            q = torch.randn(batch, rows, KV_HEADS * shape["group"], dim, dtype=DTYPE, device=device)
            # Bytes of two values each, of which none is below -MOST_STEPS.
            drawn = torch.randn(2, slots, KV_HEADS, number // 2, dtype=torch.float16, device=device) * 2.8
            high, low = drawn.round().clamp(-MOST_STEPS, MOST_STEPS)
            layers.append((q, (16 * high + low + LOW_ZERO).to(torch.int8)))
        turned = torch.randn(KV_HEADS, dim, number, device=device) * dim**-0.5
        return cls(
            Contexts(
                table,
                torch.arange(1, batch + 1, device=device),
                torch.full((batch,), context, device=device),
            ),
            Lists(torch.zeros(starts.numel() * count, dtype=torch.int32, device=device), starts, counts),
            Scores(
                torch.zeros(KV_HEADS, batch * context, dtype=torch.float16, device=device),
                torch.arange(batch, device=device) * context,
            ),
            Directions(
                (turned * 2.8).to(DTYPE),
                torch.zeros(KV_HEADS, number, device=device),
                (turned / 2.8).to(DTYPE),
            ),
            layers,
            dim**-0.5,
            Pooling("max", "max", rows),
        )

    def prepare(self) -> None:
        """What precedes the layers."""
        self.plan = ops("triton").plan_scores(self.contexts, kv_heads=KV_HEADS)

    def score(self, layer: int = 0, kernel: str = "triton") -> None:
        q, sketches = self.layers[layer]
        ops(kernel).score_tokens(
            q,
            sketches,
            self.directions,
            self.contexts,
            self.scores,
            scale=self.scale,
            pooling=self.pooling,
            plan=self.plan,
        )

    def list(self, kernel: str = "triton") -> None:
        ops(kernel).list_tokens(self.scores, self.contexts, self.lists, sink=SINK, recent=RECENT)

    def layer(self, layer: int) -> None:
        self.score(layer)
        self.list()


def score_bytes(shape: Shape) -> int:
    """Sketches and slots; scores."""
    return shape["batch"] * shape["context"] * (KV_HEADS * (sketch_bytes(shape["dim"]) + 2) + 4)


def list_bytes(shape: Shape) -> int:
    """Scores, and the lists with the slots in them."""
    tokens_ = shape["batch"] * shape["context"] * KV_HEADS
    return 2 * tokens_ + int(8 * tokens_ * shape["keep"])


def same_scores(step: Step) -> None:
    importance = step.scores.importance
    step.score(kernel="torch")
    expected = importance.clone()
    importance.zero_()
    step.score()
    # Queries on bfloat16 directions, and logits in float16.
    torch.testing.assert_close(importance.float(), expected.float(), rtol=6e-2, atol=2e-3)


def same_lists(step: Step) -> None:
    """Entry for entry, once each list is sorted: of one length all."""
    count, found = int(step.lists.counts[0, 0]), []
    for kernel in ("torch", "triton"):
        step.lists.indices.zero_()
        step.list(kernel)
        found.append(step.lists.indices.view(-1, count).sort(1).values)
    assert torch.equal(*found), f"{int((found[0] != found[1]).sum())} slots differ"


def same_sketches(step: Step, keys: torch.Tensor, written: int) -> Callable[[], None]:
    def check() -> None:
        twins = [torch.zeros_like(step.layers[0][1]) for _ in range(2)]
        for kernel, sketches in zip(("torch", "triton"), twins, strict=True):
            sketch(step, keys, sketches, written, kernel)
        apart = (sketch_values(twins[0]).int() - sketch_values(twins[1]).int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01, f"{apart.max()} steps apart"
        assert twins[0].any(), "nothing was written"

    return check


def sketch(step: Step, keys, sketches, written: int, kernel: str = "triton") -> None:
    before = step.contexts.lens - written
    ops(kernel).sketch_tokens(keys, sketches, step.directions, step.contexts, before, most=written)


def prepare(shape: Shape):
    """What `tune` times of scores."""
    step = Step.draw(shape)
    step.prepare()
    calls = [lambda i=i: step.score(i) for i in range(len(step.layers))]

    def check() -> None:
        step.prepare()
        same_scores(step)

    return calls, check, score_bytes(shape)


def bench(results: Results, shape: Shape) -> None:
    step = Step.draw(shape)
    layers, batch, context = range(len(step.layers)), shape["batch"], shape["context"]

    def arm(name: str, gate: Callable[[], None], calls: list[Callable[[], Any]], nbytes: int) -> None:
        if results.gate(name, shape, gate):
            results.add(name, shape, microseconds(calls), nbytes)
            results.rows.append((shape, f"{name}-MiB", nbytes / 2**20))

    step.prepare()
    arm("score", lambda: same_scores(step), [lambda i=i: step.score(i) for i in layers], score_bytes(shape))
    arm("list", lambda: same_lists(step), [step.list], list_bytes(shape))
    both = score_bytes(shape) + list_bytes(shape)
    arm("layer", lambda: same_lists(step), [lambda i=i: step.layer(i) for i in layers], both)
    if shape["rows"] > 1:
        return
    size = (batch * context + 1, KV_HEADS, shape["dim"])
    keys, sketches = torch.randn(size, dtype=DTYPE, device=DEVICE), step.layers[-1][1]
    key_bytes = KV_HEADS * shape["dim"] * keys.itemsize
    for name, written in (("sketch", 1), ("chunk", CHUNK)):
        if written == 1 or batch == 1:
            call = [lambda written=written: sketch(step, keys, sketches, written)]
            nbytes = batch * written * (key_bytes + KV_HEADS * sketch_bytes(shape["dim"]))
            arm(name, same_sketches(step, keys, written), call, nbytes)


def compile_one(shape: Shape, knobs: dict) -> None:
    """The ops on tensors that are only shapes."""
    with compile_only(), using(tokens, knobs):
        step = Step.draw(shape, device="meta")
        step.prepare()
        step.layer(0)
        keys = torch.empty(*step.layers[0][1].shape[:2], shape["dim"], dtype=DTYPE, device="meta")
        for written in (1, CHUNK):
            sketch(step, keys, step.layers[0][1], written)


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes = QUICK if args.quick or args.tune else FULL
    lengths = {(shape["context"], shape["rows"]): shape for shape in shapes}  # what kernels are compiled for
    compile_ahead(compile_one, list(lengths.values()), GRID if args.tune else [{}])
    results = Results("tokens", args.out)
    for shape in shapes:
        if args.tune:
            tune(results, tokens, GRID, shape, prepare)
        else:
            bench(results, shape)
        torch.cuda.empty_cache()
    results.finish()


if __name__ == "__main__":
    main()
