"""The command line `sts-sglang`. A command is a function in COMMANDS."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import inspect
import json
import os
import platform as host
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from sts_sglang import __version__, cpu
from sts_sglang.calibrate import command as calibrate
from sts_sglang.config import BACKEND, CHAIN_FLAGS, ENV, ConfigError, StsConfig
from sts_sglang.evaluate import command as evaluate
from sts_sglang.host import compat
from sts_sglang.tools import inspection

LAUNCH = (
    "python -m sglang.launch_server --model-path TARGET --attention-backend sts "
    f"--speculative-algorithm STANDALONE --speculative-draft-model-path DRAFT {CHAIN_FLAGS}"
)
# Beside what commands return: 0, 1 (this host cannot serve, or no keep passes) and 2 (bad input).
CRASHED, INTERRUPTED = 70, 130  # sysexits.h's EX_SOFTWARE; what shells say of SIGINT


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code. An unexpected error is printed with its traceback, so that it is no verdict."""
    parser = argparse.ArgumentParser(
        prog="sts-sglang",
        description="Tools around SGLang's `--attention-backend sts`: what is attached, what is configured.",
        epilog=f"example:\n  sts-sglang doctor && {LAUNCH}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # SIGTERM as well, where a command started a server
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return CRASHED


def _add_doctor(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="versions, what is attached to SGLang and what is not, and how to launch here",
        description="Shows what the plugin finds on this host, in the environment of a launch:\n"
        "SGLANG_PLUGINS, SGLANG_PLATFORM, STS_CONFIG. Exit code 1, with the reason, when `sts`\n"
        "could not serve here.",
        epilog=f"example, the reference on a plain CPU:\n  SGLANG_PLATFORM={cpu.NAME} sts-sglang doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_doctor)


def _add_config(commands) -> None:
    parser = commands.add_parser(
        "config",
        help="print the effective configuration as canonical JSON",
        description="Prints the configuration that a launch with this argument and environment would\n"
        "use, as canonical JSON. Exit code 2 and one line when it is not allowed.",
        epilog=f"keys:\n{_keys()}\n\nexample:\n"
        """  sts-sglang config --sts-config '{"keep": 0.05, "dense_layers": [0, 1]}'""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sts-config",
        metavar="JSON|PATH",
        help=f"inline JSON or a JSON file; wins over the environment variable {ENV}",
    )
    parser.set_defaults(run=_config)


COMMANDS: tuple[Callable, ...] = (_add_doctor, _add_config, calibrate.add, evaluate.add, inspection.add)


def _config(args: argparse.Namespace) -> int:
    print(StsConfig.resolve(args.sts_config, os.environ).to_json())
    return 0


def _keys() -> str:
    """Every key with its default, what is allowed and what it means."""
    meanings = _field_docs()
    lines = []
    for name, default in json.loads(StsConfig().to_json()).items():
        lines += [f"  {name} (default {json.dumps(default)}): {_allowed(name)}"]
        words = " ".join(meanings.get(name, "").split())
        lines += textwrap.wrap(words, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _allowed(name: str) -> str:
    """What the configuration itself says is allowed, asked by giving it what never is."""
    try:
        StsConfig(**{name: object()})
    except ConfigError as error:
        return str(error).rpartition("allowed: ")[2]
    raise AssertionError(f"sts_config.{name} takes anything")


def _field_docs() -> dict[str, str]:
    """The string below each field of StsConfig, which Python keeps in the source only."""
    body = ast.parse(inspect.getsource(StsConfig)).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _doctor(args: argparse.Namespace) -> int:
    _show_versions()
    problems = [*_entry_points()]
    if not problems:
        problems += _attachment()
    problems += [*_kernels(), *_configuration()]
    launch, no_device = _device()
    problems += no_device
    if problems:
        print(f"sts cannot serve here: {'; '.join(problems)}")
        return 1
    print(f"launch: {launch}")
    return 0


def _show_versions() -> None:
    print(f"python {host.python_version()}, sts-sglang {__version__}")
    for distribution in ("sglang", "torch", "flashinfer-python", "triton"):
        print(f"{distribution} {compat.installed_version(distribution) or 'is not installed'}")
    print(f"served: sglang {' and '.join(compat.RELEASES)}")


def _entry_points() -> Iterator[str]:
    """Print the entry points as SGLang sees them; yield why ours would not be used."""
    plugins, platforms = _show_group("sglang.srt.plugins"), _show_group("sglang.srt.platforms")
    chosen = {name: os.environ.get(name, "") for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM")}
    for name, value in chosen.items():
        print(f"{name}: {value or 'not set'}")
    if BACKEND not in plugins or cpu.NAME not in platforms:
        yield "SGLang finds no entry points of sts-sglang: install it into this environment"
    allowed = [name.strip() for name in chosen["SGLANG_PLUGINS"].split(",")]
    if chosen["SGLANG_PLUGINS"] and BACKEND not in allowed:
        yield f"SGLANG_PLUGINS={chosen['SGLANG_PLUGINS']} keeps the plugin out: add {BACKEND} or unset it"
    if chosen["SGLANG_PLATFORM"] not in ("", cpu.NAME):
        # SGLang skips the plugins of every distribution that has another platform.
        yield f"SGLANG_PLATFORM={chosen['SGLANG_PLATFORM']} keeps the plugin out: unset it"


def _show_group(group: str) -> set[str]:
    entries = importlib.metadata.entry_points(group=group)
    for entry in entries:
        print(f"{group}: {entry.name} = {entry.value}")
    return entries.names


def _attachment() -> Iterator[str]:
    """Print every name of SGLang that the plugin stands on; attach if all are there; yield what is wrong."""
    findings = compat.findings(cpu_platform=cpu.selected())
    for name, problem in findings.items():
        print(f"{name}: {'ok' if problem is None else f'MISSING, {problem}'}")
    if wrong := [problem for problem in findings.values() if problem]:
        yield from wrong
        return
    from sglang.srt.plugins import load_plugins

    load_plugins()
    missing = compat.unhooked()
    print(f"hooks applied: {len(compat.HOOK_TARGETS) - len(missing)} of {len(compat.HOOK_TARGETS)}")
    if missing:
        yield f"SGLang did not apply the hooks on {', '.join(missing)}"


def _kernels() -> Iterator[str]:
    """SGLang's FA3 loader does without the PyPI package if `python -m` from here finds another one."""
    if compat.installed_version("kernels") is None:
        yield "the PyPI package kernels, which SGLang depends on, is not installed"
        return
    expected = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    found = PathFinder.find_spec("kernels", [os.getcwd(), *sys.path]).origin
    if not Path(found).samefile(expected):
        yield f"{found} shadows the PyPI package kernels of SGLang's FA3: launch from another directory"
        return
    print("kernels: the PyPI package, not shadowed")


def _configuration() -> Iterator[str]:
    try:
        print(f"configuration: {StsConfig.resolve(None, os.environ).to_json()}")
    except ConfigError as error:
        yield str(error)


def _device() -> tuple[str, list[str]]:
    """Print the device; return how to launch on it, or why not."""
    import torch

    if cpu.selected():
        print("device: cpu (the reference platform)")
        return f"SGLANG_PLATFORM={cpu.NAME} {LAUNCH} --device cpu", []
    if torch.cuda.is_available():
        print(f"device: {torch.cuda.get_device_name()}")
        return LAUNCH, []
    print("device: cpu")
    return "", [f"no CUDA device: set SGLANG_PLATFORM={cpu.NAME} for the reference on a plain CPU"]


if __name__ == "__main__":
    raise SystemExit(main())
