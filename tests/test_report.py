"""The README's tables are what the raw results say."""

from __future__ import annotations

import json

import pytest

from benchmarks import report


def test_the_readme_shows_the_results():
    text = report.README.read_text()
    assert report.rewritten(text) == text, "run python -m benchmarks.report"


def test_a_table_holds_medians_spread_and_gain(tmp_path, monkeypatch):
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
        "sts": (150, 156, 150),
        "sts-blend": (147,),
    }
    rows = [{"arm": arm, "tokens_per_s": s, **origin} for arm, found in speeds.items() for s in found]
    # An older run is shown where the newer one has nothing, and compared with nothing of the newer one.
    arms = ("stock", "sts-draft", "sts")
    older = [{"arm": arm, "tokens_per_s": 50, **origin, "commit": "b"} for arm in arms]
    (tmp_path / "serving.jsonl").write_text("\n".join(map(json.dumps, older + rows)))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert (
        "| 1,000 x 2 | 50 ± 0 | 100 ± 7 | 120 ± 0 | – | 150 ± 3 | 50 ± 0 | 12 % | 1.50x (1.25x) | – |"
        in report.serving()
    )
    assert "makes sts 0.980x at 1,000 x 2" in report.serving()
    assert report.verify() == "Not measured yet."
    assert report.round_ops() == "Not measured yet."


def test_what_sts_adds_to_a_round_shows_the_newest_of_what_was_measured(tmp_path, monkeypatch):
    row = {"context": 1000, "batch": 2, "gpu": "G", "commit": "c", "keep": 0.1}
    found = {
        "select": [{"provider": "triton", "us": us} for us in (9.0, 7.4)]
        + [{"provider": "triton", "us": 99.0, "keep": 0.05}],
        "draft_attention": [
            {"provider": "triton", "us": 5.0, "step": 0},
            {"provider": "triton+importance", "us": 6.0, "step": 0},
            {"provider": "triton+importance", "us": 88.0, "step": 0, "dim": 128},
        ],
    }
    for name, measured in found.items():
        lines = "\n".join(json.dumps({**row, **one}) for one in measured)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    shown = report.round_ops().splitlines()
    assert shown[0] == "| context x requests | sts, no importance | first step | selection |"
    assert shown[2] == "| 1,000 x 2 | 5 | 6 | 7 |"


def test_a_readme_without_marks_is_refused():
    with pytest.raises(SystemExit, match="serving"):
        report.rewritten("nothing")
