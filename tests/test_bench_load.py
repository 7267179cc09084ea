"""Servers under load: what the client is asked for, and what a row says of its answer."""

from __future__ import annotations

import json
import random
import sys
from contextlib import nullcontext

import pytest

from benchmarks import bench_load, bench_serving, dummy_models, load_client, tables
from benchmarks.bench_load import client_args, parse, run_arm
from benchmarks.tables import load
from sts_sglang.tools.demo import shipped_pair
from tests.server import ENVIRONMENT

PAIR = ["--target", "T", "--draft", "D", "--algorithm", "EAGLE3"]


@pytest.fixture(autouse=True)
def target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "config.json").write_text('{"num_hidden_layers": 4}')
    monkeypatch.setattr(bench_serving, "origin", lambda: {"gpu": "G", "sglang": "0"})
    monkeypatch.setenv("STS_COMMIT", "c")


def values(args: list[str]) -> dict[str, str]:
    return dict(zip(args, args[1:], strict=False))


def test_the_client_is_asked_for_the_load():
    shared = parse([*PAIR, "--requests", "12", "--groups", "3", "--context", "1000"])
    assert shared.arms == "stock-spec-captured,sts-draft" and shared.rates == [1, 2, 4, 8]
    asked = values(client_args(shared, 64))
    assert asked["--gsp-prompts-per-group"] == "4"
    assert int(asked["--gsp-system-prompt-len"]) + int(asked["--gsp-question-len"]) == 1000
    assert asked["--gsp-output-len"] == "64" and "--flush-cache" not in asked
    unseen = parse([*PAIR, "--dataset", "random-ids", "--context", "1000", "--arms", "sts"])
    asked = client_args(unseen, 64)
    assert values(asked)["--random-input-len"] == "1000" and "--flush-cache" in asked
    assert unseen.arms == "sts"
    agents = values(client_args(parse([*PAIR, "--turns", "6", "--context", "60000"]), 256))
    assert (agents["--backend"], agents["--gsp-num-turns"]) == ("sglang-oai-chat", "6")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--requests", "12", "--groups", "5"], "--requests 12: no multiple of --groups 5"),
        (["--turns", "2", "--dataset", "random-ids"], "--turns 2: 1, or more with --dataset generated"),
        (["--context", "128"], "--context 128: questions alone"),
        (["--arms", "none"], "--arms: no none"),
        (["--rates", "1,many"], "--rates 1,many: numbers"),
        (["--rates", "1,0"], "--rates 0: above 0"),
    ],
)
def test_what_does_not_fit_together_is_named(argv, named, capsys):
    with pytest.raises(SystemExit):
        parse([*PAIR, *argv])
    assert named in capsys.readouterr().err


# Two requests: 10 ms and 30 ms a token.
TOLD = {
    **dict.fromkeys(bench_load.TIMES, 1.0),
    **{"duration": 4.0, "completed": 2, "output_throughput": 50.0, "request_throughput": 0.5},
    **{"concurrency": 1.5, "accept_length": None, "errors": ["", ""]},
    **{"itls": [[0.01, 0.01], [0.06]], "ttfts": [0.1, 0.2], "output_lens": [3, 3]},
}


def test_prompts_are_the_same_in_every_process():
    """Whatever the order of the vocabulary."""
    drawn = []
    for order in (1, -1):
        vocabulary = dict([("a", 7), ("b", 3), ("c", 9)][::order])
        tokenizer = type(
            "T", (), {"get_vocab": lambda self, v=vocabulary: v, "decode": lambda self, ids: ids}
        )
        random.seed(1)
        drawn.append(load_client.common.gen_prompt(tokenizer(), 50))
    assert drawn[0] == drawn[1] and set(drawn[0]) == {3, 7, 9}


def test_prefixes_that_are_not_cached_end_the_benchmark():
    bench_load.check_cached({"cached_tokens": [100, 90], "input_lens": [100, 100]}, 1)
    missing = r"^94% of the prompts' tokens were in the prefix cache .* --groups"
    for turns in (1, 2):  # what later turns find says nothing of the first ones
        found = {"cached_tokens": [100, 150, 88, 150][:: 3 - turns], "input_lens": [100] * 2 * turns}
        with pytest.raises(SystemExit, match=missing):
            bench_load.check_cached(found, turns)


def test_goodput_counts_requests_whose_tokens_came_in_time():
    assert bench_load.summary(TOLD, 20)["goodput"] == 0.25
    assert bench_load.summary(TOLD, 30.1)["goodput"] == 0.5
    row = bench_load.summary(TOLD, 20)
    assert (row["tpots_ms"], row["ttfts_ms"]) == ([10, 30], [100, 200])


def test_stages_are_means_of_the_requests_in_between():
    """A histogram that nobody has been through yet is not published."""
    waits = 'sglang:queue_time_seconds_{}{{model_name="m"}} {}'
    prefill = 'sglang:per_stage_req_latency_seconds_{}{{stage="{}"}} {}'
    first = ["# TYPE sglang:queue_time_seconds histogram", waits.format("sum", 1), waits.format("count", 2)]
    then = ["# TYPE sglang:queue_time_seconds histogram", waits.format("sum", 4), waits.format("count", 5)]
    then += ["# TYPE sglang:per_stage_req_latency_seconds histogram"]
    for stage, seconds in (("prefill_forward", 0.2), ("decode_forward", 9)):
        then += [prefill.format("sum", stage, seconds), prefill.format("count", stage, 4)]
    answers = ["\n".join(lines) + "\n" for lines in (first, then)]
    server = type("S", (), {"get": lambda self, path: answers.pop(0).encode()})()
    before, after = bench_load.stages(server), bench_load.stages(server)
    assert bench_load.means(before, after) == {"waits_ms": 1000, "prefill_ms": 50}
    with pytest.raises(SystemExit, match="says prefill_ms"):
        bench_load.means({**before, "prefill_ms": after["prefill_ms"]}, after)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit('no such model')", "ended in an error: no such model"),
        ('open(sys.argv[1], \'w\').write(\'{"errors": ["", "Bad Request"]}\')', "1 requests failed"),
    ],
)
def test_a_client_that_fails_ends_the_benchmark(monkeypatch, tmp_path, script, message):
    real = bench_load.subprocess.run

    def run(command: list[str], **how):
        out = command[command.index("--output-file") + 1]
        return real([sys.executable, "-c", f"import sys; {script}", out], **how)

    monkeypatch.setattr(bench_load.subprocess, "run", run)
    server = type("S", (), {"port": 1})
    with pytest.raises(SystemExit, match=message):
        bench_load.client(server, parse(PAIR), 1.0, 8)


def test_a_table_compares_stock_and_sts_at_every_rate_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert load.load() == "Not measured yet."
    row = {"dataset": "random-ids", "context": 1000, "algorithm": "EAGLE3", "gpu": "G", "sglang": "0"}
    row |= {"output_throughput": 100, "median_tpot_ms": 5, "p99_ttft_ms": 80, "duration": 2}
    row |= {"requests": 8, "new_tokens": 64, "turns": 1, "groups": None}
    runs = [("b", "sts", 1, [9.0]), ("c", "stock-spec-captured", 1, [10.5, 20.5])]
    runs += [("c", "sts", 1, [9, 9, 11, 12]), ("c", "sts", 2, [1.0])]
    runs += [("c", "stock-spec-captured", 4, [25]), ("c", "sts", 4, [20, 30])]
    agents = {**row, "commit": "c", "turns": 6, "rate": 1, "dataset": "generated-shared-prefix"}
    lines = [
        {**row, "commit": commit, "arm": arm, "rate": rate, "tpots_ms": times}
        for commit, arm, rate, times in runs
    ]
    lines += [{**agents, "arm": arm, "tpots_ms": [1]} for arm in ("sts", "stock-spec-captured")]
    (tmp_path / "load.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = load.load().splitlines()
    load_, rest = (
        "1,000 tokens, prompts nobody has seen, EAGLE3, 8 x 64 tokens",
        "100 | 100 | 5.00 | 5.00 | 80 | 80",
    )
    assert shown[2:4] == [
        f"| {load_} | 1 | {rest} | 0.00 | 1.00 | 0.50 | 2.00 |",
        f"| {load_} | 4 | {rest} | 0.00 | 0.00 | 0.00 | 0.50 |",
    ]
    assert shown[4].startswith(
        "| 1,000 tokens, agents of 6 turns over prefixes that are shared, EAGLE3, 8 x 64 tokens | 1 |"
    )
    assert "10 and 20 ms" in shown[-1] and "commit c;" in shown[-1]
    assert "first, mean" not in shown[0]
    told = {**agents, "arm": "sts", "tpots_ms": [1], "mean_ttft_ms": 90, "waits_ms": 1, "prefill_ms": 20}
    with (tmp_path / "load.jsonl").open("a") as file:
        file.write("\n" + json.dumps(told))
    head, _, *lines, _, _ = load.load().splitlines()
    columns = dict(zip(head.split("|"), lines[-1].split("|"), strict=True))
    assert columns[" ms to the first, mean: sts, dense draft "] == " 90 "
    assert columns[" of which in the scheduler: sts, dense draft "] == " 21 "
    assert columns[" of which in the scheduler: stock "] == " – "


def test_dummy_models_have_words_where_prompts_are_text(tmp_path):
    from transformers import AutoTokenizer

    options = parse(["--dummy", str(tmp_path), "--algorithm", "EAGLE3"])
    bench_serving.prepare(options, words=True)
    assert "--skip-tokenizer-init" not in options.server_args
    ids = list(range(0, 128256, 999))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / next(iter(dummy_models.DRAFTS)))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@pytest.mark.server
def test_the_real_client_loads_a_real_server(tmp_path, monkeypatch):
    """With one request a conversation, and with two."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    pair = shipped_pair()
    server = "--device cpu --dtype float32 --context-length 8192 --max-total-tokens 20000 "
    server += "--max-running-requests 8 --skip-server-warmup --enable-metrics"
    options = ["--target", str(pair.target), "--draft", str(pair.draft), "--algorithm", "STANDALONE"]
    options += ["--context", "400", "--requests", "4", "--groups", "2", "--rates", "inf", "--arms", "sts"]
    options += ["--new-tokens", "16", "--tpot-ms", "1000000", "--server-args", server, "--out", "rows.jsonl"]
    options = [*options, "--sts-config", '{"keep": 0.25, "budget": 64}']
    once, twice = (parse([*options, "--turns", turns]) for turns in ("1", "2"))
    for given in (once, twice):
        bench_serving.prepare(given, words=True)
    with bench_serving.serve("sts", 0, once) as served:
        monkeypatch.setattr(bench_serving, "serve", lambda *_: nullcontext(served))
        rows = [*run_arm("sts", once), *run_arm("sts", twice)]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    for row, turns in zip(rows, (1, 2), strict=True):
        answers = 4 * turns
        assert (row["turns"], row["completed"], len(row["tpots_ms"])) == (turns, answers, answers)
        assert 0.2 < row["keep_ratio"] < 0.4 and row["sparse_verifies"] > 0
        assert row["goodput"] == pytest.approx(answers / row["duration"], rel=1e-3)
        assert row["waits_ms"] >= 0 and 0 < row["prefill_ms"] <= row["mean_ttft_ms"]
