"""Sparse verify attention: Triton against its twin (gate), then time beside dense attention.

One layer, all requests of one length, selections drawn at random per (request, channel), bf16. Rivals
that are not installed are left out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from benchmarks.harness import Results, copies, microseconds, parser
from sts_kernels import ops

KV_HEADS = 8
FULL = {
    "context": [8192, 32768, 131072],
    "batch": [1, 4, 16],
    "keep": [0.05, 0.1, 0.25],
    "rows": [1, 4, 8],
    "group": [4, 8],
    "dim": [64, 128],
}
QUICK = [
    {"context": c, "batch": b, "keep": 0.1, "rows": 4, "group": 4, "dim": 128}
    for c, b in ((131072, 1), (32768, 4), (32768, 8), (32768, 16), (8192, 16))
]


@dataclass
class Case:
    """Inputs of one call."""

    args: list
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor

    @classmethod
    def draw(cls, shape: dict, seed: int) -> Case:
        torch.manual_seed(seed)
        context, batch, rows, dim = shape["context"], shape["batch"], shape["rows"], shape["dim"]
        width = context + rows
        slots = batch * width + 1
        table = torch.randperm(slots - 1, device="cuda")[: batch * width].view(batch, width).int() + 1
        table = torch.cat([torch.zeros(1, width, dtype=torch.int32, device="cuda"), table])  # slot 0: padding
        k, v = (torch.randn(slots, KV_HEADS, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        q = torch.randn(batch, rows, KV_HEADS * shape["group"], dim, dtype=torch.bfloat16, device="cuda")
        count = int(context * shape["keep"])
        reqs = torch.arange(1, batch + 1, device="cuda")
        lists = torch.stack(
            [
                table[b + 1, torch.randperm(context, device="cuda")[:count].sort().values]
                for b in range(batch)
                for _ in range(KV_HEADS)
            ]
        )
        start = torch.arange(batch * KV_HEADS, device="cuda").view(batch, KV_HEADS) * count
        counts = torch.full((batch, KV_HEADS), count, dtype=torch.int32, device="cuda")
        heads = torch.arange(KV_HEADS, dtype=torch.int32, device="cuda")
        lens = torch.full((batch,), context, device="cuda")
        mask = torch.ones(rows, rows, device="cuda").tril().bool().expand(batch, -1, -1).contiguous()
        attended = torch.zeros(2, dtype=torch.int64, device="cuda")
        args = [q, k, v, lists.flatten(), start, counts, heads, table, reqs, lens, mask, dim**-0.5, attended]
        return cls(args, q, k, v, table)


def dense_flashinfer(shape: dict, cases: list[Case]):
    """FlashInfer's paged prefill over the whole context, planned once."""
    import flashinfer

    context, batch, rows = shape["context"], shape["batch"], shape["rows"]
    calls = []
    for case in cases:
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        width = context + rows
        wrapper.plan(
            torch.arange(batch + 1, dtype=torch.int32, device="cuda") * rows,
            torch.arange(batch + 1, dtype=torch.int32, device="cuda") * width,
            case.table[1:, :width].flatten().contiguous(),
            torch.ones(batch, dtype=torch.int32, device="cuda"),
            KV_HEADS * shape["group"],
            KV_HEADS,
            shape["dim"],
            1,
            causal=True,
            q_data_type=torch.bfloat16,
        )
        kv = (case.k[:, None], case.v[:, None])
        q = case.q.flatten(0, 1)
        calls.append(lambda w=wrapper, q=q, kv=kv: w.run(q, kv))
    return calls


def dense_fa3(shape: dict, cases: list[Case]):
    """FA3 with a page table of page size 1, as SGLang calls it."""
    from sglang.jit_kernel.flash_attention import flash_attn_with_kvcache

    context, batch, rows = shape["context"], shape["batch"], shape["rows"]
    lens = torch.full((batch,), context + rows, dtype=torch.int32, device="cuda")
    cu = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * rows
    return [
        lambda c=case: flash_attn_with_kvcache(
            q=c.q.flatten(0, 1),
            k_cache=c.k[:, None],
            v_cache=c.v[:, None],
            page_table=c.table[1:],
            cache_seqlens=lens,
            cu_seqlens_q=cu,
            max_seqlen_q=rows,
            softmax_scale=shape["dim"] ** -0.5,
            causal=True,
        )
        for case in cases
    ]


RIVALS = {"fa3-dense": dense_fa3, "flashinfer-dense": dense_flashinfer}


def gate(shape: dict) -> None:
    """The kernel equals its twin, or nothing is timed."""
    case = Case.draw(shape, seed=1)
    found = ops("triton").sparse_verify_attention(*case.args)
    expected = ops("torch").sparse_verify_attention(*case.args)
    torch.testing.assert_close(found.float(), expected.float(), rtol=1.6e-2, atol=8e-3)


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes = (
        QUICK if args.quick else [dict(zip(FULL, s, strict=True)) for s in itertools.product(*FULL.values())]
    )
    results = Results("verify", args.out)
    for shape in shapes:
        if shape["batch"] * shape["context"] <= 1 << 18:
            gate(shape)
        count = int(shape["context"] * shape["keep"])
        per_token = 2 * KV_HEADS * shape["dim"] * 2
        sparse = shape["batch"] * (count + shape["rows"]) * per_token
        whole = shape["batch"] * (shape["context"] + shape["rows"]) * per_token
        cases = [Case.draw(shape, seed) for seed in range(min(4, copies(sparse)))]
        calls = [lambda c=c: ops("triton").sparse_verify_attention(*c.args) for c in cases]
        results.add("triton", shape, microseconds(calls), sparse)
        for name, rival in RIVALS.items():
            try:
                calls = rival(shape, cases[: max(1, copies(whole))])
            except ImportError as error:
                print(f"{name} is left out: {error}")
                continue
            results.add(name, shape, microseconds(calls), whole)


if __name__ == "__main__":
    main()
