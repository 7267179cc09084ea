"""The real server with a sparse prefill, float32, greedy: it says what the oracle says, and its prefix cache
keeps what was prefilled sparsely from requests that want everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.oracle import Oracle, Rule
from tests.server import Server, random_ids
from tests.test_alone import alone
from tests.test_serving import CHAIN, logs, pair, refusal, sts_server  # noqa: F401

torch.set_num_threads(1)  # the server has the other core
pytestmark = pytest.mark.server

KEEP = 0.25
CONFIG = {"keep": 1.0, "prefill": "sparse", "prefill_keep": KEEP, "prefill_floor": 300}
RULE = Rule(keep=1.0, selector="pages", prefill_keep=KEEP, prefill_floor=300)
# A prompt is prefilled in chunks of whole blocks: alone, one after the other.
CHUNKED = ("--chunked-prefill-size", "640", "--max-prefill-tokens", "640")
PROMPTS = [random_ids(n, 500 + n) for n in (1500, 1290, 420, 90)]
LONG = random_ids(1600, 7)


def asking(**params) -> dict:
    return {"sampling_params": {"custom_params": {"sts": params}}}


@pytest.fixture(scope="module")
def stock(pair, logs) -> list[list[int]]:  # noqa: F811
    """What SGLang's own attention says of LONG, of a branch of it, and of the prompts."""
    with Server(pair["target"], logs / "prefill-stock.log") as server:
        return [server.generate(ids, 24)["output_ids"] for ids in (LONG, branch(), *PROMPTS)]


def branch() -> list[int]:
    return LONG[:1400] + random_ids(130, 8)


@pytest.fixture(scope="module")
def sparse(pair, logs):  # noqa: F811
    with alone(pair, logs, "prefill", CONFIG, *CHUNKED, "--enable-metrics") as server:
        yield server


@pytest.fixture(scope="module")
def oracle(pair) -> Oracle:  # noqa: F811
    return Oracle(pair["target"])


def test_a_sparse_prefill_agrees_with_the_oracle(sparse, oracle, stock):
    answers = [sparse.generate(ids, 24)["output_ids"] for ids in PROMPTS]
    for tokens, ids in zip(answers, PROMPTS, strict=True):
        oracle.agree(tokens, ids, RULE)
    assert answers != stock[2:]
    for wrong in (
        {"prefill_keep": 0.4},
        {"prefill_keep": None},
        {"prefill_floor": 900},
        {"asked": 1},
        {"last_block": True},
        {"dense_layers": (1,)},
    ):
        tokens = [oracle.generate(ids, 24, replace(RULE, **wrong)).tokens for ids in PROMPTS]
        assert tokens != answers, f"the test does not notice {wrong}"
    counters = sparse.counters()
    ratio = counters["prefill_selected_blocks"] / counters["prefill_available_blocks"]
    assert KEEP < ratio < 0.7
