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

SAMPLES = 4  # evenly spread in each tensor
SAMPLE_BYTES = 256
MAX_HEADER = 100 << 20  # the format's own limit
# Where it came from and what it was saved with; not what it computes.
_IGNORED = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def of_model(path: str, revision: str | None = None) -> dict[str, str] | None:
    """`{"config", "weights"}`: hex SHA-256 of a model folder or a model in the hub's local cache.

    None when the files are not here, or hold no safetensors (dummy weights).
    """
    folder = _folder(path, revision)
    if folder is None:
        return None
    files = sorted(folder.glob("*.safetensors"))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not files or not isinstance(config, dict):
            return None
        kept = {key: value for key, value in config.items() if key not in _IGNORED}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        return {"config": digest, "weights": _weights(files)}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged files: loading the model says more about them


def _weights(files: list[Path]) -> str:
    tensors = {}
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"header of {size} bytes")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                digest = hashlib.sha256(json.dumps([tensor["dtype"], tensor["shape"]]).encode())
                for i in range(SAMPLES):
                    file.seek(8 + size + begin + i * max(end - begin - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                    digest.update(file.read(min(SAMPLE_BYTES, end - begin)))
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
