"""The soak: a short run on a real server, and that it notices what is off."""

from __future__ import annotations

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest

from benchmarks import soak
from benchmarks.soak import Account, Ask, Mix, Off, Soak
from sts_sglang.config import StsConfig

CONFIG = StsConfig(keep=0.1, budget=64)
HEADS = 8


def asked(number: int = 0, **fields) -> Ask:
    return Ask(
        **{"number": number, "ids": [1] * 1000, "new_tokens": 20, "keep": None, "abort_after": None} | fields
    )


def delta(**changes) -> dict:
    rounds, context = 7, 1010
    counts = {"sparse_verifies": rounds, "available_tokens": rounds * context * HEADS}
    counts["selected_tokens"] = rounds * HEADS * CONFIG.budget_for(context)
    return {**counts, "dense_verifies": 0, "clipped_tokens": 0, **changes}


def test_the_account_holds_what_was_asked_and_nothing_else():
    account = Account(CONFIG, 4000)
    account.add(asked(), 7)
    account.check(delta(), HEADS)
    for change in (
        {"sparse_verifies": 6},
        {"sparse_verifies": 7 + soak.SLACK_ROUNDS + 1},
        {"dense_verifies": 1},
        {"clipped_tokens": 1},
        {"available_tokens": 7 * 999 * HEADS},
        {"selected_tokens": 7 * HEADS * 1000},
        {"selected_tokens": 7 * HEADS * 64},
    ):
        with pytest.raises(Off, match=r"^counters: "):
            account.check(delta(**change), HEADS)
    account.add(asked(keep=1.0), None)  # aborted: may have run, need not
    account.check(delta(), HEADS)
    account.check(delta(sparse_verifies=20, available_tokens=20 * 1010 * HEADS), HEADS)


def test_who_asks_for_more_than_a_list_holds_is_to_attend_to_everything():
    account = Account(CONFIG, 400)
    account.add(asked(keep=0.5), 7)
    account.check(delta(selected_tokens=7 * HEADS * 1010), HEADS)
    with pytest.raises(Off, match="selected_tokens"):
        account.check(delta(selected_tokens=7 * HEADS * 505), HEADS)


def test_a_seed_gives_the_same_requests():
    asks = [[Mix(seed, 400).ask(i, 0.5) for i in range(30)] for seed in (1, 1, 2)]
    assert asks[0] == asks[1] != asks[2]
    assert all(1 <= len(ask.ids) <= 400 and 1 <= ask.new_tokens <= 64 for ask in asks[0])


@pytest.fixture
def idle(tmp_path):
    """A soak whose server is a file."""
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4, "num_key_value_heads": 2}')
    pair = SimpleNamespace(target=tmp_path)
    options = Namespace(sts_config="{}", pair=pair, seed=0, longest=100, growth=1.0)
    return Soak(SimpleNamespace(log=tmp_path / "log", pid=1), options)


def test_leaks_answers_and_memory_that_are_off_are_noticed(idle, monkeypatch):
    idle.server.log.write_text("fine\n")
    idle.check_log()
    idle.server.log.write_text("fine\nValueError: pool memory leak detected! x\nmore")
    with pytest.raises(Off, match=r"^log: memory leak detected! x$"):
        idle.check_log()
    monkeypatch.setattr(idle, "_flush", lambda: None)
    answers = iter([[1, 2, 3], [1, 2, 3], [1, 2, 4]])
    monkeypatch.setattr(idle, "answer", lambda ask: {"output_ids": next(answers)})
    idle.check_probe()
    idle.check_probe()
    with pytest.raises(Off, match=r"^probe: answered as at first for 2 of "):
        idle.check_probe()
    sizes = iter([1e9, 1e9 + 5e5, 1e9 + 2e6])
    process = SimpleNamespace(
        children=lambda recursive: [], memory_info=lambda: SimpleNamespace(rss=next(sizes))
    )
    monkeypatch.setattr(soak.psutil, "Process", lambda pid: process)
    idle.check_memory()
    idle.check_memory()
    with pytest.raises(Off, match=r"^memory: 2 MB more"):
        idle.check_memory()


def test_an_answer_that_is_short_is_noticed(idle):
    meta = {"finish_reason": {"type": "length"}}
    idle.server.post = lambda path, body: {"output_ids": [1] * 19, "meta_info": meta}
    with pytest.raises(Off, match=r"^request 3: 19 of 20 tokens, length"):
        idle.answer(asked(3))


@pytest.mark.server
def test_sixty_requests(tmp_path, capsys):
    out = tmp_path / "soak.jsonl"
    flags = [
        "--requests",
        "60",
        "--every",
        "20",
        "--longest",
        "600",
        "--abort",
        "0.1",
        "--pair",
        "tiny",
        "--retract",
        "20",
    ]
    soak.main([*flags, "--out", str(out), "--log", str(tmp_path / "soak.log")])
    assert "60 requests" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["requests"] for row in rows] == [20, 40, 60]
    assert rows[-1]["retractions"] > 0 and rows[-1]["memory_mb"] > 0 and rows[-1]["server"]


@pytest.mark.server
def test_a_server_that_is_off_is_one_line(tmp_path):
    """Nothing can be sparse below this budget: the account of another server is not this one's."""
    config = '{"verify": "dense", "keep": 0.1, "budget": 64}'
    flags = ["--requests", "8", "--every", "8", "--longest", "300", "--pair", "tiny"]
    with pytest.raises(SystemExit) as ended:
        soak.main([*flags, "--sts-config", config])
    assert str(ended.value).startswith("soak: counters: sparse_verifies grew by 0,")
