"""Slot history under random traffic through SGLang's own radix cache and allocator, against a plain model."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    EvictParams,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sts_kernels import ops
from sts_kernels.layout import UNKNOWN, Contexts, Scores
from sts_sglang.config import StsConfig
from sts_sglang.core.history import SlotHistory
from sts_sglang.core.sizes import history_bytes_per_token
from sts_sglang.host.releases import release

SLOTS, REQUESTS, WIDTH, TOKENS = 160, 6, 64, 4
CONFIG = StsConfig(history="blend", history_weight=0.5, history_decay=0.75)


def radix_cache(allocator: TokenToKVPoolAllocator) -> BasePrefixCache:
    """The tree that serves with this release, over nothing but an allocator."""
    if release.TREES_THAT_REMEMBER:
        return RadixCache.create_simulated(mock_allocator=allocator)
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    table = SimpleNamespace(req_to_token=torch.zeros(1, 1))
    return UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=table,
            token_to_kv_pool_allocator=allocator,
            page_size=1,
            tree_components=(ComponentType.FULL,),
        )
    )


def slots_of(cache: BasePrefixCache, match: MatchResult) -> torch.Tensor:
    """Of a matched prefix."""
    if hasattr(match, "device_indices"):
        return match.device_indices
    return cache.path_device_indices(match.last_device_node)[: match.device_prefix_len]


def locked(cache: BasePrefixCache, node: object) -> Callable[[], object]:
    """What undoes it."""
    if hasattr(cache, "unlock"):
        return partial(cache.unlock, cache.lock(node))
    cache.inc_lock_ref(node)
    return partial(cache.dec_lock_ref, node)


class Engine:
    """A scheduler's bookkeeping over the real cache, and beside it what each slot should remember."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        kv_pool = SimpleNamespace()
        self.allocator = TokenToKVPoolAllocator(SLOTS, torch.float32, "cpu", kv_pool, need_sort=False)
        self.cache = radix_cache(self.allocator)
        self.table = torch.zeros(REQUESTS, WIDTH, dtype=torch.int32)
        self.history = SlotHistory(CONFIG, 1, SLOTS + 1, REQUESTS, "cpu", torch.float32)
        self.running: dict[int, SimpleNamespace] = {}
        self.expected: dict[int, float] = {}  # slot -> what its present occupant left there

    # what the target does

    def write(self, slots: torch.Tensor) -> None:
        """A forward of the target writes these slots: new occupants."""
        self.history.forget(slots)
        for slot in slots.tolist():
            self.expected.pop(slot, None)

    def alloc(self, count: int) -> torch.Tensor | None:
        if self.allocator.available_size() < count:
            self.cache.evict(EvictParams(num_tokens=count))
        return self.allocator.alloc(count)

    # what may happen

    def start(self) -> None:
        free = [r for r in range(1, REQUESTS) if r not in self.running]
        if not free:
            return
        # Few token values, so that prompts branch from each other all the time.
        tokens = [self.rng.randrange(2) for _ in range(self.rng.randrange(2, 24))]
        self.admit(free[0], tokens)

    def admit(self, req: int, tokens: list[int]) -> None:
        match = self.cache.match_prefix(MatchPrefixParams(key=self.key(tokens[:-1])))
        cached, node = slots_of(self.cache, match), match.last_device_node
        unlock = locked(self.cache, node)
        own = self.alloc(len(tokens) - len(cached))
        if own is None:
            unlock()
            return
        self.table[req, : len(tokens)] = torch.cat([cached, own]).int()
        self.write(own)
        self.running[req] = SimpleNamespace(tokens=tokens, cached=len(cached), unlock=unlock)

    def round(self) -> None:
        """One verify round of a random batch: rejected tokens' slots are written and freed again."""
        batch = self.rng.sample(sorted(self.running), self.rng.randrange(len(self.running) + 1))
        batch = [r for r in batch if len(self.running[r].tokens) + TOKENS < WIDTH]
        lengths = [len(self.running[r].tokens) for r in batch]
        columns = [sum(-(-n // 64) * 64 for n in lengths[:i]) for i in range(len(batch))]
        importance = torch.rand(1, 64 * REQUESTS) * 100
        fresh = importance.clone()
        args = [torch.tensor(x, dtype=torch.int64) for x in (columns, lengths, batch)]
        columns_, lengths_, reqs = args
        contexts = Contexts(self.table, reqs, lengths_)
        self.history.blend(ops("torch"), Scores(importance, columns_), contexts)
        self.remember(batch, lengths, columns, fresh[0], importance[0])
        for req in batch:
            self.commit(req)

    def remember(self, batch, lengths, columns, fresh, mixed) -> None:
        """The model's own statement of a round, and a check of what was mixed in."""
        before, found = dict(self.expected), {}
        for req, length, column in zip(batch, lengths, columns, strict=True):
            for position in range(1, length):
                slot, value = int(self.table[req, position]), float(fresh[column + position])
                known = before.get(slot)
                expected = value if known is None else 0.5 * value + 0.5 * known
                assert float(mixed[column + position]) == pytest.approx(expected, rel=1e-5)
                found[slot] = max(value, found.get(slot, 0.0))
        for slot, value in found.items():
            self.expected[slot] = max(value, before[slot] * 0.75) if slot in before else value

    def commit(self, req: int) -> None:
        state = self.running[req]
        slots = self.alloc(TOKENS)
        if slots is None:
            self.retract(req)
            return
        self.write(slots)
        accepted = self.rng.randrange(1, TOKENS + 1)
        length = len(state.tokens)
        self.table[req, length : length + accepted] = slots[:accepted].int()
        self.allocator.free(slots[accepted:])
        state.tokens += [self.rng.randrange(2) for _ in range(accepted)]

    def finish(self, req: int) -> None:
        """Insert into the tree; where the tree had the tokens already, its slots stay and ours go."""
        state = self.running.pop(req)
        slots = self.table[req, : len(state.tokens)].long()
        own = InsertParams(key=self.key(state.tokens), value=slots.clone(), prev_prefix_len=state.cached)
        had = self.cache.insert(own).prefix_len
        if release.TREES_THAT_REMEMBER:  # the unified tree has freed them
            self.allocator.free(slots[state.cached : had])
        state.unlock()

    def retract(self, req: int) -> None:
        """Abort and retraction free what is the request's own; a retracted one comes back by prefill."""
        state = self.running.pop(req)
        self.allocator.free(self.table[req, state.cached : len(state.tokens)].long())
        state.unlock()
        if self.rng.random() < 0.5:
            self.admit(req, state.tokens)

    def flush(self) -> None:
        if not self.running:
            self.cache.reset()
            self.allocator.clear()

    @staticmethod
    def key(tokens: list[int]) -> RadixKey:
        return RadixKey(array("q", tokens))

    def check(self) -> None:
        """Every slot that someone owns remembers exactly what its occupant left."""
        free = set(self.allocator.free_pages.tolist())
        for slot in set(range(1, SLOTS + 1)) - free:
            found = float(self.history.remembered[slot, 0])
            assert found == pytest.approx(self.expected.get(slot, UNKNOWN), rel=1e-5), slot

    def step(self) -> None:
        action = self.rng.choice(
            ["start", "start", "round", "round", "round", "finish", "abort", "evict", "flush"]
        )
        if action in ("finish", "abort") and self.running:
            req = self.rng.choice(sorted(self.running))
            self.finish(req) if action == "finish" else self.retract(req)
        elif action == "evict":
            self.cache.evict(EvictParams(num_tokens=self.rng.randrange(30)))
        elif action in ("start", "round", "flush"):
            getattr(self, action)()


@pytest.mark.parametrize("seed", range(5))
def test_no_slot_remembers_an_earlier_occupant(seed: int) -> None:
    torch.manual_seed(seed)
    engine = Engine(seed)
    inherited = 0
    for _ in range(200):
        engine.step()
        engine.check()
        inherited += sum(s.cached > 0 for s in engine.running.values())
    assert inherited > 40  # the traffic did share prefixes
    assert engine.expected


def test_it_takes_what_is_reserved_for_it() -> None:
    history = SlotHistory(CONFIG, 5, SLOTS + 1, REQUESTS, "cpu", torch.float16)
    assert history.nbytes() == (SLOTS + 1) * history_bytes_per_token(5)


def test_the_slot_past_a_matched_prefix_is_unknown() -> None:
    engine = Engine(0)
    engine.admit(1, [0, 1, 0, 1, 1])
    engine.running[1].tokens += [0]
    engine.table[1, 5] = engine.alloc(1).int()
    engine.rng.sample = lambda *_: [1]
    engine.round()
    engine.finish(1)
    engine.admit(2, [0, 1, 0, 1, 1, 1, 1])
    slots = engine.table[2, :7].long()
    assert engine.running[2].cached == 5
    remembered = engine.history.remembered[slots, 0]
    assert (remembered[1:5] != UNKNOWN).all()
    assert (remembered[5:] == UNKNOWN).all()
    assert remembered[0] == UNKNOWN  # position 0 has no draft score
