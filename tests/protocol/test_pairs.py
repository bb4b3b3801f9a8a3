"""D_HT and D_E: halves, scenarios scored on validation rows, and what two scenarios share."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench import data
from clbench.errors import InputError
from clbench.protocol.pairs import compare, open_phase
from clbench.scenarios import build, find, list_scenarios
from clbench.scenarios.class_half import half_of
from clbench.scenarios.derive import first_tasks, score_on_validation
from clbench.scenarios.model import Scenario

HALVES = [row["name"] for row in list_scenarios() if row["builder"] == "class_half"]


def digits(**params: object) -> Scenario:
    preset = find("split-digits-a").with_params(params)
    return build(preset, [data.load("digits").table()], 3)


# -- halves ----------------------------------------------------------------------------------------------------------
@given(st.integers(2, 300), st.none() | st.integers(0, 1000))
def test_halves_are_disjoint_and_of_one_size(num: int, seed: int | None) -> None:
    first, second = half_of(num, "first", seed).tolist(), half_of(num, "second", seed).tolist()
    assert not set(first) & set(second)
    assert len(first) == len(second) == num // 2
    assert first == sorted(first)
    assert second == sorted(second)


def test_every_preset_has_its_other_half_with_the_same_configuration() -> None:
    assert len(HALVES) == len(set(HALVES))
    for name in HALVES:
        other = find(name[:-1] + {"a": "b", "b": "a"}[name[-1]])
        mine = find(name)
        assert replace(mine.params, half="first") == replace(other.params, half="first"), name
        assert mine.params.half != other.params.half
        assert mine.defaults == other.defaults
        assert mine.datasets == other.datasets


def test_the_official_halves_of_cifar100() -> None:
    """Card, section 3: classes 0-49 and 50-99, T = 10 tasks of 5, order from the seed inside the half."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scenarios"))
    from label_tables import real_layout

    table = real_layout("cifar100")
    for name, low in (("split-cifar100-a", 0), ("split-cifar100-b", 50)):
        scenario = build(find(name), [table], 1993)
        assert [len(task.classes) for task in scenario.tasks] == [5] * 10
        order = np.random.RandomState(1993).permutation(50) + low
        assert scenario.classes.names == tuple(table.classes.names[i] for i in order)
        labels = {int(label) for task in scenario.tasks for label in table.labels[task.rows].unique()}
        assert labels == set(range(low, low + 50))


def test_random_halves_differ_by_seed_and_lists_stay_inside() -> None:
    names = [set(digits(half_seed=seed).classes.names) for seed in (0, 1)]
    assert names[0] != names[1]
    assert digits(order="3,0,4").num_classes == 3
    with pytest.raises(InputError, match="class 7"):
        digits(order="3,7")


# -- scoring on validation rows --------------------------------------------------------------------------------------
def test_no_test_row_is_left_and_training_rows_stay_the_same() -> None:
    plain, scored = digits(val_share=0.2), digits(val_share=0.2, score="validation")
    table = data.load("digits").table()
    for group, task, before in zip(scored.groups, scored.tasks, plain.tasks, strict=True):
        assert before.val is not None
        assert torch.equal(group.rows, before.val[0])
        assert torch.equal(group.targets, before.val[1])
        assert torch.equal(task.rows, before.rows)
        assert task.val is None
        assert not table.split[group.rows].any()  # all of them are training rows of the data set
        assert not set(group.rows.tolist()) & set(task.rows.tolist())
    assert scored.fingerprint != plain.fingerprint
    assert scored.params["score"] == "validation"
    assert digits(val_share=0.2, score="test").fingerprint == plain.fingerprint


def test_without_validation_rows_it_is_refused() -> None:
    with pytest.raises(InputError, match="val_share"):
        digits(score="validation")
    with pytest.raises(InputError, match="score"):
        digits(score="valid")


def test_groups_of_no_single_task_get_the_rows_of_all_tasks() -> None:
    preset = find("si-blurry-digits").with_params({"val_share": 0.2})
    plain = build(preset, [data.load("digits").table()], 0)
    scored = score_on_validation(plain)
    kept = torch.cat([task.val[0] for task in plain.tasks if task.val is not None])
    asked = torch.cat([group.rows for group in scored.groups])
    assert set(asked.tolist()) <= set(kept.tolist())
    for group in scored.groups:
        labels = data.load("digits").labels[group.rows]
        assert len(labels.unique()) == 1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3))
def test_first_tasks_are_the_same_as_in_the_whole(num: int) -> None:
    whole, part = digits(), digits(first_tasks=num)
    assert len(part.tasks) == len(part.groups) == num
    for before, after in zip(whole.tasks, part.tasks, strict=False):
        assert torch.equal(before.rows, after.rows)
    assert part.classes.names == whole.classes.names
    assert torch.equal(part.first_seen, whole.first_seen)


def test_too_many_first_tasks_are_refused() -> None:
    with pytest.raises(InputError, match="3 tasks"):
        first_tasks(digits(), 4)


# -- what two scenarios share ----------------------------------------------------------------------------------------
def shared(tune: str, evaluate: str, tune_params: dict[str, object], params: dict[str, object]) -> tuple[int, int]:
    found = compare(open_phase(tune, tune_params, (0, 1), ()), open_phase(evaluate, params, (0, 1, 2), ()))
    assert found.disjoint == (not found.classes and not found.images)
    assert found.images is not None
    return len(found.classes), found.images


def test_halves_share_nothing_and_everything_else_is_found() -> None:
    assert shared("split-digits-a", "split-digits-b", {}, {}) == (0, 0)
    assert shared("split-digits-a", "split-digits-b", {"half_seed": 1}, {"half_seed": 1}) == (0, 0)
    assert shared("split-digits-a", "split-digits-b", {"half_seed": 1}, {"half_seed": 2})[0] > 0
    assert shared("split-digits-a", "split-digits", {}, {})[0] == 5
    classes, images = shared("split-digits-a", "split-digits-a", {}, {})
    assert classes == 5
    assert images > 800


def test_the_same_pictures_under_other_names_are_found(tmp_path: Path) -> None:
    """A second data set with the first one's pictures and classes called otherwise."""
    from PIL import Image

    store = data.load("digits")
    for row in range(len(store)):
        if int(store.labels[row]) < 5:
            part = "test" if int(store.split[row]) else "train"
            folder = tmp_path / "letters" / part / "abcde"[int(store.labels[row])]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(store.images[row, 0].numpy()).save(folder / f"{row}.png")
    tune = open_phase("split-digits-a", {}, (0,), ())
    other = open_phase("split-digits", {"dataset": str(tmp_path / "letters"), "tasks": 2}, (0,), ())
    if other.stores[0].image_shape[0] != 1:
        pytest.fail("grey images were read as colour images: the comparison below would say nothing")
    found = compare(tune, other)
    assert found.classes == ()
    assert found.images is not None
    assert found.images > 800
    with pytest.raises(InputError, match="images under other names"):
        found.require_disjoint(tune.id, other.id)


def test_a_different_configuration_is_named() -> None:
    found = compare(
        open_phase("split-digits-a", {}, (0,), ()), open_phase("split-digits-b", {"increment": 1}, (0,), ())
    )
    assert found.differences == ("tasks: 3 and 5", "classes per task: [2, 2, 1] and [1, 1, 1, 1, 1]")


@pytest.mark.slow
@pytest.mark.skipif("CLBENCH_DATA" not in os.environ, reason="needs CIFAR-100 in CLBENCH_DATA")
def test_the_official_halves_share_one_picture_of_cifar100() -> None:
    """Known and written down, not refused: one of 60,000 pictures stands in both halves."""
    found = compare(open_phase("split-cifar100-a", {}, (0,), ()), open_phase("split-cifar100-b", {}, (0,), ()))
    assert found.classes == ()
    assert found.images == 1
    assert found.disjoint
