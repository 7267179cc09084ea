"""How much of the target's attention the draft's choice holds, by calibrate's measure.

To inform only: mass that is held does not predict what is lost, so no gate looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import NamedTuple

from sts_sglang import headmap
from sts_sglang.config import StsConfig
from sts_sglang.evaluate.pair import Pair

WINDOWS = 8  # verify windows of a text


class Recall(NamedTuple):
    """Shares of the target's attention outside sink and recent, of 1: means over texts, layers and heads."""

    draft: float  # on what the draft selects
    latest: float  # on as many of the latest tokens
    best: float  # on the target's own top


def measure(
    pair: Pair,
    texts: Sequence[list[int]],
    config: StsConfig,
    keeps: Sequence[float],
    device: str,
    ranks: int = 1,
) -> dict[float, Recall]:
    """By keep, without those whose budget is sink and recent alone, or nothing where that is all.

    In a process of its own, so that both models have left the device when a server needs it.

    Args:
        texts: token ids, each of at most the models' positions.
        config: names the head map; its keep and budget do not count.
        ranks: tensor-parallel ones of the launch whose map it is. A head that several of them have is judged
            by all its draft heads together, as calibrate does.

    Raises:
        ConfigError: a model that calibrate cannot read.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(here, pair, texts, config, keeps, device, ranks).result()


def here(
    pair: Pair,
    texts: Sequence[list[int]],
    config: StsConfig,
    keeps: Sequence[float],
    device: str,
    ranks: int = 1,
) -> dict[float, Recall]:
    """`measure` in this process."""
    from sts_sglang.calibrate import record, search

    forced, shortest = config.sink + config.recent, min(map(len, texts))
    least = {keep: int((forced + 1) / keep) + 1 for keep in keeps}
    keeps = [keep for keep in keeps if least[keep] < shortest - record.VERIFY_ROWS - WINDOWS]
    if not keeps:
        return {}
    models = record.Pair(pair.target, pair.draft, device, "float32" if device == "cpu" else "bfloat16")
    target, draft = models.target_counts, models.draft_counts
    head_map = headmap.of_config(config, target, draft, headmap.ModelPaths(pair.target, pair.draft), ranks)
    records = []
    for number, ids in enumerate(texts):
        windows = record.choose_windows(len(ids), WINDOWS, max(least[keep] for keep in keeps), number)
        records.append(models.record("text", ids, windows))
    found = {}
    for keep in keeps:
        windows = search.windows_of(records, replace(config, keep=keep, budget=0))
        held = (
            search.recall_of(head_map, windows, target, draft),
            search.latest(windows, target),
            search.oracle(windows, target),
        )
        found[keep] = Recall(*(float(values.mean()) for values in held))
    return found
