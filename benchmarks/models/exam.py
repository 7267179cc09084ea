"""Dense greedy accuracy of the target on held-out tasks, by task, length and depth of the needle.

python benchmarks/models/exam.py --lengths 4096 16384 32768 --items 44 [--out FILE.jsonl --corpus DIR]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from model import DRAFT, TARGET, Llama
from tasks import EXAM, ROOM, Question, Row, Writer
from tqdm import tqdm
from train import load_checkpoint

DEPTHS = [i / 10 for i in range(11)]
SHIPPED = Path(__file__).parents[2] / "sts_sglang" / "models"


def load(folder: Path, name: str, device: str) -> Llama:
    """A model from a folder of checkpoints or of Hugging Face folders."""
    model = Llama({"target": TARGET, "draft": DRAFT}[name])
    load_checkpoint(folder, name, model)
    return model.to(device).eval()


def heldout(corpus: Path | None) -> Writer:
    return Writer.of_corpus(corpus, "test") if corpus else Writer.shipped(SHIPPED / "target")


def score(answer: str, question: Question) -> float:
    """The share of the values asked for that the answer has."""
    found = [v for v in question.values if v in answer]
    return len(found) / len(question.values)


def answers(model: Llama, writer: Writer, rows: list[Row], tokens_at_once: int) -> list[str]:
    device, length, texts = model.model.norm.weight.device, len(rows[0].ids), []
    size = max(1, tokens_at_once // length)
    for i in range(0, len(rows), size):
        prompt = torch.tensor([r.ids for r in rows[i : i + size]], device=device)
        for out in model.generate(prompt, ROOM, stop=writer.end).tolist():
            out = out[: out.index(writer.end)] if writer.end in out else out
            texts.append(writer.tok.decode(out, skip_special_tokens=False))
    return texts


def examine(
    model: Llama,
    writer: Writer,
    name: str,
    length: int,
    items: int,
    tokens_at_once: int,
    show: int = 0,
    seed: int = 0,
) -> dict:
    rng = random.Random(f"exam {name} {length}" + (f" {seed}" if seed else ""))
    depths = [DEPTHS[i % len(DEPTHS)] if name == "single" else None for i in range(items)]
    rows, questions = zip(*(writer.examination(name, length, rng, d) for d in depths), strict=True)
    texts = answers(model, writer, list(rows), tokens_at_once)
    scores = [score(t, q) for t, q in zip(texts, questions, strict=True)]
    for text, question, right in list(zip(texts, questions, scores, strict=True)):
        if right < 1 and show > 0:
            show -= 1
            tqdm.write(f"  {name}: {question.ask!r} -> {text[:150]!r}, not {question.answer[:150]!r}")
    result = {"task": name, "length": length, "items": items, "accuracy": sum(scores) / items}
    if name == "single":
        result["by_depth"] = {
            d: sum(s for s, e in zip(scores, depths, strict=True) if e == d) / depths.count(d) for d in DEPTHS
        }
    return result


@torch.no_grad()
def text_loss(model: Llama, writer: Writer, length: int, rows: int = 16) -> float:
    rng = random.Random("text")
    ids = torch.tensor(
        [writer.plain(length, rng).ids for _ in range(rows)], device=model.model.norm.weight.device
    )
    losses = [model.losses(model(row[None, :-1]), row[1:])[0].mean() for row in ids]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="what corpus.py built; without it the documents are Python's own library"
    )
    parser.add_argument("--models", type=Path, default=SHIPPED)
    parser.add_argument("--model", default="target")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--items", type=int, default=55)
    parser.add_argument("--tasks", nargs="+", default=list(EXAM))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=2**19, help="in one batch")
    parser.add_argument("--seed", type=int, default=0, help="of the items: other seeds, other items")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print, of each cell")
    args = parser.parse_args()
    model = load(args.models, args.model, args.device)
    writer = heldout(args.corpus)
    results = []
    tqdm.write(f"held-out text, nats a token: {text_loss(model, writer, min(args.lengths)):.3f}")
    for length in args.lengths:
        for name in tqdm(args.tasks, desc=str(length), mininterval=10):
            results.append(
                examine(model, writer, name, length, args.items, args.tokens, args.show, args.seed)
            )
            tqdm.write(json.dumps(results[-1]))
        cells = [r["accuracy"] for r in results if r["length"] == length]
        tqdm.write(f"mean of {len(cells)} tasks at {length}: {sum(cells) / len(cells):.3f}")
    if args.out:
        args.out.write_text("\n".join(map(json.dumps, results)) + "\n")


if __name__ == "__main__":
    main()
