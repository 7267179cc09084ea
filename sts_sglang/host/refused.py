"""Hooks on the tokenizer manager: calls and requests that SGLang takes under speculation and does not follow.

Here they can still be answered with a 400; in the scheduler they would end it, or change it without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sts_sglang.config import ConfigError
from sts_sglang.host.serves import asks_for_sts

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import CheckWeightsReqInput, GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

_ANEW = "start a server with the new weights"
FROM_DISK = f"not served by sts: SGLang would load the target's checkpoint into the draft too; {_ANEW}"
FROM_TENSOR = f"not served by sts: SGLang would load the same tensors into draft and target; {_ANEW}"
FROM_IPC = f"not served by sts: SGLang would load the same weights into draft and target; {_ANEW}"
FROM_DISTRIBUTED = (
    "not served by sts: SGLang would update the target alone, or the draft by the same tensors, and the head "
    f"map is of the old weights; {_ANEW}"
)
SESSION = f"not served by sts: SGLang would make the weights of draft and target ready for others; {_ANEW}"
RESET = f"not served by sts: it overwrites the weights of draft and target, and no update is served; {_ANEW}"


async def update_from_disk(original, self: TokenizerManager, obj, request=None):
    """AROUND TokenizerManager.update_weights_from_disk: (success, message, paused requests)."""
    if asks_for_sts(self.server_args):
        return False, f"update_weights_from_disk: {FROM_DISK}", 0
    return await original(self, obj, request)


async def update_from_tensor(original, self: TokenizerManager, obj, request=None):
    """AROUND TokenizerControlMixin.update_weights_from_tensor: (success, message)."""
    if asks_for_sts(self.server_args):
        return False, f"update_weights_from_tensor: {FROM_TENSOR}"
    return await original(self, obj, request)


async def update_from_ipc(original, self: TokenizerManager, obj, request=None):
    """AROUND TokenizerControlMixin.update_weights_from_ipc: (success, message)."""
    if asks_for_sts(self.server_args):
        return False, f"update_weights_from_ipc: {FROM_IPC}"
    return await original(self, obj, request)


async def update_from_distributed(original, self: TokenizerManager, obj, request=None):
    """AROUND TokenizerControlMixin.update_weights_from_distributed: (success, message)."""
    if asks_for_sts(self.server_args):
        return False, f"update_weights_from_distributed: {FROM_DISTRIBUTED}"
    return await original(self, obj, request)


async def begin_update(original, self: TokenizerManager, obj, request=None):
    """AROUND TokenizerControlMixin.begin_weight_update: (success, message)."""
    if asks_for_sts(self.server_args):
        return False, f"begin_weight_update: {SESSION}"
    return await original(self, obj, request)


async def end_update(original, self: TokenizerManager, obj, request=None):
    """AROUND TokenizerControlMixin.end_weight_update: (success, message)."""
    if asks_for_sts(self.server_args):
        return False, f"end_weight_update: {SESSION}"
    return await original(self, obj, request)


async def check_weights(original, self: TokenizerManager, obj: CheckWeightsReqInput, request=None):
    """AROUND TokenizerControlMixin.check_weights, one of whose actions fills the weights with noise:
    (success, message, ranks, checksum)."""
    if asks_for_sts(self.server_args) and obj.action == "reset_tensors":
        return False, f"weights_checker: action 'reset_tensors' is {RESET}", None, None
    return await original(self, obj, request)


def validate_request(result: None, self: TokenizerManager, obj: GenerateReqInput, input_ids) -> None:
    """AFTER TokenizerManager._validate_one_request; a ValueError becomes a 400."""
    if not asks_for_sts(self.server_args):
        return
    for field, given in (
        ("input_embeds", obj.input_embeds),
        ("positional_embed_overrides", obj.positional_embed_overrides),
    ):
        if given is not None:
            raise ConfigError(
                f"{field}: given, but the draft would read placeholders in their place, and select by them; "
                "allowed: text or input_ids"
            )
    size = self.model_config.vocab_size
    if input_ids and (min(input_ids) < 0 or max(input_ids) >= size):
        wrong = next(token for token in input_ids if not 0 <= token < size)
        raise ConfigError(f"input_ids: got {wrong}; allowed: token ids from 0 to {size - 1}")
