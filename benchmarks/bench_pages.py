"""Selection of pages by the target's own queries: Triton against its twins (gate), then time.

Shapes of an 8B target: 8 KV heads of 128 dimensions, 32 layers. In every layer of a step `score` reads the
sketches of all pages, `list` selects and writes lists, and `layer` is both one after the other; `join` takes
the place of `list` where a draft has scored the tokens too. `sketch` writes the pages that a decode step
completes, of all requests at once (one step in sixteen, on average), and `chunk` those of a prefill chunk of
8,192 tokens. Once a step `tag` says whose sketches slots hold, and `sizes` which pages have one, with the
plans of scores and of attention. `MiB` is what an arm must read and write.
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
from sts_kernels import Ops, ops, page_scores
from sts_kernels.layout import NO_PAGE, PAGE, Contexts, Lists, PageSizes, Plan, Pooling, Scores

KV_HEADS, LAYERS, SINK, RECENT, CHUNK = 8, 32, 4, 64, 8192
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
    {"context": c, "batch": b, "keep": 0.1, "rows": 1, "group": 4, "dim": 128}
    for c, b in ((8192, 1), (8192, 24), (32768, 1), (32768, 8), (32768, 24), (131072, 1), (131072, 4))
]
GRID = settings(
    {
        "programs": [264, 528, 1056],
        "least": [32, 64, 128],
        "block": [16384, 32768],
        "num_stages": [3, 5, 7],
    }
) + [{"pool_pages": 64}, {"pool_pages": 256}, {"pool_programs": 264}, {"pool_warps": 2}, {"early": False}]


@dataclass
class Step:
    """One decode step; `layers` are (queries [batch, rows, H_q, D], sketches) of as many layers as make one
    read of all of them pass through the cache."""

    contexts: Contexts
    tags: torch.Tensor
    lists: Lists
    channels: torch.Tensor
    scores: Scores
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    scale: float
    pooling: Pooling
    sizes: PageSizes | None = None
    plan: Plan | None = None

    @classmethod
    def draw(cls, shape: Shape, device: str = DEVICE) -> Step:
        torch.manual_seed(0)
        context, batch, rows, dim = shape["context"], shape["batch"], shape["rows"], shape["dim"]
        slots, columns = batch * context + 1, -(-context // PAGE // 64) * 64
        count = int(context * shape["keep"])

        def normal(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(size, dtype=dtype, device=device)

        table = (torch.randperm(slots - 1, device=device).int() + 1).view(batch, context)
        table = torch.cat([torch.zeros(1, context, dtype=torch.int32, device=device), table])
        reqs = torch.arange(1, batch + 1, device=device)
        # All layers list where the one before did: it has attended.
        starts = torch.arange(batch * KV_HEADS, device=device).view(batch, KV_HEADS) * count
        counts = torch.full((batch, KV_HEADS), count, dtype=torch.int32, device=device)
        indices = torch.zeros(batch * KV_HEADS * count, dtype=torch.int32, device=device)
        heads = torch.arange(KV_HEADS, dtype=torch.int32, device=device).repeat(LAYERS, 1)
        layers = []
        for _ in range(1 if device == "meta" else copies(sketch_bytes(shape))):
            q = normal(batch, rows, KV_HEADS * shape["group"], dim, dtype=DTYPE)
            layers.append((q, normal(slots, KV_HEADS, 2 * dim // PAGE, dtype=torch.float16).abs_()))
        return cls(
            Contexts(table, reqs, torch.full((batch,), context, device=device)),
            torch.full((slots,), NO_PAGE, dtype=torch.int32, device=device),
            Lists(indices, starts, counts),
            heads,
            Scores(
                torch.zeros(KV_HEADS, batch * columns, dtype=torch.float16, device=device),
                torch.arange(batch, device=device) * columns,
            ),
            layers,
            dim**-0.5,
            Pooling("max", "max", rows),
        )

    def tag(self, written: int, kernel: str = "triton") -> None:
        """The last `written` positions of every request."""
        before = self.contexts.lens - written
        ops(kernel).tag_pages(self.contexts, before, self.tags, most=written)

    def size(self, kernel: str = "triton") -> PageSizes:
        return ops(kernel).size_pages(
            self.contexts, self.tags, self.lists, self.channels, sink=SINK, recent=RECENT
        )

    def prepare(self) -> None:
        """What precedes the layers."""
        self.tag(self.contexts.table.shape[1])
        self.sizes = self.size()
        self.lists = self.lists._replace(counts=self.sizes.counts)
        self.plan = ops("triton").plan_pages(self.sizes, kv_heads=KV_HEADS)

    def once(self) -> None:
        """What a step asks for before its layers, besides tags."""
        op: Ops = ops("triton")
        sizes, width = self.size(), self.contexts.table.shape[1]
        op.plan_pages(sizes, kv_heads=KV_HEADS)
        lists = self.lists._replace(counts=sizes.counts)
        op.plan_attention(lists, self.channels, self.contexts.lens, max_context=width)

    def score(self, layer: int = 0, kernel: str = "triton") -> None:
        ops(kernel).score_pages(
            *self.layers[layer],
            self.contexts,
            self.sizes,
            self.scores,
            scale=self.scale,
            pooling=self.pooling,
            plan=self.plan,
        )

    def list(self, kernel: str = "triton") -> None:
        args = self.scores, self.contexts, self.sizes, self.lists, self.channels
        ops(kernel).list_pages(*args, layer=0, sink=SINK, recent=RECENT)

    def draft(self, device: str = DEVICE) -> tuple[Scores, torch.Tensor]:
        """Importance of all tokens by KV head, and room for what joins it with pages."""
        bs, width = self.contexts.lens.numel(), -(-self.contexts.table.shape[1] // 64) * 64
        drafted = torch.rand(KV_HEADS, bs * width, device=device).half()
        return Scores(drafted, torch.arange(bs, device=device) * width), torch.empty_like(drafted)

    def join(self, drafted: Scores, joined: torch.Tensor, kernel: str = "triton") -> None:
        """And select by it: lists of the same length, of which the pages have their share."""
        args = self.scores, drafted, joined, self.contexts, self.sizes, self.channels
        ops(kernel).join_pages(*args, layer=0, sink=SINK, recent=RECENT)
        by = drafted._replace(importance=joined)
        ops(kernel).select_tokens(by, self.contexts, self.contexts.lens, self.lists, sink=SINK, recent=RECENT)

    def layer(self, layer: int) -> None:
        self.score(layer)
        self.list()


def sketch_bytes(shape: Shape) -> int:
    """Of one layer: a sixteenth of its keys and values."""
    return shape["batch"] * shape["context"] // PAGE * KV_HEADS * 2 * shape["dim"] * 2


def score_bytes(shape: Shape) -> int:
    """Sketches, slots, and what is known of a page; scores."""
    pages = shape["batch"] * shape["context"] // PAGE
    return sketch_bytes(shape) + pages * (4 * PAGE + 1 + 2 * KV_HEADS)


def list_bytes(shape: Shape) -> int:
    """Scores, and the lists with the slots in them."""
    pages, tokens = shape["batch"] * shape["context"] // PAGE, shape["context"] * shape["keep"]
    return 2 * KV_HEADS * pages + int(8 * KV_HEADS * shape["batch"] * tokens)


def same_sizes(step: Step) -> None:
    found, expected = step.size(), step.size("torch")
    for name in ("known", "unknown", "counts", "starts", "pages"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), f"{name} differ"
    assert torch.equal(found.contexts.lens.long(), expected.contexts.lens.long()), "pages differ"


def same_tags(step: Step) -> None:
    for written in (step.contexts.table.shape[1], 1):
        step.tag(written, "torch")
        expected = step.tags.clone()
        step.tags.fill_(NO_PAGE)
        step.tag(step.contexts.table.shape[1])
        step.tag(written)
        assert torch.equal(step.tags, expected), f"{int((step.tags != expected).sum())} tags differ"


def same_scores(step: Step) -> None:
    importance = step.scores.importance
    step.score(kernel="torch")
    expected = importance.clone()
    importance.zero_()
    step.score()
    # Sums of another order, and one rounding to float16.
    torch.testing.assert_close(importance.float(), expected.float(), rtol=2e-3, atol=1e-3, equal_nan=True)


def same_lists(step: Step) -> None:
    """Entry for entry, once each list is sorted: of one length all."""
    count, rows = int(step.lists.counts[0, 0]), step.lists.starts.flatten().tolist()
    found = []
    for kernel in ("torch", "triton"):
        step.lists.indices.zero_()
        step.list(kernel)
        lists = [step.lists.indices[start : start + count] for start in rows]
        found.append(torch.stack(lists).sort(1).values)
    assert torch.equal(*found), f"{int((found[0] != found[1]).sum())} slots differ"


def same_joined(step: Step, drafted: Scores, joined: torch.Tensor) -> None:
    found = []
    for kernel in ("torch", "triton"):
        joined.zero_()
        args = step.scores, drafted, joined, step.contexts, step.sizes, step.channels
        ops(kernel).join_pages(*args, layer=0, sink=SINK, recent=RECENT)
        found.append(joined.float().nan_to_num(-1))
    assert torch.equal(*found), f"{int((found[0] != found[1]).sum())} scores differ"


def same_sketches(step: Step, keys: torch.Tensor, written: int) -> Callable[[], None]:
    """A gate of sketch_pages for the pages that the last `written` positions complete."""

    def check() -> None:
        twins = [torch.zeros_like(step.layers[0][1]) for _ in range(2)]
        for kernel, sketches in zip(("torch", "triton"), twins, strict=True):
            sketch(step, keys, sketches, written, kernel)
        torch.testing.assert_close(twins[0].float(), twins[1].float(), rtol=1e-3, atol=1e-5)
        assert twins[0].any(), "no page was written"

    return check


def sketch(step: Step, keys, sketches, written: int, kernel: str = "triton") -> None:
    before = step.contexts.lens - written
    ops(kernel).sketch_pages(keys, sketches, step.contexts, before, step.tags, most=written)


def prepare(shape: Shape):
    """What `tune` times: the scores."""
    step = Step.draw(shape)
    step.prepare()
    calls = [lambda i=i: step.score(i) for i in range(len(step.layers))]

    def check() -> None:
        step.plan = ops("triton").plan_pages(step.sizes, kv_heads=KV_HEADS)
        same_scores(step)

    return calls, check, score_bytes(shape)


def bench(results: Results, shape: Shape) -> None:
    step = Step.draw(shape)
    layers, batch, context = range(len(step.layers)), shape["batch"], shape["context"]

    def arm(name: str, gate: Callable[[], None], calls: list[Callable[[], Any]], nbytes: int) -> None:
        if results.gate(name, shape, gate):
            results.add(name, shape, microseconds(calls), nbytes)
            results.rows.append((shape, f"{name}-MiB", nbytes / 2**20))

    arm("tag", lambda: same_tags(step), [lambda: step.tag(1)], batch * PAGE * 12)
    step.prepare()
    arm("sizes", lambda: same_sizes(step), [step.once], batch * context * 8)
    arm("score", lambda: same_scores(step), [lambda i=i: step.score(i) for i in layers], score_bytes(shape))
    arm("list", lambda: same_lists(step), [step.list], list_bytes(shape))
    both = score_bytes(shape) + list_bytes(shape)
    arm("layer", lambda: same_lists(step), [lambda i=i: step.layer(i) for i in layers], both)
    drafted = step.draft()
    tokens = 2 * KV_HEADS * batch * context
    join = [lambda: step.join(*drafted)]
    arm("join", lambda: same_joined(step, *drafted), join, 3 * tokens + list_bytes(shape))
    if shape["rows"] > 1:
        return
    size = (batch * context + 1, KV_HEADS, shape["dim"])
    keys, sketches = torch.randn(size, dtype=DTYPE, device=DEVICE), step.layers[-1][1]
    key_bytes = KV_HEADS * shape["dim"] * keys.itemsize
    for name, written in (("sketch", 1), ("chunk", CHUNK)):
        if written == 1 or batch == 1:
            pages = batch * -(-written // PAGE)
            call = [lambda written=written: sketch(step, keys, sketches, written)]
            arm(name, same_sketches(step, keys, written), call, pages * (PAGE * key_bytes + 2 * key_bytes))


def compile_one(shape: Shape, knobs: dict) -> None:
    """The ops on tensors that are only shapes."""
    with compile_only(), using(page_scores, knobs):
        step = Step.draw(shape, device="meta")
        step.prepare()
        step.once()
        step.layer(0)
        keys = torch.empty(*step.layers[0][1].shape[:2], shape["dim"], dtype=DTYPE, device="meta")
        step.join(*step.draft(device="meta"))
        for written in (1, CHUNK):
            step.tag(written)
            sketch(step, keys, step.layers[0][1], written)


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes = QUICK if args.quick or args.tune else FULL
    grid = GRID if args.tune else [{}]
    compile_ahead(compile_one, shapes[:1], grid)
    results = Results("pages", args.out)
    for shape in shapes:
        if args.tune:
            tune(results, page_scores, GRID, shape, prepare)
        else:
            bench(results, shape)
        torch.cuda.empty_cache()
    results.finish()


if __name__ == "__main__":
    main()
