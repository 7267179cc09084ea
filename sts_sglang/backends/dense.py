"""The dense attention that STS stands on: SGLang's own backends, or the plain torch one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sts_kernels.layout import FP8
from sts_sglang.backends.carry import TorchCarry
from sts_sglang.backends.torch_dense import TorchBackend

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sts_sglang.config import StsConfig


def choose(
    config: StsConfig, device: str, dtype: str, capability: tuple[int, int] | None, *, fp8: bool = False
) -> str:
    """`fa3`, `flashinfer` or `torch`.

    Args:
        device: "cpu" or "cuda"; capability: of the CUDA device, None on a CPU.
        dtype: of the model, as torch prints it. fp8: whether its KV is.

    FA3 is what SGLang itself takes on Hopper, and it needs no plan on the host; it reads FP8 there alone.
    Neither library computes in float32.
    """
    if config.dense != "auto":
        return config.dense
    if device == "cpu" or config.kernel == "torch" or dtype == "torch.float32":
        return "torch"
    return "fa3" if capability[0] in ((9,) if fp8 else (8, 9)) else "flashinfer"


def of_target(name: str, runner: ModelRunner) -> AttentionBackend:
    """What the target prefills, and verifies its dense layers if it can, with; `name` as of `choose`."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return TorchBackend(runner) if name == "torch" else ATTENTION_BACKENDS[name](runner)


def of_draft_extend(config: StsConfig, runner: ModelRunner) -> AttentionBackend:
    """What the draft prefills and draft-extends with; it also carries the last row."""
    name = name_of(config, runner)
    if name == "torch":
        return TorchCarry(runner)
    from sts_sglang.backends import carry_cuda

    return {"fa3": carry_cuda.FlashAttention, "flashinfer": carry_cuda.FlashInfer}[name](runner)


def name_of(config: StsConfig, runner: ModelRunner) -> str:
    """`choose` for a model runner."""
    import torch

    capability = torch.cuda.get_device_capability() if runner.device == "cuda" else None
    fp8 = runner.kv_cache_dtype in FP8
    return choose(config, runner.device, str(runner.dtype), capability, fp8=fp8)
