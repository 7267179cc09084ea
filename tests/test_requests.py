"""What of a request's own fields is answered with a 400: what speculation takes and does not follow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from sts_sglang import cpu
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.host import hooks
from sts_sglang.host.releases import release


@pytest.fixture
def verify(monkeypatch):
    """verify(cpu, **params) as SGLang's own verify, with the hook behind it."""

    def call(on_cpu: bool, **params):
        monkeypatch.setattr(cpu, "selected", lambda: on_cpu)
        made = SamplingParams(**params)
        made.verify(1000)
        hooks.sampling_verify(None, made, 1000)

    monkeypatch.setattr(hooks._Launch, "served", StsConfig())
    monkeypatch.setattr(hooks._Launch, "speculates", True)
    return call


@pytest.fixture
def unchecked(monkeypatch):
    """Nothing launched yet, and launches that are not checked."""
    monkeypatch.setattr(hooks, "check_all", lambda args, config: config)
    monkeypatch.setattr(hooks.handover, "leave", lambda *args: None)
    monkeypatch.setattr(hooks.views, "resolved", lambda args: args)
    for name, value in (("config", None), ("served", None), ("speculates", False)):
        monkeypatch.setattr(hooks._Launch, name, value)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 20,
            "stop": ["x"],
            "logit_bias": {"3": 1.0},
            "min_new_tokens": 1,
        },
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 0, "sampling_seed": 7},  # greedy: any seed gives the same
        {"temperature": 0, "frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0},
        {"temperature": 0, "repetition_penalty": 1.1, "max_new_tokens": 1},
        {"temperature": 0.7, "min_p": 0.1, "max_new_tokens": 1},  # its only token is the prefill's
        {"max_new_tokens": 0},
    ],
)
def test_what_verify_follows_is_served(verify, on_cpu, params):
    verify(on_cpu, **params)


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("min_p", {"temperature": 0, "min_p": 0.05}),
        ("min_p", {"temperature": 0.7, "min_p": 0.05, "max_new_tokens": None}),
        ("min_new_tokens", {"temperature": 0, "min_new_tokens": 2}),
        ("frequency_penalty", {"temperature": 0, "frequency_penalty": 1.5}),
        ("presence_penalty", {"temperature": 0, "presence_penalty": -0.5}),
        ("repetition_penalty", {"temperature": 0, "repetition_penalty": 1.05}),
        ("sampling_seed", {"temperature": 0.7, "sampling_seed": 7}),
        ("sampling_seed", {"temperature": 0.7, "sampling_seed": 0, "max_new_tokens": 1}),
        ("custom_params.sts.keep", {"temperature": 0, "custom_params": {"sts": {"keep": 7}}}),
    ],
)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_verify_does_not_follow_is_refused_by_name(verify, on_cpu, field, params):
    with pytest.raises(ConfigError, match=rf"^{field}: got .*; allowed: "):
        verify(on_cpu, **params)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"top_p": 0.5}]
)
def test_temperature_is_refused_on_the_cpu_platform_alone(verify, params):
    verify(False, **params)
    with pytest.raises(ConfigError, match=r"^temperature: got .*; allowed: 0 "):
        verify(True, **params)


def test_servers_without_sts_refuse_nothing(verify, monkeypatch):
    monkeypatch.setattr(hooks._Launch, "served", None)
    verify(True, temperature=0.7, min_p=0.1, min_new_tokens=5)


def test_without_a_draft_sampling_is_as_ever(verify, monkeypatch):
    monkeypatch.setattr(hooks._Launch, "speculates", False)
    for params in (
        {"temperature": 0.7, "min_p": 0.05},
        {"min_new_tokens": 4, "repetition_penalty": 1.05},
        {"temperature": 0.7, "sampling_seed": 7},
    ):
        verify(True, **params)
    with pytest.raises(ConfigError, match="custom_params.sts.keep"):
        verify(True, custom_params={"sts": {"keep": 2}})


@pytest.mark.parametrize(("selector", "most"), [("tokens", 0.1), ("pages", 0.5)])
def test_a_bound_is_what_auto_stands_for(verify, unchecked, monkeypatch, selector, most):
    monkeypatch.setattr(hooks, "check_all", lambda args, config: config.for_launch(False, directions=True))
    args = SimpleNamespace(model_path="m", speculative_algorithm=None)
    hooks._check(args, StsConfig(selector=selector, request_keep="at_most"))
    verify(False, custom_params={"sts": {"keep": most}})
    with pytest.raises(ConfigError, match=f"at most this server's {most}"):
        verify(False, custom_params={"sts": {"keep": most + 0.05}})


@pytest.mark.skipif("beam_width" not in SamplingParams.__dict__, reason="a field of later releases")
def test_beams_are_refused_with_a_draft_and_without(verify, monkeypatch):
    """Their rows of a batch belong to no request: nothing that was asked for would reach them."""
    for speculates in (True, False):
        monkeypatch.setattr(hooks._Launch, "speculates", speculates)
        verify(False, temperature=0.7, beam_width=1)
        with pytest.raises(ConfigError, match="^beam_width: got 4"):
            verify(False, temperature=0.7, beam_width=4)


def test_checks_of_speculation_stay_once_a_launch_speculates(unchecked):
    """An engine without a draft in the same process does not switch them off for one that has one."""
    for algorithm, expected in ((None, False), ("EAGLE3", True), (None, True)):
        args = SimpleNamespace(model_path="m", speculative_algorithm=algorithm)
        hooks._check(args, StsConfig())
        assert hooks._Launch.speculates is expected


def test_a_decode_step_that_reads_the_table_to_its_end_holds_the_scheduler_back(monkeypatch):
    """Where an event says that the table is free, before the graph that reads it has run; a graph that stands
    aside does not read it, and is waited for when a request ends."""
    runner = SimpleNamespace(war_fastpath_read_done_event="early")
    worker, seen, noted = SimpleNamespace(model_runner=runner), [], []
    runtime = SimpleNamespace(aside=SimpleNamespace(forwarded=lambda: noted.append("forward")))
    for alone, reads in ((False, True), (True, False), (True, True)):
        bound = SimpleNamespace(alone=alone, runtime=runtime, verify=SimpleNamespace(reads_table=reads))
        monkeypatch.setattr(hooks.bind, "current", lambda bound=bound: bound)
        monkeypatch.setattr(hooks, "_before_forward", lambda runtime, batch: seen.append(batch))
        assert hooks.forward_target(lambda self, batch, flag: (batch, flag), worker, "batch", 7) == (
            "batch",
            7,
        )
        held = alone and reads and release.VERSION == "0.5.16"
        assert runner.war_fastpath_read_done_event == (None if held else "early")
    assert seen == ["batch"] * 2 and noted == ["forward"]
