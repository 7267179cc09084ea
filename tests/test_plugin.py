"""The plugin in SGLang: off, on, on the CPU platform, and on an SGLang that has changed.

A scenario is a function that asserts. It runs in a fork of a process that has imported SGLang and
loaded no plugin yet: every scenario starts from a pristine SGLang, and the import is paid once a platform.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sts_sglang import cpu, plugin
from sts_sglang.cpu import ops as cpu_ops
from sts_sglang.host import compat, hooks, serves
from sts_sglang.host.releases import RELEASES, release

ROOT = Path(__file__).parents[1]
ARGUMENTS = [
    "--model-path",
    "dummy",
    "--attention-backend",
    "triton",
    "--random-seed",
    "7",
    "--port",
    "12345",
]


def load_plugins() -> None:
    """As a process of SGLang does, once; a second call in the same process returns at once."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


def raw(path: str):
    """An attribute as it is stored: neither bound nor unwrapped, so that identity means something."""
    owner, _, name = path.rpartition(".")
    return inspect.getattr_static(pkgutil.resolve_name(owner), name, None)


def hooked_attributes() -> dict[str, object]:
    return {target.path: raw(target.path) for target in compat.HOOK_TARGETS}


def cpu_attributes() -> dict[str, object]:
    """What the CPU platform replaces; a stand-in's name is absent (None) from a pristine module."""
    paths = [target.path for target in compat.CPU_TARGETS] + list(release.CPU_SYMBOLS)
    paths += [f"{module}.{name}" for module, ops in release.CPU_BRANCHES.items() for name in ops]
    return {path: raw(path) for path in paths}


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [path for path in before | after if before[path] is not after[path]]


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert not changed(before, after), changed(before, after)


def off() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    before = hooked_attributes() | cpu_attributes()
    os.environ["SGLANG_PLUGINS"] = "another"
    load_plugins()
    assert_same(before, hooked_attributes() | cpu_attributes())
    assert "sts" not in ATTENTION_BACKEND_CHOICES and "sts" not in ATTENTION_BACKENDS
    assert compat.unhooked() == [target.path for target in compat.HOOK_TARGETS]


def on() -> None:
    import torch
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    stock, cpu = hooked_attributes(), cpu_attributes()
    load_plugins()
    loaded = hooked_attributes()
    assert compat.unhooked() == []
    assert changed(stock, loaded) == [target.path for target in compat.HOOK_TARGETS]
    assert [target.path for target, _, _ in hooks.table()] == [t.path for t in compat.HOOK_TARGETS]
    assert_same(cpu, cpu_attributes())
    assert ATTENTION_BACKEND_CHOICES.count("sts") == 1
    assert ATTENTION_BACKENDS["sts"] is plugin._create_backend

    load_plugins()
    plugin.register()
    HookRegistry.apply_hooks()
    assert_same(loaded, hooked_attributes())
    assert ATTENTION_BACKEND_CHOICES.count("sts") == 1
    assert not torch.cuda.is_initialized()


def on_serves_other_backends_as_before() -> None:
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    def made() -> list:
        by_hand = ServerArgs(model_path="dummy", attention_backend="triton", random_seed=7)
        return [(repr(args), vars(args)) for args in (by_hand, prepare_server_args(ARGUMENTS))]

    stock = made()
    environment = dict(os.environ)
    load_plugins()
    assert made() == stock
    assert dict(os.environ) == environment


def on_makes_the_arguments_that_another_makes() -> None:
    from types import SimpleNamespace

    from sglang.srt.entrypoints.engine import Engine

    of_another = SimpleNamespace(**dict.fromkeys(serves.BACKEND_FIELDS))
    Engine.server_args_class = staticmethod(lambda model_path: of_another)
    load_plugins()
    wrapped = Engine.server_args_class
    plugin.register()
    assert Engine.server_args_class is wrapped
    assert wrapped(model_path="dummy") is of_another


def hook_not_applied() -> None:
    """SGLang logs it and serves on: neither the launcher nor a scheduler process of ours may."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    HookRegistry._patched.remove(FACTORY)
    for serve in (
        lambda: release.resolve(ServerArgs(model_path="dummy", attention_backend="sts")),
        lambda: ATTENTION_BACKENDS["sts"](None),
    ):
        try:
            serve()
        except (SystemExit, RuntimeError) as error:
            assert "did not apply the" in str(error) and FACTORY in str(error)
        else:
            raise AssertionError("served on")


def on_cpu() -> None:
    import torch
    from sglang.srt.mem_cache import allocation
    from sglang.srt.platforms import current_platform

    load_plugins()
    assert compat.unhooked(compat.HOOK_TARGETS + compat.CPU_TARGETS) == []
    for name, stand_ins in release.CPU_BRANCHES.items():
        module = importlib.import_module(name)
        assert module._is_cpu is True
        for op, stand_in in stand_ins.items():
            assert getattr(module, op) is getattr(cpu_ops, stand_in)
    for path in release.CPU_KERNELS:
        assert isinstance(pkgutil.resolve_name(path), cpu_ops.Launch)
    assert allocation.support_triton("flashinfer") is False  # the copy that allocation.py imported
    assert current_platform.device_type == "cpu"
    assert type(current_platform).__module__ == "sts_sglang.cpu.platform"
    assert not torch.cuda.is_initialized()


def delete(path: str) -> None:
    owner, _, name = path.rpartition(".")
    delattr(pkgutil.resolve_name(owner), name)


def replace(path: str, value: object) -> None:
    owner, _, name = path.rpartition(".")
    setattr(pkgutil.resolve_name(owner), name, value)


def newer_sglang() -> None:
    installed = compat.installed_version
    compat.installed_version = lambda name: "0.5.17" if name == "sglang" else installed(name)


def hook_on_a_struct() -> None:
    """A msgspec.Struct looks up how it is made when its class is: what replaces that is never called."""
    from sglang.srt.server_args import ServerArgs

    if not hasattr(ServerArgs, "__struct_fields__"):
        ServerArgs.__struct_fields__ = ()
    post_init = compat.Target("sglang.srt.server_args.ServerArgs.__post_init__", ("self",))
    hooked = compat.HOOKS["resolve_args"]
    compat.HOOK_TARGETS = tuple(post_init if t == hooked else t for t in compat.HOOK_TARGETS)


FACTORY, FORWARD = compat.HOOKS["create_draft_backend"].path, compat.HOOKS["forward_batch"].path
KV_LOC = "sglang.srt.mem_cache.memory_pool.KVWriteLoc"
# name -> (how SGLang has changed, what the refusal names)
CHANGES: dict[str, tuple[Callable[[], None], str]] = {
    "another version": (newer_sglang, f"sglang is 0.5.17, not {' or '.join(RELEASES)}"),
    "factory gone": (partial(delete, FACTORY), f"{FACTORY} is missing"),
    "factory with other parameters": (
        partial(replace, FACTORY, lambda self, backend_name: None),
        f"{FACTORY} takes ('self', 'backend_name')",
    ),
    "parameter renamed": (
        partial(replace, FORWARD, lambda self, schedule_batch, on_publish=None: None),
        f"{FORWARD} takes ('self', 'schedule_batch', 'on_publish')",
    ),
    "not callable": (partial(replace, FORWARD, 7), f"{FORWARD} is not callable"),
    "arguments a Struct": (
        hook_on_a_struct,
        "ServerArgs.__post_init__ cannot be replaced",
    ),
    "symbol gone": (partial(delete, KV_LOC), f"{KV_LOC} is missing"),
    **{
        f"{target.path.rpartition('.')[2]} gone": (partial(delete, target.path), f"{target.path} is missing")
        for target in (
            compat.HOOKS["internal_state"],
            compat.HOOKS["from_cli_args"],
            compat.HOOKS["sampling_verify"],
        )
    },
}
CPU_NAME = release.CPU_SYMBOLS[-1]
CPU_CHANGES = {"CPU op gone": (partial(delete, CPU_NAME), f"{CPU_NAME} is missing")}


def exits_if_asked_for(change: Callable[[], None], named: str, flag: list[str]) -> None:
    change()
    sys.argv = ["launch_server", *flag]
    try:
        load_plugins()
    except SystemExit as exit:
        assert isinstance(exit.code, str)  # Python prints it and exits with 1
        assert named in exit.code and "\n" not in exit.code
        assert all(f"sglang=={version}" in exit.code for version in RELEASES)
    else:
        raise AssertionError("served on")


def is_stock_if_not_asked_for(change: Callable[[], None], named: str) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    change()
    before = hooked_attributes() | cpu_attributes()
    sys.argv = ["launch_server", "--attention-backend", "triton"]
    load_plugins()
    assert_same(before, hooked_attributes() | cpu_attributes())
    assert len(compat.unhooked()) == len(compat.HOOK_TARGETS)
    try:
        ATTENTION_BACKENDS["sts"](None)
    except SystemExit as exit:
        assert named in exit.code
    else:
        raise AssertionError("the backend was built")


def refusals(changes: dict) -> dict[str, Callable[[], None]]:
    scenarios = {}
    for name, change in changes.items():
        scenarios[f"{name}: exits"] = partial(exits_if_asked_for, *change, ["--attention-backend", "sts"])
        scenarios[f"{name}: stock"] = partial(is_stock_if_not_asked_for, *change)
    return scenarios


SCENARIOS = {
    "": {
        "off": off,
        "on": on,
        "on, other backends": on_serves_other_backends_as_before,
        "on, arguments of another": on_makes_the_arguments_that_another_makes,
        "hook not applied": hook_not_applied,
        "flag with =": partial(exits_if_asked_for, *CHANGES["factory gone"], ["--attention-backend=sts"]),
        **refusals(CHANGES),
    },
    cpu.NAME: {"on": on_cpu, **refusals(CPU_CHANGES)},
}


def run_scenarios(platform_name: str) -> None:
    """In the child: print scenario -> traceback, empty when it passed."""
    for path in (t.path for t in compat.HOOK_TARGETS + compat.CPU_TARGETS):
        pkgutil.resolve_name(path)
    outcomes = {name: run_forked(scenario) for name, scenario in SCENARIOS[platform_name].items()}
    print(json.dumps(outcomes))


def run_forked(scenario: Callable[[], None]) -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            scenario()
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcome = pipe.read()
    _, status = os.waitpid(pid, 0)
    return outcome or ("" if status == 0 else f"ended with status {status}")


@pytest.fixture(scope="module")
def outcomes() -> Callable[[str], dict[str, str]]:
    """platform name -> outcomes; both children run at once."""
    children = {}
    for name in SCENARIOS:
        env = {k: v for k, v in os.environ.items() if k != "STS_CONFIG"}
        script = f"from tests.test_plugin import run_scenarios; run_scenarios({name!r})"
        children[name] = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**env, "SGLANG_PLATFORM": name, "SGLANG_PLUGINS": "sts"},  # SGLang's wheel brings others
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finished = {name: child.communicate() for name, child in children.items()}

    def of(name: str) -> dict[str, str]:
        out, err = finished[name]
        assert children[name].returncode == 0, err[-3000:]
        return json.loads(out.splitlines()[-1])

    return of


@pytest.mark.parametrize("scenario", SCENARIOS[""])
def test_on_any_host(scenario: str, outcomes) -> None:
    assert outcomes("")[scenario] == ""


@pytest.mark.parametrize("scenario", SCENARIOS[cpu.NAME])
def test_on_the_cpu_platform(scenario: str, outcomes) -> None:
    assert outcomes(cpu.NAME)[scenario] == ""
