"""Model folders as they lie on disk: configuration and headers of weights, checked before they are loaded.

SGLang leaves a parameter whose tensor is missing as it was allocated, and transformers draws it at random:
both go on, and what they compute is noise. A damaged file ends either in a traceback, or in as much memory as
its header asks for. Here every one of these is a line that names the file and the tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sts_sglang.config import MAX_LAYERS, ConfigError, quoted, shown

MAX_CONFIG = 4 << 20
MAX_INDEX = 32 << 20
MAX_HEADER = 16 << 20  # 100,000 tensors; the format's own limit of 100 MB takes gigabytes to parse
INDEX = "model.safetensors.index.json"

# The largest that is believed: a model of more than that is a damaged file.
INTEGERS = {
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "hidden_size": 2**17,
    "target_hidden_size": 2**17,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
    "draft_vocab_size": 2**24,
    "max_position_embeddings": 2**30,
}
NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
_WIDTHS = {
    1: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0",
    2: "U16 I16 F16 BF16",
    4: "U32 I32 F32",
    8: "U64 I64 F64 C64",
}
WIDTHS = {dtype: width for width, dtypes in _WIDTHS.items() for dtype in dtypes.split()}
# Of one number: as struct unpacks it.
NUMBERS = {"F16": "<e", "BF16": "<f", "F32": "<f", "F64": "<d"}
# As the names of a layer's scales of keys, of values, and of both end.
SCALES = (".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale")
# How configurations name the number of layers.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_OF_A_LAYER = re.compile(r"(?P<stack>(?:[a-z_]+\.)+)(?P<layer>\d+)(?P<part>\..+)")


class Tensor(NamedTuple):
    """begin, end: bytes in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class OwnLayer(NamedTuple):
    """A model's own layer for the next token but one, as it stands in its checkpoint. {n}: how many layers
    the model has besides.

    made: the class that SGLang makes of it. block: its decoder layer. norms: those outside of that, in words.
    joined: what joins a token's embedding and the target's state.
    """

    made: str
    block: str
    norms: str
    joined: str


OWN_LAYERS = {
    "Ernie4_5_MoeForCausalLM": OwnLayer(
        "Ernie4_5_MoeForCausalLMMTP",
        "model.mtp_block.0",
        "model.mtp_emb_norm.0 model.mtp_hidden_norm.0",
        "model.mtp_linear_proj.0",
    ),
    "Glm4MoeForCausalLM": OwnLayer(
        "Glm4MoeForCausalLMNextN",
        "model.layers.{n}",
        "model.layers.{n}.enorm model.layers.{n}.hnorm model.layers.{n}.shared_head.norm",
        "model.layers.{n}.eh_proj",
    ),
    "HYV3ForCausalLM": OwnLayer(
        "HYV3ForCausalLMNextN",
        "model.layers.{n}",
        "model.layers.{n}.enorm model.layers.{n}.hnorm model.layers.{n}.final_layernorm",
        "model.layers.{n}.eh_proj",
    ),
    "MiMoForCausalLM": OwnLayer(
        "MiMoMTP",
        "model.mtp_layers.0",
        "model.mtp_layers.0.token_layernorm model.mtp_layers.0.hidden_layernorm "
        "model.mtp_layers.0.final_layernorm",
        "model.mtp_layers.0.input_proj",
    ),
    "Qwen3MoeForCausalLM": OwnLayer(
        "Qwen3MoeForCausalLMMTP",
        "mtp.layers.0",
        "mtp.pre_fc_norm_embedding mtp.pre_fc_norm_hidden mtp.norm",
        "mtp.fc",
    ),
}


def read_config(what: str, folder: Path) -> dict[str, Any]:
    """config.json. Raises ConfigError, one line that starts with `what` and names the file."""
    config = _json(what, folder / "config.json", MAX_CONFIG)
    names = config.get("architectures")
    is_list = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if names is not None and not is_list:
        raise _error(what, "config.json", f"architectures: got {shown(names)}", "a list of names")
    quantized = config.get("quantization_config")
    if quantized is not None and not isinstance(quantized, dict):
        problem = f"quantization_config: got {shown(quantized)}"
        raise _error(what, "config.json", problem, 'an object such as {"quant_method": "fp8"}')
    return config


def check_numbers(what: str, config: Mapping[str, Any], needed: tuple[str, ...] = ()) -> None:
    """That the sizes of a config.json are numbers and could be those of a model. Raises ConfigError."""
    for key, most in INTEGERS.items():
        value = config.get(key)
        if value is None and key not in needed:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise _error(what, "config.json", f"{key}: got {shown(value)}", f"an integer from 1 to {most}")


def read_headers(what: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by name, of every safetensors file by name.

    Raises:
        ConfigError: a damaged file, or an index that names a file or a tensor which is not there.
    """
    files = {path.name: header(what, path) for path in safetensors(folder)}
    if (folder / INDEX).exists():
        _check_index(what, folder, files)
    return files


def check_folder(what: str, folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors by name; none when it holds no such files. Raises as above."""
    return by_name(read_headers(what, folder))


def by_name(headers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor of all files."""
    return {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}


def check_scales(what: str, folder: Path, headers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """That the scales of keys and values are such by which can be divided. Raises ConfigError."""
    for file, tensors in headers.items():
        for name, tensor in tensors.items():
            if not name.endswith(SCALES) or math.prod(tensor.shape) != 1 or tensor.dtype not in NUMBERS:
                continue
            value = _number(what, folder / file, tensor)
            if not (math.isfinite(value) and value > 0):
                raise _error(what, file, f"tensor {quoted(name)}: got {value}", "a finite number above 0")


def _number(what: str, path: Path, tensor: Tensor) -> float:
    with _open(what, path) as file:
        file.seek(tensor.begin)
        content = file.read(tensor.end - tensor.begin)
    # A bfloat16 is the upper half of a float32.
    return struct.unpack(NUMBERS[tensor.dtype], b"\0\0" * (tensor.dtype == "BF16") + content)[0]


def safetensors(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def header(what: str, path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, by its header alone, which is read only if it can be one."""
    with _open(what, path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise _error(what, path.name, f"header of {length} bytes", f"at most {MAX_HEADER}")
        start = 8 + length
        if start > size:
            raise _error(what, path.name, f"{size} bytes, and its header ends at {start}", "a whole file")
        found = _parse(what, path.name, file.read(length))
    notes = found.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise _error(what, path.name, f"__metadata__: got {shown(notes)}", "an object of strings")
    tensors = {name: _tensor(what, path.name, name, entry, start) for name, entry in found.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.begin != end:
            raise _error(what, path.name, f"tensor {quoted(name)} begins at {tensor.begin}", f"{end}, no gap")
        end = tensor.end
    if end != size:
        raise _error(what, path.name, f"{size} bytes, and its tensors end at {end}", "a whole file")
    return tensors


def _tensor(what: str, file: str, name: str, entry: Any, start: int) -> Tensor:
    def refuse(problem: str) -> ConfigError:
        allowed = '{"dtype": ..., "shape": [...], "data_offsets": [begin, end]} that agree'
        return _error(what, file, f"tensor {quoted(name)}: {problem}", allowed)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise refuse(f"got {shown(entry)}")
    width = WIDTHS.get(dtype)
    if offsets[1] < offsets[0] or (width and math.prod(shape) * width != offsets[1] - offsets[0]):
        raise refuse(f"{quoted(dtype)} of shape {shown(shape)} in bytes {shown(offsets)}")
    return Tensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 16 and all(type(x) is int and 0 <= x < 2**63 for x in value)
    )


def _check_index(what: str, folder: Path, files: dict[str, dict[str, Tensor]]) -> None:
    names = _json(what, folder / INDEX, MAX_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise _error(what, INDEX, f"weight_map: got {shown(names)}", "an object of tensors and their files")
    for tensor, file in names.items():
        if file not in files:
            raise _error(what, INDEX, f"names {quoted(file)}, which is not there", "a whole checkpoint")
        if tensor not in files[file]:
            problem = f"names tensor {quoted(tensor)}, which {quoted(file)} does not hold"
            raise _error(what, INDEX, problem, "a whole checkpoint")


def check_tensors(what: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], strict: bool) -> None:
    """That a checkpoint holds what its configuration asks for, in its shapes; of an architecture whose
    tensors are not known here, that all layers have the same of attention. Nothing for quantized ones, whose
    tensors have other names.

    Raises:
        ConfigError: a tensor is missing or has another shape; with `strict`, one is there for no reason.
    """
    expected = _expected(config)
    if config.get("quantization_config"):
        return
    if expected is None:
        return _check_alike(what, config, tensors)
    bare = {name.removeprefix("model.") if _is_head(config) else name: t for name, t in tensors.items()}
    names = {name.replace("midlayer.", "layers.0.", 1): t for name, t in bare.items()}
    missing = [name for name, shape in expected.items() if name not in names and shape is not None]
    if missing:
        raise _error(what, "weights", _some("missing", missing), _made_for(config))
    for name, shape in expected.items():
        if name in names and shape and names[name].shape != shape:
            problem = f"tensor {quoted(name)} has shape {list(names[name].shape)}"
            raise _error(what, "weights", problem, f"{list(shape)}, as config.json says")
    unexpected = [name for name in names if name not in expected and "rotary_emb." not in name]
    if strict and unexpected:
        raise _error(what, "weights", _some("unexpected", unexpected), _made_for(config))


def _check_alike(what: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """That what one layer has of attention every layer has; of experts the first layers may have none."""
    layers = _layers(config)
    found: dict[str, set[int]] = {}
    for name in tensors:
        match = _OF_A_LAYER.match(name)
        if match and "att" in match["part"] and "mtp" not in match["stack"]:
            found.setdefault(f"{match['stack']}{{}}{match['part']}", set()).add(int(match["layer"]))
    numbers = range(layers if type(layers) is int else 0)
    missing = [name.format(i) for name, there in found.items() for i in numbers if i not in there]
    if missing:
        raise _error(what, "weights", _some("missing", missing), _made_for(config))


def _some(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{kind} tensor{'s' * (len(names) > 1)} {', '.join(map(quoted, sorted(names)[:3]))}{more}"


def _made_for(config: Mapping[str, Any]) -> str:
    return f"the tensors of {quoted(config['architectures'][0])} with {_layers(config)} layers"


def _layers(config: Mapping[str, Any]) -> Any:
    return next((config[key] for key in _LAYERS if config.get(key) is not None), None)


def _is_head(config: Mapping[str, Any]) -> bool:
    return config["architectures"][0].endswith(("Eagle", "Eagle3"))


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None] | None:
    """Shape of every tensor by name, () for any, None for one that may be missing; None in all for a model
    whose tensors are not known here."""
    name = (config.get("architectures") or [""])[0]
    if name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        return dict(_of_model(config, name))
    if name.endswith(("Eagle", "Eagle3")):
        return dict(_of_head(config, name.endswith("3")))
    own = next((layer for layer in OWN_LAYERS.values() if layer.made == name), None)
    return dict(_of_own_layer(config, own)) if own else None


def _of_model(config: Mapping[str, Any], name: str) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    # Tied, by its own word or by default, it may be there all the same.
    yield "lm_head.weight", (vocab, hidden) if config.get("tie_word_embeddings") is False else None
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield from _block(config, layer, hidden)
        dim, biased = _dim(config), config.get("attention_bias", False)
        if name == "Qwen3ForCausalLM":
            yield f"{layer}.self_attn.q_norm.weight", (dim,)
            yield f"{layer}.self_attn.k_norm.weight", (dim,)
        for part in "qkv" if name == "Qwen2ForCausalLM" else "qkvo" if biased else "":
            yield f"{layer}.self_attn.{part}_proj.bias", ()
        for part in ("gate", "up", "down") if config.get("mlp_bias", False) else ():
            yield f"{layer}.mlp.{part}_proj.bias", ()


def _of_head(config: Mapping[str, Any], eagle3: bool) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """As SGLang's models/llama_eagle.py and llama_eagle3.py name them; embeddings may be the target's."""
    hidden = config["hidden_size"]
    yield "fc.weight", ()
    for name in ("fc.bias", "embed_tokens.weight", "lm_head.weight", "d2t", "t2d"):
        yield name, None
    yield "norm.weight", (hidden,) if eagle3 else None
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,) if eagle3 or i else None
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if eagle3:
            yield f"{layer}.hidden_norm.weight", (hidden,)
        yield from _block(config, layer, hidden * (2 if eagle3 and i == 0 else 1))
        for part in "qkvo":
            yield f"{layer}.self_attn.{part}_proj.bias", None


def _of_own_layer(config: Mapping[str, Any], own: OwnLayer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What it has beside experts, by which models differ; embeddings are the target's."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    number = 0 if layers == 1 else layers  # alone in a checkpoint it is the first
    block, norms, joined = (names.format(n=number) for names in (own.block, own.norms, own.joined))
    yield f"{joined}.weight", (hidden, 2 * hidden)
    for name in (*norms.split(), f"{block}.input_layernorm", f"{block}.post_attention_layernorm"):
        yield f"{name}.weight", (hidden,)
    yield from _attention(config, block, hidden)
    for part in "qkv" if config.get("attention_bias") else "":
        yield f"{block}.self_attn.{part}_proj.bias", ()


def _block(config: Mapping[str, Any], layer: str, reads: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config.get("intermediate_size")
    yield from _attention(config, layer, reads)
    for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"{layer}.mlp.{part}_proj.weight", shape if inner else ()


def _attention(config: Mapping[str, Any], layer: str, reads: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, dim = config["hidden_size"], config["num_attention_heads"], _dim(config)
    kv_heads = config.get("num_key_value_heads") or heads
    yield f"{layer}.self_attn.q_proj.weight", (heads * dim, reads)
    yield f"{layer}.self_attn.k_proj.weight", (kv_heads * dim, reads)
    yield f"{layer}.self_attn.v_proj.weight", (kv_heads * dim, reads)
    yield f"{layer}.self_attn.o_proj.weight", (hidden, heads * dim)


def _dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _json(what: str, path: Path, most: int) -> dict[str, Any]:
    with _open(what, path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise _error(what, path.name, f"{size} bytes", f"at most {most}")
        return _parse(what, path.name, file.read(size))


def _parse(what: str, name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        problem = "nested too deeply" if deep else f"not JSON ({quoted(error, 120)})"
        raise _error(what, name, problem, "a JSON object") from None
    if not isinstance(value, dict):
        raise _error(what, name, f"got {shown(value)}", "a JSON object")
    return value


def _open(what: str, path: Path) -> BinaryIO:
    try:
        # Non-blocking, so that a pipe without a writer is refused below instead of waited for.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except OSError as error:
        raise _error(what, path.name, f"cannot be read ({error.strerror})", "a regular file") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _error(what, path.name, "not a regular file", "a regular file")
    return file


def _error(what: str, file: str, problem: str, allowed: str) -> ConfigError:
    return ConfigError(f"{what}: {file}: {problem}; allowed: {allowed}")
