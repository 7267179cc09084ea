"""Ways to predict the target's attention from the draft's: what each recalls, and what none can exceed.

    python -m benchmarks.bench_calibrate --draft draft --out benchmarks/results/calibrate/standalone.jsonl
    python -m benchmarks.bench_calibrate --draft eagle3 --out benchmarks/results/calibrate/eagle3.jsonl

One JSON line a way: recall of the target's attention mass outside sink and recent at keep 10 %, mean over
windows, layers and KV heads, on the built-in held-out texts (`texts`) and on windows in the answers of recall
tasks (`tasks`, benchmarks/models/tasks.py); `by_mass` weighs by how much mass there is. `serves` says whether
a head map can express the way: the others are measured to know what the format leaves behind. Ways are fitted
on the built-in calibration texts unless they say otherwise. The last lines compare maps from 4K tokens with a
map from 64K, `tokens` each.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.harness import commit
from sts_sglang import fingerprint
from sts_sglang.calibrate import search
from sts_sglang.calibrate.command import DOMAINS, TEXTS
from sts_sglang.calibrate.record import Pair, Record, choose_windows
from sts_sglang.config import StsConfig
from sts_sglang.headmap import HeadMap, proportional

sys.path.append(str(Path(__file__).parent / "models"))
from tasks import EXAM, Writer  # noqa: E402 (a script folder, no package)

CONFIG = StsConfig(keep=0.1, budget=0)
LEAST = 690  # shorter contexts select nothing besides sink and recent
WINDOWS, STEPS = 16, 2000
Scorer = Callable[["Window"], Tensor]  # to [rows, positions], rows being layers * KV heads


class Window:
    """All of a window in memory: small models only."""

    def __init__(self, window: search.Window):
        self.window, self.domain, n = window, window.domain, window.positions
        rows = range(window.record.mass.rows)
        self.mass, self.shares = window.worth(rows), window.shares(rows)
        self.max, self.mean = window.scores("max"), window.scores("mean")
        self.distance = CONFIG.recent + n - torch.arange(n).float()

    def recall(self, scores: Tensor) -> Tensor:
        return self.window.recall(self.shares, self.window.top(scores))


class Bench:
    def __init__(self, models: Path, draft: str):
        self.pair = Pair(str(models / "target"), str(models / draft))
        self.target, self.draft = self.pair.target_counts, self.pair.draft_counts
        self.rows = self.target.layers * self.target.kv_heads
        self.tokenizer = AutoTokenizer.from_pretrained(models / "target")
        self.writer = Writer.shipped(models / "target")

    def text(self, domain: str, part: str) -> list[int]:
        return self.tokenizer((TEXTS / f"{domain}.{part}.txt").read_text(), verbose=False)["input_ids"]

    def record(self, domain: str, ids: list[int], seed: int, count: int = WINDOWS) -> Record:
        return self.pair.record(domain, ids, choose_windows(len(ids), count, LEAST, seed))

    def texts(self, part: str) -> list[Record]:
        return [self.record(d, self.text(d, part)[:4096], i) for i, d in enumerate(DOMAINS)]

    def tasks(self, length: int, items: int, part: str) -> list[Record]:
        """Windows in the answers."""
        records = []
        for name in EXAM:
            for i in range(items):
                row, question = self.writer.examination(name, length, random.Random(f"{part} {name} {i}"))
                ids = row.ids + self.writer.encode(question.answer) + [self.writer.end]
                if windows := list(range(len(row.ids), len(ids) - 4, 8))[:6]:
                    records.append(self.pair.record(name, ids, windows))
        return records

    def map_scorer(self, head_map: HeadMap, pool: str | None = None) -> Scorer:
        """[rows, positions] of a map."""
        pool = pool or head_map.pool or "max"
        sources = [own for layer in head_map.sources for own in layer]
        picks = [[d * self.draft.q_heads + q for d, q in own] for own in sources]

        def score(window: Window) -> Tensor:
            values, rows = getattr(window, pool), []
            for pick in picks:
                if not pick:
                    rows.append(-window.distance)
                else:
                    rows.append(values[pick].amax(0) if pool == "max" else values[pick].mean(0))
            return torch.stack(rows)

        return score


def windows_of(records: list[Record]) -> list[Window]:
    return [Window(window) for window in search.windows_of(records, CONFIG)]


def measure(windows: list[Window], scorer: Scorer) -> dict:
    recall = torch.stack([w.recall(scorer(w)) for w in windows])
    mass = torch.stack([w.mass.sum(1) for w in windows])
    by_domain = search.by_domain(windows, recall.mean(1))
    return {
        "recall": round(float(recall.mean()), 4),
        "by_mass": round(float((recall * mass).sum() / mass.sum()), 4),
        "by_domain": {name: round(value, 4) for name, value in by_domain.items()},
    }


def best_single(windows: list[Window], pool: str, rows: int) -> Scorer:
    total = torch.zeros(rows, windows[0].max.shape[0])
    for w in windows:
        chosen = torch.zeros_like(w.max).scatter_(1, w.window.top(getattr(w, pool)), 1.0)
        total += w.mass @ chosen.T / w.mass.sum(1, keepdim=True)
    best = total.argmax(1)
    return lambda w: getattr(w, pool)[best]


def forward_once(windows: list[Window], rows: int, heads: int) -> Scorer:
    """Forward selection under the mean without repetition: every head weighs the same."""
    candidates, picks = windows[0].mean.shape[0], []
    for row in range(rows):
        pick, best = [], 0.0
        while len(pick) < heads:
            gain = torch.zeros(candidates)
            for w in windows:
                joined = w.mean + w.mean[pick].sum(0)
                gain += w.window.recall(w.shares[row].expand_as(joined), w.window.top(joined))
            gain[pick] = 0
            if float(gain.max()) / len(windows) < best + search.LEAST_GAIN:
                break
            best = float(gain.max()) / len(windows)
            pick.append(int(gain.argmax()))
        picks.append(pick)
    return lambda w: torch.stack([w.mean[p].mean(0) for p in picks])


def least_squares(
    windows: list[Window], pool: str, shape: Callable[[Tensor], Tensor], signed: bool
) -> Scorer:
    """Weights a head that fit the target's attention, both reshaped; non-negative unless `signed`."""
    a = b = 0.0
    for w in windows:
        x, y = shape(getattr(w, pool)), shape(w.mass)
        x = torch.cat([x, torch.ones(1, x.shape[1])])
        a, b = a + x @ x.T / x.shape[1], b + y @ x.T / x.shape[1]
    if signed:
        ridge = 1e-9 * torch.eye(a.shape[0], dtype=torch.float64)
        weights = torch.linalg.lstsq(a.double() + ridge, b.T.double()).solution.T.float()
    else:
        weights = torch.full(b.shape, 0.1)
        for _ in range(3000):  # multiplicative updates keep the sign
            weights = weights * b.clamp(min=0) / (weights @ a).clamp(min=1e-20)
    return lambda w: weights[:, :-1] @ shape(getattr(w, pool))


def with_distance(windows: list[Window], scorer: Scorer, rows: int) -> Scorer:
    """A power of the distance a target head, as a factor on its importance."""
    powers = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3])

    def at(w: Window, power: Tensor) -> Tensor:
        return (scorer(w) + 1e-7).clamp(min=1e-9).log() - power[:, None] * w.distance.log()

    recall = torch.stack(
        [torch.stack([w.recall(at(w, p.expand(rows))) for w in windows]).mean(0) for p in powers]
    )
    best = powers[recall.argmax(0)]
    return lambda w: at(w, best)


def network(windows: list[Window], rows: int, distance: bool) -> Scorer:
    """What all draft heads together know of a position, through a small network: no map can do that."""
    torch.manual_seed(0)

    def features(w: Window) -> Tensor:
        x = torch.cat([(w.max + 1e-7).log(), (w.mean + 1e-7).log()])
        return torch.cat([x, w.distance.log()[None]] if distance else [x]).T

    xs = [features(w) for w in windows]
    middle, spread = torch.cat(xs).mean(0), torch.cat(xs).std(0) + 1e-6
    net = nn.Sequential(
        nn.Linear(len(middle), 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, rows)
    )
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        i = int(torch.randint(len(windows), (1,)))
        wanted = windows[i].mass / windows[i].mass.sum(1, keepdim=True)
        loss = -(wanted * net((xs[i] - middle) / spread).T.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda w: net((features(w) - middle) / spread).T.detach()


def best_in_window(w: Window) -> Tensor:
    """The draft head that is best in this very window, for each target head."""
    every = torch.cat([w.max, w.mean])
    chosen = torch.zeros_like(every).scatter_(1, w.window.top(every), 1.0)
    return every[(w.mass @ chosen.T).argmax(1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=TEXTS.parent / "models")
    parser.add_argument("--draft", default="draft", help="folder in --models: draft or eagle3")
    parser.add_argument("--task-length", type=int, default=4096)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.models, args.draft)
    rows, target, draft = bench.rows, bench.target, bench.draft
    records = bench.texts("calibration")
    windows, texts = windows_of(records), windows_of(bench.texts("heldout"))
    tasks = windows_of(bench.tasks(args.task_length, 3, "heldout"))
    lines = [
        {
            "command": " ".join(["python", *sys.argv]),
            "commit": commit(),
            "torch": torch.__version__,
            "fingerprints": {n: fingerprint.of_model(str(args.models / n)) for n in ("target", args.draft)},
            "windows": {"calibration": len(windows), "texts": len(texts), "tasks": len(tasks)},
        }
    ]
    default = measure(texts, bench.map_scorer(proportional(target, draft)))["recall"]
    oracle = measure(texts, lambda w: w.mass)["recall"]

    def add(way: str, scorer: Scorer, serves: bool, **more) -> None:
        found = measure(texts, scorer)
        line = {"way": way, "serves": serves, "texts": found, "tasks": measure(tasks, scorer)}
        line["gap_closed"] = round((found["recall"] - default) / (oracle - default), 3)
        lines.append({**line, **more})
        shown = [f"{line[w]['recall']:.4f} ({line[w]['by_mass']:.4f} by mass)" for w in ("texts", "tasks")]
        print(f"{way:58} texts {shown[0]}, gap {line['gap_closed']:+.0%}; tasks {shown[1]}", flush=True)

    def search_map(found: list[Record], pool: str | None = None, heads: int = 6) -> HeadMap:
        pools = (pool,) if pool else ("max", "mean")
        return search.best_map(search.windows_of(found, CONFIG), target, draft, None, heads, pools).head_map

    add("oracle: the target's own top", lambda w: w.mass, False)
    generator = torch.Generator().manual_seed(0)
    add("random", lambda w: torch.rand(w.mass.shape, generator=generator), False)
    add("sink + recent of the same size", lambda w: (-w.distance).expand(rows, -1), True)
    for pool in ("max", "mean"):
        add(f"proportional, pool {pool}", bench.map_scorer(proportional(target, draft), pool), True)
        add(f"best single head, pool {pool}", best_single(windows, pool, rows), True)
    shipped = search_map(records)
    maps = {f"forward selection, pool {p}, {h} heads": (p, h) for p in ("max", "mean") for h in (2, 6)}
    for way, (pool, heads) in maps.items():
        head_map = search_map(records, pool, heads)
        sources = [[list(map(list, own)) or "latest" for own in layer] for layer in head_map.sources]
        add(f"{way}, latest", bench.map_scorer(head_map), True, sources=sources)
    once = forward_once(windows, rows, 6)
    add("forward selection, pool mean, 6 heads, each once", once, True)
    identity, root, log = lambda x: x, torch.sqrt, lambda x: (x + 1e-6).log()
    for name, shape in (("linear", identity), ("of roots", root), ("log-linear", log)):
        for signed in (False, True):
            way = f"least squares {name}, {'signed' if signed else 'non-negative'}"
            add(way, least_squares(windows, "mean", shape, signed), False)
    smooth = nn.AvgPool1d(3, 1, 1, count_include_pad=False)
    near = with_distance(windows, once, rows)
    add("each once, times a power of the distance", near, False)
    add("each once, means of 3 neighbours", lambda w: smooth(once(w)[None])[0], False)
    both = with_distance(windows, lambda w: smooth(once(w)[None])[0], rows)
    add("each once, means of 3 neighbours, power of the distance", both, False)
    add("ceiling: best single head in every window", best_in_window, False)
    add(
        "ceiling: map searched on these texts themselves",
        bench.map_scorer(search_map(bench.texts("heldout"))),
        True,
    )
    add("ceiling: network over all draft heads", network(windows, rows, False), False)
    add("ceiling: network over all draft heads and distance", network(windows, rows, True), False)

    # 64K tokens: the built-in texts, and recall tasks in documents of Python's own library.
    more = [replace(record, domain="tasks") for record in bench.tasks(4096, 2, "calibration")[:12]]
    add(
        "map from 64K tokens: 4 texts, 12 tasks",
        bench.map_scorer(search_map(records + more)),
        True,
        tokens=65536,
    )
    dense = [bench.record(r.domain, bench.text(r.domain, "calibration")[:4096], 9, 64) for r in records]
    add("map from 16K tokens, 64 windows a text", bench.map_scorer(search_map(dense)), True, tokens=16384)
    add("map from 16K tokens: the built-in texts (shipped)", bench.map_scorer(shipped), True, tokens=16384)
    for record in records:
        add(f"map from 4K tokens: {record.domain}", bench.map_scorer(search_map([record])), True, tokens=4096)
    mixed = [
        t for d in DOMAINS for t in bench.text(d, "calibration")[: 1024 if d != "recall" else 4096][-1024:]
    ]
    add(
        "map from 4K tokens: 1K of each",
        bench.map_scorer(search_map([bench.record("mixed", mixed, 0)])),
        True,
        tokens=4096,
    )
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
