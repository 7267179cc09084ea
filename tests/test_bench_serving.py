"""The arms of bench_serving, what of a run it refuses, and the rows that it writes; no server runs."""

from __future__ import annotations

import json
import os

import pytest

# Before SGLang is imported: it chooses its platform once per process.
os.environ.setdefault("SGLANG_PLATFORM", "sts_cpu")

from benchmarks import bench_serving, bound, dummy_models, tables, two_gpus
from benchmarks.bench_serving import parse, prepare, run_arm
from benchmarks.serving_arms import ARMS_OF, arm_args, check_kept, launched
from benchmarks.shapes import Shape
from tests import arguments

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
    assert flags("sts-blend", *given) == [
        *(*drafts, *SPARSE),
        '{"keep": 0.1, "draft": "dense", "history": "blend"}',
    ]
    dense = json.loads(flags("sts-dense", *given)[-1])
    assert dense == {"keep": 0.1, "draft": "dense", "dense_layers": [0, 1, 2, 3]}
    assert flags("stock-spec", *PAIR)[5] == "3"  # draft steps, unless said otherwise
    assert flags("stock-fp8", *given) == [*drafts, "--kv-cache-dtype", "fp8_e4m3"]
    tree = flags("sts", *given, "--topk", "4")
    assert tree[7:10] == ["4", "--speculative-num-draft-tokens", "8"]
    assert flags("sts", *given, "--topk", "4", "--draft-tokens", "16")[9] == "16"


def test_batches_are_of_equal_lengths_or_of_lengths_the_same_factor_apart():
    equal, mixed = Shape.parse("32000x3"), Shape.parse("mixed:2000-64000x6")
    assert equal.lengths() == [32000] * 3
    assert mixed.lengths() == [64000, 32000, 16000, 8000, 4000, 2000]
    for shape in (equal, mixed):
        assert Shape.parse(str(shape)) == shape == Shape.of({"arm": "sts", **shape.fields()})
    assert (equal.shown(), mixed.shown()) == ("32,000 x 3", "2,000 to 64,000 x 6")
    for wrong in ("32000", "x8", "0x8", "8x0", "mixed:9-9x4", "mixed:9-8x4", "mixed:2-8x1", "mixed:0-8x2"):
        with pytest.raises(ValueError, match=wrong):
            Shape.parse(wrong)


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
        (["--dummy", "--algorithm", "NONE", "--topk", "4"], "--topk: nothing drafts"),
        (["--dummy", "--tp", "3"], "--tp"),
        (["--dummy", "--shapes", "32000x8,mixed"], "--shapes: 'mixed' is no CONTEXTxREQUESTS"),
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
    told = {"gpu": "G", "sglang": "0", "commit": "c", "simulated": None, "draft": None}
    assert options.where.items() >= told.items()
    assert options.where["target"]["layers"] == 32


@pytest.mark.parametrize("model", dummy_models.DRAFTS)
@pytest.mark.parametrize("algorithm", ["STANDALONE", "EAGLE3"])
def test_dummy_pairs_are_models_that_sts_takes_by_tokens_too(tmp_path, model, algorithm):
    from transformers import AutoConfig

    options = parse(["--dummy", str(tmp_path), "--dummy-model", model, "--algorithm", algorithm])
    prepare(options)
    target, draft = (AutoConfig.from_pretrained(folder) for folder in (options.target, options.draft))
    assert target.vocab_size == draft.vocab_size and options.vocab <= target.vocab_size
    assert launched(ARMS_OF[algorithm]["sts-tokens"], options).selector == "tokens"
    directions = json.loads((tmp_path / f"directions-{options.draft.name}.json").read_text())
    assert len(directions["directions"]["heads"]) == target.num_hidden_layers
    assert directions["draft"]["layers"] == draft.num_hidden_layers


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
    assert arguments.launched(monkeypatch, **given).attention_backend == "sts"


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
        return check_kept(ratio, arm, [4000], options)
    with pytest.raises(SystemExit, match=f"attended to {ratio:.4f}"):
        check_kept(ratio, arm, [4000], options)


def test_of_mixed_lengths_the_share_is_of_all_tokens():
    options = parse(["--target", "T", "--algorithm", "NONE"])
    lengths = Shape.parse("mixed:1000-64000x4").lengths()  # 1,000 is attended to whole, 4,000 by a quarter
    assert lengths == [64000, 16000, 4000, 1000]
    check_kept((6400 + 1600 + 1024 + 1000) / 85000, ARMS_OF["NONE"]["sts"], lengths, options)
    with pytest.raises(SystemExit, match="1000 to 64000 tokens: verifies attended to 0.1000"):
        check_kept(0.1, ARMS_OF["NONE"]["sts"], lengths, options)


@pytest.mark.parametrize(
    ("requests", "ratio", "passes"),
    [
        (2, 1.0, True),  # 8,000 tokens that become 9,024 stand aside from the first to the last
        (2, 0.9, False),
        (4, 0.1, True),
        (4, 0.14, True),  # while requests come one by one
        (4, 0.2, False),
        (3, 0.1 + 0.9 * 500 / 512, True),  # 500 steps of 512
        (3, 0.5, False),
        (4, 0.08, False),  # none attends to less than was asked for
    ],
)
def test_a_batch_that_stands_aside_attends_to_everything(requests, ratio, passes):
    config = '{"keep": 0.1, "budget": 0}'
    options = parse(["--target", "T", "--algorithm", "NONE", "--sts-config", config])
    given = ratio, ARMS_OF["NONE"]["sts"], [4000] * requests, options, 13_500
    if passes:
        return check_kept(*given)
    with pytest.raises(SystemExit, match=f"attended to {ratio:.4f}"):
        check_kept(*given)


def test_whatever_was_measured_so_far_attended_to_what_was_asked_for():
    options = parse(["--dummy", "."])
    prepare(options)
    found = [r for r in tables.rows("serving.jsonl") if r["arm"] in ("sts", "sts-draft", "sts-dense")]
    assert len(found) > 50
    for row in found:
        check_kept(row["keep_ratio"], ARMS_OF["STANDALONE"][row["arm"]], Shape.of(row).lengths(), options)


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

    def sts(self) -> dict:
        return {"config": {"stand_aside": 0}}

    def counters(self) -> dict:
        of_a_pass = {"sparse_verifies": 40, "dense_verifies": 0, "selected_tokens": 1, "available_tokens": 10}
        of_a_pass["aside_verifies"] = 10
        self.read += 1
        return {name: self.read * count for name, count in {**of_a_pass, **self.counted}.items()}

    def post(self, path: str, body: dict, timeout: float) -> dict:
        tokens = body["sampling_params"]["max_new_tokens"]
        return {
            "meta_info": {"completion_tokens": tokens, "cached_tokens": len(body["input_ids"]) - 1},
        }

    def shown_command(self) -> str:
        return "python -m sglang.launch_server"


def run(monkeypatch, arm: str, *shapes: str, **server: int) -> list[dict]:
    monkeypatch.setattr(bench_serving, "serve", lambda *given: Fake(*given, **server))
    argv = ["--target", "T", "--algorithm", "NONE", "--tp", "2", "--passes", "2", "--out", "rows.jsonl"]
    options = parse([*argv, "--sts-config", '{"keep": 0.1, "budget": 0}'])
    prepare(options)
    return run_arm(arm, 0, [Shape.parse(shape) for shape in shapes], options)


def test_a_row_says_what_was_served_and_how_sparsely(monkeypatch, tmp_path):
    rows = run(monkeypatch, "sts", "3000x2")
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(written) == 2
    told = {"arm": "sts", "repeat": 0, "context": 3000, "requests": 2, "algorithm": "NONE", "tp": 2}
    told |= {"kv": "auto"}
    told |= {
        "sparse_verifies": 40,
        "aside_share": 0.25,
        "keep_ratio": 0.1,
        "cached_tokens": 2999,
        "accept_length": 1,
    }
    told |= {"commit": "c", "simulated": None, "gpu": "G", "server": "python -m sglang.launch_server"}
    assert written[0].items() >= told.items()
    assert written[0]["tokens_per_s"] > 0
    assert (written[0]["selector"], written[0]["new_tokens"], written[0]["target"]) == ("pages", 512, None)
    stock = run(monkeypatch, "stock", "3000x2")
    assert "keep_ratio" not in stock[0]


# 32 layers: queries and outputs of 4096 x 4096, keys and values of 4096 x 1024, and an MLP of 14336.
LAYER = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
HEAD_LAYER = 4096 * (4096 + 2 * (4096 + 2 * 1024) + 3 * 14336)


def test_the_bytes_of_a_round_are_weights_and_what_attention_is_over(tmp_path):
    target = bound.model(dummy_models.write("llama-8b", tmp_path))
    draft = bound.model(dummy_models.write("llama-8b-eagle3", tmp_path))
    assert target["weights"] == 2 * (32 * LAYER + 128256 * 4096)
    assert draft["weights"] == 2 * (HEAD_LAYER + 32000 * 4096)
    row = {"target": target, "draft": draft, "drafts": True, "steps": 3, "kv": "auto", "shared": 0, "tp": 1}
    row |= {"context": 1000, "requests": 2, "new_tokens": 200}  # 1,100 tokens each, on average
    token, of_head = 2 * 2 * 8 * 128 * 32, 2 * 2 * 8 * 128
    weights = target["weights"] + 3 * draft["weights"] + 2 * 3 * 4096 * 4096
    dense = {"weights": weights, "target": 2200 * token, "draft": 3 * 2200 * of_head}
    assert bound.round_bytes(row) == dense
    halves = bound.round_bytes({**row, "kv": "fp8_e4m3"})
    assert halves == {"weights": weights, "target": dense["target"] / 2, "draft": dense["draft"] / 2}
    for mode, passes in {"dense": 3, "extend": 2.25, "steps": 2.25, "all": 1.5}.items():
        sparse = bound.round_bytes({**row, "keep_ratio": 0.25, "sparse_draft": mode})
        assert (sparse["target"], sparse["draft"]) == (550 * token, passes * 2200 * of_head)
    # Every pass a quarter, and the keys of all tokens, in as many rounds as score.
    for share, passes in {1: 1.25, 0.5: 1}.items():
        told = {"keep_ratio": 0.25, "sparse_draft": "every", "scored_share": share}
        assert bound.round_bytes({**row, **told})["draft"] == passes * 2200 * of_head
    often = bound.round_bytes({**row, "keep_ratio": 0.25, "sparse_draft": "all", "scored_share": 0.5})
    assert often["draft"] == (0.5 + 0.25 * 2.5) * 2200 * of_head
    for kept, share in {"fp8_e4m3": 0.5, "model": 1, "auto": 1}.items():
        alone = bound.round_bytes({**row, "draft_kv": kept})
        assert alone == {**dense, "draft": share * dense["draft"]}
    scored = bound.round_bytes({**row, "selector": "tokens", "keep_ratio": 0.25})
    assert scored["sketches"] == 2200 * 32 * 8 * 128 / 4
    aside = bound.round_bytes({**row, "selector": "tokens", "keep_ratio": 1, "aside_share": 1})
    assert aside == {**dense, "sketches": 0}
    assert bound.round_bytes({**row, "drafts": False}) == {
        "weights": target["weights"],
        "target": 2200 * token,
    }
    for unsaid in ({"target": None}, {"draft": None}, {"shared": 500}):
        assert bound.round_bytes({**row, **unsaid}) is None
    row |= {"tpot_ms": 4, "accept_length": 2.5, "read_gbps": sum(dense.values()) / 1e9 * 200}  # 5 ms of bytes
    assert bound.times_bound([row]) == pytest.approx(2)
    assert bound.times_bound([{**row, "read_gbps": None}]) is None and bound.times_bound([]) is None


def test_a_model_that_does_not_say_what_it_reads_has_no_bound(tmp_path):
    path = dummy_models.write("llama-8b", tmp_path)
    config = json.loads((path / "config.json").read_text())
    for other in ({"hidden_size": None}, {"num_local_experts": 8}):
        (path / "config.json").write_text(json.dumps({**config, **other}))
        assert bound.model(path) is None


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
        run(monkeypatch, "sts", "3000x2", **counted)
    assert not (tmp_path / "rows.jsonl").exists()


def test_shapes_that_a_server_has_no_room_for_are_left_out_and_named(monkeypatch, capsys):
    rows = run(monkeypatch, "stock", "3000x5", "3000x4", "30000x4", "2000x1", capacity=14_048)
    assert [(r["context"], r["requests"]) for r in rows[::2]] == [(3000, 4), (2000, 1)]
    said = capsys.readouterr().out
    assert "stock 3000x5: left out, room for 4 requests at a time, not for 5" in said
    assert "stock 30000x4: left out, room for 14,048 tokens of KV, not for 122,048" in said
