"""Multi-domain streams: sizes, orders, prompts and class texts of the mtil card, and what cannot be met."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_tables import balanced, real_layout, tables

from clbench.data.catalogue import dataset
from clbench.data.classes import ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios import build as build_preset
from clbench.scenarios import find
from clbench.scenarios.check import check_scenario
from clbench.scenarios.mtil import Params, build
from clbench.scenarios.prompts import class_texts, templates

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "mtil.json").read_text())
NAMES = VECTORS["names"]


def named(table: LabelTable, name: str) -> LabelTable:
    return table._replace(dataset=name)


def of_catalogue(name: str) -> LabelTable:
    """A label table with the sizes of a known data set, and the names of its classes where the catalogue has them."""
    table, entry = real_layout(name), dataset(name)
    names = entry.class_names or tuple(f"class_{i}" for i in range(entry.num_classes))
    levels = torch.zeros(len(names), dtype=torch.int64)
    return table._replace(classes=ClassTable(names, levels, torch.full((len(names),), -1)))


MTIL = [of_catalogue(name) for name in NAMES]


def test_the_eleven_data_sets() -> None:
    preset = find("mtil")
    assert list(preset.datasets) == NAMES
    assert preset.size == 224
    scenario = build_preset(preset, MTIL, 0)
    assert [task.name for task in scenario.tasks] == [group.name for group in scenario.groups] == NAMES
    assert [len(task.classes) for task in scenario.tasks] == VECTORS["classes"]
    assert [len(task.rows) for task in scenario.tasks] == VECTORS["n_train"]
    assert [len(group.rows) for group in scenario.groups] == VECTORS["n_test"]
    assert scenario.num_classes == VECTORS["total_classes"] == 1_201
    assert sum(len(group.rows) for group in scenario.groups) == 97_209
    assert scenario.setting == "task"
    assert not scenario.online
    for task, group in zip(scenario.tasks, scenario.groups, strict=True):
        assert group.classes.tolist() == task.classes.tolist(), "an image is answered with classes of its data set"
    assert [check for check in check_scenario(scenario, MTIL) if not check.ok] == []


def test_order_two() -> None:
    first = build(MTIL, 0, Params())
    second = build(MTIL, 0, Params(order="II"))
    assert [task.name for task in second.tasks] == VECTORS["order_II"]
    by_name = {task.name: task for task in first.tasks}
    for task in second.tasks:
        assert task.rows.tolist() == by_name[task.name].rows.tolist(), "rows count through the data sets as listed"
    assert [check for check in check_scenario(second, MTIL) if not check.ok] == []
    assert build(MTIL, 0, Params(order=tuple(VECTORS["order_II"]))).fingerprint == second.fingerprint


def test_templates_and_class_texts_are_those_of_the_official_code() -> None:
    scenario = build(MTIL, 0, Params())
    for index, name in enumerate(NAMES):
        assert list(scenario.prompts[index]) == list(templates(name)) == VECTORS["templates"][name]
        texts = [scenario.classes.names[i] for i in scenario.tasks[index].classes.tolist()]
        if name in VECTORS["class_texts"]:
            assert texts == VECTORS["class_texts"][name]
    assert sum(len(scenario.prompts[i]) * VECTORS["classes"][i] for i in range(11)) == 8_648
    assert class_texts("mnist", dataset("mnist").class_names, "")[0] == "0 - zero"
    assert class_texts("cifar100", ("aquarium_fish",), "") == ("aquarium fish",)
    assert class_texts("sun397", ("apartment_building/outdoor",), "") == ("apartment building/outdoor",)
    prompts = [template.format(text) for template in templates("mnist") for text in ("0 - zero",)]
    assert prompts == ['a photo of the number: "0 - zero".']


def test_the_small_pack_of_caltech101_has_the_texts_of_the_full_set() -> None:
    full = dict(zip(dataset("caltech101-full").class_names, VECTORS["class_texts"]["caltech101-full"], strict=True))
    pack = [name for name in full if name not in ("Faces", "Faces_easy")]
    assert list(class_texts("caltech101", pack, "")) == [full[name] for name in pack]


def test_small_domains() -> None:
    preset = find("mtil-small")
    own = [real_layout(name) for name in preset.datasets]
    scenario = build_preset(preset, own, 0)
    assert len(scenario.tasks) == 10
    assert preset.size == 64
    assert all(len(templates(name)) >= 1 for name in preset.datasets)
    assert max(len(task.rows) for task in scenario.tasks) <= 10_000, "CIFAR-100 is capped"
    assert sum(len(group.rows) for group in scenario.groups) < 7_000, "all of them are tested after every task"


@given(
    st.lists(tables(), min_size=2, max_size=4),
    st.sampled_from(["I", "seeded"]),
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.integers(1, 3)),
    st.integers(0, 5),
)
def test_any_data_sets(
    found: list[LabelTable], order: str, per_class: int | None, test_per_class: int | None, seed: int
) -> None:
    given_ = [named(table, f"set {i}") for i, table in enumerate(found)]
    params = Params(order=order, per_class=per_class, test_per_class=test_per_class)
    scenario = build(given_, seed, params)
    assert [check for check in check_scenario(scenario, given_) if not check.ok] == []
    offsets = [sum(len(table.labels) for table in given_[:i]) for i in range(len(given_))]
    position = 0
    for task, group in zip(scenario.tasks, scenario.groups, strict=True):
        number = int(task.name.split()[1])
        table, start = given_[number], offsets[number]
        assert task.classes.tolist() == list(range(int(task.classes[0]), int(task.classes[0]) + len(task.classes)))
        for rows, targets in ((task.rows, task.targets), (group.rows, group.targets)):
            assert torch.equal(table.labels[rows - start] + int(task.classes[0]), targets)
        assert scenario.first_seen[task.classes].tolist() == [position] * len(task.classes)
        if per_class is not None:
            assert int(torch.bincount(task.targets).max()) <= per_class
        if test_per_class is not None:
            assert int(torch.bincount(group.targets).max()) <= test_per_class
        position += len(task.rows)
    assert sorted(group.task for group in scenario.groups) == list(range(len(given_)))
    assert sorted(torch.cat([task.classes for task in scenario.tasks]).tolist()) == list(range(scenario.num_classes))


def test_validation_rows_and_caps() -> None:
    own = [named(balanced("x", 60, 30, 6), name) for name in ("a", "b")]
    scenario = build(own, 0, Params(val_share=0.2, per_class=5, test_per_class=2))
    assert [len(task.rows) for task in scenario.tasks] == [24, 24]
    assert [len(task.val[0]) for task in scenario.tasks] == [6, 6]
    assert [len(group.rows) for group in scenario.groups] == [12, 12]
    other = build(own, 0, Params(val_share=0.2, per_class=5, test_per_class=2, subset_seed=1))
    assert scenario.fingerprint != other.fingerprint
    assert build(own, 9, Params(val_share=0.2, per_class=5, test_per_class=2)).fingerprint == scenario.fingerprint


def test_seeds_and_lists_order_the_data_sets() -> None:
    own = [named(balanced("x", 12, 6, 3), name) for name in "abcd"]
    orders = {tuple(task.name for task in build(own, seed, Params(order="seeded")).tasks) for seed in range(9)}
    assert len(orders) > 4
    listed = build(own, 0, Params(order=("c", "a")))
    assert [task.name for task in listed.tasks] == ["c", "a"]
    assert listed.tasks[0].rows.min() == 36, "rows still count through all data sets"
    preset = find("mtil-small").with_params({"dataset": "a,b,c", "order": "c,a", "size": "32"})
    assert preset.datasets == ("a", "b", "c")
    assert preset.size == 32
    assert preset.params.order == ("c", "a")


def test_what_cannot_be_met() -> None:
    a, b = (named(balanced("x", 12, 6, 3), name) for name in "ab")
    with pytest.raises(InputError, match="at least two data sets"):
        build([a], 0, Params())
    with pytest.raises(InputError, match="two data sets are called a"):
        build([a, a], 0, Params())
    with pytest.raises(InputError, match="order=II is one of the 11 data sets of MTIL, not of 2"):
        build([a, b], 0, Params(order="II"))
    with pytest.raises(InputError, match="unknown data set of mtil@1 'c'"):
        build([a, b], 0, Params(order=("a", "c")))
    for wrong in ((), ("a", "a")):
        with pytest.raises(InputError, match="order must name each data set once at most"):
            build([a, b], 0, Params(order=wrong))
    with pytest.raises(InputError, match="caltech101-full has 3 classes, but its prompts name 101"):
        build([a, named(b, "caltech101-full")], 0, Params())
    with pytest.raises(InputError, match=r"mtil@1 on b: val_share=0\.9 leaves no training rows"):
        build([named(balanced("x", 60, 6, 3), "a"), b], 0, Params(val_share=0.9))
    with pytest.raises(InputError, match="size must be at least 1"):
        find("mtil").with_params({"size": 0})
