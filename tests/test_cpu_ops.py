"""The stand-ins of cpu_ops: against their meaning in plain Python, and against SGLang's own Triton kernels.

Triton's interpreter runs the latter on a CPU, in a process of its own: `python -m tests.test_cpu_ops`.
"""

from __future__ import annotations

import importlib
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sts_sglang.cpu import ops as cpu_ops
from sts_sglang.host.releases import release

FULL_MASK, QLEN_ONLY = 0, 1
TREES = [(1, 3, 4), (2, 3, 6), (4, 5, 8), (4, 3, 16), (8, 1, 5)]  # topk, steps, tokens to verify


@dataclass
class Node:
    """A draft token, numbered as SGLang numbers its candidates over all steps."""

    id: int
    score: float
    parent: Node | None
    children: list[Node] = field(default_factory=list)

    def path(self) -> list[Node]:
        return [self] if self.parent is None else [*self.parent.path(), self]


def draft(topk: int, steps: int, tokens: int) -> tuple[list[int], list[Node]]:
    """Draft like SGLang: each step keeps the topk best of topk * topk children, verify the `tokens - 1` best.

    Returns the parent list and the nodes to verify, root first.
    """
    root = Node(-1, 1.0, None)
    beam, first, parents, candidates = [root], 0, [-1, *range(topk)], []
    for step in range(steps):
        found = []
        for node in beam:
            for _ in range(topk):
                found.append(Node(first + len(found), node.score * random.random(), node))
        candidates += found
        beam = sorted(found, key=lambda node: -node.score)[:topk] if step else found
        if 0 < step < steps - 1:
            parents += [node.id for node in beam]
        first += len(found)
    kept = sorted(candidates, key=lambda node: -node.score)[: tokens - 1]
    nodes = [root, *sorted(kept, key=lambda node: node.id)]
    for node in nodes[1:]:
        node.parent.children.append(node)
    return parents if steps > 1 else [], nodes


def drafts(shape: tuple[int, int, int], bs: int = 3) -> tuple[torch.Tensor, torch.Tensor, list[list[Node]]]:
    """(parent_list, selected_index, nodes of each request)"""
    parents, nodes = zip(*(draft(*shape) for _ in range(bs)), strict=True)
    return torch.tensor(parents).long(), torch.tensor([[node.id for node in ns[1:]] for ns in nodes]), nodes


def tree_outputs(bs: int, tokens: int, seq_lens: torch.Tensor, mode: int) -> tuple[torch.Tensor, ...]:
    """What SGLang hands over to be filled: mask, positions, index, next token, next sibling."""
    context = int(seq_lens.sum()) * tokens if mode == FULL_MASK else 0
    mask = torch.ones(context + bs * tokens * tokens, dtype=torch.bool)
    return mask, torch.empty(bs * tokens, dtype=torch.long), *torch.full((3, bs, tokens), -1)


def build_tree(shape: tuple[int, int, int], mode: int, seed: int):
    random.seed(seed)
    parent_list, selected, nodes = drafts(shape)
    seq_lens = torch.tensor([5, 1, 37])
    inputs, outputs = (parent_list, selected, seq_lens), tree_outputs(3, shape[2], seq_lens, mode)
    return inputs, nodes, outputs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", [FULL_MASK, QLEN_ONLY], ids=["full mask", "qlen only"])
@pytest.mark.parametrize("shape", TREES, ids=lambda s: "topk{}-steps{}-tokens{}".format(*s))
def test_build_tree(shape: tuple[int, int, int], mode: int, seed: int) -> None:
    inputs, requests, outputs = build_tree(shape, mode, seed)
    tokens = shape[2]
    cpu_ops.build_tree(*inputs, *outputs, *shape, mode)
    mask, positions, index, next_token, next_sibling = outputs
    offset = 0
    for b, (nodes, length) in enumerate(zip(requests, inputs[2].tolist(), strict=True)):
        place = {id(node): i for i, node in enumerate(nodes)}
        context = length if mode == FULL_MASK else 0
        rows = mask[offset : offset + tokens * (context + tokens)].view(tokens, -1)
        offset += rows.numel()
        for i, node in enumerate(nodes):
            path = {place[id(ancestor)] for ancestor in node.path()}
            assert rows[i].tolist() == [True] * context + [j in path for j in range(tokens)]
            assert positions[b * tokens + i] == length + len(path) - 1
            assert index[b, i] == b * tokens + i
            children = [place[id(child)] for child in node.children]
            assert next_token[b, i] == (children[0] if children else -1)
            for child, sibling in pairwise([*children, -1]):
                assert next_sibling[b, child] == sibling
    assert offset == mask.numel()
    assert (next_sibling[:, 0] == -1).all()


def test_build_tree_refuses_bit_packed_masks() -> None:
    inputs, _, outputs = build_tree((2, 3, 6), QLEN_ONLY, 0)
    with pytest.raises(NotImplementedError, match="mode 2"):
        cpu_ops.build_tree(*inputs, *outputs, 2, 3, 6, 2)


def verify_tree(shape: tuple[int, int, int], seed: int):
    """Trees whose tokens come from so small a vocabulary that the target often agrees."""
    inputs, nodes, outputs = build_tree(shape, QLEN_ONLY, seed)
    cpu_ops.build_tree(*inputs, *outputs, *shape, QLEN_ONLY)
    torch.manual_seed(seed)
    bs, (_, steps, tokens) = len(nodes), shape
    candidates = torch.randint(3, (bs, tokens))
    target = torch.randint(3, (bs, tokens))
    filled = (
        torch.zeros(bs * tokens, dtype=torch.int32),
        torch.full((bs, steps + 1), -1, dtype=torch.int32),
        torch.empty(bs, dtype=torch.int32),
    )
    return filled, (candidates, *outputs[2:], target), nodes


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", TREES, ids=lambda s: "topk{}-steps{}-tokens{}".format(*s))
def test_verify_tree_greedy(shape: tuple[int, int, int], seed: int) -> None:
    filled, given, requests = verify_tree(shape, seed)
    cpu_ops.verify_tree_greedy(*filled, *given)
    predicts, accept_index, accepted = filled
    candidates, target = given[0], given[-1]
    tokens = shape[2]
    for b, nodes in enumerate(requests):
        place = {id(node): i for i, node in enumerate(nodes)}

        def walk(node: Node, b=b, place=place) -> list[int]:
            here = place[id(node)]
            agreeing = (c for c in node.children if candidates[b, place[id(c)]] == target[b, here])
            child = next(agreeing, None)
            return [here] if child is None else [here, *walk(child)]

        path = walk(nodes[0])
        assert accepted[b] == len(path) - 1
        padding = [-1] * (shape[1] + 1 - len(path))
        assert accept_index[b].tolist() == [b * tokens + i for i in path] + padding
        assert predicts[b * tokens + torch.tensor(path)].tolist() == target[b, path].tolist()


def test_some_trees_are_accepted_deeply_and_some_not_at_all() -> None:
    lengths = set()
    for seed in range(10):
        filled, given, _ = verify_tree((4, 5, 8), seed)
        cpu_ops.verify_tree_greedy(*filled, *given)
        lengths |= set(filled[2].tolist())
    assert {0, 1, 2} <= lengths


@dataclass
class Batch:
    """Requests of a token pool: rows in any order, lengths before and after, slots all different."""

    rows: torch.Tensor
    table: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def spans(self) -> list[tuple[int, int, int]]:
        return list(zip(self.rows.tolist(), self.start.tolist(), self.end.tolist(), strict=True))


def batch(seed: int) -> Batch:
    torch.manual_seed(seed)
    table = torch.randperm(10 * 100).view(10, 100).int()
    start = torch.randint(40, (5,))
    return Batch(torch.randperm(10)[:5], table, start, start + torch.tensor([3, 0, 40, 1, 7]))


def test_assign_extend_cache_locs() -> None:
    b = batch(0)
    out = torch.full((51 + 2,), -7)
    cpu_ops.assign_extend_cache_locs(b.rows, b.table, b.start, b.end, out, 100)
    slots = [int(b.table[row, p]) for row, start, end in b.spans() for p in range(start, end)]
    assert out.tolist() == [*slots, -7, -7]


def test_assign_req_to_token_pool() -> None:
    b, slots = batch(1), torch.arange(2000, 2051)
    before = b.table.clone()
    cpu_ops.assign_req_to_token_pool(b.rows, b.table, b.start, b.end, slots, 100)
    new = iter(slots.tolist())
    for row, start, end in b.spans():
        for p in range(start, end):
            before[row, p] = next(new)
    assert torch.equal(b.table, before)


def test_assign_draft_cache_locs() -> None:
    b = batch(2)
    out = torch.empty(5 * 6, dtype=torch.int64)
    cpu_ops.assign_draft_cache_locs(b.rows, b.table, b.start, out, 100, 2, 3)
    assert out.tolist() == [int(b.table[row, start + i]) for row, start, _ in b.spans() for i in range(6)]


def test_fill_bonus_tokens() -> None:
    out = torch.empty(3, dtype=torch.int32)
    accepted = torch.tensor([[5, 6, 7], [8, -1, -1], [1, 2, -1]])
    cpu_ops.fill_bonus_tokens(accepted, torch.tensor([3, 1, 2], dtype=torch.int32), out, 3)
    assert out.tolist() == [7, 8, 2]


def test_fill_accept_out_cache_loc() -> None:
    out = torch.zeros(6, dtype=torch.int64)
    index = torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32)
    cpu_ops.fill_accept_out_cache_loc(index, torch.tensor([50, 51, 52, 53]), out)
    assert out.tolist() == [50, 52, 53, 0, 0, 0]


@pytest.mark.parametrize("hidden", [None, 4], ids=["STANDALONE", "EAGLE"])
def test_gather_spec_extras(hidden: int | None) -> None:
    indices = torch.tensor([4, 0, 4], dtype=torch.int32)
    buffers = [torch.rand(6, 2), torch.randint(9, (6, 2)), torch.randint(9, (6,))]
    states = None if hidden is None else torch.rand(6, hidden)
    *rows, state = cpu_ops.gather_spec_extras(indices, *buffers, states)
    for row, buffer in zip(rows, buffers, strict=True):
        assert torch.equal(row, torch.stack([buffer[4], buffer[0], buffer[4]]))
    assert (
        state is None if states is None else torch.equal(state, torch.stack([states[i] for i in (4, 0, 4)]))
    )


@pytest.mark.parametrize("page", [1, 4, 16])
def test_alloc_decode(page: int) -> None:
    lengths = torch.tensor([1, page, page + 1, 3 * page, 3 * page + 2, 7])
    last = torch.arange(100, 106) * page + (lengths - 2) % page  # the slot before the new one
    free, out = torch.tensor([9, 4, 7, 30, 31, 32]), torch.empty(6, dtype=torch.int64)
    cpu_ops.alloc_decode(lengths, last, free, out, 8, page)
    pages = iter(free.tolist())
    expected = [
        next(pages) * page if length % page == 1 % page else slot + 1
        for length, slot in zip(lengths.tolist(), last.tolist(), strict=True)
    ]
    assert out.tolist() == expected


def test_alloc_decode_within_pages_needs_no_free_page() -> None:
    out = torch.empty(2, dtype=torch.int64)
    cpu_ops.alloc_decode(torch.tensor([2, 7]), torch.tensor([64, 85]), torch.empty(0).long(), out, 2, 16)
    assert out.tolist() == [65, 86]


def test_a_launch_takes_a_grid_like_a_triton_kernel() -> None:
    assert cpu_ops.Launch(divmod)[(3,)](7, 2) == (3, 1)


def test_vocab_mask() -> None:
    logits = torch.zeros(2, 40)
    allowed = torch.tensor([[0b101, 0], [-1, 1 << 7]], dtype=torch.int32)  # a bit for each token
    cpu_ops.apply_vocab_mask(None, logits, allowed)
    kept = [(row == 0).nonzero().flatten().tolist() for row in logits]
    assert kept == [[0, 2], [*range(32), 39]]


def test_a_gate_weighs_the_shared_expert() -> None:
    hidden, gate, shared, out = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8), torch.randn(3, 8)
    weights = [1 / (1 + math.exp(-sum(a * b for a, b in zip(row, gate, strict=True)))) for row in hidden]
    expected = [row + w * own for row, w, own in zip(out.clone(), weights, shared, strict=True)]
    cpu_ops.fused_gate_sigmoid_mul_add(hidden, gate, shared, out)
    torch.testing.assert_close(out, torch.stack(expected))


def test_queries_and_keys_are_normed_by_their_own() -> None:
    norms = SimpleNamespace(_q_norm=lambda x: x + 1, _k_norm=lambda x: x * 2)
    assert cpu_ops.minimax_qk_norm(norms, 5, 7) == (6, 14)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(4,), (1, 4)], ids=["a bias by expert", "a row of it"])
def test_a_bias_chooses_experts_and_weighs_none(scoring: str, shape: tuple[int, ...]) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([-9.0, 0.0, 0.0, 9.0]).view(shape)
    weights, ids = cpu_ops.fused_topk_native(None, logits, 2, False, bias, scoring)
    score = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
    assert sorted(ids[0].tolist()) == [1, 3] and torch.equal(weights, score.gather(1, ids))
    weights, ids = cpu_ops.fused_topk_native(None, logits, 2, True, None, scoring)
    assert ids.tolist() == [[0, 1]]
    assert weights.sum().item() == pytest.approx(1) and weights[0, 0] > weights[0, 1]


def test_experts_are_weighed_by_their_router() -> None:
    states, up, down = torch.randn(3, 8), torch.randn(4, 10, 8), torch.randn(4, 8, 5)
    ids, weights = torch.tensor([[2, 0], [1, 3], [3, 2]]), torch.rand(3, 2)
    found = cpu_ops.fused_moe(states, up, down, (weights, ids.int(), None), None)
    for row, state in enumerate(states):
        expected = torch.zeros(8)
        for expert, weight in zip(ids[row], weights[row], strict=True):
            gate, own = (up[expert] @ state).chunk(2)
            expected += weight * (down[expert] @ (torch.nn.functional.silu(gate) * own))
        torch.testing.assert_close(found[row], expected)


def test_what_is_allocated_on_a_gpu_by_name_is_here() -> None:
    def init(self, size: int, *, name: str) -> None:
        self.made = torch.empty(size, device="cuda"), torch.ones(size, dtype=torch.int32), name

    module = SimpleNamespace()
    cpu_ops.dbrx_experts(init, module, 3, name="ws")
    weights, others, name = module.made
    assert weights.device.type == "cpu" and weights.shape == (3,)
    assert others.tolist() == [1, 1, 1] and others.dtype == torch.int32 and name == "ws"


def test_plain_torch_attends_by_rows_of_tokens() -> None:
    layer = SimpleNamespace(tp_q_head_num=4, qk_head_dim=16)
    q = torch.randn(3 * 4, 16)
    for stand_in in (cpu_ops.torch_native_extend, cpu_ops.torch_native_decode):
        said = stand_in(lambda *args, **kwargs: (args, kwargs), "self", q, "k", "v", layer, "fb", save=True)
        (_, rows, *others), kwargs = said
        assert torch.equal(rows, q.view(3, 64)) and others == ["k", "v", layer, "fb"] and kwargs["save"]


def test_stand_ins_do_what_sglangs_triton_kernels_do() -> None:
    """A shift or an order that the tests above got wrong in the same way as the stand-in shows here."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "SGLANG_PLUGINS": "none", "SGLANG_PLATFORM": ""}
    command = [sys.executable, "-m", "tests.test_cpu_ops"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all agree"


def agree(kernel: Callable, stand_in: Callable, *outputs: torch.Tensor) -> None:
    """Run both on buffers of their own and compare everything they wrote."""
    ours, theirs = ([output.clone() for output in outputs] for _ in range(2))
    stand_in(*ours)
    kernel(*theirs)
    for mine, upstream in zip(ours, theirs, strict=True):
        assert torch.equal(mine, upstream), (stand_in, mine, upstream)


def compare_trees(shape: tuple[int, int, int], seed: int) -> None:
    built = "sgl_build_tree_kernel_efficient_cpu"
    module = next(name for name, ops in release.CPU_BRANCHES.items() if built in ops)
    trees = importlib.import_module(module)
    for mode in (FULL_MASK, QLEN_ONLY):
        inputs, _, outputs = build_tree(shape, mode, seed)
        agree(
            lambda *out, given=(inputs, mode): trees.sgl_build_tree_kernel_triton(
                *given[0], *out, *shape, given[1]
            ),
            lambda *out, given=(inputs, mode): cpu_ops.build_tree(*given[0], *out, *shape, given[1]),
            *outputs,
        )
    filled, given, _ = verify_tree(shape, seed)
    agree(
        lambda *out: trees.verify_tree_greedy_triton(*out, *given),
        lambda *out: cpu_ops.verify_tree_greedy(*out, *given),
        *filled,
    )


def compare_slots(seed: int) -> None:
    from sglang.kernels.ops.speculative import cache_locs
    from sglang.srt.mem_cache import allocation

    b = batch(seed)
    agree(
        lambda out: cache_locs.assign_extend_cache_locs[(5,)](b.rows, b.table, b.start, b.end, out, 100, 8),
        lambda out: cpu_ops.assign_extend_cache_locs(b.rows, b.table, b.start, b.end, out, 100),
        torch.zeros(51, dtype=torch.int64),
    )
    slots = torch.arange(2000, 2051)
    agree(
        lambda table: allocation.assign_req_to_token_pool[(5,)](b.rows, table, b.start, b.end, slots, 100, 8),
        lambda table: cpu_ops.assign_req_to_token_pool(b.rows, table, b.start, b.end, slots, 100),
        b.table,
    )
    agree(
        lambda out: cache_locs.assign_draft_cache_locs_contiguous[(5,)](
            b.rows, b.table, b.start, out, 100, 2, 3
        ),
        lambda out: cpu_ops.assign_draft_cache_locs(b.rows, b.table, b.start, out, 100, 2, 3),
        torch.zeros(30, dtype=torch.int64),
    )


def compare_accepted(seed: int) -> None:
    from sglang.kernels.ops.speculative import eagle

    torch.manual_seed(seed)
    lens = torch.randint(1, 5, (6,))
    tokens, slots = torch.randint(99, (6, 4)), torch.randperm(99)[:24]
    index = torch.arange(24).view(6, 4).masked_fill(torch.arange(4) >= lens[:, None], -1)
    agree(
        lambda out: eagle.fill_bonus_tokens[(6,)](tokens, lens, out, 4),
        lambda out: cpu_ops.fill_bonus_tokens(tokens, lens, out, 4),
        torch.zeros(6, dtype=torch.int64),
    )
    agree(
        lambda out: eagle.fill_accept_out_cache_loc[(24,)](index, slots, out, 32),
        lambda out: cpu_ops.fill_accept_out_cache_loc(index, slots, out),
        torch.zeros(24, dtype=torch.int64),
    )


def compare_pages(seed: int, page: int) -> None:
    """Also the naive extend of SGLang that the platform launches in place of the kernel."""
    from sglang.kernels.ops.memory.allocator import alloc_decode_kernel, alloc_extend_kernel
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    torch.manual_seed(seed)
    before = torch.randint(40, (8,))
    after = before + torch.randint(1, 50, (8,))
    last, free = 100 * page + torch.arange(8) * page + (before - 1) % page, torch.randperm(500)
    agree(
        lambda out: alloc_decode_kernel[(8,)](before + 1, last, free, out, 8, page),
        lambda out: cpu_ops.alloc_decode(before + 1, last, free, out, 8, page),
        torch.zeros(8, dtype=torch.int64),
    )
    agree(
        lambda out: alloc_extend_kernel[(8,)](before, after, last, free, out, 8, page),
        lambda out: alloc_extend_naive(before, after, last, free, out, page, out.device),
        torch.zeros(int((after - before).sum()), dtype=torch.int64),
    )


if __name__ == "__main__":
    for number in range(3):
        for tree in TREES:
            compare_trees(tree, number)
        compare_slots(number)
        compare_accepted(number)
        for page_size in (1, 4, 16):
            compare_pages(number, page_size)
    print("all agree")
