"""README.md and benchmarks/REPORT.md say what the raw results say."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import facts, pictures, report, tables
from benchmarks.tables import eagle3, kernels, recall, serving


def test_readme_report_and_plots_show_the_results():
    assert report.stale() == [], "run python -m benchmarks.report"


def test_what_was_changed_by_hand_is_named(tmp_path, monkeypatch):
    for name in ("README", "REPORT"):
        path = getattr(report, name)
        copy = tmp_path / path.name
        number = re.search(r"[\d,]+(?= \|)", path.read_text())
        text = path.read_text()
        copy.write_text(f"{text[: number.start()]}1{text[number.start() :]}")
        monkeypatch.setattr(report, name, copy)
    found = {name.rpartition("/")[2] for name in report.stale()}
    assert found == {"README.md", "REPORT.md"}


def test_a_plot_says_what_it_was_drawn_from(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    assert pictures.source_of(path) is None
    report.plot_break_even(path)
    assert pictures.source_of(path) == pictures.digest(report.break_even())
    monkeypatch.setattr(report, "break_even", lambda: {"sts 1 stock-spec": [(1000, 1.5)]})
    assert pictures.source_of(path) != pictures.digest(report.break_even())


def test_every_fact_is_in_a_sentence():
    shown = report.TEMPLATE.read_text()
    assert [name for name in facts.facts() if f"{{{name}}}" not in shown + report.ANSWERS] == []


def test_a_name_that_nothing_was_measured_under_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "template.md")
    report.TEMPLATE.write_text("It gains {{everything}}.")
    with pytest.raises(SystemExit, match="nothing is measured under everything"):
        report.report()
    report.TEMPLATE.write_text("No tables.")
    with pytest.raises(SystemExit, match="does not show serving"):
        report.report()


@pytest.fixture
def some_serving(tmp_path, monkeypatch):
    origin = {
        "gpu": "G",
        "sglang": "0",
        "commit": "c",
        "simulated": 3.0,
        "context": 1000,
        "requests": 2,
        "keep_ratio": 0.125,
    }
    speeds = {
        "stock-spec": (100, 104, 90),
        "stock-spec-captured": (120,),
        "sts-draft": (150, 156, 150),
        "sts-draft-blend": (147,),
    }
    rows = [{"arm": arm, "tokens_per_s": s, **origin} for arm, found in speeds.items() for s in found]
    # An older run is shown where the newer one has nothing, and compared with nothing of the newer one.
    arms = ("stock", "sts", "sts-draft")
    older = [{"arm": arm, "tokens_per_s": 50, **origin, "commit": "b"} for arm in arms]
    (tmp_path / "serving.jsonl").write_text("\n".join(map(json.dumps, older + rows)))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)


def test_a_table_holds_medians_spread_and_gain(some_serving):
    assert (
        "| 1,000 x 2 | G | 50 ± 0 | 100 ± 7 | 120 ± 0 | – | 150 ± 3 | 50 ± 0 | 12 % | 1.50x (1.25x) | – |"
        in serving.serving()
    )
    assert "makes sts 0.980x at 1,000 x 2" in serving.serving()
    assert kernels.verify() == "Not measured yet."
    assert kernels.round_ops() == "Not measured yet."


def test_cards_have_rows_of_their_own(some_serving, tmp_path):
    """Of one shape, though newer than those of the other card."""
    row = {"gpu": "NVIDIA H9 80GB", "sglang": "0", "commit": "d", "context": 1000, "requests": 2}
    arms = {"stock-spec-captured": 500, "sts-draft": 1000}
    with (tmp_path / "serving.jsonl").open("a") as file:
        for arm, speed in arms.items():
            file.write("\n" + json.dumps({**row, "arm": arm, "tokens_per_s": speed, "keep_ratio": 0.1}))
    shown = serving.serving()
    assert "| 1,000 x 2 | G | 50 ± 0 | 100 ± 7 | 120 ± 0 |" in shown
    assert "| 1,000 x 2 | H9 | – | – | 500 ± 0 | – | 1,000 ± 0 | – | 10 % | – (2.00x) | – |" in shown


def test_the_front_table_compares_with_the_captured_stock_and_says_the_null_result(some_serving, monkeypatch):
    monkeypatch.setattr(serving, "FRONT", ((1000, 2),))
    assert "| 1,000 x 2 | 100 | 120 | 150 | **1.25x** | 50 | – |" in serving.front()
    assert "brings nothing: 1.25x to 1.25x" in serving.front()


def test_a_target_alone_has_a_table_of_its_own(some_serving, tmp_path):
    of_pairs = serving.serving(), serving.front(), report.break_even()
    assert serving.alone() == "Not measured yet."
    row = {
        "gpu": "G",
        "sglang": "0",
        "context": 1000,
        "requests": 2,
        "algorithm": "NONE",
        "keep_ratio": 0.0984,
    }
    runs = [(1, "b", "stock", 50), (1, "c", "stock", 100), (1, "c", "sts-tokens", 150)]
    runs += [(1, "c", "sts-tokens", 154), (1, "c", "sts-pages", 120)]
    runs += [(2, "c", "stock", 200), (2, "c", "sts-pages", 200), (1, "d", "sts-tokens", 900)]
    with (tmp_path / "serving.jsonl").open("a") as file:
        for tp, commit, arm, speed in runs:
            file.write(
                "\n" + json.dumps({**row, "tp": tp, "commit": commit, "arm": arm, "tokens_per_s": speed})
            )
    shown = serving.alone().splitlines()
    assert shown[2:5] == [
        "| 1,000 x 2 | 1 | tokens | 100 ± 0 | 152 ± 2 | 9.8 % | 1.52x |",
        "| 1,000 x 2 | 1 | pages | 100 ± 0 | 120 ± 0 | 9.8 % | 1.20x |",
        "| 1,000 x 2 | 2 | pages | 200 ± 0 | 200 ± 0 | 9.8 % | 1.00x |",
    ]
    assert "commit c;" in shown[-1]
    assert (serving.serving(), serving.front(), report.break_even()) == of_pairs


def test_heads_have_a_table_of_their_own_and_stand_beside_drafts_on_the_front(
    some_serving, tmp_path, monkeypatch
):
    monkeypatch.setattr(serving, "FRONT", ((1000, 2), (500, 2)))
    of_drafts = serving.serving(), report.break_even()
    assert eagle3.eagle3() == "Not measured yet." and eagle3.front() == serving.front()
    target = {"layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "weights": 10**10, "once": 0}
    row = {"gpu": "H", "sglang": "0", "commit": "c", "simulated": 3.0, "algorithm": "EAGLE3", "tp": 1}
    row |= {"shared": 0, "new_tokens": 512, "target": target, "draft": {**target, "weights": 0}, "steps": 3}
    row |= {"read_gbps": 4000, "tpot_ms": 2, "accept_length": 3.0, "drafts": True, "draft_tokens": 4}
    row |= {"context": 1000, "requests": 2, "kv": "auto", "topk": 1}
    alone = {"drafts": False, "accept_length": 1, "tpot_ms": 6}
    mixed = {"shortest": 100, "topk": 4, "draft_tokens": 8}
    arms = [("stock", 50, alone), ("stock-spec-captured", 100, {}), ("sts-draft", 160, {"keep_ratio": 0.1})]
    arms += [("stock-fp8", 110, {"kv": "fp8_e4m3"}), ("sts", 999, {"kv": "fp8_e4m3", "keep_ratio": 0.1})]
    arms += [("stock-spec-captured", 333, {"kv": "fp8_e4m3"})]
    arms += [("stock-spec-captured", 80, mixed), ("sts", 100, {**mixed, "keep_ratio": 0.2})]
    with (tmp_path / "serving.jsonl").open("a") as file:
        for arm, speed, more in arms:
            file.write("\n" + json.dumps({**row, "arm": arm, "tokens_per_s": speed, **more}))
    chain, tree = (part.splitlines() for part in eagle3.eagle3().split("*A tree of 4 branches a step"))
    assert chain[0].startswith("*A chain, 3 steps and 4 tokens a verify; a target of 32 layers with 32 query")
    own = "| 1,000 x 2 | 50 ± 0 | 100 ± 0 | 110 ± 0 | 160 ± 0 | 10 % | **1.60x** |"
    assert own in "\n".join(chain)
    times = [float(cell.strip("x ")) for cell in chain[4].split("|")[-3:-1]]
    assert 1.5 < times[0] < times[1] < 2.4  # 6 ms a round; 2.5 of weights, and more KV without sts
    assert "| 100 to 1,000 x 2 | – | 80 ± 0 | 100 ± 0 | 20 % | **1.25x** |" in "\n".join(tree)
    assert "1,000 x 2 | 50" not in "\n".join(tree)
    assert "| 1,000 x 2 | 333 ± 0 | 999 ± 0 | 10 % | **3.00x** |" in eagle3.fp8_kv()
    assert eagle3.two_gpus() == "Not measured yet."
    assert (serving.serving(), report.break_even()) == of_drafts
    assert "| 1,000 x 2 | 100 | 160 | **1.60x** | – | – | **1.25x** (G) | – |" in eagle3.front()
    assert "**At 2,000 tokens sts brings next to nothing: 1.25x to 1.60x" in eagle3.front()


def test_what_sts_adds_to_a_round_shows_the_newest_of_what_was_measured(tmp_path, monkeypatch):
    row = {"context": 1000, "batch": 2, "gpu": "G", "commit": "c", "keep": 0.1}
    found = {
        "select": [{"provider": "triton", "us": us} for us in (9.0, 7.4)]
        + [{"provider": "triton", "us": 99.0, "keep": 0.05}],
        "draft_attention": [
            {"provider": "triton", "us": 5.0, "step": 0, "group": 4},
            {"provider": "triton+importance", "us": 6.0, "step": 0, "group": 4},
            {"provider": "triton+importance", "us": 88.0, "step": 0, "dim": 128},
        ],
    }
    for name, measured in found.items():
        lines = "\n".join(json.dumps({**row, **one}) for one in measured)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    shown = kernels.round_ops().splitlines()
    assert shown[0] == "| context x requests | sts, no importance | first step | selection |"
    assert shown[2] == "| 1,000 x 2 | 5 | 6 | 7 |"
    assert "| 4 | first | 1.20x | 1.20x | 1.20x | 0 of 1 |" in kernels.importance_cost()


def test_heads_and_their_groups_stand_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert kernels.heads() == "Not measured yet."
    row = {"context": 1000, "batch": 2, "gpu": "G", "commit": "c", "rows": 4}
    for name, op, provider in (
        ("verify", "verify", "triton"),
        ("draft", "draft_attention", "triton+importance"),
        ("draft", "draft_attention", "triton"),
    ):
        with (tmp_path / f"{name}_heads.jsonl").open("a") as file:
            for dim, group in ((64, 3), (64, 4), (96, 3), (96, 4)):
                one = {"op": op, "provider": provider, "dim": dim, "group": group, "us": dim + group}
                file.write(json.dumps({**row, **one}) + "\n")
    shown = kernels.heads()
    assert (
        "| verify, heads of 64 | 67 | 68 |" in shown and "| a draft step, heads of 96 | 99 | 100 |" in shown
    )


def test_a_round_is_parted_by_kernels(tmp_path, monkeypatch):
    spent = {
        "_draft_kernel": 1000,
        "flash::prepare": 500,
        "nvjet_1": 2000,
        "_verify_kernel": 250,
        "norm": 125,
    }
    row = {"arm": "sts", "context": 1000, "requests": 2, "commit": "c", "gpu": "G", "rounds": 3}
    row |= {"kernels": {name: {"us": us} for name, us in spent.items()}, "idle_us": 125, "round_us": 4000}
    (tmp_path / "profile.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    own = "1.50 | 2.00 | 0.25 | 0.00 | 0.00 | 0.00 | 0.12 | 0.12"
    assert f"| `sts`, 1,000 x 2, G, c | {own} | – | 4.00 |" in kernels.round_time()
    row |= {"late_us": 60}
    (tmp_path / "profile.jsonl").write_text(json.dumps(row))
    of_pairs = kernels.round_time()
    assert f"| `sts`, 1,000 x 2, G, c | {own} | 0.06 | 4.00 |" in of_pairs
    assert kernels.step_time() == "Not measured yet."
    parts = {"page_scores": 500, "pages": 250, "tokens": 0, "select": 250, "rest": 2000}
    step = {**row, "algorithm": "NONE", "tp": 1, "parts": parts, "select_share": 0.25, "kernels": {}}
    (tmp_path / "profile.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(step)}")
    own = "1 | 0.50 | 0.25 | 0.00 | 0.25 | 2.00 | 0.12 | 4.00 | 25.0 %"
    assert f"| `sts`, 1,000 x 2 | {own} |" in kernels.step_time()
    assert kernels.round_time() == of_pairs


def test_what_slots_remember_and_what_maps_hold(tmp_path, monkeypatch):
    row = {
        "over_off": 0.01,
        "over_off_error": 0.002,
        "conversations": 2,
        "rounds": 9,
        "longest": 50,
        "commit": "c",
    }
    row |= {
        "by_mass": 0.9,
        "first_by_mass": 0.8,
        "recall": 0.7,
        "first_of_fresh": 1,
        "first_of_fresh_least": 0.9,
    }
    lines = [{"way": way, "weight": weight, **row} for weight in (0.5, 0.05) for way in ("off", "warm")]
    (tmp_path / "history_summary.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "calibrate"
    folder.mkdir()
    held = dict.fromkeys(recall.SPLITS, 0.5)
    own = {"recall_by_mass": held, "gap_closed_by_mass": 0.25, "share_outside": 0.1}
    (folder / "standalone.split.json").write_text(json.dumps(own))
    header = {"commit": "c", "windows": {"texts": 3}}
    (folder / "standalone.jsonl").write_text(json.dumps(header))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    shown = recall.history().splitlines()
    assert [line.split(" | ")[:2] for line in shown[2:5]] == [
        ["| `off`", "–"],
        ["| `warm`", "0.05"],
        ["| `warm`", "0.5"],
    ]
    assert "| 0.900 | +0.0100 ± 0.0020 | 0.800 | 0.700 | 100.0 % | 90.0 % |" in shown[3]
    assert "| **calibrated map** | **50 %** |" in recall.calibration()
    assert "on 3 windows" in recall.calibration()
    assert recall.ways() == "Not measured yet."


def test_a_readme_without_marks_is_refused():
    with pytest.raises(SystemExit, match="speed"):
        report.readme("nothing")
