"""Head map: which draft (layer, query head) speaks for which target (layer, KV head)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sts_sglang import fingerprint
from sts_sglang.config import ConfigError, StsConfig

MAP_VERSION = 1
# Draft index p holds token p + 1 in every algorithm (the draft prefill runs on input_ids[1:] plus
# the sampled token), so its score belongs to target position p + 1.
SHIFT = 1
MAX_FILE_BYTES = 4 << 20

MAPS = Path(__file__).parent / "maps"
FIELDS = (
    "version",
    "shift",
    "tp",
    "target",
    "draft",
    "fingerprints",
    "sources",
    "dense_layers",
    "best",
    "texts",
    "settings",
)

Source = tuple[int, int]  # (draft layer, draft query head)


class HeadCounts(NamedTuple):
    """Attention shape of one model; `kv_heads` of a draft is not used by the map."""

    layers: int
    q_heads: int
    kv_heads: int


class ModelPaths(NamedTuple):
    """Folders or hub names of a pair, for its fingerprints."""

    target: str
    draft: str
    target_revision: str | None = None
    draft_revision: str | None = None

    def fingerprints(self) -> dict[str, dict[str, str] | None]:
        """By model; None for one whose weights are not here."""
        return {
            "target": fingerprint.of_model(self.target, self.target_revision),
            "draft": fingerprint.of_model(self.draft, self.draft_revision),
        }

    def are_folders(self) -> bool:
        return os.path.isdir(self.target) and os.path.isdir(self.draft)

    @classmethod
    def of_server(cls, server_args: Any) -> ModelPaths:
        """Of a launch."""
        return cls(
            server_args.model_path,
            server_args.speculative_draft_model_path,
            server_args.revision,
            server_args.speculative_draft_model_revision,
        )


@dataclass(frozen=True)
class HeadMap:
    """sources[target layer][target KV head] = the draft heads whose importance it selects by.

    Two (layer, KV head) pairs with the same sources share a *channel*: one importance row, one
    selection, one index list.
    """

    sources: tuple[tuple[tuple[Source, ...], ...], ...]
    origin: str

    @cached_property
    def channels(self) -> tuple[tuple[Source, ...], ...]:
        """Distinct source sets, in order of first use."""
        return tuple(dict.fromkeys(heads for layer in self.sources for heads in layer))

    def head_channels(self, layer: int) -> list[int]:
        """Channel of every KV head of a target layer."""
        index = {sources: i for i, sources in enumerate(self.channels)}
        return [index[sources] for sources in self.sources[layer]]


def counts(model_config: Any) -> HeadCounts:
    """Attention shape of an SGLang ModelConfig."""
    return HeadCounts(
        layers=model_config.num_hidden_layers,
        q_heads=model_config.num_attention_heads,
        kv_heads=model_config.get_total_num_kv_heads(),
    )


def of_config(
    config: StsConfig, target: HeadCounts, draft: HeadCounts, models: ModelPaths | None = None
) -> HeadMap:
    """The configured map for this pair, else the packaged map made for it, else the proportional default.

    `models`: where the weights are; without it fingerprints are not compared and no packaged map is used.

    Raises:
        ConfigError: the map does not fit the pair, or joins draft layers while the pools differ.
    """
    if config.head_map:
        head_map = load(config.head_map, target, draft, models)
    else:
        head_map = packaged(config, target, draft, models) or proportional(target, draft)
    if not _joins(head_map, config):
        return head_map
    # One buffer takes the rows of all layers: it cannot add layers and compare rows.
    raise ConfigError(
        f"sts_config.pool_heads: {config.pool_heads!r} with pool_rows {config.pool_rows!r} and a map "
        "that joins heads of several draft layers; allowed: the same pool for both"
    )


def _joins(head_map: HeadMap, config: StsConfig) -> bool:
    """Whether the map needs an order of pooling that the configuration does not have."""
    joined = any(len({layer for layer, _ in sources}) > 1 for sources in head_map.channels)
    return joined and config.pool_heads != config.pool_rows


def packaged(
    config: StsConfig, target: HeadCounts, draft: HeadCounts, models: ModelPaths | None
) -> HeadMap | None:
    """The map in `sts_sglang/maps` whose fingerprints are those of both models, if it suits the pooling."""
    candidates = sorted(MAPS.glob("*.json"))
    if models is None or not candidates:
        return None
    found = models.fingerprints()
    for path in candidates if None not in found.values() else ():
        if _read(str(path)).get("fingerprints") == found:
            head_map = load(str(path), target, draft)
            return None if _joins(head_map, config) else replace(head_map, origin=f"packaged {path.name}")
    return None


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


def load(path: str, target: HeadCounts, draft: HeadCounts, models: ModelPaths | None = None) -> HeadMap:
    """Read and check a map file for this pair of models.

    The file is a JSON object `{"version": 1, "shift": 1, "tp": 1, "target": {"layers", "q_heads",
    "kv_heads"}, "draft": {...}, "sources": [layer][kv head][[draft layer, draft head], ...]}`.
    `sts-sglang calibrate` adds `fingerprints`, which are compared when `models` is given, and fields
    that only inform: `dense_layers`, `best`, `texts`, `settings`. A handwritten map may omit them.

    Raises:
        ConfigError: one line that names the field.
    """
    data = _read(path)
    if unknown := sorted(set(data) - set(FIELDS)):
        raise _error(_short(unknown[0]), "unknown field", ", ".join(FIELDS))
    for field, expected in (("version", MAP_VERSION), ("shift", SHIFT), ("tp", 1)):
        if type(data.get(field)) is not int or data[field] != expected:
            raise _error(field, f"got {_short(data.get(field))}", str(expected))
    for field, counts in (("target", target), ("draft", draft)):
        if data.get(field) != counts._asdict():
            raise _error(field, f"made for {_short(data.get(field))}", f"this model, {counts._asdict()}")
    _check_fingerprints(data.get("fingerprints"), models)
    sources = _list(data.get("sources"), "sources", target.layers)
    parsed = tuple(
        tuple(
            _sources(heads, f"sources[{t}][{h}]", draft)
            for h, heads in enumerate(_list(layer, f"sources[{t}]", target.kv_heads))
        )
        for t, layer in enumerate(sources)
    )
    return HeadMap(parsed, origin=os.path.basename(path))


def _check_fingerprints(value: Any, models: ModelPaths | None) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or set(value) != {"target", "draft"}:
        raise _error("fingerprints", f"got {_short(value)}", '{"target": ..., "draft": ...}')
    for model, made_for in value.items():
        field = f"fingerprints.{model}"
        ok = isinstance(made_for, dict) and set(made_for) == {"config", "weights"}
        if not ok or not all(isinstance(v, str) for v in made_for.values()):
            raise _error(field, f"got {_short(made_for)}", '{"config": SHA-256, "weights": SHA-256}')
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


def _read(path: str) -> dict[str, Any]:
    try:
        if not os.path.isfile(path):
            raise _error("file", f"{path!r} is not a file", "a head map JSON")
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise _error("file", f"{path!r} is too large", f"at most {MAX_FILE_BYTES} bytes")
        with open(path, encoding="utf-8") as f:
            data = json.load(f, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _error(
            "file", f"cannot read {path!r} ({type(error).__name__}: {_short(str(error))})", "JSON"
        ) from None
    if not isinstance(data, dict):
        raise _error("file", f"{path!r} holds a {type(data).__name__}", "a JSON object")
    return data


def _no_constant(name: str) -> None:
    raise _error("file", f"holds {name}, which JSON does not have", "finite numbers")


def _list(value: Any, field: str, length: int) -> list:
    if not isinstance(value, list) or len(value) != length:
        found = f"{len(value)} entries" if isinstance(value, list) else _short(value)
        raise _error(field, f"got {found}", f"a list of {length}")
    return value


def _sources(value: Any, field: str, draft: HeadCounts) -> tuple[Source, ...]:
    if not isinstance(value, list) or not value:
        raise _error(field, f"got {_short(value)}", "at least one [draft layer, draft head]")
    for pair in value:
        ok = isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
        if not ok or not (0 <= pair[0] < draft.layers and 0 <= pair[1] < draft.q_heads):
            raise _error(field, f"got {_short(pair)}", f"[0..{draft.layers - 1}, 0..{draft.q_heads - 1}]")
    return tuple(sorted({(layer, head) for layer, head in value}))


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _error(field: str, problem: str, allowed: str) -> ConfigError:
    return ConfigError(f"head_map.{field}: {problem}; allowed: {allowed}")
