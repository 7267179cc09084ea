"""The arms of bench_serving, what of a run it refuses, and the rows that it writes; no server runs."""

from __future__ import annotations

import json
import os

import pytest

# Before SGLang is imported: it chooses its platform once per process.
os.environ.setdefault("SGLANG_PLATFORM", "sts_cpu")

from benchmarks import bench_serving, dummy_models, tables, two_gpus
from benchmarks.bench_serving import parse, prepare, run_arm
from benchmarks.serving_arms import ARMS_OF, arm_args, check_kept
from tests.arguments import launched

PAIR = ["--target", "T", "--draft", "D"]
SPARSE = ["--attention-backend", "sts", "--sts-config"]


@pytest.fixture(autouse=True)
def target(tmp_path, monkeypatch):
    """`T`, of 4 layers, in the working directory; nothing is asked of git or a GPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "config.json").write_text('{"num_hidden_layers": 4}')
    monkeypatch.setattr(bench_serving, "origin", lambda: {"gpu": "G", "sglang": "0"})
    monkeypatch.setenv("STS_COMMIT", "c")


def flags(arm: str, *argv: str) -> list[str]:
    options = parse(list(argv))
    return arm_args(ARMS_OF[options.algorithm][arm], options)


def test_a_target_alone_is_served_without_a_word_of_a_draft():
    alone = ["--target", "T", "--algorithm", "NONE"]
    assert parse(alone).arms == "stock,sts,sts-pages,sts-tokens"
    assert flags("stock", *alone) == []
    assert flags("sts", *alone, "--sts-config", '{"keep": 0.2}') == [*SPARSE, '{"keep": 0.2}']


def test_a_pair_is_served_as_ever():
    drafts = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", "D"]
    drafts += ["--speculative-num-steps", "2", "--speculative-eagle-topk", "1"]
    drafts += ["--speculative-num-draft-tokens", "3"]
    given = [*PAIR, "--algorithm", "EAGLE3", "--steps", "2"]
    assert flags("stock", *given) == []
    assert flags("stock-spec", *given) == flags("stock-spec-captured", *given) == drafts
    assert flags("sts-blend", *given) == [*drafts, *SPARSE, '{"keep": 0.1, "history": "blend"}']
    dense = json.loads(flags("sts-dense", *given)[-1])
    assert dense == {"keep": 0.1, "dense_layers": [0, 1, 2, 3]}
    assert flags("stock-spec", *PAIR)[5] == "3"  # draft steps, unless said otherwise


@pytest.mark.parametrize("arm", ["stock", "sts"])
def test_ranks_are_those_of_every_arm(arm):
    given = ["--target", "T", "--algorithm", "NONE", "--tp", "2"]
    assert flags(arm, *given)[:2] == ["--tp-size", "2"]
    assert flags(arm, *given)[2:] == flags(arm, *given[:-2])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--algorithm", "NONE"], "give --target, or --dummy"),
        (["--target", "T"], "give --target and --draft, or --dummy"),
        (["--target", "nowhere", "--algorithm", "NONE"], "--target nowhere: no folder with a config.json"),
        (["--dummy", "--algorithm", "NONE", "--accept-length", "3"], "--accept-length: nothing drafts"),
        (["--dummy", "--algorithm", "NONE", "--steps", "3"], "--steps: nothing drafts"),
        (["--target", "T", "--draft", "D", "--algorithm", "NONE"], "--draft: nothing drafts"),
        (["--dummy", "--algorithm", "NONE", "--arms", "stock-spec"], "--arms: no stock-spec"),
        (["--dummy", "--tp", "3"], "--tp"),
    ],
)
def test_what_does_not_fit_together_is_named(argv, named, capsys):
    with pytest.raises(SystemExit):
        parse(argv)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("config", ['{"keep": 7}', '{"history": "warm"}', "keep"])
def test_a_configuration_that_no_server_takes_ends_before_the_first_one_starts(config):
    with pytest.raises(SystemExit, match="--sts-config, as arm sts takes it: "):
        prepare(parse(["--target", "T", "--algorithm", "NONE", "--sts-config", config]))
    prepare(parse(["--target", "T", "--algorithm", "NONE"]))


def test_dummy_models_are_those_of_the_algorithm(tmp_path):
    options = parse(["--dummy", str(tmp_path), "--algorithm", "NONE"])
    prepare(options)
    assert options.target.name == "llama-8b" and options.draft is None
    assert not (tmp_path / "llama-1b").exists()
    assert options.where == {"gpu": "G", "sglang": "0", "commit": "c", "simulated": None}


@pytest.mark.parametrize("target", two_gpus.PAIRS)
def test_two_gpus_have_a_part_of_every_model(tmp_path, monkeypatch, target):
    given = two_gpus.parse(["--work", str(tmp_path / "work"), "--out", str(tmp_path / "rows.jsonl")])
    options = parse(two_gpus.arguments(target, given))
    prepare(options)
    assert options.tp == 2 and options.arms == "stock,stock-spec-captured,sts" and options.logs.is_dir()
    for model in (options.target, options.draft):
        assert dummy_models.counts(model).shared_evenly(2)
    args = {arm: arm_args(ARMS_OF["EAGLE3"][arm], options) for arm in options.arms.split(",")}
    assert all(given[:2] == ["--tp-size", "2"] for given in args.values())
    given = dict.fromkeys(("speculative_num_draft_tokens",), 4)
    given |= {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "tp_size": 2, "device": "cpu"}
    given |= {"load_format": "dummy", "skip_tokenizer_init": True, "disable_cuda_graph": True}
    given |= {"model_path": str(options.target), "speculative_draft_model_path": str(options.draft)}
    given |= {"speculative_algorithm": "EAGLE3", "attention_backend": "sts", "context_length": 131072}
    monkeypatch.setenv("SGLANG_PLATFORM", "sts_cpu")
    assert launched(monkeypatch, **given).attention_backend == "sts"


# 4,000 tokens: a tenth is 400, 25 whole pages; the floor of 1,024 tokens is more than a quarter.
@pytest.mark.parametrize(
    ("config", "ratio", "passes"),
    [
        ('{"keep": 0.1, "budget": 0}', 0.1, True),
        ('{"keep": 0.1, "budget": 0}', 0.0965, True),  # whole pages only
        ('{"keep": 0.1, "budget": 0}', 0.095, False),
        ('{"keep": 0.1, "budget": 0}', 0.105, False),
        ('{"keep": 0.1}', 0.1, False),
        ('{"keep": 0.1}', 0.25, True),
        ('{"keep": 0.1, "budget": 0, "dense_layers": [2]}', 0.1, False),
        ('{"keep": 0.1, "budget": 0, "dense_layers": [2]}', 0.325, True),
        ('{"keep": 0.1, "budget": 0, "full_verify_every": 4}', 0.4, True),
        ('{"keep": 0.1, "budget": 0, "verify": "dense"}', 1.0, True),
    ],
)
def test_verifies_attend_to_what_was_asked_for_within_a_page(config, ratio, passes):
    options = parse(["--target", "T", "--algorithm", "NONE", "--sts-config", config])
    arm = ARMS_OF["NONE"]["sts"]
    if passes:
        return check_kept(ratio, arm, 4000, options)
    with pytest.raises(SystemExit, match=f"attended to {ratio:.4f}"):
        check_kept(ratio, arm, 4000, options)


def test_whatever_was_measured_so_far_attended_to_what_was_asked_for():
    options = parse(["--dummy", "."])
    prepare(options)
    found = [r for r in tables.rows("serving.jsonl") if r["arm"] in ("sts", "sts-draft", "sts-dense")]
    assert len(found) > 50
    for row in found:
        check_kept(row["keep_ratio"], ARMS_OF["STANDALONE"][row["arm"]], row["context"], options)


class Fake:
    """Answers at once. Between two readings a tenth was attended to, unless told otherwise."""

    def __init__(self, arm: str, repeat: int, options, capacity: int = 100_000, **counted: int):
        self.capacity, self.counted, self.read = capacity, counted, 0

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None: ...

    def state(self) -> dict:
        memory = {"token_capacity": self.capacity}
        return {"memory_usage": memory, "effective_max_running_requests_per_dp": 4}

    def counters(self) -> dict:
        of_a_pass = {"sparse_verifies": 40, "dense_verifies": 0, "selected_tokens": 1, "available_tokens": 10}
        self.read += 1
        return {name: self.read * count for name, count in {**of_a_pass, **self.counted}.items()}

    def post(self, path: str, body: dict, timeout: float) -> dict:
        tokens = body["sampling_params"]["max_new_tokens"]
        return {
            "meta_info": {"completion_tokens": tokens, "cached_tokens": len(body["input_ids"]) - 1},
        }

    def shown_command(self) -> str:
        return "python -m sglang.launch_server"


def run(monkeypatch, arm: str, shapes: list[tuple[int, int]], **server: int) -> list[dict]:
    monkeypatch.setattr(bench_serving, "serve", lambda *given: Fake(*given, **server))
    argv = ["--target", "T", "--algorithm", "NONE", "--tp", "2", "--passes", "2", "--out", "rows.jsonl"]
    options = parse([*argv, "--sts-config", '{"keep": 0.1, "budget": 0}'])
    prepare(options)
    return run_arm(arm, 0, shapes, options)


def test_a_row_says_what_was_served_and_how_sparsely(monkeypatch, tmp_path):
    rows = run(monkeypatch, "sts", [(3000, 2)])
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(written) == 2
    told = {"arm": "sts", "repeat": 0, "context": 3000, "requests": 2, "algorithm": "NONE", "tp": 2}
    told |= {"kv": "auto"}
    told |= {"sparse_verifies": 40, "keep_ratio": 0.1, "cached_tokens": 2999, "accept_length": 1}
    told |= {"commit": "c", "simulated": None, "gpu": "G", "server": "python -m sglang.launch_server"}
    assert written[0].items() >= told.items()
    assert written[0]["tokens_per_s"] > 0
    stock = run(monkeypatch, "stock", [(3000, 2)])
    assert "keep_ratio" not in stock[0]


def test_what_kv_is_kept_as_is_read_off_the_arguments_of_all_servers():
    for given in ("--kv-cache-dtype fp8_e4m3", "--page-size 1 --kv-cache-dtype=fp8_e4m3 --x"):
        assert bench_serving.kv_dtype(given) == "fp8_e4m3"
    assert bench_serving.kv_dtype("--mem-fraction-static 0.8") == "auto"


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        ({"sparse_verifies": 0}, "not verified sparsely"),
        ({"dense_verifies": 1}, "not verified sparsely"),
        ({"selected_tokens": 5}, "attended to 0.5000"),
    ],
)
def test_what_was_not_sparse_as_asked_is_not_written(monkeypatch, tmp_path, counted, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "sts", [(3000, 2)], **counted)
    assert not (tmp_path / "rows.jsonl").exists()


def test_shapes_that_a_server_has_no_room_for_are_left_out_and_named(monkeypatch, capsys):
    rows = run(monkeypatch, "stock", [(3000, 5), (3000, 4), (30_000, 4), (2000, 1)], capacity=13_024)
    assert [(r["context"], r["requests"]) for r in rows[::2]] == [(3000, 4), (2000, 1)]
    said = capsys.readouterr().out
    assert "stock 3000x5: left out, room for 4 requests at a time, not for 5" in said
    assert "stock 30000x4: left out, room for 13,024 tokens of KV, not for 121,024" in said
