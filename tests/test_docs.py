"""What README.md and docs/ say of the package, where it can be asked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sts_sglang.config import StsConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("R*.md")])
KEY = re.compile(r"^\| `(\w+)` \| `(.+?)` \|", re.MULTILINE)


def test_every_key_and_its_default_stand_in_the_tables():
    shown = KEY.findall((ROOT / "docs" / "configuration.md").read_text())
    keys = [(name, default) for name, default in shown if name in StsConfig.__dataclass_fields__]
    defaults = json.loads(StsConfig().to_json())
    assert {name: json.loads(default) for name, default in keys} == defaults
    assert len(keys) == len(defaults), "a key stands twice"


def test_the_readme_shows_few_keys_with_their_defaults():
    section = (ROOT / "README.md").read_text().partition("| key | default |")[2]
    shown = re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", section, re.MULTILINE)
    defaults = json.loads(StsConfig().to_json())
    assert shown and {name: json.loads(default) for name, default in shown} == {
        n: defaults[n] for n, _ in shown
    }


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in headings(there), target


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
