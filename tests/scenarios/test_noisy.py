"""SHARP's blurry scenario: its episodes against the card, its tables on random data, and what cannot be met."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from label_tables import balanced, real_layout, tables

from clbench.data.classes import TRAIN, LabelTable
from clbench.errors import InputError
from clbench.scenarios import build as build_preset
from clbench.scenarios import find
from clbench.scenarios.check import check_scenario
from clbench.scenarios.noisy import Params, build, episodes

seeds = st.integers(0, 2**32)


@given(st.integers(1, 30), st.data())
@settings(deadline=None)
def test_episodes_are_the_cards(num_classes: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, num_classes))
    novelty = data.draw(st.floats(0.05, 1.0))
    found = episodes(num_classes, size, novelty, data.draw(seeds))
    seen: set[int] = set()
    for index, classes in enumerate(found):
        assert len(seen) < num_classes, "it ends as the classes run out"
        assert len(set(classes)) == len(classes) == size
        new = set(classes) - seen
        assert index > 0 or len(new) == size, "the first episode has new classes alone"
        seen |= new
    assert seen == set(range(num_classes))


def test_a_slot_is_new_with_the_probability_of_novelty() -> None:
    new = total = 0
    for seed in range(60):
        found = episodes(100, 3, 0.3, seed)
        seen = set(found[0])
        for classes in found[1:-1]:  # in the last one the classes run out
            new += len(set(classes) - seen)
            total += len(classes)
            seen |= set(classes)
    assert total > 15_000
    assert new / total == pytest.approx(0.3, abs=0.015)  # four standard deviations


def test_classes_that_come_back_are_drawn_evenly() -> None:
    """Two new classes A, B, then pairs: without a new class, A and B in either order."""
    first = back = 0
    for seed in range(800):
        found = episodes(3, 2, 0.3, seed)
        for before, after in pairwise(found):
            if set(before) == set(after) == set(found[0]):
                back += 1
                first += after[0] == found[0][0]
    assert back > 500
    assert first / back == pytest.approx(0.5, abs=0.09)
    starts = torch.bincount(torch.tensor([episodes(4, 1, 1.0, seed)[0][0] for seed in range(800)]), minlength=4)
    assert (starts - 200).abs().max() < 60


def test_all_new_gives_disjoint_episodes() -> None:
    found = episodes(10, 3, 1.0, 5)
    assert len(found) == 4
    assert len({c for classes in found[:3] for c in classes}) == 9
    assert len(set(found[3])) == 3


@given(tables(), st.data())
@settings(deadline=None)
def test_tables_on_random_data(table: LabelTable, data: st.DataObject) -> None:
    num_classes = len(set(table.labels.tolist()))
    params = Params(
        classes_per_task=data.draw(st.integers(1, num_classes)), novelty=data.draw(st.floats(0.1, 1.0)),
        online=data.draw(st.booleans()),
    )  # fmt: skip
    seed = data.draw(st.integers(0, 50))
    scenario = build([table], seed, params)
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []
    plan = episodes(num_classes, params.classes_per_task, params.novelty, seed)
    assert len(plan) == len(scenario.tasks)
    for classes, task in zip(plan, scenario.tasks, strict=True):
        rows = torch.isin(table.labels, torch.tensor(classes)) & (table.split == TRAIN)
        assert sorted(task.rows.tolist()) == rows.nonzero()[:, 0].tolist(), "all training rows of the classes, once"
        assert torch.equal(task.targets, table.labels[task.rows])
    assert scenario.online == params.online
    times = [sum(label in classes for classes in plan) for label in range(num_classes)]
    for label, group in enumerate(scenario.groups):
        assert (group.task is None) == (times[label] > 1)


@given(tables(), st.data())
@settings(deadline=None)
def test_validation_rows_come_once_with_their_class(table: LabelTable, data: st.DataObject) -> None:
    params = Params(classes_per_task=1, novelty=0.5, val_share=0.3)
    assume(int(torch.bincount(table.labels[table.split == TRAIN]).min()) > 1)  # a class needs one of each
    scenario = build([table], data.draw(st.integers(0, 50)), params)
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []
    kept = torch.cat([task.val[0] for task in scenario.tasks if task.val is not None])
    assert len(kept.unique()) == len(kept)
    for task in scenario.tasks:
        assert task.val is not None
        assert torch.isin(task.val[1], task.classes).all()


def test_a_class_that_comes_back_comes_in_another_order() -> None:
    scenario = build([balanced("toy", 300, 30, 3)], 0, Params(classes_per_task=1, novelty=0.1))
    first, second = [task.rows for task in scenario.tasks if task.targets[0] == scenario.tasks[0].targets[0]][:2]
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_preset_has_the_cards_numbers() -> None:
    preset = find("noisy-mnist")
    assert (preset.params.classes_per_task, preset.params.novelty) == (3, 0.3)
    assert preset.defaults.train_view == preset.defaults.test_view == "", "pixels in [0, 1]"
    scenario = build_preset(preset, [real_layout("mnist")], 0)
    assert not scenario.online
    assert len(scenario.tasks[0].classes) == 3
    assert max(len(task.classes) for task in scenario.tasks[1:]) <= 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"classes_per_task": 11}, "classes_per_task=11 is more than the 10 classes"),
        ({"novelty": 0}, "novelty must be at least 0.001"),
        ({"novelty": 1.5}, "novelty must be at least 0.001 and at most 1, not 1.5"),
        ({"classes_per_task": 0}, "classes_per_task must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_met_is_one_sentence(given: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        build_preset(find("noisy-digits").with_params(given), [real_layout("digits")], 0)
    assert "\n" not in str(caught.value)
