"""Sparse verify attention: Triton against its twin (gate), then time beside FA3 and FlashInfer.

`triton-split` reads as many tokens in lists of unequal length, as a map that splits the budget makes them;
`plan` parts those lists among programs, for 32 layers in one launch, once a round.

One layer, all requests of one length, selections drawn at random per (request, channel), bf16. Rivals:
dense FA3 (as SGLang calls it) and FlashInfer over the whole context, and FlashInfer over the same
selections, with every (request, KV head) as a request of its own on a view of the pools with one head.
Those that cannot run here are left out.
"""

from __future__ import annotations

import functools
import itertools
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
from sts_kernels import ops, verify
from sts_kernels.layout import Contexts, KvPool, Lists, Plan
from sts_kernels.split_kv import splits

KV_HEADS = 8
FULL = {
    "context": [8192, 32768, 131072],
    "batch": [1, 4, 16],
    "dim": [64, 128],
    "rows": [1, 4, 8],
    "group": [4, 8],
    "keep": [0.05, 0.1, 0.25],
}
QUICK = [
    {"context": c, "batch": b, "dim": 128, "rows": 4, "group": 4, "keep": 0.1}
    for c, b in ((131072, 1), (32768, 4), (32768, 8), (32768, 16), (8192, 16))
]
GRID = settings(
    {
        "programs": [132, 264, 396, 528],
        "block": [32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [3, 5, 7],
    }
) + [
    {"early": False},
    {"least": 256},
    {"least": 1024},
    {"uneven": 1},
    {"uneven": 8},
    {"merge_warps": 1},
    {"merge_warps": 2},
]
LAYERS = 32  # that one plan is made for
# Parts of the budget of KV heads in a map that splits it; their mean is 1.
SPLIT = (0.3, 0.3, 0.5, 0.5, 0.9, 1.0, 1.5, 3.0)


@dataclass
class Pool:
    """KV of one layer: shared by all shapes of a context, a batch and a head size."""

    kv: KvPool
    contexts: Contexts  # table [1 + batch, context + 8], request 0 is padding
    order: torch.Tensor  # [batch * H_kv, context], each head's random order of the positions

    @classmethod
    def draw(cls, shape: Shape, seed: int) -> Pool:
        torch.manual_seed(seed)
        context, batch = shape["context"], shape["batch"]
        width = context + 8
        slots = torch.randperm(batch * width, device=DEVICE).view(batch, width).int() + 1
        table = torch.cat([torch.zeros(1, width, dtype=torch.int32, device=DEVICE), slots])
        size = (batch * width + 1, KV_HEADS, shape["dim"])
        kept = stored(shape, DTYPE)
        k, v = (torch.randn(size, dtype=DTYPE, device=DEVICE).to(kept) for _ in range(2))
        reqs = torch.arange(1, batch + 1, device=DEVICE)
        contexts = Contexts(table, reqs, torch.full((batch,), context, device=DEVICE))
        order = torch.rand(batch * KV_HEADS, context, device=DEVICE).argsort(1).int()
        return cls(KvPool(k, v), contexts, order)

    @property
    def slots(self) -> torch.Tensor:
        """Of the requests, without the padding's."""
        return self.contexts.table[1:]

    @classmethod
    def several(cls, shape: Shape) -> list[Pool]:
        """As many as make one read of all of them pass through the cache."""
        return [cls.draw(shape, seed) for seed in range(copies(kv_bytes(shape, shape["context"])))]


@dataclass
class Case:
    """Inputs of one call."""

    pool: Pool
    q: torch.Tensor  # [batch, rows, H_q, D]
    lists: Lists  # one a (request, KV head)
    channels: torch.Tensor  # [H_kv]
    mask: torch.Tensor  # [batch, rows, rows]
    attended: torch.Tensor  # [2]
    plans: dict[tuple, Plan] = field(default_factory=dict)

    @classmethod
    def draw(cls, shape: Shape, pool: Pool, part: int) -> Case:
        """Parts are disjoint: no call finds what another has read."""
        context, batch, rows, dim = shape["context"], shape["batch"], shape["rows"], shape["dim"]
        count = int(context * shape["keep"])
        chosen = pool.order[:, part * count : (part + 1) * count].sort(1).values.long()
        indices = pool.slots.repeat_interleave(KV_HEADS, 0).gather(1, chosen).flatten()
        # Logits of deviation 3: attention is peaked, and a gate sees what one token does.
        q = 3 * torch.randn(batch, rows, KV_HEADS * shape["group"], dim, dtype=DTYPE, device=DEVICE)
        starts = torch.arange(batch * KV_HEADS, device=DEVICE).view(batch, KV_HEADS) * count
        counts = torch.full((batch, KV_HEADS), count, dtype=torch.int32, device=DEVICE)
        mask = torch.ones(rows, rows, device=DEVICE).tril().bool().expand(batch, -1, -1).contiguous()
        channels = torch.arange(KV_HEADS, dtype=torch.int32, device=DEVICE)
        attended = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        return cls(pool, q, Lists(indices, starts, counts), channels, mask, attended)

    def split(self) -> Case:
        """The same list entries of a request, parted unequally between its KV heads."""
        batch = self.q.shape[0]
        total = self.lists.indices.numel() // batch
        ends = (
            (torch.tensor(SPLIT, dtype=torch.float64).cumsum(0) / KV_HEADS * total).round().long().to(DEVICE)
        )
        counts = ends.diff(prepend=ends.new_zeros(1))
        starts = torch.arange(batch, device=DEVICE)[:, None] * total + ends - counts
        counts = counts.int().expand(batch, -1).contiguous()
        return replace(self, lists=Lists(self.lists.indices, starts, counts), plans={})

    def whole(self) -> Case:
        """The same with everybody attending to everything."""
        return replace(self, lists=self.lists.whole(), plans={})

    def run(self, kernel: str = "triton") -> torch.Tensor:
        """The plan is made once, as for all layers of a round; so is FlashInfer's."""
        how = self.parts()
        if how not in self.plans:
            self.plans[how] = self.plan(how, layers=1).of(0)
        return ops(kernel).sparse_attention(
            self.q,
            self.pool.kv,
            self.lists,
            self.channels,
            self.pool.contexts,
            self.mask,
            self.attended,
            scale=self.q.shape[-1] ** -0.5,
            plan=self.plans[how],
        )

    def parts(self) -> tuple[int, int]:
        """Programs, and parts of a list at most, by the knobs as they are."""
        return splits(self.lists.counts.numel(), self.pool.contexts.table.shape[1], verify.KNOBS)

    def plan(self, how: tuple[int, int], layers: int, kernel: str = "triton") -> Plan:
        channels, (programs, most) = self.channels.expand(layers, -1).contiguous(), how
        lens = self.pool.contexts.lens
        return ops(kernel).plan_lists(self.lists, channels, lens, programs=programs, most=most)


def kv_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of keys and values of so many tokens of every request."""
    return shape["batch"] * tokens * KV_HEADS * shape["dim"] * 2 * stored(shape, DTYPE).itemsize


def sparse_bytes(shape: Shape) -> int:
    return kv_bytes(shape, int(shape["context"] * shape["keep"]) + shape["rows"])


def cases_of(shape: Shape, pools: list[Pool]) -> list[Case]:
    """Enough disjoint selections to keep the cache cold, over as few pools as hold them."""
    number = min(copies(sparse_bytes(shape), 64), len(pools) * int(1 / shape["keep"]))
    return [Case.draw(shape, pools[i % len(pools)], i // len(pools)) for i in range(number)]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=1.6e-2, atol=8e-3)


# ---- rivals: (shape, case) to a call that returns [batch, rows, H_q, D], planned


@functools.cache
def flashinfer_workspace() -> torch.Tensor:
    """Shared: calls follow each other."""
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def flashinfer_plan(shape: Shape, requests: int, kv_heads: int, tokens: int, indices: torch.Tensor):
    """FlashInfer's paged prefill of page size 1, planned for requests of `tokens` tokens."""
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(flashinfer_workspace(), "NHD", backend="fa2")
    steps = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
    wrapper.plan(
        steps * shape["rows"],
        steps * tokens,
        indices.flatten().int().contiguous(),
        torch.ones(requests, dtype=torch.int32, device="cuda"),
        kv_heads * shape["group"],
        kv_heads,
        shape["dim"],
        1,
        causal=True,
        q_data_type=DTYPE,
        kv_data_type=stored(shape, DTYPE),
    )
    return wrapper


def flashinfer_dense(shape: Shape, case: Case):
    tokens = shape["context"] + shape["rows"]
    wrapper = flashinfer_plan(shape, shape["batch"], KV_HEADS, tokens, case.pool.contexts.table[1:, :tokens])
    q, kv = case.q.flatten(0, 1), (case.pool.kv.k[:, None], case.pool.kv.v[:, None])
    return lambda: wrapper.run(q, kv).view_as(case.q)


def flashinfer_headwise(shape: Shape, case: Case):
    batch, rows, group, dim = (shape[k] for k in ("batch", "rows", "group", "dim"))
    heads = torch.arange(KV_HEADS, device="cuda").repeat(batch)[:, None]
    tail = case.pool.contexts.table[1:, shape["context"] : shape["context"] + rows].repeat_interleave(
        KV_HEADS, 0
    )
    indices = torch.cat([case.lists.indices.view(batch * KV_HEADS, -1), tail], 1).long() * KV_HEADS + heads
    wrapper = flashinfer_plan(shape, batch * KV_HEADS, 1, indices.shape[1], indices)
    # Queries head-major; in a model this copy would cost time too, here it is not counted.
    q = case.q.view(batch, rows, KV_HEADS, group, dim).transpose(1, 2).reshape(-1, group, dim)
    kv = (case.pool.kv.k.view(-1, 1, 1, dim), case.pool.kv.v.view(-1, 1, 1, dim))
    turn = (batch, KV_HEADS, rows, group, dim)
    return lambda: wrapper.run(q, kv).view(turn).transpose(1, 2).flatten(2, 3)


def fa3_dense(shape: Shape, case: Case):
    """As SGLang's FlashAttentionBackend calls it."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    batch, rows = shape["batch"], shape["rows"]
    options = {
        "q": case.q.flatten(0, 1),
        "k_cache": case.pool.kv.k[:, None],
        "v_cache": case.pool.kv.v[:, None],
        "page_table": case.pool.slots.contiguous(),
        "cache_seqlens": torch.full((batch,), shape["context"] + rows, dtype=torch.int32, device="cuda"),
        "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device="cuda") * rows,
        "max_seqlen_q": rows,
        "softmax_scale": shape["dim"] ** -0.5,
        "causal": True,
    }
    return lambda: flash_attn_with_kvcache(**options).view_as(case.q)


DENSE = {"fa3-dense": fa3_dense, "fi-dense": flashinfer_dense}
SPARSE = {"fi-headwise": flashinfer_headwise}


def rivals(results: Results, shape: Shape, cases: list[Case], which: dict, nbytes: int, expected) -> None:
    """Gate and time them; one that raises is left out from here on."""
    for name, plan in list(which.items()):
        try:
            calls = [plan(shape, case) for case in cases]
            if results.gate(name, shape, lambda c=calls[0]: close(c(), expected)):
                results.add(name, shape, microseconds(calls, replays=5), nbytes)
        except (AttributeError, NameError):  # ours, not the rival's
            raise
        except Exception as error:  # whatever is not installed, or does not compile here
            print(f"{name} is left out from {shape} on: {type(error).__name__} {str(error)[:300]}")
            del which[name]


def ours(results: Results, shape: Shape, cases: list[Case]) -> torch.Tensor:
    """The kernel's time, and what its twin answers."""
    expected = cases[0].run("torch")
    if results.gate("triton", shape, lambda: close(cases[0].run(), expected)):
        results.add("triton", shape, microseconds([c.run for c in cases]), sparse_bytes(shape))
    return expected


def bench(results: Results, shape: Shape, pools: list[Pool], timed_dense: set[tuple]) -> None:
    """One shape; dense rivals once for all keep ratios."""
    cases = cases_of(shape, pools)
    expected = ours(results, shape, cases)
    split = [case.split() for case in cases]
    if results.gate("triton-split", shape, lambda: close(split[0].run(), split[0].run("torch"))):
        results.add("triton-split", shape, microseconds([c.run for c in split]), sparse_bytes(shape))
    how = split[0].parts()
    plan = functools.partial(split[0].plan, how, LAYERS)
    if results.gate("plan", shape, lambda: same_plan(plan(), split[0].plan(how, 1, "torch"))):
        results.add("plan", shape, microseconds([plan]), split[0].lists.starts.nbytes * LAYERS)
    rivals(results, shape, cases[:8], SPARSE, sparse_bytes(shape), expected)
    whole = {k: v for k, v in shape.items() if k != "keep"}
    if tuple(whole.values()) not in timed_dense:
        timed_dense.add(tuple(whole.values()))
        case = Case.draw(shape, pools[0], 0).whole()
        full = kv_bytes(shape, shape["context"] + shape["rows"])
        others = [Case.draw(shape, p, 0) for p in pools[1:]]
        rivals(results, whole, [case, *others], DENSE, full, case.run("torch"))


def same_plan(plans: Plan, twin: Plan) -> None:
    """Of every layer."""
    used = int(twin.ends[0, -1])
    assert (plans.ends == twin.ends).all() and (plans.work[:, :used] == twin.work[:, :used]).all()


def compile_one(shape: Shape, knobs: dict) -> None:
    """The op on tensors that are only shapes."""

    def like(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    batch, rows, dim = shape["batch"], shape["rows"], shape["dim"]
    width = shape["context"] + 8
    dtype = shape.get("dtype", torch.bfloat16)
    pool = like(batch * width + 1, KV_HEADS, dim, dtype=stored(shape, dtype))
    q = like(batch, rows, KV_HEADS * shape["group"], dim, dtype=dtype)
    per_channel = (batch, KV_HEADS)
    lists = Lists(like(8), like(*per_channel, dtype=torch.int64), like(*per_channel))
    reqs, lens = (like(batch, dtype=torch.int64) for _ in range(2))
    contexts = Contexts(like(batch + 1, width), reqs, lens)
    mask, attended = like(batch, rows, rows, dtype=torch.bool), like(2, dtype=torch.int64)
    inputs = (q, KvPool(pool, pool), lists, like(KV_HEADS), contexts, mask, attended)
    with compile_only(), using(verify, knobs):
        ops("triton").sparse_attention(*inputs, scale=dim**-0.5)


def prepare(shape: Shape):
    """What `tune` times."""
    cases = cases_of(shape, Pool.several(shape))
    expected = cases[0].run("torch")
    return [c.run for c in cases], lambda: close(cases[0].run(), expected), sparse_bytes(shape)


def main() -> None:
    p = parser(__doc__)
    add_fp8(p)
    add_heads(p)
    args = p.parse_args()
    shapes = QUICK if args.quick or args.tune else settings(FULL)
    if args.heads:
        shapes = heads_of(QUICK)
    if args.fp8:
        shapes = [{**shape, "stored": "float8_e4m3fn"} for shape in shapes]
    compile_ahead(compile_one, shapes, GRID if args.tune else [{}])
    results = Results("verify", args.out)
    if args.tune:
        for shape in shapes:
            tune(results, verify, GRID, shape, prepare)
        results.finish()
    timed_dense: set[tuple] = set()
    for _, same in itertools.groupby(shapes, lambda s: (s["context"], s["batch"], s["dim"])):
        same = list(same)
        pools = Pool.several(same[0])
        for shape in same:
            if args.heads:
                ours(results, shape, cases_of(shape, pools))
            else:
                bench(results, shape, pools, timed_dense)
        del pools
    if args.heads:
        results.beside_powers("triton", sparse_bytes)
    results.finish()


if __name__ == "__main__":
    main()
