"""Selections that are kept for some rounds: who is scored when, and what the others go by."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch.utils._python_dispatch import TorchDispatchMode

from sts_kernels import ops
from sts_kernels.layout import KEPT_TOKENS, WHOLE, Contexts, Count, Kept, KeptSizes, Lists, Room, Sizes
from sts_sglang.config import MOST_REFRESH, ConfigError, StsConfig
from tests.test_backends import DIM, KV_HEADS, LAYERS, Q_HEADS, SCALE, TOKENS, Rig

KERNELS = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, CHANNELS, ENTRIES = 40, 3, 4000


def on(kernel: str, value):
    """On the device of a kernel."""
    if isinstance(value, tuple):
        return type(value)(*(on(kernel, part) for part in value))
    return value.to(DEVICE if kernel == "triton" else "cpu") if isinstance(value, torch.Tensor) else value


def some_kept(rng: random.Random, lengths: dict[int, int]) -> Kept:
    """Of rows with contexts of these lengths: some were selected long ago, some lately, some never."""
    made, last, rounds = ([0] * ROWS for _ in range(3))
    for row, length in lengths.items():
        since = rng.choice((0, 1, 7, 40, KEPT_TOKENS, KEPT_TOKENS + 1, -3, length))
        made[row], rounds[row] = max(0, length - since), rng.randrange(1, 6)
        last[row] = length - rng.randrange(0, 6)
    counts = torch.randint(1, 900, (ROWS, CHANNELS), dtype=torch.int32)
    counts[torch.rand(ROWS, CHANNELS) < 0.2] = WHOLE
    wide = counts.clamp(min=0).long()
    starts = torch.arange(ROWS)[:, None] * ENTRIES + wide.cumsum(1) - wide + 5
    positions = torch.randint(0, 1 << 30, (ROWS * ENTRIES,), dtype=torch.int32)
    accepted = torch.randint(0, 9, (ROWS, 4))
    accepted[:, 1] = accepted[:, 1].clamp(min=1)
    numbers = (torch.tensor(t) for t in (made, rounds, last))
    return Kept(positions, starts, counts, *numbers, accepted)


def sizes_by_loops(
    contexts: Contexts, sizes: Sizes, kept: Kept, every: int, percent: int | None, first_too: bool
):
    """What is written, by name, one request after the other."""
    kept = Kept(*(t.clone() for t in kept))
    known, sparse, counts = (t.clone() for t in (sizes.known, sizes.sparse, sizes.counts))
    starts = (torch.arange(len(known)) * ENTRIES)[:, None].repeat(1, CHANNELS)
    lists, totals = torch.full_like(counts, WHOLE), torch.zeros(len(Count), dtype=torch.int64)
    scored, old = contexts.lens.clone(), torch.zeros_like(contexts.lens)
    keep_at = sizes.starts.clone()
    for b, (row, length) in enumerate(zip(contexts.reqs.tolist(), contexts.lens.tolist(), strict=True)):
        made, rounds = int(kept.lens[row]), int(kept.rounds[row])
        keep_at[b] += (row - b) * ENTRIES
        there = row > 0 and made > 0 and int(known[b]) >= 0 and 0 <= length - made <= KEPT_TOKENS
        fresh, fresh_rounds, since, since_rounds = kept.accepted[row].tolist()
        if there and rounds == 1:
            fresh, fresh_rounds = fresh + length - int(kept.last[row]), fresh_rounds + 1
        if there and rounds > 1:
            since, since_rounds = since + length - int(kept.last[row]), since_rounds + 1
        else:
            since, since_rounds = 0, 0
        stays = there and rounds < every
        if stays and percent and since_rounds:
            stays = since / since_rounds >= percent / 100 * fresh / fresh_rounds - 1e-9
        wants_less = row > 0 and int(known[b]) >= 0 and int(sizes.budgets[b]) < length
        totals[Count.KEPT_ROUNDS] += stays and int(sparse[b]) >= 0
        totals[Count.SCORED_ROUNDS] += wants_less and not stays
        kept.accepted[row] = torch.tensor([fresh, fresh_rounds, since, since_rounds])
        kept.rounds[row], kept.last[row] = rounds + 1 if stays else 1, length
        if not stays:
            kept.lens[row] = length if int(sparse[b]) >= 0 else 0
        if not stays and not (first_too and there and int(sparse[b]) >= 0):
            continue
        old[b], place = length, b * ENTRIES
        for c in range(CHANNELS):
            starts[b, c] = place
            if int(sparse[b]) >= 0 and int(kept.counts[row, c]) >= 0:
                lists[b, c] = int(kept.counts[row, c]) + length - made
                place += int(lists[b, c])
        if stays:
            scored[b], counts[b] = 0, WHOLE
            known[b] = sparse[b] = -1
    written = {**kept._asdict(), "known": known, "sparse": sparse, "starts_": starts, "counts_": counts}
    written |= {"goes": old > 0, "keep_at": keep_at}
    return {**written, "lists": lists, "scored": scored, "kept_lens": old, "totals": totals}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "every, percent, first_too",
    [(1, None, False), (4, None, False), (16, 80, False), (1, None, True), (3, 80, True)],
)
def test_who_is_scored_follows_the_definition(
    kernel: str, every: int, percent: int | None, first_too: bool
) -> None:
    rng, kept_rounds = random.Random(every), 0
    torch.manual_seed(every)
    # Warps of a GPU come in another order each time.
    for bs in (0, 1, 5, *[33] * (20 if kernel == "triton" and DEVICE == "cuda" else 1)):
        rows = rng.sample(range(1, ROWS), bs)
        if bs == 33:
            rows[-2:] = [0, 0]  # pads
        lens = {row: 1 if row == 0 else rng.randrange(300, 4000) for row in rows}
        contexts = Contexts(
            torch.zeros(ROWS, 1, dtype=torch.int32),
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor([lens[row] for row in rows], dtype=torch.int64),
        )
        places = torch.arange(bs) * 4096
        known = torch.where(torch.rand(bs) < 0.1, -1, places)
        sparse = torch.where(torch.rand(bs) < 0.1, -1, known)
        budgets = torch.where(torch.rand(bs) < 0.1, contexts.lens, contexts.lens // 4)
        counts = torch.randint(-1, 50, (bs, CHANNELS), dtype=torch.int32)
        sizes = Sizes(known, sparse, budgets, torch.randint(0, 1 << 40, (bs, CHANNELS)), counts)
        kept = some_kept(rng, lens)
        expected = sizes_by_loops(contexts, sizes, kept, every, percent, first_too)
        totals, own = on(kernel, torch.zeros(len(Count), dtype=torch.int64)), on(kernel, kept)
        room = Room(CHANNELS, 4096, 4096, ENTRIES)
        found = ops(kernel).size_kept(
            on(kernel, contexts), on(kernel, sizes), own, room, totals,
            every=every, percent=percent, first_too=first_too,
        )  # fmt: skip
        assert found.sizes.starts.tolist() == sizes.starts.tolist()
        written = {**own._asdict(), "known": found.sizes.known, "sparse": found.sizes.sparse}
        written |= {"starts_": found.starts, "counts_": found.sizes.counts, "lists": found.counts}
        written |= {"scored": found.scored, "kept_lens": found.kept, "totals": totals}
        written |= {"goes": found.goes, "keep_at": found.keep_at}
        for name, right in expected.items():
            # What the row of pads has is that of any of them, and nobody reads it.
            first = 1 if name in Kept._fields and name != "positions" else 0
            assert written[name].tolist()[first:] == right.tolist()[first:], name
        kept_rounds += int(totals[Count.KEPT_ROUNDS])
    assert (kept_rounds > 0) == (every > 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_slots_are_those_that_positions_have_now(kernel: str) -> None:
    """Of what was selected and of all that came since, in lists of every length, the draft's keys one
    before."""
    torch.manual_seed(0)
    lengths, width = [1, 70, 900, 5000], 5004
    rows, since = torch.tensor([3, 1, 7, 4]), [0, 0, 5, KEPT_TOKENS]
    table = torch.randperm(8 * width).view(8, width).int()
    counts = torch.tensor([[WHOLE, WHOLE], [9, WHOLE], [1, 800], [3000, 4000]], dtype=torch.int32)
    wide = counts.clamp(min=0).long() + torch.tensor(since)[:, None]
    starts = (torch.arange(4) * 9000)[:, None] + wide.cumsum(1) - wide
    kept = Kept(
        torch.full((8 * 9000,), 1 << 30, dtype=torch.int32),
        torch.zeros(8, 2, dtype=torch.int64),
        torch.full((8, 2), WHOLE, dtype=torch.int32),
        *(torch.zeros(8, dtype=torch.int64) for _ in range(3)),
        torch.zeros(8, 4, dtype=torch.int64),
    )
    expected, drafted = (torch.full((4 * 9000,), -1, dtype=torch.int32) for _ in range(2))
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths, strict=True)):
        for c in range(2):
            if (number := int(counts[b, c])) == WHOLE:
                continue
            first, start = row * 9000 + c * 4500, int(starts[b, c])
            positions = torch.randperm(length - since[b])[:number]
            positions[0] = 0
            kept.positions[first : first + number] = positions.int()
            kept.starts[row, c], kept.counts[row, c] = first, number
            positions = positions.tolist() + list(range(length - since[b], length))
            expected[start : start + len(positions)] = table[row, positions]
            keys = [(p or length) - 1 for p in positions]
            drafted[start : start + len(keys)] = table[row, keys]
    now = torch.where(counts == WHOLE, WHOLE, counts + torch.tensor(since)[:, None]).int()
    contexts = Contexts(table, rows, torch.tensor(lengths))
    lists, draft = Lists(torch.full_like(expected, -1), starts, now), torch.full_like(expected, -1)
    args = [on(kernel, a) for a in (kept, contexts, lists, draft)]
    ops(kernel).list_kept(*args)
    assert torch.equal(args[2].indices.cpu(), expected)
    assert torch.equal(args[3].cpu(), drafted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels", [1, CHANNELS, 64])
def test_what_is_selected_is_kept_of_those_alone_that_were_scored(kernel: str, channels: int) -> None:
    """Wherever they stand in the batch; the lists of all are those of either kind. Nothing is written of
    other rows, nor of what is larger than the batch, and nothing is read of what nobody made."""
    torch.manual_seed(channels)
    poison = -(1 << 30)

    def some(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(WHOLE, 1 << 29, size, dtype=dtype)

    for bs, pads in ((0, 0), (1, 0), (1, 1), (7, 0), (33, 3)):
        reqs = torch.cat([torch.randperm(ROWS - 1)[: bs - pads] + 1, torch.zeros(pads, dtype=torch.int64)])
        scored, shape = torch.rand(bs) < 0.5, (bs, channels)
        scored[bs - pads :] = True
        lens = torch.randint(1, 4000, (bs,))
        own = Sizes(*(torch.full((bs,), poison) for _ in range(3)), some(*shape), some(*shape).int())
        own.counts[bs - pads :] = WHOLE
        made = some(*shape), some(*shape).int(), lens * scored, lens * ~scored, ~scored, some(*shape)
        for part in (own.starts, own.counts, made[5]):
            part[~scored] = poison
        made[0][scored], made[1][scored] = poison, poison
        kept = Kept(
            torch.zeros(0, dtype=torch.int32),
            some(ROWS, channels),
            some(ROWS, channels).int(),
            *(torch.full((ROWS,), poison) for _ in range(3)),
            torch.full((ROWS, 4), poison),
        )
        room = torch.full((bs + 2, channels), poison)  # of larger batches too
        lists, written = (
            Lists(torch.zeros(0, dtype=torch.int32), room, room.int()),
            Kept(*map(torch.clone, kept)),
        )
        for b, row in enumerate(reqs.tolist()):
            if scored[b]:
                written.starts[row], written.counts[row] = made[5][b], own.counts[b]
        right = [
            torch.where(scored[:, None], *pair) for pair in ((own.starts, made[0]), (own.counts, made[1]))
        ]
        kept, lists = on(kernel, kept), on(kernel, lists)
        contexts = Contexts(torch.zeros(ROWS, 1, dtype=torch.int32), reqs, lens)
        few = Lists(lists.indices, lists.starts[:bs], lists.counts[:bs])
        ops(kernel).keep_selected(kept, on(kernel, contexts), on(kernel, KeptSizes(own, *made)), few)
        rows = slice(1 if pads else 0, None)  # who of the pads comes last is nobody's business
        for name in Kept._fields:
            assert torch.equal(getattr(kept, name)[rows].cpu(), getattr(written, name)[rows]), name
        assert (kept.counts[0] == WHOLE).all() or not pads
        for found, expected in zip(lists[1:], right, strict=True):
            assert torch.equal(found[:bs].cpu(), expected) and (found[bs:] == poison).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_lists_that_a_kernel_would_miss_are_refused(kernel: str) -> None:
    torch.manual_seed(0)
    kept, i = some_kept(random.Random(0), {1: 500}), torch.zeros(1, CHANNELS, dtype=torch.int64)
    lens = torch.ones(1, dtype=torch.int64)
    found = KeptSizes(Sizes(lens, lens, lens, i, i.int()), i, i.int(), lens, lens, lens > 0, i)
    contexts = Contexts(torch.zeros(ROWS, 1, dtype=torch.int32), lens, lens)
    apart = torch.zeros(1, 2 * CHANNELS, dtype=torch.int64)[:, ::2]
    for starts, counts in ((apart, i.int()), (i, i), (i.int(), i.int()), (i[:, :1], i[:, :1].int())):
        with pytest.raises(ValueError, match="^keep_selected: (lists.)?(starts|counts) "):
            ops(kernel).keep_selected(kept, contexts, found, Lists(kept.positions, starts, counts))


CONFIG = {"policy": "fixed", "budget": 7, "sink": 2, "recent": 4, "draft": "all"}  # forced + 1


class Requests(Rig):
    """Several requests over one pool; what the rounds of any of them attend to."""

    def __init__(self, config: dict, topk: int = 1):
        super().__init__({**CONFIG, **config}, topk=topk, width=100)
        order = torch.randperm(self.draft_pool.k.shape[1] - 1, generator=torch.Generator().manual_seed(3)) + 1
        self.table = self.runtime.cache.table
        self.table[1:5] = torch.stack([order[:100].roll(7 * row) for row in range(4)]).int()

    def of(self, mode: ForwardMode, rows: list[int], lens: list[int], **extra) -> SimpleNamespace:
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(rows),
            req_pool_indices=torch.tensor(rows),
            seq_lens=torch.tensor(lens),
            out_cache_loc=None,
            **extra,
        )

    def prefill(self, rows: list[int], lens: list[int]) -> None:
        state = self.runtime.state
        state.carry_lengths(torch.tensor(rows), torch.tensor(lens), prefill=True)
        self.look(rows, lens)

    def look(self, rows: list[int], lens: list[int], seed: int = 0) -> None:
        """What draft-extend leaves: a carried row."""
        state, g = self.runtime.state, torch.Generator().manual_seed(seed)
        state.carry_lengths(torch.tensor(rows), torch.tensor(lens), prefill=False)
        state.carried.copy_(torch.randn(state.carried.shape, generator=g) * 3)

    def round(
        self, rows: list[int], lens: list[int], seed: int = 0
    ) -> tuple[list[torch.Tensor], list[set[int]]]:
        """A round of these requests: what each layer of each draft step answers, and the positions that
        verify attends to, by request and channel."""
        self.look(rows, lens, seed)
        fb = self.of(ForwardMode.DECODE, rows, lens)
        self.steps.init_forward_metadata(fb)
        g = torch.Generator().manual_seed(seed + 1)
        q = torch.randn(len(rows) * self.topk, Q_HEADS * DIM, generator=g) * 3
        outs = [
            step.forward_decode(q, None, None, self.layer(i), fb)
            for step in self.steps.attn_backends
            for i in range(LAYERS)
        ]
        spec = SimpleNamespace(draft_token_num=TOKENS, custom_mask=None, topk=1)
        verify = self.of(ForwardMode.TARGET_VERIFY, rows, lens, spec_info=spec)
        verify.out_cache_loc = torch.cat(
            [self.table[r, n : n + TOKENS] for r, n in zip(rows, lens, strict=True)]
        )
        self.target.init_forward_metadata(verify)
        return outs, self.selected(rows, lens)

    def selected(self, rows: list[int], lens: list[int]) -> list[list[set[int]]]:
        indices, starts, counts = self.target._lists
        found = []
        for b, (row, length) in enumerate(zip(rows, lens, strict=True)):
            position = {int(slot): p for p, slot in enumerate(self.table[row, :length])}
            found.append([])
            for start, count in zip(starts[b].tolist(), counts[b].tolist(), strict=True):
                slots = self.table[row, :length] if count < 0 else indices[start : start + count]
                assert len(slots) == len({int(s) for s in slots})
                found[-1].append({position[int(s)] for s in slots})
        return found

    def totals(self) -> tuple[int, int]:
        return tuple(self.runtime.state.totals[[Count.SCORED_ROUNDS, Count.KEPT_ROUNDS]].tolist())


class Beside(TorchDispatchMode):
    """Notes what torch does beside the ops that it wraps, views apart: a launch each on a GPU."""

    def __init__(self):
        super().__init__()
        self.found, self.within = [], False

    def ops(self) -> SimpleNamespace:
        own = {name: getattr(ops("torch"), name) for name in ops("triton").__all__}
        return SimpleNamespace(**{name: self._wrapped(op) for name, op in own.items()})

    def _wrapped(self, op):
        def run(*args, **kwargs):
            self.within = True
            found = op(*args, **kwargs)
            self.within = False
            return found

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.within and not func.is_view:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_keeping_launches_ops_alone() -> None:
    """No index, no comparison beside them: each is a launch, and a round has few of its own."""
    rig, beside, rows, lens = Requests({"draft": "every", "draft_refresh": 3}), Beside(), [2, 1], [40, 61]
    rig.prefill(rows, lens)
    runtime, out = rig.runtime, torch.zeros(2, DIM)
    runtime.refresh.ops = runtime.selector.ops = beside.ops()
    contexts = runtime.contexts(torch.tensor(rows), torch.tensor(lens))
    with beside:
        parted = runtime.refresh.part(contexts)
        parted.join(out, out)
        runtime.select_early(contexts, parted)
    assert beside.found == ["aten.where.self"]  # of join, in each layer


@pytest.mark.parametrize("topk", [1, 2])
def test_scored_in_every_round_is_todays_bits(topk: int) -> None:
    """The machinery that keeps selections, told to keep none, does what a server without it does."""
    plain, kept = Requests({}, topk), Requests({"draft_refresh": 2}, topk)
    kept.runtime.refresh.every = 1
    rows, lens = [2, 1, 4], [40, 5, 61]
    for rig in (plain, kept):
        rig.prefill(rows, lens)
    for seed in range(3):
        found = [rig.round(rows, lens, seed) for rig in (plain, kept)]
        assert all(torch.equal(*outs) for outs in zip(found[0][0], found[1][0], strict=True))
        assert found[0][1] == found[1][1]
        assert [len(chosen[0]) for chosen in found[0][1]] == [7, 5, 7]
        lens = [n + 2 if n > 5 else n for n in lens]
    attended = [rig.runtime.state.draft_attended.tolist() for rig in (plain, kept)]
    assert attended[0] == attended[1]
    assert plain.runtime.refresh is None and kept.totals() == (6, 0)  # the short one is never selected from


def test_rounds_in_between_go_by_the_latest_selection_and_what_came_since() -> None:
    """Each request by its own count of rounds, wherever it stands in the batch, and a short one not at
    all."""
    rig, plain = Requests({"draft_refresh": 3}), Requests({})
    lens, chosen, made = {1: 50, 2: 30, 3: 5, 4: 41}, {}, {}
    for r in (rig, plain):
        r.prefill(list(lens), list(lens.values()))
    rounds = [[1, 2, 3], [2, 1], [4, 1, 2], [1, 4, 3, 2], [2, 4, 1], [4, 1], [1, 2, 4]]
    age, kept_rounds, scored_rounds = dict.fromkeys(lens, 0), 0, 0
    for seed, rows in enumerate(rounds):
        now = [lens[row] for row in rows]
        outs, found = rig.round(rows, now, seed)
        _, fresh = plain.round(rows, now, seed)
        for b, row in enumerate(rows):
            if lens[row] <= 7:
                assert found[b] == fresh[b]
                continue
            if age[row] % 3 == 0:
                assert found[b] == fresh[b], (seed, row)
                chosen[row], made[row] = found[b], lens[row]
                scored_rounds += 1
            else:
                since = set(range(made[row], lens[row]))
                assert found[b] == [channel | since for channel in chosen[row]], (seed, row)
                kept_rounds += 1
            age[row] += 1
            lens[row] += 1 + (seed + row) % TOKENS
    assert rig.totals() == (scored_rounds, kept_rounds) and kept_rounds > 5


def test_the_first_step_of_such_a_round_attends_to_what_is_kept() -> None:
    """In the draft's keys, about the same tokens; the step after it too."""
    rig, topk, length = Requests({"draft_refresh": 4}, topk=2), 2, 50
    rig.prefill([2, 1], [40, length])
    rig.round([1], [length])
    (of_scored, of_kept), length = rig.round([2, 1], [40, length + 3], seed=5), length + 3
    dense = Requests({}, topk=2)
    dense.prefill([2, 1], [40, length])
    (expected, _) = dense.round([2, 1], [40, length], seed=5)
    per_step = [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = {"scored": slice(0, topk), "kept": slice(topk, 2 * topk)}
    for (step, layer), out, full in zip(per_step, of_scored, expected, strict=True):
        torch.testing.assert_close(out[rows["scored"]], full[rows["scored"]], rtol=0, atol=0)
        q = torch.randn(2 * topk, Q_HEADS * DIM, generator=torch.Generator().manual_seed(6)) * 3
        for branch in range(topk):
            scratch = rig.table[1, length + branch * 3 : length + branch * 3 + step + 1].long()
            for head in range(Q_HEADS):
                kv = head // (Q_HEADS // KV_HEADS)
                channel = int(rig.runtime.channels.of_draft[layer, kv])
                keys = [(p or length) - 1 for p in of_kept[1][channel]]
                slots = torch.cat([rig.table[1, keys].long(), scratch])
                query = q.view(-1, Q_HEADS, DIM)[topk + branch, head].double()
                weights = (rig.draft_pool.k[layer, slots, kv].double() @ query * SCALE).softmax(0)
                right = weights @ rig.draft_pool.v[layer, slots, kv].double()
                mine = out[rows["kept"]].view(topk, Q_HEADS, DIM)[branch, head].double()
                torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("topk", [1, 2])
def test_every_pass_sparse_scores_as_ever_and_attends_to_what_is_kept(topk: int, refresh: int) -> None:
    """Queries are given here, so that what is selected is what a draft that reads everything selects. A
    request that has no selection yet reads everything; of the others no value outside of theirs is read."""
    rig = Requests({"draft": "every", "draft_refresh": refresh}, topk)
    plain = Requests({"draft_refresh": refresh}, topk)
    lens, held = {1: 50, 2: 30, 3: 5}, {}
    for r in (rig, plain):
        r.prefill(list(lens), list(lens.values()))
    values = rig.draft_pool.v.clone()
    for seed in range(4):
        rows, now = list(lens), list(lens.values())
        if seed:  # the first step's, of which nobody may see what is not kept
            seen = [rig.table[row, n : n + 3 * topk] for row, n in lens.items()] + [rig.table[3, :5]]
            for row in (1, 2):
                for chosen in held[row]:
                    seen.append(rig.table[row, sorted(keys_of(chosen, lens[row]))])
            unseen = torch.ones(values.shape[1], dtype=torch.bool)
            unseen[torch.cat(seen).long()] = False
            assert unseen.sum() > 20
            rig.draft_pool.v[:, unseen] = torch.nan
        (outs, found), (expected, fresh) = (r.round(rows, now, seed) for r in (rig, plain))
        rig.draft_pool.v.copy_(values)
        assert found == fresh and (refresh == 1 or rig.totals() == plain.totals())
        first = [out.view(3, topk, -1) for out in outs[:LAYERS]]
        dense = [out.view(3, topk, -1) for out in expected[:LAYERS]]
        for layer in range(LAYERS):
            assert torch.equal(first[layer][2], dense[layer][2])
            for b in (0, 1):
                assert first[layer][b].isfinite().all()
                alike = torch.equal(first[layer][b], dense[layer][b])
                assert alike == (seed == 0 or seed % refresh > 0), (seed, layer, b)
        came = 1 + seed % TOKENS
        for b, row in enumerate(rows[:2]):
            held[row] = [chosen | {*range(lens[row], lens[row] + came)} for chosen in found[b]]
            lens[row] += came


def keys_of(chosen: set[int], length: int) -> set[int]:
    """Draft indices of the keys about these positions of the target."""
    return {(p or length) - 1 for p in chosen}


def test_a_request_that_is_new_in_its_row_is_scored_at_once() -> None:
    rig = Requests({"draft_refresh": 8})
    rig.prefill([1], [40])
    rig.round([1], [40])
    rig.round([1], [42])
    rig.prefill([1], [43])  # another one, or the same again after it was retracted
    rig.round([1], [43])
    rig.round([1], [44])
    assert rig.totals() == (2, 2)
    rig.runtime.state.carried_lens.fill_(0)  # whose row nobody carried
    fb = rig.of(ForwardMode.DECODE, [1], [45])
    rig.steps.init_forward_metadata(fb)
    assert rig.steps.attn_backends[0].round.parted.scored.lens.tolist() == [45]


def test_slots_that_change_under_a_running_request_are_followed() -> None:
    """SGLang lets a prompt share the slots of an equal one that was cached first, when its own first round
    may have begun."""
    rig = Requests({"draft_refresh": 4})
    rig.prefill([1], [40])
    _, (chosen,) = rig.round([1], [40])
    rig.table[1, :40] = rig.table[1, :40].flip(0)
    _, (found,) = rig.round([1], [41])
    assert found == [channel | {40} for channel in chosen]


def test_a_selection_is_kept_for_no_more_tokens_than_lists_have_room_for() -> None:
    assert MOST_REFRESH == KEPT_TOKENS
    rig = Requests({"draft_refresh": 200})
    rig.prefill([1], [40])
    rig.round([1], [40])
    rig.runtime.state.kept.lens[1] = 41 - KEPT_TOKENS - 1
    rig.round([1], [41])
    assert rig.totals() == (2, 0)


def test_adaptive_scores_when_fewer_tokens_are_accepted() -> None:
    rig, length, told = Requests({"draft_refresh": "adaptive"}), 20, []
    rig.prefill([1], [length])
    # 4 tokens by the round that scores; those after it bring less than 80 % of that on average only with the
    # 1.
    for came in (4, 4, 4, 2, 3, 3, 1, 3):
        scored, _ = rig.totals()
        rig.round([1], [length])
        told.append(rig.totals()[0] > scored)
        length += came
    assert told == [True, False, False, False, False, False, False, True]


def test_what_a_sparse_first_step_cannot_go_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="^sts_config.draft: got 'every' with selector 'joined'"):
        StsConfig(draft="every", selector="joined")
    assert StsConfig(draft="every", kernel="flashinfer", inspect_dir=".").keeps_selections


@pytest.mark.parametrize(
    "config, what",
    [
        (
            {},
            "draft 'auto': only a selection of sparse steps is kept, and steps that are dense, as those of "
            "'auto' may be, score in every round anyway; allowed: 1, or draft 'steps', 'all' or 'every' of a "
            "launch with a draft",
        ),
        ({"draft": "extend"}, "draft 'extend': only .*; allowed: 1, or draft 'steps'"),
        ({"draft": "all", "selector": "joined"}, "selector 'joined', .*; allowed: 1, or another one"),
        ({"draft": "all", "kernel": "flashinfer"}, "kernel 'flashinfer', .*; allowed: 1, or another kernel"),
        ({"draft": "steps", "inspect_dir": "."}, "an inspect_dir and history 'off', .*, or no inspect_dir"),
    ],
)
@pytest.mark.parametrize("refresh", [4, "adaptive"])
def test_what_cannot_keep_a_selection_is_refused(config: dict, what: str, refresh: int | str) -> None:
    with pytest.raises(ConfigError, match=f"^sts_config.draft_refresh: got {refresh!r} with {what}"):
        StsConfig(**config, draft_refresh=refresh)
    StsConfig(**config, draft_refresh=1)
    StsConfig(draft="all", draft_refresh=refresh, inspect_dir=".", history="blend")
