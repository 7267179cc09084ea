"""Damaged model folders: one line that names the file, in calibrate, for fingerprints and at launch."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

# Before SGLang is imported: it chooses its platform once per process.
os.environ.setdefault("SGLANG_PLATFORM", "sts_cpu")

import pytest
import torch
from safetensors.torch import load_file, save_file

from sts_sglang import checkpoints, cli, fingerprint
from sts_sglang.config import ConfigError
from sts_sglang.tools.tiny_pair import make_pair
from tests import arguments, tiny_architectures

MODELS = Path(__file__).parents[1] / "sts_sglang" / "models"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def configured(**changes):
    """The folder's config.json changed; ... takes a key out."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return damage


def text(name: str, content: str | bytes):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def weights(change):
    """Saved again after `change` of the tensors by name."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def headed(change, data=lambda data: data):
    """The header changed by hand, and what follows it."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header = change(header) or header
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data(content[start:]))

    return damage


def entry(**changes):
    return headed(lambda header: header["model.norm.weight"].update(changes))


def shifted(header: dict) -> None:
    entry = header["model.norm.weight"]
    entry["data_offsets"] = [offset - 2 for offset in entry["data_offsets"]]


def truncated(share: float):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def piped(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def indexed(**files):
    return text(checkpoints.INDEX, json.dumps({"weight_map": files}))


HUGE = (2**40).to_bytes(8, "little") + b"{}"
# What is damaged, and words of the line.
FILES = {
    "a header of a terabyte": (text("model.safetensors", HUGE), "header of 1099511627776 bytes"),
    "a header of gigabytes in a long file": (
        lambda folder: os.truncate(folder / "model.safetensors", 2**33)
        or (folder / "model.safetensors").open("r+b").write((2**32).to_bytes(8, "little")),
        "header of 4294967296 bytes",
    ),
    "a header past the end": (text("model.safetensors", (999).to_bytes(8, "little") + b"{}"), "ends at 1007"),
    "nothing": (text("model.safetensors", b""), "ends at 8"),
    "cut in its header": (truncated(0.0005), "ends at"),
    "cut in its data": (truncated(0.5), "its tensors end at"),
    "longer than its tensors": (headed(lambda h: None, lambda d: d + b"x"), "its tensors end at"),
    "a header that is no JSON": (headed(lambda h: b"{"), "not JSON"),
    "a header that is no text": (headed(lambda h: b"\xff\xfe{}"), "not JSON"),
    "a header that is a list": (headed(lambda h: b"[1]"), "got [1]"),
    "a deep header": (headed(lambda h: b'{"a":' * 100_000), "nested too deeply"),
    "notes of numbers": (headed(lambda h: h.update(__metadata__={"a": 1})), "__metadata__"),
    "a tensor that is a list": (headed(lambda h: h.update(x=[])), "tensor 'x'"),
    "offsets beyond the file": (entry(data_offsets=[2**50, 2**50 + 128]), "tensor 'model.norm.weight'"),
    "offsets backwards": (entry(data_offsets=[128, 0]), "tensor 'model.norm.weight'"),
    "offsets below zero": (entry(data_offsets=[-128, 0]), "tensor 'model.norm.weight'"),
    "offsets that overlap": (headed(shifted), "begins at"),
    "a dtype of another width": (entry(dtype="F64"), "tensor 'model.norm.weight': 'F64'"),
    "a shape of gigabytes": (entry(shape=[2**40, 2**40]), "tensor 'model.norm.weight'"),
    "a pipe": (piped, "not a regular file"),
    "an index of other files": (
        indexed(**{"lm_head.weight": "model-00002-of-00002.safetensors"}),
        "names 'model-00002-of-00002.safetensors', which is not there",
    ),
    "an index of other tensors": (indexed(x="model.safetensors"), "names tensor 'x'"),
    "an index elsewhere": (indexed(x="../model.safetensors"), "which is not there"),
    "an index that is a list": (text(checkpoints.INDEX, "[]"), checkpoints.INDEX),
    "an index of numbers": (text(checkpoints.INDEX, '{"weight_map": {"x": 1}}'), "weight_map"),
}
CONFIGS = {
    "a list": (text("config.json", "[]"), "config.json: got []"),
    "no JSON": (text("config.json", '{"a": '), "config.json: not JSON"),
    "no text": (text("config.json", b"\xff"), "config.json: not JSON"),
    "deep": (text("config.json", '{"a":' * 100_000), "config.json: nested too deeply"),
    "huge": (text("config.json", " " * (5 << 20)), "config.json: 5242880 bytes"),
    "architectures of numbers": (configured(architectures=[1]), "architectures: got [1]"),
    "a name as architectures": (configured(architectures="LlamaForCausalLM"), "architectures: got 'Llama"),
    "no name as architectures": (configured(architectures=[]), "architectures: got []"),
    "a method as quantization": (
        configured(quantization_config="fp8"),
        "quantization_config: got 'fp8'; allowed: an object such as",
    ),
    "quantization as a list": (configured(quantization_config=[1]), "quantization_config: got [1]"),
}
NUMBERS = {
    "layers as text": (configured(num_hidden_layers="2"), "num_hidden_layers: got '2'"),
    "a billion layers": (configured(num_hidden_layers=10**9), "num_hidden_layers: got 1000000000"),
    "no heads": (configured(num_attention_heads=0), "num_attention_heads: got 0"),
    "a width of gigabytes": (configured(hidden_size=2**40), "hidden_size: got"),
    "heads as a list": (configured(num_key_value_heads=[2]), "num_key_value_heads: got [2]"),
    "half a head": (configured(head_dim=0.5), "head_dim: got 0.5"),
}
LAYER = "model.layers.1.mlp.up_proj.weight"
TENSORS = {
    "one missing": (weights(lambda w: w.pop(LAYER)), f"missing tensor '{LAYER}'"),
    "a layer more than there are": (
        configured(num_hidden_layers=9),
        "missing tensors 'model.layers.",
    ),
    "another shape": (weights(lambda w: w.update({LAYER: torch.zeros(3, 3)})), f"tensor '{LAYER}' has shape"),
}
UNEXPECTED = {
    "one too many": (
        weights(lambda w: w.update({"model.layers.1.mlp.extra.weight": torch.zeros(3)})),
        "unexpected tensor 'model.layers.1.mlp.extra.weight'",
    ),
    "not a number": (
        weights(lambda w: w[LAYER].fill_(torch.nan)),
        f"tensor '{LAYER}' holds inf or nan",
    ),
    "kv heads that divide nothing": (configured(num_key_value_heads=3), "num_key_value_heads: got 3"),
    "no vocabulary": (configured(vocab_size=...), "vocab_size: got None"),
}


def copied(source: Path, tmp_path: Path, damage) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    damage(folder)
    return folder


def all_of(*groups):
    cases = {name: case for group in groups for name, case in group.items()}
    return pytest.mark.parametrize(("damage", "words"), cases.values(), ids=cases)


def refused(call, words: str) -> int:
    """In one line with these words; returns the most bytes that were allocated meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert words in message and "; allowed: " in message and message.isprintable() and len(message) < 600
    return peak


@all_of(FILES, CONFIGS)
def test_a_fingerprint_of_damaged_files_is_refused(pair, tmp_path, damage, words):
    folder = copied(pair["draft"], tmp_path, damage)
    assert refused(lambda: fingerprint.of_model(str(folder)), words) < 2**25


@all_of(FILES, CONFIGS, NUMBERS, TENSORS, UNEXPECTED)
def test_calibrate_refuses_damaged_models(pair, tmp_path, capsys, damage, words):
    folder = copied(pair["draft"], tmp_path, damage)
    argv = ["calibrate", "--model", str(pair["target"]), "--draft", str(folder)]
    assert cli.main([*argv, "--out", str(tmp_path / "map.json")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(error) == 1 and error[0].startswith("error: ") and words in error[0], error
    assert str(folder) in error[0] and not (tmp_path / "map.json").exists()


@pytest.mark.parametrize(
    ("target", "draft", "words"),
    [
        ("eagle3", "draft", "error: --model {models}/eagle3: missing tensor 'model."),
        ("draft", "target", None),
    ],
)
def test_no_map_is_made_of_weights_drawn_at_random(tmp_path, capsys, target, draft, words):
    out = tmp_path / "map.json"
    argv = ["calibrate", "--model", str(MODELS / target), "--draft", str(MODELS / draft), "--out", str(out)]
    code = cli.main([*argv, "--tokens", "700", "--windows", "2", "--sink", "1", "--recent", "4"])
    error = capsys.readouterr().err
    assert (code, out.exists()) == ((0, True) if words is None else (2, False)), error
    if words is not None:
        assert words.format(models=MODELS) in error


HEADS = {
    "one missing": (
        weights(lambda w: w.pop("midlayer.mlp.up_proj.weight")),
        "missing tensor 'layers.0.mlp.up",
    ),
    "one too many": (weights(lambda w: w.update(x=torch.zeros(1))), "unexpected tensor 'x'"),
    "made for another target": (
        weights(lambda w: w.update({"fc.weight": torch.zeros(64, 7)})),
        "tensor 'fc.weight' has shape [64, 7]",
    ),
    "eps as text": (configured(rms_norm_eps="1e-5"), "rms_norm_eps: got '1e-5'"),
    "eagle_config as a list": (configured(eagle_config=[1]), "eagle_config: got [1]"),
    "layers as text": (
        configured(eagle_config={"eagle_aux_hidden_state_layer_ids": ["1"]}),
        "after layers ['1']",
    ),
    "rope as a number": (configured(rope_parameters=3), "--draft"),
}


@pytest.mark.parametrize(("damage", "words"), HEADS.values(), ids=HEADS)
def test_calibrate_refuses_damaged_heads(pair, tmp_path, capsys, damage, words):
    folder = copied(pair["eagle3"], tmp_path, damage)
    argv = ["calibrate", "--model", str(pair["target"]), "--draft", str(folder)]
    assert cli.main([*argv, "--out", str(tmp_path / "map.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and words in error and "Traceback" not in error


@pytest.fixture
def launched(pair, monkeypatch):
    """launched(**models) makes arguments with the checks where the plugin puts them."""
    saved = dict(os.environ)

    def start(target=pair["target"], draft=pair["draft"], algorithm="STANDALONE", **more):
        given = {"device": "cpu", "dtype": "float32", "disable_cuda_graph": True, "attention_backend": "sts"}
        return arguments.launched(
            monkeypatch,
            model_path=str(target),
            speculative_draft_model_path=str(draft),
            speculative_algorithm=algorithm,
            **given | more,
        )

    monkeypatch.setenv("SGLANG_PLATFORM", "sts_cpu")
    yield start
    os.environ.clear()
    os.environ.update(saved)


# What is written of a scale; None: what can be divided by.
SCALES = {
    "negative": (-0.5, torch.float32),
    "zero": (0.0, torch.bfloat16),
    "not a number": (float("nan"), torch.float32),
    "infinite": (float("inf"), torch.float16),
    "whole": (None, torch.float32),
    "bfloat16": (None, torch.bfloat16),
}


@pytest.mark.parametrize("model", ["target", "draft"])
@pytest.mark.parametrize(("value", "dtype"), SCALES.values(), ids=SCALES)
def test_scales_are_numbers_above_zero(launched, pair, tmp_path, model, value, dtype):
    """Where SGLang reads them."""
    names = [f"model.layers.0.self_attn.{scale}" for scale in ("k_scale", "v_proj.output_scale")]
    scales = {name: torch.tensor(0.25 if value is None else value, dtype=dtype) for name in names}

    def damage(folder: Path) -> None:
        weights(lambda w: w.update(scales))(folder)
        (folder / "config.json").write_text(json.dumps(config))

    config = json.loads((pair[model] / "config.json").read_text())
    launched(**{model: copied(pair[model], tmp_path / "plain", damage)}, kv_cache_dtype="fp8_e4m3")
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    folder = copied(pair[model], tmp_path / "quantized", damage)
    given = {model: folder, "kv_cache_dtype": "fp8_e4m3", "dtype": "bfloat16"}
    if value is None:
        launched(**given)
        with pytest.raises(ValueError, match="^--dtype float32: .* is quantized by fp8"):
            launched(**given | {"dtype": "float32"})
        return
    with pytest.raises(ConfigError) as caught:
        launched(**given)
    message = str(caught.value)
    assert message.startswith(("--model-path ", "--speculative-draft-model-path ")[model == "draft"])
    said = f"{folder}: model.safetensors: tensor '{names[0]}': got {value}; allowed: a finite number above 0"
    assert said in message


@pytest.mark.parametrize("draft", ["draft", "eagle", "eagle3"])
def test_whole_models_are_launched(launched, pair, draft):
    launched(draft=pair[draft], algorithm="STANDALONE" if draft == "draft" else draft.upper())


def test_the_shipped_models_are_launched(launched):
    launched(MODELS / "target", MODELS / "draft")
    launched(MODELS / "target", MODELS / "eagle3", "EAGLE3")


# How they name the number of their layers, and a tensor.
OTHERS = {
    "ChatGLMModel": ("num_layers", "transformer.encoder.layers.{}.self_attention.query_key_value.weight"),
    "DbrxForCausalLM": ("n_layers", "transformer.blocks.{}.norm_attn_norm.attn.Wqkv.weight"),
    "GPT2LMHeadModel": ("n_layer", "transformer.h.{}.attn.c_attn.weight"),
    "InternLM2ForCausalLM": ("num_hidden_layers", "model.layers.{}.attention.wqkv.weight"),
    "Qwen3MoeForCausalLM": ("num_hidden_layers", "model.layers.{}.self_attn.q_norm.weight"),
}


@pytest.mark.parametrize(("name", "field", "tensor"), [(n, *of) for n, of in OTHERS.items()], ids=OTHERS)
def test_layers_of_other_architectures_have_the_same_of_attention(name, field, tensor):
    """Whose tensors are not known here; the layers' experts may differ."""
    config = {"architectures": [name], field: 3}
    whole = {tensor.format(i): None for i in range(4)}  # the last one of what predicts the token but one
    whole |= {"model.layers.1.mlp.experts.0.up_proj.weight": None, "model.embed_tokens.weight": None}
    checkpoints.check_tensors("it", config, whole, strict=False)
    short = {key: value for key, value in whole.items() if key != tensor.format(1)}
    with pytest.raises(ConfigError, match=f"^it: weights: missing tensor '{tensor.format(1)}'"):
        checkpoints.check_tensors("it", config, short, strict=False)
    checkpoints.check_tensors("it", {**config, "quantization_config": {"bits": 4}}, short, strict=False)


@pytest.mark.parametrize("name", checkpoints.OWN_LAYERS)
def test_a_checkpoint_without_its_own_layer_is_refused_as_a_draft(launched, tmp_path, name):
    """For the next token but one; of the target SGLang needs none of it."""
    target, draft = (
        tiny_architectures.make(tmp_path, name),
        tiny_architectures.own_layer(tmp_path / "own", name),
    )
    given = {"algorithm": "EAGLE", "load_format": "dummy", "speculative_draft_load_format": "auto"}
    given["trust_remote_code"] = True
    launched(target, draft, **given)
    for tensor in load_file(draft / "model.safetensors"):
        if "mlp" in tensor or "q_norm" in tensor or "k_norm" in tensor:
            continue  # not known here
        damage = weights(lambda w, tensor=tensor: w.pop(tensor))
        folder = copied(draft, tmp_path / tensor, damage)
        with pytest.raises(ConfigError, match=f"^--speculative-draft-model-path .*missing tensor '{tensor}'"):
            launched(target, folder, **given)


@pytest.mark.parametrize("name", checkpoints.OWN_LAYERS)
def test_of_a_target_its_own_layer_is_no_layer_of_the_others(name):
    """Nor of as many as they."""
    own = checkpoints.OWN_LAYERS[name].block.format(n=3)
    config = {"architectures": [name], "num_hidden_layers": 3}
    whole = {f"model.layers.{i}.self_attn.q_proj.weight": None for i in range(3)}
    whole[f"{own}.self_attn.q_proj.weight"] = None
    checkpoints.check_tensors("it", config, whole, strict=False)


@pytest.mark.parametrize("model", ["target", "draft"])
@all_of(FILES, CONFIGS, NUMBERS, TENSORS)
def test_a_launch_with_damaged_models_is_refused(launched, pair, tmp_path, model, damage, words):
    folder = copied(pair[model], tmp_path, damage)
    with pytest.raises(ValueError) as caught:
        launched(**{model: folder})
    message = str(caught.value)
    flag = "--model-path" if model == "target" else "--speculative-draft-model-path"
    assert message.startswith(f"{flag} {folder}: ") and words in message and message.isprintable(), message


def test_dummy_weights_need_no_files(launched, pair, tmp_path):
    folder = copied(pair["draft"], tmp_path, weights(lambda w: w.pop(LAYER)))
    launched(draft=folder, load_format="dummy")


def test_a_long_header_is_the_most_that_is_read(tmp_path):
    """What is made of the longest header that is read is bounded, and a longer one is not read."""
    path = tmp_path / "model.safetensors"
    raw = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(40_000)})
    raw = raw.encode().ljust(checkpoints.MAX_HEADER)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"x")
    assert refused(lambda: checkpoints.header("x", path), "its tensors end at") < 2**28
    path.write_bytes((len(raw) + 1).to_bytes(8, "little") + raw + b"xx")
    assert refused(lambda: checkpoints.header("x", path), "header of 16777217 bytes") < 2**20
