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

RESULTS, README = Path(__file__).with_name("results"), Path(__file__).parents[1] / "README.md"
ARMS = {
    "stock": "stock FA3, no speculation",
    "stock-spec": "stock FA3 + STANDALONE",
    "stock-spec-captured": "the same, draft-extend captured",
    "sts-dense": "sts, verify dense",
    "sts": "sts, `keep` 0.1",
    "sts-draft": "sts, draft sparse too",
}


def rows(name: str) -> list[dict]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


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
    first, runs = found[0], dict.fromkeys(r["commit"] for r in found)
    note = (
        f"Tokens per second, median ± half the spread. {first['gpu']}, SGLang {first['sglang']}, commit "
        f"{', '.join(runs)}; shapes of Llama-3.1-8B and 3.2-1B, dummy weights, simulated accept length "
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
    """Microseconds of one layer's verify attention by provider, the README's shapes."""
    found = [
        r
        for r in rows("verify.jsonl")
        if (r.get("keep", 0.1), r["rows"], r["group"], r["dim"]) == (0.1, 4, 4, 128) and "knobs" not in r
    ]
    if not found:
        return "Not measured yet."
    providers = ["triton", "fi-headwise", "fa3-dense", "fi-dense"]
    newest = {(r["provider"], r["context"], r["batch"]): r for r in found}
    lines = []
    for context, batch in sorted({(r["context"], r["batch"]) for r in found}, reverse=True):
        cells = [newest.get((p, context, batch)) for p in providers]
        own, fa3 = cells[0], cells[2]
        gain = f"{fa3['us'] / own['us']:.1f}x" if own and fa3 else "–"
        share = f"{100 * own['of_copy_rate']:.0f} %" if own else "–"
        lines.append(
            [f"{context:,} x {batch}", *(f"{c['us']:.0f}" if c else "–" for c in cells), gain, share]
        )
    last = found[-1]
    head = ["context x requests", "sts (Triton)", "FlashInfer head-wise", "FA3 dense", "FlashInfer dense"]
    note = (
        f"Microseconds of one layer (4 query tokens, 32 query and 8 KV heads of 128, keep 10 %, bf16). "
        f"{last['gpu']}, commit {last['commit']}; the last column is the selected KV over the measured copy "
        f"rate ({last['copy_gbps']:,} GB/s)."
    )
    return table([*head, "over FA3 dense", "of copy rate"], lines) + "\n\n" + note


SECTIONS: dict[str, Callable[[], str]] = {"serving": serving, "verify": verify}


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
    for (arm, requests, over), points in lines.items():
        captured = over == "stock-spec-captured"
        label = None if captured else f"{ARMS[arm]}, {requests} request" + "s" * (requests > 1)
        line = zip(*sorted(points), strict=True)
        axis.plot(*line, marker="o", ls="--" if captured else "-", color=colours[arm, requests], label=label)
    axis.axhline(1, color="k", lw=0.8)
    axis.set(xscale="log", xlabel="context (tokens)", ylabel="tokens/s over stock FA3 + STANDALONE")
    axis.set_title("dashed: over the same with its draft-extend captured", fontsize=9)
    axis.legend(fontsize=8, loc="upper right")
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
