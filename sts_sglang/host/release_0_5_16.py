"""SGLang 0.5.16: the names that are hooked, called or subclassed, and the fields that are read; at the end,
as functions, where other releases mean something else.

Another release is another file of this kind (docs/extending.md). Nothing here imports SGLang before a
function is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

VERSION = "0.5.16"
# Whether the architectures are there that only the newer release has (host/architectures.py).
HAS_NEWER_MODELS = False

# What is done to a function -> (its path, the parameter names that is relied on).
Targets = dict[str, tuple[str, tuple[str, ...]]]

_SPEC = "sglang.srt.speculative"
_WORKER = f"{_SPEC}.eagle_worker_v2.EAGLEWorkerV2"
_DRAFT_WORKER = f"{_SPEC}.eagle_worker_v2.EagleDraftWorker"
_TARGET = "sglang.srt.managers.tp_worker.TpModelWorker"
_DECODE_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_ARGS = "sglang.srt.server_args.ServerArgs"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
_CALL = ("self", "obj", "request")

# By the function of host/hooks.py, or of host/refused.py, that hooks it.
HOOKS: Targets = {
    "create_draft_backend": (
        f"{_SPEC}.draft_utils.DraftBackendFactory._create_backend",
        ("self", "backend_name", "backend_map", "error_template"),
    ),
    "init_attention_backends": (f"{_WORKER}.init_attention_backends", ("self",)),
    "init_cuda_graphs": (f"{_WORKER}.init_cuda_graphs", ("self",)),
    "forward_batch": (f"{_WORKER}.forward_batch_generation", ("self", "batch", "on_publish")),
    "draft_prefill": (
        f"{_DRAFT_WORKER}._draft_extend_for_prefill",
        ("self", "batch", "target_hidden_states", "next_token_ids"),
    ),
    "verify_complete": (
        f"{_WORKER}.on_verify_complete_cpu",
        ("self", "num_correct_drafts_per_req", "batch_size"),
    ),
    "init_target_backends": (f"{_TARGET}.init_attention_backends", ("self",)),
    "init_target_graphs": (f"{_TARGET}.init_cuda_graphs", ("self",)),
    "capture_shape": (
        f"{_DECODE_GRAPHS}.capture_one_shape",
        ("self", "size", "forward", "stream_idx", "variant_label"),
    ),
    "graph_variant": (f"{_DECODE_GRAPHS}._resolve_lora_variant", ("self", "forward_batch")),
    "forward_target": (f"{_TARGET}.forward_batch_generation", ("self", "batch")),
    "decode_complete": (
        "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
        ".process_batch_result_decode",
        ("self",),
    ),
    "configure_kv": (
        "sglang.srt.model_executor.model_runner.ModelRunner.configure_kv_cache_dtype",
        ("self",),
    ),
    "profile_available_bytes": (
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
        ("self", "pre_model_load_memory"),
    ),
    "begin_request": (
        "sglang.srt.managers.scheduler.Scheduler.handle_generate_request",
        ("self", "recv_req"),
    ),
    "internal_state": ("sglang.srt.managers.scheduler.Scheduler.get_internal_state", ("self", "recv_req")),
    "hicache_load": ("sglang.srt.managers.cache_controller.HiCacheController.load", ("self", "host_indices")),
    "release_kv": ("sglang.srt.mem_cache.common.release_kv_cache", ("req", "tree_cache", "is_insert")),
    "add_cli_args": (f"{_ARGS}.add_cli_args", ("parser",)),
    "from_cli_args": (f"{_ARGS}.from_cli_args", ("cls", "args")),
    "resolve_args": (f"{_ARGS}.__post_init__", ("self",)),
    "check_args": (f"{_ARGS}.check_server_args", ("self",)),
    "scheduler_init": ("sglang.srt.managers.scheduler.Scheduler.__init__", ("self", "server_args")),
    "sampling_verify": ("sglang.srt.sampling.sampling_params.SamplingParams.verify", ("self", "vocab_size")),
    "validate_request": (f"{_MANAGER}._validate_one_request", ("self", "obj", "input_ids")),
    "update_from_disk": (f"{_MANAGER}.update_weights_from_disk", _CALL),
    "update_from_tensor": (f"{_CONTROL}.update_weights_from_tensor", _CALL),
    "update_from_ipc": (f"{_CONTROL}.update_weights_from_ipc", _CALL),
    "update_from_distributed": (f"{_CONTROL}.update_weights_from_distributed", _CALL),
    "check_weights": (f"{_CONTROL}.check_weights", _CALL),
    "attach_storage": (f"{_CONTROL}.attach_hicache_storage", ("self", "hicache_storage_backend")),
}

# Names that are called or subclassed rather than hooked.
SYMBOLS = (
    "sglang.srt.configs.model_config.ModelConfig.from_server_args",
    "sglang.srt.constrained.base_grammar_backend.register_grammar_backend",
    "sglang.srt.distributed.parallel_state.get_tp_group",
    "sglang.srt.entrypoints.engine.Engine.server_args_class",
    "sglang.srt.environ.envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH",
    "sglang.srt.environ.envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM",
    "sglang.srt.environ.envs.SGLANG_ENABLE_UNIFIED_RADIX_TREE",
    "sglang.srt.environ.envs.SGLANG_EXPERIMENTAL_CPP_RADIX_TREE",
    "sglang.srt.environ.envs.SGLANG_SIMULATE_ACC_LEN",
    "sglang.srt.environ.envs.SGLANG_USE_HND_KVCACHE",
    "sglang.srt.environ.envs.SGLANG_USE_MODELSCOPE",
    "sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS",
    "sglang.srt.layers.attention.attention_registry.register_attention_backend",
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend",
    "sglang.srt.layers.quantization.QUANTIZATION_METHODS",
    "sglang.srt.layers.quantization.get_quantization_config",
    "sglang.srt.layers.moe.utils.speculative_moe_a2a_backend_context",
    "sglang.srt.layers.moe.utils.speculative_moe_backend_context",
    "sglang.srt.mem_cache.memory_pool.KVWriteLoc",
    "sglang.srt.managers.scheduler.run_scheduler_process",
    "sglang.srt.model_executor.cuda_graph_config.Backend.DISABLED",
    "sglang.srt.plugins.hook_registry.HookRegistry._patched",
    "sglang.srt.plugins.hook_registry.HookType",
    "sglang.srt.plugins.load_plugins",
    "sglang.srt.server_args.ATTENTION_BACKEND_CHOICES",
    "sglang.srt.server_args.add_attention_backend_choices",
    "sglang.srt.server_args.add_grammar_backend_choices",
    "sglang.srt.server_args.prepare_server_args",
    "sglang.srt.utils.hf_transformers_utils.get_config",
    f"{_SPEC}.eagle_utils.TreeMaskMode.QLEN_ONLY",
    f"{_SPEC}.draft_utils.DraftBackendFactory._create_triton_decode_backend",
)

# Functions that are called, and methods that are overridden, with the parameters that this relies on.
_BACKEND = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend"
_POOL = "sglang.srt.mem_cache.memory_pool"
_GRAMMAR = "sglang.srt.constrained.base_grammar_backend.BaseGrammarObject"  # of host/forced.py
CALLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (f"{_BACKEND}.init_cuda_graph_state", ("self", "max_bs", "max_num_tokens")),
    (f"{_BACKEND}.init_forward_metadata", ("self", "forward_batch")),
    (f"{_BACKEND}.init_forward_metadata_in_graph", ("self", "forward_batch")),
    (f"{_BACKEND}.init_forward_metadata_out_graph", ("self", "forward_batch", "in_capture")),
    (f"{_BACKEND}.forward_extend", ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")),
    (f"{_BACKEND}.forward_decode", ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")),
    (
        f"{_POOL}.MHATokenToKVPool.set_kv_buffer",
        ("self", "layer", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale"),
    ),
    (f"{_POOL}.MHATokenToKVPool.get_key_buffer", ("self", "layer_id")),
    (f"{_POOL}.MHATokenToKVPool.get_value_buffer", ("self", "layer_id")),
    (f"{_POOL}.KVWriteLoc", ("loc", "swa_loc")),
    (f"{_GRAMMAR}.accept_token", ("self", "token")),
    (f"{_GRAMMAR}.rollback", ("self", "k")),
    (f"{_GRAMMAR}.allocate_vocab_mask", ("self", "vocab_size", "batch_size", "device")),
    (f"{_GRAMMAR}.fill_vocab_mask", ("self", "vocab_mask", "idx")),
    (f"{_GRAMMAR}.move_vocab_mask", ("vocab_mask", "device")),
    (f"{_GRAMMAR}.apply_vocab_mask", ("logits", "vocab_mask")),
    ("sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend.dispatch_ebnf", ("self", "key_string")),
    (
        "sglang.srt.configs.model_config.ModelConfig.from_server_args",
        ("server_args", "model_path", "model_revision", "is_draft_model", "context_length"),
    ),
    (
        "sglang.srt.utils.hf_transformers_utils.get_config",
        ("model", "trust_remote_code", "revision", "model_override_args", "model_config_parser"),
    ),
)

# Server arguments that are read, most of them by the allow-list of host/serves.py.
SERVER_ARGS_READ = (
    "attention_backend",
    "attn_cp_size",
    "checkpoint_engine_wait_weights_before_ready",
    "chunked_prefill_size",
    "cuda_graph_config",
    "dcp_size",
    "decode_attention_backend",
    "decode_log_interval",
    "decoupled_spec_role",
    "decrypted_config_file",
    "decrypted_draft_config_file",
    "device",
    "disable_cuda_graph",
    "disaggregation_mode",
    "dllm_algorithm",
    "dp_size",
    "enable_custom_logit_processor",
    "enable_deterministic_inference",
    "enable_dp_attention",
    "enable_dsa_prefill_context_parallel",
    "enable_flexkv",
    "enable_hierarchical_cache",
    "enable_hisparse",
    "enable_lmcache",
    "enable_memory_saver",
    "enable_metrics",
    "enable_mis",
    "enable_mixed_chunk",
    "enable_multi_layer_eagle",
    "enable_page_major_kv_layout",
    "enable_pdmux",
    "enable_prefill_context_parallel",
    "enable_prefill_cp",
    "enable_return_hidden_states",
    "enable_streaming_session",
    "enable_torch_compile",
    "enable_two_batch_overlap",
    "enable_unified_memory",
    "encoder_only",
    "ep_size",
    "get_model_config",
    "grpc_mode",
    "hicache_storage_backend",
    "is_embedding",
    "json_model_override_args",
    "kv_cache_dtype",
    "load_format",
    "max_prefill_tokens",
    "max_running_requests",
    "model_config_parser",
    "model_impl",
    "model_path",
    "moe_dp_size",
    "nnodes",
    "page_size",
    "pp_size",
    "preferred_sampling_params",
    "prefill_attention_backend",
    "quantization",
    "quantization_param_path",
    "radix_cache_backend",
    "revision",
    "rl_on_policy_target",
    "smg_grpc_mode",
    "speculative_adaptive",
    "speculative_algorithm",
    "speculative_draft_attention_backend",
    "speculative_draft_load_format",
    "speculative_draft_model_path",
    "speculative_draft_model_quantization",
    "speculative_draft_model_revision",
    "speculative_draft_window_size",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "speculative_num_steps",
    "speculative_token_map",
    "tokenizer_worker_num",
    "tp_size",
    "trust_remote_code",
    "use_ray",
)

# Fields and methods that are read (host/views.py, host/bind.py) or overridden (backends/), by class. A class
# that is built by a function or declares its fields by assignment is found in its source.
_BATCH = "sglang.srt.model_executor.forward_batch_info"
_EAGLE = f"{_SPEC}.eagle_info"
_ATTENTION = "sglang.srt.layers.attention"
_GRAPHS = "sglang.srt.model_executor.cuda_graph_config"
FIELDS: dict[str, tuple[str, ...]] = {
    f"{_BATCH}.ForwardBatch": (
        "batch_size",
        "extend_prefix_lens",
        "extend_prefix_lens_cpu",
        "extend_seq_lens",
        "extend_seq_lens_cpu",
        "forward_mode",
        "out_cache_loc",
        "req_pool_indices",
        "seq_lens",
        "spec_info",
    ),
    f"{_BATCH}.ForwardMode": (
        "is_decode",
        "is_draft_extend_v2",
        "is_extend",
        "is_idle",
        "is_target_verify",
    ),
    f"{_EAGLE}.EagleVerifyInput": ("custom_mask", "draft_token_num", "topk"),
    f"{_EAGLE}.EagleDraftInput": ("bonus_tokens",),
    f"{_EAGLE}.EagleDraftExtendInput": ("num_accept_tokens", "num_tokens_per_req"),
    "sglang.srt.distributed.parallel_state.GroupCoordinator": ("cpu_group", "rank_in_group", "world_size"),
    "sglang.srt.layers.quantization.base_config.QuantizationConfig": (
        "get_supported_act_dtypes",
        "override_quantization_method",
    ),
    "sglang.srt.layers.radix_attention.AttentionType": ("DECODER",),
    "sglang.srt.layers.radix_attention.RadixAttention": (
        "attn_type",
        "is_cross_attention",
        "k_scale",
        "k_scale_float",
        "layer_id",
        "logit_cap",
        "qk_head_dim",
        "scaling",
        "sliding_window_size",
        "tp_k_head_num",
        "tp_q_head_num",
        "use_irope",
        "v_head_dim",
        "v_scale",
        "v_scale_float",
        "xai_temperature_len",
    ),
    "sglang.srt.managers.schedule_batch.ScheduleBatch": (
        "chunked_req",
        "chunked_req_next_prompt_token",
        "extend_lens",
        "extend_num_tokens",
        "forward_mode",
        "input_ids",
        "out_cache_loc",
        "prefix_lens",
        "req_pool_indices",
        "reqs",
        "seq_lens",
    ),
    "sglang.srt.managers.schedule_batch.Req": (
        "cached_tokens",
        "finished",
        "kv_committed_len",
        "origin_input_ids",
        "output_ids",
        "output_ids_through_stop",
        "req_pool_idx",
        "rid",
        "sampling_params",
    ),
    "sglang.srt.managers.io_struct.CheckWeightsReqInput": ("action",),
    "sglang.srt.managers.io_struct.GenerateReqInput": ("input_embeds", "positional_embed_overrides"),
    "sglang.srt.managers.io_struct.GetInternalStateReqOutput": ("internal_state",),
    "sglang.srt.managers.io_struct.TokenizedGenerateReqInput": ("extra_key", "sampling_params"),
    _MANAGER: ("model_config", "server_args"),
    "sglang.srt.sampling.sampling_params.SamplingParams": (
        "custom_params",
        "frequency_penalty",
        "max_new_tokens",
        "min_new_tokens",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "sampling_seed",
        "temperature",
        "top_k",
    ),
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool": (
        "get_key_buffer",
        "get_kv_size_bytes",
        "get_value_buffer",
        "set_kv_buffer",
        "size",
    ),
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool": ("req_to_token",),
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache": ("req_to_token_pool",),
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator": (
        "is_draft_worker",
        "model_config",
        "server_args",
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner": (
        "attn_backend",
        "decode_cuda_graph_runner",
        "device",
        "dtype",
        "is_draft_worker",
        "kv_cache_dtype",
        "model",
        "model_config",
        "req_to_token_pool",
        "server_args",
        "token_to_kv_pool",
        "tp_group",
        "war_fastpath_read_done_event",
    ),
    "sglang.srt.configs.model_config.ModelConfig": (
        "context_len",
        "dtype",
        "get_default_sampling_params",
        "get_total_num_kv_heads",
        "head_dim",
        "hf_config",
        "hf_text_config",
        "hidden_size",
        "is_multimodal",
        "model_is_mrope",
        "model_path",
        "num_attention_heads",
        "num_hidden_layers",
        "num_nextn_predict_layers",
        "quantization",
        "speculative_algorithm",
        "v_head_dim",
        "vocab_size",
    ),
    f"{_GRAPHS}.CudaGraphConfig": ("decode", "prefill"),
    f"{_GRAPHS}.PhaseConfig": ("backend", "bs", "max_bs"),
    f"{_GRAPHS}.Backend": ("BREAKABLE", "DISABLED", "FULL"),
    _WORKER: ("_draft_worker", "_target_worker", "server_args", "speculative_num_steps", "topk"),
    _DRAFT_WORKER: (
        "_draft_extend_for_prefill",
        "cuda_graph_runner",
        "cuda_graph_runner_for_draft_extend",
        "draft_attn_backend",
        "draft_extend_attn_backend",
        "draft_runner",
        "draft_tp_context",
        "tree_mask_mode",
    ),
    _TARGET: ("model_runner", "server_args"),
    _DECODE_GRAPHS: ("model_runner",),
    f"{_SPEC}.draft_utils.DraftBackendFactory": (
        "_create_triton_decode_backend",
        "draft_model_runner",
        "speculative_num_steps",
        "topk",
    ),
    f"{_ATTENTION}.base_attn_backend.AttentionBackend": (
        "forward_decode",
        "forward_extend",
        "get_cuda_graph_seq_len_fill_value",
        "get_verify_buffers_to_fill_after_draft",
        "init_cuda_graph_state",
        "init_forward_metadata",
        "init_forward_metadata_in_graph",
        "init_forward_metadata_out_graph",
        "needs_cpu_seq_lens",
        "support_triton",
    ),
    f"{_ATTENTION}.flashattention_backend.FlashAttentionBackend": (
        "flash_attn_with_kvcache",
        "forward_extend",
        "init_forward_metadata_in_graph",
        "init_forward_metadata_out_graph",
        "kv_cache_dtype",
        "kv_cache_dtype_str",
    ),
    f"{_ATTENTION}.flashinfer_backend.FlashInferAttnBackend": ("forward_extend",),
    _ARGS: SERVER_ARGS_READ,
}
# Importing these loads kernels, which a host without a GPU does not have: their source is read instead.
NOT_IMPORTED = (f"{_ATTENTION}.flashattention_backend", f"{_ATTENTION}.flashinfer_backend")


# The reference CPU platform switches on SGLang's own `_is_cpu` branches, module by module, and
# supplies the sgl_kernel CPU ops those branches call: module -> {its global: our stand-in}.
CPU_BRANCHES = {
    "sglang.kernels.ops.speculative.cache_locs": {
        "assign_extend_cache_locs_cpu": "assign_extend_cache_locs",
    },
    "sglang.kernels.ops.speculative.eagle": {
        "fill_bonus_tokens_cpu": "fill_bonus_tokens",
        "fill_accept_out_cache_loc_cpu": "fill_accept_out_cache_loc",
    },
    "sglang.srt.mem_cache.allocation": {
        "assign_req_to_token_pool_cpu": "assign_req_to_token_pool",
    },
    "sglang.srt.speculative.spec_utils": {
        "assign_extend_cache_locs_cpu": "assign_extend_cache_locs",
    },
    "sglang.srt.speculative.eagle_utils": {
        "sgl_build_tree_kernel_efficient_cpu": "build_tree",
        "sgl_verify_tree_greedy_cpu": "verify_tree_greedy",
    },
    "sglang.srt.speculative.eagle_worker_common": {
        "assign_draft_cache_locs_contiguous_cpu": "assign_draft_cache_locs",
    },
}
_TORCH_NATIVE = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
# Our stand-ins for functions and for Triton kernels, by name in cpu/ops.py.
CPU_HOOKS: Targets = {
    "synchronize": ("torch.cuda.synchronize", ("device",)),
    "support_triton": ("sglang.srt.utils.common.support_triton", ("backend",)),
    "gather_spec_extras": ("sglang.kernels.ops.speculative.gather_spec_extras.gather_spec_extras", ()),
    "get_last_loc": ("sglang.srt.mem_cache.allocation.get_last_loc", ()),
    "apply_vocab_mask": (
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",
        ("self", "logits", "vocab_mask"),
    ),
    "fused_gate_sigmoid_mul_add": (
        "sglang.kernels.ops.layernorm.elementwise.fused_gate_sigmoid_mul_add",
        ("hidden_states", "gate_weight", "shared_output", "final_hidden_states"),
    ),
    "minimax_qk_norm": (
        "sglang.srt.models.minimax_m2.MiniMaxM2QKRMSNorm._forward_naive",
        ("self", "q", "k"),
    ),
    "fused_topk_native": (
        "sglang.srt.layers.moe.topk.fused_topk_native",
        ("hidden_states", "gating_output", "topk", "renormalize", "correction_bias", "scoring_func"),
    ),
    "fused_moe": (
        "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe.fused_moe",
        ("hidden_states", "w1", "w2", "topk_output", "moe_runner_config"),
    ),
    "dbrx_experts": ("sglang.srt.models.dbrx.DbrxExperts.__init__", ("self",)),
    "torch_native_extend": (f"{_TORCH_NATIVE}.forward_extend", ("self", "q", "k", "v", "layer")),
    "torch_native_decode": (f"{_TORCH_NATIVE}.forward_decode", ("self", "q", "k", "v", "layer")),
}
_PAGED = "sglang.srt.mem_cache.allocator.paged"
CPU_KERNELS = {
    f"{_PAGED}.alloc_extend_kernel": "alloc_extend",
    f"{_PAGED}.alloc_decode_kernel": "alloc_decode",
}
CPU_SYMBOLS = (
    *(f"{module}._is_cpu" for module in CPU_BRANCHES),
    *CPU_KERNELS,
    f"{_PAGED}.alloc_extend_naive",
    "sglang.srt.mem_cache.allocation.get_last_loc_torch",
)

# Radix trees that bring KV back from the host by roads of their own, on which no slot is forgotten.
TREES_THAT_REMEMBER = ("SGLANG_ENABLE_UNIFIED_RADIX_TREE", "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE")
# Radix trees that share a prefix among requests of every `extra_key`.
TREES_WITHOUT_KEYS = ("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE",)


def resolve(args: ServerArgs) -> None:
    """Resolve arguments that were made just now: making them has done it."""


def is_resolved(args: ServerArgs) -> bool:
    """Whether the function that is hooked as `resolve_args` has run: it runs once."""
    return False


def resolved(args: ServerArgs) -> ServerArgs:
    """The arguments as SGLang resolved them: in their own place."""
    return args


def model_config(args: ServerArgs) -> ModelConfig:
    """The target's."""
    return args.get_model_config()


def draft_kv_dtype(args: ServerArgs) -> tuple[str, str] | None:
    """The flag for the draft's KV alone and its value; None: --kv-cache-dtype is the draft's too."""


def ask_draft_kv(args: ServerArgs, kept: str) -> None:
    """Ask for what the configuration's `draft_kv` says by a flag: there is none, so a hook does it."""


def reads_own_kv(backend: FlashAttentionBackend) -> None:
    """Let FA3 go by its runner's KV: it asks the launch whether queries become FP8 too."""
    from sts_kernels.layout import FP8  # torch, which the launcher's side does without

    if backend.kv_cache_dtype in FP8:
        backend.kv_cache_dtype_str = "fp8_e4m3"


def pool_row(req: Req) -> int | None:
    """A request's row in the table of slots, None while it has none."""
    return req.req_pool_idx


def committed(req: Req) -> int:
    """Tokens of a request whose KV is there."""
    return req.kv_committed_len


def built(backend: Any) -> Any:
    """What a builder in the map of DraftBackendFactory answers."""
    return backend


@contextmanager
def drafting(draft: EagleDraftWorker) -> Iterator[None]:
    """What the draft's passes run in."""
    from sglang.srt.layers.moe.utils import (
        speculative_moe_a2a_backend_context,
        speculative_moe_backend_context,
    )

    runner: ModelRunner = draft.draft_runner
    with (
        draft.draft_tp_context(runner.tp_group),
        speculative_moe_backend_context(),
        speculative_moe_a2a_backend_context(),
    ):
        yield


def offers_tree_mask(cls: type) -> type:
    """Decorator of the target's backend: trees are written where its graphs read them.

    `cls.tree_mask_buffer`: bool [requests * T * T], or None without graphs.
    """

    def get_verify_buffers_to_fill_after_draft(self) -> list:
        return [self.tree_mask_buffer, None]

    cls.get_verify_buffers_to_fill_after_draft = get_verify_buffers_to_fill_after_draft
    return cls


def use_qlen_tree_mask(draft: EagleDraftWorker) -> None:
    """Ask for the [T, T] tree mask instead of [T, L + T].

    CUDA defaults to FULL_MASK, which the worker fills whole every round (MBs at long contexts).
    """
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    draft.tree_mask_mode = TreeMaskMode.QLEN_ONLY


def reads_table_to_the_end(cls: type) -> type:
    """Decorator of backends that read the table of slots in every layer: nobody asks here."""
    return cls


def hold_table(runner: ModelRunner) -> None:
    """After a decode graph was launched whose backend reads the table of slots to its end.

    The runner publishes an event before the replay, by which the scheduler would write the table while the
    replay reads it. Without the event it waits for the whole forward.
    """
    runner.war_fastpath_read_done_event = None


def refuse_beams(params: SamplingParams) -> None:
    """No request can ask for beam search."""


def captured_draft_extend(cls: type) -> type:
    """Decorator of the draft's FA3 backend, which the draft worker captures if it is on a closed list of
    classes.

    FA3 is not, and runs under a graph as it is (patches/0002): a virtual subclass of a class on the list
    gets in and inherits nothing. The runner publishes its read-done event before the replay, while FA3 reads
    the table of slots in the graph once more; by then the scheduler may write it. The same buffers have been
    filled outside of the graph, so nothing need happen inside.
    """
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

    def init_forward_metadata_in_graph(self, forward_batch) -> None:
        """Nothing: see above."""

    cls.init_forward_metadata_in_graph = init_forward_metadata_in_graph
    FlashInferAttnBackend.register(cls)
    return cls
