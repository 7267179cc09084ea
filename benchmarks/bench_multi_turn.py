"""Agents over many turns of one growing history, through the real server: speed and answers by turn.

Every agent shares a system prompt (tool descriptions and library source), then reads one tool output a
turn, which holds new facts, and is asked about a fact of an earlier turn. Half of the agents branch from
the history of another one after the first turn. Arms, each its own server:
  stock       the target alone
  stock-spec  with a STANDALONE draft, dense
  sts-cold    sts, nothing remembered between rounds ("history": "off")
  sts-warm    sts, the first verify of a turn starts from what slots remember ("history": "warm")
  sts-blend   sts, memory in every verify ("history": "blend")
All servers start at the same time; then one after the other is measured, after a warm-up and on an empty
cache, with one set of agents a seed. A line of the output is a turn of an arm, medians over its requests.

Examples, with the package's trained pair on one GPU, and without any:
  python -m benchmarks.bench_multi_turn --agents 64 --seeds 3 --out benchmarks/results/multi_turn.jsonl
  SGLANG_PLATFORM=sts_cpu python -m benchmarks.bench_multi_turn --agents 4 --turns 4 --arms stock,sts-warm \\
      --one-by-one --max-total-tokens 200000 --out multi_turn.jsonl
First verifies after a prefix hit, and what they recall of the attention mass: bench_history.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sysconfig
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.harness import check_arms, commit
from sts_sglang.host.serves import CHAIN_FLAGS
from sts_sglang.tools.demo import shipped_pair
from sts_sglang.tools.local_server import LocalServer, sparse_between, stop_when_terminated

HISTORY = {"sts-cold": "off", "sts-warm": "warm", "sts-blend": "blend"}
ARMS = ("stock", "stock-spec", *HISTORY)
COLORS = ["amber", "stone", "quiet", "silver", "northern", "hidden", "marble", "copper", "velvet", "frozen"]
PLACES = [
    "lantern",
    "harbor",
    "meadow",
    "bridge",
    "tower",
    "orchard",
    "canyon",
    "station",
    "garden",
    "anchor",
]
SHAPES = ("access code", "serial number", "port number")


@dataclass
class Agent:
    """One conversation: what it has read, and what it can be asked."""

    messages: list[dict]
    facts: list[tuple[str, str]] = field(default_factory=list)  # (question, value)

    def read(self, library: list[str], lines: int, rng: random.Random) -> None:
        """A tool output: library source with two facts in it."""
        start = rng.randrange(len(library) - lines)
        output = library[start : start + lines]
        for _ in range(2):
            name = f"{rng.choice(COLORS)} {rng.choice(PLACES)} {rng.randrange(10, 99)}"
            what, value = rng.choice(SHAPES), str(rng.randrange(10000, 99999))
            output.insert(rng.randrange(len(output)), f"The {what} of {name} is {value}.")
            self.facts.append((f"What is the {what} of {name}?", value))
        self.messages.append({"role": "tool", "content": "\n".join(output)})


def library_source() -> list[str]:
    """Lines of the running Python's library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [line for f in files[:80] for line in f.read_text(errors="ignore").splitlines() if line.strip()]


@dataclass
class Reply:
    """What one streamed request gave."""

    answer: str
    ttft_s: float
    tpot_s: float  # of the tokens after the first
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    verifies: int  # rounds of speculation; 0 without


class Client:
    """Asks one server in the form of the pair's chat template."""

    def __init__(self, server: LocalServer, tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        self.server, self.tokenizer, self.max_tokens = server, tokenizer, max_tokens

    def prompt(self, messages: list[dict]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def ask(self, ids: list[int]) -> Reply:
        """One greedy answer, streamed."""
        params = {"temperature": 0, "max_new_tokens": self.max_tokens}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.server.port}/generate",
            json.dumps({"input_ids": ids, "sampling_params": params, "stream": True}).encode(),
            {"content-type": "application/json"},
        )
        started, first, last = time.monotonic(), None, {}
        with urllib.request.urlopen(request, timeout=3600) as stream:
            for line in stream:
                if line.startswith(b"data: {"):
                    first = first or time.monotonic()
                    last = json.loads(line[6:])
        ended, meta = time.monotonic(), last["meta_info"]
        return Reply(
            last["text"],
            first - started,
            (ended - first) / max(1, meta["completion_tokens"] - 1),
            meta["completion_tokens"],
            meta["prompt_tokens"],
            meta["cached_tokens"],
            meta.get("spec_verify_ct", 0),
        )

    def counters(self) -> dict | None:
        state = json.loads(self.server.get("/server_info"))["internal_states"][0]
        return state["sts"]["counters"] if "sts" in state else None


def run_turn(client: Client, agents: list[Agent], turn: int, rng: random.Random) -> dict:
    """All agents read, then all ask at once; answers join their histories."""
    expected = []
    for agent in agents:
        question, value = rng.choice(agent.facts[: max(2, 2 * turn - 2)])
        agent.messages.append({"role": "user", "content": question})
        expected.append(value)
    prompts = [client.prompt(agent.messages) for agent in agents]  # outside of what is timed
    before, started = client.counters(), time.monotonic()
    with ThreadPoolExecutor(len(agents)) as pool:
        replies = list(pool.map(client.ask, prompts))
    seconds = time.monotonic() - started
    for agent, reply in zip(agents, replies, strict=True):
        agent.messages.append({"role": "assistant", "content": reply.answer})
    row = {
        "turn": turn,
        "right": sum(value in reply.answer for value, reply in zip(expected, replies, strict=True)),
        "tokens_per_s": sum(reply.tokens for reply in replies) / seconds,
    }
    for name in ("ttft_s", "tpot_s", "prompt_tokens", "cached_tokens"):
        row[name] = statistics.median(getattr(reply, name) for reply in replies)
    if verifies := sum(reply.verifies for reply in replies):
        row["accept_length"] = sum(reply.tokens - 1 for reply in replies) / verifies
    if before is not None:
        row["keep_ratio"] = sparse_between(before, client.counters())["keep_ratio"]
    return row


def converse(client: Client, options: argparse.Namespace, seed: int, turns: int) -> list[dict]:
    """All turns of one set of agents; every arm sees the same conversations up to its own answers."""
    rng, library = random.Random(seed), library_source()
    system = "You read tool outputs and answer questions about them.\n" + "\n".join(
        library[: options.shared_lines]
    )
    agents = [Agent([{"role": "system", "content": system}]) for _ in range(options.agents)]
    client.server.flush()
    rows = []
    for turn in range(1, turns + 1):
        if turn == 2:  # branches: the second half goes on from the first half's histories
            half = len(agents) // 2
            for i in range(half):
                agents[half + i] = Agent(list(agents[i].messages), list(agents[i].facts))
        for agent in agents:
            agent.read(library, options.lines, rng)
        rows.append({"seed": seed, "agents": len(agents), **run_turn(client, agents, turn, rng)})
    return rows


def run_arm(arm: str, server: LocalServer, options: argparse.Namespace) -> list[dict]:
    """Warm up, then one set of agents a seed."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_pair().target)
    client = Client(server, tokenizer, options.max_tokens)
    converse(client, options, seed=-1, turns=options.warmup_turns)
    rows = []
    for seed in range(options.seed, options.seed + options.seeds):
        for row in converse(client, options, seed, options.turns):
            row = {"arm": arm, **row}
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(shown), flush=True)
            rows.append(row)
    return rows


def launch(arm: str, options: argparse.Namespace) -> LocalServer:
    """The arm's server, which starts at once."""
    pair, requests = shipped_pair(), str(options.agents)
    args = ["--skip-server-warmup", "--random-seed", "0", "--max-running-requests", requests]
    args += ["--context-length", "32768", "--max-total-tokens", str(options.max_total_tokens)]
    if torch.cuda.is_available():
        args += ["--mem-fraction-static", "0.7", "--cuda-graph-max-bs", requests]
        args += ["--cuda-graph-backend-prefill", "disabled"]
    else:
        args += ["--device", "cpu", "--dtype", "float32"]
    if arm != "stock":
        args += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(pair.draft)]
        args += CHAIN_FLAGS.split()
    if arm in HISTORY:
        config = {"stand_aside": 0, **json.loads(options.sts_config), "history": HISTORY[arm]}
        args += ["--attention-backend", "sts", "--sts-config", json.dumps(config)]
    args += shlex.split(options.server_args)
    return LocalServer(pair.target, options.logs / f"{arm}.log", *args, start_seconds=600)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--agents", type=int, default=8, help="conversations at a time (%(default)s)")
    p.add_argument("--turns", type=int, default=5, help="(%(default)s)")
    p.add_argument("--shared-lines", type=int, default=150, help="lines of the system prompt (%(default)s)")
    p.add_argument("--lines", type=int, default=120, help="lines of a tool output (%(default)s)")
    p.add_argument("--max-tokens", type=int, default=32, help="length of an answer (%(default)s)")
    p.add_argument("--arms", default=",".join(ARMS), help="comma separated (%(default)s)")
    p.add_argument("--sts-config", default='{"keep": 0.1, "budget": 0}', help="inline JSON (%(default)s)")
    p.add_argument("--server-args", default="", help="further arguments of all servers, one string")
    p.add_argument("--max-total-tokens", type=int, default=800_000, help="of a KV pool (%(default)s)")
    p.add_argument("--one-by-one", action="store_true", help="start a server when the one before is done")
    p.add_argument("--warmup-turns", type=int, default=2, help="not reported, 0 for none (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the first set of conversations (%(default)s)")
    p.add_argument("--seeds", type=int, default=1, help="sets of conversations (%(default)s)")
    p.add_argument("--logs", type=Path, default=Path("."), help="folder of the server logs (%(default)s)")
    p.add_argument("--out", type=Path, help="append raw results to this JSONL file")
    options = p.parse_args(argv)
    check_arms(p, options.arms, ARMS)
    return options


def main(argv: list[str] | None = None) -> None:
    stop_when_terminated()
    options = parse(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    arms = options.arms.split(",")
    with ExitStack() as stack:
        started = {} if options.one_by_one else {arm: launch(arm, options) for arm in arms}
        for server in started.values():
            stack.callback(server.stop)  # also those that wait while an earlier one fails
        for server in started.values():
            stack.enter_context(server)
        for arm in arms:
            with ExitStack() as own:
                server = started.get(arm) or own.enter_context(launch(arm, options))
                rows = run_arm(arm, server, options)
            origin = {"device": device, "commit": commit(), "server": server.shown_command()}
            if options.out:
                with options.out.open("a") as file:
                    file.writelines(json.dumps({**row, **origin}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
