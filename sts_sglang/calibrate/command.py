"""`sts-sglang calibrate`: texts in, a head map and what it is worth out."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from sts_sglang.config import ConfigError, StsConfig

TEXTS = Path(__file__).parent.parent / "texts"
DOMAINS = ("prose", "code", "dialogue")


class Text(NamedTuple):
    domain: str
    content: str


def add(commands) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "calibrate",
        help="find which draft heads speak for which target heads, and say how well",
        description="Runs both models over a few texts, takes for every target (layer, KV head) the draft\n"
        "heads that select most of what it attends to, and writes the head map. Then measures\n"
        "the map on texts that were not used for it.",
        epilog="example:\n"
        "  sts-sglang calibrate --model TARGET --draft DRAFT --out map.json --plot map.png\n"
        '  python -m sglang.launch_server ... --sts-config \'{"head_map": "map.json"}\'',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--model", required=True, help="target: folder or hub name")
    flag("--draft", required=True, help="draft, EAGLE or EAGLE-3 head: folder or hub name")
    flag("--out", required=True, metavar="FILE", help="head map to write")
    flag(
        "--text", nargs="+", metavar="FILE", help="texts to calibrate on (default: prose, code and dialogue)"
    )
    flag("--holdout", nargs="+", metavar="FILE", help="texts to check on (default: others of the same kinds)")
    flag("--tokens", type=_count, default=4096, help="most tokens of a text (default 4096)")
    flag("--windows", type=_count, default=16, help="verify windows of a text (default 16)")
    flag("--keep", type=float, default=0.1, help="share of the context to select (default 0.1)")
    flag("--sink", type=int, default=4, help="first tokens always kept (default 4)")
    flag("--recent", type=int, default=64, help="last tokens always kept (default 64)")
    flag("--heads", type=_count, default=4, help="most draft heads for a target head (default 4)")
    flag(
        "--band",
        type=_band,
        default=None,
        metavar="N|all",
        help="search draft layers this near (default all)",
    )
    flag("--dense-below", type=float, metavar="R", help="suggest dense layers where mean recall is below R")
    flag("--report", metavar="FILE", help="write the raw numbers as JSON")
    flag("--plot", metavar="FILE", help="draw recall by target layer and head (needs matplotlib)")
    flag("--device", default="cpu", help="cpu (default) or cuda")
    flag("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default float32)")
    flag("--seed", type=int, default=0, help="of the windows' positions (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError, one line that names the flag."""
    try:
        config = StsConfig(keep=args.keep, sink=args.sink, recent=args.recent, budget=0)
    except ConfigError as error:
        raise ConfigError(str(error).replace("sts_config.", "--")) from None
    for flag, path in (("--out", args.out), ("--report", args.report), ("--plot", args.plot)):
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{flag} {path}: no such folder; allowed: a file in a folder that exists")
    texts, holdout = _texts(args.text, "calibration", "--text"), _texts(args.holdout, "heldout", "--holdout")
    if same := {t.content for t in texts} & {t.content for t in holdout}:
        raise ConfigError(f"--holdout: {len(same)} text(s) also given to --text; allowed: other texts")

    import torch

    from sts_sglang.calibrate import report as reports
    from sts_sglang.calibrate.record import Pair

    if args.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: no CUDA device here; allowed: cpu")
    pair = Pair(args.model, args.draft, args.device, args.dtype)
    records, held = _record(pair, args, config, texts), _record(pair, args, config, holdout)
    head_map, report, recall = measure(pair, args, config, records, held)
    _write("--out", args.out, _map(pair, args, head_map, report, texts, records))
    print(reports.table(report))
    if args.report:
        _write("--report", args.report, report)
    if args.plot:
        reports.plot(args.plot, recall, f"held-out recall at keep {args.keep:g}")
    print(f"""wrote {args.out}; use it with --sts-config '{{"head_map": "{args.out}"}}'""")
    return 0


def measure(pair, args, config, records, held):
    """(head map, report, held-out recall [layers, KV heads]) of recorded texts."""
    import torch

    from sts_sglang.calibrate import search
    from sts_sglang.calibrate.report import weak_heads
    from sts_sglang.headmap import proportional

    target, draft = pair.target_counts, pair.draft_counts
    windows, checks = search.frees(records, config), search.frees(held, config)

    def find(windows):
        scores = search.score(windows)
        return scores, search.search(windows, scores, target, draft, args.band, args.heads)

    scores, head_map = find(windows)
    recall = search.recall_of(head_map, checks, draft)
    best = search.oracle(checks).view_as(recall)
    default = float(search.recall_of(proportional(target, draft), checks, draft).mean())
    gap = float(best.mean()) - default
    stability = {}
    for domain in dict.fromkeys(r.domain for r in records):
        _, own = find(search.frees([r for r in records if r.domain == domain], config))
        stability[domain] = {
            other: float(
                search.recall_of(
                    own, search.frees([r for r in held if r.domain == other], config), draft
                ).mean()
            )
            for other in dict.fromkeys(r.domain for r in held)
        }
    outside = [free.mass.sum(1).mean() for free in checks]
    layers = recall.mean(1)
    report = {
        "recall": {
            "sink + recent": 0.0,
            "random": search.random(checks),
            "proportional default": default,
            "calibrated": float(recall.mean()),
            "calibrated, own texts": float(search.recall_of(head_map, windows, draft).mean()),
            "oracle": float(best.mean()),
        },
        "gap_closed": (float(recall.mean()) - default) / gap if gap > 1e-6 else None,
        "share_outside": float(torch.stack(outside).mean()),
        "stability": stability,
        "weak_heads": weak_heads(recall, best),
        "dense_layers": [t for t, r in enumerate(layers.tolist()) if r < (args.dense_below or 0)],
        "heldout_recall": _rounded(recall),
        "oracle_recall": _rounded(best),
        "candidate_recall": _rounded(scores.recall),
        "candidate_jaccard": _rounded(scores.jaccard),
    }
    return head_map, report, recall


def _map(pair, args, head_map, report: dict[str, Any], texts: list[Text], records) -> dict[str, Any]:
    from sts_sglang import fingerprint
    from sts_sglang.headmap import MAP_VERSION, SHIFT

    heads = pair.target_counts.kv_heads
    prints = {"target": fingerprint.of_model(args.model), "draft": fingerprint.of_model(args.draft)}
    for name, flag in (("target", "--model"), ("draft", "--draft")):
        if prints[name] is None:
            raise ConfigError(f"{flag}: no safetensors files to fingerprint; allowed: a safetensors model")
    best = {
        key: [
            [max(row) for row in rows[t * heads : (t + 1) * heads]] for t in range(pair.target_counts.layers)
        ]
        for key in ("recall", "jaccard")
        for rows in [report[f"candidate_{key}"]]
    }
    return {
        "version": MAP_VERSION,
        "shift": SHIFT,
        "tp": 1,
        "target": pair.target_counts._asdict(),
        "draft": pair.draft_counts._asdict(),
        "fingerprints": prints,
        "sources": [[[list(source) for source in h] for h in layer] for layer in head_map.sources],
        "dense_layers": report["dense_layers"],
        "best": best,
        "texts": [
            {"domain": t.domain, "sha256": hashlib.sha256(t.content.encode()).hexdigest(), "tokens": r.tokens}
            for t, r in zip(texts, records, strict=True)
        ],
        "settings": {
            name: getattr(args, name)
            for name in ("tokens", "windows", "keep", "sink", "recent", "heads", "band", "dtype", "seed")
        },
    }


def _texts(paths: list[str] | None, part: str, flag: str) -> list[Text]:
    try:
        if paths is None:
            return [Text(d, (TEXTS / f"{d}.{part}.txt").read_text(encoding="utf-8")) for d in DOMAINS]
        return [Text(Path(p).stem, Path(p).read_text(encoding="utf-8")) for p in paths]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag}: {error}; allowed: UTF-8 text files") from None


def _record(pair, args, config: StsConfig, texts: list[Text]):
    from transformers import AutoTokenizer

    from sts_sglang.calibrate.record import choose_windows

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # Below this the budget is sink + recent and nothing is selected.
    least = int((args.sink + args.recent + 1) / args.keep) + 1 if args.keep < 1 else 0
    records = []
    for i, text in enumerate(texts):
        print(f"[{i + 1}/{len(texts)}] {text.domain}", file=sys.stderr, flush=True)
        ids = tokenizer(text.content)["input_ids"][: args.tokens]
        windows = choose_windows(len(ids), args.windows, least, args.seed + i)
        records.append(pair.record(text.domain, ids, windows))
    return records


def _write(flag: str, path: str, data: dict[str, Any]) -> None:
    try:
        partial = f"{path}.partial"
        Path(partial).write_text(json.dumps(data) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; allowed: a file to write") from None


def _rounded(values) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in values.tolist()]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: an integer of at least 1")
    return int(text)


def _band(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number of layers or 'all'")
    return int(text)
