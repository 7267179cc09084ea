"""The least bytes that a round of speculation reads, and so the least time that it can take.

Weights of the target once and of the draft in each of its passes, and the keys and values that attention is
over: of the target what verify attends to, of the draft what its passes attend to (by which sts scores), and
the sketches where the target's own queries choose, in verifies that do not stand aside. What is written,
activations and the rows of embeddings are left out, so the bound is below what any kernel can do.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.shapes import Shape
from sts_kernels.layout import sketch_bytes

BF16 = 2  # bytes of a value
FUSED = 3  # hidden states of the target that an EAGLE-3 head is given, side by side


def model(folder: Path) -> dict[str, int] | None:
    """Layers, heads and bytes of weights of a dense model of Llama's kind in bfloat16, or of an EAGLE-3 head.

    weights: bytes that every pass reads. once: those that one pass a round reads besides. None where
    config.json does not say all of it, or names experts, of which a pass reads some.
    """
    config = json.loads((folder / "config.json").read_text())
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not all(isinstance(config.get(field), int) for field in fields) or any(
        "expert" in name for name in config
    ):
        return None
    hidden, inner, layers, heads, vocab = (config[field] for field in fields)
    kv_heads, dim = config.get("num_key_value_heads", heads), config.get("head_dim") or hidden // heads
    head = "Eagle3" in "".join(config.get("architectures", ()))
    # The head reads the embedding of a token beside the hidden state of the one before.
    attention = (2 if head else 1) * hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden
    weights = layers * (attention + 3 * hidden * inner) + config.get("draft_vocab_size", vocab) * hidden
    once = FUSED * hidden * hidden if head else 0
    shape = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    return {**shape, "weights": BF16 * weights, "once": BF16 * once}


def round_bytes(row: dict) -> dict[str, float] | None:
    """Of a row of bench_serving by purpose, on all its GPUs; None where it does not say which models it is
    of, or its requests share keys, which need not be read for each.

    The draft passes over its context in `steps` - 1 decode steps and in draft-extend; where it is sparse
    (`sparse_draft`: "steps", "all" or "every") the first step alone, of `scored_share` of the rounds where
    selections are kept, and draft-extend with "steps", read all of it; with "every" what scores reads keys
    alone, and with "extend" all steps read all of it.
    """
    target, draft = row.get("target"), row.get("draft")
    if target is None or row["shared"] or (row["drafts"] and draft is None):
        return None
    context = sum(Shape.of(row).lengths()) + row["requests"] * row["new_tokens"] / 2
    value = 1 if row["kv"].startswith("fp8") else BF16
    kept = row.get("keep_ratio", 1)
    found = {"weights": target["weights"], "target": kept * context * kv_bytes(target, value)}
    if row["drafts"]:
        passes = row["steps"]
        read = {"extend": passes - 1, "steps": 2, "all": 1, "every": 0}  # by so many passes
        dense = min(passes, read.get(row.get("sparse_draft"), passes))
        scored = row.get("scored_share", 1)
        # Keys without values, beside the step that attends sparsely; else the scoring step is a dense one.
        alone = scored / 2 if row.get("sparse_draft") == "every" else 0
        dense -= 0 if row.get("sparse_draft") == "every" else 1 - scored
        found["weights"] += passes * draft["weights"] + draft["once"]
        own = {"model": BF16, "fp8_e4m3": 1}.get(row.get("draft_kv"), value)
        found["draft"] = (alone + dense + kept * (passes - dense)) * context * kv_bytes(draft, own)
    if row.get("selector") == "tokens":
        own = target["layers"] * target["kv_heads"] * sketch_bytes(target["head_dim"])
        found["sketches"] = (1 - row.get("aside_share", 0)) * context * own
    return found


def kv_bytes(model: dict[str, int], value: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * value * model["layers"] * model["kv_heads"] * model["head_dim"]


def times_bound(found: list[dict]) -> float | None:
    """How many times the bound of its bytes a round takes, by the median of rows of one server; None where
    they do not say what it is."""
    bounds = [round_bytes(row) for row in found]
    if not found or not all(bounds) or not all(row.get("read_gbps") for row in found):
        return None
    took = [row["tpot_ms"] * row["accept_length"] for row in found]
    least = [
        sum(b.values()) / row["read_gbps"] / row["tp"] / 1e6 for b, row in zip(bounds, found, strict=True)
    ]
    return statistics.median(t / b for t, b in zip(took, least, strict=True))
