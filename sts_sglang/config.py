"""The configuration of STS: one frozen dataclass, its parser, and the budget rule.

Imports neither torch nor SGLang, so that the launcher can refuse a bad configuration at once.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, get_args

from sts_sglang import strict_json

if TYPE_CHECKING:
    from sts_kernels.layout import Rule

BACKEND = "sts"  # the name that a launch asks for
CHAIN_FLAGS = "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
ENV = "STS_CONFIG"
MAX_SOURCE = 64 * 1024  # bytes of a file, characters of a string
MAX_TOKENS = 2**24
MAX_LAYERS = 1024
# What `keep` "auto" stands for. Where the target's own queries select it is the least of 0.1, 0.25 and 0.5 at
# which they pass the gate of `sts-sglang evaluate`, with the default `budget`, on a model that nobody trained
# to be sparse.
KEEP, KEEP_OF_PAGES = 0.1, 0.5
# Rounds that go by one selection at most under `draft_refresh` "adaptive", that which made it included, and
# the share, in percent, of the tokens which rounds that score bring that the others must bring on average.
ADAPTIVE_ROUNDS, ADAPTIVE_PERCENT = 16, 80
# A selection is kept for no more tokens (layout.KEPT_TOKENS), and a round brings one at least.
MOST_REFRESH = 256
# `draft` "auto" is "all" with these, in chains of so many steps and down to such a keep: there it was
# measured to cost no answers, neither of the shipped pairs nor of a model that nobody trained to be sparse
# (benchmarks/REPORT.md, Sparse drafts).
SPARSE_ALGORITHMS, SPARSE_STEPS, SPARSE_KEEP = ("STANDALONE", "EAGLE3"), 3, 0.1
# What `spread` "auto" stands for: with heads whose steps are sparse it is more, and goes twice as far, since
# one layer finds less than a model does (there as well).
SPREAD, SPREAD_OF_HEADS = 0.5, 0.75
MOST_OVER = 64  # tokens that importance is passed on to (layout.MOST_OVER)
BRANCHES = 2  # places within a page where a request left the prefix that it shares; more are rare

Policy = Literal["ratio", "fixed", "top_p"]
PoolName = Literal["max", "mean"]
KernelName = Literal["auto", "flashinfer", "triton", "torch"]
DenseName = Literal["auto", "fa3", "flashinfer", "torch"]
HistoryMode = Literal["off", "warm", "blend"]
SelectorName = Literal["auto", "draft", "tokens", "pages", "joined", "quest", "recent", "random", "oracle"]
VerifyMode = Literal["sparse", "dense"]
DraftMode = Literal["auto", "dense", "extend", "steps", "all", "every"]
DraftKv = Literal["auto", "model", "fp8_e4m3"]
RequestKeep = Literal["any", "at_most", "off"]
PrefillMode = Literal["dense", "sparse"]
PrefillAttend = Literal["auto", "ops", "fa3"]
PrefillBy = Literal["auto", "target", "draft"]
PrefillDraft = Literal["dense", "sparse"]

# What goes by the scores that a draft leaves.
BY_SCORES = [("history", name) for name in ("warm", "blend")]
BY_SCORES += [("draft", name) for name in ("extend", "steps", "all", "every")]

# A share of a token below this is float error (0.1 * 30 = 3.0000000000000004), not a token.
# It exceeds the error of keep * context for every context up to 2**33 tokens.
CEIL_GUARD = 1e-6


class ConfigError(ValueError):
    """A configuration or request value that is not allowed: one line, field first, then what is."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def not_allowed(field: str, problem: str, allowed: str) -> ConfigError:
    return ConfigError(f"{field}: {problem}; allowed: {allowed}")


def _shower() -> reprlib.Repr:
    """`repr` that stops after a few levels and entries: a request may nest as deep as Python can recurse."""
    found = reprlib.Repr()
    found.maxlevel, found.maxdict, found.maxlist, found.maxtuple = 4, 8, 20, 20
    found.maxstring = found.maxlong = found.maxother = 400
    return found


_SHOWER = _shower()


def shown(value: object, longest: int = 80) -> str:
    """`value` for a message: one line, short, without control characters, however deep or large it is."""
    try:
        return one_line(_SHOWER.repr(value), longest)
    except Exception:  # an int beyond Python's limit of digits, or whatever a foreign __repr__ raises
        return f"a {type(value).__name__} too long to print"


def quoted(text: object, longest: int = 80) -> str:
    """Text of a user, a file or another library for a log line or a message: in quotes, so that it cannot be
    taken for ours, and in one line of printable characters."""
    try:
        return shown(str(text), longest)
    except Exception:
        return f"a {type(text).__name__} too long to print"


def one_line(text: object, longest: int | None = None) -> str:
    """Text with blanks for line breaks and escapes for what a terminal would act upon; cut if too long."""
    words = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return line if longest is None or len(line) <= longest else line[: longest - 3] + "..."


def _choice(options: tuple[str, ...]) -> Callable[[str, object], str]:
    def read(field: str, value: object) -> str:
        if not isinstance(value, str) or value not in options:
            raise not_allowed(field, f"got {shown(value)}", " | ".join(options))
        return value

    return read


def _flag(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise not_allowed(field, f"got {shown(value)}", "true or false")
    return value


def _integer(low: int, high: int) -> Callable[[str, object], int]:
    def read(field: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise not_allowed(field, f"got {shown(value)}", f"an integer from {low} to {high}")
        return int(value)

    return read


def _number(inside: Callable[[float], bool], allowed: str) -> Callable[[str, object], float]:
    def read(field: str, value: object) -> float:
        # A comparison is false for NaN, and is done before float(): a huge int does not fit one.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not inside(value):
            raise not_allowed(field, f"got {shown(value)}", allowed)
        return float(value)

    return read


_share = _number(lambda x: 0 < x <= 1, "a number above 0 and at most 1")
_keep = _number(lambda x: 0 < x <= 1, "a number above 0 and at most 1, or 'auto'")
_part = _number(lambda x: 0 <= x <= 1, "a number from 0 to 1, or 'auto'")
_inner = _number(lambda x: 0 < x < 1, "a number between 0 and 1")
# Between 0.999 and 1 float16 would round the change away, round after round.
_decay = _number(lambda x: 0 < x <= 0.999 or x == 1, "a number above 0 and at most 0.999, or 1")


def _auto_or(read: Callable[[str, object], float]) -> Callable[[str, object], float | str]:
    return lambda field, value: value if isinstance(value, str) and value == "auto" else read(field, value)


def _integer_or(word: str, low: int, high: int) -> Callable[[str, object], int | str]:
    integer = _integer(low, high)

    def read(field: str, value: object) -> int | str:
        if isinstance(value, str) and value == word:
            return value
        try:
            return integer(field, value)
        except ConfigError:
            allowed = f"an integer from {low} to {high}, or {word!r}"
            raise not_allowed(field, f"got {shown(value)}", allowed) from None

    return read


def _sink(field: str, value: object) -> int:
    if type(value) in (int, float) and value == 0:
        raise not_allowed(
            field,
            "got 0",
            f"an integer from 1 to {MAX_TOKENS} (the draft never scores position 0: it must be a sink)",
        )
    return _integer(1, MAX_TOKENS)(field, value)


def _layers(field: str, value: object) -> tuple[int, ...]:
    allowed = f"a list of different layer numbers from 0 to {MAX_LAYERS - 1}"
    if not isinstance(value, (list, tuple)):
        raise not_allowed(field, f"got {shown(value)}", allowed)
    read = _integer(0, MAX_LAYERS - 1)
    layers = tuple(sorted(read(f"{field}[{i}]", layer) for i, layer in enumerate(value)))
    if len(set(layers)) != len(layers):
        raise not_allowed(field, f"got {shown(value)}, a layer twice", allowed)
    return layers


def _path(allowed: str, longest: int) -> Callable[[str, object], str | None]:
    def read(field: str, value: object) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip() or len(value) > longest or "\0" in value:
            raise not_allowed(field, f"got {shown(value)}", allowed)
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            raise not_allowed(field, f"got {shown(value)}, which no file can be named", allowed) from None
        return value

    return read


def _digest(field: str, value: object) -> str | None:
    if value is not None and not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
        raise not_allowed(field, f"got {shown(value)}", "64 lower-case hex digits, or null for any map")
    return value


_READERS: dict[str, Callable[[str, object], object]] = {
    "policy": _choice(get_args(Policy)),
    "keep": _auto_or(_keep),
    "budget": _integer(0, MAX_TOKENS),
    "top_p": _share,
    "sink": _sink,
    "recent": _integer(1, MAX_TOKENS),
    "dense_layers": _layers,
    "spread": _auto_or(_part),
    "spread_over": _integer_or("auto", 1, MOST_OVER),
    "pool_rows": _choice(get_args(PoolName)),
    "pool_heads": _choice(get_args(PoolName)),
    "head_map": _path("the path of a head map file, or null for the proportional map", 4096),
    "head_map_sha256": _digest,
    "kernel": _choice(get_args(KernelName)),
    "dense": _choice(get_args(DenseName)),
    "history": _choice(get_args(HistoryMode)),
    "history_weight": _share,
    "history_decay": _decay,
    "selector": _choice(get_args(SelectorName)),
    "page_share": _inner,
    "verify": _choice(get_args(VerifyMode)),
    "draft": _choice(get_args(DraftMode)),
    "draft_refresh": _integer_or("adaptive", 1, MOST_REFRESH),
    "prefill": _choice(get_args(PrefillMode)),
    "prefill_keep": _share,
    "prefill_floor": _integer(0, MAX_TOKENS),
    "prefill_attend": _choice(get_args(PrefillAttend)),
    "prefill_by": _choice(get_args(PrefillBy)),
    "prefill_draft": _choice(get_args(PrefillDraft)),
    "draft_kv": _choice(get_args(DraftKv)),
    "full_verify_every": _integer(0, MAX_TOKENS),
    "stand_aside": _integer_or("auto", 0, MAX_TOKENS),
    "request_keep": _choice(get_args(RequestKeep)),
    "request_inspect": _flag,
    "inspect_dir": _path("the path of a folder for dumps, at most 512 characters, or null for none", 512),
}


@dataclass(frozen=True)
class StsConfig:
    """What STS keeps and how; every way of building one validates it (`ConfigError`).

    The budget is in context tokens of one (request, target layer, KV head); the tail being verified
    is attended besides and never counted. The rule is `budget_for`.
    """

    policy: Policy = "ratio"
    """`ratio`: keep a share of the context; `fixed`: `budget` tokens; `top_p`: the smallest set that holds
    `top_p` of the importance, at most `budget`."""
    keep: float | Literal["auto"] = "auto"
    """Share of the context to keep under `ratio`, 0 < keep <= 1; a request may set its own. auto: 0.1; by
    `pages` 0.5."""
    budget: int = 1024
    """Tokens: the floor under `ratio` (0 allowed), the budget of `fixed`, the cap of `top_p`."""
    top_p: float = 0.95
    """Importance to cover under `top_p`, 0 < top_p <= 1."""
    sink: int = 4
    """First tokens, always kept; at least 1, for the draft never scores target position 0."""
    recent: int = 64
    """Last context tokens, always kept."""
    dense_layers: tuple[int, ...] = ()
    """Target layers that attend to everything; a launch knows how many there are."""
    spread: float | Literal["auto"] = "auto"
    """Part of a token's score that the next token has at least. A row that attends to a token is often
    followed by one that attends to the token after it, and the last rows of a verify have no row of the draft
    that could say so. auto: 0.5, with the sparse steps of a head 0.75; with `draft_refresh` what it lacks
    of 1 is divided by the rounds that go by one selection. 0: none."""
    spread_over: int | Literal["auto"] = "auto"
    """Tokens that it is passed on to, each of them getting `spread` times what the one before got; auto: 1,
    or with sparse draft steps, where most rows of a verify have none of the draft, as many as it has, with a
    head twice as many, each times the rounds that go by one selection, and 64 at most."""
    pool_rows: PoolName = "max"
    """How the draft rows of a request become one score."""
    pool_heads: PoolName = "max"
    """How the draft heads mapped to one target KV head become one score."""
    head_map: str | None = None
    """Path of a head map file, relative to the working directory, read at launch; None: the packaged map
    of the shipped pair on one rank, or of its target alone, else the proportional one."""
    head_map_sha256: str | None = None
    """Refuse a head map file of another SHA-256. A launch fills it in: what it checked is what serves."""
    kernel: KernelName = "auto"
    """Kernels to run: `triton` on CUDA and `torch` on a CPU, unless said otherwise; `flashinfer` verifies by
    FlashInfer, on CUDA, for chains and the policies ratio and fixed."""
    dense: DenseName = "auto"
    """Backend of everything dense (prefill, draft-extend, dense layers); auto: fa3 where SGLang has it."""
    history: HistoryMode = "off"
    """What KV slots remember of earlier rounds, shared with whoever shares the prefix: unused, in the
    first verify of a request only, or in every verify."""
    history_weight: float = 0.05
    """Part of a remembered token's score that comes from history; the rest is this round's."""
    history_decay: float = 0.9
    """Factor on what a slot remembers, once in every round that touches it."""
    selector: SelectorName = "auto"
    """What scores the context. `draft` is STS; `tokens` the target's own queries, layer by layer, against
    short forms of all keys, on the directions that a head map brings; `pages` the same against the mean and
    deviation of the keys of pages of 16, which need no map; `joined` the draft and pages; `auto` the draft
    where there is one, else tokens where the map has directions, else pages. The others are for comparison,
    slow, in plain torch, from the target layer's own queries and keys: `oracle` its attention, `quest` bounds
    of pages of 16, `recent` nothing but sink and the last tokens, `random` chance."""
    page_share: float = 0.75
    """Part of every list that pages have under selector `joined`, 0 < page_share < 1; the draft's choice has
    the rest."""
    verify: VerifyMode = "sparse"
    """`dense`: draft and score as ever but attend to everything, which is stock's output."""
    draft: DraftMode = "auto"
    """What the draft itself attends to sparsely. `auto`: `all` where that was measured to cost no answers,
    which is in chains of three steps of a STANDALONE draft or an EAGLE-3 head that chooses alone, by policy
    `ratio` a tenth or more, without history, and else `dense`. `extend`: draft-extend alone, to what its
    round selected by all of its steps. `steps`: a round scores and selects the context in its first draft
    step; the steps after it attend to the selection, as verify does, and score nothing. `all`: so does
    draft-extend. `every`: and the first step, to the selection of the round before it and what came since; it
    then scores by the keys of the draft heads that speak, and reads no values."""
    draft_refresh: int | Literal["adaptive"] = 1
    """With a draft whose steps are sparse: every how many rounds of a request its context is scored and
    selected from anew. The rounds in between go by the latest selection and all tokens that came since, in
    the first draft step too. adaptive: when they bring less than 80 % of the tokens that rounds which score
    bring, and in every 16th."""
    prefill: PrefillMode = "dense"
    """`sparse`: every block of 128 new tokens of a long prompt attends to the blocks of 128 keys that some of
    its own queries give the most attention, in every layer and KV head anew; or the draft's, see
    `prefill_by`."""
    prefill_keep: float = 0.25
    """Share of the blocks of keys before them that new tokens attend to when prefill is sparse, 0 <
    prefill_keep <= 1; a request may set its own."""
    prefill_floor: int = 16384
    """Tokens: new ones attend to everything as long as they and what is before them are no more."""
    prefill_attend: PrefillAttend = "auto"
    """What attends to the selected blocks of keys when prefill is sparse: `ops`, those of `kernel`; `fa3`,
    which needs `dense` fa3, KV in the model's dtype and a GPU of compute capability 9; `auto` fa3 where that
    can be and was seen to say the same, in bf16 with heads of 64 and 128, unless kernel is torch."""
    prefill_by: PrefillBy = "auto"
    """Whose queries say what new tokens attend to when prefill is sparse. `target`: its own, layer by layer.
    `draft`, with STANDALONE alone: the draft reads a chunk before the target, and its attention selects for
    all layers at once through the head map. `auto`: the target's."""
    prefill_draft: PrefillDraft = "dense"
    """What the draft's own prefill attends to when prefill is sparse. `sparse`: as the target's, with the
    same share, to the blocks of keys that its own queries want, in every layer and KV head of it."""
    draft_kv: DraftKv = "auto"
    """What the draft's keys and values are kept as, whatever the target's are: the `model`'s dtype or
    `fp8_e4m3`, which halves what its passes over the context read; `auto` as SGLang's flags say."""
    full_verify_every: int = 0
    """Every N-th verify of a request attends to everything; 0: none does."""
    stand_aside: int | Literal["auto"] = "auto"
    """Tokens: while the contexts of a batch are no more together, they are attended to whole, by `dense`, and
    nothing is scored, selected or listed. 0: never. auto: on a GPU, where tokens or pages have a say, as many
    as have 256 MiB of keys and values in one layer; else 0."""
    request_keep: RequestKeep = "any"
    """What a request may ask for by `custom_params.sts.keep`: any; `at_most`: none above `keep`, whatever
    the policy, so that no client makes the others wait; `off`: nothing. What it may not is a 400. The same
    of `prefill` and `prefill_keep`."""
    request_inspect: bool = True
    """Whether requests may ask for dumps, where there is an inspect_dir; false: a 400."""
    inspect_dir: str | None = None
    """Folder for dumps of the importance of requests that ask for it, with their tokens; None: no dumps."""

    def __post_init__(self) -> None:
        for name, read in _READERS.items():
            object.__setattr__(self, name, read(f"sts_config.{name}", getattr(self, name)))
        if self.policy != "ratio" and self.budget == 0:
            raise not_allowed(
                "sts_config.budget",
                f"got 0 with policy {self.policy!r}",
                f"an integer from 1 to {MAX_TOKENS} (0 is for policy 'ratio')",
            )
        if self.policy == "fixed" and self.forced > self.budget:
            what = "sink + recent" + (", in whole pages," if self.selector == "pages" else "")
            raise not_allowed(
                "sts_config.budget",
                f"got {self.budget} with policy 'fixed', below {what} = {self.forced}",
                "a budget of at least sink + recent, which are always kept",
            )
        if not self.by_draft:
            self._check_selector()
        if self.keeps_selections:
            self._check_refresh()
        if self.stand_aside not in ("auto", 0) and (barred := self.bars_standing_aside()) is not None:
            field, why, instead = barred
            problem = f"got {self.stand_aside} with {field} {getattr(self, field)!r}, {why}"
            raise not_allowed("sts_config.stand_aside", problem, f"'auto', 0, or {instead}")
        for field, value in (("prefill_draft", "sparse"), ("prefill_by", "draft")):
            if getattr(self, field) == value and self.prefill == "dense":
                problem, default = f"got {value!r} with prefill 'dense'", getattr(StsConfig, field)
                raise not_allowed(f"sts_config.{field}", problem, f"{default!r}, or prefill 'sparse'")

    def bars_standing_aside(self) -> tuple[str, str, str] | None:
        """The field that wants scores where a batch that stands aside has none, why, and what to set instead;
        None where there is none."""
        wants = (
            ("verify", self.verify == "dense", "which attends to everything anyway", "verify 'sparse'"),
            ("history", self.history != "off", "which remembers the scores of every round", "history 'off'"),
            ("draft", self.sparse_draft, "whose passes go by the round's selection", "draft 'dense'"),
            ("inspect_dir", self.inspect_dir is not None, "whose dumps are of scores", "no inspect_dir"),
        )
        return next(((field, why, instead) for field, wanted, why, instead in wants if wanted), None)

    def _check_selector(self) -> None:
        """What only the draft's scores can do: be a mass, be remembered, and be there before verify; and what
        those that compare are spared."""
        unserved = [("policy", "top_p")]
        if self.selector != "joined":
            unserved += BY_SCORES
        for field, value in unserved:
            if getattr(self, field) == value:
                raise not_allowed(
                    "sts_config.selector",
                    f"got {self.selector!r} with {field} {value!r}",
                    f"'draft' with {field} {value!r}, or another {field}",
                )
        if self.inspect_dir is not None and not self.by_sketches:
            problem = f"got {self.selector!r} with an inspect_dir"
            raise not_allowed(
                "sts_config.selector", problem, "auto | draft | tokens | pages | joined, or no inspect_dir"
            )

    def _check_refresh(self) -> None:
        """What needs the scores of every round, or lists as long as the budget says."""
        unserved = [
            (
                not self.sparse_steps,
                f"draft {self.draft!r}: only a selection of sparse steps is kept, and steps that are dense, "
                "as those of 'auto' may be, score in every round anyway",
                "or draft 'steps', 'all' or 'every' of a launch with a draft",
            ),
            (
                self.selector == "joined",
                "selector 'joined', whose selections are not kept",
                "or another one",
            ),
            (
                self.draft_refresh != 1 and self.kernel == "flashinfer",
                "kernel 'flashinfer', which plans for lists no longer than the budget",
                "or another kernel",
            ),
            (
                self.draft_refresh != 1 and self.inspect_dir is not None and self.history == "off",
                "an inspect_dir and history 'off', where a dump has the scores of the last round",
                "with history 'warm' or 'blend', or no inspect_dir",
            ),
        ]
        for wrong, what, instead in unserved:
            if wrong:
                field, other = ("draft", "'all'") if self.draft_refresh == 1 else ("draft_refresh", "1")
                problem = f"got {getattr(self, field)!r} with {what}"
                raise not_allowed(f"sts_config.{field}", problem, f"{other}, {instead}")

    def for_launch(self, drafts: bool, directions: bool = False) -> StsConfig:
        """With the selector and the keep that `auto` stands for, with or without a draft, and with or without
        directions of keys in the head map. Raises `ConfigError` for what needs a draft."""
        if not drafts:
            self._check_alone()
        own = "draft" if drafts else "tokens" if directions else "pages"
        chosen = replace(self, selector=own) if self.selector == "auto" else self
        return replace(chosen, keep=chosen.share)

    def for_draft(self, algorithm: str, num_steps: int, topk: int) -> StsConfig:
        """With what `auto` stands for in `draft`, `spread` and `spread_over`, given SGLang's flags."""
        chosen = self
        if self.draft == "auto":
            asked = algorithm in SPARSE_ALGORITHMS and topk == 1 and num_steps == SPARSE_STEPS
            chosen = replace(self, draft="all" if asked and self._keeps_as_asked else "dense")
        auto = chosen._auto_spread(algorithm, num_steps)
        return replace(chosen, **{key: value for key, value in auto.items() if getattr(self, key) == "auto"})

    def _auto_spread(self, algorithm: str, num_steps: int) -> dict[str, float | int]:
        """What `spread` and `spread_over` "auto" stand for. Rounds that go by one selection read on where the
        one before ended, so that it goes as many times as far, and loses so much less from token to token."""
        if not self.sparse_steps:
            return {"spread": SPREAD, "spread_over": 1}
        rows, (rounds, _) = num_steps + 1, self.refresh
        spread, over = (SPREAD, rows) if algorithm == "STANDALONE" else (SPREAD_OF_HEADS, 2 * rows)
        over = min(over, MOST_OVER)
        further = min(over * rounds, MOST_OVER)
        return {"spread": round(1 - (1 - spread) * over / further, 3), "spread_over": further}

    @property
    def _keeps_as_asked(self) -> bool:
        """Whether verify keeps what it kept when sparse drafts were asked for answers. Another selector, or a
        batch that stands aside, has no selection for them in time."""
        alone = self.by_draft and self.verify == "sparse" and self.stand_aside in ("auto", 0)
        return alone and self.history == "off" and self.policy == "ratio" and self.share >= SPARSE_KEEP

    def _check_alone(self) -> None:
        """Raises `ConfigError` for what needs a draft."""
        needs = [("selector", "draft"), ("selector", "joined"), ("policy", "top_p"), *BY_SCORES]
        needs += [("draft_kv", "model"), ("draft_kv", "fp8_e4m3"), ("prefill_by", "draft")]
        needs += [("prefill_draft", "sparse")]
        for field, value in needs:
            if getattr(self, field) == value:
                what = {"draft_kv": "keys", "prefill_draft": "layers"}.get(field, "scores")
                raise not_allowed(
                    f"sts_config.{field}",
                    f"got {value!r} without --speculative-algorithm, and only a draft's {what} can do that",
                    f"{getattr(StsConfig, field)!r}, or a draft",
                )

    def dense_verify(self, layer: int) -> bool:
        """Whether a target layer attends to everything in every verify."""
        return self.verify == "dense" or layer in self.dense_layers

    @property
    def some_dense_verify(self) -> bool:
        """Whether any layer does."""
        return self.verify == "dense" or bool(self.dense_layers)

    @property
    def by_draft(self) -> bool:
        """Whether the draft's choice is all there is."""
        return self.selector in ("auto", "draft")

    @property
    def hears_draft(self) -> bool:
        """Whether the draft's attention has a say in what is selected."""
        return self.by_draft or self.selector == "joined"

    @property
    def by_pages(self) -> bool:
        """Whether sketches of pages have a say in what is selected."""
        return self.selector in ("pages", "joined")

    @property
    def by_sketches(self) -> bool:
        """Whether sketches of any kind have."""
        return self.by_pages or self.selector == "tokens"

    @property
    def share(self) -> float:
        """`keep`, or what `auto` stands for with this selector."""
        if self.keep != "auto":
            return self.keep
        return KEEP_OF_PAGES if self.selector == "pages" else KEEP

    @property
    def forced(self) -> int:
        """Tokens that every list has: sink and recent. Where pages alone are selected, whole pages of them,
        what is after the last complete page, and some whose sketch another branch took."""
        if self.selector != "pages":
            return self.sink + self.recent
        from sts_kernels.layout import PAGE, pages_of  # imports torch

        return PAGE * (pages_of(self.sink) + pages_of(self.recent) + BRANCHES) + PAGE - 1

    @property
    def prefill_selector(self) -> Literal["target", "draft"]:
        """Who selects in a sparse prefill: `prefill_by`, or what `auto` stands for."""
        return "target" if self.prefill_by == "auto" else self.prefill_by

    @property
    def prefills_by_draft(self) -> bool:
        """Whether the draft's attention selects for new tokens."""
        return self.prefill == "sparse" and self.prefill_selector == "draft"

    @property
    def prefills_draft(self) -> bool:
        """Whether the draft's own prefill attends to selections."""
        return self.prefill_draft == "sparse"

    @property
    def sparse_draft(self) -> bool:
        """Whether a pass of the draft attends to a selection."""
        return self.draft not in ("auto", "dense")

    @property
    def sparse_steps(self) -> bool:
        """Whether decode steps of the draft attend to the selection of their round, made after the first."""
        return self.draft in ("steps", "all", "every")

    @property
    def passed_on(self) -> tuple[float, int]:
        """`factor` and `over` of `sts_kernels.torch_ops.spread_importance`; `auto` as with a dense draft."""
        factor = SPREAD if self.spread == "auto" else self.spread
        return factor, 1 if self.spread_over == "auto" else self.spread_over

    @property
    def keeps_selections(self) -> bool:
        """Whether a round, or its first step, may go by the selection of an earlier one."""
        return self.draft_refresh != 1 or self.draft == "every"

    @property
    def sparse_extend(self) -> bool:
        """Whether draft-extend attends to the selection of its round."""
        return self.draft in ("extend", "all", "every")

    @property
    def refresh(self) -> tuple[int, int | None]:
        """`every` and `percent` of `sts_kernels.torch_ops.size_kept`."""
        if self.draft_refresh == "adaptive":
            return ADAPTIVE_ROUNDS, ADAPTIVE_PERCENT
        return self.draft_refresh, None

    @classmethod
    def parse(cls, source: str | os.PathLike[str] | Mapping[str, object] | StsConfig | None) -> StsConfig:
        """Reads a mapping, inline JSON (a string that starts with `{`) or a JSON file; None is the default.

        Raises `ConfigError` for everything else, and for a file or string above 64 KiB.
        """
        if source is None:
            return cls()
        if isinstance(source, StsConfig):
            return source
        if isinstance(source, str) and source.lstrip().startswith("{"):
            source = _load(source)
        elif isinstance(source, (str, os.PathLike)):
            source = _load(_read_file(os.fsdecode(source)))
        if not isinstance(source, Mapping):
            raise not_allowed("sts_config", f"got {shown(source)}", "a JSON object or the path of one")
        for key in source:
            _check_key("sts_config", key, tuple(_READERS))
        return cls(**source)

    @classmethod
    def resolve(
        cls,
        given: str | os.PathLike[str] | Mapping[str, object] | StsConfig | None,
        environ: Mapping[str, str],
    ) -> StsConfig:
        """The flag or argument if given, else `STS_CONFIG` of `environ` (blank: unset), else the default."""
        from_environ = environ.get(ENV, "").strip()
        if given is not None or not from_environ:
            return cls.parse(given)
        try:
            return cls.parse(from_environ)
        except ConfigError as error:
            # The user may not know that the variable is set: say where the value comes from.
            error.args = (f"{error} (read from the environment variable {ENV})",)
            raise

    @classmethod
    def of_launch(cls) -> StsConfig:
        """In a scheduler process: what the launcher resolved and left in the environment.

        Raises `ConfigError` where no launcher did.
        """
        if (left := os.environ.get(ENV)) is None:
            raise not_allowed(
                ENV, "not set, so nobody checked this launch", "what a launch with sts sets itself"
            )
        return cls.parse(left)

    def to_json(self) -> str:
        """Canonical JSON: every field, sorted, no spaces. `parse` gives an equal configuration back."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def check_layers(self, num_layers: int) -> None:
        """Raises `ConfigError` if `dense_layers` names a layer that a target of `num_layers` lacks."""
        if self.dense_layers and self.dense_layers[-1] >= num_layers:
            raise not_allowed(
                "sts_config.dense_layers",
                f"got layer {self.dense_layers[-1]}, but the target has {num_layers} layers",
                f"layer numbers from 0 to {num_layers - 1}",
            )

    def budget_for(self, context: int, keep: float | None = None) -> int:
        """Tokens K to select from `context` tokens: min(context, max(floor, forced, n)).

        n is ceil(keep * context) under `ratio`, whose floor is `budget`; `budget` under `fixed` and,
        as the cap of the top-p set, under `top_p`, whose floor is 0. A request's own `keep` makes n
        ceil(keep * context) under every policy. `keep` 1 is always the whole context.
        """
        floor = self.budget if self.policy == "ratio" else 0
        if keep is None and self.policy != "ratio":
            wanted = self.budget
        else:
            wanted = math.ceil((self.share if keep is None else keep) * context - CEIL_GUARD)
        return min(context, max(floor, self.forced, wanted))

    def rule(self) -> Rule:
        """`budget_for` as the ops take it, for many requests at once on the device."""
        from sts_kernels.layout import Rule  # imports torch

        ratio, forced = self.policy == "ratio", self.forced
        least = max(self.budget if ratio else 0, forced)
        return Rule(self.share if ratio else None, self.budget, least, forced, CEIL_GUARD)


def request_keep(custom_params: Mapping[str, object] | None, config: StsConfig | None = None) -> float | None:
    """The keep that a request asks for in `sampling_params.custom_params`: `{"sts": {"keep": 0.5}}`.

    None when it asks for none. Keys beside `sts` belong to others and are ignored. Raises `ConfigError`
    for a keep outside 0 < keep <= 1, another type, an unknown key under `sts`, or a keep that the server's
    `config`, when given, does not leave to requests.
    """
    own = _request_params(custom_params)
    if "keep" not in own:
        return None
    field, keep = "custom_params.sts.keep", _share("custom_params.sts.keep", own["keep"])
    rule = "any" if config is None else config.request_keep
    if rule == "off":
        raise not_allowed(
            field, "this server lets no request choose", "no keep (sts_config.request_keep is 'off')"
        )
    if rule == "at_most" and keep > config.share:
        most = f"at most this server's {config.share} (sts_config.request_keep is 'at_most')"
        raise not_allowed(field, f"got {shown(keep)}", most)
    return keep


def request_prefill(custom_params: Mapping[str, object] | None, config: StsConfig) -> float | None:
    """Which share of the blocks of keys a request's prompt attends to, None for a dense prefill: the
    server's, or what it asks for by `{"sts": {"prefill": "sparse", "prefill_keep": 0.5}}`, each alone too.

    Raises `ConfigError` for other values, a share beside "dense", and for what this server does not do or
    does not leave to requests.
    """
    own, field = _request_params(custom_params), "custom_params.sts.prefill"
    mode = _choice(get_args(PrefillMode))(field, own.get("prefill", config.prefill))
    keep = _share(f"{field}_keep", own.get("prefill_keep", config.prefill_keep))
    asks = "prefill_keep" if "prefill_keep" in own else "prefill"
    if asks not in own:
        return None if mode == "dense" else keep
    if config.prefill == "dense" and (mode == "sparse" or "prefill_keep" in own):
        allowed = "'dense', or a server with sts_config.prefill 'sparse'"
        raise not_allowed(f"custom_params.sts.{asks}", "this server prefills densely", allowed)
    if mode == "dense" and "prefill_keep" in own:
        raise not_allowed(
            f"{field}_keep", "given with prefill 'dense'", "prefill 'sparse', or no prefill_keep"
        )
    if config.request_keep == "off":
        raise not_allowed(
            f"custom_params.sts.{asks}",
            "this server lets no request choose",
            "neither prefill nor prefill_keep (sts_config.request_keep is 'off')",
        )
    if (
        config.request_keep == "at_most"
        and config.prefill == "sparse"
        and (mode == "dense" or keep > config.prefill_keep)
    ):
        most = f"at most this server's {config.prefill_keep}" if asks == "prefill_keep" else "'sparse'"
        most += " (sts_config.request_keep is 'at_most')"
        raise not_allowed(f"custom_params.sts.{asks}", f"got {shown(own[asks])}", most)
    return None if mode == "dense" else keep


def request_inspect(custom_params: Mapping[str, object] | None, config: StsConfig | None = None) -> bool:
    """Whether a request asks for a dump: `{"sts": {"inspect": true}}`.

    Raises `ConfigError` for another type, or when the server's `config`, when given, allows none.
    """
    field = "custom_params.sts.inspect"
    wanted = _flag(field, _request_params(custom_params).get("inspect", False))
    if not wanted or config is None:
        return wanted
    if config.inspect_dir is None:
        allowed = "false, or a server with sts_config.inspect_dir set to a folder"
        raise not_allowed(field, "this server writes no dumps", allowed)
    if not config.request_inspect:
        raise not_allowed(
            field, "this server dumps for no request", "false (sts_config.request_inspect is false)"
        )
    return wanted


def check_request(custom_params: Mapping[str, object] | None, config: StsConfig) -> None:
    """Raises `ConfigError` for what a request may not ask of a server with this configuration."""
    request_keep(custom_params, config)
    request_prefill(custom_params, config)
    request_inspect(custom_params, config)


def _request_params(custom_params: Mapping[str, object] | None) -> Mapping[str, object]:
    if custom_params is None:
        return {}
    if not isinstance(custom_params, Mapping):
        raise not_allowed("custom_params", f"got {shown(custom_params)}", "an object")
    if "sts" not in custom_params:
        return {}
    own = custom_params["sts"]
    if not isinstance(own, Mapping):
        raise not_allowed("custom_params.sts", f"got {shown(own)}", 'an object such as {"keep": 0.5}')
    for key in own:
        _check_key("custom_params.sts", key, ("keep", "prefill", "prefill_keep", "inspect"))
    return own


def _check_key(field: str, key: object, allowed: tuple[str, ...]) -> None:
    if isinstance(key, str) and key in allowed:
        return
    nearest = difflib.get_close_matches(key[:40] if isinstance(key, str) else "", allowed, n=1, cutoff=0.7)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    raise not_allowed(field, f"unknown key {shown(key, 48)}{hint}", ", ".join(allowed))


def _read_file(path: str) -> str:
    field = f"sts_config (file {shown(path)})"
    allowed = f"inline JSON that starts with '{{', or a UTF-8 JSON file of at most {MAX_SOURCE} bytes"
    try:
        # Non-blocking, so that a FIFO without a writer is refused below instead of waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise not_allowed(field, "not a regular file", allowed)
            if status.st_size > MAX_SOURCE:
                raise not_allowed(field, f"{status.st_size} bytes", allowed)
            return file.read(MAX_SOURCE + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_allowed(field, f"not UTF-8 at byte {error.start}", allowed) from None
    except OSError as error:
        raise not_allowed(field, f"cannot be read ({error.strerror})", allowed) from None
    except ConfigError:
        raise
    except ValueError as error:
        raise not_allowed(field, f"not a path ({error})", allowed) from None


def _load(text: str) -> object:
    allowed = f"one JSON object of at most {MAX_SOURCE} characters"
    if len(text) > MAX_SOURCE:
        raise not_allowed("sts_config", f"{len(text)} characters", allowed)
    try:
        return strict_json.loads(text, _repeated, _constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise not_allowed("sts_config", f"not JSON ({error.msg}, {where})", allowed) from None
    except ConfigError:
        raise
    except RecursionError:
        raise not_allowed("sts_config", "nested too deeply", allowed) from None
    except ValueError:
        raise not_allowed("sts_config", "holds a number with too many digits", allowed) from None


def _repeated(key: str) -> ConfigError:
    return not_allowed("sts_config", f"key {shown(key)} appears twice", "each key once")


def _constant(name: str) -> ConfigError:
    return not_allowed("sts_config", f"holds {name}, which JSON does not have", "finite numbers")


assert set(_READERS) == {field.name for field in fields(StsConfig)}
