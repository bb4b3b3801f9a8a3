"""Minima over noisy subsets, tried on drawn rows whose true accuracy is known."""

from collections.abc import Callable

import numpy as np
import pytest
from curves import Plain, plain_curves
from hypothesis import given, settings

from clbench.metrics import stability
from clbench.metrics.curve import Curve
from clbench.metrics.minimum_noise import (
    corrected_min_accuracy,
    corrected_worst_case_accuracy,
    crossed_minimum,
    wilson,
)

PARTS, ROWS, STEPS, TRIALS = 10, 200, 40, 300
Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]  # true accuracy (n,) -> right or not (n, ROWS)


def same_rows(rng: np.random.Generator, truth: np.ndarray) -> np.ndarray:
    """Rows have a fixed difficulty: the noise of all states is that of one draw."""
    return rng.random(ROWS) < truth[:, None]


def new_rows(rng: np.random.Generator, truth: np.ndarray) -> np.ndarray:
    """Each state is right on other rows: noise is independent in time."""
    return rng.random((len(truth), ROWS)) < truth[:, None]


def changing_rows(rng: np.random.Generator, truth: np.ndarray) -> np.ndarray:
    """Between the two: a row's luck is drawn anew in a tenth of the steps."""
    luck = rng.random(ROWS)
    out = np.empty((len(truth), ROWS), bool)
    for n, accuracy in enumerate(truth):
        luck = np.where(rng.random(ROWS) < 0.1, rng.random(ROWS), luck)
        out[n] = luck < accuracy
    return out


FLAT = np.full(STEPS, 0.7)
DIP = 0.9 - 0.5 * np.exp(-np.arange(STEPS) / 6)
SLOPE = np.linspace(0.95, 0.6, STEPS)


def two_left_groups(rng: np.random.Generator, draw: Draw, truth: np.ndarray) -> tuple[Curve, np.ndarray, np.ndarray]:
    """A curve of two groups that were left at step 0, their parts (S, G, P), and the parts' rows (G, P)."""
    right = np.stack([draw(rng, truth), draw(rng, truth)], axis=1)
    parts = right.reshape(STEPS, 2, PARTS, ROWS // PARTS).sum(axis=3)
    curve = Curve.of(
        steps=np.arange(1, STEPS + 1), task=np.ones(STEPS), hits=parts.sum(axis=2), totals=[ROWS, ROWS],
        group_task=[0, 0], task_ends=[0, STEPS],
    )  # fmt: skip
    return curve, parts, np.full((2, PARTS), ROWS // PARTS)


@pytest.mark.parametrize("truth", [FLAT, DIP, SLOPE], ids=["flat", "dip", "slope"])
@pytest.mark.parametrize("draw", [same_rows, changing_rows, new_rows])
def test_the_interval_covers_and_the_two_estimates_bracket_the_truth(draw: Draw, truth: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    found = [corrected_min_accuracy(*two_left_groups(rng, draw, truth)) for _ in range(TRIALS)]
    value, low, high, plain, crossed = (np.array(column) for column in zip(*found, strict=True))
    lowest = truth.min()
    covered = np.mean((low <= lowest) & (lowest <= high))
    assert covered >= 0.95 - 2.5 * np.sqrt(0.05 * 0.95 / TRIALS)
    noise = 3 / np.sqrt(TRIALS)
    assert plain.mean() <= lowest + noise * plain.std()
    assert crossed.mean() >= lowest - noise * crossed.std()
    assert abs(value.mean() - lowest) <= (crossed.mean() - plain.mean()) / 2 + noise * value.std()
    assert (high - low).mean() < 0.2


def test_the_correction_takes_off_most_of_the_bias_where_there_is_one() -> None:
    rng = np.random.default_rng(1)
    found = [corrected_min_accuracy(*two_left_groups(rng, new_rows, FLAT)) for _ in range(200)]
    plain, value = np.mean([f.plain for f in found]), np.mean([f.value for f in found])
    assert plain < 0.645  # too low by 1.7 standard errors of one state
    assert abs(value - 0.7) < 0.6 * (0.7 - plain)


def test_rows_that_stay_the_same_have_no_bias_to_correct() -> None:
    rng = np.random.default_rng(2)
    found = [corrected_min_accuracy(*two_left_groups(rng, same_rows, DIP)) for _ in range(200)]
    assert np.mean([f.crossed - f.plain for f in found]) < 0.003


def test_a_minimum_of_zero_has_an_upper_limit_above_it() -> None:
    curve, parts, totals = two_left_groups(np.random.default_rng(0), same_rows, np.zeros(STEPS))
    found = corrected_min_accuracy(curve, parts, totals)
    assert found is not None
    assert found.value == 0.0
    assert found.low == pytest.approx(0.0, abs=1e-12)
    assert 0.005 < found.high < 0.05


def test_wilson_limits() -> None:
    low, high = wilson([0.0, 0.5, 1.0], 10)  # Brown, Cai & DasGupta 2001
    assert low == pytest.approx([0.0, 0.2366, 0.7225], abs=1e-4)
    assert high == pytest.approx([0.2775, 0.7634, 1.0], abs=1e-4)


def test_crossed_minimum_by_hand() -> None:
    hits = np.array([[3.0, 1.0], [1.0, 3.0]])
    assert crossed_minimum(hits, np.array([4.0, 4.0])) == pytest.approx(6 / 8)  # each part at its high step
    assert crossed_minimum(np.array([[2.0, 1.0], [1.0, 1.0]]), np.array([4.0, 4.0])) == pytest.approx(2.5 / 8)
    assert crossed_minimum(np.array([[2.0, 0.0], [1.0, 0.0]]), np.array([4.0, 0.0])) == pytest.approx(1.5 / 4)


@settings(max_examples=60, deadline=None)
@given(plain_curves(min_tasks=1))
def test_plain_values_are_those_of_the_metrics(plain: Plain) -> None:
    curve = plain.curve()
    share = np.full((len(curve.groups), PARTS), 100)
    parts = np.repeat(curve.hits[:, :, None] // PARTS, PARTS, axis=2)
    parts[:, :, 0] += curve.hits - parts.sum(axis=2)
    for corrected, metric in (
        (corrected_min_accuracy, stability.min_accuracy),
        (corrected_worst_case_accuracy, stability.worst_case_accuracy),
    ):
        found, expected = corrected(curve, parts, share), metric(curve)
        if expected is None:
            assert found is None
            continue
        assert found is not None
        assert found.plain == pytest.approx(expected.value, abs=1e-12)
        assert found.low <= found.plain
        assert found.low <= found.value <= found.high
