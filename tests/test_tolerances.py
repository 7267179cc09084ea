"""What the GPU tests take for near ties."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import tables
from tests.tolerances import NEAR_TIES, NearTies, assert_near_ties

NEAR = NearTies(gap=0.1, few=4, share=0.02)


@pytest.mark.parametrize("gaps", [[], [0.1] * 9, [-0.1]])
def test_near_ties_pass(gaps: list[float]) -> None:
    assert_near_ties(gaps, 250, NEAR)


@pytest.mark.parametrize(
    ("gaps", "why"),
    [
        ([0.0] * 10, r"10 differences in 250 tokens"),
        ([0.2, 0.05], r"beyond 0.1 in 250 tokens: \[0.05, 0.2\]"),
        ([math.nan], r"beyond 0.1 in 250 tokens: \[nan\]"),
    ],
)
def test_too_many_and_too_far_do_not(gaps: list[float], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        assert_near_ties(gaps, 250, NEAR)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_two_orders_of_summation_do_passes(dtype: str) -> None:
    """Of the shipped target, and by no more than twice: the bounds are not wider than they have to be."""
    (found,) = (
        row for row in tables.rows("near_ties.jsonl") if row["dtype"] == dtype and not row.get("rounded")
    )
    near = NEAR_TIES[getattr(torch, dtype)]
    assert_near_ties(found["gaps"], found["tokens"], near)
    assert near.gap <= 2 * max(found["gaps"])
