"""The hooks on SGLang. `patches/` holds, for each, the upstream change that would replace it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from sts_sglang import compat, dumps, platform, runtime
from sts_sglang.config import ENV, ConfigError, StsConfig, check_request, check_sampling
from sts_sglang.metrics import Exporter
from sts_sglang.validate import Refusal, asks_for_sts, check_all, check_raw

UNSET = object()


class _Launch:
    """State of the launching process, where ServerArgs are built and requests are validated."""

    config: StsConfig | None = None  # of the first `sts` launch
    user_env: Any = UNSET  # STS_CONFIG as the user left it, before we hand canonical JSON to children
    cli_config: str | None = None  # --sts-config, on its way from argparse to ServerArgs


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args: `--sts-config`."""
    parser.add_argument(
        "--sts-config",
        type=str,
        default=None,
        metavar="JSON|PATH",
        help="Configuration of --attention-backend sts: inline JSON or a JSON file, for example "
        '\'{"keep": 0.1, "budget": 1024}\'. Wins over the environment variable STS_CONFIG. '
        "`sts-sglang config --help` lists the keys.",
    )


def from_cli_args(original, cls, args: argparse.Namespace):
    """AROUND ServerArgs.from_cli_args: carry the flag over; our refusals end in one line and code 2."""
    _Launch.cli_config = getattr(args, "sts_config", None)
    try:
        return original(cls, args)
    except (ConfigError, Refusal) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        _Launch.cli_config = None


def args_init(original, self, *args, **kwargs) -> None:
    """AROUND ServerArgs.__init__: `sgl.Engine(sts_config=...)` takes a dict, JSON or a path."""
    self._sts_config = kwargs.pop("sts_config", None)
    original(self, *args, **kwargs)


def args_post_init(original, self) -> None:
    """AROUND ServerArgs.__post_init__: refuse before weights load, hand the config to the children."""
    given = self.__dict__.pop("_sts_config", None)
    given = _Launch.cli_config if given is None else given
    if not asks_for_sts(self):
        if given is not None:
            raise Refusal("--sts-config: given without --attention-backend sts; add it or drop the config")
        return original(self)
    if missing := compat.unhooked():
        raise SystemExit(f"sts_sglang: SGLang did not apply the hooks on {', '.join(missing)}; see its log")
    config = _launch_config(given)
    check_raw(self)
    original(self)
    checked = config
    if self.model_path.lower() not in ("none", "dummy"):  # SGLang's own placeholder: resolves nothing
        checked = check_all(self, config)
    _Launch.config = config
    os.environ[ENV] = checked.to_json()
    return None


def _launch_config(given: Any) -> StsConfig:
    if _Launch.user_env is UNSET:
        _Launch.user_env = os.environ.get(ENV)
    config = StsConfig.resolve(given, {ENV: _Launch.user_env} if _Launch.user_env else {})
    if _Launch.config is not None and config != _Launch.config:
        raise ConfigError(
            "sts_config: this process already launched an engine with another config; "
            "allowed: the same config, or a process of its own"
        )
    return config


def sampling_verify(result: None, self, vocab_size: int) -> None:
    """AFTER SamplingParams.verify: what a request asks of us; ValueError becomes HTTP 400."""
    if _Launch.config is not None:
        check_request(self.custom_params, _Launch.config)
        check_sampling(self, cpu=platform.selected())


def create_draft_backend(original, self, backend_name: str, backend_map: dict, error_template: str):
    """AROUND DraftBackendFactory._create_backend: `sts` joins the closed map; SGLang keeps choosing."""
    from sts_sglang.backends import dense
    from sts_sglang.backends.draft import DraftMultiStepBackend

    runner = self.draft_model_runner
    if backend_map["triton"] == self._create_triton_decode_backend:

        def build():
            return DraftMultiStepBackend(runner, self.topk, self.speculative_num_steps)
    else:

        def build():
            return dense.of_draft_extend(StsConfig.of_launch(), runner)

    return original(self, backend_name, {**backend_map, "sts": build}, error_template)


def init_attention_backends(result: None, self) -> None:
    """AFTER EAGLEWorkerV2.init_attention_backends: bind draft and target, before any capture."""
    if not asks_for_sts(self.server_args):
        return
    bound = runtime.bind(self, StsConfig.of_launch())
    self.sts_exporter = Exporter(
        bound.state.counts,
        enable_metrics=self.server_args.enable_metrics,
        interval=self.server_args.decode_log_interval,
        plans=bound.plans,
    )


def init_cuda_graphs(result: None, self) -> None:
    """AFTER EAGLEWorkerV2.init_cuda_graphs: say what serves, now that the graphs are known."""
    if (bound := runtime.current()) is not None:
        bound.graphs = runtime.check_graphs(compat.captured_graphs(self), bound.dense)
        runtime.announce(bound)


def forward_batch(self, batch, on_publish=None) -> None:
    """BEFORE EAGLEWorkerV2.forward_batch_generation: note keeps at prefill, and who is in a round."""
    if (bound := runtime.current()) is None:
        return
    if bound.state.history is not None:
        bound.state.history.forget_loaded()
    if batch.forward_mode.is_extend():
        bound.admit(batch.reqs)
    elif bound.headwise is not None:
        bound.headwise.host.note(batch.reqs)


def verify_complete(result: None, self, *args, **kwargs) -> None:
    """AFTER EAGLEWorkerV2.on_verify_complete_cpu: publish counters; results are on the CPU already."""
    if (exporter := getattr(self, "sts_exporter", None)) is not None:
        exporter.on_round()


def profile_available_bytes(result: int, self, pre_model_load_memory) -> int | None:
    """AFTER KVCacheConfigurator._profile_available_bytes: leave room for the buffers of a round."""
    if self.is_draft_worker or not asks_for_sts(self.server_args):
        return None
    config = StsConfig.of_launch()
    return result - runtime.reserved_bytes(config, self.server_args, self.model_config, result)


def internal_state(result, self, recv_req) -> None:
    """AFTER Scheduler.get_internal_state: repeat the start-up line, with counters, in /get_server_info."""
    if (bound := runtime.current()) is not None:
        result.internal_state["sts"] = bound.describe()


def hicache_load(result, self, *args, **kwargs) -> None:
    """AFTER HiCacheController.load: these slots get new occupants that no forward writes."""
    if result is not None and (bound := runtime.current()) is not None and bound.state.history is not None:
        bound.state.history.loaded(result)


def release_kv(req, tree_cache, is_insert=True) -> None:
    """BEFORE release_kv_cache: dump a finished request that asks for it, while its slots are its own."""
    bound = runtime.current()
    if bound is None or bound.config.inspect_dir is None or req.req_pool_idx is None or not req.finished():
        return
    dumps.finished(bound, req, tree_cache.req_to_token_pool.req_to_token)


def table() -> list[tuple[compat.Target, Any, str]]:
    """(target, hook, HookType name) of every hook."""
    return [
        (compat.CREATE_DRAFT_BACKEND, create_draft_backend, "AROUND"),
        (compat.INIT_ATTENTION_BACKENDS, init_attention_backends, "AFTER"),
        (compat.INIT_CUDA_GRAPHS, init_cuda_graphs, "AFTER"),
        (compat.FORWARD_BATCH, forward_batch, "BEFORE"),
        (compat.VERIFY_COMPLETE, verify_complete, "AFTER"),
        (compat.PROFILE_AVAILABLE_BYTES, profile_available_bytes, "AFTER"),
        (compat.INTERNAL_STATE, internal_state, "AFTER"),
        (compat.HICACHE_LOAD, hicache_load, "AFTER"),
        (compat.RELEASE_KV, release_kv, "BEFORE"),
        (compat.ADD_CLI_ARGS, add_cli_args, "AFTER"),
        (compat.FROM_CLI_ARGS, from_cli_args, "AROUND"),
        (compat.ARGS_INIT, args_init, "AROUND"),
        (compat.ARGS_POST_INIT, args_post_init, "AROUND"),
        (compat.SAMPLING_VERIFY, sampling_verify, "AFTER"),
    ]
