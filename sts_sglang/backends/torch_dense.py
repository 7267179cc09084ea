"""Dense attention in plain torch for every forward mode of speculative decoding, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch.nn.functional import scaled_dot_product_attention

from sts_sglang.host import views
from sts_sglang.host.views import Mode

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class Segment(NamedTuple):
    """Query rows [start, end) of one request (or one draft branch) and the keys they see."""

    req: int  # its row in the table of slots
    start: int
    end: int
    slots: torch.Tensor  # int64 [kv_len], in position order
    mask: torch.Tensor | None  # bool [end - start, kv_len]; None: every row sees every key


class TorchBackend(AttentionBackend):
    """Reads the same pools as SGLang's own backends and builds one Segment per request and forward."""

    def __init__(self, model_runner: ModelRunner):
        super().__init__()
        # SGLang reads these three of a backend.
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.max_context_len = model_runner.model_config.context_len
        self.device = model_runner.device
        self.table = views.slots_of(self.req_to_token_pool)
        self.pools = views.pools(model_runner)
        self.segments: list[Segment] = []

    def support_triton(self) -> bool:
        return False

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to allocate: it does not run in a graph (StsTargetBackend._dense_verifies)."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        plan = {
            Mode.IDLE: lambda batch: [],
            Mode.DECODE: self._decode_segments,
            Mode.VERIFY: self._verify_segments,
        }.get(views.mode(forward_batch), self._extend_segments)
        self.segments = plan(forward_batch)

    def request_slots(self, req: int, end: int, start: int = 0) -> torch.Tensor:
        """int64 slots of positions [start, end) of a request."""
        return self.table[req, start:end].long()

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if save_kv_cache and k is not None:
            self.pools.write(k, v, layer, forward_batch)
        return self.attend(q, layer)

    forward_decode = forward_extend

    def attend(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """[rows, H_q * D] queries to [rows, H_q * D_v] outputs over the planned segments."""
        of = views.layer(layer)
        q = q.reshape(-1, of.q_heads, of.head_dim)
        pool = self.pools.layer(of.number)
        out = q.new_zeros(q.shape[0], of.q_heads, of.v_head_dim)
        for segment in self.segments:
            found = scaled_dot_product_attention(
                q[segment.start : segment.end].transpose(0, 1)[None],
                pool.k[segment.slots].transpose(0, 1)[None].to(q.dtype),
                pool.v[segment.slots].transpose(0, 1)[None].to(q.dtype),
                attn_mask=segment.mask,
                scale=of.scale * pool.k_scale,
                enable_gqa=of.q_heads != of.kv_heads,
            )
            out[segment.start : segment.end] = found[0].transpose(0, 1) * pool.v_scale
        return out.flatten(1)

    def _decode_segments(self, fb: ForwardBatch) -> list[Segment]:
        _, reqs, lens = views.requests_of(fb)
        rows = zip(reqs.tolist(), lens.tolist(), strict=True)
        return [Segment(req, i, i + 1, self.request_slots(req, n), None) for i, (req, n) in enumerate(rows)]

    def _extend_segments(self, fb: ForwardBatch) -> list[Segment]:
        segments, start, rows = [], 0, views.new_rows(fb)
        reqs = views.requests_of(fb).reqs
        lens = zip(reqs.tolist(), rows.before.tolist(), rows.number.tolist(), strict=True)
        for req, prefix, new in lens:
            causal = torch.ones(new, prefix + new, dtype=torch.bool, device=self.device).tril(prefix)
            slots = self.request_slots(req, prefix + new)
            segments.append(Segment(req, start, start + new, slots, causal))
            start += new
        return segments

    def _verify_segments(self, fb: ForwardBatch) -> list[Segment]:
        _, reqs, lens = views.requests_of(fb)
        tails = tail_masks(fb)
        tokens, segments = tails.shape[1], []
        for i, (req, n) in enumerate(zip(reqs.tolist(), lens.tolist(), strict=True)):
            mask = torch.ones(tokens, n + tokens, dtype=torch.bool, device=self.device)
            mask[:, n:] = tails[i]
            slots = self.request_slots(req, n + tokens)
            segments.append(Segment(req, i * tokens, (i + 1) * tokens, slots, mask))
        return segments


def chain_mask(tokens: int, device: torch.device) -> torch.Tensor:
    """bool [T, T]: tokens that follow each other see the ones before them and themselves."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def tail_masks(fb: ForwardBatch) -> torch.Tensor:
    """bool [bs, T, T]: which draft tokens each draft token of a verify batch sees.

    SGLang hands a tree over as QLEN_ONLY ([T, T] a request) or FULL_MASK ([T, L + T] a request, possibly
    in a longer preallocated buffer); without branches the draft is a chain.
    """
    tokens, topk, mask = views.tree(fb)
    bs, _, lens = views.requests_of(fb)
    if mask is None or topk == 1:
        return chain_mask(tokens, lens.device).expand(bs, -1, -1)
    if mask.numel() == bs * tokens * tokens:
        return mask.view(bs, tokens, tokens).bool()
    tails, offset = [], 0
    for length in lens.tolist():
        size = tokens * (length + tokens)
        tails.append(mask[offset : offset + size].view(tokens, -1)[:, length:].bool())
        offset += size
    return torch.stack(tails)
