"""The conformance check passes what is right and names what is wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_tables import balanced, tables

from clbench.data.classes import ClassTable, LabelTable
from clbench.scenarios import find
from clbench.scenarios.check import check_preset, check_scenario
from clbench.scenarios.class_incremental import Params, build
from clbench.scenarios.model import Domains, Scenario, StreamDefaults

TABLE = balanced("toy", 60, 30, 6)
GOOD = build([TABLE], 0, Params(tasks=3, val_share=0.2, online=True))


def with_task(index: int, **columns: Any) -> Scenario:
    tasks = list(GOOD.tasks)
    tasks[index] = tasks[index]._replace(**columns)
    return replace(GOOD, tasks=tuple(tasks))


def with_group(index: int, **columns: Any) -> Scenario:
    groups = list(GOOD.groups)
    groups[index] = groups[index]._replace(**columns)
    return replace(GOOD, groups=tuple(groups))


def changed(column: torch.Tensor, value: int, at: int = 0) -> torch.Tensor:
    column = column.clone()
    column[at] = value
    return column


def failures(scenario: Scenario) -> dict[str, str]:
    return {check.name: check.message for check in check_scenario(scenario, [TABLE]) if not check.ok}


def test_a_good_one_passes_all() -> None:
    checks = check_scenario(GOOD, [TABLE], lambda: build([TABLE], 0, Params(tasks=3, val_share=0.2, online=True)))
    assert [(check.ok, check.message) for check in checks] == [(True, "")] * 10


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(0, 1000), st.booleans(), st.sampled_from(["class", "task"]))
def test_whatever_the_builder_makes_passes(table: LabelTable, seed: int, online: bool, setting: Any) -> None:
    scenario = build([table], seed, Params(increment=1, order="seeded", online=online, setting=setting))
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []


FIRST, GROUP = GOOD.tasks[0], GOOD.groups[0]
VAL = FIRST.val
assert VAL is not None


@pytest.mark.parametrize(
    ("scenario", "name", "message"),
    [
        (replace(GOOD, id="toy"), "form", "id 'toy' is not of the form name@version"),
        (replace(GOOD, datasets=("a", "b")), "form", "names 2 data sets but is built on 1"),
        (replace(GOOD, setting="clas"), "form", "setting 'clas'"),  # type: ignore[arg-type]  # that is the point
        (replace(GOOD, tasks=()), "form", "nothing to train on"),
        (replace(GOOD, groups=()), "form", "nothing to test on"),
        (replace(GOOD, params={"x": torch.zeros(1)}), "form", "params must be plain values"),
        (replace(GOOD, first_seen=GOOD.first_seen[:-1]), "form", "one entry per class"),
        (with_task(0, rows=FIRST.rows.float()), "form", "task 0: rows must be a 1-d int64 tensor"),
        (with_task(0, targets=FIRST.targets[:-1]), "form", "task 0: 15 targets for 16 rows"),
        (with_group(0, domain=GROUP.rows[:3]), "form", "group 'task 0': 3 domain for 10 rows"),
        (with_task(1, rows=changed(GOOD.tasks[1].rows, 90)), "form", "task 1: rows must be numbers from 0 to 89"),
        (with_task(1, rows=changed(GOOD.tasks[1].rows, -1)), "form", "task 1: rows must be numbers from 0 to 89"),
        (with_task(0, rows=changed(FIRST.rows, 66)), "rows", "task 0: 1 of 16 rows are test rows"),
        (with_group(0, rows=changed(GROUP.rows, 6)), "rows", "group 'task 0': 1 of 10 rows are training rows"),
        (with_task(0, val=(VAL[0] % 6 + 60, VAL[1])), "rows", "task 0, validation: 4 of 4 rows are test rows"),
        (with_task(2, rows=changed(GOOD.tasks[2].rows, int(VAL[0][0]))), "rows", "1 validation rows are also trained"),
        (with_task(0, targets=changed(FIRST.targets, 6)), "form", "task 0: targets must be numbers from 0 to 5"),
        (with_task(1, classes=torch.tensor([2, 1])), "classes", "task 1 introduces a class that was introduced before"),
        (with_task(1, classes=torch.tensor([2, 2, 3])), "classes", "task 1 introduces a class that was introduced"),
        (with_task(0, classes=torch.tensor([0])), "classes", "task 0 trains class 'class 1', which neither it nor"),
        (
            replace(GOOD, classes=ClassTable(GOOD.classes.names, GOOD.classes.level, changed(GOOD.classes.parent, 1))),
            "classes",
            "a class's parent must be one level above it",
        ),
        (
            replace(GOOD, first_seen=changed(GOOD.first_seen, 20, at=5)),
            "first seen",
            "class 'class 5' unlocks at 20, but its task starts at 32",
        ),
        (with_group(1, name="task 0"), "groups", "two groups have this name"),
        (with_group(1, rows=GROUP.rows[:0], targets=GROUP.rows[:0]), "groups", "group 'task 1' has no rows"),
        (with_group(1, classes=torch.arange(2)), "groups", "a right answer is not among the classes"),
        (with_group(1, classes=torch.tensor([2, 2, 3])), "groups", "a class stands twice"),
        (with_group(1, level=1), "groups", "level is 1, but its targets are of another level"),
        (with_group(1, task=3), "groups", "belongs to task 3, but the tasks are 0 to 2"),
        (replace(GOOD, groups=GOOD.groups[:2]), "groups", "class 'class 4' is trained but in no group"),
        (replace(with_group(0, task=None), setting="task"), "groups", "belongs to no task"),
        (with_group(0, targets=1 - GROUP.targets), "labels", "task 0: most of its rows have other targets"),
        (with_group(0, targets=changed(GROUP.targets, 1)), "labels", "test rows of one label have different targets"),
        (with_task(0, domain=torch.zeros_like(FIRST.rows)), "domains", "the scenario has no domain table"),
        (
            replace(
                with_task(0, domain=torch.full_like(FIRST.rows, 2)),
                domains=Domains("permutation", torch.arange(4).repeat(2, 1)),
            ),
            "domains",
            "task 0: domains must be 0 to 1",
        ),
        (
            replace(GOOD, domains=Domains("permutation", torch.zeros(2, 4, dtype=torch.int64))),
            "domains",
            "no permutation of the pixels",
        ),
        (
            replace(
                with_group(0, domain=torch.zeros_like(GROUP.rows)),
                domains=Domains("permutation", torch.arange(4).repeat(2, 1)),
            ),
            "domains",
            "group 'task 1' does not say the domain",
        ),
        (replace(GOOD, defaults=StreamDefaults(batch_size=0)), "defaults", "batch_size is 0, but must be at least 1"),
        (replace(GOOD, defaults=StreamDefaults(train_view="flop")), "defaults", "train_view: unknown view operation"),
        (replace(GOOD, prompts={3: ("a",)}), "defaults", "prompts are given for task 3"),
    ],
)
def test_what_is_wrong_is_named(scenario: Scenario, name: str, message: str) -> None:
    found = failures(scenario)
    assert message in found[name]


def test_a_class_may_unlock_with_its_first_row() -> None:
    first_row = GOOD.offsets[1] + int((GOOD.tasks[1].targets == 3).nonzero()[0])
    assert failures(replace(GOOD, first_seen=changed(GOOD.first_seen, first_row, at=3))) == {}


def test_rehearsal_and_empty_tasks_are_allowed() -> None:
    last, first = GOOD.tasks[2], GOOD.tasks[0]
    rehearsed = with_task(
        2, rows=torch.cat([last.rows, first.rows[:5]]), targets=torch.cat([last.targets, first.targets[:5]])
    )
    assert failures(rehearsed) == {}
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = GOOD.tasks[0]._replace(rows=nothing, targets=nothing, classes=nothing, val=None)
    assert failures(replace(GOOD, tasks=(*GOOD.tasks, empty))) == {}


def test_a_builder_that_is_not_a_function_of_its_inputs() -> None:
    calls: list[int] = []

    def drifting() -> Scenario:
        calls.append(1)
        return with_task(0, rows=FIRST.rows.flip(0))

    def spoiling() -> Scenario:
        table.labels[0] = 5
        return GOOD

    table = TABLE._replace(labels=TABLE.labels.clone())

    def bad(rebuild: Callable[[], Scenario]) -> list[str]:
        return [check.name for check in check_scenario(GOOD, [table], rebuild) if not check.ok]

    assert bad(drifting) == ["same again"]
    assert calls == [1]
    assert bad(spoiling) == ["inputs kept"]


def test_check_preset_tries_two_seeds() -> None:
    table = balanced("digits", 100, 50, 10)
    preset = find("split-digits")
    seeds = []

    class Spy:
        @staticmethod
        def build(tables: Any, seed: int, *args: Any, **kwargs: Any) -> Scenario:
            seeds.append(seed)
            scenario = preset.module.build(tables, seed, *args, **kwargs)
            return replace(scenario, setting="none") if seed == 6 else scenario  # type: ignore[arg-type]  # wrong on purpose

    checks = check_preset(replace(preset, module=Spy), [table], 5)  # type: ignore[arg-type]  # all it needs is build
    assert set(seeds) == {5, 6}
    assert [check.name for check in checks if not check.ok] == ["form"]
