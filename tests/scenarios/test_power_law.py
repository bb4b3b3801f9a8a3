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
from label_tables import balanced, make_table, tables

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
    home = {}
    for index, task in enumerate(scenario.tasks if kind == "classes" else ()):
        home |= {row: o for row, o in zip(task.rows.tolist(), owners(scenario, task), strict=True) if o == index}
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
            its_own = {row for row in scenario.tasks[owner].rows.tolist() if kind == "permuted" or home[row] == owner}
            times = Counter(row for o, row in again if o == owner)
            assert set(times) <= its_own, "from the training set of its task"
            assert max(times.values()) - (min(times.values()) if len(times) == len(its_own) else 0) <= 1, count


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


@given(st.floats(0, 3), st.integers(2, 7), st.booleans())
def test_natural_budget_in_the_stream(exponent: float, tasks: int, mixed: bool) -> None:
    """floor(n (1 + lag)^-a) of every earlier task; more in total with every task, but never more of one than before."""
    params = Params(
        tasks=tasks, budget="natural", exponent=exponent, variant="mixed" if mixed else "after", rehearsed=9.0
    )
    scenario = build([TABLE], 1, params)
    for index, task in enumerate(scenario.tasks):
        counts = np.bincount(task.domain.numpy(), minlength=tasks)
        expected = [int(400 * (1 + index - j) ** -exponent + 1e-9) for j in range(index)]
        assert counts.tolist() == [*expected, 400, *[0] * (tasks - index - 1)]
    sizes = [len(task.rows) for task in scenario.tasks]
    assert sizes == sorted(sizes)


def test_every_epoch_has_an_order_of_its_own_and_rehearsal_comes_once() -> None:
    scenario = build([TABLE], 0, Params(tasks=2, epochs=3, rehearsed=0.25))
    for index, task in enumerate(scenario.tasks):
        passes = task.rows[:1200].reshape(3, 400)
        assert all(sorted(one.tolist()) == list(range(400)) for one in passes)
        assert len({tuple(one.tolist()) for one in passes}) == 3
        assert len(task.rows) == 1200 + 100 * index, "a share of the new task's rows, whatever the epochs"


def test_mixed_is_the_same_rows_as_after_in_another_order() -> None:
    after, mixed = (build([TABLE], 2, Params(tasks=3, variant=variant)).tasks[2] for variant in ("after", "mixed"))
    pairs = [sorted(zip(t.domain.tolist(), t.rows.tolist(), strict=True)) for t in (after, mixed)]
    assert pairs[0] == pairs[1]
    assert (after.domain[:400] == 2).all()
    assert (after.domain[400:] < 2).all()
    old = (mixed.domain < 2).nonzero()[:, 0].float()
    assert 150 < old.mean() < 350, "rehearsed rows lie all over the task"


def test_a_refreshed_task_is_met_again_only_if_it_was_rehearsed() -> None:
    """Blocks of 40, 40, 2 and 60 rows, half as many rehearsed: task 2 has one row for two tasks at lag 1."""
    table = make_table("uneven", np.repeat(np.arange(4), [40, 40, 2, 60]), range(4), 4)

    def rehearsed(refresh: bool) -> list[list[int]]:
        params = Params(kind="classes", tasks=4, rehearsed=0.5, refresh=refresh)
        tasks = build([table], 0, params).tasks
        return [np.bincount(task.targets[task.targets < t], minlength=t).tolist() for t, task in enumerate(tasks)][1:]

    assert rehearsed(False) == [[20], [0, 1], [6, 8, 16]], "lags 3, 2, 1: 30 rows in 2 : 3 : 6, 5.45, 8.18, 16.36"
    # at lag 1 both, the tie goes to the first; the other one, not met, has lag 2 at task 3
    assert rehearsed(True) == [[20], [1, 0], [12, 6, 12]], "lags 1, 2, 1: 30 rows in 2 : 1 : 2"


def test_validation_rows_of_blocks() -> None:
    scenario = build([TABLE], 0, Params(kind="classes", tasks=5, val_share=0.1, per_class=20, rehearsed=1.0))
    val = torch.cat([task.val[0] for task in scenario.tasks])
    assert [len(task.val[0]) for task in scenario.tasks] == [4] * 5
    assert [len(task.rows) for task in scenario.tasks] == [36, 72, 72, 72, 72]
    assert not torch.isin(val, torch.cat([task.rows for task in scenario.tasks])).any(), "nor rehearsed"


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
