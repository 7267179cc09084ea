"""Hooks on the tokenizer manager: calls and requests that SGLang takes under speculation and does not follow.

Here they can still be answered with a 400; in the scheduler they would end it, or change it without a word.
Without a draft weights change as ever, unless FP8 KV has scales of the old ones: keys that are written anew
are sketched anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sts_sglang.config import ConfigError
from sts_sglang.host import views
from sts_sglang.host.serves import asks_for_sts, speculates

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import CheckWeightsReqInput, GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.server_args import ServerArgs

_ANEW = "start a server with the new weights"
FROM_DISK = f"not served by sts: SGLang would load the target's checkpoint into the draft too; {_ANEW}"
FROM_TENSOR = f"not served by sts: SGLang would load the same tensors into draft and target; {_ANEW}"
FROM_IPC = f"not served by sts: SGLang would load the same weights into draft and target; {_ANEW}"
FROM_DISTRIBUTED = (
    "not served by sts: SGLang would update the target alone, or the draft by the same tensors, and the head "
    f"map is of the old weights; {_ANEW}"
)
SESSION = f"not served by sts: SGLang would make the weights of draft and target ready for others; {_ANEW}"
SCALES = f"not served by sts with FP8 KV, which it reads by the scales of the old weights; {_ANEW}"
STORAGE = "not served by sts: it may bring a prefix back without the draft's KV; leave it out"
RESET = f"not served by sts: it overwrites the weights of draft and target, and no update is served; {_ANEW}"


def _drafts(server_args: ServerArgs) -> bool:
    return asks_for_sts(server_args) and speculates(server_args)


def _refuses(name: str, call: str, why: str, *rest: object) -> Callable:
    """AROUND a method that changes weights: (success, message, *rest). name: in the release's table."""

    async def refuse(original, self: TokenizerManager, obj, request=None):
        if _drafts(self.server_args):
            return False, f"{call}: {why}", *rest
        if asks_for_sts(self.server_args) and views.kv_asked(self.server_args).fp8:
            return False, f"{call}: {SCALES}", *rest
        return await original(self, obj, request)

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


# An update from disk also answers how many requests it paused.
update_from_disk = _refuses("update_from_disk", "update_weights_from_disk", FROM_DISK, 0)
update_from_tensor = _refuses("update_from_tensor", "update_weights_from_tensor", FROM_TENSOR)
update_from_ipc = _refuses("update_from_ipc", "update_weights_from_ipc", FROM_IPC)
update_from_distributed = _refuses(
    "update_from_distributed", "update_weights_from_distributed", FROM_DISTRIBUTED
)
begin_update = _refuses("begin_update", "begin_weight_update", SESSION)
end_update = _refuses("end_update", "end_weight_update", SESSION)


async def check_weights(original, self: TokenizerManager, obj: CheckWeightsReqInput, request=None):
    """AROUND TokenizerControlMixin.check_weights, one of whose actions fills the weights with noise:
    (success, message, ranks, checksum)."""
    if _drafts(self.server_args) and obj.action == "reset_tensors":
        return False, f"weights_checker: action 'reset_tensors' is {RESET}", None, None
    return await original(self, obj, request)


async def attach_storage(original, self: TokenizerManager, hicache_storage_backend: str, *args, **kwargs):
    """AROUND TokenizerControlMixin.attach_hicache_storage: what a launch with sts refuses is not attached
    later either."""
    if asks_for_sts(self.server_args):
        from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput

        return AttachHiCacheStorageReqOutput(success=False, message=f"hicache_storage_backend: {STORAGE}")
    return await original(self, hicache_storage_backend, *args, **kwargs)


def validate_request(result: None, self: TokenizerManager, obj: GenerateReqInput, input_ids) -> None:
    """AFTER TokenizerManager._validate_one_request; a ValueError becomes a 400."""
    if not asks_for_sts(self.server_args):
        return
    for field, given in (
        ("input_embeds", obj.input_embeds),
        ("positional_embed_overrides", obj.positional_embed_overrides),
    ):
        if given is not None and _drafts(self.server_args):
            raise ConfigError(
                f"{field}: given, but the draft would read placeholders in their place, and select by them; "
                "allowed: text or input_ids"
            )
    size = self.model_config.vocab_size
    if input_ids and (min(input_ids) < 0 or max(input_ids) >= size):
        wrong = next(token for token in input_ids if not 0 <= token < size)
        raise ConfigError(f"input_ids: got {wrong}; allowed: token ids from 0 to {size - 1}")
