"""What the GPU tests take for near ties."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import tables
from benchmarks.near_ties import forced_through
from tests.tolerances import NEAR_TIES, NearTies, assert_near_ties

NEAR = NearTies(gap=0.1, few=4, share=0.02)


PROMPT, STOCK = [1, 2, 3], [7, 8, 9, 9]


class Says:
    """A server that says these tokens at these places; it must be asked for what stock said from there on."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.places = tokens, []

    def post(self, path: str, body: dict) -> dict:
        done = len(body["input_ids"]) - len(PROMPT)
        assert body["input_ids"] == PROMPT + STOCK[:done] and done not in self.places
        assert body["sampling_params"]["max_new_tokens"] == len(STOCK) - done
        assert body["sampling_params"]["custom_params"] == {"sts": {"keep": 1.0}}
        self.places.append(done)
        return {"output_ids": self.tokens[done:]}


@pytest.mark.parametrize(
    ("said", "gaps"), [([7, 8, 9, 9], []), ([7, 0, 9, 9], [2.0]), ([0, 8, 9, 0], [1.0, 4.0])]
)
def test_differences_along_what_stock_says(said: list[int], gaps: list[float]) -> None:
    two_best = [((-0.5, 0), (-0.5 - gap, 1)) for gap in (1.0, 2.0, 3.0, 4.0)]
    stock = {"output_ids": STOCK, "meta_info": {"output_top_logprobs": two_best}}
    params = {"custom_params": {"sts": {"keep": 1.0}}}
    assert forced_through(Says(said), PROMPT, stock, **params) == gaps


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
    rows = (r for r in tables.rows("near_ties.jsonl") if not r.get("rounded") and "backend" not in r)
    (found,) = (row for row in rows if row["dtype"] == dtype)
    near = NEAR_TIES[getattr(torch, dtype)]
    assert_near_ties(found["gaps"], found["tokens"], near)
    assert near.gap <= 2 * max(found["gaps"])
