"""`sts-sglang`. What attaches to SGLang runs in a process of its own, so that no other test is hooked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sts_sglang import cli
from sts_sglang.config import StsConfig
from sts_sglang.evaluate import pair
from sts_sglang.host import compat
from sts_sglang.tools import demo
from sts_sglang.tools.demo import MODELS
from sts_sglang.tools.local_server import LocalServer

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM", "STS_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nothing_to_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves SGLang alone; the attachment itself is tested in a subprocess."""
    monkeypatch.setattr(cli, "_attachment", lambda: [])


def test_config_prints_the_effective_configuration(capsys, monkeypatch, tmp_path) -> None:
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == StsConfig().to_json() + "\n"
    monkeypatch.setenv("STS_CONFIG", '{"keep": 0.5}')
    assert cli.main(["config"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == 0.5
    file = tmp_path / "sts.json"
    file.write_text('{"keep": 0.25, "dense_layers": [3, 0]}')
    assert cli.main(["config", "--sts-config", str(file)]) == 0
    effective = json.loads(capsys.readouterr().out)
    assert (effective["keep"], effective["dense_layers"]) == (0.25, [0, 3])


@pytest.mark.parametrize("given", ['{"keep": 2}', '{"kep": 0.5}', "{", "no such file"])
def test_config_refuses_in_one_line(given: str, capsys) -> None:
    assert cli.main(["config", "--sts-config", given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: sts_config") and err.count("\n") == 1


def test_config_help_teaches_every_key(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["config", "--help"])
    text = capsys.readouterr().out
    for field in fields(StsConfig):
        default = json.loads(StsConfig().to_json())[field.name]
        assert f"  {field.name} (default {json.dumps(default)}): " in text
    assert "keep (default \"auto\"): a number above 0 and at most 1, or 'auto'\n      Share of the" in text
    assert "ratio | fixed | top_p" in text


def test_help_shows_an_example_that_works(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "--attention-backend sts" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["config", "--help"])
    example = capsys.readouterr().out.rpartition("--sts-config '")[2].strip().removesuffix("'")
    assert cli.main(["config", "--sts-config", example]) == 0


def doctor(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sts_sglang.cli", "doctor"]
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )


def test_doctor_on_the_reference_platform() -> None:
    done = doctor(SGLANG_PLATFORM="sts_cpu")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    for distribution in ("sglang", "torch", "triton", "flashinfer-python"):
        assert f"{distribution} {compat.installed_version(distribution)}" in lines
    assert "served: sglang 0.5.16 and 0.5.23" in lines
    for target in (*compat.HOOK_TARGETS, *compat.CPU_TARGETS):
        assert f"{target.path}: ok" in lines
    for symbol in (*compat.release.SYMBOLS, *compat.release.CPU_SYMBOLS):
        assert f"{symbol}: ok" in lines
    assert "sglang.srt.plugins: sts = sts_sglang.plugin:register" in lines
    assert "sglang.srt.platforms: sts_cpu = sts_sglang.cpu:activate" in lines
    assert f"hooks applied: {len(compat.HOOK_TARGETS)} of {len(compat.HOOK_TARGETS)}" in lines
    assert lines[-1].startswith("launch: SGLANG_PLATFORM=sts_cpu python -m sglang.launch_server ")


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"SGLANG_PLUGINS": "another, third"}, "SGLANG_PLUGINS=another, third keeps the plugin out: add sts"),
        ({"SGLANG_PLATFORM": "another"}, "SGLANG_PLATFORM=another keeps the plugin out"),
        ({"STS_CONFIG": '{"keep": 0}', "SGLANG_PLATFORM": "sts_cpu"}, "sts_config.keep: got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_doctor_names_what_keeps_sts_out(environment, reason, capsys, monkeypatch, nothing_to_attach) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor"]) == 1
    assert f"sts cannot serve here: {reason}" in capsys.readouterr().out


def test_doctor_allows_a_list_of_plugins(capsys, monkeypatch, nothing_to_attach) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another, sts")
    monkeypatch.setenv("SGLANG_PLATFORM", "sts_cpu")
    assert cli.main(["doctor"]) == 0


def test_doctor_reports_a_missing_name(capsys, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "sts_cpu")
    monkeypatch.setattr(
        compat, "findings", lambda cpu_platform: {"a.b": None, "a.c": "a.c is missing (gone)"}
    )
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "a.b: ok" in lines and "a.c: MISSING, a.c is missing (gone)" in lines
    assert lines[-1] == "sts cannot serve here: a.c is missing (gone)"


def test_doctor_needs_a_device(capsys, monkeypatch, nothing_to_attach) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["doctor"]) == 1
    assert "sts cannot serve here: no CUDA device: set SGLANG_PLATFORM=sts_cpu" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["kernels/__init__.py", "kernels.py"])
def test_doctor_sees_a_shadowed_kernels_package(
    file, capsys, monkeypatch, tmp_path, nothing_to_attach
) -> None:
    shadow = tmp_path / file
    shadow.parent.mkdir(exist_ok=True)
    shadow.touch()
    monkeypatch.setenv("SGLANG_PLATFORM", "sts_cpu")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 1
    assert f"{shadow} shadows the PyPI package kernels" in capsys.readouterr().out


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (RuntimeError("why"), 70)])
def test_what_ends_a_command_is_no_verdict(error, code, capsys, monkeypatch) -> None:
    def ended(*_):
        raise error

    monkeypatch.setattr(cli.StsConfig, "resolve", ended)
    assert cli.main(["config"]) == code
    out, err = capsys.readouterr()
    assert out == "" and (err == "interrupted\n") == (code == 130)
    assert ("Traceback" in err and "RuntimeError: why" in err) == (code == 70)


@pytest.fixture
def terminated_start(tmp_path, monkeypatch):
    """In place of what makes a server: it is never ready, SIGTERM comes while it is waited for, and it must
    be gone in the end."""
    (tmp_path / "never_ready.py").write_text("import time\ntime.sleep(600)")
    started = []

    def start(model, log, *_, **__) -> LocalServer:
        env = {"PYTHONPATH": str(tmp_path)}
        started.append(LocalServer("m", log, module="never_ready", env=env, start_seconds=30))
        return started[0]

    monkeypatch.setattr(LocalServer, "get", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not on SIGTERM as on Ctrl-C"))
    try:
        yield start
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)


def test_sigterm_ends_the_server_that_evaluate_is_starting(terminated_start, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pair, "start", terminated_start)
    size = ["--tasks", "text", "--lengths", "512", "--items", "1"]
    code = cli.main(["evaluate", "--target", str(MODELS / "target"), "--device", "cpu", *size])
    assert code == 130 and capsys.readouterr().err.endswith("interrupted\n")


def test_sigterm_ends_the_server_that_the_demo_is_starting(terminated_start, monkeypatch) -> None:
    monkeypatch.setattr(demo, "LocalServer", terminated_start)
    with pytest.raises(KeyboardInterrupt):
        demo.main([])
