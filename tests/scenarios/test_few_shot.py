"""Continual few-shot learning: counts, episodes, the instance test on real digits, and what cannot be met."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_tables import balanced, real_layout, tables

from clbench.data import Reader, load
from clbench.data.classes import LabelTable
from clbench.errors import InputError
from clbench.scenarios import build as build_preset
from clbench.scenarios import find
from clbench.scenarios.check import check_scenario
from clbench.scenarios.few_shot import Params, build

TABLE = balanced("digits", 400, 80, 10)


@pytest.mark.parametrize(
    ("sets", "change", "classes", "total"), [(10, 1, 1, 10), (10, 5, 5, 10), (6, 2, 3, 9), (3, 3, 4, 4)]
)
def test_number_of_classes(sets: int, change: int, classes: int, total: int) -> None:
    scenario = build([TABLE], 0, Params(support_sets=sets, class_change=change, classes=classes, shots=2))
    assert scenario.num_classes == total == sets * classes // change
    assert [len(task.rows) for task in scenario.tasks] == [classes * 2] * sets
    assert [len(task.classes) for task in scenario.tasks] == [classes * (i % change == 0) for i in range(sets)]


@given(tables(), st.data())
def test_episodes_on_random_data(table: LabelTable, data: st.DataObject) -> None:
    num_classes = int(table.labels.max()) + 1
    rows = int(torch.bincount(table.labels[table.split == 0]).min())
    change = data.draw(st.integers(1, rows))
    classes = data.draw(st.integers(1, num_classes))
    blocks = data.draw(st.integers(1, num_classes // classes))
    params = Params(change * blocks, change, classes, data.draw(st.integers(1, rows // change)))
    scenario = build([table], data.draw(st.integers(0, 9)), params)
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []
    shown = torch.cat([task.rows for task in scenario.tasks])
    assert len(shown.unique()) == len(shown), "every shot is a new image"
    assert sum(len(group.rows) for group in scenario.groups) == len(
        {row for group in scenario.groups for row in group.rows.tolist()}
    )


def test_targets_do_not_depend_on_the_shots() -> None:
    few, many = (build([TABLE], 3, Params(support_sets=5, classes=2, shots=k, targets=4)) for k in (1, 7))
    assert [g.rows.tolist() for g in few.groups] == [g.rows.tolist() for g in many.groups]
    assert {len(g.rows) for g in few.groups} == {8}


def test_targets_do_not_depend_on_the_support_sets() -> None:
    """All ten digits, in sets of one, two or five: the same target set, asked for in other groups."""
    shapes = [Params(10, 1, 1, targets=3), Params(5, 1, 2, shots=4, targets=3), Params(4, 2, 5, targets=3)]
    found = []
    for params in shapes:
        groups = build([TABLE], 3, params).groups
        found.append(sorted(row for group in groups for row in group.rows.tolist()))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 30


def test_task_incremental_episodes() -> None:
    scenario = build([TABLE], 0, Params(support_sets=5, classes=2, setting="task"))
    assert scenario.setting == "task"
    assert [group.classes.tolist() for group in scenario.groups] == [[2 * i, 2 * i + 1] for i in range(5)]
    assert [group.task for group in scenario.groups] == list(range(5))
    assert [check for check in check_scenario(scenario, [TABLE]) if not check.ok] == []


def test_seeds_draw_other_episodes() -> None:
    one, other = (build([TABLE], seed, Params(support_sets=4, classes=2)) for seed in (0, 1))
    assert one.classes.names != other.classes.names


# -- the instance test -------------------------------------------------------------------------------------------
def nearest_share(scenario, reader: Reader) -> float:
    """Part of the queries whose nearest shown image in pixels is the right one."""
    shown = torch.cat([task.rows for task in scenario.tasks])
    known = torch.cat([task.targets for task in scenario.tasks])
    images = reader(shown, None, "test").flatten(1)
    hits = []
    for group in scenario.groups:
        queries = reader(group.rows, group.domain, "test").flatten(1)
        hits.append(known[torch.cdist(queries, images).argmin(1)] == group.targets)
    return float(torch.cat(hits).float().mean())


def test_instances_on_real_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untouched queries are found by their pixels alone; the more is changed, the fewer."""
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path))
    store = load("digits")
    shares = []
    for change in ({"corruption": "none"}, {"level": 0.3}, {"level": 1.0}, {"corruption": "occlusion", "level": 1.0}):
        scenario = build_preset(find("cfsl-digits-instance").with_params(change), [store.table()], 0)
        assert [check for check in check_scenario(scenario, [store.table()]) if not check.ok] == []
        shares.append(nearest_share(scenario, Reader(store, {"test": ""}, scenario.domains)))
    untouched, some, all_noise, covered = shares
    assert untouched == 1.0
    assert untouched >= some > all_noise
    assert covered <= 1 / 25, "a covered image says nothing"


def test_instances_of_one_category() -> None:
    scenario = build([TABLE], 0, Params(support_sets=10, classes=5, instance=True, per_category=10))
    assert scenario.recall
    categories = [name.partition(" #")[0] for name in scenario.classes.names]
    assert sorted(map(categories.count, set(categories))) == [10] * 5
    rows = torch.cat([task.rows for task in scenario.tasks])
    assert len(rows.unique()) == scenario.num_classes == 50, "labels are unique per image"
    again = build([TABLE], 0, Params(support_sets=10, class_change=2, classes=5, shots=3, instance=True))
    assert torch.equal(again.tasks[0].rows, again.tasks[1].rows), "the same exemplars until new classes come"
    assert again.tasks[0].rows.tolist() == [row for row in again.groups[0].rows.tolist() for _ in range(3)]


def test_knowing_the_category_is_right_one_time_in_m() -> None:
    """Whoever tells categories apart but not exemplars is left with m answers, of which one is right."""
    for m in (5, 10):
        scenario = build([TABLE], 0, Params(support_sets=10, classes=5, instance=True, per_category=m))
        shown = torch.cat([task.rows for task in scenario.tasks])
        of = torch.cat([task.targets for task in scenario.tasks])
        category = torch.empty(scenario.num_classes, dtype=torch.int64).scatter_(0, of, TABLE.labels[shown])
        rows = torch.cat([group.rows for group in scenario.groups])
        targets = torch.cat([group.targets for group in scenario.groups])
        answers = category[None] == TABLE.labels[rows][:, None]  # (queries, classes) exemplars of the right category
        right = answers.gather(1, targets[:, None])[:, 0] / answers.sum(1)
        assert len(right) == 50
        assert float(right.mean()) == pytest.approx(1 / m)


def test_overlays() -> None:
    params = Params(support_sets=2, classes=3, instance=True, corruption="occlusion", level=0.25)
    table = build([TABLE], 0, params).domains.table
    assert ((table >= 0).sum(1) == 16).all(), "a quarter of 64 pixels"
    for one in (table >= 0).view(-1, 8, 8).int():
        assert sorted(one.sum(0).tolist()) == sorted(one.sum(1).tolist()) == [0] * 4 + [4] * 4, "in one square"
    noise = build([TABLE], 0, Params(support_sets=2, classes=3, instance=True, corruption="noise", level=0.5)).domains
    assert ((noise.table >= 0).sum(1) == 32).all()
    assert len({tuple(row.tolist()) for row in noise.table}) == 6, "every query is changed in its own way"
    sized = Params(support_sets=2, classes=3, instance=True, corruption="noise", size=5)
    assert build([balanced("mine", 60, 12, 3)], 0, sized).domains.table.shape == (6, 25)
    stronger = Params(support_sets=4, classes=3, instance=True, corruption="noise", level=0.75)
    more = build([TABLE], 0, stronger).domains.table[:6]
    assert torch.equal(more[noise.table >= 0], noise.table[noise.table >= 0]), "more corruption adds to the same pixels"
    none = Params(support_sets=2, classes=3, instance=True, corruption="noise", level=0.0)
    assert (build([TABLE], 0, none).domains.table == -1).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (Params(support_sets=5, class_change=2), "no multiple of class_change=2"),
        (Params(support_sets=11, classes=1), "11 classes, but the data have 10"),
        (Params(support_sets=2, shots=41), "class_change \\* shots = 41 are shown"),
        (Params(support_sets=2, targets=9), "fewer than 9 test rows; lower targets"),
        (Params(instance=True, support_sets=100, per_category=40), "categories of that size"),
        (Params(support_sets=4, class_change=2, setting="task"), "setting=task needs class_change=1"),
        (Params(support_sets=2, corruption="noise"), "is for the instance test; add instance=true"),
    ],
)
def test_bad_parameters(params: Params, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build([TABLE], 0, params)


def test_other_bad_input() -> None:
    oblong = Params(support_sets=1, instance=True, corruption="occlusion", pixels=50)
    with pytest.raises(InputError, match="square images"):
        build([real_layout("digits")], 0, oblong)
    with pytest.raises(InputError, match="one data set, not 2"):
        build([TABLE, TABLE], 0, Params())
