"""`sts-sglang calibrate`: texts in, a head map and what it is worth out."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sts_sglang import files
from sts_sglang.config import MAX_TOKENS, ConfigError, StsConfig, one_line
from sts_sglang.headmap import (
    DIMS_STEP,
    HEAD_DIMS,
    LATEST,
    MAP_SHIFT,
    MAP_VERSION,
    MAX_SOURCES,
    POOLS,
    RANKS,
    SETTINGS,
    directions_of,
)

if TYPE_CHECKING:
    from sts_sglang.calibrate.directions import Keys
    from sts_sglang.calibrate.record import Record, Target
    from sts_sglang.headmap import Directions, HeadCounts

TEXTS = Path(__file__).parent.parent / "texts"
DOMAINS = ("prose", "code", "dialogue", "recall")
MAX_TEXT = 64 << 20  # bytes of a file
MAX_SEED = 2**63 - 1


class Text(NamedTuple):
    domain: str
    content: str


# Flags that say how draft heads are searched, and what they are unless given.
BY_DRAFT = {"heads": 6, "pool": "auto", "band": None, "dense_below": None}


class Recorded(NamedTuple):
    """A text that both models ran over."""

    ids: list[int]
    record: Record


def add(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "calibrate",
        help="find which draft heads speak for which target heads and which need more, and say how well",
        description="With a draft: runs both models over a few texts, takes for every target (layer, KV\n"
        "head) the draft heads whose selection changes its output least, splits the budget over\n"
        "target heads, and writes the head map.\n"
        "Without: runs the target, finds what its output loses at every length of a head's list of\n"
        "tokens, and writes a map that splits the budget over heads so that least is lost.\n"
        "Either way the map has the directions along which the target's keys differ most, which\n"
        "sketches of tokens are made on, and is measured on texts that were not used for it.",
        epilog="examples:\n"
        "  sts-sglang calibrate --model TARGET --draft DRAFT --out map.json --plot map.png\n"
        "  sts-sglang calibrate --model TARGET --out map.json     # to serve without a draft\n"
        '  python -m sglang.launch_server ... --sts-config \'{"head_map": "map.json"}\'',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    flag = parser.add_argument
    flag("--model", required=True, help="target: folder or hub name")
    flag("--draft", help="draft, EAGLE or EAGLE-3 head: folder or hub name; none: the target is served alone")
    flag("--out", required=True, metavar="FILE", help="head map to write")
    flag("--text", nargs="+", metavar="FILE", help=f"texts to calibrate on (default: {', '.join(DOMAINS)})")
    flag("--holdout", nargs="+", metavar="FILE", help="texts to check on (default: others of the same kinds)")
    flag("--tokens", type=_count(MAX_TOKENS), default=4096, help="most tokens of a text (default 4096)")
    flag(
        "--windows",
        type=_count(MAX_TOKENS),
        default=16,
        help="verify windows, or decode steps, of a text (default 16)",
    )
    flag("--keep", type=float, default=0.1, help="share of the context to select (default 0.1)")
    flag("--sink", type=int, default=4, help="first tokens always kept (default 4)")
    flag("--recent", type=int, default=64, help="last tokens always kept (default 64)")
    flag(
        "--heads",
        type=_count(MAX_SOURCES),
        default=argparse.SUPPRESS,
        help=f"most draft heads for a target head (default {BY_DRAFT['heads']})",
    )
    flag(
        "--measure",
        choices=("output", "mass"),
        default="output",
        help="what a map is good by: how little the target's output changes (default), or the attention\n"
        "that it holds, which diffuse heads own (with a draft)",
    )
    flag(
        "--pool",
        choices=("auto", *POOLS),
        default=argparse.SUPPRESS,
        help="pool of rows and heads (default: the better)",
    )
    flag(
        "--budget",
        choices=("split", "uniform"),
        default="split",
        help="give heads that lose more a larger part of the budget (default), or, with a draft, all\n"
        "the same",
    )
    flag(
        "--selector",
        choices=SETTINGS["selector"],
        default=argparse.SUPPRESS,
        help="what the target alone is to select, and the budget is split for: tokens by sketches of their\n"
        "keys (default), or whole pages, for which the map has no directions (without a draft)",
    )
    flag(
        "--band",
        type=_band,
        default=argparse.SUPPRESS,
        metavar="N|all",
        help="search draft layers this near (default all)",
    )
    flag(
        "--dense-below",
        type=_share,
        default=argparse.SUPPRESS,
        metavar="R",
        help="keep target layers dense whose mean recall on the texts is below R, 0 to 1 (with a draft)",
    )
    flag(
        "--tp",
        type=int,
        choices=RANKS,
        default=1,
        help="ranks of the launch, its --tp-size (default 1): a head listens to draft heads of its own rank",
    )
    flag("--report", metavar="FILE", help="write the raw numbers as JSON")
    flag(
        "--plot",
        metavar="FILE",
        help="draw recall, or shares of the budget, by target layer and head\n(needs matplotlib)",
    )
    flag("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    flag("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default float32)")
    flag("--seed", type=_seed, default=0, help="of the windows' positions (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError, one line that names the flag."""
    if args.draft is None:
        _refuse_by_draft(args)
    elif hasattr(args, "selector"):
        raise ConfigError("--selector: is about a target alone; allowed: without --draft, or leave it out")
    vars(args).update({name: getattr(args, name, default) for name, default in BY_DRAFT.items()})
    try:
        config = StsConfig(keep=args.keep, sink=args.sink, recent=args.recent, budget=0, selector="draft")
    except ConfigError as error:
        raise ConfigError(str(error).replace("sts_config.", "--")) from None
    _check_outputs(args)
    texts, holdout = (
        read_texts(args.text, "calibration", "--text"),
        read_texts(args.holdout, "heldout", "--holdout"),
    )
    if same := {t.content for t in texts} & {t.content for t in holdout}:
        raise ConfigError(f"--holdout: {len(same)} text(s) also given to --text; allowed: other texts")
    if args.plot:
        from sts_sglang.calibrate import report as reports

        reports.check_plot(args.plot)
    _check_device(args.device)
    (_calibrate_alone if args.draft is None else _calibrate_pair)(args, config, texts, holdout)
    print(f"""wrote {args.out}; use it with --sts-config '{{"head_map": "{args.out}"}}'""")
    return 0


def _refuse_by_draft(args: argparse.Namespace) -> None:
    """What says nothing of a target alone."""
    for name in BY_DRAFT:
        if hasattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag}: is about draft heads; allowed: with --draft, or leave {flag} out")
    if args.measure != "output":
        raise ConfigError(f"--measure: got {args.measure!r} without --draft; allowed: output")
    if args.budget != "split":
        raise ConfigError(
            f"--budget: got {args.budget!r} without --draft, as is served without any map; allowed: split"
        )


def _calibrate_pair(args, config: StsConfig, texts: list[Text], holdout: list[Text]) -> None:
    from sts_sglang.calibrate import report as reports
    from sts_sglang.calibrate.record import Pair

    # Checks the files; and a model of the hub is here only after it was loaded.
    pair = Pair(args.model, args.draft, args.device, args.dtype)
    _check_ranks(args.tp, {"--model": pair.target_counts, "--draft": pair.draft_counts})
    prints = _fingerprints({"target": ("--model", args.model), "draft": ("--draft", args.draft)})
    keys = pair.keys()
    recorded = _record(pair, args, texts, "--text", args.measure == "output", keys)
    held = _record(pair, args, holdout, "--holdout")
    found, report = measure(pair, args, config, recorded, held)
    directions, report["directions"] = _directions(pair, keys)
    print(reports.table(report))
    head_map = _map(pair, args, found, report, prints, texts, recorded)
    _write("--out", args.out, head_map | _field_of(directions))
    if args.report:
        _write("--report", args.report, report)
    if args.plot:
        reports.plot(args.plot, report, f"held-out recall at keep {args.keep:g}")


def _calibrate_alone(args, config: StsConfig, texts: list[Text], holdout: list[Text]) -> None:
    from sts_sglang.calibrate import alone
    from sts_sglang.calibrate import report as reports
    from sts_sglang.calibrate.record import Target

    target = Target(args.model, args.device, args.dtype)
    args.selector = _selector(args, target)
    config = alone.lists_of(config, args.selector)
    _check_ranks(args.tp, {"--model": target.target_counts})
    prints = _fingerprints({"target": ("--model", args.model)})
    found, held = (
        [
            alone.Passage(text.domain, *chosen)
            for text, chosen in zip(part, _windows(target, args, part, flag, config.forced), strict=True)
        ]
        for part, flag in ((texts, "--text"), (holdout, "--holdout"))
    )
    keys = target.keys() if args.selector == "tokens" else None
    if keys is not None:
        for text in found:
            _say(f"keys of {text.domain}")
            target.run(text.ids, keys.add)
    directions, of_keys = _directions(target, keys)
    report = alone.measure(target, config, found, held, _say, directions) | {"directions": of_keys}
    print(reports.table_alone(report))
    head_map = {"draft": None, "shares": report["shares"], "dense_layers": []} | _field_of(directions)
    settings = [name for name in SETTINGS if name not in BY_DRAFT]
    _write(
        "--out",
        args.out,
        _made_of(args, target, prints, texts, [text.ids for text in found], settings) | head_map,
    )
    if args.report:
        _write("--report", args.report, report)
    if args.plot:
        reports.plot_shares(args.plot, report, f"shares of the budget at keep {args.keep:g}")


def _selector(args: argparse.Namespace, target: Target) -> str:
    """What a target alone is to select: what the flag says, else tokens where its keys have directions."""
    number = directions_of(target.head_dim)
    selector = getattr(args, "selector", "tokens" if number else "pages")
    if selector == "pages":
        target.check_pages()
    elif not number:
        raise ConfigError(
            f"--selector tokens: --model has heads of {target.head_dim} dimensions; allowed: a multiple of "
            f"{DIMS_STEP} from {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, or --selector pages"
        )
    return selector


def _directions(target: Target, keys: Keys | None) -> tuple[Directions | None, dict[str, Any]]:
    """Of `Keys`, None for a map without; and what the report says of them."""
    directions, variance = (None, 0.0) if keys is None else keys.directions()
    number = directions.number if directions else 0
    return directions, {"head_dim": target.head_dim, "number": number, "variance": variance}


def _field_of(directions: Directions | None) -> dict[str, Any]:
    return {"directions": directions.to_field()} if directions else {}


def _check_ranks(tp: int, models: dict[str, HeadCounts]) -> None:
    for flag, counts in models.items():
        if not counts.shared_evenly(tp):
            fitting = " | ".join(str(ranks) for ranks in RANKS if counts.shared_evenly(ranks))
            raise ConfigError(
                f"--tp {tp}: {flag} has {counts.q_heads} query and {counts.kv_heads} KV heads, which so many "
                f"ranks cannot share evenly; allowed: {fitting}"
            )


def _fingerprints(models: dict[str, tuple[str, str]]) -> dict[str, dict[str, str]]:
    """Of models by name, each with its flag and where it is."""
    from sts_sglang import fingerprint

    found = {}
    for name, (flag, path) in models.items():
        found[name] = fingerprint.of_model(path)
        if found[name] is None:
            raise ConfigError(f"{flag}: no safetensors files to fingerprint; allowed: a safetensors model")
    return found


def _check_outputs(args: argparse.Namespace) -> None:
    """Now, not after minutes of work."""
    taken = {os.path.realpath(path): "a text" for path in (*(args.text or ()), *(args.holdout or ()))}
    for flag, path in (("--out", args.out), ("--report", args.report), ("--plot", args.plot)):
        if not path:
            continue
        files.check_output(flag, path)
        if (other := taken.setdefault(os.path.realpath(path), flag)) is not flag:
            raise ConfigError(f"{flag} {path}: is {other} as well; allowed: a file of its own")


def measure(pair, args, config, recorded: list[Recorded], held: list[Recorded]):
    """(Calibrated, report) of recorded texts."""
    import torch

    from sts_sglang.calibrate import search
    from sts_sglang.calibrate.report import weak_heads
    from sts_sglang.headmap import proportional

    target, draft = pair.target_counts, pair.draft_counts
    records = [text.record for text in recorded]
    checks = search.windows_of([text.record for text in held], config)

    def windows_to_find_by(records):
        return search.windows_of(records, config, args.measure)

    def errors(head_map):
        if args.measure == "mass":
            return None
        parts = torch.tensor(search.parts_of(args.keep), dtype=torch.float64).expand(target.kv_heads, -1)

        def kept(window, layer):
            return search.kept_by_part(head_map, window, layer, draft, parts)

        return output_errors(pair, recorded, windows, parts.shape[1], kept)

    def find(windows):
        pools = POOLS if args.pool == "auto" else (args.pool,)
        return search.best_map(windows, target, draft, args.band, args.heads, pools, args.tp)

    _say("searching")
    windows = windows_to_find_by(records)
    found = find(windows)
    if args.budget == "split":
        _say("splitting the budget")
        split = search.split_budget(found.head_map, windows, target, draft, args.keep, errors(found.head_map))
        found = replace(found, head_map=split)
    _say("checking on held-out texts")
    mass = search.outside(checks, target)
    ways = {
        "sink + recent only": mass.new_zeros(mass.shape),
        "sink + recent, same size": search.latest(checks, target),
        "proportional default": search.recall_of(proportional(target, draft), checks, target, draft),
        "calibrated": search.recall_of(found.head_map, checks, target, draft),
        "best draft head a window": search.best_single(checks, target),
        "oracle": search.oracle(checks, target),
    }
    recall = {name: float(values.mean()) for name, values in ways.items()}
    recall["random"] = search.random(checks)
    where_found = search.recall_of(found.head_map, search.windows_of(records, config), target, draft).mean(0)
    recall["calibrated, own texts"] = float(where_found.mean())
    weighted = {name: float((values * mass).sum() / mass.sum()) for name, values in ways.items()}
    stability = {}
    for domain in dict.fromkeys(r.domain for r in records):
        _say(f"stability: {domain}")
        own = find(windows_to_find_by([r for r in records if r.domain == domain])).head_map
        share = search.recall_of(own, checks, target, draft).mean((1, 2))
        stability[domain] = search.by_domain(checks, share)
    lost = search.lost(found.head_map, checks, target, draft, args.keep)
    saved = None
    if args.measure == "output":
        saved = _saved(pair, held, checks, found.head_map, args.keep)
    weighted |= {f"calibrated, {name}": 1 - share / float(mass.mean()) for name, share in lost.items()}
    by_head, best = ways["calibrated"].mean(0), ways["oracle"].mean(0)
    latest = sum(not own for layer in found.head_map.sources for own in layer)
    return found, {
        "recall": recall,
        "recall_by_mass": weighted,
        "recall_by_domain": {n: search.by_domain(checks, v.mean((1, 2))) for n, v in ways.items()},
        "gap_closed": _closed(recall, "calibrated"),
        "share_outside": float(mass.mean()),
        "lost": lost,
        "saved": saved,
        "gap_closed_by_mass": _closed(weighted, f"calibrated, {args.budget} budget"),
        "pool": found.head_map.pool,
        "latest_heads": latest,
        "heads_mean": sum(len(own) for layer in found.head_map.sources for own in layer)
        / max(1, target.layers * target.kv_heads - latest),
        "stability": stability,
        "weak_heads": weak_heads(by_head, best),
        # Decided on the texts the map is made from: the others only judge.
        "dense_layers": [
            t for t, r in enumerate(where_found.mean(1).tolist()) if r < (args.dense_below or 0)
        ],
        "heldout_recall": _rounded(by_head),
        "oracle_recall": _rounded(best),
        "candidate_recall": _rounded(found.singles.recall),
        "candidate_jaccard": _rounded(found.singles.jaccard),
    }


def output_errors(pair, texts: list[Recorded], windows, ways: int, kept) -> Any:
    """[layers, KV heads, ways] of `Pair.output_errors` over all texts, every domain counting the same.

    kept: of a search.Window and a layer, bool [KV heads, ways, t].
    """
    import torch

    from sts_sglang.calibrate import search

    found = []
    for ids, record in texts:
        own = [window for window in windows if window.record is record]
        by_layer = partial(_of_window, kept, own)
        found.append(pair.output_errors(ids, record.windows, by_layer, ways))
    return search.over_domains(windows, torch.cat(found))


def _of_window(kept, windows, i: int, seen):
    return kept(windows[i], seen.layer)


def _saved(pair, texts, windows, head_map, keep: float) -> dict[str, float]:
    """Of the error of the target's output that sink and recent leave, the part that a map takes away."""
    import torch

    from sts_sglang.calibrate import search
    from sts_sglang.headmap import proportional

    target, draft = pair.target_counts, pair.draft_counts
    maps = {"proportional default": proportional(target, draft), "calibrated": head_map}

    def kept(window, layer):
        ways = []
        for own in maps.values():
            shares = own.shares[layer] if own.shares else [1.0] * target.kv_heads
            parts = torch.tensor([[0.0, keep * share] for share in shares], dtype=torch.float64)
            ways.append(search.kept_by_part(own, window, layer, draft, parts.clamp(max=1.0)))
        return torch.cat(ways, 1)

    errors = output_errors(pair, texts, windows, 4, kept).mean((0, 1)).tolist()
    return {name: 1 - errors[1 + 2 * i] / errors[0] for i, name in enumerate(maps)}


def _closed(recall: dict[str, float], way: str) -> float | None:
    """Part of the gap between the proportional default and the oracle, None where there is hardly one."""
    gap = recall["oracle"] - recall["proportional default"]
    return (recall[way] - recall["proportional default"]) / gap if gap > 0.005 else None


def _map(pair, args, found, report: dict[str, Any], prints, texts: list[Text], recorded) -> dict[str, Any]:
    heads = pair.target_counts.kv_heads
    best = {
        key: [
            [max(row) for row in rows[t * heads : (t + 1) * heads]] for t in range(pair.target_counts.layers)
        ]
        for key in ("recall", "jaccard")
        for rows in [report[f"candidate_{key}"]]
    }
    settings = [name for name in SETTINGS if name != "selector"]
    return _made_of(args, pair, prints, texts, [text.ids for text in recorded], settings) | {
        "shift": MAP_SHIFT,
        "draft": pair.draft_counts._asdict(),
        "pool": found.head_map.pool,
        "sources": [
            [[list(source) for source in h] or LATEST for h in layer] for layer in found.head_map.sources
        ],
        **({"shares": found.head_map.shares} if found.head_map.shares else {}),
        "dense_layers": report["dense_layers"],
        "best": best,
    }


def _made_of(args, target, prints, texts: list[Text], ids: list[list[int]], settings) -> dict[str, Any]:
    """What a map says of how it was made, by the names of these settings."""
    return {
        "version": MAP_VERSION,
        "tp": args.tp,
        "target": target.target_counts._asdict(),
        "fingerprints": prints,
        "texts": [
            {
                "domain": text.domain,
                "sha256": hashlib.sha256(text.content.encode()).hexdigest(),
                "tokens": len(own),
            }
            for text, own in zip(texts, ids, strict=True)
        ],
        "settings": {name: getattr(args, name) for name in settings},
    }


def _check_device(name: str) -> None:
    import torch

    allowed = "cpu, cuda" if torch.cuda.is_available() else "cpu (no CUDA device here)"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: got {name!r}; allowed: {allowed}") from None
    there = torch.cuda.device_count() if device.type == "cuda" else int(device.type == "cpu")
    if (device.index or 0) >= there:
        raise ConfigError(f"--device: got {name!r}; allowed: {allowed}")


def read_texts(paths: list[str] | None, part: str, flag: str) -> list[Text]:
    """What a flag names; None: the package's, of `part` "calibration" or "heldout". Raises ConfigError."""
    if paths is None:
        return [Text(d, (TEXTS / f"{d}.{part}.txt").read_text(encoding="utf-8")) for d in DOMAINS]
    return [_text(path, flag) for path in paths]


def _text(path: str, flag: str) -> Text:
    allowed = f"allowed: UTF-8 text files of at most {MAX_TEXT >> 20} MB"
    try:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(
                f"{flag} {path}: {'not a file' if file.exists() else 'no such file'}; {allowed}"
            )
        if file.stat().st_size > MAX_TEXT:
            raise ConfigError(f"{flag} {path}: {file.stat().st_size} bytes; {allowed}")
        content = file.read_text(encoding="utf-8")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {path}: {getattr(error, 'strerror', None) or error}; {allowed}") from None
    return Text(one_line(file.stem)[:255], content)


def _record(
    pair, args, texts: list[Text], flag: str, change: bool = False, keys: Keys | None = None
) -> list[Recorded]:
    windows = _windows(pair, args, texts, flag, args.sink + args.recent)
    found = []
    for n, (text, (ids, own)) in enumerate(zip(texts, windows, strict=True), 1):
        _say(f"[{n}/{len(texts)}] {text.domain}")
        found.append(Recorded(ids, pair.record(text.domain, ids, own, change, keys)))
    return found


def _windows(target, args, texts: list[Text], flag: str, forced: int) -> list[tuple[list[int], list[int]]]:
    """(token ids, committed lengths) of every text; forced: what is selected in any case."""
    from sts_sglang.calibrate.record import choose_windows, tokenizer_of

    tokenizer = tokenizer_of(args.model)
    # Below this the budget is forced and nothing is selected.
    least = int((forced + 1) / args.keep) + 1 if args.keep < 1 else 0
    found = []
    for i, text in enumerate(texts):
        ids = tokenizer(text.content, verbose=False)["input_ids"][: args.tokens]
        if target.positions and len(ids) > target.positions:
            raise ConfigError(
                f"--tokens {args.tokens}: {flag} {text.domain} has {len(ids)}, the models have positions for "
                f"{target.positions}; allowed: at most {target.positions}"
            )
        cut = "--tokens" if len(ids) == args.tokens else flag
        found.append((ids, choose_windows(len(ids), args.windows, least, args.seed + i, cut)))
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(flag: str, path: str, data: dict[str, Any]) -> None:
    with files.replacing(flag, path) as partial:
        partial.write_text(json.dumps(data) + "\n", encoding="utf-8")


def _rounded(values) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in values.tolist()]


def _count(most: int):
    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}; allowed: an integer from 1 to {most}")
        return int(text)

    return read


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) > MAX_SEED - 1024:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}; allowed: an integer from 0 to 2**63 - 1025")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}; allowed: a number from 0 to 1")
    return share


def _band(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 4:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}; allowed: a number of layers or 'all'")
    return int(text)
