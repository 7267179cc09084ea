"""Verify by FlashInfer: every (request, KV head) is a request of its own, over pools seen as one head.

FlashInfer plans on the host and needs lengths for it, which the host does not know without waiting for
the device. So lists are planned for what a request can have at most, rounded up, and stay planned until
that changes; the device fills them to exactly that length, and a mask hides what is not there.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sts_sglang.importance import ALIGN
from sts_sglang.memory import PLAN_BLOCK

if TYPE_CHECKING:
    from sts_kernels import Ops
    from sts_sglang.config import StsConfig
    from sts_sglang.headmap import HeadMap
    from sts_sglang.memory import Headwise

logger = logging.getLogger(__name__)


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
        self._admitted: dict[int, tuple[str, float | None]] = {}  # by req_pool_idx

    def admit(self, reqs: list[Any], keeps: list[float]) -> None:
        """A prefill batch, with the keep of each (NaN: none); its draft pass leaves their rows."""
        for req, keep in zip(reqs, keeps, strict=True):
            self._admitted[req.req_pool_idx] = (req.rid, None if math.isnan(keep) else keep)

    def note(self, reqs: list[Any]) -> None:
        """A decode batch, before its round."""
        self.batch = [self._of(req) for req in reqs]

    def _of(self, req: Any) -> HostRequest:
        # Results come one round late, and a round commits T tokens at most.
        known = len(req.origin_input_ids) + len(req.output_ids)
        owner, keep = self._admitted.get(req.req_pool_idx, (None, None))
        return HostRequest(min(known + 2 * self.tokens, self.limit), keep, owner == req.rid)


def planned_contexts(config: StsConfig, batch: list[HostRequest], columns: int, lists: int) -> list[int]:
    """Context tokens to plan for each request, at least what it attends to.

    The rules of RoundState.select at the bounds: a request that may find no room among `columns` scored
    tokens or `lists` listed ones, or was never scored, attends whole. All of them grow with the length.
    """
    budgets = [config.budget_for(bound, keep) for bound, keep, _ in batch]
    taken = [budget if budget < request.bound else 0 for budget, request in zip(budgets, batch, strict=True)]
    # Those with a keep of their own come behind all others.
    listed = {False: 0, True: sum(n for n, request in zip(taken, batch, strict=True) if request.keep is None)}
    planned, column = [], 0
    for budget, room, (bound, keep, scored) in zip(budgets, taken, batch, strict=True):
        column += _round_up(bound, ALIGN)
        own = keep is not None
        listed[own] += room
        whole = not scored or column > columns or listed[own] > lists
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


class FlashInferVerify:
    """Stands in for sparse_verify_attention under `kernel: flashinfer`.

    Args:
        config: policy `fixed` or `ratio`.
        shape: what to hold; dtype: of queries, keys and values.
        entries: of the lists of one KV head (shape.entries).
        columns, lists: capacities of the round's state, in tokens (planned_contexts).
        runs: layer_runs of the head map.
        limit: longest context.
        ops: the ops in use; headwise_lists is called.
        clipped: int64 [1], counts tokens without room.
        wrapper_class: FlashInfer's BatchPrefillWithPagedKVCacheWrapper unless given.
    """

    def __init__(
        self,
        config: StsConfig,
        shape: Headwise,
        dtype: torch.dtype,
        entries: int,
        columns: int,
        lists: int,
        runs: dict[int, int],
        limit: int,
        ops: Ops,
        device: str,
        clipped: torch.Tensor,
        wrapper_class: type | None = None,
    ):
        if wrapper_class is None:
            from flashinfer import BatchPrefillWithPagedKVCacheWrapper as wrapper_class
        self.config, self.shape, self.dtype, self.runs, self.ops = config, shape, dtype, runs, ops
        self.entries, self.columns, self.lists, self.device = entries, columns, lists, device
        self.host = HostView(shape.tokens, limit)
        self.indices = torch.zeros(shape.kv_heads * entries, dtype=torch.int32, device=device)
        mask_bytes = shape.kv_heads * shape.mask_bytes(entries)
        self.mask = torch.zeros(mask_bytes, dtype=torch.uint8, device=device)
        # One for all plans: calls follow each other.
        self.workspace = torch.empty(shape.float_workspace(), dtype=torch.uint8, device=device)
        self.clipped = clipped
        self.plans, self._warned = 0, False
        self._wrapper_class = wrapper_class
        self._graphs: dict[int, _Planned] = {}
        self._eager: _Planned | None = None
        self._active: _Planned | None = None

    def plan_graph(self, bs: int, in_capture: bool) -> None:
        """Before a CUDA graph of so many requests is captured or replayed."""
        if self.runs:
            if bs not in self._graphs:
                self._graphs[bs] = self._for_graph(bs)
            self._active = self._graphs[bs]
            self._plan(self._active, self._contexts(bs, [] if in_capture else self.host.batch))

    def plan_eager(self, bs: int) -> None:
        """Before an eager verify of so many requests."""
        if self.runs:
            if self._eager is None:
                self._eager = self._for_eager()
            self._active = self._eager
            self._plan(self._active, self._contexts(bs, self.host.batch))

    def attend(
        self,
        layer_id: int,
        q: torch.Tensor,
        k_buffer: torch.Tensor,
        v_buffer: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_start: torch.Tensor,
        kv_count: torch.Tensor,
        head_channels: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        tail_mask: torch.Tensor,
        sm_scale: float,
        attended: torch.Tensor,
    ) -> torch.Tensor:
        """sparse_verify_attention of a layer; layers come in order, the first of a run writes its lists."""
        active, (bs, tokens, q_heads, dim) = self._active, q.shape
        if layer_id in self.runs:
            self.ops.headwise_lists(
                kv_indices,
                kv_start,
                kv_count,
                head_channels,
                req_to_token,
                req_pool_indices,
                seq_lens,
                tokens,
                active.indptr,
                active.mask_indptr,
                self.indices,
                self.mask,
                self.runs[layer_id],
                attended,
                self.clipped,
            )
        turned = (bs, self.shape.kv_heads, tokens, self.shape.group, dim)
        rows = q.view(bs, tokens, self.shape.kv_heads, -1, dim).transpose(1, 2).reshape(-1, turned[3], dim)
        out = torch.empty_like(rows)
        kv = (k_buffer.view(-1, 1, 1, dim), v_buffer.view(-1, 1, 1, dim))
        active.wrapper.run(rows, kv, out=out, q_scale=sm_scale)
        return out.view(turned).transpose(1, 2).reshape(bs, tokens, q_heads, dim)

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        plans = [*self._graphs.values(), *([self._eager] if self._eager else [])]
        return {
            "headwise_lists": self.indices.nbytes + self.mask.nbytes,
            "flashinfer_workspace": self.workspace.nbytes + sum(p.staging.nbytes for p in plans),
        }

    def _contexts(self, bs: int, batch: list[HostRequest]) -> tuple[int, ...]:
        """Context tokens to plan for each row; rows that pad a graph get none, or the constant."""
        found = planned_contexts(self.config, batch[:bs], self.columns, self.lists)
        padding = self.config.budget if self.config.policy == "fixed" else 0
        found += [padding] * (bs - len(found))
        left, fitting = self.entries - bs * self.shape.tokens, []
        for context in found:
            fitting.append(min(context, left))
            left -= fitting[-1]
        if fitting != found and not self._warned:
            self._warned = True
            logger.warning(
                "STS: kernel flashinfer has no room for the lists of %d requests at once; tokens they lose "
                "are counted as clipped_tokens, kernel triton loses none",
                bs,
            )
        return tuple(fitting)

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
            kv_data_type=self.dtype,
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
        self.plans += 1

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
        return values if self.device == "cpu" else values.pin_memory()


class _Staging:
    """Page-locked memory that plans are copied to the device from, in turns.

    FlashInfer has one buffer and writes the next plan into it at once, while the copy of the last one
    may still wait behind a round that the device has not done.
    """

    def __init__(self, size: int, device: str):
        self.nbytes, self._turn, cuda = size, 0, device != "cpu"
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
