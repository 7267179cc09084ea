"""How well the draft's attention predicts the target's: per target layer and KV head, on recall tasks.

    python benchmarks/models/predict.py --length 16384 --items 3 --out FILE.json [--corpus .data/corpus]

Around the tokens of an answer, verify windows of four rows are scored as the sparse attention does it: the
draft's probabilities are pooled over rows and mapped heads by their maximum, and the top `keep` of the
context is taken besides sink and recent. Reported of the target's attention probability outside sink and
recent (mean over the window's rows and the KV head's query heads): the share that lies on the selected
tokens (mass), weighted by how much there is, and how many of the target's own top 5 % of the context are
selected (top); beside it the same for other ways of choosing as many tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from exam import SHIPPED, heldout, load
from model import Llama, Trace
from students import RECENT, SINK, grouped
from tasks import EXAM, Writer
from torch import Tensor
from tqdm import tqdm

WINDOW = 4  # rows verified at once


def attention(trace: Trace, rows: Tensor) -> Tensor:
    """Probabilities of the given rows of one sequence: [layers, kv heads, group, rows, L]."""
    layers = []
    for q, k in zip(trace.queries, trace.keys, strict=True):
        q = grouped(q[rows][None], k.shape[1])[0].float() * q.shape[-1] ** -0.5
        scores = torch.einsum("rhgd,lhd->hgrl", q, k.float())
        after = torch.arange(k.shape[0], device=k.device) > rows[:, None]
        layers.append(scores.masked_fill(after, -torch.inf).softmax(-1))
    return torch.stack(layers)


def top_mask(score: Tensor, k: int) -> Tensor:
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(k, -1).indices, True)


def proportional(layers: int, draft: Tensor) -> Tensor:
    """The default map: draft importance [layers, kv, L] of the layer at the same depth, by KV head."""
    index = [t * draft.shape[0] // layers for t in range(layers)]
    return draft[index]


def calibrated(wanted: Tensor, heads: Tensor, k: int) -> Tensor:
    """For each target head the draft head whose own top k holds most of its mass: indices [layers, kv]."""
    mass = torch.einsum("tkl,dl->tkd", wanted, top_mask(heads, k).float())
    return mass.argmax(-1)


class Window:
    """One verify window: what the target wants and what the draft offers, over target positions 1..L-1."""

    def __init__(self, target: Trace, draft: Trace, start: int, keep: float):
        rows = torch.arange(start, start + WINDOW, device=target.keys[0].device)
        context = start  # tokens before the window
        far = torch.arange(1, context, device=rows.device)
        self.far = (far >= SINK) & (far < context - RECENT)
        self.k = max(1, int(keep * context) - SINK - RECENT)
        self.top = max(1, int(0.05 * context))
        self.wanted = attention(target, rows)[..., 1:context].mean((2, 3)) * self.far
        self.heads = attention(draft, rows - 1)[..., : context - 1].amax(3) * self.far

    def shares(self, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Of importance [layers, kv, L]: the mass selected, and the share of the target's own top tokens."""
        chosen = top_mask(importance.masked_fill(~self.far, -1.0), self.k) & self.far
        own = top_mask(self.wanted.masked_fill(~self.far, -1.0), self.top) & self.far
        return (self.wanted * chosen).sum(-1), (own & chosen).sum(-1) / own.sum(-1)


@torch.no_grad()
def traces(target: Llama, draft: Llama, ids: Tensor) -> tuple[Trace, Trace]:
    a, b = Trace([], [], []), Trace([], [], [])
    target(ids[None], a)
    draft(ids[None, 1:], b)
    return a, b


def windows(
    target: Llama, draft: Llama, writer: Writer, name: str, length: int, rng: random.Random, keep: float
) -> list[Window]:
    row, question = writer.examination(name, length, rng)
    answer = writer.encode(question.answer) + [writer.end]
    ids = torch.tensor(row.ids + answer, device=target.model.norm.weight.device)
    a, b = traces(target, draft, ids)
    return [Window(a, b, start, keep) for start in range(len(row.ids), len(ids) - WINDOW, 2 * WINDOW)]


def evaluate(found: list[Window], best: Tensor) -> dict[str, dict]:
    """Sums over windows by way of choosing: mass, total mass, top share; each [layers, kv]."""
    table: dict[str, dict] = {}
    for w in found:
        layers, flat = w.wanted.shape[0], w.heads.flatten(0, 2)
        ways = {
            "proportional": proportional(layers, w.heads.amax(2)),
            "calibrated": flat[best],
            "any draft head": flat.amax(0).expand_as(w.wanted),
            "random": torch.rand_like(w.wanted),
            "latest": torch.arange(w.wanted.shape[-1], device=flat.device).float().expand_as(w.wanted),
            "target itself": w.wanted,
        }
        for way, importance in ways.items():
            mass, top = w.shares(importance)
            entry = table.setdefault(way, {"mass": 0, "total": 0, "top": 0, "windows": 0})
            for key, value in (("mass", mass), ("total", w.wanted.sum(-1)), ("top", top), ("windows", 1)):
                entry[key] = entry[key] + value
    return table


def report(table: dict[str, dict]) -> dict[str, dict]:
    return {
        way: {
            "mass": float(e["mass"].sum() / e["total"].sum()),
            "top": float((e["top"] / e["windows"]).mean()),
            "outside": float((e["total"] / e["windows"]).mean()),
            "mass_by_head": (e["mass"] / e["total"].clamp(min=1e-9)).tolist(),
            "top_by_head": (e["top"] / e["windows"]).tolist(),
            "outside_by_head": (e["total"] / e["windows"]).tolist(),
        }
        for way, e in table.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="what corpus.py built; without it the documents are Python's own library"
    )
    parser.add_argument("--models", type=Path, default=SHIPPED)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--items", type=int, default=3, help="of each task")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    target, draft = (load(args.models, name, args.device) for name in ("target", "draft"))
    writer = heldout(args.corpus)
    # The map is chosen on other, shorter text than it is judged on.
    calibration = [
        w
        for name in EXAM
        for w in windows(target, draft, writer, name, 4096, random.Random(f"map {name}"), args.keep)
    ]
    wanted = [calibrated(w.wanted, w.heads.flatten(0, 2), w.k) for w in calibration]
    best = torch.stack(wanted).mode(0).values
    found: list[Window] = []
    for name in tqdm(EXAM):
        for i in range(args.items):
            found += windows(
                target, draft, writer, name, args.length, random.Random(f"predict {name} {i}"), args.keep
            )
    result = report(evaluate(found, best))
    for way, entry in result.items():
        print(f"{way:15} mass {entry['mass']:.3f}  top {entry['top']:.3f}  outside {entry['outside']:.3f}")
    if args.out:
        args.out.write_text(
            json.dumps({"length": args.length, "items": args.items, "keep": args.keep, **result}) + "\n"
        )


if __name__ == "__main__":
    main()
