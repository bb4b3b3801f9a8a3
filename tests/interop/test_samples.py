"""The import from samples, with no other framework at hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_store, split_scenario

from clbench.data import ImageStore, load
from clbench.errors import InputError
from clbench.interop.samples import Samples, scenario_from_samples
from clbench.scenarios import build, find
from clbench.scenarios.check import check_scenario
from clbench.scenarios.model import Scenario


def as_samples(scenario: Scenario, store: ImageStore, marked: bool = True) -> dict[str, list[Samples]]:
    """Every task, validation part and group as samples."""

    def one(rows: torch.Tensor, targets: torch.Tensor, task: int | None, name: str) -> Samples:
        label = task if scenario.setting == "task" and task is not None else 0
        return Samples(store.images[rows].numpy(), targets.numpy(), label, rows.numpy() if marked else None, name)

    out = {
        "train": [one(t.rows, t.targets, i, t.name) for i, t in enumerate(scenario.tasks)],
        "test": [one(g.rows, g.targets, g.task, g.name) for g in scenario.groups],
    }
    if any(t.val is not None for t in scenario.tasks):
        out["val"] = [one(*t.val, i, t.name) for i, t in enumerate(scenario.tasks) if t.val is not None]
    return out


def assert_same_tables(a: Scenario, b: Scenario) -> None:
    for x, y in zip(a.tasks, b.tasks, strict=True):
        for name in ("rows", "targets", "classes"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name
        assert (x.val is None) == (y.val is None)
        if x.val is not None and y.val is not None:
            assert torch.equal(x.val[0], y.val[0])
            assert torch.equal(x.val[1], y.val[1])
    for g, h in zip(a.groups, b.groups, strict=True):
        assert (g.name, g.task) == (h.name, h.task)
        for name in ("rows", "targets", "classes"):
            assert torch.equal(getattr(g, name), getattr(h, name)), name
    assert torch.equal(a.first_seen, b.first_seen)
    assert a.setting == b.setting


@pytest.mark.parametrize(
    ("given", "online"),
    [({}, False), ({"setting": "task", "val_share": "0.2"}, False), ({"online": "true", "order": "seeded"}, True)],
)
@pytest.mark.parametrize("marked", [True, False])
def test_digits_come_back_with_the_same_rows(given: dict[str, str], online: bool, marked: bool) -> None:
    """Canonical order: row numbers are the same even if nothing but images and targets is known."""
    store = load("digits")
    scenario = build(find("split-digits").with_params(given), [store.table()], 3)
    names = scenario.classes.names
    back_store, back = scenario_from_samples(
        **as_samples(scenario, store, marked), name="digits", online=online, class_names=names
    )
    assert_same_tables(scenario, back)
    assert torch.equal(back_store.images, store.images)
    if "order" not in given:  # class ids, and so the labels of the store, are the data set's
        assert back_store.fingerprint == store.fingerprint
    assert [check for check in check_scenario(back, [back_store.table()]) if not check.ok] == []


def test_rehearsed_rows_stay_one_row() -> None:
    store = load("digits")
    scenario = build(find("power-law-digits").with_params({"kind": "classes", "tasks": "5"}), [store.table()], 0)
    back_store, back = scenario_from_samples(**as_samples(scenario, store), name="digits")
    assert_same_tables(scenario, back)
    assert back_store.fingerprint == store.fingerprint
    _, apart = scenario_from_samples(**as_samples(scenario, store, marked=False), name="digits")
    rows = torch.cat([task.rows for task in apart.tasks])
    assert len(rows.unique()) == len(rows)  # unmarked, nobody can tell a repeat from a copy


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_stream_becomes_a_conformant_scenario(data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(1, 4))
    raw_ids = sorted(data.draw(st.sets(st.integers(0, 9), min_size=num_classes, max_size=num_classes)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))

    def part(labels: list[int], first: int, marked: bool) -> Samples:
        targets = np.array([raw_ids[label] for label in labels], dtype=np.int64)
        images = np.stack([np.full((1, 2, 2), label, np.uint8) for label in labels] or [np.zeros((1, 2, 2), np.uint8)])
        images = images[: len(labels)] + rng.integers(0, 2, (len(labels), 1, 2, 2), dtype=np.uint8) * 10
        return Samples(images, targets, 0, first + np.arange(len(labels)) if marked else None)

    marked = data.draw(st.booleans())
    label = st.integers(0, num_classes - 1)
    lists = data.draw(st.lists(st.lists(label, max_size=6), max_size=3))
    train = [
        part(list(range(num_classes)), 0, marked),
        *(part(labels, 100 * i, marked) for i, labels in enumerate(lists)),
    ]
    test = [part(list(range(num_classes)), 10_000, marked)]
    online = data.draw(st.booleans())
    store, scenario = scenario_from_samples(train, test, name="any", online=online, setting="class")
    assert [c for c in check_scenario(scenario, [store.table()]) if not c.ok] == []
    assert scenario.classes.names == tuple(f"class {i}" for i in raw_ids)
    for task, given_part in zip(scenario.tasks, train, strict=True):
        assert np.array_equal(store.images[task.rows].numpy(), given_part.images)
        assert np.array_equal(np.array(raw_ids)[task.targets.numpy()], given_part.targets)


def test_settings_are_told_apart() -> None:
    store = make_store()
    scenario = split_scenario(store)
    samples = as_samples(scenario, store)
    assert scenario_from_samples(**samples, name="a")[1].setting == "class"
    everything = samples["train"][0]
    same = [everything, everything._replace(rows=everything.rows + 100)]
    domain = scenario_from_samples(same, [samples["test"][0]], name="a")[1]
    assert domain.setting == "domain"
    assert domain.groups[0].task is None  # trained in both
    labelled = {key: [p._replace(task_label=7 - i) for i, p in enumerate(parts)] for key, parts in samples.items()}
    task = scenario_from_samples(**labelled, name="a")[1]
    assert task.setting == "task"
    assert [group.classes.tolist() for group in task.groups] == [[0, 1], [2, 3], [4, 5]]
    assert [group.task for group in task.groups] == [0, 1, 2]


def test_blurry_classes_unlock_with_their_first_sample() -> None:
    """As Si-Blurry has it; a class of one task unlocks as the task starts."""
    images = np.zeros((3, 1, 2, 2), np.uint8)
    train = [Samples(images, np.array(targets), 0, None) for targets in ([0, 2, 0], [1, 3, 2])]
    test = [Samples(images, np.array(targets), 0, None) for targets in ([0, 0, 1], [2, 2, 2], [3, 3, 3])]
    online = scenario_from_samples(train, test, name="a", online=True)[1]
    assert online.first_seen.tolist() == [0, 3, 1, 3]
    assert [group.task for group in online.groups] == [None, None, 1]
    assert scenario_from_samples(train, test, name="a")[1].first_seen.tolist() == [0, 3, 0, 3]


def test_recall_is_seen() -> None:
    store = make_store()
    train = as_samples(split_scenario(store), store)["train"]
    back_store, back = scenario_from_samples(train, train, name="a")
    assert back.recall
    assert not back_store.split.any()
    assert [c for c in check_scenario(back, [back_store.table()]) if not c.ok] == []


def changed(samples: dict[str, list[Samples]], part: str, **values: Any) -> dict[str, list[Samples]]:
    first = samples[part][0]
    return {**samples, part: [first._replace(**values), *samples[part][1:]]}


def test_bad_input_is_told() -> None:
    store = make_store()
    scenario = split_scenario(store)
    samples = as_samples(scenario, store)
    first = samples["train"][0]
    empty = first._replace(images=first.images[:0], targets=first.targets[:0], rows=None)
    cases: list[tuple[dict[str, Any], str]] = [
        ({**samples, "train": []}, "nothing to train on"),
        ({**samples, "train": [empty]}, "nothing to train on"),
        ({**samples, "test": []}, "nothing to test on"),
        ({**samples, "test": [empty]}, "test experience 0 has no samples"),
        ({**samples, "val": [first]}, "1 validation experiences for 3 training ones"),
        (changed(samples, "test", targets=np.full(12, 9)), "asks for class 9, which is never trained"),
        (changed(samples, "train", targets=first.targets - 1), "has a target below 0"),
        (changed(samples, "test", images=np.zeros((12, 3, 6, 6), np.uint8)), "test experience 0 are 3x6x6, .* 1x6x6"),
        ({**samples, "class_names": ["a", "b"]}, "2 class names, but a target is 5"),
        ({**changed(samples, "test", task_label=4), "setting": "task"}, "test experience 0 has task label 4"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            scenario_from_samples(**arguments, name="a")
