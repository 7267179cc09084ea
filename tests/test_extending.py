"""docs/extending.md to the letter: its selector and its verifier serve a round of the real backends."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from sts_kernels.layout import WHOLE
from sts_sglang import config
from sts_sglang.core.selectors.compare import RULES, Layer
from sts_sglang.core.sizes import Need
from sts_sglang.core.verifier import VerifierParts
from sts_sglang.host import bind
from sts_sglang.verifiers import registry
from tests.test_backends import CONFIG, CONTEXT, DIM, LAYERS, Q_HEADS, TOKENS, Rig

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SELECTOR, VERIFIER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def any_name(monkeypatch):
    """The step of naming it in config.py."""
    for field in ("selector", "kernel"):
        monkeypatch.setitem(config._READERS, field, lambda field, value: value)


def verified(rig: Rig) -> tuple[list[Tensor], list[int]]:
    """Outputs of a round's layers, and the totals."""
    torch.manual_seed(7)
    rig.draft_extend(CONTEXT, 1, torch.randn(TOKENS, Q_HEADS * DIM))
    rig.draft_steps(CONTEXT + 1, {})
    fb = rig.verify_batch(CONTEXT + 1)
    rig.target.init_forward_metadata(fb)
    q = torch.randn(TOKENS, Q_HEADS * DIM)
    outputs = [rig.target.forward_extend(q, None, None, rig.layer(i), fb) for i in range(LAYERS)]
    return outputs, rig.runtime.state.totals.tolist()


def test_the_selector_of_the_page_selects(monkeypatch, any_name) -> None:
    monkeypatch.setattr("sts_sglang.core.selectors.compare.RULES", RULES)
    names = {"Layer": Layer, "Tensor": Tensor, "RULES": dict(RULES)}
    exec(SELECTOR, names)
    monkeypatch.setitem(RULES, "norm", names["RULES"]["norm"])
    rig = Rig({**CONFIG, "selector": "norm"})
    rig.target_pool.k[:, rig.slots[20]] *= 50  # a long key
    outputs, totals = verified(rig)
    rig.target_pool.v[:, rig.slots[20]] += 100  # whoever attends to it sees this
    changed, _ = verified(rig)
    assert all(not torch.equal(a, b) for a, b in zip(outputs, changed, strict=True))
    rig.target_pool.v[:, rig.slots[15]] += 100  # and nobody this
    again, _ = verified(rig)
    assert all(torch.equal(a, b) for a, b in zip(changed, again, strict=True))
    assert totals[:2] == [1, 0]


def attention_by_definition(call, lists, channels, attended) -> Tensor:
    out = torch.empty_like(call.q)
    group = call.q.shape[2] // channels.numel()
    table, reqs, lens = call.contexts
    for b, (req, length) in enumerate(zip(reqs.tolist(), lens.tolist(), strict=True)):
        tail = table[req, length : length + call.q.shape[1]]
        for h, channel in enumerate(channels.tolist()):
            start, count = int(lists.starts[b, channel]), int(lists.counts[b, channel])
            slots = table[req, :length] if count == WHOLE else lists.indices[start : start + count]
            attended += torch.tensor([slots.numel(), length])
            seen = torch.ones(call.q.shape[1], slots.numel() + tail.numel(), dtype=torch.bool)
            seen[:, slots.numel() :] = call.tail_mask[b]
            slots = torch.cat([slots, tail]).long()
            for head in range(h * group, (h + 1) * group):
                logits = call.q[b, :, head] @ call.pool.k[slots, h].T * call.scale
                weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
                out[b, :, head] = weights @ call.pool.v[slots, h]
    return out


def test_the_verifier_of_the_page_verifies(monkeypatch, any_name) -> None:
    names = {"VerifierParts": VerifierParts, "Need": Need, "attention_by_definition": attention_by_definition}
    exec(VERIFIER, names)
    kind = SimpleNamespace(**{name: names[name] for name in ("refusal", "need", "make")})
    monkeypatch.setitem(registry.KINDS, "gather", kind)
    found = [verified(Rig({**CONFIG, "kernel": kernel})) for kernel in ("gather", "torch")]
    for own, twin in zip(*(outputs for outputs, _ in found), strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-5, atol=1e-5)
    assert found[0][1] == found[1][1]


def test_every_name_of_the_configuration_has_its_kind() -> None:
    """A kernel without one would be served by another, in its name."""
    assert set(registry.KINDS) == set(get_args(config.KernelName))
    assert {*RULES, "auto", "draft", "tokens", "pages", "joined"} == set(get_args(config.SelectorName))


@pytest.mark.parametrize(
    "kernel, device, ops",
    [
        ("torch", "cpu", "torch"),
        ("triton", "cpu", "triton"),
        ("flashinfer", "cpu", "torch"),
        ("gather", "cpu", "torch"),
        ("torch", "cuda", "torch"),
        ("triton", "cuda", "triton"),
        ("flashinfer", "cuda", "triton"),
        ("gather", "cuda", "triton"),
    ],
)
def test_what_runs_beside_a_verifier(kernel: str, device: str, ops: str) -> None:
    assert bind.ops_for(kernel, device) == ops
