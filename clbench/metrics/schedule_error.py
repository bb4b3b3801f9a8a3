"""What a sparse evaluation schedule misses of min-ACC and WC-ACC, which every-iteration evaluation would have found.

On a fixed subset, leaving out evaluations can only raise a minimum, so the error of a thinned min-ACC or WC-ACC lies
in [0, bound]. Each bound is true under an assumption on the stretches that were not evaluated. Both look at the second
half of the dense stretch that opens the same task (accuracy moves most right behind a switch, and calms down):

- `slope`: in one step accuracy falls by at most D and rises by at most R, the largest one-step fall and rise seen
  there. Between accuracies a and b, m steps apart, it is then at least (R a + D b - R D m) / (R + D).
- `dip`: between two evaluations m steps apart it goes below both of them by no more than the deepest such dip seen
  there within m steps. Stated only if that stretch is at least m evaluations long (`eval_dense >= 2 * eval_every`).

`slope` is the safe one and wide, `dip` the close one, which is exceeded now and then. Neither is stated where fewer
than `OPENING` steps behind a switch were dense: the fall may then not be over. `results/benchmarks/schedules.md` says
how both did on recorded runs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clbench.metrics.curve import Curve, FloatArray
from clbench.metrics.minimum_noise import Window, measured, min_windows, worst_case_windows

# dense evaluations behind a switch; from 20 the fall was often not over, and both bounds failed (schedules.md)
OPENING = 50

__all__ = ["ScheduleError", "min_accuracy_error", "thinned", "worst_case_accuracy_error"]


class ScheduleError(NamedTuple):
    """Upper bounds on (value measured) - (value at every-iteration evaluation), fractions; both 0 if nothing was left
    out. dip: None where too little was dense to state it."""

    slope: float
    dip: float | None


def min_accuracy_error(curve: Curve) -> ScheduleError | None:
    """Bounds for `stability.min_accuracy`. None if there is no left group, or evaluation was nowhere dense."""
    return mean_error(curve, min_windows(curve))


def worst_case_accuracy_error(curve: Curve) -> ScheduleError | None:
    """Bounds for `stability.worst_case_accuracy`; the current task's groups have no error in it."""
    return mean_error(curve, worst_case_windows(curve))


def thinned(curve: Curve, every: int, dense: int) -> Curve:
    """What a run evaluated behind the first `dense` steps of a task, every `every`-th and the last would have recorded,
    of a curve that has more. The untrained state stays."""
    starts = np.concatenate([[0], curve.task_ends])[curve.task]
    ends = np.append(curve.task_ends, np.iinfo(np.int64).max)[curve.task]
    inside = curve.steps - starts
    keep: NDArray[np.bool_] = (inside <= dense) | (inside % every == 0) | (curve.steps == ends)
    return Curve.of(
        steps=curve.steps[keep], task=curve.task[keep], phase=curve.phase[keep], position=curve.position[keep],
        hits=curve.hits[keep], totals=curve.totals, valid=curve.valid[keep], groups=curve.groups,
        group_task=curve.group_task, task_ends=curve.task_ends,
    )  # fmt: skip


# -- inside -----------------------------------------------------------------------------------------------------------
def mean_error(curve: Curve, windows: list[Window]) -> ScheduleError | None:
    if not windows:
        return None
    errors = [group_error(curve, window) for window in windows]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    dips = [error.dip for error in known if error.dip is not None]
    slope = float(np.mean([error.slope for error in known]))
    return ScheduleError(slope, float(np.mean(dips)) if len(dips) == len(known) else None)


def group_error(curve: Curve, window: Window) -> ScheduleError | None:
    """Of one group's minimum over its window. None if a stretch was left out in a task that opened with fewer than
    `OPENING` evaluations in a row."""
    group, slots = window
    if curve.task[slots[-1]] == curve.group_task[group]:  # still being learned: its value now, no minimum
        return ScheduleError(0.0, 0.0)
    earlier = measured(curve, group, slice(0, int(slots[0])))
    ends = np.concatenate([earlier[-1:], slots])  # the state at the end of the own task bounds the first stretch
    values, steps, tasks = curve.accuracy[ends, group], curve.steps[ends], curve.task[ends]
    lowest = float(curve.accuracy[slots, group].min())
    by_slope = by_dip = lowest
    long_enough = True
    for right in np.flatnonzero(np.diff(steps) > 1) + 1:
        start = opening(values, steps, tasks, int(tasks[right]))
        if len(start) < OPENING:
            return None
        calm = start[len(start) // 2 :]
        a, b, apart = values[right - 1], values[right], int(steps[right] - steps[right - 1])
        long_enough &= len(calm) >= apart
        by_slope = min(by_slope, lowest_by_slope(a, b, apart, np.diff(calm)))
        by_dip = min(by_dip, min(a, b) - deepest_dip(calm, apart))
    slope, dip = (lowest - max(float(low), 0.0) for low in (by_slope, by_dip))
    return ScheduleError(slope, dip if long_enough else None)


def opening(values: FloatArray, steps: NDArray[np.int64], tasks: NDArray[np.int64], task: int) -> NDArray[np.float64]:
    """The evaluations, one step apart, that open a task."""
    inside = np.flatnonzero(tasks == task)
    gaps = np.flatnonzero(np.diff(steps[inside]) > 1)
    return values[inside][: gaps[0] + 1] if len(gaps) else values[inside]


def lowest_by_slope(a: float, b: float, apart: int, changes: FloatArray) -> float:
    """Where falling from `a` at the fastest seen and rising to `b` at the fastest seen meet."""
    fall, rise = max(-float(changes.min()), 0.0), max(float(changes.max()), 0.0)
    if fall + rise == 0.0:
        return min(a, b)
    return min((rise * a + fall * b - rise * fall * apart) / (fall + rise), a, b)


def deepest_dip(values: FloatArray, length: int) -> float:
    """Largest fall below both ends of any stretch of at most `length` steps of `values`, one step apart."""
    deepest = 0.0
    for span in range(2, min(length, len(values) - 1) + 1):
        inner = np.lib.stride_tricks.sliding_window_view(values, span + 1)
        dips = np.minimum(inner[:, 0], inner[:, -1]) - inner.min(axis=1)
        deepest = max(deepest, float(dips.max()))
    return deepest
