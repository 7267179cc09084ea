"""The default head map, and the refusal of map files that do not fit."""

from __future__ import annotations

import base64
import copy
import json
import math
import os
import random
import re
import struct
from dataclasses import replace

import pytest
import torch

from sts_kernels import torch_ops
from sts_kernels.layout import SHIFT, Pooling
from sts_sglang import headmap
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core.channels import members_by_layer
from sts_sglang.headmap import (
    MAX_SOURCES,
    SPLIT_STEPS,
    Directions,
    HeadCounts,
    ModelPaths,
    load,
    of_config,
    pinned,
    proportional,
    served,
)
from tests import test_backends as rigs

TARGET, DRAFT = HeadCounts(4, 8, 2), HeadCounts(2, 4, 2)
PRINT = {"config": "c" * 64, "weights": "d" * 64}


def valid() -> dict:
    return {
        "version": 1,
        "shift": 1,
        "tp": 1,
        "target": TARGET._asdict(),
        "draft": DRAFT._asdict(),
        "sources": [[[[layer // 2, head]] for head in range(2)] for layer in range(4)],
    }


DIM, NUMBER = 32, 16


def head_of(n: int, last: float = 0.5) -> bytes:
    """Directions of a head as a map has them, all of them different; the last of its steps."""
    numbers = [1.0 + n / 64 + i / 2048 for i in range((DIM + 2) * NUMBER - 1)]
    return struct.pack(f"<{len(numbers) + 1}e", *numbers, last)


DIRECTIONS = Directions(DIM, NUMBER, tuple(tuple(head_of(2 * t + h) for h in range(2)) for t in range(4)))


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


def full() -> dict:
    """A map with every optional field."""
    data = {
        **valid(),
        "fingerprints": {"target": PRINT, "draft": PRINT},
        "pool": "mean",
        "shares": [[0.5, 2.0]] * 4,
        "dense_layers": [3, 1],
        "directions": DIRECTIONS.to_field(),
        "best": {"recall": [[0, 1.0], [0.5, 0.25]] * 2, "jaccard": [[0.0, 1]] * 4},
        "texts": [{"domain": "prose", "sha256": "0" * 64, "tokens": 4096}],
        "settings": {
            "tokens": 4096,
            "windows": 16,
            "keep": 0.1,
            "sink": 4,
            "recent": 64,
            "heads": 6,
            "band": None,
            "dense_below": None,
            "pool": "auto",
            "budget": "split",
            "selector": "tokens",
            "dtype": "float32",
            "seed": 0,
        },
    }
    return json.loads(json.dumps(data))  # nothing shared, each test changes its own


def write(folder, data) -> str:
    path = folder / "map.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_proportional_layers_share_channels():
    head_map = proportional(TARGET, DRAFT)
    assert [{layer for layer, _ in heads[0]} for heads in head_map.sources] == [{0}, {0}, {1}, {1}]
    assert len(head_map.channels) == 4
    assert head_map.head_channels(0) == head_map.head_channels(1) != head_map.head_channels(2)


def test_a_sparse_draft_has_a_channel_for_every_head_of_the_draft(tmp_path):
    """The proportional map has them all; another one gets those it lacks, which serve no target head."""
    head_map = of_config(StsConfig(draft="steps"), TARGET, DRAFT)
    assert len(head_map.channels) == 4 and head_map.of_draft() == [[0, 1], [2, 3]]
    data = valid()
    data["sources"] = [[[[0, 0]], [[0, 2], [0, 3]]], *[[[[1, 1], [0, 3]], "latest"]] * 3]
    data["shares"] = [[3, 1], *[[1, 1]] * 3]
    path = write(tmp_path, data)
    own, longer = (
        of_config(StsConfig(head_map=path, draft=which), TARGET, DRAFT) for which in ("dense", "all")
    )
    assert own.channels == longer.channels[:4]
    assert longer.channels[4:] == (((1, 0), (1, 1)), ((1, 2), (1, 3)))
    assert longer.of_draft() == [[0, 1], [4, 5]]
    for before, after in zip(own.split(), longer.split(), strict=True):
        assert before == pytest.approx(after[:4])


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


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


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
        (_set("sources", 1, 1, [[0, 1]] * (MAX_SOURCES + 1)), "sources[1][1]"),
        (_set("sources", 1, 1, "newest"), "sources[1][1]"),
        (_set("sources", [["latest"] * 2] * 4), "sources"),
        (_set("target", "layers", 4.0), "target"),
        (_set("draft", "layers", True), "draft"),
        (_set("sorces", []), "sorces"),
        (_set("pool", "sum"), "pool"),
        (_set("pool", None), "pool"),
        (_set("pool", ["max"]), "pool"),
        (_set("dense_layers", None), "dense_layers"),
        (_set("dense_layers", [0, 1, 2, 3, 3]), "dense_layers"),
        (_set("dense_layers", [0, 0]), "dense_layers[1]"),
        (_set("dense_layers", [4]), "dense_layers[0]"),
        (_set("dense_layers", [0, -1]), "dense_layers[1]"),
        (_set("dense_layers", [True]), "dense_layers[0]"),
        (_set("dense_layers", [1.0]), "dense_layers[0]"),
        (_set("directions", None), "directions"),
        (_set("directions", "size", 1), "directions.size"),
        (_set("directions", {"head_dim": 32, "number": 16}), "directions.heads"),
        (_set("directions", "head_dim", 12), "directions.head_dim"),
        (_set("directions", "head_dim", 34), "directions.head_dim"),
        (_set("directions", "head_dim", 1028), "directions.head_dim"),
        (_set("directions", "head_dim", 32.0), "directions.head_dim"),
        (_set("directions", "head_dim", 36), "directions.number"),
        (_set("directions", "number", 8), "directions.number"),
        (_set("directions", "number", True), "directions.number"),
        (_set("directions", "heads", {}), "directions.heads"),
        (_set("directions", "heads", 3, ["AAAA"]), "directions.heads[3]"),
        (_set("directions", "heads", 3, 1, None), "directions.heads[3][1]"),
        (_set("directions", "heads", 3, 1, "AAAA"), "directions.heads[3][1]"),
        (_set("directions", "heads", 3, 1, base64_of(head_of(0) + b"ab")), "directions.heads[3][1]"),
        (_set("directions", "heads", 3, 1, "\n" + base64_of(head_of(0))), "directions.heads[3][1]"),
        (_set("directions", "heads", 3, 1, "\u00e4" * 724), "directions.heads[3][1]"),
        (_set("directions", "heads", 3, 1, base64_of(head_of(0, math.inf))), "directions.heads[3][1]"),
        (_set("directions", "heads", 3, 1, base64_of(head_of(0, math.nan))), "directions.heads[3][1]"),
        (_set("directions", "heads", 3, 1, base64_of(head_of(0, 0.0))), "directions.heads[3][1]"),
        (_set("directions", "heads", 3, 1, base64_of(head_of(0, -1.0))), "directions.heads[3][1]"),
        (_set("best", []), "best"),
        (_set("best", "mass", [[0.5] * 2] * 4), "best.mass"),
        (_set("best", "recall", [[0.5] * 2] * 3), "best.recall"),
        (_set("best", "recall", 2, [0.5]), "best.recall[2]"),
        (_set("best", "recall", 2, 1, 1.01), "best.recall[2][1]"),
        (_set("best", "jaccard", 0, 0, -1), "best.jaccard[0][0]"),
        (_set("best", "jaccard", 0, 0, "1"), "best.jaccard[0][0]"),
        (_set("best", "jaccard", 0, 0, False), "best.jaccard[0][0]"),
        (_set("best", "jaccard", 0, 0, 10**400), "best.jaccard[0][0]"),
        (_set("texts", {}), "texts"),
        (_set("texts", [{}] * 1025), "texts"),
        (_set("texts", 0, 1), "texts[0]"),
        (_set("texts", 0, "path", "/home"), "texts[0].path"),
        (_set("texts", 0, {"domain": "x", "tokens": 1}), "texts[0].sha256"),
        (_set("texts", 0, "domain", "x" * 256), "texts[0].domain"),
        (_set("texts", 0, "sha256", "0" * 63), "texts[0].sha256"),
        (_set("texts", 0, "sha256", 0), "texts[0].sha256"),
        (_set("texts", 0, "tokens", 0), "texts[0].tokens"),
        (_set("texts", 0, "tokens", 2**60), "texts[0].tokens"),
        (_set("texts", 0, "tokens", 5.0), "texts[0].tokens"),
        (_set("settings", None), "settings"),
        (_set("settings", "speed", 1), "settings.speed"),
        (_set("settings", "keep", 2), "settings.keep"),
        (_set("settings", "heads", 0), "settings.heads"),
        (_set("settings", "heads", None), "settings.heads"),
        (_set("settings", "band", -1), "settings.band"),
        (_set("settings", "selector", "joined"), "settings.selector"),
        (_set("settings", "dtype", "int4"), "settings.dtype"),
        (_set("settings", "pool", ["auto"]), "settings.pool"),
        (_set("settings", "seed", True), "settings.seed"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_by_field(tmp_path, change, field):
    data = full()
    change(data)
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, data), TARGET, DRAFT)
    assert f"head_map.{field}:" in str(error.value)
    assert "\n" not in str(error.value)


def lone() -> dict:
    """A map of a target alone with every optional field."""
    data = {field: value for field, value in full().items() if field in headmap.ALONE}
    for name in ("heads", "band", "dense_below", "pool"):
        del data["settings"][name]
    return data | {"draft": None, "fingerprints": {"target": dict(PRINT)}}


def test_a_map_of_a_target_alone_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelPaths, "fingerprints", lambda self: {"target": PRINT})
    models = ModelPaths("t", None)
    head_map = load(write(tmp_path, lone()), TARGET, None, models)
    assert head_map.shares == ((0.5, 2.0),) * 4 and head_map.dense_layers == (1, 3)
    assert head_map.pool is None and head_map.sources == headmap.undrafted(TARGET).sources
    assert head_map.directions == DIRECTIONS
    for field in ("fingerprints", "shares", "dense_layers", "directions", "texts", "settings"):
        less = lone()
        del less[field]
        load(write(tmp_path, less), TARGET, None, models)
    for made, ranks in ((1, 2), (2, 1), (8, 4)):  # it holds for any split of the heads
        load(write(tmp_path, {**lone(), "tp": made}), TARGET, None, models, tp=ranks)


def _without(*keys):
    return lambda data: [data.pop(key) for key in keys]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_set("sources", [[[[0, 0]], [[0, 1]]]] * 4), "sources"),
        (_set("pool", "max"), "pool"),
        (_set("shift", 1), "shift"),
        (_set("best", {}), "best"),
        (_without("shares", "directions"), "shares"),
        (_set("shares", None), "shares"),
        (_set("shares", 3, [1.0]), "shares[3]"),
        (_set("shares", 3, 1, 0), "shares[3][1]"),
        (_without("draft"), "draft"),
        (_set("draft", DRAFT._asdict()), "draft"),
        (_set("draft", {}), "draft"),
        (_set("draft", False), "draft"),
        (_without("target"), "target"),
        (_set("target", "layers", 5), "target"),
        (_without("version"), "version"),
        (_without("tp"), "tp"),
        (_set("tp", 3), "tp"),
        (_set("tp", True), "tp"),
        (_set("fingerprints", "draft", PRINT), "fingerprints"),
        (_set("fingerprints", {}), "fingerprints"),
        (_set("fingerprints", "target", "weights", "e"), "fingerprints.target"),
        (_set("dense_layers", [4]), "dense_layers[0]"),
        (_set("directions", "heads", []), "directions.heads"),
        (_set("texts", 0, "tokens", 0), "texts[0].tokens"),
        (_set("settings", "keep", 2), "settings.keep"),
    ],
)
def test_a_map_of_a_target_alone_that_does_not_fit_is_refused_by_field(tmp_path, change, field):
    data = lone()
    change(data)
    with pytest.raises(ConfigError, match=rf"^head_map\.{re.escape(field)}: .*allowed: ") as error:
        load(write(tmp_path, data), TARGET, None)
    assert "\n" not in str(error.value)


def test_maps_with_and_without_a_draft_are_not_for_each_other(tmp_path):
    with pytest.raises(ConfigError, match=r"^head_map\.draft: made for .*; allowed: null, for this"):
        load(write(tmp_path, {**valid(), "shares": SHARES}), TARGET, None)
    for found in (lone(), {**lone(), "shift": 1}):
        with pytest.raises(ConfigError, match=r"^head_map\.draft: a map of the target alone"):
            load(write(tmp_path, found), TARGET, DRAFT)


def test_a_draft_that_selects_for_prefill_is_heard(tmp_path):
    path = write(tmp_path, lone())
    config = StsConfig(selector="pages", head_map=path, prefill="sparse")
    assert of_config(config, TARGET, DRAFT).origin == os.path.basename(path)
    with pytest.raises(ConfigError, match=r'^head_map\.draft: .* alone.*prefill_by "target"'):
        of_config(replace(config, prefill_by="draft"), TARGET, DRAFT)


def test_a_packaged_map_of_a_target_alone_is_its_default_without_a_draft(tmp_path, monkeypatch):
    monkeypatch.setattr("sts_sglang.headmap.MAPS", tmp_path)
    monkeypatch.setattr(ModelPaths, "fingerprints", lambda self: {"target": PRINT})
    models = ModelPaths("t", None)
    write(tmp_path, lone())
    for tp in headmap.RANKS:
        found = of_config(StsConfig(), TARGET, None, models, tp)
        assert found.origin == "packaged map.json" and found.shares is not None
    other = {"target": {**PRINT, "weights": "e" * 64}}
    for found in (other, {"target": None}, {"target": PRINT, "draft": PRINT}):
        monkeypatch.setattr(ModelPaths, "fingerprints", lambda self, found=found: found)
        assert of_config(StsConfig(), TARGET, None, models) == headmap.undrafted(TARGET)
    # A pair of the same target takes no map of it alone.
    assert of_config(StsConfig(), TARGET, DRAFT, ModelPaths("t", "d")) == proportional(TARGET, DRAFT)


def test_on_several_ranks_a_packaged_map_of_a_pair_gives_directions_alone(tmp_path, monkeypatch):
    prints = {"target": PRINT, "draft": PRINT}
    monkeypatch.setattr("sts_sglang.headmap.MAPS", tmp_path)
    monkeypatch.setattr(ModelPaths, "fingerprints", lambda self: prints)
    models, config = ModelPaths("t", "d"), StsConfig(selector="tokens")
    write(tmp_path, full())
    assert of_config(config, TARGET, DRAFT, models).shares is not None
    default = proportional(TARGET, DRAFT)
    found = of_config(config, TARGET, DRAFT, models, 2)
    assert found.origin == "proportional default (not calibrated), directions of packaged map.json"
    assert replace(found, origin=default.origin, sha256=None) == default
    assert found.directions == DIRECTIONS
    for rank in range(2):
        own = found.of_rank(rank, 2, TARGET, DRAFT).directions
        assert own.heads == tuple(heads[rank : rank + 1] for heads in DIRECTIONS.heads)
    headmap.check_directions(config, found, DIM)
    again = pinned(config, found)
    assert again.head_map_sha256 and of_config(again, TARGET, DRAFT, models, 2) == found
    write(tmp_path, {**full(), "pool": "max"})
    with pytest.raises(ConfigError, match=r"^sts_config\.head_map_sha256: "):
        of_config(again, TARGET, DRAFT, models, 2)
    less = full()
    del less["directions"]
    write(tmp_path, less)
    assert of_config(config, TARGET, DRAFT, models, 2) == default


def test_a_map_of_a_target_alone_serves_a_pair_on_any_ranks(tmp_path):
    config = StsConfig(selector="tokens", head_map=write(tmp_path, lone()))
    for tp in headmap.RANKS:
        found = of_config(config, TARGET, DRAFT, tp=tp)
        assert found.directions == DIRECTIONS and found.sources == proportional(TARGET, DRAFT).sources


def test_every_optional_field_is_read(tmp_path):
    head_map = load(write(tmp_path, full()), TARGET, DRAFT)
    assert (head_map.pool, head_map.dense_layers) == ("mean", (1, 3))
    assert head_map.directions == DIRECTIONS
    for field in ("pool", "dense_layers", "directions", "best", "texts", "settings", "fingerprints"):
        less = full()
        del less[field]
        load(write(tmp_path, less), TARGET, DRAFT)


DEEP = '{"best": ' + "[" * 900 + "]" * 900 + "}"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"version": NaN', "[" * 100000, '{"best":' * 5000, DEEP, "\0", "null", "1" * 5000]
    + ['{"version": 1' + "0" * 5000 + "}", '{"version": 1e999}', '{"\\ud800\\n": 1}', "\ufeff{}"],
)
def test_an_unreadable_map_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="^head_map") as error:
        load(write(tmp_path, text), TARGET, DRAFT)
    assert str(error.value).isascii() and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_key_twice_is_refused(tmp_path):
    text = json.dumps(full())
    for key in ("shift", "layers", "sha256"):
        with pytest.raises(ConfigError, match=rf"^head_map\.{key}: appears twice"):
            load(write(tmp_path, text.replace(f'"{key}": ', f'"{key}": 1, "{key}": ', 1)), TARGET, DRAFT)


HOSTILE = [None, True, -1, 2**70, 1.5, 1e308, "", "x", "\ud800", [], [[]], [None], {}, {"a": {}}]


def test_nothing_else_than_a_refusal_or_a_map_comes_of_a_changed_file(tmp_path):
    """Every place of a map, replaced, removed or doubled: loading never fails in another way."""
    draw = random.Random(0)

    def places(value, path=()):
        yield path
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (dict, list)):
                yield from places(item, (*path, key))
            else:
                yield (*path, key)

    refused = 0
    for *path, last in [place for place in places(full()) if place]:
        for value in draw.sample(HOSTILE, 5):
            data = holder = full()
            for key in path:
                holder = holder[key]
            holder[last] = copy.deepcopy(value)
            try:
                load(write(tmp_path, data), TARGET, DRAFT)
            except ConfigError as error:
                refused += 1
                assert str(error).startswith("head_map.") and str(error).isascii()
    assert refused > 300


def test_directions_say_nothing_about_channels(tmp_path):
    head_map = load(write(tmp_path, full()), TARGET, DRAFT)
    without = replace(head_map, directions=None)
    assert head_map == without and hash(head_map) == hash(without)
    assert head_map.channels == without.channels and "directions" not in repr(head_map)


@pytest.mark.parametrize("draft", [DRAFT, None])
def test_a_rank_has_the_directions_of_its_heads(tmp_path, draft):
    """One KV head each on two ranks; on four, two ranks share each."""
    data = lone() if draft is None else full()
    if draft:  # heads of every rank in every channel
        data["sources"] = [[[[0, 0], [0, 1]], [[0, 2], [0, 3]]]] * 4
    for ranks in (2, 4):
        head_map = load(write(tmp_path, {**data, "tp": ranks}), TARGET, draft, tp=ranks)
        for rank in range(ranks):
            own = head_map.of_rank(rank, ranks, TARGET, draft).directions
            kv_head = rank * 2 // ranks
            assert own == Directions(DIM, NUMBER, tuple((layer[kv_head],) for layer in DIRECTIONS.heads))
    assert proportional(TARGET, DRAFT).of_rank(1, 2, TARGET, DRAFT).directions is None


def test_a_map_of_the_largest_target_with_its_directions_is_within_what_is_read(tmp_path):
    """80 layers of 8 heads of 128 dimensions, and 40 layers of 40."""
    for target in (HeadCounts(80, 64, 8), HeadCounts(40, 40, 40)):
        content = struct.pack("<8320e", *[1.0] * 8320)
        whole = Directions(128, 64, ((content,) * target.kv_heads,) * target.layers)
        data = {"version": 1, "tp": 1, "target": target._asdict(), "draft": None}
        data |= {"shares": [[1.0] * target.kv_heads] * target.layers, "directions": whole.to_field()}
        assert load(write(tmp_path, data), target, None).directions == whole


def test_missing_and_large_files(tmp_path):
    with pytest.raises(ConfigError, match="not a file"):
        load(str(tmp_path / "none.json"), TARGET, DRAFT)
    with pytest.raises(ConfigError, match="not a file"):
        load(str(tmp_path), TARGET, DRAFT)
    large = tmp_path / "large.json"
    with open(large, "wb") as file:
        file.truncate(headmap.MAX_FILE_BYTES + 1)
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


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sorces": []}, "sorces"),
        ({"fingerprints": []}, "fingerprints"),
        ({"fingerprints": {"target": PRINT}}, "fingerprints"),
        ({"fingerprints": {"target": PRINT, "draft": {**PRINT, "config": 1}}}, "fingerprints.draft"),
        ({"fingerprints": {"target": PRINT, "draft": {**PRINT, "config": "C" * 64}}}, "fingerprints.draft"),
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
        ({"target": PRINT, "draft": {**PRINT, "weights": "e" * 64}}, "draft.weights"),
        ({"target": {**PRINT, "config": "e" * 64}, "draft": PRINT}, "target.config"),
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


def test_a_source_that_stands_twice_weighs_twice(tmp_path):
    data = valid()
    data["sources"][0][0] = [[1, 3], [1, 3], [0, 1], [1, 0]]
    head_map = load(write(tmp_path, data), TARGET, DRAFT)
    assert head_map.sources[0][0] == ((0, 1), (1, 0), (1, 3), (1, 3))
    probs = torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(0))
    members = members_by_layer(head_map, "cpu")[1]
    pooled = torch_ops._pool(probs, members, Pooling("mean", "mean", 3))
    channel = members.channels.tolist().index(head_map.head_channels(0)[0])
    torch.testing.assert_close(pooled[channel], (2 * probs[:, 3] + probs[:, 0]).sum(0) / 4 / 3)


def map_for_rig(folder, **fields) -> str:
    data = {**valid(), "target": rigs.COUNTS._asdict(), "draft": rigs.COUNTS._asdict()}
    return write(folder, {**data, "sources": [[[[0, 0]], [[1, 3]]], [[[1, 1]], [[0, 2]]]], **fields})


@pytest.mark.parametrize("history", ["off", "blend"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_latest_heads_select_the_last_tokens_and_others_do_not(tmp_path, num_steps, history):
    path = map_for_rig(tmp_path, sources=[["latest", [[1, 3]]], [[[1, 1], [0, 0]], "latest"]])
    config = {"policy": "fixed", "budget": 12, "sink": 2, "recent": 4, "head_map": path, "history": history}
    rig = rigs.Rig(config, num_steps=num_steps)
    length = rigs.CONTEXT + 1
    for _ in range(2):
        rig.draft_extend(rigs.CONTEXT, 1, rigs.needle_query(rig, 20 - 1, rigs.TOKENS, 0))
        rig.draft_steps(length, {})
        chosen = rig.plan(length)
        for layer in range(2):
            for head, channel in enumerate(rig.runtime.head_map.head_channels(layer)):
                latest = layer == head
                assert (chosen[channel] == [0, 1, *range(length - 10, length)]) == latest
                assert (20 in chosen[channel]) != latest


def test_the_dense_layers_of_a_map_are_dense_when_served(tmp_path):
    rig = rigs.Rig({**rigs.CONFIG, "head_map": map_for_rig(tmp_path, dense_layers=[1])})
    assert rig.runtime.config.dense_layers == (1,)
    length = rigs.CONTEXT + 1
    rig.draft_extend(rigs.CONTEXT, 1, torch.randn(rigs.TOKENS, rigs.Q_HEADS * rigs.DIM))
    rig.draft_steps(length, {})
    rig.plan(length)
    q, before = torch.randn(rigs.TOKENS, rigs.Q_HEADS * rigs.DIM), 0
    for layer, (selected, there) in enumerate([(7, length), (length, length)]):
        rig.target.forward_extend(q, None, None, rig.layer(layer), rig.verify_batch(length))
        counts = rig.runtime.state.attended.tolist()
        assert counts == [before + selected * rigs.KV_HEADS, (layer + 1) * there * rigs.KV_HEADS]
        before = counts[0]


def test_a_map_that_changed_since_the_launch_is_refused_though_valid(tmp_path):
    path = map_for_rig(tmp_path)
    given = StsConfig(head_map=path)
    config = StsConfig.parse(pinned(given, of_config(given, rigs.COUNTS, rigs.COUNTS)).to_json())
    assert of_config(config, rigs.COUNTS, rigs.COUNTS).sha256 == config.head_map_sha256 is not None
    map_for_rig(tmp_path, pool="mean")
    of_config(given, rigs.COUNTS, rigs.COUNTS)
    with pytest.raises(
        ConfigError, match=r"^sts_config\.head_map_sha256: 'map\.json' has .* changed since"
    ) as caught:
        of_config(config, rigs.COUNTS, rigs.COUNTS)
    assert len(str(caught.value).splitlines()) == 1
    map_for_rig(tmp_path)
    of_config(config, rigs.COUNTS, rigs.COUNTS)


def test_a_packaged_map_that_changed_since_the_launch_is_refused(tmp_path, monkeypatch):
    prints = {"target": PRINT, "draft": PRINT}
    monkeypatch.setattr("sts_sglang.headmap.MAPS", tmp_path)
    monkeypatch.setattr(ModelPaths, "fingerprints", lambda self: prints)
    models = ModelPaths("t", "d")
    path = write(tmp_path, {**valid(), "fingerprints": prints})
    config = pinned(StsConfig(), of_config(StsConfig(), TARGET, DRAFT, models))
    assert of_config(config, TARGET, DRAFT, models).origin == "packaged map.json"
    of_config(config, TARGET, DRAFT)  # as for the sizes of buffers, before the models are known
    write(tmp_path, {**valid(), "fingerprints": prints, "pool": "max"})
    for changed in (True, False):
        with pytest.raises(ConfigError, match=r"^sts_config\.head_map_sha256: "):
            of_config(config, TARGET, DRAFT, models)
        if changed:
            os.remove(path)
    assert pinned(StsConfig(), of_config(StsConfig(), TARGET, DRAFT, models)) == StsConfig()


def test_what_is_served_joins_map_and_configuration(tmp_path):
    path = map_for_rig(tmp_path, dense_layers=[1], pool="mean")
    config = StsConfig(head_map=path, dense_layers=(0,))
    head_map = of_config(config, rigs.COUNTS, rigs.COUNTS)
    found = served(config, head_map)
    assert (found.dense_layers, found.pool_rows, found.pool_heads) == ((0, 1), "mean", "mean")
    plain = of_config(StsConfig(), rigs.COUNTS, rigs.COUNTS)
    assert served(StsConfig(pool_heads="mean"), plain) == StsConfig(pool_heads="mean")
    for rows, heads in (("max", "mean"), ("mean", "max")):
        with pytest.raises(
            ConfigError, match=r"^sts_config\.pool_heads: .* calibrated for 'mean'; allowed: "
        ):
            of_config(StsConfig(head_map=path, pool_rows=rows, pool_heads=heads), rigs.COUNTS, rigs.COUNTS)


def test_latest_heads_need_a_budget_that_importance_does_not_cut(tmp_path):
    path = map_for_rig(tmp_path, sources=[["latest", [[1, 3]]], [[[1, 1]], "latest"]])
    of_config(StsConfig(head_map=path, policy="fixed"), rigs.COUNTS, rigs.COUNTS)
    with pytest.raises(ConfigError, match=r"^sts_config\.policy: 'top_p' .*allowed: ratio \| fixed"):
        of_config(StsConfig(head_map=path, policy="top_p"), rigs.COUNTS, rigs.COUNTS)


SHARES = [[0.5, 2.0], [1.0, 1.0], [0.25, 1.0], [3.0, 0.75]]


def shared_map(tmp_path, shares=SHARES):
    return load(write(tmp_path, {**valid(), "shares": shares}), TARGET, DRAFT)


def test_heads_with_other_shares_are_other_channels(tmp_path):
    data = valid()
    data["sources"] = [[[[0, 0]], [[0, 0]]]] * TARGET.layers
    assert len(load(write(tmp_path, data), TARGET, DRAFT).channels) == 1
    head_map = load(write(tmp_path, {**data, "shares": SHARES}), TARGET, DRAFT)
    assert len(head_map.channels) == len({share for row in SHARES for share in row})
    assert head_map.head_channels(1) == [head_map.head_channels(1)[0]] * 2
    assert head_map.head_channels(2)[1] == head_map.head_channels(1)[0] != head_map.head_channels(0)[0]


@pytest.mark.parametrize("keep", [0, 1, 5, 20, 40, 63, SPLIT_STEPS])
def test_a_split_budget_is_the_budget_on_the_mean_and_follows_the_shares(tmp_path, keep):
    head_map = shared_map(tmp_path)
    row = head_map.split()[keep]
    heads = [row[c] for layer in range(TARGET.layers) for c in head_map.head_channels(layer)]
    assert sum(heads) / len(heads) == pytest.approx(keep / SPLIT_STEPS, abs=1e-9)
    assert all(0 <= part <= 1 for part in heads)
    flat = [share for layer in SHARES for share in layer]
    part_of_one = next(p / s for p, s in zip(heads, flat, strict=True) if p < 1 or keep == SPLIT_STEPS)
    for part, share in zip(heads, flat, strict=True):
        assert part == pytest.approx(min(1, part_of_one * share), abs=1e-9) or keep == SPLIT_STEPS
    assert proportional(TARGET, DRAFT).split() is None


def test_a_large_share_of_few_heads_needs_room_for_longer_lists(tmp_path):
    data = valid()
    data["sources"] = [[[[0, 0]], [[0, 0]]]] * TARGET.layers
    shares = [[3.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 1.5]]  # three channels; the mean of heads is 1
    head_map = load(write(tmp_path, {**data, "shares": shares}), TARGET, DRAFT)
    assert head_map.list_growth() == pytest.approx((3.5 + 0.5 + 1.5) / 3)
    assert proportional(TARGET, DRAFT).list_growth() == 1
    assert shared_map(tmp_path, [[1.0, 1.0]] * 4).list_growth() == 1


@pytest.mark.parametrize(
    ("shares", "field"),
    [
        ("x", "shares"),
        (None, "shares"),
        (SHARES[:3], "shares"),
        ([*SHARES[:3], [1.0]], "shares[3]"),
        ([*SHARES[:3], [1.0, 0]], "shares[3][1]"),
        ([*SHARES[:3], [1.0, -1.0]], "shares[3][1]"),
        ([*SHARES[:3], [1.0, "1"]], "shares[3][1]"),
        ([*SHARES[:3], [1.0, True]], "shares[3][1]"),
        ([*SHARES[:3], [1.0, 1e9]], "shares[3][1]"),
    ],
)
def test_bad_shares_are_refused_by_field(tmp_path, shares, field):
    with pytest.raises(ConfigError, match=rf"^head_map\.{re.escape(field)}: "):
        shared_map(tmp_path, shares)


def test_a_split_budget_and_flashinfer_do_not_go_together(tmp_path):
    path = write(tmp_path, {**valid(), "shares": SHARES})
    of_config(StsConfig(head_map=path), TARGET, DRAFT)
    with pytest.raises(ConfigError, match=r"^sts_config\.kernel: 'flashinfer' with a map that splits"):
        of_config(StsConfig(head_map=path, kernel="flashinfer"), TARGET, DRAFT)


def test_an_operators_pin_stays_where_no_file_was_read():
    """Weights of a hub name are not there at launch: the map is chosen when they are."""
    config = StsConfig(head_map_sha256="a" * 64)
    assert headmap.pinned(config, proportional(HeadCounts(4, 4, 2), HeadCounts(2, 4, 2))) == config


def test_what_a_map_file_says_of_the_shift_is_what_the_kernels_have():
    assert headmap.MAP_SHIFT == SHIFT
