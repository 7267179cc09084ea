"""Fingerprints of models, so that a map made for one is not used with another.

The weight hash covers every tensor's name, dtype and shape and a fixed sample of its bytes, not all of
them: a 16 GB checkpoint takes well under a second. It tells models and fine-tunes apart; it is no proof
against an adversary.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from sts_sglang import checkpoints
from sts_sglang.config import ConfigError

SAMPLES = 4  # evenly spread in each tensor
SAMPLE_BYTES = 256
# Where it came from and what it was saved with; not what it computes.
_IGNORED = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def of_model(path: str, revision: str | None = None) -> dict[str, str] | None:
    """`{"config", "weights"}`: hex SHA-256 of a model folder or a model in the hub's local cache.

    None when the files are not here, or hold no safetensors (dummy weights). Raises ConfigError, one line
    that names the file, for damaged ones.
    """
    folder = _folder(path, revision)
    if folder is None or not checkpoints.safetensors(folder):
        return None
    what = f"model {path}"
    config = checkpoints.read_config(what, folder)
    kept = {key: value for key, value in config.items() if key not in _IGNORED}
    try:
        text = json.dumps(kept, sort_keys=True)
    except RecursionError:
        raise ConfigError(
            f"{what}: config.json: nested too deeply; allowed: a model's configuration"
        ) from None
    headers = checkpoints.read_headers(what, folder)
    return {"config": hashlib.sha256(text.encode()).hexdigest(), "weights": _weights(folder, headers)}


def _weights(folder: Path, headers: dict[str, dict[str, checkpoints.Tensor]]) -> str:
    tensors = {}
    for name_of_file, header in headers.items():
        with open(folder / name_of_file, "rb") as file:
            for name, tensor in header.items():
                size = tensor.end - tensor.begin
                digest = hashlib.sha256(json.dumps([tensor.dtype, list(tensor.shape)]).encode())
                for i in range(SAMPLES):
                    file.seek(tensor.begin + i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                    digest.update(file.read(min(SAMPLE_BYTES, size)))
                tensors[name] = digest.hexdigest()
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def _folder(path: str, revision: str | None) -> Path | None:
    if os.path.isdir(path):
        return Path(path)
    from transformers.utils import cached_file

    try:
        return Path(cached_file(path, "config.json", revision=revision, local_files_only=True)).parent
    except (OSError, ValueError):
        return None
