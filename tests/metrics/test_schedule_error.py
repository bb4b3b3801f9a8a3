"""What sparse schedules miss: the bounds hold where their assumptions do, and are zero where nothing is left out."""

import numpy as np
import pytest
from curves import Plain, plain_curves
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.evaluator import Schedule
from clbench.metrics import Curve, stability
from clbench.metrics.schedule_error import (
    deepest_dip,
    lowest_by_slope,
    min_accuracy_error,
    thinned,
    worst_case_accuracy_error,
)


def after_a_switch(values: list[float], total: int = 1000) -> Curve:
    """Task 0 of one step, then one task with `values` of group 0 behind each step; group 1 rises to 0.5."""
    steps = np.arange(1, len(values) + 2)
    hits = np.zeros((len(steps), 2), np.int64)
    hits[:, 0] = np.round(np.array([0.9, *values]) * total)
    hits[1:, 1] = total // 2
    valid = np.ones_like(hits, dtype=bool)
    valid[0, 1] = False
    return Curve.of(
        steps=steps, task=[0] + [1] * len(values), hits=hits, valid=valid, totals=[total] * 2, group_task=[0, 1],
        task_ends=[1, len(steps)],
    )  # fmt: skip


# -- thinning ---------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(plain_curves(), st.integers(1, 6), st.integers(0, 6))
def test_thinned_is_what_the_schedule_evaluates(plain: Plain, every: int, dense: int) -> None:
    curve = plain.curve()
    thin = thinned(curve, every, dense)
    schedule = Schedule(every, dense)
    expected = {0}
    for start, end in zip([0, *plain.ends], plain.ends, strict=False):
        expected |= {start + n for n in range(1, end - start + 1) if schedule.due(n)} | {end}
    assert thin.steps.tolist() == sorted(expected & set(curve.steps.tolist()))
    assert thinned(curve, 1, 0).steps.tolist() == curve.steps.tolist()


@settings(max_examples=60, deadline=None)
@given(plain_curves(min_tasks=2), st.integers(1, 6), st.integers(0, 6))
def test_leaving_out_can_only_raise_minima(plain: Plain, every: int, dense: int) -> None:
    curve = plain.curve()
    thin = thinned(curve, every, dense)
    for metric in (stability.min_accuracy, stability.worst_case_accuracy):
        whole, part = metric(curve), metric(thin)
        assert whole is not None
        assert part is not None
        assert part.value >= whole.value - 1e-12


# -- bounds -----------------------------------------------------------------------------------------------------------
@given(plain_curves(min_tasks=2))
def test_every_iteration_misses_nothing(plain: Plain) -> None:
    for error in (min_accuracy_error(plain.curve()), worst_case_accuracy_error(plain.curve())):
        assert error == (0.0, 0.0)


def test_nothing_is_stated_without_a_dense_stretch() -> None:
    curve = after_a_switch([0.5] * 120)
    assert min_accuracy_error(thinned(curve, 10, 0)) is None
    assert min_accuracy_error(thinned(curve, 10, 48)) is None  # the fall may not be over
    short = min_accuracy_error(thinned(curve, 30, 50))
    assert short is not None
    assert short.dip is None
    enough = min_accuracy_error(thinned(curve, 10, 50))
    assert enough == (0.0, 0.0)  # nothing moves there
    assert min_accuracy_error(after_a_switch([])) is None


def test_bounds_by_hand() -> None:
    calm = [0.5, 0.48, 0.5, 0.48, 0.5, 0.48, 0.5, 0.48]  # falls and rises by 0.02, dips by 0.02
    curve = after_a_switch([0.3] + [0.5] * 43 + calm + [0.45] * 3 + [0.5] + [0.5] * 4)
    thin = thinned(curve, 4, 52)
    assert thin.steps.tolist()[-3:] == [53, 57, 61]
    error = min_accuracy_error(thin)
    assert error is not None
    # lowest seen: 0.3; the stretches cannot come near it
    assert error == (pytest.approx(0.0), pytest.approx(0.0))
    shallow = after_a_switch([0.5] * 44 + calm + [0.45] * 3 + [0.5] + [0.5] * 4)
    error = min_accuracy_error(thinned(shallow, 4, 52))
    assert error is not None
    # from 0.48 at step 53 to 0.50 at step 57: falls to (0.02 * 0.48 + 0.02 * 0.5 - 0.0004 * 4) / 0.04 = 0.45
    assert error.slope == pytest.approx(0.48 - 0.45)
    assert error.dip == pytest.approx(0.02)
    worst = worst_case_accuracy_error(thinned(shallow, 4, 52))
    assert worst is not None
    assert worst.slope == pytest.approx((0.48 - 0.45) / 2)  # the current group has no error


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-20, 20), min_size=90, max_size=90), st.integers(2, 12), st.sampled_from([50, 56])
)  # fmt: skip
def test_the_safe_bound_holds_wherever_its_assumption_does(changes: list[int], every: int, dense: int) -> None:
    """Steps of at most 20 of 1000, and both -20 and 20 seen in the second half of the dense stretch."""
    changes[dense - 4 : dense] = [20, -20, 20, -20]
    values = np.clip(500 + np.cumsum(changes), 0, 1000) / 1000
    curve = after_a_switch(values.tolist())
    thin = thinned(curve, every, dense)
    whole, part, error = stability.min_accuracy(curve), stability.min_accuracy(thin), min_accuracy_error(thin)
    assert whole is not None
    assert part is not None
    assert error is not None
    fallen = np.diff(values[dense // 2 - 1 : dense])
    if fallen.min() <= -0.02 and fallen.max() >= 0.02:  # unless clipped at 0 or 1
        assert part.value - whole.value <= error.slope + 1e-9


@given(st.lists(st.integers(0, 9), min_size=2, max_size=14), st.integers(1, 8))
def test_deepest_dip_matches_its_definition(values: list[int], length: int) -> None:
    series = np.array(values, np.float64)
    expected = max(
        (min(series[i], series[j]) - series[i : j + 1].min()
         for i in range(len(series)) for j in range(i, min(i + length, len(series) - 1) + 1)),
        default=0.0,
    )  # fmt: skip
    assert deepest_dip(series, length) == expected


def test_lowest_by_slope() -> None:
    assert lowest_by_slope(0.5, 0.5, 4, np.array([-0.1, 0.1])) == pytest.approx(0.3)
    assert lowest_by_slope(0.5, 0.6, 4, np.array([0.1, 0.1])) == 0.5  # never falls
    assert lowest_by_slope(0.5, 0.6, 4, np.array([0.0, 0.0])) == 0.5
