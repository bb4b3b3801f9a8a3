"""Metrics of protocols that evaluate by samples: the official code's numbers, and a plain re-run of its loop."""

import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.metrics import accuracy_matrix, online
from clbench.metrics.online import OFFICIAL_EPSILON, anytime_accuracy, f_last, official_points, sample_schedule

CASES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "scenarios" / "fixtures" / "si_blurry.json").read_text()
)
METRICS = CASES["metrics"][0]
ACCURACY = np.array(METRICS["cls_acc_task_by_class"])


# -- when to evaluate --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES["eval_schedule"])
def test_official_schedule(case: dict[str, Any]) -> None:
    found = sample_schedule(case["task_sizes"], case["batch"], case["period"])
    assert found == [tuple(point) for point in case["evals"]]


def loop_of_the_protocol(sizes: list[int], batch: int, period: int) -> list[tuple[int, int, int]]:
    """The protocol word by word (card, section 1)."""
    out, seen, due = [], 0, period
    for task, size in enumerate(sizes):
        left = size
        while left > 0:
            taken = min(batch, left)
            left -= taken
            seen += taken
            if seen > due:
                out.append((task, seen, due))
                due += period
    return out


@given(st.lists(st.integers(0, 70), max_size=5), st.integers(1, 20), st.integers(1, 40))
def test_schedule_is_the_protocols_loop(sizes: list[int], batch: int, period: int) -> None:
    """Empty tasks, ragged batches, and periods shorter than a batch (one evaluation per batch at most) included."""
    assert sample_schedule(sizes, batch, period) == loop_of_the_protocol(sizes, batch, period)


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 40), st.integers(1, 4))
def test_points_are_the_last_of_each_batch(steps: list[int], period: int, updates: int) -> None:
    """Evaluations behind every update of a batch stand at one position; the protocol makes the last one of them."""
    behind = np.cumsum(steps)
    dense = np.repeat(behind, updates)
    once, several = official_points(behind, period), official_points(dense, period)
    assert (several + 1 == updates * (once + 1)).all()
    assert (dense[several] > period * np.arange(1, len(several) + 1)).all()


def test_a_full_stream_has_49_evaluations_not_50() -> None:
    """Card, section 5.4. The sizes are those of order seed 1."""
    points = sample_schedule([6500, 3000, 10264, 22000, 8236], 64, 1000)
    assert len(points) == 49
    assert [nominal for *_, nominal in points] == list(range(1000, 50_000, 1000))
    assert len(sample_schedule([10_000] * 5, 8, 100)) == 499


def test_nothing_to_evaluate() -> None:
    assert sample_schedule([], 64, 1000) == sample_schedule([0, 0], 64, 1000) == []
    assert sample_schedule([1000], 64, 1000) == [], "exactly 1000 are not more than 1000"
    assert len(official_points([], 10)) == len(official_points([-1, -1], 10)) == 0
    for batch, period in ((0, 10), (10, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            sample_schedule([10], batch, period)


# -- what to make of it ------------------------------------------------------------------------------------------
def test_official_metrics() -> None:
    assert np.mean(METRICS["anytime_acc"]) == pytest.approx(METRICS["A_auc"], abs=1e-12)  # the fixture means this
    hits = np.array(METRICS["anytime_acc"])[:, None] * 1000
    assert anytime_accuracy(hits, [1000], np.ones(hits.shape, bool)) == pytest.approx(METRICS["A_auc"], abs=1e-12)
    ends = np.array(METRICS["task_end_acc"])[:, None]  # one group that is active from the first task on
    found = accuracy_matrix.average_incremental_accuracy(ends, [0], [100], np.ones(ends.shape, bool))
    assert found == pytest.approx(METRICS["A_avg"], abs=1e-12)
    assert METRICS["task_end_acc"][-1] == METRICS["A_last"]
    everywhere = np.ones(ACCURACY.shape, bool)
    assert f_last(ACCURACY, everywhere) == pytest.approx(METRICS["F_last"], abs=1e-12)
    peak = ACCURACY[:-1].max(axis=0)
    assert (peak - ACCURACY[-1])[peak > 0] == pytest.approx(METRICS["F_terms"], abs=1e-12)


def test_classes_that_have_not_come_are_as_those_never_right() -> None:
    active = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    for unseen in (0.0, np.nan):
        accuracy = np.where(active, ACCURACY, unseen)
        assert f_last(accuracy, active) == pytest.approx(METRICS["F_last"], abs=1e-12)
    guessed = np.where(active, ACCURACY, 0.9)  # answers before the first sample are no peak
    assert f_last(guessed, active) == pytest.approx(METRICS["F_last"], abs=1e-12)


def test_the_official_denominator() -> None:
    """hits / (images + 1e-5): every class's accuracy falls a little, and F_last with it."""
    sizes = np.array([100, 1, 50, 30, 20])
    everywhere = np.ones(ACCURACY.shape, bool)
    hits = ACCURACY * sizes
    by_hand = hits / (sizes + 1e-5)
    peak = by_hand[:-1].max(axis=0)
    expected = np.mean([p - last for p, last in zip(peak, by_hand[-1], strict=True) if p > 0])
    found = f_last(ACCURACY, everywhere, sizes, OFFICIAL_EPSILON)
    assert found == pytest.approx(expected, abs=1e-15)
    plain = f_last(ACCURACY, everywhere)
    assert found != plain
    assert found == pytest.approx(plain, abs=1e-5)
    assert f_last(ACCURACY, everywhere, sizes) == plain, "no epsilon, no change"
    with pytest.raises(ValueError, match="needs the sizes"):
        f_last(ACCURACY, everywhere, epsilon=OFFICIAL_EPSILON)


def test_undefined_is_none() -> None:
    assert f_last(np.array([[0.5, 0.2]]), np.ones((1, 2), bool)) is None, "there is no task before the last"
    assert f_last(np.zeros((3, 2)), np.ones((3, 2), bool)) is None, "nothing was ever right"
    assert anytime_accuracy(np.zeros((0, 3)), [1, 1, 1], np.zeros((0, 3), bool)) is None
    assert anytime_accuracy([[5, 5]], [10, 10], [[False, False]]) is None


def test_an_empty_first_task_has_no_accuracy() -> None:
    """The official code fails there (card, section 5.2); ours averages the tasks behind which something was seen."""
    matrix = np.array([[np.nan, np.nan], [0.5, np.nan], [0.4, 0.8]])
    active = np.isfinite(matrix)
    found = accuracy_matrix.average_incremental_accuracy(matrix, [1, 2], [10, 30], active)
    assert found == pytest.approx((0.5 + (0.4 * 10 + 0.8 * 30) / 40) / 2)


def test_a_auc_is_pooled_over_classes_and_plain_over_evaluations() -> None:
    hits, totals = np.array([[9, 77], [5, 30]]), [10, 90]
    valid = np.array([[True, False], [True, True]])
    # first only 10 images count, then all 100: both evaluations weigh the same
    assert anytime_accuracy(hits, totals, valid) == pytest.approx((9 / 10 + 35 / 100) / 2)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(online).failed == 0
    assert doctest.testmod(online).attempted > 0


def test_phases_behind_the_stream_are_not_the_protocols() -> None:
    """A method may go on behind a task's last batch (alignment, weights): the evaluation before that counts."""
    positions, phases = [60, 60, 120, 120, 120, 180], [0, 0, 0, 1, 2, 0]
    assert official_points(positions, 50, phases).tolist() == [1, 2, 5]
    assert official_points(positions, 50).tolist() == [1, 4, 5], "without phases the last one at a position"
