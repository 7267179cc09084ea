"""Sampling parameters that speculation takes and does not follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sts_sglang.config import not_allowed, shown

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_params import SamplingParams


def check_sampling(params: SamplingParams, cpu: bool) -> None:
    """Raises `ConfigError` for sampling parameters that speculation would take and
    not follow, without a word: see docs/limits.md. `cpu`: on the reference platform.

    A request of one token ends with its prefill, which samples as ever.
    """
    if params.sampling_seed is not None and params.top_k != 1:  # which SGLang makes of temperature 0
        allowed = "none (SGLang draws by it in deterministic inference only), or temperature 0"
        raise not_allowed("sampling_seed", f"got {shown(params.sampling_seed)}", allowed)
    if params.max_new_tokens is not None and params.max_new_tokens <= 1:
        return
    if params.min_p > 0:
        raise not_allowed(
            "min_p", f"got {shown(params.min_p)}", "0 (verify does not apply it), or top_p and top_k"
        )
    if params.min_new_tokens > 1:
        allowed = "0 or 1 (speculation counts rounds for it, not tokens), or ignore_eos"
        raise not_allowed("min_new_tokens", f"got {shown(params.min_new_tokens)}", allowed)
    for field, value, none in (
        ("frequency_penalty", params.frequency_penalty, 0),
        ("presence_penalty", params.presence_penalty, 0),
        ("repetition_penalty", params.repetition_penalty, 1),
    ):
        if value != none:
            allowed = f"{none} (speculation counts the last token of a round for it, no others)"
            raise not_allowed(field, f"got {shown(value)}", allowed)
    if cpu and params.top_k != 1:
        allowed = "0 (on the CPU platform verify takes the likeliest token, whatever is asked)"
        raise not_allowed("temperature", f"got {shown(params.temperature)}", allowed)
