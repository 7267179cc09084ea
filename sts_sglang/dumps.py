"""What was learned of a finished request's tokens: written by the server, read by `sts-sglang inspect`.

Off unless the operator names a folder (`inspect_dir`), and then only for requests that ask for it. A
dump is a .npz of plain arrays: whoever can read the folder can read the tokens of these requests.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sts_kernels import IMPORTANCE_SCALE, UNKNOWN
from sts_sglang.config import ConfigError, one_line, quoted, request_inspect

if TYPE_CHECKING:
    from sts_sglang.runtime import StsRuntime

logger = logging.getLogger(__name__)

VERSION = 1
PREFIX = "sts-"
MAX_FILES = 100  # in the folder
MAX_BYTES = 2**31  # of the folder
ARRAYS = {"importance": "f", "channels": "i", "tokens": "i"}

_numbers = itertools.count()


class Dump(NamedTuple):
    """importance float32 [channels, L], a draft attention probability by position, UNKNOWN (-1) where
    nothing is known; channels int32 [target layers, KV heads]; tokens int32 [L], the context; meta:
    configuration, head map, lengths."""

    importance: np.ndarray
    channels: np.ndarray
    tokens: np.ndarray
    meta: dict[str, Any]


def finished(runtime: StsRuntime, req: Any, table: torch.Tensor) -> None:
    """Dump a request that asks for it; it still owns its slots. Waits for the device.

    A dump that fails is logged: the request and the server go on.
    """
    folder = runtime.config.inspect_dir
    try:
        if folder is None or not request_inspect(req.sampling_params.custom_params):
            return
        path = write(Path(folder), of_request(runtime, req, table))
        logger.info("STS: request %s dumped to %s", quoted(req.rid), path.name)
    except (ConfigError, OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        logger.warning("STS: request %s was not dumped: %s", quoted(req.rid), one_line(error, 300))


def of_request(runtime: StsRuntime, req: Any, table: torch.Tensor) -> Dump:
    """What slots remember of the request's tokens or, without history, how its last round scored them."""
    tokens = [*req.origin_input_ids, *req.output_ids_through_stop][: req.kv_committed_len]
    if table.is_cuda:  # rounds in flight on the stream of the forwards
        torch.cuda.synchronize(table.device)
    state, head_map = runtime.state, runtime.head_map
    if state.history is not None:
        slots = table[req.req_pool_idx, : len(tokens)].long()
        # Some at a time: the device may have no room for all.
        importance = torch.cat([state.history.remembered[some].cpu() for some in slots.split(4096)]).T
    else:
        importance = state.last_scores(req.req_pool_idx, len(tokens))
    importance = importance.cpu().float()
    importance = torch.where(importance == UNKNOWN, importance, importance / IMPORTANCE_SCALE)
    return Dump(
        importance.numpy(),
        np.array([head_map.head_channels(i) for i in range(len(head_map.sources))], dtype=np.int32),
        np.array(tokens, dtype=np.int32),
        {
            "version": VERSION,
            "prompt_tokens": len(req.origin_input_ids),
            "cached_tokens": req.cached_tokens,
            "config": json.loads(runtime.config.to_json()),
            "head_map": head_map.origin,
            "signal": "last round" if state.history is None else "history",
        },
    )


def write(folder: Path, dump: Dump) -> Path:
    """Write a dump under a name of our own. Raises ValueError when the folder holds as much as it may."""
    there = [entry.stat().st_size for entry in os.scandir(folder) if entry.name.startswith(PREFIX)]
    size = sum(array.nbytes for array in dump[:3])
    if len(there) >= MAX_FILES or sum(there) + size > MAX_BYTES:
        raise ValueError(f"{len(there)} dumps of {sum(there)} bytes are there; move some of them away")
    path = folder / f"{PREFIX}{time.time_ns()}-{os.getpid()}-{next(_numbers)}.npz"
    partial = path.with_suffix(".partial")
    try:
        with partial.open("xb") as file:
            arrays = dict(zip(ARRAYS, dump[:3], strict=True))
            np.savez(file, **arrays, meta=np.array(json.dumps(dump.meta)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(path: Path) -> Dump:
    """Read a dump. Raises ConfigError, one line, for what is not one."""
    try:
        if not (path.suffix == ".npz" and path.is_file()):
            raise ValueError("no .npz file")
        with np.load(path, allow_pickle=False) as file:
            dump = Dump(*(file[name] for name in ARRAYS), json.loads(str(file["meta"])))
    except Exception as error:  # numpy, zipfile and json raise of everything for what others wrote
        raise ConfigError(f"{path}: not a dump ({quoted(str(error) or type(error).__name__, 120)})") from None
    if not _is_dump(dump):
        raise ConfigError(f"{path}: not a dump of this version; allowed: files written under inspect_dir")
    if dump.channels.min() < 0 or dump.channels.max() >= len(dump.importance):
        raise ConfigError(f"{path}: names channel {dump.channels.max()} of {len(dump.importance)}")
    return dump


def _is_dump(dump: Dump) -> bool:
    importance, channels, tokens, meta = dump
    kinds = {name: getattr(array, "dtype", np.dtype("O")) for name, array in zip(ARRAYS, dump, strict=False)}
    if {name: dtype.kind for name, dtype in kinds.items()} != ARRAYS:
        return False
    shaped = importance.ndim == channels.ndim == 2 and tokens.shape == importance.shape[1:]
    if not (shaped and channels.size and np.isfinite(importance).all()):
        return False
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
        return False
    expected = {"version": int, "prompt_tokens": int, "cached_tokens": int, "config": dict}
    expected |= {"head_map": str, "signal": str}
    if not isinstance(meta, dict) or any(type(meta.get(key)) is not kind for key, kind in expected.items()):
        return False
    history, decay = (meta["config"].get(key) for key in ("history", "history_decay"))
    words = (history, meta["signal"], meta["head_map"])
    plain = all(isinstance(word, str) and word.isprintable() for word in words)
    return meta["version"] == VERSION and plain and isinstance(decay, (int, float))
