"""The default head map, and the refusal of map files that do not fit."""

from __future__ import annotations

import json

import pytest
import torch

from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.headmap import HeadCounts, ModelPaths, load, of_config, proportional
from sts_sglang.importance import members_by_layer

TARGET, DRAFT = HeadCounts(4, 8, 2), HeadCounts(2, 4, 2)


def valid() -> dict:
    return {
        "version": 1,
        "shift": 1,
        "tp": 1,
        "target": TARGET._asdict(),
        "draft": DRAFT._asdict(),
        "sources": [[[[layer // 2, head]] for head in range(2)] for layer in range(4)],
    }


@pytest.mark.parametrize(
    ("target", "draft", "expected"),
    [
        ((4, 8, 2), (2, 4, 2), [[0, 1], [2, 3]]),  # more draft heads than KV heads
        ((2, 8, 4), (1, 2, 1), [[0], [0], [1], [1]]),  # fewer
        ((2, 6, 3), (1, 4, 2), [[0, 1], [1, 2], [2, 3]]),  # neither divides
        ((2, 4, 2), (1, 1, 1), [[0], [0]]),
        ((2, 32, 8), (1, 32, 8), [[4 * h + i for i in range(4)] for h in range(8)]),
    ],
)
def test_proportional_heads(target, draft, expected):
    head_map = proportional(HeadCounts(*target), HeadCounts(*draft))
    assert [[head for _, head in heads] for heads in head_map.sources[0]] == expected


def test_proportional_layers_share_channels():
    head_map = proportional(TARGET, DRAFT)
    assert [{layer for layer, _ in heads[0]} for heads in head_map.sources] == [{0}, {0}, {1}, {1}]
    assert len(head_map.channels) == 4
    assert head_map.head_channels(0) == head_map.head_channels(1) != head_map.head_channels(2)


def test_sources_are_read_in_order_and_shares_add_up_over_the_draft_layers(tmp_path):
    data = valid()
    data["sources"][0][0] = [[1, 3], [0, 1], [1, 0]]
    path = tmp_path / "map.json"
    path.write_text(json.dumps(data))
    head_map = load(str(path), TARGET, DRAFT)
    assert head_map.sources[0][0] == ((0, 1), (1, 0), (1, 3))
    assert head_map.origin == "map.json"
    shares, fresh = torch.zeros(len(head_map.channels)), torch.zeros(len(head_map.channels))
    for members in members_by_layer(head_map, "cpu").values():
        shares[members.channels.long()] += members.scale * (members.heads >= 0).sum(1)
        fresh[members.channels.long()] += members.fresh
    torch.testing.assert_close(shares, torch.ones_like(shares))
    assert (fresh == 1).all()  # one layer feeds a channel first


def _set(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(data):
        for key in keys:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_set("version", 2), "version"),
        (_set("version", True), "version"),
        (_set("shift", 0), "shift"),
        (_set("tp", 2), "tp"),
        (_set("target", {"layers": 5, "q_heads": 8, "kv_heads": 2}), "target"),
        (_set("draft", None), "draft"),
        (_set("sources", []), "sources"),
        (_set("sources", "x"), "sources"),
        (_set("sources", 3, [[[0, 0]]]), "sources[3]"),
        (_set("sources", 1, 1, []), "sources[1][1]"),
        (_set("sources", 1, 1, [[2, 0]]), "sources[1][1]"),
        (_set("sources", 1, 1, [[0, 4]]), "sources[1][1]"),
        (_set("sources", 1, 1, [[0, -1]]), "sources[1][1]"),
        (_set("sources", 1, 1, [[0, 1.0]]), "sources[1][1]"),
        (_set("sources", 1, 1, [[True, 1]]), "sources[1][1]"),
        (_set("sources", 1, 1, [[0, 1, 2]]), "sources[1][1]"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_by_field(tmp_path, change, field):
    data = valid()
    change(data)
    path = tmp_path / "map.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as error:
        load(str(path), TARGET, DRAFT)
    assert f"head_map.{field}:" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": NaN', "[" * 100000, "\0", "null"])
def test_an_unreadable_map_is_refused(tmp_path, text):
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="head_map"):
        load(str(path), TARGET, DRAFT)


def test_missing_and_large_files(tmp_path):
    with pytest.raises(ConfigError, match="not a file"):
        load(str(tmp_path / "none.json"), TARGET, DRAFT)
    with pytest.raises(ConfigError, match="not a file"):
        load(str(tmp_path), TARGET, DRAFT)
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (5 << 20))
    with pytest.raises(ConfigError, match="too large"):
        load(str(large), TARGET, DRAFT)


def test_maps_that_join_draft_layers_need_one_pool(tmp_path):
    data = valid()
    data["sources"][0][0] = [[0, 0], [1, 0]]
    path = tmp_path / "map.json"
    path.write_text(json.dumps(data))
    joined = {"head_map": str(path)}
    for pool in ("max", "mean"):
        of_config(StsConfig(**joined, pool_heads=pool, pool_rows=pool), TARGET, DRAFT)
    with pytest.raises(ConfigError, match=r"^sts_config\.pool_heads: 'mean' with pool_rows 'max'"):
        of_config(StsConfig(**joined, pool_heads="mean"), TARGET, DRAFT)
    of_config(StsConfig(pool_heads="mean"), TARGET, DRAFT)


PRINT = {"config": "c", "weights": "w"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sorces": []}, "sorces"),
        ({"fingerprints": []}, "fingerprints"),
        ({"fingerprints": {"target": PRINT}}, "fingerprints"),
        ({"fingerprints": {"target": PRINT, "draft": {"config": 1, "weights": "w"}}}, "fingerprints.draft"),
        ({"fingerprints": {"target": {**PRINT, "x": "y"}, "draft": PRINT}}, "fingerprints.target"),
        ({"dense_layers": [float("nan")]}, "file"),
        ({"best": float("inf")}, "file"),
    ],
)
def test_calibrated_fields_are_refused_by_name(tmp_path, change, field):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({**valid(), **change}))
    with pytest.raises(ConfigError, match=rf"^head_map\.{field}: .*allowed: "):
        load(str(path), TARGET, DRAFT)


@pytest.mark.parametrize(
    ("found", "field"),
    [
        ({"target": PRINT, "draft": {**PRINT, "weights": "x"}}, "draft.weights"),
        ({"target": {**PRINT, "config": "x"}, "draft": PRINT}, "target.config"),
        ({"target": PRINT, "draft": None}, "draft"),
    ],
)
def test_fingerprints_must_be_those_of_the_models(tmp_path, monkeypatch, found, field):
    path = tmp_path / "map.json"
    made_for = {"target": PRINT, "draft": PRINT}
    path.write_text(json.dumps({**valid(), "fingerprints": made_for}))
    monkeypatch.setattr(ModelPaths, "fingerprints", lambda self: made_for)
    assert load(str(path), TARGET, DRAFT, ModelPaths("t", "d")).origin == "map.json"
    monkeypatch.setattr(ModelPaths, "fingerprints", lambda self: found)
    with pytest.raises(ConfigError, match=rf"^head_map\.fingerprints\.{field}: "):
        load(str(path), TARGET, DRAFT, ModelPaths("t", "d"))
    # A handwritten map names no weights, and is anyone's.
    path.write_text(json.dumps(valid()))
    load(str(path), TARGET, DRAFT, ModelPaths("t", "d"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(tmp_path, share):
    text = json.dumps({**valid(), "fingerprints": {"target": PRINT, "draft": PRINT}})
    path = tmp_path / "map.json"
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(ConfigError, match=r"^head_map\.file: "):
        load(str(path), TARGET, DRAFT)
