"""Train the target on real text and recall tasks, from 128 tokens to 32,768, and distil its students from it.

python benchmarks/models/train.py --corpus .data/corpus --out DIR --steps 12500 --minutes 9
python benchmarks/models/train.py ... --resume DIR              goes on where DIR's checkpoint stopped
python benchmarks/models/train.py ... --students --plan joint   trains draft and EAGLE-3 head as well
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from model import TARGET, Llama, Trace, compiled
from optim import Optimiser
from safetensors.torch import load_file, save_file
from students import Students, sample_rows, tail_loss
from tasks import ANSWER, TEXT, Writer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

PEAK_RATE, WARM_UP, ANSWER_WEIGHT = 3e-3, 200, 1.5
# (share of the steps, {length: how often}). Recall emerges at short lengths; it is lengthened from there.
PLANS = {
    "curriculum": [
        (0.05, {128: 1.0}),
        (0.10, {128: 0.3, 512: 0.7}),
        (0.25, {128: 0.1, 512: 0.3, 2048: 0.6}),
        (0.20, {512: 0.2, 2048: 0.3, 8192: 0.5}),
        (0.40, {512: 0.1, 2048: 0.2, 8192: 0.3, 32768: 0.4}),
    ],
    "joint": [
        (0.08, {128: 0.5, 512: 0.5}),
        (0.12, {512: 0.6, 2048: 0.4}),
        (0.30, {512: 0.2, 2048: 0.6, 8192: 0.2}),
        (0.50, {512: 0.15, 2048: 0.33, 8192: 0.3, 32768: 0.22}),
    ],
    "mixture": [(1.0, {128: 0.05, 512: 0.25, 2048: 0.35, 8192: 0.18, 32768: 0.17})],
}


@dataclass(frozen=True)
class Batches(Dataset):
    """The batch of each step, a function of (seed, step) alone."""

    writer: Writer
    plan: list
    steps: int
    tokens: int
    longest: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def length(self, step: int) -> int:
        ends = itertools.accumulate(width for width, _ in self.plan)
        lengths = next(
            (p for end, (_, p) in zip(ends, self.plan, strict=True) if step < end * self.steps), {}
        )
        lengths = lengths or self.plan[-1][1]
        rng = random.Random(f"{self.seed} length {step}")
        return min(rng.choices(list(lengths), list(lengths.values()))[0], self.longest)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        length, rng = self.length(step), random.Random(f"{self.seed} rows {step}")
        rows = [self.writer.row(length, rng) for _ in range(self.tokens // length)]
        ids = torch.tensor([r.ids for r in rows], dtype=torch.int32)
        return ids, torch.tensor([r.kinds for r in rows], dtype=torch.int8)


def learning_rate(step: int, share: float, peak: float, warm_up: int = WARM_UP) -> float:
    """Warm-up, constant, and a linear decay over the last 40 % of the run."""
    return peak * min(1.0, (step + 1) / warm_up, max(0.02, (1 - share) / 0.4))


def shifted(ids: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and their kinds, flat; the last position of a row has none."""
    labels, kinds = ids.roll(-1, 1), kinds.roll(-1, 1)
    kinds[:, -1] = 0
    return labels.flatten(), kinds.flatten()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


class Journal:
    """Means of what is recorded on the device, written every `every` steps."""

    def __init__(self, path: Path, every: int):
        self.path, self.every, self.pending, self.start = path, every, [], time.time()

    def record(self, step: int, length: int, **values: Tensor) -> str | None:
        self.pending.append((length, torch.stack([v.detach().float() for v in values.values()])))
        if (step + 1) % self.every:
            return None
        table = torch.stack([v for _, v in self.pending]).tolist()
        lines = []
        with self.path.open("a") as file:
            for n in sorted({n for n, _ in self.pending}):
                rows = [v for (m, _), v in zip(self.pending, table, strict=True) if m == n]
                means = {
                    k: round(sum(c) / len(rows), 4)
                    for k, c in zip(values, zip(*rows, strict=True), strict=True)
                }
                file.write(
                    json.dumps(
                        {
                            "step": step + 1,
                            "length": n,
                            "seconds": round(time.time() - self.start, 1),
                            **means,
                        }
                    )
                    + "\n"
                )
                lines.append(f"{n}: " + " ".join(f"{k} {v:.3f}" for k, v in means.items()))
        self.pending = []
        return " | ".join(lines)


def save_checkpoint(folder: Path, name: str, model: nn.Module, optimiser: Optimiser, **state) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, tensors in ("", model.state_dict()), (".moments", optimiser.moments()):
        half = {k: v.to(torch.bfloat16) if v.ndim else v for k, v in tensors.items()}
        part = folder / f"{name}{suffix}.part"
        save_file({k: v.contiguous() for k, v in half.items()}, part, metadata={"format": "pt"})
        part.rename(folder / f"{name}{suffix}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(state))


def weights_of(folder: Path, name: str) -> Path:
    """A checkpoint of this script or the shipped folder of the same model."""
    own = folder / f"{name}.safetensors"
    return own if own.exists() else folder / {"eagle": "eagle3"}.get(name, name) / "model.safetensors"


def load_checkpoint(
    folder: Path, name: str, model: torch.nn.Module, optimiser: Optimiser | None = None
) -> int:
    """Returns the step to go on with; shipped models have neither step nor moments and begin at 0."""
    model.load_state_dict(load_file(weights_of(folder, name)))
    moments, state = folder / f"{name}.moments.safetensors", folder / f"{name}.json"
    if optimiser is not None and moments.exists():
        optimiser.load_moments(load_file(moments))
    return json.loads(state.read_text())["step"] if state.exists() else 0


def loader(batches: Batches, first: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ahead = 6 if workers else None
    order = range(first, len(batches))
    return iter(
        DataLoader(
            batches,
            None,
            sampler=order,
            num_workers=workers,
            prefetch_factor=ahead,
            pin_memory=torch.cuda.is_available(),
        )
    )


def target_step(
    model: Llama, ids: Tensor, kinds: Tensor, trace: Trace | None
) -> tuple[Tensor, dict[str, Tensor]]:
    labels, kinds = shifted(ids, kinds)
    loss, right = model.losses(model(ids, trace), labels)
    text, answer = masked_mean(loss, kinds == TEXT), masked_mean(loss, kinds == ANSWER)
    return text + ANSWER_WEIGHT * answer, {
        "text": text,
        "answer": answer,
        "right": masked_mean(right, kinds == ANSWER),
    }


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint, or the shipped models")
    parser.add_argument("--students", action="store_true", help="train draft and EAGLE-3 head as well")
    parser.add_argument("--concentrate", type=float, default=0.0, help="weight of diffuse attention")
    parser.add_argument("--attention", type=float, default=0.3, help="weight of the draft's attention")
    parser.add_argument("--freeze", action="store_true", help="leave the target as it is")
    parser.add_argument(
        "--restart", action="store_true", help="take the weights of --resume, but begin the plan anew"
    )
    parser.add_argument("--plan", choices=PLANS, default="curriculum")
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="peak learning rate")
    parser.add_argument("--student-rate", type=float, default=PEAK_RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=16000, help="of the whole plan")
    parser.add_argument("--stop", type=int, help="step to stop at, if before the end of the plan")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this time")
    parser.add_argument("--tokens", type=int, default=65536, help="a step")
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--every", type=int, default=100, help="steps between lines of the journal")
    return parser


def main() -> None:
    args, begin = arguments(__doc__).parse_args(), time.time()
    torch.manual_seed(args.seed)
    writer = Writer.of_corpus(args.corpus, "train")
    batches = Batches(writer, PLANS[args.plan], args.steps, args.tokens, args.longest, args.seed)
    run = Run(args)
    first = run.resume(args.resume) if args.resume else 0
    args.out.mkdir(parents=True, exist_ok=True)
    journal, saved = Journal(args.out / "journal.jsonl", args.every), time.time()
    last = min(args.stop or args.steps, args.steps)
    bar = tqdm(
        zip(range(first, last), loader(batches, first, args.workers), strict=False),
        initial=first,
        total=last,
        mininterval=10,
    )
    for step, (ids, kinds) in bar:
        ids, kinds = ids.to(args.device, non_blocking=True).long(), kinds.to(args.device, non_blocking=True)
        # A run that is slower than planned still ends with a low rate.
        line = journal.record(
            step,
            ids.shape[1],
            **run.step(step, max(step / args.steps, (time.time() - begin) / 60 / args.minutes), ids, kinds),
        )
        if line:
            tqdm.write(f"{step + 1} {time.time() - begin:.0f}s {line}")
        done = time.time() - begin > 60 * args.minutes or step + 1 == last
        if done or time.time() - saved > 120:
            run.save(step + 1)
            saved = time.time()
        if done:
            break


class Run:
    """The models of a run with their optimisers."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.target = Llama(TARGET).to(args.device)
        self.students = Students(args.attention).to(args.device) if args.students else None
        fast = not args.no_compile
        if fast:
            self.target.fused = compiled()
        self.optimisers = {} if args.freeze else {"target": (self.target, Optimiser(self.target, fast))}
        if self.students is not None:
            self.students.draft.fused = self.target.fused
            self.optimisers["draft"] = (self.students.draft, Optimiser(self.students.draft, False))
            self.optimisers["eagle"] = (self.students.eagle, Optimiser(self.students.eagle, False))

    def resume(self, folder: Path) -> int:
        """Loads what the folder has; students that it lacks begin anew."""
        if self.args.freeze:
            load_checkpoint(folder, "target", self.target)
        step = 0
        for name, (model, optimiser) in self.optimisers.items():
            if weights_of(folder, name).exists():
                step = load_checkpoint(folder, name, model, optimiser)
            elif name == "eagle":
                model.lm_head.load_state_dict({"weight": self.target.model.embed_tokens.weight})
        return 0 if self.args.restart else step

    def step(self, step: int, share: float, ids: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        trace = Trace([], [], []) if self.students is not None or self.args.concentrate else None
        with torch.set_grad_enabled(not self.args.freeze):
            loss, values = target_step(self.target, ids, kinds.clone(), trace)
            if self.args.concentrate:
                tail = tail_loss(trace, sample_rows(kinds.roll(-1, 1), 16))
                loss, values = loss + self.args.concentrate * tail, values | {"tail": tail}
        if self.students is not None:
            more, metrics = self.students.losses(self.target, ids, kinds, trace)
            loss, values = (more if self.args.freeze else loss + more), values | metrics
        loss.backward()
        for name, (_, optimiser) in self.optimisers.items():
            rate = self.args.rate if name == "target" else self.args.student_rate
            optimiser.step(learning_rate(step, share, rate))
        return values

    def save(self, step: int) -> None:
        for name, (model, optimiser) in self.optimisers.items():
            save_checkpoint(self.args.out, name, model, optimiser, step=step, steps=self.args.steps)


if __name__ == "__main__":
    main()
