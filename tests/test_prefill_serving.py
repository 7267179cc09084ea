"""The real server with a sparse prefill, float32, greedy: it says what the oracle says, and its prefix cache
keeps what was prefilled sparsely from requests that want everything."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.forked import Forked
from tests.oracle import Oracle, Rule
from tests.server import Server, random_ids
from tests.test_alone import alone
from tests.test_hicache import HICACHE
from tests.test_serving import CHAIN, refusal, sts_server

torch.set_num_threads(1)  # the server has the other core
pytestmark = pytest.mark.server

KEEP = 0.25
# Chunks end within blocks. A prompt that has a server to itself is cut there.
CHUNKED = ("--chunked-prefill-size", "600", "--max-prefill-tokens", "600")
CUTS = (600, 1200)
# Room for five of the longest prompts, and the others on the host.
HOST = (*HICACHE, "--max-total-tokens", "9000")
PREFILL = {"prefill": "sparse", "prefill_keep": KEEP, "prefill_floor": 300}
# The same in whole pages.
PAGED = ("--page-size", "16", "--chunked-prefill-size", "592", "--max-prefill-tokens", "592")
PAGED_CUTS = (592, 1184)
CONFIG = {"keep": 1.0, "dense_layers": [2], **PREFILL}
RULE = Rule(keep=1.0, prefill_keep=KEEP, prefill_floor=300, cuts=CUTS)
ALONE = replace(RULE, selector="pages", dense_layers=(2,))
PROMPTS = [random_ids(n, 500 + n) for n in (1500, 1290, 420, 90)]
LONG = random_ids(1600, 7)
SHORT = random_ids(900, 77)
TURN = SHORT[:768] + random_ids(150, 78)


def asking(**params) -> dict:
    return {"sampling_params": {"custom_params": {"sts": params}}}


@pytest.fixture(scope="module")
def stock(pair, logs) -> list[list[int]]:
    """What SGLang's own attention says of LONG, of a branch of it, and of the prompts."""
    with Forked(pair["target"], logs / "prefill-stock.log") as server:
        return [server.generate(ids, 24)["output_ids"] for ids in (LONG, branch(), *PROMPTS)]


def branch() -> list[int]:
    """Leaves LONG where a block ends, so that the blocks of both are the same before that."""
    return LONG[:1408] + random_ids(330, 8)


@pytest.fixture(scope="module")
def sparse(pair, logs):
    args = (*CHUNKED, *HOST, "--enable-metrics")
    with alone(pair, logs, "prefill", CONFIG, *args, module="tests.hicache_on_cpu") as server:
        yield server


@pytest.fixture(scope="module")
def oracle(pair) -> Oracle:
    return Oracle(pair["target"])


def test_a_sparse_prefill_agrees_with_the_oracle(sparse, oracle, stock):
    answers = [sparse.generate(ids, 24)["output_ids"] for ids in PROMPTS]
    for tokens, ids in zip(answers, PROMPTS, strict=True):
        oracle.agree(tokens, ids, ALONE)
    assert answers != stock[2:]
    begun = [tokens[:12] for tokens in answers[:2]]
    for wrong in (
        {"prefill_keep": 0.4},
        {"prefill_keep": None},
        {"prefill_floor": 900},
        {"asked": 1},
        {"last_block": True},
        {"dense_layers": ()},
        {"cuts": ()},
    ):
        noticed = oracle.disagrees(begun, PROMPTS[:2], replace(ALONE, **wrong))
        assert noticed, f"the test does not notice {wrong}"
    counters = sparse.counters()
    ratio = counters["prefill_selected_blocks"] / counters["prefill_available_blocks"]
    assert KEEP < ratio < 0.7


@functools.cache
def agreed(oracle: Oracle, tokens: tuple[int, ...], ids: tuple[int, ...], rule: Rule) -> None:
    """Judged once, in whatever order requests come: an oracle takes seconds for prompts this long."""
    oracle.agree(list(tokens), list(ids), rule)


def cached(answer: dict) -> int:
    return answer["meta_info"]["cached_tokens"]


def ask(server: Server, ids: list[int], **extra) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt came from the cache."""
    answer = server.generate(ids, 24, **extra)
    return answer["output_ids"], cached(answer)


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_the_cache_keeps_kinds_apart(sparse, oracle, stock, first):
    """Whoever comes first: a dense prefill is stock's, and a sparse one the oracle's."""
    sparse.flush()
    kinds = {"sparse": {}, "dense": asking(prefill="dense"), "half": asking(prefill_keep=0.5)}
    order = [first, *(kind for kind in kinds if kind != first)]
    answers = {}
    for kind in order:
        answers[kind], hit = ask(sparse, LONG, **kinds[kind])
        assert hit == 0, f"{kind} was handed what another one left"
    agreed(oracle, tuple(answers["sparse"]), tuple(LONG), ALONE)
    agreed(oracle, tuple(answers["half"]), tuple(LONG), replace(ALONE, prefill_keep=0.5))
    assert answers["dense"] == stock[0]
    assert len({tuple(tokens) for tokens in answers.values()}) == 3
    for kind in order:  # its own kind shares
        tokens, hit = ask(sparse, LONG, **kinds[kind])
        assert tokens == answers[kind] and hit >= 1590
    tokens, hit = ask(sparse, branch(), **kinds["dense"])
    assert tokens == stock[1] and hit == 1408
    tokens, hit = ask(sparse, branch())
    assert hit == 1408
    agreed(oracle, tuple(tokens), tuple(branch()), ALONE)


def test_the_host_keeps_kinds_apart_too(sparse, oracle, stock):
    """What was evicted to the host comes back to those who asked for the like."""
    sparse.flush()
    kinds = {"sparse": {}, "dense": asking(prefill="dense")}
    answers = {kind: ask(sparse, LONG, **extra)[0] for kind, extra in kinds.items()}
    for seed in range(6):  # every slot gets another occupant
        sparse.generate(random_ids(1500, 700 + seed), 1)
    for kind, extra in kinds.items():
        answer = sparse.generate(LONG, 24, **extra)
        assert answer["meta_info"]["cached_tokens_details"]["host"] >= 1500, kind
        assert answer["output_ids"] == answers[kind]
    assert answers["dense"] == stock[0]
    oracle.agree(answers["sparse"], LONG, ALONE)


def test_a_request_s_own_key_is_respected(sparse):
    ids = random_ids(700, 61)
    assert ask(sparse, ids)[1] == 0
    for extra in ({"extra_key": "a"}, {"extra_key": "a", **asking(prefill="dense")}, {"extra_key": "b"}):
        assert ask(sparse, ids, **extra)[1] == 0, extra
        assert ask(sparse, ids, **extra)[1] >= 690, extra


def test_a_keep_of_one_is_a_dense_prefill(sparse):
    ids = random_ids(700, 62)
    tokens, _ = ask(sparse, ids, **asking(prefill_keep=1.0))
    again, hit = ask(sparse, ids, **asking(prefill="dense"))
    assert again == tokens and hit >= 690


def test_nonsense_is_a_400(sparse):
    for params, message in (
        ({"prefill": "half"}, "custom_params.sts.prefill"),
        ({"prefill_keep": 0}, "custom_params.sts.prefill_keep"),
        ({"prefill": "dense", "prefill_keep": 0.5}, "custom_params.sts.prefill_keep"),
    ):
        assert message in refusal(sparse.generate, PROMPTS[3], 4, **asking(**params))


def test_the_start_up_line_and_the_metrics_say_so(sparse):
    ask(sparse, random_ids(900, 63))
    assert "0.25 of the blocks of keys" in sparse.sts()["prefill"]
    assert sparse.counters()["prefill_selected_blocks"] > 0


def test_with_a_draft(pair, logs, stock):
    """Prompts at once, cut somewhere within their blocks; what a head reads of the target comes from a sparse
    prefill. Its own changes nothing: of a single layer nobody uses what rows make but that of the last."""
    algorithm, draft = "EAGLE3", "eagle3"
    config = {**PREFILL, "prefill_draft": "sparse", "keep": 0.1, "budget": 0, "sink": 2, "recent": 8}
    rule = replace(RULE, keep=0.1, sink=2, recent=8, cuts=PAGED_CUTS)
    oracle = Oracle(pair["target"], pair[draft])
    name = f"prefill-{algorithm}"
    args = (*CHAIN, *PAGED)
    with sts_server(pair, logs, name, algorithm, draft, config, *args) as server:
        for ids in PROMPTS:
            answer = server.generate(ids, 24)
            assert oracle.agree(answer["output_ids"], ids, rule).rounds == rounds_of(answer)
        assert reads_sparsely(server)
        dense = asking(prefill="dense", keep=1.0)
        together = server.generate_all([LONG, branch()], 24, **dense)
        assert [answer["output_ids"] for answer in together] == stock[:2]
        assert server.counters()["prefill_selected_blocks"] > 0


def rounds_of(answer: dict) -> int:
    return answer["meta_info"]["spec_verify_ct"]


def reads_sparsely(server: Server) -> bool:
    """Whether blocks were left out of the draft's own prefills so far."""
    counters = server.counters()
    selected, there = (counters[f"draft_prefill_{which}_blocks"] for which in ("selected", "available"))
    return 0 < selected < there


@pytest.mark.parametrize("by", ["draft", "target"])
def test_a_draft_that_is_prefilled_sparsely(pair, logs, stock, by):
    """It drafts what the oracle's does, which reads its prompt through the same masks, and so is as often
    right; where it reads first, what it says of the target's blocks comes from that too."""
    config = {**PREFILL, "prefill_by": by, "prefill_draft": "sparse", "keep": 0.1, "budget": 0}
    config |= {"sink": 2, "recent": 8}
    rule = replace(DRAFTED, prefill_by=by, prefill_draft=True)
    oracle, args = Oracle(pair["target"], pair["draft"]), (*CHAIN, *PAGED)
    with sts_server(pair, logs, f"prefill-sparse-{by}", "STANDALONE", "draft", config, *args) as server:
        answer = server.generate(SHORT, 16)
        assert oracle.agree(answer["output_ids"], SHORT, rule).rounds == rounds_of(answer)
        dense = oracle.generate(SHORT, 16, replace(rule, prefill_draft=False))
        found = answer["output_ids"], rounds_of(answer)
        assert (dense.tokens, dense.rounds) != found, "the test does not notice a dense draft"
        assert reads_sparsely(server)
        assert server.sts()["draft_prefill"].startswith("0.25 of the blocks of keys")
        if by == "draft":  # a turn behind a prefix that another prompt left
            tokens, hit = ask(server, TURN)
            assert hit == 768
            rule = replace(rule, cuts=(*PAGED_CUTS, 768), donor=(767, SHORT[768]))
            oracle.agree(tokens[:12], TURN, rule)
        whole = asking(prefill="dense", keep=1.0)
        together = server.generate_all([LONG, branch()], 24, **whole)
        assert [answer["output_ids"] for answer in together] == stock[:2]


@pytest.fixture(scope="module")
def by_draft(pair, logs):  # noqa: F811
    config = {**PREFILL, "prefill_by": "draft", "keep": 0.1, "budget": 0, "sink": 2, "recent": 8}
    args = (*CHAIN, *PAGED, "--enable-metrics")
    with sts_server(pair, logs, "prefill-draft", "STANDALONE", "draft", config, *args) as server:
        yield server


DRAFTED = replace(RULE, keep=0.1, sink=2, recent=8, prefill_by="draft", cuts=PAGED_CUTS)


def test_a_draft_that_reads_first_selects_as_the_oracle_says(by_draft, pair):  # noqa: F811
    """And drafts from what it would have read afterwards: it is as often right."""
    oracle = Oracle(pair["target"], pair["draft"])
    answers = [by_draft.generate(ids, 16) for ids in PROMPTS[:3]]
    for answer, ids in zip(answers, PROMPTS, strict=False):
        trace = oracle.agree(answer["output_ids"], ids, DRAFTED)
        assert answer["meta_info"]["spec_verify_ct"] == trace.rounds
    for wrong in ({"prefill_by": "target"}, {"prefill_shift": 64}, {"swap_heads": True}, {"cuts": ()}):
        rule = replace(DRAFTED, **wrong)
        noticed = any(
            oracle.generate(ids, 12, rule).tokens != answer["output_ids"][:12]
            for answer, ids in zip(answers[:2], PROMPTS, strict=False)
        )
        assert noticed, f"the test does not notice {wrong}"
    assert "by the draft's attention" in by_draft.sts()["prefill"]
    assert by_draft.counters()["prefill_selected_blocks"] > 0


def test_what_the_draft_reads_first_it_reads_as_ever(by_draft, stock):
    """Who wants everything gets stock's answer, alone and beside prompts for which the draft reads first, and
    its draft is as often right."""
    dense = asking(prefill="dense", keep=1.0)
    rounds = []
    for beside in ([], [random_ids(n, n) for n in (1000, 1350, 700)]):
        by_draft.flush()
        bodies = [(LONG, dense), (branch(), dense), *((ids, {}) for ids in beside)]
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: by_draft.generate(body[0], 24, **body[1]), bodies))
        assert [answer["output_ids"] for answer in answers[:2]] == stock[:2]
        rounds.append([answer["meta_info"]["spec_verify_ct"] for answer in answers[:2]])
    assert rounds[0] == rounds[1]


def test_prefixes_of_prompts_that_the_draft_selected_for(by_draft, pair):  # noqa: F811
    """Shared with their like alone; a turn behind them selects from where it begins."""
    oracle = Oracle(pair["target"], pair["draft"])
    by_draft.flush()
    assert ask(by_draft, LONG)[1] == 0 and ask(by_draft, LONG, **asking(prefill="dense"))[1] == 0
    tokens, hit = ask(by_draft, branch())
    assert hit == 1408
    # What its first key is about is what the prompt before went on with.
    rule = replace(DRAFTED, cuts=(*PAGED_CUTS, 1408), donor=(1407, LONG[1408]))
    oracle.agree(tokens[:12], branch(), rule)
    kept = asking(prefill_keep=1.0, keep=1.0)
    assert ask(by_draft, LONG, **kept)[1] >= 1584  # as a dense prefill
