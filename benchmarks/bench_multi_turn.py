"""Agents over many turns of one growing history, through the real server: speed and answers by turn.

Every agent shares a system prompt (tool descriptions and library source), then reads one tool output a
turn, which holds new facts, and is asked about a fact of an earlier turn. Half of the agents branch from
the history of another one after the first turn. Arms, each its own server:
  stock       the target alone
  stock-spec  with a STANDALONE draft, dense
  sts-cold    sts, nothing remembered between rounds ("history": "off")
  sts-warm    sts, the first verify of a turn starts from what slots remember ("history": "warm")
  sts-blend   sts, memory in every verify ("history": "blend")

Example, with the package's trained pair on a machine without a GPU:
  SGLANG_PLATFORM=sts_cpu python benchmarks/bench_multi_turn.py --agents 4 --turns 4 \\
      --server-args "--device cpu --dtype float32 --max-total-tokens 200000" --out multi_turn.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import sysconfig
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sts_sglang.demo import shipped_pair
from sts_sglang.local_server import LocalServer

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


def ask(server: LocalServer, messages: list[dict], max_tokens: int) -> dict:
    """One streamed chat completion: answer, seconds to the first token, seconds per further token, usage."""
    body = {"model": "x", "messages": messages, "temperature": 0, "max_tokens": max_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    started, first, text, usage = time.monotonic(), None, "", {}
    with urllib.request.urlopen(request, timeout=3600) as stream:
        for line in stream:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                first = first or time.monotonic()
                text += piece
    ended, tokens = time.monotonic(), usage["completion_tokens"]
    first = first or ended
    return {
        "answer": text,
        "ttft_s": first - started,
        "tpot_s": (ended - first) / max(1, tokens - 1),
        "tokens": tokens,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
    }


def run_turn(server: LocalServer, agents: list[Agent], turn: int, options, rng: random.Random) -> dict:
    """All agents read, then all ask at once; answers join their histories."""
    questions = []
    for agent in agents:
        question, value = rng.choice(agent.facts[: max(2, 2 * turn - 2)])
        agent.messages.append({"role": "user", "content": question})
        questions.append(value)
    before, started = _counters(server), time.monotonic()
    with ThreadPoolExecutor(len(agents)) as pool:
        replies = list(pool.map(lambda a: ask(server, a.messages, options.max_tokens), agents))
    seconds = time.monotonic() - started
    for agent, reply in zip(agents, replies, strict=True):
        agent.messages.append({"role": "assistant", "content": reply["answer"]})
    after = _counters(server)
    row = {
        "turn": turn,
        "accuracy": statistics.mean(v in r["answer"] for v, r in zip(questions, replies, strict=True)),
        "tokens_per_s": sum(r["tokens"] for r in replies) / seconds,
        **{
            k: statistics.median(r[k] for r in replies)
            for k in ("ttft_s", "tpot_s", "prompt_tokens", "cached_tokens")
        },
    }
    if before:
        delta = {k: after[k] - before[k] for k in after}
        if not delta["sparse_verifies"] or delta["dense_verifies"]:
            raise SystemExit(f"this turn was not verified sparsely: {delta}; nothing is reported")
        row["accept_length"] = sum(r["tokens"] - 1 for r in replies) / delta["sparse_verifies"]
        row["keep_ratio"] = delta["selected_tokens"] / delta["available_tokens"]
    return row


def _counters(server: LocalServer) -> dict | None:
    state = json.loads(server.get("/server_info"))["internal_states"][0]
    return state["sts"]["counters"] if "sts" in state else None


def run_arm(arm: str, options: argparse.Namespace) -> list[dict]:
    """All turns of all agents on one server; every arm sees the same conversations up to its own answers."""
    rng, library = random.Random(options.seed), library_source()
    system = "You read tool outputs and answer questions about them.\n" + "\n".join(
        library[: options.shared_lines]
    )
    agents = [Agent([{"role": "system", "content": system}]) for _ in range(options.agents)]
    pair = shipped_pair()
    args = ["--enable-cache-report", "--skip-server-warmup", *shlex.split(options.server_args)]
    if arm != "stock":
        args += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(pair.draft)]
    if arm in HISTORY:
        config = {**json.loads(options.sts_config), "history": HISTORY[arm]}
        args += ["--attention-backend", "sts", "--sts-config", json.dumps(config)]
    rows = []
    with LocalServer(pair.target, options.logs / f"{arm}.log", *args, start_seconds=600) as server:
        for turn in range(1, options.turns + 1):
            if turn == 2:  # branches: the second half goes on from the first half's histories
                half = len(agents) // 2
                for i in range(half):
                    agents[half + i] = Agent(list(agents[i].messages), list(agents[i].facts))
            for agent in agents:
                agent.read(library, options.lines, rng)
            row = {"arm": arm, "agents": options.agents, **run_turn(server, agents, turn, options, rng)}
            print(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )
            rows.append({**row, "server": server.shown_command()})
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--agents", type=int, default=8, help="conversations at a time (%(default)s)")
    p.add_argument("--turns", type=int, default=5, help="(%(default)s)")
    p.add_argument("--shared-lines", type=int, default=150, help="lines of the system prompt (%(default)s)")
    p.add_argument("--lines", type=int, default=120, help="lines of a tool output (%(default)s)")
    p.add_argument("--max-tokens", type=int, default=32, help="length of an answer (%(default)s)")
    p.add_argument("--arms", default=",".join(ARMS), help="comma separated (%(default)s)")
    p.add_argument("--sts-config", default='{"keep": 0.1, "budget": 0}', help="inline JSON (%(default)s)")
    p.add_argument("--server-args", default="", help="arguments common to all servers, one string")
    p.add_argument("--seed", type=int, default=0, help="of the conversations (%(default)s)")
    p.add_argument("--logs", type=Path, default=Path("."), help="folder of the server logs (%(default)s)")
    p.add_argument("--out", type=Path, help="append raw results to this JSONL file")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    commit = os.environ.get("STS_COMMIT", "unknown")
    for arm in options.arms.split(","):
        rows = run_arm(arm, options)
        if options.out:
            with options.out.open("a") as f:
                f.writelines(
                    json.dumps({**row, "commit": commit, "seed": options.seed}) + "\n" for row in rows
                )


if __name__ == "__main__":
    main()
