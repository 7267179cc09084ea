"""Lists and masks of the FlashInfer verify path, both implementations, against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sts_kernels import ops
from sts_kernels.layout import WHOLE, Contexts, Lists, PagedLists

TOKENS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (context, tokens listed, room planned): to the brim, with padding, whole, a context below the budget,
# more than a block of the kernel, one token, room that is no multiple of a byte
CASES = [(60, 20, 20), (60, 20, 31), (60, WHOLE, 64), (9, WHOLE, 20), (1500, 1100, 1280), (1, WHOLE, 1)]


class Batch:
    """Requests with permuted slots; every buffer is garbage wherever an op has no business reading."""

    def __init__(self, cases=CASES, kv_heads: int = 2, channels: int = 3, padded: int = 0):
        self.cases = [*cases, *[(1, WHOLE, 0)] * padded]
        self.kv_heads, self.channels = kv_heads, channels
        bs, width = len(self.cases), max([length for length, *_ in self.cases], default=1) + TOKENS
        self.table = (torch.randperm((len(cases) + 2) * width) + 1).view(-1, width).int()
        self.table[0] = 0
        reqs = torch.randperm(len(cases) + 1)[: len(cases)] + 1
        self.reqs = torch.cat([reqs, torch.zeros(padded, dtype=torch.int64)])
        self.seq_lens = torch.tensor([length for length, *_ in self.cases], dtype=torch.int64)
        self.count = torch.tensor([[count] * channels for _, count, _ in self.cases], dtype=torch.int32)
        self.count = self.count.view(bs, channels)
        sizes = self.count.clamp(min=0).flatten().long()
        self.start = (sizes.cumsum(0) - sizes).view(bs, channels)
        self.listed = torch.full((int(sizes.sum()) + 7,), -(10**6), dtype=torch.int32)
        for b, (length, count, _) in enumerate(self.cases):
            for c in range(channels if count > 0 else 0):
                chosen = self.table[self.reqs[b], torch.randperm(length)[:count]]
                self.listed[self.start[b, c] : self.start[b, c] + count] = chosen
        self.heads = torch.randint(channels, (kv_heads,), dtype=torch.int32)
        lists = torch.tensor([room + TOKENS for *_, room in self.cases for _ in range(kv_heads)])
        self.ends = ends(lists)
        self.mask_ends = ends((TOKENS * lists + 7) // 8)
        self.indices = torch.full((int(self.ends[-1]) + 5,), -7, dtype=torch.int32)
        self.mask = torch.full((int(self.mask_ends[-1]) + 5,), 0xA5, dtype=torch.uint8)
        self.attended = torch.tensor([1000, 5000])
        self.clipped = torch.zeros(1, dtype=torch.int64)

    def run(self, kernel: str, layers: int = 1) -> Batch:
        on = [t.to(DEVICE) for t in (self.indices, self.mask, self.attended, self.clipped)]
        ops(kernel).headwise_lists(
            Lists(*(t.to(DEVICE) for t in (self.listed, self.start, self.count))),
            self.heads.to(DEVICE),
            Contexts(*(t.to(DEVICE) for t in (self.table, self.reqs, self.seq_lens))),
            PagedLists(self.ends.to(DEVICE), self.mask_ends.to(DEVICE), *on[:2]),
            *on[2:],
            tokens=TOKENS,
            layers=layers,
        )
        self.indices, self.mask, self.attended, self.clipped = (t.cpu() for t in on)
        return self

    def pair(self, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of a (request, KV head), and bool [T, entries] of its mask."""
        p = b * self.kv_heads + h
        found = self.indices[self.ends[p] : self.ends[p + 1]]
        packed = self.mask[self.mask_ends[p] : self.mask_ends[p + 1]].numpy()
        bits = np.unpackbits(packed, bitorder="little")
        assert not bits[TOKENS * found.numel() :].any()
        return found, torch.from_numpy(bits[: TOKENS * found.numel()]).bool().view(TOKENS, -1)

    def chosen(self, b: int, h: int) -> list[int]:
        """Slots of the context that a (request, KV head) attends to."""
        length, count, _ = self.cases[b]
        start = int(self.start[b, self.heads[h]])
        slots = self.table[self.reqs[b], :length] if count < 0 else self.listed[start : start + count]
        return slots.tolist()


def ends(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
def test_every_row_sees_the_chosen_tokens_and_the_chain_up_to_itself(kernel, kv_heads):
    batch = Batch(kv_heads=kv_heads).run(kernel)
    for b, (length, _, room) in enumerate(batch.cases):
        context, tail = batch.table[batch.reqs[b], :length], batch.table[batch.reqs[b], length:]
        for h in range(kv_heads):
            entries, seen = batch.pair(b, h)
            assert entries.numel() == room + TOKENS
            for row in range(TOKENS):
                expected = batch.chosen(b, h) + tail[: row + 1].tolist()
                found = entries[seen[row]]
                assert (found % kv_heads == h).all()
                assert sorted((found // kv_heads).tolist()) == sorted(expected)
            hidden = entries[~seen.any(0)] // kv_heads
            assert set(hidden.tolist()) <= {int(context[0])}  # of the request itself: never garbage


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_nothing_else_is_written_and_tokens_are_counted_per_layer(kernel):
    batch = Batch().run(kernel, layers=3)
    assert (batch.indices[batch.ends[-1] :] == -7).all()
    assert (batch.mask[batch.mask_ends[-1] :] == 0xA5).all()
    selected = sum(length if count < 0 else count for length, count, _ in batch.cases)
    there = sum(length for length, *_ in batch.cases)
    assert batch.attended.tolist() == [1000 + 3 * 2 * selected, 5000 + 3 * 2 * there]
    assert batch.clipped.item() == 0


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_what_finds_no_room_is_counted_and_the_last_tokens_found_it(kernel):
    batch = Batch([(60, WHOLE, 10), (60, 30, 12)]).run(kernel)
    for b, room in enumerate([10, 12]):
        for h in range(2):
            entries, seen = batch.pair(b, h)
            found = (entries[seen[0]] // 2)[:room].tolist()
            assert found == batch.chosen(b, h)[-room:]
    assert batch.clipped.item() == 2 * (50 + 18)
    assert batch.attended.tolist() == [1000 + 2 * (10 + 12), 5000 + 2 * (60 + 60)]


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_padded_rows_are_harmless_and_not_counted(kernel):
    batch = Batch(CASES[:2], padded=2).run(kernel)
    assert batch.attended.tolist() == [1000 + 2 * 40, 5000 + 2 * 120] and batch.clipped.item() == 0
    for b in (2, 3):
        for h in range(2):
            entries, seen = batch.pair(b, h)
            assert entries.tolist() == [h] * TOKENS and torch.equal(seen, torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_an_empty_batch_and_wrong_buffers(kernel):
    Batch([]).run(kernel)
    batch = Batch()
    batch.ends = batch.ends[:-1]
    with pytest.raises(ValueError, match=r"headwise_lists: indptr must be int32 \[12 \+ 1 or more\]"):
        batch.run(kernel)
    batch = Batch()
    batch.mask = batch.mask.int()
    with pytest.raises(ValueError, match="headwise_lists: mask must be uint8, got torch.int32"):
        batch.run(kernel)


@pytest.mark.parametrize("kv_heads, padded", [(1, 0), (8, 3)])
def test_both_write_the_same_bytes(kv_heads, padded):
    torch.manual_seed(7)
    kernel = Batch(kv_heads=kv_heads, padded=padded).run("triton")
    torch.manual_seed(7)
    twin = Batch(kv_heads=kv_heads, padded=padded).run("torch")
    assert torch.equal(kernel.indices, twin.indices) and torch.equal(kernel.mask, twin.mask)
