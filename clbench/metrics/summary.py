"""All metrics of a run, under the keys of `summary.json` (see `registry.toml` for what each one is)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.metrics import accuracy_matrix as matrix_metrics
from clbench.metrics import online, stability
from clbench.metrics.curve import Curve, FloatArray
from clbench.metrics.facilitation import facilitation, samples_to_reach_per_task
from clbench.metrics.minimum_noise import corrected_min_accuracy, corrected_worst_case_accuracy
from clbench.metrics.registry import list_metrics
from clbench.metrics.schedule_error import min_accuracy_error, worst_case_accuracy_error

__all__ = ["summarise"]

FACILITATION_LEVEL = 0.8


def summarise(
    matrix: ArrayLike,
    *,
    group_task: ArrayLike,
    sizes: ArrayLike,
    setting: Literal["class", "task", "domain"],
    mask: Literal["seen", "all", "task"],
    before: ArrayLike | None = None,
    curve: Curve | None = None,
    active: ArrayLike | None = None,
    sample_period: int | None = None,
    own: Sequence[NDArray[np.bool_]] | None = None,
    parts: tuple[ArrayLike, ArrayLike] | None = None,
) -> dict[str, float | None]:
    """Return every metric of the registry, plus `<key>_se` where a sampling error belongs to it; None if undefined.

    matrix: (K, G) fractions on full test sets.  group_task, sizes: (G,) task and number of test rows of each group.
    setting: in `class` final and average incremental accuracy are top-1 on the pooled test sets, else means over tasks.
    mask: what answers were taken over; with `seen` a future task scores 0 by construction, so transfers to it are None.
    before: (G,) fractions before any training, or None if that was not measured.  curve: None if it was not recorded.
    active: (K, G) bool, groups that had begun to count after each task; None: those of the tasks so far.
    sample_period: samples between the evaluations of an online protocol that has them (Si-Blurry); a_auc is then the
        plain mean over those evaluations, and f_last is defined.
    own: of an online stream, per task (n,) which of its samples belong to the new task and are not rehearsed.
    parts: of the curve, (S, G, P) hits of random parts of each group's subset, and (G, P) their rows.
    """
    pooled = sizes if setting == "class" else None
    out: dict[str, float | None] = {key: None for metric in list_metrics() for key in metric.keys}
    out["final_accuracy"] = matrix_metrics.final_accuracy(matrix, group_task, pooled, active)
    out["average_incremental_accuracy"] = matrix_metrics.average_incremental_accuracy(
        matrix, group_task, pooled, active
    )
    out["forgetting"] = matrix_metrics.forgetting(matrix, group_task, active=active)
    out["backward_transfer"] = matrix_metrics.backward_transfer(matrix, group_task)
    out["a_last"] = matrix_metrics.final_accuracy(matrix, group_task, sizes, active)
    out["last"] = matrix_metrics.final_accuracy(matrix, group_task, active=active)
    if sample_period is not None and active is not None:
        out["f_last"] = online.f_last(np.asarray(matrix, np.float64), np.asarray(active, np.bool_))
    if mask != "seen":
        out["transfer"] = matrix_metrics.zero_shot_transfer(matrix, group_task)
        out["avg"] = matrix_metrics.matrix_average(matrix)
        if before is not None:
            out["forward_transfer"] = matrix_metrics.forward_transfer(matrix, before, group_task)
    if curve is not None:
        out |= _of_curve(curve) | _of_minima(curve, parts)
        if sample_period is not None:
            points = online.official_points(curve.position, sample_period, curve.phase)
            out["a_auc"] = online.anytime_accuracy(curve.hits[points], curve.totals, curve.valid[points])
        if own is not None:
            needed = samples_to_reach_per_task(curve, own, FACILITATION_LEVEL)
            out["facilitation_missing"] = float(np.isnan(needed).sum())
            found = facilitation(needed)
            out["facilitation_slope"] = None if found is None else found.slope
    return out


def _of_curve(curve: Curve) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    gap = stability.stability_gap(curve)
    estimates = {
        "min_accuracy": stability.min_accuracy(curve),
        "worst_case_accuracy": stability.worst_case_accuracy(curve),
        "stability_gap": None if gap is None else gap[0],
    }
    for key, estimate in estimates.items():
        out[key], out[f"{key}_se"] = (None, None) if estimate is None else estimate
    if gap is not None:
        out["stability_gap_max"] = gap[1]
        out["recovery_iterations"], out["recovery_missing"] = stability.recovery(curve)
    for window in (10, 100):
        out[f"wf_{window}"] = _mean(stability.windowed_forgetting(curve, window))
        out[f"wp_{window}"] = _mean(stability.windowed_plasticity(curve, window))
    out["lca"] = stability.learning_curve_area(curve)
    out["a_auc"] = stability.area_under_curve(curve)
    return out


def _of_minima(curve: Curve, parts: tuple[ArrayLike, ArrayLike] | None) -> dict[str, float | None]:
    """How far the minima may be off: by the noise of their subsets, and by what the schedule left out."""
    out: dict[str, float | None] = {}
    errors = {"min_accuracy": min_accuracy_error(curve), "worst_case_accuracy": worst_case_accuracy_error(curve)}
    for key, error in errors.items():
        if error is not None:
            out[f"{key}_missed"], out[f"{key}_missed_safe"] = error.dip, error.slope
    if parts is not None:
        corrections = {
            "min_accuracy": corrected_min_accuracy(curve, *parts),
            "worst_case_accuracy": corrected_worst_case_accuracy(curve, *parts),
        }
        for key, found in corrections.items():
            if found is not None:
                out[f"{key}_corrected"], out[f"{key}_low"], out[f"{key}_high"] = found[:3]
    return out


def _mean(values: FloatArray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None
