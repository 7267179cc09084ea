"""Calibration against brute force, planted maps, and the command from texts to a launch."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sts_kernels import torch_ops
from sts_kernels.layout import IMPORTANCE_SCALE, NO_PAGE, PAGE, WHOLE, Contexts, Lists, Pooling, Scores
from sts_sglang import checkpoints, cli, fingerprint, headmap
from sts_sglang.calibrate import alone, search
from sts_sglang.calibrate import report as reports
from sts_sglang.calibrate.directions import LEAST_STEP, Keys, Sketched
from sts_sglang.calibrate.record import (
    Pair,
    Record,
    Seen,
    Table,
    Target,
    choose_windows,
    disk_bytes,
    page_scores,
)
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.headmap import Directions, HeadCounts, HeadMap
from sts_sglang.tools import tiny_pair
from tests import tiny_architectures
from tests.oracle import Eagle3Draft

ROOT = Path(__file__).parents[1]
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
    for i, t in enumerate(WINDOWS):
        mass, scores = record.mass.read(i), {pool: table.read(i) for pool, table in record.scores.items()}
        for layer in range(4):
            for kv in range(2):
                expected = target[layer, 2 * kv : 2 * kv + 2, t : t + 4, :t].mean((0, 1))
                torch.testing.assert_close(mass[2 * layer + kv], expected, atol=1e-5, rtol=1e-4)
        for layer in range(2):
            for head in range(4):
                # Token n is row n - 1 of the draft, and position p its key p - 1.
                rows = [draft[layer, head, token - 1] for token in (t, t + 1, t + 2)]
                for pool, join in (("max", max), ("mean", lambda shares: sum(shares) / 3)):
                    expected = [0.0] + [join([float(row[p - 1]) for row in rows]) for p in range(1, t)]
                    found = scores[pool][4 * layer + head]
                    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_what_leaving_a_token_out_changes_by_definition(pair):
    record = Pair(str(pair["target"]), str(pair["draft"])).record("x", TOKENS, WINDOWS, change=True)
    model, target, hidden = attentions(pair["target"], TOKENS)
    for layer, block in enumerate(model.model.layers):
        with torch.no_grad():
            values = block.self_attn.v_proj(block.input_layernorm(hidden[layer])).double()
        output = block.self_attn.o_proj.weight.detach().double()
        dim = output.shape[1] // 4
        for i, t in enumerate(WINDOWS):
            expected = torch.zeros(2, t, dtype=torch.float64)
            for row in range(t, t + 4):
                probs = target[layer, :, row, : row + 1].double()
                own = [values[: row + 1, (h // 2) * dim : (h // 2 + 1) * dim] for h in range(4)]
                parts = [output[:, h * dim : (h + 1) * dim] for h in range(4)]
                outs = [probs[h] @ own[h] for h in range(4)]
                added = sum(part @ out for part, out in zip(parts, outs, strict=True))
                residual = float((hidden[layer][row].detach().double() + added).square().sum())
                for h in range(4):
                    apart = ((own[h] - outs[h]) @ parts[h].T).square().sum(1)
                    expected[h // 2] += (probs[h].square() * apart)[:t] / residual / 8
            found = record.change.read(i, range(2 * layer, 2 * layer + 2)).double()
            # A value near the output is a difference of large numbers.
            torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.max()), rtol=1e-3)


def test_the_error_of_a_decode_step_by_definition(pair):
    """Of every query head, over what its list has and itself; the error is of a KV head's heads together."""
    draw, dim, steps = torch.Generator().manual_seed(5), 32, [120, 171]
    chosen = [torch.rand(4, 2, 3, t, generator=draw) < 0.5 for t in steps]  # [layers, KV heads, ways, t]
    found = Target(str(pair["target"])).output_errors(
        TOKENS, steps, lambda i, seen: chosen[i][seen.layer], 3, rows_each=1
    )
    model, target, hidden = attentions(pair["target"], TOKENS)
    for layer, block in enumerate(model.model.layers):
        with torch.no_grad():
            values = block.self_attn.v_proj(block.input_layernorm(hidden[layer])).double()
        output = block.self_attn.o_proj.weight.detach().double()
        for i, t in enumerate(steps):
            added, apart = hidden[layer][t].detach().double(), torch.zeros(2, 3, output.shape[0]).double()
            for h in range(4):
                probs, kv = target[layer, h, t, : t + 1].double(), h // 2
                own = values[: t + 1, kv * dim : (kv + 1) * dim] @ output[:, h * dim : (h + 1) * dim].T
                added = added + probs @ own
                for way in range(3):
                    left = probs * torch.cat([chosen[i][layer, kv, way], torch.ones(1, dtype=torch.bool)])
                    apart[kv, way] += (left / left.sum() - probs) @ own
            expected = apart.square().sum(-1) / added.square().sum()
            torch.testing.assert_close(found[i, layer].double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("t", [80, 95])
def test_pages_are_scored_as_the_server_scores_them(t):
    draw, heads, dim = torch.Generator().manual_seed(6), 2, 32
    q, k = torch.randn(6, 100, dim, generator=draw), torch.randn(heads, 100, dim, generator=draw)
    keys, tags = k.transpose(0, 1).contiguous(), torch.full((100,), NO_PAGE, dtype=torch.int32)
    table = torch.arange(100, dtype=torch.int32).expand(2, -1).contiguous()
    contexts = Contexts(table, torch.tensor([1]), torch.tensor([t]))
    torch_ops.tag_pages(contexts, torch.tensor([0]), tags, most=t)
    sketches = torch.zeros(100, heads, 2 * dim // PAGE)
    torch_ops.sketch_pages(keys, sketches, contexts, torch.tensor([0]), tags, most=t)
    channels = torch.arange(heads, dtype=torch.int32)[None]
    lists = Lists(torch.zeros(200, dtype=torch.int32), torch.tensor([[0, 100]]), torch.full((1, 2), 48).int())
    sizes = torch_ops.size_pages(contexts, tags, lists, channels, sink=1, recent=1)
    assert (sizes.counts != WHOLE).all()
    scores = Scores(torch.zeros(heads, 64), torch.tensor([0]))
    pooling = Pooling("max", "max", 1)
    row = q[None, None, :, t].contiguous()
    torch_ops.score_pages(row, sketches, contexts, sizes, scores, scale=0.3, pooling=pooling)
    found = page_scores(Seen(0, q, k, k, 0.3), t)
    assert found.shape == (heads, t // PAGE)
    expected = scores.importance[:, : t // PAGE] / IMPORTANCE_SCALE
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def shown_keys(layers: int, k: list[torch.Tensor]) -> Keys:
    """Of texts whose keys [H_kv, T, D] are those in every layer, times its number and one."""
    keys = Keys(HeadCounts(layers, 4, k[0].shape[0]), k[0].shape[2], "cpu")
    for text in k:
        for layer in range(layers):
            keys.add(Seen(layer, text, text * (layer + 1), text, 1.0))
    return keys


def rows_of(directions: Directions, layer: int, head: int) -> tuple[torch.Tensor, ...]:
    """float64 basis [D, R], centre [R] and steps [R], as docs/calibration.md says they are read."""
    content = bytearray(directions.heads[layer][head])
    rows = torch.frombuffer(content, dtype=torch.float16).view(-1, directions.number).double()
    return rows[:-2], rows[-2], rows[-1]


def test_directions_are_those_along_which_keys_differ_most():
    """Planted: columns of a rotation with deviations 24, 23, .. beside noise, around a far mean."""
    draw, dim, number = torch.Generator().manual_seed(7), 32, 16
    planted = torch.linalg.qr(torch.randn(2, dim, dim, generator=draw)).Q
    deviations = torch.cat([torch.arange(24, 8, -1).float(), torch.full((dim - number,), 0.5)])
    mean = 30 * torch.randn(2, 1, dim, generator=draw)
    texts = [
        (torch.randn(2, n, dim, generator=draw) * deviations) @ planted.mT + mean for n in (3000, 9000, 4000)
    ]
    directions, held = shown_keys(2, texts).directions()
    assert (directions.head_dim, directions.number) == (dim, number)
    variances = deviations.square()
    assert held == pytest.approx(float(variances[:number].sum() / variances.sum()), abs=2e-3)
    everything = torch.cat(texts, 1).double()
    for layer in range(2):
        for head in range(2):
            basis, centre, step = rows_of(directions, layer, head)
            keys = everything[head] * (layer + 1)
            expected = torch.linalg.eigh(torch.cov(keys.T, correction=0)).eigenvectors.flip(1)[:, :number]
            torch.testing.assert_close(
                (expected.T @ basis).abs(), torch.eye(number).double(), atol=3e-3, rtol=0
            )
            torch.testing.assert_close(basis.T @ basis, torch.eye(number).double(), atol=2e-3, rtol=0)
            torch.testing.assert_close(centre, (keys @ basis).mean(0), atol=1e-9, rtol=1e-3)
            spread = (keys @ basis).std(0, correction=0)
            torch.testing.assert_close(step, 2.5 * spread / 7, atol=1e-9, rtol=1e-2)
    # The planted ones too, though no sample has exactly them.
    within = planted[0, :, :number].double().T @ rows_of(directions, 0, 0)[0]
    assert (within.square().sum(0) > 0.99).all()


def test_directions_of_keys_that_do_not_differ_have_steps_that_can_be_divided_by():
    keys = torch.full((1, 50, 32), 1e5)
    directions, _ = shown_keys(1, [keys]).directions()
    basis, centre, step = rows_of(directions, 0, 0)
    assert (step >= LEAST_STEP).all() and centre.isfinite().all() and basis.isfinite().all()


def test_directions_are_of_the_keys_that_a_cache_holds(pair):
    """After positions; of the target whether a draft runs with it or not, and of all tokens of all texts."""
    model = AutoModelForCausalLM.from_pretrained(pair["target"], dtype=torch.float32)
    texts = [TOKENS, TOKENS[50:130]]
    with torch.no_grad():
        caches = [model(torch.tensor([text]), use_cache=True).past_key_values for text in texts]
    target = Target(str(pair["target"]))
    assert target.head_dim == 32
    keys, too = target.keys(), target.keys()
    for text in texts:
        target.run(text, keys.add)
        Pair(str(pair["target"]), str(pair["draft"])).record("x", text, [60], keys=too)
    assert keys.number == 280
    for layer in range(4):
        own = torch.cat([cache.layers[layer].keys[0] for cache in caches], 1).double()  # [H_kv, T, D]
        torch.testing.assert_close(keys.sums[layer], own.sum(1), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(keys.products[layer], own.mT @ own, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(too.products, keys.products, rtol=1e-4, atol=1e-2)
    assert too.number == keys.number


def test_tokens_are_scored_by_sketches_of_their_keys():
    draw, heads, dim, t = torch.Generator().manual_seed(8), 2, 32, 90
    q, k = torch.randn(6, 100, dim, generator=draw), torch.randn(heads, 100, dim, generator=draw)
    k[:, 7] *= 50  # further than a sketch reaches
    directions, _ = shown_keys(3, [k[:, :7], k[:, 8:]]).directions()
    seen = Seen(1, q, 2 * k, k, 0.3)
    found = Sketched(directions).scores(seen, t)
    assert found.shape == (heads, t)
    for head in range(heads):
        basis, centre, step = rows_of(directions, 1, head)
        sketches = ((seen.k[head, :t].double() @ basis - centre) / step).round().clamp(-7, 7)
        assert sketches[7].abs().max() == 7
        rows = q[3 * head : 3 * head + 3, t].double()
        probs = torch.softmax(0.3 * (rows @ (basis * step)) @ sketches.T, -1)
        torch.testing.assert_close(found[head].double(), probs.amax(0), rtol=1e-3, atol=1e-6)


def test_keys_in_few_directions_are_ranked_by_sketches_as_by_attention():
    """What sketches leave out is then nothing but their rounding."""
    draw, dim, t = torch.Generator().manual_seed(9), 32, 300
    plane = torch.linalg.qr(torch.randn(dim, 8, generator=draw)).Q
    k = (torch.randn(2, t + 1, 8, generator=draw) @ plane.T) + torch.randn(2, 1, dim, generator=draw)
    seen = Seen(0, torch.randn(4, t + 1, dim, generator=draw), k, k, 0.5)
    directions, held = shown_keys(1, [k]).directions()
    assert held == pytest.approx(1, abs=1e-6)
    config = StsConfig(selector="draft", keep=0.1, budget=0, sink=2, recent=8)
    by_sketch, best = (
        reach(seen, t) for reach in (alone.sketch_reach(config, directions), alone.token_reach(config))
    )
    assert (by_sketch[:, :2] == 10).all() and (by_sketch[:, -8:] == 10).all()
    for n in (20, 30, 60):
        common = ((by_sketch <= n) & (best <= n)).sum(1)
        assert (common >= 0.9 * n).all(), (n, common)


def test_a_list_has_what_is_forced_then_the_highest_and_of_equal_ones_the_later():
    scores = torch.tensor([[9.0, 1.0, 1.0, 3.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0]])
    assert alone._places(scores, 1, 2).tolist() == [[3, 7, 6, 4, 5, 3, 3], [3, 7, 6, 5, 4, 3, 3]]


WAYS = ("pages, equal budgets", "pages, split budget", "sink + recent only", "best tokens, equal budgets")
BY_SKETCHES = ("tokens by sketches, equal budgets", "tokens by sketches, split budget", WAYS[0], *WAYS[2:])
ALONE = StsConfig(selector="pages", keep=0.4, budget=0, sink=2, recent=8)


class TwoHeads:
    """Head 0 wants all pages alike, and head 1 what one page in the middle says; by attention left out."""

    target_counts = HeadCounts(1, 2, 2)

    def output_errors(self, ids, steps, kept, ways, rows_each):
        assert rows_each == 1
        found = torch.zeros(len(steps), 1, 2, ways)
        for i, t in enumerate(steps):
            k = torch.zeros(2, t + 1, 16)
            k[1, 96:112, 0] = 8.0
            q = torch.ones(2, t + 1, 16)
            probs = (q[:, t, None] @ k[:, :t].mT).softmax(-1)
            found[i, 0] = (probs * ~kept(i, Seen(0, q, k, k, 1.0))).sum(-1)
        return found


def test_the_budget_of_a_target_alone_goes_to_the_head_that_loses_by_every_page():
    texts = [alone.Passage(name, [], steps) for name, steps in (("a", [400, 500]), ("b", [450]))]
    report = alone.measure(TwoHeads(), ALONE, texts, [alone.Passage("c", [], [480])], lambda text: None)
    (wide, narrow), least = report["shares"][0], ALONE.forced / 450 / 0.4
    assert least < narrow <= 0.5 and wide == 1.5
    error = report["error"]
    assert error["best tokens, equal budgets"] <= error["pages, equal budgets"] < error["sink + recent only"]
    assert error["pages, split budget"] < error["pages, equal budgets"]
    assert report["error_by_domain"]["pages, split budget"] == {"c": error["pages, split budget"]}
    assert report["list_share"] == pytest.approx(0.4, abs=0.01)
    assert report["by"] == "pages" and tuple(error) == WAYS
    # Of 480 tokens 192, which are 12 of the 30 pages, all of them alike to the first head.
    assert error["pages, equal budgets"] == pytest.approx((1 - 12 / 30) / 2, abs=0.01)


def test_the_budget_of_a_target_alone_is_split_for_tokens_where_there_are_directions():
    """Head 0 again wants all tokens alike, and head 1 those that its one direction tells."""
    texts = [alone.Passage(name, [], steps) for name, steps in (("a", [400, 500]), ("b", [450]))]
    told = torch.zeros(18, 4)  # 16 dimensions are too few for a map, not for this
    told[0, 0], told[1, 1], told[2, 2], told[3, 3], told[-1] = 1, 1, 1, 1, 8 / 7
    content = told.half().numpy().tobytes()
    directions = Directions(16, 4, ((content, content),))
    config = alone.lists_of(ALONE, "tokens")
    assert config.forced == 10 < ALONE.forced == alone.lists_of(config, "pages").forced
    held = [alone.Passage("c", [], [480])]
    report = alone.measure(TwoHeads(), config, texts, held, lambda text: None, directions)
    (wide, narrow), error = report["shares"][0], report["error"]
    assert narrow < 1 < wide and report["parts"][0] == pytest.approx(0.2 * 0.4)
    assert report["by"] == "tokens by sketches" and tuple(error) == BY_SKETCHES
    assert error[BY_SKETCHES[1]] < error[BY_SKETCHES[0]] < error["sink + recent only"]
    assert error[BY_SKETCHES[0]] == pytest.approx(error["best tokens, equal budgets"], rel=1e-3)


def test_no_list_is_measured_that_is_shorter_than_the_servers():
    steps = [alone.Passage("a", [], [300, 500])]
    parts = alone.parts_of(ALONE, steps)
    assert parts[0] == ALONE.forced / 400 and parts[-1] == 1 and parts == sorted(set(parts))
    assert alone.list_lengths(parts, 300, ALONE).tolist()[:3] == [ALONE.forced, ALONE.forced, 90]
    assert alone.list_lengths(parts, 300, ALONE)[-1] == 300


def test_a_map_by_output_weighs_windows_by_what_they_change():
    """One window that changes much decides against nine that change little; by mass every one counts."""
    scores = [[[0.0] * 60 for _ in range(2)] for _ in range(10)]
    worth = [[0.0] * 60 for _ in range(10)]
    for window in range(10):
        loud = window == 0
        worth[window][20] = 100.0 if loud else 1.0
        scores[window][0][20 if loud else 30] = 1.0  # head 0 finds it where it matters
        scores[window][1][30 if loud else 20] = 1.0
    tables = [Table.of([torch.tensor([values]) for values in worth]) for _ in range(2)]
    heard = Table.of([torch.tensor(values) for values in scores])
    record = Record("x", [60] * 10, 70, tables[0], {"max": heard, "mean": heard}, tables[1])
    one, two = HeadCounts(1, 1, 1), HeadCounts(1, 2, 1)
    config = StsConfig(keep=11 / 60, budget=0, sink=2, recent=8)
    for measure, speaker in (("mass", 1), ("output", 0)):
        windows = search.windows_of([record], config, measure)
        found = search.search(windows, search.score(windows, one), one, two, None, 1)
        assert found.head_map.sources == ((((0, speaker),),),)


def test_a_target_without_an_output_projection_is_measured_by_mass(pair, monkeypatch):
    found = Pair(str(pair["target"]), str(pair["draft"]))
    for layer in found.target.model.layers:
        layer.self_attn.out, layer.self_attn.o_proj = layer.self_attn.o_proj, torch.nn.Identity()
    with pytest.raises(ConfigError, match="--measure output: this target's attention has no o_proj"):
        found.record("x", TOKENS, WINDOWS, change=True)


def test_eagle3_head_as_the_oracle_runs_it(pair):
    record = Pair(str(pair["target"]), str(pair["eagle3"])).record("x", TOKENS, WINDOWS)
    model, _, hidden = attentions(pair["target"], TOKENS)
    head = Eagle3Draft(pair["eagle3"], model)
    count = len(TOKENS) - 1
    mask = torch.ones(count, count, dtype=torch.bool).tril()
    with torch.no_grad():
        states = head.project([h[:-1] for h in hidden])
        _, _, (attention,) = head(TOKENS[1:], states, list(range(count)), mask)
    for i, t in enumerate(WINDOWS):
        expected = attention[:, t - 1 : t + 2, : t - 1].amax(1)
        torch.testing.assert_close(record.scores["max"].read(i)[:, 1:], expected, atol=1e-5, rtol=1e-4)


def test_eagle_head_runs(pair):
    record = Pair(str(pair["target"]), str(pair["eagle"])).record("x", TOKENS, WINDOWS)
    scores = [record.scores["mean"].read(i) for i in range(len(WINDOWS))]
    assert [tuple(s.shape) for s in scores] == [(4, t) for t in WINDOWS]
    assert all(float(s.sum(1).min()) > 0.5 for s in scores)


def best(values, free, k):
    """The k highest of the positions `free`."""
    return set(sorted(free, key=lambda p: -float(values[p]))[:k])


def frees_of(t):
    return range(2, t - 8), CONFIG.budget_for(t) - 10


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_recall_by_brute_force(pair, pool):
    found = Pair(str(pair["target"]), str(pair["draft"]))
    record = found.record("x", TOKENS, WINDOWS)
    scores = search.score(search.windows_of([record], CONFIG), found.target_counts, pool)
    for row, candidate in ((0, 0), (5, 7), (7, 2)):
        recall = jaccard = 0.0
        for i, t in enumerate(WINDOWS):
            mass, score = record.mass.read(i), record.scores[pool].read(i)
            free, k = frees_of(t)
            chosen, wanted = (best(v, free, k) for v in (score[candidate], mass[row]))
            recall += sum(float(mass[row][p]) for p in chosen) / sum(float(mass[row][p]) for p in free)
            jaccard += len(chosen & wanted) / len(chosen | wanted)
        assert float(scores.recall[row, candidate]) == pytest.approx(recall / 3, abs=1e-4)
        assert float(scores.jaccard[row, candidate]) == pytest.approx(jaccard / 3, abs=1e-4)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_recall_of_a_map_by_brute_force(pair, pool):
    """Several heads, one of them twice, one target head with the latest tokens; and the bounds beside it."""
    found = Pair(str(pair["target"]), str(pair["draft"]))
    target, draft = found.target_counts, found.draft_counts
    record = found.record("x", TOKENS, WINDOWS)
    windows = search.windows_of([record], CONFIG)
    sources = [[((0, 1), (1, 2)), ()], [((1, 3), (1, 3), (0, 0)), ((0, 2),)]] * 2
    head_map = HeadMap(tuple(map(tuple, sources)), "x", pool)
    recall = search.recall_of(head_map, windows, target, draft)
    oracle, latest = search.oracle(windows, target), search.latest(windows, target)
    single, outside = search.best_single(windows, target), search.outside(windows, target)
    for i, t in enumerate(WINDOWS):
        mass, score = record.mass.read(i), record.scores[pool].read(i)
        every = [table.read(i) for table in record.scores.values()]
        free, k = frees_of(t)
        for layer in range(4):
            for h in range(2):
                own = mass[2 * layer + h]
                all_ = sum(float(own[p]) for p in free)

                def share(values, own=own, all_=all_, free=free, k=k):
                    return sum(float(own[p]) for p in best(values, free, k)) / all_

                heads = [score[4 * d + q] for d, q in sources[layer][h]]
                values = torch.arange(t)
                if heads:
                    values = torch.stack(heads).amax(0) if pool == "max" else sum(heads)
                at = (i, layer, h)
                assert float(recall[at]) == pytest.approx(share(values), abs=1e-4)
                assert float(oracle[at]) == pytest.approx(share(own), abs=1e-4)
                assert float(latest[at]) == pytest.approx(share(torch.arange(t)), abs=1e-4)
                assert float(single[at]) == pytest.approx(max(share(v) for s in every for v in s), abs=1e-4)
                assert float(outside[at]) == pytest.approx(all_, abs=1e-4)


def planted(seed: int, target: HeadCounts, draft: HeadCounts, speakers: list[int], domain="x"):
    """Draft heads of noise, except that target head i is a noisy copy of draft head speakers[i]."""
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.rand(draft.layers * draft.q_heads, t, generator=draw) ** 8 for t in (300, 400)]
    mass = [s[speakers] + 0.01 * torch.rand(len(speakers), s.shape[1], generator=draw) for s in scores]
    assert len(speakers) == target.layers * target.kv_heads
    return scores, mass, domain


def recorded(scores, mass, domain="x"):
    table = Table.of(scores)
    return Record(domain, [300, 400], 404, Table.of(mass), {"max": table, "mean": table})


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_permutation_of_unequal_head_counts_is_found_and_is_near_the_oracle(pool):
    target, draft = HeadCounts(3, 6, 3), HeadCounts(2, 7, 1)
    speakers = [13, 2, 8, 0, 5, 11, 7, 12, 3]
    windows = search.windows_of([recorded(*planted(0, target, draft, speakers))], CONFIG)
    found = search.best_map(windows, target, draft, None, 4, (pool,))
    sources = [set(heads) for layer in found.head_map.sources for heads in layer]
    assert sources == [{divmod(s, 7)} for s in speakers] and found.head_map.pool == pool
    recall = search.recall_of(found.head_map, windows, target, draft)
    assert torch.allclose(recall, search.oracle(windows, target), atol=0.02)
    torch.testing.assert_close(recall.mean(0), found.recall)
    assert float(recall.min()) > 2 * search.random(windows)


def test_the_band_limits_the_draft_layers():
    target, draft = HeadCounts(4, 2, 2), HeadCounts(4, 2, 2)
    windows = search.windows_of([recorded(*planted(1, target, draft, list(reversed(range(8)))))], CONFIG)
    head_map = search.best_map(windows, target, draft, 1).head_map
    for t, layer in enumerate(head_map.sources):
        assert all(abs(d - t) <= 1 for heads in layer for d, _ in heads)


@pytest.mark.parametrize(("kv_heads", "tp"), [(4, 1), (4, 2), (2, 4)])  # in the last, ranks share heads
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_head_listens_to_the_draft_heads_of_its_own_ranks(kv_heads, tp, pool):
    """Every head follows a draft head of the last rank, which only the last heads may listen to."""
    target, draft = HeadCounts(2, 8, kv_heads), HeadCounts(2, 8, 2)
    speakers = [8 * layer + 7 for layer in range(2) for _ in range(kv_heads)]
    windows = search.windows_of([recorded(*planted(9, target, draft, speakers))], CONFIG)
    found = search.best_map(windows, target, draft, None, 4, (pool,), tp)
    sources = found.head_map.sources
    assert headmap.foreign(sources, target, draft, tp) is None
    own = [(layer, 7) in heads for layer, of_layer in enumerate(sources) for heads in of_layer]
    of_last_rank = {1: range(4), 2: (2, 3), 4: (1,)}[tp]
    assert own == [h in of_last_rank for _ in range(2) for h in range(kv_heads)]
    assert all(len(heads) <= 4 for of_layer in sources for heads in of_layer)
    if tp > 1:
        free = search.best_map(windows, target, draft, None, 4, (pool,)).head_map.sources
        assert headmap.foreign(free, target, draft, tp)[0] == "sources[0][0]"


def test_the_ranks_of_a_shared_head_have_as_many_draft_heads_as_one_may_have():
    """It follows them all, so that every further one helps."""
    target, draft = HeadCounts(1, 4, 2), HeadCounts(2, 8, 2)
    scores, mass, _ = planted(11, target, draft, [0, 1])
    for score, own in zip(scores, mass, strict=True):
        own[:] = score.sum(0)
    windows = search.windows_of([recorded(scores, mass)], CONFIG)
    sources = search.best_map(windows, target, draft, None, 4, ("mean",), 4).head_map.sources
    assert [len(heads) for heads in sources[0]] == [4, 4]


@pytest.mark.parametrize("draft", ["draft", None])
def test_a_map_is_of_so_many_ranks(pair, tmp_path, draft):
    code, out = run(pair, tmp_path, draft, "--keep", "0.4", "--tp", "2")
    counts = counts_of(pair)
    given = (counts[0], draft and counts[1])
    assert code == 0 and json.loads(out.read_text())["tp"] == 2
    head_map = headmap.load(str(out), *given, tp=2)
    assert bool(draft) == any(heads for layer in head_map.sources for heads in layer)
    if draft is None:  # which holds for any split of the heads
        assert headmap.load(str(out), *given) == head_map
        return
    with pytest.raises(ConfigError, match=r"head_map\.tp: got 2; allowed: 1"):
        headmap.load(str(out), *given)


@pytest.mark.parametrize("draft", ["draft", None])
@pytest.mark.parametrize(("tp", "said"), [("8", "--tp 8: --model has 4 query and 2 KV heads"), ("3", "--tp")])
def test_ranks_that_cannot_share_the_heads_are_refused(pair, tmp_path, capsys, draft, tp, said):
    try:
        code, out = run(pair, tmp_path, draft, "--keep", "0.4", "--tp", tp)
    except SystemExit as error:
        code, out = error.code, tmp_path / "map.json"
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and not out.exists() and len(errors) == 1 and said in errors[0]


@pytest.mark.parametrize("name", checkpoints.OWN_LAYERS)
def test_a_models_own_layer_is_not_run(pair, tmp_path, name):
    """For the next token but one, which SGLang drafts with where such a model is the draft."""
    draft = str(tiny_architectures.own_layer(tmp_path, name))
    with pytest.raises(ConfigError, match=f"^--draft .*the layer that {name} has .*--no-recall"):
        Pair(str(pair["target"]), draft)


def test_a_head_that_follows_two_gets_both_and_not_more_than_allowed():
    target, draft = HeadCounts(1, 1, 1), HeadCounts(1, 6, 1)
    scores, mass, _ = planted(2, target, draft, [4])
    for score, own in zip(scores, mass, strict=True):
        own[0] = torch.maximum(score[1], score[4])
    windows = search.windows_of([recorded(scores, mass)], CONFIG)
    for heads, expected in ((4, {1, 4}), (1, None)):
        sources = search.best_map(windows, target, draft, None, heads, ("max",)).head_map.sources[0][0]
        assert {q for _, q in sources} == expected if expected else len(sources) == 1


def test_under_the_mean_a_head_that_counts_more_is_taken_more_often():
    target, draft = HeadCounts(1, 1, 1), HeadCounts(1, 6, 1)
    scores, mass, _ = planted(3, target, draft, [4])
    for score, own in zip(scores, mass, strict=True):
        own[0] = 2 * score[1] + score[4]
    windows = search.windows_of([recorded(scores, mass)], CONFIG)
    found = search.best_map(windows, target, draft, None, 4)
    assert found.head_map.pool == "mean"  # the better of both for this
    assert [q for _, q in found.head_map.sources[0][0]] == [1, 1, 4]


def test_the_budget_goes_to_heads_whose_attention_is_spread():
    """Heads 0 and 3 attend evenly, the others to what their draft head finds: those need few tokens."""
    target, draft = HeadCounts(2, 4, 2), HeadCounts(1, 4, 2)
    scores, mass, _ = planted(3, target, draft, [0, 1, 2, 3])
    for m, s in zip(mass, scores, strict=True):
        m[[1, 2]] = torch.where(s[[1, 2]] > s[[1, 2]].quantile(0.97), 1.0, 0.0)
        m[[0, 3]] = 1.0
    windows = search.windows_of([recorded(scores, mass)], CONFIG)
    sources = (((((0, 0)),), ((0, 1),)), (((0, 2),), ((0, 3),)))
    head_map = search.split_budget(HeadMap(sources, "x", "max"), windows, target, draft, 0.25)
    flat = [share for row in head_map.shares for share in row]
    assert sum(flat) / 4 == pytest.approx(1, abs=0.1) and sum(flat) <= 4 + 1e-6
    assert min(flat[0], flat[3]) > 1 > max(flat[1], flat[2])
    lost = search.lost(head_map, windows, target, draft, 0.25)
    assert lost["split budget"] < lost["uniform budget"]


def test_lost_attention_by_brute_force(pair):
    found = Pair(str(pair["target"]), str(pair["draft"]))
    target, draft = found.target_counts, found.draft_counts
    record = found.record("x", TOKENS, WINDOWS)
    windows = search.windows_of([record], CONFIG)
    sources = [[((0, 1), (1, 2)), ()], [((1, 3), (0, 0)), ((0, 2),)]] * 2
    shares = ((0.5, 1.5), (2.0, 1.0), (0.2, 0.8), (1.0, 1.0))
    head_map = HeadMap(tuple(map(tuple, sources)), "x", "max", shares=shares)
    lost = search.lost(head_map, windows, target, draft, 0.25)
    total = {"uniform budget": 0.0, "split budget": 0.0}
    for i, t in enumerate(WINDOWS):
        mass, score = record.mass.read(i), record.scores["max"].read(i)
        free, _ = frees_of(t)
        for layer in range(4):
            for h in range(2):
                own, heads = mass[2 * layer + h], [score[4 * d + q] for d, q in sources[layer][h]]
                values = torch.stack(heads).amax(0) if heads else torch.arange(t)
                for name, share in (("uniform budget", 1.0), ("split budget", shares[layer][h])):
                    k = max(0, math.ceil(0.25 * share * t - 1e-6) - (t - len(free)))
                    kept = best(values, free, k)
                    total[name] += sum(float(own[p]) for p in free if p not in kept) / (8 * len(WINDOWS))
    assert lost == pytest.approx(total, abs=1e-4)


def near_end(mass):
    """As much to the end of the context as is needed that the latest tokens win."""
    for own in mass:
        own[1:, -60:] += 5.0


def test_heads_take_the_latest_tokens_where_they_win_in_every_domain_and_never_all():
    target, draft = HeadCounts(1, 3, 3), HeadCounts(1, 6, 1)
    both = [planted(seed, target, draft, [4, 2, 3], domain) for seed, domain in ((4, "a"), (5, "b"))]
    near_end(both[0][1])

    def sources():
        windows = search.windows_of([recorded(*text) for text in both], CONFIG)
        found = search.best_map(windows, target, draft)
        recall = search.recall_of(found.head_map, windows, target, draft)
        torch.testing.assert_close(recall.mean(0), found.recall)
        return found.head_map.sources[0]

    assert [bool(own) for own in sources()] == [True, True, True]  # one domain only
    near_end(both[1][1])
    assert [bool(own) for own in sources()] == [True, False, False]
    for _, mass, _ in both:
        for own in mass:
            own[0, -60:] += 4.0
    assert [bool(own) for own in sources()] == [True, False, False]  # the least gain keeps its draft head


def test_tables_give_back_what_was_written():
    draw = torch.Generator().manual_seed(0)
    values = [torch.rand(9, t, generator=draw) for t in (5, 8, 3)]
    table = Table(9, [5, 8, 3])
    assert not table.read(1).any()
    for i in (2, 0, 1):
        for first in (6, 0, 3):
            table.write(i, first, values[i][first : first + 3])
    for i, value in enumerate(values):
        assert torch.equal(table.read(i), value)
        for rows in ([0], [3, 4, 5, 1], [8, 8, 0], [0, 2, 7], range(2, 7)):
            assert torch.equal(table.read(i, rows), value[list(rows)])
    counts = HeadCounts(3, 6, 3)
    assert disk_bytes(counts, HeadCounts(1, 2, 1), [5, 8, 3]) == 4 * (9 + 2 * 2) * 16
    assert disk_bytes(counts, HeadCounts(1, 2, 1), [5, 8, 3], change=True) == 4 * (18 + 2 * 2) * 16


PEAK = """
import re, sys, torch
from sts_sglang.calibrate import record, search
from sts_sglang.config import StsConfig
from sts_sglang.headmap import HeadCounts
torch.set_num_threads(1)
target, draft, dim, tokens, count = HeadCounts(32, 32, 8), HeadCounts(16, 32, 8), 128, 4096, 16
texts = 4
windows = [tokens - 4 - i for i in range(count)]  # the longest there can be
few = HeadCounts(2, 32, 8)  # target layers searched here; the files hold all 32

q, k = torch.randn(32, tokens, dim, dtype=torch.bfloat16), torch.randn(8, tokens, dim, dtype=torch.bfloat16)
def rss(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
torch.rand(8, 8) @ torch.rand(8, 8); torch.rand(9).topk(2); torch.rand(9).sort()  # libraries load
open("/proc/self/clear_refs", "w").write("5")  # the peak so far, imports included, is forgotten
start = rss("VmRSS")
mass, change = (record.Table(few.layers * 8, windows) for _ in range(2))
states, output = torch.randn(2, tokens, 4096, dtype=torch.bfloat16)
start = rss("VmRSS")
scores = {pool: record.Table(16 * 32, windows) for pool in ("max", "mean")}
for layer in range(2):
    for i, t in enumerate(windows):
        probs = record._attention(q, k, range(t, t + 4), dim**-0.5)
        mass.write(i, 8 * layer, probs[:, :, :t].mean(1).view(8, -1, t).mean(1))
        seen = record.Seen(layer, q, k, k, dim**-0.5, states, output)
        change.write(i, 8 * layer, record._changes(seen, range(t, t + 4), probs)[:, :t])
        del probs
for i, t in enumerate(windows):
    rows = record._attention(q, k, range(t - 1, t + 2), dim**-0.5)[..., : t - 1]
    for table in scores.values():
        for layer in range(16):
            table.write(i, 32 * layer, torch.nn.functional.pad(rows.amax(1), (1, 0)).roll(7 * layer, 1))
text = record.Record("x", windows, tokens, mass, scores, change)
windows = search.windows_of([text] * texts, StsConfig(budget=0), "output")
search.search(windows, search.score(windows, few, "mean"), few, draft, None, 2, "mean")
search.best_single(windows[:2], few)
print(rss("VmHWM") - start, search.working_bytes(target, draft, tokens, texts * count, dim))
"""


def test_memory_of_an_8b_target_with_a_1b_draft_stays_below_the_bound():
    """One process at the real shapes and lengths; fewer target layers, which the bound does not count."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT)
    used, bound = map(int, done.stdout.split())
    assert bound < 110e6
    assert used < bound


def test_windows_are_inside_the_text_and_follow_the_seed():
    windows = choose_windows(1000, 16, 300, seed=1)
    assert windows == sorted(set(windows)) and windows[0] >= 300 and windows[-1] + 4 <= 1000
    assert windows == choose_windows(1000, 16, 300, seed=1) != choose_windows(1000, 16, 300, seed=2)
    with pytest.raises(ConfigError, match="too short"):
        choose_windows(310, 16, 300, seed=1)


def run(pair, folder, draft: str | None = "draft", *more):
    folder.mkdir(exist_ok=True)
    texts = {}
    for name, seed in (("a", 1), ("b", 2), ("held", 3)):
        letters = torch.randint(97, 123, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
        texts[name] = folder / f"{name}.txt"
        texts[name].write_text("".join(map(chr, letters)))
    out = folder / "map.json"
    code = cli.main(
        ["calibrate", "--model", str(pair["target"]), "--out", str(out)]
        + (["--draft", str(pair[draft])] if draft else [])
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
    assert "proportional default" in shown and "oracle" in shown and "map keeps dense: [0, 1, 2, 3]" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    recall = json.loads(report.read_text())["recall"]
    assert 0 < recall["calibrated"] <= recall["oracle"] and 0 < recall["random"] < recall["oracle"]
    models = headmap.ModelPaths(str(pair["target"]), str(pair[draft]))
    head_map = headmap.load(str(out), *counts_of(pair, draft), models)
    assert head_map.dense_layers == (0, 1, 2, 3) and head_map.pool in ("max", "mean")
    assert json.loads(report.read_text())["dense_layers"] == [0, 1, 2, 3]
    again, other = run(pair, tmp_path / "again", draft, "--dense-below", "1")
    assert again == 0 and json.loads(other.read_text()) == json.loads(out.read_text())


@pytest.mark.parametrize(
    ("selector", "ways"),
    [((), BY_SKETCHES), (("--selector", "tokens"), BY_SKETCHES), (("--selector", "pages"), WAYS)],
)
def test_command_without_a_draft_writes_map_table_report_and_plot(pair, tmp_path, capsys, selector, ways):
    pytest.importorskip("matplotlib")
    plot, report = tmp_path / "map.png", tmp_path / "report.json"
    flags = ("--keep", "0.4", "--plot", str(plot), "--report", str(report), *selector)
    code, out = run(pair, tmp_path, None, *flags)
    assert code == 0
    shown = capsys.readouterr()
    table, progress = shown.out.splitlines(), shown.err.splitlines()
    assert [line.strip() for line in progress if "[" in line] == ["[1/2] a", "[2/2] b", "[1/1] held"]
    rows = [line for line in table if re.match("  [a-z]", line)]
    assert len(rows) == len(ways)
    assert all(row.startswith(f"  {name} ") for row, name in zip(rows, ways, strict=True))
    by_tokens = ways == BY_SKETCHES
    assert ("16 directions of the 32 that keys have hold" in shown.out) == by_tokens
    assert ("the map has no directions of keys\n" in shown.out) != by_tokens
    assert any("the split takes away" in line for line in table)
    assert table[-1] == f"""wrote {out}; use it with --sts-config '{{"head_map": "{out}"}}'"""
    assert plot.read_bytes().startswith(b"\x89PNG")
    target, _ = counts_of(pair)
    models = headmap.ModelPaths(str(pair["target"]), None)
    head_map = headmap.of_config(StsConfig(head_map=str(out)), target, None, models)
    found = json.loads(report.read_text())
    assert [list(row) for row in head_map.shares] == found["shares"] and head_map.dense_layers == ()
    assert sum(map(sum, found["shares"])) <= 8 + 1e-6
    error = found["error"]
    assert error["best tokens, equal budgets"] < error["pages, equal budgets"] < error["sink + recent only"]
    data = json.loads(out.read_text())
    assert data["settings"]["selector"] == ("tokens" if by_tokens else "pages")
    if by_tokens:
        assert error["best tokens, equal budgets"] < error[ways[0]] < error["pages, equal budgets"]
        assert data["directions"] == head_map.directions.to_field()
        _, of_pair = run(pair, tmp_path / "pair", "draft", "--keep", "0.4")
        with_draft = headmap.load(str(of_pair), *counts_of(pair))
        own, too = (Sketched(each)._packed.float() for each in (head_map.directions, with_draft.directions))
        torch.testing.assert_close(own[..., -2:, :].abs(), too[..., -2:, :].abs(), rtol=0.02, atol=0.02)
    else:
        assert "directions" not in data and head_map.directions is None
    assert data["draft"] is None and set(data) <= set(headmap.ALONE)
    assert [text["domain"] for text in data["texts"]] == ["a", "b"] and data["settings"]["keep"] == 0.4
    again, other = run(pair, tmp_path / "again", None, "--keep", "0.4", *selector)
    assert again == 0 and json.loads(other.read_text()) == data
    wrong = headmap.ModelPaths(str(pair["draft"]), None)
    with pytest.raises(ConfigError, match=r"head_map\.fingerprints\.target\.config"):
        headmap.of_config(StsConfig(head_map=str(out)), target, None, wrong)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--heads", "6"], "--heads: is about draft heads"),
        (["--pool", "auto"], "--pool: is about draft heads"),
        (["--band", "all"], "--band: is about draft heads"),
        (["--dense-below", "0.5"], "--dense-below: is about draft heads"),
        (["--measure", "mass"], "--measure: got 'mass' without --draft; allowed: output"),
        (["--budget", "uniform"], "--budget: got 'uniform' without --draft"),
        (
            ["--selector", "pages", "--keep", "0.2"],
            "too short for 3 windows beyond 401 tokens",
        ),  # 79 tokens are on every list
    ],
)
def test_what_says_nothing_of_a_target_alone_is_refused_without_a_draft(pair, tmp_path, capsys, flags, said):
    code, out = run(pair, tmp_path, None, "--keep", "0.4", *flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not out.exists()
    assert len(errors) == 1 and said in errors[0] and "allowed: " in errors[0] and len(errors[0]) < 300


def test_heads_without_sketches_are_refused_without_a_draft(pair, tmp_path, capsys, monkeypatch):
    target = Target(str(pair["target"]))
    target.check_pages()
    target.target.config.head_dim = 12
    with pytest.raises(ConfigError, match="--model: heads of 12 dimensions; allowed: a multiple of 16"):
        target.check_pages()
    monkeypatch.setattr(Target, "head_dim", 12)
    assert run(pair, tmp_path, None)[0] == 2
    assert "error: --model: heads of 12 dimensions; allowed: a multiple of 16" in capsys.readouterr().err


def test_heads_without_directions_have_their_budget_split_for_pages(pair, tmp_path, capsys, monkeypatch):
    """And a map of a pair of them has none; both say so."""
    monkeypatch.setattr("sts_sglang.headmap.HEAD_DIMS", (36, 1024))
    monkeypatch.setattr(reports, "HEAD_DIMS", (36, 1024))
    said = (
        "the map has no directions of keys: its heads have 32 dimensions, and not a multiple of 4 from 36 on"
    )
    for draft in (None, "draft"):
        code, out = run(pair, tmp_path, draft, "--keep", "0.4")
        assert code == 0 and said in capsys.readouterr().out
        data = json.loads(out.read_text())
        assert "directions" not in data and data["settings"].get("selector") == (None if draft else "pages")
    code, _ = run(pair, tmp_path, None, "--selector", "tokens")
    assert code == 2
    assert "error: --selector tokens: --model has heads of 32 dimensions; allowed:" in capsys.readouterr().err


def test_the_table_says_when_a_split_is_worth_nothing():
    report = {
        "shares": [[1.0, 1.0]],
        "by": "pages",
        "directions": {"head_dim": 32, "number": 0, "variance": 0.0},
        "error": dict(zip(WAYS, (0.002, 0.003, 0.004, 0.001), strict=True)),
        "error_by_domain": {name: {"x": 0.1} for name in WAYS},
        "list_share": 0.1,
    }
    assert "no better than none" in reports.table_alone(report)
    report["error"]["pages, split budget"] = 0.001
    shown = reports.table_alone(report)
    assert "no better" not in shown and "takes away 50.0%" in shown


def test_the_table_says_what_it_leaves_out(pair, tmp_path, capsys):
    """More weak heads than it shows, and a gap that is too small for a share of it."""
    report = tmp_path / "report.json"
    run(pair, tmp_path, "draft", "--report", str(report))
    found = json.loads(report.read_text())
    found["weak_heads"] = [{"layer": n, "head": 0, "recall": 0.1} for n in range(reports.SHOWN + 3)]
    for by_mean, by_mass, said in (
        (0.4, None, "closes 40%\n"),
        (None, 0.3, "closes 30% by mass"),
        (None, None, ""),
    ):
        text = reports.table(found | {"gap_closed": by_mean, "gap_closed_by_mass": by_mass})
        assert said in text and ("the map closes" in text) == bool(said)
        assert "and 3 more, all of them in --report" in text and text.count("  layer ") == reports.SHOWN


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--keep", "0"], "--keep"),
        (["--keep", "nan"], "--keep"),
        (["--keep", "1.01"], "--keep"),
        (["--keep", "some"], "--keep"),
        (["--sink", "0"], "--sink"),
        (["--recent", "-1"], "--recent"),
        (["--dense-below", "1.5"], "--dense-below"),
        (["--dense-below", "-0.1"], "--dense-below"),
        (["--dense-below", "nan"], "--dense-below"),
        (["--dense-below", "half"], "--dense-below"),
        (["--heads", "0"], "--heads"),
        (["--heads", "65"], "--heads"),
        (["--tokens", "9" * 5000], "--tokens"),
        (["--band", "near"], "--band"),
        (["--seed", "-1"], "--seed"),
        (["--pool", "sum"], "--pool"),
        (["--selector", "tokens"], "--selector"),
        (["--selector", "draft"], "--selector"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda:99"], "--device"),
        (["--device", "cpu:1"], "--device"),
        (["--windows", "4000"], "--windows"),
        (["--plot", "/no/such/folder/x.png"], "--plot"),
        (["--plot", "{folder}/x.doc"], "--plot"),
        (["--out", "{folder}"], "--out"),
        (["--report", "{folder}"], "--report"),
        (["--model", "/no/such/model"], "--model"),
        (["--draft", "/no/such/model"], "--draft"),
        (["--text", "/no/such/text"], "--text"),
        (["--text", "/dev"], "--text"),
        (["--text", "{folder}/binary.txt"], "--text"),
        (["--text", "{folder}/empty.txt"], "--text"),
        (["--holdout", "{folder}/empty.txt"], "--holdout"),
        (["--holdout", "{folder}/huge.txt"], "--holdout"),
        (["--text", "{folder}/held.txt"], "--holdout"),
    ],
)
def test_refusals_are_one_line_that_names_the_flag(pair, tmp_path, capsys, flags, named):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_text("")
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(65 << 20)
    try:
        code, _ = run(pair, tmp_path, "draft", *(flag.format(folder=tmp_path) for flag in flags))
    except SystemExit as error:  # argparse's own
        code = error.code
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line or "usage" in line]
    assert code == 2 and not (tmp_path / "map.json").exists()
    assert len(error) == 1 and error[0].startswith("error: ") and named in error[0]
    assert "allowed: " in error[0] or "invalid" in error[0]
    assert len(error[0]) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("model", ["target", "draft"])
def test_texts_longer_than_a_model_has_positions_are_refused(pair, tmp_path, capsys, model):
    short = {name: tmp_path / name for name in ("target", "draft")}
    for name, folder in short.items():
        shutil.copytree(pair[name], folder)
    config = json.loads((short[model] / "config.json").read_text())
    (short[model] / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 300}))
    code, out = run(short, tmp_path)
    assert code == 2 and not out.exists()
    assert "error: --tokens 4096: --text a has 400" in capsys.readouterr().err
    assert run(short, tmp_path, "draft", "--tokens", "300")[0] == 0


def test_a_model_without_weights_is_refused_before_it_runs(pair, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(pair["draft"], copy)
    (copy / "model.safetensors").rename(copy / "model.bin")
    code, _ = run({**pair, "draft": copy}, tmp_path)
    shown = capsys.readouterr().err
    assert code == 2 and "error: --draft" in shown and "[1/2]" not in shown


# Logits of about 10 through four layers: 8 bits of mantissa leave 0.04 of a probability, 11 bits an eighth.
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.01)])
def test_half_precision_gives_nearly_the_same_windows(pair, dtype, tolerance):
    exact = Pair(str(pair["target"]), str(pair["eagle3"])).record("x", TOKENS, WINDOWS)
    half = Pair(str(pair["target"]), str(pair["eagle3"]), "cpu", dtype).record("x", TOKENS, WINDOWS)
    tables = [(exact.mass, half.mass), *((exact.scores[p], half.scores[p]) for p in ("max", "mean"))]
    for a, b in tables:
        for i in range(len(WINDOWS)):
            assert float((a.read(i) - b.read(i)).abs().max()) < tolerance


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


@pytest.mark.parametrize("draft", ["draft", "eagle3", None])
def test_the_shipped_models_have_maps(draft):
    """All with the same directions, for they are of the target's keys alone."""
    models = headmap.MAPS.parent / "models"
    pair = {name: models / name for name in ("target", draft) if name}
    paths = headmap.ModelPaths(str(pair["target"]), draft and str(pair[draft]))
    counts = counts_of(pair, draft) if draft else [*counts_of(pair, "target")[:1], None]
    found = headmap.of_config(StsConfig(), *counts, paths)
    assert found.origin.startswith("packaged") and found.shares is not None
    alone = headmap.load(str(headmap.MAPS / "none.json"), counts[0], None)
    assert found.directions == alone.directions is not None
    on_two = headmap.of_config(StsConfig(), *counts, paths, 2)
    assert on_two.directions == alone.directions
    assert on_two.origin.startswith("proportional" if draft else "packaged none.json")
