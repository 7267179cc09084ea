"""SGLang 0.5.23: what is otherwise than in 0.5.16, of names, fields and what is meant by them.

What is public here and was private there is used as what it is: the mask of a verify, the list of backends
whose draft-extend is captured, where a backend's reads of shared tables end, what a platform can do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sts_sglang.config import not_allowed
from sts_sglang.host import release_0_5_16 as before

if TYPE_CHECKING:
    from sglang.srt.arg_groups.model_override_base import ResolvingConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.schedule_batch import Req, ReqKvInfo
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

VERSION = "0.5.23"
# Whether the architectures are there that only the newer release has (host/architectures.py).
HAS_NEWER_MODELS = True

_SPEC = "sglang.srt.speculative"
_ARGS = "sglang.srt.server_args.ServerArgs"
_ATTENTION = "sglang.srt.layers.attention"
_OVERRIDES = "sglang.srt.arg_groups.model_override_base"
_BATCH = "sglang.srt.managers.schedule_batch"
_CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"

# A flag says what the draft's KV is kept as.
HOOKS: before.Targets = {
    **{name: target for name, target in before.HOOKS.items() if name != "configure_kv"},
    "create_draft_backend": (
        f"{_SPEC}.draft_utils.DraftBackendFactory._create_backend",
        ("self", "backend_name", "backend_map", "error_template", "stamps_children"),
    ),
    "forward_batch": (
        f"{_SPEC}.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation",
        ("self", "batch", "on_publish"),
    ),
    # The unified tree is the only one with a host cache, and brings KV back by this controller alone.
    "hicache_load": (
        "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController.load",
        ("self", "host_indices"),
    ),
    "release_kv": ("sglang.srt.mem_cache.common.release_kv_cache", ("req", "tree_cache", "checkpoint")),
    "begin_update": (f"{_CONTROL}.begin_weight_update", ("self", "obj", "request")),
    "end_update": (f"{_CONTROL}.end_weight_update", ("self", "obj", "request")),
    # A msgspec.Struct looks __init__ and __post_init__ up when the class is made: hooks on them do nothing.
    "resolve_args": (f"{_ARGS}.resolve_once", ("self",)),
}

TREES_THAT_REMEMBER: tuple[str, ...] = ()
TREES_WITHOUT_KEYS: tuple[str, ...] = ()
SYMBOLS = (
    *(name for name in before.SYMBOLS if name.rpartition(".")[2] not in before.TREES_THAT_REMEMBER),
    f"{_ATTENTION}.base_attn_backend.SharedReadEnds.POST_REPLAY",
    "sglang.srt.environ.envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH",
    "sglang.srt.environ.envs.SGLANG_RUST_SERVER",
    f"{_SPEC}.spec_utils.draft_tp_context",
    f"{_OVERRIDES}.model_config_of",
    f"{_OVERRIDES}.resolving_view",
)
CALLS = before.CALLS + (
    (f"{_ATTENTION}.base_attn_backend.AttentionBackend.shared_read_ends", ("self", "fm")),
    (f"{_ATTENTION}.verify_mask.VerifyMask", ("buffer", "mode", "max_bs")),
)

_GONE = {"enable_dsa_prefill_context_parallel", "enable_prefill_context_parallel", "get_model_config"}
_NEW = {
    "_resolution_finished",
    "attn_dp_size",
    "disaggregation_decode_retraction_backup",
    "enable_amd_monokernel",
    "enable_kv_cache_sharding",
    "enable_nvidia_megakernel",
    "enable_return_aux_hidden_states",
    "enable_unified_cache_external_linker",
    "enable_watermark",
    "hicache_host_memory_mode",
    "resolve_once",
    "speculative_draft_kv_cache_dtype",
}
SERVER_ARGS_READ = tuple(sorted(set(before.SERVER_ARGS_READ) - _GONE | _NEW))


def _changed(path: str, gone: set[str], new: set[str]) -> tuple[str, ...]:
    return tuple(sorted(set(before.FIELDS[path]) - gone | new))


_BACKEND = f"{_ATTENTION}.base_attn_backend.AttentionBackend"
_FA3 = f"{_ATTENTION}.flashattention_backend.FlashAttentionBackend"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_PARAMS = "sglang.srt.sampling.sampling_params.SamplingParams"
_DRAFT_WORKER = f"{_SPEC}.eagle_worker_v2.EagleDraftWorker"
FIELDS: dict[str, tuple[str, ...]] = {
    **before.FIELDS,
    f"{_BATCH}.Req": _changed(f"{_BATCH}.Req", {"kv_committed_len", "req_pool_idx"}, {"kv"}),
    f"{_BATCH}.ReqKvInfo": ("kv_committed_len", "req_pool_idx"),
    _BACKEND: _changed(
        _BACKEND, {"get_verify_buffers_to_fill_after_draft"}, {"shared_read_ends", "verify_mask"}
    ),
    f"{_ATTENTION}.verify_mask.VerifyMask": ("buffer", "max_bs", "mode"),
    _RUNNER: _changed(_RUNNER, {"tp_group", "war_fastpath_read_done_event"}, set()),
    _PARAMS: _changed(_PARAMS, set(), {"beam_width"}),
    _FA3: ("flash_attn_with_kvcache", "forward_extend"),
    _DRAFT_WORKER: _changed(_DRAFT_WORKER, {"draft_tp_context", "tree_mask_mode"}, {"parallel_layout"}),
    _ARGS: SERVER_ARGS_READ,
}
NOT_IMPORTED = before.NOT_IMPORTED

_OPS = "sglang.kernels.ops.speculative"
CPU_BRANCHES: dict[str, dict[str, str]] = {
    f"{_OPS}.cache_locs": {
        "assign_draft_cache_locs_contiguous_cpu": "assign_draft_cache_locs",
        "assign_extend_cache_locs_cpu": "assign_extend_cache_locs",
    },
    f"{_OPS}.eagle": before.CPU_BRANCHES[f"{_OPS}.eagle"],
    f"{_OPS}.spec_tree": before.CPU_BRANCHES[f"{_SPEC}.eagle_utils"],
    "sglang.srt.mem_cache.allocation": before.CPU_BRANCHES["sglang.srt.mem_cache.allocation"],
    # Without ops of their own: which mask, and where the draft's positions are written.
    f"{_SPEC}.eagle_utils": {},
    f"{_SPEC}.eagle_worker_common": {},
    f"{_SPEC}.eagle_worker_v2": {},
}
# Platforms that do not say they run Triton get torch allocators and writers.
CPU_HOOKS: before.Targets = {
    name: before.CPU_HOOKS[name]
    for name in (
        "synchronize",
        "gather_spec_extras",
        "get_last_loc",
        "fused_topk_native",
        "fused_moe",
        "dbrx_experts",
        "minimax_qk_norm",
    )
} | {
    "fused_gate_sigmoid_mul_add": (
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        before.CPU_HOOKS["fused_gate_sigmoid_mul_add"][1],
    )
}
CPU_KERNELS: dict[str, str] = {}
CPU_SYMBOLS = (
    *(f"{module}._is_cpu" for module in CPU_BRANCHES),
    "sglang.srt.mem_cache.allocation.get_last_loc_torch",
)


def resolve(args: ServerArgs) -> None:
    """Resolve arguments that were made just now: SGLang does it when it launches them."""
    args.resolve_once()


def is_resolved(args: ServerArgs) -> bool:
    """Whether the function that is hooked as `resolve_args` has run: every process calls it once more."""
    return "_resolution_finished" in vars(args) and args._resolution_finished


def resolved(args: ServerArgs) -> ResolvingConfig:
    """The arguments as SGLang resolved them: the record itself keeps what was given."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    return resolving_view(args)


def model_config(args: ServerArgs | ResolvingConfig) -> ModelConfig:
    """The target's."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(args)


def draft_kv_dtype(args: ServerArgs) -> tuple[str, str] | None:
    """The flag for the draft's KV alone and its value; None: --kv-cache-dtype is the draft's too."""
    value = args.speculative_draft_kv_cache_dtype
    return None if value is None else ("--speculative-draft-kv-cache-dtype", value)


def ask_draft_kv(args: ServerArgs, kept: str) -> None:
    """Ask for what the configuration's `draft_kv` says by a flag. Raises `ConfigError` where that is given
    and says something else."""
    if kept == "auto":
        return
    value, given = "auto" if kept == "model" else kept, args.speculative_draft_kv_cache_dtype
    if given not in (None, value):
        problem = f"got {kept!r} with --speculative-draft-kv-cache-dtype {given}"
        raise not_allowed("sts_config.draft_kv", problem, "the key or the flag, not both")
    args.speculative_draft_kv_cache_dtype = value


def reads_own_kv(backend: Any) -> None:
    """Let FA3 go by its runner's KV: it does."""


def pool_row(req: Req) -> int | None:
    """A request's row in the table of slots, None while it has none."""
    kv: ReqKvInfo = req.kv
    return kv.req_pool_idx


def committed(req: Req) -> int:
    """Tokens of a request whose KV is there."""
    kv: ReqKvInfo = req.kv
    return kv.kv_committed_len


def built(backend: Any) -> Any:
    """What a builder in the map of DraftBackendFactory answers: with the name it is stamped with."""
    return "sts", backend


@contextmanager
def drafting(draft: EagleDraftWorker) -> Iterator[None]:
    """What the draft's passes run in."""
    from sglang.srt.layers.moe.utils import (
        speculative_moe_a2a_backend_context,
        speculative_moe_backend_context,
    )
    from sglang.srt.speculative.spec_utils import draft_tp_context

    with (
        draft_tp_context(draft.parallel_layout),
        speculative_moe_backend_context(),
        speculative_moe_a2a_backend_context(),
    ):
        yield


def offers_tree_mask(cls: type) -> type:
    """Decorator of the target's backend: trees are written as [T, T] a request, where its graphs read them.

    `cls.tree_mask_buffer`: bool [requests * T * T], or None without graphs: SGLang then allocates a mask of
    the same layout every round.
    """

    def verify_mask(self):
        import torch
        from sglang.srt.layers.attention.verify_mask import VerifyMask
        from sglang.srt.speculative.eagle_utils import TreeMaskMode

        buffer, requests = self.tree_mask_buffer, self.table.shape[0]
        if buffer is None:
            buffer, requests = torch.empty(0, dtype=torch.bool, device=self.device), 0
        return VerifyMask(buffer=buffer, mode=TreeMaskMode.QLEN_ONLY, max_bs=requests)

    cls.verify_mask = property(verify_mask)
    return cls


def use_qlen_tree_mask(draft: EagleDraftWorker) -> None:
    """The target's backend has said so (`offers_tree_mask`)."""


def reads_table_to_the_end(cls: type) -> type:
    """Decorator of backends that read the table of slots in every layer, where SGLang takes for granted that
    metadata is all that reads it: the scheduler may write it when the forward is over, no earlier."""

    def shared_read_ends(self, fm):
        from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

        return SharedReadEnds.POST_REPLAY

    cls.shared_read_ends = shared_read_ends
    return cls


def hold_table(runner: ModelRunner) -> None:
    """The backend has said how long it reads (`reads_table_to_the_end`)."""


def refuse_beams(params: SamplingParams) -> None:
    """Beam search is a request's own choice: its beams are rows of a batch that no request stands for.

    Raises:
        ConfigError: where a request asks for several.
    """
    if (params.beam_width or 1) > 1:
        raise not_allowed(
            "beam_width", f"got {params.beam_width}, and sts does not know the rows of a beam", "none, or 1"
        )


def captured_draft_extend(cls: type) -> type:
    """Decorator of the draft's FA3 backend, which is on the draft worker's list of captured classes. It reads
    the table in its graph."""
    return reads_table_to_the_end(cls)
