"""How the house stands: who may import whom, nothing in a circle, and what is read of SGLang is checked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sts_sglang.host import serves
from sts_sglang.host.releases import RELEASES

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
    for root in (ROOT, ROOT / "kernels")
    for package in ("sts_sglang", "sts_kernels")
    for file in (root / package).rglob("*.py")
}
# Room -> what its modules may import of ours, by prefix, and whether they may import SGLang.
ROOMS = {
    "sts_kernels": (("sts_kernels",), False),
    "sts_sglang.core": (
        ("sts_kernels", "sts_sglang.core", "sts_sglang.config", "sts_sglang.headmap"),
        False,
    ),
    "sts_sglang.verifiers": (
        ("sts_kernels", "sts_sglang.core", "sts_sglang.config", "sts_sglang.headmap", "sts_sglang.verifiers"),
        False,
    ),
    "sts_sglang.backends": (
        (
            "sts_kernels",
            "sts_sglang.core",
            "sts_sglang.config",
            "sts_sglang.backends",
            "sts_sglang.host.views",
        ),
        True,
    ),
    "sts_sglang.host.views": (
        ("sts_kernels", "sts_sglang.core", "sts_sglang.headmap", "sts_sglang.host.releases")
        + ("sts_sglang.host.architectures",),
        True,
    ),
    "sts_sglang.calibrate": (
        ("sts_kernels", "sts_sglang.calibrate", "sts_sglang.config", "sts_sglang.headmap")
        + ("sts_sglang.checkpoints", "sts_sglang.files", "sts_sglang.fingerprint"),
        False,
    ),
    "sts_sglang.evaluate": (
        ("sts_sglang.evaluate", "sts_sglang.calibrate", "sts_sglang.config", "sts_sglang.headmap")
        + ("sts_sglang.files", "sts_sglang.host.serves", "sts_sglang.tools.local_server"),
        False,
    ),
}


def imports(name: str) -> set[str]:
    """Modules that a module imports when it runs, at its top or in a function."""
    tree = ast.parse(FILES[name].read_text())
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", None) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room: str) -> None:
    allowed, sglang = ROOMS[room]
    modules = [name for name in FILES if within(name, (room,))]
    assert modules
    for name in modules:
        for imported in imports(name):
            if within(imported, ("sts_sglang", "sts_kernels")):
                assert within(imported, allowed), f"{name} imports {imported}"
            if within(imported, ("sglang",)):
                assert sglang, f"{name} imports {imported}"


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: imports(name) & set(FILES) for name in FILES}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in graph[name]:
                walk(imported, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])


def test_a_circle_would_be_seen(monkeypatch, tmp_path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.py").write_text(f"def f():\n    import {other}\n")
        monkeypatch.setitem(FILES, name, tmp_path / f"{name}.py")
    with pytest.raises(AssertionError, match="a -> b -> a|b -> a -> b"):
        test_no_import_goes_in_a_circle()


def test_no_function_takes_more_than_eight_positional_arguments() -> None:
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
                continue
            taken = [*node.args.posonlyargs, *node.args.args]
            if taken and taken[0].arg in ("self", "cls"):
                taken = taken[1:]
            # Signatures that SGLang calls.
            if name not in ("sts_sglang.cpu.ops",):
                assert len(taken) <= 8, f"{name}.{node.name} takes {len(taken)}"


# ---- what is read of SGLang

of_each_release = pytest.mark.parametrize("release", RELEASES.values(), ids=RELEASES)


def classes(release) -> dict[str, tuple[str, ...]]:
    return {path.rpartition(".")[2]: names for path, names in release.FIELDS.items()}


def trees(release) -> dict[str, ast.Module]:
    """What runs beside a release: everything but the modules of others."""
    others = {module.__name__ for module in RELEASES.values()} - {release.__name__}
    return {name: ast.parse(file.read_text()) for name, file in FILES.items() if name not in others}


def test_nobody_else_asks_which_release_this_is() -> None:
    """Where releases differ there is a function of each."""
    may = {"sts_sglang.host.releases", "sts_sglang.host.compat"} | {m.__name__ for m in RELEASES.values()}
    for name, file in FILES.items():
        text = file.read_text()
        asked = "release.VERSION" in text or any(
            imported.startswith("sts_sglang.host.release_") for imported in imports(name)
        )
        assert name in may or not asked, name


def test_releases_have_the_same_names() -> None:
    """Functions with the same parameters, and tables; what is private to a module may differ."""
    shapes = []
    for module in RELEASES.values():
        tree = ast.parse(FILES[module.__name__].read_text())
        functions = {
            node.name: [arg.arg for arg in node.args.args]
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        }
        shapes.append((functions, {name for name in vars(module) if name.isupper() and name[0] != "_"}))
    assert all(shape == shapes[0] for shape in shapes)
    assert len(shapes[0][0]) > 8


def reads(tree: ast.AST, known: dict[str, tuple[str, ...]]) -> set[tuple[str, str]]:
    """(class, field) of every attribute read from a name that is annotated with a class of SGLang."""
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        annotated = {
            arg.arg: ast.unparse(arg.annotation) for arg in function.args.args if arg.annotation is not None
        }
        for node in ast.walk(function):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                annotated[node.target.id] = ast.unparse(node.annotation)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                kind = annotated.get(node.value.id)
                if kind in known and not node.attr.startswith("__"):
                    found.add((kind, node.attr))
    return found


@of_each_release
def test_every_field_that_is_read_is_checked_at_load(release) -> None:
    known = classes(release)
    for name, tree in trees(release).items():
        for kind, field in reads(tree, known):
            assert field in known[kind], f"{name} reads {kind}.{field}"


def test_backends_read_batches_and_layers_through_views() -> None:
    """A field that is read raw there would stand in no table."""
    for name, file in FILES.items():
        if not within(name, ("sts_sglang.backends",)):
            continue
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                raw = {"fb", "forward_batch"} & {arg.arg for arg in function.args.args}
                annotated = [arg for arg in function.args.args if arg.annotation is not None]
                raw |= {a.arg for a in annotated if ast.unparse(a.annotation) == "RadixAttention"}
                raw |= {"layer"} if function.name.startswith("forward_") else set()
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                        assert node.value.id not in raw, f"{name}: {ast.unparse(node)}"


def test_views_name_what_they_read_through() -> None:
    """`batch.spec_info.topk` says of no class that it has a topk: an annotated name in between does."""
    tree = ast.parse(FILES["sts_sglang.host.views"].read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            given = {arg.arg for arg in function.args.args if arg.annotation is not None}
            given = {arg.arg for arg in function.args.args if arg.arg in given} - {"self"}
            for node in ast.walk(function):
                chain = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)
                if chain and isinstance(node.value.value, ast.Name):
                    assert node.value.value.id not in given, ast.unparse(node)


@of_each_release
def test_every_checked_field_is_read(release) -> None:
    """What nobody reads any more need not end a launch. Constructors are given some as keywords."""
    everything, overridden = set(), set()
    for name, tree in trees(release).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                everything.add(node.attr)
            elif isinstance(node, ast.keyword) and name == release.__name__:
                everything.add(node.arg)
            elif isinstance(node, ast.FunctionDef) and within(
                name, ("sts_sglang.backends", release.__name__)
            ):
                overridden.add(node.name)
    for kind, fields in classes(release).items():
        for field in fields:
            ruled = kind == "ServerArgs" and field in {rule.field for rule in serves._ALL_RULES}
            named = kind == "ServerArgs" and field in serves.BACKEND_FIELDS
            assert field in everything | overridden or ruled or named, f"{kind}.{field}"


@of_each_release
def test_every_server_argument_that_is_read_is_checked_at_load(release) -> None:
    known, read = set(release.SERVER_ARGS_READ), set(serves.BACKEND_FIELDS)
    for name, tree in trees(release).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("server_args"):
                read.add(node.attr)
        assert read <= known, f"{name}: {read - known}"


def test_no_field_of_sglang_is_read_with_a_default() -> None:
    """A field that is gone would silently become the default."""
    rooms = (
        "sts_sglang.host.views",
        "sts_sglang.host.bind",
        "sts_sglang.host.hooks",
        "sts_sglang.host.reserve",
        *(module.__name__ for module in RELEASES.values()),
    )
    for name in (name for name in FILES if within(name, (*rooms, "sts_sglang.backends"))):
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
                own = ast.unparse(node.args[1]) == "'sts_config'"
                assert own or len(node.args) == 2, f"{name}: {ast.unparse(node)}"
