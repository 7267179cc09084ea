"""The numbers in the prose of benchmarks/report_template.md and in the README's lines on answers.

Every one is worked out from benchmarks/results, so that a sentence cannot outlive the table it speaks of.
A number that stands in the template itself says at which commit it was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from benchmarks import tables
from benchmarks.quality.report import DENSE, Results, points, same_outputs, signed
from benchmarks.tables import answers, eagle3, recall, serving

REFRESHED = "sts-draft-refresh-2"


def facts() -> dict[str, str]:
    """By name. Raises SystemExit where a file is missing that a sentence needs."""
    found = {
        **_speed(),
        **_eagle3(),
        **_every(),
        **_fp8(),
        **_line(),
        **_tuned(),
        **_ties(),
        **_heads(),
        **_selection(),
        **_recall(),
    }
    makers = {
        "quality": _answers,
        "quality_parity": _parity,
        "quality_eagle3": partial(_answered, "eagle3", {"sts": [0.1], "joined-75": [0.1]}),
        "quality_eagle3_16k": partial(_answered, "eagle3_16k", {"sts": [0.1], "joined": [0.1]}),
        "quality_eagle3_tokens": partial(_answered, "e3t", {"sts": [0.1], "tokens": [0.1, 0.25]}),
        "quality_sparse": partial(_each, "sparse", *[{"sts-draft": [0.1]}] * 2, beside="sts"),
        "quality_alone": partial(_read, "alone", {"sts": [0.1], "pages": [0.1]}),
        "quality_smollm2_plain": _plain,
        "quality_smollm2_eagle3": partial(_accepted, "smol_eagle3"),
        "quality_smollm2_alone": _pretrained_alone,
        "quality_smollm2_eagle3_tokens": partial(
            _each, "smol_e3", {"map": [0.1], "tokens": [0.1]}, {"map": [0.1], "tokens": [0.1]}
        ),
        "quality_smollm2_plain_tokens": partial(_each, "smol_plain", {"map": [0.25], "tokens": [0.1]}, {}),
        "quality_smollm2_looking_tokens": partial(
            _each, "smol_looking", {"map": [0.1, 0.25], "tokens": [0.1]}, {}
        ),
        "quality_prefill": _prefilled,
        "quality_prefill_16k": partial(
            _each, "prefill16", *[{"prefill": [0.25], "prefill-draft-sparse": [0.25]}] * 2
        ),
        "quality_smollm2_eagle3_draft": partial(
            _each, "smol_e3_draft", *[{"map-all-75-8": [0.1]}] * 2, beside="map-dense"
        ),
        "quality_smollm2_plain_draft": partial(
            _each, "smol_plain_draft", *[{"map-all": [0.1], "map-all-75-8": [0.1]}] * 2, beside="map-dense"
        ),
        "quality_eagle3_sparse": _sparse_head,
        "quality_kept": partial(_kept, "kept", answers.KEPT),
        "quality_eagle3_kept": partial(_kept, "e3_kept", answers.KEPT_BY_HEADS),
        "quality_smollm2_prefill": partial(_each, "smol_prefill", {"prefill": [0.1, 0.25]}, {}),
    }
    for folder, make in makers.items():
        results = answers.answers(tables.RESULTS / folder)
        if results is None:
            raise SystemExit(f"benchmarks/results/{folder} is missing")
        found |= make(results)
    return found


def _speed() -> dict[str, str]:
    found = serving.drafted()
    low, high = serving.null_result(found)
    of_gpus = tables.by_gpu(found)
    anew, long, slower = of_gpus["NVIDIA H200"], (32_000, 8), []
    shapes = ((128_000, 1), long)  # that were measured anew
    more = [serving.gain(anew, REFRESHED, shape, "sts-draft") for shape in shapes]
    found = of_gpus["NVIDIA H100 80GB HBM3"]  # cells of one card alone are compared
    for shape in tables.shapes_of(found):
        captured, dense = (
            serving.speeds(found, shape, arm)[0] for arm in ("stock-spec-captured", "sts-dense")
        )
        if captured and dense:
            slower.append((1 - statistics.median(dense) / statistics.median(captured), shape))
    least, most = min(slower), max(slower)
    same = {
        s: g
        for s in tables.shapes_of(found)
        if (g := serving.gain(found, "sts-dense", s, "stock-spec-captured"))
    }
    return {
        "gain_32k": f"{serving.gain(found, 'sts', long, 'stock-spec'):.2f}x",
        "gain_32k_draft": f"{serving.gain(found, 'sts-draft', long, 'stock-spec'):.2f}x",
        **{
            f"{name}_{shape[0]}": f"{serving.gain(anew, arm, shape, 'stock-spec-captured'):.2f}x"
            for name, arm in (("anew", "sts"), ("anew_draft", "sts-draft"), ("refresh_alone", REFRESHED))
            for shape in shapes
        },
        "refresh_more_least": f"{100 * (min(more) - 1):.1f}",
        "refresh_more_most": f"{100 * (max(more) - 1):.1f} %",
        "null_low": f"{low:.2f}x",
        "null_high": f"{high:.2f}x",
        "idle_least": f"{max(0, 100 * least[0]):.0f} % at {least[1][0]:,} x {least[1][1]}",
        "idle_most": f"{100 * most[0]:.0f} % at {most[1][0]:,} x {most[1][1]}",
        "idle_same_run": ", ".join(f"{100 * (1 - g):.0f} % at {n:,} x {r}" for (n, r), g in same.items()),
    }


def _eagle3() -> dict[str, str]:
    """Of trees, and of chains by dense and by sparse drafts, over stock; of stock with KV in FP8 over stock
    in bf16, of the head's KV in FP8 over the same in its own dtype, and of all KV in FP8, over stock."""
    trees = [r for r in eagle3.measured() if r.get("topk", 1) > 1]
    chains, fp8, long, wide = eagle3.chains(), eagle3.measured(kv="fp8_e4m3"), (128_000, 1), (32_000, 8)
    over = partial(serving.gain, over="stock-spec-captured")
    aims = {"128000": long, "32000": wide, "most": (32_000, 24)}
    by_fp8 = [over(chains, "stock-fp8", shape) for shape in aims.values()]
    return {
        "tree_128000": f"{over(trees, 'sts', long):.2f}x",
        "tree_32000": f"{over(trees, 'sts', wide):.2f}x",
        **{
            f"{name}_{which}": f"{over(chains, arm, shape):.2f}x"
            for name, arm in (("dense", "sts"), ("sparse", "sts-draft"), ("refresh", REFRESHED))
            for which, shape in aims.items()
        },
        "stock_fp8": f"{min(by_fp8):.2f}x to {max(by_fp8):.2f}x",
        "head_fp8_128000": f"{serving.gain(chains, 'sts-draft-kv', long, 'sts'):.2f}x",
        "head_fp8_32000": f"{serving.gain(chains, 'sts-draft-kv', wide, 'sts'):.2f}x",
        "fp8_128000": f"{over(fp8, 'sts', long):.2f}x",
        "fp8_32000": f"{over(fp8, 'sts', wide):.2f}x",
    }


def _line() -> dict[str, str]:
    """Of a verify over lists of one length, requests of 32,768 tokens: microseconds that it takes whatever it
    reads, and how fast it reads then. A line through batches of several sizes."""
    found = [r for r in tables.rows("verify_h200.jsonl") if r["context"] == 32_768]
    own = [r for r in found if r["provider"] == "triton" and "stored" not in r]
    line = statistics.linear_regression([r["us"] * r["gbps"] for r in own], [r["us"] for r in own])
    return {"verify_fixed": f"{line.intercept:.0f}", "verify_rate": f"{1e-3 / line.slope:.1f}"}


def _heads() -> dict[str, str]:
    """In percent: what groups that are padded take at most over the next power of two, and what a head of 96
    reaches by its bytes of one of 128."""
    found: dict[str, str] = {}
    for name, provider in (("verify", "triton"), ("draft", "triton+importance")):
        own = [r for r in tables.rows(f"{name}_heads.jsonl") if r["provider"] == provider]
        us = {(r["dim"], r["group"]): r["us"] for r in own}
        rates = {(r["dim"], r["group"]): r["gbps"] for r in own}
        power = {group: 1 << (group - 1).bit_length() for _, group in us}
        odd = [us[dim, group] / us[dim, power[group]] for dim, group in us if group != power[group]]
        padded = [rates[96, group] / rates[128, group] for dim, group in rates if dim == 96]
        found |= {f"odd_{name}": f"{100 * max(0, max(odd) - 1):.0f} %"}
        found |= {f"padded_{name}": f"{100 * min(padded):.0f} to {100 * max(padded):.0f} %"}
    return found


def _selection() -> dict[str, str]:
    """Microseconds of selection from rows of 131,072 scores: of 8, and of 128 a request."""
    found = [r for r in tables.timings("select") if r["provider"] == "triton" and r["keep"] == 0.1]
    us = {(r["context"], r["batch"], r.get("channels", 128)): f"{r['us']:.0f}" for r in found}
    return {"select_few": us[131_072, 1, 8], "select_many": us[131_072, 1, 128]}


def _tuned() -> dict[str, str]:
    """Microseconds of draft attention, heads of 128, with its knobs of now and with those of 0df45b0: of keys
    alone, and of all of it with importance."""
    found = tables.rows("draft_attention_tune.jsonl")

    def times(alone: bool, **knobs: int) -> str:
        own = [r for r in found if r["dim"] == 128 and r.get("alone", False) == alone]
        each = [f"{r['us']:.0f}" for r in own if r["knobs"] == {"narrow": [], **knobs}]
        return f"{', '.join(each[:-1])} and {each[-1]}"

    return {
        "keys_now": times(True, programs=396, keys_stages=5),
        "keys_before": times(True, programs=264, keys_stages=7),
        "whole_now": times(False, programs=396, num_stages=5),
        "whole_before": times(False, programs=264, num_stages=5),
    }


def _ties() -> dict[str, str]:
    """Of stock's own backends along what its FA3 says, in bf16: how often they say another token, and how far
    apart FA3's two best are there at most."""
    own = (r for r in tables.rows("near_ties.jsonl") if r["dtype"] == "bfloat16")
    found = {r["backend"]: r for r in own if "backend" in r}
    (tokens,) = {r["tokens"] for r in found.values()}
    return {
        "ties_of": f"{tokens:,}",
        **{f"ties_{backend}": str(len(r["gaps"])) for backend, r in found.items()},
        **{f"tie_{backend}": f"{max(r['gaps']):g}" for backend, r in found.items()},
    }


def _fp8() -> dict[str, str]:
    """Microseconds of the first step of a draft whose KV is in FP8, heads of 64, 32,768 x 8, and in bf16."""
    found = tables.rows("draft_fp8.jsonl"), tables.rows("draft_h200.jsonl")
    wanted = {
        "provider": "triton+importance",
        "context": 32_768,
        "batch": 8,
        "dim": 64,
        "group": 4,
        "step": 0,
    }
    own = [next(r["us"] for r in rows if wanted.items() <= r.items()) for rows in found]
    return dict(zip(("draft_fp8_us", "draft_bf16_us"), (f"{us:.0f}" for us in own), strict=True))


def _every() -> dict[str, str]:
    """Of a draft whose passes are all sparse, over captured stock."""
    found = tables.rows("draft_every.jsonl")
    of = partial(serving.gain, found, "sts-draft-every", over="stock-spec-captured")
    return {f"every_{n}": f"{of(shape=(n, r)):.2f}x" for n, r in ((32_000, 8), (128_000, 1))}


def _recall() -> dict[str, str]:
    standalone, eagle = (recall.calibrated(pair) for pair in recall.PAIRS)
    kept = {r["way"]: r for r in tables.rows("calibrate/standalone.jsonl")[1:]}
    large = kept["map from 64K tokens: 4 texts, 12 tasks"]["texts"]

    def below(domain: str, what: str) -> float:
        """Points that a map from 4,096 tokens of one domain holds less than one from 64K."""
        return 100 * (large[what] - kept[f"map from 4K tokens: {domain}"]["texts"][what])

    network = kept["ceiling: network over all draft heads and distance"]
    others = ("prose", "dialogue", "recall")
    return {
        "closed": f"{100 * standalone['gap_closed_by_mass']:.0f} %",
        "closed_eagle3": f"{100 * eagle['gap_closed_by_mass']:.0f} %",
        "closed_uniform": f"{100 * standalone['gap_closed']:.0f} %",
        "closed_uniform_eagle3": f"{100 * eagle['gap_closed']:.0f} %",
        "closed_network": f"{100 * network['gap_closed']:.0f} %",
        "small_texts": f"{max(below(d, 'by_mass') for d in others):.1f}",
        "small_texts_heads": f"{max(below(d, 'recall') for d in others):.1f}",
        "small_code": f"{below('code', 'by_mass'):.1f}",
        "small_code_heads": f"{below('code', 'recall'):.1f}",
    }


def listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _answers(found: Results) -> dict[str, str]:
    lengths, texts = found.lengths(), found.lengths(loss=True)

    def change(arm: str, keep: float, length: int) -> str:
        return signed(found.difference((arm, keep), (arm, DENSE), length)).strip("*")

    def points_of(arm: str, keep: float, length: int) -> float:
        return 100 * found.difference((arm, keep), (arm, DENSE), length).mean

    def rise(arm: str, keep: float, length: int) -> float:
        return 100 * found.loss_change((arm, keep), (arm, DENSE), length).mean

    quest = [
        f"{rise('quest', 0.05, n):.1f} % at 5 % and {rise('quest', 0.1, n):.1f} % at 10 % of {n:,} tokens"
        for n in texts
    ]
    again = [found.difference(("sts", k), ("sts-again", k), lengths[0]) for k in (0.05, 0.1, DENSE)]
    return {
        "lengths": listed([f"{n:,}" for n in lengths]),
        "texts": listed([f"{n:,}" for n in texts]),
        "items": f"{next(iter(found.headers.values()))['items']}",
        "answers_10": listed([change("sts", 0.1, n) for n in lengths]),
        "dense": listed([points(found.mean("sts", DENSE, n)) for n in lengths]),
        "text_10": listed([f"{rise('sts', 0.1, n):+.2f} %" for n in texts]),
        "recent_10": listed([f"{-points_of('recent', 0.1, n):.1f}" for n in lengths]),
        "quest_10": listed([f"{points_of('quest', 0.1, n):+.1f}" for n in lengths]),
        "draft_blend_text_5": f"{rise('sts-draft-blend', 0.05, texts[0]):.1f} %",
        "first_text": f"{texts[0]:,}",
        "quest_text": "; ".join(quest),
        "noise": f"{100 * max(abs(f.mean) for f in again if f):.1f}",
        "noise_equal": same_outputs(found, "sts", "sts-again", found.keeps),
    }


Shown = dict[str, list[float]]  # arms, and the keeps of each


def _answered(name: str, shown: Shown, found: Results) -> dict[str, str]:
    """By NAME_ARM_KEEP, at the first length: points of answers."""
    return _changes(name, shown, found, found.difference, digits=1)


def _read(name: str, shown: Shown, found: Results) -> dict[str, str]:
    """The same of percent of the loss of text."""
    return _changes(name, shown, found, found.loss_change, digits=2)


def _changes(name: str, shown: Shown, found: Results, change: Callable, digits: int) -> dict[str, str]:
    first = found.lengths(loss=True)[0]
    return {
        f"{name}_{arm}_{100 * keep:.0f}": signed(
            change((arm, keep), (arm, DENSE), first), digits=digits
        ).strip("*")
        for arm, keeps in shown.items()
        for keep in keeps
    }


def _each(
    name: str, texts: Shown, answers: Shown, found: Results, *, beside: str | None = None
) -> dict[str, str]:
    """By NAME_text_ARM_KEEP and NAME_answers_ARM_KEEP, at every length: percent of the loss of text, and
    points of answers, against the arm's own dense verify or, of drafts that are sparse, `beside` another arm
    at the same keep."""
    if absent := {*texts, *answers} - set(found.arms):
        raise SystemExit(f"arms are missing that a sentence speaks of: {', '.join(sorted(absent))}")

    def all_of(what: str, shown: Shown, change: Callable, lengths: list[int], digits: int) -> dict[str, str]:
        return {
            f"{name}_{what}_{arm}_{100 * keep:.0f}": listed(
                [
                    signed(
                        change((arm, keep), (beside, keep) if beside else (arm, DENSE), n), digits=digits
                    ).strip("*")
                    for n in lengths
                ]
            )
            for arm, keeps in shown.items()
            for keep in keeps
        }

    return {
        **all_of("text", texts, found.loss_change, found.lengths(loss=True), 2),
        **all_of("answers", answers, found.difference, found.lengths(), 1),
    }


def _sparse_head(found: Results) -> dict[str, str]:
    """Of the shipped head."""
    shown = dict.fromkeys(("all-75-8", "sts-draft", "sts-extend"), [0.1])
    changes = _each("e3", shown, shown, found, beside="sts")
    return {**changes, **_drafted("e3", ("sts", "all-75-8", "sts-extend"), found)}


def _kept(name: str, arms: dict[str, str], found: Results) -> dict[str, str]:
    """Of drafts that go by selections which are kept. arms: of answers.KEPT."""
    changes = _each(name, {}, dict.fromkeys(arms.values(), [0.1]), found, beside="sts")
    return {**changes, **_drafted(name, ("sts", *arms.values()), found)}


def _drafted(name: str, arms: tuple[str, ...], found: Results) -> dict[str, str]:
    """NAME_accept_ARM, tokens of a round that are accepted in answers, at every length."""
    return {
        f"{name}_accept_{arm}": listed(
            [f"{found.accept_length(arm, 0.1, n, found.tasks):.2f}" for n in found.lengths()]
        )
        for arm in arms
    }


def _pretrained_alone(found: Results) -> dict[str, str]:
    """Of SmolLM2 without a draft."""
    shown = {"tokens": [0.05, 0.1], "tokens-split": [0.1], "pages": [0.1, 0.25, 0.5], "oracle": [0.1]}
    texts = listed([f"{n:,}" for n in found.lengths(loss=True)])
    # Differences of losses, item by item.
    rivals = {
        f"smol_ahead_of_{rival}": listed(
            [
                signed(found.loss_change((rival, 0.1), ("tokens", 0.1), n), digits=2).strip("*")
                for n in lengths
            ]
        )
        for rival, lengths in (("pages", found.lengths(loss=True)), ("quest", [2048]))
    }
    return {"smol_texts": texts, **rivals, **_each("smol", shown, {"tokens": [0.1]}, found)}


def _prefilled(found: Results) -> dict[str, str]:
    """Of the shipped pair after a sparse prefill."""
    shown = {"prefill": [0.25], "prefill-draft": [0.25]}
    texts = listed([f"{n:,}" for n in found.lengths(loss=True)])
    return {"prefill_texts": texts, **_each("prefill", shown, shown, found)}


def _accepted(name: str, found: Results) -> dict[str, str]:
    """NAME_accept, tokens a round of dense verify on text."""
    first = found.lengths(loss=True)[0]
    return {f"{name}_accept": f"{found.accept_length('sts', DENSE, first, ['text']):.2f}"}


def _plain(found: Results) -> dict[str, str]:
    both = dict.fromkeys(("sts", "map", "pages", "joined-map-u"), [0.1, 0.25])
    return {**_read("plain", both, found), **_accepted("plain", found)}


def _parity(found: Results) -> dict[str, str]:
    lengths = sorted({*found.lengths(), *found.lengths(loss=True)})
    return {
        "parity": same_outputs(found, "dense", "stock", [DENSE]),
        "parity_lengths": f"{lengths[0]:,} to {lengths[-1]:,}",
    }
