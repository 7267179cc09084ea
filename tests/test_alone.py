"""The real server without a draft, float32, greedy: the queries of every token select tokens or pages of the
context. At full budget it equals reference, below it the oracle."""

from __future__ import annotations

import json
import re
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from sts_sglang.headmap import HeadCounts
from tests import directions
from tests.forked import Forked
from tests.oracle import Oracle, Rule
from tests.server import Server, logged, random_ids
from tests.test_hicache import HICACHE
from tests.test_serving import LEAK, Whole, features, refusal, scenario

torch.set_num_threads(1)  # the server has the other core
pytestmark = pytest.mark.server

SPARSE = {"keep": 0.3, "budget": 0, "sink": 2, "recent": 8}
# Steps of directions are about a thirtieth of how far the tiny target's keys are from each other.
COUNTS, DIM, STEP = HeadCounts(4, 4, 2), 32, 0.07
HEAD_MAP = directions.of_target(COUNTS, DIM, step=STEP)
RULES = {
    "tokens": Rule(keep=0.3, sink=2, recent=8, selector="tokens", directions=HEAD_MAP["directions"]),
    "pages": Rule(keep=0.3, sink=2, recent=8, selector="pages"),
}
# What an oracle would say otherwise.
WRONG = {"tokens": {"directions": directions.drawn(COUNTS, DIM, STEP, seed=1)}, "pages": {"deviation": 0.0}}
PROMPTS = [random_ids(n, 100 + n) for n in (150, 260, 333, 91)]
TOOLS = ("--tool-call-parser", "llama3")
# Under speculation SGLang does not follow these, without it it does.
SAMPLING = (
    {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"repetition_penalty": 1.2},
    {"min_new_tokens": 30, "ignore_eos": False},
    {"logit_bias": {"65": 5.0}},
)


@contextmanager
def alone(pair, logs, name: str, config: dict, *args: str, start=Forked, **more):
    """An `sts` server without a draft; afterwards its log must be free of leak reports and tracebacks."""
    log = logs / f"alone-{name}.log"
    given = ("--attention-backend", "sts", "--sts-config", json.dumps(config), *args)
    with start(pair["target"], log, *given, **more) as server:
        yield server
    assert not LEAK.search(logged(log)), server.log_tail()


def sampled(server: Server | Whole) -> list[list[int]]:
    ids = random_ids(120, 42)
    return [server.generate(ids, 40, sampling_params=params)["output_ids"] for params in SAMPLING]


@pytest.fixture(scope="module", params=RULES)
def selector(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(selector, tmp_path_factory) -> dict:
    """That `auto` makes this selector of: tokens with directions, pages without."""
    if selector == "pages":
        return SPARSE
    head_map = tmp_path_factory.mktemp("map") / "map.json"
    head_map.write_text(json.dumps(HEAD_MAP))
    return {**SPARSE, "head_map": str(head_map)}


@pytest.fixture(scope="module")
def sparse(pair, logs, selector, config):
    start = Server if selector == "tokens" else Forked
    with alone(pair, logs, selector, config, "--enable-metrics", *TOOLS, start=start) as server:
        yield server


@pytest.fixture(scope="module")
def oracle(pair) -> Oracle:
    return Oracle(pair["target"])


def check_answers(answers: list[dict], prompts: list[list[int]], oracle: Oracle, rule: Rule) -> list:
    return [oracle.agree(a["output_ids"], ids, rule) for a, ids in zip(answers, prompts, strict=True)]


def test_small_budgets_agree_with_the_oracle(sparse, oracle, selector):
    """Concurrent requests of unequal lengths; ways to be wrong would be noticed."""
    answers, rule = sparse.generate_all(PROMPTS, 32), RULES[selector]
    check_answers(answers, PROMPTS, oracle, rule)
    counters = sparse.counters()
    assert counters["dense_verifies"] == 0
    assert counters["sparse_verifies"] >= len(PROMPTS) * 31
    # Whole pages, and what is always there; or tokens alone, rounded up.
    assert 0.3 < counters["keep_ratio"] < (0.5 if selector == "pages" else 0.31)
    found = [answer["output_ids"] for answer in answers]
    for wrong in (WRONG[selector], {"keep": 0.25}, {"recent": 40}, {"keep": 1.0}):
        noticed = oracle.disagrees(found, PROMPTS, replace(rule, **wrong))
        assert noticed, f"the test does not notice {wrong}"


def test_full_budget_equals_stock(sparse, reference):
    before = sparse.counters()
    whole = Whole(sparse)
    assert scenario(whole) == reference["outputs"]
    after = sparse.counters()
    assert after["sparse_verifies"] > before["sparse_verifies"]
    attended = after["selected_tokens"] - before["selected_tokens"]
    assert attended == after["available_tokens"] - before["available_tokens"]
    found, expected = features(sparse, **Whole.PARAMS), dict(reference["features"])
    assert found.pop("logprobs") == pytest.approx(expected.pop("logprobs"), abs=1e-4)
    assert found == expected
    assert sampled(whole) == reference["sampled"]


def test_a_branch_within_a_page_reads_its_own_sketches(sparse, oracle, selector):
    prompt = random_ids(331, 7)
    sparse.generate(prompt, 24)
    branch = [*prompt, *random_ids(60, 5)]
    answer = sparse.generate(branch, 24)
    assert answer["meta_info"]["cached_tokens"] >= len(prompt) - 1
    oracle.agree(answer["output_ids"], branch, RULES[selector])


def test_an_extra_key_keeps_from_a_request_the_keys_of_sparse_answers(sparse):
    """Whoever goes on from a cached answer goes on from its keys, and attends to all of them."""
    prompt = random_ids(260, 77)
    answer = sparse.generate(prompt, 60)["output_ids"]
    turn = [*prompt, *answer[:-3], *random_ids(20, 78)]

    def asked(**key) -> tuple[int, list[float]]:
        params = {**Whole.PARAMS, "temperature": 0}
        found = sparse.generate(turn, 8, sampling_params=params, return_logprob=True, **key)["meta_info"]
        return found["cached_tokens"], [logprob for logprob, *_ in found["output_token_logprobs"]]

    (none, apart), (_, again), (cached, heir) = (
        asked(**key) for key in ({"extra_key": "a"}, {"extra_key": "b"}, {})
    )
    assert none == 0 and cached >= len(prompt) + 50
    assert again == pytest.approx(apart, abs=1e-5) and heir != pytest.approx(apart, abs=1e-4)


def test_temperature_is_served(sparse):
    """The CPU platform draws where it does not verify."""
    ids = random_ids(120, 42)
    answers = {
        tuple(sparse.generate(ids, 20, sampling_params={"temperature": 1.0})["output_ids"]) for _ in range(4)
    }
    assert len(answers) > 1


def test_what_serves_says_so(sparse, selector):
    info = sparse.sts()
    assert info["selects_by"] == f"{selector[:-1]} scores of the target's queries"
    assert info["config"]["selector"] == selector
    assert (
        info["head_map"] == {"tokens": "map.json", "pages": "one budget for all heads (no draft)"}[selector]
    )
    assert info["memory_bytes"]["sketches"] > 0 and "STS serves: {" in sparse.log.read_text()
    metrics = sparse.get("/metrics").decode()
    published = re.search(r"^sts:sparse_verifies_total\S* ([\d.e+]+)$", metrics, re.MULTILINE)
    assert float(published[1]) == sparse.counters()["sparse_verifies"] > 0
    assert "custom_params.sts.keep" in refusal(
        sparse.generate, [1, 2, 3], 4, sampling_params={"custom_params": {"sts": {"keep": 7}}}
    )


def test_weights_change_as_ever(sparse, pair, oracle, selector):
    """Keys that are written anew are sketched anew."""
    answer = sparse.post(
        "/update_weights_from_disk", {"model_path": str(pair["target"]), "flush_cache": True}
    )
    assert answer["success"]
    check_answers(sparse.generate_all(PROMPTS, 16), PROMPTS, oracle, RULES[selector])


def test_large_pages_with_retraction(pair, logs, reference, oracle):
    """A pool too small for everyone, and SGLang's own forced retractions; counted to the token."""
    env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "25"}
    args = ("--page-size", "64", "--max-total-tokens", "8192", "--disable-overlap-schedule")
    with alone(pair, logs, "paged", SPARSE, *args, env=env) as server:
        answers = [server.generate(ids, 20) for ids in PROMPTS]  # too few steps each to be retracted
        traces = check_answers(answers, PROMPTS, oracle, RULES["pages"])
        counters = server.counters()
        assert counters["sparse_verifies"] == sum(t.rounds for t in traces)
        assert counters["selected_tokens"] == sum(t.selected for t in traces)
        assert counters["available_tokens"] == sum(t.available for t in traces)
        assert scenario(Whole(server)) == reference["outputs"]
        assert server.counters()["dense_verifies"] == 0
        assert "etract" in server.log.read_text()


def test_dense_layers_and_full_steps(pair, logs, oracle):
    """Every fourth step attends to everything, and one layer always does."""
    config = {**SPARSE, "dense_layers": [0], "full_verify_every": 4, "request_keep": "at_most"}
    with alone(pair, logs, "layers", config, "--disable-overlap-schedule") as server:
        server.generate(random_ids(400, 3), 21)
        counters = server.counters()
        assert (counters["sparse_verifies"], counters["full_verifies"]) == (15, 5)
        layers, kv_heads = 4, 2
        full = sum(kv_heads * layers * (400 + i) for i in range(3, 20, 4))
        some = counters["selected_tokens"] - full - kv_heads * sum(400 + i for i in range(20) if i % 4 != 3)
        assert 0.25 < some / (15 * 410 * kv_heads * (layers - 1)) < 0.31  # whole pages of three tenths
        message = refusal(
            server.generate, [1, 2], 4, sampling_params={"custom_params": {"sts": {"keep": 0.5}}}
        )
        assert "at most" in message


def test_what_the_host_cache_brings_back_is_sketched_anew(pair, logs, oracle, selector, config):
    args, name, rule = (*HICACHE, "--admin-api-key", "key"), f"hicache-{selector}", RULES[selector]
    with alone(pair, logs, name, config, *args, module="tests.hicache_on_cpu") as server:
        prompt = random_ids(400, 31)
        oracle.agree(server.generate(prompt, 24)["output_ids"], prompt, rule)
        for seed in range(4):  # every slot gets another occupant, who leaves sketches there
            server.generate(random_ids(600, 100 + seed), 24)
        turn = [*prompt, *random_ids(30, 32)]
        answer = server.generate(turn, 24)
        assert answer["meta_info"]["cached_tokens_details"]["host"] >= len(prompt) - 1
        oracle.agree(answer["output_ids"], turn, rule)
        assert server.counters()["dense_verifies"] == 0
        assert "hicache_storage_backend: not served by sts" in refusal(attach_storage, server)


def attach_storage(server: Server) -> None:
    """What a launch refuses is not attached later either."""
    body = json.dumps({"hicache_storage_backend": "file"}).encode()
    headers = {"content-type": "application/json", "authorization": "Bearer key"}
    url = f"http://127.0.0.1:{server.port}/hicache/storage-backend"
    urllib.request.urlopen(urllib.request.Request(url, body, headers, method="PUT"), timeout=60)
