"""Configuration: what is read, what is refused and in which words, and the budget rule."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from fractions import Fraction
from types import MappingProxyType

import pytest
import torch

from sts_kernels import layout
from sts_kernels.torch_ops import budget_tokens
from sts_sglang.config import (
    MAX_SOURCE,
    MAX_TOKENS,
    MOST_OVER,
    ConfigError,
    StsConfig,
    check_request,
    one_line,
    quoted,
    request_inspect,
    request_keep,
    request_prefill,
)

EVERY_KEY = {
    "policy": "top_p",
    "keep": 0.25,
    "budget": 2048,
    "top_p": 0.9,
    "sink": 2,
    "recent": 32,
    "dense_layers": [3, 0],
    "spread": 0.25,
    "spread_over": 2,
    "pool_rows": "mean",
    "pool_heads": "mean",
    "head_map": "maps/pair.json",
    "head_map_sha256": "0123456789abcdef" * 4,
    "kernel": "torch",
    "dense": "flashinfer",
    "history": "blend",
    "history_weight": 0.25,
    "history_decay": 0.5,
    "selector": "auto",
    "page_share": 0.25,
    "verify": "dense",
    "draft": "all",
    "draft_refresh": 4,
    "prefill": "sparse",
    "prefill_keep": 0.5,
    "prefill_floor": 0,
    "prefill_attend": "ops",
    "prefill_by": "draft",
    "prefill_draft": "sparse",
    "draft_kv": "fp8_e4m3",
    "full_verify_every": 16,
    "stand_aside": 0,
    "request_keep": "at_most",
    "request_inspect": False,
    "inspect_dir": "dumps",
}


def refused(source, *words: str) -> str:
    """`source` is refused in one line that holds `words`."""
    with pytest.raises(ConfigError) as caught:
        StsConfig.parse(source)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "; allowed: " in message and len(message) < 500, message
    for word in words:
        assert word in message, message
    return message


def test_defaults():
    config = StsConfig.parse(None)
    assert config == StsConfig() == StsConfig.parse("{}")
    assert (config.policy, config.keep, config.budget, config.sink, config.recent) == (
        "ratio",
        "auto",
        1024,
        4,
        64,
    )


def test_what_a_launch_keeps_depends_on_who_selects():
    found = {
        (selector, drafts): StsConfig(selector=selector).for_launch(drafts, directions=True).keep
        for selector in ("auto", "tokens", "pages", "quest")
        for drafts in (True, False)
    }
    assert found == {case: 0.5 if case[0] == "pages" else 0.1 for case in found}
    assert StsConfig(selector="joined").for_launch(True).keep == 0.1
    assert StsConfig(keep=0.3).for_launch(False).keep == 0.3
    assert StsConfig(selector="pages").budget_for(100_000) == 50_000
    with pytest.raises(ConfigError, match="or 'auto'"):
        StsConfig(keep="most")


def test_a_draft_is_sparse_where_that_was_measured_to_cost_nothing():
    def chosen(algorithm: str, num_steps: int = 3, topk: int = 1, **config) -> tuple:
        found = StsConfig(**config).for_launch(True).for_draft(algorithm, num_steps, topk)
        assert found.for_launch(True).for_draft(algorithm, num_steps, topk) == found
        return found.draft, *found.passed_on

    dense = ("dense", 0.5, 1)
    assert chosen("STANDALONE") == ("all", 0.5, 4) and chosen("EAGLE3") == ("all", 0.75, 8)
    assert chosen("STANDALONE", 5, draft="all") == ("all", 0.5, 6)
    assert chosen("EAGLE3", 40, draft="steps") == ("steps", 0.75, 64)
    assert [chosen("STANDALONE", steps) for steps in (1, 2, 4)] == [dense] * 3
    assert [chosen("EAGLE3", topk=4), chosen("EAGLE")] == [dense] * 2
    assert [chosen("EAGLE3", keep=keep)[0] for keep in (0.05, 0.1, 1.0)] == ["dense", "all", "all"]
    assert chosen("EAGLE3", policy="fixed") == chosen("EAGLE3", policy="top_p") == dense
    assert chosen("STANDALONE", verify="dense") == dense
    assert chosen("STANDALONE", history="warm") == dense
    assert [chosen("EAGLE3", selector=name) for name in ("tokens", "joined")] == [dense] * 2
    assert chosen("STANDALONE", stand_aside=4096) == chosen("STANDALONE", draft="dense") == dense
    assert chosen("EAGLE", draft="steps") == ("steps", 0.75, 8)
    assert chosen("EAGLE3", draft="extend") == ("extend", 0.5, 1)
    assert chosen("STANDALONE", draft="all", draft_refresh=2) == ("all", 0.75, 8)
    assert chosen("EAGLE3", draft="every", draft_refresh="adaptive") == ("every", 0.969, 64)
    assert chosen("EAGLE3", spread=0.25, spread_over=2) == ("all", 0.25, 2)
    assert chosen("STANDALONE", draft="dense", spread=0) == ("dense", 0, 1)
    assert StsConfig().passed_on == (0.5, 1) and not StsConfig().sparse_draft
    assert MOST_OVER == layout.MOST_OVER


def test_every_source_reads_the_same(tmp_path):
    text = json.dumps(EVERY_KEY)
    file = tmp_path / "sts.json"
    file.write_text(f" \n{text}\n")
    config = StsConfig.parse(EVERY_KEY)
    assert config.dense_layers == (0, 3)
    assert {key: getattr(config, key) for key in EVERY_KEY} == {**EVERY_KEY, "dense_layers": (0, 3)}
    for source in (f"\n {text} ", file, str(file), MappingProxyType(EVERY_KEY), config):
        assert StsConfig.parse(source) == config


def test_json_round_trip_of_random_configs():
    rng = random.Random(0)
    for _ in range(300):
        config = StsConfig(
            policy=rng.choice(("ratio", "fixed", "top_p")),
            keep=rng.choice((1, 1.0, 5e-324, rng.uniform(1e-9, 1))),
            budget=rng.randint(300, MAX_TOKENS),
            top_p=rng.uniform(1e-9, 1),
            sink=rng.randint(1, 99),
            recent=rng.randint(1, 99),
            dense_layers=tuple(rng.sample(range(1024), rng.randint(0, 9))),
            pool_rows=rng.choice(("max", "mean")),
            pool_heads=rng.choice(("max", "mean")),
            head_map=rng.choice((None, "map.json", 'ü"\\ \n💡')),
            kernel=rng.choice(("auto", "flashinfer", "triton", "torch")),
        )
        text = config.to_json()
        assert StsConfig.parse(text) == config
        assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_equal_configs_have_equal_json():
    assert (
        StsConfig(keep=1, dense_layers=[2, 1]).to_json() == StsConfig(keep=1.0, dense_layers=(1, 2)).to_json()
    )


def test_longest_config_fits_into_its_own_source_limit():
    config = StsConfig(dense_layers=tuple(range(1024)), head_map="💡" * 4096, inspect_dir="💡" * 512)
    assert len(config.to_json()) < MAX_SOURCE
    assert StsConfig.parse(config.to_json()) == config


INTEGER = "an integer from "
SHARE = "a number above 0 and at most 1"
BAD_VALUES = {
    "policy": (["Ratio", "", None, 1, ["ratio"]], "ratio | fixed | top_p"),
    "keep": ([0, -0.1, 1.0001, math.nan, math.inf, True, "0.1", None, [0.1], 10**400], SHARE),
    "budget": ([-1, MAX_TOKENS + 1, 1.0, True, "1024", None, 10**5000], INTEGER),
    "top_p": ([0, 1.1, math.nan, False, "x", None], SHARE),
    "sink": ([0, -1, 0.0, False, True, 4.0, "4", None, MAX_TOKENS + 1], INTEGER),
    "recent": ([0, -1, True, 64.0, "64", None, MAX_TOKENS + 1], INTEGER),
    "dense_layers": (
        ["0", 0, None, {"0": 1}, [-1], [1, 1], [0.0], [True], ["1"], [1024], [[1]]],
        "from 0 to 1023",
    ),
    "spread_over": ([0, -1, 65, 2.0, True, "2", None], "an integer from 1 to 64, or 'auto'"),
    "spread": ([-0.1, 1.5, True, "0.5", None, math.nan], "a number from 0 to 1, or 'auto'"),
    "pool_rows": (["sum", "", None, 0], "max | mean"),
    "pool_heads": (["min", "MAX", None, True], "max | mean"),
    "head_map": (["", "  ", 1, ["m.json"], "a\0b", "\ud800", "x" * 4097], "path of a head map"),
    "head_map_sha256": (["", "0" * 63, "G" * 64, "A" * 64, "0" * 64 + chr(10), 0, True], "64 lower-case hex"),
    "kernel": (["cuda", "", None, 0], "auto | flashinfer | triton | torch"),
    "dense": (["fa2", "", None, 0], "auto | fa3 | flashinfer | torch"),
    "history": (["on", "", None, True], "off | warm | blend"),
    "history_weight": ([0, -0.1, 1.01, True, "0.5", None, math.nan], "a number above 0 and at most 1"),
    "history_decay": (
        [0, 2, 0.9999, True, "0.9", None, math.inf],
        "a number above 0 and at most 0.999, or 1",
    ),
    "selector": (
        ["sts", "", None, True, ["quest"]],
        "auto | draft | tokens | pages | joined | quest | recent | random | oracle",
    ),
    "page_share": ([0, 1, -0.5, True, "half", None], "a number between 0 and 1"),
    "verify": (["full", "", None, True], "sparse | dense"),
    "draft": (["sparse", "", None, False], "dense | extend | steps | all | every"),
    "draft_refresh": ([0, -1, 257, 4.0, True, "4", "auto", None], "an integer from 1 to 256, or 'adaptive'"),
    "prefill": (["all", "", None, True], "dense | sparse"),
    "prefill_keep": ([0, -0.1, 1.01, True, "0.5", None, math.nan], "a number above 0 and at most 1"),
    "prefill_by": (["pages", "", None, True], "auto | target | draft"),
    "prefill_draft": (["all", "", None, True], "dense | sparse"),
    "prefill_floor": ([-1, 1.0, True, "8", None, MAX_TOKENS + 1], INTEGER),
    "prefill_attend": (["triton", "", None, True], "auto | ops | fa3"),
    "draft_kv": (["fp8", "", None, True, "bfloat16"], "auto | model | fp8_e4m3"),
    "full_verify_every": ([-1, 1.0, True, "8", None, MAX_TOKENS + 1], INTEGER),
    "stand_aside": ([-1, 1.0, True, "8", None, MAX_TOKENS + 1], "or 'auto'"),
    "request_keep": (["all", "", None, True, 0.5, ["any"]], "any | at_most | off"),
    "request_inspect": ([0, 1, "true", None, [], "no"], "true or false"),
    "inspect_dir": (["", " ", 1, True, ["d"], "a\0b", "\ud800", "x" * 513], "path of a folder for dumps"),
}


def test_bad_values_cover_every_key():
    assert set(BAD_VALUES) == set(EVERY_KEY) == set(json.loads(StsConfig().to_json()))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        pytest.param(key, value, allowed, id=f"{key}-{i}")
        for key, (values, allowed) in BAD_VALUES.items()
        for i, value in enumerate(values)
    ],
)
def test_bad_value_is_refused_by_name(key, value, allowed):
    message = refused({key: value}, f"sts_config.{key}", allowed)
    assert message.startswith("sts_config.")
    with pytest.raises(ConfigError):
        StsConfig(**{key: value})


def test_sink_says_why_zero_is_not_allowed():
    refused({"sink": 0}, "sts_config.sink", "never scores position 0")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"policy": "fixed", "budget": 0}, ("sts_config.budget", "from 1", "'ratio'")),
        ({"policy": "top_p", "budget": 0}, ("sts_config.budget", "from 1", "'ratio'")),
        ({"policy": "fixed", "budget": 67}, ("sts_config.budget", "sink + recent = 68")),
        ({"selector": "quest", "policy": "top_p"}, ("sts_config.selector", "'quest' with policy 'top_p'")),
        ({"selector": "oracle", "history": "warm"}, ("sts_config.selector", "with history 'warm'")),
        ({"selector": "quest", "draft": "steps"}, ("sts_config.selector", "with draft 'steps'")),
        ({"prefill_draft": "sparse"}, ("sts_config.prefill_draft", "'sparse' with prefill 'dense'")),
        ({"prefill_by": "draft"}, ("sts_config.prefill_by", "'draft' with prefill 'dense'; allowed: 'auto'")),
        ({"selector": "recent", "inspect_dir": "d"}, ("sts_config.selector", "with an inspect_dir")),
        ({"selector": "joined", "policy": "top_p"}, ("sts_config.selector", "'joined' with policy 'top_p'")),
        ({"selector": "pages", "history": "blend"}, ("sts_config.selector", "with history 'blend'")),
        ({"selector": "pages", "policy": "fixed", "budget": 120}, ("in whole pages, = 127",)),
    ],
)
def test_keys_that_disagree(config, words):
    refused(config, *words)


def test_keys_that_just_agree():
    assert StsConfig(policy="ratio", budget=0).budget == 0
    assert StsConfig(policy="fixed", budget=68).budget == 68
    assert StsConfig(policy="top_p", budget=1).budget == 1
    assert StsConfig(selector="random", policy="fixed").selector == "random"
    assert StsConfig(selector="pages", policy="fixed", budget=127).forced == 127
    assert StsConfig(selector="joined", history="blend", draft="all", inspect_dir="d").by_pages


def test_which_layers_verify_densely():
    assert not StsConfig().dense_verify(0)
    assert StsConfig(verify="dense").dense_verify(7)
    assert [StsConfig(dense_layers=[1]).dense_verify(layer) for layer in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('{"share_heads": 1}', ("unknown key 'share_heads'; allowed: ",)),
        ('{"kepp": 1}', ("'kepp'", "did you mean 'keep'?", "policy, keep, budget")),
        ('{"zzzzzz": 1}', ("'zzzzzz'; allowed", "policy, keep, budget")),
        ('{"' + "k" * 60_000 + '": 1}', ("unknown key",)),
        ('{"keep\\n": 1}', (r"'keep\n'",)),
        ({1: 2}, ("unknown key 1",)),
        ('{"keep": 1, "keep": 0.1}', ("'keep'", "twice")),
        ('{"budget": 1, "keep": 1, "budget": 1}', ("'budget'", "twice")),
        ('{"keep": NaN}', ("NaN",)),
        ('{"keep": -Infinity}', ("-Infinity",)),
        ('{"keep": 1e999}', ("sts_config.keep", "inf")),
        ('{"budget": 1' + "0" * 5000 + "}", ("too many digits",)),
        ('{"a":' * 12_000, ("nested too deeply",)),
        ('{"a":' + "[" * 60_000, ("nested too deeply",)),
        ("{} {}", ("Extra data", "column 4")),
        ('{"keep": 0.1,}', ("not JSON",)),
        ("{", ("not JSON", "line 1 column 2")),
        ("{'keep': 1}", ("not JSON",)),
        ("{" + " " * MAX_SOURCE + "}", (f"at most {MAX_SOURCE} characters",)),
        ([("keep", 1)], ("a JSON object",)),
        (b'{"keep": 1}', ("a JSON object",)),
        (7, ("got 7",)),
        (True, ("got True",)),
    ],
    ids=lambda value: repr(value)[:30] if not isinstance(value, tuple) else "",
)
def test_bad_source_is_refused(source, words):
    refused(source, "sts_config", *words)


@pytest.mark.parametrize("path", ["", "  ", "no-such-file.json", "[1]", "a\0b", "x" * 5000])
def test_unreadable_path_is_refused(path):
    refused(path, "sts_config", "inline JSON that starts with '{'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff{}", ("not UTF-8 at byte 0",)),
        (b"", ("not JSON",)),
        (b"[1, 2]", ("got [1, 2]", "a JSON object")),
        (b'"text"', ("a JSON object",)),
        (b"null", ("got None", "a JSON object")),
        (b"{}" + b" " * MAX_SOURCE, (f"{MAX_SOURCE + 2} bytes", f"at most {MAX_SOURCE} bytes")),
    ],
)
def test_bad_file_is_refused(tmp_path, content, words):
    file = tmp_path / "sts.json"
    file.write_bytes(content)
    refused(file, *words)


def test_largest_file_is_read(tmp_path):
    file = tmp_path / "sts.json"
    file.write_bytes(b"{}" + b" " * (MAX_SOURCE - 2))
    assert StsConfig.parse(file) == StsConfig()


def test_huge_file_is_refused_unread(tmp_path):
    file = tmp_path / "sts.json"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)  # reading it would end in MemoryError
    refused(file, f"{1 << 40} bytes")


def test_directory_and_fifo_are_refused_at_once(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refused(fifo, "not a regular file")
    refused(tmp_path, "directory")
    refused("/dev/zero", "not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_forbidden_file_is_refused(tmp_path):
    file = tmp_path / "sts.json"
    file.write_text("{}")
    file.chmod(0)
    refused(file, "Permission denied")


def test_flag_wins_over_environment():
    environ = {"STS_CONFIG": '{"keep": 0.5}'}
    assert StsConfig.resolve(None, environ).keep == 0.5
    assert StsConfig.resolve({"keep": 0.2}, environ).keep == 0.2
    # The flag replaces the environment as a whole, defaults included, even if that is not readable.
    assert StsConfig.resolve("{}", environ).keep == "auto"
    assert StsConfig.resolve("{}", {"STS_CONFIG": "{"}) == StsConfig()
    for unset in ({}, {"STS_CONFIG": ""}, {"STS_CONFIG": " \n"}):
        assert StsConfig.resolve(None, unset) == StsConfig()


def test_bad_environment_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"^sts_config.keep: .*environment variable STS_CONFIG\)$"):
        StsConfig.resolve(None, {"STS_CONFIG": '{"keep": 2}'})
    with pytest.raises(ConfigError) as caught:
        StsConfig.resolve("", {"STS_CONFIG": ""})  # an empty flag was meant to say something
    assert "environment" not in str(caught.value)


def test_layers_are_checked_against_the_target():
    config = StsConfig(dense_layers=(0, 3))
    config.check_layers(4)
    StsConfig().check_layers(1)
    with pytest.raises(
        ConfigError, match=r"^sts_config.dense_layers: got layer 3, .* 3 layers; allowed: .* 0 to 2$"
    ):
        config.check_layers(3)


def rule(config: StsConfig, context: int, keep: float | None) -> int:
    """The budget rule of the method, in exact decimal arithmetic."""
    if keep is None and config.policy != "ratio":
        n = config.budget
    else:
        n = math.ceil(Fraction(str(config.share if keep is None else keep)) * context)
    floor = config.budget if config.policy == "ratio" else 0
    return min(context, max(floor, config.sink + config.recent, n))


KEEPS = (None, 0.001, 0.05, 0.07, 0.1, 0.29, 0.3, 0.57, 0.7, 0.9, 0.999, 1)
CONTEXTS = (0, 1, 4, 5, 68, 69, 1023, 1024, 1025, 10_240, 10_241, 32_768, 100_000, 131_072, 1_000_000)
POLICIES = (
    StsConfig(),
    StsConfig(budget=0, sink=1, recent=1),
    StsConfig(budget=0, sink=1, recent=1, keep=0.29),
    StsConfig(policy="fixed", budget=500),
    StsConfig(policy="top_p", budget=30),
    StsConfig(policy="top_p", budget=3000),
)


@pytest.mark.parametrize("config", POLICIES, ids=lambda c: f"{c.policy}-{c.budget}-{c.keep}")
@pytest.mark.parametrize("keep", KEEPS)
def test_budget_follows_the_rule(config, keep):
    for context in (*CONTEXTS, *range(200)):
        assert config.budget_for(context, keep) == rule(config, context, keep), context


@pytest.mark.parametrize(
    ("config", "context", "keep", "expected"),
    [
        (StsConfig(), 32_768, None, 3277),  # ceil(3276.8)
        (StsConfig(), 10_241, None, 1025),  # just above the floor
        (StsConfig(), 5000, None, 1024),  # the floor
        (StsConfig(), 1024, None, 1024),  # the identity
        (StsConfig(), 700, None, 700),
        (StsConfig(), 32_768, 0.01, 1024),  # a request's keep does not go below the floor
        (StsConfig(budget=0, sink=1, recent=1), 30, 0.1, 3),  # 0.1 * 30 is 3.0000000000000004 in floats
        (StsConfig(budget=0), 30, 0.1, 30),  # sink + recent alone
        (StsConfig(policy="fixed", budget=500), 32_768, None, 500),
        (StsConfig(policy="fixed", budget=500), 32_768, 0.001, 68),  # no floor: sink + recent
        (StsConfig(policy="fixed", budget=500), 32_768, 0.5, 16_384),
        (StsConfig(policy="top_p", budget=30), 32_768, None, 68),
        (StsConfig(policy="top_p", budget=3000), 32_768, None, 3000),
    ],
)
def test_budget_examples(config, context, keep, expected):
    assert config.budget_for(context, keep) == expected


def test_keep_one_is_the_whole_context():
    for config in POLICIES:
        for context in (0, 1, 7, 1023, 131_071, MAX_TOKENS - 1, MAX_TOKENS, 2**33):
            assert config.budget_for(context, 1.0) == config.budget_for(context, 1) == context


@pytest.mark.parametrize("config", POLICIES, ids=lambda c: f"{c.policy}-{c.budget}-{c.keep}")
def test_budget_tensor_equals_the_scalar(config):
    rng = random.Random(0)
    contexts = [*CONTEXTS, *(rng.randrange(200_000) for _ in range(500))]
    keeps = [rng.choice(KEEPS) for _ in contexts]
    lens = torch.tensor(contexts, dtype=torch.int32)
    own = torch.tensor([math.nan if keep is None else keep for keep in keeps], dtype=torch.float64)
    got = budget_tokens(lens, own, config.rule())
    assert got.dtype == torch.int64
    assert got.tolist() == [config.budget_for(*pair) for pair in zip(contexts, keeps, strict=True)]


@pytest.mark.parametrize(
    ("params", "keep"),
    [
        (None, None),
        ({}, None),
        ({"other": {"keep": 7}}, None),
        ({"sts": {}}, None),
        ({"sts": {"keep": 1}}, 1.0),
        ({"sts": {"keep": 0.25}, "__req__": object()}, 0.25),
    ],
)
def test_request_keep(params, keep):
    assert request_keep(params) == keep


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"sts": {"keep": value}}, "custom_params.sts.keep: ")
        for value in (0, -1, 1.5, math.nan, math.inf, True, "0.5", None, [], 10**5000)
    ]
    + [
        ({"sts": {"keeps": 1}}, "custom_params.sts: unknown key 'keeps', did you mean 'keep'?"),
        ({"sts": {"keep": 1, "budget": 2}}, "custom_params.sts: unknown key 'budget'"),
        ({"sts": None}, "custom_params.sts: got None"),
        ({"sts": 0.5}, "custom_params.sts: got 0.5"),
        ({"sts": [["keep", 1]]}, "custom_params.sts: got"),
        ([], "custom_params: got []"),
        ("sts", "custom_params: got 'sts'"),
    ],
    ids=lambda value: None,
)
def test_bad_request_keep_is_refused(params, field):
    with pytest.raises(ConfigError) as caught:
        request_keep(params)
    message = str(caught.value)
    assert message.startswith(field) and "; allowed: " in message and len(message.splitlines()) == 1


def test_dumps_are_for_servers_that_write_them():
    wants = {"sts": {"inspect": True, "keep": 0.5}}
    assert request_inspect(wants) and request_keep(wants) == 0.5
    assert not request_inspect(None) and not request_inspect({"sts": {}})
    check_request(wants, StsConfig(inspect_dir="dumps"))
    check_request({"sts": {"inspect": False}}, StsConfig())
    with pytest.raises(ConfigError, match=r"sts\.inspect: .* set to a folder$"):
        check_request(wants, StsConfig())
    with pytest.raises(ConfigError, match=r"sts\.inspect: got 1; allowed: true or false$"):
        check_request({"sts": {"inspect": 1}}, StsConfig(inspect_dir="dumps"))


@pytest.mark.parametrize("policy", ["ratio", "fixed", "top_p"])
def test_an_operator_bounds_what_requests_may_keep(policy):
    def asked(keep, rule):
        config = StsConfig(policy=policy, keep=0.25, request_keep=rule)
        check_request({"sts": {} if keep is None else {"keep": keep}}, config)
        check_request(None, config)

    for keep in (None, 1e-9, 0.25, 1):
        asked(keep, "any")
    for keep in (None, 1e-9, 0.25):
        asked(keep, "at_most")
    asked(None, "off")
    for keep in (0.2500001, 1):
        with pytest.raises(
            ConfigError, match=r"^custom_params\.sts\.keep: got .* at most this server's 0\.25 "
        ):
            asked(keep, "at_most")
    for keep in (0.01, 0.25, 1):
        with pytest.raises(
            ConfigError, match=r"^custom_params\.sts\.keep: .*; allowed: no keep \(sts_config"
        ):
            asked(keep, "off")
    for rule in ("any", "at_most", "off"):
        with pytest.raises(ConfigError, match=r"^custom_params\.sts\.keep: got 7; allowed: a number above 0"):
            asked(7, rule)


@pytest.mark.parametrize(
    ("params", "keep"),
    [
        (None, 0.25),
        ({"sts": {"keep": 0.5}}, 0.25),
        ({"sts": {"prefill": "sparse"}}, 0.25),
        ({"sts": {"prefill_keep": 0.5}}, 0.5),
        ({"sts": {"prefill": "sparse", "prefill_keep": 1}}, 1.0),
        ({"sts": {"prefill": "dense"}}, None),
    ],
)
def test_what_a_request_s_prompt_attends_to(params, keep):
    config = StsConfig(prefill="sparse")
    check_request(params, config)
    assert request_prefill(params, config) == keep


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        ({}, {"prefill": "sparse"}, "prefill: this server prefills densely; allowed: 'dense', or a server"),
        ({}, {"prefill_keep": 0.5}, "prefill_keep: this server prefills densely"),
        ({}, {"prefill": True}, "prefill: got True; allowed: dense | sparse"),
        ({"prefill": "sparse"}, {"prefill_keep": 0}, "prefill_keep: got 0; allowed: a number above 0"),
        ({"prefill": "sparse"}, {"prefill": "dense", "prefill_keep": 0.5}, "prefill_keep: given with"),
        ({"prefill": "sparse", "request_keep": "off"}, {"prefill": "dense"}, "prefill: this server lets no"),
        ({"prefill": "sparse", "request_keep": "off"}, {"prefill_keep": 0.1}, "prefill_keep: this server"),
        ({"prefill": "sparse", "request_keep": "at_most"}, {"prefill": "dense"}, "prefill: got 'dense'"),
        ({"prefill": "sparse", "request_keep": "at_most"}, {"prefill_keep": 0.3}, "prefill_keep: got 0.3"),
    ],
)
def test_a_prefill_that_a_request_may_not_ask_for(config, asked, message):
    with pytest.raises(ConfigError) as caught:
        check_request({"sts": asked}, StsConfig(**config))
    assert str(caught.value).startswith(f"custom_params.sts.{message}")
    check_request({"sts": {}}, StsConfig(**config))


def test_a_request_may_ask_for_no_more_than_the_server_does():
    config = StsConfig(prefill="sparse", request_keep="at_most")
    assert request_prefill({"sts": {"prefill_keep": 0.1}}, config) == 0.1
    assert request_prefill({"sts": {"prefill": "dense"}}, StsConfig()) is None


def test_an_operator_closes_dumps_to_requests():
    closed = StsConfig(inspect_dir="dumps", request_inspect=False)
    check_request({"sts": {"inspect": False}}, closed)
    with pytest.raises(ConfigError, match=r"^custom_params\.sts\.inspect: this server dumps for no request"):
        check_request({"sts": {"inspect": True}}, closed)
    check_request({"sts": {"inspect": True}}, StsConfig(inspect_dir="dumps"))


def test_importing_the_configuration_imports_neither_torch_nor_sglang():
    code = "import sys, sts_sglang.config; print([m for m in ('torch', 'sglang') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def nested(depth: int, kind: type = list) -> object:
    """`depth` lists or objects in each other, made without recursion."""
    value: object = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("depth", [5, 400, 950, 1000, 100_000])
def test_any_depth_of_nesting_is_one_line(depth, kind):
    value = nested(depth, kind)
    for key in ("keep", "dense_layers", "head_map", "sink", "policy"):
        refused({key: value}, f"sts_config.{key}")
    refused({"dense_layers": [value]}, "sts_config.dense_layers[0]")
    for params in ({"sts": {"keep": value}}, {"sts": {"inspect": value}}, {"sts": [value]}, [value]):
        with pytest.raises(ConfigError, match=r"^custom_params.*; allowed: ") as caught:
            check_request(params, StsConfig())
        assert len(str(caught.value)) < 400
    check_request({"others": value, "sts": {"keep": 0.5}}, StsConfig())


def test_a_nested_launch_configuration_is_one_line(tmp_path):
    """Among the depths is the one that JSON can just be read at and Python's repr cannot."""
    for depth in (400, *range(850, 1000), 20_000):
        refused('{"keep": ' + "[" * depth + "]" * depth + "}", "sts_config")
    (tmp_path / "deep.json").write_text('{"keep": ' + "[" * 900 + "]" * 900 + "}")
    refused(tmp_path / "deep.json", "sts_config")


class Rude:
    def __repr__(self):
        raise RuntimeError("no")

    __str__ = __repr__


@pytest.mark.parametrize("key", [10**5000, (1, "x"), Rude()], ids=["number", "tuple", "rude"])
def test_keys_and_values_of_any_kind_are_shown(key):
    refused({key: 1}, "sts_config: unknown key")
    refused({"keep": key}, "sts_config.keep: got")
    refused({"sink": torch.zeros(2)}, "sts_config.sink: got")


FOREIGN = 'x\n2026 sts: all is well\x1b[2J\u202e\x07"'


def test_foreign_text_is_one_line_in_quotes():
    shown = quoted(FOREIGN)
    assert shown.isprintable() and shown[0] == shown[-1] == "'" and r"\n2026" in shown and r"\x1b[2J" in shown
    assert len(quoted("y" * 10_000)) == 80 and quoted(7) == "'7'"
    error = ConfigError(f"head_map.{FOREIGN}: wrong")
    assert str(error).isprintable() and one_line("a \n\t b") == "a b"


# As the release before the code was taken apart wrote it.
WRITTEN_BEFORE = (
    '{"budget":1024,"dense":"auto","dense_layers":[],"draft":"dense","full_verify_every":0,"head_map":null,'
    '"history":"off","history_decay":0.9,"history_weight":0.05,"inspect_dir":null,"keep":0.1,"kernel":"auto",'
    '"policy":"ratio","pool_heads":"max","pool_rows":"max","recent":64,"selector":"auto","sink":4,'
    '"spread":0.5,"top_p":0.95,"verify":"sparse"}'
)


def test_configurations_of_before_are_read_as_before():
    assert StsConfig.parse(WRITTEN_BEFORE) == StsConfig(keep=0.1, draft="dense", spread=0.5)
