"""What of a request's own fields is answered with a 400: what speculation takes and does not follow."""

from __future__ import annotations

import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from sts_sglang import cpu
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.host import hooks


@pytest.fixture
def verify(monkeypatch):
    """verify(cpu, **params) as SGLang's own verify, with the hook behind it."""

    def call(on_cpu: bool, **params):
        monkeypatch.setattr(cpu, "selected", lambda: on_cpu)
        made = SamplingParams(**params)
        made.verify(1000)
        hooks.sampling_verify(None, made, 1000)

    monkeypatch.setattr(hooks._Launch, "config", StsConfig())
    monkeypatch.setattr(hooks._Launch, "speculates", True)
    return call


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
    monkeypatch.setattr(hooks._Launch, "config", None)
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
