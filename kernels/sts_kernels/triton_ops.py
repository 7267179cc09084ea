"""The ops as Triton kernels, which a CUDA graph can record. `sts_kernels.torch_ops` says what each means."""

from sts_kernels.draft_attention import draft_attention, plan_contexts
from sts_kernels.headwise import headwise_lists
from sts_kernels.history import blend_history
from sts_kernels.select import select_tokens
from sts_kernels.sizes import size_lists
from sts_kernels.split_kv import plan_lists
from sts_kernels.spread import spread_importance
from sts_kernels.verify import plan_attention, sparse_attention

__all__ = [
    "blend_history",
    "draft_attention",
    "headwise_lists",
    "plan_attention",
    "plan_contexts",
    "plan_lists",
    "select_tokens",
    "size_lists",
    "sparse_attention",
    "spread_importance",
]
