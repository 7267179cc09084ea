"""What docs/limits_upstream.md says of SGLang's tools, asked of the installed release."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "limits_upstream.md").read_text()
PARSES_FIRST = ("offline_throughput", "one_batch")


@pytest.mark.parametrize("tool", PARSES_FIRST)
def test_these_tools_parse_before_plugins_load(tool):
    assert f"| `sglang.benchmark.{tool}` (`sglang.bench_{tool}`) | no: parses first" in PAGE
    command = [sys.executable, "-m", f"sglang.benchmark.{tool}", "--model-path", "x"]
    done = subprocess.run(
        [*command, "--attention-backend", "sts"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2 and "invalid choice: 'sts'" in done.stderr
