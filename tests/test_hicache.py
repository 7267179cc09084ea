"""History with SGLang's HiRadixCache: what the host brings back is unknown, and learned again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.forked import Forked
from tests.oracle import Oracle, Rule
from tests.server import logged, random_ids

torch.set_num_threads(1)  # the server has the other core
pytestmark = pytest.mark.server

CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
CHAIN += ("--speculative-num-draft-tokens", "4")
# Of io backends and layouts, those whose one op tests/hicache_on_cpu.py supplies.
HICACHE = ("--enable-hierarchical-cache", "--hicache-io-backend", "direct")
HICACHE += ("--hicache-mem-layout", "layer_first", "--hicache-write-policy", "write_through")
HICACHE += ("--hicache-ratio", "4", "--max-total-tokens", "1200")


def test_loaded_slots_are_unknown_and_learned_again(pair, tmp_path):
    """With weight 1 a score that is remembered decides alone, so one stale slot changes the selection."""
    config = {"keep": 0.1, "budget": 0, "sink": 2, "recent": 8, "history": "blend", "history_weight": 1.0}
    rule = Rule(keep=0.1, sink=2, recent=8, history="blend", history_weight=1.0)
    args = ["--attention-backend", "sts", "--sts-config", json.dumps(config), *CHAIN, *HICACHE]
    args += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(pair["draft"])]
    prompt, oracle = random_ids(400, 31), Oracle(pair["target"], pair["draft"])
    server = Forked(pair["target"], tmp_path / "hicache.log", *args, module="tests.hicache_on_cpu")
    with server:
        first = server.generate(prompt, 24)
        learned = oracle.agree(first["output_ids"], prompt, rule).memory
        for seed in range(4):  # every slot gets another occupant, who leaves memory there
            server.generate(random_ids(600, 100 + seed), 24)
        turn = prompt + random_ids(30, 32)
        second = server.generate(turn, 24)
        assert second["meta_info"]["cached_tokens_details"] == {"device": 0, "host": len(prompt)}
        hit = replace(rule, donor=(len(prompt) - 1, first["output_ids"][0]))
        trace = oracle.agree(second["output_ids"], turn, hit)
        kept = {key: value for key, value in learned.items() if key[2] < len(prompt)}
        assert oracle.generate(turn, 24, hit, kept).tokens != trace.tokens, "memory would not be noticed"
        branch = prompt + random_ids(30, 33)
        third = server.generate(branch, 24)
        assert third["meta_info"]["cached_tokens_details"] == {"device": len(prompt), "host": 0}
        inherited = {key: value for key, value in trace.memory.items() if key[2] < len(prompt)}
        oracle.agree(third["output_ids"], branch, hit, inherited)
    assert "Traceback" not in logged(tmp_path / "hicache.log")
