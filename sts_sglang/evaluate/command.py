"""`sts-sglang evaluate`: what sparse verify loses, with a draft or without, and the smallest keep that passes
a gate."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_sglang import files
from sts_sglang.calibrate.command import read_texts
from sts_sglang.config import ConfigError, StsConfig, quoted, shown
from sts_sglang.headmap import RANKS

if TYPE_CHECKING:
    from sts_sglang.evaluate.asking import Cell, Client
    from sts_sglang.evaluate.gate import Judged
    from sts_sglang.evaluate.items import Plain
    from sts_sglang.evaluate.pair import Known, Models
    from sts_sglang.evaluate.recall import Recall
    from sts_sglang.tools.local_server import LocalServer

SIZES = {"cpu": (2048, 20, 4), "cuda": (4096, 48, 8)}  # length, items, requests at a time
FIRST_LOOK = 10  # items that decide whether dense attention does a task
MOST_ITEMS, LEAST_LENGTH = 10_000, 512
# Requests choose their keeps here, and one of them alone is no batch to stand aside for.
SERVED = {"request_keep": "any", "inspect_dir": None, "stand_aside": 0}
UNBOUNDED = {"budget": 0}


@dataclass
class Plan:
    """What is asked, and of which server. `config`: what was given, without defaults, keep and budget."""

    known: Known
    suite: Plain
    device: str
    lengths: list[int]
    keeps: list[float]
    items: int
    concurrency: int
    config: dict[str, Any]
    tasks: list[str]
    server_args: list[str]

    def served(self) -> dict[str, Any]:
        """Without a floor, unless one was given: it would hide what a keep costs in longer contexts."""
        return {**UNBOUNDED, **self.config, **SERVED, "keep": max(self.keeps)}


def add(commands: Any) -> None:
    """Register the subcommand."""
    from sts_sglang.evaluate.gate import GATE
    from sts_sglang.evaluate.items import ABOUT

    tasks = "\n".join(f"  {name:9} {about}" for name, about in ABOUT.items())
    parser = commands.add_parser(
        "evaluate",
        help="measure what your models lose in answers, and which keep passes a gate",
        description="Serves a target, with its draft or alone, on this machine and asks the same items\n"
        "densely and at several keeps: the loss of text that is forced through decode, look-ups\n"
        "and copies of what stands far back. A task that the model does not do densely (below 0.6)\n"
        "is left out. With --draft, what the draft attends to selects; without, every decode step\n"
        "is sparse, and the target's own queries select: single tokens by a map that has directions\n"
        "of its keys (packaged for the shipped target, else --sts-config head_map, which\n"
        "`sts-sglang calibrate` makes), or pages of 16 tokens.\n"
        f"\nThe gate, stated beforehand:\n{_wrapped(GATE)}\n"
        "\nExit code 0 and the command to serve with where a keep passes, 1 where none does, 2 for\n"
        "bad input, 130 when interrupted, 70 for an error that nobody expected.",
        epilog=f"tasks:\n{tasks}\n\nexamples:\n"
        "  sts-sglang evaluate --target TARGET --text docs/*.md --out found\n"
        "  sts-sglang evaluate --target TARGET --draft DRAFT --text docs/*.md --out found\n"
        "  sts-sglang evaluate --target TARGET --draft HEAD --algorithm EAGLE3 --keeps 0.1 0.25\n"
        '  sts-sglang evaluate --target TARGET --draft DRAFT --sts-config \'{"head_map": "map.json"}\'',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    flag = parser.add_argument
    flag("--target", required=True, help="folder or hub name")
    flag("--draft", help="draft, EAGLE or EAGLE-3 head: folder or hub name (none: the target alone)")
    flag(
        "--algorithm",
        metavar="NAME",
        help="STANDALONE, EAGLE3 or EAGLE (what the draft is made for), or NONE",
    )
    flag("--text", nargs="+", metavar="FILE", help="texts like those you serve (the package's held-out ones)")
    flag(
        "--keeps", nargs="+", type=float, default=[0.05, 0.1, 0.25, 0.5], metavar="K", help="(.05 .1 .25 .5)"
    )
    flag("--lengths", nargs="+", type=int, metavar="N", help="tokens of an item (4096, on a CPU 2048)")
    flag("--items", type=int, help="documents of a task and length (48, on a CPU 20)")
    flag("--tasks", nargs="+", metavar="TASK", help="(all)")
    flag("--sts-config", metavar="JSON|PATH", help="what you would serve with, beside keep ({})")
    flag(
        "--no-recall", action="store_true", help="with --draft: do not measure what of the attention is held"
    )
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(auto)")
    flag("--concurrency", type=int, metavar="N", help="requests at a time (8, on a CPU 4)")
    flag("--out", metavar="DIR", help="also write results.jsonl, report.md and server.log there")
    flag("--server-args", nargs=argparse.REMAINDER, default=[], help="last: the rest goes to SGLang as it is")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where no keep passes. Raises ConfigError, one line that names the flag."""
    from sts_sglang.evaluate import gate
    from sts_sglang.evaluate.items import LOSS, NoRoom, TooShort
    from sts_sglang.tools.local_server import stop_when_terminated

    try:
        plan = plan_of(args)
    except NoRoom as error:
        raise ConfigError(f"--lengths: {error}; allowed: longer ones, or other --tasks") from None
    except TooShort as error:
        named = quoted(" ".join(args.text), 200)[1:-1] if args.text else ""
        raise ConfigError(f"{f'--text {named}'.rstrip()}: {error}") from None
    stop_when_terminated()
    with tempfile.TemporaryDirectory(prefix="sts-evaluate-") as spare:
        out = _folder(args.out) if args.out else None
        _say(f"the gate: {gate.GATE}")
        held = _recall(plan) if plan.known.pair.drafts and not args.no_recall else {}
        cells, left_out, about = measure(plan, (out or Path(spare)) / "server.log")
    wanted = plan.tasks != [LOSS]
    judged = [gate.judge(cells, keep, wanted) for keep in plan.keeps] if cells else []
    found = gate.smallest(judged)
    report = report_of(plan, gate.table(cells, judged, held) if cells else "", judged, left_out, found)
    print(report)
    if out:
        recall = {str(keep): one._asdict() for keep, one in held.items()}
        first = {**about, "gate": gate.GATE, "left_out": left_out, "recall": recall}
        rows = [first, *map(asdict, cells.values())]
        _write(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        _write(out / "report.md", report + "\n")
    return 0 if found else 1


def plan_of(args: argparse.Namespace) -> Plan:
    """Refuses what can be before a model is loaded. Raises ConfigError, TooShort."""
    keeps = sorted(set(args.keeps))
    if not all(0 < keep < 1 for keep in keeps):
        raise ConfigError(f"--keeps: got {shown(args.keeps)}; allowed: numbers above 0 and below 1")
    config = _config(args.sts_config)
    texts = read_texts(args.text, "heldout", "--text")
    from sts_sglang.evaluate import pair
    from sts_sglang.evaluate.items import Plain, Source

    if args.algorithm not in (None, *pair.ALGORITHMS, pair.NONE):
        names = ", ".join((*pair.ALGORITHMS, pair.NONE))
        raise ConfigError(f"--algorithm: got {shown(args.algorithm)}; allowed: {names}")
    device = _device(args.device)
    known = pair.check(args.target, args.draft, args.algorithm)
    served = _checked(config, known.pair, args.server_args)
    length, items, concurrency = SIZES[device]
    lengths = sorted(set(args.lengths or [min(length, known.positions or length)]))
    most = known.positions or 2**24
    if not all(LEAST_LENGTH <= n <= most for n in lengths):
        raise ConfigError(f"--lengths: got {shown(lengths)}; allowed: from {LEAST_LENGTH} to {most} tokens")
    _check_floor(served, lengths)
    items = _count("--items", args.items, items, MOST_ITEMS)
    suite = Plain(Source(known.tokenizer, [text.content for text in texts]))
    if unknown := set(args.tasks or ()) - set(suite.tasks):
        raise ConfigError(f"--tasks: got {shown(sorted(unknown))}; allowed: {', '.join(suite.tasks)}")
    tasks = [task for task in suite.tasks if not args.tasks or task in args.tasks]
    for n in lengths:  # texts that are too short are found now
        for task in tasks:
            suite.make(task, n, items - 1)
    concurrency = _count("--concurrency", args.concurrency, concurrency, 512)
    return Plan(known, suite, device, lengths, keeps, items, concurrency, config, tasks, args.server_args)


def measure(plan: Plan, log: Path) -> tuple[dict, list[dict], dict[str, Any]]:
    """(cells by task, length and keep; what dense attention does not do; where it comes from)."""
    from sts_sglang.evaluate import pair
    from sts_sglang.evaluate.asking import Client, NotAsked

    longest = max(plan.lengths) + pair.ROOM
    # Its fingerprints first: they refuse damaged files.
    about = {"pair": plan.known.pair.named(), "models": plan.known.pair.paths().fingerprints()}
    _say(f"starting the server, its log: {log}")
    server = pair.start(
        plan.known.pair,
        log,
        device=plan.device,
        context=min(longest, plan.known.positions or longest),
        concurrency=plan.concurrency,
        config=plan.served(),
        extra=plan.server_args,
    )
    whose = f"--target {plan.known.pair.target}"

    def failed(error: Exception) -> ConfigError:
        return ConfigError(
            f"{whose}: the server failed, {_last_error(log, error)}; allowed: models that sts serves on this "
            "device (with --out its log is kept)"
        )

    with ExitStack() as running:
        try:
            running.enter_context(server)
        except (RuntimeError, OSError) as error:
            raise failed(error) from None
        try:
            cells, left_out = _ask(plan, Client(server))
            return cells, left_out, {**about, **_origin(plan, server)}
        except NotAsked as error:
            raise ConfigError(f"{whose}: {error}") from None
        except OSError as error:  # it ended, or answered with an error
            raise failed(error) from None


def _ask(plan: Plan, client: Client) -> tuple[dict, list[dict]]:
    """Every task of every length: densely on a few items first, then all items at every keep."""
    from tqdm import tqdm

    from sts_sglang.evaluate import asking
    from sts_sglang.evaluate.items import GOOD_ENOUGH, LOSS

    cells: dict[tuple[str, int, float], Cell] = {}
    left_out = []
    rows = [(task, n) for n in plan.lengths for task in plan.tasks]
    for number, (task, n) in enumerate(rows, start=1):
        keeps = [*plan.keeps, asking.DENSE]
        own = [asking.Cell("sts", task, n, keep) for keep in keeps]

        def make(index, task=task, n=n):
            return plan.suite.make(task, n, index)

        if task != LOSS:
            count = min(FIRST_LOOK, plan.items)
            score = asking.dense_score(client, make, count, task, n, plan.concurrency)
            if score < GOOD_ENOUGH:
                left_out.append({"task": task, "length": n, "dense": round(score, 3)})
                _say(f"[{number}/{len(rows)}] {task} of {n:,} tokens: dense {score:.2f}, left out")
                continue
        name = f"[{number}/{len(rows)}] {task} of {n:,} tokens"
        with tqdm(total=plan.items * len(keeps), desc=name, mininterval=2) as bar:
            asking.measure(client, make, plan.items, own, plan.concurrency, bar.update)
        for cell in own:
            if not asking.verified_as_said(cell, some_full=bool(plan.config.get("full_verify_every"))):
                raise asking.NotAsked(
                    f"{task} of {n} tokens at keep {cell.keep:g} was verified as {cell.counters}; allowed: "
                    "lengths that a keep and the configuration's floor leave something out of"
                )
            cells[task, n, cell.keep] = cell
    return cells, left_out


def _recall(plan: Plan) -> dict[float, Recall]:
    """On a few windows of the texts, of the longest length that is asked."""
    from sts_sglang.evaluate import recall

    _say("running both models for the share of attention that is held")
    length, source = max(plan.lengths), plan.suite.source
    most = source.tails(length)
    texts = [source.window(length, number) for number in sorted({0, most // 2, most - 1})]
    config = StsConfig.parse({**plan.config, "budget": 0})
    try:
        ranks = _ranks(plan.server_args)
        return recall.measure(plan.known.pair, texts, config, plan.keeps, plan.device, ranks)
    except ConfigError as error:  # in calibrate's words, whose flag for the target is another
        raise ConfigError(str(error).replace("--model", "--target", 1)) from None


def report_of(
    plan: Plan, table: str, judged: list[Judged], left_out: list[dict], found: Judged | None
) -> str:
    """Markdown: the models, the table, what was left out, the verdict, and the command to serve with."""
    from sts_sglang.evaluate import gate, pair
    from sts_sglang.evaluate.items import LOSS

    models = plan.known.pair
    named = models.named()
    said = "{target} with {draft}, {algorithm}" if models.drafts else "{target} alone"
    lines = [f"{said.format(**named)}; texts {plan.suite.checksum}", ""]
    lines += [table, ""] if table else []
    lines += [
        f"left out, {row['task']} of {row['length']:,} tokens: dense attention scores {row['dense']:.2f}"
        for row in left_out
    ]
    if not judged:
        remedy = "ask with texts like those you serve, at other lengths, or for `text` as well"
        return "\n".join([*lines, f"nothing is shown, for dense attention does none of the tasks: {remedy}"])
    lines += [f"keep {j.keep:g} {gate.verdict(j)}: {'; '.join(j.problems)}" for j in judged if j.problems]
    if LOSS not in plan.tasks:
        lines.append(f"(`{LOSS}` was not asked for: what it loses, rule 1 of the gate, is not known)")
    if found is not None:
        lines.append(f"keep {found.keep:g} is the smallest that passes")
    if "budget" not in plan.config:
        floor, keep = StsConfig().budget, min(j.keep for j in judged) if found is None else found.keep
        lines.append(
            f"(measured without a floor; the default floor of {floor:,} tokens keeps more than {keep:g} of "
            f"contexts below {floor / keep:,.0f})"
        )
    if found is None:
        remedy = "serve without sts, or try other keeps, and the lengths that you serve"
        if any(not j.shown for j in judged):
            remedy = "more --items may show that one does; else " + remedy
        return "\n".join([*lines, f"no keep passes the gate: {remedy}"])
    extra = list(plan.server_args)
    if plan.known.bounded:  # SGLang asks the draft for as many positions as the target has
        extra = ["--context-length", str(plan.known.positions), *extra]
    line = pair.launch_line(models, {**plan.config, "keep": found.keep}, plan.device, extra)
    return "\n".join([*lines, f"serve with: {line}"])


def _config(given: str | None) -> dict[str, Any]:
    """What differs from the defaults. Raises ConfigError for what no keep can be judged with."""
    with _of_config():
        config, default = asdict(StsConfig.parse(given)), asdict(StsConfig())
    # Prefill: what is judged is verify, against a dense one over the same keys.
    for field, value in (("policy", "ratio"), ("verify", "sparse"), ("prefill", "dense")):
        if config[field] != value:
            raise ConfigError(
                f"--sts-config: {field} {shown(config[field])}; allowed: {value!r}, for only keep is judged"
            )
    said = {key: value for key, value in config.items() if value != default[key] and key != "keep"}
    if given is not None and "budget" in _keys(given):
        said["budget"] = config["budget"]
    return json.loads(json.dumps(said))


@contextmanager
def _of_config() -> Iterator[None]:
    """What is refused in here was given by --sts-config."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"--sts-config: {error}") from None


def _checked(config: dict[str, Any], models: Models, server_args: list[str]) -> StsConfig:
    """As the launch takes it, with the floor that is measured with. What only pages need the launch refuses
    itself: it knows whether a packaged map has directions."""
    from sts_sglang.evaluate import pair

    if config.get("head_map") is not None:
        models.paths().fingerprints()  # damaged files are not the fault of a map that is compared with them
    ranks = _ranks(server_args)
    with _of_config():
        served = StsConfig.parse({**UNBOUNDED, **config}).for_launch(models.drafts, directions=True)
        pair.check_map(models, served, ranks)
    return served


def _ranks(server_args: list[str]) -> int:
    """Tensor-parallel ones, by what goes to SGLang."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--tp-size", "--tensor-parallel-size", "--tp", type=int, default=1)
    try:
        ranks = parser.parse_known_args(server_args)[0].tp_size
    except argparse.ArgumentError as error:
        raise ConfigError(f"--server-args: {error}; allowed: SGLang's") from None
    if ranks not in RANKS:
        raise ConfigError(f"--server-args: --tp-size {ranks}; allowed: {' | '.join(map(str, RANKS))}")
    return ranks


def _check_floor(config: StsConfig, lengths: list[int]) -> None:
    """Whether something is left out of every context that is asked of, whatever the keep."""
    from sts_sglang.evaluate.items import shortest_context

    floor, context = max(config.budget, config.forced), shortest_context(lengths[0])
    if context <= floor:
        least = lengths[0] + floor + 1 - context
        raise ConfigError(
            f"--lengths: got {lengths[0]}, whose contexts of {context} tokens every keep attends to whole, "
            f"for --sts-config has a floor of {floor}; allowed: at least {least}, or a smaller floor"
        )


def _keys(given: str) -> set[str]:
    """The keys that a configuration names itself."""
    text = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
    return set(json.loads(text))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: got 'cuda'; allowed: cpu (no CUDA device here)")
    return name


def _count(flag: str, given: int | None, default: int, most: int) -> int:
    if given is not None and not 1 <= given <= most:
        raise ConfigError(f"{flag}: got {given}; allowed: an integer from 1 to {most}")
    return given or default


def _folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {path}: {reason}; allowed: a folder") from None
    for name in ("results.jsonl", "report.md", "server.log"):
        files.check_output("--out", folder / name)
    return folder


def _origin(plan: Plan, server: LocalServer) -> dict[str, Any]:
    import torch

    state = server.sts()
    state.pop("counters")
    return {
        "sts": state,
        "texts": plan.suite.checksum,
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "server": server.shown_command(),
    }


def _last_error(log: Path, error: Exception) -> str:
    """The last line of the log that speaks of an error, else what was raised."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if "Error" in line or "error:" in line or "Refusal" in line]
    return quoted(said[-1].strip() if said else str(error).splitlines()[0], 240)


def _write(path: Path, text: str) -> None:
    with files.replacing("--out", path) as partial:
        partial.write_text(text, encoding="utf-8")


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 90, initial_indent="  ", subsequent_indent="  ")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
