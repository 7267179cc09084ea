"""Sizes of the lists of a batch, both implementations, against loops over requests and heads."""

from __future__ import annotations

import math
import random

import pytest
import torch

from sts_kernels import ops
from sts_kernels.layout import Contexts, Count, Room, Sizes
from sts_sglang.config import CEIL_GUARD, StsConfig
from sts_sglang.core.sizes import Capacity
from sts_sglang.headmap import HeadMap

KERNELS = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REQUESTS, STEPS = 80, 64


class Batch:
    """Requests in any order, a fifth of them with a keep of their own, and one whose row is a leftover."""

    def __init__(self, bs: int, channels: int, split: bool, seed: int = 0, longest: int = 40_000):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.reqs = rng.sample(range(1, REQUESTS), bs)
        self.lengths = [rng.choice((1, 63, 64, 65, rng.randrange(1, longest))) for _ in range(bs)]
        own = [
            rng.choice((0.05, 0.1, 0.29, 1.0)) if rng.random() < 0.2 else math.nan for _ in range(REQUESTS)
        ]
        self.keeps = torch.tensor(own, dtype=torch.float64)
        self.carried = torch.full((REQUESTS,), -7)
        self.carried[self.reqs] = torch.tensor(self.lengths, dtype=torch.int64)
        if bs > 2:
            self.carried[self.reqs[1]] += 1
        self.channels, self.split = channels, None
        if split:  # rising from nothing to everything, each channel by another curve
            bends = 0.3 + 2 * torch.rand(channels, generator=generator, dtype=torch.float64)
            self.split = (torch.arange(STEPS + 1) / STEPS)[:, None].double() ** bends
        self.counts = torch.arange(len(Count))

    def run(
        self,
        kernel: str,
        config: StsConfig,
        columns: int,
        budget: int,
        entries: int,
        full=None,
        list_full=False,
    ):
        """Sizes and totals, on the CPU."""
        where = {"device": DEVICE if kernel == "triton" else "cpu"}
        counts = self.counts.clone().to(**where)
        table = torch.zeros(REQUESTS, 1, dtype=torch.int32, **where)
        reqs, lens = (torch.tensor(t, dtype=torch.int64, **where) for t in (self.reqs, self.lengths))
        sizes = ops(kernel).size_lists(
            Contexts(table, reqs, lens),
            self.carried.to(**where),
            self.keeps.to(**where),
            config.rule(),
            Room(self.channels, columns, budget, entries),
            counts,
            split=None if self.split is None else self.split.to(**where),
            full=None if full is None else torch.tensor(full, dtype=torch.bool, **where),
            list_full=list_full,
        )
        return Sizes(*(t.cpu() for t in sizes)), counts.cpu()

    def list_length(self, config: StsConfig, length: int, budget: int, channel: int) -> int:
        if self.split is None:
            return budget
        at = budget / length * STEPS
        low = min(int(at), STEPS - 1)
        a, z = (float(self.split[step, channel]) for step in (low, low + 1))
        wanted = math.ceil((a + (at - low) * (z - a)) * length - CEIL_GUARD)
        return min(max(wanted, config.sink + config.recent), length)

    def by_definition(
        self, config: StsConfig, columns: int, budget: int, entries: int, full=None, list_full=False
    ):
        """The same by loops."""
        bs = len(self.reqs)
        full = full or [False] * bs
        known, sparse = [-1] * bs, [-1] * bs
        budgets = [0] * bs
        starts, lists = [[0] * self.channels for _ in range(bs)], [[-1] * self.channels for _ in range(bs)]
        counts = self.counts.tolist()
        own = [not math.isnan(self.keeps[req]) for req in self.reqs]
        for b, (req, length) in enumerate(zip(self.reqs, self.lengths, strict=True)):
            budgets[b] = config.budget_for(length, float(self.keeps[req]) if own[b] else None)
            if budgets[b] > budget:
                budgets[b] = length
            scored = int(self.carried[req]) == length
            few = scored and budgets[b] < length and (list_full or not full[b])
            sizes = [self.list_length(config, length, budgets[b], c) for c in range(self.channels)]
            room = [size if few and size < length else 0 for size in sizes]
            assert sum(room) <= entries
            starts[b] = [b * entries + sum(room[:c]) for c in range(self.channels)]
            if scored:
                known[b], lists[b] = b * columns, [size or -1 for size in room]
                sparse[b] = b * columns if few else -1
            sparsely = Count.SPARSE_VERIFIES if scored else Count.DENSE_VERIFIES
            counts[Count.FULL_VERIFIES if full[b] else sparsely] += req > 0
        made = (known, sparse, budgets, starts, lists)
        return Sizes(*map(torch.tensor, made)), torch.tensor(counts)


def check(batch: Batch, config: StsConfig, kernel: str, *args) -> Sizes:
    (sizes, counts), (expected, counted) = (
        batch.run(kernel, config, *args),
        batch.by_definition(config, *args),
    )
    for name, found, right in zip(Sizes._fields, sizes, expected, strict=True):
        assert found.tolist() == right.tolist(), name
    assert counts.tolist() == counted.tolist()
    return sizes


CONFIGS = [
    StsConfig(budget=0),
    StsConfig(keep=0.29),
    StsConfig(policy="fixed", budget=700),
    StsConfig(policy="top_p", budget=700, sink=1, recent=1),
]
ROOM = (40_000, 40_000, 10**9)  # columns, budget and entries of a request


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("split", [False, True], ids=["uniform", "split"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.policy}-{c.budget}-{c.keep}")
def test_sizes_follow_the_definition(kernel: str, split: bool, config: StsConfig) -> None:
    for bs, channels in ((1, 1), (5, 3), (8, 128), (64, 16)):
        sizes = check(Batch(bs, channels, split, seed=bs), config, kernel, *ROOM)
        assert bs < 64 or (sizes.counts > 0).any() and (sizes.counts == -1).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_who_wants_more_than_a_list_can_have_attends_to_everything(kernel: str) -> None:
    """By its own length and keep alone, and counted as what it asked for: its importance is known."""
    batch, config = Batch(40, 6, True, seed=3), StsConfig(budget=0)
    everything = check(batch, config, kernel, *ROOM)
    limited = check(batch, config, kernel, 40_000, 3000, 10**9)
    more = everything.budgets > 3000
    assert more.any() and (limited.counts[more] == -1).all()
    assert (limited.counts[~more] == everything.counts[~more]).all()
    assert (limited.known == everything.known).all()


@pytest.mark.parametrize("policy", ["ratio", "fixed", "top_p"])
@pytest.mark.parametrize("keeps", ["any", "at_most", "off"])
@pytest.mark.parametrize("seed", range(12))
def test_a_requests_part_of_the_lists_holds_whatever_it_may_ask_for(policy, keeps, seed) -> None:
    """With shares split as head maps split them, channels that serve one head or many, and budgets that are
    hardly more than sink and recent; at every keep and length."""
    rng = random.Random(seed)
    kinds = [((0, i),) for i in range(rng.randrange(1, 4))]
    share = {kind: rng.uniform(0.05, 4.0) for kind in kinds}
    sources = tuple(tuple(rng.choice(kinds) for _ in range(3)) for _ in range(3))
    shares = tuple(tuple(share[kind] for kind in layer) for layer in sources)
    head_map = HeadMap(sources, "drawn", shares=rng.choice((shares, shares, None)))
    sink, recent = rng.randrange(1, 5), rng.randrange(1, 80)
    budget = sink + recent + rng.choice((0, 0, 1, 100))
    keep = rng.choice((0.05, 0.1, 0.4))
    config = StsConfig(policy=policy, keep=keep, budget=budget, sink=sink, recent=recent, request_keep=keeps)
    room = Capacity.of(1, 3000).room(config, head_map)
    batch = Batch(60, len(head_map.channels), False, seed=seed, longest=3000)
    most = {"any": 1.0, "at_most": keep, "off": 0.0}[keeps]
    own = [rng.choice((math.nan, rng.random() * most)) if most else math.nan for _ in range(REQUESTS)]
    batch.keeps = torch.tensor(own, dtype=torch.float64)
    batch.split = head_map.split() and torch.tensor(head_map.split(), dtype=torch.float64)
    sizes, _ = batch.run("torch", config, *room[1:])
    assert sizes.counts.clamp(min=0).sum(1).max() <= room.entries
    # What the configuration asks for is never more than a list can have, nor what `at_most` lets a request.
    asked = [
        config.budget_for(n, None if math.isnan(k) else k)
        for n, k in zip(batch.lengths, batch.keeps[batch.reqs].tolist(), strict=True)
    ]
    held = torch.tensor([keeps != "any" or math.isnan(k) for k in batch.keeps[batch.reqs].tolist()])
    assert (sizes.budgets == torch.tensor(asked))[held].all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("list_full", [False, True])
def test_who_is_to_attend_to_everything_is_counted_apart(kernel: str, list_full: bool) -> None:
    batch = Batch(9, 4, False, seed=4)
    full = [b % 3 == 0 for b in range(9)]
    sizes = check(batch, StsConfig(budget=0), kernel, *ROOM, full, list_full)
    assert (sizes.counts[::3] > 0).any() == list_full


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_of_a_graph_is_not_counted(kernel: str) -> None:
    batch = Batch(4, 4, False, seed=5)
    batch.reqs[2:], batch.lengths[2:] = [0, 0], [1, 1]
    check(batch, StsConfig(budget=0), kernel, *ROOM)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_of_an_empty_batch(kernel: str) -> None:
    sizes, counts = Batch(0, 5, True).run(kernel, StsConfig(), 128, 100, 100)
    assert [tuple(t.shape) for t in sizes] == [(0,), (0,), (0,), (0, 5), (0, 5)]
    assert counts.tolist() == list(range(len(Count)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keeps": torch.zeros(REQUESTS)}, "keeps must be float64"),
        ({"carried": torch.zeros(3, dtype=torch.int64)}, "carried_lens must be int64"),
        ({"split": torch.zeros(65, 3, dtype=torch.float64)}, r"split must be float64 \[steps \+ 1, 4\]"),
        ({"split": torch.zeros(1, 4, dtype=torch.float64)}, "2 rows or more"),
        ({"columns": 100}, "100 columns a request are no multiple of 64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kernel: str, change: dict, message: str) -> None:
    change = dict(change)
    batch, room = Batch(3, 4, True), change.pop("columns", 128)
    vars(batch).update(change)
    with pytest.raises(ValueError, match=message):
        batch.run(kernel, StsConfig(), room, 100, 100)
