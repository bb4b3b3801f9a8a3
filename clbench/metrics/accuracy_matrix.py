"""Metrics of the accuracy matrix `R[i, j]`: accuracy on group j after task i, on full test sets.

Shapes: K tasks, G groups. `matrix` is (K, G) float, fractions in [0, 1], NaN where a group was not evaluated.
`group_task` (G,) is the task that each group belongs to (-1: to no single one); None means group j belongs to task j.
`sizes` (G,), rows of each group, pools the groups into one test set; None gives every group the same weight.
`active` (K, G) says which groups had begun to count after each task; None means those of the tasks so far.
A result is None where it is not defined (forgetting of a single task), never NaN.

>>> R = [[0.9, 0.0], [0.7, 0.8]]
>>> final_accuracy(R), round(average_incremental_accuracy(R), 3), round(forgetting(R), 3)
(0.75, 0.825, 0.2)
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from clbench.metrics.curve import FloatArray, IntArray

__all__ = [
    "accuracy_after_tasks",
    "average_incremental_accuracy",
    "backward_transfer",
    "final_accuracy",
    "forgetting",
    "forward_transfer",
    "matrix_average",
    "mean_backward_transfer",
    "zero_shot_transfer",
]


def accuracy_after_tasks(
    matrix: ArrayLike,
    group_task: ArrayLike | None = None,
    sizes: ArrayLike | None = None,
    active: ArrayLike | None = None,
) -> FloatArray:
    """(K,) accuracy after each task over the groups that count by then; NaN where none was evaluated."""
    values, owner = _read(matrix, group_task)
    begun = owner <= np.arange(len(values))[:, None] if active is None else np.asarray(active, np.bool_)
    counted = np.isfinite(values) & begun
    weight = counted * (np.ones(values.shape[1]) if sizes is None else np.asarray(sizes, np.float64))
    total = weight.sum(axis=1)
    out = np.full(len(values), np.nan)
    np.divide(np.where(counted, values * weight, 0.0).sum(axis=1), total, out=out, where=total > 0)
    return out


def final_accuracy(
    matrix: ArrayLike,
    group_task: ArrayLike | None = None,
    sizes: ArrayLike | None = None,
    active: ArrayLike | None = None,
) -> float | None:
    """Accuracy after the last task: mean over groups (ACC of Lopez-Paz & Ranzato 2017), or with `sizes` top-1 on the
    union of the test sets (Last of PyCIL and PILOT). They differ if groups differ in size."""
    return _defined(accuracy_after_tasks(matrix, group_task, sizes, active)[-1:])


def average_incremental_accuracy(
    matrix: ArrayLike,
    group_task: ArrayLike | None = None,
    sizes: ArrayLike | None = None,
    active: ArrayLike | None = None,
) -> float | None:
    """Mean over all K tasks, the first included, of the accuracy on what was seen so far. With `sizes` the cumulative
    test set of PyCIL and PILOT; without, the online literature's *anytime accuracy*."""
    return _defined(accuracy_after_tasks(matrix, group_task, sizes, active))


def forgetting(
    matrix: ArrayLike,
    group_task: ArrayLike | None = None,
    *,
    peak: Literal["before_last", "any", "learned"] = "before_last",
    over: Literal["left", "all"] = "left",
    active: ArrayLike | None = None,
) -> float | None:
    """Mean fall from a group's peak to its accuracy after the last task.

    peak: `before_last` max over t < K-1, may be negative (Chaudhry et al. 2018); `any` max over all t, never negative
        (PyCIL); `learned` the value right after its own task (FORG of continual evaluation; minus backward transfer).
    over: `left` the groups of all tasks but the last; `all` (with peak `any`) divides by all of them, as the online
        replay literature does.
    active: a group of no single task counts from where it is active only.
    """
    values, owner = _read(matrix, group_task)
    if active is not None:
        values = np.where(np.asarray(active, np.bool_) | (owner >= 0), values, np.nan)
    last = len(values) - 1
    if peak == "learned":
        top = np.where(owner >= 0, values[np.maximum(owner, 0), np.arange(values.shape[1])], np.nan)
    else:
        top = np.fmax.reduce(values[: last + (peak == "any")], axis=0, initial=-np.inf)
    chosen = (owner < last) | (over == "all")
    return _defined((top - values[-1])[chosen & np.isfinite(top)])


def backward_transfer(matrix: ArrayLike, group_task: ArrayLike | None = None) -> float | None:
    """BWT: mean over left groups of `R[K-1, j] - R[j, j]` (Lopez-Paz & Ranzato 2017)."""
    fall = forgetting(matrix, group_task, peak="learned")
    return None if fall is None else 0.0 - fall


def mean_backward_transfer(matrix: ArrayLike, group_task: ArrayLike | None = None) -> float | None:
    """Mean of `R[i, j] - R[j, j]` over all i > j (Díaz-Rodríguez et al. 2018); their BWT+ is its positive part."""
    values, owner = _read(matrix, group_task)
    own = np.where(owner >= 0, values[np.maximum(owner, 0), np.arange(values.shape[1])], np.nan)
    behind = (owner < np.arange(len(values))[:, None]) & (owner >= 0)
    return _defined((values - own)[behind])


def forward_transfer(matrix: ArrayLike, before: ArrayLike, group_task: ArrayLike | None = None) -> float | None:
    """FWT: mean over groups of tasks j >= 1 of `R[j-1, j] - before[j]` (Lopez-Paz & Ranzato 2017).

    before: (G,) accuracy before any training. Zero by construction where answers are restricted to seen classes.
    """
    values, owner = _read(matrix, group_task)
    later = np.flatnonzero(owner >= 1)
    return _defined(values[owner[later] - 1, later] - np.asarray(before, np.float64)[later])


def zero_shot_transfer(matrix: ArrayLike, group_task: ArrayLike | None = None) -> float | None:
    """Transfer of MTIL (ZSCL 2023): per group the mean over i < j of `R[i, j]`, then the mean over groups; not the flat
    mean of the upper triangle."""
    values, owner = _read(matrix, group_task)
    means = [_defined(values[: owner[j], j]) for j in np.flatnonzero(owner >= 1)]
    return _defined(np.array([mean for mean in means if mean is not None]))


def matrix_average(matrix: ArrayLike) -> float | None:
    """Avg of MTIL (ZSCL 2023): mean of the whole matrix, groups of future tasks included."""
    values, _ = _read(matrix, np.zeros(np.shape(matrix)[-1]))
    return _defined(values)


def _read(matrix: ArrayLike, group_task: ArrayLike | None) -> tuple[FloatArray, IntArray]:
    values = np.asarray(matrix, np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"the accuracy matrix must be (tasks, groups) with at least one task, not {values.shape}")
    owner = np.arange(values.shape[1]) if group_task is None else np.asarray(group_task, np.int64)
    if owner.shape != values.shape[1:] or np.any(owner >= len(values)):
        raise ValueError(f"group_task must name a task of the {len(values)} for each of {values.shape[1]} groups")
    return values, owner


def _defined(values: FloatArray) -> float | None:
    """Mean of the finite entries, None if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None
