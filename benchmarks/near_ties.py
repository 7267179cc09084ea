"""How far apart the two best tokens are where half precision decides between them by chance.

The shipped target answers questions with transformers, a token at a time, and then reads the same text at
once: the same weights in another order of summation. Wherever it would have said another token, its two best
were a near tie. tests/tolerances.py goes by what this finds; no sts takes part. With --rounded it reads by an
attention that rounds where FA3 and the kernels here do, probabilities before they are divided by their sum:
two implementations differ in such things as well. With --backends it asks, on a GPU, where servers of
other attention backends of stock SGLang, given what FA3 said so far, say another token; prompts are up to 20
times as long.

  python -m benchmarks.near_ties --out benchmarks/results/near_ties.jsonl     # 40 minutes on one core
  python -m benchmarks.near_ties --backends flashinfer triton --prompts 160 --dtypes bfloat16 --out ...
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.harness import commit
from sts_sglang.tools.demo import FACTS, MODELS, document, question
from sts_sglang.tools.local_server import LocalServer, stop_when_terminated

NEW_TOKENS = 48
DTYPES = ("bfloat16", "float16")
BACKENDS = ("flashinfer", "triton")
AT_ONCE = 8  # requests to a server


def questions(number: int, longest: int = 3500) -> list[list[int]]:
    """Prompts of documents of 500 to `longest` characters, about 300 to 1,500 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    found = []
    for i in range(number):
        name = list(FACTS)[i % len(FACTS)]
        text = question(name, document(500 + (longest - 500) * i // number))
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


def ask(server: LocalServer, ids: list[int], tokens: int = NEW_TOKENS, **params) -> dict:
    """So many tokens, greedy unless `params` say otherwise, with the two best of every place."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True, **params}
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 2}
    return server.post("/generate", body)


def forced_through(server: LocalServer, ids: list[int], stock: dict, **params) -> list[float]:
    """Along stock's output, how far apart stock's two best are wherever the server says something else."""
    tokens = stock["output_ids"]
    gaps = [first[0] - second[0] for first, second in stock["meta_info"]["output_top_logprobs"]]
    done, found = 0, []
    while done < len(tokens):
        own = ask(server, ids + tokens[:done], len(tokens) - done, **params)["output_ids"]
        same = next((i for i, (a, b) in enumerate(zip(own, tokens[done:], strict=True)) if a != b), len(own))
        done += same
        if done < len(tokens):
            found.append(gaps[done])
            done += 1
    return found


def between_backends(dtype: str, backends: list[str], prompts: list[list[int]]) -> list[dict]:
    """Where each backend says another token than FA3 said; FA3 too, whose batches are others then."""
    args = ["--dtype", dtype, "--context-length", "33792", "--max-total-tokens", "400000"]
    args += ["--cuda-graph-max-bs", str(AT_ONCE), "--cuda-graph-backend-prefill", "disabled"]
    args += ["--skip-server-warmup", "--random-seed", "0"]
    with ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for backend in ("fa3", *backends):
            how = [*args, "--attention-backend", backend]
            servers[backend] = LocalServer(
                MODELS / "target", folder / f"{backend}.log", *how, start_seconds=600
            )
            stack.callback(servers[backend].stop)
        for server in servers.values():
            server.__enter__()
        answers = list(pool.map(partial(ask, servers["fa3"]), prompts))
        rows = []
        for backend, server in servers.items():
            found = chain.from_iterable(pool.map(partial(forced_through, server), prompts, answers))
            rows.append({"backend": backend, "tokens": NEW_TOKENS * len(prompts), "gaps": in_order(found)})
    return rows


def in_order(gaps: Iterable[float]) -> list[float]:
    return sorted(round(gap, 4) for gap in gaps)


def save(row: dict, out: Path | None) -> None:
    """Show a row, and append it."""
    row = {**row, "torch": torch.__version__, "commit": commit()}
    print(f"\n{json.dumps(row)}", flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    stop_when_terminated()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=800, help="of 48 tokens each (%(default)s)")
    p.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="(both)")
    p.add_argument("--rounded", action="store_true", help="read by another attention, see above")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, help="of SGLang, on a GPU, see above")
    p.add_argument("--out", type=Path, help="JSONL, appended to")
    args = p.parse_args()
    if args.rounded and args.backends:
        p.error("--rounded: no server attends so; leave it out, or --backends")
    if args.backends and not torch.cuda.is_available():
        p.error("--backends: FA3, which they are compared with, needs a GPU")
    if args.backends:
        for dtype in args.dtypes:
            for row in between_backends(dtype, args.backends, questions(args.prompts, 70_000)):
                save({"dtype": dtype, "gpu": torch.cuda.get_device_name(), **row}, args.out)
        return
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
        row = {"dtype": dtype, "rounded": args.rounded, "tokens": every.numel(), "gaps": in_order(gaps)}
        row |= {"change_std": round(float(every.std()), 4), "change_most": round(float(every.max()), 4)}
        save(row, args.out)


if __name__ == "__main__":
    main()
