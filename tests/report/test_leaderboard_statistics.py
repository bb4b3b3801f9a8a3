"""Paired tests, Holm's correction, ranks and critical differences, against scipy and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clbench.report.leaderboard.statistics import (
    critical_difference,
    holm,
    mean_ranks,
    pair_up,
    paired_test,
    range_quantile,
)

NUMBERS = st.floats(-1, 1, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12))
def test_paired_t_is_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    if (a - b).std(ddof=1) < 1e-6:
        return
    found, expected = paired_test(pairs), stats.ttest_rel(a, b)
    assert found.t_test == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    low, high = expected.confidence_interval(0.95)
    assert found.difference is not None
    assert found.half_width is not None
    assert (found.difference - found.half_width, found.difference + found.half_width) == pytest.approx((low, high))


def test_sign_flip_is_the_exact_permutation_test() -> None:
    pairs = [(0.5, 0.4), (0.6, 0.3), (0.7, 0.75), (0.2, 0.1), (0.9, 0.5)]
    a, b = np.array(pairs).T
    expected = stats.permutation_test(
        (a, b), lambda x, y: (x - y).mean(), permutation_type="samples", n_resamples=np.inf
    )
    assert paired_test(pairs).sign_flip == pytest.approx(expected.pvalue)


def test_few_and_equal_pairs_claim_nothing() -> None:
    assert paired_test([]) == (0, None, None, None, None)
    assert paired_test([(0.5, 0.25)]) == (1, 0.25, None, None, None)
    assert paired_test([(0.5, 0.5)] * 3).t_test == 1.0
    constant = paired_test([(0.5, 0.25)] * 3)
    assert (constant.t_test, constant.sign_flip) == (None, 0.25)
    assert paired_test([(0.5, 0.25)] * 20).sign_flip is None, "2^20 patterns are not enumerated"


def test_runs_are_paired_by_order_seed_and_by_both_where_one_order_has_several() -> None:
    a = {(1993, 1): 0.5, (1996, 1): 0.6}
    assert pair_up(a, {(1996, 7): 0.1, (1993, 7): 0.2, (5, 5): 0.9}) == [(0.5, 0.2), (0.6, 0.1)]
    several = {(0, 0): 0.1, (0, 1): 0.2, (1, 0): 0.3}
    assert pair_up(several, {(0, 1): 0.5, (0, 2): 0.6}) == [(0.2, 0.5)]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("k", [2, 3, 5, 10, 30])
def test_quantile_of_the_range_is_scipys(k: int) -> None:
    assert range_quantile(k) == pytest.approx(stats.studentized_range.ppf(0.95, k, np.inf), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_ranks_are_scipys(values: list[int]) -> None:
    assert mean_ranks(np.array(values, float)).tolist() == stats.rankdata(values).tolist()


def test_friedman_is_scipys_and_groups_are_by_hand() -> None:
    rng = np.random.default_rng(0)
    scores = np.array([0.9, 0.7, 0.65, 0.2]) + rng.normal(0, 0.08, (12, 4))
    scores[0, 1] = scores[0, 2]  # a tie
    found = critical_difference(["best", "second", "third", "last"], scores)
    assert found.friedman == pytest.approx(stats.friedmanchisquare(*scores.T).pvalue)
    assert found.methods[0] == "best"
    assert found.methods[-1] == "last"
    assert sum(found.mean_ranks) == pytest.approx(1 + 2 + 3 + 4)
    assert found.critical == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 12)), rel=1e-3)  # Demsar 2006, table 5
    for first, last in found.groups:
        assert found.mean_ranks[last] - found.mean_ranks[first] < found.critical
    assert (0, 3) not in found.groups


def test_a_critical_difference_needs_three_of_each() -> None:
    with pytest.raises(ValueError, match="at least 3 methods"):
        critical_difference(["a", "b"], np.ones((5, 2)))
