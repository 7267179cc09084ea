"""SGLang's server whose freed slots remember a score that nothing beats (`python -m tests.poisoned_history`).

Whoever reads a slot's memory before its new occupant was written reads the poison. Slots are poisoned on
the stream of the forwards, at the next one: a round that was launched before may still own them. Reads
are counted on the device, inside CUDA graphs too. With STS_TEST_NEVER_FORGET=1 slots keep what they
remember when they are written: the count must then rise, or it would prove nothing.

/server_info says `sts.poison`: slots poisoned, and rounds that mixed poison into importance. Worker
processes import this file again when they are spawned.
"""

import functools
import os

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

from sts_sglang.core.history import SlotHistory
from sts_sglang.host import bind

POISON = float("inf")  # any part of it is that too
_freed: list[torch.Tensor | None] = []  # None: every slot
_poisoned = 0


def after(cls: type, name: str):
    """Decorator: run the function after cls.name, with its result and arguments."""

    def install(function):
        original = getattr(cls, name)

        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            function(result, *args, **kwargs)
            return result

        setattr(cls, name, wrapper)
        return function

    return install


@after(TokenToKVPoolAllocator, "free")
@after(PagedTokenToKVPoolAllocator, "free")
def note_free(result, allocator, slots) -> None:
    _freed.append(slots.long().clone())


@after(TokenToKVPoolAllocator, "clear")
@after(PagedTokenToKVPoolAllocator, "clear")
def note_clear(result, allocator) -> None:
    _freed.append(None)


@after(SlotHistory, "__init__")
def add_counter(result, history, *args) -> None:
    history.poison_read = torch.zeros(1, dtype=torch.int64, device=history.remembered.device)


@after(SlotHistory, "blend")
def count_reads(result, history, ops, scores, *args) -> None:
    history.poison_read += (scores.importance == POISON).any()


@after(bind.Bound, "describe")
def show(described, bound) -> None:
    if (history := bound.runtime.state.history) is not None:
        described["poison"] = {"slots": _poisoned, "read": int(history.poison_read)}


def poison() -> None:
    global _poisoned
    bound = bind.current()
    if bound is not None and bound.runtime.state.history is not None:
        remembered = bound.runtime.state.history.remembered
        for slots in _freed:
            if slots is None:
                remembered[1:] = POISON  # slot 0 is the padding's, and nobody's
                _poisoned += remembered.shape[0] - 1
            else:
                remembered.index_fill_(0, slots, POISON)
                _poisoned += slots.numel()
                if slots.is_cuda:  # allocated on the scheduler's stream
                    slots.record_stream(torch.cuda.current_stream())
    _freed.clear()


_forward = EAGLEWorkerV2.forward_batch_generation


@functools.wraps(_forward)
def forward_batch_generation(*args, **kwargs):
    poison()
    return _forward(*args, **kwargs)


EAGLEWorkerV2.forward_batch_generation = forward_batch_generation

if os.environ.get("STS_TEST_NEVER_FORGET") == "1":
    SlotHistory.forget = lambda self, slots: None

if __name__ == "__main__":
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
