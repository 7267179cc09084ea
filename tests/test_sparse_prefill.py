"""The prefill of a batch: which blocks of new tokens select how much, what is counted, what is shared."""

from __future__ import annotations

import pytest
import torch

from sts_kernels import ops
from sts_kernels.layout import KEY_BLOCK, WHOLE, KvPool, blocks_of
from sts_sglang.config import StsConfig
from sts_sglang.core import prefill
from sts_sglang.core.block_attention import ByOps
from sts_sglang.core.block_selectors import (
    SAMPLED,
    BlockCall,
    BlockSelector,
    ByDraft,
    ByOwnQueries,
    of_draft,
)
from sts_sglang.core.channels import Channels
from sts_sglang.core.prefill import Reader, SparsePrefill
from sts_sglang.core.request import Request
from sts_sglang.core.round import Draft
from sts_sglang.headmap import HeadMap
from tests.test_kernels import DEVICE, KERNELS, on_device
from tests.test_prefill import Prefill
from tests.tolerances import assert_close

LAYERS = 3


def request(tokens: int, output: int = 0, **asked) -> Request:
    return Request("rid", 1, range(tokens), range(output), {"sts": asked} if asked else None)


def made_of(made: Prefill, kernel: str = "torch", **config) -> SparsePrefill:
    config = StsConfig(prefill="sparse", **{"prefill_floor": 0, **config})
    selector = ByOwnQueries(config, ops(kernel), made.kv_heads, made.group)
    return prefilling(made, config, kernel, selector)


def reader_of(made: Prefill, kernel: str, layers: set[int]) -> Reader:
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    return Reader(ByOps(ops(kernel), kernel, DEVICE), frozenset(layers), made.kv_heads, counts)


def prefilling(
    made: Prefill, config: StsConfig, kernel: str, selector: BlockSelector, first: Reader | None = None
) -> SparsePrefill:
    reader = reader_of(made, kernel, set(range(LAYERS)) - set(config.dense_layers))
    return SparsePrefill(config, selector, reader, DEVICE, first)


def counted(reader: Reader) -> list[int]:
    """Blocks of keys attended to, and those there."""
    return reader.counts.tolist()


def attend(sparse: SparsePrefill, made: Prefill, q: torch.Tensor, layer: int = 0) -> torch.Tensor:
    call = BlockCall(layer, on_device(q), on_device(made.pool), made.scale)
    return sparse.attend(call).cpu()


def begun(sparse: SparsePrefill, made: Prefill, requests: list[Request]) -> list[tuple]:
    """(request, first row, tokens, tokens before, count) of all blocks, in the order of their rows."""
    sparse.admit(requests)
    sparse.begin(on_device(made.contexts), *map(list, zip(*made.chunks, strict=True)))
    if not sparse._parts:
        return []
    first = sparse.reader.attention._first  # those that attend to everything, too
    parts = [sparse._parts[0] if first is None else first, *sparse._parts[1:]]
    blocks = [block for part in parts for block in zip(*(c.tolist() for c in part[:5]), strict=True)]
    return sorted(blocks, key=lambda block: block[1])


def test_blocks_begin_where_those_of_the_whole_prompt_do() -> None:
    made = Prefill([(1000, 200), (0, 300)])
    found = begun(made_of(made), made, [request(5000), request(5000)])
    assert [block[:4] for block in found] == [
        (0, 0, 24, 1000),
        (0, 24, 128, 1024),
        (0, 152, 48, 1152),
        (1, 200, 128, 0),
        (1, 328, 128, 128),
        (1, 456, 44, 256),
    ]
    # A quarter of the seven, eight and nine before them, rounded up; sink and recent where there are no more.
    assert [block[4] for block in found] == [2, 2, 3, WHOLE, WHOLE, WHOLE]


def test_what_attends_to_everything() -> None:
    """The prompt's last block, what is below the floor, and who asks for it."""
    made = Prefill([(1900, 200), (1900, 200), (1900, 200), (900, 100)])
    requests = [request(2100), request(2090, 10), request(2101, prefill="dense"), request(9000)]
    found = begun(made_of(made, prefill_floor=1000), made, requests)
    counts = [[block[4] for block in found if block[0] == i] for i in range(4)]
    assert counts == [[4, 4, WHOLE], [4, 4, WHOLE], [WHOLE] * 3, [WHOLE]]


def test_keeps_of_requests() -> None:
    made = Prefill([(2560, 128)] * 3)
    requests = [request(9000), request(9000, prefill_keep=0.5), request(9000, prefill_keep=0)]
    assert [block[4] for block in begun(made_of(made), made, requests)] == [5, 10, 5]


def test_what_attends_to_everything_begins_and_requests_stand_together() -> None:
    made = Prefill([(1024, 300), (1024, 256), (1024, 300)])
    sparse = made_of(made)
    begun(sparse, made, [request(9000), request(9000, prefill="dense"), request(9000)])
    assert sparse.reader.attention._first.requests.tolist() == [1, 1, 0, 0, 0, 2, 2, 2]
    assert sparse._parts[0].requests.tolist() == [0, 0, 0, 2, 2, 2]
    assert sparse._parts[0].most == 11


def test_counts_are_of_what_may_be_sparse() -> None:
    made = Prefill([(1024, 128), (1024, 128)])
    sparse = made_of(made, dense_layers=(1,))
    begun(sparse, made, [request(9000), request(9000, prefill="dense")])
    heads = (LAYERS - 1) * made.kv_heads
    assert counted(sparse.reader) == [2 * heads, 8 * heads]
    assert sparse.attends(0) and not sparse.attends(1) and sparse.attends(2)


@pytest.mark.parametrize(
    "requests",
    [
        [],  # SGLang captures a graph, or warms up
        [request(9000, prefill="dense")],
        [request(9000, prefill_keep=1.0)],
        [request(1152)],
    ],
)
def test_where_nobody_selects_the_dense_backend_attends(requests) -> None:
    made = Prefill([(1024, 128)])
    sparse = made_of(made)
    assert begun(sparse, made, [request(9000)]) and sparse.attends(0)
    assert not begun(sparse, made, requests) and not sparse.attends(0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scratch", [prefill.SCRATCH, 5_000])
def test_a_batch_attends_as_it_would_one_by_one(monkeypatch, kernel: str, scratch: int) -> None:
    """However many blocks there is room for at a time, and whoever else is in the batch."""
    monkeypatch.setattr(prefill, "SCRATCH", scratch)
    made = Prefill([(1000, 300), (0, 200), (700, 140)], group=2)
    requests = [request(9000), request(200), request(9000, prefill="dense")]
    sparse = made_of(made, kernel, prefill_keep=0.4)
    begun(sparse, made, requests)
    assert (len(sparse._parts) > 1) == (scratch == 5_000)
    found = attend(sparse, made, made.q)
    row = 0
    for i, (before, new) in enumerate(made.chunks):
        rows = slice(row, row + new)
        alone = made_of(made, "torch", prefill_keep=0.4)
        alone.admit([requests[i]])
        contexts = on_device(
            made.contexts._replace(reqs=made.reqs[i : i + 1], lens=made.contexts.lens[i : i + 1])
        )
        alone.begin(contexts, [before], [new])
        if alone.attends(0):
            expected = attend(alone, made, made.q[rows])
        else:
            expected = whole(made, i, rows)
        assert_close(found[rows], expected.double())
        row += new
    assert not torch.isnan(found).any()


def whole(made: Prefill, request_: int, rows: slice) -> torch.Tensor:
    before, found = made.chunks[request_][0], torch.empty(made.q[rows].shape)
    for place, row in enumerate(range(rows.start, rows.stop)):
        slots = made.slots(request_, before + place + 1)
        for head in range(made.q.shape[1]):
            probs = made.logits(request_, row, head, before + place + 1).softmax(0)
            found[place, head] = (probs @ made.pool.v[slots, head // made.group].double()).float()
    return found


def test_counts_are_the_same_however_a_prompt_is_cut() -> None:
    """At ends of blocks: one that is cut is two."""
    found = []
    for chunks in ([(0, 4000)], [(0, 512), (512, 1152), (1664, 2336)]):
        made = Prefill([(0, 4000)])
        sparse = made_of(made, prefill_floor=1000)
        for before, number in chunks:
            sparse.admit([request(4000)])
            sparse.begin(on_device(made.contexts), [before], [number])
        found.append(counted(sparse.reader))
    assert found[0] == found[1]
    assert found[0][1] == LAYERS * made.kv_heads * sum(range(32)) > found[0][0]


def test_queries_that_do_not_fit_the_batch_are_an_error() -> None:
    made = Prefill([(1024, 128)])
    sparse = made_of(made)
    begun(sparse, made, [request(9000)])
    with pytest.raises(RuntimeError, match="127 queries of a prefill of 128 tokens"):
        attend(sparse, made, made.q[1:])


def test_marks_are_of_what_keys_and_values_become() -> None:
    sparse = made_of(Prefill([(0, 1)]))
    marks = [
        sparse.mark(params)
        for params in (
            None,
            {"sts": {"keep": 0.5}},
            {"sts": {"prefill": "sparse"}},
            {"sts": {"prefill_keep": 0.25}},
            {"sts": {"prefill_keep": 0.5}},
            {"sts": {"prefill_keep": 1.0}},
            {"sts": {"prefill": "dense"}},
        )
    ]
    assert len(set(marks[:4])) == 1 and marks[4] not in ("", marks[0]) and marks[5:] == ["", ""]


def test_a_block_of_keys_is_one_of_queries() -> None:
    """Blocks begin where blocks of keys do."""
    assert prefill.QUERY_BLOCK == KEY_BLOCK


def test_need_is_what_a_forward_has_at_a_time() -> None:
    sizes = {"channels": 7, "tokens": 8192, "requests": 16, "context": 131072}
    assert prefill.need(StsConfig(), **sizes).fixed == 0
    assert prefill.need(StsConfig(prefill="sparse"), **sizes).fixed == prefill.SCRATCH
    made = Prefill([(100_000, 3000)], kv_heads=2, dim=16)
    sparse = made_of(made)
    begun(sparse, made, [request(200_000)])
    each = SAMPLED * made.group + 1  # sums, and a place in a list
    for blocks in sparse._parts:
        assert 4 * blocks.counts.numel() * made.kv_heads * blocks.most * each <= prefill.SCRATCH


# ---- the draft selects


class Drafted:
    """A draft of two layers of three and six query heads a KV head, whose keys lie a position before those of
    the target's tokens, in slots of its own; and a map onto a target of LAYERS layers of two KV heads."""

    # Layers joined, a head that weighs twice, one that nobody speaks for.
    SOURCES = (
        (((0, 0), (0, 5)), ((1, 2),)),
        (((0, 1), (1, 1), (1, 4)), ((1, 2),)),
        (((1, 0), (1, 0)), ()),
    )

    def __init__(self, chunks: list[tuple[int, int]], pool: str):
        self.layers = [Prefill(chunks, group=3, dim=16) for _ in range(2)]
        for layer in self.layers[1:]:
            layer.contexts, layer.reqs = self.layers[0].contexts, self.layers[0].reqs
            keys = self.layers[0].pool.k
            drawn = torch.where(keys.isnan(), keys, torch.randn(keys.shape))
            layer.pool = layer.pool._replace(k=drawn, v=self.layers[0].pool.v)
        self.made, self.head_map = self.layers[0], HeadMap(self.SOURCES, "test", pool)
        self.config = StsConfig(
            prefill="sparse", prefill_floor=0, prefill_keep=0.4, pool_rows=pool, pool_heads=pool
        )

    def selecting(self, kernel: str, first: Reader | None = None) -> SparsePrefill:
        scales = (self.made.scale, self.made.scale)
        q_heads, pools = self.made.q.shape[1], self
        draft = Draft(3, 1, q_heads, self.made.kv_heads, self.made.dim, torch.float32, pools, scales)
        selector = ByDraft(self.config, ops(kernel), Channels.of(self.head_map, DEVICE), draft)
        return prefilling(self.made, self.config, kernel, selector, first)

    def layer(self, number: int) -> KvPool:
        return on_device(self.layers[number].pool)

    def read(self, sparse: SparsePrefill, requests: list[Request]) -> bool:
        """As the draft's worker does."""
        sparse.admit(requests)
        contexts = on_device(self.made.contexts)
        asked = sparse.ask_draft(contexts, *map(list, zip(*self.made.chunks, strict=True)))
        if asked:
            with sparse.listening():
                for number, layer in enumerate(self.layers):
                    sparse.hear(number, on_device(layer.q))
        return asked

    def shares(self, request: int, first: int, last: int) -> torch.Tensor:
        """float64 [layers, heads, rows, blocks of keys]: what the draft's rows of some of the target's tokens
        [first, last) of a request attend to."""
        before, start = self.made.chunks[request][0], sum(n for _, n in self.made.chunks[:request])
        first = max(first, before + 1)  # the row of the token before that was in another forward
        asked = [first + max((i + 1) * (last - first) // SAMPLED - 1, 0) for i in range(SAMPLED)]
        found = []
        for layer in self.layers:
            for head in range(layer.q.shape[1]):
                for token in asked:
                    row = start + token - 1 - before
                    # Its own key is the last that it sees; keys are of tokens 1, 2, ...
                    probs = layer.logits(request, row, head, token).softmax(0)
                    probs = torch.cat([torch.zeros(1), probs, torch.zeros(-(token + 1) % KEY_BLOCK)])
                    found.append(probs.view(-1, KEY_BLOCK).sum(1))
        blocks = blocks_of(last)
        found = [torch.cat([part, torch.zeros(blocks - len(part))]) for part in found]
        return torch.stack(found).view(len(self.layers), -1, SAMPLED, blocks)

    def expected(self, block: tuple[int, ...], layer: int, head: int) -> list[int]:
        """Blocks of keys that a head of the target attends to."""
        request, _, number, before, count = block
        sources, shares = self.SOURCES[layer][head], self.shares(request, before, before + number)
        choices = before // KEY_BLOCK
        spoken = [shares[source] for source in sources]  # [rows, blocks] each
        if not spoken:
            score = torch.zeros(choices)
        elif self.config.pool_rows == "max":
            score = torch.stack(spoken).amax((0, 1))
        else:
            score = torch.stack(spoken).mean((0, 1))
        free = sorted(range(1, choices - 1), key=lambda j: (-float(score[j]), -j))
        return sorted([0, choices - 1, *free[: count - 2]])


@pytest.mark.parametrize(
    ("kernel", "pool", "scratch"),
    [
        ("torch", "max", prefill.SCRATCH),
        ("torch", "mean", 10_000),
        ("triton", "max", 10_000),
        pytest.param("triton", "mean", prefill.SCRATCH, marks=pytest.mark.gpu),
    ],
)
def test_what_the_draft_attends_to_becomes_lists_of_the_target(monkeypatch, kernel, pool, scratch) -> None:
    """Of chunks that begin within a block, and of several requests; whoever wants everything gets it."""
    monkeypatch.setattr(prefill, "SCRATCH", scratch)
    drafted = Drafted([(1000, 300), (0, 200), (1151, 140), (700, 140)], pool)
    sparse = drafted.selecting(kernel)
    requests = [request(9000), request(200), request(9000), request(9000, prefill="dense")]
    assert drafted.read(sparse, requests)
    assert (len(sparse._parts) > 1) == (scratch == 10_000)
    checked = 0
    for part, blocks in enumerate(sparse._parts):
        for layer in range(LAYERS):
            listed = sparse.selector.listed(part, BlockCall(layer, None, None, 1.0)).cpu()
            assert listed.shape == (blocks.counts.numel(), 2, blocks.most)
            for i, block in enumerate(zip(*(c.tolist() for c in blocks[:5]), strict=True)):
                for head in range(2) if block[4] != WHOLE else ():
                    assert listed[i, head, : block[4]].tolist() == drafted.expected(block, layer, head)
                    checked += 1
    # Four blocks of the first request, and of the third all but its first, which is a single token.
    assert checked == 2 * LAYERS * (4 + 2)
    attended = attend(sparse, drafted.made, drafted.made.q, layer=1)
    assert not torch.isnan(attended).any()
    sparse.end()
    assert not sparse.attends(0)


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scratch", [prefill.SCRATCH, 10_000])
def test_a_draft_attends_by_what_it_is_asked_for_the_target(monkeypatch, kernel: str, scratch: int) -> None:
    """To lists of the same sums, over blocks of keys by its own numbers; those of the target stay as they
    are. What it attends to exactly: test_draft_prefill."""
    monkeypatch.setattr(prefill, "SCRATCH", scratch)
    drafted = Drafted([(1000, 300), (0, 200), (1151, 140), (700, 140)], "max")
    requests = [request(9000), request(200), request(9000), request(9000, prefill="dense")]
    heard = drafted.selecting("torch")
    drafted.read(heard, requests)
    sparse = drafted.selecting(kernel, reader_of(drafted.made, kernel, {0, 1}))
    sparse.admit(requests)
    sparse.ask_draft(on_device(drafted.made.contexts), *map(list, zip(*drafted.made.chunks, strict=True)))
    with sparse.listening():
        for number, layer in enumerate(drafted.layers):
            call = BlockCall(number, on_device(layer.q), drafted.layer(number), drafted.made.scale)
            found = sparse.attend_first(call)
            expected = torch.empty_like(found)
            for part, blocks in enumerate(sparse._parts):
                sums = ops("torch").score_blocks(
                    call.q,
                    call.pool,
                    on_device(drafted.made.contexts),
                    heard.selector._asking[part],
                    scale=call.scale,
                    sampled=SAMPLED,
                    shift=1,
                )
                listed = ops("torch").list_blocks(sums, blocks, sink=1, recent=1)
                heard.reader.attention.attend(
                    part, blocks, listed, call.q, call.pool, expected, scale=call.scale
                )
            assert_close(found.cpu(), expected.cpu().double())
    for part, blocks in enumerate(sparse._parts):
        own, other = (s.selector.listed(part, BlockCall(1, None, None, 1.0)) for s in (sparse, heard))
        for i, count in enumerate(blocks.counts.tolist()):
            assert torch.equal(own[i, :, :count].cpu(), other[i, :, :count].cpu())
    assert counted(sparse.first)[0] * LAYERS == counted(sparse.reader)[0] * 2 > 0


def test_the_target_goes_by_what_the_draft_has_read() -> None:
    """Its own forward begins nothing anew, and is counted once; the next one is."""
    drafted = Drafted([(1024, 300)], "max")
    sparse = drafted.selecting("torch")
    assert not sparse.listens and drafted.read(sparse, [request(9000)]) and not sparse.listens
    once, parts = counted(sparse.reader)[0], sparse._parts
    sparse.begin(on_device(drafted.made.contexts), [1024], [300])
    assert sparse._parts is parts and counted(sparse.reader)[0] == once > 0
    sparse.end()
    sparse.begin(on_device(drafted.made.contexts), [1024], [300])
    assert counted(sparse.reader)[0] == 2 * once


def test_where_nobody_selects_the_draft_reads_afterwards() -> None:
    drafted = Drafted([(1024, 300)], "max")
    sparse = drafted.selecting("torch")
    assert not drafted.read(sparse, [request(9000, prefill="dense")])
    sparse.begin(on_device(drafted.made.contexts), [1024], [300])
    assert not sparse.attends(0)


def test_a_list_depends_on_no_later_token() -> None:
    """Nor does it where the next token is in the same forward."""
    drafted = Drafted([(1000, 400)], "max")
    found = []
    for _ in range(2):
        sparse = drafted.selecting("torch")
        drafted.read(sparse, [request(9000)])
        blocks, listed = sparse._parts[0], sparse.selector.listed(0, BlockCall(0, None, None, 1.0))
        ends = (blocks.before + blocks.numbers).tolist()
        block = ends.index(1152)
        found.append(listed[block, :, : blocks.counts[block]])
        for layer in drafted.layers:  # of token 1152, and after it
            layer.q[1151 - 1000 :] = torch.randn_like(layer.q[1151 - 1000 :])
            layer.pool.k[layer.slots(0, 1400)[1151:]] *= -1
    assert torch.equal(*found)


def test_rows_of_blocks_in_the_draft_s_pass() -> None:
    made = Prefill([(1000, 300)])
    blocks = on_device(made.blocks)
    moved = of_draft(blocks, torch.tensor([1000], dtype=torch.int32, device=DEVICE))
    columns = [part.tolist() for part in (moved.rows, moved.numbers, moved.before)]
    assert sorted(zip(*columns, strict=True)) == [(0, 127, 1001), (127, 128, 1128), (255, 44, 1256)]


def test_what_the_draft_selected_is_shared_with_its_like() -> None:
    marks = {made_of(Prefill([(0, 1)])).mark(None), Drafted([(0, 1)], "max").selecting("torch").mark(None)}
    assert len(marks) == 2 and "" not in marks


def test_lists_of_a_draft_take_what_is_reserved() -> None:
    drafted = Drafted([(9000, 3000), (12_000, 2)], "max")
    sparse = drafted.selecting("torch")
    sparse.admit([request(99_999), request(99_999)])
    sparse.ask_draft(on_device(drafted.made.contexts), [9000, 12_000], [3000, 2])
    taken = sum(scores.nbytes for scores in sparse.selector._scores)
    channels = sparse.selector.number
    need = prefill.need(StsConfig(prefill="sparse", prefill_by="draft"), channels, 3002, 2, 12_002)
    assert taken + prefill.SCRATCH <= need.fixed
