"""Seeds, NaN-poisoned allocations, the `gpu` marker, and Triton without a GPU."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so before anything imports triton: kernels then run as numpy.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes half an hour runs when it is asked for by its name."""
    if "architectures" in config.option.markexpr:
        return
    on_demand = [item for item in items if item.get_closest_marker("architectures")]
    config.hook.pytest_deselected(items=on_demand)
    items[:] = [item for item in items if item not in on_demand]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> dict[str, Path]:
    from sts_sglang.tools.tiny_pair import make_pair

    return make_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def reference(pair, logs) -> dict:
    """What the target alone says: stock attention, no speculation."""
    from tests.forked import Forked
    from tests.test_alone import sampled
    from tests.test_serving import features, scenario

    with Forked(pair["target"], logs / "reference.log", "--tool-call-parser", "llama3") as server:
        return {"outputs": scenario(server), "features": features(server), "sampled": sampled(server)}


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floats are NaN, so that an output nobody wrote fails instead of being zero by luck."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def _poisoned(allocate):
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.requires_grad else tensor

    return poisoned
