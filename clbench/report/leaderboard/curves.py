"""Curves, accuracy matrices and confusion matrices of runs, packed small enough for a page that holds hundreds.

A packed thing is JSON, deflated, as base64: the page unpacks one when it is looked at. Fractions are integers in units
of 1/10000, shifted by one so that 0 says "not evaluated", and each series holds differences to its last value: long
runs of small numbers, which deflate well.
"""

import base64
import json
import zlib
from typing import Any

import numpy as np

from clbench.metrics import Curve, stability
from clbench.metrics.curve import FloatArray, IntArray
from clbench.store.record import Matrix

__all__ = ["MAX_CLASSES", "Confusion", "columns_for", "confusion_of", "pack", "pack_curve", "pack_matrix"]

UNIT = 10_000
MAX_COLUMNS, MIN_COLUMNS = 500, 40
MAX_CLASSES = 400  # a confusion matrix of more classes is no picture any more
Confusion = dict[str, Any]


def pack(content: Any) -> str:
    """JSON, raw deflate, base64."""
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    squeezed = zlib.compressobj(6, zlib.DEFLATED, -15)
    return base64.b64encode(squeezed.compress(data) + squeezed.flush()).decode("ascii")


def columns_for(channels: int, values: int) -> int:
    """Points that a curve of so many channels may have, if it is to hold about `values` numbers (three per point)."""
    return max(MIN_COLUMNS, min(MAX_COLUMNS, values // max(3 * channels, 1)))


def pack_curve(curve: Curve, values: int = 200_000) -> str:
    """The curve as the page draws it. Channels: mean over the tasks so far, worst case so far, then each group.

    A curve with more evaluations than fit in `values` numbers is thinned to columns of neighbours that never cross a
    task switch; mean, lowest and highest of each are kept, so that no dip is lost.
    """
    worst = stability.worst_case_trace(curve)
    channels = np.column_stack([curve.mean_accuracy, worst, curve.accuracy])
    starts = column_starts(curve, columns_for(channels.shape[1], values))
    found = stability.dips(curve)
    content: dict[str, Any] = {
        "steps": _differences(curve.steps[starts]),
        "tasks": _differences(curve.task[starts]),
        "ends": curve.task_ends.tolist(),
        "groups": list(curve.groups),
        "group_task": curve.group_task.tolist(),
        "totals": curve.totals.tolist(),
        "evaluations": len(curve.steps),
        "dips": [
            [int(group), _fraction(before), _fraction(low), int(step), None if np.isnan(back) else int(back)]
            for group, before, low, step, back in zip(*found, strict=True)
        ],
    }
    if len(starts) == len(curve.steps):
        content["mean"] = _series(channels.T)
        return pack(content)
    low, high = np.fmin.reduceat(channels, starts), np.fmax.reduceat(channels, starts)
    measured = np.isfinite(channels)
    count = np.add.reduceat(measured.astype(np.int64), starts)
    mean = np.full(low.shape, np.nan)
    np.divide(np.add.reduceat(np.where(measured, channels, 0.0), starts), count, out=mean, where=count > 0)
    content |= {
        "mean": _series(mean.T),
        "low": _series(low.T),
        "high": _series(high.T),
    }
    return pack(content)


def column_starts(curve: Curve, columns: int) -> IntArray:
    """(P,) first evaluation of each column; every evaluation is one if there are few enough."""
    number = len(curve.steps)
    if number <= columns:
        return np.arange(number)
    steps, task = curve.steps, curve.task
    column = (steps - steps[0]) * columns // (steps[-1] - steps[0] + 1)
    return np.flatnonzero(np.r_[True, (np.diff(column) != 0) | (np.diff(task) != 0)])


def pack_matrix(matrix: Matrix) -> str:
    """`R[i, j]`, sizes of the groups, and the accuracy before training where that was measured."""
    before = None if matrix.before is None else _series(matrix.before[None])[0]
    rows = _series(matrix.accuracy)
    return pack({"groups": list(matrix.groups), "sizes": matrix.sizes.tolist(), "rows": rows, "before": before})


def confusion_of(
    targets: IntArray, predictions: IntArray, sizes: IntArray | None, group_task: IntArray | None
) -> Confusion | None:
    """Counts of (target, answer) after the last task, classes in the order in which they were learned.

    targets, predictions: (N,) class ids, test rows in the order of the groups, whose sizes and tasks are (G,).
    None if there are more than `MAX_CLASSES` classes. `bounds`: positions at which a new task's classes begin.
    """
    classes = np.unique(np.concatenate([targets, predictions]))
    if len(classes) > MAX_CLASSES:
        return None
    first = np.full(len(classes), np.iinfo(np.int64).max)
    at = np.searchsorted(classes, targets)
    if sizes is not None and group_task is not None and sizes.sum() == len(targets):
        np.minimum.at(first, at, np.repeat(group_task, sizes))
    order = np.lexsort((classes, first))
    place = np.argsort(order, kind="stable")
    cells = place[at] * len(classes) + place[np.searchsorted(classes, predictions)]
    cell, count = np.unique(cells, return_counts=True)
    switches = np.flatnonzero(np.diff(first[order])) + 1
    return {
        "classes": classes[order].tolist(),
        "bounds": switches.tolist(),
        "cells": _differences(cell),
        "counts": count.tolist(),
    }


def _differences(values: IntArray) -> list[int]:
    steps: list[int] = np.diff(values, prepend=0).tolist()
    return steps


def _series(values: FloatArray) -> list[list[int]]:
    """(C, P) fractions -> C lists."""
    scaled = np.where(np.isfinite(values), np.rint(values * UNIT) + 1, 0).astype(np.int64)
    steps: list[list[int]] = np.diff(scaled, prepend=0, axis=1).tolist()
    return steps


def _fraction(value: float) -> int:
    return round(value * UNIT)
