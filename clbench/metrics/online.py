"""Metrics of online protocols that evaluate by samples (Si-Blurry: `si_blurry` card, section 1)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.metrics.curve import FloatArray, IntArray

__all__ = ["anytime_accuracy", "f_last", "official_points"]


def official_points(positions: Sequence[int] | IntArray, period: int) -> IntArray:
    """Indices of the evaluations that the protocol makes: `if n > next: evaluate; next += period`, once per batch.

    positions: (S,) samples streamed behind each evaluation, not decreasing; of several at one position (updates on the
    same batch) the last counts.
    """
    stream = np.asarray(positions, np.int64)
    last = np.flatnonzero(np.append(stream[1:] != stream[:-1], True)[: len(stream)])
    chosen: list[int] = []
    for index in last.tolist():
        if stream[index] > (len(chosen) + 1) * period:
            chosen.append(index)
    return np.array(chosen, np.int64)


def anytime_accuracy(hits: ArrayLike, totals: ArrayLike, valid: ArrayLike) -> float | None:
    """A_auc: plain mean over the evaluations of the accuracy on the pooled valid groups; None if there is none.

    hits, valid: (S, G).  totals: (G,).
    """
    counted = np.asarray(valid, np.bool_)
    pooled = counted @ np.asarray(totals, np.int64)
    right = (np.asarray(hits) * counted).sum(axis=1)
    return float((right[pooled > 0] / pooled[pooled > 0]).mean()) if (pooled > 0).any() else None


def f_last(accuracy: FloatArray, active: NDArray[np.bool_]) -> float | None:
    """F_last: mean over the classes whose best accuracy before the last task is above 0, of that minus the last one.

    accuracy, active: (K, G), a group per class; falls below 0 are kept, classes that were never right left out.
    """
    before = np.where(active, accuracy, -np.inf)[:-1]
    best = np.fmax.reduce(before, axis=0, initial=-np.inf)
    known = best > 0
    return float((best - accuracy[-1])[known].mean()) if known.any() else None
