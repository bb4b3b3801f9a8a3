"""Power-law rehearsal: the reference numbers, the card's invariants on random data sets, and what cannot be met."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_tables import balanced, tables

from clbench.data.classes import LabelTable
from clbench.errors import InputError
from clbench.scenarios.check import check_scenario
from clbench.scenarios.power_law import (
    Params,
    build,
    distinct,
    natural_counts,
    rehearsal_counts,
    round_counts,
    shape_weights,
)

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / "power_law.json").read_text())
TABLE = balanced("digits", 400, 40, 10)
SHAPES = ("power", "exponential", "uniform", "random", "none")


def lags(number: int) -> np.ndarray:
    return np.arange(1, number + 1)


# -- reference numbers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES["weights"], ids=lambda c: f"{c['n_previous']} tasks, a={c['exponent']}")
def test_weights(case: dict[str, Any]) -> None:
    found = shape_weights(lags(case["n_previous"]), "power", case["exponent"])
    assert found == pytest.approx(case["weight_by_lag_1_to_k"], abs=1e-15)


@pytest.mark.parametrize("case", CASES["exponential"], ids=lambda c: f"{c['n_previous']} tasks")
def test_exponential_weights(case: dict[str, Any]) -> None:
    found = shape_weights(lags(case["n_previous"]), "exponential", rate=case["rate"])
    assert found == pytest.approx(case["weight_by_lag_1_to_k"], abs=1e-15)


@pytest.mark.parametrize("case", CASES["counts"], ids=lambda c: f"{c['n_previous']} tasks of {c['total_rehearsed']}")
def test_counts(case: dict[str, Any]) -> None:
    weights = shape_weights(lags(case["n_previous"]), "power", case["exponent"])
    assert round_counts(weights, case["total_rehearsed"]).tolist() == case["count_by_lag_1_to_k"]


@pytest.mark.parametrize("case", CASES["unnormalised"], ids=lambda c: f"a={c['exponent']}")
def test_natural_counts(case: dict[str, Any]) -> None:
    found = natural_counts(case["samples_of_new_task"], lags(case["n_previous"]), case["exponent"])
    assert found.tolist() == case["count_by_lag_1_to_k"]


# -- invariants of the numbers -----------------------------------------------------------------------------------
exponents = st.floats(0, 4)


@given(st.integers(1, 200), exponents, st.integers(0, 100_000))
def test_counts_sum_to_the_budget(number: int, exponent: float, total: int) -> None:
    weights = shape_weights(lags(number), "power", exponent)
    assert weights.sum() == pytest.approx(1)
    counts = round_counts(weights, total)
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert (np.diff(counts) <= 0).all(), "a longer lag must not get more"
    if total >= 1:
        assert counts[0] >= 1, "a small budget leaves out long lags first"


@given(st.integers(2, 200), exponents)
def test_weights_are_a_power_of_the_lag(number: int, exponent: float) -> None:
    weights = shape_weights(lags(number), "power", exponent)
    slope = np.polyfit(np.log(lags(number)), np.log(weights), 1)[0]
    assert slope == pytest.approx(-exponent, abs=1e-9)
    if exponent > 1e-6:
        assert weights[0] > weights[1]
    assert shape_weights(lags(number), "power", 0.0) == pytest.approx(shape_weights(lags(number), "uniform"))
    assert (np.diff(natural_counts(1000, lags(number), exponent)) <= 0).all()


@given(st.integers(1, 60), st.data())
def test_distinct_draws(below: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, below))
    found = distinct(count, below, np.random.RandomState(data.draw(st.integers(0, 9)))).tolist()
    assert len(found) == len(set(found)) == count
    assert all(0 <= value < below for value in found)


def test_refreshed_lags() -> None:
    """Met again means lag 1 at the next task, whatever the order of the tasks."""
    params = Params(rehearsed=1.0)
    counts = rehearsal_counts(np.array([1, 3, 1]), 70, params, np.random.RandomState(0))
    assert counts.tolist() == [30, 10, 30]
    on, off = (build([TABLE], 0, Params(tasks=5, refresh=flag)) for flag in (True, False))
    share = [Counter(s.tasks[4].domain.tolist()) for s in (on, off)]
    assert len({share[0][d] for d in range(4)}) == 1, "with all of them met at every task, all lags are 1"
    assert share[1][3] > share[1][0]


# -- invariants of the stream ------------------------------------------------------------------------------------
@given(tables(), st.data())
def test_streams_on_random_data(table: LabelTable, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["permuted", "classes"]))
    most = len(set(table.labels.tolist())) if kind == "classes" else 4
    params = Params(
        kind=kind, tasks=data.draw(st.integers(1, most)), shape=data.draw(st.sampled_from(SHAPES)),
        rehearsed=data.draw(st.floats(0, 3)), variant=data.draw(st.sampled_from(["after", "mixed"])),
        epochs=data.draw(st.integers(1, 3)), refresh=data.draw(st.booleans()), pixels=4,
    )  # fmt: skip
    scenario = build([table], data.draw(st.integers(0, 20)), params)
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []
    first = scenario.tasks[0]
    assert Counter(first.rows.tolist()) == dict.fromkeys(set(first.rows.tolist()), params.epochs)
    for index, task in enumerate(scenario.tasks):
        source = task.domain.tolist() if kind == "permuted" else owners(scenario, task)
        new = [row for row, owner in zip(task.rows.tolist(), source, strict=True) if owner == index]
        assert set(Counter(new).values()) == {params.epochs}, "every row of the new task once per epoch"
        assert max(source) == index
        if params.variant == "after":
            assert source[: len(new)] == [index] * len(new)
        again = [pair for pair in zip(source, task.rows.tolist(), strict=True) if pair[0] != index]
        per_task = Counter(owner for owner, _ in again)
        for owner, count in per_task.items():
            available = len(set(scenario.tasks[owner].rows.tolist())) if kind == "permuted" else None
            times = Counter(row for o, row in again if o == owner)
            if available is not None:
                assert max(times.values()) - (min(times.values()) if len(times) == available else 0) <= 1, count


def owners(scenario, task) -> list[int]:
    home = {c: i for i, t in enumerate(scenario.tasks) for c in t.classes.tolist()}
    return [home[c] for c in task.targets.tolist()]


@given(st.floats(0, 2), st.integers(2, 6))
def test_shapes_differ_in_shape_only(rehearsed: float, tasks: int) -> None:
    totals = {
        shape: [len(t.rows) for t in build([TABLE], 3, Params(tasks=tasks, shape=shape, rehearsed=rehearsed)).tasks]
        for shape in SHAPES
    }
    assert totals["power"] == totals["exponential"] == totals["uniform"] == totals["random"]
    assert totals["none"] == [400] * tasks


def test_first_task_may_be_plain() -> None:
    plain, permuted = (build([TABLE], 0, Params(tasks=3, first_plain=flag)) for flag in (True, False))
    assert plain.domains.table[0].tolist() == list(range(64))
    assert permuted.domains.table[0].tolist() != list(range(64))
    assert torch.equal(plain.domains.table[1:], permuted.domains.table[1:])


def test_class_incremental_ids_are_positions() -> None:
    scenario = build([TABLE], 1993, Params(kind="classes", tasks=5, order="seeded"))
    assert scenario.setting == "class"
    assert [task.classes.tolist() for task in scenario.tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert scenario.first_seen.tolist() == [offset for offset in scenario.offsets[:-1] for _ in range(2)]


# -- what cannot be met ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (Params(kind="classes", tasks=11), "more than the 10 classes"),
        (Params(budget="natural", shape="uniform"), "budget=natural is a power of the lag"),
        (Params(order="seeded"), "leave order out"),
        (Params(val_share=0.1), "validation rows"),
    ],
)
def test_bad_parameters(params: Params, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build([TABLE], 0, params)


def test_unknown_image_size() -> None:
    with pytest.raises(InputError, match="give pixels="):
        build([balanced("mine", 40, 10, 2)], 0, Params(tasks=2))
    assert build([balanced("mine", 40, 10, 2)], 0, Params(tasks=2, pixels=9)).domains.table.shape == (2, 9)
    with pytest.raises(InputError, match="one data set, not 2"):
        build([TABLE, TABLE], 0, Params())
