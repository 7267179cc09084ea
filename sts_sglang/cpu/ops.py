"""Torch stand-ins for the sgl_kernel CPU ops on SGLang's speculative path.

The wheel for CUDA has no CPU build of sgl_kernel. SGLang's `_is_cpu` branches call these by name
with exactly these signatures (`CPU_BRANCHES` of the release's table); all outputs are written in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode


def assign_extend_cache_locs(req_pool_indices, req_to_token, start, end, out, pool_len):
    """out = slots of positions [start, end) of each request, concatenated."""
    offset = 0
    for req, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        out[offset : offset + last - first] = req_to_token[req, first:last].to(out.dtype)
        offset += last - first


def assign_req_to_token_pool(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    """req_to_token positions [start, end) of each request = the next of `out_cache_loc`."""
    offset = 0
    for req, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[req, first:last] = out_cache_loc[offset : offset + last - first].to(req_to_token.dtype)
        offset += last - first


def assign_draft_cache_locs(req_pool_indices, req_to_token, seq_lens, out, pool_len, topk, num_steps):
    """out = the topk * num_steps scratch slots that follow each request's committed tokens."""
    width = topk * num_steps
    rows = zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
    for i, (req, length) in enumerate(rows):
        out[i * width : (i + 1) * width] = req_to_token[req, length : length + width].to(out.dtype)


def fill_bonus_tokens(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    """bonus_tokens[i] = the last accepted token of request i."""
    last = torch.arange(accept_lens.shape[0]) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.reshape(-1)[last].to(bonus_tokens.dtype))


def fill_accept_out_cache_loc(accept_index, out_cache_loc, accept_out_cache_loc):
    """accept_out_cache_loc = slots of the accepted nodes, in order."""
    accepted = accept_index.reshape(-1)
    slots = out_cache_loc[accepted[accepted > -1].long()]
    accept_out_cache_loc[: slots.numel()] = slots


def gather_spec_extras(indices, topk_p_buf, topk_index_buf, output_tokens_buf, hidden_states_buf):
    """Rows `indices` of the per-request relay buffers (hidden states are absent in STANDALONE)."""
    rows = indices.long()
    hidden_states = None if hidden_states_buf is None else hidden_states_buf[rows]
    return topk_p_buf[rows], topk_index_buf[rows], output_tokens_buf[rows], hidden_states


def build_tree(
    parent_list,
    selected_index,
    seq_lens,
    tree_mask,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    topk,
    depth,
    num_tokens,
    tree_mask_mode,
):
    """Node links, positions and attention mask of each request's draft tree.

    Node 0 is the root (the bonus token); node i >= 1 is `selected_index[b, i - 1]`. Mask modes
    FULL_MASK (0, context columns left as they are) and QLEN_ONLY (1).
    """
    mode = int(tree_mask_mode)
    if mode not in (0, 1):
        raise NotImplementedError(f"tree mask mode {mode} on the CPU; FULL_MASK and QLEN_ONLY are built")
    full_offset = 0
    for b, length in enumerate(seq_lens.tolist()):
        parents = _parents(selected_index[b].tolist(), parent_list[b].tolist(), topk, num_tokens)
        next_token, next_sibling = _links(parents, num_tokens)
        retrieve_index[b] = torch.arange(b * num_tokens, (b + 1) * num_tokens)
        retrieve_next_token[b] = torch.tensor(next_token)
        retrieve_next_sibling[b] = torch.tensor(next_sibling)
        mask, depths = _ancestor_mask(parents, num_tokens)
        positions[b * num_tokens : (b + 1) * num_tokens] = torch.tensor([length + d for d in depths])
        if mode == 0:
            size = num_tokens * (length + num_tokens)
            tree_mask[full_offset : full_offset + size].view(num_tokens, -1)[:, length:] = mask
            full_offset += size
        else:
            tree_mask[b * num_tokens**2 : (b + 1) * num_tokens**2] = mask.reshape(-1)


def _parents(selected: list[int], parent_list: list[int], topk: int, num_tokens: int) -> list[int]:
    """Parent node of every node; the root is its own parent, -1 marks one that was not selected."""
    parents = [0] * num_tokens
    for node in range(1, num_tokens):
        table = selected[node - 1] // topk
        if table > 0:
            token = parent_list[table]
            parents[node] = selected.index(token) + 1 if token in selected[: num_tokens - 1] else -1
    return parents


def _links(parents: list[int], num_tokens: int) -> tuple[list[int], list[int]]:
    """First child and next sibling of every node, -1 where there is none."""
    next_token, next_sibling = [-1] * num_tokens, [-1] * num_tokens
    for node in range(num_tokens - 1, 0, -1):
        parent = parents[node]
        if parent >= 0:
            next_sibling[node], next_token[parent] = next_token[parent], node
    return next_token, next_sibling


def _ancestor_mask(parents: list[int], num_tokens: int) -> tuple[torch.Tensor, list[int]]:
    """mask[i, j]: node j is i or an ancestor of i; and the depth of every node."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    mask[:, 0] = True
    depths = [0] * num_tokens
    for node in range(1, num_tokens):
        current = node
        while current > 0:
            mask[node, current] = True
            depths[node] += 1
            current = parents[current]
    return mask, depths


def verify_tree_greedy(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Walk each tree along the target's argmax; write accepted nodes and the predicted tokens.

    The caller passes keywords, in the spelling of sgl_kernel.
    """
    targets = target_predict.reshape(-1).tolist()
    for b in range(candidates.shape[0]):
        tokens, nodes = candidates[b].tolist(), retrive_index[b].tolist()
        children, siblings = retrive_next_token[b].tolist(), retrive_next_sibling[b].tolist()
        last, node, accepted = nodes[0], 0, 0
        accept_index[b, 0] = last
        for _ in range(1, accept_index.shape[1]):
            node = children[node]
            while node != -1 and tokens[node] != targets[last]:
                node = siblings[node]
            if node == -1:
                break
            predicts[last] = targets[last]
            accepted += 1
            last = nodes[node]
            accept_index[b, accepted] = last
        accept_token_num[b] = accepted
        predicts[last] = targets[last]


class Launch:
    """A plain function that can be called like a Triton kernel, `fn[grid](...)`."""

    def __init__(self, fn: Callable):
        self.fn = fn

    def __getitem__(self, grid) -> Callable:
        return self.fn


def alloc_extend(prefix_lens, seq_lens, last_loc, free_pages, out, bs_upper, page_size):
    """SGLang's own loop, called like its kernel."""
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    alloc_extend_naive(prefix_lens, seq_lens, last_loc, free_pages, out, page_size, out.device)


def alloc_decode(seq_lens, last_loc, free_pages, out, bs_upper, page_size):
    """One new slot per request: the next of its page, or the first of a free page."""
    pages_before = (seq_lens - 1 + page_size - 1) // page_size
    new_pages = (seq_lens + page_size - 1) // page_size - pages_before
    first = torch.cumsum(new_pages, 0) - new_pages
    # Short of free pages SGLang discards the result, and it may have none left when none is needed.
    pages = torch.cat([free_pages, free_pages.new_zeros(1)])[first.clamp(max=len(free_pages)).long()]
    out.copy_(torch.where(new_pages > 0, pages * page_size, last_loc + 1))


def synchronize(device=None) -> None:
    """torch.cuda.synchronize: some models wait for a GPU when they take the target's embeddings."""


def support_triton(backend) -> bool:
    """Whether SGLang may run Triton kernels beside this attention backend: not on a CPU."""
    return False


def get_last_loc(req_to_token, req_pool_indices, prefix_lens):
    """Slot of the last token of each prefix, -1 without one."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, req_pool_indices, prefix_lens)


def apply_vocab_mask(self, logits, vocab_mask):
    """XGrammarGrammar.apply_vocab_mask, which raises on a CPU although xgrammar itself has the op."""
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask)


def fused_gate_sigmoid_mul_add(hidden_states, gate_weight, shared_output, final_hidden_states):
    """final_hidden_states += the shared expert's output, by Qwen2-MoE's gate; a Triton kernel elsewhere."""
    final_hidden_states += torch.sigmoid(hidden_states @ gate_weight).unsqueeze(1) * shared_output


def fused_topk_native(
    hidden_states, gating_output, topk, renormalize, correction_bias=None, scoring_func="softmax"
):
    """Each token's experts, and their weights. SGLang's own takes no bias of [1, experts], as is Ernie's."""
    score = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}[scoring_func]
    scores = score(gating_output.float())
    chosen_by = scores if correction_bias is None else scores + correction_bias.reshape(1, -1)
    ids = chosen_by.topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, ids


def fused_moe(hidden_states, w1, w2, topk_output, moe_runner_config):
    """What each token's experts make of it, gated by SiLU, by the router's weights; Triton elsewhere."""
    weights, ids, _ = topk_output
    out = torch.zeros_like(hidden_states)
    for expert in ids.unique().tolist():
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        gate, states = (hidden_states[tokens] @ w1[expert].T).chunk(2, dim=-1)
        made = (torch.nn.functional.silu(gate) * states) @ w2[expert].T
        out[tokens] += weights[tokens, places, None].to(out.dtype) * made
    return out


def minimax_qk_norm(self, q, k):
    """Queries and keys of MiniMax-M2 by their own norms, which Triton kernels join elsewhere."""
    return self._q_norm(q), self._k_norm(k)


class _OnCpu(TorchFunctionMode):
    """Allocates here what is asked of a GPU by name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def dbrx_experts(original, self, *args, **kwargs):
    """DbrxExperts.__init__, whose weights SGLang allocates on a GPU whatever the server's device is."""
    with _OnCpu():
        original(self, *args, **kwargs)


def torch_native_extend(original, self, q, k, v, layer, *args, **kwargs):
    """SGLang's attention in plain torch, whose output has the shape of its queries: HunYuan's, when they are
    normed, have a row a head, and every other backend returns a row a token."""
    return original(
        self, q.reshape(-1, layer.tp_q_head_num * layer.qk_head_dim), k, v, layer, *args, **kwargs
    )


torch_native_decode = torch_native_extend
# Stand-ins that are handed the original first.
AROUND = ("dbrx_experts", "torch_native_extend", "torch_native_decode")
