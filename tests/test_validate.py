"""What is served and what is refused, in-process on real ServerArgs and real model configs."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import runpy
from dataclasses import replace
from types import SimpleNamespace

# Before SGLang is imported: it chooses its platform once per process.
os.environ.setdefault("SGLANG_PLATFORM", "sts_cpu")

import pytest
import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.server_args import ServerArgs

from sts_sglang.config import CHAIN_FLAGS, ConfigError, StsConfig
from sts_sglang.headmap import HeadCounts
from sts_sglang.host import compat, handover, hooks
from sts_sglang.host import serves as validate
from sts_sglang.host.releases import RELEASES, release
from sts_sglang.host.serves import BACKEND_FIELDS, DRAFTS, Refusal
from tests import directions
from tests.arguments import Resolved, launched

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "vocab_size": 256,
}
EAGLE = {**LLAMA, "architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
EAGLE3 = {**EAGLE, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 128}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

CHAIN = {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
TREE = {"speculative_num_steps": 3, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}


@pytest.fixture(autouse=True)
def environment():
    """SGLang writes environment variables while it resolves arguments."""
    saved = dict(os.environ)
    os.environ["SGLANG_PLATFORM"] = "sts_cpu"
    for name in ("SGLANG_IS_IN_CI", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """launch(**arguments) -> resolved arguments of tiny models, as the plugin checks them."""

    def model(name: str, config: dict) -> str:
        # A new path each time: SGLang caches configurations by path.
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    def start(target=LLAMA, draft=LLAMA, config=None, **arguments) -> Resolved:
        defaults = {
            "attention_backend": "sts",
            "speculative_algorithm": "STANDALONE",
            "speculative_draft_model_path": model("draft", draft),
            "device": "cpu",
            "dtype": "float32",
            "disable_cuda_graph": True,
        }
        given = {"model_path": model("target", target), **defaults, **arguments}
        return launched(monkeypatch, config, **given)

    return start


@pytest.fixture
def head_map(tmp_path):
    """head_map(head_dim) -> path of a map of the target alone with directions in so many dimensions."""

    def write(head_dim: int) -> str:
        path = tmp_path / f"{head_dim}.json"
        path.write_text(json.dumps(directions.of_target(HeadCounts(2, 4, 2), head_dim)))
        return str(path)

    return write


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every option of SGLang's command line."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {option for action in parser._actions for option in action.option_strings}


def check_message(caught, flags: set[str], subject: str, remedy: str) -> None:
    """One line, `subject` first, `remedy` after the last semicolon, and only flags that exist."""
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(subject), message
    assert remedy in message.rpartition("; ")[2], message
    assert set(re.findall(r"--[a-z][a-z0-9-]*", message)) <= flags, message


@pytest.mark.parametrize("field", BACKEND_FIELDS)
def test_any_of_the_four_flags_asks_for_sts(field):
    args = SimpleNamespace(**dict.fromkeys(BACKEND_FIELDS))
    assert not validate.asks_for_sts(args)
    setattr(args, field, "fa3")
    assert not validate.asks_for_sts(args)
    setattr(args, field, "sts")
    assert validate.asks_for_sts(args)


# A launch without a draft.
ALONE = {"speculative_algorithm": None, "speculative_draft_model_path": None}
SERVED = {
    "standalone": {},
    "alone": ALONE,
    "two ranks": {"tp_size": 2},
    "more ranks than KV heads": {"tp_size": 4},
    "alone, pages of 64": {**ALONE, "page_size": 64},
    "alone, all flags": {**ALONE, **dict.fromkeys(BACKEND_FIELDS[:3], "sts")},
    "alone, hidden states": {**ALONE, "enable_return_hidden_states": True},
    "alone, logit processors": {**ALONE, "enable_custom_logit_processor": True},
    "alone, another selector": {**ALONE, "config": StsConfig(selector="quest")},
    "alone, torch kernels": {**ALONE, "config": StsConfig(kernel="torch", dense_layers=(1,))},
    "lower case": {"speculative_algorithm": "standalone"},
    "chain": CHAIN,
    "tree": TREE,
    "deepest tree": {**TREE, "speculative_num_draft_tokens": 37},
    "one step": {"speculative_num_steps": 1, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 2},
    "pages": {"page_size": 16},
    "pages, lower case": {"page_size": 16, "speculative_algorithm": "standalone"},
    "pages, chain": {"page_size": 16, **CHAIN},
    "page size 1, tree": {"page_size": 1, **TREE},
    "eagle": {"speculative_algorithm": "EAGLE", "draft": EAGLE},
    "nextn": {"speculative_algorithm": "NEXTN", "draft": EAGLE},
    "eagle, pages": {"speculative_algorithm": "EAGLE", "draft": EAGLE, "page_size": 16, **CHAIN},
    "eagle3": {"speculative_algorithm": "EAGLE3", "draft": EAGLE3},
    "eagle3 narrower than its target": {
        "speculative_algorithm": "EAGLE3",
        "draft": {**EAGLE3, "hidden_size": 32, "target_hidden_size": 64},
    },
    "mistral": {"target": MISTRAL, "draft": MISTRAL},
    "qwen2": {"target": QWEN2, "draft": QWEN2},
    "qwen2, window off": {"target": {**QWEN2, "use_sliding_window": False, "sliding_window": 128}},
    "llama, window off": {"target": {**LLAMA, "use_sliding_window": False, "sliding_window": 128}},
    "qwen3": {"target": QWEN3, "draft": QWEN3},
    "hidden states": {"speculative_algorithm": "EAGLE", "draft": EAGLE, "enable_return_hidden_states": True},
    "all flags": dict.fromkeys(BACKEND_FIELDS, "sts"),
    "bfloat16": {"kv_cache_dtype": "bfloat16", "dtype": "bfloat16"},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "shorter context": {"draft": {**LLAMA, "max_position_embeddings": 512}, "context_length": 512},
    "verify mode": {"speculative_attention_mode": "decode"},
    "hierarchical cache": {"enable_hierarchical_cache": True},
    "no radix cache": {"disable_radix_cache": True},
    "dense layer": {"config": StsConfig(dense_layers=(1,))},
    "torch kernels": {"config": StsConfig(kernel="torch")},
}


@pytest.mark.parametrize("arguments", SERVED.values(), ids=SERVED)
def test_served(launch, arguments):
    assert launch(**arguments).attention_backend == "sts"


def test_what_selects_is_settled_at_launch(launch, head_map):
    """And handed to the schedulers."""
    tokens = {"head_map": head_map(LLAMA["head_dim"])}
    few = {"policy": "fixed", "budget": 100}  # fewer than a list of pages has
    for given, config, selector in (
        ({}, {}, "draft"),
        (ALONE, {}, "pages"),
        (ALONE, tokens, "tokens"),
        (ALONE, {**tokens, **few}, "tokens"),
        (ALONE, {**tokens, "selector": "pages"}, "pages"),
    ):
        served = validate.check_all(launch(**given), StsConfig(**config))
        assert served.selector == selector and StsConfig.parse(served.to_json()) == served
    with pytest.raises(ConfigError, match=r"sts_config\.budget: got 100 with policy 'fixed'.*whole pages"):
        launch(config=StsConfig(**few), **ALONE)


def test_tokens_are_selected_only_on_directions_of_these_heads(launch, head_map):
    """Said by the launcher, in one line."""
    tokens = StsConfig(selector="tokens")
    for given in ({}, ALONE, {**ALONE, "tp_size": 2}):
        with pytest.raises(ConfigError, match=r"^sts_config\.selector: got 'tokens' with .* no directions"):
            launch(config=tokens, **given)
    other = StsConfig(head_map=head_map(2 * LLAMA["head_dim"]))
    with pytest.raises(ConfigError, match=r"^sts_config\.head_map: directions in 32 dimensions, .* have 16"):
        launch(config=other, **ALONE)
    launch(config=replace(other, selector="pages"), **ALONE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("selector", "draft"),
        ("selector", "joined"),
        ("policy", "top_p"),
        ("history", "warm"),
        ("history", "blend"),
        ("draft", "extend"),
        ("draft", "steps"),
        ("draft", "all"),
    ],
)
def test_what_needs_a_draft_is_refused_without_one(launch, field, value):
    config = StsConfig(**{field: value})
    launch(config=config, **CHAIN)
    with pytest.raises(
        ConfigError, match=f"sts_config.{field}: got '{value}' without --speculative-algorithm"
    ):
        launch(config=config, **ALONE)


def test_a_launch_hands_the_hash_of_its_head_map_along(launch, fresh_process, monkeypatch, tmp_path):
    shape = {"layers": 2, "q_heads": 4, "kv_heads": 2}
    head_map = {"version": 1, "shift": 1, "tp": 1, "target": shape, "draft": shape}
    text = json.dumps({**head_map, "sources": [[[[0, 0]], [[1, 1]]]] * 2})
    path = tmp_path / "map.json"
    path.write_text(text)
    args = launch()
    os.environ["STS_CONFIG"] = json.dumps({"head_map": str(path)})
    # These are resolved already.
    monkeypatch.setattr(hooks, "check_raw", lambda args: None)
    for _ in range(2):  # a second engine of the same process may have the same configuration
        hooks.resolve_args(lambda args: None, args)
        handed = StsConfig.of_launch()
        assert handed.head_map_sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def fresh_process(monkeypatch):
    """Hooks in place, and nothing launched yet."""
    monkeypatch.setattr(compat, "unhooked", list)
    for name, value in (("config", None), ("served", None), ("user_env", hooks.UNSET), ("given", None)):
        monkeypatch.setattr(hooks._Launch, name, value)
    for name in ("STS_CONFIG", handover.MARK):
        os.environ.pop(name, None)


def test_arguments_that_were_built_before_the_hooks_are_checked_when_launched(launch, fresh_process):
    args = launch()
    hooks.check_args(args)
    assert hooks._Launch.config == StsConfig() and handover.fits(args)
    hooks.scheduler_init(None, args)
    args.page_size, args.speculative_eagle_topk = 16, 4  # changed by the caller since
    assert not handover.fits(args)
    with pytest.raises(Refusal, match=r"^--page-size 16: "):
        hooks.check_args(args)


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        ('{"keep": 2}', {}, r"^sts_config\.keep: got 2; .*read from the environment"),
        ("{}", {"enable_custom_logit_processor": True}, "^--enable-custom-logit-processor: "),
        ('{"dense_layers": [9]}', {}, r"^sts_config\.dense_layers: "),
    ],
)
def test_what_they_ask_for_is_refused_like_a_command_line(launch, fresh_process, config, arguments, message):
    args = launch()
    for field, value in arguments.items():
        setattr(args, field, value)
    os.environ["STS_CONFIG"] = config
    with pytest.raises(ValueError, match=message):
        hooks.check_args(args)
    assert hooks._Launch.config is None and handover.MARK not in os.environ


def test_arguments_that_were_checked_in_another_process_are_checked_again(launch, fresh_process, monkeypatch):
    """They come with the environment of that process; without our own checks no request would be."""
    args = launch()
    hooks.check_args(args)
    monkeypatch.setattr(hooks._Launch, "config", None)
    monkeypatch.setattr(hooks._Launch, "user_env", hooks.UNSET)
    hooks.check_args(args)
    assert hooks._Launch.config is not None


@pytest.mark.parametrize(
    "left", [{}, {"STS_CONFIG": '{"keep": 0.5}'}, {"STS_CONFIG": "{}", "STS_CHECKED": "0"}]
)
def test_a_scheduler_whose_launch_was_not_checked_ends_in_one_line(launch, fresh_process, left):
    args = launch()
    os.environ.update(left)
    with pytest.raises(SystemExit) as ended:
        hooks.scheduler_init(None, args)
    assert "was not checked" in ended.value.code and "\n" not in ended.value.code
    stock = launch()
    stock.attention_backend = "torch_native"
    for field in BACKEND_FIELDS:
        setattr(stock, field, None)
    hooks.check_args(stock)
    hooks.scheduler_init(None, stock)


def test_a_configuration_that_no_launch_left_is_one_line(fresh_process):
    with pytest.raises(ConfigError, match=r"^STS_CONFIG: not set"):
        StsConfig.of_launch()


# One bad value for every rule: a rule without a row fails the test below.
BAD_VALUES = {
    "tp_size": 3,
    "pp_size": 2,
    "dp_size": 2,
    "ep_size": 2,
    "nnodes": 2,
    "attn_cp_size": 2,
    "moe_dp_size": 2,
    "dcp_size": 2,
    "attn_dp_size": 2,
    "enable_kv_cache_sharding": True,
    "enable_prefill_cp": True,
    "enable_prefill_context_parallel": True,
    "enable_dsa_prefill_context_parallel": True,
    "enable_dp_attention": True,
    "enable_two_batch_overlap": True,
    "enable_pdmux": True,
    "disaggregation_mode": "decode",
    "decoupled_spec_role": "verifier",
    "disaggregation_decode_retraction_backup": "host_pool",
    "kv_cache_dtype": "fp8_e5m2",
    "speculative_draft_kv_cache_dtype": "fp8_e5m2",
    "quantization_param_path": "scales.json",
    "enable_unified_memory": True,
    "enable_page_major_kv_layout": True,
    "enable_hisparse": True,
    "enable_lmcache": True,
    "enable_flexkv": True,
    "hicache_storage_backend": "file",
    "hicache_host_memory_mode": "buffer_only",
    "enable_unified_cache_external_linker": True,
    "radix_cache_backend": "flexkv",
    "enable_deterministic_inference": True,
    "rl_on_policy_target": "fsdp",
    "speculative_adaptive": True,
    "enable_multi_layer_eagle": True,
    "speculative_draft_window_size": 512,
    "is_embedding": True,
    "dllm_algorithm": "LowConfidence",
    "enable_custom_logit_processor": True,
    "enable_mis": True,
    "enable_mixed_chunk": True,
    "enable_memory_saver": True,
    "checkpoint_engine_wait_weights_before_ready": True,
    "enable_streaming_session": True,
    "smg_grpc_mode": True,
    "grpc_mode": True,
    "enable_nvidia_megakernel": True,
    "enable_amd_monokernel": True,
    "enable_watermark": True,
    "enable_return_aux_hidden_states": True,
    "encoder_only": True,
    "model_impl": "transformers",
    "use_ray": True,
    "tokenizer_worker_num": 2,
}
REMEDIES = {
    "tp_size": "use --tp-size 1, 2, 4 or 8",
    "disaggregation_decode_retraction_backup": (
        "remove --disaggregation-decode-retraction-backup or use --disaggregation-decode-retraction-backup "
        "cpu_tensor"
    ),
    "speculative_draft_kv_cache_dtype": (
        "remove --speculative-draft-kv-cache-dtype or use --speculative-draft-kv-cache-dtype auto, bf16, "
        "bfloat16 or fp8_e4m3"
    ),
    "disaggregation_mode": "use --disaggregation-mode null",
    "decoupled_spec_role": "use --decoupled-spec-role null",
    "kv_cache_dtype": "use --kv-cache-dtype auto, bf16, bfloat16 or fp8_e4m3",
    "hicache_host_memory_mode": "use --hicache-host-memory-mode cache",
    "model_impl": "use --model-impl auto or sglang",
}


RULED = [
    pytest.param(rule.field, {} if drafted else ALONE, id=rule.field if drafted else f"{rule.field}, alone")
    for rule in validate._RULES
    for drafted in (True, False)
    if rule.drafted in (None, drafted) and (drafted or not rule.field.startswith("speculative_"))
]


def test_every_rule_has_a_bad_value():
    assert set(BAD_VALUES) == {rule.field for rule in validate._ALL_RULES}


def test_a_rule_is_left_out_only_where_sglang_has_no_such_flag():
    """What the release's table forgets would be served."""
    fields = set(ServerArgs.__annotations__)
    ruled = {rule.field for rule in validate._RULES}
    assert ruled == {rule.field for rule in validate._ALL_RULES} & fields
    read = {field for module in RELEASES.values() for field in module.SERVER_ARGS_READ}
    assert {rule.field for rule in validate._ALL_RULES} <= read


def remedy_of(field: str) -> str:
    flag = f"--{field.replace('_', '-')}"
    number = isinstance(BAD_VALUES[field], int) and field.endswith(("_size", "_num", "nnodes"))
    window = field == "speculative_draft_window_size"
    return REMEDIES.get(field) or (f"use {flag} 1" if number and not window else f"remove {flag}")


@pytest.mark.parametrize(("field", "given"), RULED)
def test_rule_refuses_before_sglang_acts(launch, flags, field, given):
    with pytest.raises(Refusal) as caught:
        launch(**given, **{field: BAD_VALUES[field]})
    check_message(caught, flags, f"--{field.replace('_', '-')}", remedy_of(field))


@pytest.mark.parametrize(("field", "given"), RULED)
def test_rule_refuses_what_sglang_turns_on(launch, flags, field, given):
    args = launch(**given)
    setattr(args, field, BAD_VALUES[field])
    with pytest.raises(Refusal) as caught:
        validate.check_resolved(args)
    check_message(caught, flags, f"--{field.replace('_', '-')}", remedy_of(field))
    assert "use another model" in str(caught.value)


@pytest.mark.parametrize("ranks", [5, 16, 0, -1])
def test_so_many_ranks_are_refused_with_all_that_are_served(launch, flags, ranks):
    with pytest.raises(Refusal) as caught:
        launch(tp_size=ranks)
    check_message(caught, flags, f"--tp-size {ranks}: not served", "use --tp-size 1, 2, 4 or 8")


@pytest.mark.parametrize("dtype", ["mxfp8", "nvfp4", "fp4_mx_block16", "fp4_e2m1"])
def test_kv_of_other_codes_is_refused(launch, flags, dtype):
    with pytest.raises(Refusal) as caught:
        launch(kv_cache_dtype=dtype)
    check_message(caught, flags, f"--kv-cache-dtype {dtype}", "use --kv-cache-dtype auto")


NO_TREE = "--speculative-eagle-topk 1"
REFUSED = {
    "prefill elsewhere": (
        {"prefill_attention_backend": "fa3"},
        "--prefill-attention-backend fa3",
        "set it to sts or remove it",
    ),
    "decode elsewhere": (
        {"decode_attention_backend": "triton"},
        "--decode-attention-backend triton",
        "remove it",
    ),
    "draft elsewhere": (
        {"speculative_draft_attention_backend": "flashinfer"},
        "--speculative-draft-attention-backend flashinfer",
        "set it to sts or remove it",
    ),
    "target elsewhere": (
        {"attention_backend": "fa3", "decode_attention_backend": "sts"},
        "--attention-backend fa3",
        "set it to sts",
    ),
    "decode alone": (
        {"attention_backend": None, "decode_attention_backend": "sts"},
        "--decode-attention-backend sts",
        "add --attention-backend sts",
    ),
    "draft alone": (
        {"attention_backend": None, "speculative_draft_attention_backend": "sts"},
        "--speculative-draft-attention-backend sts",
        "add --attention-backend sts",
    ),
    "a draft without speculation": (
        {"speculative_algorithm": None},
        "--speculative-draft-model-path",
        "remove it or add --speculative-algorithm STANDALONE or EAGLE or EAGLE3",
    ),
    "steps without speculation": (
        {**ALONE, **CHAIN},
        "--speculative-eagle-topk 1",
        "remove it or add --speculative-algorithm",
    ),
    **{
        name: (
            {"speculative_algorithm": name},
            f"--speculative-algorithm {name}",
            "use STANDALONE, EAGLE, EAGLE3 or use another --attention-backend",
        )
        for name in ("NGRAM", "DFLASH", "DSPARK", "dflash", "FROZEN_KV_MTP", "MINE")
    },
    "no draft": (
        {"speculative_draft_model_path": None},
        "--speculative-algorithm STANDALONE",
        "add --speculative-draft-model-path",
    ),
    "steps alone": ({"speculative_num_steps": 3}, "--speculative-eagle-topk None", CHAIN_FLAGS),
    "topk alone": ({"speculative_eagle_topk": 1}, "--speculative-num-steps None", CHAIN_FLAGS),
    "no step": (
        {**CHAIN, "speculative_num_steps": 0},
        "--speculative-num-steps 0",
        CHAIN_FLAGS,
    ),
    "no branch": (
        {**CHAIN, "speculative_eagle_topk": 0},
        "--speculative-eagle-topk 0",
        CHAIN_FLAGS,
    ),
    "no draft token": (
        {**CHAIN, "speculative_num_draft_tokens": 1},
        "--speculative-num-draft-tokens 1",
        CHAIN_FLAGS,
    ),
    "more tokens than the tree has": (
        {**TREE, "speculative_num_draft_tokens": 38},
        "--speculative-num-draft-tokens 38",
        "use --speculative-num-draft-tokens 37 or less",
    ),
    "pages, eagle's own choice": (
        {"page_size": 16, "speculative_algorithm": "EAGLE", "draft": EAGLE},
        "--page-size 16",
        NO_TREE,
    ),
    "pages, nextn's own choice": (
        {"page_size": 64, "speculative_algorithm": "nextn", "draft": EAGLE},
        "--page-size 64",
        NO_TREE,
    ),
    "pages, tree": ({"page_size": 16, **TREE}, "--page-size 16", f"use {NO_TREE} or --page-size 1"),
    **(
        {
            "draft kv of another dtype": (
                {"speculative_draft_kv_cache_dtype": "bf16"},
                "--speculative-draft-kv-cache-dtype bf16: --speculative-draft-model-path runs in",
                "use --speculative-draft-kv-cache-dtype auto or --dtype bfloat16",
            )
        }
        if "speculative_draft_kv_cache_dtype" in {rule.field for rule in validate._RULES}
        else {}
    ),
    "kv of another dtype": (
        {"kv_cache_dtype": "bf16"},
        "--kv-cache-dtype bf16: --model-path runs in torch.float32",
        "use --kv-cache-dtype auto or --dtype bfloat16",
    ),
    "hidden states, dropped": (
        {"enable_return_hidden_states": True},
        "--enable-return-hidden-states: with --speculative-algorithm STANDALONE",
        "remove --enable-return-hidden-states",
    ),
    "hidden states of other layers": (
        {"enable_return_hidden_states": True, "speculative_algorithm": "EAGLE3", "draft": EAGLE3},
        "--enable-return-hidden-states: with --speculative-algorithm EAGLE3",
        "remove --enable-return-hidden-states",
    ),
    "token map": (
        {"speculative_token_map": "map.pt"},
        "--speculative-token-map",
        "remove --speculative-token-map",
    ),
    "heads that ranks cannot share": (
        {"tp_size": 8, "target": {**LLAMA, "num_attention_heads": 6, "hidden_size": 96}},
        "--tp-size 8",
        "use --tp-size 1 or 2",
    ),
    "a draft whose heads ranks cannot share": (
        {"tp_size": 4, "draft": {**LLAMA, "hidden_size": 96, "num_attention_heads": 6}},
        "--tp-size 4: --speculative-draft-model-path has 6 query and 2 KV heads",
        "use --tp-size 1 or 2",
    ),
    "heads of a target, whose draft's fewer ranks can share": (
        {"tp_size": 8, "draft": {**LLAMA, "hidden_size": 96, "num_attention_heads": 6}},
        "--tp-size 8: --model-path has 4 query and 2 KV heads",
        "use --tp-size 1 or 2",
    ),
    "torch.compile": ({"enable_torch_compile": True}, "--enable-torch-compile", "remove it"),
}


@pytest.mark.parametrize(("arguments", "subject", "remedy"), REFUSED.values(), ids=REFUSED)
def test_refused(launch, flags, arguments, subject, remedy):
    with pytest.raises(Refusal) as caught:
        launch(**arguments)
    check_message(caught, flags, subject, remedy)


def test_llama_with_eagle_and_no_steps_is_the_tree_that_pages_refuse(launch):
    args = launch(speculative_algorithm="EAGLE", draft=EAGLE)
    chosen = (
        args.speculative_num_steps,
        args.speculative_eagle_topk,
        args.speculative_num_draft_tokens,
    )
    assert chosen == (5, 4, 8)
    args.page_size = 16
    with pytest.raises(Refusal, match=f"^--page-size 16: .*topk 4; use {NO_TREE}"):
        validate.check_resolved(args)


def test_a_variable_is_left_out_only_where_sglang_has_none() -> None:
    from sglang.srt.environ import envs

    assert set(validate._ENVIRONMENT) == {name for name in validate._ALL_ENVIRONMENT if hasattr(envs, name)}


@pytest.mark.parametrize("name", validate._ENVIRONMENT)
def test_environment_variable_is_refused(launch, flags, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    launch()
    monkeypatch.setenv(name, "true")
    with pytest.raises(Refusal) as caught:
        launch()
    check_message(caught, flags, name, f"unset the environment variable {name}")


ANOTHER_MODEL = "or use another --attention-backend"
UNSERVED_ARCHITECTURES = {
    "latent attention": "DeepseekV3ForCausalLM",
    "attention sinks": "GptOssForCausalLM",
    "soft caps": "Gemma2ForCausalLM",
    "windows by layer": "Cohere2ForCausalLM",
    "local attention": "Llama4ForCausalLM",
    "encoder-decoder": "WhisperForConditionalGeneration",
    "cross attention": "MllamaForConditionalGeneration",
    "multimodal": "Qwen2VLForConditionalGeneration",
    "hybrid": "Qwen3NextForCausalLM",
    "mamba": "FalconH1ForCausalLM",
    "not seen running": "SolarForCausalLM",
    "another library's": "TransformersForCausalLM",
    "multi-layer EAGLE": "MiMoV2ForCausalLM",
    "embedding": "LlamaEmbeddingModel",
    "reward": "LlamaForSequenceClassification",
    "diffusion": "LLaDA2MoeModelLM",
    "an EAGLE head": "LlamaForCausalLMEagle",
    "unknown": "NoSuchModel",
}


@pytest.mark.parametrize("architecture", UNSERVED_ARCHITECTURES.values(), ids=UNSERVED_ARCHITECTURES)
def test_other_targets_are_refused(launch, flags, architecture):
    for listed in ([architecture], ["LlamaForCausalLM", architecture]):
        with pytest.raises(Refusal) as caught:
            launch(target={**LLAMA, "architectures": listed})
        check_message(caught, flags, "--model-path", ANOTHER_MODEL)
        assert architecture in str(caught.value) and "Qwen3ForCausalLM" in str(caught.value)


def test_architecture_is_refused_before_sglang_acts_on_it(launch):
    # SGLang's own assertion on GPT-OSS, later in ServerArgs, knows nothing of the flags of `sts`.
    architecture = {"architectures": ["GptOssForCausalLM"]}
    with pytest.raises(Refusal, match="GptOssForCausalLM"):
        launch(target={**LLAMA, **architecture})
    with pytest.raises(Refusal, match="GptOssForCausalLM"):
        launch(json_model_override_args=json.dumps(architecture))


WINDOW = ["full_attention", "sliding_attention"]
SPECIAL_FIELDS = {
    "mistral window": ({**MISTRAL, "sliding_window": 128}, "sliding_window = 128"),
    "mistral default": (
        {k: v for k, v in {**MISTRAL, "max_position_embeddings": 8192}.items() if k != "sliding_window"},
        "sliding_window = 4096",
    ),
    "qwen2 window": (
        {**QWEN2, "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
        "layer_types with 'sliding_attention'",
    ),
    "llama window": ({**LLAMA, "sliding_window": 128}, "sliding_window = 128"),
    "window size": ({**LLAMA, "sliding_window_size": 128}, "sliding_window_size = 128"),
    "bare window size": ({**LLAMA, "window_size": 128}, "window_size = 128"),
    "layers": ({**LLAMA, "layer_types": WINDOW, "use_sliding_window": False}, "layer_types with 'sliding"),
    "soft cap": ({**LLAMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    "soft cap, other name": ({**LLAMA, "attn_logit_softcap": 30.0}, "attn_logit_softcap = 30.0"),
    "chunks": ({**LLAMA, "attention_chunk_size": 512}, "attention_chunk_size = 512"),
    "dual chunks": (
        {**QWEN2, "dual_chunk_attention_config": {"chunk_size": 8192}},
        "dual_chunk_attention_config = ",
    ),
    "sinks": ({**LLAMA, "add_full_attention_sink_bias": True}, "add_full_attention_sink_bias = True"),
    "sinks under windows": (
        {**LLAMA, "add_swa_attention_sink_bias": True},
        "add_swa_attention_sink_bias = True",
    ),
    "alibi": ({**LLAMA, "alibi": True}, "alibi = True"),
    "wide values": ({**LLAMA, "v_head_dim": 32}, "head_dim = 16 but v_head_dim = 32"),
    "odd groups": ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads = 4, no multiple"),
    "3D positions": (
        {**LLAMA, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "multimodal inputs or positions",
    ),
}


@pytest.mark.parametrize(("model", "problem"), SPECIAL_FIELDS.values(), ids=SPECIAL_FIELDS)
def test_special_attention_is_refused(launch, flags, model, problem):
    roles = {"target": "--model-path", "draft": "--speculative-draft-model-path"}
    for role, flag in roles.items():
        with pytest.raises(Refusal) as caught:
            launch(**{role: model})
        check_message(caught, flags, flag, ANOTHER_MODEL)
        assert problem in str(caught.value)


UNFIT_DRAFTS = {
    "head without EAGLE": ("STANDALONE", EAGLE, "LlamaForCausalLMEagle", ANOTHER_MODEL),
    "EAGLE without head": ("EAGLE", LLAMA, "LlamaForCausalLM", ANOTHER_MODEL),
    "EAGLE with EAGLE3": ("EAGLE", EAGLE3, "LlamaForCausalLMEagle3", ANOTHER_MODEL),
    "EAGLE3 with EAGLE": ("EAGLE3", EAGLE, "LlamaForCausalLMEagle", ANOTHER_MODEL),
    "MTP": (
        "EAGLE",
        {**LLAMA, "architectures": ["MiMoForCausalLM"]},
        "MiMoMTP, a layer of another kind of model",
        "give the target's own path",
    ),
    "MTP that is not served": (
        "EAGLE",
        {**LLAMA, "architectures": ["Step3p5ForCausalLM"]},
        "Step3p5MTP",
        ANOTHER_MODEL,
    ),
    "other vocabulary": (
        "STANDALONE",
        {**LLAMA, "vocab_size": 255},
        "vocab_size 255, the target has 256",
        "give a draft trained for this target",
    ),
    "other width": (
        "EAGLE",
        {**EAGLE, "hidden_size": 32},
        "hidden_size 32, the target has 64",
        "give a draft trained for this target",
    ),
    "other target": (
        "EAGLE3",
        {**EAGLE3, "target_hidden_size": 128},
        "hidden_size 128, the target has 64",
        "give a draft trained for this target",
    ),
    "short context": (
        "STANDALONE",
        {**LLAMA, "max_position_embeddings": 512},
        "context of 4096",
        "a smaller --context-length",
    ),
}


@pytest.mark.parametrize(("algorithm", "draft", "problem", "remedy"), UNFIT_DRAFTS.values(), ids=UNFIT_DRAFTS)
def test_unfit_draft_is_refused(launch, flags, algorithm, draft, problem, remedy):
    with pytest.raises(Refusal) as caught:
        launch(speculative_algorithm=algorithm, draft=draft)
    check_message(caught, flags, "--speculative-draft-model-path", remedy)
    assert problem in str(caught.value)


# Changes of config.json that SGLang and transformers end on in a traceback, and what is said instead.
UNREAD = {
    "heads that do not divide": ({"num_attention_heads": 3, "hidden_size": 128}, "is not a multiple"),
    "unknown type": ({"model_type": "foo"}, "model type `foo`"),
    "no architectures": ({"architectures": None}, "config.json: architectures: got None"),
    "an unknown method": (
        {"quantization_config": {"quant_method": "junk"}},
        "config.json: quantization_config.quant_method: got 'junk'",
    ),
    "no method": (
        {"quantization_config": {"bits": 4}},
        "config.json: quantization_config.quant_method: there is none",
    ),
    "a number for a method": (
        {"quantization_config": {"quant_method": 5}},
        "config.json: quantization_config.quant_method: got 5",
    ),
}


@pytest.mark.parametrize("model", ["target", "draft"])
@pytest.mark.parametrize(("changes", "problem"), UNREAD.values(), ids=UNREAD)
def test_a_configuration_that_cannot_be_read_is_refused(launch, flags, model, changes, problem):
    plain = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    with pytest.raises(Refusal) as caught:
        launch(**{model: plain | changes})
    flag = "--model-path" if model == "target" else "--speculative-draft-model-path"
    check_message(caught, flags, f"{flag} /", "give a ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/model", "."])
def test_a_draft_that_is_not_there_is_refused(launch, flags, tmp_path, path):
    path = str(tmp_path) if path == "." else path
    with pytest.raises(Refusal) as caught:
        launch(speculative_draft_model_path=path)
    subject = f"--speculative-draft-model-path {path}: its configuration cannot be read"
    check_message(caught, flags, subject, "give a folder or hub name")


def test_what_an_override_makes_whole_is_served(launch):
    """As SGLang takes it: of target and draft."""
    override = json.dumps({"architectures": LLAMA["architectures"]})
    bare = {**LLAMA, "architectures": None}
    launch(target=bare, draft=bare, json_model_override_args=override)


def test_a_method_may_be_named_as_sglang_finds_it():
    """By a flag, by what ModelOpt calls it, or by what a method sees in the rest."""

    def check(asked=None, **given):
        config = SimpleNamespace(architectures=["LlamaForCausalLM"], quantization_config=given)
        validate._check_named("--model-path", "M", config, asked)

    for method in QUANTIZATION_METHODS:
        check(quant_method=method)
        check(quant_method=method.upper())
    check(quant_algo="FP8")
    check("awq", bits=4)
    check("humming", quant_method="other")
    check("w8a8_fp8", quant_method="compressed_tensors")
    with pytest.raises(Refusal, match=r"quant_method: got 'other'"):
        check("awq", quant_method="other")


def test_quantized_weights_are_served_in_what_their_method_says(flags):
    def check(name, dtype):
        model = SimpleNamespace(quantization=name, dtype=dtype, model_path="M")
        for models in ((model, None), (SimpleNamespace(quantization=None), model)):
            validate._check_quantized_dtype(*models)

    for name in QUANTIZATION_METHODS:  # every one answers
        with contextlib.suppress(Refusal):
            check(name, torch.bfloat16)
    for name, dtype in (("fp8", torch.bfloat16), ("fp8", torch.float16), (None, torch.float32)):
        check(name, dtype)
    for name in ("fp8", "awq"):
        with pytest.raises(Refusal) as caught:
            check(name, torch.float32)
        subject = f"--dtype float32: --model-path M is quantized by {name}"
        check_message(caught, flags, subject, "use --dtype ")


def test_draft_lists_cover_the_served_algorithms():
    assert tuple(DRAFTS) == validate.ALGORITHMS


def test_what_sglang_changes_is_refused(launch, flags):
    args = launch()
    args.attention_backend = "dual_chunk_flash_attn"
    with pytest.raises(Refusal) as caught:
        validate.check_resolved(args)
    check_message(
        caught, flags, "--attention-backend: SGLang made it dual_chunk", "give --model-path another model"
    )
    args = launch()
    args.speculative_algorithm = "FROZEN_KV_MTP"
    with pytest.raises(Refusal) as caught:
        validate.check_resolved(args)
    check_message(
        caught, flags, "--speculative-algorithm", "give --speculative-draft-model-path another model"
    )
    args = launch()
    args.speculative_draft_attention_backend = "flashinfer"
    with pytest.raises(Refusal) as caught:
        validate.check_resolved(args)
    check_message(
        caught, flags, "--speculative-draft-attention-backend flashinfer", "set it to sts or remove it"
    )


def test_a_checkpoint_that_may_bring_fp8_kv_needs_an_explicit_dtype(flags):
    def model(quantization=None, **config):
        hf_config = SimpleNamespace(**({"quantization_config": config} if config else {}))
        return SimpleNamespace(quantization=quantization, dtype=torch.bfloat16, hf_config=hf_config)

    plain, modelopt = model(), model("modelopt_fp8")
    packed = model("compressed-tensors", kv_cache_scheme={"num_bits": 8, "type": "float"})
    fp8 = model("fp8", quant_method="fp8", kv_cache_quant_algo="FP8")
    args = SimpleNamespace(kv_cache_dtype="auto", speculative_draft_kv_cache_dtype=None, device="cuda")
    config = StsConfig()
    validate._check_kv_dtype(args, config, plain, model("fp8", quant_method="fp8", kv_cache_scheme=None))
    for models in ((modelopt, plain), (plain, modelopt), (packed, plain), (fp8, plain)):
        with pytest.raises(Refusal) as caught:
            validate._check_kv_dtype(args, config, *models)
        remedy = "use --kv-cache-dtype fp8_e4m3 or --kv-cache-dtype bfloat16"
        check_message(caught, flags, "--kv-cache-dtype auto", remedy)
    for args.kv_cache_dtype in ("bfloat16", "fp8_e4m3"):
        validate._check_kv_dtype(args, config, modelopt, modelopt)
    args.kv_cache_dtype = "bfloat16"
    for kept in ("model", "fp8_e4m3"):  # which say it of the draft
        validate._check_kv_dtype(args, StsConfig(draft_kv=kept), plain, modelopt)


def test_fp8_kv_on_a_gpu_needs_a_model_in_bfloat16(flags):
    """In which SGLang's attention answers, whatever the queries were."""
    model = SimpleNamespace(quantization=None, dtype=torch.float16, hf_config=SimpleNamespace())
    args = SimpleNamespace(kv_cache_dtype="fp8_e4m3", speculative_draft_kv_cache_dtype=None, device="cuda")
    with pytest.raises(Refusal) as caught:
        validate._check_kv_dtype(args, StsConfig(), model, None)
    named = "--kv-cache-dtype fp8_e4m3: --model-path runs in torch.float16"
    check_message(caught, flags, named, "use --kv-cache-dtype auto or --dtype bfloat16")
    args.kv_cache_dtype = "auto"
    with pytest.raises(Refusal) as caught:
        validate._check_kv_dtype(args, StsConfig(draft_kv="fp8_e4m3"), model, model)
    named = "sts_config.draft_kv fp8_e4m3: --speculative-draft-model-path runs in torch.float16"
    check_message(caught, flags, named, "use sts_config.draft_kv auto or --dtype bfloat16")
    args.device = "cpu"
    validate._check_kv_dtype(args, StsConfig(draft_kv="fp8_e4m3"), model, model)


def test_device(launch, flags, monkeypatch):
    args, config = launch(), StsConfig()
    args.device = "xpu"
    with pytest.raises(Refusal) as caught:
        validate.check_device(args, config)
    check_message(caught, flags, "--device xpu", "use --device cpu or cuda")
    args.device = "cpu"
    monkeypatch.delenv("SGLANG_PLATFORM")
    with pytest.raises(Refusal) as caught:
        validate.check_device(args, config)
    check_message(caught, flags, "--device cpu", "set SGLANG_PLATFORM=sts_cpu")


def test_a_cpu_serves_one_rank(launch, flags, monkeypatch):
    """More of them the tests run themselves (tests/tp_on_cpu.py)."""
    args = launch(tp_size=2)
    with pytest.raises(Refusal) as caught:
        validate.check_device(args, StsConfig())
    check_message(caught, flags, "--tp-size 2: sts serves one rank on", "use --tp-size 1, or GPUs")
    args.device = "cuda"
    validate.check_device(args, StsConfig())
    args.device = "cpu"
    monkeypatch.setattr(parallel_state, "init_model_parallel_group", None)  # and back from what it becomes
    monkeypatch.setitem(validate.RANKS, "cpu", validate.RANKS["cpu"])
    runpy.run_module("tests.tp_on_cpu", run_name="imported")
    validate.check_device(args, StsConfig())


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("backend", ["disabled", "full", "breakable", "tc_piecewise"])
def test_graphs(launch, flags, phase, backend):
    args = launch()
    args.device = "cuda"
    getattr(args.cuda_graph_config, phase).backend = backend
    if backend in ("disabled", {"decode": "full", "prefill": "breakable"}[phase]):
        validate.check_device(args, StsConfig())
    else:
        with pytest.raises(Refusal) as caught:
            validate.check_device(args, StsConfig())
        check_message(
            caught, flags, f"--cuda-graph-backend-{phase} {backend}", f"use --cuda-graph-backend-{phase}"
        )
    if backend != "disabled":
        with pytest.raises(Refusal) as caught:
            validate.check_device(args, StsConfig(kernel="torch"))
        check_message(caught, flags, "CUDA graphs", "add --disable-cuda-graph")


def heads(head_dim: int, queries: int, keys: int) -> SimpleNamespace:
    """A ModelConfig of so many; of multi-query attention SGLang leaves the configuration's own number."""
    own = queries if keys == 1 else keys
    return SimpleNamespace(
        model_path="m",
        head_dim=head_dim,
        num_attention_heads=queries,
        num_key_value_heads=own,
        get_total_num_kv_heads=lambda: keys,
    )


@pytest.mark.parametrize(
    "target, draft, room, arguments, subject",
    [
        ((128, 32, 8), (64, 32, 8), 232448, {}, None),
        ((96, 32, 8), (80, 32, 8), 232448, {}, None),
        ((96, 28, 4), (64, 32, 8), 232448, {"speculative_num_draft_tokens": 128}, "--speculative-num-draft"),
        # As compiled: 237,824 bytes for 256 rows of 256, and 141,824 for a draft of 256.
        ((256, 32, 8), (64, 32, 8), 232448, {"speculative_num_draft_tokens": 64}, "--speculative-num-draft"),
        ((128, 28, 4), (64, 32, 8), 232448, {"speculative_num_draft_tokens": 128}, "--speculative-num-draft"),
        ((128, 28, 4), (64, 32, 8), None, {"speculative_num_draft_tokens": 128}, None),
        ((128, 32, 8), (256, 16, 8), 101376, {}, "--speculative-eagle-topk 1"),
        ((128, 32, 8), (256, 16, 8), 166912, {}, None),
        ((256, 32, 8), (64, 32, 8), 101376, {}, None),  # 75,008 bytes
    ],
)
def test_what_no_thread_block_can_hold_is_refused(
    launch, flags, monkeypatch, target, draft, room, arguments, subject
):
    monkeypatch.setattr(validate, "_shared_memory", lambda: room)
    args = launch()
    for field, value in arguments.items():
        setattr(args, field, value)
    models = [heads(*m) for m in (target, draft)]
    if subject is None:
        validate.check_tiles(args, StsConfig(), *models)
        return
    with pytest.raises(Refusal) as caught:
        validate.check_tiles(args, StsConfig(), *models)
    check_message(caught, flags, subject, 'set kernel to "torch" with --disable-cuda-graph')


def test_a_draft_whose_lists_no_thread_block_can_hold_may_attend_to_everything(launch, flags, monkeypatch):
    monkeypatch.setattr(validate, "_shared_memory", lambda: 101376)
    models, args = (heads(128, 32, 8), heads(128, 16, 1)), launch()
    args.speculative_num_draft_tokens = 9
    validate.check_tiles(args, StsConfig(draft="dense"), *models)
    with pytest.raises(Refusal) as caught:
        validate.check_tiles(args, StsConfig(draft="all"), *models)
    check_message(caught, flags, "--speculative-num-draft-tokens 9", 'set draft to "dense", or set kernel')


def test_rows_that_page_scores_cannot_hold_are_refused_with_them(launch, flags, monkeypatch):
    """270,336 bytes as compiled for 256 rows of 128, where verify needs less than half of it."""
    monkeypatch.setattr(validate, "_shared_memory", lambda: 232448)
    args = launch()
    args.speculative_num_draft_tokens = 64
    model = heads(128, 32, 8)
    validate.check_tiles(args, StsConfig(), model, model)
    for selector in ("pages", "joined"):
        with pytest.raises(Refusal) as caught:
            validate.check_tiles(args, StsConfig(selector=selector), model, model)
        check_message(caught, flags, "--speculative-num-draft", 'set kernel to "torch"')
        assert "270336 bytes" in str(caught.value)


def test_a_sparse_draft_needs_a_step_after_the_first(launch, flags):
    args = launch()
    args.speculative_num_steps = 2
    for draft in ("dense", "extend"):
        validate.check_device(args, StsConfig(draft=draft))
    with pytest.raises(Refusal) as caught:
        validate.check_device(args, StsConfig(draft="steps"))
    check_message(caught, flags, "sts_config.draft: 'steps' with --speculative-num-steps 2", CHAIN_FLAGS)
    args.speculative_num_steps = 3
    validate.check_device(args, StsConfig(draft="steps"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("field, value", [("kernel", "flashinfer"), ("kernel", "triton"), ("dense", "fa3")])
def test_kernels_of_a_device(launch, device, field, value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    args = launch()
    args.device = device
    served = {"cpu": {}, "cuda": {"kernel": ("auto", "triton", "flashinfer", "torch"), "dense": ("fa3",)}}[
        device
    ]
    if value in served.get(field, ()):
        validate.check_device(args, StsConfig(**{field: value}))
        return
    with pytest.raises(Refusal) as caught:
        validate.check_device(args, StsConfig(**{field: value}))
    allowed = "auto, torch" if device == "cpu" else "auto, triton, flashinfer, torch"
    assert str(caught.value) == (
        f"sts_config.{field}: {value!r} is not available on device {device} in this release; "
        f"allowed here: {allowed}"
    )


def test_fa3_attends_to_lists_on_cuda_alone(launch):
    args, config = launch(), StsConfig(prefill="sparse", prefill_attend="fa3")
    args.device = "cpu"
    with pytest.raises(Refusal, match="sts_config.prefill_attend: 'fa3' is not .* allowed here: auto, ops"):
        validate.check_device(args, config)
    args.device = "cuda"
    validate.check_device(args, config)


@pytest.mark.parametrize(
    "config, arguments, named",
    [
        ({"policy": "top_p"}, {}, "sts_config.policy 'top_p'"),
        ({"selector": "quest"}, {}, "sts_config.selector 'quest'"),
        ({"full_verify_every": 4}, {}, "sts_config.full_verify_every"),
        ({}, {"speculative_eagle_topk": 4}, "--speculative-eagle-topk 4"),
    ],
)
def test_what_kernel_flashinfer_cannot_plan(launch, flags, config, arguments, named):
    args = launch()
    args.device, args.cuda_graph_config.decode.backend = "cuda", "disabled"
    validate.check_device(args, StsConfig(kernel="flashinfer"))
    for field, value in arguments.items():
        setattr(args, field, value)
    validate.check_device(args, StsConfig(**config))
    with pytest.raises(Refusal) as caught:
        validate.check_device(args, StsConfig(**config, kernel="flashinfer"))
    subject = f"sts_config.kernel: 'flashinfer' does not serve {named}"
    check_message(caught, flags, subject, 'set kernel to "triton"')


@pytest.mark.parametrize(
    "preferred, subject",
    [
        ({"min_p": 0.1}, "min_p: got 0.1"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: got 0.5"),
        ({"sampling_seed": 3, "temperature": 0.5}, "sampling_seed: got 3"),
        ({"temperature": 0.5}, "temperature: got 0.5"),
        ({"custom_params": {"sts": {"keep": 7}}}, "custom_params.sts.keep: got 7"),
        ({"top_p": 2}, "top_p must be"),
        ({"no_such_parameter": 1}, ""),
    ],
)
def test_preferred_sampling_params_are_checked_like_a_request(launch, flags, preferred, subject):
    with pytest.raises(Refusal) as caught:
        launch(preferred_sampling_params=json.dumps(preferred))
    check_message(caught, flags, f"--preferred-sampling-params: {subject}", "change or remove it")


def test_preferred_sampling_params_that_a_request_may_have_are_served(launch):
    params = {"max_new_tokens": 8, "top_p": 0.9, "custom_params": {"sts": {"keep": 0.5}}}
    launch(preferred_sampling_params=json.dumps(params))
    launch(preferred_sampling_params=json.dumps({**params, "temperature": 0}))


def test_what_a_model_asks_of_every_request_is_checked_too(launch, flags, monkeypatch):
    """Qwen2.5-Instruct's generation_config.json has a penalty: a 400 for whoever does not say otherwise."""
    from sglang.srt.configs.model_config import ModelConfig

    def asks(**params):
        monkeypatch.setattr(ModelConfig, "get_default_sampling_params", lambda self: params)

    asks(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.0)
    launch()
    asks(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    with pytest.raises(Refusal) as caught:
        launch()
    subject = "--sampling-defaults model (generation_config.json): repetition_penalty: got 1.05"
    check_message(caught, flags, subject, "--sampling-defaults openai")


def test_configuration_is_checked_at_launch(launch, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(Refusal, match=r"^sts_config\.kernel: 'triton'"):
        launch(config=StsConfig(kernel="triton"))
    with pytest.raises(ConfigError, match=r"^sts_config\.dense_layers: got layer 2"):
        launch(config=StsConfig(dense_layers=(2,)))
    with pytest.raises(ConfigError, match=r"^head_map\.file: "):
        launch(config=StsConfig(head_map="no-such-map.json"))


@pytest.mark.parametrize("path", ["none", "DUMMY", "/no/such/model"])
def test_unreadable_target_is_left_to_sglang(path):
    # Its own message names the path, and its placeholders have no configuration to read.
    args = SimpleNamespace(
        model_path=path,
        trust_remote_code=False,
        revision=None,
        json_model_override_args="{}",
        model_config_parser="auto",
        decrypted_config_file=None,
    )
    assert validate._target_config(args) is None


def test_a_refusal_is_one_line():
    assert str(Refusal("a\nb\t c\u2028d")) == "a b c d"


@pytest.mark.parametrize("name", release.TREES_THAT_REMEMBER)
def test_history_needs_a_cache_that_says_what_it_loads_back(name, monkeypatch):
    hierarchical = SimpleNamespace(enable_hierarchical_cache=True, speculative_algorithm="EAGLE3")
    alone = SimpleNamespace(enable_hierarchical_cache=True, speculative_algorithm=None)
    validate.check_history(hierarchical, StsConfig(history="blend"))
    monkeypatch.setenv(name, "1")
    validate.check_history(hierarchical, StsConfig())
    validate.check_history(SimpleNamespace(enable_hierarchical_cache=False), StsConfig(history="warm"))
    for key, config in (("history", StsConfig(history="blend")), ("selector", StsConfig(selector="joined"))):
        with pytest.raises(Refusal, match=rf"^sts_config\.{key}: not served with .* {name}.* unset"):
            validate.check_history(hierarchical, config)
    with pytest.raises(Refusal, match=r"unset the variable$"):  # nothing else selects there
        validate.check_history(alone, StsConfig(selector="pages"))


@pytest.mark.parametrize("name", release.TREES_WITHOUT_KEYS)
def test_a_sparse_prefill_needs_a_cache_that_keeps_kinds_apart(name, monkeypatch):
    args = SimpleNamespace(speculative_algorithm=None)
    validate.check_prefill(args, StsConfig(prefill="sparse"))
    monkeypatch.setenv(name, "1")
    validate.check_prefill(args, StsConfig())
    with pytest.raises(Refusal, match=rf"^sts_config\.prefill: 'sparse' is not served with {name}.* unset"):
        validate.check_prefill(args, StsConfig(prefill="sparse"))


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "STANDALONE"])
def test_a_head_cannot_read_a_prompt_first(flags, algorithm):
    args = SimpleNamespace(speculative_algorithm=algorithm, enable_hierarchical_cache=False)
    validate.check_prefill(args, StsConfig(prefill="sparse", prefill_by="target"))
    if algorithm == "STANDALONE":
        validate.check_prefill(args, StsConfig(prefill="sparse", prefill_by="draft"))
        return
    with pytest.raises(Refusal) as caught:
        validate.check_prefill(args, StsConfig(prefill="sparse", prefill_by="draft"))
    check_message(
        caught,
        flags,
        f"sts_config.prefill_by: 'draft' with --speculative-algorithm {algorithm}",
        'prefill_by to "target"',
    )


def test_a_draft_does_not_read_ahead_of_the_host_cache(flags):
    args = SimpleNamespace(speculative_algorithm="STANDALONE", enable_hierarchical_cache=True)
    for config in (StsConfig(prefill="sparse"), StsConfig()):
        validate.check_prefill(args, config)
    with pytest.raises(Refusal) as caught:
        validate.check_prefill(args, StsConfig(prefill="sparse", prefill_by="draft"))
    check_message(caught, flags, "sts_config.prefill_by: 'draft'", "drop that flag")


@pytest.mark.parametrize(("dim", "fits"), [(64, True), (128, True), (256, True), (512, False)])
def test_heads_that_no_block_of_a_sparse_prefill_can_hold_are_refused(launch, flags, monkeypatch, dim, fits):
    monkeypatch.setattr(validate, "_shared_memory", lambda: 232448)
    args, model, draft = launch(), heads(dim, 8, 8), heads(64, 8, 8)
    for drafts in (draft, None):
        validate.check_tiles(args, StsConfig(), model, drafts)
        if fits:
            validate.check_tiles(args, StsConfig(prefill="sparse"), model, drafts)
            continue
        with pytest.raises(Refusal) as caught:
            validate.check_tiles(args, StsConfig(prefill="sparse"), model, drafts)
        check_message(caught, flags, "sts_config.prefill: 'sparse' with heads of 512", 'prefill to "dense"')


def test_a_draft_whose_rows_no_block_can_hold_is_refused_a_sparse_prefill(launch, flags, monkeypatch):
    """Of its own, whoever selects for the target."""
    monkeypatch.setattr(validate, "_shared_memory", lambda: 232448)
    target, draft = heads(64, 8, 8), heads(512, 8, 8)
    with pytest.raises(Refusal) as caught:
        config = StsConfig(prefill="sparse", prefill_draft="sparse")
        validate.check_tiles(launch(), config, target, draft)
    check_message(caught, flags, "sts_config.prefill_draft: 'sparse' with heads of 512", "prefill_draft to")


def test_many_heads_over_one_are_refused_a_sparse_prefill(launch, monkeypatch):
    """All of them ask in one product with a block of keys."""
    monkeypatch.setattr(validate, "_shared_memory", lambda: 232448)
    for number, fits in ((16, True), (48, False)):
        target = heads(128, number, 1)
        if fits:
            validate.check_tiles(launch(), StsConfig(prefill="sparse"), target, None)
            continue
        with pytest.raises(Refusal, match="with heads of 128, 48 to a KV head"):
            validate.check_tiles(launch(), StsConfig(prefill="sparse"), target, None)
