"""Forward facilitation: does each further task take fewer samples to learn? (`power_law` card, section 1, metrics.)

Of a task t: how many of its own samples had been streamed when its accuracy first reached a fixed level. That number as
a function of t falls if earlier tasks make later ones easier; `facilitation` puts a straight line through it. Numbers
are as fine as the evaluations lie: compare runs of the same schedule and the same level only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.metrics.curve import Curve, FloatArray

__all__ = ["Facilitation", "facilitation", "own_samples", "samples_to_reach", "samples_to_reach_per_task"]


class Facilitation(NamedTuple):
    """slope: samples per task, of the least-squares line through samples to reach the level against the task's index;
    below 0 each further task needs fewer. missing: tasks that never reached the level. They are not in the slope: with
    some missing, read it with care, since it is then taken over the easy tasks."""

    slope: float
    missing: int


def samples_to_reach(samples: ArrayLike, accuracy: ArrayLike, level: float) -> float:
    """Samples at the first evaluation with at least the accuracy `level`; NaN if there is none.

    samples: (S,) of the task streamed before each evaluation, not decreasing; 0 is the state before the task.
    accuracy: (S,) fractions on the task's test images, NaN where it was not evaluated.
    """
    reached = np.flatnonzero(np.asarray(accuracy, np.float64) >= level)
    return float(np.asarray(samples, np.float64)[reached[0]]) if len(reached) else float("nan")


def own_samples(position: ArrayLike, own: Sequence[NDArray[np.bool_]], task: int) -> FloatArray:
    """(S,) samples of `task` streamed up to each stream position, inside the task's own stretch of the stream.

    position: (S,) samples of all tasks streamed, at least the start of that stretch; positions behind it count in full.
    own: one (n,) bool array per stretch: which of its samples belong to the new task and are not rehearsed. Samples of
    further epochs are counted again.
    """
    start = sum(len(stretch) for stretch in own[:task])
    so_far = np.concatenate([[0], np.cumsum(own[task])])
    return np.asarray(so_far[np.clip(np.asarray(position, np.int64) - start, 0, len(own[task]))], np.float64)


def samples_to_reach_per_task(curve: Curve, own: Sequence[NDArray[np.bool_]], level: float) -> FloatArray:
    """(K,) samples of each task until the accuracy on its groups, pooled, was first at `level`; NaN where it never was.

    For online streams, whose positions move with every batch. Only evaluations inside the task's own stretch count
    (the untrained state included, at 0 samples), and those whose stream position is known. own: see `own_samples`; K
    arrays. Raises ValueError if there are fewer than the tasks of the curve.
    """
    if len(own) < curve.num_tasks:
        raise ValueError(f"the curve has {curve.num_tasks} tasks, but `own` has {len(own)}")
    out = np.full(len(own), np.nan)
    for task in range(curve.num_tasks):
        inside = curve.during(task)
        groups = curve.group_task == task
        counted = curve.valid[inside][:, groups] & (curve.position[inside] >= 0)[:, None]
        rows = counted @ curve.totals[groups]
        right = (curve.hits[inside][:, groups] * counted).sum(axis=1)
        accuracy = np.full(len(rows), np.nan)
        np.divide(right, rows, out=accuracy, where=rows > 0)
        samples = own_samples(curve.position[inside], own, task)
        samples[curve.steps[inside] == 0] = 0  # the untrained state is recorded at the end of the first batch
        out[task] = samples_to_reach(samples, accuracy, level)
    return out


def facilitation(samples: ArrayLike) -> Facilitation | None:
    """The slope of samples to reach a level over tasks; None if fewer than two tasks reached it.

    samples: (K,) as `samples_to_reach_per_task` gives them; NaN where the level was not reached.

    >>> facilitation([3000, 2000, float("nan"), 0])
    Facilitation(slope=-1000.0, missing=1)
    """
    values = np.asarray(samples, np.float64)
    tasks = np.flatnonzero(np.isfinite(values))
    if len(tasks) < 2:
        return None
    centred = tasks - tasks.mean()
    slope = float(centred @ values[tasks] / (centred @ centred))
    return Facilitation(slope, len(values) - len(tasks))
