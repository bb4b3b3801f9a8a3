"""Best-of-R against brute force, sensitivity against data with a known answer."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clbench.protocol.analysis import expected_best, influence, spearman, trial_scores
from clbench.protocol.tables import curve_rows, markdown, to_csv


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_expected_best_is_the_mean_over_all_subsets(scores: list[float]) -> None:
    for k, found in enumerate(expected_best(scores), 1):
        subsets = [max(subset) for subset in itertools.combinations(scores, k)]
        assert math.isclose(found, sum(subsets) / len(subsets), abs_tol=1e-12)


def test_expected_best_rises_to_the_best() -> None:
    curve = expected_best([0.3, 0.9, 0.5, 0.5])
    assert curve == sorted(curve)
    assert curve[0] == pytest.approx(0.55)
    assert curve[-1] == 0.9


def test_many_trials_are_no_trouble() -> None:
    curve = expected_best(np.linspace(0, 1, 500).tolist())
    assert curve[-1] == 1.0
    assert curve[0] == pytest.approx(0.5)


def study(trials: list[dict[str, Any]], kind: str = "uniform", score: str = "final_accuracy") -> dict[str, Any]:
    space = {"lr": {"low": 0, "high": 1}, "batch_size": {"choices": [8, 16]}, "noise": {"low": 0, "high": 1}}
    return {"score": score, "search": {"kind": kind}, "seeds": [0], "space": space, "trials": trials,
            "best": {"values": {}, "trial": 0}}  # fmt: skip


def trial(number: int, score: float | None, **values: Any) -> dict[str, Any]:
    return {
        "trial": number, "values": values, "score": score, "scores": {} if score is None else {"0": score},
        "status": "failed" if score is None else "done", "first_tasks": None, "reason": "",
    }  # fmt: skip


def test_the_dimension_that_decides_is_found() -> None:
    rng = np.random.default_rng(0)
    trials = []
    for number in range(60):
        lr, noise, batch = rng.random(), rng.random(), int(rng.choice([8, 16]))
        trials.append(trial(number, lr + 0.01 * rng.random(), lr=lr, noise=noise, batch_size=batch))
    found = {each["name"]: each for each in influence(study(trials))}
    assert found["lr"]["explained"] > 0.9
    assert found["lr"]["rank_correlation"] > 0.95
    assert max(found["noise"]["explained"], found["batch_size"]["explained"]) < 0.2
    assert next(iter(influence(study(trials))))["name"] == "lr"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=4, max_size=20))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, float]]) -> None:
    x, y = np.array(pairs, float).T
    found = spearman(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def test_failed_trials_count_as_the_worst_and_lower_may_be_better() -> None:
    trials = [trial(0, 0.2), trial(1, None), trial(2, 0.6)]
    assert trial_scores(study(trials)) == [0.2, 0.2, 0.6]
    assert trial_scores(study(trials, score="forgetting")) == [-0.2, -0.6, -0.6]
    assert trial_scores(study([trial(0, None)])) == []


@pytest.mark.parametrize("kind", ["tpe", "halving"])
def test_no_curve_where_trials_are_not_exchangeable(kind: str) -> None:
    assert curve_rows(study([trial(0, 0.2), trial(1, 0.3)], kind)) == []


def test_tables_hold_every_column() -> None:
    rows = [{"a": "1"}, {"a": "2", "b": "x|y"}]
    assert markdown(rows).splitlines() == ["| a | b |", "|---|---|", "| 1 | - |", "| 2 | x\\|y |"]
    assert to_csv(rows) == "a,b\n1,\n2,x|y\n"
