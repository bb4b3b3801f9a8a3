"""Hierarchical label expansion: the card's counts and invariants, label trees, and what is no tree."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_tables import balanced, real_layout, tables

from clbench.data.classes import TRAIN, ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios import build as build_preset
from clbench.scenarios import find
from clbench.scenarios.check import check_scenario
from clbench.scenarios.hle import Params, build
from clbench.scenarios.model import Scenario
from clbench.scenarios.trees import FOLDER, Edge, find_tree, from_edges, own_tree, tree_names

CIFAR = real_layout("cifar100")


def preset(name: str, seed: int = 0, **changes) -> Scenario:
    found = find(name).with_params(changes)
    return build_preset(found, [real_layout(d) for d in found.datasets], seed)


# -- counts of the card ------------------------------------------------------------------------------------------
def test_dual_label_counts() -> None:
    scenario = preset("hle-cifar100")
    assert [len(task.rows) for task in scenario.tasks] == [50_000] + [10_000] * 5
    assert [len(task.classes) for task in scenario.tasks] == [20] + [20] * 5
    assert Counter(scenario.tasks[0].rows.tolist()) == Counter(torch.cat([t.rows for t in scenario.tasks[1:]]).tolist())


def test_single_label_counts() -> None:
    scenario = preset("hle-cifar100-single")
    assert [len(task.rows) for task in scenario.tasks] == [8_300] + [8_340] * 5
    assert set(Counter(scenario.tasks[0].targets.tolist()).values()) == {415}
    for task in scenario.tasks[1:]:
        assert set(Counter(task.targets.tolist()).values()) == {417}
    rows = torch.cat([task.rows for task in scenario.tasks])
    assert sorted(rows.tolist()) == list(range(50_000))


def test_multi_depth_counts(tmp_path: Path) -> None:
    """Five levels in the card's sizes, on a tree of our own: every level gets a fifth of every class."""
    edges = [(f"#{i}", f"d{i // 5}") for i in range(100)] + [(f"d{i}", f"c{i % 8}") for i in range(20)]
    edges += [(f"c{i}", f"b{i % 4}") for i in range(8)] + [(f"b{i}", f"a{min(i, 1)}") for i in range(4)]
    file = tmp_path / "five.csv"
    file.write_text("\n".join(["child,parent", *(f"{child},{parent}" for child, parent in edges)]))
    scenario = build([CIFAR], 0, Params(setup="multi", tree=str(file)))
    assert [len(task.rows) for task in scenario.tasks] == [10_000] * 5
    assert [len(task.classes) for task in scenario.tasks] == [2, 4, 8, 20, 100]
    counts = torch.stack([torch.bincount(CIFAR.labels[task.rows], minlength=100) for task in scenario.tasks])
    assert (counts == 100).all(), "every level shows a fifth of every finest class"
    rows = torch.cat([task.rows for task in scenario.tasks])
    assert len(rows.unique()) == len(rows) == 50_000
    assert [check for check in check_scenario(scenario, [CIFAR]) if not check.ok] == []


def test_multi_depth_on_the_data_s_own_levels() -> None:
    scenario = preset("hle-cifar100-multi")
    assert [len(task.rows) for task in scenario.tasks] == [25_000, 25_000]
    assert [len(task.classes) for task in scenario.tasks] == [20, 100]


def test_cars_have_a_task_per_body_type() -> None:
    scenario = preset("hle-cars", 1)
    assert len(scenario.tasks) == 10
    assert len(scenario.tasks[0].classes) == 9
    assert sorted(len(task.classes) for task in scenario.tasks[1:]) == [6, 7, 7, 13, 18, 26, 34, 35, 50]
    assert len(scenario.tasks[0].rows) == sum(len(task.rows) for task in scenario.tasks[1:]) == 8_144
    parent = scenario.classes.parent
    owners = [set(parent[task.classes].tolist()) for task in scenario.tasks[1:]]
    assert [len(owner) for owner in owners] == [1] * 9
    assert owners != [set(parent[task.classes].tolist()) for task in preset("hle-cars", 2).tasks[1:]]


def test_birds_by_order_or_by_family() -> None:
    orders, families = preset("hle-cub"), preset("hle-cub", coarse_level=1)
    assert [len(task.classes) for task in orders.tasks] == [13] + [40] * 5
    assert [len(task.classes) for task in families.tasks] == [38] + [40] * 5
    assert [len(task.classes) for task in preset("hle-cub", setup="multi").tasks] == [13, 38, 200]


# -- invariants --------------------------------------------------------------------------------------------------
@given(tables(), st.data())
def test_streams_on_random_data(table: LabelTable, data: st.DataObject) -> None:
    if table.classes.num_levels < 2:
        with pytest.raises(InputError, match="one level only"):
            build([table], 0, Params())
        return
    setup = data.draw(st.sampled_from(["dual", "single", "multi"]))
    num_fine = int((table.classes.level == 1).sum())
    params = Params(setup=setup, tasks=data.draw(st.integers(2, num_fine + 1)), by_parent=data.draw(st.booleans()))
    seed = data.draw(st.integers(0, 20))
    rows_per_class = torch.bincount(table.labels[table.split == TRAIN]).min()
    by_parent = params.by_parent and setup != "multi"
    num_tasks = 1 + len(set(table.classes.parent[:num_fine].tolist())) if by_parent else params.tasks
    if setup != "dual" and rows_per_class < (2 if setup == "multi" else num_tasks):
        with pytest.raises(InputError, match="training rows of every class"):
            build([table], seed, params)
        return
    scenario = build([table], seed, params)
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []
    level, parent = scenario.classes.level, scenario.classes.parent
    for task in scenario.tasks:
        assert len(set(level[task.targets].tolist())) <= 1, "a task shows labels of one level"
        fine = table.labels[task.rows]
        expected = torch.where(level[task.targets] == 1, fine, parent[fine])
        names = table.classes.names
        assert all(scenario.classes.names[p] == names[table.classes.parent[f]] for f, p in enumerate(parent[:num_fine]))
        assert torch.equal(task.targets, expected), "a coarse label is the parent of the fine one"
    train = (table.split == TRAIN).nonzero()[:, 0].tolist()
    rows = torch.cat([task.rows for task in scenario.tasks]).tolist()
    assert sorted(rows) == (sorted(train * 2) if setup == "dual" else train)
    stream = torch.cat([task.targets for task in scenario.tasks]).tolist()
    assert scenario.first_seen.tolist() == [stream.index(c) for c in range(scenario.num_classes)]
    for group in scenario.groups:
        assert set(level[group.classes].tolist()) == {group.level}
        assert len(set(group.targets.tolist())) == 1


def test_seeds_deal_other_classes_to_tasks() -> None:
    one, other = (preset("hle-cifar100", seed).tasks[1].classes.tolist() for seed in (0, 1))
    assert one != other


def test_validation_rows_carry_the_label_of_their_task() -> None:
    scenario = build([real_layout("cifar100")], 0, Params(val_share=0.1, per_class=20))
    assert [len(task.rows) for task in scenario.tasks] == [1_800] + [360] * 5
    assert [len(task.val[0]) for task in scenario.tasks] == [200] + [40] * 5


# -- trees -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("cub200", [13, 38, 200]), ("stanford-cars", [9, 196]), ("fgvc-aircraft", [30, 70, 100]), ("digits", [2, 4, 10])],
)
def test_trees_of_the_package(name: str, sizes: list[int]) -> None:
    table = balanced(name, sizes[-1] * 3, sizes[-1], sizes[-1])
    tree = find_tree(name, table, "here")
    assert [len(names) for names in tree.names] == sizes
    for level in range(tree.num_levels - 1):  # a class has one parent
        pairs = set(zip(tree.at[level + 1].tolist(), tree.at[level].tolist(), strict=True))
        assert len(pairs) == sizes[level + 1]
    assert set(tree_names()) == {"cub200", "stanford-cars", "fgvc-aircraft", "digits"}


def named(table: LabelTable, names: Sequence[str]) -> LabelTable:
    return table._replace(classes=ClassTable(tuple(names), table.classes.level, table.classes.parent))


def names_in(tree: str) -> list[str]:
    """Class names that a table of the package lists, by number."""
    lines = [line.split(",") for line in (FOLDER / f"{tree}.csv").read_text().splitlines()]
    return [line[2] for line in lines if line[0][:1] == "#" and line[0][1:].isdigit()]


AIRCRAFT = {
    "707-320": "Boeing", "737-900": "Boeing", "A300B4": "Airbus", "A380": "Airbus", "An-12": "Antonov",
    "BAE 146-200": "British Aerospace", "C-130": "Lockheed Corporation", "CRJ-900": "Canadair", "DC-3":
    "Douglas Aircraft Company", "DC-10": "McDonnell Douglas", "E-190": "Embraer", "Model B200": "Beechcraft",
    "Tornado": "Panavia", "Yak-42": "Yakovlev",
}  # fmt: skip
CARS = {
    "AM General Hummer SUV 2000": "SUV", "Acura RL Sedan 2012": "Sedan", "smart fortwo Convertible 2012": "Convertible",
    "Cadillac Escalade EXT Crew Cab 2007": "Cab", "Dodge Sprinter Cargo Van 2009": "Van",
}  # fmt: skip
BIRDS = {
    "Black footed Albatross": "Procellariiformes", "Mallard": "Anseriformes", "Common Yellowthroat": "Passeriformes",
    "Ruby throated Hummingbird": "Apodiformes", "Belted Kingfisher": "Coraciiformes",
}  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "first", "facts"),
    [
        ("fgvc-aircraft", ["707-320", "727-200", "737-200"], AIRCRAFT),  # the order of variants.txt
        ("stanford-cars", ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"], CARS),
        ("cub200", ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross"], BIRDS),
    ],
)
def test_parents_are_the_right_ones(tree: str, first: list[str], facts: dict[str, str]) -> None:
    """By number, for data in the official order; by name, whatever their order and spelling."""
    names = names_in(tree)
    assert names[:3] == first
    plain = balanced(tree, len(names) * 2, len(names), len(names))
    mixed = np.random.RandomState(0).permutation(len(names)).tolist()
    by_number = find_tree(tree, plain, "here")
    by_name = find_tree(tree, named(plain, [names[i].replace(" ", "_").upper() for i in mixed]), "here")
    assert by_number.names[:-1] == by_name.names[:-1]
    assert np.array_equal(by_number.at[:-1, mixed], by_name.at[:-1])
    for name, parent in facts.items():
        assert by_number.names[0][by_number.at[0, names.index(name)]] == parent, name


def test_tables_must_know_all_names_or_none() -> None:
    names = names_in("fgvc-aircraft")
    table = balanced("planes", 200, 100, 100)
    with pytest.raises(InputError, match="names of these classes, but not of 'Concorde'"):
        find_tree("fgvc-aircraft", named(table, ["Concorde", *names[1:]]), "here")
    with pytest.raises(InputError, match="it names 100 classes, but 99 of them are in the data"):
        find_tree("fgvc-aircraft", named(balanced("planes", 198, 99, 99), names[1:]), "here")


@pytest.mark.parametrize(
    ("number", "message"),
    [(9, "a class #9, but the 9 classes are #0 to #8"), (11, "class 'class 10' is not in the tree")],
)
def test_a_tree_for_another_number_of_classes(number: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build([balanced("digits", 40, 20, number)], 0, Params(tree="digits"))


def test_a_tree_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("\ufeff# fruit, and more\nchild,parent\nclass 0,a\nclass 1,a\n#2,b\na,all\nb,all\n")
    table = balanced("mine", 30, 6, 3)
    scenario = build([table], 0, Params(setup="multi", tree=str(file)))
    assert scenario.classes.names == ("class 0", "class 1", "class 2", "all", "a", "b")
    assert scenario.classes.level.tolist() == [2, 2, 2, 0, 1, 1]
    assert scenario.classes.parent.tolist() == [4, 4, 5, -1, 3, 3]
    assert [len(task.rows) for task in scenario.tasks] == [12, 9, 9], "10 rows of a class: 4, 3, 3"


EDGES = [Edge("class 0", "a"), Edge("class 1", "a"), Edge("class 2", "b")]


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([*EDGES, Edge("class 0", "b")], "'class 0' has two parents, 'a' and 'b'"),
        ([*EDGES, Edge("a", "c"), Edge("c", "a"), Edge("b", "c")], "its own ancestor: a cycle"),
        ([*EDGES, Edge("x", "y"), Edge("y", "x")], "'x' is its own ancestor: a cycle"),
        ([*EDGES, Edge("a", "a")], "its own ancestor: a cycle"),
        (EDGES[:2], "class 'class 2' is not in the tree"),
        ([*EDGES, Edge("class 9", "b")], "'class 9' is no class of the data and has no children: an orphan"),
        ([*EDGES, Edge("#3", "b")], "it has a class #3, but the 3 classes are #0 to #2"),
        ([*EDGES, Edge("a", "c")], "every class needs as many"),
        ([*EDGES, Edge("x", "class 1")], "'class 1' is a parent"),
    ],
)
def test_what_is_no_tree(edges: list[Edge], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_edges(edges, ["class 0", "class 1", "class 2"], "here")


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "child,parent\nx\n", "child,parent\nx,\n", "child,parent\na,b,c\n", ""])
def test_damaged_tree_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=r"bad\.csv"):
        build([balanced("mine", 30, 6, 3)], 0, Params(tree=str(file)))


def test_a_broken_hierarchy_of_the_data() -> None:
    table = balanced("mine", 30, 6, 3, 2)
    orphan = ClassTable(table.classes.names, table.classes.level, torch.tensor([3, -1, 3, -1, -1]))
    with pytest.raises(InputError, match="'class 1' has no ancestor on level 0: an orphan"):
        own_tree(table._replace(classes=orphan), "here")
    crossed = ClassTable(table.classes.names, table.classes.level, torch.tensor([3, 0, 3, -1, -1]))
    with pytest.raises(InputError, match="an orphan"):
        own_tree(table._replace(classes=crossed), "here")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (Params(tasks=102), "more than one and the 100 finest classes"),
        (Params(coarse_level=1), "coarse_level=1 is not above the finest level"),
        (Params(setup="single", per_class=3), "training rows of every class; lower tasks"),
        (Params(setup="multi", per_class=1), "training rows of every class; give more rows"),
        (Params(tree="cub"), "did you mean 'cub200'"),
        (Params(tree="/nowhere/x.csv"), "cannot read the tree"),
    ],
)
def test_bad_parameters(params: Params, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build([CIFAR], 0, params)


def test_one_level_and_several_data_sets() -> None:
    with pytest.raises(InputError, match="one level only; give tree="):
        build([real_layout("mnist")], 0, Params())
    with pytest.raises(InputError, match="one data set, not 2"):
        build([CIFAR, CIFAR], 0, Params())
    assert np.all(preset("hle-groceries").classes.level.numpy() < 2)
