"""`sts-sglang evaluate`: the items of any tokenizer, the gate, what is refused, and a short real run."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from sts_sglang import cli, headmap
from sts_sglang.calibrate import search
from sts_sglang.calibrate.command import read_texts
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.evaluate import asking, command, gate, items, pair, recall
from sts_sglang.evaluate.asking import Cell, Reply
from sts_sglang.evaluate.items import Copy, Item, Plain, Recital, Source, Text, TooShort
from sts_sglang.headmap import MAPS
from sts_sglang.tools.demo import MODELS
from sts_sglang.tools.tiny_pair import make_pair
from tests import tiny_architectures

LENGTH = 2048


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def source() -> Source:
    texts = [text.content for text in read_texts(None, "heldout", "")]
    return Source(AutoTokenizer.from_pretrained(MODELS / "target"), texts)


# ---- items


@pytest.mark.parametrize("task", [*items.TASKS, *items.CHATS, items.LOSS])
def test_an_item_fits_its_length_and_is_the_same_again(source, task):
    suite = Plain(source)
    made = [suite.make(task, LENGTH, index) for index in range(4)]
    for one in made:
        prompt = one.ids if isinstance(one, Item | Copy) else one.prefix
        answer = {
            Item: lambda x: x.new_tokens,
            Copy: lambda x: len(x.expected),
        }.get(type(one), lambda x: len(x.forced))(one)
        assert LENGTH - 64 < len(prompt) + answer + items.SPARE <= LENGTH
    assert vars(made[1]) == vars(Plain(source).make(task, LENGTH, 1)) != vars(made[2])


@pytest.mark.parametrize("task", ["needle", "keys", "records", "ask", "ask_keys"])
def test_what_is_asked_for_stands_in_the_document_once(source, task):
    for index in range(5):
        one = Plain(source).make(task, LENGTH, index)
        text = source.tokenizer.decode(one.ids)
        assert all(value in text for value in one.values)
        assert text.count(one.values[-1 if task != "records" else 1]) == 1
        at = text.index(one.values[-1 if task != "records" else 1]) / len(text)
        assert at == pytest.approx(one.depth, abs=0.15)


def test_questions_in_a_conversation_end_where_the_answer_begins(source):
    text = source.tokenizer.decode(Plain(source).make("ask", LENGTH, 0).ids)
    assert text.endswith("?<|end|><|assistant|>") and text.startswith("<|begin|><|user|>")
    source.tokenizer.chat_template, kept = None, source.tokenizer.chat_template
    try:
        assert "ask" not in Plain(Source(source.tokenizer, ["a\n" * 99])).tasks
    finally:
        source.tokenizer.chat_template = kept


@pytest.mark.parametrize("task", ["copy", "recite", "sequence"])
def test_what_is_copied_stands_far_back(source, task):
    for index in range(20):
        one = Plain(source).make(task, LENGTH, index)
        prompt, rest = (one.ids, one.expected) if isinstance(one, Copy) else (one.prefix, one.forced)
        cue = prompt[-8:]
        places = [i for i in range(len(prompt) - 8) if prompt[i : i + 8] == cue]
        assert any(prompt[i + 8 : i + 8 + len(rest)] == rest for i in places)
        at = next(i for i in places if prompt[i + 8 : i + 8 + len(rest)] == rest)
        assert at < 0.8 * len(prompt) or task == "sequence"
        assert at < len(prompt) - 64, "not among the recent tokens, which are always kept"


def test_measured_tokens_of_text_are_no_other_items():
    """Windows overlap; what is measured of them does not."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    source = Source(tokenizer, [f"line {i} of this text\n" for i in range(600)])
    most = source.tails(600 - items.SPARE)
    ends = []
    for index in range(most):
        one = Plain(source).make(items.LOSS, 600, index)
        whole = [*one.prefix, *one.forced]
        at = next(i for i in range(len(source.stream)) if source.stream[i : i + len(whole)] == whole)
        ends.append(at + len(whole))
    assert most > 30 and all(
        b - a > items.FORCED for a, b in zip(sorted(ends), sorted(ends)[1:], strict=False)
    )
    with pytest.raises(TooShort, match=f"{len(source.stream)} tokens; allowed: at least"):
        Plain(source).make(items.LOSS, 600, most)


def test_too_little_filler_is_said(source):
    short = Source(source.tokenizer, ["a line\n" * 50])
    with pytest.raises(TooShort, match="allowed: at least"):
        short.filler(10_000, random.Random(0))


# ---- scores


class Answering:
    """Stands in for a client: says what it was given."""

    def __init__(self, text: str = "", ids: tuple[int, ...] = (), logprobs: tuple[float, ...] = ()):
        self.reply, self.logprobs = Reply(0.0, len(ids), 1, "", text, ids), list(logprobs)

    def generate(self, ids, keep, new_tokens, extra=None, **params):
        return self.reply

    def forced(self, ids, tokens, keep):
        return self.reply, self.logprobs


def test_scores_of_answers():
    item = Item([1], ["17", "green"], 9, 0.3)
    assert item.ask(Answering(" It is 17.\ngreen"), 1.0)[0].score == 0.5, "the first line counts"
    assert item.ask(Answering("\n17 green"), 1.0)[0].score == 1
    assert Copy([1], [4, 5, 6, 7], 0.1).ask(Answering(ids=(4, 5, 9, 7)), 1.0)[0].score == 0.5
    assert Copy([1], [4, 5, 6, 7], 0.1).ask(Answering(ids=(4,)), 1.0)[0].score == 0.25
    logprobs = (math.log(0.5), math.log(0.25))
    assert Text([1], [2, 3, 4]).ask(Answering(logprobs=logprobs), 1.0)[0].score == pytest.approx(
        -1.0397, abs=1e-4
    )
    assert Recital([1], [2, 3, 4], 0).ask(Answering(logprobs=logprobs), 1.0)[0].score == pytest.approx(0.375)


# ---- the gate


def cells(text: dict[float, list[float]], tasks: dict[str, dict[float, list[float]]]) -> gate.Cells:
    found = {}
    for task, by_keep in {items.LOSS: text, **tasks}.items():
        for keep, scores in by_keep.items():
            cell = Cell("sts", task, 4096, keep)
            for group, score in enumerate(scores):
                cell.add(Reply(score, 21, 8 if keep < 1 else 5, ""), group)
            found[task, 4096, keep] = cell
    return found


DENSE_TEXT, HIT = [-2.0] * 50, [1.0] * 50


@pytest.mark.parametrize(
    ("text", "answers", "verdict", "problem"),
    [
        ([-2.01] * 50, HIT, "passes", None),
        ([-2.03] * 50, HIT, "fails", r"loss of text \+1.50 % at 4,096"),
        ([-2.0, -2.03] * 25, [0.0] + HIT[1:], "not shown", "the tasks may fall by"),
        ([-2.01] * 50, [0.0] * 2 + HIT[2:], "fails", "keys -4.0 points"),
        ([-1.5, -2.53] * 25, HIT, "not shown", "the loss of text may be"),
        ([-2.01] * 10, HIT, "not shown", "10 documents"),
    ],
)
def test_the_gate(text, answers, verdict, problem):
    found = cells({0.1: text, 1.0: DENSE_TEXT[: len(text)]}, {"keys": {0.1: answers, 1.0: HIT}})
    judged = gate.judge(found, 0.1)
    assert gate.verdict(judged) == verdict and judged.passes == (verdict == "passes")
    assert (problem is None) == (not judged.problems)
    if problem:
        assert re.search(problem, "; ".join(judged.problems))
    assert judged.accept == (20 / 8, 4.0)
    assert judged.loss[4096].mean == pytest.approx(-sum(text) / len(text) / 2 - 1)


def test_without_a_task_nothing_is_shown_unless_none_was_wanted():
    found = cells({0.1: DENSE_TEXT, 1.0: DENSE_TEXT}, {})
    assert gate.verdict(gate.judge(found, 0.1)) == "not shown"
    assert gate.judge(found, 0.1, tasks_wanted=False).passes


def test_without_a_draft_no_round_has_a_length():
    found = cells({0.1: DENSE_TEXT, 1.0: DENSE_TEXT}, {})
    for cell in found.values():
        cell.rounds = [0] * len(cell.rounds)
    judged = gate.judge(found, 0.1, tasks_wanted=False)
    assert judged.passes and judged.accept is None
    assert "tokens a round" not in gate.table(found, [judged])


def test_the_smallest_keep_passes_with_every_larger_one():
    found = cells(dict.fromkeys((0.05, 0.1, 0.25, 1.0), DENSE_TEXT), {})
    passing = {k: gate.judge(found, k, tasks_wanted=False) for k in (0.05, 0.1, 0.25)}
    assert gate.smallest(list(passing.values())).keep == 0.05
    passing[0.1] = passing[0.1]._replace(problems=("worse",))
    assert gate.smallest(list(passing.values())).keep == 0.25
    passing[0.25] = passing[0.25]._replace(problems=("worse",))
    assert gate.smallest(list(passing.values())) is None


def test_the_table_shows_every_keep():
    found = cells({0.1: [-2.06] * 50, 1.0: DENSE_TEXT}, {"keys": {0.1: [0.0] * 10 + HIT[10:], 1.0: HIT}})
    text = gate.table(found, [gate.judge(found, 0.1)], {0.1: recall.Recall(0.5, 0.2, 0.9)})
    assert "| attention held (by the latest, by the best; %) |  |  | 50 (20, 90) |" in text
    assert "| loss of text, 4,096 (%) | 50 | 2.000 nats | **+3.00 [+3.00, +3.00]** |" in text
    assert "| keys, 4,096 (points) | 50 | 100.0 | **-20.0 [" in text and "| fails |" in text
    assert "| tokens a round |  | 4.00 | 2.50 |" in text


def test_recall_is_of_the_map_that_would_serve(source):
    """More than the latest tokens hold, less than the target's own top; all of it grows with the keep."""
    shipped = pair.Pair(str(MODELS / "target"), str(MODELS / "draft"), "STANDALONE")
    texts = [source.window(1024, number) for number in (0, 100)]
    config = StsConfig(budget=0, recent=16)
    found = recall.here(shipped, texts, config, [0.01, 0.1, 0.25], "cpu")
    assert list(found) == [0.1, 0.25], "a hundredth is sink and recent alone"
    assert found[0.1].draft < found[0.25].draft and found[0.1].latest < found[0.1].draft < found[0.1].best < 1
    assert recall.here(shipped, texts, config, [0.01], "cpu") == {}


def test_recall_is_of_the_map_of_so_many_ranks(monkeypatch, source, tmp_path):
    """What --server-args ask for: the proportional map, or the one that was made for them."""
    data = json.loads((MAPS / "standalone.json").read_text())
    target, draft = headmap.HeadCounts(**data["target"]), headmap.HeadCounts(**data["draft"])
    default = headmap.proportional(target, draft)
    # Of every two draft heads of the proportional map one, which is of the same rank.
    half = [[[list(heads[-1])] for heads in layer] for layer in default.sources]
    path = tmp_path / "map.json"
    kept = {key: data[key] for key in ("version", "shift", "target", "draft")}
    path.write_text(json.dumps(kept | {"tp": 2, "sources": half}))
    measured = []

    def of(head_map, *rest):
        measured.append([[list(map(list, heads)) for heads in layer] for layer in head_map.sources])
        return search.latest(*rest[:2])

    monkeypatch.setattr(search, "recall_of", of)
    monkeypatch.setattr(recall, "measure", recall.here)
    known = pair.check(str(MODELS / "target"), str(MODELS / "draft"), None)
    for config in ({}, {"head_map": str(path)}):
        plan = command.Plan(
            known, items.Plain(source), "cpu", [512], [0.5], 1, 1, {**config, "recent": 16}, [], ["--tp", "2"]
        )
        assert list(command._recall(plan)) == [0.5]
    whole = [[list(map(list, heads)) for heads in layer] for layer in default.sources]
    assert measured == [whole, half] and whole != half


@pytest.mark.parametrize("ranks", ["3", "16", "0", "-1"])
def test_ranks_that_no_launch_has_are_refused_before_anything_runs(ranks):
    with pytest.raises(ConfigError, match=rf"^--server-args: --tp-size {ranks}; allowed: 1 \| 2 \| 4 \| 8$"):
        command._ranks(["--tp", ranks])


# ---- what is refused


def test_help_states_the_gate_and_the_tasks(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"  {task} " in text for task in items.ABOUT)
    words = " ".join(text.split())
    assert "the loss of text rises by at most 1%" in words
    assert "single tokens by a map that has directions" in words


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--target", "nowhere/at all"], "--target nowhere/at all: no such folder"),
        (["--target", "/no/such"], "--target /no/such: no such folder; allowed: a model folder or hub name"),
        (["--target", "/dev/null"], "--target /dev/null: not a folder"),
        (["--draft", "EAGLE3", "--algorithm", "STANDALONE"], "architecture 'LlamaForCausalLMEagle3' under"),
        (["--draft", str(MODELS / "draft")], "vocabulary of 2048, the target's is 384"),
        (["--text", "/no/such"], "--text /no/such: no such file"),
        (["--lengths", "512"], "--lengths: no room for the question in "),
        (["--text", "SHORT"], "short: 12 tokens; allowed: at least"),
        (["--keeps", "0"], "--keeps: got [0.0]"),
        (["--keeps", "1"], "--keeps: got [1.0]"),
        (["--keeps", "nan"], "--keeps: got [nan]"),
        (["--lengths", "100000"], "--lengths: got [100000]; allowed: from 512 to 32768"),
        (["--lengths", "-5"], "--lengths: got [-5]"),
        (["--items", "0"], "--items: got 0"),
        (["--items", "9999"], "--text: "),
        (["--tasks", "keys", "x"], "--tasks: got ['x']"),
        (["--concurrency", "0"], "--concurrency: got 0"),
        (["--algorithm", "NGRAM"], "--algorithm: got 'NGRAM'"),
        (["--algorithm", "NONE"], "given with --algorithm NONE; allowed: one of the two"),
        (["--draft", "--algorithm", "STANDALONE"], "--algorithm STANDALONE: given without --draft"),
        (["--draft", "--sts-config", '{"selector": "joined"}'], "sts_config.selector: got 'joined' without"),
        (["--sts-config", '{"kep": 1}'], "--sts-config: sts_config: unknown key"),
        (["--sts-config", '{"kep": 1'], "--sts-config: sts_config: not JSON"),
        (["--sts-config", '{"head_map": "no.json"}'], "--sts-config: head_map.file: 'no.json' is not a file"),
        (
            ["--sts-config", f'{{"head_map": "{MAPS / "eagle3.json"}"}}'],
            "--sts-config: head_map.target: made",
        ),
        (["--sts-config", '{"budget": 1024}', "--lengths", "640"], "--lengths: got 640, whose contexts"),
        (["--sts-config", '{"policy": "top_p"}'], "--sts-config: policy 'top_p'"),
        (["--sts-config", '{"verify": "dense"}'], "--sts-config: verify 'dense'"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: "),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_that_names_the_flag(flags, problem, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(pair, "start", lambda *_, **__: pytest.fail("a server was started"))
    (tmp_path / "short").write_text("Too short.\n")
    named = {"EAGLE3": str(tiny["eagle3"]), "SHORT": str(tmp_path / "short")}
    given = {"--target": [str(tiny["target"])], "--draft": [str(tiny["draft"])]}
    for i, word in enumerate(flags):
        if word.startswith("--"):
            last = next((j for j in range(i + 1, len(flags)) if flags[j].startswith("--")), len(flags))
            given[word] = [named.get(value, value) for value in flags[i + 1 : last]]
    said = [x for flag, values in given.items() if values for x in (flag, *values)]
    assert cli.main(["evaluate", *said]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: ") and problem in err.splitlines()[-1]


@pytest.mark.parametrize(("kind", "algorithm"), [("draft", "STANDALONE"), ("eagle3", "EAGLE3")])
def test_a_draft_with_another_tokenizer_is_refused(tiny, tmp_path, kind, algorithm):
    draft = tmp_path / "draft"
    shutil.copytree(tiny[kind], draft)
    assert pair.check(str(tiny["target"]), str(draft), None).pair.algorithm == algorithm
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="--draft .*differs from the target's in 2 tokens, among them 'a'"):
        pair.check(str(tiny["target"]), str(draft), None)
    (draft / "tokenizer.json").unlink()
    (draft / "tokenizer_config.json").unlink()
    settings = json.loads((draft / "config.json").read_text())
    for kind in (settings["model_type"], "qwen2"):  # of whose kind transformers makes an empty one
        (draft / "config.json").write_text(json.dumps({**settings, "model_type": kind}))
        assert pair.check(str(tiny["target"]), str(draft), None).pair.algorithm == algorithm, "it brings none"


def test_a_head_of_another_target_is_named_before_it_is_loaded():
    head = str(MODELS / "eagle3")
    with pytest.raises(ConfigError) as refused:
        pair.check(str(MODELS / "draft"), head, None)
    assert str(refused.value) == (f"--draft {head}: reads the target after layers [1, 4, 6]; allowed: 0..2")


@pytest.mark.parametrize(
    ("draft", "name", "ranks", "problem"),
    [
        ("draft", "standalone.json", 1, None),
        ("eagle3", "eagle3.json", 1, None),
        (None, "none.json", 1, None),
        (None, "none.json", 2, None),
        ("draft", "eagle3.json", 1, "head_map.draft: made for"),
        ("draft", "none.json", 1, "head_map.draft: a map of the target alone"),
        (None, "eagle3.json", 1, "head_map.draft: made for"),
        ("draft", "standalone.json", 2, "head_map.tp: got 1; allowed: 2"),
    ],
)
def test_a_head_map_is_read_before_anything_starts(draft, name, ranks, problem):
    known = pair.check(str(MODELS / "target"), draft and str(MODELS / draft), None)
    flags = ["--tp", str(ranks)] if ranks > 1 else []
    if problem is None:
        assert command._checked({"head_map": str(MAPS / name)}, known.pair, flags).head_map
        return
    with pytest.raises(ConfigError, match=f"^--sts-config: {problem}"):
        command._checked({"head_map": str(MAPS / name)}, known.pair, flags)


def test_a_map_without_directions_selects_no_tokens(tmp_path):
    data = json.loads((MAPS / "none.json").read_text())
    del data["directions"]
    data["shares"] = [[1] * data["target"]["kv_heads"]] * data["target"]["layers"]
    (tmp_path / "map.json").write_text(json.dumps(data))
    known, given = pair.check(str(MODELS / "target"), None, None), {"head_map": str(tmp_path / "map.json")}
    with pytest.raises(ConfigError, match="^--sts-config: sts_config.selector: got 'tokens' with 'map.json'"):
        command._checked({**given, "selector": "tokens"}, known.pair, [])
    assert command._checked({**given, "selector": "pages"}, known.pair, []).selector == "pages"


def test_the_least_length_is_one_that_no_keep_attends_to_whole(source):
    config = StsConfig(budget=1024)
    with pytest.raises(ConfigError, match="contexts of 567 tokens .* allowed: at least 1098,") as refused:
        command._check_floor(config, [640, 2048])
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    command._check_floor(config, [least])
    with pytest.raises(ConfigError):
        command._check_floor(config, [least - 1])
    for task in (items.LOSS, "recite"):
        prompt = len(Plain(source).make(task, least, 0).prefix)
        assert config.budget_for(prompt, 0.1) == prompt - 1, "one token is left out of the first context"


def test_a_models_own_layer_drafts_under_eagle(tmp_path):
    model = str(tiny_architectures.own_layer(tmp_path, "Glm4MoeForCausalLM"))
    assert pair.check(model, model, None).pair.algorithm == "EAGLE"
    with pytest.raises(
        ValueError, match="architecture 'Glm4MoeForCausalLMNextN' under --algorithm STANDALONE"
    ):
        pair.check(model, model, "STANDALONE")


@pytest.mark.parametrize("head", ["eagle", "eagle3"])
def test_the_algorithm_is_what_the_draft_is_made_for(tiny, head):
    known = pair.check(str(tiny["target"]), str(tiny[head]), None)
    assert known.pair.algorithm == head.upper() and known.positions == 32768
    assert known.pair.named() == {"target": "target", "draft": head, "algorithm": head.upper()}


def test_a_target_alone_has_no_flags_of_a_draft(tiny):
    for algorithm in (None, "NONE"):
        known = pair.check(str(tiny["target"]), None, algorithm)
        assert known.pair == pair.Alone(str(tiny["target"])) and known.positions == 32768
    assert known.pair.flags() == [] and list(known.pair.paths().fingerprints()) == ["target"]
    assert known.pair.named() == {"target": "target", "draft": None, "algorithm": "NONE"}


def said(known: pair.Known, config: dict, device="cuda", server_args=(), tasks=(items.LOSS, "needle")):
    """As much of a plan as a report is made of."""
    suite = SimpleNamespace(checksum="0")
    return SimpleNamespace(
        config=config, known=known, suite=suite, device=device, server_args=server_args, tasks=tasks
    )


def test_where_every_task_is_left_out_they_are_named_and_nothing_is_shown(tmp_path, capsys, monkeypatch):
    left_out = [{"task": "needle", "length": 640, "dense": 0.1}]
    monkeypatch.setattr(command, "measure", lambda plan, log: ({}, left_out, {}))
    given = ["--target", str(MODELS / "target"), "--tasks", "needle", "--lengths", "640", "--items", "10"]
    assert cli.main(["evaluate", *given, "--out", str(tmp_path)]) == 1
    out, _ = capsys.readouterr()
    assert "left out, needle of 640 tokens: dense attention scores 0.10" in out
    assert out.splitlines()[-1].startswith("nothing is shown, for dense attention does none of the tasks")
    assert (tmp_path / "report.md").read_text() == out


def test_where_no_keep_passes_it_is_said_what_the_floor_of_a_server_would_change(tiny):
    known = pair.check(str(tiny["target"]), None, None)
    judged = [gate.judge(cells({keep: DENSE_TEXT, 1.0: DENSE_TEXT}, {}), keep) for keep in (0.1, 0.25)]
    plan = said(known, {})
    *_, floor, last = command.report_of(plan, "", judged, [], None).splitlines()
    assert "floor of 1,024 tokens keeps more than 0.1 of contexts below 10,240" in floor
    assert last.startswith("no keep passes the gate")
    plan.config["budget"] = 0
    assert "floor" not in command.report_of(plan, "", judged, [], None)


@pytest.mark.parametrize("documents, decide", [(3, True), (50, False)])
def test_where_no_keep_passes_it_is_said_whether_more_items_may_decide(tiny, documents: int, decide: bool):
    hit, missed = [1.0] * documents, [0.0 if documents == 50 else 1.0] * documents
    found = cells({0.1: DENSE_TEXT, 1.0: DENSE_TEXT}, {"needle": {0.1: missed, 1.0: hit}})
    judged, plan = [gate.judge(found, 0.1)], said(pair.check(str(tiny["target"]), None, None), {})
    last = command.report_of(plan, "", judged, [], None).splitlines()[-1]
    assert ("more --items may show" in last) == decide and "serve without sts" in last


def test_what_was_not_asked_for_is_said(tiny):
    known = pair.check(str(tiny["target"]), None, None)
    judged = [gate.judge(cells({0.1: DENSE_TEXT, 1.0: DENSE_TEXT}, {}), 0.1)]
    for tasks in ([items.LOSS], ["needle"]):
        report = command.report_of(said(known, {}, tasks=tasks), "", judged, [], None)
        assert ("`text` was not asked for" in report) == (tasks == ["needle"])


@pytest.mark.parametrize("draft", [None, "eagle3"])
def test_the_last_line_is_the_command_to_serve_with(tiny, draft):
    known = pair.check(str(tiny["target"]), draft and str(tiny[draft]), None)
    judged = gate.judge(cells({0.1: DENSE_TEXT, 1.0: DENSE_TEXT}, {}), 0.1, tasks_wanted=False)
    plan = said(known, {"recent": 16})
    words = shlex.split(command.report_of(plan, "", [judged], [], judged).splitlines()[-1])
    assert words[:5] == ["serve", "with:", "python", "-m", "sglang.launch_server"]
    given = dict(zip(words[5::2], words[6::2], strict=True))
    assert given["--model-path"] == str(tiny["target"]) and given["--attention-backend"] == "sts"
    assert json.loads(given["--sts-config"]) == {"recent": 16, "keep": 0.1}
    drafting = {flag: value for flag, value in given.items() if flag.startswith("--speculative")}
    assert drafting.get("--speculative-draft-model-path") == (draft and str(tiny[draft]))
    assert len(given) == 3 + len(drafting) and bool(drafting) == bool(draft)


def test_that_command_is_of_the_server_that_was_measured(tiny, monkeypatch):
    """On a CPU its platform and float32, everywhere what was given for SGLang."""
    known = pair.check(str(tiny["target"]), None, None)
    judged = gate.judge(cells({0.1: DENSE_TEXT, 1.0: DENSE_TEXT}, {}), 0.1, tasks_wanted=False)
    plan = said(known, {}, "cpu", ["--chunked-prefill-size", "256"])
    line = command.report_of(plan, "", [judged], [], judged).splitlines()[-1]
    assert line.startswith("serve with: SGLANG_PLATFORM=sts_cpu python -m sglang.launch_server ")
    assert " --device cpu --dtype float32 " in line and line.endswith(" --chunked-prefill-size 256")
    monkeypatch.setattr(pair, "LocalServer", lambda *args, **given: (args, given))
    args, given = pair.start(
        known.pair, Path("log"), device="cpu", context=512, concurrency=4, config={}, extra=plan.server_args
    )
    assert {"--device", "cpu", "--dtype", "float32"} < set(args) and args[-1] == "256"
    assert given["env"]["SGLANG_PLATFORM"] == "sts_cpu"
    assert "--max-running-requests" in args and "--max-running-requests" not in line


def test_that_command_bounds_the_context_where_the_draft_has_fewer_positions(tiny, tmp_path):
    judged = gate.judge(cells({0.1: DENSE_TEXT, 1.0: DENSE_TEXT}, {}), 0.1, tasks_wanted=False)
    for fewer in (False, True):
        draft = tmp_path / str(fewer)
        shutil.copytree(tiny["eagle3"], draft)
        settings = json.loads((draft / "config.json").read_text())
        settings["max_position_embeddings"] -= 100 * fewer
        (draft / "config.json").write_text(json.dumps(settings))
        known = pair.check(str(tiny["target"]), str(draft), None)
        line = command.report_of(said(known, {}), "", [judged], [], judged).splitlines()[-1]
        bound = f" --context-length {settings['max_position_embeddings']}"
        assert (bound in line) == fewer and ("--context-length" in line) == fewer


def test_who_is_interrupted_while_items_are_asked_waits_for_none():
    """What they ask ends with the server, which is then stopped."""
    answered = threading.Event()
    client = SimpleNamespace(counters=lambda: {})
    asked = SimpleNamespace(ask=lambda client, keep: answered.wait(30))
    interrupt = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    interrupt.start()
    try:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            asking.measure(client, lambda index: asked, 1, [asking.Cell("sts", "text", 9, 1.0)], 1)
        assert time.monotonic() - began < 10
    finally:
        answered.set()
        interrupt.join()
        signal.signal(signal.SIGINT, before)


# ---- the server


@pytest.mark.server
def test_a_pair_is_evaluated(tiny, tmp_path, capsys, monkeypatch):
    """A random model does no task; its text is judged, and every verify was what its keep says."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    given = ["--target", str(tiny["target"]), "--draft", str(tiny["eagle3"]), "--tasks", "copy", "text"]
    given += ["--lengths", "512", "--items", "4", "--keeps", "0.2", "--concurrency", "4"]
    given += ["--sts-config", '{"recent": 16}', "--out", str(tmp_path / "out"), "--device", "cpu"]
    given += ["--no-recall"]
    assert cli.main(["evaluate", *given]) == 1
    out, err = capsys.readouterr()
    header, *rows = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert header["pair"]["algorithm"] == "EAGLE3" and header["sts"]["config"]["recent"] == 16
    assert header["left_out"][0]["task"] == "copy" and "copy of 512 tokens: dense" in err
    assert {(row["task"], row["keep"]) for row in rows} == {("text", keep) for keep in (0.2, 1.0)}
    by_keep = {row["keep"]: row for row in rows}
    assert by_keep[0.2]["score"] != by_keep[1.0]["score"]
    for keep, row in by_keep.items():
        counters = row["counters"]
        share = counters["selected_tokens"] / counters["available_tokens"]
        assert share == pytest.approx(keep, abs=0.02) and counters["sparse_verifies"] == sum(row["rounds"])
    assert "| loss of text, 512 (%) | 4 |" in out and "no keep passes the gate" in out
    assert (tmp_path / "out" / "report.md").read_text() == out
    assert (tmp_path / "out" / "server.log").stat().st_size > 1000


@pytest.mark.server
def test_a_target_alone_is_evaluated(tiny, tmp_path, capsys, monkeypatch):
    """Every token after the first is forced through a sparse decode step, and nothing is said of rounds."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    given = ["--target", str(tiny["target"]), "--tasks", "text", "--lengths", "512", "--items", "4"]
    given += ["--keeps", "0.3", "--sts-config", '{"recent": 16}', "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(["evaluate", *given]) == 1
    out, _ = capsys.readouterr()
    header, *rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert header["pair"] == {"target": "target", "draft": None, "algorithm": "NONE"}
    assert header["sts"]["config"]["selector"] == "pages" and list(header["models"]) == ["target"]
    by_keep = {row["keep"]: row for row in rows}
    assert by_keep[0.3]["score"] != by_keep[1.0]["score"] and by_keep[0.3]["out"] == by_keep[1.0]["out"]
    for keep, row in by_keep.items():
        counters = row["counters"]
        share = counters["selected_tokens"] / counters["available_tokens"]
        assert keep - 0.03 <= share <= keep, "whole pages of 16"
        # One more than the tokens after the first, where the step after the last is on its way already.
        assert 0 <= counters["sparse_verifies"] - 4 * items.FORCED <= 4
    assert out.startswith("target alone; texts ") and "tokens a round" not in out


def test_verifies_that_were_something_else_are_seen():
    names = ("sparse_verifies", "dense_verifies", "selected_tokens", "available_tokens", "full_verifies")
    for keep, counters, right in (
        (0.1, (5, 0, 10, 100, 0), True),
        (0.1, (5, 0, 100, 100, 0), False),
        (1.0, (5, 0, 100, 100, 0), True),
    ):
        cell = Cell("sts", "text", 512, keep, counters=dict(zip(names, counters, strict=True)))
        assert asking.verified_as_said(cell) == right
