"""Head map: which draft (layer, query head) speaks for which target (layer, KV head)."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import struct
from collections import Counter
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sts_sglang import fingerprint, strict_json
from sts_sglang.config import MAX_TOKENS, ConfigError, StsConfig, not_allowed, one_line, shown

MAP_VERSION = 1
# What the draft's key at an index is about, in the format of a map file: the target's token one further on,
# as the kernels have it (sts_kernels.layout.SHIFT, which the launcher does not load torch for).
MAP_SHIFT = 1
MAX_FILE_BYTES = 64 << 20  # directions of 1,600 heads of 128 dimensions take 36 MB
MAX_SOURCES = (
    64  # draft heads of one target head, repetitions counted; a map of every draft head may have more
)
MAX_TEXTS = 1024
RANKS = (1, 2, 4, 8)  # tensor-parallel launches that are served
LATEST = "latest"  # in place of sources: the head selects the last tokens, whatever the draft says
POOLS = ("max", "mean")
MAX_SHARE = 1000.0
DIMS_EACH = 2  # dimensions of a head for each of its directions
DIMS_STEP = 2 * DIMS_EACH  # what a head with directions has a multiple of: the number of these is even
HEAD_DIMS = (16, 1024)  # of heads that have directions
SPLIT_STEPS = 64  # keeps at which a split budget is worked out; in between it is interpolated

MAPS = Path(__file__).parent / "maps"
FIELDS = (
    "version",
    "shift",
    "tp",
    "target",
    "draft",
    "fingerprints",
    "sources",
    "pool",
    "shares",
    "dense_layers",
    "directions",
    "best",
    "texts",
    "settings",
)
# Of a map of a target alone.
ALONE = tuple(field for field in FIELDS if field not in ("shift", "sources", "pool", "best"))

Source = tuple[int, int]  # (draft layer, draft query head)


class HeadCounts(NamedTuple):
    """Attention shape of one model; `kv_heads` of a draft is not used by the map."""

    layers: int
    q_heads: int
    kv_heads: int

    def of_rank(self, ranks: int) -> HeadCounts:
        """What one of so many tensor-parallel ranks has; several have the same KV head where there are fewer
        of them (sglang.srt.layers.linear.QKVParallelLinear)."""
        return HeadCounts(self.layers, self.q_heads // ranks, max(1, self.kv_heads // ranks))

    def ranks_of(self, kv_head: int, ranks: int) -> range:
        """Those of so many ranks that have this KV head: one, or several where there are fewer heads."""
        first = kv_head * ranks // self.kv_heads
        return range(first, first + max(1, ranks // self.kv_heads))

    def shared_evenly(self, ranks: int) -> bool:
        """Whether so many ranks can share the heads out."""
        return not (self.q_heads % ranks or (self.kv_heads % ranks and ranks % self.kv_heads))


def directions_of(head_dim: int) -> int:
    """How many directions the keys of a head of so many dimensions have, 0 where it has none."""
    low, high = HEAD_DIMS
    return head_dim // DIMS_EACH if low <= head_dim <= high and head_dim % DIMS_STEP == 0 else 0


class Directions(NamedTuple):
    """What keys of the target are written in short by: few directions, along which they differ most.

    heads: [target layer][target KV head], float16, little-endian, [head_dim + 2, number] by rows: orthonormal
    columns in head_dim rows, then where the mean of the keys lies along each, then the step that a key's
    place is counted in from there, above zero. Keys are those of the KV pool, after positions and norms.
    """

    head_dim: int
    number: int
    heads: tuple[tuple[bytes, ...], ...]

    def to_field(self) -> dict[str, Any]:
        """As in a map file."""
        heads = [[base64.b64encode(own).decode() for own in layer] for layer in self.heads]
        return {"head_dim": self.head_dim, "number": self.number, "heads": heads}


class ModelPaths(NamedTuple):
    """Folders or hub names of a pair, or of a target alone, for their fingerprints."""

    target: str
    draft: str | None
    target_revision: str | None = None
    draft_revision: str | None = None

    def fingerprints(self) -> dict[str, dict[str, str] | None]:
        """By model; None for one whose weights are not here."""
        found = {"target": fingerprint.of_model(self.target, self.target_revision)}
        if self.draft is not None:
            found["draft"] = fingerprint.of_model(self.draft, self.draft_revision)
        return found

    def are_folders(self) -> bool:
        return os.path.isdir(self.target) and (self.draft is None or os.path.isdir(self.draft))


@dataclass(frozen=True)
class HeadMap:
    """sources[target layer][target KV head] = the draft heads whose importance it selects by.

    Two (layer, KV head) pairs with the same sources share a *channel*: one importance row, one
    selection, one index list. A source that stands twice weighs twice under pool "mean". No source:
    importance stays equal everywhere, so that the latest tokens win. A map of a target alone has none, and
    says how long the lists of its heads are.

    pool: how rows and heads are to be pooled, None to leave it to the configuration.
    shares: of the budget, [target layer][target KV head]: a head with twice the share of another selects
    twice as many tokens, all of them together as many as without. Channels are then by share as well.
    dense_layers: target layers that are not to be sparse, besides the configuration's.
    draft: with it every KV head of the draft has a channel too, see `of_draft`.
    sha256: of the file, None for one that was made here.
    whole: the shares of all ranks' heads, over which a budget is split, where this is one rank's map.
    directions: of the target's keys, None of a map that has none. Maps are compared without them: they say
    nothing about channels.
    """

    sources: tuple[tuple[tuple[Source, ...], ...], ...]
    origin: str
    pool: Literal["max", "mean"] | None = None
    dense_layers: tuple[int, ...] = ()
    shares: tuple[tuple[float, ...], ...] | None = None
    draft: HeadCounts | None = None
    sha256: str | None = None
    whole: tuple[tuple[float, ...], ...] | None = None
    directions: Directions | None = dataclass_field(default=None, compare=False, repr=False)

    @cached_property
    def _by_channel(self) -> dict[tuple[tuple[Source, ...], float], int]:
        """Distinct (sources, share) in order of first use: how many heads have them."""
        found: dict[tuple[tuple[Source, ...], float], int] = {}
        for layer in range(len(self.sources)):
            for key in self._keys(layer):
                found[key] = found.get(key, 0) + 1
        for own in self._own_sources():
            if not any(_within(sources, own) for sources, _ in found):
                found[own, 1.0] = 0  # serves no target head
        return found

    def _own_sources(self) -> list[tuple[Source, ...]]:
        """Query heads of every (layer, KV head) of the draft."""
        if self.draft is None:
            return []
        group = self.draft.q_heads // self.draft.kv_heads
        heads = [range(h * group, (h + 1) * group) for h in range(self.draft.kv_heads)]
        return [tuple((i, head) for head in own) for i in range(self.draft.layers) for own in heads]

    def of_draft(self) -> list[list[int]]:
        """Channel of every KV head of every draft layer: one that only its own query heads speak for. Empty
        without `draft`."""
        if self.draft is None:
            return []
        channels = [
            next(i for i, sources in enumerate(self.channels) if _within(sources, own))
            for own in self._own_sources()
        ]
        heads = self.draft.kv_heads
        return [channels[i : i + heads] for i in range(0, len(channels), heads)]

    def _keys(self, layer: int) -> list[tuple[tuple[Source, ...], float]]:
        shares = self.shares[layer] if self.shares else [1.0] * len(self.sources[layer])
        return list(zip(self.sources[layer], shares, strict=True))

    @cached_property
    def channels(self) -> tuple[tuple[Source, ...], ...]:
        """Sources of each channel."""
        return tuple(sources for sources, _ in self._by_channel)

    def head_channels(self, layer: int) -> list[int]:
        """Channel of every KV head of a target layer."""
        index = {key: i for i, key in enumerate(self._by_channel)}
        return [index[key] for key in self._keys(layer)]

    def split(self) -> list[list[float]] | None:
        """[SPLIT_STEPS + 1][channel]: part of the context that a channel keeps when all keep i / SPLIT_STEPS.

        In proportion to the shares as long as no head has its whole context; what such heads cannot use
        goes to the others, so that the mean over heads is the keep. None without shares.
        """
        return self._split

    @cached_property
    def _split(self) -> list[list[float]] | None:
        if self.shares is None:
            return None
        return [self._parts(i / SPLIT_STEPS) for i in range(SPLIT_STEPS + 1)]

    def list_growth(self) -> float:
        """How much longer the lists of all channels are together, at most and at whatever keep, than with the
        same budget for every head: a budget is split over heads, and a channel of a large share may serve few
        of them. At least 1."""
        if self.shares is None:
            return 1.0
        # Between two steps parts are interpolated, so that the ratio is largest at one of them.
        means = [sum(parts) / len(parts) for parts in self.split()[1:]]
        return max(1.0, *(mean * SPLIT_STEPS / step for step, mean in enumerate(means, 1)))

    def longest_growth(self) -> float:
        """How much longer the longest list is, at most and at whatever keep, than with the same budget for
        every head. At least 1."""
        if self.shares is None:
            return 1.0
        longest = (max(parts) * SPLIT_STEPS / step for step, parts in enumerate(self.split()[1:], 1))
        return max(1.0, *longest)

    def _parts(self, keep: float) -> list[float]:
        """Of each channel: min(1, s * share) for the s at which their mean over all heads is `keep`."""
        low, high = 0.0, 1.0 / min(*self._heads_by_share, *(share for _, share in self._by_channel))
        for _ in range(60):
            s = (low + high) / 2
            mean = sum(n * min(1.0, s * share) for share, n in self._heads_by_share.items())
            low, high = (s, high) if mean < keep * self._heads_by_share.total() else (low, s)
        return [min(1.0, high * share) for _, share in self._by_channel]

    @cached_property
    def _heads_by_share(self) -> Counter[float]:
        """How many heads have a share, of all ranks."""
        return Counter(share for layer in self.whole or self.shares for share in layer)

    def of_rank(self, rank: int, ranks: int, target: HeadCounts, draft: HeadCounts | None) -> HeadMap:
        """This map for the heads of one of so many ranks, numbered as the rank numbers them.

        target, draft: of whole models. A head listens to those draft heads that its rank has (see `foreign`).
        """
        if ranks == 1:
            return self
        own, first = target.of_rank(ranks).kv_heads, rank * target.kv_heads // ranks
        heads = slice(first, first + own)
        group = draft.q_heads // ranks if draft else 0
        sources = tuple(
            tuple(
                tuple(
                    (layer, q - rank * group) for layer, q in head if rank * group <= q < (rank + 1) * group
                )
                for head in of_layer[heads]
            )
            for of_layer in self.sources
        )
        shares = self.shares and tuple(of_layer[heads] for of_layer in self.shares)
        directions = self.directions and self.directions._replace(
            heads=tuple(of_layer[heads] for of_layer in self.directions.heads)
        )
        own_draft = self.draft and self.draft.of_rank(ranks)
        own = replace(self, sources=sources, shares=shares, draft=own_draft, whole=self.shares)
        return replace(own, directions=directions)


def _within(sources: tuple[Source, ...], own: tuple[Source, ...]) -> bool:
    """Whether a channel selects by some of these heads and by no other."""
    return bool(sources) and set(sources) <= set(own)


def of_config(
    config: StsConfig,
    target: HeadCounts,
    draft: HeadCounts | None,
    models: ModelPaths | None = None,
    tp: int = 1,
) -> HeadMap:
    """The configured map for this pair, else the packaged map made for it, else the proportional default.
    Where nothing goes by what the draft attends to, a map of the target alone will do. On several ranks a
    pair has of its packaged map what holds for any of them, the directions of the target's keys.

    `draft`: None without one, where a map only splits the budget. `models`: where the weights are; without it
    fingerprints are not compared and no packaged map is used. `tp`: tensor-parallel ranks; the map is of all
    of them (HeadMap.of_rank).

    Raises:
        ConfigError: the map does not fit the pair, or joins draft layers while the pools differ.
    """
    deaf = draft is not None and not config.hears_draft and not config.prefills_by_draft
    if config.head_map and deaf and is_alone(config.head_map):
        of_target = models and models._replace(draft=None, draft_revision=None)
        head_map = load(config.head_map, target, None, of_target, tp)
        head_map = replace(head_map, sources=proportional(target, draft).sources)
    elif config.head_map:
        head_map = load(config.head_map, target, draft, models, tp)
    else:
        default = undrafted(target) if draft is None else proportional(target, draft)
        head_map = packaged(config, target, draft, models, tp) or default
    # Without the models' folders no packaged map is looked for, so that none can be missed.
    if config.head_map or models is not None:
        _check_file(config, head_map)
    if conflict := _conflict(head_map, config):
        raise conflict
    return replace(head_map, draft=draft) if config.sparse_draft else head_map


def _check_file(config: StsConfig, head_map: HeadMap) -> None:
    if config.head_map_sha256 not in (None, head_map.sha256):
        raise ConfigError(
            f"sts_config.head_map_sha256: {_short(head_map.origin)} has {head_map.sha256}, it changed "
            f"since it was chosen; allowed: the file with {config.head_map_sha256}, or another launch"
        )


def check_directions(config: StsConfig, head_map: HeadMap, head_dim: int) -> None:
    """Raises `ConfigError` where tokens are to be selected and the map has no directions of the keys of a
    target with such heads."""
    if config.selector != "tokens":
        return
    if (found := head_map.directions) is None:
        raise not_allowed(
            "sts_config.selector",
            f"got 'tokens' with {_short(head_map.origin)}, which has no directions of keys",
            "a head_map that `sts-sglang calibrate` made for this target, or another selector",
        )
    if found.head_dim != head_dim:
        raise not_allowed(
            "sts_config.head_map",
            f"directions in {found.head_dim} dimensions, and the target's heads have {head_dim}",
            "a map that was made for this target",
        )


def pinned(config: StsConfig, head_map: HeadMap) -> StsConfig:
    """The configuration for the schedulers, which read the file again: no other than this one will do."""
    return replace(config, head_map_sha256=head_map.sha256 or config.head_map_sha256)


def served(config: StsConfig, head_map: HeadMap) -> StsConfig:
    """What a launch with this map runs by: the map's pool if it names one, and the dense layers of both."""
    pool = {"pool_rows": head_map.pool, "pool_heads": head_map.pool} if head_map.pool else {}
    dense = tuple({*config.dense_layers, *head_map.dense_layers})
    return replace(config, dense_layers=dense, **pool)


def _conflict(head_map: HeadMap, config: StsConfig) -> ConfigError | None:
    """Why the map cannot serve with this configuration."""
    pools = (config.pool_rows, config.pool_heads)
    default = (StsConfig.pool_rows, StsConfig.pool_heads)
    if head_map.pool and pools not in (default, (head_map.pool, head_map.pool)):
        return ConfigError(
            f"sts_config.pool_heads: {pools[1]!r} with pool_rows {pools[0]!r} and a map calibrated for "
            f"{head_map.pool!r}; allowed: leave both out, the map decides"
        )
    joined = any(len({layer for layer, _ in sources}) > 1 for sources in head_map.channels)
    if joined and not head_map.pool and pools[0] != pools[1]:
        # One buffer takes the rows of all layers: it cannot add layers and compare rows.
        return ConfigError(
            f"sts_config.pool_heads: {pools[1]!r} with pool_rows {pools[0]!r} and a map "
            "that joins heads of several draft layers; allowed: the same pool for both"
        )
    if head_map.shares and config.kernel == "flashinfer":
        return ConfigError(
            "sts_config.kernel: 'flashinfer' with a map that splits the budget between heads, which it would "
            "pad to the longest list; allowed: auto | triton, or a map without shares"
        )
    if () in head_map.channels and config.policy == "top_p":  # which a launch without a draft refuses
        return ConfigError(
            f"sts_config.policy: 'top_p' with a map whose heads select the {LATEST} tokens, which hold no "
            "share of the importance; allowed: ratio | fixed, or a map without such heads"
        )
    return None


def packaged(
    config: StsConfig,
    target: HeadCounts,
    draft: HeadCounts | None,
    models: ModelPaths | None,
    tp: int,
) -> HeadMap | None:
    """The map in `sts_sglang/maps` whose fingerprints are those of the models, if it suits the configuration;
    of a pair's, all of which are of one rank, on several ranks the directions alone."""
    candidates = sorted(MAPS.glob("*.json"))
    if models is None or not candidates:
        return None
    found = models.fingerprints()
    for path in candidates if None not in found.values() else ():
        if _read(str(path))[0].get("fingerprints") == found:
            head_map = replace(load(str(path), target, draft), origin=f"packaged {path.name}")
            if draft and tp > 1:
                head_map = _directions_alone(head_map, target, draft)
            return head_map if _conflict(head_map, config) is None else None
    return None


def _directions_alone(head_map: HeadMap, target: HeadCounts, draft: HeadCounts) -> HeadMap:
    """The proportional map with this one's directions, which are of the target's keys, whoever has the heads;
    the file's hash stays, for a launch and its schedulers must read the same."""
    default = proportional(target, draft)
    if head_map.directions is None:
        return default
    origin = f"{default.origin}, directions of {head_map.origin}"
    return replace(default, origin=origin, sha256=head_map.sha256, directions=head_map.directions)


def proportional(target: HeadCounts, draft: HeadCounts) -> HeadMap:
    """The default map: target layer t reads draft layer t * L_draft // L_target (paper, section on head
    mapping); KV head h reads the draft query heads that cover the same fraction of the heads."""
    layers = [t * draft.layers // target.layers for t in range(target.layers)]
    spans = [
        range(h * draft.q_heads // target.kv_heads, -(-(h + 1) * draft.q_heads // target.kv_heads))
        for h in range(target.kv_heads)
    ]
    sources = tuple(tuple(tuple((layer, head) for head in span) for span in spans) for layer in layers)
    return HeadMap(sources, origin="proportional default (not calibrated)")


def undrafted(target: HeadCounts) -> HeadMap:
    """Where no draft speaks: every head has the same budget."""
    return HeadMap((((),) * target.kv_heads,) * target.layers, origin="one budget for all heads (no draft)")


def is_alone(path: str) -> bool:
    """Whether a file is a map of a target alone, if it is a map at all. Raises as `load`."""
    return _read(path)[0].get("draft", ...) is None


def load(
    path: str,
    target: HeadCounts,
    draft: HeadCounts | None,
    models: ModelPaths | None = None,
    tp: int = 1,
) -> HeadMap:
    """Read and check a map file for this pair of models, or for a target without a draft, on so many ranks.

    The file is a JSON object `{"version": 1, "shift": 1, "tp": 1, "target": {"layers", "q_heads",
    "kv_heads"}, "draft": {...}, "sources": [layer][kv head]}`. An entry of `sources` is a list of [draft
    layer, draft head], one of them repeated to weigh more under pool "mean", or "latest". Optional:
    `fingerprints`, compared when `models` is given; `pool`, "max" or "mean"; `shares` of the budget
    [layer][kv head], in any unit; `dense_layers`; `directions`, {"head_dim", "number", "heads"
    [layer][kv head]}, with each head's bytes (see Directions) in base64. Only to
    inform, but checked as well: `best` (recall and Jaccard [layer][kv head] of the best single draft
    head), `texts`, `settings`. A handwritten map may omit all of these. A map of a target alone has `"draft":
    null`, `shares` or `directions` or both, and nothing that is about a draft (ALONE);
    it is for any number of ranks, whichever of RANKS its `tp` says.

    Raises:
        ConfigError: one line that names the field.
    """
    data, digest = _read(path)
    _keys(data, "", FIELDS)
    if draft and data.get("draft", ...) is None:
        problem = "a map of the target alone, where the draft's attention selects"
        allowed = 'a map of the pair, or sts_config.selector "tokens" or "pages" with prefill_by "target"'
        raise _error("draft", problem, allowed)
    # Without sources a map asks no rank for a head of another one.
    expected = {"version": (MAP_VERSION,), "tp": (tp,) if draft else RANKS}
    expected |= {"shift": (MAP_SHIFT,)} if draft else {}
    for field, values in expected.items():
        if type(data.get(field)) is not int or data[field] not in values:
            raise _error(field, f"got {_short(data.get(field))}", " | ".join(map(str, values)))
    _check_made_for(data, target, draft)
    _keys(data, "", FIELDS if draft else ALONE)
    _check_fingerprints(data.get("fingerprints"), models, ("target", "draft") if draft else ("target",))
    pool = data.get("pool")
    if "pool" in data and pool not in POOLS:
        raise _error("pool", f"got {_short(pool)}", " | ".join(POOLS))
    if draft is None and not {"shares", "directions"} & set(data):
        allowed = "a part of the budget for every head, or directions: a map without a draft is of these"
        raise _error("shares", "missing", allowed)
    sources = _all_sources(data.get("sources"), target, draft) if draft else undrafted(target).sources
    if draft and (apart := foreign(sources, target, draft, tp)):
        raise _error(*apart)
    shares = _shares(data["shares"], target) if "shares" in data else None
    dense = _dense_layers(data.get("dense_layers", []), target)
    directions = _directions(data["directions"], target) if "directions" in data else None
    _check_best(data.get("best", {}), target)
    _check_texts(data.get("texts", []))
    _check_settings(data.get("settings", {}))
    origin = os.path.basename(path)
    return HeadMap(sources, origin, pool, dense, shares, sha256=digest, directions=directions)


def foreign(
    sources: tuple[tuple[tuple[Source, ...], ...], ...], target: HeadCounts, draft: HeadCounts, tp: int
) -> tuple[str, str, str] | None:
    """What a launch on `tp` ranks could not serve of these sources: field, problem and what is allowed. A
    head needs sources on its own rank alone; one that several ranks have, on each of them."""
    group = draft.q_heads // tp
    for t, layer in enumerate(sources):
        for h, heads in enumerate(layer):
            own = target.ranks_of(h, tp)
            if heads and {q // group for _, q in heads} != set(own):
                named = " and ".join(f"[{rank * group}..{(rank + 1) * group - 1}]" for rank in own)
                problem = f"got draft heads {_short(sorted({q for _, q in heads}))} with tp {tp}"
                return f"sources[{t}][{h}]", problem, f"heads of {named}, which the ranks of this head have"
    return None


def _check_made_for(data: dict[str, Any], target: HeadCounts, draft: HeadCounts | None) -> None:
    for field, counts in (("target", target), ("draft", draft)):
        made_for = data.get(field)
        if counts is None:
            if field not in data or made_for is not None:
                raise _error(field, f"made for {_short(made_for)}", "null, for this launch has no draft")
            continue
        ints = isinstance(made_for, dict) and all(type(v) is int for v in made_for.values())
        if not ints or made_for != counts._asdict():
            raise _error(field, f"made for {_short(made_for)}", f"this model, {counts._asdict()}")


def _all_sources(
    value: Any, target: HeadCounts, draft: HeadCounts
) -> tuple[tuple[tuple[Source, ...], ...], ...]:
    parsed = tuple(
        tuple(
            _sources(heads, f"sources[{t}][{h}]", draft)
            for h, heads in enumerate(_list(layer, f"sources[{t}]", target.kv_heads))
        )
        for t, layer in enumerate(_list(value, "sources", target.layers))
    )
    if not any(heads for layer in parsed for heads in layer):
        raise _error("sources", f"every head is {LATEST!r}", "at least one that a draft head speaks for")
    return parsed


def _check_fingerprints(value: Any, models: ModelPaths | None, names: tuple[str, ...]) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or set(value) != set(names):
        allowed = ", ".join(f'"{name}": ...' for name in names)
        raise _error("fingerprints", f"got {_short(value)}", f"{{{allowed}}}")
    for model, made_for in value.items():
        field = f"fingerprints.{model}"
        ok = isinstance(made_for, dict) and set(made_for) == {"config", "weights"}
        if not ok or not all(_is_digest(v) for v in made_for.values()):
            raise _error(field, f"got {_short(made_for)}", '{"config": SHA-256, "weights": SHA-256} in hex')
    for model, found in models.fingerprints().items() if models else ():
        if found is None:
            raise _error(
                f"fingerprints.{model}",
                "this model has no safetensors weights to compare with",
                "real weights, or a map without fingerprints",
            )
        for part, digest in found.items():
            if digest != value[model][part]:
                raise _error(f"fingerprints.{model}.{part}", f"made for another {model}", digest)


def _shares(value: Any, target: HeadCounts) -> tuple[tuple[float, ...], ...]:
    for t, row in enumerate(_list(value, "shares", target.layers)):
        for h, share in enumerate(_list(row, f"shares[{t}]", target.kv_heads)):
            _number(share, f"shares[{t}][{h}]", 1 / MAX_SHARE, MAX_SHARE)
    return tuple(tuple(map(float, row)) for row in value)


def _dense_layers(value: Any, target: HeadCounts) -> tuple[int, ...]:
    allowed = f"a list of different layer numbers from 0 to {target.layers - 1}"
    if not isinstance(value, list) or len(value) > target.layers:
        raise _error("dense_layers", f"got {_short(value)}", allowed)
    for i, layer in enumerate(value):
        if type(layer) is not int or not 0 <= layer < target.layers or layer in value[:i]:
            raise _error(f"dense_layers[{i}]", f"got {_short(layer)}", allowed)
    return tuple(sorted(value))


def _directions(value: Any, target: HeadCounts) -> Directions:
    keys = Directions._fields
    _object(value, "directions", keys)
    for key in keys:
        if key not in value:
            raise _error(f"directions.{key}", "missing", ", ".join(keys))
    dim, number = value["head_dim"], value["number"]
    _number(dim, "directions.head_dim", *HEAD_DIMS, int)
    if not directions_of(dim):
        raise _error("directions.head_dim", f"got {dim}", f"a multiple of {DIMS_STEP}")
    if type(number) is not int or number != directions_of(dim):
        raise _error(
            "directions.number",
            f"got {_short(number)}",
            f"head_dim // {DIMS_EACH}, {dim // DIMS_EACH}; calibrate anew",
        )
    return Directions(
        dim,
        number,
        tuple(
            tuple(
                _head_directions(text, f"directions.heads[{t}][{h}]", dim, number)
                for h, text in enumerate(_list(layer, f"directions.heads[{t}]", target.kv_heads))
            )
            for t, layer in enumerate(_list(value["heads"], "directions.heads", target.layers))
        ),
    )


def _head_directions(value: Any, field: str, dim: int, number: int) -> bytes:
    values = (dim + 2) * number
    try:
        content = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:  # binascii's too
        content = b""
    if len(content) != 2 * values:
        raise _error(field, f"got {_short(value)}", f"base64 of {2 * values} bytes")
    numbers = struct.unpack(f"<{values}e", content)
    if not math.isfinite(sum(numbers)):  # which no sum of so few finite float16 is not
        raise _error(field, "holds inf or nan", "finite numbers")
    if min(numbers[-number:]) <= 0:
        raise _error(field, f"holds a step of {min(numbers[-number:])}", "steps above zero, the last row")
    return content


def _check_best(value: Any, target: HeadCounts) -> None:
    _object(value, "best", ("recall", "jaccard"))
    for key, rows in value.items():
        for t, row in enumerate(_list(rows, f"best.{key}", target.layers)):
            for h, share in enumerate(_list(row, f"best.{key}[{t}]", target.kv_heads)):
                _number(share, f"best.{key}[{t}][{h}]", 0, 1)


def _check_texts(value: Any) -> None:
    if not isinstance(value, list) or len(value) > MAX_TEXTS:
        raise _error("texts", f"got {_short(value)}", f"a list of at most {MAX_TEXTS}")
    keys = ("domain", "sha256", "tokens")
    for i, text in enumerate(value):
        field = f"texts[{i}]"
        _object(text, field, keys)
        for key in keys:
            if key not in text:
                raise _error(f"{field}.{key}", "missing", ", ".join(keys))
        if not isinstance(text["domain"], str) or len(text["domain"]) > 255:
            raise _error(f"{field}.domain", f"got {_short(text['domain'])}", "a string of at most 255")
        if not _is_digest(text["sha256"]):
            raise _error(f"{field}.sha256", f"got {_short(text['sha256'])}", "SHA-256 in hex")
        _number(text["tokens"], f"{field}.tokens", 1, MAX_TOKENS, int)


def _check_settings(value: Any) -> None:
    _object(value, "settings", tuple(SETTINGS))
    for key, setting in value.items():
        rule = SETTINGS[key]
        if setting is None and key in ("band", "dense_below"):
            continue
        if isinstance(rule[0], str):
            if not isinstance(setting, str) or setting not in rule:
                raise _error(f"settings.{key}", f"got {_short(setting)}", " | ".join(rule))
        else:
            _number(setting, f"settings.{key}", *rule)


# What a calibration was made with: the strings allowed, or the range and whether it is integers.
SETTINGS: dict[str, tuple] = {
    "tokens": (1, MAX_TOKENS, int),
    "windows": (1, MAX_TOKENS, int),
    "keep": (0, 1),
    "sink": (1, MAX_TOKENS, int),
    "recent": (1, MAX_TOKENS, int),
    "heads": (1, MAX_SOURCES, int),
    "band": (0, 9999, int),
    "dense_below": (0, 1),
    "pool": ("auto", *POOLS),
    "budget": ("split", "uniform"),
    "measure": ("output", "mass"),
    "selector": ("tokens", "pages"),
    "dtype": ("float32", "bfloat16", "float16"),
    "seed": (0, 2**63 - 1, int),
}


def _object(value: Any, field: str, keys: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise _error(field, f"got {_short(value)}", f"an object with {', '.join(keys)}")
    _keys(value, f"{field}.", keys)


def _keys(value: dict[str, Any], prefix: str, keys: tuple[str, ...]) -> None:
    if unknown := sorted(set(value) - set(keys)):
        raise _error(prefix + _name(unknown[0]), "unknown field", ", ".join(keys))


def _number(value: Any, field: str, low: float, high: float, kind: type = float) -> None:
    ok = type(value) in ((int,) if kind is int else (int, float)) and low <= value <= high
    if not ok or not math.isfinite(value):
        noun = "an integer" if kind is int else "a number"
        raise _error(field, f"got {_short(value)}", f"{noun} from {low} to {high}")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _read(path: str) -> tuple[dict[str, Any], str]:
    """The file's object and the SHA-256 of its bytes, of one reading."""
    shown = _short(path if len(path) <= 200 else f"...{path[-200:]}", 240)
    try:
        if not os.path.isfile(path):
            raise _error("file", f"{shown} is not a file", "a head map JSON")
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise _error("file", f"{shown} is too large", f"at most {MAX_FILE_BYTES} bytes")
        with open(path, "rb") as f:
            content = f.read(MAX_FILE_BYTES)
        data = strict_json.loads(content.decode("utf-8"), _repeated, _constant)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _error(
            "file", f"cannot read {shown} ({type(error).__name__}: {_short(str(error))})", "JSON"
        ) from None
    if not isinstance(data, dict):
        raise _error("file", f"{shown} holds a {type(data).__name__}", "a JSON object")
    return data, hashlib.sha256(content).hexdigest()


def _repeated(key: str) -> ConfigError:
    return _error(_name(key), "appears twice in one object", "each key once")


def _constant(name: str) -> ConfigError:
    return _error("file", f"holds {name}, which JSON does not have", "finite numbers")


def _list(value: Any, field: str, length: int) -> list:
    if not isinstance(value, list) or len(value) != length:
        found = f"{len(value)} entries" if isinstance(value, list) else _short(value)
        raise _error(field, f"got {found}", f"a list of {length}")
    return value


def _sources(value: Any, field: str, draft: HeadCounts) -> tuple[Source, ...]:
    if value == LATEST:
        return ()
    most = max(MAX_SOURCES, draft.layers * draft.q_heads)
    if not isinstance(value, list) or not 0 < len(value) <= most:
        found = f"{len(value)} entries" if isinstance(value, list) else _short(value)
        raise _error(field, f"got {found}", f"{LATEST!r}, or 1 to {most} times [draft layer, draft head]")
    for pair in value:
        ok = isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
        if not ok or not (0 <= pair[0] < draft.layers and 0 <= pair[1] < draft.q_heads):
            raise _error(field, f"got {_short(pair)}", f"[0..{draft.layers - 1}, 0..{draft.q_heads - 1}]")
    return tuple(sorted((layer, head) for layer, head in value))


def _short(value: Any, longest: int = 80) -> str:
    """`value` for a message: as `quoted`, in ASCII, since it may go to a log of any encoding."""
    return _ascii(shown(value, longest))


def _name(key: str) -> str:
    """A key as part of a field's name, without quotes."""
    return _ascii(one_line(key[:80]))[:80]


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def _error(field: str, problem: str, allowed: str) -> ConfigError:
    return ConfigError(f"head_map.{field}: {problem}; allowed: {allowed}")
