"""FP8 keys and values: through the backends, and in the server."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.layers.radix_attention import RadixAttention

from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.host import bind, refused, release_0_5_16, release_0_5_23, views
from tests import directions
from tests.forked import Forked
from tests.server import random_ids
from tests.test_backends import COUNTS, DIM, KV_HEADS, LAYERS, Q_HEADS, TOKENS, Pool, Rig
from tests.test_hicache import HICACHE
from tests.test_page_selectors import PROMPT, Request

torch.set_num_threads(1)  # the server has the other core
FP8 = ("--kv-cache-dtype", "fp8_e4m3")
CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
CHAIN += ("--speculative-num-draft-tokens", "4")


# ---- backends


@pytest.mark.parametrize(
    "config",
    [
        {"history": "blend"},
        {"policy": "ratio", "keep": 0.3, "budget": 0, "draft": "all"},
        {"policy": "ratio", "keep": 0.3, "budget": 0, "draft": "every"},
        {"dense_layers": [0]},
        {"verify": "dense"},
        *({"selector": name} for name in ("tokens", "pages", "joined", "oracle", "quest")),
    ],
    ids=str,
)
def test_a_round_over_fp8_is_one_over_what_it_means(monkeypatch, tmp_path, config: dict) -> None:
    """Scales are powers of two, by which nothing is rounded: outputs, importance and lists are the same."""
    if config.get("selector") == "tokens":
        (tmp_path / "map.json").write_text(json.dumps(directions.of_pair(COUNTS, COUNTS, DIM)))
        config = {**config, "head_map": str(tmp_path / "map.json")}
    monkeypatch.setattr(Rig, "fp8", (2**-5, 2**-3))
    found = []
    for meant in (True, False):
        monkeypatch.setattr(Rig, "meant", meant)
        torch.manual_seed(0)
        rig = Request(config)
        assert (rig.target.pools.layer(0).k.dtype == torch.float8_e4m3fn) == (not meant)
        outs = rig.draft_extend(PROMPT - TOKENS, 2, 4 * torch.randn(TOKENS, Q_HEADS * DIM))
        for length in (PROMPT - 2, PROMPT + 40):
            outs += rig.draft_extend(length - 1, 1, 4 * torch.randn(TOKENS, Q_HEADS * DIM))
            outs += rig.draft_steps(length, {i: 4 * torch.randn(1, Q_HEADS * DIM) for i in range(2)})
            outs += rig.round(length, [torch.randn(TOKENS, Q_HEADS * DIM) for _ in range(LAYERS)])
        state = rig.runtime.state
        found.append((outs, state.importance, state.totals))
    for a, b in zip(*(outs for outs, *_ in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][2], found[1][2])


class Layers(torch.nn.ModuleList):
    """Of a model whose checkpoint brought scales, and a runner of it."""

    def __init__(self, **scales):
        super().__init__([RadixAttention(Q_HEADS, DIM, 1.0, KV_HEADS, i) for i in range(2)])
        for name, value in scales.items():
            setattr(self[1], name, value)

    def runner(self, pool: Pool, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        pools = views.pools(SimpleNamespace(model=self, token_to_kv_pool=pool))
        return SimpleNamespace(dtype=dtype, pools=pools, device="cpu")


SCALES = {
    "k_scale": torch.tensor(0.5),
    "k_scale_float": 0.5,
    "v_scale": torch.tensor(0.25),
    "v_scale_float": 0.25,
}
AUTO, E4M3 = (views.KvAsked("--kv-cache-dtype", value) for value in ("auto", "fp8_e4m3"))


@pytest.mark.parametrize("kept, dtype", [("model", torch.float16), ("fp8_e4m3", torch.float8_e4m3fn)])
def test_what_a_draft_is_kept_as_is_its_own(kept: str, dtype: torch.dtype) -> None:
    """Whatever flags say; `auto` is what they say."""
    given = SimpleNamespace(kv_cache_dtype="fp8_e4m3", speculative_draft_kv_cache_dtype=None)
    asked = views.kv_asked(given, of_draft=StsConfig(draft_kv=kept))
    assert asked.flag == "sts_config.draft_kv" and asked.dtype(torch.float16) == dtype
    assert views.kv_asked(given, of_draft=StsConfig()) == views.kv_asked(given) == E4M3
    runner = SimpleNamespace(dtype=torch.float16)
    views.keep_kv_as(runner, asked)
    assert runner.kv_cache_dtype == dtype


def test_fa3_goes_by_the_kv_of_its_own_runner() -> None:
    """On the release where it asks the launch."""
    for dtype, says in ((torch.float8_e4m3fn, "fp8_e4m3"), (torch.bfloat16, "auto")):
        backend = SimpleNamespace(kv_cache_dtype=dtype, kv_cache_dtype_str="auto")
        release_0_5_16.reads_own_kv(backend)
        assert backend.kv_cache_dtype_str == says


def test_the_flag_for_the_drafts_kv_is_set_and_not_contradicted() -> None:
    """On the release that has one."""
    for kept, value in (("auto", None), ("model", "auto"), ("fp8_e4m3", "fp8_e4m3")):
        args = SimpleNamespace(speculative_draft_kv_cache_dtype=None)
        for _ in range(2):  # as every process does once more
            release_0_5_23.ask_draft_kv(args, kept)
            assert args.speculative_draft_kv_cache_dtype == value
    with pytest.raises(ConfigError, match="got 'model' with --speculative-draft-kv-cache-dtype fp8_e4m3"):
        release_0_5_23.ask_draft_kv(args, "model")


def test_scales_are_those_of_fp8_alone() -> None:
    """As SGLang writes: keys of the model's own dtype are not divided, whatever a checkpoint says."""
    for fp8, scales in ((None, (1.0, 1.0)), ((0.5, 0.25), (0.5, 0.25))):
        pools = Layers(**SCALES).runner(Pool(8, fp8)).pools
        assert pools.layer(1)[2:] == scales and pools.layer(0)[2:] == (1, 1)


@pytest.mark.parametrize("missing", SCALES)
def test_scales_that_are_half_there_are_refused(missing: str) -> None:
    """SGLang divides by the one and multiplies by the other."""
    with pytest.raises(RuntimeError, match="STS: layer 1 has scales of keys and values that no checkpoint"):
        Layers(**{name: value for name, value in SCALES.items() if name != missing}).runner(Pool(8))


@pytest.mark.parametrize(
    "asked, fp8, dense, problem",
    [
        (AUTO, None, "fa3", None),
        (AUTO, None, "flashinfer", "FlashInfer scales keys of torch.float32 too.*allowed: fp8_e4m3"),
        (AUTO, (0.5, 0.25), "fa3", "keys are kept as torch.float8_e4m3fn, where auto of a model in"),
        (E4M3, None, "fa3", "keys are kept as torch.float32, where fp8_e4m3 of a model in"),
        (E4M3, (0.5, 0.25), "fa3", None),
        (E4M3, (0.5, 0.25), "flashinfer", None),
    ],
)
def test_kv_is_what_the_launch_asked_for(asked, fp8, dense, problem) -> None:
    """Whatever a checkpoint made of it."""
    runner = Layers(**SCALES).runner(Pool(8, fp8))
    if problem is None:
        return bind._check_kv(runner, asked, dense)
    with pytest.raises(ConfigError, match=f"--kv-cache-dtype: .*{problem}"):
        bind._check_kv(runner, asked, dense)


def test_gpus_without_fp8_are_refused(monkeypatch) -> None:
    runner = Layers().runner(Pool(8, (1.0, 1.0)))
    runner.device = "cuda"
    for capability, lacks in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if lacks:
            with pytest.raises(ConfigError, match="--kv-cache-dtype: this GPU has no FP8.*allowed: auto"):
                bind._check_kv(runner, E4M3, "fa3")
        else:
            bind._check_kv(runner, E4M3, "fa3")


# ---- the server


def with_scales(model: Path, folder: Path, k: float, v: float) -> Path:
    """A copy whose checkpoint has scales of keys and values, as SGLang reads them of FP8 checkpoints; all of
    its layers are left as they are, since a CPU has no FP8 products."""
    shutil.copytree(model, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(model / "model.safetensors")
    projections = [f"self_attn.{name}_proj" for name in "qkvo"]
    projections += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
    ignored = [f"{layer}.{name}" for layer in layers for name in projections]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ignored,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for layer in layers:
        tensors |= {
            f"{layer}.self_attn.k_scale": torch.tensor(k),
            f"{layer}.self_attn.v_scale": torch.tensor(v),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sts(draft: Path, /, **config) -> list[str]:
    args = [
        "--attention-backend",
        "sts",
        "--sts-config",
        json.dumps({"sink": 2, "recent": 8, "draft": "dense", **config}),
    ]
    return [
        *args,
        "--speculative-algorithm",
        "STANDALONE",
        "--speculative-draft-model-path",
        str(draft),
        *CHAIN,
    ]


def answers(
    model: Path, log: Path, *args: str, module: str = "sglang.launch_server", kv: tuple[str, ...] = FP8
) -> tuple[list, dict]:
    """Of requests one after the other, so that rounds can be counted: alone, chunked, and over the first half
    of a context whose slots others have had since; and counters."""
    prompts = [random_ids(n, n) for n in (7, 200, 700, 600, 601)]
    prompts.append(prompts[2][:350] + random_ids(30, 1))
    with Forked(model, log, *kv, *args, module=module) as server:
        found = [server.generate(ids, 24) for ids in prompts]
        if "--enable-hierarchical-cache" in args:
            assert found[-1]["meta_info"]["cached_tokens_details"]["host"] >= 300
        told = server.sts() if "sts" in args else {"counters": {}}
        return [one["output_ids"] for one in found], {"draft_kv": told.get("draft_kv"), **told["counters"]}


@pytest.mark.server
def test_full_budget_is_stock_over_fp8(pair, tmp_path) -> None:
    """Stock's backend of a CPU knows no scales. With HiCache, which moves KV as it is kept."""
    stock, _ = answers(pair["target"], tmp_path / "stock.log")
    args = [*sts(pair["draft"], keep=1.0, history="blend"), *HICACHE]
    own, counters = answers(pair["target"], tmp_path / "sts.log", *args, module="tests.hicache_on_cpu")
    assert own == stock
    assert counters["sparse_verifies"] > 0 and counters["keep_ratio"] == 1.0


@pytest.mark.server
def test_a_draft_over_fp8_leaves_the_target_exact(pair, tmp_path) -> None:
    """Its KV alone is FP8: answers at full budget are stock's over KV in the model's dtype."""
    stock, _ = answers(pair["target"], tmp_path / "stock.log", kv=())
    for draft in ("dense", "all"):
        args = sts(pair["draft"], keep=1.0, draft=draft, draft_kv="fp8_e4m3")
        own, told = answers(pair["target"], tmp_path / f"{draft}.log", *args, kv=())
        assert own == stock
        assert told["draft_kv"] == "float8_e4m3fn" and told["sparse_verifies"] > 0


@pytest.mark.server
def test_a_draft_may_be_kept_as_it_is_beside_a_target_over_fp8(pair, tmp_path) -> None:
    args = sts(pair["draft"], keep=0.3, budget=0, draft_kv="model")
    _, told = answers(pair["target"], tmp_path / "log", *args)
    assert told["draft_kv"] == "float32" and told["sparse_verifies"] > 0 and told["keep_ratio"] < 1


@pytest.mark.server
def test_scales_of_a_checkpoint_are_written_and_read_alike(pair, tmp_path) -> None:
    """Powers of two, by which only the smallest numbers are kept otherwise. What is drafted and answered is
    the same where dividing and multiplying meet, in the draft's KV and in the target's."""
    found = []
    for name, target, draft in (
        ("one", (2**-4, 2**-5), (2**-4, 2**-5)),
        ("two", (2**-3, 2**-6), (2**-5, 2**-4)),
    ):
        of_target = with_scales(pair["target"], tmp_path / f"target-{name}", *target)
        of_draft = with_scales(pair["draft"], tmp_path / f"draft-{name}", *draft)
        args = [*sts(of_draft, keep=1.0), "--dtype", "bfloat16"]
        found.append(answers(of_target, tmp_path / f"{name}.log", *args))
    assert found[0] == found[1]
    assert found[0][1]["sparse_verifies"] > 0


@pytest.mark.parametrize("kv, refused_", [("fp8_e4m3", True), ("auto", False)])
def test_weights_that_scales_are_of_do_not_change_while_serving(kv: str, refused_: bool) -> None:
    args = SimpleNamespace(
        attention_backend="sts",
        prefill_attention_backend=None,
        decode_attention_backend=None,
        speculative_draft_attention_backend=None,
        speculative_algorithm=None,
        kv_cache_dtype=kv,
    )

    async def original(self, obj, request):
        return True, "updated", 0

    call = refused.update_from_disk(original, SimpleNamespace(server_args=args), None)
    done, said, _ = asyncio.run(call)
    assert done != refused_ and ("scales of the old weights" in said) == refused_
