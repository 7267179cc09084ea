"""The patches fit the installed SGLang, compile, and cover every hook."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sts_sglang.host import compat
from sts_sglang.host.releases import RELEASES, release

FOLDER = Path(__file__).parents[1] / "patches"
PATCHES = sorted((FOLDER / release.VERSION).glob("*.patch"))
README = (FOLDER / "README.md").read_text()


def touched(patch: Path) -> list[str]:
    """Files of a patch, relative to the folder that holds the package."""
    return re.findall(r"^\+\+\+ b/python/(\S+)$", patch.read_text(), re.MULTILINE)


def apply(patch: Path, folder: Path, *options: str) -> None:
    done = subprocess.run(
        ["git", "apply", "-p2", *options, patch],
        cwd=folder,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},  # a plain folder, not a checkout
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the installed files that the patches touch; found without importing SGLang."""
    source = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]).parent
    for file in {file for patch in PATCHES for file in touched(patch)}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, tmp_path / file)
    return tmp_path


def test_patches_are_numbered_alike_and_what_upstream_took_is_gone() -> None:
    first, *later = ([patch.name for patch in sorted((FOLDER / v).glob("*.patch"))] for v in RELEASES)
    assert [int(name[:4]) for name in first] == list(range(1, len(first) + 1)) != []
    for names in later:
        assert names and set(names) < set(first)
        for gone in set(first) - set(names):
            assert README.count(f"({gone})") == 0 and f"{gone}), 0.5.23 has it |" in README


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_applies_alone_and_compiles(patch: Path, installed: Path) -> None:
    before = {file: (installed / file).read_text() for file in touched(patch)}
    apply(patch, installed, "--check")
    apply(patch, installed)
    for file, text in before.items():
        patched = (installed / file).read_text()
        assert patched != text
        ast.parse(patched)


def test_patches_apply_in_order(installed: Path) -> None:
    for patch in PATCHES:
        apply(patch, installed)
        for file in touched(patch):
            ast.parse((installed / file).read_text())


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_says_why_and_has_a_row(patch: Path) -> None:
    subject, _, message = patch.read_text().partition("Subject: ")[2].partition("\n\n")
    assert subject.startswith("[PATCH] ") and len(message.partition("\n---\n")[0]) > 80
    assert README.count(f"({release.VERSION}/{patch.name})") == 1


def test_readme_names_every_hook_target() -> None:
    for target in compat.HOOK_TARGETS + compat.CPU_TARGETS:
        owner, _, name = target.path.rpartition(".")
        short = (
            f"{owner.rpartition('.')[2]}.{name}"  # class.method, where the class is listed above the table
        )
        assert f"`{target.path}`" in README or (f"`{owner}`" in README and f"`{short}`" in README), (
            target.path
        )


def test_readme_names_every_private_symbol() -> None:
    private = {path.rpartition(".")[2] for path in (*release.SYMBOLS, *release.CPU_SYMBOLS) if "._" in path}
    assert private and all(f"{name}`" in README for name in private), private
