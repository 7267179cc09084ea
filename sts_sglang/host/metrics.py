"""Counters of what verify really attended to, at /metrics and in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from sts_kernels.layout import Count
from sts_sglang.core.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Totals since start, those of `Count` and the host's. A verify is one request in one round; tokens are
    counted per (layer, KV head)."""

    sparse_verifies: int = 0
    dense_verifies: int = 0
    selected_tokens: int = 0
    available_tokens: int = 0
    full_verifies: int = 0
    clipped_tokens: int = 0
    draft_selected_tokens: int = 0
    draft_available_tokens: int = 0
    aside_verifies: int = 0
    prefill_selected_blocks: int = 0
    prefill_available_blocks: int = 0
    scored_rounds: int = 0
    kept_rounds: int = 0
    draft_prefill_selected_blocks: int = 0
    draft_prefill_available_blocks: int = 0
    plans: int = 0  # of FlashInfer, made on the host

    @property
    def keep_ratio(self) -> float:
        """Context tokens attended / context tokens there, 1.0 before the first verify."""
        return self.selected_tokens / self.available_tokens if self.available_tokens else 1.0

    def as_dict(self) -> dict[str, float]:
        values = asdict(self)
        return {"plans_total": values.pop("plans"), **values, "keep_ratio": self.keep_ratio}


_HELP = {
    "sparse_verifies": "Verifies (request, round) that attended to a selection.",
    "dense_verifies": "Verifies (request, round) that attended to the whole context for want of importance.",
    "selected_tokens": "Context tokens attended to in verify, per (layer, KV head).",
    "available_tokens": "Context tokens there in verify, per (layer, KV head).",
    "full_verifies": "Verifies (request, round) of the whole context by verify or full_verify_every.",
    "clipped_tokens": "Context tokens that kernel flashinfer had no room for, per (layer, KV head).",
    "draft_selected_tokens": "Context tokens attended to in sparse draft steps, per (layer, KV head).",
    "draft_available_tokens": "Context tokens there in sparse draft steps, per (layer, KV head).",
    "aside_verifies": "Sparse verifies (request, round) of a whole context, where nothing is selected.",
    "prefill_selected_blocks": "Blocks of keys attended to in sparse prefills, per (layer, KV head).",
    "prefill_available_blocks": "Blocks of keys there in sparse prefills, per (layer, KV head).",
    "scored_rounds": "Rounds (request, round) that scored the context, where selections may be kept.",
    "kept_rounds": "Rounds (request, round) that went by the selection of an earlier one.",
    "draft_prefill_selected_blocks": "Blocks of keys attended to in sparse prefills of the draft, likewise.",
    "draft_prefill_available_blocks": "Blocks of keys there in sparse prefills of the draft, likewise.",
    "plans": "Plans of kernel flashinfer, made on the host.",
}


def read_counters(totals: torch.Tensor, plans: int) -> dict[str, float]:
    """The device's totals (RoundState.totals) and the host's by name; waits for the device."""
    return _counters(totals, plans).as_dict()


def _counters(totals: torch.Tensor, plans: int) -> Counters:
    by_name = {count.name.lower(): total for count, total in zip(Count, totals.tolist(), strict=True)}
    return Counters(**by_name, plans=plans)


class Exporter:
    """Publishes the totals: Prometheus when asked for, a log line every `interval` rounds.

    The hot loop never waits for the device: its totals are copied to pinned memory and read one round
    later. `plans` gives the host's. Of several ranks the first one publishes, every `interval` rounds: then
    they all meet to add up.
    """

    def __init__(
        self,
        counts: torch.Tensor,
        enable_metrics: bool,
        interval: int,
        plans: Callable[[], int] = int,
        ranks: Ranks = ALONE,
    ):
        self._counts, self._plans, self._ranks = counts, plans, ranks
        self._cpu = torch.zeros_like(counts, device="cpu", pin_memory=counts.is_cuda)
        self._counters = Counters()
        self._interval = interval
        self._rounds = 0
        self._published = Counters()
        self._logged = Counters()
        self._prometheus = _prometheus_metrics() if enable_metrics and ranks.rank == 0 else None

    def on_round(self) -> None:
        """Called once a verify round, after its results are on the CPU."""
        self._rounds += 1
        due = self._ranks.size == 1 or self._rounds % self._interval == 0
        if due and self._counts.is_cuda:
            self._read()  # of the round before
        self._cpu.copy_(self._counts, non_blocking=True)
        if due and not self._counts.is_cuda:
            self._read()
        if due and self._prometheus:
            self._publish()
        if self._rounds % self._interval == 0 and self._ranks.rank == 0:
            self._log()

    def _read(self) -> None:
        self._counters = _counters(self._ranks.whole(self._cpu), self._plans())

    def _publish(self) -> None:
        for name in _HELP:
            # A copy may be of the middle of a round, where a verify still counts as what it will not be.
            self._prometheus[name].inc(max(0, getattr(self._counters, name) - getattr(self._published, name)))
        self._prometheus["keep_ratio"].set(_since(self._counters, self._published).keep_ratio)
        highest = {name: max(getattr(self._counters, name), getattr(self._published, name)) for name in _HELP}
        self._published = Counters(**highest)

    def _log(self) -> None:
        recent = _since(self._counters, self._logged)
        logger.info(
            "STS: %d sparse verifies, %d dense, keep ratio %.4f, %d plans (last %d rounds)",
            recent.sparse_verifies,
            recent.dense_verifies,
            recent.keep_ratio,
            recent.plans,
            self._interval,
        )
        self._logged = Counters(**asdict(self._counters))


def _since(now: Counters, before: Counters) -> Counters:
    return Counters(**{name: getattr(now, name) - getattr(before, name) for name in _HELP})


def _prometheus_metrics() -> dict:
    # Imported late: SGLang sets the multi-process directory just before it starts the scheduler.
    from prometheus_client import Counter, Gauge

    metrics: dict = {name: Counter(f"sts:{name}", text) for name, text in _HELP.items()}
    metrics["keep_ratio"] = Gauge(
        "sts:keep_ratio",
        "Context tokens attended / context tokens there, in the latest verify round.",
        multiprocess_mode="mostrecent",
    )
    return metrics
