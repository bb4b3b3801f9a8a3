"""Per-iteration metrics: the card's vectors, its invariants, and the plain references."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from curves import TOTAL, Plain, plain_curves
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.metrics import Curve, reference, stability

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "stability_gap.json").read_text())
CASE = VECTORS["cases"][0]
accuracies = st.lists(st.integers(0, 50).map(lambda hits: hits / 50), min_size=1, max_size=40)


def card_curve() -> Plain:
    """The vectors count iterations from 0, with -1 before training; steps count updates done."""
    ends = [end for _, end in CASE["task_iteration_ranges"]]
    series = {task: [(n + 1, a) for n, a in points] for task, points in enumerate(CASE["curves"])}
    return Plain(series, ends)


# -- vectors ----------------------------------------------------------------------------------------------------------
def test_vectors_of_minima() -> None:
    curve, expected = card_curve().curve(), CASE["expected"]
    found = stability.min_accuracy(curve)
    assert found is not None
    assert found.value == pytest.approx(expected["min_ACC"], abs=1e-6)
    lows = stability.minima(curve)
    assert lows.lowest == pytest.approx([expected["min_acc_per_task"]["0"], expected["min_acc_per_task"]["1"]])
    assert lows.step.tolist() == [8, 15]
    trace = [[step - 1, task, value] for step, task, value in zip(
        curve.steps, curve.task, stability.worst_case_trace(curve), strict=True)]  # fmt: skip
    assert np.array(trace) == pytest.approx(np.array(expected["WC_ACC_trace"]), abs=1e-6)
    worst = stability.worst_case_accuracy(curve)
    assert worst is not None
    assert worst.value == pytest.approx(expected["WC_ACC_final"], abs=1e-6)


@pytest.mark.parametrize("window", CASE["windows"])
def test_vectors_of_windows(window: int) -> None:
    curve, expected = card_curve().curve(), CASE["expected"]
    drops, rises = stability.windowed_forgetting(curve, window), stability.windowed_plasticity(curve, window)
    assert drops == pytest.approx(list(expected["WF"][str(window)].values()))
    assert rises == pytest.approx(list(expected["WP_as_defined"][str(window)].values()))
    assert drops.mean() == pytest.approx(expected["WF_avg"][str(window)], abs=1e-6)
    released = [
        reference.windowed_reference([a for _, a in series], window, reference.max_rise_released)
        for series in card_curve().series.values()
    ]
    assert released == pytest.approx(list(expected["WP_released_code"][str(window)].values()))


@pytest.mark.parametrize("case", VECTORS["window_delta"])
def test_vectors_of_one_window(case: dict) -> None:
    window = case["window"]
    assert stability.max_drop(window, len(window)) == pytest.approx(case["max_drop_released"])
    assert stability.max_rise(window, len(window)) == pytest.approx(case["max_rise_true"])
    assert reference.max_rise_released(window) == pytest.approx(case["max_rise_released"])


def test_vector_of_learning_curve_area() -> None:
    area = stability.learning_curve_area(card_curve().curve(), CASE["lca_beta"])
    assert area == pytest.approx(CASE["expected"]["LCA"], abs=1e-6)
    assert stability.learning_curve_area(card_curve().curve(), 100) is None


# -- references -------------------------------------------------------------------------------------------------------
@given(accuracies, st.integers(1, 45))
def test_windows_match_the_reference(values: list[float], window: int) -> None:
    drop = reference.windowed_reference(values, window, reference.max_drop_reference)
    rise = reference.windowed_reference(values, window, reference.max_rise_reference)
    assert stability.max_drop(values, window) == pytest.approx(drop, abs=1e-12)
    assert stability.max_rise(values, window) == pytest.approx(rise, abs=1e-12)
    assert reference.windowed_reference(values, window, reference.max_rise_released) <= rise


@given(plain_curves())
def test_minima_match_the_reference(plain: Plain) -> None:
    curve = plain.curve()
    expected, found = reference.min_accuracy_reference(plain.series, plain.ends), stability.min_accuracy(curve)
    assert (found is None) == (expected is None) == (len(plain.ends) == 1)
    if found is not None:
        assert found.value == pytest.approx(expected)
    trace = stability.worst_case_trace(curve)
    for step, value in zip(curve.steps.tolist(), trace, strict=True):
        assert value == pytest.approx(reference.worst_case_reference(plain.series, plain.ends, step))


@given(plain_curves(min_tasks=2))
def test_dips_match_the_reference(plain: Plain) -> None:
    found = stability.dips(plain.curve())
    assert found.group.tolist() == list(range(len(plain.ends) - 1))
    for index, task in enumerate(found.group.tolist()):
        gap, recovery = reference.dip_reference(plain.series[task], plain.ends[task], plain.ends[task + 1])
        assert found.before[index] - found.lowest[index] == pytest.approx(gap)
        if recovery is None:
            assert np.isnan(found.recovery[index])
        else:
            assert found.recovery[index] == recovery


# -- invariants (card section 6) --------------------------------------------------------------------------------------
@given(plain_curves())
def test_worst_case_is_below_the_current_mean_where_minima_fell(plain: Plain) -> None:
    curve = plain.curve()
    assert np.all(stability.worst_case_trace(curve) <= curve.mean_accuracy + 1e-12)


@given(plain_curves(min_tasks=2))
def test_worst_case_uses_the_current_task_as_it_is(plain: Plain) -> None:
    last, end = len(plain.ends) - 1, plain.ends[-1]
    worst, lows = stability.worst_case_accuracy(plain.curve()), stability.minima(plain.curve()).lowest
    assert worst is not None
    assert worst.value == pytest.approx((lows.sum() + dict(plain.series[last])[end]) / (last + 1))


@given(plain_curves(), st.integers(1, 20), st.integers(1, 20))
def test_longer_windows_find_more(plain: Plain, a: int, b: int) -> None:
    curve, (short, long) = plain.curve(), sorted((a, b))
    assert np.all(stability.windowed_forgetting(curve, short) <= stability.windowed_forgetting(curve, long))
    assert np.all(stability.windowed_plasticity(curve, short) <= stability.windowed_plasticity(curve, long))


@given(accuracies, st.integers(2, 45))
def test_a_rising_curve_forgets_nothing(values: list[float], window: int) -> None:
    assert stability.max_drop(sorted(values), window) == 0
    assert stability.max_rise(sorted(values, reverse=True), window) == 0


@given(plain_curves(min_tasks=2), st.integers(2, 6))
def test_a_coarser_schedule_can_only_raise_the_minimum(plain: Plain, every: int) -> None:
    coarse = Plain(
        {k: [(n, a) for n, a in series if n % every == 0 or n in plain.ends] for k, series in plain.series.items()},
        plain.ends,
    )
    ends_only = Plain({k: [(n, a) for n, a in s if n in plain.ends] for k, s in plain.series.items()}, plain.ends)
    fine, middle, few = (stability.min_accuracy(p.curve()) for p in (plain, coarse, ends_only))
    assert fine is not None
    assert middle is not None
    assert few is not None
    assert fine.value <= middle.value <= few.value


@given(plain_curves(min_tasks=2))
def test_the_minimum_does_not_rise_as_the_run_goes_on(plain: Plain) -> None:
    before = None
    for step in range(plain.ends[0] + 1, plain.ends[-1] + 1):
        cut = Plain(
            {k: [(n, a) for n, a in s if n <= step] for k, s in plain.series.items() if s[0][0] <= step}, plain.ends
        )
        lows = dict(zip(stability.minima(cut.curve()).group, stability.minima(cut.curve()).lowest, strict=True))
        for task, low in (before or {}).items():
            assert lows[task] <= low
        before = lows


# -- definitions at their edges ---------------------------------------------------------------------------------------
def test_the_state_before_the_first_update_is_no_candidate() -> None:
    """An evaluation behind a switch but before an update has the weights of the task's end."""
    curve = Curve.of(
        steps=[1, 2, 2, 3], task=[0, 0, 1, 1], hits=[[5, 0], [9, 0], [2, 1], [7, 4]], totals=[10, 10],
        valid=[[1, 0], [1, 0], [1, 1], [1, 1]], group_task=[0, 1], task_ends=[2, 3],
    )  # fmt: skip
    assert stability.minima(curve).lowest.tolist() == [0.7]
    assert stability.dips(curve).before.tolist() == [0.9]
    assert np.isnan(stability.worst_case_trace(curve)[2])
    assert stability.learning_curve_area(curve, 2) == pytest.approx((0.7 + 0.25) / 2)


def test_recovery_is_counted_from_the_switch_to_behind_the_lowest_point() -> None:
    """95 % reached on the way down does not count."""
    series = [(1, 1.0), (2, 0.96), (3, 0.2), (4, 0.9), (5, 0.95), (6, 0.1)]
    plain = Plain({0: series, 1: [(n, 0.5) for n in range(2, 7)], 2: [(6, 0.5)]}, [1, 5, 6])
    found = stability.dips(plain.curve())
    assert found.lowest.tolist() == [0.2, 0.5]  # only the next task counts: not 0.1 at step 6
    assert found.recovery.tolist() == [4, 0]
    assert stability.recovery(plain.curve()) == (2.0, 0)


def test_a_group_that_does_not_recover_is_counted() -> None:
    plain = Plain({0: [(1, 1.0), (2, 0.2), (3, 0.3)], 1: [(2, 0.5), (3, 0.5)]}, [1, 3])
    assert stability.recovery(plain.curve()) == (None, 1)


def test_sampling_errors() -> None:
    plain = Plain({0: [(1, 0.9), (2, 0.2), (3, 0.5)], 1: [(2, 0.5), (3, 0.6)]}, [1, 3])
    low, worst, gap = (f(plain.curve(100)) for f in (
        stability.min_accuracy, stability.worst_case_accuracy, stability.stability_gap))  # fmt: skip
    assert low is not None
    assert low.standard_error == pytest.approx(np.sqrt(0.2 * 0.8 / 100))
    assert worst is not None
    assert worst.standard_error == pytest.approx(np.sqrt(0.2 * 0.8 / 100 + 0.6 * 0.4 / 100) / 2)
    assert gap is not None
    assert gap[0].value == gap[1] == pytest.approx(0.7)
    assert gap[0].standard_error == pytest.approx(np.sqrt(0.2 * 0.8 / 100 + 0.9 * 0.1 / 100))


def test_the_sampling_error_is_that_of_binomial_draws() -> None:
    """Groups of known accuracy, subsets drawn anew: the spread of the mean minimum is the one stated."""
    rng = np.random.default_rng(0)
    truth, n = np.array([0.3, 0.7, 0.5]), 200
    values, errors = [], []
    for draw in rng.binomial(n, truth, (4000, 3)):
        hits = np.array([[n, n, n, n], [*draw, n]])
        curve = Curve.of(
            steps=[1, 2], task=[0, 1], hits=hits, totals=[n] * 4, group_task=[0, 0, 0, 1], task_ends=[1, 2]
        )
        found = stability.min_accuracy(curve)
        assert found is not None
        values.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.05)


def test_one_task_has_no_minimum() -> None:
    curve = Plain({0: [(0, 0.1), (1, 0.5), (2, 0.4)]}, [2]).curve()
    assert stability.min_accuracy(curve) is None
    assert stability.worst_case_accuracy(curve) is None
    assert stability.stability_gap(curve) is None
    assert stability.recovery(curve) == (None, 0)
    assert stability.windowed_forgetting(curve, 10) == pytest.approx([0.1])


def test_a_run_that_is_not_finished_has_metrics_so_far() -> None:
    whole = Plain({0: [(1, 0.9), (2, 0.2), (3, 0.5)], 1: [(2, 0.5), (3, 0.6)]}, [1, 3]).curve()
    running = Curve(**{**vars(whole), "task_ends": np.array([1])})
    assert stability.min_accuracy(running) == stability.min_accuracy(whole)
    assert stability.worst_case_accuracy(running) == stability.worst_case_accuracy(whole)


def test_a_group_of_no_task_counts_in_windows_alone() -> None:
    curve = Curve.of(steps=[1, 2], task=[0, 1], hits=[[9], [3]], totals=[10], group_task=[-1], task_ends=[1, 2])
    assert stability.windowed_forgetting(curve, 2) == pytest.approx([0.6])
    assert stability.min_accuracy(curve) is None
    assert stability.worst_case_accuracy(curve) is None
    assert stability.learning_curve_area(curve, 1) is None


def test_evaluations_of_future_groups_do_not_count_as_drops() -> None:
    curve = Curve.of(
        steps=[1, 2, 3],
        task=[0, 1, 1],
        hits=[[5, 9], [5, 1], [5, 4]],
        totals=[10, 10],
        group_task=[0, 1],
        task_ends=[1, 3],
    )
    assert stability.windowed_forgetting(curve, 10).tolist() == [0, 0]
    assert stability.windowed_plasticity(curve, 10) == pytest.approx([0, 0.3])


def test_area_under_the_curve_weighs_steps() -> None:
    even = Curve.of(
        steps=[0, 2, 4, 6], task=[0] * 4, hits=[[0], [2], [4], [6]], totals=[10], group_task=[0], task_ends=[6]
    )
    assert stability.area_under_curve(even) == pytest.approx(0.4)
    dense = Curve.of(steps=[1, 2, 10], task=[0] * 3, hits=[[0], [0], [10]], totals=[10], group_task=[0], task_ends=[10])
    assert stability.area_under_curve(dense) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": [2, 1]}, "order"),
        ({"totals": [10, 10, 10]}, "totals"),
        ({"hits": [[11, 0], [0, 0]]}, "hits"),
        ({"groups": ["a", "a"]}, "names"),
        ({"task": [0]}, "task"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change: dict, reason: str) -> None:
    good = {
        "steps": [1, 2],
        "task": [0, 1],
        "hits": [[1, 2], [3, 4]],
        "totals": [10, 10],
        "group_task": [0, 1],
        "task_ends": [1],
    }
    Curve.of(**good)
    with pytest.raises(ValueError, match=reason):
        Curve.of(**{**good, **change})


@settings(max_examples=30)
@given(plain_curves(min_tasks=2))
def test_hits_of_unequal_subsets_give_the_same_fractions(plain: Plain) -> None:
    double = stability.min_accuracy(plain.curve(2 * TOTAL))
    single = stability.min_accuracy(plain.curve())
    assert double is not None
    assert single is not None
    assert double.value == pytest.approx(single.value)
    assert double.standard_error == pytest.approx(single.standard_error / np.sqrt(2))


def test_speed_of_a_long_curve() -> None:
    """50,000 evaluations x 100 groups, windows of 10 and 100: well below a second of processor time each."""
    rng = np.random.default_rng(0)
    steps, groups = 50_000, 100
    ends = np.arange(1, groups + 1) * (steps // groups)
    curve = Curve.of(
        steps=np.arange(1, steps + 1), task=np.repeat(np.arange(groups), steps // groups),
        hits=rng.integers(0, 200, (steps, groups)), totals=np.full(groups, 200), group_task=np.arange(groups),
        task_ends=ends,
    )  # fmt: skip
    assert curve.accuracy.shape == (steps, groups)
    start = time.process_time()
    stability.windowed_forgetting(curve, 100)
    assert time.process_time() - start < 1
    start = time.process_time()
    stability.min_accuracy(curve), stability.worst_case_accuracy(curve), stability.dips(curve)
    assert time.process_time() - start < 2
