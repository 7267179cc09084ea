"""The kinds of verifiers, by the configuration's `kernel`."""

from __future__ import annotations

from sts_sglang.core.verifier import Kind
from sts_sglang.verifiers import by_ops, flashinfer

KINDS: dict[str, Kind] = {
    "auto": by_ops,  # which becomes triton or torch
    "triton": by_ops,
    "torch": by_ops,
    "flashinfer": flashinfer,
}


def of(kernel: str) -> Kind:
    """Raises KeyError for a name that config.py allows and nobody serves: a test holds the two together."""
    return KINDS[kernel]
