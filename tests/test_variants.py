"""Ways to select, compared offline: on a tiny random target with a draft and a head of the same kind."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "models"))

import fit  # noqa: E402
import plots  # noqa: E402
import pretrained  # noqa: E402
import replay  # noqa: E402
import variants  # noqa: E402
from model import Trace  # noqa: E402

from benchmarks import tables  # noqa: E402
from benchmarks.tables import variants as compared  # noqa: E402
from sts_kernels import torch_ops  # noqa: E402
from sts_kernels.layout import Carried, Contexts, KvPool, Members, Pooling, Scores  # noqa: E402
from sts_sglang.headmap import HeadMap  # noqa: E402

LAYERS, VOCAB, LENGTH, ROWS = 6, 300, 128, 16
TABLE = variants.variants()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A target of six query and two KV heads with its three drafts, none of them trained; a text."""
    root = tmp_path_factory.mktemp("variants")
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=VOCAB, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "target")
    rng = np.random.default_rng(0)
    stream = (rng.integers(0, VOCAB, 3000) ** 2 // VOCAB).astype(np.uint16)
    for name in ("train", "heldout"):
        stream.tofile(root / f"{name}.bin")
    pretrained.DRAFT_VOCAB = 100
    where = ["--target", str(root / "target")]
    small = ["--device", "cpu", "--tokens", "160", "--longest", "160", "--steps", "1"]
    pretrained.main(["train", *where, "--corpus", str(root), "--out", str(root / "ck"), *small])
    pretrained.main(["export", *where, "--models", str(root / "ck"), "--out", str(root / "drafts")])
    return root


class Study:
    """A pair, fitted to one window, and another window."""

    def __init__(self, root: Path, draft: str):
        self.pair = replay.load_pair(root / "target", root / "drafts" / draft, None, "cpu")
        self.rows = replay.Rows(LENGTH, ROWS, "cpu", sink=4, recent=16)
        ids = torch.from_numpy(np.fromfile(root / "heldout.bin", np.uint16).astype(np.int64))
        first, self.window = (
            self.pair.window(i, ids[start : start + LENGTH + 1], self.rows)
            for i, start in ((-1, 0), (0, 900))
        )
        self.fit = fit.Fit(self.pair, [first], self.rows, keep=0.3)

    def counts(self, name: str, keep: float) -> torch.Tensor | None:
        variant = TABLE[name]
        return variant.budget(self.fit, self.rows, variant.importance(self.fit, self.window), keep)

    def replayed(self, name: str, keep: float) -> replay.Replayed:
        variant = TABLE[name]
        choose = variant.choose(variant.importance(self.fit, self.window))
        return replay.sparse(self.pair, self.window, self.rows, choose, self.counts(name, keep))


@pytest.fixture(scope="module", params=["plain", "eagle3"])
def study(folders, request) -> Study:
    return Study(folders, request.param)


def test_nothing_is_lost_where_everything_is_kept(study) -> None:
    whole = replay.dense(study.pair, study.window, study.rows)
    for name in TABLE:
        found = study.replayed(name, 1.0)
        assert found.loss == whole and found.kept == 1 and found.error == [0] * LAYERS, name


def test_dense_is_what_the_target_gives(study) -> None:
    ids = study.window.ids
    losses, _ = study.pair.target.losses(study.pair.target(ids[None, :-1]), ids[1:])
    whole = replay.dense(study.pair, study.window, study.rows)
    assert whole == pytest.approx(float(losses[-ROWS:].mean()), rel=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_lists_have_the_size_of_their_budget(study, name) -> None:
    keep, variant = 0.6, TABLE[name]
    counts, sizes = study.counts(name, keep), []
    choose = variant.choose(variant.importance(study.fit, study.window))

    def noted(at: replay.Look, own: torch.Tensor) -> torch.Tensor:
        chosen = choose(at, own)
        assert not (chosen & ~study.rows.context).any() and (chosen | ~study.rows.forced).all()
        sizes.append(chosen.sum(-1))
        return chosen

    replay.sparse(study.pair, study.window, study.rows, noted, counts)
    assert torch.equal(torch.stack(sizes), counts)
    budget = torch.tensor([-(-int(n) * 6 // 10) for n in study.rows.lengths])
    if variant.budget is variants.uniform:
        assert (counts == budget).all()
    elif "extra" not in name:
        assert float(counts.sum()) == pytest.approx(float(budget.sum()) * counts[..., 0].numel(), rel=0.05)


def test_the_oracle_holds_most(study) -> None:
    held = {name: study.replayed(name, 0.3).held for name, v in TABLE.items() if v.family == "baselines"}
    del held["oracle contribution"]
    assert max(held, key=held.get) == "oracle" and held["oracle"] < 1


def test_a_better_map_is_found_than_the_default(study) -> None:
    """By each measure, on the window that it is fitted to."""
    (window,), rows = study.fit.windows, study.rows
    count = rows.counts(0.3)
    for which, measure in enumerate(fit.MEASURES):
        lost = []
        for own in (study.fit.proportional, study.fit.single(measure), study.fit.joined(measure)):
            scores = fit.importance(window, own)
            found = [
                study.fit.measured(0, study.fit.look(0, i), rows.select(scores[i], count)[None])[which, :, 0]
                for i in range(LAYERS)
            ]
            lost.append(torch.stack(found))
        default, single, joined = lost
        assert (joined <= single + 1e-6).all() and joined.sum() < default.sum()


def test_a_draft_scores_as_the_ops_do(folders) -> None:
    """One carried row and two decode steps of every draft layer, over the draft's own KV."""
    study = Study(folders, "plain")
    pair, trace = study.pair, Trace([], [], [])
    pair.draft(study.window.ids[None, 1:-1], trace)
    heads, length = pair.draft.config.num_attention_heads, int(study.rows.lengths[1])
    expected = torch.zeros(pair.head_counts()[1].layers * heads, LENGTH)
    contexts = Contexts(
        torch.arange(LENGTH, dtype=torch.int32)[None],
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([length]),
    )
    members = Members(
        torch.arange(heads, dtype=torch.int32),
        torch.arange(heads, dtype=torch.int32)[:, None],
        torch.ones(heads),
        torch.ones(heads, dtype=torch.bool),
    )
    for layer, (q, k) in enumerate(zip(trace.queries, trace.keys, strict=True)):
        scores = Scores(expected[layer * heads : (layer + 1) * heads], torch.zeros(1, dtype=torch.int64))
        for step in range(2):
            carried = Carried(q[length - 1][None] if step == 0 else None, torch.tensor([length]))
            torch_ops.draft_attention(
                q[length + step][None], KvPool(k, k), contexts, scores, members, carried,
                step=step, num_steps=3, scale=q.shape[-1] ** -0.5, pooling=Pooling("max", "max", 3),
            )  # fmt: skip
    torch_ops.spread_importance(
        Scores(expected, torch.zeros(1, dtype=torch.int64)), contexts.lens, factor=0.5, over=1
    )
    own = study.fit.heard(study.window)[:, 1] * study.rows.context[1]
    assert torch.allclose(own * torch_ops.IMPORTANCE_SCALE, expected, rtol=1e-4, atol=1e-2)


def test_a_served_map_selects_as_served(study) -> None:
    """One head of the draft for some, the latest tokens for others, twice the budget for one."""
    target, draft = study.pair.head_counts()
    sources = tuple(tuple(((0, 1),) if h else () for h in range(target.kv_heads)) for _ in range(LAYERS))
    shares = tuple(tuple(2.0 if (t, h) == (1, 1) else 1.0 for h in range(2)) for t in range(LAYERS))
    head_map = HeadMap(sources, "here", "mean", dense_layers=(2,), shares=shares)
    variant = variants.served(head_map, study.pair)["served map"]
    scores = variant.importance(study.fit, study.window)
    counts = variant.budget(study.fit, study.rows, scores, 0.4)
    assert torch.equal(counts[2], study.rows.lengths.expand(2, -1))
    assert float(counts[1, 1, 0] / counts[1, 0, 0]) == pytest.approx(2, rel=0.05)
    latest = study.rows.select(study.rows.place.float().expand(study.rows.verifies, -1), counts[0, 0])
    assert torch.equal(study.rows.select(scores[0, 0], counts[0, 0]), latest)
    one = fit.spread(study.window.heard[1, : fit.DRAFTED].mean(0), fit.SPREAD)
    assert torch.allclose(scores[0, 1], one)


def test_budgets_go_where_they_save_most() -> None:
    lost = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0]).expand(2, 2, -1).clone()
    lost[0, 0] *= 100
    parts = fit.split(lost, 0.3, 0.02)
    assert float(parts.mean()) == pytest.approx(0.3)
    assert parts[0, 0] == parts.max() and parts.min() >= 0.02
    assert (fit.split(lost, 1.0, 0.02) == 1).all()


def test_a_run_goes_on_and_is_summed_up(folders, tmp_path, monkeypatch) -> None:
    out = tmp_path / "variants" / "found.jsonl"
    out.parent.mkdir()

    def run(*more: str) -> list[dict]:
        variants.main(
            ["--target", str(folders / "target"), "--draft", str(folders / "ck" / "looking.safetensors"),
             "--text", str(folders / "heldout.bin"), "--out", str(out), "--device", "cpu", "--length", "160",
             "--rows", "16", "--windows", "3", "--calibration", "1", "--keep", "0.5", "1", *more]
        )  # fmt: skip
        return [json.loads(line) for line in out.with_suffix(".summary.jsonl").read_text().splitlines()]

    first = run("--variants", "oracle", "--minutes", "5")
    assert [(r["variant"], r["keep"], r["windows"]) for r in first] == [("oracle", 0.5, 3), ("oracle", 1, 3)]
    lines = out.read_text()
    found = run("--variants", "oracle", "draft", "map output 1", "--minutes", "5")
    assert out.read_text().startswith(lines) and len(out.read_text().splitlines()) == 1 + 3 * 2 * 3
    assert found[:2] == first and all(r["loss"] == 0 for r in found if r["keep"] == 1)
    assert run("--variants", "recent", "--minutes", "0")[:2] == first, "time is up before the first window"
    with pytest.raises(SystemExit, match="is of other settings"):
        run("--rows", "8")
    plots.variants(out.with_suffix(".summary.jsonl"))
    assert out.with_suffix(".png").stat().st_size > 0
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    shown = compared.pair("found")
    assert "| oracle | " in shown and f"{found[0]['loss']:+.2f} ± " in shown
    assert compared.pair("none") == tables.MISSING


def test_what_is_not_there_is_said_in_a_line(folders, tmp_path) -> None:
    target = folders / "target"
    with pytest.raises(SystemExit, match="has no config.json"):
        replay.load_pair(target, tmp_path, None, "cpu")
    with pytest.raises(SystemExit, match="eagle3 is EAGLE3, not STANDALONE"):
        replay.load_pair(target, folders / "drafts" / "eagle3", "STANDALONE", "cpu")
    short = Namespace(target=target, text=[folders / "heldout.bin"], length=4096, windows=2, calibration=1)
    with pytest.raises(SystemExit, match="need more"):
        variants.texts(short)
