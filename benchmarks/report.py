"""Write the README's measured tables and plots anew from benchmarks/results/*.jsonl, and nothing else.

    python -m benchmarks.report            rewrite README.md between its <!-- name --> marks, and the plots
    python -m benchmarks.report --check    exit 1 if that would change README.md

Medians over repeats and passes, and half their spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.quality.report import DENSE, Results, percent, points, signed, table

RESULTS, README = Path(__file__).with_name("results"), Path(__file__).parents[1] / "README.md"
ARMS = {
    "stock": "stock FA3, no speculation",
    "stock-spec": "stock FA3 + STANDALONE",
    "stock-spec-captured": "the same, draft-extend captured",
    "sts-dense": "sts, verify dense",
    "sts": "sts, `keep` 0.1",
    "sts-draft": "sts, draft sparse too",
}
QUALITY = {
    "sts": "sts",
    "sts-proportional": "sts without a calibrated map",
    "sts-warm": "sts, history `warm`",
    "sts-blend": "sts, history `blend`",
    "sts-draft": "sts, draft sparse too",
    "sts-draft-blend": "sts, draft sparse too, history `blend`",
    "sts-full4": "sts, every 4th verify full",
    "oracle": "oracle",
    "quest": "Quest",
    "recent": "sink + recent",
    "random": "chance",
}


def rows(name: str) -> list[dict]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timings(op: str) -> list[dict]:
    """Of a kernel as it is shipped, without those of searching for its knobs."""
    return [r for r in rows(f"{op}.jsonl") if "knobs" not in r]


def commits(found: Iterable[dict]) -> str:
    return ", ".join(dict.fromkeys(r["commit"] for r in found))


def shapes_of(found: list[dict]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((r["context"], r["requests"]) for r in found))


def speeds(found: list[dict], shape: tuple[int, int], *arms: str) -> list[list[float]]:
    """Tokens per second of each arm, of the newest run (commit) that has all of them; else empty lists."""
    for run in reversed(dict.fromkeys(r["commit"] for r in found)):
        mine = [r for r in found if (r["commit"], r["context"], r["requests"]) == (run, *shape)]
        own = [[r["tokens_per_s"] for r in mine if r["arm"] == arm] for arm in arms]
        if all(own):
            return own
    return [[] for _ in arms]


def serving() -> str:
    """Tokens per second by arm; the gain of sts over stock with the same draft."""
    found = rows("serving.jsonl")
    if not found:
        return "Not measured yet."
    lines = []
    for shape in shapes_of(found):
        own = [speeds(found, shape, arm)[0] for arm in ARMS]
        cells = [f"{statistics.median(s):,.0f} ± {(max(s) - min(s)) / 2:,.0f}" if s else "–" for s in own]
        kept = {r["keep_ratio"] for r in found if (r["arm"], r["context"], r["requests"]) == ("sts", *shape)}
        cells += [f"{100 * max(kept):.0f} %" if kept else "–"]
        cells += [gains(found, arm, shape) for arm in ("sts", "sts-draft")]
        lines.append([f"{shape[0]:,} x {shape[1]}", *cells])
    first = found[0]
    note = (
        f"Tokens per second, median ± half the spread. {first['gpu']}, SGLang {first['sglang']}, commit "
        f"{commits(found)}; shapes of Llama-3.1-8B and 3.2-1B, dummy weights, simulated accept length "
        f"{first['simulated']:g} (the output is meaningless, the work is not), prefix cached. Kept is what "
        f"verify attends to, never less than `budget`, 1,024 tokens. Gains are over stock FA3 + STANDALONE, "
        f"in brackets over the same with its draft-extend captured."
    )
    for arm, name in (("sts", "sts"), ("sts-draft", "the sparse draft")):
        costs = {s: g for s in shapes_of(found) if (g := gain(found, f"{arm}-blend", s, arm))}
        if costs:
            shown = ", ".join(f"{g:.3f}x at {n:,} x {r}" for (n, r), g in costs.items())
            note += f" History in every verify (`blend`) makes {name} {shown}."
    return (
        table(["context x requests", *ARMS.values(), "kept", "gain", "gain, draft too"], lines)
        + "\n\n"
        + note
    )


def gain(found: list[dict], arm: str, shape: tuple[int, int], over: str) -> float | None:
    """Over another arm of the same run; None where no run has both."""
    own, stock = speeds(found, shape, arm, over)
    return statistics.median(own) / statistics.median(stock) if own and stock else None


def gains(found: list[dict], arm: str, shape: tuple[int, int]) -> str:
    """Over stock as it is, and over stock with its draft-extend captured."""
    stock, captured = (gain(found, arm, shape, over) for over in ("stock-spec", "stock-spec-captured"))
    return (f"{stock:.2f}x" if stock else "–") + (f" ({captured:.2f}x)" if captured else "")


def verify() -> str:
    """Microseconds of one layer's verify attention by provider, the README's shapes, and the whole grid."""
    found = timings("verify")
    newest = {
        (r["provider"], *(r[k] for k in ("dim", "rows", "group", "context", "batch")), r.get("keep")): r
        for r in found
    }
    shapes = sorted({key[1:6] for key in newest if key[0] == "triton"}, reverse=True)
    lines = [verify_line(newest, shape) for shape in shapes if shape[:3] == (128, 4, 4)]
    if not lines:
        return "Not measured yet."
    head = ["context x requests", "sts (Triton)", "FlashInfer head-wise", "FA3 dense", "FlashInfer dense"]
    head += ["over FA3 dense", "at 5 %", "at 25 %", "of copy rate"]
    last = found[-1]
    note = (
        f"Microseconds of one layer (4 query tokens, 32 query and 8 KV heads of 128, keep 10 %, bf16). "
        f"{last['gpu']}, commit {commits(newest.values())}; the last "
        f"column is the selected KV over the measured copy rate ({last['copy_gbps']:,} GB/s)."
    )
    return table(head, lines) + "\n\n" + note + verify_grid(newest)


def verify_line(newest: dict[tuple, dict], shape: tuple) -> list[str]:
    def us(provider: str, keep: float | None) -> float | None:
        return newest.get((provider, *shape, keep), {}).get("us")

    own = {keep: us("triton", keep) for keep in (0.05, 0.1, 0.25)}
    dense = us("fa3-dense", None)
    shown = [own[0.1], us("fi-headwise", 0.1), dense, us("fi-dense", None)]
    gains = [f"{dense / own[k]:.1f}x" if dense and own[k] else "–" for k in (0.1, 0.05, 0.25)]
    rate = newest.get(("triton", *shape, 0.1), {}).get("of_copy_rate")
    cells = [f"{x:.0f}" if x else "–" for x in shown]
    return [f"{shape[3]:,} x {shape[4]}", *cells, *gains, f"{100 * rate:.0f} %" if rate else "–"]


def verify_grid(newest: dict[tuple, dict]) -> str:
    """How sts compares over all shapes that were measured."""
    over: dict[str, list[tuple[float, tuple]]] = {"fa3-dense": [], "fi-headwise": []}
    for (provider, *shape, keep), row in newest.items():
        for rival in over if provider == "triton" else ():
            if other := newest.get((rival, *shape, None if "dense" in rival else keep)):
                over[rival].append((other["us"] / row["us"], tuple(shape)))
    dense, headwise = (sorted(found) for found in over.values())
    if not dense or not headwise:
        return ""
    slower = [shape for gain, shape in headwise if gain < 1]
    where = ", ".join(f"{c:,} x {b}" for c, b in sorted({shape[3:] for shape in slower}))
    return (
        f" Over the whole grid of {len(dense)} shapes (8K to 128K x 1 to 16, 1 to 8 query tokens, GQA 4 and "
        f"8, heads of 64 and 128, keep 5 to 25 %) sts is {dense[0][0]:.1f}x to {dense[-1][0]:.1f}x FA3 dense "
        f"and {headwise[0][0]:.2f}x to {headwise[-1][0]:.2f}x FlashInfer head-wise, slower than it in "
        f"{len(slower)} shapes ({where})."
    )


OPS = {
    "FA3": ("draft_attention", "fa3-dense", 0),
    "sts, no importance": ("draft_attention", "triton", 0),
    "first step": ("draft_attention", "triton+importance", 0),
    "later step": ("draft_attention", "triton+importance", 1),
    "selection": ("select", "triton", None),
    "sizes": ("select", "sizes", None),
    "spread": ("select", "spread", None),
    "memory": ("remember", "warm", None),
    "half shared": ("remember", "warm-shared", None),
    "memory, mixed in": ("remember", "blend", None),
    "mixed, half shared": ("remember", "blend-shared", None),
}


def round_ops() -> str:
    """Microseconds of what sts adds to a round: of a draft layer's step, and once a round."""
    newest = {}
    for name in dict.fromkeys(name for name, *_ in OPS.values()):
        for r in timings(name):
            if (r.get("dim", 64), r.get("group", 4), r.get("keep", 0.1)) == (64, 4, 0.1):
                newest[(name, r["provider"], r.get("step"), r["context"], r["batch"])] = r
    shapes = sorted({key[3:] for key in newest if key[0] == "select"})
    shown = {title: op for title, op in OPS.items() if any(key[:3] == op for key in newest)}
    lines = []
    for shape in shapes:
        found = [newest.get((*op, *shape), {}).get("us") for op in shown.values()]
        cells = ["–" if us is None else f"{max(us, 0):.0f}" for us in found]
        lines.append([f"{shape[0]:,} x {shape[1]}", *cells])
    if not lines:
        return "Not measured yet."
    last = next(reversed(newest.values()))
    note = (
        f"Microseconds. The first four columns: dense attention of one step of one draft layer (32 query and "
        f"8 KV heads of 64); the first step of a round scores the carried row too. The others: once a round, "
        f"128 channels, keep 10 %. {last['gpu']}, commit {commits(newest.values())}."
    )
    return table(["context x requests", *shown], lines) + "\n\n" + note


def multi_turn() -> str:
    """Answers, speculation and speed of agents by turn."""
    found = rows("multi_turn.jsonl")
    if not found:
        return "Not measured yet."
    turns = sorted({r["turn"] for r in found})
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in found):
        mine = [r for r in found if r["arm"] == arm]
        right = [sum(r["right"] for r in mine if r["turn"] == turn) for turn in turns]
        asked = [sum(r["agents"] for r in mine if r["turn"] == turn) for turn in turns]
        rate = [f"{100 * n / of:.1f}" for n, of in zip(right, asked, strict=True)]
        later = [r for r in mine if r["turn"] > 1]
        speculated = [r["accept_length"] for r in later if "accept_length" in r]
        speed = [statistics.median(r[key] for r in later) for key in ("ttft_s", "tpot_s", "tokens_per_s")]
        accept = f"{statistics.mean(speculated):.3f}" if speculated else "–"
        ttft, tpot, rate_s = speed
        lines.append(
            [f"`{arm}`", *rate, accept, f"{1000 * ttft:.0f}", f"{1000 * tpot:.1f}", f"{rate_s:,.0f}"]
        )
    first = found[0]
    tokens = [round(statistics.median(r["prompt_tokens"] for r in found if r["turn"] == t)) for t in turns]
    head = ["server", *(f"turn {t}, {n:,} tokens" for t, n in zip(turns, tokens, strict=True))]
    note = (
        f"Right answers of {first['agents']} agents by turn, percent; accept length, time to the first token "
        f"and per token (ms) and tokens/s of turns 2 to {turns[-1]}, medians over turns. {first['device']}, "
        f"commit {first['commit']}, the shipped pair, keep 10 %."
    )
    return table([*head, "accept length", "TTFT", "TPOT", "tokens/s"], lines) + "\n\n" + note


def quality() -> str:
    """What each selector and budget changes against dense, by context: answers, and the loss of text."""
    folder = RESULTS / "quality"
    if not folder.exists():
        return "Not measured yet."
    found = Results(folder)
    keeps = [keep for keep in found.keeps if keep <= 0.25]
    parts = []
    for length in found.lengths():
        dense = points(found.mean("sts", DENSE, length))
        head = [f"{length:,} tokens (dense: {dense})", *map(percent, keeps)]
        lines = changes(found, found.difference, length, keeps, digits=1)
        parts.append(table(head, [[QUALITY[arm] + found.part(arm, length), *cells] for arm, *cells in lines]))
    losses = [
        [f"{QUALITY[arm]}, {length:,}", *cells]
        for length in found.lengths(loss=True)
        for arm, *cells in changes(found, found.loss_change, length, keeps, digits=2)
    ]
    parts.append(table(["loss of text, tokens", *map(percent, keeps)], losses))
    head = next(iter(found.headers.values()))
    commits = ", ".join(sorted({h["commit"] for h in found.headers.values()}))
    parts.append(
        f"Points of accuracy, mean over tasks, and percent of the loss, against the same server's dense "
        f"verify, 95 % intervals; bold excludes 0. {head['device']}, {head['items']} items a task, commit "
        f"{commits}, the shipped pair."
    )
    return "\n\n".join(parts)


def changes(
    found: Results, change: Callable, length: int, keeps: list[float], digits: int
) -> list[list[str]]:
    """[arm, a cell a keep] against dense, of the arms that are shown and were asked."""
    over = {arm: [change((arm, k), (arm, DENSE), length) for k in keeps] for arm in QUALITY}
    return [[arm, *(signed(f, digits=digits) for f in own)] for arm, own in over.items() if any(own)]


SECTIONS: dict[str, Callable[[], str]] = {
    "serving": serving,
    "verify": verify,
    "ops": round_ops,
    "quality": quality,
    "multi-turn": multi_turn,
}


def plot_break_even() -> None:
    """Gain of sts over stock with the same draft, by context: below 1 stock is faster."""
    found = rows("serving.jsonl")
    lines: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for arm in ("sts", "sts-draft"):
        for shape in shapes_of(found):
            for over in ("stock-spec", "stock-spec-captured"):
                if own := gain(found, arm, shape, over):
                    lines.setdefault((arm, shape[1], over), []).append((shape[0], own))
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    colours = {key: f"C{i}" for i, key in enumerate(dict.fromkeys(key[:2] for key in lines))}
    for (arm, requests, over), gained in lines.items():
        captured = over == "stock-spec-captured"
        label = None if captured else f"{ARMS[arm]}, {requests} request" + "s" * (requests > 1)
        line = zip(*sorted(gained), strict=True)
        axis.plot(*line, marker="o", ls="--" if captured else "-", color=colours[arm, requests], label=label)
    axis.axhline(1, color="k", lw=0.8)
    axis.set(xscale="log", xlabel="context (tokens)", ylabel="tokens/s over stock FA3 + STANDALONE")
    axis.set_title("dashed: over the same with its draft-extend captured", fontsize=9)
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # room for the legend
    axis.legend(fontsize=8, loc="upper center", ncols=2)
    figure.tight_layout()
    figure.savefig(RESULTS / "break_even.png", dpi=80)
    plt.close(figure)


def rewritten(text: str) -> str:
    """The README with every marked section made anew."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"README.md: needs {begin.strip()} and {end} once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{make()}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is stale")
    args = parser.parse_args()
    text = README.read_text()
    new = rewritten(text)
    if args.check:
        raise SystemExit("README.md is stale: run python -m benchmarks.report" if new != text else 0)
    README.write_text(new)
    plot_break_even()


if __name__ == "__main__":
    main()
