"""Server arguments as a launch makes them, with the checks where the plugin puts them."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sts_sglang import headmap
from sts_sglang.config import StsConfig
from sts_sglang.host import compat, serves
from sts_sglang.host.releases import release


class Resolved:
    """Server arguments as SGLang resolved them; a test may change them, where SGLang seals its own."""

    def __init__(self, made: ServerArgs):
        vars(self)["_made"] = made
        # Declarations of the resolution would win over what a test says.
        vars(self)["_resolved_overrides"] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(release.resolved(vars(self)["_made"]), name)


def launched(monkeypatch: pytest.MonkeyPatch, config: StsConfig | None = None, **arguments) -> Resolved:
    """Raises what the checks raise."""
    name = compat.HOOKS["resolve_args"].path.rpartition(".")[2]
    resolve = getattr(ServerArgs, name)

    def checked(self) -> None:
        serves.check_raw(self)
        resolve(self)
        serves.check_all(release.resolved(self), config or StsConfig())

    with monkeypatch.context() as patched:
        patched.setattr(ServerArgs, name, checked)
        patched.setitem(serves.RANKS, "cpu", headmap.RANKS)  # as in tests/tp_on_cpu.py
        made = ServerArgs(**arguments)
        release.resolve(made)
    return Resolved(made)
