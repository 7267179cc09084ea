"""Verify by FlashInfer's paged attention: every (request, KV head) is a request of its own, and the pools are
seen as one head.

FlashInfer plans on the host and needs lengths for it, which the host does not know without waiting for
the device. So lists are planned for what a request can have at most, rounded up, and stay planned until
that changes; the device fills them to exactly that length, and a mask hides what is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sts_kernels import Ops
from sts_kernels.layout import Lists, PagedLists
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core.request import Request
from sts_sglang.core.selectors.base import LayerCall
from sts_sglang.core.sizes import Need
from sts_sglang.core.verifier import TargetShape, VerifierParts
from sts_sglang.headmap import HeadMap

HEAD_DIMS = (64, 128, 256)  # that its kernels are made for
# Lists are planned in whole blocks: a plan holds until a list outgrows its last one.
PLAN_BLOCK = 256
# FlashInfer splits lists over two thread blocks a multiprocessor; no device has more than 160 of them.
PLAN_GRID = 320


class Shape(NamedTuple):
    """What the verifier must hold: T query rows of a GQA group for every (request, KV head)."""

    tokens: int  # T
    q_heads: int
    kv_heads: int
    head_dim: int
    requests: int  # of a batch
    graph_requests: int  # of the largest CUDA graph, 0 without graphs

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    def entries(self, config: StsConfig, context: int) -> int:
        """Entries of the lists of one KV head: every request may attend to the whole of its context."""
        longest = _round_up(max(context, config.budget if config.policy == "fixed" else 0), PLAN_BLOCK)
        return max(self.requests, self.graph_requests) * (longest + self.tokens)

    def list_bytes(self, entries: int) -> int:
        """Of lists and mask bits of so many entries a KV head; each pair's bits start at a byte."""
        return self.kv_heads * (4 * entries + self.mask_bytes(entries))

    def mask_bytes(self, entries: int) -> int:
        """Of one KV head."""
        return -(-self.tokens * entries // 8) + max(self.requests, self.graph_requests)

    @property
    def tile(self) -> int:
        """Query rows of FlashInfer's thread blocks (FA2DetermineCtaTileQ)."""
        rows = self.tokens * self.group
        return 16 if rows <= 16 else 64 if rows <= 64 else 128

    def planned_requests(self, pairs: int) -> int:
        """Requests to plan a graph of so many (request, KV head) pairs for, the last ones empty.

        For graphs FlashInfer sizes its tile for the longest query there can be among so many rows of so
        many requests. Just enough empty ones make that T, not a tile of 128 rows that are nearly all waste.
        """
        return pairs if self.tile == 128 else max(0, pairs - 1) * self.tokens + 1

    def slots(self, pairs: int) -> int:
        """Thread blocks of the graph of so many pairs, at least those of any batch that is split."""
        tiles = -(-pairs * self.tokens * self.group // self.tile) + self.planned_requests(pairs)
        return max(PLAN_GRID, tiles)

    def float_workspace(self) -> int:
        """Bytes for partial results (PrefillPlan): output and log-sum-exp of every row of every block."""
        slots = self.slots(self.graph_requests * self.kv_heads)
        return self.group * slots * self.tile * (self.head_dim + 1) * 4 + 1024

    def int_workspace(self, pairs: int, slots: int) -> int:
        """Bytes of one plan."""
        rows = pairs * self.tokens
        return 16 * slots + 8 * (rows + self.planned_requests(pairs)) + 4096

    @classmethod
    def of(cls, target: TargetShape) -> Shape:
        graph_requests = min(target.requests, target.graph_requests)
        return cls(
            target.tokens, target.q_heads, target.kv_heads, target.head_dim, target.requests, graph_requests
        )


def refusal(config: StsConfig, topk: int | None) -> str | None:
    """What a plan that is made on the host cannot follow in this launch, or None."""
    unserved = (
        (config.policy == "top_p", "sts_config.policy 'top_p' (its lists end where the device finds)"),
        (not config.by_draft, f"sts_config.selector {config.selector!r} (its lists differ by layer)"),
        (config.full_verify_every > 0, "sts_config.full_verify_every (the device counts the rounds)"),
        ((topk or 1) > 1, f"--speculative-eagle-topk {topk} (its mask is a chain's)"),
    )
    return next((what for found, what in unserved if found), None)


def need(config: StsConfig, target: TargetShape) -> Need:
    """Workspace, and the lists and masks of every KV head."""
    shape = Shape.of(target)
    return Need(shape.float_workspace() + shape.list_bytes(shape.entries(config, target.context_len)))


def make(parts: VerifierParts) -> FlashInferVerifier:
    config, target, state = parts.config, parts.target, parts.state
    shape = Shape.of(target)
    if shape.head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"sts_config.kernel: 'flashinfer' has no attention for heads of {shape.head_dim} dimensions; "
            "allowed: 'triton'"
        )
    entries = shape.entries(config, state.room.columns)
    if max(target.slots, entries) * shape.kv_heads >= 2**31:
        raise ConfigError(
            "sts_config.kernel: 'flashinfer' numbers slots and list entries of all KV heads by int32, and "
            "there are too many; allowed: 'triton', or less of --max-total-tokens, --max-running-requests or "
            "--context-length"
        )
    return FlashInferVerifier(
        config,
        shape,
        entries,
        layer_runs(config, parts.head_map, target.layers),
        Limits(state.room.budget, state.room.columns),
        parts.ops,
        target.dtype,
        target.kv_dtype,
        clipped=state.clipped,
    )


class HostRequest(NamedTuple):
    """What the host knows of a request of the batch."""

    bound: int  # its committed length is at most this
    keep: float | None  # its own
    scored: bool  # the draft has left its row, so it does not attend whole for want of importance


class HostView:
    """The batch as the host sees it, without waiting for the device.

    Args:
        tokens: draft tokens of a round; limit: no context is longer.
    """

    def __init__(self, tokens: int, limit: int):
        self.tokens, self.limit = tokens, limit
        self.batch: list[HostRequest] = []
        self._admitted: dict[int | None, tuple[str, float | None]] = {}  # by row of the table

    def admit(self, requests: list[Request], keeps: list[float | None]) -> None:
        """A prefill batch, with the keep of each; its draft pass leaves their rows."""
        for request, keep in zip(requests, keeps, strict=True):
            self._admitted[request.row] = (request.rid, keep)

    def note(self, requests: list[Request]) -> None:
        """A decode batch, before its round."""
        self.batch = [self._of(request) for request in requests]

    def _of(self, request: Request) -> HostRequest:
        # Results come one round late, and a round commits T tokens at most.
        known = len(request.prompt) + len(request.output)
        owner, keep = self._admitted.get(request.row, (None, None))
        return HostRequest(min(known + 2 * self.tokens, self.limit), keep, owner == request.rid)


class Limits(NamedTuple):
    """Capacities of the round's state, as far as the host must know them.

    budget: tokens that a list can have. context: no request has more.
    """

    budget: int
    context: int


def planned_contexts(config: StsConfig, batch: list[HostRequest], limits: Limits) -> list[int]:
    """Context tokens to plan for each request, at least what it attends to.

    The rules of `size_lists` at the bounds: a request that wants more than a list can have, or was never
    scored, attends whole. Budgets grow with the length.
    """
    planned = []
    for bound, keep, scored in batch:
        budget = config.budget_for(bound, keep)
        whole = not scored or budget > limits.budget
        constant = config.policy == "fixed" and keep is None and not whole
        planned.append(config.budget if constant else _round_up(bound if whole else budget, PLAN_BLOCK))
    return planned


def layer_runs(config: StsConfig, head_map: HeadMap, layers: int) -> dict[int, int]:
    """First layer and length of every run of sparse layers that select by the same channels.

    Layers of a run share lists, and one buffer serves all runs in turn: the default map gives neighbours
    the same channels, and the lists of a map that does not are written layer by layer.
    """
    runs: dict[int, int] = {}
    first, channels = -1, None
    for layer in range(layers):
        if config.dense_verify(layer):
            continue
        if (own := head_map.head_channels(layer)) != channels:
            first, channels = layer, own
        runs[first] = runs.get(first, 0) + 1
    return runs


@dataclass
class _Planned:
    """A wrapper with the buffers its plan lives in."""

    wrapper: Any
    indptr: torch.Tensor  # int32, where the list of each pair starts
    mask_indptr: torch.Tensor  # int32, at which byte its mask bits start
    staging: _Staging
    contexts: tuple[int, ...] | None = None  # planned for


class FlashInferVerifier:
    """Verifies for chains and the policies `ratio` and `fixed`.

    Args:
        config: as served. shape: what to hold. entries: of the lists of one KV head (`Shape.entries`).
        runs: `layer_runs` of the head map. limits: capacities (`planned_contexts`).
        ops: the ops in use; headwise_lists is called. dtype: of queries, kv_dtype: of keys and values.
        clipped: int64 [1], counts tokens without room; it also says on which device everything lives.
        wrapper_class: FlashInfer's BatchPrefillWithPagedKVCacheWrapper unless given.
    """

    on_host = True

    def __init__(
        self,
        config: StsConfig,
        shape: Shape,
        entries: int,
        runs: dict[int, int],
        limits: Limits,
        ops: Ops,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        *,
        clipped: torch.Tensor,
        wrapper_class: type | None = None,
    ):
        if wrapper_class is None:
            from flashinfer import BatchPrefillWithPagedKVCacheWrapper as wrapper_class
        self.config, self.shape, self.runs, self.ops = config, shape, runs, ops
        self.dtype, self.kv_dtype = dtype, kv_dtype
        self.limits, self.device = limits, clipped.device
        self.host = HostView(shape.tokens, limits.context)
        new = {"device": self.device}
        self.indices = torch.zeros(shape.kv_heads * entries, dtype=torch.int32, **new)
        self.mask = torch.zeros(shape.kv_heads * shape.mask_bytes(entries), dtype=torch.uint8, **new)
        # One for all plans: calls follow each other.
        self.workspace = torch.empty(shape.float_workspace(), dtype=torch.uint8, **new)
        self.clipped = clipped
        self.host_plans = 0
        self._wrapper_class = wrapper_class
        self._graphs: dict[int, _Planned] = {}
        self._eager: _Planned | None = None
        self._active: _Planned | None = None

    def admit(self, requests: list[Request], keeps: list[float | None]) -> None:
        self.host.admit(requests, keeps)

    def note(self, requests: list[Request]) -> None:
        self.host.note(requests)

    def before_graph(self, bs: int, capturing: bool) -> None:
        if self.runs:
            if bs not in self._graphs:
                self._graphs[bs] = self._for_graph(bs)
            self._active = self._graphs[bs]
            self._plan(self._active, self._contexts(bs, [] if capturing else self.host.batch))

    def before_eager(self, bs: int) -> None:
        if self.runs:
            if self._eager is None:
                self._eager = self._for_eager()
            self._active = self._eager
            self._plan(self._active, self._contexts(bs, self.host.batch))

    def begin(self, lists: Lists, channels: torch.Tensor, lens: torch.Tensor) -> None:
        """The plan was made on the host."""

    def attend(
        self, call: LayerCall, lists: Lists, channels: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        """Layers come in order: the first of a run writes the lists of all of them."""
        active, (bs, tokens, q_heads, dim) = self._active, call.q.shape
        if call.layer in self.runs:
            self.ops.headwise_lists(
                lists,
                channels,
                call.contexts,
                PagedLists(active.indptr, active.mask_indptr, self.indices, self.mask),
                attended,
                self.clipped,
                tokens=tokens,
                layers=self.runs[call.layer],
            )
        turned = (bs, self.shape.kv_heads, tokens, self.shape.group, dim)
        rows = call.q.view(bs, tokens, self.shape.kv_heads, -1, dim).transpose(1, 2)
        rows = rows.reshape(-1, self.shape.group, dim)
        out = torch.empty_like(rows)
        pool = call.pool
        kv = tuple(buffer.view(-1, 1, 1, dim) for buffer in (pool.k, pool.v))
        scales = {"q_scale": call.scale, "k_scale": pool.k_scale, "v_scale": pool.v_scale}
        active.wrapper.run(rows, kv, out=out, **scales)
        return out.view(turned).transpose(1, 2).reshape(bs, tokens, q_heads, dim)

    def nbytes(self) -> dict[str, int]:
        plans = [*self._graphs.values(), *([self._eager] if self._eager else [])]
        return {
            "headwise_lists": self.indices.nbytes + self.mask.nbytes,
            "flashinfer_workspace": self.workspace.nbytes + sum(p.staging.nbytes for p in plans),
        }

    def _contexts(self, bs: int, batch: list[HostRequest]) -> tuple[int, ...]:
        """Context tokens to plan for each row; rows that pad a graph get none, or the constant."""
        found = planned_contexts(self.config, batch[:bs], self.limits)
        padding = self.config.budget if self.config.policy == "fixed" else 0
        found += [padding] * (bs - len(found))
        return tuple(found)

    def _plan(self, planned: _Planned, contexts: tuple[int, ...]) -> None:
        """Plan for these contexts, unless that is planned already."""
        if planned.contexts == contexts:
            return
        shape, graph = self.shape, planned is not self._eager
        pairs = len(contexts) * shape.kv_heads
        requests = shape.planned_requests(pairs) if graph else pairs
        lists = torch.tensor(contexts).repeat_interleave(shape.kv_heads) + shape.tokens
        rows = (torch.arange(requests + 1) * shape.tokens).clamp(max=pairs * shape.tokens)
        indptr = self._pinned(_ends(lists, requests))
        mask_indptr = self._pinned(_ends((shape.tokens * lists + 7) // 8, requests))
        planned.staging.take(planned.wrapper)
        planned.wrapper.plan(
            self._pinned(rows),
            indptr,
            self.indices[:0] if graph else self.indices,
            self._pinned(torch.ones(requests)),
            shape.group,
            1,
            shape.head_dim,
            1,
            packed_custom_mask=None if graph else self.mask,
            sm_scale=1.0,
            q_data_type=self.dtype,
            kv_data_type=self.kv_dtype,
            # The longest alone: FlashInfer takes their maximum one by one, and fa2 reads no more of them.
            seq_lens=self._pinned(lists.max()[None]),
            max_token_per_sequence=shape.tokens,
        )
        planned.staging.taken()
        if graph:
            planned.mask_indptr.copy_(mask_indptr, non_blocking=True)
        else:
            planned.indptr = indptr.to(self.device, non_blocking=True)
            planned.mask_indptr = mask_indptr.to(self.device, non_blocking=True)
            # FlashInfer counts a packed mask in bits here.
            _replace(planned.wrapper, "_mask_indptr_buf", planned.mask_indptr)
        planned.contexts = contexts
        self.host_plans += 1

    def _for_graph(self, bs: int) -> _Planned:
        pairs = bs * self.shape.kv_heads
        requests = self.shape.planned_requests(pairs)
        rows, indptr, mask_indptr, last = (
            torch.zeros(n, dtype=torch.int32, device=self.device)
            for n in (requests + 1, requests + 1, requests + 1, requests)
        )
        wrapper = self._wrapper_class(
            self.workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=rows,
            paged_kv_indptr_buf=indptr,
            paged_kv_indices_buf=self.indices,
            paged_kv_last_page_len_buf=last,
            custom_mask_buf=self.mask,
            mask_indptr_buf=mask_indptr,
            backend="fa2",
        )
        size = self.shape.int_workspace(pairs, self.shape.slots(pairs))
        return _Planned(wrapper, indptr, mask_indptr, self._staging(wrapper, size))

    def _for_eager(self) -> _Planned:
        pairs = self.shape.requests * self.shape.kv_heads
        wrapper = self._wrapper_class(self.workspace, "NHD", backend="fa2")
        tiles = -(-pairs * self.shape.tokens * self.shape.group // self.shape.tile) + pairs
        size = self.shape.int_workspace(pairs, max(self.shape.slots(0), tiles))
        none = torch.zeros(0, dtype=torch.int32, device=self.device)
        return _Planned(wrapper, none, none, self._staging(wrapper, size))

    def _staging(self, wrapper: Any, size: int) -> _Staging:
        # FlashInfer's own takes 8 MB a batch size.
        wrapper.reset_workspace_buffer(
            self.workspace, torch.zeros(size, dtype=torch.uint8, device=self.device)
        )
        return _Staging(size, self.device)

    def _pinned(self, values: torch.Tensor) -> torch.Tensor:
        values = values.to(torch.int32)
        return values if self.device.type == "cpu" else values.pin_memory()


class _Staging:
    """Page-locked memory that plans are copied to the device from, in turns.

    FlashInfer has one buffer and writes the next plan into it at once, while the copy of the last one
    may still wait behind a round that the device has not done.
    """

    def __init__(self, size: int, device: torch.device):
        self.nbytes, self._turn, cuda = size, 0, device.type != "cpu"
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if cuda else []

    def take(self, wrapper: Any) -> None:
        """Give the wrapper the buffer of the plan before the last; its copy has long been done."""
        self._turn = 1 - self._turn
        if self._copied and not self._copied[self._turn].query():
            self._copied[self._turn].synchronize()
        _replace(wrapper, "_pin_memory_int_workspace_buffer", self._buffers[self._turn])

    def taken(self) -> None:
        """The wrapper has launched its copy."""
        if self._copied:
            self._copied[self._turn].record()


def _replace(wrapper: Any, name: str, buffer: torch.Tensor) -> None:
    """Give a wrapper another buffer, by a name that is FlashInfer's own business."""
    if not hasattr(wrapper, name):
        raise RuntimeError(f"this FlashInfer has no {name}: use kernel triton")
    setattr(wrapper, name, buffer)


def _ends(lengths: torch.Tensor, requests: int) -> torch.Tensor:
    """0 and the sums so far, for more requests than there are lengths: the others are empty."""
    sums = torch.zeros(requests + 1, dtype=torch.int64)
    sums[1 : lengths.numel() + 1] = lengths.cumsum(0)
    sums[lengths.numel() + 1 :] = lengths.sum()
    return sums


def _round_up(count: int, block: int) -> int:
    return -(-count // block) * block
