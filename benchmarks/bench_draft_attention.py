"""Draft attention that leaves importance behind: against its twin (gate), then time with and without.

8 KV heads, every query head mapped; `--quick` has the shapes of a 1B draft, 32 query heads of 64. Two steps
of a round: the first scores the carried row too, a later one its own row only; `importance alone` is that of
rows that attend elsewhere, which needs no values. Dense FA3 beside it where it is installed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch

from benchmarks.harness import (
    DEVICE,
    DTYPE,
    Results,
    Shape,
    add_fp8,
    add_heads,
    compile_ahead,
    compile_only,
    copies,
    heads_of,
    microseconds,
    parser,
    settings,
    stored,
    tune,
    using,
)
from sts_kernels import draft_attention, ops
from sts_kernels.layout import ALIGN, Carried, Contexts, KvPool, Members, Plan, Pooling, Scores

KV_HEADS, STEPS = 8, 3
FULL = settings(
    {
        "context": [8192, 32768, 131072],
        "batch": [1, 4, 16],
        "dim": [64, 128],
        "group": [4, 8],
        "step": [0, 1],
    }
)
QUICK = [
    {"context": c, "batch": b, "dim": 64, "group": 4, "step": s}
    for c, b in ((32768, 1), (32768, 8), (131072, 1))
    for s in (0, 1)
]
FIRST = [shape for shape in QUICK if shape["step"] == 0]  # the step that scores the carried row too
TUNED = [
    *FIRST,
    *(
        {"context": c, "batch": b, "dim": 128, "group": 4, "step": 0}
        for c, b in ((32768, 8), (32768, 24), (131072, 1))
    ),
]
# Whatever the bytes of a key.
SPLIT_GRID = settings(
    {"narrow": [0], "programs": [264, 396, 528, 792], "num_warps": [2, 4], "num_stages": [5, 7]}
)
POOL_GRID = settings(
    {
        "pool_blocks": [8, 16, 32],
        "pool_programs": [32, 64, 128],
        "pool_warps": [4, 8],
        "stored_policy": ["evict_last", ""],
    }
)


def members(group: int, device: str = DEVICE) -> Members:
    """The query heads of each KV head are a channel."""
    heads = torch.arange(KV_HEADS * group, dtype=torch.int32, device=device).view(KV_HEADS, group)
    channels = torch.arange(KV_HEADS, dtype=torch.int32, device=device)
    scale = torch.full((KV_HEADS,), 1 / group, device=device)
    fresh = torch.ones(KV_HEADS, dtype=torch.bool, device=device)
    return Members(channels, heads, scale, fresh)


@dataclass
class Case:
    """Inputs of one call."""

    q: torch.Tensor  # [batch, H_q, D]
    pool: KvPool
    contexts: Contexts
    scores: Scores
    members: Members
    carried: Carried
    step: int
    plans: dict[draft_attention.DraftKnobs, Plan] = field(default_factory=dict)

    @classmethod
    def draw(cls, shape: Shape, seed: int = 0, device: str = DEVICE, dtype: torch.dtype = DTYPE) -> Case:
        """With importance."""
        torch.manual_seed(seed)
        context, batch, step, dim = shape["context"], shape["batch"], shape["step"], shape["dim"]
        q_heads, kept = KV_HEADS * shape["group"], stored(shape, dtype)
        width = context + STEPS + 1
        table = torch.randperm(batch * width, device=device).view(batch, width).int() + 1
        table = torch.cat([torch.zeros(1, width, dtype=torch.int32, device=device), table])
        size = (batch * width + 1, KV_HEADS, dim)
        k, v = (torch.randn(size, dtype=dtype, device=device).to(kept) for _ in range(2))
        # Logits of deviation 3: attention is peaked, and a gate sees what one token does.
        q = 3 * torch.randn(batch, q_heads, dim, dtype=dtype, device=device)
        carried = 3 * torch.randn(batch + 1, q_heads, dim, dtype=dtype, device=device) if step == 0 else None
        lens = torch.full((batch,), context, device=device)
        carried_lens = torch.full((batch + 1,), context, device=device)
        reqs = torch.arange(1, batch + 1, device=device)
        columns = -(-context // ALIGN) * ALIGN
        starts = torch.arange(batch, device=device) * columns
        importance = torch.zeros(KV_HEADS, batch * columns, dtype=torch.float16, device=device)
        return cls(
            q,
            KvPool(k, v),
            Contexts(table, reqs, lens),
            Scores(importance, starts),
            members(shape["group"], device),
            Carried(carried, carried_lens),
            step,
        )

    def silent(self) -> Case:
        """The same attention without importance: no member speaks, no carried row."""
        nobody = Members(*(t[:0] for t in self.members))
        return replace(self, members=nobody, carried=Carried(None, self.carried.lens))

    def plan(self) -> Plan:
        """By the knobs as they are; made once, as for all layers and steps of a round."""
        knobs = draft_attention.KNOBS
        if knobs not in self.plans:
            lens, width = self.contexts.lens, self.contexts.table.shape[1]
            self.plans[knobs] = ops("triton").plan_contexts(lens, self.pool, max_context=width)
        return self.plans[knobs]

    def attend(self, kernel: str = "triton", elsewhere: torch.Tensor | None = None) -> torch.Tensor:
        return ops(kernel).draft_attention(
            self.q,
            self.pool,
            self.contexts,
            self.scores,
            self.members,
            self.carried,
            step=self.step,
            num_steps=STEPS,
            scale=self.q.shape[-1] ** -0.5,
            pooling=Pooling("max", "max", STEPS),
            elsewhere=elsewhere,
            plan=self.plan(),
        )

    def run(self, kernel: str = "triton") -> tuple[torch.Tensor, torch.Tensor]:
        """Output and importance."""
        self.scores.importance.zero_()
        return self.attend(kernel).float(), self.scores.importance.float()


def close(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1.6e-2, atol=8e-3)
    torch.testing.assert_close(found[1], expected[1], rtol=2e-3, atol=2e-3)


def nbytes(shape: Shape) -> int:
    kept = stored(shape, DTYPE)
    return shape["batch"] * shape["context"] * KV_HEADS * shape["dim"] * 2 * kept.itemsize


def prepare(shape: Shape):
    """What `tune` times."""
    cases = drawn(shape)
    expected = cases[0].run("torch")
    return [case.attend for case in cases], lambda: close(cases[0].run(), expected), nbytes(shape)


def prepare_alone(shape: Shape):
    """The same of importance alone."""
    cases = drawn(shape)
    return alone(shape, cases, cases[0].run("torch")[1])


def alone(shape: Shape, cases: list[Case], expected: torch.Tensor):
    """Calls, a check of one and their bytes where the rows of all requests attend elsewhere: keys are read,
    and no values."""
    everybody = torch.ones(shape["batch"], dtype=torch.bool, device=DEVICE)
    calls = [functools.partial(case.attend, elsewhere=everybody) for case in cases]

    def check() -> None:
        scores = cases[0].scores.importance.zero_()
        calls[0]()
        torch.testing.assert_close(scores.float(), expected, rtol=2e-3, atol=2e-3)

    return calls, check, nbytes(shape) // 2


def fa3_dense(shape: Shape, case: Case):
    """FA3 over the same slots, its own draft tokens included."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    batch, seen = shape["batch"], shape["context"] + shape["step"] + 1
    options = {
        "q": case.q,
        "k_cache": case.pool.k[:, None],
        "v_cache": case.pool.v[:, None],
        "page_table": case.contexts.table[1:].contiguous(),
        "cache_seqlens": torch.full((batch,), seen, dtype=torch.int32, device="cuda"),
        "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
        "max_seqlen_q": 1,
        "softmax_scale": shape["dim"] ** -0.5,
        "causal": True,
    }
    return lambda: flash_attn_with_kvcache(**options)


def drawn(shape: Shape) -> list[Case]:
    """As many as make one read of all of them pass through the cache."""
    return [Case.draw(shape, seed) for seed in range(copies(nbytes(shape)))]


def ours(results: Results, shape: Shape, cases: list[Case]) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's time with and without importance, and what its twin answers."""
    expected = cases[0].run("torch")
    if results.gate("triton+importance", shape, lambda: close(cases[0].run(), expected)):
        plain = [case.silent() for case in cases]
        for name, timed in (("triton", plain), ("triton+importance", cases)):
            results.add(name, shape, microseconds([case.attend for case in timed]), nbytes(shape))
    calls, check, keys = alone(shape, cases, expected[1])
    if results.gate("importance alone", shape, check):
        results.add("importance alone", shape, microseconds(calls), keys)
    return expected


def bench(results: Results, shape: Shape) -> None:
    cases = drawn(shape)
    expected = ours(results, shape, cases)
    try:
        calls = [fa3_dense(shape, case) for case in cases]

        def check() -> None:
            torch.testing.assert_close(calls[0]().float(), expected[0], rtol=1.6e-2, atol=8e-3)

        if results.gate("fa3-dense", shape, check):
            results.add("fa3-dense", shape, microseconds(calls, replays=5), nbytes(shape))
    except Exception as error:  # not installed, or not for this device
        print(f"fa3-dense is left out at {shape}: {type(error).__name__} {str(error)[:300]}")


def compile_one(shape: Shape, knobs: dict) -> None:
    """The op on tensors that are only shapes: with importance, without it, and that alone."""
    case = Case.draw(shape, device="meta", dtype=shape.get("dtype", torch.bfloat16))
    with compile_only(), using(draft_attention, knobs):
        case.attend()
        case.silent().attend()
        case.attend(elsewhere=torch.empty(shape["batch"], dtype=torch.bool, device="meta"))


def main() -> None:
    p = parser(__doc__)
    add_fp8(p)
    add_heads(p)
    args = p.parse_args()
    shapes = TUNED if args.tune else QUICK if args.quick else FULL
    if args.heads:
        shapes = heads_of(FIRST)
    if args.fp8:
        shapes = [{**shape, "stored": "float8_e4m3fn"} for shape in shapes]
    grid = [*SPLIT_GRID, *POOL_GRID, {"early": False}] if args.tune else [{}]
    compile_ahead(compile_one, shapes, grid)
    results = Results("draft_attention", args.out)
    for shape in shapes:
        if args.tune:
            tune(results, draft_attention, grid, shape, prepare)
            tune(results, draft_attention, SPLIT_GRID, {**shape, "alone": True}, prepare_alone)
        elif args.heads:
            ours(results, shape, drawn(shape))
        else:
            bench(results, shape)
    if args.heads:
        for provider in ("triton", "triton+importance"):
            results.beside_powers(provider, nbytes)
    results.finish()


if __name__ == "__main__":
    main()
