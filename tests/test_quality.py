"""The quality harness: items, forced text, intervals, the report, and a short real run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality import __main__ as command
from benchmarks.quality import items, measure, report
from benchmarks.quality.arms import ALONE, ARMS, Dense, Plan, sts_config
from benchmarks.quality.cells import packed, unpacked
from sts_sglang import headmap
from sts_sglang.config import StsConfig, check_request, request_prefill
from sts_sglang.evaluate import asking, stats
from sts_sglang.evaluate.items import TooShort
from sts_sglang.evaluate.pair import Alone, Pair
from sts_sglang.host.forced import ForcedText
from sts_sglang.tools.demo import MODELS
from sts_sglang.tools.tiny_pair import make_pair
from tests.forked import Forked
from tests.server import random_ids

DENSELY, SPARSELY = {"prefill": "dense"}, {"prefill": "sparse", "prefill_keep": 0.25}


@pytest.fixture(scope="module")
def writer() -> items.Writer:
    return items.unseen_writer(MODELS / "target")[0]


@pytest.mark.parametrize("name", items.TASKS)
def test_an_item_has_its_length_and_hides_what_is_asked(writer, name):
    made = [items.item(writer, name, 2048, i) for i in range(3)]
    for item in made:
        assert len(item.ids) == 2048 - items.ROOM
        text = writer.tok.decode(item.ids, skip_special_tokens=False)
        assert all(value in text for value in item.question.values)
        assert text.endswith("<|assistant|>") and item.question.ask in text
    assert made[2].ids == items.item(writer, name, 2048, 2).ids != made[1].ids


@pytest.mark.parametrize("task, length", [("multi_key", 768), ("shared", 768), ("text", 65)])
def test_what_does_not_fit_ends_before_a_server_starts(monkeypatch, task, length, tmp_path):
    monkeypatch.setattr(command, "run_arm", lambda *_: pytest.fail("an arm was asked"))
    flag = "--text-lengths" if task == "text" else "--lengths"
    given = ["--quick", "--device", "cpu", "--tasks", task, flag, str(length), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"^{flag}: {task} does not fit into {length} tokens"):
        command.main(given)
    assert not (tmp_path / "out").exists()


def test_texts_too_short_for_a_length_are_said_in_a_line(tmp_path):
    """In plain words: an item's texts are the user's."""
    plan = planned("--device", "cpu", "--tasks", "single", "--lengths", "2048")
    suite = SimpleNamespace(make=raiser(TooShort("99 tokens")), documents=lambda task, items: items)
    with pytest.raises(SystemExit, match="^--text: single of 2048 tokens: 99 tokens$"):
        command.check_room(plan, suite)


def raiser(error: Exception):
    def made(*_):
        raise error

    return made


def test_needles_go_through_the_depths(writer):
    depths = [items.item(writer, "single", 2048, i).depth for i in (0, 5, 10)]
    assert depths[0] < 0.1 and 0.4 < depths[1] < 0.6 and depths[2] > 0.9


def test_shared_documents_have_room_for_their_turns(writer):
    made = items.shared(writer, 2048, 0)
    assert len(made.document) == 2048 - items.TURNS * items.ROOM
    assert len(made.turns) == len(made.alone) == items.TURNS
    text = writer.tok.decode(made.document, skip_special_tokens=False)
    for question, asked in (*made.turns, *made.alone):
        assert all(value in text for value in question.values)
        assert writer.tok.decode(asked).find(question.ask) >= 0
    asks = {question.ask for question, _ in (*made.turns, *made.alone)}
    assert len(asks) == 2 * items.TURNS


def test_a_forced_token_is_the_argmax_and_its_logprob_survives():
    torch.manual_seed(0)
    vocab, tokens = 70, [31, 0, 69]
    grammar = ForcedText(tokens)
    logits, mask = torch.randn(4, vocab), grammar.allocate_vocab_mask(vocab, 4, "cpu")
    for row, token in enumerate(tokens):
        grammar.fill_vocab_mask(mask, row)
        grammar.accept_token(token)
    grammar.fill_vocab_mask(mask, 3)  # past the end: free
    expected, free = logits.log_softmax(-1), logits[3].clone()
    grammar.apply_vocab_mask(logits=logits, vocab_mask=mask)
    assert logits[:3].argmax(-1).tolist() == tokens
    assert torch.equal(logits[3], free)
    answer = logits[:3].log_softmax(-1).topk(2)
    top = [
        list(zip(v, i, strict=True))
        for v, i in zip(answer.values.tolist(), answer.indices.tolist(), strict=True)
    ]
    found = asking.forced_logprobs({"output_top_logprobs": top})
    assert found == pytest.approx([float(expected[r, t]) for r, t in enumerate(tokens)], abs=1e-5)


def test_a_forced_text_refuses_another_token_and_rolls_back():
    grammar = ForcedText([5, 6])
    grammar.accept_token(5)
    grammar.rollback(1)
    with pytest.raises(ValueError, match="where 5 was forced"):
        grammar.accept_token(6)


def test_interval_of_known_data():
    rng = np.random.default_rng(1)
    values = rng.normal(0.3, 1.0, 400)
    found = stats.interval(list(values))
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert stats.interval(list(values)) == found, "seeded"
    assert found.excludes_zero and not stats.interval([-1.0, 1.0] * 50).excludes_zero


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    rng = np.random.default_rng(2)
    found = [stats.interval(list(rng.binomial(1, 0.2, 150) - 0.2), seed=i) for i in range(150)]
    assert 0.89 <= np.mean([f.low <= 0 <= f.high for f in found]) <= 0.99


def test_items_of_a_document_are_resampled_together():
    """Four equal answers about each document are one observation, not four."""
    rng = np.random.default_rng(3)
    by_document = rng.normal(0, 1, 50)
    values, groups = np.repeat(by_document, 4), np.repeat(np.arange(50), 4)
    together, alone = stats.interval(values, groups), stats.interval(by_document)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_a_mean_over_tasks_weighs_them_equally():
    found = stats.macro_interval([([1.0] * 300, range(300)), ([0.0] * 10, range(10))])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_few_documents_are_never_called_significant():
    assert not stats.interval([-1.0] * 8, [0] * 8).excludes_zero
    assert stats.interval([-1.0] * stats.ENOUGH).excludes_zero


def cell(arm: str, task: str, keep: float, score: list[float], out: str = "a") -> dict:
    n = len(score)
    columns = {"group": list(range(n)), "depth": [i / n for i in range(n)], "score": score}
    columns |= {"tokens": [21] * n, "rounds": [8 if keep < 1 else 5] * n, "out": [out] * n}
    return {"arm": arm, "task": task, "length": 4096, "keep": keep, **columns, "counters": {}, "seconds": 1.0}


@pytest.fixture
def small_results(tmp_path) -> Path:
    """Dense is always right; sts loses a quarter of `qa` at keep 10 %, quest half of everything."""
    hit, quarter, half = [1.0] * 40, [0.0] * 10 + [1.0] * 30, [0.0, 1.0] * 20
    lost = {"sts": {"single": hit, "qa": quarter}, "quest": {"single": half, "qa": half}}
    head = {"about": "x", "sts": {"head_map": "m", "kernel": "torch"}, "device": "CPU", "dtype": "float32"}
    head |= {"items": 40, "text": "t", "commit": "c", "torch": "2", "python": "3"}
    head["models"] = {"target": {"weights": "w" * 64}, "draft": {"weights": "v" * 64}}
    for arm, tasks in lost.items():
        rows = [{"arm": arm, **head}]
        for task, score in tasks.items():
            rows += [cell(arm, task, 0.1, score, out=arm), cell(arm, task, 1.0, hit)]
        rows += [cell(arm, "text", 0.1, [-1.02] * 40), cell(arm, "text", 1.0, [-1.0] * 40)]
        (tmp_path / f"{arm}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_report_of_a_small_file(small_results):
    report.write(small_results)
    text = (small_results / "report.md").read_text()
    assert (small_results / "pareto.png").stat().st_size > 5000
    lines = [line for line in text.splitlines() if line.startswith("| sts | 10 %")]
    # Mean of 100 and 75; its interval; the worst task; 20 tokens in 8 rounds instead of 5.
    assert "| 87.5 | **-12.5 [" in lines[0] and "qa **-25.0 [" in lines[0] and "2.50 (-1.50)" in lines[0]
    assert "| quest | **+37.5 [" in text, "sts minus quest"
    assert "| 4096 | sts | 10 % | 1.020 (1.000) | **+2.00 [+2.00, +2.00]** |" in text
    assert "| 0 to 20 % | 16 | 100.0 | 50.0 | 50.0 |" in text
    assert "Some cells have 40 items, so that intervals are wide." in text
    assert "| keep 10 %: every task within 5 | qa **-25.0" in text
    aims = {
        line.split(" | ")[0][2:]: line.endswith("| yes |")
        for line in text.splitlines()
        if "| keep 10 %: " in line
    }
    assert aims["keep 10 %: ahead of quest"] and not aims["keep 10 %: mean within 1 point of dense"]
    assert not aims["keep 10 %: loss of text within 1 %"]
    assert not aims["keep 10 %: loss of text ahead of quest"]
    assert "| 4096 | quest | +0.00 [+0.00, +0.00] |" in text, "loss, sts minus quest"


@pytest.mark.parametrize(
    "items, said", [(19, "first look: some cells have 19 items"), (20, "Some cells have 20"), (100, "")]
)
def test_few_items_are_said(items, said):
    """No conclusion below what a verdict needs; from there on intervals say what is known."""
    text = report.few(SimpleNamespace(cells={"a": {"score": [1.0] * items}, "b": {"score": [1.0] * 200}}))
    assert said in text and bool(said) == bool(text)
    assert ("No conclusion" in text) == (items < stats.ENOUGH)


def test_report_of_a_run_that_was_cut_off(small_results):
    """What both were asked is compared, and the table says that it is a part."""
    path = small_results / "quest.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row) for row in rows if row.get("task") not in ("qa", "text")))
    report.write(small_results)
    text = (small_results / "report.md").read_text()
    assert "| quest (1 of 2 tasks) | **+50.0 [" in text
    assert "| quest (1 of 2 tasks) | 10 % | 50.0 | **-50.0 [" in text
    assert "loss of text ahead of quest" not in text
    assert "| 0 to 20 % | 16 | 100.0 | 50.0 |" in text, "sts alone by depth"


def test_report_of_servers_that_attend_to_everything(small_results):
    """`--arms stock dense`: nothing but parity."""
    for path in small_results.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(row) for row in rows if row.get("keep", 1.0) == 1.0))
    report.write(small_results)
    text = (small_results / "report.md").read_text()
    assert "equal outputs" in text and "against dense |" not in text


def test_a_file_of_another_run_is_not_gone_on_with(small_results):
    path = small_results / "sts.jsonl"
    same = {"device": "CPU", "items": 40}
    assert measure.finished(path, same) == {("single", 4096), ("qa", 4096), ("text", 4096)}
    assert measure.finished(small_results / "none.jsonl", same) == set()
    with pytest.raises(SystemExit, match="has other device"):
        measure.finished(path, {**same, "device": "H100"})


def test_report_refuses_different_items(small_results):
    path = small_results / "quest.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["group"] = rows[1]["group"][::-1]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match="not asked the same items"):
        report.write(small_results)
    rows[0]["text"] = "another"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match="with different text"):
        report.write(small_results)


@pytest.mark.parametrize(
    ("arm", "keep", "counters", "ok"),
    [
        ("sts", 0.1, (5, 0, 10, 100, 0), True),
        ("sts", 0.1, (0, 0, 0, 0, 0), False),
        ("sts", 0.1, (5, 1, 10, 100, 0), False),
        ("sts", 0.1, (5, 0, 100, 100, 0), False),
        ("sts", 1.0, (5, 0, 100, 100, 0), True),
        ("sts", 1.0, (5, 0, 10, 100, 0), False),
        ("dense", 1.0, (0, 0, 100, 100, 5), True),
        ("dense", 1.0, (5, 0, 100, 100, 0), False),
        ("sts-full4", 0.1, (5, 0, 30, 100, 1), True),
        ("sts-full4", 0.1, (5, 0, 30, 100, 0), False),
    ],
)
def test_results_of_other_verifies_are_refused(arm, keep, counters, ok):
    checked(arm, keep, (*counters, 0, 0), None if ok else "verified")


@pytest.mark.parametrize(
    ("arm", "keep", "verifies", "blocks", "problem"),
    [
        ("prefill", 0.25, (100, 100), (30, 100), None),
        ("prefill", 0.25, (100, 100), (100, 100), "prefilled"),
        ("prefill", 0.25, (100, 100), (0, 0), "prefilled"),
        ("prefill", 0.25, (25, 100), (30, 100), "verified"),
        ("prefill", 1.0, (100, 100), (0, 0), None),
        ("prefill", 1.0, (100, 100), (100, 100), "prefilled"),
        ("prefill", 1.0, (25, 100), (0, 0), "verified"),
        ("prefill-verify", 0.25, (10, 100), (30, 100), None),
        ("prefill-verify", 0.25, (100, 100), (30, 100), "verified"),
        ("prefill-verify", 1.0, (100, 100), (0, 0), None),
        ("sts", 0.25, (25, 100), (30, 100), "prefilled"),
        ("dense", 1.0, (100, 100), (30, 100), "prefilled"),
    ],
)
def test_results_of_other_prefills_are_refused(arm, keep, verifies, blocks, problem):
    sparse, full = (0, 1) if arm == "dense" else (5, 0)
    checked(arm, keep, (sparse, 0, *verifies, full, *blocks), problem)


@pytest.mark.parametrize(
    ("keep", "of_draft", "problem"),
    [(0.25, (30, 100), None), (0.25, (0, 0), "prefilled"), (0.25, (9, 9), "prefilled"), (1.0, (0, 0), None)],
)
def test_an_arm_s_draft_is_prefilled_as_it_says(keep, of_draft, problem):
    blocks = (0, 0) if keep == 1.0 else (30, 100)
    checked("prefill-draft-sparse", keep, (5, 0, 100, 100, 0, *blocks, *of_draft), problem)


def checked(arm: str, keep: float, counters: tuple[int, ...], problem: str | None) -> None:
    names = ("sparse_verifies", "dense_verifies", "selected_tokens", "available_tokens", "full_verifies")
    names += ("prefill_selected_blocks", "prefill_available_blocks")
    names += ("draft_prefill_selected_blocks", "draft_prefill_available_blocks")
    counters = (*counters, 0, 0)[: len(names)]
    found = asking.Cell(arm, "single", 4096, keep, counters=dict(zip(names, counters, strict=True)))
    if problem is None:
        measure.check_sparse(found, ARMS[arm])
    else:
        with pytest.raises(SystemExit, match=f"{arm} single 4096 keep {keep}: {problem} as"):
            measure.check_sparse(found, ARMS[arm])


class Recorded:
    """A server that notes what it is asked for."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []

    def post(self, path: str, body: dict, timeout: float) -> dict:
        self.bodies.append(body)
        return {"meta_info": {"completion_tokens": 1}, "output_ids": [1], "text": "", "path": path}


@pytest.mark.parametrize(
    ("arm", "sparse", "dense"),
    [
        ("sts", {"keep": 0.25}, {"keep": 1.0}),
        ("prefill", {"keep": 1.0, **SPARSELY}, {"keep": 1.0, **DENSELY}),
        ("prefill-verify", {"keep": 0.1, **SPARSELY}, {"keep": 1.0, **DENSELY}),
    ],
)
def test_an_arm_says_what_its_keeps_ask_for(arm, sparse, dense):
    """And its server allows it; dense is a dense prefill and whole verifies in all arms."""
    server = Recorded()
    client = asking.Client(server, ARMS[arm].sweep)
    for keep in (0.25, 1.0):
        client.generate([1, 2], keep, 1)
    asked = [body["sampling_params"]["custom_params"] for body in server.bodies]
    assert asked == [{"sts": sparse}, {"sts": dense}]
    config = StsConfig.parse({"keep": 0.5, **ARMS[arm].config})
    for params in asked:
        check_request(params, config)
    assert request_prefill(asked[0], config) == sparse.get("prefill_keep")
    assert request_prefill(asked[1], config) is None


def test_stock_is_asked_for_nothing():
    server = Recorded()
    asking.Client(server, None).generate([1], 0.5, 1)
    assert "custom_params" not in server.bodies[0]["sampling_params"]


def test_arms_of_ones_own_sweep_their_prefill_where_it_is_sparse(writer):
    given = {
        "whole": {"prefill": "sparse", "prefill_floor": 0},
        "served": {"prefill": "sparse", "keep": 0.2},
        "auto": {"prefill": "sparse", "keep": "auto"},
        "verify": {"keep": 0.2},
    }
    more = [word for name, config in given.items() for word in ("--arm", f"{name}={json.dumps(config)}")]
    arms = planned("--device", "cpu", *more).arms
    found = {name: arms[name].sweep.named().get("verify") for name in given}
    assert found == {"whole": 1.0, "served": 0.2, "auto": 0.1, "verify": None}
    with pytest.raises(SystemExit, match="--sts-config: prefill is said by an arm"):
        planned("--sts-config", '{"prefill": "sparse"}')


def test_a_draft_that_reads_first_is_an_arm_of_standalone_alone(writer):
    for algorithm, there in (("STANDALONE", True), ("EAGLE3", False), ("NONE", False)):
        arms = planned("--algorithm", algorithm, "--device", "cpu").arms
        assert ({"prefill-draft", "prefill-draft-sparse"} & set(arms) != set()) == there
        assert {"prefill", "prefill-verify"} <= set(arms)


def test_the_report_tells_keeps_of_prompts_from_those_of_verifies(small_results):
    """Beside sts, which is not compared with them, and alone."""
    path = small_results / "quest.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"own": True, **ARMS["prefill-verify"].sweep.named()}
    path.write_text("\n".join(json.dumps({**row, "arm": "mine"}) for row in rows))
    report.write(small_results)
    text = (small_results / "report.md").read_text()
    assert text.startswith("# Quality of sparse verify and prefill, by")
    assert "In `mine` (10 %) a keep is the share of blocks of keys that prompts attend to" in text
    assert "| mine | 10 % | 50.0 | **-50.0 [" in text and "| mine | **+37.5" not in text
    assert "| mine, keep 10 %: mean within 1 point of dense | **-50.0 [" in text
    assert "| mine, keep 10 %: loss of text within 1 % | **+2.00 [+2.00, +2.00]** | no |" in text
    (small_results / "sts.jsonl").unlink()
    report.write(small_results)
    text = (small_results / "report.md").read_text()
    assert text.startswith("# Quality of sparse prefill, by") and "sts" not in text
    assert "| single | 40 | 100.0 | **-50.0 [" in text, "dense is its own"
    assert "| 0 to 20 % | 16 | 100.0 | 50.0 |" in text


def test_help_names_every_arm_and_quick_is_small(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ARMS) and "--quick" in text
    plan = planned("--quick", "--items", "2", "--device", "cpu")
    assert (plan.items, plan.lengths, plan.device) == (2, tuple(command.QUICK["lengths"]), "cpu")
    assert plan.pair == Pair(str(MODELS / "target"), str(MODELS / "draft"), "STANDALONE")
    with pytest.raises(SystemExit, match="--keeps"):
        planned("--keeps", "0.7")


def planned(*argv: str) -> Plan:
    options = command.parse(list(argv))
    known = command.known_pair(options)
    return command.plan_of(options, known, *command.suite_of(options, known))


def test_the_head_is_the_shipped_one_and_its_suite_the_shipped(writer):
    plan = planned("--algorithm", "EAGLE3", "--device", "cpu")
    assert plan.pair == Pair(str(MODELS / "target"), str(MODELS / "eagle3"), "EAGLE3")
    assert set(plan.tasks) == {*items.TASKS, "shared", "text"}


def test_a_target_alone_is_asked_of_arms_that_need_no_draft(writer):
    plan = planned("--algorithm", "NONE", "--device", "cpu", "--arm", 'own={"dense_layers": [0]}')
    assert plan.pair == Alone(str(MODELS / "target")) and set(plan.tasks) == {*items.TASKS, "shared", "text"}
    assert list(plan.arms) == [*ALONE, "own"]
    for arm in plan.arms.values():
        StsConfig.parse(arm.config or {}).for_launch(drafts=False)
    for more, problem in (
        (["--arms", "joined"], "--arms: no joined; there are stock, dense, sts"),
        (["--arm", 'x={"history": "warm"}'], "--arm x: sts_config.history: got 'warm' without"),
        (["--draft", "d"], "--draft d: given with --algorithm NONE"),
    ):
        with pytest.raises(SystemExit, match=problem):
            planned("--algorithm", "NONE", *more)
    with pytest.raises(SystemExit, match="--draft: needed with --target, or --algorithm NONE"):
        planned("--target", str(MODELS / "target"))


@pytest.mark.parametrize("algorithm", ["STANDALONE", "EAGLE3", "NONE"])
def test_budgets_are_uniform_by_the_map_of_all_arms_or_the_packaged_one(writer, tmp_path, algorithm):
    for own in (False, True):
        path, more = headmap.MAPS / f"{algorithm.lower()}.json", []
        if own:
            data = json.loads(path.read_text()) | {"dense_layers": [1]}
            path = tmp_path / "own.json"
            path.write_text(json.dumps(data))
            more = ["--sts-config", json.dumps({"head_map": str(path)})]
        plan = planned("--algorithm", algorithm, "--device", "cpu", *more)
        made = json.loads(Path(sts_config(plan.arms["sts-uniform"], plan, tmp_path)["head_map"]).read_text())
        assert "shares" not in made and made | {"shares": None} == json.loads(path.read_text()) | {
            "shares": None
        }


def test_any_pair_is_asked_in_plain_words(tmp_path):
    pair = make_pair(tmp_path)
    (tmp_path / "text").write_text("One line.\n" * 400)
    given = ["--target", str(pair["target"]), "--draft", str(pair["draft"]), "--text", str(tmp_path / "text")]
    plan = planned(*given, "--arm", 'mine={"spread": 0}', "--device", "cpu")
    assert plan.tasks[0] == "needle" and plan.arms["mine"].config == {"spread": 0}
    assert plan.pair.algorithm == "STANDALONE" and plan.positions == 32768
    for more, problem in (
        (["--lengths", "40000"], "--lengths: 40000"),
        (["--tasks", "single"], "--tasks: no single"),
        (["--arms", "mine"], "--arms: no mine"),
        (["--arm", "x={"], "--arm x: sts_config"),
        (["--algorithm", "EAGLE3"], "under --algorithm EAGLE3"),
    ):
        with pytest.raises(SystemExit, match=problem):
            planned(*given, *more)


def test_tasks_that_the_model_does_not_do_are_not_asked():
    plan = Plan(("a", "b", "text"), (10, 20), (10,), (0.1,), 3, 2, "cpu", Pair("t", "d", "EAGLE"))
    tried = (Dense("a", 10, 0.7, True), Dense("b", 10, 0.5, False), Dense("a", 20, 0.1, False))
    cells = replace(plan, tried=tried).cells()
    assert cells == [("a", 10), ("text", 10), ("b", 20)]


def test_the_report_names_the_pair_and_what_was_left_out(small_results):
    for path in small_results.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0]["pair"] = Pair("T", "D", "EAGLE3").named()
        rows[0]["tried"] = [Dense("keys", 4096, 0.31, False)._asdict(), Dense("qa", 4096, 1, True)._asdict()]
        rows[0]["own"] = path.stem == "quest"
        path.write_text("\n".join(map(json.dumps, rows)))
    report.write(small_results)
    text = (small_results / "report.md").read_text()
    assert "Pair: T with D, EAGLE3." in text
    assert "do them with dense attention: keys of 4,096 (31.0)." in text


def test_the_report_of_a_target_alone_says_nothing_of_drafts(small_results):
    report.write(small_results)
    assert "| accept length, dense |" in (small_results / "report.md").read_text()
    for path in small_results.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0]["pair"] = Alone("T").named()
        for row in rows[1:]:
            row["rounds"] = [0] * len(row["rounds"])
        path.write_text("\n".join(map(json.dumps, rows)))
    report.write(small_results)
    text = (small_results / "report.md").read_text()
    assert "Target alone: T; a verify is one decode step" in text and "Pair:" not in text
    assert "| accept length, dense |" not in text and "2.50 (-1.50)" not in text
    assert "| quest | **+37.5 [" in text


@pytest.mark.server
@pytest.mark.parametrize("drafts", [True, False], ids=["drafted", "alone"])
def test_oracle_serves_a_tenth_and_scores_forced_text(pair, tmp_path, drafts):
    """At full budget the forced losses are Hugging Face's; at a tenth verify is sparse and they differ."""
    config = {"keep": 0.1, "budget": 0, "sink": 2, "recent": 8, "selector": "oracle"}
    args = ("--attention-backend", "sts", "--sts-config", json.dumps(config), "--grammar-backend", "forced")
    models = Pair(str(pair["target"]), str(pair["draft"]), "STANDALONE")
    args += tuple(models.flags()) if drafts else ()
    ids = random_ids(240, 5)
    texts = [items.Text(ids[:200], ids[200:]), items.Text(random_ids(90, 6), random_ids(30, 7))]
    with Forked(pair["target"], tmp_path / "log", *args, module="sts_sglang.host.forced") as server:
        client = asking.Client(server)
        dense = [text.ask(client, 1.0)[0] for text in texts]
        before = client.counters()
        sparse = [text.ask(client, 0.1)[0] for text in texts]
        after = client.counters()
        again = [text.ask(client, 0.1)[0] for text in texts]
    model = AutoModelForCausalLM.from_pretrained(pair["target"], dtype=torch.float32).eval()
    for text, reply in zip(texts, dense, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([text.prefix + text.forced])).logits[0]
        logprobs = logits.log_softmax(-1)[len(text.prefix) : -1]
        expected = logprobs.gather(1, torch.tensor(text.forced[1:])[:, None]).mean()
        assert reply.score == pytest.approx(float(expected), abs=1e-4)
    assert [r.score for r in sparse] == [r.score for r in again] != [r.score for r in dense]
    delta = {key: after[key] - before[key] for key in after}
    verifies = sum(r.rounds if drafts else r.tokens - 1 for r in sparse)
    # Without a draft the step after a request's last is on its way when it ends.
    assert 0 < verifies <= delta["sparse_verifies"] <= verifies + (0 if drafts else len(texts))
    assert delta["dense_verifies"] == delta["full_verifies"] == 0
    assert 0.08 < delta["selected_tokens"] / delta["available_tokens"] < 0.14


def test_plans_cover_text_at_its_own_lengths():
    plan = Plan(("qa", "text"), (4096,), (2048, 8192), (0.1,), 3, 2, "cpu", Pair("t", "d", "EAGLE"))
    assert plan.cells() == [("text", 2048), ("qa", 4096), ("text", 8192)]


@pytest.mark.parametrize("group", [[0, 1, 2], [1, 0, 2], [0, 0, 1]])
@pytest.mark.parametrize("tokens", [[5, 5, 5], [5, 4, 5]])
def test_a_cell_is_read_as_it_was_written(group: list[int], tokens: list[int]):
    row = {"task": "t", "group": group, "tokens": tokens, "score": [1.0, 0.5, 0.0], "depth": [0.0, 0.25, 1.0]}
    short = packed(row)
    assert unpacked(json.loads(json.dumps(short))) == row
    assert (short["group"] == 3) == (group == [0, 1, 2]) and (short["tokens"] == 5) == (tokens == [5, 5, 5])
    assert len(json.dumps(short)) < len(json.dumps(row))
