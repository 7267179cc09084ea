"""What a launch hands to its schedulers through the environment: the configuration that it checked, and a
mark by which a scheduler knows that the checks were of the arguments it was given.

Arguments may be built, changed or unpickled by anybody; a scheduler that served them unchecked would serve
what the launch refuses.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

from sts_sglang.config import ENV, StsConfig
from sts_sglang.host import serves

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

MARK = "STS_CHECKED"  # the environment variable beside STS_CONFIG


def leave(server_args: ServerArgs, config: StsConfig) -> None:
    """For the schedulers that this process starts: these arguments were checked with this configuration."""
    os.environ[ENV] = config.to_json()
    os.environ[MARK] = _digest(server_args)


def fits(server_args: ServerArgs) -> bool:
    """Whether the environment's configuration was checked with these arguments."""
    return ENV in os.environ and os.environ.get(MARK) == _digest(server_args)


def verify(server_args: ServerArgs) -> None:
    """In a scheduler, before weights load. Raises `Refusal` where nobody checked this launch."""
    if not fits(server_args):
        raise serves.Refusal(
            "--attention-backend sts: this scheduler's launch was not checked by sts; start it by "
            "sgl.Engine, sglang.launch_server or sglang serve, without overriding "
            "ServerArgs.check_server_args, and leave STS_CONFIG and STS_CHECKED to the launch"
        )


def _digest(server_args: ServerArgs) -> str:
    """Of what is served by arguments that do not change between the launch and its schedulers."""
    values = {field: getattr(server_args, field) for field in serves.CHECKED}
    text = json.dumps([os.environ[ENV], values], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()
