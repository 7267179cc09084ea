"""What was learned of a finished request's tokens: written by the server, read by `sts-sglang inspect`.

Off unless the operator names a folder (`inspect_dir`), and then only for requests that ask for it. A
dump is a .npz of plain arrays: whoever can read the folder can read the tokens of these requests.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import struct
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

import numpy as np
import torch

from sts_kernels.layout import IMPORTANCE_SCALE, UNKNOWN
from sts_sglang.config import ConfigError, HistoryMode, one_line, quoted, request_inspect
from sts_sglang.core.request import Finished
from sts_sglang.core.runtime import Runtime
from sts_sglang.core.selectors.base import Scored

logger = logging.getLogger(__name__)

VERSION = 1
PREFIX = "sts-"
MAX_FILES = 100  # in the folder
MAX_BYTES = 2**31  # of the folder
MAX_FILE = MAX_BYTES + 2**20  # of one dump that is read: headers included
MAX_META = 2**20
MAX_DIRECTORY = 4096  # of the archive
MAX_SCORE = 65504  # of float16, in which slots remember
PIECE = 2**20  # bytes read at a time
SIGNALS = ("history", "last round", "page scores", "token scores")
ARRAYS = {"importance": "f", "channels": "i", "tokens": "i"}

_numbers = itertools.count()


class Dump(NamedTuple):
    """importance float32 [channels, L], by position an attention probability or a part of a page's,
    UNKNOWN (-1) where nothing is known; channels int32 [target layers, KV heads]; tokens int32 [L], the
    context; meta: configuration, head map, lengths."""

    importance: np.ndarray
    channels: np.ndarray
    tokens: np.ndarray
    meta: dict[str, Any]


def finished(runtime: Runtime, ended: Finished, table: torch.Tensor) -> None:
    """Dump a request that asks for it; it still owns its slots. Waits for the device.

    A dump that fails is logged: the request and the server go on.
    """
    folder, request = runtime.config.inspect_dir, ended.request
    try:
        if folder is None or not request_inspect(request.params, runtime.config):
            return
        if (dump := of_request(runtime, ended, table)) is not None:
            path = write(Path(folder), dump)
            logger.info("STS: request %s dumped to %s", quoted(request.rid), path.name)
    except (ConfigError, OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        logger.warning("STS: request %s was not dumped: %s", quoted(request.rid), one_line(error, 300))


def of_request(runtime: Runtime, ended: Finished, table: torch.Tensor) -> Dump | None:
    """What is known of the request's tokens, by what selects. Of several ranks, which have to ask together,
    the first one tells it for the heads of all, and the others None."""
    tokens, row = ended.tokens, ended.request.row
    if table.is_cuda:  # rounds in flight on the stream of the forwards
        torch.cuda.synchronize(table.device)
    own = _scored(runtime, row, table[row, : len(tokens)])
    by_rank, numbers = runtime.ranks.gather(own.importance), runtime.ranks.gather(own.channels)
    if by_rank is None:
        return None
    if not all(len(rows) for rows in by_rank):
        raise ValueError("there was no room for its scores")
    first = itertools.accumulate((len(rows) for rows in by_rank), initial=0)
    channels = torch.cat([of_rank + start for of_rank, start in zip(numbers, first, strict=False)], 1)
    return Dump(
        torch.cat(by_rank).numpy(),
        channels.numpy(),
        np.array(tokens, dtype=np.int32),
        {
            "version": VERSION,
            "prompt_tokens": len(ended.request.prompt),
            "cached_tokens": ended.cached,
            "config": json.loads(runtime.config.to_json()),
            "head_map": runtime.head_map.origin,
            "signal": own.signal,
        },
    )


def _scored(runtime: Runtime, row: int, slots: torch.Tensor) -> Scored:
    """With importance as a probability; without a row of it where there is no room, for others wait."""
    try:
        found = runtime.selector.scored(row, slots.long())
        importance = found.importance.float()
        importance = torch.where(importance == UNKNOWN, importance, importance / IMPORTANCE_SCALE)
    except (MemoryError, torch.OutOfMemoryError):
        channels = torch.zeros_like(runtime.selector.channels, device="cpu")
        return Scored(torch.empty(0, slots.numel()), channels, "last round")
    return found._replace(importance=importance)


def write(folder: Path, dump: Dump) -> Path:
    """Write a dump under a name of our own, for this user's eyes only. Raises ValueError when the folder
    holds as much as it may."""
    there = _sizes(folder)
    size = sum(array.nbytes for array in dump[:3])
    if len(there) >= MAX_FILES or sum(there) + size > MAX_BYTES:
        raise ValueError(f"{len(there)} dumps of {sum(there)} bytes are there; move some of them away")
    path = folder / f"{PREFIX}{time.time_ns()}-{os.getpid()}-{next(_numbers)}.npz"
    partial = path.with_suffix(".partial")
    try:
        # Whatever the umask: others may read the folder, and these are a user's tokens.
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            arrays = dict(zip(ARRAYS, dump[:3], strict=True))
            np.savez(file, **arrays, meta=np.array(json.dumps(dump.meta)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _sizes(folder: Path) -> list[int]:
    """Of the dumps in the folder, of whichever server; somebody may move one away meanwhile."""
    sizes = []
    for entry in os.scandir(folder):
        if entry.name.startswith(PREFIX):
            with suppress(FileNotFoundError):
                sizes.append(entry.stat(follow_symlinks=False).st_size)
    return sizes


def read(path: Path) -> Dump:
    """Read a dump. Raises ConfigError, one line, for what is not one."""
    try:
        if not (path.suffix == ".npz" and path.is_file()):
            raise ValueError("no .npz file")
        with path.open("rb") as file:
            dump = _unpack(file)
    except Exception as error:  # numpy, zipfile and json raise of everything for what others wrote
        raise ConfigError(f"{path}: not a dump ({quoted(str(error) or type(error).__name__, 120)})") from None
    if not _is_dump(dump):
        raise ConfigError(f"{path}: not a dump of this version; allowed: files written under inspect_dir")
    if dump.channels.min() < 0 or dump.channels.max() >= len(dump.importance):
        raise ConfigError(f"{path}: names channel {dump.channels.max()} of {len(dump.importance)}")
    return dump


def _unpack(file: BinaryIO) -> Dump:
    """Reads no more than the file is long: what its headers say is compared with that first.

    A server stores its arrays as they are, so a compressed member is none of ours, and what a member holds
    is at most as large as the file.
    """
    _check_end(file)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if set(members) != {f"{name}.npy" for name in (*ARRAYS, "meta")}:
            raise ValueError("it has other members")
        if any(info.compress_type or info.compress_size != info.file_size for info in members.values()):
            raise ValueError("its members are compressed, which a server's are not")
        if sum(info.file_size for info in members.values()) > os.fstat(file.fileno()).st_size:
            raise ValueError("its members are larger than the file")
        if members["meta.npy"].file_size > MAX_META:
            raise ValueError(f"its meta has more than {MAX_META} bytes")
        arrays = [_array(archive, members[f"{name}.npy"], kind) for name, kind in ARRAYS.items()]
        return Dump(*arrays, json.loads(str(_array(archive, members["meta.npy"], "U"))))


def _check_end(file: BinaryIO) -> None:
    """That the archive's directory is as short as ours: zipfile reads all of it before it says anything."""
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE:
        raise ValueError(f"{size} bytes, more than {MAX_FILE}")
    file.seek(max(0, size - 42))
    locator, end = file.read(20), file.read(22)
    if end[:4] != b"PK\5\6" or locator[:4] == b"PK\6\7":  # the second would name another directory
        raise ValueError("no archive that a server wrote")
    count, length = struct.unpack("<HI", end[10:16])
    if count != len(ARRAYS) + 1 or length > MAX_DIRECTORY:
        raise ValueError("it has other members")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kind: str) -> np.ndarray:
    """One member, whose header must say as many bytes as there are."""
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):  # later ones have headers of any length
            raise ValueError("an array of another format")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.kind != kind:
            raise ValueError(f"an array of {dtype}")
        data = np.empty(info.file_size - member.tell(), np.uint8)
        if math.prod(shape) * dtype.itemsize != data.size:
            raise ValueError(f"an array of shape {shape} in {data.size} bytes")
        for start in range(0, data.size, PIECE):
            data[start : start + PIECE] = np.frombuffer(member.read(min(PIECE, data.size - start)), np.uint8)
        return data.view(dtype).reshape(shape, order="F" if by_column else "C")


def _is_dump(dump: Dump) -> bool:
    importance, channels, tokens, meta = dump
    kinds = {name: getattr(array, "dtype", np.dtype("O")) for name, array in zip(ARRAYS, dump, strict=False)}
    if {name: dtype.kind for name, dtype in kinds.items()} != ARRAYS:
        return False
    shaped = importance.ndim == channels.ndim == 2 and tokens.shape == importance.shape[1:]
    if not (shaped and channels.size):
        return False
    if not (importance.min(initial=0) >= UNKNOWN and importance.max(initial=0) <= MAX_SCORE):  # false for NaN
        return False
    return tokens.min(initial=0) >= 0 and tokens.max(initial=0) < 2**31 and _is_meta(meta)


def _is_meta(meta: Any) -> bool:
    expected = {"version": int, "prompt_tokens": int, "cached_tokens": int, "config": dict}
    expected |= {"head_map": str, "signal": str}
    if not isinstance(meta, dict) or any(type(meta.get(key)) is not kind for key, kind in expected.items()):
        return False
    history, decay = (meta["config"].get(key) for key in ("history", "history_decay"))
    known = meta["signal"] in SIGNALS and isinstance(history, str) and history in get_args(HistoryMode)
    counted = 0 <= meta["prompt_tokens"] < 2**31
    return meta["version"] == VERSION and known and counted and type(decay) in (int, float)
