"""History under overlap scheduling, aborts, retraction, branches and eviction, with freed slots poisoned.

On a GPU with the trained pair; on the CPU platform with the tiny one, where nothing runs ahead, but
which shows that the poison is found.
"""

from __future__ import annotations

import json
import time
import urllib.error
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sts_sglang.core import dumps
from sts_sglang.tools.demo import FACTS, MODELS, document, question
from sts_sglang.tools.local_server import LocalServer
from tests.forked import Forked
from tests.server import random_ids

pytestmark = pytest.mark.server

CHAIN = ["--speculative-algorithm", "STANDALONE", "--speculative-num-steps", "3"]
CHAIN += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"]
MODULE = "tests.poisoned_history"
ENV = {"SGLANG_TEST_RETRACT": "1"}
BROKEN = {**ENV, "STS_TEST_NEVER_FORGET": "1"}
BRANCHES = 8  # requests over every prefix
NEW_TOKENS, ENDLESS = 32, 1000  # of a request, and of one that is aborted


def sts(draft: Path, **config) -> list[str]:
    config = {"keep": 0.1, "budget": 0, "sink": 4, "recent": 16, "draft": "dense", **config}
    return ["--attention-backend", "sts", "--sts-config", json.dumps(config), *CHAIN] + [
        "--speculative-draft-model-path",
        str(draft),
    ]


def ask(server: LocalServer, ids: list[int], rid: str | None = None, tokens: int = NEW_TOKENS) -> dict:
    params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return server.post("/generate", {"input_ids": ids, "sampling_params": params, "rid": rid})


def storm(server: LocalServer, prefixes: list[list[int]], turns: int = 2) -> list[dict]:
    """Branches of every prefix at once, a third of them aborted on the way; then another turn."""
    answers = []
    for turn in range(turns):
        prompts = [
            prefix + random_ids(20 + 7 * i, 1000 * turn + 50 * p + i)
            for i in range(BRANCHES)
            for p, prefix in enumerate(prefixes)
        ]
        with ThreadPoolExecutor(2 * len(prompts)) as pool:
            for n, ids in enumerate(prompts):
                rid, doomed = f"{turn}-{n}", n % 3 == 0
                answers.append(pool.submit(ask, server, ids, rid, ENDLESS if doomed else NEW_TOKENS))
                if doomed:
                    pool.submit(_abort, server, rid, answers[-1], 0.1 + 0.04 * n)
    return [found for answer in answers if (found := _answer(answer))]


def _abort(server: LocalServer, rid: str, answer: Future, delay: float) -> None:
    """Until it is gone: one that has not arrived yet is not found."""
    while not answer.done():
        time.sleep(delay)
        with suppress(OSError):
            server.post("/abort_request", {"rid": rid})


def _answer(answer: Future) -> dict | None:
    """None for a request that was aborted before it began."""
    try:
        return answer.result()
    except urllib.error.HTTPError:
        return None


def was_a_storm(answers: list[dict], server: LocalServer) -> None:
    """The traffic had what it is for."""
    reasons = [a["meta_info"]["finish_reason"]["type"] for a in answers]
    assert reasons.count("length") >= len(answers) // 3
    assert "abort" in reasons
    assert sum(a["meta_info"].get("num_retractions", 0) for a in answers) > 0
    assert sum(a["meta_info"].get("cached_tokens", 0) > 0 for a in answers) > len(answers) // 4
    assert server.sts()["poison"]["slots"] > 1000
    assert server.counters()["sparse_verifies"] > 100


def alone(server: LocalServer, prompts: list[list[int]]) -> list[list[int]]:
    """One after the other, each on an empty cache: all its slots are new, and the freed ones poisoned."""
    outputs = []
    for ids in prompts:
        server.flush()
        outputs.append(ask(server, ids)["output_ids"])
    return outputs


def start_all(stack: ExitStack, servers: dict[str, LocalServer]) -> dict[str, LocalServer]:
    """They start at the same time: processes run since they were made."""
    return {name: stack.enter_context(server) for name, server in servers.items()}


def inspect(server: LocalServer, ids: list[int]) -> None:
    """A dump, with nothing else running, knows the whole prompt and no more than a probability of it."""
    folder = Path(server.sts()["config"]["inspect_dir"])
    before = set(folder.glob("*.npz"))
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    params["custom_params"] = {"sts": {"inspect": True}}
    answer = server.post("/generate", {"input_ids": ids, "sampling_params": params})
    (path,) = set(folder.glob("*.npz")) - before
    dump = dumps.read(path)
    assert dump.tokens.tolist() == [*ids, *answer["output_ids"]][: len(dump.tokens)]
    known = dump.importance[:, 1 : len(ids)]
    assert (known >= 0).all() and 0.01 < known.max() < 1.01


def check(servers: dict[str, LocalServer], prefixes: list[list[int]]) -> None:
    poisoned = [name for name in servers if name != "off"]
    with ThreadPoolExecutor(len(poisoned)) as pool:
        answers = dict(zip(poisoned, pool.map(lambda n: storm(servers[n], prefixes), poisoned), strict=True))
    for name in ("warm", "blend"):
        was_a_storm(answers[name], servers[name])
    assert servers["broken"].sts()["poison"]["read"] > 0, "nobody notices the poison"
    # Nothing is inherited on an empty cache, so that `warm` must say what `off` says.
    prompts = [prefix + random_ids(24, 77) for prefix in prefixes]
    with ThreadPoolExecutor(2) as pool:
        outputs = pool.map(lambda name: alone(servers[name], prompts), ("warm", "off"))
        warm, off = outputs
    assert warm == off
    for name in ("warm", "blend"):
        assert servers[name].sts()["poison"]["read"] == 0
        assert servers[name].sts()["history_bytes_per_token"] > 4
    for name in ("warm", "off"):
        inspect(servers[name], prompts[0])
    for name, server in servers.items():
        assert "Traceback" not in server.log.read_text(), f"{name}: {server.log_tail()}"


@pytest.mark.gpu
def test_no_freed_slot_is_remembered_on_a_gpu(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    prefixes = [
        tokenizer(question(name, document(characters)))["input_ids"]
        for characters, name in zip((8000, 16000, 24000), FACTS, strict=True)
    ]
    # Room for a third of a storm: the rest waits, evicts, and retracts.
    args = ["--max-total-tokens", str(6 * max(map(len, prefixes))), "--max-running-requests", "12"]
    args += ["--context-length", "16384", "--mem-fraction-static", "0.85", "--skip-server-warmup"]
    args += ["--cuda-graph-max-bs", "12", "--cuda-graph-backend-prefill", "disabled", "--random-seed", "0"]
    args += ["--chunked-prefill-size", "2048", "--sleep-on-idle"]

    def server(name: str, env: dict, **config) -> LocalServer:
        flags = [*args, *sts(MODELS / "draft", inspect_dir=str(tmp_path), **config)]
        log = tmp_path / f"{name}.log"
        return LocalServer(MODELS / "target", log, *flags, env=env, start_seconds=240, module=MODULE)

    with ExitStack() as stack:
        servers = {
            "warm": server("warm", ENV, history="warm"),
            "blend": server("blend", ENV, history="blend"),
            "broken": server("broken", BROKEN, history="blend"),
            "off": server("off", {}),
        }
        check(start_all(stack, servers), prefixes)


def test_no_freed_slot_is_remembered_on_the_cpu(pair, tmp_path):
    prefixes = [random_ids(n, n) for n in (90, 150, 240)]
    args = ["--max-total-tokens", "1500", "--chunked-prefill-size", "128"]

    def server(name: str, env: dict, **config) -> LocalServer:
        flags = [*args, *sts(pair["draft"], inspect_dir=str(tmp_path), **config)]
        return Forked(pair["target"], tmp_path / f"{name}.log", *flags, env=env, module=MODULE)

    with ExitStack() as stack:
        servers = {
            "warm": server("warm", ENV, history="warm"),
            "blend": server("blend", ENV, history="blend"),
            "broken": server("broken", BROKEN, history="blend"),
            "off": server("off", {}),
        }
        check(start_all(stack, servers), prefixes)
