"""The ops as Triton kernels, which a CUDA graph can record. `sts_kernels.torch_ops` says what each means."""

from sts_kernels.draft_attention import draft_attention, plan_contexts
from sts_kernels.headwise import headwise_lists
from sts_kernels.history import blend_history
from sts_kernels.kept import keep_selected, list_kept, size_kept
from sts_kernels.page_scores import plan_pages, score_pages
from sts_kernels.pages import join_pages, list_pages, size_pages, sketch_pages, tag_pages
from sts_kernels.prefill import block_attention, block_slots, list_blocks, pool_blocks, score_blocks
from sts_kernels.select import select_tokens
from sts_kernels.sizes import score_columns, size_lists
from sts_kernels.split_kv import plan_lists
from sts_kernels.spread import spread_importance
from sts_kernels.tokens import list_tokens, plan_scores, score_tokens, sketch_tokens
from sts_kernels.verify import plan_attention, sparse_attention

__all__ = [
    "blend_history",
    "block_attention",
    "block_slots",
    "draft_attention",
    "headwise_lists",
    "join_pages",
    "keep_selected",
    "list_blocks",
    "list_kept",
    "list_pages",
    "list_tokens",
    "plan_attention",
    "plan_contexts",
    "plan_lists",
    "plan_pages",
    "plan_scores",
    "pool_blocks",
    "score_blocks",
    "score_columns",
    "score_pages",
    "score_tokens",
    "select_tokens",
    "size_kept",
    "size_lists",
    "size_pages",
    "sketch_pages",
    "sketch_tokens",
    "sparse_attention",
    "spread_importance",
    "tag_pages",
]
