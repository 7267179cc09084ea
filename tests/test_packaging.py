"""What is installed: both packages, their entry points, and nothing that gets in SGLang's way."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

import sts_sglang

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SOURCES = sorted(
    [file.relative_to(ROOT).as_posix() for file in (ROOT / "sts_sglang").rglob("*.py")]
    + [file.relative_to(ROOT / "kernels").as_posix() for file in (ROOT / "kernels").rglob("*.py")]
)


def python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter started in the checkout, as `python -m` starts servers and tests."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_from_pypi_is_not_shadowed() -> None:
    """SGLang's FA3 loader imports get_kernel from it and falls back to slower kernels on any error."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = Path(python("import kernels; kernels.get_kernel; print(kernels.__file__)"))
    assert found == Path(importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py"))


def test_sts_kernels_needs_no_sglang() -> None:
    loaded = python(
        "import sts_kernels, sys; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    ).split()
    assert "torch" in loaded
    assert not {"sglang", "sts_sglang", "flashinfer"} & set(loaded)


@pytest.mark.parametrize("module", ["sts_sglang", "sts_sglang.cli", "sts_sglang.config", "sts_sglang.cpu"])
def test_the_launcher_side_needs_neither_torch_nor_sglang(module: str) -> None:
    code = f"import {module}, sys; print(*(m for m in ('torch', 'sglang') if m in sys.modules))"
    assert python(code, SGLANG_PLATFORM="sts_cpu") == ""


def discovered() -> dict[str, Path]:
    """package -> folder, found as setuptools finds them."""
    options = PYPROJECT["tool"]["setuptools"]
    folders = {}
    for root in options["packages"]["find"]["where"]:
        for package in setuptools.find_namespace_packages(
            ROOT / root, include=options["packages"]["find"]["include"]
        ):
            folders[package] = ROOT / root / package.replace(".", "/")
    return folders


def test_every_module_is_in_a_discovered_package() -> None:
    folders = discovered()
    found = [
        f"{package.replace('.', '/')}/{file.name}"
        for package, folder in folders.items()
        for file in folder.glob("*.py")
    ]
    assert sorted(found) == SOURCES
    assert {"sts_sglang/backends/target.py", "sts_kernels/verify.py", "sts_sglang/cli.py"} <= set(found)
    for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items():
        assert folders[package] == ROOT / folder


def test_type_marker_and_license_are_declared() -> None:
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list(discovered()[package].glob(pattern)), (package, pattern)
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["sts_sglang"]
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


@pytest.mark.skipif(
    int(setuptools.__version__.partition(".")[0])
    < int(re.search(r"\d+", PYPROJECT["build-system"]["requires"][0]).group()),
    reason="the environment's setuptools is older than the build needs, and tests download nothing",
)
def test_wheel_of_the_sdist(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build writes into its source
    for name in ("sts_sglang", "kernels", "tests"):
        for file in (ROOT / name).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                copy = source / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; build_meta.build_sdist('../sdist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    sdist = next((tmp_path / "sdist").glob("*.tar.gz"))
    alone = ["--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", *alone, "--wheel-dir", tmp_path, sdist]
    subprocess.run(command, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if name.endswith(".py")) == SOURCES
    assert "sts_sglang/py.typed" in names
    for model in ("target", "draft", "eagle3"):
        assert {f"sts_sglang/models/{model}/{file}" for file in ("config.json", "model.safetensors")} <= set(
            names
        )
    for folder, kind in (("maps", "*.json"), ("texts", "*.txt")):
        files = {f"sts_sglang/{folder}/{file.name}" for file in (ROOT / "sts_sglang" / folder).glob(kind)}
        assert files and files <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    installed = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", *alone, "--target", installed, wheel]
    subprocess.run(command, check=True, capture_output=True)
    doctor = subprocess.run(
        [sys.executable, "-m", "sts_sglang.cli", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "SGLANG_PLATFORM": "sts_cpu"},
        capture_output=True,
        text=True,
    )
    assert doctor.returncode == 0 and "launch: SGLANG_PLATFORM=sts_cpu" in doctor.stdout, doctor.stdout


def test_entry_points_are_installed_and_load_without_sglang() -> None:
    installed = importlib.metadata.distribution("sts-sglang").entry_points
    declared = {
        (group, name, value)
        for group, entries in {**PROJECT["entry-points"], "console_scripts": PROJECT["scripts"]}.items()
        for name, value in entries.items()
    }
    assert {(entry.group, entry.name, entry.value) for entry in installed} == declared
    assert {group for group, _, _ in declared} == {
        "sglang.srt.plugins",
        "sglang.srt.platforms",
        "console_scripts",
    }
    for entry in installed:
        assert callable(entry.load())


def test_versions_are_pinned_where_the_plugin_checks_them() -> None:
    from sts_sglang.host import compat

    (sglang,) = (Requirement(line) for line in PROJECT["dependencies"])
    tried = [f"0.5.{patch}" for patch in range(10, 30)]
    assert [version for version in tried if version in sglang.specifier] == list(compat.RELEASES)
    assert compat.installed_version("sglang") in compat.RELEASES
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    assert PROJECT["version"] == sts_sglang.__version__ == compat.installed_version("sts-sglang")


def test_every_benchmark_starts_as_its_readme_says() -> None:
    """`python -m benchmarks.NAME` from the repository root."""
    commands = re.findall(r"python -m (benchmarks[\w.]*)", (ROOT / "benchmarks" / "README.md").read_text())
    assert {f"benchmarks.{file.stem}" for file in (ROOT / "benchmarks").glob("bench_*.py")} <= set(commands)
    python(f"import importlib; [importlib.import_module(name) for name in {sorted(set(commands))}]")


def test_every_test_that_the_makefile_names_is_there() -> None:
    """A renamed test would end CI after half an hour, when the second release's turn comes."""
    plan = ["make", "--dry-run", "contract", "test-servers"]
    planned = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {word for word in shlex.split(planned, comments=True) if word.startswith("tests/")}
    single = sorted(word for word in named if "::" in word)
    assert len(single) > 10
    assert all((ROOT / word).is_file() for word in named.difference(single))
    # Beside its whole file pytest would not miss a test, hence these alone.
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", *single]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
