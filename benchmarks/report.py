"""Write what was measured into README.md and benchmarks/REPORT.md, and draw the plot anew.

    python -m benchmarks.report            REPORT.md from report_template.md, the README between its
                                           <!-- marks -->, and the plot
    python -m benchmarks.report --check    change nothing; exit 1 and name what the results do not give

Every table, and every number that a sentence takes from one, comes from benchmarks/results and from nothing
else (tables.py, facts.py). The reports and plots of quality are made by benchmarks.quality.report; here they
are only checked to be of the result files beside them.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import facts, pictures, tables
from benchmarks.quality.report import folder_digest
from benchmarks.tables import answers, eagle3, kernels, load, recall, restructuring, serving, shared, variants

HERE = Path(__file__).parent
README, REPORT, TEMPLATE = HERE.parent / "README.md", HERE / "REPORT.md", HERE / "report_template.md"
TABLES: dict[str, Callable[[], str]] = {
    "serving": serving.serving,
    "eagle3": eagle3.eagle3,
    "two-gpus": eagle3.two_gpus,
    "fp8-kv": eagle3.fp8_kv,
    "heads": kernels.heads,
    "verify-h200": kernels.verify_h200,
    "draft-h200": kernels.draft_h200,
    "sparse-drafts": answers.sparse_drafts,
    "load": load.load,
    "alone": serving.alone,
    "round": kernels.round_time,
    "step": kernels.step_time,
    "verify": kernels.verify,
    "ops": kernels.round_ops,
    "importance": kernels.importance_cost,
    "quality": answers.quality,
    "quality-eagle3": answers.eagle3,
    "quality-pretrained": answers.pretrained,
    "variants": variants.compared,
    "quality-tokens": answers.tokens,
    "quality-alone": answers.alone,
    "quality-pretrained-tokens": answers.pretrained_tokens,
    "pages": kernels.pages,
    "tokens": kernels.tokens,
    "prefill": kernels.prefill,
    "first-token": kernels.first_token,
    "quality-prefill": answers.prefill,
    "multi-turn": answers.multi_turn,
    "history": recall.history,
    "calibration": recall.calibration,
    "ways": recall.ways,
    "restructuring": restructuring.restructuring,
    "shared-prefix": shared.shared_prefix,
    "soak": shared.soak,
}
ANSWERS = """\
- At `keep` 0.1 answers over {lengths} tokens differ from the same server's dense verify by
  {answers_10} points of {dense} (95 % intervals, {items} items a task), where
  the latest tokens alone cost {recent_10}. The loss on held-out text of {texts} tokens
  changes by {text_10}.
- That is the shipped pair, **which was trained to attend to few tokens**, with its STANDALONE draft,
  dense; the default's sparse one changes those over 4,096 and 16,384 by {sparse_answers_sts-draft_10} \
points against it. A rival
  answers as well (Quest: {quest_10} points). Its EAGLE-3 head's choice alone changes answers by {e3t_sts_10}
  points at 4,096 tokens (in another run {eagle3_sts_10}); [`"selector": "tokens"`](docs/method.md#tokens), \
where the target's \
own queries score short forms of all keys, by {e3t_tokens_10}.
- **On a model that nobody here trained, token scores hold at a tenth, and a draft's choice does not.**
  Text of {smol_texts} tokens loses, by SmolLM2-135M alone, {smol_text_tokens_10} %,
  with an EAGLE-3 head {smol_e3_text_tokens_10} %; by that head's own choice and a calibrated
  map {smol_e3_text_map_10} %, and {smol_e3_answers_map_10} points of answers \
over the first two. [Measure yours](docs/evaluate.md) first."""


def report() -> str:
    """REPORT.md: the template with its {{names}} replaced."""
    found = {**{name: make() for name, make in TABLES.items()}, **facts.facts()}
    template = TEMPLATE.read_text()
    if unknown := set(re.findall(r"{{([\w-]+)}}", template)) - set(found):
        raise SystemExit(f"{TEMPLATE.name}: nothing is measured under {', '.join(sorted(unknown))}")
    if absent := [name for name in TABLES if f"{{{{{name}}}}}" not in template]:
        raise SystemExit(f"{TEMPLATE.name}: does not show {', '.join(absent)}")
    return re.sub(r"{{([\w-]+)}}", lambda name: found[name[1]], template)


def readme(text: str) -> str:
    """The README with every marked section made anew."""
    sections = {"speed": eagle3.front, "answers": lambda: ANSWERS.format(**facts.facts())}
    for name, make in sections.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"README.md: needs {begin.strip()} and {end} once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{make()}\n{end}{rest.partition(end)[2]}"
    return text


def break_even() -> dict[str, list[tuple[int, float]]]:
    """By "arm requests stock", the (context, gain) of what the README shows in its plot, of the card that
    more shapes were measured on."""
    of_gpus = tables.by_gpu(serving.drafted()).values()
    found = max(of_gpus, key=lambda own: len(tables.shapes_of(own)), default=[])
    lines: dict[str, list[tuple[int, float]]] = {}
    for arm in ("sts", "sts-draft"):
        for shape in tables.shapes_of(found):
            for over in ("stock-spec", "stock-spec-captured"):
                if own := serving.gain(found, arm, shape, over):
                    lines.setdefault(f"{arm} {shape[1]} {over}", []).append((shape[0], round(own, 4)))
    return {name: sorted(line) for name, line in lines.items()}


def plot_break_even(path: Path) -> None:
    """Gain of sts over stock with the same draft, by context: below 1 stock is faster."""
    lines = break_even()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="tight")
    axis = figure.subplots()
    colours = {key: f"C{i}" for i, key in enumerate(dict.fromkeys(tuple(n.split()[:2]) for n in lines))}
    for name, line in lines.items():
        arm, requests, over = name.split()
        captured, colour = over == "stock-spec-captured", colours[arm, requests]
        named = "sts" if arm == "sts" else 'sts, "draft": "all"'
        label = f"{named}, {requests} request" + "s" * (requests != "1") if captured else None
        style = {"ls": "-", "marker": "o"} if captured else {"ls": ":", "marker": ".", "alpha": 0.6}
        axis.plot(*zip(*line, strict=True), color=colour, label=label, **style)
    axis.axhline(1, color="k", lw=0.8)
    axis.set(xscale="log", xlabel="context (tokens)", ylabel="tokens/s over stock FA3 + STANDALONE")
    contexts = sorted({context for line in lines.values() for context, _ in line})
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.minorticks_off()
    axis.set_title(
        "solid: over stock with its draft-extend captured; dotted: over stock as shipped", fontsize=9
    )
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # room for the legend
    axis.legend(fontsize=8, loc="upper center", ncols=2)
    pictures.save(figure, path, pictures.digest(lines), dpi=80)


def stale() -> list[str]:
    """Files that are not what the results give."""
    plot = tables.RESULTS / "break_even.png"
    found = {
        README: readme(README.read_text()) != README.read_text(),
        REPORT: not REPORT.exists() or report() != REPORT.read_text(),
        plot: pictures.source_of(plot) != pictures.digest(break_even()),
    }
    for text in sorted(tables.RESULTS.glob("quality*/**/report.md")):
        source, picture = folder_digest(text.parent), text.with_name("pareto.png")
        found[text] = source not in text.read_text()
        if picture.name in text.read_text():
            found[picture] = pictures.source_of(picture) != source
    return [os.path.relpath(path, HERE.parent) for path, is_stale in found.items() if is_stale]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is stale")
    if not parser.parse_args().check:
        README.write_text(readme(README.read_text()))
        REPORT.write_text(report())
        plot_break_even(tables.RESULTS / "break_even.png")
    if names := stale():
        remedy = (
            "python -m benchmarks.report, and python -m benchmarks.quality.report FOLDER for those of quality"
        )
        raise SystemExit(f"not what the results give: {', '.join(names)}; run {remedy}")


if __name__ == "__main__":
    main()
