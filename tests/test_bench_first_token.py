"""Time to the first token: what is asked for, and what a row is refused for."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_first_token, bench_serving
from benchmarks.bench_first_token import kinds_of, measure, parse, run
from sts_sglang.tools.demo import shipped_pair
from tests.server import ENVIRONMENT

TARGET = ["--target", "T", "--algorithm", "NONE"]


@pytest.fixture(autouse=True)
def target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "config.json").write_text('{"num_hidden_layers": 4}')


class Server:
    """One that caches prefixes, and leaves blocks out of what is asked sparsely beyond the floor."""

    def __init__(self, floor: int, leaves: bool = True):
        self.floor, self.leaves, self.blocks, self.seen = floor, leaves, 0, []

    def post(self, path: str, body: dict) -> dict:
        ids, asks = body["input_ids"], body["sampling_params"]["custom_params"]["sts"]
        cached = 0
        for old in self.seen:
            same = next((i for i, (a, b) in enumerate(zip(ids, old, strict=False)) if a != b), len(ids))
            cached = max(cached, same)
        self.seen.append(ids)
        if self.leaves and "prefill_keep" in asks and len(ids) > self.floor:
            self.blocks += 5
        return {"meta_info": {"cached_tokens": cached}}

    def counters(self) -> dict:
        return {"prefill_available_blocks": self.blocks, "prefill_selected_blocks": 0}


def asked(*more: str):
    return parse([*TARGET, "--lengths", "600,100", "--floor", "200", "--passes", "2", *more])


def test_a_server_is_asked_for_sparse_prefills_of_every_keep():
    options = asked("--keeps", "0.25", "0.5", "--turn", "50")
    assert options.lengths == [600, 100] and options.arms == "sts"
    config = json.loads(options.sts_config)
    assert (config["prefill"], config["prefill_keep"], config["prefill_floor"]) == ("sparse", 0.25, 200)
    assert list(kinds_of(options.keeps)) == ["dense", "sparse 0.25", "sparse 0.5"]


def test_rows_are_of_new_prompts_and_of_turns_behind_them_but_for_the_first():
    options = asked("--turn", "50")
    rows = measure(Server(200), 600, "sparse 0.25", options)
    assert [(row["context"], row["new"], len(row["seconds"])) for row in rows] == [
        (600, 600, 2),
        (600, 50, 2),
    ]
    assert [row["new"] for row in measure(Server(200), 100, "sparse 0.25", options)] == [100]
    assert len(measure(Server(200), 600, "dense", options)) == 2


def test_what_was_prefilled_otherwise_is_not_reported():
    with pytest.raises(SystemExit, match="prefilled otherwise"):
        measure(Server(200, leaves=False), 600, "sparse 0.25", asked())
    with pytest.raises(SystemExit, match="prefilled otherwise"):
        measure(Server(50), 100, "sparse 0.25", asked())
    server = Server(200)
    measure(server, 600, "dense", asked())
    with pytest.raises(SystemExit, match="were cached"):
        measure(server, 600, "dense", asked())  # the same prompts


@pytest.mark.parametrize(
    ("argv", "named"), [(["--lengths", "8,x"], "--lengths"), (["--turn", "600"], "--turn: got 600")]
)
def test_bad_arguments_are_named(argv, named, capsys):
    with pytest.raises(SystemExit):
        asked(*argv)
    assert named in capsys.readouterr().err


@pytest.mark.server
def test_a_server_is_measured(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    target = shipped_pair()[0]
    out = tmp_path / "rows.jsonl"
    args = "--device cpu --max-total-tokens 20000 --max-running-requests 4 --context-length 4096"
    options = parse(
        [
            "--target",
            str(target),
            "--algorithm",
            "NONE",
            "--lengths",
            "2000",
            "--floor",
            "512",
            "--turn",
            "300",
        ]
        + ["--passes", "1", "--server-args", args, "--out", str(out), "--logs", str(tmp_path)]
    )
    monkeypatch.setattr(bench_serving, "read_rate", lambda: None)
    bench_serving.prepare(options)
    rows = run(options)
    assert [(row["kind"], row["new"]) for row in rows] == [
        ("dense", 2000),
        ("dense", 300),
        ("sparse 0.25", 2000),
        ("sparse 0.25", 300),
    ]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert bench_first_token.DENSE in rows[0]["kind"]
