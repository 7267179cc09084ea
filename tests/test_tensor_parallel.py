"""Ranks of a tensor-parallel launch: their part of a head map, what they say together, and the real server on
two of them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from sts_kernels.layout import Count
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core import dumps
from sts_sglang.core.ranks import ALONE, OF_REQUESTS, Ranks
from sts_sglang.headmap import HeadCounts, load, of_config, proportional
from tests.forked import Forked
from tests.oracle import Oracle, Rule
from tests.server import Server, logged, random_ids
from tests.test_serving import CHAIN, LEAK, SHAPES, TREE, Whole, scenario, spread_rule

torch.set_num_threads(1)

PAIRS = [
    (HeadCounts(4, 8, 4), HeadCounts(2, 8, 2), 2),
    (HeadCounts(4, 32, 8), HeadCounts(1, 32, 8), 8),
    (HeadCounts(3, 8, 2), HeadCounts(2, 4, 1), 4),  # ranks share KV heads
    (HeadCounts(2, 16, 4), HeadCounts(2, 4, 4), 4),
]


@pytest.mark.parametrize(("target", "draft", "ranks"), PAIRS)
def test_proportional_maps_ask_no_head_of_another_rank(target, draft, ranks) -> None:
    """A rank's map, put back where its heads are, is the whole map as far as the rank has its draft heads."""
    whole, group = proportional(target, draft), draft.q_heads // ranks
    for rank in range(ranks):
        own = whole.of_rank(rank, ranks, target, draft)
        heads = target.of_rank(ranks).kv_heads
        for layer in range(target.layers):
            assert len(own.sources[layer]) == heads
            for i, sources in enumerate(own.sources[layer]):
                of_all = set(whole.sources[layer][rank * target.kv_heads // ranks + i])
                back = {(at, head + rank * group) for at, head in sources}
                mine = {s for s in of_all if s[1] // group == rank}
                assert back == mine != set()
                assert mine == of_all or target.kv_heads < ranks


def test_a_budget_is_split_over_the_heads_of_all_ranks() -> None:
    target, draft = HeadCounts(2, 8, 4), HeadCounts(1, 4, 4)
    shares = ((0.5, 1.0, 2.0, 0.5), (1.0, 1.0, 1.5, 0.5))
    whole = replace(proportional(target, draft), shares=shares)
    by_head = {}
    for rank in range(2):
        own = whole.of_rank(rank, 2, target, draft)
        for layer in range(2):
            for i, channel in enumerate(own.head_channels(layer)):
                by_head[layer, rank * 2 + i] = [parts[channel] for parts in own.split()]
    for layer in range(2):
        for head, channel in enumerate(whole.head_channels(layer)):
            assert by_head[layer, head] == pytest.approx([parts[channel] for parts in whole.split()])


def write_map(folder: Path, tp: int, sources: list) -> str:
    counts = {"target": HeadCounts(1, 4, 2)._asdict(), "draft": HeadCounts(1, 4, 2)._asdict()}
    path = folder / "map.json"
    path.write_text(json.dumps({"version": 1, "shift": 1, "tp": tp, **counts, "sources": [sources]}))
    return str(path)


def test_a_map_says_its_ranks_and_is_refused_with_others(tmp_path) -> None:
    counts = HeadCounts(1, 4, 2), HeadCounts(1, 4, 2)
    path = write_map(tmp_path, 2, [[[0, 1]], [[0, 2], [0, 3]]])
    found = of_config(StsConfig(head_map=path), *counts, tp=2)
    assert [found.of_rank(rank, 2, *counts).sources[0] for rank in range(2)] == [
        (((0, 1),),),
        (((0, 0), (0, 1)),),
    ]
    for tp in (1, 4):
        with pytest.raises(ConfigError, match=f"head_map.tp: got 2; allowed: {tp}"):
            load(path, *counts, tp=tp)


@pytest.mark.parametrize(("target", "draft", "tp"), PAIRS)
def test_the_ranks_of_a_head_are_those_that_number_it(target, draft, tp) -> None:
    found = [[rank for rank in range(tp) if rank in target.ranks_of(h, tp)] for h in range(target.kv_heads)]
    own = target.of_rank(tp).kv_heads
    firsts = [rank * target.kv_heads // tp for rank in range(tp)]
    assert found == [
        [r for r, first in enumerate(firsts) if first <= h < first + own] for h in range(target.kv_heads)
    ]
    assert target.shared_evenly(tp) and not target.shared_evenly(7)


@pytest.mark.parametrize(
    ("tp", "sources", "named"),
    [
        (
            2,
            [[[0, 2]], [[0, 3]]],
            r"sources\[0\]\[0\]: got draft heads \[2\] with tp 2; allowed: heads of \[0..1\]",
        ),
        (2, [[[0, 1], [0, 2]], [[0, 3]]], r"sources\[0\]\[0\]: .*allowed: heads of \[0..1\]"),
        (4, [[[0, 0]], "latest"], r"sources\[0\]\[0\]: .*allowed: heads of \[0..0\] and \[1..1\]"),
    ],
)
def test_a_map_that_asks_heads_of_another_rank_is_refused(tmp_path, tp, sources, named) -> None:
    with pytest.raises(ConfigError, match=named):
        load(write_map(tmp_path, tp, sources), HeadCounts(1, 4, 2), HeadCounts(1, 4, 2), tp=tp)


def meet(rank: int, folder: str) -> None:
    """What two ranks say together; in a process each."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    ranks = Ranks(rank, 2, torch.distributed.group.WORLD)
    totals = torch.arange(len(Count)) + 10 * rank
    rows = torch.full((1 + rank, 3), float(rank))
    whole, gathered = ranks.whole(totals), ranks.gather(rows)
    torch.save({"whole": whole, "gathered": gathered}, f"{folder}/{rank}.pt")


def test_ranks_add_up_tokens_and_agree_on_verifies(tmp_path) -> None:
    multiprocessing.spawn(meet, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["whole"], second["whole"])
    expected = [10 + 2 * count for count in Count]
    expected[Count.SPARSE_VERIFIES] = int(Count.SPARSE_VERIFIES)  # on every rank
    for count in set(OF_REQUESTS) - {Count.SPARSE_VERIFIES}:
        expected[count] = 10 + int(count)  # on any
    assert first["whole"].tolist() == expected
    assert [rows.tolist() for rows in first["gathered"]] == [[[0.0] * 3], [[1.0] * 3] * 2]
    assert second["gathered"] is None
    assert ALONE.whole(first["whole"]) is first["whole"] and len(ALONE.gather(torch.ones(2, 2))) == 1


@contextmanager
def on_two(pair, logs, name: str, config: dict, *args: str):
    log = logs / f"tp-{name}.log"
    given = ("--tp-size", "2", "--attention-backend", "sts", "--sts-config", json.dumps(config), *args)
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|0"}  # else SGLang wants a NUMA node a rank
    with Forked(pair["target"], log, *given, env=env, module="tests.tp_on_cpu") as server:
        yield server
    assert not LEAK.search(logged(log)), server.log_tail()


PROMPTS = [random_ids(n, 100 + n) for n in (150, 260, 333, 91)]


def check_whole(server: Server, traces: list) -> None:
    """Counters are of all heads, whatever rank has them."""
    counters = server.counters()
    assert server.sts()["ranks"] == 2
    assert counters["dense_verifies"] == 0
    assert counters["selected_tokens"] == sum(t.selected for t in traces)
    assert counters["available_tokens"] == sum(t.available for t in traces)


@pytest.mark.server
@pytest.mark.parametrize(
    ("algorithm", "model", "shape", "mode"),
    [("STANDALONE", "draft", TREE, "dense"), ("EAGLE3", "eagle3", CHAIN, "all")],
    ids=["standalone-tree", "eagle3-chain"],
)
def test_two_ranks_draft_and_verify_as_one(pair, logs, reference, algorithm, model, shape, mode):
    """With what the draft attends to by default."""
    config = {"keep": 0.1, "budget": 0, "sink": 2, "recent": 8}
    rule, oracle = Rule(keep=0.1, sink=2, recent=8, **SHAPES[shape]), Oracle(pair["target"], pair[model])
    rule = spread_rule(replace(rule, draft=mode), algorithm)
    draft = ("--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(pair[model]))
    with on_two(pair, logs, model, config, *draft, *shape, "--enable-metrics") as server:
        answers = server.generate_all(PROMPTS, 32)
        traces = [oracle.agree(a["output_ids"], ids, rule) for a, ids in zip(answers, PROMPTS, strict=True)]
        check_whole(server, traces)
        assert scenario(Whole(server)) == reference["outputs"]
        metrics = server.get("/metrics").decode().splitlines()
        published = [
            float(line.split()[-1]) for line in metrics if line.startswith("sts:sparse_verifies_total")
        ]
        assert len(published) == 1 and 0 < published[0] <= server.counters()["sparse_verifies"]


@pytest.mark.server
def test_two_ranks_decode_without_a_draft_and_dump_the_heads_of_both(pair, logs, tmp_path):
    config = {"keep": 0.3, "budget": 0, "sink": 2, "recent": 8, "inspect_dir": str(tmp_path)}
    rule, oracle = Rule(keep=0.3, sink=2, recent=8, selector="pages"), Oracle(pair["target"])
    with on_two(pair, logs, "alone", config, "--disable-overlap-schedule") as server:
        answers = server.generate_all(PROMPTS, 24)
        traces = [oracle.agree(a["output_ids"], ids, rule) for a, ids in zip(answers, PROMPTS, strict=True)]
        check_whole(server, traces)
        params = {"custom_params": {"sts": {"inspect": True}}}
        server.generate(PROMPTS[1], 8, sampling_params=params)
    (path,) = tmp_path.glob("*.npz")
    dump = dumps.read(path)
    assert dump.channels.tolist() == [[layer, 4 + layer] for layer in range(4)]
    assert len(dump.importance) == 8 and (dump.importance[:, :256] > 0).all()
