"""Paired bootstrap: the same items under two ways of selecting, resampled by document, seeded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
ENOUGH = 20  # documents of a task; below, an interval is shown but nothing is called significant


@dataclass
class Interval:
    """A mean and its 95 % percentile interval."""

    mean: float
    low: float
    high: float
    documents: int  # of the task that has fewest

    @property
    def excludes_zero(self) -> bool:
        return self.documents >= ENOUGH and (self.low > 0 or self.high < 0)


def resampled_means(values: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float64 [RESAMPLES] means of `values` with whole groups drawn with replacement."""
    _, place = np.unique(groups, return_inverse=True)
    sizes = np.bincount(place).astype(float)
    sums = np.bincount(place, values)
    drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), RESAMPLES)
    return (drawn @ sums) / (drawn @ sizes)


def interval(values: list[float], groups: list[int] | None = None, seed: int = 0) -> Interval:
    """The mean of values, or of differences of pairs; items of one group are not independent."""
    return macro_interval([(values, list(range(len(values))) if groups is None else groups)], seed)


def macro_interval(cells: list[tuple[list[float], list[int]]], seed: int = 0) -> Interval:
    """The mean over tasks of their means: each task (values, groups) is resampled by itself."""
    rng = np.random.default_rng(seed)
    arrays = [(np.asarray(values, float), np.asarray(groups)) for values, groups in cells]
    means = np.mean([resampled_means(values, groups, rng) for values, groups in arrays], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(np.mean([values.mean() for values, _ in arrays]))
    return Interval(mean, float(low), float(high), min(np.unique(groups).size for _, groups in arrays))
