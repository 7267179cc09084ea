"""Ops of draft-guided sparse attention (STS, arXiv 2605.15508).

Each op is a module with a plain-torch implementation that validates its arguments and runs on any
device. This package imports torch (and, where kernels exist, triton) and never sglang.
"""

from sts_kernels.importance import row_importance
from sts_kernels.select import select_tokens
from sts_kernels.verify import sparse_verify_attention

__all__ = ["row_importance", "select_tokens", "sparse_verify_attention"]
