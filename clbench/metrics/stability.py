"""Metrics of the per-iteration curve: what happens between the task ends (De Lange et al. 2023, `stability_gap` card).

A group is *left* once the last update of its own task is done; candidates for its minimum start behind the first update
of the next task. Windows are counted in evaluations, not in steps: compare runs of the same schedule only. Groups that
belong to no single task (`group_task` -1) have no switch; they count in windowed drops and rises alone.

Every minimum comes with the sampling error of its subset: sqrt(p (1 - p) / n) for one group of n rows, combined over a
mean of groups as if they were independent (their rows are disjoint). It is the distance to the value on endless test
data, at a given state; that a minimum over many states is a little too low is not in it, and small as the subset is
fixed for the run. At p = 0 or 1 the estimate is 0, which says only that n is too small to tell.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from clbench.metrics.curve import Curve, FloatArray, IntArray

__all__ = [
    "Dips",
    "Estimate",
    "Minima",
    "area_under_curve",
    "dips",
    "learning_curve_area",
    "max_drop",
    "max_rise",
    "min_accuracy",
    "minima",
    "recovery",
    "stability_gap",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
    "worst_case_trace",
]

RECOVERED = 0.95  # share of the accuracy before a switch that counts as recovered


class Estimate(NamedTuple):
    """A fraction, and the sampling error (standard deviation) of the evaluation subsets it was taken over."""

    value: float
    standard_error: float


class Minima(NamedTuple):
    """Lowest points of the L groups that were left and evaluated since. group: (L,) int64 index; lowest: (L,) fraction;
    step: (L,) int64 at which it was first reached."""

    group: IntArray
    lowest: FloatArray
    step: IntArray


class Dips(NamedTuple):
    """The dip of L groups in the task right behind their own.

    before: (L,) accuracy at the end of the own task.  lowest, lowest_step: (L,) minimum in the next task, and where.
    recovery: (L,) steps from the switch to the first evaluation, from the lowest point on, with 95 % of `before`;
        0 if it never fell below that, NaN if it never came back within the task.
    """

    group: IntArray
    before: FloatArray
    lowest: FloatArray
    lowest_step: IntArray
    recovery: FloatArray


# -- minima -----------------------------------------------------------------------------------------------------------
def minima(curve: Curve) -> Minima:
    """Lowest accuracy of every left group over all that followed its own task."""
    found = []
    for group in range(len(curve.groups)):
        behind = curve.left(group)
        values = curve.accuracy[behind, group]
        if np.isfinite(values).any():
            at = int(np.nanargmin(values))
            found.append((group, values[at], curve.steps[behind][at]))
    table = np.array(found, np.float64).reshape(-1, 3)
    return Minima(table[:, 0].astype(np.int64), table[:, 1], table[:, 2].astype(np.int64))


def min_accuracy(curve: Curve) -> Estimate | None:
    """min-ACC: mean over left groups of their lowest accuracy since. None while there is none."""
    lows = minima(curve)
    return _mean(lows.lowest, curve.totals[lows.group])


def worst_case_trace(curve: Curve) -> FloatArray:
    """WC-ACC(n), (S,): mean over the groups so far, the current task's with their accuracy now, left ones with their
    minimum up to now. NaN where a group has no value yet (before the first update behind a switch)."""
    lowest, _ = _worst_case(curve)
    so_far = (curve.group_task >= 0) & (curve.group_task <= curve.task[:, None])
    count = so_far.sum(axis=1)
    out = np.full(len(curve.steps), np.nan)
    np.divide(np.where(so_far, lowest, 0.0).sum(axis=1), count, out=out, where=count > 0)
    return out


def worst_case_accuracy(curve: Curve) -> Estimate | None:
    """The last defined value of `worst_case_trace`; None for a single task, where there is no worst case yet."""
    if curve.num_tasks < 2:
        return None
    defined = np.flatnonzero(np.isfinite(worst_case_trace(curve)))
    if not len(defined) or curve.task[defined[-1]] == 0:
        return None
    lowest, so_far = _worst_case(curve)
    chosen = so_far[defined[-1]]
    return _mean(lowest[defined[-1], chosen], curve.totals[chosen])


# -- the gap behind a switch ------------------------------------------------------------------------------------------
def dips(curve: Curve) -> Dips:
    """Dip and recovery of every left group in the task right behind its own."""
    found = []
    for group, task in enumerate(curve.group_task.tolist()):
        own = curve.accuracy[curve.during(task), group] if task >= 0 else np.empty(0)
        behind, following = curve.left(group), curve.during(task + 1)
        window = slice(max(behind.start, following.start), following.stop)
        values, steps = curve.accuracy[window, group], curve.steps[window]
        measured = np.isfinite(values)
        if not np.isfinite(own).any() or not measured.any():
            continue
        before = own[np.isfinite(own)][-1]
        values, steps = values[measured], steps[measured]
        at = int(values.argmin())
        goal = RECOVERED * before
        back = np.flatnonzero(values[at:] >= goal)
        if values[at] >= goal:
            recovery = 0.0
        else:
            recovery = float(steps[at + back[0]] - curve.task_ends[task]) if len(back) else np.nan
        found.append((group, before, values[at], steps[at], recovery))
    table = np.array(found, np.float64).reshape(-1, 5)
    return Dips(table[:, 0].astype(np.int64), table[:, 1], table[:, 2], table[:, 3].astype(np.int64), table[:, 4])


def stability_gap(curve: Curve) -> tuple[Estimate, float] | None:
    """Mean over left groups of `before - lowest` in the next task, and its maximum over groups.

    A fall and its start are counted on the same rows, so their errors partly cancel: the standard error, which adds
    them as if independent, is an upper bound.
    """
    found = dips(curve)
    if not len(found.group):
        return None
    gaps = found.before - found.lowest
    n = curve.totals[found.group]
    variance = (found.before * (1 - found.before) + found.lowest * (1 - found.lowest)) / n
    return Estimate(float(gaps.mean()), float(np.sqrt(variance.sum()) / len(gaps))), float(gaps.max())


def recovery(curve: Curve) -> tuple[float | None, int]:
    """Mean recovery time in steps over the groups that recovered (None if none did), and how many did not."""
    times = dips(curve).recovery
    back = times[np.isfinite(times)]
    return (float(back.mean()) if len(back) else None), len(times) - len(back)


# -- windows ----------------------------------------------------------------------------------------------------------
def max_drop(values: ArrayLike, window: int) -> float:
    """Largest fall `x[i] - x[i']` with i < i' inside any `window` consecutive values, at least 0. O(n log window).

    >>> max_drop([0.5, 0.1, 0.9], 2), max_rise([0.5, 0.1, 0.9], 2)
    (0.4, 0.8)
    """
    series = np.asarray(values, np.float64)
    return float((series - _lowest_ahead(series, window)).max(initial=0.0))


def max_rise(values: ArrayLike, window: int) -> float:
    """Largest rise `x[i'] - x[i]` with i < i' inside any `window` consecutive values, at least 0."""
    return max_drop(-np.asarray(values, np.float64), window)


def windowed_forgetting(curve: Curve, window: int) -> FloatArray:
    """WF^w, (G,): each group's largest drop within `window` evaluations since its own task began, while that is being
    learned included. NaN for a group that was never evaluated."""
    return np.array([max_drop(series, window) if len(series) else np.nan for series in _since_own_task(curve)])


def windowed_plasticity(curve: Curve, window: int) -> FloatArray:
    """WP^w, (G,): the same with the largest rise, as defined in the paper. The released code prunes starts with a rule
    that is valid for drops only and may give less (`reference.max_rise_released`)."""
    return np.array([max_rise(series, window) if len(series) else np.nan for series in _since_own_task(curve)])


def learning_curve_area(curve: Curve, beta: int = 10) -> float | None:
    """LCA: mean of a group's first `beta` evaluations in its own task (the one before the first update too, if it was
    made), then mean over the groups that have that many."""
    means = []
    for group, task in enumerate(curve.group_task.tolist()):
        series = curve.accuracy[curve.during(task), group] if task >= 0 else np.empty(0)
        first = series[np.isfinite(series)][:beta]
        if len(first) == beta:
            means.append(first.mean())
    return float(np.mean(means)) if means else None


def area_under_curve(curve: Curve) -> float | None:
    """A_auc: mean accuracy on the pooled subsets over the run, each evaluation weighted with the steps since the one
    before. With evenly spaced evaluations this is their plain mean (Koh et al. 2022); step 0 has no weight."""
    pooled = curve.valid @ curve.totals
    weight = np.diff(curve.steps, prepend=0) * (pooled > 0)
    if weight.sum() == 0:
        return None
    accuracy = (curve.hits * curve.valid).sum(axis=1) / np.maximum(pooled, 1)
    return float((accuracy * weight).sum() / weight.sum())


# -- inside -----------------------------------------------------------------------------------------------------------
def _worst_case(curve: Curve) -> tuple[FloatArray, np.ndarray]:
    """(S, G) accuracy now for groups of the current task, running minimum for left ones; and which count, (S, G)."""
    running = np.full(curve.hits.shape, np.nan)
    for group, task in enumerate(curve.group_task.tolist()):
        behind, own = curve.left(group), curve.during(task)
        running[behind, group] = np.fmin.accumulate(curve.accuracy[behind, group])
        running[own, group] = curve.accuracy[own, group]
    return running, (curve.group_task >= 0) & (curve.group_task <= curve.task[:, None])


def _since_own_task(curve: Curve) -> list[FloatArray]:
    """Each group's evaluations from the start of its own task on, all of them for a group of no single task."""
    out = []
    for group, task in enumerate(curve.group_task.tolist()):
        series = curve.accuracy[curve.during(max(task, 0)).start :, group]
        out.append(series[np.isfinite(series)])
    return out


def _lowest_ahead(values: FloatArray, window: int) -> FloatArray:
    """(n,) minimum of `values[i : i + window]`, by doubling: a minimum over 2m values is that of two minima over m."""
    if window < 1:
        raise ValueError(f"a window needs at least one evaluation, not {window}")
    lowest, span = values.copy(), 1
    while span < min(window, len(values)):
        shift = min(span, window - span)
        lowest[:-shift] = np.minimum(lowest[:-shift], lowest[shift:])
        span += shift
    return lowest


def _mean(values: FloatArray, totals: IntArray) -> Estimate | None:
    if not len(values):
        return None
    error = np.sqrt((values * (1 - values) / totals).sum()) / len(values)
    return Estimate(float(values.mean()), float(error))
