"""On two GPUs: the shipped pair says what it says on one, but for near ties, at full budget and at a tenth,
and counters are of both. Skipped below two GPUs; on a CPU tests/test_tensor_parallel.py has two ranks.

    python -m pytest -m gpu tests/test_gpu_tensor_parallel.py
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.dummy_models import counts
from sts_sglang import headmap
from sts_sglang.tools.demo import FACTS, MODELS
from sts_sglang.tools.local_server import LocalServer
from tests.test_gpu import (
    CHAIN,
    SPARSE,
    TREE,
    WHOLE,
    ask_all,
    assert_ties_alone,
    draft,
    prompts,  # noqa: F401 (a fixture)
)
from tests.tolerances import NEAR_TIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

TENTH = {"custom_params": {"sts": {"keep": 0.1}}}
TIE = NEAR_TIES[torch.bfloat16]
STOCK = "stock"
# Name -> what drafts, and what of sts is on.
ROADS: dict[str, tuple[list[str], dict]] = {
    "alone": ([], {"selector": "tokens"}),
    "chain": ([*draft("STANDALONE"), *CHAIN], {}),
    "tree": ([*draft("EAGLE3"), *TREE], {"dense_layers": [1]}),
    "history": ([*draft("STANDALONE"), *CHAIN], {"history": "blend"}),
}
SIZES = ("--context-length", "33792", "--max-running-requests", "8", "--max-total-tokens", "120000")
SIZES += ("--cuda-graph-max-bs", "8", "--mem-fraction-static", "0.85", "--cuda-graph-backend-prefill")
SIZES += ("disabled", "--skip-server-warmup", "--random-seed", "0", "--sleep-on-idle", "--enable-metrics")
SIZES += ("--decode-log-interval", "5")  # rounds after which ranks publish what they counted


def map_of(folder: Path, name: str, tp: int) -> str | None:
    """A map of a pair that a launch on so many ranks takes, and that is the same for any: the packaged ones
    are of one rank. None without a draft: the packaged map of the target alone is for any."""
    path, flags = folder / f"{name}-{tp}.json", ROADS[name][0]
    if not flags:
        return None
    target = counts(MODELS / "target")
    drafts = counts(Path(flags[flags.index("--speculative-draft-model-path") + 1]))
    found = {"version": headmap.MAP_VERSION, "shift": headmap.MAP_SHIFT}
    found |= {"target": target._asdict(), "draft": drafts._asdict()}
    found["sources"] = headmap.proportional(target, drafts).sources
    path.write_text(json.dumps({**found, "tp": tp}))
    return str(path)


def arguments(folder: Path, name: str, tp: int) -> list[str]:
    """Of a server; stock's has FA3 and no draft."""
    given = [*SIZES, "--tp-size", str(tp)]
    if name == STOCK:
        return [*given, "--attention-backend", "fa3"]
    flags, config = ROADS[name]
    config = {**SPARSE, **config, "head_map": map_of(folder, name, tp)}
    return [*given, "--attention-backend", "sts", "--sts-config", json.dumps(config), *flags]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """All of them at once, by name and number of GPUs: they are compared, not timed."""
    folder, running = tmp_path_factory.mktemp("tp"), {}
    # The first GPU has more of them than the second.
    env = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}

    def start(key: tuple[str, int]) -> None:
        name, tp = key
        log = folder / f"{name}-{tp}.log"
        args = arguments(folder, name, tp)
        running[key] = LocalServer(MODELS / "target", log, *args, env=env, start_seconds=400).__enter__()

    keys = [*((name, 2) for name in ROADS), (STOCK, 1), *((name, 1) for name in ROADS)]
    try:
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(start, keys))
        yield running
    finally:
        with ThreadPoolExecutor(len(keys)) as pool:
            list(pool.map(LocalServer.stop, running.values()))


@pytest.fixture(scope="module")
def stock(servers, prompts):  # noqa: F811
    return cache(lambda: ask_all(servers[STOCK, 1], prompts))


def counted(server: LocalServer, ask) -> tuple[list[dict], dict]:
    """What was answered, and by how much every counter grew."""
    before = server.counters()
    answers = ask()
    after = server.counters()
    return answers, {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize("name", ROADS)
def test_full_budget_is_stock_on_one_gpu_but_for_near_ties(servers, stock, prompts, name):  # noqa: F811
    server = servers[name, 2]
    _, grown = counted(server, lambda: ask_all(server, prompts, **WHOLE))  # together: batches change
    assert grown["dense_verifies"] == 0 and grown["selected_tokens"] == grown["available_tokens"] > 0
    assert_ties_alone(server, prompts, stock(), TIE, **WHOLE)


@pytest.mark.parametrize("name", [name for name in ROADS if name != "history"])
def test_a_tenth_is_what_one_gpu_says_but_for_near_ties(servers, prompts, name):  # noqa: F811
    """With history an answer depends on what was asked before."""
    one, two = servers[name, 1], servers[name, 2]
    twins, of_one = counted(one, lambda: ask_all(one, prompts, **TENTH))
    _, of_two = counted(two, lambda: ask_all(two, prompts, **TENTH))
    assert_ties_alone(two, prompts, twins, TIE, **TENTH)
    for grown in (of_one, of_two):
        assert grown["dense_verifies"] == 0 < grown["sparse_verifies"]
    # Of all heads, whatever GPU has them. Where an answer parts at a tie, verifies of other lengths follow.
    seen = [grown["available_tokens"] / grown["sparse_verifies"] for grown in (of_one, of_two)]
    kept = [grown["selected_tokens"] / grown["available_tokens"] for grown in (of_one, of_two)]
    assert seen[1] == pytest.approx(seen[0], rel=0.2) and kept[1] == pytest.approx(kept[0], rel=0.05)
    assert kept[1] < (0.25 if name == "tree" else 0.15)


@pytest.mark.parametrize("name", ROADS)
def test_questions_are_answered_from_a_tenth_of_the_context(servers, prompts, name):  # noqa: F811
    answers = ask_all(servers[name, 2], prompts[2:], **TENTH)
    expected = [*FACTS.values()][2:] + [*FACTS.values()][:2]
    assert [code in a["text"] for a, code in zip(answers, expected, strict=True)] == [True] * 3
    if ROADS[name][0]:
        assert min(a["meta_info"]["spec_accept_length"] for a in answers) > 1.5


@pytest.mark.parametrize("name", ROADS)
def test_what_is_said_is_of_both(servers, prompts, name):  # noqa: F811
    server, said = servers[name, 2], servers[name, 2].sts()
    ask_all(server, prompts[:2])
    assert said["ranks"] == 2 and servers[name, 1].sts()["ranks"] == 1
    passes = ("verify", "draft_decode", "draft_extend") if ROADS[name][0] else ("decode",)
    assert said["graphs"] == dict.fromkeys(passes, True)
    lines = server.get("/metrics").decode().splitlines()
    told = [float(line.split()[-1]) for line in lines if line.startswith("sts:sparse_verifies_total")]
    assert len(told) == 1 and 0 < told[0] <= server.counters()["sparse_verifies"]
