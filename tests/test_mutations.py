"""Every private name and field of SGLang, taken away in turn: the load check must name it.

A mutation runs in a fork of a process that has imported SGLang: what it takes away is back for the next one.
That a problem of the check ends the launch is in test_plugin.py.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sts_sglang.host import compat
from sts_sglang.host.compat import release

ROOT = Path(__file__).parents[1]


def take_name(path: str) -> None:
    """A function, class or module attribute, from whoever of SGLang defines it."""
    owner_path, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    for holder in (owner, *getattr(owner, "__mro__", type(owner).__mro__)):
        if name in vars(holder) and getattr(holder, "__module__", None) != "builtins":
            _take(holder, name)


def take_field(path: str, field: str) -> None:
    """A field: the attribute, its annotation, and every assignment to `self` in the sources."""
    module, _, _ = path.rpartition(".")
    assigned, class_in = compat._assigned, compat._class_in
    compat._assigned = lambda node: assigned(node) - {field}
    if module in release.NOT_IMPORTED:
        compat._class_in = lambda file, name: _without(class_in(file, name), field)
        return
    for base in pkgutil.resolve_name(path).__mro__:
        vars(base).get("__annotations__", {}).pop(field, None)
        if field in vars(base):
            _take(base, field)


def swap_parameters(target: compat.Target) -> None:
    """The last two that are relied on change places."""
    *first, one, other = target.params
    owner_path, _, name = target.path.rpartition(".")
    made = {}
    exec(f"def {name}({', '.join([*first, other, one])}): ...", made)
    owner = pkgutil.resolve_name(owner_path)
    setattr(owner, name, made[name])


def _take(holder: object, name: str) -> None:
    if name in getattr(holder, "__members__", {}):  # of an Enum
        holder._member_map_.pop(name)
    if isinstance(holder, type):
        type.__delattr__(holder, name)
    else:
        delattr(holder, name)


def _without(tree: ast.ClassDef, method: str) -> ast.ClassDef:
    tree = copy.deepcopy(tree)
    tree.body = [node for node in tree.body if getattr(node, "name", None) != method]
    return tree


# What is taken -> (how, the check that must notice it, what that has to name).
MUTATIONS: dict[str, tuple[Callable[[], None], Callable[[], str | None], str]] = {
    **{
        f"hook {target.path}": (
            partial(take_name, target.path),
            partial(compat._check_target, target),
            target.path,
        )
        for target in compat.HOOK_TARGETS
    },
    **{
        f"name {path}": (partial(take_name, path), partial(compat._check_symbol, path), path)
        for path in release.SYMBOLS
    },
    **{
        f"call {target.path}": (
            partial(swap_parameters, target),
            partial(compat._check_params, target),
            f"{target.path} takes",
        )
        for target in compat.CALLS
    },
    **{
        f"field {path}.{field}": (
            partial(take_field, path, field),
            partial(compat._check_fields, path, fields),
            f"{path} has no {field}",
        )
        for path, fields in release.FIELDS.items()
        for field in fields
    },
}


def run(mutate: Callable[[], None], check: Callable[[], str | None], named: str) -> str:
    """In the fork: what went wrong, empty when the check named what was taken."""
    mutate()
    problem = check()
    if problem is None:
        return "was not noticed"
    return "" if named in problem else f"says: {problem[:300]}"


def run_all() -> None:
    """In the child: mutation -> what went wrong."""
    assert not [problem for problem in compat.findings().values() if problem]
    outcomes = {}
    for name, mutation in MUTATIONS.items():
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                found = run(*mutation)
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            os.write(writer, found.encode()[:1000])
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            outcomes[name] = pipe.read()
        os.waitpid(pid, 0)
    print(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    child = subprocess.run(
        [sys.executable, "-c", "from tests.test_mutations import run_all; run_all()"],
        env={**os.environ, "SGLANG_PLUGINS": "none", "SGLANG_PLATFORM": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["hook", "name", "call", "field"])
def test_whatever_is_taken_away_ends_the_launch(kind: str, outcomes) -> None:
    chosen = {name: problem for name, problem in outcomes.items() if name.startswith(f"{kind} ")}
    assert len(chosen) > 8
    assert not {name: problem for name, problem in chosen.items() if problem}
