"""What `--attention-backend sts` serves, by allow-list; the rest is refused before weights load.

`check_raw` sees the arguments as given, `check_all` what SGLang made of them. The raw checks come
first because SGLang acts on some arguments itself: it turns adaptive speculation off with a warning,
and refuses deterministic inference, pages with trees, or GPT-OSS, in words that do not lead to `sts`.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sts_sglang import checkpoints, cpu, headmap
from sts_sglang.config import (
    BACKEND,
    CHAIN_FLAGS,
    StsConfig,
    check_request,
    one_line,
    quoted,
    shown,
)
from sts_sglang.host import views
from sts_sglang.host.architectures import (
    DRAFTS,
    HEADED_TARGETS,
    OWN_LAYERS,
    OWN_PATH,
    ROW_A_HEAD,
    TARGETS,
    why_not,
)
from sts_sglang.host.releases import release
from sts_sglang.host.sampling import check_sampling
from sts_sglang.verifiers import registry as verifiers

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs
    from transformers import PretrainedConfig

BACKEND_FIELDS = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "speculative_draft_attention_backend",
)
ALGORITHMS = ("STANDALONE", "EAGLE", "EAGLE3")
OTHERWISE = "or use another --attention-backend"

# A device that is not listed is not served.
KERNELS = {"cpu": ("auto", "torch"), "cuda": ("auto", "triton", "flashinfer", "torch")}
DENSE = {"cpu": ("auto", "torch"), "cuda": ("auto", "fa3", "flashinfer", "torch")}
PREFILL_ATTEND = {"cpu": ("auto", "ops"), "cuda": ("auto", "ops", "fa3")}
# How many ranks. On a CPU more of them are run by the tests alone, which add what SGLang lacks there
# (tests/tp_on_cpu.py).
RANKS = {"cpu": (1,), "cuda": headmap.RANKS}

_OTHER_WINDOWS = ("sliding_window_size", "window_size")
_HEADS_READ = {
    "EAGLE": "embeddings and the output layer",
    "EAGLE3": "hidden states of some layers, embeddings and the output layer",
}
_SPECIAL_FIELDS = (
    "attention_chunk_size",
    "dual_chunk_attention_config",
    "attn_logit_softcapping",
    "attn_logit_softcap",
    "add_full_attention_sink_bias",
    "add_swa_attention_sink_bias",
    "alibi",
    "use_cla",  # keys and values of another layer
    "mixer_types",  # MiniCPM's: a kind of attention, or none, by layer
)


class Refusal(ValueError):
    """Something that `sts` does not serve: one line that names the flag and says what to change."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class _Rule(NamedTuple):
    """drafted: whether it is for launches with a draft, or for those without; None: for all."""

    field: str
    served: tuple[Any, ...]
    why: str
    drafted: bool | None = None


_ONE_PROCESS = "one process must see all layers of a request, and all its tokens"
_DTYPE = "KV must have the model's dtype or be fp8_e4m3"
_OTHER_LAYOUT = "it reads KV as [slot, head, dim]"
_ROADS = "this cache may bring a prefix back without the draft's KV, or without a word of the slots it takes"
_ALL_RULES = (
    _Rule("tp_size", headmap.RANKS, "the heads of a model are shared out among so many"),
    *(
        _Rule(field, (1,), _ONE_PROCESS)
        for field in (
            "pp_size",
            "dp_size",
            "ep_size",
            "nnodes",
            "attn_cp_size",
            "moe_dp_size",
            "dcp_size",
            "attn_dp_size",
        )
    ),
    _Rule("enable_kv_cache_sharding", (False,), _ONE_PROCESS),
    _Rule("enable_prefill_cp", (False,), _ONE_PROCESS),
    _Rule("enable_prefill_context_parallel", (False,), _ONE_PROCESS),
    _Rule("enable_dsa_prefill_context_parallel", (False,), _ONE_PROCESS),
    _Rule("enable_dp_attention", (False,), _ONE_PROCESS),
    _Rule("enable_two_batch_overlap", (False,), "it splits a batch under the backend"),
    _Rule("enable_pdmux", (False,), "it runs decode on a group of backends"),
    _Rule(
        "disaggregation_mode",
        ("null",),
        "a transferred prompt brings neither the draft's attention nor sketches",
    ),
    _Rule("decoupled_spec_role", ("null",), "draft and target must share a process"),
    _Rule("disaggregation_decode_retraction_backup", (None, "cpu_tensor"), "its pool is a decode server's"),
    _Rule("kv_cache_dtype", ("auto", "bf16", "bfloat16", "fp8_e4m3"), _DTYPE),
    _Rule("speculative_draft_kv_cache_dtype", (None, "auto", "bf16", "bfloat16", "fp8_e4m3"), _DTYPE),
    _Rule("quantization_param_path", (None,), "SGLang writes by its scales and does not read by them"),
    _Rule("enable_unified_memory", (False,), _OTHER_LAYOUT),
    _Rule("enable_page_major_kv_layout", (False,), _OTHER_LAYOUT),
    _Rule("enable_hisparse", (False,), "it keeps KV in pools of its own"),
    _Rule("enable_lmcache", (False,), _ROADS),
    _Rule("enable_flexkv", (False,), _ROADS),
    _Rule("hicache_storage_backend", (None,), _ROADS),
    _Rule("hicache_host_memory_mode", ("cache",), _ROADS),
    _Rule("enable_unified_cache_external_linker", (False,), _ROADS),
    _Rule("radix_cache_backend", (None,), _ROADS),
    _Rule("enable_deterministic_inference", (False,), "the order of sums depends on the batch"),
    _Rule("rl_on_policy_target", (None,), "it turns deterministic inference on"),
    _Rule("speculative_adaptive", (False,), "it swaps attention backends while serving"),
    _Rule("enable_multi_layer_eagle", (False,), "every draft layer is a worker of its own"),
    _Rule("speculative_draft_window_size", (None,), "a windowed draft does not score the whole context"),
    _Rule("is_embedding", (False,), "embeddings have no decode to verify"),
    _Rule("dllm_algorithm", (None,), "diffusion models do not verify drafts"),
    _Rule(
        "enable_custom_logit_processor", (False,), "under speculation it acts on the first token only", True
    ),
    _Rule("enable_mixed_chunk", (False,), "SGLang decodes beside a prefill as if it were one", False),
    _Rule("enable_mis", (False,), "scoring has no decode to verify"),
    _Rule(
        "enable_memory_saver", (False,), "released weights come back by an update, and none is served", True
    ),
    _Rule("enable_memory_saver", (False,), "nobody has tried what is left of sketches", False),
    _Rule("checkpoint_engine_wait_weights_before_ready", (False,), "no update of weights is served", True),
    _Rule(
        "enable_streaming_session",
        (False,),
        "from the second turn on SGLang counts a cached token under speculation that is not there, and "
        "answers differently from one request of the same tokens",
        True,
    ),
    _Rule("enable_streaming_session", (False,), "nobody has read what it keeps between turns", False),
    _Rule("enable_nvidia_megakernel", (False,), "its kernels verify in the backend's place"),
    _Rule("enable_amd_monokernel", (False,), "its kernels verify in the backend's place"),
    _Rule("enable_watermark", (False,), "nobody has read how it draws under speculation", True),
    _Rule("enable_return_aux_hidden_states", (False,), "SGLang then runs no draft", True),
    _Rule("encoder_only", (False,), "an encoder has no decode to verify"),
    _Rule("model_impl", ("auto", "sglang"), "only SGLang's own models have been read"),
    _Rule("use_ray", (False,), "SGLang loads no plugins in Ray actors"),
    _Rule("smg_grpc_mode", (False,), "its server hands requests on without SGLang's checks of them"),
    _Rule("grpc_mode", (False,), "its server hands requests on without SGLang's checks of them"),
    _Rule("tokenizer_worker_num", (1,), "SGLang loads no plugins in further tokenizer workers"),
)
# Releases differ in the flags they have.
_RULES = tuple(rule for rule in _ALL_RULES if rule.field in release.SERVER_ARGS_READ)
# What the launch's checks stand on, as far as SGLang leaves it alone until a scheduler has it: a scheduler
# asks for the same values (host/handover.py).
CHECKED = (
    *BACKEND_FIELDS,
    *dict.fromkeys(rule.field for rule in _RULES),
    "device",
    "enable_return_hidden_states",
    "model_path",
    "page_size",
    "revision",
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_draft_model_revision",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "speculative_num_steps",
    "speculative_token_map",
)
_ALL_ENVIRONMENT = {
    "SGLANG_USE_HND_KVCACHE": _OTHER_LAYOUT,
    "SGLANG_ENABLE_OVERLAP_PLAN_STREAM": "the selection is only known when the draft has run",
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": "it would replay the plan of the round that it recorded",
    "SGLANG_RUST_SERVER": "its server hands requests on without SGLang's checks of them",
}
_ENVIRONMENT = {
    name: why
    for name, why in _ALL_ENVIRONMENT.items()
    if f"sglang.srt.environ.envs.{name}" in release.SYMBOLS
}


def asks_for_sts(server_args: ServerArgs) -> bool:
    """Whether any of the four attention-backend flags names `sts`."""
    return any(getattr(server_args, field) == BACKEND for field in BACKEND_FIELDS)


def speculates(server_args: ServerArgs) -> bool:
    """Whether a draft does, or nothing."""
    return server_args.speculative_algorithm is not None


def check_raw(server_args: ServerArgs) -> None:
    """Check the arguments as given, before `ServerArgs.__post_init__`. Raises `Refusal`."""
    _check_backends(server_args)
    _check_algorithm(server_args)
    _check_rules(server_args)
    _check_steps(server_args)
    _check_pages(server_args)
    _check_config_files(server_args)
    if (config := _target_config(server_args)) is not None:
        _check_named("--model-path", server_args.model_path, config, server_args.quantization)
        _check_config("--model-path", server_args.model_path, config, TARGETS)
    _check_draft_given(server_args, config)
    if (config := _draft_config(server_args)) is not None:
        asked = server_args.speculative_draft_model_quantization or server_args.quantization
        path = server_args.speculative_draft_model_path
        _check_named("--speculative-draft-model-path", path, config, None if asked == "unquant" else asked)


def check_resolved(server_args: ServerArgs) -> None:
    """Check the arguments after `ServerArgs.__post_init__`. Raises `Refusal`."""
    if (resolved := server_args.attention_backend) != BACKEND:
        raise Refusal(
            f"--attention-backend: SGLang made it {resolved} for this model; {_other_model('--model-path')}"
        )
    _check_backends(server_args)
    if server_args.speculative_algorithm not in (None, *ALGORITHMS):
        raise Refusal(
            f"--speculative-algorithm: SGLang made it {server_args.speculative_algorithm} for this draft; "
            f"{_other_model('--speculative-draft-model-path')}"
        )
    _check_unread(server_args)
    _check_rules(server_args, hint=" (SGLang sets it itself for some models: then use another model)")
    _check_pages(server_args)


def _check_unread(server_args: ServerArgs) -> None:
    """Flags that this algorithm's worker takes without a word and does something else with."""
    algorithm = server_args.speculative_algorithm
    if algorithm is None:
        return
    if server_args.enable_return_hidden_states and algorithm != "EAGLE":
        what = (
            "drops them" if algorithm == "STANDALONE" else "returns those of the layers that the head reads"
        )
        raise Refusal(
            f"--enable-return-hidden-states: with --speculative-algorithm {algorithm} SGLang {what}; "
            "remove --enable-return-hidden-states"
        )
    if server_args.speculative_token_map is not None and algorithm == "STANDALONE":
        raise Refusal(
            "--speculative-token-map: with --speculative-algorithm STANDALONE SGLang takes the draft's own "
            "token ids for numbers in this map; remove --speculative-token-map"
        )


def check_device(server_args: ServerArgs, config: StsConfig) -> None:
    """Plain CPUs on the reference platform, and CUDA. Raises `Refusal`."""
    device = server_args.device
    if device not in KERNELS:
        raise Refusal(f"--device {device}: not served by sts; use --device {' or '.join(KERNELS)}")
    if device == "cpu" and not cpu.selected():
        raise Refusal(f"--device cpu: sts needs its own platform; set SGLANG_PLATFORM={cpu.NAME}")
    if (ranks := server_args.tp_size) not in RANKS[device]:
        one = f"--tp-size {ranks}: sts serves one rank on --device {device}"
        raise Refusal(f"{one}; use --tp-size 1, or GPUs")
    if server_args.enable_torch_compile:
        raise Refusal("--enable-torch-compile: not served by sts (its kernels are no torch ops); remove it")
    _check_kernel(server_args, config)
    _check_graphs(server_args, config)
    steps = server_args.speculative_num_steps
    if config.sparse_steps and (steps or 0) < 3:
        raise Refusal(
            f"sts_config.draft: {config.draft!r} with --speculative-num-steps {steps}: the draft runs "
            f"{max(0, (steps or 0) - 1)} steps, and the first is dense; use {CHAIN_FLAGS} or more steps"
        )


def _check_kernel(server_args: ServerArgs, config: StsConfig) -> None:
    device = server_args.device
    available = {"kernel": KERNELS[device], "dense": DENSE[device], "prefill_attend": PREFILL_ATTEND[device]}
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        # As numpy: far too slow to serve, for tests of the whole path.
        available["kernel"] = (*available["kernel"], "triton")
    for field, served in available.items():
        if (value := getattr(config, field)) not in served:
            raise Refusal(
                f"sts_config.{field}: {value!r} is not available on device {device} in this release; "
                f"allowed here: {', '.join(served)}"
            )
    if what := verifiers.of(config.kernel).refusal(config, server_args.speculative_eagle_topk):
        raise Refusal(f'sts_config.kernel: {config.kernel!r} does not serve {what}; set kernel to "triton"')


def _check_graphs(server_args: ServerArgs, config: StsConfig) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    phases = (
        ("decode", views.decode_graphs(server_args), (Backend.FULL, Backend.DISABLED)),
        ("prefill", views.prefill_graphs(server_args), (Backend.BREAKABLE, Backend.DISABLED)),
    )
    if server_args.device == "cpu" or config.kernel == "torch":
        if any(graphs.captured for _, graphs, _ in phases):
            raise Refusal(
                "CUDA graphs: the torch kernels of sts cannot be captured; add --disable-cuda-graph"
            )
        return
    for phase, graphs, allowed in phases:
        if graphs.backend not in allowed:
            raise Refusal(
                f"--cuda-graph-backend-{phase} {graphs.backend}: not served by sts; "
                f"use --cuda-graph-backend-{phase} {' or '.join(allowed)}"
            )


def _by_flag(target: ModelConfig, draft: ModelConfig | None) -> dict[str, ModelConfig]:
    """The models that a launch has, by the flags that name them."""
    models = {"--model-path": target}
    return models if draft is None else {**models, "--speculative-draft-model-path": draft}


def check_prefill_graphs(server_args: ServerArgs, target: ModelConfig, draft: ModelConfig | None) -> None:
    """Whether every query of the models reaches attention in a prefill graph. Raises `Refusal`."""
    graphs = views.prefill_graphs(server_args)
    for flag, model in _by_flag(target, draft).items() if graphs.captured else ():
        normed = getattr(model.hf_text_config, "use_qk_norm", False)
        if normed and ROW_A_HEAD.intersection(model.hf_config.architectures or ()):
            raise Refusal(
                f"--cuda-graph-backend-prefill {graphs.backend}: SGLang drops queries of {flag} "
                f"{model.model_path} there (use_qk_norm); use --cuda-graph-backend-prefill disabled"
            )


def check_history(server_args: ServerArgs, config: StsConfig) -> None:
    """Whether slots can remember, scores or sketches, with this cache. Raises `Refusal`."""
    from sglang.srt.environ import envs

    key, off = ("history", "off") if config.history != "off" else ("selector", "draft")
    remembers = config.history != "off" or config.by_sketches
    if not remembers or not server_args.enable_hierarchical_cache:
        return
    can = config.history != "off" or speculates(server_args)  # nothing else selects without a draft
    instead = f' or set {key} to "{off}"' if can else ""
    for name in release.TREES_THAT_REMEMBER:
        if getattr(envs, name).get():
            raise Refusal(
                f"sts_config.{key}: not served with --enable-hierarchical-cache and {name}, whose slots "
                f"would remember their earlier occupants; unset the variable{instead}"
            )


def check_inspect(config: StsConfig) -> None:
    """Whether dumps can be written. Raises `Refusal`."""
    folder = config.inspect_dir
    if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise Refusal(f"sts_config.inspect_dir: {folder} is no folder that can be written; create it first")
    # Dumps are for the server's user alone, but who may write a folder may put others in their place; where
    # the sticky bit keeps everybody to their own files, as in /tmp, that is not so.
    if folder is not None and (mode := os.stat(folder).st_mode) & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise Refusal(
            f"sts_config.inspect_dir: everybody may write {folder}, where users' tokens would lie; "
            "chmod o-w it, or set its sticky bit"
        )


def check_preferred(server_args: ServerArgs, config: StsConfig, target: ModelConfig) -> None:
    """What joins every request must be what a request may ask for. Raises `Refusal`."""
    preferred = server_args.preferred_sampling_params or {}
    drafted = speculates(server_args)
    _check_joining("--preferred-sampling-params", preferred, "change or remove it", config, target, drafted)
    # Qwen2.5-Instruct comes with a repetition_penalty of 1.05. Of the others a request may have any.
    given = target.get_default_sampling_params()
    own = {name: given[name] for name in ("repetition_penalty", "min_p") if name in given}
    what = "--sampling-defaults model (generation_config.json)"
    _check_joining(what, own, "use --sampling-defaults openai", config, target, drafted)


def _check_joining(
    what: str, params: dict[str, Any], remedy: str, config: StsConfig, target: ModelConfig, drafted: bool
) -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    if not params:
        return
    # A request says its temperature itself on the CPU platform, whose only one is not SGLang's default.
    own = {"temperature": 0} if cpu.selected() and "top_k" not in params else {}
    try:
        made = SamplingParams(**{**own, **params})
        made.verify(target.vocab_size)
        check_request(made.custom_params, config)
        if drafted:
            check_sampling(made, cpu=cpu.selected())
    except (TypeError, ValueError) as error:
        raise Refusal(
            f"{what}: {error}; so would be answered every request that does not say otherwise; {remedy}"
        ) from error


def check_target(target: ModelConfig) -> None:
    """Check the target's own configuration. Raises `Refusal`."""
    _check_model("--model-path", target, TARGETS)


def check_draft(draft: ModelConfig, target: ModelConfig) -> None:
    """Check the draft's configuration, and that it was made for this target. Raises `Refusal`."""
    algorithm = draft.speculative_algorithm
    _check_headed(algorithm, target)
    _check_model("--speculative-draft-model-path", draft, DRAFTS[algorithm])
    if views.own_layer(draft):
        _check_own_layer(draft, target)
    if algorithm == "STANDALONE" or views.own_layer(draft):
        _check_equal("vocab_size", draft.vocab_size, target.vocab_size)
    if algorithm != "STANDALONE":
        reads = getattr(draft.hf_text_config, "target_hidden_size", None) or draft.hidden_size
        _check_equal("hidden_size", reads, target.hidden_size)


def check_all(server_args: ServerArgs, config: StsConfig) -> StsConfig:
    """Every check that follows `ServerArgs.__post_init__`. Raises `Refusal`, `ConfigError`.

    Reads the models' configurations as the workers will, no weights. Returns the configuration for the
    schedulers: with what selects, and the hash of the head map's file, which they read again.
    """
    check_resolved(server_args)
    asked = config
    # Whether the map has directions is known below; tokens ask for no more than pages do.
    config = _for_launch(asked, server_args, directions=True)
    check_device(server_args, config)
    check_history(server_args, config)
    check_prefill(server_args, config)
    check_inspect(config)
    target = release.model_config(server_args)
    check_target(target)
    if (draft := draft_config(server_args, target)) is not None:
        check_draft(draft, target)
    check_prefill_graphs(server_args, target, draft)
    check_preferred(server_args, config, target)
    _check_kv_dtype(server_args, config, target, draft)
    _check_quantized_dtype(target, draft)
    _check_heads(server_args.tp_size, target, draft)
    _check_weights(server_args, target, draft)
    config.check_layers(target.num_hidden_layers)
    if server_args.device == "cuda" and config.kernel != "torch":
        check_tiles(server_args, config, target, draft)
    models = views.paths(server_args)
    # Weights of a hub name may not be here yet: the map's fingerprints are compared when they are loaded.
    models = models if models.are_folders() else None
    counts = views.model(target).counts, draft and views.model(draft).counts
    head_map = headmap.of_config(config, *counts, models, server_args.tp_size)
    config = _for_launch(asked, server_args, head_map.directions is not None)
    if config.head_map or models is not None:  # else a packaged map may yet be found
        headmap.check_directions(config, head_map, target.head_dim)
    return headmap.pinned(config, head_map)


def _for_launch(config: StsConfig, server_args: ServerArgs, directions: bool) -> StsConfig:
    """With what `auto` stands for in a launch with these flags."""
    drafts = speculates(server_args)
    chosen = config.for_launch(drafts, directions)
    if not drafts:
        return chosen
    steps, topk = server_args.speculative_num_steps, server_args.speculative_eagle_topk
    return chosen.for_draft(server_args.speculative_algorithm.upper(), steps or 0, topk or 1)


def check_prefill(server_args: ServerArgs, config: StsConfig) -> None:
    """Whether the draft can read prompts first, if it is to, and what a sparse prefill leaves in the prefix
    cache can be kept apart. Raises `Refusal`."""
    from sglang.srt.environ import envs

    algorithm = server_args.speculative_algorithm
    if config.prefill_by == "draft" and algorithm != "STANDALONE":
        raise Refusal(
            f"sts_config.prefill_by: 'draft' with --speculative-algorithm {algorithm}, whose head reads what "
            "the target makes of a prompt and cannot read it first; use --speculative-algorithm STANDALONE, "
            'or set prefill_by to "target"'
        )
    if config.prefills_by_draft and server_args.enable_hierarchical_cache:
        # The target's layers wait for keys that come back from the host; the draft would be ahead.
        raise Refusal(
            "sts_config.prefill_by: 'draft' is not served with --enable-hierarchical-cache, whose keys may "
            'still be on their way when the draft reads; drop that flag, or set prefill_by to "target"'
        )
    for name in release.TREES_WITHOUT_KEYS:
        if config.prefill == "sparse" and getattr(envs, name).get():
            raise Refusal(
                f"sts_config.prefill: 'sparse' is not served with {name}, which would hand KV of a sparse "
                'prefill to requests that ask for a dense one; unset the variable or set prefill to "dense"'
            )


def check_tiles(
    server_args: ServerArgs, config: StsConfig, target: ModelConfig, draft: ModelConfig | None
) -> None:
    """Whether a thread block of the kernels can hold its rows. Raises `Refusal`."""
    room = _shared_memory()
    if room is None:
        return
    # Imports Triton, which a CPU's launcher goes without.
    from sts_kernels import draft_attention, page_scores, tokens, verify

    if config.prefill == "sparse":
        _check_asking_rows("prefill", draft if config.prefill_selector == "draft" else target, room)
        if config.prefills_draft:
            _check_asking_rows("prefill_draft", draft, room)
    if config.selector == "tokens" and target.head_dim > tokens.MOST_DIM:
        raise Refusal(
            f"sts_config.selector: 'tokens' scores heads of at most {tokens.MOST_DIM} dimensions on a GPU, "
            f"and this target's have {target.head_dim}; allowed: another selector"
        )
    if draft is None:  # one row of every query head
        return
    number, branches = server_args.speculative_num_draft_tokens, server_args.speculative_eagle_topk
    of_verify = "--speculative-num-draft-tokens", number, number
    readers = [(*of_verify, target, verify.shared_bytes)]
    # A carried row beside the branches'.
    readers += [("--speculative-eagle-topk", branches, 1 + branches, draft, draft_attention.shared_bytes)]
    if config.sparse_extend:
        readers += [(*of_verify, draft, verify.shared_bytes)]
    if config.by_pages:
        readers += [(*of_verify, target, page_scores.shared_bytes)]
    if config.selector == "tokens":
        readers += [(*of_verify, target, tokens.shared_bytes)]
    for flag, number, queries, model, shared_bytes in readers:
        rows = queries * _group(model)
        needed = shared_bytes(rows, model.head_dim)
        if needed > room:
            of_lists = model is draft and shared_bytes is verify.shared_bytes
            raise Refusal(
                f"{flag} {number}: a thread block of sts's kernels would hold {rows} query rows of "
                f"{model.head_dim} and need about {needed} bytes of shared memory, and this GPU has {room}; "
                + ('use fewer, set draft to "dense", ' if of_lists else "use fewer, ")
                + 'or set kernel to "torch" with --disable-cuda-graph'
            )


def _group(model: ModelConfig) -> int:
    """Query heads of a KV head, of which multi-query attention has one, whatever the configuration says."""
    return model.num_attention_heads // model.get_total_num_kv_heads()


def _check_asking_rows(field: str, model: ModelConfig, room: int) -> None:
    """Whether a thread block can hold the rows of a block of queries that ask in a sparse prefill."""
    from sts_kernels import prefill
    from sts_sglang.core.block_selectors import SAMPLED

    group = _group(model)
    if (needed := prefill.shared_bytes(model.head_dim, SAMPLED * group)) > room:
        raise Refusal(
            f"sts_config.{field}: 'sparse' with heads of {model.head_dim}, {group} to a KV head, needs "
            f"about {needed} bytes of shared memory in a thread block, and this GPU has {room}; "
            f'set {field} to "dense"'
        )


def _shared_memory() -> int | None:
    """Bytes that a thread block can have; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _other_model(flag: str) -> str:
    return f"give {flag} another model {OTHERWISE}"


def _check_backends(server_args: ServerArgs) -> None:
    given = {field: getattr(server_args, field) for field in BACKEND_FIELDS}
    for field, value in given.items():
        if value not in (None, BACKEND):
            raise Refusal(
                f"{_flag(field)} {value}: sts serves all attention or none; set it to sts or remove it"
            )
    if given["attention_backend"] is None:
        named = next(field for field, value in given.items() if value == BACKEND)
        raise Refusal(f"{_flag(named)} sts: sts serves all attention or none; add --attention-backend sts")


def _check_algorithm(server_args: ServerArgs) -> None:
    algorithm = server_args.speculative_algorithm
    if algorithm is None:
        _check_no_draft(server_args)
        return
    # NEXTN is SGLang's other word for EAGLE.
    if algorithm.upper() not in (*ALGORITHMS, "NEXTN"):
        raise Refusal(
            f"--speculative-algorithm {algorithm}: its draft gives no attention for sts to select by; "
            f"use {', '.join(ALGORITHMS)} {OTHERWISE}"
        )


def _check_draft_given(server_args: ServerArgs, target: PretrainedConfig | None) -> None:
    """A target's own layer may draft, which SGLang finds by itself for some. target: None if unknown yet."""
    algorithm = server_args.speculative_algorithm
    if algorithm is None or server_args.speculative_draft_model_path is not None:
        return
    names = set(target.architectures or ()) if target is not None else set()
    by_a_layer = algorithm.upper() in ("EAGLE", "NEXTN") and not names.isdisjoint(OWN_LAYERS)
    if by_a_layer and not names.isdisjoint(OWN_PATH):
        return
    own = f", or {server_args.model_path} itself for the layer that it has for that" if by_a_layer else ""
    raise Refusal(
        f"--speculative-algorithm {algorithm}: no draft given; add --speculative-draft-model-path DRAFT{own}"
    )


def _check_no_draft(server_args: ServerArgs) -> None:
    """Flags of a draft that nobody would ask."""
    for field in CHECKED:
        if field.startswith("speculative_") and (value := getattr(server_args, field)) not in (None, False):
            raise Refusal(
                f"{_flag(field)} {value}: given without --speculative-algorithm, so that no draft runs; "
                f"remove it or add --speculative-algorithm {' or '.join(ALGORITHMS)}"
            )


def _check_rules(server_args: ServerArgs, hint: str = "") -> None:
    from sglang.srt.environ import envs

    for field, served, why, drafted in _RULES:
        if drafted not in (None, speculates(server_args)):
            continue
        value = getattr(server_args, field)
        if value not in served:
            named = [str(value) for value in served if value not in (None, False)]
            ways = [f"remove {_flag(field)}"] if served[0] in (None, False) else []
            ways += [f"use {_flag(field)} {_either(named)}"] if named else []
            remedy = " or ".join(ways)
            given = _flag(field) if value is True else f"{_flag(field)} {value}"
            raise Refusal(f"{given}: not served by sts ({why}); {remedy}{hint}")
    for name, why in _ENVIRONMENT.items():
        if getattr(envs, name).get():
            raise Refusal(f"{name}: not served by sts ({why}); unset the environment variable {name}")


def _either(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _check_steps(server_args: ServerArgs) -> None:
    fields = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")
    values = [getattr(server_args, field) for field in fields]
    if all(value is None for value in values):
        return  # SGLang chooses
    for field, value, least in zip(fields, values, (1, 1, 2), strict=True):
        if value is None or value < least:
            raise Refusal(
                f"{_flag(field)} {value}: needs at least {least}, and all three or none; use {CHAIN_FLAGS}"
            )
    steps, topk, tokens = values
    if topk > 1 and tokens - 1 > (nodes := topk + (steps - 1) * topk * topk):
        raise Refusal(
            f"--speculative-num-draft-tokens {tokens}: {steps} steps of topk {topk} draft {nodes} tokens; "
            f"use --speculative-num-draft-tokens {nodes + 1} or less"
        )


def _check_pages(server_args: ServerArgs) -> None:
    # Branches of a tree share the last, partly filled page of the prefix.
    if (server_args.page_size or 1) == 1 or not speculates(server_args):
        return
    page, topk = f"--page-size {server_args.page_size}", server_args.speculative_eagle_topk
    if topk is None and server_args.speculative_algorithm.upper() != "STANDALONE":
        raise Refusal(
            f"{page}: sts serves larger pages with topk 1 only, and SGLang's own choice may be a tree "
            f"(5 steps, topk 4, 8 tokens for Llama); add {CHAIN_FLAGS} or use --page-size 1"
        )
    if topk is not None and topk > 1:
        raise Refusal(
            f"{page}: not served by sts with --speculative-eagle-topk {topk}; use --speculative-eagle-topk 1 "
            "or --page-size 1"
        )


def draft_config(server_args: ServerArgs, target: ModelConfig) -> ModelConfig | None:
    """The draft's configuration as its worker loads it, with the target's context; None without a draft.
    Raises `Refusal`."""
    from sglang.srt.configs.model_config import ModelConfig

    if not speculates(server_args):
        return None
    try:
        return ModelConfig.from_server_args(
            server_args,
            model_path=server_args.speculative_draft_model_path,
            model_revision=server_args.speculative_draft_model_revision,
            is_draft_model=True,
            context_length=target.context_len,
        )
    except (OSError, ValueError) as error:
        raise Refusal(
            f"--speculative-draft-model-path {server_args.speculative_draft_model_path}: cannot draft for a "
            f"context of {target.context_len} ({quoted(error, 300)}); give another draft or a smaller "
            "--context-length"
        ) from error
    except Exception as error:  # transformers raises of everything for values of another type
        path = server_args.speculative_draft_model_path
        raise _unreadable("--speculative-draft-model-path", path, error) from error


def _check_kv_dtype(
    server_args: ServerArgs, config: StsConfig, target: ModelConfig, draft: ModelConfig | None
) -> None:
    import torch

    models = [("--model-path", target, views.kv_asked(server_args))]
    if draft is not None:
        asked = views.kv_asked(server_args, of_draft=config)
        models.append(("--speculative-draft-model-path", draft, asked))
    for flag, model, asked in models:
        name, value = asked
        if value == "auto" and _may_bring_fp8(model):
            raise Refusal(
                f"{name} auto: the quantized checkpoint of {flag} may set fp8; use {name} fp8_e4m3 or "
                f"{name} bfloat16"
            )
        fits = value in ("auto", "model") or model.dtype == torch.bfloat16
        if fits or (asked.fp8 and server_args.device == "cpu"):
            continue
        why = "attention to FP8 answers in bfloat16" if asked.fp8 else "KV must have the model's dtype"
        raise Refusal(
            f"{name} {value}: {flag} runs in {model.dtype}, and {why}; use {name} auto or --dtype bfloat16"
        )


def _check_quantized_dtype(target: ModelConfig, draft: ModelConfig | None) -> None:
    """Whether quantized weights are served beside activations of the model's dtype: by the method's own word,
    for which SGLang asks when it loads them."""
    from sglang.srt.layers.quantization import get_quantization_config

    for flag, model in _by_flag(target, draft).items():
        if (name := model.quantization) is None:
            continue
        try:
            method = get_quantization_config(name)
        except ValueError as error:  # on some CPUs some methods
            raise Refusal(f"{flag} {model.model_path}: {error}; give another checkpoint") from error
        # Some of them answer as instances alone, and read nothing of one.
        served = method.__new__(method).get_supported_act_dtypes()
        if model.dtype not in served:
            given, *others = (str(dtype).removeprefix("torch.") for dtype in (model.dtype, *served))
            raise Refusal(
                f"--dtype {given}: {flag} {model.model_path} is quantized by {name}, which SGLang does not "
                f"serve in it; use --dtype {' or '.join(others)}"
            )


def _check_heads(ranks: int, target: ModelConfig, draft: ModelConfig | None) -> None:
    """Whether the heads can be shared out; of KV heads there may be fewer than ranks."""
    whole = {flag: views.model(model).counts for flag, model in _by_flag(target, draft).items()}
    for flag, counts in whole.items():
        if not counts.shared_evenly(ranks):
            fitting = [str(n) for n in headmap.RANKS if all(own.shared_evenly(n) for own in whole.values())]
            raise Refusal(
                f"--tp-size {ranks}: {flag} has {counts.q_heads} query and {counts.kv_heads} KV heads, which "
                f"so many ranks cannot share evenly; use --tp-size {_either(fitting)}"
            )


def _may_bring_fp8(model: ModelConfig) -> bool:
    """Whether a checkpoint may bring an fp8 KV cache along, which only shows when it is loaded."""
    given = getattr(model.hf_config, "quantization_config", None)
    named = given if isinstance(given, dict) else {}
    return "modelopt" in (model.quantization or "") or any(
        named.get(key) is not None for key in ("kv_cache_scheme", "kv_cache_quant_algo")
    )


def _check_headed(algorithm: str, target: ModelConfig) -> None:
    """Whether SGLang's class of the target offers what a head of this algorithm reads."""
    able = HEADED_TARGETS.get(algorithm, TARGETS)
    if unable := next((name for name in target.hf_config.architectures if name not in able), None):
        raise Refusal(
            f"--speculative-algorithm {algorithm}: SGLang's {unable} does not hand a head what it reads "
            f"({_HEADS_READ[algorithm]}); use --speculative-algorithm STANDALONE, or none"
        )


def _check_own_layer(draft: ModelConfig, target: ModelConfig) -> None:
    """Whether it is the target's kind of layer, and SGLang keeps KV for one."""
    made, path = draft.hf_config.architectures[0], draft.model_path
    if all(OWN_LAYERS.get(name) != made for name in target.hf_config.architectures):
        raise Refusal(
            f"--speculative-draft-model-path {path}: SGLang drafts with {made}, a layer of another kind of "
            "model than the target; give the target's own path, or a head that was trained for it"
        )
    if (layers := draft.num_nextn_predict_layers) != 1:
        raise Refusal(
            f"--speculative-draft-model-path {path}: num_nextn_predict_layers = {shown(layers)}, and SGLang "
            "keeps KV for so many layers where one drafts; give a checkpoint whose config.json says 1"
        )


def _check_equal(what: str, draft: int, target: int) -> None:
    if draft != target:
        raise Refusal(
            f"--speculative-draft-model-path: the draft is made for {what} {draft}, the target has {target}; "
            "give a draft trained for this target"
        )


def _folders(server_args: ServerArgs) -> Iterator[tuple[str, Path]]:
    """The flag and the folder of every model that is one; the hub's are checked as they are loaded."""
    for flag, field in (
        ("--model-path", "model_path"),
        ("--speculative-draft-model-path", "speculative_draft_model_path"),
    ):
        path = getattr(server_args, field)
        if path and os.path.isdir(path):
            yield flag, Path(path)


def _check_config_files(server_args: ServerArgs) -> None:
    """Raises `ConfigError` for a damaged config.json, on which SGLang and transformers end in a traceback."""
    served = TARGETS.union(*DRAFTS.values())
    for flag, folder in _folders(server_args):
        decrypted = {
            "--model-path": server_args.decrypted_config_file,
            "--speculative-draft-model-path": server_args.decrypted_draft_config_file,
        }
        if decrypted[flag] or not (folder / "config.json").exists():
            continue
        config = checkpoints.read_config(f"{flag} {folder}", folder)
        if served.issuperset(config.get("architectures") or ()):  # others have sizes of other kinds
            checkpoints.check_numbers(f"{flag} {folder}", config)


def _check_weights(server_args: ServerArgs, target: ModelConfig, draft: ModelConfig | None) -> None:
    """Raises `ConfigError` for damaged weights and for missing tensors: SGLang would leave such parameters as
    they were allocated; and for scales of KV that are none, which only quantized models read."""
    formats = {"--model-path": server_args.load_format}
    formats["--speculative-draft-model-path"] = (
        server_args.speculative_draft_load_format or server_args.load_format
    )
    models = _by_flag(target, draft)
    for flag, folder in _folders(server_args):
        if formats[flag] not in ("auto", "safetensors"):
            continue
        headers = checkpoints.read_headers(f"{flag} {folder}", folder)
        if models[flag].quantization is not None:
            checkpoints.check_scales(f"{flag} {folder}", folder, headers)
        tensors = checkpoints.by_name(headers)
        # ModelOpt's checkpoints say in a file of their own that their tensors are packed.
        if tensors and not (folder / "hf_quant_config.json").exists():
            config = models[flag].hf_config.to_dict()
            checkpoints.check_tensors(f"{flag} {folder}", config, tensors, strict=False)


def _target_config(server_args: ServerArgs) -> PretrainedConfig | None:
    """The target's Hugging Face config; None if it cannot be read yet."""
    if _comes_later(server_args):
        return None
    path = server_args.model_path
    try:
        return _read_config(server_args, path, server_args.revision, server_args.decrypted_config_file)
    except Exception as error:  # transformers raises of everything for values of another type
        if isinstance(error, (OSError, ValueError)) and not os.path.isdir(path):
            return None  # SGLang fails on it next, and says why
        raise _unreadable("--model-path", path, error) from error


def _draft_config(server_args: ServerArgs) -> PretrainedConfig | None:
    """The same of a draft that is given. SGLang reads it in the same way while it resolves the arguments, and
    has no words of its own for what cannot be read."""
    path = server_args.speculative_draft_model_path
    if path is None or _comes_later(server_args):
        return None
    revision, file = server_args.speculative_draft_model_revision, server_args.decrypted_draft_config_file
    try:
        return _read_config(server_args, path, revision, file)
    except Exception as error:
        raise _unreadable("--speculative-draft-model-path", path, error) from error


def _comes_later(server_args: ServerArgs) -> bool:
    """Whether there is no model to read, or none before SGLang has downloaded it from ModelScope."""
    from sglang.srt.environ import envs

    return server_args.model_path.lower() in ("none", "dummy") or envs.SGLANG_USE_MODELSCOPE.get()


def _read_config(
    server_args: ServerArgs, path: str, revision: str | None, file: str | None
) -> PretrainedConfig:
    """file: that stands for the model's config.json. Raises of everything."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    file = (file or "").strip()
    return get_config(
        path,
        trust_remote_code=server_args.trust_remote_code,
        revision=revision,
        model_override_args=json.loads(server_args.json_model_override_args),
        model_config_parser=server_args.model_config_parser,
        **({"_configuration_file": file} if file else {}),
    )


def _unreadable(flag: str, path: str, error: Exception) -> Refusal:
    return Refusal(
        f"{flag} {path}: its configuration cannot be read ({quoted(error, 300)}); give a folder or hub "
        "name that transformers loads"
    )


def _check_named(flag: str, path: str, config: PretrainedConfig, asked: str | None) -> None:
    """Whether a configuration names what SGLang looks for first: architectures, and how weights are
    quantized.
    asked: the method that a flag names. Raises `Refusal`."""
    if not config.architectures:
        raise Refusal(
            f"{flag} {path}: config.json: architectures: got {shown(config.architectures)}, and SGLang "
            "chooses a model's class by it; give a list with the name of one"
        )
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS as methods

    given = dict(given) if isinstance(given, dict) else given.to_dict()
    if "quant_method" not in given and given.get("quant_algo"):
        return  # ModelOpt's way
    method = given.get("quant_method", asked or "")
    known = isinstance(method, str) and (
        method.lower() in methods
        or (asked and method.replace("_", "-") in methods)  # beside a flag SGLang knows both spellings of one
        or any(kind.override_quantization_method(given, asked) for kind in methods.values())
    )
    if not known:
        problem = f"got {shown(method)}, which SGLang does not know" if method else "there is none"
        raise Refusal(
            f"{flag} {path}: config.json: quantization_config.quant_method: {problem}; give a checkpoint "
            "whose method SGLang serves, such as fp8, awq or compressed-tensors"
        )


def _check_config(flag: str, path: str, config: PretrainedConfig, served: frozenset[str]) -> None:
    if unserved := next((name for name in config.architectures or () if name not in served), None):
        why = f" ({reason})" if (reason := why_not(unserved)) else ""
        raise Refusal(
            f"{flag} {path}: has architecture {quoted(unserved)}, which sts does not serve here{why}; give a "
            f"model of architecture {listed(served)} {OTHERWISE}"
        )
    if problem := _special_field(config.get_text_config()):
        raise _special(flag, path, problem)


def listed(served: frozenset[str]) -> str:
    """For a message: all names, or of many those that everybody knows."""
    if len(served) < 5:
        return " or ".join(sorted(served))
    return "LlamaForCausalLM, Qwen3ForCausalLM, or another of docs/limits.md"


def _check_model(flag: str, model: ModelConfig, served: frozenset[str]) -> None:
    _check_config(flag, model.model_path, model.hf_config, served)
    heads, kv_heads = model.num_attention_heads, model.get_total_num_kv_heads()
    if model.is_multimodal or model.model_is_mrope:
        raise _special(flag, model.model_path, "multimodal inputs or positions")
    if model.head_dim != model.v_head_dim:
        problem = f"head_dim = {model.head_dim} but v_head_dim = {model.v_head_dim}"
        raise _special(flag, model.model_path, problem)
    if heads % kv_heads:
        problem = f"num_attention_heads = {heads}, no multiple of num_key_value_heads = {kv_heads}"
        raise _special(flag, model.model_path, problem)


def _special(flag: str, path: str, problem: str) -> Refusal:
    return Refusal(
        f"{flag} {path}: has {problem}, which sts does not serve; give a model with full, plain attention "
        f"in every layer {OTHERWISE}"
    )


def _special_field(text_config: PretrainedConfig) -> str | None:
    """What a Hugging Face config asks for beyond plain attention, or None."""
    types = getattr(text_config, "layer_types", None) or ()
    if not isinstance(types, (list, tuple)):
        return f"layer_types = {shown(types)}"
    kinds = {shown(kind) for kind in types if kind != "full_attention"}
    if kinds:
        return f"layer_types with {', '.join(sorted(kinds))}"
    for field in (*_windows(text_config), *_SPECIAL_FIELDS):
        if value := getattr(text_config, field, None):
            return f"{field} = {shown(value)}"
    return None


def _windows(text_config: PretrainedConfig) -> list[str]:
    """Fields of windows that are on, and shorter than the longest context."""
    # Qwen2 configs name a window and switch it off.
    if getattr(text_config, "use_sliding_window", None) is False:
        return []
    longest = getattr(text_config, "max_position_embeddings", None)
    whole = longest if type(longest) is int else math.inf
    values = {field: getattr(text_config, field, None) for field in ("sliding_window", *_OTHER_WINDOWS)}
    return [field for field, value in values.items() if type(value) is not int or value < whole]
