"""Reference CPU platform: SGLang's real server with speculative decoding on a plain CPU.

`SGLANG_PLATFORM=sts_cpu` selects it, for development, tests and the demo. Nothing here is active on
a GPU host: `activate()` answers None unless the platform was asked for by name.
"""

from __future__ import annotations

import importlib
import os

from sts_sglang.host import compat
from sts_sglang.host.releases import release

NAME = "sts_cpu"


def selected() -> bool:
    """Whether the launch asked for this platform."""
    return os.environ.get("SGLANG_PLATFORM") == NAME


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`. SGLang imports the class by this name, in the middle of its own."""
    return "sts_sglang.cpu.platform.CpuPlatform" if selected() else None


def install_branches() -> None:
    """Switch SGLang's `_is_cpu` branches on, with torch stand-ins for the ops they call."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sts_sglang.cpu import ops

    # SGLang decorates small helpers with @torch.compile: 35 s of compilation in the first request.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Trees move accepted KV, and the pool builder for out-of-tree platforms leaves the Triton copy off.
    os.environ.setdefault("SGLANG_NATIVE_MOVE_KV_CACHE", "1")

    for name, target in compat.CPU_HOOKS.items():
        kind = HookType.AROUND if name in ops.AROUND else HookType.REPLACE
        HookRegistry.register(target.path, getattr(ops, name), kind)
    for path, stand_in in release.CPU_KERNELS.items():
        module_name, _, name = path.rpartition(".")
        setattr(importlib.import_module(module_name), name, ops.Launch(getattr(ops, stand_in)))
    for module_name, stand_ins in release.CPU_BRANCHES.items():
        module = importlib.import_module(module_name)
        module._is_cpu = True
        for name, stand_in in stand_ins.items():
            setattr(module, name, getattr(ops, stand_in))
