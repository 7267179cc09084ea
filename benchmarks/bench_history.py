"""What memory adds to a selection, what a smaller one keeps of it, and the first verify after a prefix hit.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_history --out benchmarks/results/history_summary.jsonl

The conversations of bench_multi_turn.py run through the trained pair in plain torch, teacher-forced with the
right answers: no server, no approximation of the draft. Every third token of an answer is a round, and its
target rows say how much attention mass each position is worth. A line of the output is one way to remember:
  off      this round's scores alone
  channel  history "blend" as served: a score for every channel (row of the head map) and slot
  layer    one score a draft layer and slot, the maximum of its channels
  slot     one score a slot
  warm     as `channel`, in the first round of a turn only
`recall` is the share of the mass outside sink and recent that the selection at keep 10 % holds, mean over
rounds, layers and KV heads; `by_mass` weighs heads by how much mass they have there. `first` and
`first_by_mass` are the same over the first rounds after a prefix hit (turns 2 and later), in which the draft
key just past the matched prefix is the donor's: its score counts as lost. `first_of_fresh` is the mass, sink
and recent included, that the first verify holds, over what a fresh scoring of the whole context would (no key
lost, nothing remembered); `first_of_oracle` over what the target's own top tokens would. `over_channel` is
the difference of `by_mass` to `channel`, `over_off` to `off`, with standard errors over conversations.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.bench_multi_turn import Agent, library_source
from benchmarks.harness import commit
from sts_sglang import headmap
from sts_sglang.calibrate.record import Pair, Record
from sts_sglang.calibrate.search import Window
from sts_sglang.config import StsConfig
from sts_sglang.tools.demo import MODELS

CONFIG = StsConfig(keep=0.1, budget=0)
WAYS = ("off", "channel", "layer", "slot", "warm")
WEIGHTS = (0.5, 0.2, 0.05)  # of memory
ROUND = 3  # accepted tokens


class Round:
    """A window with its turn; `matched` is the prefix that the turn found in the cache."""

    def __init__(self, record: Record, i: int, turn: int, first: bool, matched: int):
        self.window = Window(record, i, CONFIG)
        self.turn, self.first, self.matched = turn, first, matched
        self.mass = record.mass.read(i)  # [layers * KV heads, t]
        self.total = self.mass.sum(1)

    def kept(self, scores: torch.Tensor) -> torch.Tensor:
        """[rows] mass outside sink and recent that the top of `scores` [rows, t] holds."""
        values = scores[:, self.window.span].double()
        values = values + 1e-15 * torch.arange(values.shape[1])  # of equal scores the later position wins
        return self.mass[:, self.window.span].gather(1, self.window.top(values)).sum(1)

    @property
    def outside(self) -> torch.Tensor:
        return self.mass[:, self.window.span].sum(1)


class Chat:
    """Conversations, and the map that scores them."""

    def __init__(self, lines: int, shared: int, turns: int):
        self.pair = Pair(str(MODELS / "target"), str(MODELS / "draft"))
        models = headmap.ModelPaths(str(MODELS / "target"), str(MODELS / "draft"))
        counts = self.pair.target_counts, self.pair.draft_counts
        self.map = headmap.of_config(CONFIG, *counts, models)
        self.pool = self.map.pool or "max"
        self.tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
        self.library, self.lines, self.shared, self.turns = library_source(), lines, shared, turns
        self.rows = [c for t in range(counts[0].layers) for c in self.map.head_channels(t)]
        layers = [min((layer for layer, _ in sources), default=-1) for sources in self.map.channels]
        self.same_layer = torch.tensor([[a == b for b in layers] for a in layers])

    def ids(self, messages: list[dict], prompt: bool = False) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False, tokenize=True
        )

    def rounds(self, seed: int) -> list[Round]:
        rng = random.Random(seed)
        agent = Agent([{"role": "system", "content": "\n".join(self.library[: self.shared])}])
        spans, matched = [], 0
        for _ in range(self.turns):
            agent.read(self.library, self.lines, rng)
            question, value = rng.choice(agent.facts)
            agent.messages.append({"role": "user", "content": question})
            start = len(self.ids(agent.messages, prompt=True))
            answer = f"{question.replace('What is the', 'The').rstrip('?')} is {value}."
            agent.messages.append({"role": "assistant", "content": answer})
            end = len(self.ids(agent.messages))
            spans.append((range(start, end - ROUND - 1, ROUND), matched))
            matched = end
        ids = self.ids(agent.messages)
        record = self.pair.record("chat", ids, [t for span, _ in spans for t in span])
        places = [(turn, t == span[0], hit) for turn, (span, hit) in enumerate(spans) for t in span]
        return [Round(record, i, *place) for i, place in enumerate(places)]

    def fresh(self, round_: Round) -> torch.Tensor:
        """[channels, t] importance of the round's draft rows."""
        scores = round_.window.record.scores[self.pool].read(round_.window.i)
        heads, found = self.pair.draft_counts.q_heads, []
        for sources in self.map.channels:
            own = scores[[layer * heads + head for layer, head in sources]]
            found.append((own.amax(0) if self.pool == "max" else own.mean(0)) if sources else 0 * scores[0])
        return torch.stack(found)

    def summary(self, fresh: torch.Tensor, way: str) -> torch.Tensor:
        """What is remembered of a round, for every channel."""
        if way == "slot":
            return fresh.amax(0).expand_as(fresh)
        if way == "layer":
            return torch.stack([fresh[same].amax(0) for same in self.same_layer])
        return fresh

    def follow(self, rounds: list[Round], way: str, weight: float) -> list[tuple[Round, torch.Tensor]]:
        """Every round's importance [rows, t], in order."""
        memory, found = torch.empty(len(self.map.channels), 0), []
        decay = CONFIG.history_decay
        for round_ in rounds:
            fresh = self.fresh(round_)
            if round_.first and round_.turn > 0:
                fresh[:, round_.matched] = 0
            known, mixed = memory.shape[1], fresh.clone()
            if way != "off" and (way != "warm" or round_.first):
                mixed[:, :known] = (1 - weight) * fresh[:, :known] + weight * memory
            found.append((round_, mixed[self.rows]))
            now = self.summary(fresh, way).clone()
            now[:, :known] = torch.maximum(now[:, :known], memory * decay)
            memory = now
        return found


def measure(chat: Chat, conversations: list[list[Round]], way: str, weight: float) -> dict:
    """A line of the output; `each` has one recall by mass a conversation."""
    seen: dict[str, list[float]] = {}

    def see(**values) -> None:
        for name, value in values.items():
            seen.setdefault(name, []).append(float(value))

    each = []
    for rounds in conversations:
        own = []
        for round_, scores in chat.follow(rounds, way, weight):
            kept = round_.kept(scores)
            recall, by_mass = (
                (kept / round_.outside.clamp(min=1e-30)).mean(),
                kept.sum() / round_.outside.sum(),
            )
            own.append(float(by_mass))
            see(recall=recall, by_mass=by_mass)
            if round_.first and round_.turn > 0:
                rest = (round_.total - round_.outside).sum()
                fresh = round_.kept(chat.fresh(round_)[chat.rows]).sum()
                best, held = round_.kept(round_.mass).sum(), kept.sum() + rest
                see(first=recall, first_by_mass=by_mass)
                see(first_of_fresh=held / (fresh + rest), first_of_oracle=held / (best + rest))
        each.append(statistics.mean(own))
    means = {name: round(statistics.mean(values), 4) for name, values in seen.items()}
    least = round(min(seen["first_of_fresh"]), 4)
    return {"way": way, "weight": weight, **means, "first_of_fresh_least": least, "each": each}


def command() -> str:
    return " ".join(["python", *(word.removeprefix(f"{Path.cwd()}/") for word in sys.argv)])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--conversations", type=int, default=12, help="(%(default)s)")
    p.add_argument("--turns", type=int, default=4, help="(%(default)s)")
    p.add_argument("--lines", type=int, default=60, help="lines of a tool output (%(default)s)")
    p.add_argument("--shared-lines", type=int, default=60, help="lines of the system prompt (%(default)s)")
    p.add_argument("--out", type=Path, help="append the lines to this JSONL file")
    options = p.parse_args()
    chat = Chat(options.lines, options.shared_lines, options.turns)
    conversations = [chat.rounds(seed) for seed in range(options.conversations)]
    channels = len(chat.map.channels)
    layers = len({min((layer for layer, _ in s), default=-1) for s in chat.map.channels})
    numbers = {"off": 0, "slot": 1, "layer": layers}
    lines = [measure(chat, conversations, way, weight) for weight in WEIGHTS for way in WAYS]
    off = lines[0]["each"]
    served = {line["weight"]: line["each"] for line in lines if line["way"] == "channel"}
    for line in lines:
        each = line.pop("each")
        for name, other in (("over_channel", served[line["weight"]]), ("over_off", off)):
            more = [a - b for a, b in zip(each, other, strict=True)]
            line[name] = round(statistics.mean(more), 4)
            line[f"{name}_error"] = round(statistics.stdev(more) / len(more) ** 0.5, 4)
        line["bytes_a_token"] = 4 * numbers.get(line["way"], channels)
        line |= {"conversations": len(conversations), "rounds": sum(map(len, conversations))}
        line |= {"longest": max(r[-1].window.record.tokens for r in conversations)}
        line |= {"head_map": chat.map.origin, "commit": commit(), "command": command()}
    for line in lines:
        print(json.dumps({k: v for k, v in line.items() if k != "command"}))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
