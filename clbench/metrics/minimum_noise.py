"""Minima over noisy subsets: how far min-ACC and WC-ACC are off because accuracy is counted on a subset of n rows.

The lowest of many noisy values is too low: E[min_n Â(n)] <= min_n A(n), with A the accuracy on endless test data and
Â that on the subset. How much depends on how the errors of different states go together, which counts alone don't tell:
if the rows that are wrong stay the same ones, nothing; if they change at every step, up to three standard errors. So
the evaluator counts each group in random parts of equal size (`clbench.evaluator.parts`), and the minimum is estimated
a second time with each part judged at the step that the *other* parts show as the lowest. Rows of different parts have
nothing to do with each other, so this is too high: min_n A(n) <= E[crossed]. Both hold without any assumption on A, on
the steps or on the correlation in time.

Estimate: the middle of the two, off by at most half of their distance, in expectation. Interval, 95 %, for the mean
over groups (Wilson limits per group, put together as Zou & Donner 2008 do): its lower end is the lower limit at the
plain minimum, safe because that lies below Â at the true lowest step. Its upper end comes from crossing two halves of
the parts, with the error of one half: the two crossed values may go together in any way, and their mean still has no
larger error than one of them. (Ten crossed tenths have no such guarantee: in simulation their own error is too small.)

"Lowest" is over the evaluated steps; what a sparse schedule misses is in `clbench.metrics.schedule_error`.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.metrics.curve import Curve, FloatArray, IntArray
from clbench.metrics.stability import worst_case_trace

__all__ = ["Corrected", "corrected_min_accuracy", "corrected_worst_case_accuracy", "crossed_minimum", "wilson"]

Z95 = 1.959963984540054  # two-sided 95 %
Window = tuple[int, IntArray]  # a group, and the evaluations its minimum is taken over


class Corrected(NamedTuple):
    """A mean of minima, corrected: plain <= truth <= crossed in expectation; value: their middle; [low, high]: 95 %."""

    value: float
    low: float
    high: float
    plain: float
    crossed: float


def corrected_min_accuracy(curve: Curve, parts: ArrayLike, part_totals: ArrayLike) -> Corrected | None:
    """min-ACC. parts: (S, G, P) hits of each part of each group's subset; part_totals: (G, P) their rows. None while no
    group is left."""
    return corrected_mean(min_windows(curve), parts, part_totals)


def corrected_worst_case_accuracy(curve: Curve, parts: ArrayLike, part_totals: ArrayLike) -> Corrected | None:
    """WC-ACC at the end of the run; arguments as above. None for a single task."""
    return corrected_mean(worst_case_windows(curve), parts, part_totals)


def min_windows(curve: Curve) -> list[Window]:
    """Every left group with the evaluations since (those where it was measured)."""
    found = [(group, measured(curve, group, curve.left(group))) for group in range(len(curve.groups))]
    return [(group, slots) for group, slots in found if len(slots)]


def worst_case_windows(curve: Curve) -> list[Window]:
    """The same up to the last evaluation at which WC-ACC is defined, and the current task's groups at that one."""
    defined = np.flatnonzero(np.isfinite(worst_case_trace(curve)))
    if curve.num_tasks < 2 or not len(defined) or curve.task[defined[-1]] == 0:
        return []
    last = int(defined[-1])
    found = []
    for group, task in enumerate(curve.group_task.tolist()):
        if task == curve.task[last]:
            found.append((group, np.array([last])))
        elif 0 <= task < curve.task[last]:
            found.append((group, measured(curve, group, slice(curve.left(group).start, last + 1))))
    return found


def measured(curve: Curve, group: int, slots: slice) -> IntArray:
    """The evaluations inside `slots` at which a group has an accuracy."""
    inside: IntArray = slots.start + np.flatnonzero(np.isfinite(curve.accuracy[slots, group]))
    return inside


def corrected_mean(windows: list[Window], parts: ArrayLike, part_totals: ArrayLike) -> Corrected | None:
    """Mean over groups of their corrected minima."""
    hits, totals = np.asarray(parts, np.float64), np.asarray(part_totals, np.float64)
    if not windows:
        return None
    plain, crossed, halved, sizes = [], [], [], []
    for group, slots in windows:
        own, rows = hits[slots, group], totals[group]
        plain.append(own.sum(axis=1).min() / rows.sum())
        crossed.append(crossed_minimum(own, rows))
        halved.append(crossed_minimum(halves(own), halves(rows)))
        sizes.append(rows.sum())
    lowest, size = np.array(plain), np.array(sizes)
    above = np.array(halved)
    low = lowest.mean() - math.sqrt(((lowest - wilson(lowest, size)[0]) ** 2).sum()) / len(size)
    high = above.mean() + math.sqrt(((wilson(above, size / 2)[1] - above) ** 2).sum()) / len(size)
    middle = float(lowest.mean() + np.mean(crossed)) / 2
    return Corrected(
        middle, min(float(low), middle), max(float(high), middle), float(lowest.mean()), float(np.mean(crossed))
    )


def halves(parts: FloatArray) -> FloatArray:
    """(..., P) -> (..., 2): even and odd parts added up."""
    return np.stack([parts[..., 0::2].sum(axis=-1), parts[..., 1::2].sum(axis=-1)], axis=-1)


def crossed_minimum(hits: FloatArray, totals: FloatArray) -> float:
    """Accuracy with each part judged at the step that the others show as the lowest, (n, P) hits and (P,) rows; where
    they show several, at the mean of those. Parts without rows are left out."""
    others = hits.sum(axis=1, keepdims=True) - hits
    lowest = others == others.min(axis=0)
    return float(((hits * lowest).sum(axis=0) / lowest.sum(axis=0)).sum() / totals.sum())


def wilson(share: ArrayLike, rows: ArrayLike, z: float = Z95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Limits of a share observed on so many rows (Wilson 1927): inside [0, 1], and of positive width at 0 and 1 too.

    >>> [round(float(limit), 3) for limit in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    p, n = np.asarray(share, np.float64), np.asarray(rows, np.float64)
    centre = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - half) / scale, (centre + half) / scale
