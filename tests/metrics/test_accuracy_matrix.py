"""Metrics of R[i, j] against cases by hand, the cards' vectors, and each other."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clbench.metrics import accuracy_matrix as m

FIXTURES = Path(__file__).parent / "fixtures"
VECTORS = json.loads((FIXTURES / "accuracy_matrix.json").read_text())
STABILITY = json.loads((FIXTURES / "stability_gap.json").read_text())["cases"][0]

R = np.array([[0.9, 0.1, 0.2], [0.95, 0.8, 0.3], [0.6, 0.7, 0.5]])
matrices = st.integers(2, 6).flatmap(lambda k: arrays(np.float64, (k, k), elements=st.floats(0, 1)))


def test_accuracies_by_hand() -> None:
    assert m.accuracy_after_tasks(R) == pytest.approx([0.9, 0.875, 0.6])
    assert m.final_accuracy(R) == pytest.approx(0.6)
    assert m.average_incremental_accuracy(R) == pytest.approx((0.9 + 0.875 + 0.6) / 3)
    sizes = [10, 10, 20]
    assert m.final_accuracy(R, sizes=sizes) == pytest.approx(0.575)
    assert m.average_incremental_accuracy(R, sizes=sizes) == pytest.approx((0.9 + 0.875 + 0.575) / 3)


def test_forgetting_by_hand_in_every_convention() -> None:
    assert m.forgetting(R) == pytest.approx((0.35 + 0.1) / 2)
    assert m.forgetting(R, peak="learned") == pytest.approx((0.3 + 0.1) / 2)
    assert m.forgetting(R, peak="any") == pytest.approx((0.35 + 0.1) / 2)
    assert m.forgetting(R, peak="any", over="all") == pytest.approx((0.35 + 0.1 + 0.0) / 3)
    rising = [[0.5, 0.0], [0.7, 0.6]]
    assert m.forgetting(rising) == pytest.approx(-0.2)
    assert m.forgetting(rising, peak="any") == 0


def test_transfer_by_hand() -> None:
    assert m.backward_transfer(R) == pytest.approx((-0.3 - 0.1) / 2)
    assert m.mean_backward_transfer(R) == pytest.approx((0.05 - 0.3 - 0.1) / 3)
    assert m.forward_transfer(R, before=[0.0, 0.05, 0.1]) == pytest.approx((0.05 + 0.2) / 2)


def test_one_task_is_none_where_nothing_can_be_said() -> None:
    single = [[0.8]]
    assert m.final_accuracy(single) == m.average_incremental_accuracy(single) == pytest.approx(0.8)
    assert m.forgetting(single) is None
    assert m.forgetting(single, peak="any") is None
    assert m.backward_transfer(single) is None
    assert m.mean_backward_transfer(single) is None
    assert m.forward_transfer(single, [0.1]) is None
    assert m.zero_shot_transfer(single) is None


def test_several_groups_per_task_and_groups_of_none() -> None:
    matrix = [[0.9, 0.7, np.nan, 0.5], [0.5, 0.5, 0.8, 0.4]]
    owner = [0, 0, 1, -1]
    assert m.accuracy_after_tasks(matrix, owner) == pytest.approx([0.7, 0.55])
    assert m.forgetting(matrix, owner) == pytest.approx((0.4 + 0.2 + 0.1) / 3)
    assert m.backward_transfer(matrix, owner) == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("matrix", "owner"), [([0.5], None), (np.empty((0, 2)), None), ([[0.5, 0.5]], [0, 1]), ([[0.5]], [0, 0])]
)
def test_what_is_no_accuracy_matrix_is_refused(matrix: list, owner: list | None) -> None:
    with pytest.raises(ValueError, match=r"accuracy matrix|group_task"):
        m.final_accuracy(matrix, owner)


@given(matrices)
def test_relations_between_the_conventions(matrix: np.ndarray) -> None:
    fall, learned, any_peak = (
        m.forgetting(matrix),
        m.forgetting(matrix, peak="learned"),
        m.forgetting(matrix, peak="any"),
    )
    assert fall is not None
    assert learned is not None
    assert any_peak is not None
    assert learned <= fall + 1e-12
    assert fall <= any_peak + 1e-12
    assert any_peak >= 0
    assert m.backward_transfer(matrix) == pytest.approx(-learned)
    assert m.final_accuracy(matrix) == pytest.approx(m.final_accuracy(matrix, sizes=np.full(len(matrix), 7)))
    assert 0 <= (m.average_incremental_accuracy(matrix) or 0) <= 1


# -- vectors ----------------------------------------------------------------------------------------------------------
def test_vector_of_the_stability_card() -> None:
    ends = [end - 1 for _, end in STABILITY["task_iteration_ranges"]]
    matrix = [[dict(map(tuple, series)).get(end, np.nan) for series in STABILITY["curves"]] for end in ends]
    assert m.final_accuracy(matrix) == pytest.approx(STABILITY["expected"]["ACC_final"])
    assert m.forgetting(matrix, peak="learned") == pytest.approx(STABILITY["expected"]["FORG"])


def test_vector_of_the_two_nmc_metrics() -> None:
    """Ours is the standard one; what some official scripts print tests each task only right after learning it."""
    case = VECTORS["nmc_two_metrics"]
    sizes = np.array(case["n_test"])
    matrix = np.array(case["correct"]) / sizes
    assert m.accuracy_after_tasks(matrix, sizes=sizes) == pytest.approx(case["standard"])
    assert m.average_incremental_accuracy(matrix, sizes=sizes) == pytest.approx(case["average_incremental_standard"])
    once = np.cumsum(np.diag(case["correct"])) / np.cumsum(sizes)
    assert once == pytest.approx(case["cumulative_at_learning"])
    assert np.any(once > m.accuracy_after_tasks(matrix, sizes=sizes))


@pytest.mark.parametrize("name", ["metrics_4x4", "metrics_4x4_random"])
def test_vectors_of_mtil(name: str) -> None:
    matrix, expected = np.array(VECTORS[name]["A"]) / 100, VECTORS[name]["expected"]
    assert m.zero_shot_transfer(matrix) == pytest.approx(expected["Transfer"] / 100)
    assert m.matrix_average(matrix) == pytest.approx(expected["Avg"] / 100)
    assert m.final_accuracy(matrix) == pytest.approx(expected["Last"] / 100)


def test_mtil_transfer_is_not_the_flat_mean() -> None:
    case = VECTORS["metrics_not_flat_mean"]
    assert m.zero_shot_transfer(np.array(case["A"]) / 100) != pytest.approx(case["flat_upper_mean"] / 100)
