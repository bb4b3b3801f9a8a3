"""Si-Blurry: the official index lists, the card's invariants on random data sets, and what cannot be met."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_tables import balanced, make_table, real_layout, tables

from clbench.data.classes import TRAIN, LabelTable
from clbench.errors import InputError
from clbench.scenarios import build as build_preset
from clbench.scenarios import find
from clbench.scenarios.check import check_scenario
from clbench.scenarios.si_blurry import Params, assign, build, class_split

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / "si_blurry.json").read_text())
shares = st.integers(0, 100)


def params_of(case: dict[str, Any]) -> Params:
    mode = "stochastic" if case.get("stochastic", True) else "deterministic"
    return Params(tasks=case["n_tasks"], disjoint=case["n_percent"], blurry=case["m_percent"], mode=mode)


# -- parity with the official sampler ----------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES["assignment"], ids=lambda case: f"{case['n_classes']}-{case['seed']}")
def test_official_index_lists(case: dict[str, Any]) -> None:
    labels = torch.arange(case["n_classes"] * case["per_class"]) % case["n_classes"]
    found = assign(labels, case["n_classes"], params_of(case), case["seed"])
    assert [stream.tolist() for stream in found.streams] == case["task_indices"]
    assert [classes.tolist() for classes in found.disjoint] == case["disjoint_classes"]
    assert [classes.tolist() for classes in found.blurry] == case["blurry_classes"]


@pytest.mark.parametrize(
    "case", CASES["class_split_full_scale"], ids=lambda case: f"{case['n_classes']}-{case['seed']}"
)
def test_official_class_splits_at_full_scale(case: dict[str, Any]) -> None:
    num_classes = case["n_classes"]
    split = class_split(num_classes, 5, 50, True, torch.Generator().manual_seed(case["seed"]))
    assert [classes.tolist() for classes in split.disjoint] == case["disjoint_classes"]
    assert [classes.tolist() for classes in split.blurry] == case["blurry_classes"]
    per_class = sum(case["task_sizes"]) // num_classes
    labels = torch.arange(num_classes * per_class) % num_classes
    assert [len(s) for s in assign(labels, num_classes, Params(), case["seed"]).streams] == case["task_sizes"]


@pytest.mark.parametrize(
    ("seed", "sizes"),
    [
        (1, [6500, 3000, 10264, 22000, 8236]),
        (2, [4500, 9500, 13500, 10500, 12000]),
        (3, [21000, 13000, 2500, 7500, 6000]),
        (4, [4000, 1300, 18000, 17000, 9700]),
        (5, [6500, 27500, 8061, 3389, 4550]),
    ],
)
def test_task_sizes_on_cifar100(seed: int, sizes: list[int]) -> None:
    """Card, section 6."""
    scenario = build_preset(find("si-blurry-cifar100"), [real_layout("cifar100")], seed)
    assert [len(task.rows) for task in scenario.tasks] == sizes


def test_imagenet_r_layout() -> None:
    """Classes of unequal size, as ImageNet-R has them: only the numbers of samples change (card, section 5.3)."""
    counts = np.random.RandomState(0).randint(40, 350, size=200)
    labels = torch.from_numpy(np.repeat(np.arange(200), counts))  # folder by folder
    case = next(c for c in CASES["class_split_full_scale"] if c["n_classes"] == 200)
    found = assign(labels, 200, Params(), case["seed"])
    assert [classes.tolist() for classes in found.disjoint] == case["disjoint_classes"]
    assert [classes.tolist() for classes in found.blurry] == case["blurry_classes"]
    assert sorted(torch.cat(found.streams).tolist()) == list(range(len(labels)))


# -- a second telling of the card ------------------------------------------------------------------------------------
def card(labels: list[int], num_classes: int, params: Params, seed: int) -> list[list[int]]:
    """Sections 1 to 6 of the card's definition step by step, sample by sample; slow, and shares nothing with ours."""
    rng = torch.Generator().manual_seed(seed)
    tasks, random = range(params.tasks), params.mode == "stochastic"
    num_disjoint = params.tasks * int(num_classes * params.disjoint / 100 // params.tasks)
    num_blurry = params.tasks * ((num_classes - num_disjoint) // params.tasks)
    pi = torch.randperm(num_classes, generator=rng).tolist()

    def edges(total: int) -> list[int]:
        if not random:
            return [t * total // params.tasks for t in tasks] + [total]
        if total == 0:
            return [0] * (params.tasks + 1)
        return [0, *sorted(torch.randint(0, total, (params.tasks - 1,), generator=rng).tolist()), total]

    d = edges(num_disjoint)
    b = edges(num_blurry)
    dis: list[list[int]] = [[] for _ in tasks]
    blu: list[list[int]] = [[] for _ in tasks]
    for index, label in enumerate(labels):
        for t in tasks:
            if label in pi[d[t] : d[t + 1]]:
                dis[t].append(index)
            if label in pi[num_disjoint + b[t] : num_disjoint + b[t + 1]]:
                blu[t].append(index)
    if random:
        q = edges(sum(len(samples) for samples in blu) * params.blurry // 100)
        give = take = [q[t + 1] - q[t] for t in tasks]
    else:
        give = [len(samples) * params.blurry // 100 for samples in blu]
        take = [sum(give) // params.tasks for _ in tasks]
    pool = [index for t in tasks for index in blu[t][: give[t]]]
    blu = [blu[t][give[t] :] for t in tasks]
    if pool:
        pool = [pool[i] for i in torch.randperm(len(pool), generator=rng).tolist()]
    for t in tasks:
        blu[t] += pool[: take[t]]
        pool = pool[take[t] :]
    together = [dis[t] + blu[t] for t in tasks]
    return [[own[i] for i in torch.randperm(len(own), generator=rng).tolist()] for own in together]


@pytest.mark.parametrize("case", CASES["assignment"], ids=lambda case: f"{case['n_classes']}-{case['seed']}")
def test_the_second_telling_is_the_official_one(case: dict[str, Any]) -> None:
    labels = [index % case["n_classes"] for index in range(case["n_classes"] * case["per_class"])]
    assert card(labels, case["n_classes"], params_of(case), case["seed"]) == case["task_indices"]


@given(st.data())
def test_streams_are_the_cards(data: st.DataObject) -> None:
    """Both modes, N and m at both ends (nothing drawn that is not needed), uneven and missing classes."""
    num_classes = data.draw(st.integers(1, 12))
    labels = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=80))
    params = Params(
        tasks=data.draw(st.integers(1, num_classes)),
        disjoint=data.draw(st.one_of(st.sampled_from([0, 100]), shares)),
        blurry=data.draw(st.one_of(st.sampled_from([0, 100]), shares)),
        mode=data.draw(st.sampled_from(["stochastic", "deterministic"])),
    )
    seed = data.draw(st.integers(0, 2**32))
    found = assign(torch.tensor(labels), num_classes, params, seed)
    assert [stream.tolist() for stream in found.streams] == card(labels, num_classes, params, seed)


# -- invariants --------------------------------------------------------------------------------------------------
@given(tables(), st.data())
def test_every_sample_of_the_kept_classes_comes_once(table: LabelTable, data: st.DataObject) -> None:
    params = Params(
        tasks=data.draw(st.integers(1, len(set(table.labels.tolist())))), disjoint=data.draw(shares),
        blurry=data.draw(shares), mode=data.draw(st.sampled_from(["stochastic", "deterministic"])),
    )  # fmt: skip
    scenario = build([table], data.draw(st.integers(0, 50)), params)
    rows = torch.cat([task.rows for task in scenario.tasks]).tolist()
    assert len(rows) == len(set(rows))
    labels = {name: i for i, name in enumerate(table.classes.names)}
    kept = torch.tensor([labels[name] for name in scenario.classes.names])
    train = torch.isin(table.labels, kept) & (table.split == TRAIN)
    dropped = set(train.nonzero()[:, 0].tolist()) - set(rows)
    assert not dropped if params.mode == "stochastic" else len(dropped) < params.tasks
    for group in scenario.groups:
        if group.task is not None:  # disjoint: in one task only
            others = [t.targets for i, t in enumerate(scenario.tasks) if i != group.task]
            assert not torch.isin(group.targets[:1], torch.cat(others) if others else torch.empty(0)).any()
    stream = torch.cat([task.targets for task in scenario.tasks]).tolist()
    assert scenario.first_seen.tolist() == [stream.index(c) for c in range(scenario.num_classes)]
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []


@given(st.lists(st.integers(2, 6), min_size=1, max_size=9), st.data())
def test_validation_rows_belong_to_known_classes(counts: list[int], data: st.DataObject) -> None:
    """Also where all samples of a class have leaked into later tasks."""
    table = make_table("small", np.repeat(np.arange(len(counts)), counts), range(len(counts)), len(counts))
    params = Params(
        tasks=data.draw(st.integers(1, len(counts))), disjoint=data.draw(shares), blurry=data.draw(shares),
        val_share=0.3, mode=data.draw(st.sampled_from(["stochastic", "deterministic"])),
    )  # fmt: skip
    scenario = build([table], data.draw(st.integers(0, 50)), params)
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []


def test_validation_rows_wait_for_a_class_that_leaks_away() -> None:
    """A class of 2 samples may give both into the pool, and be shown by a later task than its own first."""
    moved = 0
    for seed in range(40):
        table = balanced("toy", 30, 10, 10)
        params = Params(tasks=2, disjoint=20, blurry=100, per_class=3, val_share=0.3)
        scenario = build([table], seed, params)
        train = assign(table.labels[torch.cat([t.rows for t in scenario.tasks]).sort().values], 10, params, seed)
        owner = {c: t for t, own in enumerate(train.blurry) for c in own.tolist()}
        names = scenario.classes.names
        introduced = {names[c]: t for t, task in enumerate(scenario.tasks) for c in task.classes.tolist()}
        for index, task in enumerate(scenario.tasks):
            for target in task.val[1].tolist():
                home = owner.get(int(names[target].split()[1]))
                assert index == max(introduced[names[target]], -1 if home is None else home)
                moved += home is not None and index > home
    assert moved > 0, "no seed shows the case"


def test_nothing_moves_without_blurry_classes_or_budget() -> None:
    labels = torch.arange(200) % 20
    for params in (Params(disjoint=100, blurry=70), Params(blurry=0)):
        found = assign(labels, 20, params, 3)
        for own, stream in zip(zip(found.disjoint, found.blurry, strict=True), found.streams, strict=True):
            assert set(labels[stream].tolist()) == set(torch.cat(own).tolist())


def test_classes_do_not_depend_on_the_labels() -> None:
    even, uneven = torch.arange(100) % 10, torch.tensor([0] * 91 + list(range(1, 10)))
    one, other = (assign(labels, 10, Params(), 5) for labels in (even, uneven))
    assert [c.tolist() for c in one.disjoint + one.blurry] == [c.tolist() for c in other.disjoint + other.blurry]


def test_deterministic_tasks_are_equal() -> None:
    scenario = build([balanced("toy", 1000, 100, 10)], 0, Params(mode="deterministic"))
    assert [len(task.rows) for task in scenario.tasks] == [200] * 5
    counts = Counter(c for task in scenario.tasks for c in set(task.targets.tolist()))
    assert sorted(counts.values())[:5] == [1] * 5, "five classes are disjoint"
    assert max(counts.values()) > 1, "and some blurry ones leak"


def test_an_empty_task_stays() -> None:
    scenario = build([balanced("toy", 100, 20, 10)], 4, Params(blurry=0))
    assert [len(task.rows) for task in scenario.tasks] == [0, 30, 0, 30, 40]
    assert len(scenario.tasks[0].classes) == 0


def test_subsets_and_validation() -> None:
    table = balanced("toy", 400, 40, 10)
    scenario = build([table], 1, Params(per_class=20, val_share=0.1))
    assert sum(len(task.rows) for task in scenario.tasks) == 10 * 18
    val = torch.cat([task.val[0] for task in scenario.tasks])
    assert len(val) == 10 * 2
    assert not torch.isin(val, torch.cat([task.rows for task in scenario.tasks])).any()


# -- what cannot be met ------------------------------------------------------------------------------------------
def test_bad_parameters() -> None:
    table = balanced("toy", 100, 20, 10)
    with pytest.raises(InputError, match="tasks=11 is more than the 10 classes"):
        build([table], 0, Params(tasks=11))
    with pytest.raises(InputError, match="takes one data set, not 2"):
        build([table, table], 0, Params())
    for changed in ({"disjoint": 101}, {"blurry": -1}):
        with pytest.raises(InputError, match="must be at"):
            find("si-blurry-digits").with_params(changed)
    with pytest.raises(InputError, match="no test rows of class 'class 1'"):
        build([make_table("odd", [0, 1] * 5, [0], 2)], 0, Params(tasks=1))
