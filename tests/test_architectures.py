"""The table of SGLang's architectures, and a tiny random model of every served one in the real server: at
full budget it equals stock.

Two are served in every run of the tests, and all of them on demand (`make architectures`).
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

# Before SGLang is imported: it chooses its platform once per process.
os.environ.setdefault("SGLANG_PLATFORM", "sts_cpu")

import pytest
import sglang.srt.models
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sts_sglang import checkpoints
from sts_sglang.config import ConfigError
from sts_sglang.headmap import HeadCounts
from sts_sglang.host import architectures, bind, serves, views
from sts_sglang.host.architectures import (
    DENSE,
    DRAFTS,
    EAGLE3_TARGETS,
    EAGLE_TARGETS,
    EXPERTS,
    OWN_LAYERS,
    TARGETS,
)
from sts_sglang.host.serves import Refusal
from sts_sglang.tools import tiny_pair
from tests import tiny_architectures
from tests.arguments import launched
from tests.forked import Forked
from tests.server import Server, logged, random_ids
from tests.test_serving import CHAIN, LEAK

ALL = sorted(TARGETS)
# What the other release alone serves.
ELSEWHERE = architectures.ROW_A_HEAD - TARGETS
OWN = "own layer"  # of the target, under EAGLE
SPARSE = json.dumps({"keep": 0.3, "budget": 0, "sink": 2, "recent": 8})
MODULE = "tests.random_weights"
DUMMY = ("--load-format", "dummy", "--trust-remote-code")
PROMPTS = [random_ids(n, n) for n in (1, 40, 333)]


@functools.cache
def registered() -> dict[str, type]:
    """SGLang's own registry; it imports every model."""
    from sglang.srt.models.registry import ModelRegistry

    return dict(ModelRegistry.models)


def declared() -> set[str]:
    """What SGLang's model files declare, also those that some machines cannot import, for want of CUDA."""
    found = set()
    for path in Path(sglang.srt.models.__path__[0]).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8-sig")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
                classes = node.value.elts if isinstance(node.value, ast.List) else [node.value]
                found |= {entry.id for entry in classes}
    return found


def test_every_architecture_of_sglang_is_in_the_table():
    """A new one is judged, and one that is gone is dropped."""
    heads = DRAFTS["EAGLE"] | DRAFTS["EAGLE3"]
    groups = (DENSE, EXPERTS, heads, frozenset(architectures.REFUSED))
    assert set().union(*groups) == declared() >= set(registered())
    assert sum(map(len, groups)) == len(declared()), "an architecture stands twice"


def test_what_heads_ask_of_a_target_is_there():
    """SGLang calls these while it starts, and would end in a traceback."""
    able = {name for name in TARGETS if hasattr(registered()[name], "get_embed_and_head")}
    able.remove("OPTForCausalLM")  # asks its model for a field that it does not have
    assert able == EAGLE_TARGETS
    able &= {name for name in TARGETS if hasattr(registered()[name], "set_eagle3_layers_to_capture")}
    assert able == EAGLE3_TARGETS


def test_what_sglang_makes_of_a_draft_is_known(tmp_path):
    """Of some it loads the layer for the next token but one: their model as a draft is refused."""
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    for name in ALL:
        change = latent if name.startswith("Bailing") else None  # their layer's, which SGLang asks for
        path = str(tiny_architectures.make(tmp_path, name, change))
        config = ModelConfig(path, is_draft_model=True, speculative_algorithm="STANDALONE")
        made = config.hf_config.architectures[0]
        assert (made == name) == (name in DRAFTS["STANDALONE"]), name
        assert made == OWN_LAYERS.get(name, made) and (made in OWN_LAYERS.values()) == (name in OWN_LAYERS)
        assert made == name or made in DRAFTS["EAGLE"] or made in architectures.REFUSED


def test_every_served_architecture_has_a_tiny_model():
    assert set(tiny_architectures.TINY) & declared() == TARGETS | ELSEWHERE


def test_a_wide_tiny_model_has_heads_of_64_dimensions(tmp_path):
    """As SGLang's rotary kernel on a GPU asks, and no router whose near ties half precision would decide."""
    for name in tiny_architectures.TINY:
        config = ModelConfig(str(tiny_architectures.make(tmp_path, name, wide=True)), trust_remote_code=True)
        assert (config.head_dim, config.hidden_size) == (64, 256), name
        assert all(f'"{field}": 2' not in str(config.hf_config) for field in tiny_architectures.CHOSEN), name
    for name in OWN_LAYERS:
        narrow, wide = (tiny_architectures.own_layer(tmp_path / str(w), name, wide=w) for w in (False, True))
        few, many = (checkpoints.header("", path / "model.safetensors") for path in (narrow, wide))
        assert few.keys() == many.keys()
        assert many[checkpoints.OWN_LAYERS[name].joined.format(n=4) + ".weight"].shape == (256, 512)


def launch(monkeypatch, folder: Path, name: str, *, change=None, draft=None, **arguments) -> str:
    path = tiny_architectures.make(folder, name, change)
    given = {"speculative_algorithm": None, **arguments}
    if draft is not None:
        given["speculative_draft_model_path"] = str(tiny_architectures.make(folder / "draft", draft))
    given |= {"model_path": str(path), "attention_backend": "sts", "device": "cpu", "dtype": "float32"}
    given |= {"disable_cuda_graph": True, "trust_remote_code": True, "load_format": "dummy"}
    return launched(monkeypatch, None, **given).attention_backend


@pytest.mark.parametrize("name", ALL)
def test_its_configuration_is_accepted(monkeypatch, tmp_path, name):
    assert launch(monkeypatch, tmp_path, name) == "sts"


# What would not be plain; for every architecture, since SGLang reads of each other fields.
NOT_PLAIN = {
    "sliding_window = 128": {"sliding_window": 128, "use_sliding_window": True},
    "attn_logit_softcapping = 50.0": {"attn_logit_softcapping": 50.0},
    "layer_types with 'sliding_attention'": {
        "layer_types": ["full_attention", "sliding_attention"] * (tiny_architectures.LAYERS // 2)
    },
    "attention_chunk_size = 512": {"attention_chunk_size": 512},
    "use_cla = True": {"use_cla": True},
    "alibi = True": {"alibi": True},
}


@pytest.mark.parametrize("name", ALL)
def test_a_configuration_that_is_not_plain_is_refused(monkeypatch, tmp_path, name):
    for number, (problem, change) in enumerate(NOT_PLAIN.items()):
        with pytest.raises((Refusal, ConfigError)) as caught:
            launch(monkeypatch, tmp_path / str(number), name, change=change)
        message = str(caught.value)
        # Of a Qwen2's window transformers makes a list of its layers.
        fields = {problem.split()[0], "layer_types"} if "window" in problem else {problem.split()[0]}
        assert message.startswith("--model-path ") and any(f in message for f in fields), message
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", sorted(architectures.ROW_A_HEAD & TARGETS))
def test_queries_that_a_prefill_graph_would_drop_are_refused(monkeypatch, tmp_path, name):
    """On the device that has such graphs."""
    monkeypatch.setattr(serves, "_check_graphs", lambda *args: None)  # a CPU has none

    def as_target(folder: Path, change: dict) -> str:
        return launch(monkeypatch, folder, name, change=change)

    def as_draft(folder: Path, change: dict) -> str:
        draft = str(tiny_architectures.make(folder / "draft", name, change))
        given = {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": draft}
        return launch(monkeypatch, folder, "LlamaForCausalLM", **given)

    for serve, flag in ((as_target, "--model-path"), (as_draft, "--speculative-draft-model-path")):
        for backend, normed in (("disabled", True), ("breakable", False), ("breakable", True)):
            graphs = views.Phase(backend != "disabled", backend, 8)
            monkeypatch.setattr(views, "prefill_graphs", lambda args, graphs=graphs: graphs)
            made = tmp_path / f"{flag}-{backend}-{normed}", {"use_qk_norm": normed}
            if (backend, normed) != ("breakable", True):
                assert serve(*made) == "sts"
                continue
            with pytest.raises(Refusal) as caught:
                serve(*made)
            message = str(caught.value)
            assert message.startswith("--cuda-graph-backend-prefill breakable: ") and f" {flag} " in message
            assert message.endswith("; use --cuda-graph-backend-prefill disabled")


def test_a_window_as_long_as_the_longest_context_is_none(monkeypatch, tmp_path):
    """As Phi-3.5 has it, and Phi-3.5-MoE."""
    for name in ("Phi3ForCausalLM", "PhiMoEForCausalLM"):
        change = {"sliding_window": tiny_pair.CONTEXT}
        assert launch(monkeypatch, tmp_path / "whole", name, change=change) == "sts"
        with pytest.raises(Refusal, match=f"has sliding_window = {tiny_pair.CONTEXT - 1}, which sts"):
            change = {"sliding_window": tiny_pair.CONTEXT - 1}
            launch(monkeypatch, tmp_path / "short", name, change=change)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("Qwen3MoeForCausalLM", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads = 3"),
        ("ChatGLMModel", {"multi_query_group_num": 3}, "no multiple of num_key_value_heads = 3"),
        ("MiniCPMForCausalLM", {"mixer_types": ["minicpm4", "lightning-attn"]}, "mixer_types = "),
        ("GraniteForCausalLM", {"v_head_dim": 32}, "head_dim = 16 but v_head_dim = 32"),
    ],
)
def test_shapes_that_are_not_served_are_refused(monkeypatch, tmp_path, name, change, problem):
    with pytest.raises(Refusal) as caught:
        launch(monkeypatch, tmp_path, name, change=change)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "able"), [("EAGLE", EAGLE_TARGETS), ("EAGLE3", EAGLE3_TARGETS)], ids=["EAGLE", "EAGLE3"]
)
def test_a_target_that_does_not_hand_a_head_what_it_reads_is_refused(monkeypatch, tmp_path, algorithm, able):
    unable = ["GraniteForCausalLM", "Qwen2MoeForCausalLM", "MixtralForCausalLM"]
    unable += ["Glm4ForCausalLM"] if algorithm == "EAGLE3" else []
    for name in (*unable, "Qwen3MoeForCausalLM"):
        assert (name in able) == (name not in unable)
        head = str(eagle_head(tmp_path / name, algorithm))
        given = {"speculative_algorithm": algorithm, "speculative_draft_model_path": head}
        if name in able:
            assert launch(monkeypatch, tmp_path, name, **given) == "sts"
            continue
        with pytest.raises(Refusal) as caught:
            launch(monkeypatch, tmp_path, name, **given)
        message = str(caught.value)
        assert message.startswith(
            f"--speculative-algorithm {algorithm}: SGLang's {name} does not hand a head"
        )


def test_the_layer_for_the_next_token_but_one_is_refused_as_a_draft(monkeypatch, tmp_path):
    """For all that SGLang calls it: the draft of a Qwen3-MoE target is no Qwen3-MoE."""
    for name in sorted(architectures.DRAFTED_BY_A_LAYER):
        given = {"speculative_algorithm": "STANDALONE", "draft": name}
        # The older release asks a Bailing model for the latents of that layer, and there are none.
        why = "(a model's own layer .* under EAGLE alone|cannot be read .*kv_lora_rank|not seen running)"
        with pytest.raises(Refusal, match=f"^--speculative-draft-model-path .*{why}"):
            launch(monkeypatch, tmp_path / name, name, **given)


def own_layer(monkeypatch, folder: Path, name: str, *, target=None, change=None, **arguments) -> str:
    """A launch with the layer of one model as the draft of another, or of itself by its own path."""
    draft = tiny_architectures.make(folder / "draft", name, change)
    given = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(draft), **arguments}
    return launch(monkeypatch, folder, target or name, **given)


@pytest.mark.parametrize("name", sorted(OWN_LAYERS))
def test_its_own_layer_drafts_for_a_target_of_its_kind(monkeypatch, tmp_path, name):
    for algorithm in ("EAGLE", "NEXTN"):
        given = {"speculative_algorithm": algorithm}
        assert own_layer(monkeypatch, tmp_path / algorithm, name, **given) == "sts"
    refused = r"^--speculative-draft-model-path .*"
    with pytest.raises(Refusal, match=f"{refused}{OWN_LAYERS[name]}, a layer of another kind of model"):
        own_layer(monkeypatch, tmp_path / "other", name, target="LlamaForCausalLM")
    with pytest.raises(Refusal, match=f"{refused}a model's own layer .* under EAGLE alone"):
        own_layer(monkeypatch, tmp_path / "standalone", name, speculative_algorithm="STANDALONE")
    with pytest.raises(Refusal, match="made for vocab_size 128, the target has"):
        own_layer(monkeypatch, tmp_path / "words", name, change={"vocab_size": 128})
    if name not in ("HYV3ForCausalLM", "Qwen3MoeForCausalLM"):  # of which SGLang takes one, whatever they say
        with pytest.raises(Refusal, match=f"{refused}num_nextn_predict_layers = 2, .* says 1"):
            own_layer(monkeypatch, tmp_path / "two", name, change={"num_nextn_predict_layers": 2})


@pytest.mark.parametrize("name", sorted(OWN_LAYERS))
def test_a_draft_that_sglang_finds_by_itself_need_not_be_named(monkeypatch, tmp_path, name):
    given = {"speculative_draft_model_path": None}
    if name in architectures.OWN_PATH:
        assert own_layer(monkeypatch, tmp_path, name, **given) == "sts"
        given["speculative_algorithm"] = "STANDALONE"
        with pytest.raises(Refusal, match="no draft given; add --speculative-draft-model-path DRAFT$"):
            own_layer(monkeypatch, tmp_path, name, **given)
        return
    with pytest.raises(Refusal, match=f"no draft given; add .* or .*{name} itself for the layer"):
        own_layer(monkeypatch, tmp_path, name, **given)


def loaded(*layers: dict) -> tuple[SimpleNamespace, views.Runner, int]:
    """A model with attention layers as SGLang makes them, which are otherwise in these ways; on one rank."""
    plain = {"num_heads": 4, "head_dim": 16, "scaling": 0.25, "num_kv_heads": 2}
    made = [RadixAttention(**{**plain, "layer_id": i, **otherwise}) for i, otherwise in enumerate(layers)]
    runner = SimpleNamespace(model=torch.nn.ModuleList(made), is_draft_worker=False)
    model = views.Model(HeadCounts(len(layers), 4, 2), 16, torch.float32, 128)
    return runner, views.Runner("cpu", torch.float32, model, None, None), 1


def test_layers_are_looked_at_once_they_are_made():
    found = bind._attention_of(*loaded({"layer_id": 1}, {"layer_id": 0, "scaling": 0.5}))
    assert [(layer.number, layer.scale) for layer in found] == [(0, 0.5), (1, 0.25)]


@pytest.mark.parametrize(
    ("otherwise", "problem"),
    [
        ({"sliding_window_size": 127}, "layer 1 of the target has a window of 127"),
        ({"logit_cap": 30.0}, "layer 1 of the target has a soft cap of 30.0"),
        ({"is_cross_attention": True}, "layer 1 of the target has cross attention"),
        ({"use_irope": True}, "layer 1 of the target has chunks"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "has attention of kind AttentionType.ENCODER_ONLY"),
        ({"v_head_dim": 8}, r"has \(4, 2, 16, 8\) query heads.*says \(4, 2, 16, 16\)"),
        ({"num_kv_heads": 4}, r"has \(4, 4, 16, 16\) query heads"),
        ({"layer_id": 2}, r"attention layers \[0, 2\], and its configuration 2 layers"),
        ({"layer_id": 0}, r"attention layers \[0, 0\], and its configuration 2 layers"),
    ],
)
def test_layers_that_are_not_what_was_read_end_the_launch(otherwise, problem):
    """Another package may put its own model in the place of SGLang's."""
    with pytest.raises(RuntimeError, match=f"^STS: .*{problem}"):
        bind._attention_of(*loaded({}, otherwise))
    runner, *known = loaded({}, {})
    list(runner.model)[1].xai_temperature_len = 1024
    with pytest.raises(RuntimeError, match="layer 1 of the target has a temperature by position"):
        bind._attention_of(runner, *known)


PAGE = (Path(__file__).parents[1] / "docs" / "limits.md").read_text()


def row(start: str) -> set[str]:
    """Names in the line of the page's tables that starts so."""
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {start} "))
    return set(re.findall(r"`(\w+)`", line))


def test_the_page_says_what_is_served():
    """And of the newer release, which has all that the older has, how much."""
    newer = set(architectures._NEWER.split())
    for start, names in (("dense", DENSE), ("mixtures of experts", EXPERTS)):
        assert row(start) - newer - ELSEWHERE == names - newer and names <= row(start)
        assert f"| {start} ({len(row(start))}) |" in PAGE
    assert row("drafts under STANDALONE") == architectures.DRAFTED_BY_A_LAYER
    assert row("own layers under EAGLE") == {*OWN_LAYERS, *OWN_LAYERS.values()} <= DRAFTS["EAGLE"] | TARGETS
    assert row("heads under EAGLE") == DRAFTS["EAGLE"] - {*OWN_LAYERS.values()} | EAGLE_TARGETS
    assert row("heads under EAGLE3") == DRAFTS["EAGLE3"] | (EAGLE_TARGETS - EAGLE3_TARGETS)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"[{len(row('dense') | row('mixtures of experts'))} architectures]" in readme


def test_the_page_says_why_others_are_refused():
    for why in set(architectures.REFUSED.values()):
        names = {name for name, reason in architectures.REFUSED.items() if reason == why}
        newer = set(architectures._NEWER.split())
        assert row(why) - newer <= names
        assert (names <= row(why)) or len(row(why)) == 3, why


def eagle_head(folder: Path, algorithm: str) -> Path:
    """An EAGLE or EAGLE-3 head for the tiny models."""
    make = {"EAGLE": tiny_pair._eagle_config, "EAGLE3": tiny_pair._eagle3_config}[algorithm]
    config = make({"model_type": "llama", **tiny_architectures.COMMON})
    return tiny_architectures.write(folder / algorithm, config)


def answers(server: Server, **own) -> tuple[list[list[int]], list[float]]:
    """Tokens of every prompt, and their logprobs."""
    params = {"custom_params": {"sts": own}} if own else {}
    found = [server.generate(ids, 24, sampling_params=params, return_logprob=True) for ids in PROMPTS]
    said = [logprob for a in found for logprob, _, _ in a["meta_info"]["output_token_logprobs"]]
    return [a["output_ids"] for a in found], said


def check(server: Server, stock: tuple[list[list[int]], list[float]]) -> None:
    """At full budget it says what stock says, and below it something else, all of it verified sparsely."""
    tokens, logprobs = answers(server, keep=1.0)
    assert tokens == stock[0]
    assert logprobs == pytest.approx(stock[1], abs=1e-4)
    before = server.counters()
    assert answers(server)[1] != pytest.approx(stock[1], abs=1e-4)
    after = server.counters()
    assert after["dense_verifies"] == 0 and after["sparse_verifies"] > before["sparse_verifies"]
    selected, available = (after[n] - before[n] for n in ("selected_tokens", "available_tokens"))
    assert selected < 0.6 * available
    assert not LEAK.search(logged(server.log)), server.log_tail()


def flags(folder: Path, road: str, model: Path) -> tuple[str, ...]:
    """Of a server that speculates by this algorithm, or not at all."""
    serve = ("--attention-backend", "sts", "--sts-config", SPARSE)
    if road == "alone":
        return serve
    draft, load = model, "dummy"
    if road == OWN:
        road, draft, load = "EAGLE", tiny_architectures.own_layer(folder / "own", model.name), "auto"
    elif road != "STANDALONE":
        draft = eagle_head(folder, road)
    elif model.name not in DRAFTS["STANDALONE"]:
        draft, load = tiny_pair.make_pair(folder / "pair")["draft"], "auto"
    drafted = ("--speculative-draft-model-path", str(draft), "--speculative-draft-load-format", load)
    return (*serve, "--speculative-algorithm", road, *CHAIN, *drafted)


REPRESENTATIVES = {"GraniteForCausalLM": ("STANDALONE",), "Qwen3MoeForCausalLM": ("EAGLE3", OWN)}


@pytest.mark.server
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_served(tmp_path, name):
    model = tiny_architectures.make(tmp_path, name)
    with Forked(model, tmp_path / "stock.log", *DUMMY, module=MODULE) as server:
        stock = answers(server)
    for road in REPRESENTATIVES[name]:
        args = (*DUMMY, *flags(tmp_path, road, model))
        with Forked(model, tmp_path / f"{road}.log", *args, module=MODULE) as server:
            check(server, stock)


@pytest.fixture(scope="session")
def stocks(tmp_path_factory):
    """What SGLang's own attention says of a tiny model, asked once."""

    @functools.cache
    def stock(name: str) -> tuple[list[list[int]], list[float]]:
        folder = tmp_path_factory.mktemp("stock")
        model = tiny_architectures.make(folder, name)
        with Forked(model, folder / "log", *DUMMY, module=MODULE) as server:
            return answers(server)

    return stock


ROADS = {"alone": TARGETS, "STANDALONE": TARGETS, "EAGLE3": EAGLE3_TARGETS, "EAGLE": EAGLE_TARGETS}
ROADS[OWN] = frozenset(OWN_LAYERS)


@pytest.mark.architectures
@pytest.mark.server
@pytest.mark.parametrize(("road", "name"), [(road, name) for road in ROADS for name in sorted(ROADS[road])])
def test_each_is_served_on_every_road(stocks, tmp_path, name, road):
    model = tiny_architectures.make(tmp_path, name)
    args = (*DUMMY, *flags(tmp_path, road, model))
    with Forked(model, tmp_path / f"{road}.log", *args, module=MODULE) as server:
        check(server, stocks(name))
