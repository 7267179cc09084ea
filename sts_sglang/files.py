"""Files that commands write: checked before the work is done, written beside their place, then renamed."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sts_sglang.config import ConfigError

_numbers = itertools.count()


def check_output(what: str, path: str | os.PathLike[str]) -> None:
    """Raises ConfigError, one line that starts with `what` (a flag or a command) and names the file.

    Only a regular file, or nothing, may be at its place: renaming over /dev/null or a pipe would take it
    away from everybody who uses it. A link counts as what it leads to, and is kept.
    """
    try:
        place, there = Path(os.path.realpath(path)), _status(path)
        if there is not None and (found := _status(place)) is not None and os.path.samestat(there, found):
            problem = _problem(place, there)
        else:  # nothing there, or an open pipe or deleted file by its name in /proc, which leads nowhere
            problem = "cannot be written (not a regular file)" if there else _problem(place, None)
    except (OSError, ValueError) as error:
        problem = f"cannot be written ({getattr(error, 'strerror', None) or error})"
    if problem:
        raise ConfigError(f"{what} {os.fspath(path)}: {problem}; allowed: a file in a folder that is yours")


def _status(path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _problem(place: Path, there: os.stat_result | None) -> str | None:
    folder = _status(place.parent)
    if folder is None or not stat.S_ISDIR(folder.st_mode):
        return "no such folder"
    if there is not None and not stat.S_ISREG(there.st_mode):
        return "cannot be written (not a regular file)"
    if not os.access(place.parent, os.W_OK | os.X_OK):
        return "cannot be written (permission denied)"
    mine = os.geteuid() in (0, folder.st_uid) or there is None or there.st_uid == os.geteuid()
    if folder.st_mode & stat.S_ISVTX and not mine:
        return "cannot be written (another user's file in a shared folder)"
    return None


@contextmanager
def replacing(what: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a new, empty file in the same folder to write; renames it to `path` when all went well.

    So a reader sees the old file or the new one, and a full disk costs nothing that was there. Raises
    ConfigError for what `check_output` refuses, and for an OSError on the way.
    """
    check_output(what, path)
    place = Path(os.path.realpath(path))
    partial = place.parent / f".sts-{os.getpid()}-{next(_numbers)}.partial"
    try:
        partial.open("xb").close()  # never through a link that somebody left under this name
        yield partial
        partial.replace(place)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"{what} {os.fspath(path)}: cannot be written ({reason}); allowed: a file to write"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
