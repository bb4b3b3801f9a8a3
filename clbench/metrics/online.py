"""Metrics of online protocols that evaluate by samples (Si-Blurry: `si_blurry` card, section 1).

A_avg and A_last are `accuracy_matrix.average_incremental_accuracy` and `final_accuracy` with sizes and active groups.

>>> sample_schedule([700, 1500, 64], batch=64, period=500)
[(0, 512, 500), (1, 1020, 1000), (1, 1532, 1500), (1, 2044, 2000)]
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.metrics.curve import FloatArray, IntArray

__all__ = ["OFFICIAL_EPSILON", "anytime_accuracy", "f_last", "official_points", "sample_schedule"]

OFFICIAL_EPSILON = 1e-5  # what the official code adds to the number of test images of a class


def sample_schedule(task_sizes: Sequence[int] | IntArray, batch: int, period: int) -> list[tuple[int, int, int]]:
    """The in-stream evaluations of the protocol: (task, samples streamed, nominal count), in order.

    task_sizes: (K,) samples of each task, 0 for an empty one; a task's last batch may be ragged and is not dropped.
    The nominal count is the multiple of `period` that an evaluation stands for. Raises ValueError for a batch or a
    period below 1.
    """
    if batch < 1 or period < 1:
        raise ValueError(f"batch and period must be at least 1, not {batch} and {period}")
    sizes = np.asarray(task_sizes, np.int64)
    starts = np.cumsum(sizes) - sizes
    per_task = [np.minimum(np.arange(batch, size + batch, batch), size) for size in sizes.tolist()]
    behind = np.concatenate([np.zeros(0, np.int64), *(start + n for start, n in zip(starts, per_task, strict=True))])
    task = np.repeat(np.arange(len(sizes)), [len(n) for n in per_task])
    points = official_points(behind, period)
    nominal = period * np.arange(1, len(points) + 1)
    return list(zip(task[points].tolist(), behind[points].tolist(), nominal.tolist(), strict=True))


def official_points(
    positions: Sequence[int] | IntArray, period: int, phases: Sequence[int] | IntArray | None = None
) -> IntArray:
    """Indices of the evaluations that the protocol makes: `if n > next: evaluate; next += period`, once per batch.

    positions: (S,) samples streamed behind each evaluation, not decreasing; of several at one position (updates on the
    same batch) the last counts. phases: (S,) phase of each evaluation; those of further phases at the same position,
    behind the stream of a task, are then left out, since the protocol evaluates before them.
    """
    stream = np.asarray(positions, np.int64)
    phase = np.zeros_like(stream) if phases is None else np.asarray(phases, np.int64)
    last = np.flatnonzero(np.append(stream[1:] != stream[:-1], True)[: len(stream)])
    first = np.append(0, last[:-1] + 1)[: len(last)]
    own = zip(first.tolist(), last.tolist(), strict=True)
    last = np.array([a + int(np.flatnonzero(phase[a : b + 1] == phase[a])[-1]) for a, b in own], np.int64)
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


def f_last(
    accuracy: FloatArray, active: NDArray[np.bool_], sizes: ArrayLike | None = None, epsilon: float = 0.0
) -> float | None:
    """F_last: mean over the classes whose best accuracy before the last task is above 0, of that minus the last one.

    accuracy, active: (K, G), a group per class; falls below 0 are kept, classes that were never right left out.
    sizes, epsilon: (G,) test images of each class; accuracies are taken as hits / (images + epsilon), which is what the
    official code does with `OFFICIAL_EPSILON`. Raises ValueError if an epsilon is given without sizes.
    """
    if epsilon and sizes is None:
        raise ValueError("f_last: an epsilon needs the sizes of the classes")
    if sizes is not None:
        images = np.asarray(sizes, np.float64)
        accuracy = accuracy * (images / (images + epsilon))
    before = np.where(active, accuracy, -np.inf)[:-1]
    best = np.fmax.reduce(before, axis=0, initial=-np.inf)
    known = best > 0
    return float((best - accuracy[-1])[known].mean()) if known.any() else None
