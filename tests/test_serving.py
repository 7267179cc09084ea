"""The real server, float32, greedy: at full budget it equals the target without speculation; below it,
the oracle. Each configuration is started once."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch

from sts_sglang.headmap import HeadCounts
from sts_sglang.host import compat
from tests import directions
from tests.forked import Forked
from tests.oracle import Oracle, Rule
from tests.server import Server, logged, random_ids

torch.set_num_threads(1)  # the server has the other core
pytestmark = pytest.mark.server

CHAIN = (
    "--speculative-num-steps",
    "3",
    "--speculative-eagle-topk",
    "1",
    "--speculative-num-draft-tokens",
    "4",
)
LONG_CHAIN = (
    "--speculative-num-steps",
    "5",
    "--speculative-eagle-topk",
    "1",
    "--speculative-num-draft-tokens",
    "6",
)
TREE = (
    "--speculative-num-steps",
    "3",
    "--speculative-eagle-topk",
    "4",
    "--speculative-num-draft-tokens",
    "8",
)
FULL = {"keep": 1.0}
SPARSE = {"keep": 0.1, "budget": 0, "sink": 2, "recent": 8}
RULE = Rule(keep=0.1, sink=2, recent=8)
SHAPES = {
    CHAIN: {},
    LONG_CHAIN: {"num_steps": 5, "num_tokens": 6},
    TREE: {"topk": 4, "num_tokens": 8},
}
LEAK = re.compile(r"memory leak|leak detected|Traceback", re.IGNORECASE)
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}, "n": {"enum": [1, 22]}},
    "required": ["color", "n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}


@contextmanager
def sts_server(
    pair, logs, name: str, algorithm: str, draft: str, config: dict, *args: str, env=None, start=Forked
):
    """An `sts` server; afterwards its log must be free of leak reports and tracebacks."""
    log = logs / f"{name}.log"
    server = start(
        pair["target"],
        log,
        *("--attention-backend", "sts", "--sts-config", json.dumps({"draft": "dense", **config})),
        *("--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(pair[draft])),
        *args,
        env=env,
    )
    with server:
        yield server
    assert not LEAK.search(logged(log)), server.log_tail()


def spread_rule(rule: Rule, algorithm: str) -> Rule:
    """With what a draft passes on whose first step alone scores: to as many tokens as a verify has rows, and
    a head more of it to twice as many; as many times as far as there are rounds that go by one selection."""
    if rule.draft in ("dense", "extend"):
        return rule
    part, times = (0.5, 1) if algorithm == "STANDALONE" else (0.75, 2)
    over = times * rule.refresh * (rule.num_steps + 1)
    return replace(rule, spread=round(1 - (1 - part) / rule.refresh, 3), spread_over=over)


def scenario(server: Server) -> list[list[int]]:
    """16 requests: alone, concurrent, a chunked prompt twice (prefix hit), a branch, own output appended."""
    outputs = [server.generate(random_ids(n, n), 40)["output_ids"] for n in (1, 2, 7, 33, 200)]
    together = server.generate_all([random_ids(n, n) for n in (3, 17, 64, 150, 5, 90)], 40)
    outputs += [r["output_ids"] for r in together]
    prompt = random_ids(3000, 9)
    first = server.generate(prompt, 32)
    again = server.generate(prompt, 32)
    branch = server.generate(prompt[:2500] + random_ids(40, 10), 32)
    appended = server.generate(prompt + first["output_ids"][:20], 24)
    for hit, length in ((again, 2900), (branch, 2400), (appended, 3000)):
        assert hit["meta_info"]["cached_tokens"] >= length
    outputs += [r["output_ids"] for r in (first, again, branch, appended)]
    outputs.append(server.generate(random_ids(20, 20), 200)["output_ids"])
    return outputs


def features(server: Server, **extra) -> dict:
    """Grammar, tool calls, stop strings, logprobs and one-token requests."""
    ids = random_ids(120, 42)

    def run(new_tokens, **params):
        params = {"ignore_eos": False, **params, **extra}
        return server.generate(ids, new_tokens, sampling_params=params)

    tools = server.post(
        "/v1/chat/completions",
        {
            "model": "x",
            "messages": [{"role": "user", "content": "paint it"}],
            "tools": [TOOL],
            "tool_choice": "required",
            "temperature": 0,
            "max_tokens": 128,
            **extra,
        },
    )
    calls = tools["choices"][0]["message"]["tool_calls"]
    logprobs = server.generate(ids, 12, sampling_params=dict(extra), return_logprob=True)["meta_info"]
    plain = run(40)["output_ids"]
    # A stop string the output really holds; the tokenizer maps single bytes.
    stop = server.post(
        "/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 40, "temperature": 0, **extra}}
    )["text"][5:7]
    return {
        "grammar": json.loads(run(64, json_schema=json.dumps(SCHEMA))["text"]),
        "tools": [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls],
        "plain": plain,
        "stop": run(40, stop=[stop])["text"],
        "one": run(1)["output_ids"],
        "logprob_tokens": [t for _, t, _ in logprobs["output_token_logprobs"]],
        "logprobs": [p for p, _, _ in logprobs["output_token_logprobs"]],
    }


@pytest.mark.parametrize(
    ("algorithm", "model", "shape", "draft", "refresh"),
    [
        ("STANDALONE", "draft", CHAIN, "dense", 1),
        ("STANDALONE", "draft", TREE, "dense", 1),
        ("EAGLE3", "eagle3", CHAIN, "dense", 1),
        ("EAGLE3", "eagle3", TREE, "dense", 1),
        ("EAGLE3", "eagle3", CHAIN, "extend", 1),
        ("STANDALONE", "draft", CHAIN, "auto", 1),
        ("STANDALONE", "draft", LONG_CHAIN, "all", 1),
        ("STANDALONE", "draft", TREE, "steps", 1),
        ("EAGLE3", "eagle3", CHAIN, "auto", 1),
        ("EAGLE3", "eagle3", LONG_CHAIN, "all", 3),
        ("STANDALONE", "draft", CHAIN, "every", 2),
    ],
    ids=[
        *("standalone-chain", "standalone-tree", "eagle3-chain", "eagle3-tree", "eagle3-chain-extend"),
        *(
            "standalone-chain-auto",
            "standalone-chain-all",
            "standalone-tree-steps",
            "eagle3-chain-auto",
            "eagle3-chain-all-refresh",
        ),
        "standalone-chain-every",
    ],
)
def test_full_budget_then_small(pair, logs, reference, algorithm, model, shape, draft, refresh, request):
    """One server: by default a tenth of the context, per request all of it."""
    config = {**SPARSE, "draft": draft, "draft_refresh": refresh}
    name, mode = request.node.callspec.id, "all" if draft == "auto" else draft
    with sts_server(pair, logs, name, algorithm, model, config, *shape) as server:
        rule = spread_rule(replace(RULE, draft=mode, refresh=refresh, **SHAPES[shape]), algorithm)
        served = server.sts()["config"]
        assert (served["draft"], served["spread"], served["spread_over"]) == (
            mode, rule.spread, rule.spread_over,
        )  # fmt: skip
        assert (f"draft_refresh {refresh} loses answers" in server.log.read_text()) == (refresh > 2)
        _check_small_budget(server, Oracle(pair["target"], pair[model]), rule)
        before = server.counters()
        whole = Whole(server)
        assert scenario(whole) == reference["outputs"]
        after = server.counters()
        assert after["sparse_verifies"] > before["sparse_verifies"]
        assert after["dense_verifies"] == 0
        attended = after["selected_tokens"] - before["selected_tokens"]
        assert attended == after["available_tokens"] - before["available_tokens"]


@pytest.mark.parametrize(
    ("selector", "algorithm", "model", "shape"),
    [
        ("pages", "STANDALONE", "draft", TREE),
        ("joined", "EAGLE3", "eagle3", CHAIN),
        ("tokens", "EAGLE3", "eagle3", TREE),
    ],
)
def test_the_targets_queries_have_a_say(pair, logs, reference, selector, algorithm, model, shape):
    """Selected by the target's own queries, alone or beside the draft; prefixes come with their sketches."""
    config = {**SPARSE, "keep": 0.3, "selector": selector, "page_share": 0.6}
    rule = replace(RULE, keep=0.3, selector=selector, page_share=0.6, **SHAPES[shape])
    if selector == "tokens":
        head_map = directions.of_pair(HeadCounts(4, 4, 2), HeadCounts(1, 4, 2), 32, step=0.07)
        (logs / "map.json").write_text(json.dumps(head_map))
        config["head_map"] = str(logs / "map.json")
        rule = replace(rule, directions=head_map["directions"])
    oracle = Oracle(pair["target"], pair[model])
    with sts_server(pair, logs, selector, algorithm, model, config, *shape) as server:
        prompts = [random_ids(n, 100 + n) for n in (150, 260, 333, 91)]
        answers = server.generate_all(prompts, 32)
        found = [answer["output_ids"] for answer in answers]
        traces = [oracle.agree(tokens, ids, rule) for tokens, ids in zip(found, prompts, strict=True)]
        counters = server.counters()
        assert counters["dense_verifies"] == 0
        assert counters["selected_tokens"] == sum(t.selected for t in traces)
        assert counters["available_tokens"] == sum(t.available for t in traces)
        for wrong in ({"selector": "draft"}, {"selector": "pages"}, {"page_share": 0.9}, {"keep": 0.25}):
            if wrong.get("selector") != selector and (selector == "joined" or "page_share" not in wrong):
                noticed = oracle.disagrees(found, prompts, replace(rule, **wrong))
                assert noticed, f"the test does not notice {wrong}"
        if algorithm == "EAGLE3":  # a branch that leaves a cached prompt within a page
            branch = [*prompts[2], *random_ids(60, 5)]
            answer = server.generate(branch, 24)
            assert answer["meta_info"]["cached_tokens"] >= len(prompts[2]) - 1
            oracle.agree(answer["output_ids"], branch, rule)
        whole = server.generate(random_ids(200, 200), 40, sampling_params=Whole.PARAMS)
        assert whole["output_ids"] == reference["outputs"][4]
        assert server.counters()["dense_verifies"] == 0


class Whole:
    """A server whose every request asks to keep everything."""

    PARAMS = {"custom_params": {"sts": {"keep": 1.0}}}

    def __init__(self, server: Server):
        self._server = server

    def generate(self, ids, new_tokens, **extra):
        params = {**self.PARAMS, **extra.pop("sampling_params", {})}
        return self._server.generate(ids, new_tokens, sampling_params=params, **extra)

    def generate_all(self, prompts, new_tokens):
        return self._server.generate_all(prompts, new_tokens, sampling_params=self.PARAMS)


def _check_small_budget(server: Server, oracle: Oracle, rule: Rule) -> None:
    """Concurrent requests of unequal lengths that leave and join the batch, against the oracle."""
    prompts = [random_ids(n, 100 + n) for n in (150, 260, 333, 91)]
    answers = server.generate_all(prompts, 32)
    counters = server.counters()
    found = [answer["output_ids"] for answer in answers]
    traces = [oracle.agree(tokens, ids, rule) for tokens, ids in zip(found, prompts, strict=True)]
    for answer, trace in zip(answers, traces, strict=True):
        assert answer["meta_info"]["spec_verify_ct"] == trace.rounds
    assert counters["dense_verifies"] == 0
    assert counters["selected_tokens"] == sum(t.selected for t in traces)
    assert counters["available_tokens"] == sum(t.available for t in traces)
    draft_tokens = [counters[f"draft_{name}_tokens"] for name in ("selected", "available")]
    if rule.draft == "dense":
        assert draft_tokens == [0, 0]
    else:
        assert 0.05 < draft_tokens[0] / draft_tokens[1] < 0.3
    scored = sum(t.scored for t in traces) if rule.refresh > 1 else 0
    assert counters["scored_rounds"] == scored
    assert counters["kept_rounds"] == (sum(t.rounds for t in traces) - scored if scored else 0)
    for wrong in (
        {"shift": 0},
        {"swap_heads": True},
        {"drop_tail": True},
        {"drop_carried": True},
        {"keep": 1.0},
        *({"draft": other} for other in ("dense", "steps", "all") if other != rule.draft),
        *({"refresh": other} for other in (1, rule.refresh + 1) if rule.refresh > 1),
    ):
        noticed = oracle.disagrees(found, prompts, replace(rule, **wrong))
        assert noticed, f"the test does not notice {wrong}"


@pytest.fixture(scope="module")
def sparse(pair, logs):
    with sts_server(
        pair,
        logs,
        "sparse",
        "STANDALONE",
        "draft",
        SPARSE,
        *CHAIN,
        "--enable-metrics",
        "--tool-call-parser",
        "llama3",
        start=Server,
    ) as server:
        yield server


def test_features_at_full_budget_equal_stock(sparse, reference):
    found = features(sparse, custom_params={"sts": {"keep": 1.0}})
    expected = dict(reference["features"])
    assert found.pop("logprobs") == pytest.approx(expected.pop("logprobs"), abs=1e-4)
    assert found == expected


@pytest.mark.parametrize(
    "params",
    [
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"temperature": 0.7, "sampling_seed": 7},
    ],
)
def test_what_speculation_does_not_follow_is_a_400(sparse, params):
    """Of the tokens of a round a penalty would count the last one alone, and a seed is not read."""
    message = refusal(sparse.generate, random_ids(120, 42), 40, sampling_params=params)
    assert next(reversed(params)) in message or next(iter(params)) in message
    chat = {"model": "x", "messages": [{"role": "user", "content": "a"}], "temperature": 0, "max_tokens": 4}
    chat |= {"seed" if key == "sampling_seed" else key: value for key, value in params.items()}
    assert "allowed: " in refusal(sparse.post, "/v1/chat/completions", chat)


def test_logprobs_are_of_the_sparse_distribution(sparse, pair):
    ids = random_ids(200, 77)
    answer = sparse.generate(ids, 20, return_logprob=True)
    tokens = [t for _, t, _ in answer["meta_info"]["output_token_logprobs"]]
    trace = Oracle(pair["target"], pair["draft"]).agree(tokens, ids, RULE)
    found = [p for p, _, _ in answer["meta_info"]["output_token_logprobs"]]
    assert found == pytest.approx(trace.logprobs, abs=1e-4)


def test_grammar_and_tools_below_full_budget(sparse):
    found = features(sparse)
    assert set(found["grammar"]) == {"color", "n"}
    assert found["tools"][0][0] == "paint"
    assert len(found["one"]) == 1


def test_carried_row_survives_aborts_and_reused_slots(sparse, pair):
    """Requests aborted in the middle of a batch free their slots to new ones, whose rows must be theirs."""
    oracle = Oracle(pair["target"], pair["draft"])
    stayer = random_ids(180, 500)
    result = {}
    thread = threading.Thread(target=lambda: result.update(sparse.generate(stayer, 60)))
    thread.start()
    for i in range(3):
        rid = f"doomed-{i}"
        doomed = threading.Thread(target=_ignore_abort, args=(sparse, random_ids(230 + i, 600 + i), rid))
        doomed.start()
        time.sleep(0.3)
        sparse.post("/abort_request", {"rid": rid})
        doomed.join()
        fresh = random_ids(140 + 10 * i, 700 + i)
        oracle.agree(sparse.generate(fresh, 16)["output_ids"], fresh, RULE)
    thread.join()
    oracle.agree(result["output_ids"], stayer, RULE)


def _ignore_abort(server: Server, ids: list[int], rid: str) -> None:
    with suppress(urllib.error.HTTPError):
        server.generate(ids, 4000, rid=rid)


def test_metrics_and_server_info(sparse):
    before = sparse.counters()["aside_verifies"]
    everything = {"custom_params": {"sts": {"keep": 1.0}}}
    verifies = sparse.generate(random_ids(400, 9), 8, sampling_params=everything)["meta_info"][
        "spec_verify_ct"
    ]
    sparse.generate(random_ids(400, 8), 240)  # more rounds than lie between two log lines
    counters = sparse.counters()
    metrics = dict(
        line.split("{")[0].split()[0:1] + [line.rsplit(" ", 1)[1]]
        for line in sparse.get("/metrics").decode().splitlines()
        if line.startswith("sts:")
    )
    assert float(metrics["sts:sparse_verifies_total"]) == counters["sparse_verifies"] > 0
    assert float(metrics["sts:dense_verifies_total"]) == counters["dense_verifies"] == 0
    assert float(metrics["sts:aside_verifies_total"]) == counters["aside_verifies"]
    assert verifies <= counters["aside_verifies"] - before <= verifies + 1
    assert 0 < float(metrics["sts:keep_ratio"]) <= 1
    info = sparse.sts()
    assert info["config"]["keep"] == 0.1
    assert info["head_map"].startswith("proportional")
    assert info["device"] == "cpu"
    assert info["graphs"] == "none"
    log = sparse.log.read_text()
    assert "STS serves: {" in log
    assert re.search(r"STS: \d+ sparse verifies, 0 dense, keep ratio 0\.\d+", log)


@pytest.mark.parametrize("keep", [0, 1.5, "all", True])
def test_bad_request_keep_is_a_400(sparse, keep):
    with pytest.raises(urllib.error.HTTPError) as error:
        sparse.generate([1, 2, 3], 4, sampling_params={"custom_params": {"sts": {"keep": keep}}})
    assert error.value.code == 400
    assert "custom_params.sts.keep" in error.value.read().decode()


def refusal(ask, *args, **extra) -> str:
    """Body of the 400 that a call is answered with."""
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(*args, **extra)
    body = error.value.read().decode()
    assert error.value.code == 400, body
    return body


def test_updates_of_weights_are_400s_and_touch_none(sparse, pair):
    prompt = random_ids(150, 21)
    before = sparse.generate(prompt, 16)["output_ids"]
    version = {"flush_cache": True, "weight_version": "2"}
    updates = {
        "update_weights_from_disk": {"model_path": str(pair["target"])},
        "update_weights_from_tensor": {"serialized_named_tensors": ["AA=="]},
        "update_weights_from_ipc": {"zmq_handles": {}},
        "update_weights_from_distributed": {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]]},
    }
    bodies = {call: {**body, **version} for call, body in updates.items()}
    if "begin_update" in compat.HOOKS:  # of a later release
        bodies |= {"begin_weight_update": {}, "end_weight_update": {}}
    for call, body in bodies.items():
        answer = json.loads(refusal(sparse.post, f"/{call}", body))
        assert answer["success"] is False
        assert answer["message"].startswith(f"{call}: not served by sts: SGLang would ")
    answer = json.loads(refusal(sparse.post, "/weights_checker", {"action": "reset_tensors"}))
    assert "'reset_tensors' is not served by sts" in answer["message"]
    assert sparse.generate(prompt, 16)["output_ids"] == before
    assert json.loads(sparse.get("/model_info"))["weight_version"] != "2"


@pytest.mark.parametrize("token", [-1, 512, 99999, 2**31, 2**70])
def test_tokens_outside_the_vocabulary_are_400s(sparse, token):
    for ids in ([token], [1, 2, token, 3]):
        assert "input_ids" in refusal(sparse.generate, ids, 4)
    assert len(sparse.generate([1, 2, 3], 4)["output_ids"]) == 4


@pytest.fixture(scope="module")
def without_radix_cache(pair, logs):
    """SGLang itself takes embeddings only where nothing is cached by tokens."""
    args = (*CHAIN, "--disable-radix-cache")
    with sts_server(pair, logs, "embeddings", "STANDALONE", "draft", SPARSE, *args) as server:
        yield server


def test_embeddings_in_place_of_tokens_are_400s(without_radix_cache):
    body = {"input_embeds": [[0.5] * 64] * 3, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    message = refusal(without_radix_cache.post, "/generate", body)
    assert "input_embeds: given, but the draft would read placeholders" in message
    assert len(without_radix_cache.generate([1, 2, 3], 4)["output_ids"]) == 4


def test_a_keep_of_any_depth_is_a_400(sparse):
    """As text: the client's own JSON would not nest that deep."""
    for depth in (5, 400, 700, 950, 2000):
        keep = "[" * depth + "]" * depth
        body = '{"input_ids": [1], "sampling_params": {"custom_params": {"sts": {"keep": KEEP}}}}'
        body = body.replace("KEEP", keep)
        request = urllib.request.Request(
            f"http://127.0.0.1:{sparse.port}/generate", body.encode(), {"content-type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=60)
        assert error.value.code == 400, depth


def test_pages_of_16_with_retraction(pair, logs, reference):
    """A pool too small for everyone, and SGLang's own forced retractions."""
    env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    args = (*CHAIN, "--page-size", "16", "--max-total-tokens", "8192")
    with sts_server(pair, logs, "paged", "STANDALONE", "draft", FULL, *args, env=env) as server:
        assert scenario(server) == reference["outputs"]
        counters = server.counters()
        assert counters["sparse_verifies"] > 0
        assert counters["dense_verifies"] == 0
        assert "etract" in server.log.read_text()


@pytest.mark.parametrize("algorithm, draft", [("STANDALONE", "draft"), ("EAGLE3", "eagle3")])
def test_many_requests_over_one_prefix_are_all_sparse(pair, logs, algorithm, draft):
    """Contexts that are together twenty times the pool: all are sparse, and nobody depends on anybody."""
    args = (*CHAIN, "--max-total-tokens", "4096", "--max-running-requests", "48")
    with sts_server(pair, logs, f"shared-{draft}", algorithm, draft, SPARSE, *args) as server:
        prefix, number, new = random_ids(1792, 7), 48, 24
        server.generate(prefix, 1)
        prompts = [prefix + random_ids(10 + b % 3, 1000 + b) for b in range(number)]
        answers = server.generate_all(prompts, new)
        counters = server.counters()
        assert sum(map(len, prompts)) > 20 * 4096
        assert counters["dense_verifies"] == counters["full_verifies"] == counters["aside_verifies"] == 0
        assert counters["sparse_verifies"] > number * new / 5
        assert counters["selected_tokens"] < 0.2 * counters["available_tokens"]
        assert all(answer["meta_info"]["cached_tokens"] >= 1024 for answer in answers)
        for b in range(0, number, 6):
            assert server.generate(prompts[b], new)["output_ids"] == answers[b]["output_ids"]


def test_eagle_head_with_a_fixed_budget(pair, logs):
    """EAGLE (not 3); K is the budget whatever the length, and dense layers count as attended whole."""
    config = {"policy": "fixed", "budget": 32, "sink": 4, "recent": 8, "dense_layers": [0]}
    with sts_server(pair, logs, "eagle", "EAGLE", "eagle", config, *CHAIN) as server:
        answer = server.generate(random_ids(400, 3), 24)
        counters = server.counters()
        assert answer["meta_info"]["spec_accept_length"] > 1
        assert counters["dense_verifies"] == 0
        layers, kv_heads = 4, 2
        lengths = counters["available_tokens"] // (layers * kv_heads)
        expected = kv_heads * (lengths + (layers - 1) * 32 * counters["sparse_verifies"])
        assert counters["selected_tokens"] == pytest.approx(expected, rel=0.01)


def test_dense_verify_equals_stock(pair, logs, reference):
    """Draft and scoring as ever, nothing left out: the target's own output, token for token."""
    config = {**SPARSE, "verify": "dense"}
    with sts_server(pair, logs, "dense", "STANDALONE", "draft", config, *CHAIN) as server:
        assert scenario(server) == reference["outputs"]
        counters = server.counters()
    assert counters["full_verifies"] > 0
    assert counters["sparse_verifies"] == counters["dense_verifies"] == 0
    assert counters["selected_tokens"] == counters["available_tokens"]


@pytest.mark.parametrize("draft, refresh", [("dense", 1), ("all", 2)])
def test_the_triton_kernels_serve_in_the_interpreter(pair, logs, draft, refresh):
    """The whole path with the kernels in place of their twins: slow, so few and short requests."""
    args = (*TREE, "--max-running-requests", "2")
    config = {**SPARSE, "keep": 0.4, "kernel": "triton", "draft": draft, "draft_refresh": refresh}
    env, name = {"TRITON_INTERPRET": "1"}, f"triton-{draft}"
    with sts_server(pair, logs, name, "STANDALONE", "draft", config, *args, env=env) as server:
        prompts = [random_ids(n, 900 + n) for n in (40, 61)]
        answers = server.generate_all(prompts, 5)
        assert server.sts()["kernel"] == "triton"
        counters = server.counters()
    rule = replace(RULE, keep=0.4, draft=draft, refresh=refresh, **SHAPES[TREE])
    rule = spread_rule(rule, "STANDALONE")
    oracle = Oracle(pair["target"], pair["draft"])
    traces = [oracle.generate(ids, 5, rule) for ids in prompts]
    assert [a["output_ids"] for a in answers] == [t.tokens for t in traces]
    assert counters["dense_verifies"] == 0
    assert counters["selected_tokens"] == sum(t.selected for t in traces)


def test_history_follows_the_prefix_and_forgets_with_its_slots(pair, logs):
    """Turn 2 starts from what turn 1 learned; after a flush nobody remembers; both against the oracle."""
    config = {**SPARSE, "history": "blend", "history_weight": 1.0}
    rule = replace(RULE, history="blend", history_weight=1.0)
    oracle = Oracle(pair["target"], pair["draft"])
    prompt = random_ids(240, 31)
    with sts_server(pair, logs, "history", "STANDALONE", "draft", config, *CHAIN) as server:
        first = server.generate(prompt, 24)
        trace = oracle.agree(first["output_ids"], prompt, rule)
        # The prompt's slots are cached; the suffix is new, so nothing is remembered of it.
        turn = prompt + random_ids(30, 32)
        second = server.generate(turn, 24)
        assert second["meta_info"]["cached_tokens"] == len(prompt)
        inherited = {key: value for key, value in trace.memory.items() if key[2] < len(prompt)}
        hit = replace(rule, donor=(len(prompt) - 1, first["output_ids"][0]))
        oracle.agree(second["output_ids"], turn, hit, inherited)
        cold = oracle.generate(turn, 24, hit).tokens
        assert second["output_ids"] != cold, "nobody notices whether anything was inherited"
        server.flush()
        oracle.agree(server.generate(turn, 24)["output_ids"], turn, rule)


def test_without_history_foreign_requests_leave_no_trace(sparse):
    prompt = random_ids(300, 51)
    before = sparse.generate(prompt, 24)["output_ids"]
    sparse.generate_all([prompt[:200] + random_ids(90, 52 + i) for i in range(4)], 24)
    assert sparse.generate(prompt, 24)["output_ids"] == before
