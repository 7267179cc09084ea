"""Every private name and field of SGLang that the plugin touches, checked when the plugin loads.

SGLang's plugin loader logs a failing plugin and serves on without it; whoever asked for `sts` would
then measure stock attention. So nothing is hooked before `check()` has found every name and every field,
and the backends refuse to start unless every hook is in place (`unhooked()`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import pkgutil
from typing import NamedTuple

from sts_sglang.host.releases import RELEASES, installed_version, release


class Target(NamedTuple):
    """A function we hook, with the parameter names the hook relies on."""

    path: str
    params: tuple[str, ...]


# By the function that hooks it.
HOOKS = {name: Target(*target) for name, target in release.HOOKS.items()}
CPU_HOOKS = {name: Target(*target) for name, target in release.CPU_HOOKS.items()}
HOOK_TARGETS, CPU_TARGETS = tuple(HOOKS.values()), tuple(CPU_HOOKS.values())
CALLS = tuple(Target(*target) for target in release.CALLS)


class Incompatible(RuntimeError):
    """This SGLang is not one the plugin can attach to."""


def check(cpu_platform: bool = False) -> None:
    """Find every upstream name in its expected shape.

    Raises:
        Incompatible: one line that lists what is missing or has changed.
    """
    if problems := [problem for problem in findings(cpu_platform).values() if problem]:
        raise Incompatible(
            f"sts_sglang cannot attach to this SGLang: {'; '.join(problems)}. "
            f"Install {' or '.join(f'sglang=={served}' for served in RELEASES)}."
        )


def findings(cpu_platform: bool = False) -> dict[str, str | None]:
    """Every name the plugin stands on, with what is wrong with it (None: nothing)."""
    targets = HOOK_TARGETS + (CPU_TARGETS if cpu_platform else ())
    symbols = release.SYMBOLS + (release.CPU_SYMBOLS if cpu_platform else ())
    return {
        "sglang": _check_version("sglang", tuple(RELEASES)),
        **{target.path: _check_target(target) for target in targets},
        **{target.path: _check_params(target) for target in CALLS},
        **{path: _check_symbol(path) for path in symbols},
        **{f"fields of {path}": _check_fields(path, names) for path, names in release.FIELDS.items()},
    }


def unhooked(targets: tuple[Target, ...] = HOOK_TARGETS) -> list[str]:
    """Hook targets that SGLang's registry has not patched (it only logs why)."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [t.path for t in targets if t.path not in HookRegistry._patched]


def _check_version(distribution: str, served: tuple[str, ...]) -> str | None:
    found = installed_version(distribution)
    return None if found in served else f"{distribution} is {found}, not {' or '.join(served)}"


def _check_target(target: Target) -> str | None:
    problem = _check_symbol(target.path)
    if problem:
        return problem
    fn = _function(target.path)
    if not callable(fn):
        return f"{target.path} is not callable"
    if not inspect.isfunction(fn) or _looked_up_early(target.path):
        return f"{target.path} cannot be replaced (it is no function of SGLang's own class)"
    return _check_params(target)


def _function(path: str) -> object:
    """What stands there, without what wraps it."""
    fn = inspect.unwrap(pkgutil.resolve_name(path))
    return getattr(fn, "__func__", fn)


def _check_params(target: Target) -> str | None:
    """Whether it can be called, or overridden, with these parameters first."""
    if problem := _check_symbol(target.path):
        return problem
    found = tuple(inspect.signature(_function(target.path)).parameters)[: len(target.params)]
    return None if found == target.params else f"{target.path} takes {found}, not {target.params}"


def _looked_up_early(path: str) -> bool:
    """Of a msgspec.Struct, which looks these methods up when the class is made: a hook would do nothing."""
    owner, _, name = path.rpartition(".")
    struct = hasattr(pkgutil.resolve_name(owner), "__struct_fields__")
    return struct and name in ("__init__", "__post_init__")


def _check_symbol(path: str) -> str | None:
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        return f"{path} is missing ({_import_error(path) or error})"
    return None


def _import_error(path: str) -> ImportError | None:
    """Why a module on the path cannot be imported: resolve_name would call it an absent attribute."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        try:
            importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name == ".".join(parts[:end]):
                return None  # no module: an attribute from here on
            return error
        except ImportError as error:
            return error
    return None


def _check_fields(path: str, names: tuple[str, ...]) -> str | None:
    module, _, name = path.rpartition(".")
    try:
        found = _names_in_file(module, name) if module in release.NOT_IMPORTED else _names_of(path, names)
    except (ImportError, AttributeError, KeyError, OSError, SyntaxError) as error:
        return f"{path} is missing ({error})"
    missing = [field for field in names if field not in found]
    return f"{path} has no {', '.join(missing)}" if missing else None


def _names_of(path: str, names: tuple[str, ...]) -> set[str]:
    """Attributes of a class and of its instances: those it has, declares, or assigns to `self` somewhere."""
    cls = pkgutil.resolve_name(path)
    found: set[str] = set()
    for base in cls.__mro__:  # dir() leaves out what an Enum inherits
        found.update(vars(base), vars(base).get("__annotations__", {}))
    if not found.issuperset(names):  # reading source takes time
        for base in cls.__mro__:
            if base.__module__.startswith("sglang."):
                found |= _assigned(_class_in(inspect.getsourcefile(base), base.__name__))
    return found


def _names_in_file(module: str, name: str) -> set[str]:
    """The same of a class in a file that is not imported: what it defines itself."""
    node = _class_in(importlib.util.find_spec(module).origin, name)
    return {part.name for part in node.body if isinstance(part, ast.FunctionDef)} | _assigned(node)


@functools.cache
def _parsed(path: str) -> ast.Module:
    with open(path, encoding="utf-8") as file:
        return ast.parse(file.read())


def _class_in(path: str, name: str) -> ast.ClassDef:
    for node in _parsed(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise AttributeError(f"{path} has no class {name}")


def _assigned(tree: ast.AST) -> set[str]:
    """Names that are stored on `self`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
