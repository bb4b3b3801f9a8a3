"""Metrics per label level, where answers are asked for on several (`hle` card, section 5.5)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.metrics.accuracy_matrix import average_incremental_accuracy, final_accuracy
from clbench.metrics.curve import Curve, FloatArray, IntArray
from clbench.metrics.online import anytime_accuracy, f_last, official_points

__all__ = ["per_level"]


def per_level(
    levels: IntArray,
    matrix: FloatArray,
    curve: Curve,
    active: NDArray[np.bool_],
    sizes: ArrayLike,
    sample_period: int | None = None,
) -> list[dict[str, float | None]]:
    """One entry per level, coarsest first; empty if there is only one.

    levels: (G,) label level of each group.  matrix, active: (K, G).  sizes: (G,).

    Keys: `level`; `a_auc`, mean over the evaluations at which the level was open (the official ones if there is a
    `sample_period`, else all) of the accuracy on its opened classes; `a_avg` and `a_last`, the mean over tasks and the
    last of the accuracy after a task; `f_last`, see `online.f_last`.
    """
    found = np.unique(levels)
    if len(found) < 2:
        return []
    points = np.arange(len(curve.steps))
    if sample_period is not None:
        points = official_points(curve.position, sample_period, curve.phase)
    out: list[dict[str, float | None]] = []
    for level in found.tolist():
        own = levels == level
        tables = (matrix[:, own], np.zeros(own.sum(), np.int64), np.asarray(sizes)[own], active[:, own])
        out.append(
            {
                "level": level,
                "a_auc": anytime_accuracy(
                    curve.hits[np.ix_(points, own)], curve.totals[own], curve.valid[np.ix_(points, own)]
                ),
                "a_avg": average_incremental_accuracy(*tables),
                "a_last": final_accuracy(*tables),
                "f_last": f_last(matrix[:, own], active[:, own]),
            }
        )
    return out
