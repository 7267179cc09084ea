"""How far apart the two best tokens are where half precision decides between them by chance.

The shipped target answers questions with transformers, a token at a time, and then reads the same text at
once: the same weights in another order of summation. Wherever it would have said another token, its two best
were a near tie. tests/tolerances.py goes by what this finds; no sts takes part. With --rounded it reads by an
attention that rounds where FA3 and the kernels here do, probabilities before they are divided by their sum:
two implementations differ in such things as well.

  python -m benchmarks.near_ties --out benchmarks/results/near_ties.jsonl     # 40 minutes on one core
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.harness import commit
from sts_sglang.tools.demo import FACTS, MODELS, document, question

NEW_TOKENS = 48
DTYPES = ("bfloat16", "float16")


def questions(number: int) -> list[list[int]]:
    """Prompts of 300 to 1,500 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    found = []
    for i in range(number):
        name = list(FACTS)[i % len(FACTS)]
        text = question(name, document(500 + 3000 * i // number))
        message = [{"role": "user", "content": text}]
        found.append(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
    return found


def rounded(module, query, key, value, attention_mask, scaling=None, **_) -> tuple[torch.Tensor, None]:
    """Causal attention as transformers calls one, [batch, heads, tokens, dim] to [batch, tokens, heads, dim]:
    exponentials weigh values in the values' dtype, and their sum divides in float32."""
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, 1).float() for t in (key, value))
    logits = query.float() @ keys.transpose(-1, -2) * scaling
    rows, tokens = logits.shape[-2:]
    later = torch.ones(rows, tokens, dtype=torch.bool).triu(tokens - rows + 1)
    weights = logits.masked_fill_(later, -torch.inf).sub_(logits.amax(-1, keepdim=True)).exp_()
    out = weights.to(value.dtype).float() @ values / weights.sum(-1, keepdim=True)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


@torch.inference_mode()
def differences(
    model: PreTrainedModel, reader: PreTrainedModel, ids: list[int]
) -> tuple[list[float], torch.Tensor]:
    """Gaps of the two best where the reader says another token, and by how much every gap changes."""
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    said = model.generate(torch.tensor([ids]), **how)
    one_by_one = torch.cat(said.logits).float()
    at_once = reader(said.sequences).logits[0, len(ids) - 1 : -1].float()
    best, which = one_by_one.topk(2)
    again = at_once.gather(1, which)
    gaps = best[:, 0] - best[:, 1]
    other = at_once.argmax(1) != which[:, 0]
    return gaps[other].tolist(), (gaps - again[:, 0] + again[:, 1]).abs()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=800, help="of 48 tokens each (%(default)s)")
    p.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="(both)")
    p.add_argument("--rounded", action="store_true", help="read by another attention, see above")
    p.add_argument("--out", type=Path, help="JSONL, appended to")
    args = p.parse_args()
    AttentionInterface.register("rounded", rounded)
    for dtype in args.dtypes:
        load = partial(AutoModelForCausalLM.from_pretrained, MODELS / "target", dtype=getattr(torch, dtype))
        model, gaps, changes = load(), [], []
        reader = load(attn_implementation="rounded") if args.rounded else model
        for i, ids in enumerate(questions(args.prompts)):
            found, change = differences(model, reader, ids)
            gaps, changes = gaps + found, [*changes, change]
            print(
                f"\r{dtype}: {i + 1} of {args.prompts} prompts, {len(gaps)} differences", end="", flush=True
            )
        every = torch.cat(changes)
        row = {
            "dtype": dtype,
            "rounded": args.rounded,
            "tokens": every.numel(),
            "gaps": sorted(round(gap, 4) for gap in gaps),
        }
        row |= {"change_std": round(float(every.std()), 4), "change_most": round(float(every.max()), 4)}
        row |= {"torch": torch.__version__, "commit": commit()}
        print(f"\n{json.dumps(row)}")
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
