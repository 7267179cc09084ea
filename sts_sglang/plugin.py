"""Entry point `sglang.srt.plugins`: check the host, register the backend, hook the rest."""

from __future__ import annotations

import functools
import logging
import sys

from sts_sglang import cpu
from sts_sglang.config import BACKEND, StsConfig
from sts_sglang.host import compat

logger = logging.getLogger(__name__)


def register() -> None:
    """Attach to SGLang; runs once in the launcher and once in every scheduler process.

    SGLang logs exceptions of plugins and serves on without them. An incompatible host therefore gets
    a backend `sts` that exits with the reason, and nothing is hooked: without `sts` it is stock.
    """
    try:
        compat.check(cpu_platform=cpu.selected())
    except compat.Incompatible as error:
        _refuse(str(error))
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sts_sglang.host import hooks

    _register_backend(_create_backend)
    for target, hook, kind in hooks.table():
        HookRegistry.register(target.path, hook, HookType[kind])
    _wrap_engine_args(hooks.engine_args)
    if cpu.selected():
        cpu.install_branches()


def _wrap_engine_args(hook) -> None:
    """Around what makes an Engine's arguments, which may be another plugin's already. The registry hooks
    functions, and this attribute is a class."""
    from sglang.srt.entrypoints.engine import Engine

    original = Engine.server_args_class
    if getattr(original, "func", None) is not hook:
        Engine.server_args_class = staticmethod(functools.partial(hook, original))


def _refuse(reason: str) -> None:
    logger.error(reason)
    if any(
        arg == BACKEND or arg.endswith(f"={BACKEND}") for arg in sys.argv
    ):  # a command line that asks for it ends here, before weights load
        raise SystemExit(reason)

    def exit_with_reason(model_runner):
        raise SystemExit(reason)

    _register_backend(exit_with_reason)


def _register_backend(factory) -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if BACKEND not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(factory)


def _create_backend(model_runner):
    """Factory of the attention registry, called for the target's and the draft's model runner."""
    if missing := compat.unhooked():
        raise RuntimeError(f"SGLang did not apply the STS hooks on {', '.join(missing)}; see its log")
    from sts_sglang.host import bind

    return bind.create_backend(StsConfig.of_launch(), model_runner)
