"""Every private name of SGLang that the plugin touches, checked when the plugin loads.

SGLang's plugin loader logs a failing plugin and serves on without it; whoever asked for `sts` would
then measure stock attention. So nothing is hooked before `check()` has found every name, and the
backends refuse to start unless every hook is in place (`unhooked()`).
"""

from __future__ import annotations

import inspect
import pkgutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

SGLANG_VERSION = "0.5.16"

_SPEC = "sglang.srt.speculative"
_WORKER = f"{_SPEC}.eagle_worker_v2.EAGLEWorkerV2"
_ARGS = "sglang.srt.server_args.ServerArgs"


class Target(NamedTuple):
    """A function we hook, with the parameter names the hook relies on."""

    path: str
    params: tuple[str, ...]


CREATE_DRAFT_BACKEND = Target(
    f"{_SPEC}.draft_utils.DraftBackendFactory._create_backend",
    ("self", "backend_name", "backend_map", "error_template"),
)
INIT_ATTENTION_BACKENDS = Target(f"{_WORKER}.init_attention_backends", ("self",))
INIT_CUDA_GRAPHS = Target(f"{_WORKER}.init_cuda_graphs", ("self",))
FORWARD_BATCH = Target(f"{_WORKER}.forward_batch_generation", ("self", "batch", "on_publish"))
VERIFY_COMPLETE = Target(
    f"{_WORKER}.on_verify_complete_cpu", ("self", "num_correct_drafts_per_req", "batch_size")
)
PROFILE_AVAILABLE_BYTES = Target(
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
    ("self", "pre_model_load_memory"),
)
INTERNAL_STATE = Target("sglang.srt.managers.scheduler.Scheduler.get_internal_state", ("self", "recv_req"))
HICACHE_LOAD = Target("sglang.srt.managers.cache_controller.HiCacheController.load", ("self", "host_indices"))
RELEASE_KV = Target("sglang.srt.mem_cache.common.release_kv_cache", ("req", "tree_cache", "is_insert"))
ADD_CLI_ARGS = Target(f"{_ARGS}.add_cli_args", ("parser",))
FROM_CLI_ARGS = Target(f"{_ARGS}.from_cli_args", ("cls", "args"))
ARGS_INIT = Target(f"{_ARGS}.__init__", ("self",))
ARGS_POST_INIT = Target(f"{_ARGS}.__post_init__", ("self",))
SAMPLING_VERIFY = Target("sglang.srt.sampling.sampling_params.SamplingParams.verify", ("self", "vocab_size"))

HOOK_TARGETS = (
    CREATE_DRAFT_BACKEND,
    INIT_ATTENTION_BACKENDS,
    INIT_CUDA_GRAPHS,
    FORWARD_BATCH,
    VERIFY_COMPLETE,
    PROFILE_AVAILABLE_BYTES,
    INTERNAL_STATE,
    HICACHE_LOAD,
    RELEASE_KV,
    ADD_CLI_ARGS,
    FROM_CLI_ARGS,
    ARGS_INIT,
    ARGS_POST_INIT,
    SAMPLING_VERIFY,
)

# Names that are called or subclassed rather than hooked.
SYMBOLS = (
    "sglang.srt.configs.model_config.ModelConfig.from_server_args",
    "sglang.srt.environ.envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH",
    "sglang.srt.environ.envs.SGLANG_USE_MODELSCOPE",
    "sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS",
    "sglang.srt.layers.attention.attention_registry.register_attention_backend",
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend",
    "sglang.srt.mem_cache.memory_pool.KVWriteLoc",
    "sglang.srt.model_executor.cuda_graph_config.Backend.DISABLED",
    "sglang.srt.plugins.hook_registry.HookRegistry._patched",
    "sglang.srt.server_args.ATTENTION_BACKEND_CHOICES",
    "sglang.srt.server_args.add_attention_backend_choices",
    "sglang.srt.utils.hf_transformers_utils.get_config",
    f"{_SPEC}.eagle_utils.TreeMaskMode.QLEN_ONLY",
    f"{_SPEC}.draft_utils.DraftBackendFactory._create_triton_decode_backend",
)


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
SUPPORT_TRITON = Target("sglang.srt.utils.common.support_triton", ("backend",))
GATHER_SPEC_EXTRAS = Target("sglang.kernels.ops.speculative.gather_spec_extras.gather_spec_extras", ())
GET_LAST_LOC = Target("sglang.srt.mem_cache.allocation.get_last_loc", ())
APPLY_VOCAB_MASK = Target(
    "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",
    ("self", "logits", "vocab_mask"),
)
PAGED_ALLOCATOR = "sglang.srt.mem_cache.allocator.paged"
CPU_TARGETS = (SUPPORT_TRITON, GATHER_SPEC_EXTRAS, GET_LAST_LOC, APPLY_VOCAB_MASK)
CPU_SYMBOLS = (
    *(f"{module}._is_cpu" for module in CPU_BRANCHES),
    f"{PAGED_ALLOCATOR}.alloc_extend_kernel",
    f"{PAGED_ALLOCATOR}.alloc_decode_kernel",
    f"{PAGED_ALLOCATOR}.alloc_extend_naive",
    "sglang.srt.mem_cache.allocation.get_last_loc_torch",
)


class Incompatible(RuntimeError):
    """This SGLang is not one the plugin can attach to."""


def check(cpu_platform: bool = False) -> None:
    """Find every upstream name in its expected shape.

    Raises:
        Incompatible: one line that lists what is missing or has changed.
    """
    if problems := [problem for problem in findings(cpu_platform).values() if problem]:
        raise Incompatible(
            f"sts_sglang cannot attach to this SGLang: {'; '.join(problems)}. "
            f"Install sglang=={SGLANG_VERSION}."
        )


def findings(cpu_platform: bool = False) -> dict[str, str | None]:
    """Every name the plugin stands on, with what is wrong with it (None: nothing)."""
    targets = HOOK_TARGETS + (CPU_TARGETS if cpu_platform else ())
    symbols = SYMBOLS + (CPU_SYMBOLS if cpu_platform else ())
    return {
        "sglang": _check_version("sglang", SGLANG_VERSION),
        **{target.path: _check_target(target) for target in targets},
        **{path: _check_symbol(path) for path in symbols},
    }


def unhooked(targets: tuple[Target, ...] = HOOK_TARGETS) -> list[str]:
    """Hook targets that SGLang's registry has not patched (it only logs why)."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [t.path for t in targets if t.path not in HookRegistry._patched]


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None when it is absent."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


class SpecParts(NamedTuple):
    """What the binding needs of an EAGLEWorkerV2 (or StandaloneWorkerV2)."""

    target_runner: Any
    draft_runner: Any
    multi_step_backend: Any  # None when speculative_num_steps <= 1
    extend_backend: Any


def spec_parts(worker: Any) -> SpecParts:
    """Read the runners and draft backends of a speculative worker after its backends exist."""
    draft = worker._draft_worker
    return SpecParts(
        target_runner=worker._target_worker.model_runner,
        draft_runner=draft.draft_runner,
        multi_step_backend=draft.draft_attn_backend,
        extend_backend=draft.draft_extend_attn_backend,
    )


def use_qlen_tree_mask(worker: Any) -> None:
    """Ask for the [T, T] tree mask instead of [T, L + T].

    CUDA defaults to FULL_MASK, which the worker fills whole every round (MBs at long contexts).
    """
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    worker._draft_worker.tree_mask_mode = TreeMaskMode.QLEN_ONLY


def largest_decode_graph(server_args: Any) -> int:
    """Requests of the largest CUDA graph that decode may be captured in, 0 without graphs."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    decode = server_args.cuda_graph_config.decode
    return 0 if decode.backend == Backend.DISABLED else max(decode.bs or [decode.max_bs or 0])


def captured_graphs(worker: Any) -> dict[str, bool]:
    """Whether each of the round's passes replays a CUDA graph; without graphs, none is named."""
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.cuda_graph_config import Backend

    if worker.server_args.cuda_graph_config.decode.backend == Backend.DISABLED:
        return {}
    draft, target = worker._draft_worker, worker._target_worker.model_runner
    captured = {"verify": target.decode_cuda_graph_runner is not None}
    if worker.speculative_num_steps > 1:
        captured["draft_decode"] = draft.cuda_graph_runner is not None
    if not envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH.get():
        captured["draft_extend"] = draft.cuda_graph_runner_for_draft_extend is not None
    return captured


def _check_version(distribution: str, expected: str) -> str | None:
    found = installed_version(distribution)
    return None if found == expected else f"{distribution} is {found}, not {expected}"


def _check_target(target: Target) -> str | None:
    problem = _check_symbol(target.path)
    if problem:
        return problem
    fn = inspect.unwrap(pkgutil.resolve_name(target.path))
    fn = getattr(fn, "__func__", fn)
    if not callable(fn):
        return f"{target.path} is not callable"
    found = tuple(inspect.signature(fn).parameters)[: len(target.params)]
    return None if found == target.params else f"{target.path} takes {found}, not {target.params}"


def _check_symbol(path: str) -> str | None:
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        return f"{path} is missing ({error})"
    return None
