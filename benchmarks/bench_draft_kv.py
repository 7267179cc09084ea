"""What of the target's attention a draft's choice holds when the draft's keys and values are kept in FP8.

    python -m benchmarks.bench_draft_kv --out benchmarks/results/draft_kv.jsonl

The shipped STANDALONE pair over the package's held-out texts, by calibrate's measure of recall, once as it is
and once with the draft's keys and values rounded as `"draft_kv": "fp8_e4m3"` keeps them (scales of 1). A few
seconds on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.harness import commit
from sts_sglang.calibrate import record
from sts_sglang.config import StsConfig
from sts_sglang.evaluate import recall
from sts_sglang.tools.demo import shipped_pair

TEXTS = Path(record.__file__).parents[1] / "texts"
KEEPS = (0.05, 0.1, 0.25)
_exact = record._collecting_attention


def rounding(hidden_size: int, dtype: torch.dtype):
    """The attention of both models, in which the one of this size attends to keys and values of `dtype`."""

    def attention(module, query, key, value, *args, **kwargs):
        if module.config.hidden_size == hidden_size:
            key, value = (x.to(dtype).to(x.dtype) for x in (key, value))
        return _exact(module, query, key, value, *args, **kwargs)

    return attention


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=4096, help="of a text (%(default)s)")
    p.add_argument("--texts", type=int, default=6, help="(%(default)s)")
    p.add_argument("--out", type=Path, help="append raw results to this JSONL file")
    options = p.parse_args()
    pair = shipped_pair()
    text = "\n\n".join(path.read_text() for path in sorted(TEXTS.glob("*.heldout.txt")))
    ids = AutoTokenizer.from_pretrained(pair.target).encode(text)
    first = [i * (len(ids) - options.tokens) // max(1, options.texts - 1) for i in range(options.texts)]
    texts = [ids[i : i + options.tokens] for i in first]
    hidden = json.loads((pair.draft / "config.json").read_text())["hidden_size"]
    for kept, dtype in (("model", torch.float32), ("fp8_e4m3", torch.float8_e4m3fn)):
        record._collecting_attention = rounding(hidden, dtype)
        found = recall.here(pair, texts, StsConfig(budget=0), KEEPS, "cpu")
        for keep, held in found.items():
            row = {
                "draft_kv": kept,
                "keep": keep,
                "recall": round(held.draft, 4),
                "best": round(held.best, 4),
            }
            row |= {"texts": options.texts, "tokens": options.tokens, "commit": commit()}
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
