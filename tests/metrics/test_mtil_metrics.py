"""Transfer, Avg and Last of MTIL against the official matrices of all methods, in both orders (mtil card)."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from clbench.metrics.accuracy_matrix import final_accuracy, matrix_average, zero_shot_transfer

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "mtil.json").read_text())
ORDERS = {"order_I": VECTORS["order_I"], "order_II": VECTORS["order_II"]}
SIZES = dict(zip(VECTORS["order_I"], VECTORS["n_test"], strict=True))

# the paper's means (mtil card, section 5): Transfer, Avg, Last
PUBLISHED = {
    "order_I/Continual-FT": (44.6, 55.9, 77.3),
    "order_I/LwF": (56.9, 64.7, 74.6),
    "order_I/iCaRL": (50.4, 65.7, 80.1),
    "order_I/LwF-VR": (57.2, 65.1, 76.6),
    "order_I/WiSE-FT": (52.3, 60.7, 77.7),
    "order_I/ZSCL*": (62.2, 72.6, 84.5),
    "order_I/ZSCL": (68.1, 75.4, 83.6),
    "order_II/Continual-FT": (46.6, 56.2, 67.4),
    "order_II/LwF": (53.2, 62.2, 71.9),
    "order_II/iCaRL": (50.9, 56.9, 71.6),
    "order_II/LwF-VR": (53.1, 60.6, 68.3),
    "order_II/WiSE-FT": (51.0, 61.5, 72.2),
    "order_II/ZSCL*": (59.8, 71.8, 83.3),
    "order_II/ZSCL": (64.2, 74.5, 83.4),
}


def matrix_of(name: str) -> NDArray[np.float64]:
    """(11, 11) accuracy in percent; rows after a task, columns test sets, both in the order of the stream."""
    sizes = np.array([SIZES[dataset] for dataset in ORDERS[name.partition("/")[0]]])
    return 100 * np.array(VECTORS["matrices"][name]["correct_counts"]) / sizes


def metrics(matrix: NDArray[np.float64]) -> list[float | None]:
    return [zero_shot_transfer(matrix), matrix_average(matrix), final_accuracy(matrix)]


def test_there_are_seven_methods_in_two_orders() -> None:
    assert set(VECTORS["matrices"]) == set(PUBLISHED)
    assert len(PUBLISHED) == 14


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_matrices(name: str) -> None:
    found, expected = metrics(matrix_of(name)), VECTORS["matrices"][name]
    assert found == pytest.approx([expected["Transfer"], expected["Avg"], expected["Last"]], abs=5.1e-5)
    assert found == pytest.approx(PUBLISHED[name], abs=0.0501)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=["plain", "random"])
def test_small_matrices(case: dict[str, object]) -> None:
    expected = case["expected"]
    assert metrics(np.array(case["A"])) == pytest.approx([expected[key] for key in ("Transfer", "Avg", "Last")])
    matrix = np.array(case["A"])
    transfers = [matrix[:j, j].mean() for j in range(1, 4)]
    assert transfers == pytest.approx(expected["transfer_per_task_1..T-1"])


def test_transfer_is_no_flat_mean() -> None:
    matrix = np.array(VECTORS["cases"][0]["A"])
    assert matrix[np.triu_indices(4, 1)].mean() == pytest.approx(VECTORS["flat_upper_mean"]) == 35
    assert zero_shot_transfer(matrix) == pytest.approx(39)


@pytest.mark.parametrize("order", ORDERS)
def test_zero_shot(order: str) -> None:
    """The same accuracies in every row: Transfer leaves out the first data set, another one in each order."""
    accuracy = dict(zip(ORDERS["order_I"], VECTORS["zero_shot"]["acc"], strict=True))
    matrix = np.tile([accuracy[name] for name in ORDERS[order]], (11, 1))
    expected = VECTORS["zero_shot"][order]
    assert metrics(matrix) == pytest.approx([expected["Transfer"], expected["Avg"], expected["Last"]])


def test_an_order_belongs_to_both_axes() -> None:
    """Order II's official arrays are stored alphabetically on both axes (card, section 6.5): turning the columns alone
    gives other numbers, and the diagonal is no longer a data set's own task."""
    index = np.array(VECTORS["order_II_index"])
    assert [VECTORS["order_I"][i] for i in index] == VECTORS["order_II"]
    assert sorted(index.tolist()) == list(range(11))
    streamed = matrix_of("order_II/ZSCL")
    stored = np.empty_like(streamed)
    stored[np.ix_(index, index)] = streamed  # as in the official file
    assert metrics(stored[np.ix_(index, index)]) == pytest.approx(PUBLISHED["order_II/ZSCL"], abs=0.0501)
    for wrong in (stored, stored[:, index], stored[index]):
        assert zero_shot_transfer(wrong) != pytest.approx(PUBLISHED["order_II/ZSCL"][0], abs=1)


def test_rows_of_later_tasks_change_nothing_before() -> None:
    """Prefix consistency: Transfer of a data set needs only the rows before its own task."""
    matrix = matrix_of("order_I/ZSCL")
    changed = matrix.copy()
    changed[np.tril_indices(11, -1)] = 0
    changed[np.diag_indices(11)] = 0
    assert zero_shot_transfer(changed) == zero_shot_transfer(matrix)
