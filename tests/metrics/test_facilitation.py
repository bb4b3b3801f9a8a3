"""Forward facilitation: cases by hand, invariants, and a curve over a real rehearsal stream's table."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.metrics import Curve
from clbench.metrics import facilitation as module
from clbench.metrics.facilitation import (
    Facilitation,
    facilitation,
    own_samples,
    samples_to_reach,
    samples_to_reach_per_task,
)
from clbench.scenarios.power_law import Params, build


def flags(*stretches: str) -> list[np.ndarray]:
    """`NNo`: two new samples, then one rehearsed."""
    return [np.array([letter == "N" for letter in stretch]) for stretch in stretches]


# -- samples of one task -----------------------------------------------------------------------------------------
def test_first_evaluation_at_the_level() -> None:
    assert samples_to_reach([0, 10, 20, 30], [0.1, 0.5, 0.8, 0.7], 0.8) == 20
    assert samples_to_reach([0, 10, 20, 30], [0.1, 0.9, 0.2, 0.9], 0.8) == 10, "what comes later does not matter"
    assert samples_to_reach([0, 10, 20], [0.8, 0.9, 0.9], 0.8) == 0, "known before it is trained"
    assert samples_to_reach([10, 20], [np.nan, 0.9], 0.8) == 20, "not evaluated is not reached"
    assert np.isnan(samples_to_reach([0, 10], [0.1, 0.5], 0.8))
    assert np.isnan(samples_to_reach([], [], 0.8))


def test_rehearsed_samples_do_not_count() -> None:
    own = flags("NNN", "NoNNoo")
    assert own_samples([0, 1, 3], own, 0).tolist() == [0, 1, 3]
    assert own_samples([3, 4, 5, 6, 7, 8, 9], own, 1).tolist() == [0, 1, 1, 2, 3, 3, 3]
    assert own_samples([12], own, 1).tolist() == [3]


# -- all tasks of a curve ----------------------------------------------------------------------------------------
def curve_of(points: list[tuple[int, int, int, list[int | None]]], group_task: list[int], ends: list[int]) -> Curve:
    """points: (step, task, position, hits out of 10 per group, None where it was not evaluated)."""
    hits = [[h or 0 for h in row] for *_, row in points]
    return Curve.of(
        steps=[p[0] for p in points], task=[p[1] for p in points], position=[p[2] for p in points], hits=hits,
        valid=[[h is not None for h in row] for *_, row in points],
        totals=[10] * len(group_task), group_task=group_task, task_ends=ends,
    )  # fmt: skip


def test_samples_per_task_by_hand() -> None:
    """Task 0: 8 new samples. Task 1: 4 new, 4 rehearsed. Task 2 never gets there."""
    own = flags("NNNNNNNN", "NNNNoooo", "NNNN")
    curve = curve_of(
        [
            (0, 0, 4, [0, None, None]),
            (1, 0, 4, [3, None, None]),
            (2, 0, 8, [8, None, None]),
            (3, 1, 10, [2, 7, None]),
            (4, 1, 12, [2, 6, None]),
            (5, 1, 14, [6, 8, None]),
            (6, 2, 18, [6, 8, 1]),
            (7, 2, 20, [9, 9, 2]),
        ],
        group_task=[0, 1, 2],
        ends=[2, 5, 7],
    )
    # at position 14 task 1 has shown its 4 samples, and 2 rehearsed ones
    np.testing.assert_array_equal(samples_to_reach_per_task(curve, own, 0.8), [8, 4, np.nan])
    np.testing.assert_array_equal(samples_to_reach_per_task(curve, own, 0.7), [8, 2, np.nan])
    np.testing.assert_array_equal(samples_to_reach_per_task(curve, own, 0.0), [0, 2, 2])
    assert facilitation(samples_to_reach_per_task(curve, own, 0.7)) == Facilitation(-6.0, 1)


def test_groups_of_a_task_are_pooled_and_others_left_out() -> None:
    own = flags("NNNN")
    points = [(1, 0, 2, [9, 1, 10]), (2, 0, 4, [9, 7, 0])]
    assert samples_to_reach_per_task(curve_of(points, [0, 0, -1], [2]), own, 0.8).tolist() == [4]
    assert samples_to_reach_per_task(curve_of(points, [0, 0, -1], [2]), own, 0.5).tolist() == [2]


def test_evaluations_without_a_position_do_not_count() -> None:
    curve = curve_of([(1, 0, -1, [10]), (2, 0, -1, [10])], [0], [2])
    assert np.isnan(samples_to_reach_per_task(curve, flags("NN"), 0.5)).all()


def test_too_few_stretches() -> None:
    curve = curve_of([(1, 0, 1, [5]), (2, 1, 2, [5])], [0], [1, 2])
    with pytest.raises(ValueError, match="the curve has 2 tasks, but `own` has 1"):
        samples_to_reach_per_task(curve, flags("N"), 0.5)
    found = samples_to_reach_per_task(curve, flags("N", "N", "N"), 0.5)
    assert found[0] == 1
    assert np.isnan(found[1:]).all(), "task 1 has no group of its own, task 2 has not begun"


# -- the one number ----------------------------------------------------------------------------------------------
def test_slope_by_hand() -> None:
    assert facilitation([4000, 3000, 2000, 1000]) == Facilitation(-1000.0, 0)
    assert facilitation([10, 30]) == Facilitation(20.0, 0)
    assert facilitation([7, 7, 7]) == Facilitation(0.0, 0)
    assert facilitation([7, np.nan, np.nan]) is None
    assert facilitation([np.nan, np.nan]) is None
    assert facilitation([]) is None


@given(st.lists(st.one_of(st.just(float("nan")), st.integers(0, 60_000)), max_size=20))
def test_slope_is_the_least_squares_line(samples: list[float]) -> None:
    values = np.array(samples, float)
    known = np.flatnonzero(np.isfinite(values))
    found = facilitation(values)
    if len(known) < 2:
        assert found is None
        return
    assert found.slope == pytest.approx(np.polyfit(known, values[known], 1)[0], abs=1e-6)
    assert found.missing == len(values) - len(known)


@given(st.lists(st.integers(0, 60_000), min_size=2, max_size=20), st.integers(1, 9), st.integers(0, 99))
def test_slope_scales_with_samples_and_ignores_an_offset(samples: list[int], factor: int, offset: int) -> None:
    values = np.array(samples, float)
    expected = facilitation(values).slope * factor
    assert facilitation(values * factor + offset).slope == pytest.approx(expected, abs=1e-6)
    assert facilitation(values[::-1]).slope == pytest.approx(-facilitation(values).slope, abs=1e-6)


# -- on a stream's table -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["after", "mixed"])
def test_a_learner_that_needs_so_many_samples_of_a_task(variant: str) -> None:
    """An ideal learner knows task t as soon as it has seen `needed[t]` of its rows, rehearsal or not."""
    needed = [30, 24, 18, 12]
    labels = torch.arange(60) % 5
    table = LabelTable(
        dataset="toy",
        labels=labels,
        split=torch.tensor([TRAIN] * 40 + [TEST] * 20, dtype=torch.uint8),
        classes=ClassTable(tuple("abcde"), torch.zeros(5, dtype=torch.int64), torch.full((5,), -1)),
        fingerprint="0" * 64,
    )
    scenario = build([table], 0, Params(tasks=4, rehearsed=0.5, variant=variant, pixels=4))
    own = [(task.domain == index).numpy() for index, task in enumerate(scenario.tasks)]
    assert [int(o.sum()) for o in own] == [40] * 4
    assert [len(o) for o in own] == [40, 60, 60, 60]
    points, ends = [], []
    for task, stretch in enumerate(own):
        for n in range(len(stretch)):
            known = [True] * task + [stretch[: n + 1].sum() >= needed[task]]
            row = [10 * k for k in known] + [None] * (3 - task)
            points.append((len(points) + 1, task, scenario.offsets[task] + n + 1, row))
        ends.append(len(points))
    found = samples_to_reach_per_task(curve_of(points, [0, 1, 2, 3], ends), own, 1.0)
    assert found.tolist() == needed
    assert facilitation(found) == Facilitation(-6.0, 0)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0
