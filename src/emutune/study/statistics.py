"""Interquartile means, and bootstrap intervals over seeds and episodes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import stats


def interquartile_mean(values: Float[np.ndarray, "..."]) -> float:
    """Mean of the middle half of all values."""
    return float(stats.trim_mean(values, 0.25, axis=None))


def bootstrap_interval(
    values: Float[np.ndarray, "seeds episodes"], *, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the mean over both seeds and episodes.

    All seeds meet the same episodes, so a resample draws seeds and, alike for all of them, episodes:
    drawing episodes anew for each seed would take one hard episode for many.

    Args:
        values: one row per seed (one row for a policy that is not learned).
        confidence: coverage of the interval.
        resamples: bootstrap replications; their seed is fixed.
    """
    generator = np.random.default_rng(0)
    seeds, episodes = values.shape
    rows = generator.integers(seeds, size=(resamples, seeds, 1))
    columns = generator.integers(episodes, size=(resamples, 1, episodes))
    means = values[rows, columns].mean(axis=(1, 2))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
