"""What each way to select costs in loss of text, on a GPU in minutes: also ways that no server has.

    P="env PYTHONPATH=. python benchmarks/models/variants.py --out FILE"
    $P --target .data/smollm2 --draft .data/smollm2-drafts/plain --text .data/smollm2-text/heldout.bin
    $P --target sts_sglang/models/target --draft sts_sglang/models/eagle3 --text sts_sglang/texts/*.txt

Teacher forcing: of every window the last rows are replayed in verifies of four (replay.py), as if all that
was drafted had been accepted, and their loss is compared with that of a dense replay. The budget of a
(verify, layer, KV head) is ceil(keep * context) tokens, sink and recent among them; no floor. Maps and
budgets are fitted to windows of the first part of the text (fit.py), losses are of the rest.

Everything runs in float32, so that a loss of 0.1 % is no rounding; --dtype bfloat16 is what servers have.
FILE gets a row for each (window, variant, keep) as it is found, and with the same settings a run goes on
where the last one stopped. FILE.summary.jsonl has a row for each (variant, keep), over the windows that have
them all: loss in percent of dense, its standard error over windows, the worst window. plots.py draws it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import fit as fits
import model
import numpy as np
import torch
from fit import PARTS, Fit, Map, contribution, importance, split
from pretrained import windows
from replay import Look, Pair, Rows, Window, dense, load_pair, sparse
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import commit
from sts_kernels.layout import PAGE
from sts_sglang import headmap
from sts_sglang.headmap import HeadMap

EIGHTH = "reads an eighth of the keys (mean and deviation of pages) in every layer, before its attention"
FIRST = 1e30  # above every score, below what sink and recent have


# ---- scores of fresh queries: Look -> float32 [H, V, L]


def oracle(at: Look) -> Tensor:
    """The target's own attention."""
    return at.full.amax((1, 3))


def oracle_contribution(at: Look) -> Tensor:
    """What dropping each token alone would change of the output."""
    return contribution(at).amax((1, 3))


def recent(at: Look) -> Tensor:
    return at.rows.place.float().expand(at.full.shape[0], at.rows.verifies, -1)


def random(at: Look) -> Tensor:
    """As the server has it: the same tokens in every verify."""
    generator = torch.Generator(at.q.device).manual_seed(1000 * at.window + at.layer)
    drawn = torch.rand(at.keys.shape[1], 1, at.rows.length, generator=generator, device=at.q.device)
    return drawn.expand(-1, at.rows.verifies, -1)


def quest_logits(q: Tensor, pages: Tensor) -> Tensor:
    """Queries [H, G, V, T, D] and keys [pages, PAGE, H, D]: the bound of q.k over a page."""
    found = torch.einsum("hgvtd,phd->hgvtp", q.clamp(min=0), pages.amax(1))
    return found + torch.einsum("hgvtd,phd->hgvtp", q.clamp(max=0), pages.amin(1))


def moments_logits(q: Tensor, pages: Tensor) -> Tensor:
    """The same: q . mean + |q| . deviation."""
    found = torch.einsum("hgvtd,phd->hgvtp", q, pages.mean(1))
    return found + torch.einsum("hgvtd,phd->hgvtp", q.abs(), pages.std(1, correction=0))


def page_scores(at: Look, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """float32 [H, V, pages] of the whole pages of each context: a softmax over them, pooled by maximum."""
    number = at.rows.length // PAGE
    found = logits(at.q, at.keys[: number * PAGE].unflatten(0, (-1, PAGE))) * at.q.shape[-1] ** -0.5
    there = (torch.arange(1, number + 1, device=found.device) * PAGE) <= at.rows.lengths[:, None]
    return found.masked_fill(~there[:, None], -torch.inf).log_softmax(-1).amax((1, 3))


def by_page(logits: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Look], Tensor]:
    """Whole pages from the top; of the last of them the later tokens. What is in no whole page is recent."""

    def scores(at: Look) -> Tensor:
        rank = page_scores(at, logits).argsort(-1).argsort(-1) * PAGE
        found = rank[..., None] + torch.arange(PAGE, device=rank.device)
        spare = at.rows.length % PAGE
        return torch.nn.functional.pad(found.flatten(-2).float(), (0, spare), value=-1.0)

    return scores


def join(at: Look, scores: Tensor, counts: Tensor, share: float) -> Tensor:
    """Scores with the tokens of the best pages first. The pages have `share` of what sink and recent leave of
    the counts [H, V]; pages of nothing but those are not among them."""
    found = page_scores(at, moments_logits)
    number, rows = found.shape[-1], at.rows
    has_far = rows.far[:, : number * PAGE].unflatten(1, (-1, PAGE)).any(-1)
    found = found.masked_fill(~has_far, -torch.inf)
    wanted = (share * (counts - rows.least) / PAGE).long().minimum(has_far.sum(-1))
    rank = found.argsort(-1, descending=True).argsort(-1)
    chosen = (rank < wanted[..., None]).repeat_interleave(PAGE, -1)
    chosen = torch.nn.functional.pad(chosen, (0, rows.length - number * PAGE))
    return scores.masked_fill(chosen, FIRST)


# ---- budgets: (fit, rows, importance, keep) -> int64 [layers, H, V], None where it cannot be


def uniform(fit: Fit, rows: Rows, scores: Tensor | None, keep: float) -> Tensor | None:
    return rows.counts(torch.full((fit.layers, fit.kv_heads), keep, dtype=torch.float64))


def by_head(measure: str) -> Callable:
    """What the layers' heads have at the same total, so that the measured loss is least."""
    which = fits.MEASURES.index(measure)

    def counts(fit: Fit, rows: Rows, scores: Tensor | None, keep: float) -> Tensor | None:
        return rows.counts(split(fit.by_part[which], keep, rows.least / rows.length))

    return counts


def by_map(head_map: HeadMap) -> Callable:
    """As a served map splits it."""

    def counts(fit: Fit, rows: Rows, scores: Tensor | None, keep: float) -> Tensor | None:
        parts = torch.full((fit.layers, fit.kv_heads), keep, dtype=torch.float64)
        if head_map.shares is not None:
            steps = torch.tensor(head_map.split(), dtype=torch.float64)
            low = min(int(keep * (len(steps) - 1)), len(steps) - 2)
            own = torch.lerp(steps[low], steps[low + 1], keep * (len(steps) - 1) - low)
            parts = own[torch.tensor([head_map.head_channels(layer) for layer in range(fit.layers)])]
        parts[list(head_map.dense_layers)] = 1.0
        return rows.counts(parts)

    return counts


def dense_layers(number: int, extra: bool) -> Callable:
    """The layers that lose most attend to everything; if not `extra`, the others keep less for it."""

    def counts(fit: Fit, rows: Rows, scores: Tensor | None, keep: float) -> Tensor | None:
        rest = keep if extra else (keep * fit.layers - number) / (fit.layers - number)
        if rest * rows.length < rows.least:
            return None
        part = min(range(len(PARTS)), key=lambda i: abs(math.log(PARTS[i] / keep)))
        worst = fit.by_part[fits.MEASURES.index("output"), ..., part].sum(-1).topk(number).indices
        parts = torch.full((fit.layers, fit.kv_heads), rest, dtype=torch.float64)
        parts[worst.cpu()] = 1.0
        return rows.counts(parts)

    return counts


def as_large(sizes: Callable[[float], Tensor], most: float, rows: Rows, keep: float) -> Tensor:
    """The least of the sizes [layers, H, V], which rise from 0 to `most`, that are `keep` in the mean."""
    low, high = 0.0, most
    for _ in range(24):
        middle = (low + high) / 2
        enough = (sizes(middle) / rows.lengths).mean() >= keep
        low, high = (low, middle) if enough else (middle, high)
    return sizes(high)


def by_spread(fit: Fit, rows: Rows, scores: Tensor, keep: float) -> Tensor:
    """Half of the budget to every head, half by how many tokens its importance is spread over in this verify
    (the exponential of its entropy)."""
    p = scores * rows.far
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-20)
    tokens = torch.special.entr(p).sum(-1).exp()  # [layers, H, V]
    wanted = rows.lengths * (0.5 + 0.5 * tokens / tokens.mean((0, 1)))

    def sizes(factor: float) -> Tensor:
        return (factor * wanted).ceil().long().clamp(min=rows.least).minimum(rows.lengths)

    return as_large(sizes, 2.0, rows, keep)


def top_p(fit: Fit, rows: Rows, scores: Tensor, keep: float) -> Tensor:
    """The smallest sets that hold a part of the importance, the part at which they are as large as the budget
    in the mean of this window."""
    mass = scores * rows.context
    total, forced = mass.sum(-1, keepdim=True), (mass * rows.forced).sum(-1, keepdim=True)
    held = (mass * rows.far).sort(-1, descending=True).values.cumsum(-1) + forced

    def sizes(part: float) -> Tensor:
        return ((held < part * total).sum(-1) + 1 + rows.least).minimum(rows.lengths)

    return as_large(sizes, 1.01, rows, keep)  # above 1, since sums are rounded


# ---- the variants


@dataclass(frozen=True)
class Variant:
    """family: of the picture. cost: of a round, in words. Scores are `fresh`, of each layer's own queries, or
    the draft's: those of a map of the fit, as fit.importance pools them with `how`. share: of the budget that
    pages by fresh queries have. budget: of the heads."""

    family: str
    cost: str
    map: Callable[[Fit], Map] | None = None
    how: tuple[tuple[str, object], ...] = ()
    fresh: Callable[[Look], Tensor] | None = None
    share: float = 0.0
    budget: Callable = uniform

    def importance(self, fit: Fit, window: Window) -> Tensor | None:
        return None if self.map is None else importance(window, self.map(fit), **dict(self.how))

    def choose(self, scores: Tensor | None) -> Callable[[Look, Tensor], Tensor]:
        def chosen(at: Look, counts: Tensor) -> Tensor:
            own = self.fresh(at) if scores is None else scores[at.layer]
            if self.share:
                own = join(at, own, counts, self.share)
            return at.rows.select(own, counts)

        return chosen


def default(fit: Fit) -> Map:
    return fit.proportional


def fitted(fit: Fit) -> Map:
    return fit.joined("output")


def variants() -> dict[str, Variant]:
    """By name."""
    none = "none"
    page = EIGHTH + ", and selects layer by layer"
    bounds = page.replace("mean and deviation", "minimum and maximum")
    found = {
        "oracle": Variant("baselines", "reads all keys twice: a bound, no method", fresh=oracle),
        "oracle contribution": Variant(
            "baselines", "reads all keys and values: a bound, no method", fresh=oracle_contribution
        ),
        "quest": Variant("baselines", bounds, fresh=by_page(quest_logits)),
        "pages": Variant("baselines", page, fresh=by_page(moments_logits)),
        "recent": Variant("baselines", none, fresh=recent),
        "random": Variant("baselines", none, fresh=random),
        "draft": Variant("baselines", "the method as served by default", default),
    }
    draft = replace(found["draft"], cost=none)
    for factor, over in ((0.0, 1), (0.7, 1), (0.5, 2), (0.5, 4)):
        how = (("factor", factor), ("over", over))
        found[f"spread {factor:g} over {over}"] = replace(draft, family="rows", how=how)
    for rows, cost in ((1, "less: only the carried row scores"), (2, "less: one draft step scores")):
        found[f"rows {rows}"] = replace(draft, family="rows", cost=cost, how=(("rows", rows),))
    found["rows 4"] = replace(draft, family="rows", cost="one more draft step", how=(("rows", 4),))
    for heads, rows in (("mean", "max"), ("max", "mean"), ("mean", "mean")):
        how = (("heads_pool", heads), ("rows_pool", rows))
        found[f"pool heads {heads} rows {rows}"] = replace(draft, family="rows", how=how)
    return found | mapped(draft)


def served(head_map: HeadMap, pair: Pair) -> dict[str, Variant]:
    """Those of a map file."""
    own = Map.served(head_map, pair.head_counts()[1].q_heads, pair.device)
    how = tuple((f"{of}_pool", head_map.pool or "max") for of in ("heads", "rows"))
    found = Variant("maps", "a calibration", lambda _: own, how, budget=by_map(head_map))
    return {
        "served map": found,
        "joined 0.5 + served map": replace(found, family="joined", cost=EIGHTH, share=0.5),
        "oracle + served map's budgets": replace(found, family="budgets", map=None, fresh=oracle),
    }


def mapped(draft: Variant) -> dict[str, Variant]:
    """Those that the fit decides."""
    found, mean = {}, (("heads_pool", "mean"), ("rows_pool", "mean"))
    single, several = (f"a calibration; {n} to score in the draft" for n in ("fewer heads", "more heads"))
    for measure in fits.MEASURES:
        one = replace(draft, family="maps", cost=single, map=lambda fit, m=measure: fit.single(m))
        found[f"map {measure} 1"] = one
        found[f"map {measure} 4"] = replace(one, cost=several, map=lambda fit, m=measure: fit.joined(m))
    best = replace(draft, family="maps", cost=several, map=Fit.four_singles)
    found["map mass best 4"] = best
    found["map regressed"] = replace(best, map=lambda fit: fit.regressed, how=mean)
    best = replace(draft, cost=several, map=fitted)
    for share in (0.25, 0.5, 0.75):
        joined = replace(draft, family="joined", cost=EIGHTH, share=share)
        found[f"joined {share:g}"] = joined
        found[f"joined {share:g} + map"] = replace(joined, map=fitted)
    for measure in fits.MEASURES:
        own = replace(best, family="budgets", cost="a calibration", budget=by_head(measure))
        found[f"budgets {measure} + map"] = own
        found[f"joined 0.5 + budgets {measure} + map"] = replace(own, cost=EIGHTH, share=0.5)
    for name, logits in (("oracle", oracle), ("pages", by_page(moments_logits))):
        cost = f"as {name}, and a calibration"
        found[f"{name} + budgets output"] = Variant("budgets", cost, fresh=logits, budget=by_head("output"))
    found["budgets output"] = replace(found["budgets output + map"], map=default)
    found["floor by spread + map"] = replace(
        best, family="budgets", cost="a sum over scores before selecting", budget=by_spread
    )
    found["top_p + map"] = replace(best, family="budgets", cost="none; lists differ in length", budget=top_p)
    for number in (1, 2, 3):
        for extra, name in ((False, "same total"), (True, "extra")):
            cost = "a calibration" if not extra else f"{number} layers read all keys"
            found[f"dense {number} {name} + map"] = replace(
                best, family="layers", cost=cost, budget=dense_layers(number, extra)
            )
    return found


# ---- the run


def tokens(files: list[Path], target: Path) -> np.ndarray:
    """Token ids of texts: .bin holds uint16 ids, everything else is encoded by the target's tokenizer."""
    found = []
    for file in files:
        if file.suffix == ".bin":
            found.append(np.fromfile(file, np.uint16).astype(np.int64))
        else:
            tok = Tokenizer.from_file(str(target / "tokenizer.json"))
            text = file.read_text(encoding="utf-8", errors="ignore")
            found.append(np.array(tok.encode(text, add_special_tokens=False).ids, np.int64))
    return np.concatenate(found)


def texts(options: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """Windows [length + 1] to fit to, from the first part of the text, and to measure on, from the rest."""
    stream = tokens(options.text, options.target)
    cut = len(stream) * options.calibration // (options.calibration + options.windows)
    parts = ((stream[:cut], options.calibration), (stream[cut:], options.windows))
    return tuple(
        [torch.tensor(w) for w in windows(part, options.length + 1, number)] for part, number in parts
    )


def settings(options: argparse.Namespace) -> dict:
    """What rows of one file have in common."""
    names = ("length", "rows", "windows", "calibration", "fit_keep", "dtype")
    own = {name: getattr(options, name) for name in names}
    return {"target": options.target.name, "draft": options.draft.stem, **own}


def before(out: Path, header: dict) -> list[dict]:
    """Rows that an earlier run with the same settings left; without one the file is begun."""
    if not out.exists():
        out.write_text(json.dumps(header) + "\n")
        return []
    first, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    if first != header:
        raise SystemExit(f"--out: {out} is of other settings: {first}")
    return rows


def measure(fit: Fit, window: Window, rows: Rows, chosen: dict, keeps: list[float], done: set):
    """A row for each (variant, keep) of a window that is not done."""
    whole = dense(fit.pair, window, rows)
    for name, variant in chosen.items():
        left = [keep for keep in keeps if (window.index, name, keep) not in done]
        scores = variant.importance(fit, window) if left else None
        for keep in left:
            counts = variant.budget(fit, rows, scores, keep)
            if counts is None:
                continue
            found = sparse(fit.pair, window, rows, variant.choose(scores), counts.to(rows.place.device))
            yield {
                "window": window.index,
                "variant": name,
                "family": variant.family,
                "cost": variant.cost,
                "keep": keep,
                "dense": round(whole, 6),
                "loss": round(found.loss, 6),
                "kept": round(found.kept, 4),
                "held": round(found.held, 4),
                "held_by_layer": [round(x, 3) for x in found.held_by_layer],
                "error": [round(x, 4) for x in found.error],
            }


def run(options: argparse.Namespace) -> list[dict]:
    """All rows; those found are written at once. Stops when the next window would not end in time."""
    begin = time.time()
    found = before(options.out, settings(options))
    done = {(r["window"], r["variant"], r["keep"]) for r in found}
    pair = load_pair(options.target, options.draft, options.algorithm, options.device)
    table = variants()
    if options.head_map:
        table |= served(headmap.load(str(options.head_map), *pair.head_counts()), pair)
    chosen = {name: v for name, v in table.items() if any(fnmatch.fnmatch(name, p) for p in options.variants)}
    rows = Rows(options.length, options.rows, options.device)
    to_fit, to_measure = texts(options)
    calibration = [pair.window(-1 - i, ids, rows) for i, ids in enumerate(tqdm(to_fit, desc="calibration"))]
    fit, longest = Fit(pair, calibration, rows, options.fit_keep), 0.0
    bar = tqdm(total=len(to_measure) * len(chosen) * len(options.keep), mininterval=5, desc="replays")
    with options.out.open("a") as file:
        for index, ids in enumerate(to_measure):
            if time.time() - begin + longest > 60 * options.minutes:
                tqdm.write(f"time is up: {index} of {len(to_measure)} windows")
                break
            since = time.time()
            for row in measure(fit, pair.window(index, ids, rows), rows, chosen, options.keep, done):
                found.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                bar.update()
            longest = time.time() - since if index else 0.0  # the first makes the fits as well
    return found


def summary(rows: list[dict]) -> list[dict]:
    """A row for each (variant, keep), over the windows that have them all."""
    cells: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        cells.setdefault((row["variant"], row["keep"]), {})[row["window"]] = row
    common = sorted(set.intersection(*(set(own) for own in cells.values()))) if cells else []
    return [
        {
            **{key: own[common[0]][key] for key in ("variant", "family", "cost", "keep")},
            "windows": len(common),
            **averages([own[i] for i in common]),
        }
        for own in cells.values()
        if common
    ]


def averages(rows: list[dict]) -> dict:
    """Of one variant at one keep: losses in percent of the mean dense loss."""
    dense_loss = statistics.mean(r["dense"] for r in rows)
    losses = [100 * (r["loss"] - r["dense"]) / dense_loss for r in rows]
    held = np.mean([r["held_by_layer"] for r in rows], 0)
    deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return {
        "dense": round(dense_loss, 4),
        "loss": round(statistics.mean(losses), 3),
        "standard_error": round(deviation / math.sqrt(len(losses)), 3),
        "worst": round(max(losses), 3),
        "kept": round(statistics.mean(r["kept"] for r in rows), 4),
        "held": round(statistics.mean(r["held"] for r in rows), 4),
        "held_worst_layer": round(float(held.min()), 4),
        "error": round(float(np.mean([r["error"] for r in rows])), 4),
        "error_by_layer": np.mean([r["error"] for r in rows], 0).round(3).tolist(),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", type=Path, required=True, help="folder")
    add("--draft", type=Path, required=True, help="folder, or NAME.safetensors of pretrained.py train")
    add("--algorithm", choices=("STANDALONE", "EAGLE3"), help="only to check what the draft is")
    add("--text", type=Path, nargs="+", required=True, help=".bin: uint16 tokens; else text")
    add("--out", type=Path, required=True, help="JSON lines")
    add("--head-map", type=Path, help="a file of sts-sglang calibrate, compared as well")
    add("--variants", nargs="+", default=["*"], help="names, * for any characters")
    add("--length", type=int, default=4096)
    add("--rows", type=int, default=256, help="at the end of a window, a multiple of 4")
    add("--windows", type=int, default=24)
    add("--calibration", type=int, default=8, help="windows to fit maps and budgets to")
    add("--fit-keep", type=float, default=0.1, help="at which maps are compared")
    add("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.25])
    add("--minutes", type=float, default=3.0)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", default="cuda")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(0)
    model.COMPUTE = getattr(torch, options.dtype)
    found = summary(run(options))
    out = options.out.with_suffix(".summary.jsonl")
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "a CPU"
    made = settings(options) | {"commit": commit(), "device": name}
    out.write_text("".join(json.dumps(made | row) + "\n" for row in found))
    for r in sorted(found, key=lambda r: (r["keep"], r["loss"])):
        print(
            f"{r['keep']:<5g} {r['variant']:38} {r['loss']:+7.2f} % ± {r['standard_error']:.2f}  "
            f"worst {r['worst']:+.2f}  held {r['held']:.3f}, worst layer {r['held_worst_layer']:.3f}  "
            f"error {r['error']:.3f}  kept {r['kept']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
