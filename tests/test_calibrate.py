"""Calibration against brute force, planted maps, and the command from texts to a launch."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sts_sglang import cli, fingerprint, headmap, tiny_pair
from sts_sglang.calibrate import search
from sts_sglang.calibrate.record import Pair, Record, choose_windows
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.headmap import HeadCounts, HeadMap
from tests.oracle import Eagle3Draft

TOKENS = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(3)).tolist()
WINDOWS = [120, 171, 196]
CONFIG = StsConfig(keep=0.2, budget=0, sink=2, recent=8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair.make_pair(tmp_path_factory.mktemp("pair"))


def attentions(path, tokens):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_attentions=True, output_hidden_states=True)
    return model, torch.cat(out.attentions), [h[0] for h in out.hidden_states]


def test_windows_hold_the_attention_of_eager_transformers(pair):
    record = Pair(str(pair["target"]), str(pair["draft"])).record("x", TOKENS, WINDOWS)
    _, target, _ = attentions(pair["target"], TOKENS)
    _, draft, _ = attentions(pair["draft"], TOKENS[1:])
    for t, mass, scores in zip(WINDOWS, record.mass, record.scores, strict=True):
        for layer in range(4):
            for kv in range(2):
                expected = target[layer, 2 * kv : 2 * kv + 2, t : t + 4, :t].mean((0, 1))
                torch.testing.assert_close(mass[2 * layer + kv], expected, atol=1e-5, rtol=1e-4)
        for layer in range(2):
            for head in range(4):
                # Token n is row n - 1 of the draft, and position p its key p - 1.
                rows = [draft[layer, head, token - 1] for token in (t, t + 1, t + 2)]
                expected = [0.0] + [max(float(row[p - 1]) for row in rows) for p in range(1, t)]
                found = scores[4 * layer + head]
                torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_eagle3_head_as_the_oracle_runs_it(pair):
    record = Pair(str(pair["target"]), str(pair["eagle3"])).record("x", TOKENS, WINDOWS)
    model, _, hidden = attentions(pair["target"], TOKENS)
    head = Eagle3Draft(pair["eagle3"], model)
    count = len(TOKENS) - 1
    mask = torch.ones(count, count, dtype=torch.bool).tril()
    with torch.no_grad():
        states = head.project([h[:-1] for h in hidden])
        _, _, (attention,) = head(TOKENS[1:], states, list(range(count)), mask)
    for t, scores in zip(WINDOWS, record.scores, strict=True):
        expected = attention[:, t - 1 : t + 2, : t - 1].amax(1)
        torch.testing.assert_close(scores[:, 1:], expected, atol=1e-5, rtol=1e-4)


def test_eagle_head_runs(pair):
    record = Pair(str(pair["target"]), str(pair["eagle"])).record("x", TOKENS, WINDOWS)
    assert [tuple(s.shape) for s in record.scores] == [(4, t) for t in WINDOWS]
    assert all(float(s.sum(1).min()) > 0.5 for s in record.scores)


def test_recall_by_brute_force(pair):
    found = Pair(str(pair["target"]), str(pair["draft"]))
    record = found.record("x", TOKENS, WINDOWS)
    scores = search.score(search.frees([record], CONFIG))
    for row, candidate in ((0, 0), (5, 7), (7, 2)):
        recall = jaccard = 0.0
        for t, mass, score in zip(WINDOWS, record.mass, record.scores, strict=True):
            free = range(2, t - 8)
            k = CONFIG.budget_for(t) - 10
            chosen, wanted = (
                set(sorted(free, key=lambda p, v=v: -float(v[p]))[:k]) for v in (score[candidate], mass[row])
            )
            recall += sum(float(mass[row][p]) for p in chosen) / sum(float(mass[row][p]) for p in free)
            jaccard += len(chosen & wanted) / len(chosen | wanted)
        assert float(scores.recall[row, candidate]) == pytest.approx(recall / 3, abs=1e-4)
        assert float(scores.jaccard[row, candidate]) == pytest.approx(jaccard / 3, abs=1e-4)


def planted(seed: int, target: HeadCounts, draft: HeadCounts, speakers: list[int]) -> list[Record]:
    """Draft heads of noise, except that target head i is a noisy copy of draft head speakers[i]."""
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.rand(draft.layers * draft.q_heads, t, generator=draw) ** 8 for t in (300, 400)]
    mass = [s[speakers] + 0.01 * torch.rand(len(speakers), s.shape[1], generator=draw) for s in scores]
    assert len(speakers) == target.layers * target.kv_heads
    return [Record("x", [300, 400], 404, mass, scores)]


def test_a_permutation_of_unequal_head_counts_is_found_and_is_near_the_oracle():
    target, draft = HeadCounts(3, 6, 3), HeadCounts(2, 7, 1)
    speakers = [13, 2, 8, 0, 5, 11, 7, 12, 3]
    windows = search.frees(planted(0, target, draft, speakers), CONFIG)
    head_map = search.search(windows, search.score(windows), target, draft, None, 4)
    assert [heads for layer in head_map.sources for heads in layer] == [(divmod(s, 7),) for s in speakers]
    recall = search.recall_of(head_map, windows, draft)
    assert torch.allclose(recall.flatten(), search.oracle(windows), atol=0.01)
    assert float(recall.min()) > 2 * search.random(windows)


def test_the_band_limits_the_draft_layers():
    target, draft = HeadCounts(4, 2, 2), HeadCounts(4, 2, 2)
    windows = search.frees(planted(1, target, draft, list(reversed(range(8)))), CONFIG)
    head_map = search.search(windows, search.score(windows), target, draft, 1, 4)
    for t, layer in enumerate(head_map.sources):
        assert all(abs(d - t) <= 1 for heads in layer for d, _ in heads)


def test_a_head_that_follows_two_gets_both_and_not_more_than_allowed():
    target, draft = HeadCounts(1, 1, 1), HeadCounts(1, 6, 1)
    records = planted(2, target, draft, [4])
    for scores, mass in zip(records[0].scores, records[0].mass, strict=True):
        mass[0] = torch.maximum(scores[1], scores[4])
    windows = search.frees(records, CONFIG)
    for heads, expected in ((4, {1, 4}), (1, None)):
        sources = search.search(windows, search.score(windows), target, draft, None, heads).sources[0][0]
        assert {q for _, q in sources} == expected if expected else len(sources) == 1


def test_windows_are_inside_the_text_and_follow_the_seed():
    windows = choose_windows(1000, 16, 300, seed=1)
    assert windows == sorted(set(windows)) and windows[0] >= 300 and windows[-1] + 4 <= 1000
    assert windows == choose_windows(1000, 16, 300, seed=1) != choose_windows(1000, 16, 300, seed=2)
    with pytest.raises(ConfigError, match="too short"):
        choose_windows(310, 16, 300, seed=1)


def run(pair, folder, draft="draft", *more):
    folder.mkdir(exist_ok=True)
    texts = {}
    for name, seed in (("a", 1), ("b", 2), ("held", 3)):
        letters = torch.randint(97, 123, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
        texts[name] = folder / f"{name}.txt"
        texts[name].write_text("".join(map(chr, letters)))
    out = folder / "map.json"
    code = cli.main(
        ["calibrate", "--model", str(pair["target"]), "--draft", str(pair[draft]), "--out", str(out)]
        + ["--text", str(texts["a"]), str(texts["b"]), "--holdout", str(texts["held"]), "--windows", "3"]
        + ["--keep", "0.2", "--sink", "2", "--recent", "8", *more]
    )
    return code, out


def counts_of(pair, draft="draft"):
    configs = [json.loads((pair[n] / "config.json").read_text()) for n in ("target", draft)]
    keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return [HeadCounts(*(c[k] for k in keys)) for c in configs]


@pytest.mark.parametrize("draft", ["draft", "eagle3"])
def test_command_writes_map_table_report_and_plot(pair, tmp_path, capsys, draft):
    pytest.importorskip("matplotlib")
    plot, report = tmp_path / "map.png", tmp_path / "report.json"
    code, out = run(pair, tmp_path, draft, "--plot", str(plot), "--report", str(report), "--dense-below", "1")
    assert code == 0
    shown = capsys.readouterr().out
    assert "proportional default" in shown and "oracle" in shown and '"dense_layers": [0, 1, 2, 3]' in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    recall = json.loads(report.read_text())["recall"]
    assert 0 < recall["calibrated"] <= recall["oracle"] and 0 < recall["random"] < recall["oracle"]
    models = headmap.ModelPaths(str(pair["target"]), str(pair[draft]))
    head_map = headmap.load(str(out), *counts_of(pair, draft), models)
    assert isinstance(head_map, HeadMap)
    again, other = run(pair, tmp_path / "again", draft, "--dense-below", "1")
    assert again == 0 and json.loads(other.read_text()) == json.loads(out.read_text())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--keep", "0"], "--keep"),
        (["--windows", "4000"], "--text"),
        (["--plot", "/no/such/folder/x.png"], "--plot"),
        (["--model", "/no/such/model"], "--model"),
        (["--draft", "/no/such/model"], "--draft"),
        (["--text", "/no/such/text"], "--text"),
    ],
)
def test_refusals_are_one_line_that_names_the_flag(pair, tmp_path, capsys, flags, named):
    code, out = run(pair, tmp_path, "draft", *flags)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not out.exists()
    assert len(error) == 1 and named in error[0] and "allowed: " in error[0]


def test_fingerprint_follows_weights_and_config_not_where_they_lie(pair, tmp_path):
    original = fingerprint.of_model(str(pair["draft"]))
    copy = tmp_path / "copy"
    shutil.copytree(pair["draft"], copy)
    assert fingerprint.of_model(str(copy)) == original
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = fingerprint.of_model(str(copy))
    assert changed["weights"] != original["weights"] and changed["config"] == original["config"]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert fingerprint.of_model(str(copy))["config"] != original["config"]
    (copy / "model.safetensors").unlink()
    assert fingerprint.of_model(str(copy)) is None


def test_a_packaged_map_is_the_default_of_its_pair_only(pair, tmp_path, monkeypatch):
    _, out = run(pair, tmp_path)
    monkeypatch.setattr(headmap, "MAPS", tmp_path)
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.txt").unlink()
    models = headmap.ModelPaths(str(pair["target"]), str(pair["draft"]))
    target, draft = counts_of(pair)
    config = StsConfig()
    assert headmap.of_config(config, target, draft, models).origin == "packaged map.json"
    assert headmap.of_config(config, target, draft).origin.startswith("proportional")
    other = headmap.ModelPaths(str(pair["target"]), str(pair["target"]))
    assert headmap.of_config(config, target, draft, other).origin.startswith("proportional")
    with pytest.raises(ConfigError, match=r"head_map\.fingerprints\.draft\.config"):
        headmap.of_config(StsConfig(head_map=str(out)), target, draft, other)


@pytest.mark.parametrize("draft", ["draft", "eagle3"])
def test_the_shipped_pair_has_maps(draft):
    models = headmap.MAPS.parent / "models"
    pair = {name: models / name for name in ("target", draft)}
    paths = headmap.ModelPaths(str(pair["target"]), str(pair[draft]))
    assert headmap.of_config(StsConfig(), *counts_of(pair, draft), paths).origin.startswith("packaged")
