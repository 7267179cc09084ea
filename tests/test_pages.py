"""Pages: whose sketch lies beside a slot, what it says, and what is chosen by it; both implementations.

`Server` writes keys as a server would and keeps a ledger of its own: for every slot, all the slots of the
page that its slice was last written for. The ops know of the last of them only.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch

from sts_kernels import ops, page_scores, pages
from sts_kernels.layout import (
    FP8,
    IMPORTANCE_SCALE,
    NO_PAGE,
    PAGE,
    WHOLE,
    Contexts,
    KvPool,
    Lists,
    PageSizes,
    Pooling,
    Scores,
)
from tests.test_kernels import (
    DEVICE,
    KERNELS,
    on_device,
    skip_bf16_in_the_interpreter,
    top_by_definition,
    tune,
)
from tests.tolerances import assert_close

POOLS = [("max", "max"), ("mean", "mean"), ("mean", "max"), ("max", "mean")]


@dataclass
class Server:
    """Requests with slots in any order; keys, sketches and what is beside unused slots are NaN."""

    kernel: str
    kv_heads: int = 2
    dim: int = 32
    dtype: torch.dtype = torch.float32
    slots: int = 2000
    width: int = 320
    rows: int = 8
    lens: dict[int, int] = field(default_factory=dict)  # by row of the table
    ledger: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = (torch.randperm(self.slots - 1) + 1).tolist()
        self.table = torch.zeros(self.rows, self.width, dtype=torch.int32)
        self.keys = torch.full((self.slots, self.kv_heads, self.dim), math.nan, dtype=self.dtype)
        self.sketches = torch.full((self.slots, self.kv_heads, 2 * self.dim // PAGE), math.nan).half()
        self.tags = torch.full((self.slots,), NO_PAGE, dtype=torch.int32)
        self.keys, self.sketches, self.tags = map(on_device, (self.keys, self.sketches, self.tags))

    def admit(self, row: int, length: int, like: int | None = None, shared: int = 0) -> None:
        """A request whose first `shared` slots are those of the one in row `like`."""
        assert row not in self.lens
        self.table[row] = 0
        if like is not None:
            self.table[row, :shared] = self.table[like, :shared]
        self.lens[row] = shared
        self.forward({row: length - shared})

    def end(self, row: int) -> None:
        """Its slots that no other request has are reused soon, in their order."""
        others = {s for r, n in self.lens.items() if r != row for s in self.table[r, :n].tolist()}
        mine = self.table[row, : self.lens.pop(row)].tolist()
        self.free[:0] = [slot for slot in mine if slot not in others]

    def forward(self, more: dict[int, int], padding: bool = False) -> None:
        """Write so many positions of each request, in the order of the batch, then tag and sketch."""
        before = [self.lens[row] for row in more]
        for row, number in more.items():
            new = [self.free.pop(0) for _ in range(number)]
            self.table[row, self.lens[row] : self.lens[row] + number] = torch.tensor(new, dtype=torch.int32)
            values = torch.randn(number, self.kv_heads, self.dim).to(self.dtype)
            self.keys[torch.tensor(new, dtype=torch.int64, device=DEVICE)] = values.to(DEVICE)
            self.lens[row] += number
            for slot in new:
                self.ledger.pop(slot, None)
        for row, first in zip(more, before, strict=True):
            for page in range(first // PAGE, self.lens[row] // PAGE):
                slots = self.page(row, page)
                self.ledger |= dict.fromkeys(slots, slots)
        rows = [0, *more] if padding else [*more]
        before = torch.tensor([0, *before] if padding else before, dtype=torch.int64)
        lens = torch.tensor([40] if padding else [], dtype=torch.int64)
        lens = torch.cat([lens, torch.tensor([self.lens[row] for row in more], dtype=torch.int64)])
        contexts = on_device(Contexts(self.table, torch.tensor(rows, dtype=torch.int64), lens))
        most = max(more.values(), default=1)
        ops(self.kernel).tag_pages(contexts, on_device(before), self.tags, most=most)
        ops(self.kernel).sketch_pages(
            self.keys, self.sketches, contexts, on_device(before), self.tags, most=most
        )

    def page(self, row: int, page: int) -> tuple[int, ...]:
        return tuple(self.table[row, page * PAGE : (page + 1) * PAGE].tolist())

    def knows(self, row: int, page: int) -> bool:
        slots = self.page(row, page)
        return all(self.ledger.get(slot) == slots for slot in slots)

    def sketch(self, row: int, page: int) -> torch.Tensor:
        """float64 [2, H_kv, D] by definition."""
        keys = self.keys[torch.tensor(self.page(row, page), device=DEVICE)].cpu().double()
        mean = sum(keys) / PAGE
        return torch.stack([mean, (sum((key - mean) ** 2 for key in keys) / PAGE).sqrt()])

    def stored(self, row: int, page: int) -> torch.Tensor:
        """[2, H_kv, D] as it lies beside the slots."""
        found, size = torch.full((2, self.kv_heads, self.dim), math.nan), self.dim // PAGE
        for i, slot in enumerate(self.page(row, page)):
            for part in range(2):
                slice_ = self.sketches[slot, :, part * size : (part + 1) * size]
                found[part, :, i * size : (i + 1) * size] = slice_.cpu().float()
        return found

    def check(self) -> int:
        """That tags know what the ledger knows, and sketches are of the keys; how many pages have one."""
        number = 0
        for row, length in self.lens.items():
            for page in range(length // PAGE):
                slots = self.page(row, page)
                tagged = bool((self.tags[torch.tensor(slots, device=DEVICE)] == slots[-1]).all())
                assert tagged == self.knows(row, page), (row, page)
                if tagged:
                    number += 1
                    # One rounding to float16.
                    found, expected = self.stored(row, page).double(), self.sketch(row, page)
                    torch.testing.assert_close(found, expected, rtol=6e-4, atol=1e-6)
        return number

    @property
    def contexts(self) -> Contexts:
        rows, lens = torch.tensor([*self.lens]), torch.tensor([*self.lens.values()])
        return Contexts(self.table, rows, lens)

    def sizes(self, counts: list[list[int]], channels: list[list[int]], sink=4, recent=20, kernel=None):
        """What size_pages answers, and the lists it was asked for."""
        counts = torch.tensor(counts, dtype=torch.int32)
        room = counts.clamp(min=0).long()
        starts = (room.flatten().cumsum(0) - room.flatten()).view(room.shape)
        lists = Lists(torch.full((int(room.sum()) + 8,), -7, dtype=torch.int32), starts, counts)
        lists, heads = on_device(lists), on_device(torch.tensor(channels, dtype=torch.int32))
        args = on_device(self.contexts), self.tags, lists, heads
        sizes = ops(kernel or self.kernel).size_pages(*args, sink=sink, recent=recent)
        return sizes, lists._replace(counts=sizes.counts), heads


def on_pages(lengths: list[int], kernel: str, **more) -> Server:
    """A server with requests of these lengths."""
    server = Server(kernel, **more)
    for row, length in enumerate(lengths, 1):
        server.admit(row, length)
    return server


# ---- tags and sketches


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_sketches_are_mean_and_deviation_of_complete_pages(kernel: str, dim: int) -> None:
    server = on_pages([300, 0, 15, 16, 17, 47], kernel, dim=dim)
    assert server.check() == 18 + 1 + 1 + 2
    used = {s for row in server.lens for p in range(server.lens[row] // PAGE) for s in server.page(row, p)}
    spare = [slot for slot in range(server.slots) if slot not in used]
    assert server.sketches[spare].isnan().all() and (server.tags[spare] == NO_PAGE).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FP8], ids=str)
def test_sketches_of_keys_in_fewer_bits(kernel: str, dtype: torch.dtype) -> None:
    """In the units that keys are stored in."""
    skip_bf16_in_the_interpreter(kernel, dtype)
    assert on_pages([100, 37], kernel, dtype=dtype).check() == 8


@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_out_of_range_have_finite_sketches(kernel: str) -> None:
    server = Server(kernel)
    server.admit(1, 15)
    server.keys *= 1e6
    server.forward({1: 1})
    found = server.stored(1, 0)
    assert found.isfinite().all() and found.abs().max() == 65504


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shared", [32, 40])
def test_branches_that_part_within_a_page_share_no_sketch(kernel: str, shared: int) -> None:
    """At an edge both have all their pages; within a page the one that completed it last has it."""
    server = Server(kernel)
    server.admit(1, 64)
    server.admit(2, shared, like=1, shared=shared)
    server.forward({2: 7})
    assert server.check() == 4 + 2  # the second has not completed its third page
    server.forward({1: 1, 2: 9})
    server.check()
    assert server.knows(1, 2) == (shared == 32)
    assert server.knows(2, 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 1, 3)], ids=str)
def test_of_a_batch_the_last_to_complete_a_page_has_it(kernel: str, order) -> None:
    server = Server(kernel)
    server.admit(1, 10)
    for row, shared in ((2, 10), (3, 5)):
        server.admit(row, 12, like=1, shared=shared)
    server.forward(dict.fromkeys(order, 16), padding=True)
    server.check()
    assert [server.knows(row, 0) for row in order] == [False, False, True]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_slot_that_is_written_again_has_no_page(kernel: str) -> None:
    """A request ends, and its slots go to the next in the same order: known only once they are written."""
    server = on_pages([64], kernel)
    slots = server.table[1, :64].clone()
    server.end(1)
    server.admit(2, 30)
    assert torch.equal(server.table[2, :30], slots[:30])
    assert server.check() == 1
    server.forward({2: 1})
    assert not server.knows(2, 1) and server.check() == 1
    server.forward({2: 1})
    assert server.check() == 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_row_that_pads_graphs_writes_nothing(kernel: str) -> None:
    server = on_pages([20], kernel)
    tags, sketches = server.tags.clone(), server.sketches.clone()
    server.forward({}, padding=True)
    assert torch.equal(server.tags, tags)
    assert torch.equal(server.sketches.nan_to_num(), sketches.nan_to_num())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 33, 200])
def test_chunks_of_any_size_give_the_same_sketches(kernel: str, chunk: int) -> None:
    tokens = 100
    server = Server(kernel)
    server.admit(1, 0)
    while server.lens[1] < tokens:
        server.forward({1: min(chunk, tokens - server.lens[1])})
    other = Server(kernel)
    other.free, other.keys = server.table[1, :tokens].tolist(), server.keys
    other.admit(1, 0)
    values = server.keys.clone()
    other.forward({1: tokens})  # writes other keys to the same slots
    other.keys[:] = values
    before, contexts = on_device(torch.tensor([0])), on_device(other.contexts)
    ops(kernel).sketch_pages(other.keys, other.sketches, contexts, before, other.tags, most=tokens)
    assert server.check() == tokens // PAGE
    assert torch.equal(server.tags, other.tags)
    assert torch.equal(server.sketches.nan_to_num(), other.sketches.nan_to_num())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_server_does_no_page_has_the_sketch_of_another(monkeypatch, kernel, seed: int) -> None:
    tune(monkeypatch, pages, tag_block=32, most_programs=3)
    rng, server, known = random.Random(seed), Server(kernel, slots=700, dim=16), 0
    for _ in range(60):
        rows, idle = list(server.lens), [row for row in range(1, server.rows) if row not in server.lens]
        if idle and len(server.free) > 120 and rng.random() < 0.4:
            like = rng.choice(rows) if rows and rng.random() < 0.7 else None
            shared = 0 if like is None else rng.randint(0, server.lens[like])
            server.admit(rng.choice(idle), shared + rng.randint(1, 60), like, shared)
        elif rows and (rng.random() < 0.2 or len(server.free) < 60):
            server.end(rng.choice(rows))
        elif rows:
            batch = rng.sample(rows, rng.randint(1, len(rows)))
            most = rng.choice([1, 4, 8])
            server.forward({row: most for row in batch if server.lens[row] + most <= server.width}, True)
        known += server.check()
    assert known > 50


# ---- sizes


def sizes_by_definition(server: Server, counts, channels, sink: int, recent: int):
    """(known, unknown, tokens, pages) of every request, by loops."""
    found = []
    for (row, length), wanted in zip(server.lens.items(), counts, strict=True):
        complete, rest = divmod(length, PAGE)
        first, last = math.ceil(sink / PAGE), complete - math.ceil(recent / PAGE)
        known = [server.knows(row, page) for page in range(complete)]
        unknown = sum(not known[page] for page in range(first, max(first, last)))
        number = []
        for count in wanted:
            room = (count - rest) // PAGE
            least = first + complete - last + unknown
            fits = count >= 0 and room >= least and room < complete and row > 0 and count >= rest
            number.append(room if fits else WHOLE)
        tokens = [n if n == WHOLE else n * PAGE + rest for n in number]
        found.append((known, unknown, tokens, [[number[c] for c in heads] for heads in channels]))
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sink, recent", [(4, 20), (16, 32), (17, 1), (0, 16)])
def test_lists_have_whole_pages_and_every_page_without_a_sketch(kernel: str, sink, recent) -> None:
    server = on_pages([300, 150, 40, 3], kernel)
    server.admit(5, 290, like=1, shared=200)
    server.admit(6, 160, like=1, shared=100)  # takes a page of the first and of the fifth
    for row in (2, 3):  # pages without a sketch: those of another forward, that nobody tagged
        server.tags[on_device(server.table[row, 32:35].long())] = NO_PAGE
        for slot in server.table[row, 32:35].tolist():
            server.ledger.pop(slot, None)
    channels = [[0, 1], [2, 2], [1, 3]]
    for counts in ([[100, 60, -1, 250], *[[70, 84, 130, 20]] * 3, [64, 81, 82, 289], [-1] * 4],):
        sizes, *_ = server.sizes(counts, channels, sink, recent)
        expected = sizes_by_definition(server, counts, channels, sink, recent)
        for b, (known, unknown, tokens, of_pages) in enumerate(expected):
            listed = max(tokens) >= 0
            assert sizes.counts[b].tolist() == tokens
            assert sizes.pages[:, b].tolist() == of_pages
            assert int(sizes.contexts.lens[b]) == (len(known) if listed else 0)
            if listed:
                assert sizes.known[b, : len(known)].tolist() == known
                assert int(sizes.unknown[b]) == unknown
        assert any(unknown for _, unknown, *_ in expected)
        assert sizes.contexts.table.tolist() == [[*range(server.width // PAGE)]]
        assert not sizes.contexts.reqs.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_unknown_pages_than_budget_are_the_whole_context(kernel: str) -> None:
    server = on_pages([320], kernel)
    for page in (0, 18, 19):  # on every list, whatever is known of them
        server.tags[int(server.table[1, page * PAGE])] = NO_PAGE
    for unknown in range(12):
        if unknown:
            server.tags[int(server.table[1, 16 * (unknown + 1)])] = NO_PAGE
        sizes, *_ = server.sizes([[10 * PAGE]], [[0, 0]])
        assert int(sizes.unknown[0]) == unknown
        # Of ten pages one is sink and two are recent.
        assert sizes.counts.tolist() == ([[10 * PAGE]] if unknown <= 7 else [[WHOLE]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_row_that_pads_graphs_has_no_list(kernel: str) -> None:
    server = on_pages([100, 200], kernel)
    server.lens = {0: 100, 2: 200}
    sizes, *_ = server.sizes([[80], [100]], [[0, 0]])
    assert sizes.counts.tolist() == [[WHOLE], [80 + 8]]
    assert sizes.pages.tolist() == [[[WHOLE] * 2, [5] * 2]]
    assert sizes.contexts.lens.tolist() == [0, 12]


# ---- scores


def run_scores(server: Server, q, sizes: PageSizes, pools=("max", "max"), kernel=None):
    """(importance on the CPU, first columns): a block of columns a request."""
    bs, tokens = q.shape[:2]
    columns = (server.width // PAGE + 63) // 64 * 64
    importance = torch.full((server.kv_heads, bs * columns + 64), -5.0).half().to(DEVICE)
    starts = torch.arange(bs) * columns
    kernel = kernel or server.kernel
    ops(kernel).score_pages(
        on_device(q),
        server.sketches,
        on_device(server.contexts),
        sizes,
        Scores(importance, on_device(starts)),
        scale=server.dim**-0.5,
        pooling=Pooling(*pools, tokens),
    )
    return importance.cpu(), starts


def draw_queries(server: Server, tokens: int, group: int) -> torch.Tensor:
    """A slice of a fused projection, as models have it: rows lie apart, with NaN between them."""
    heads, bs = server.kv_heads * group, len(server.lens)
    fused = torch.full((bs, tokens, heads + 1, server.dim), math.nan, dtype=server.dtype)
    fused[:, :, :heads] = torch.randn(bs, tokens, heads, server.dim).to(server.dtype)
    return fused[:, :, :heads]


def check_scores(server: Server, tokens: int, group: int, pools=("max", "max"), counts=None) -> None:
    q = draw_queries(server, tokens, group)
    counts = counts or [[max(PAGE * 4 + length % PAGE, length // 2)] for length in server.lens.values()]
    sizes, *_ = server.sizes(counts, [[0] * server.kv_heads])
    found, starts = run_scores(server, q, sizes, pools)
    expected = torch.full_like(found, -5.0).double()
    for b, row in enumerate(server.lens):
        complete = int(sizes.contexts.lens[b])
        known = [page for page in range(complete) if server.knows(row, page)]
        for h in range(server.kv_heads if complete else 0):
            of_rows = []
            for t in range(tokens):
                of_heads = []
                for g in range(group):
                    query, logits = q[b, t, h * group + g].double(), []
                    for page in known:
                        mean, deviation = server.sketch(row, page)[:, h]
                        logits.append(query @ mean + query.abs() @ deviation)
                    logits = torch.stack(logits) if logits else torch.zeros(0).double()
                    of_heads.append((logits * server.dim**-0.5).softmax(0))
                of_heads = torch.stack(of_heads)
                of_rows.append(of_heads.amax(0) if pools[1] == "max" else of_heads.mean(0))
            of_rows = torch.stack(of_rows)
            pooled = of_rows.amax(0) if pools[0] == "max" else of_rows.mean(0)
            place = expected[h, starts[b] : starts[b] + complete]
            place[:] = math.nan
            place[known] = pooled * IMPORTANCE_SCALE
    # Sketches and queries are rounded to float16: logits of a few are off by a few of 2**-12 each.
    torch.testing.assert_close(found.double(), expected, rtol=6e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8])
@pytest.mark.parametrize("tokens", [1, 4])
def test_scores_follow_the_definition(kernel: str, group: int, tokens: int) -> None:
    """Of pages in any order of slots, with one that has no sketch, and a request without a list."""
    server = on_pages([200, 0, 97], kernel)
    server.admit(4, 100, like=1, shared=40)
    assert not server.knows(1, 2)
    check_scores(server, tokens, group)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pools", POOLS, ids="-".join)
def test_scores_pool_rows_and_heads(kernel: str, pools) -> None:
    check_scores(on_pages([130, 90], kernel), 3, 3, pools)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_scores_of_heads_of_any_dimension(kernel: str, dim: int) -> None:
    check_scores(on_pages([130, 90], kernel, dim=dim), 1, 4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_half_precision(kernel: str, dtype: torch.dtype) -> None:
    skip_bf16_in_the_interpreter(kernel, dtype)
    check_scores(on_pages([130, 90], kernel, dtype=dtype), 4, 2)


@pytest.mark.parametrize("programs, least, block", [(1, 64, 2048), (30, 2, 1024), (100, 1, 4096)])
def test_scores_in_any_number_of_parts(monkeypatch, programs: int, least: int, block: int) -> None:
    """Parts of a block, of several, and within one; several pooling programs a request."""
    tune(monkeypatch, page_scores, programs=programs, least=least, block=block, pool_pages=16)
    server = on_pages([1500, 0, 300, 97], "triton", width=1600, slots=3000)
    server.tags[int(server.table[1, 700])] = NO_PAGE
    server.ledger.pop(int(server.table[1, 700]))
    check_scores(server, 2, 2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_where_no_page_has_a_sketch(kernel: str) -> None:
    """All of them are on the list, which has room for them here."""
    server = on_pages([80, 90], kernel)
    server.tags.fill_(NO_PAGE)
    server.ledger.clear()
    # Of five pages one is sink and two are recent: two are unknown, and do not fit into a shorter list.
    sizes, *_ = server.sizes([[64], [80]], [[0, 0]])
    assert (sizes.counts == WHOLE).all()
    check_scores(server, 1, 2, counts=[[64], [80]])
    sizes = sizes._replace(contexts=sizes.contexts._replace(lens=on_device(torch.tensor([5, 5]))))
    sizes.known[:] = 0
    found, starts = run_scores(server, draw_queries(server, 1, 2), sizes)
    for start in starts.tolist():
        assert found[:, start : start + 5].isnan().all()


# ---- lists


def check_lists(server: Server, importance, starts, counts, channels, sink: int, recent: int) -> None:
    sizes, lists, heads = server.sizes(counts, channels, sink, recent)
    scores = on_device(Scores(importance, starts))
    expected = torch.full_like(lists.indices, -7).cpu()
    for layer, of_heads in enumerate(channels):
        contexts = on_device(server.contexts)
        ops(server.kernel).list_pages(
            scores, contexts, sizes, lists, heads, layer=layer, sink=sink, recent=recent
        )
        for b, (row, length) in enumerate(server.lens.items()):
            for h, channel in enumerate(of_heads):
                count, start = int(sizes.counts[b, channel]), int(lists.starts[b, channel])
                if count == WHOLE:
                    continue
                complete, rest = divmod(length, PAGE)
                of_pages = importance[h, starts[b] : starts[b] + complete]
                forced = math.ceil(sink / PAGE), math.ceil(recent / PAGE)
                chosen = top_by_definition(of_pages, count // PAGE, *forced)
                positions = [page * PAGE + i for page in chosen for i in range(PAGE)]
                positions += [complete * PAGE + i for i in range(rest)]
                slots = lists.indices[start : start + count].tolist()
                assert sorted(slots) == sorted(server.table[row, positions].tolist())
                assert {*range(sink), *range(length - recent, length)} <= set(positions)
                expected[start : start + count] = lists.indices[start : start + count].cpu()
    assert torch.equal(lists.indices.cpu(), expected)  # nothing else is written


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sink, recent", [(4, 20), (16, 32), (17, 1), (4, 64)])
@pytest.mark.parametrize("kind", ["distinct", "tied", "unknown"])
def test_lists_are_the_pages_of_the_top_and_what_follows_them(kernel: str, sink, recent, kind: str) -> None:
    server = on_pages([300, 151, 40, 0, 288], kernel)
    counts = [[110, 200, -1, 299], [111, 99, 150, 30], [-1] * 4, [-1] * 4, [96, 128, 140, 272]]
    importance = (torch.rand(2, 5 * 64 + 64) ** 6 * 16384).half()
    if kind == "tied":
        importance = (torch.randint(0, 3, importance.shape) * 5).half()
    elif kind == "unknown":
        importance[:, 5::7] = math.nan
    starts = torch.arange(5) * 64
    check_lists(server, importance, starts, counts, [[0, 1], [2, 3]], sink, recent)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_page_without_a_sketch_is_on_every_list(kernel: str) -> None:
    """From keys to slots: the other branch took the page over."""
    server = on_pages([300], kernel)
    server.admit(2, 120, like=1, shared=100)
    assert not server.knows(1, 6) and server.knows(2, 6)
    sizes, lists, heads = server.sizes([[108, 108], [88, 88]], [[0, 1]])
    found, starts = run_scores(server, draw_queries(server, 1, 2), sizes)
    ops(kernel).list_pages(
        on_device(Scores(found, starts)),
        on_device(server.contexts),
        sizes,
        lists,
        heads,
        layer=0,
        sink=4,
        recent=20,
    )
    for h in range(2):
        start, count = int(lists.starts[0, h]), int(sizes.counts[0, h])
        assert count == 108 and int(sizes.unknown[0]) == 1
        assert set(server.page(1, 6)) <= set(lists.indices[start : start + count].tolist())


@pytest.mark.parametrize("kernel", KERNELS)
def test_pages_are_joined_with_what_the_draft_found(kernel: str) -> None:
    """All chosen pages and then the top of the draft: no token twice, exactly as many as wanted."""
    server, sink, recent = on_pages([300, 150, 40, 200], kernel), 4, 20
    server.tags[int(server.table[1, 100])] = NO_PAGE
    bs, columns, channels = 4, 320, [[0, 2], [1, 1]]
    # The second request has no part for pages: the draft has its lists.
    share, wanted = [[100] * 3, [30] * 3, [-1] * 3, [112] * 3], [170, 120, WHOLE, 150]
    drafted = (torch.rand(3, bs * columns) ** 6 * 16384).half()
    of_pages = (torch.rand(2, bs * 64) ** 6 * 16384).half()
    of_pages[:, 6] = math.nan
    sizes, _, heads = server.sizes(share, channels, sink, recent)
    starts, page_starts = on_device(torch.arange(bs) * columns), on_device(torch.arange(bs) * 64)
    starts[2] = -1  # attends to everything
    contexts = on_device(server.contexts)
    for layer in range(2):
        joined = torch.full((2, bs * columns), -5.0).half().to(DEVICE)
        scores = on_device(Scores(of_pages, page_starts)), on_device(Scores(drafted, starts))
        args = *scores, joined, contexts, sizes, heads
        ops(kernel).join_pages(*args, layer=layer, sink=sink, recent=recent)
        assert (joined[:, 2 * columns : 2 * columns + 40] == -5).all()
        counts = torch.tensor(wanted, dtype=torch.int32, device=DEVICE)[:, None].expand(bs, 2).contiguous()
        places = torch.arange(bs * 2, device=DEVICE).view(bs, 2) * columns
        indices = torch.full((bs * 2 * columns,), -7, dtype=torch.int32, device=DEVICE)
        lists = Lists(indices, places, counts)
        ops(kernel).select_tokens(
            Scores(joined, starts), contexts, contexts.lens, lists, sink=sink, recent=recent
        )
        for b, (row, length) in enumerate(server.lens.items()):
            for h, channel in enumerate(channels[layer] if wanted[b] >= 0 else []):
                complete = length // PAGE
                number = 0 if b == 1 else (share[b][channel] - length % PAGE) // PAGE
                page_row = of_pages[h, b * 64 : b * 64 + complete]
                of_token = drafted[channel, b * columns : b * columns + length].clone()
                for page in top_by_definition(page_row, number, 1, 2) if number else []:
                    of_token[page * PAGE : (page + 1) * PAGE] = math.inf
                chosen = top_by_definition(of_token, wanted[b], sink, recent)
                slots = indices[int(places[b, h]) :][: wanted[b]].tolist()
                assert sorted(slots) == sorted(server.table[row, chosen].tolist())
                assert int((of_token == math.inf).sum()) == number * PAGE < wanted[b]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_needle_is_found_at_any_position(kernel: str) -> None:
    """A key that the query points at is listed, wherever it is."""
    server = on_pages([160], kernel, kv_heads=1)
    for position in (0, 1, 15, 16, 17, 31, 32, 77, 127, 128, 143, 144, 159):
        server.keys.nan_to_num_(0).mul_(0)
        server.keys[int(server.table[1, position])] = 20.0
        before, contexts = on_device(torch.tensor([0])), on_device(server.contexts)
        ops(kernel).sketch_pages(server.keys, server.sketches, contexts, before, server.tags, most=160)
        sizes, lists, heads = server.sizes([[64]], [[0]], 1, 16)
        q = torch.ones(1, 1, 1, server.dim)
        found, starts = run_scores(server, q, sizes)
        ops(kernel).list_pages(
            on_device(Scores(found, starts)), contexts, sizes, lists, heads, layer=0, sink=1, recent=16
        )
        slots = lists.indices[: int(sizes.counts[0, 0])].tolist()
        assert len(slots) == len(set(slots)) == 64
        assert int(server.table[1, position]) in slots


@pytest.mark.parametrize("kernel", KERNELS)
def test_pages_of_an_empty_batch(kernel: str) -> None:
    server = Server(kernel)
    server.forward({})
    none = torch.zeros(0, dtype=torch.int64)
    server.lens = {}
    contexts = on_device(Contexts(server.table, none, none))
    lists = Lists(torch.zeros(8, dtype=torch.int32), none.view(0, 2), none.view(0, 2).int())
    heads = on_device(torch.tensor([[0, 1]], dtype=torch.int32))
    lists = on_device(lists)
    sizes = ops(kernel).size_pages(contexts, server.tags, lists, heads, sink=4, recent=20)
    assert sizes.counts.shape == (0, 2) and sizes.pages.shape == (1, 0, 2)
    scores = on_device(Scores(torch.zeros(2, 64).half(), none))
    q = torch.zeros(0, 1, 4, server.dim, device=DEVICE)
    pooling = Pooling("max", "max", 1)
    ops(kernel).score_pages(q, server.sketches, contexts, sizes, scores, scale=1.0, pooling=pooling)
    ops(kernel).list_pages(scores, contexts, sizes, lists, heads, layer=0, sink=4, recent=20)
    joined = scores.importance.clone()
    ops(kernel).join_pages(scores, scores, joined, contexts, sizes, heads, layer=0, sink=4, recent=20)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lens", [(200, 102), (102, 200), (200, 200), (100, 98)])
def test_tags_of_a_prefix_that_two_requests_write_anew_do_not_depend_on_who_comes_first(
    kernel: str, lens: tuple[int, int]
) -> None:
    """They part within a page: whoever completes it has the shared slots of it, of two the later one."""
    prefix, page = 99, 99 // PAGE
    table = torch.randperm(600)[: 3 * 200].view(3, 200).int()
    table[2, :prefix] = table[1, :prefix]
    contexts = Contexts(table, torch.tensor([1, 2]), torch.tensor(lens))
    tags = torch.randint(-1, 600, (600,), dtype=torch.int32)
    on = [on_device(t) for t in (contexts, torch.tensor([32, 40]), tags)]
    ops(kernel).tag_pages(*on, most=200)
    completes = [row for row, length in zip((1, 2), lens, strict=True) if length >= (page + 1) * PAGE]
    shared = table[1, page * PAGE : prefix].long()
    last = int(table[completes[-1], (page + 1) * PAGE - 1]) if completes else NO_PAGE
    assert on[2][shared].tolist() == [last] * len(shared)
    assert on[2][table[1, 32 : 32 + PAGE].long()].tolist() == [int(table[1, 32 + PAGE - 1])] * PAGE


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_graph_of_a_step_follows_lengths_and_slots(tokens: int) -> None:
    """Recorded of no request and replayed for some: every step of it is the twin's."""
    server = on_pages([1000, 700, 90], "triton", dim=64, dtype=torch.float16, width=1200, slots=8000)
    server.admit(4, 800, like=1, shared=500)
    op, twin, heads = ops("triton"), ops("torch"), torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    bs, room, scale = 3, 2 * 1200, 64**-0.5
    table, reqs = server.table.to(DEVICE), torch.zeros(bs, dtype=torch.int64, device=DEVICE)
    lens, before, counts = reqs.clone(), reqs.clone(), torch.zeros(bs, 2, dtype=torch.int32, device=DEVICE)
    contexts, rest = Contexts(table, reqs, lens), torch.arange(bs * 2, device=DEVICE).view(bs, 2) * room
    lists = Lists(torch.zeros(bs * 2 * room, dtype=torch.int32, device=DEVICE), rest, counts)
    scores = Scores(torch.zeros(2, bs * 128).half().to(DEVICE), torch.arange(bs, device=DEVICE) * 128)
    q = torch.randn(bs, tokens, 8, 64, device=DEVICE).half()
    pool = KvPool(server.keys.nan_to_num(0), torch.randn_like(server.keys))
    mask = torch.ones(tokens, tokens, device=DEVICE).tril().bool().expand(bs, -1, -1).contiguous()
    attended, sketches = torch.zeros(2, dtype=torch.int64, device=DEVICE), server.sketches
    pooling = Pooling("max", "max", tokens)

    def step():
        op.tag_pages(contexts, before, server.tags, most=16)
        op.sketch_pages(pool.k, sketches, contexts, before, server.tags, most=16)
        sizes = op.size_pages(contexts, server.tags, lists, heads, sink=4, recent=20)
        plan, own = op.plan_pages(sizes, kv_heads=2), lists._replace(counts=sizes.counts)
        op.score_pages(q, sketches, contexts, sizes, scores, scale=scale, pooling=pooling, plan=plan)
        op.list_pages(scores, contexts, sizes, own, heads, layer=0, sink=4, recent=20)
        return sizes, op.sparse_attention(q, pool, own, heads[0], contexts, mask, attended, scale=scale)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            sizes, out = step()
    for rows, keep in (([1, 4, 2], 0.3), ([3, 0, 4], 0.5), ([2, 1, 0], 0.1)):
        lengths = torch.tensor([server.lens.get(row, 16) - tokens for row in rows])
        reqs.copy_(torch.tensor(rows))
        lens.copy_(lengths)
        before.copy_(lengths - 10)
        counts.copy_(torch.maximum(lengths * keep, torch.tensor(100.0)).int()[:, None].expand(bs, 2))
        counts.masked_fill_(counts >= lens[:, None], WHOLE)
        graph.replay()
        torch.cuda.synchronize()
        tags, expected = server.tags.clone(), scores._replace(importance=scores.importance.clone())
        twin.tag_pages(contexts, before, server.tags, most=16)
        assert torch.equal(server.tags, tags)
        same = twin.size_pages(contexts, server.tags, lists, heads, sink=4, recent=20)
        assert torch.equal(sizes.counts, same.counts) and (same.counts > 0).any()
        twin.score_pages(q, sketches, contexts, same, expected, scale=scale, pooling=pooling)
        own = lists._replace(counts=same.counts, indices=torch.zeros_like(lists.indices))
        found, importance = scores.importance.float(), expected.importance.float()
        torch.testing.assert_close(found, importance, rtol=3e-3, atol=2e-3, equal_nan=True)
        twin.list_pages(scores, contexts, same, own, heads, layer=0, sink=4, recent=20)
        for start, count in zip(rest.flatten().tolist(), own.counts.flatten().tolist(), strict=True):
            entries = slice(start, start + max(count, 0))
            assert torch.equal(lists.indices[entries].sort().values, own.indices[entries].sort().values)
        twins = twin.sparse_attention(q, pool, own, heads[0], contexts, mask, attended, scale=scale)
        assert_close(out, twins.double())


# ---- refusals


@pytest.mark.parametrize("kernel", KERNELS)
def test_pages_refuse_shapes_that_do_not_fit(kernel: str) -> None:
    server, op = on_pages([100], kernel), ops(kernel)
    contexts, before = on_device(server.contexts), on_device(torch.tensor([0]))
    with pytest.raises(ValueError, match="tag_pages: tags"):
        op.tag_pages(contexts, before, server.tags.long(), most=1)
    with pytest.raises(ValueError, match="tag_pages: before"):
        op.tag_pages(contexts, before[:0], server.tags, most=1)
    with pytest.raises(ValueError, match="24 dimensions"):
        keys = server.keys[..., :24]
        op.sketch_pages(keys, server.sketches, contexts, before, server.tags, most=1)
    with pytest.raises(ValueError, match="sketch_pages: sketches"):
        op.sketch_pages(server.keys, server.sketches.bfloat16(), contexts, before, server.tags, most=1)
    sizes, lists, heads = server.sizes([[80, 80]], [[0, 1]])
    with pytest.raises(ValueError, match="size_pages: channels"):
        op.size_pages(contexts, server.tags, lists, heads[0], sink=4, recent=20)
    scores = on_device(Scores(torch.zeros(2, 64).half(), torch.tensor([0])))
    q = torch.zeros(1, 1, 4, server.dim, device=DEVICE)
    score = {"contexts": contexts, "sizes": sizes, "scores": scores, "scale": 1.0}
    with pytest.raises(ValueError, match="pooling.rows"):
        op.score_pages(q, server.sketches, pooling=Pooling("median", "max", 1), **score)
    with pytest.raises(ValueError, match="score_pages: q"):
        op.score_pages(q[:, :, :3], server.sketches, pooling=Pooling("max", "max", 1), **score)
    one = scores._replace(importance=scores.importance[:1])
    with pytest.raises(ValueError, match="list_pages: 1 rows"):
        op.list_pages(one, contexts, sizes, lists, heads, layer=0, sink=4, recent=20)
    with pytest.raises(ValueError, match="join_pages: joined"):
        joined = scores.importance[:, :32]
        op.join_pages(scores, scores, joined, contexts, sizes, heads, layer=0, sink=4, recent=20)
