"""The kinds of verifiers, by the configuration's `kernel`."""

from __future__ import annotations

from sts_sglang.core.verifier import Kind
from sts_sglang.verifiers import by_ops, flashinfer

KINDS: dict[str, Kind] = {"torch": by_ops, "triton": by_ops, "flashinfer": flashinfer}


def of(kernel: str) -> Kind:
    """`auto` becomes one of those that serve every configuration."""
    return KINDS.get(kernel, by_ops)
