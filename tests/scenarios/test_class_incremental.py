import time
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_tables import balanced, make_table, real_layout, tables

from clbench.data.classes import TEST, TRAIN, LabelTable
from clbench.errors import InputError
from clbench.scenarios.class_incremental import Params, build, task_sizes
from clbench.scenarios.model import Scenario

quick = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw: st.DrawFn) -> tuple[LabelTable, int, Params]:
    """A random table with parameters that it can meet."""
    table = draw(tables())
    num_classes = int(table.labels.max()) + 1
    cut: dict[str, Any] = {"tasks": draw(st.integers(1, num_classes))}
    if draw(st.booleans()):
        cut = {"init": draw(st.integers(1, num_classes)), "increment": draw(st.integers(1, num_classes))}
    order = draw(st.one_of(st.sampled_from(["natural", "seeded"]), st.permutations(range(num_classes)).map(tuple)))
    fewest = int(torch.bincount(table.labels[table.split == TRAIN]).min())
    params = Params(
        **cut,
        order=order,
        setting=draw(st.sampled_from(["class", "task"])),
        online=draw(st.booleans()),
        shuffle=draw(st.booleans()),
        per_class=draw(st.none() | st.integers(2, 8)),
        val_share=draw(st.sampled_from([0.0, 0.1, 0.4])) if fewest >= 2 else 0.0,
        subset_seed=draw(st.integers(0, 3)),
    )
    return table, draw(st.integers(0, 2**32 - 1)), params


def source_classes(scenario: Scenario, table: LabelTable) -> list[int]:
    """The data set's class id of each class of the scenario, read off its names."""
    return [table.classes.names.index(name) for name in scenario.classes.names]


# -- the card's invariants ---------------------------------------------------------------------------------------
@quick
@given(cases())
def test_tasks_are_disjoint_blocks_that_cover_all_classes(case: tuple[LabelTable, int, Params]) -> None:
    table, seed, params = case
    scenario = build([table], seed, params)
    introduced = torch.cat([task.classes for task in scenario.tasks])
    assert introduced.tolist() == list(range(scenario.num_classes))  # ids are positions in the order
    for task in scenario.tasks:
        assert set(task.targets.tolist()) == set(task.classes.tolist())


@quick
@given(cases())
def test_every_row_comes_once_in_the_right_place(case: tuple[LabelTable, int, Params]) -> None:
    table, seed, params = case
    scenario = build([table], seed, params)
    train = torch.cat([task.rows for task in scenario.tasks])
    val = torch.cat([task.val[0] for task in scenario.tasks if task.val is not None] or [train[:0]])
    test = torch.cat([group.rows for group in scenario.groups])
    assert len(train.unique()) == len(train)
    assert not set(train.tolist()) & set(val.tolist())
    assert bool((table.split[train] == TRAIN).all())
    assert bool((table.split[val] == TRAIN).all())
    assert sorted(test.tolist()) == torch.nonzero(table.split == TEST).flatten().tolist()
    if params.per_class is None:
        assert len(train) + len(val) == int((table.split == TRAIN).sum())
    source = torch.tensor(source_classes(scenario, table))
    for rows, targets in [
        *((task.rows, task.targets) for task in scenario.tasks),
        *(task.val for task in scenario.tasks if task.val is not None),
        *((group.rows, group.targets) for group in scenario.groups),
    ]:
        assert torch.equal(source[targets], table.labels[rows])


@quick
@given(cases())
def test_cap_and_validation_share_of_each_class(case: tuple[LabelTable, int, Params]) -> None:
    table, seed, params = case
    scenario = build([table], seed, params)
    available = torch.bincount(table.labels[table.split == TRAIN])
    for target, source in enumerate(source_classes(scenario, table)):
        kept = min(int(available[source]), params.per_class or 10**9)
        num_train = sum(int((task.targets == target).sum()) for task in scenario.tasks)
        num_val = sum(int((task.val[1] == target).sum()) for task in scenario.tasks if task.val is not None)
        assert num_train + num_val == kept
        assert num_val == (max(int(kept * params.val_share + 0.5), 1) if params.val_share else 0)


@quick
@given(cases(), st.integers(0, 2**32 - 1))
def test_other_class_orders_train_on_the_same_images(case: tuple[LabelTable, int, Params], other: int) -> None:
    table, seed, params = case
    rows = []
    for order_seed in (seed, other):
        scenario = build([table], order_seed, params)
        val = {row for task in scenario.tasks if task.val is not None for row in task.val[0].tolist()}
        rows.append(({row for task in scenario.tasks for row in task.rows.tolist()}, val))
    assert rows[0] == rows[1]


@quick
@given(cases())
def test_groups_and_unlocking(case: tuple[LabelTable, int, Params]) -> None:
    table, seed, params = case
    scenario = build([table], seed, params)
    assert [group.task for group in scenario.groups] == list(range(len(scenario.tasks)))
    for task, group, offset in zip(scenario.tasks, scenario.groups, scenario.offsets, strict=False):
        assert set(group.targets.tolist()) == set(task.classes.tolist())
        allowed = task.classes if params.setting == "task" else torch.arange(scenario.num_classes)
        assert torch.equal(group.classes, allowed)
        assert bool((scenario.first_seen[task.classes] == offset).all())
    assert scenario.first_seen.shape == (scenario.num_classes,)


@quick
@given(cases())
def test_pure(case: tuple[LabelTable, int, Params]) -> None:
    table, seed, params = case
    before = [column.clone() for column in (table.labels, table.split, table.classes.level, table.classes.parent)]
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 - is it left alone?
    assert build([table], seed, params).fingerprint == build([table], seed, params).fingerprint
    after = (table.labels, table.split, table.classes.level, table.classes.parent)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (np.random.get_state()[1] == np_state).all()  # noqa: NPY002 - as above
    assert torch.equal(torch.get_rng_state(), torch_state)


@quick
@given(cases(), cases())
def test_fingerprints_differ_exactly_if_the_tables_do(
    one: tuple[LabelTable, int, Params], two: tuple[LabelTable, int, Params]
) -> None:
    def content(scenario: Scenario) -> list[Any]:
        columns: list[Any] = [scenario.setting, scenario.online, scenario.classes.names, scenario.first_seen.tolist()]
        for task in scenario.tasks:
            val = task.val and [column.tolist() for column in task.val]
            columns += [task.rows.tolist(), task.targets.tolist(), task.classes.tolist(), val]
        for group in scenario.groups:
            columns += [group.name, group.rows.tolist(), group.targets.tolist(), group.classes.tolist()]
        return columns

    first, second = (build([table], seed, params) for table, seed, params in (one, two))
    assert (content(first) == content(second)) == (first.fingerprint == second.fingerprint)


def reference_build(table: LabelTable, seed: int, sizes: list[int]) -> list[tuple[list[int], list[int]]]:
    """Rows and targets of each task with the seeded order, written down from the card, one row at a time."""
    num_classes = sum(sizes)
    rng = np.random.RandomState(seed)
    order = rng.permutation(num_classes).tolist()
    out, position = [], 0
    for size in sizes:
        block = order[position : position + size]
        rows = [
            row
            for row in range(len(table.labels))
            if int(table.split[row]) == TRAIN and int(table.labels[row]) in block
        ]
        out.append((rows, [order.index(int(table.labels[row])) for row in rows]))
        position += size
    return out


@quick
@given(tables(), st.integers(0, 2000), st.data())
def test_same_as_the_reference(table: LabelTable, seed: int, data: st.DataObject) -> None:
    num_classes = int(table.labels.max()) + 1
    tasks = data.draw(st.integers(1, num_classes))
    scenario = build([table], seed, Params(tasks=tasks, order="seeded"))
    expected = reference_build(table, seed, task_sizes(num_classes, tasks, None, None))
    assert [(task.rows.tolist(), task.targets.tolist()) for task in scenario.tasks] == expected


# -- sizes of the blocks -----------------------------------------------------------------------------------------
def reference_increments(num_classes: int, init: int, step: int) -> list[int]:
    """The card's rule, literally."""
    increments = [init]
    while sum(increments) + step < num_classes:
        increments.append(step)
    if num_classes - sum(increments) > 0:
        increments.append(num_classes - sum(increments))
    return increments


def test_increments_of_the_card() -> None:
    assert task_sizes(196, None, 20, 20) == [20] * 9 + [16]
    assert task_sizes(100, None, 50, 10) == [50] + [10] * 5
    assert task_sizes(100, None, None, 10) == [10] * 10


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_increments_follow_the_rule(num_classes: int, init: int, step: int) -> None:
    init = min(init, num_classes)
    assert task_sizes(num_classes, None, init, step) == reference_increments(num_classes, init, step)


@given(st.integers(1, 300), st.data())
def test_tasks_are_nearly_equal(num_classes: int, data: st.DataObject) -> None:
    tasks = data.draw(st.integers(1, num_classes))
    sizes = task_sizes(num_classes, tasks, None, None)
    assert len(sizes) == tasks
    assert sum(sizes) == num_classes
    assert max(sizes) - min(sizes) <= 1


# -- single parameters -------------------------------------------------------------------------------------------
def test_seeded_order_names_the_classes() -> None:
    scenario = build([real_layout("cifar100")], 1993, Params(tasks=10, order="seeded"))
    assert scenario.classes.names[:5] == ("class 68", "class 56", "class 78", "class 8", "class 23")
    assert len(scenario.classes) == 100
    assert scenario.classes.num_levels == 1


def test_online_order_is_drawn_from_the_order_seed() -> None:
    table = balanced("toy", 400, 40, 4)
    runs = {seed: build([table], seed, Params(tasks=2, online=True)) for seed in (0, 1)}
    listed = build([table], 0, Params(tasks=2, online=True, shuffle=False))
    assert listed.tasks[0].rows.tolist() == sorted(listed.tasks[0].rows.tolist())
    for seed, scenario in runs.items():
        for task, expected in zip(scenario.tasks, listed.tasks, strict=True):
            assert sorted(task.rows.tolist()) == expected.rows.tolist()
            assert task.rows.tolist() != expected.rows.tolist(), seed
    assert runs[0].tasks[0].rows.tolist() != runs[1].tasks[0].rows.tolist()
    # a shuffle, not a rotation or a sort: neighbours in the data set end up about a third of the task apart
    distance = runs[0].tasks[0].rows.diff().abs().float().mean() / 400
    assert 0.25 < float(distance) < 0.42


def test_capped_subsets_are_nested_and_depend_on_their_own_seed() -> None:
    table = balanced("toy", 600, 60, 3)

    def rows(**given: Any) -> set[int]:
        return {row for task in build([table], 0, Params(tasks=3, **given)).tasks for row in task.rows.tolist()}

    assert rows(per_class=5) < rows(per_class=20) < rows(per_class=10**6)
    assert rows(per_class=20) != rows(per_class=20, subset_seed=1)
    assert Counter(row % 3 for row in rows(per_class=20)) == {0: 20, 1: 20, 2: 20}


@quick
@given(tables(), st.integers(1, 6), st.integers(0, 3))
def test_test_rows_are_capped_per_class_and_nested(table: LabelTable, cap: int, seed: int) -> None:
    def kept(**more: Any) -> Counter[tuple[int, str]]:
        scenario = build([table], 0, Params(tasks=1, subset_seed=seed, **more))
        group = scenario.groups[0]
        assert torch.equal(table.labels[group.rows], group.targets)
        assert bool((group.rows.diff() > 0).all())
        return Counter(zip(group.rows.tolist(), group.targets.tolist(), strict=True))

    every, some, more = kept(), kept(test_per_class=cap), kept(test_per_class=cap + 1)
    assert some <= more <= every
    available = Counter(target for _, target in every)
    assert Counter(target for _, target in some) == {c: min(cap, n) for c, n in available.items()}
    train = build([table], 0, Params(tasks=1)).tasks[0].rows
    assert torch.equal(build([table], 0, Params(tasks=1, test_per_class=cap)).tasks[0].rows, train)


def test_a_class_keeps_its_rows_whatever_else_is_in_use() -> None:
    table = balanced("toy", 600, 60, 3)
    cut = Params(tasks=1, per_class=20, val_share=0.25)
    everything = build([table], 0, cut).tasks[0]
    alone = build([table], 0, replace(cut, order=(2,))).tasks[0]
    assert alone.rows.tolist() == everything.rows[everything.targets == 2].tolist()
    assert everything.val is not None
    assert alone.val is not None
    assert alone.val[0].tolist() == everything.val[0][everything.val[1] == 2].tolist()


def test_coarse_labels() -> None:
    table = real_layout("cifar100")
    scenario = build([table], 0, Params(tasks=4, label_level=0))
    assert scenario.classes.names == tuple(f"coarse {i}" for i in range(20))
    assert [len(task.rows) for task in scenario.tasks] == [12_500] * 4
    task = scenario.tasks[1]
    assert torch.equal(table.labels[task.rows] % 20, task.targets)


def test_a_list_may_leave_classes_out() -> None:
    table = balanced("toy", 100, 50, 10)
    scenario = build([table], 0, Params(tasks=2, order=(7, 2, 5)))
    assert scenario.classes.names == ("class 7", "class 2", "class 5")
    assert [len(task.rows) for task in scenario.tasks] == [20, 10]
    assert sum(len(group.rows) for group in scenario.groups) == 15
    assert scenario.tasks[0].targets.tolist() == [1, 0] * 10  # rows 2, 7, 12, ... are of class 2, 7, 2, ...


def test_params_are_recorded() -> None:
    scenario = build([balanced("toy", 100, 50, 10)], 0, Params(tasks=5, per_class=7))
    assert scenario.params["per_class"] == 7
    assert set(scenario.params) == {item.name for item in fields(Params)}


# -- what cannot be met ------------------------------------------------------------------------------------------
TOY = balanced("toy", 40, 20, 10)
HOLES = make_table("holes", [0, 2, 2], [0, 1, 2], 3)
UNTESTED = make_table("untested", [0, 1, 2], [0, 1], 3)


@pytest.mark.parametrize(
    ("table", "params", "message"),
    [
        (TOY, Params(tasks=11), "tasks=11 is more than the 10 classes"),
        (TOY, Params(init=11, increment=1), "init=11 is more than the 10 classes"),
        (TOY, Params(increment=11), "increment=11 is more than the 10 classes"),
        (TOY, Params(), "give tasks=NUMBER, or increment=CLASSES"),
        (TOY, Params(init=5), "give tasks=NUMBER, or increment=CLASSES"),
        (TOY, Params(tasks=2, increment=2), "either tasks, or init and increment"),
        (TOY, Params(tasks=2, order=(0, 1, 10)), "order holds class 10, but the ids are 0 to 9"),
        (TOY, Params(tasks=2, order=(0, -1)), "order holds class -1"),
        (TOY, Params(tasks=2, order=(0, 1, 1)), "order holds class 1 2 times"),
        (TOY, Params(tasks=2, order=()), "order is an empty list"),
        (TOY, Params(tasks=2, per_class=1, val_share=0.5), "val_share=0.5 leaves no training rows of class 'class 0'"),
        (TOY, Params(tasks=2, val_share=0.9), "val_share=0.9 leaves no training rows of class 'class 0', which has 4"),
        (TOY, Params(tasks=2, label_level=1), "label_level=1 does not exist; the levels are 0"),
        (HOLES, Params(tasks=3), "no training rows of class 'class 1'"),
        (UNTESTED, Params(tasks=3), "no test rows of class 'class 2'"),
    ],
)
def test_bad_parameters(table: LabelTable, params: Params, message: str) -> None:
    with pytest.raises(InputError) as caught:
        build([table], 0, params, id="mine@1")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"mine@1 on {table.dataset}: ")
    assert "\n" not in str(caught.value)


def test_bad_seed_and_bad_number_of_data_sets() -> None:
    with pytest.raises(InputError, match="order seed -1 is out of range"):
        build([TOY], -1, Params(tasks=2, order="seeded"))
    with pytest.raises(InputError, match="takes one data set, not 2"):
        build([TOY, TOY], 0, Params(tasks=2))


def test_fast_enough() -> None:
    table = real_layout("cifar100")
    params = Params(tasks=10, order="seeded", online=True, per_class=450, val_share=0.1)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        build([table], 0, params)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1
