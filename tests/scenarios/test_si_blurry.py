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
from clbench.metrics.online import anytime_accuracy, f_last, official_points
from clbench.scenarios import build as build_preset
from clbench.scenarios import find
from clbench.scenarios.check import check_scenario
from clbench.scenarios.si_blurry import Params, assign, build, class_split

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / "si_blurry.json").read_text())


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


def test_official_evaluations() -> None:
    case = CASES["eval_schedule"][0]
    behind, start = [], 0
    for size in case["task_sizes"]:
        behind += [start + min(n + case["batch"], size) for n in range(0, size, case["batch"])]
        start += size
    chosen = [behind[i] for i in official_points(behind, case["period"])]
    assert chosen == [n for _, n, _ in case["evals"]]
    assert [nominal for _, _, nominal in case["evals"]] == [case["period"] * (i + 1) for i in range(len(chosen))]


def test_49_evaluations_of_50_000_samples() -> None:
    assert len(official_points([*range(64, 50_000, 64), 50_000], 1000)) == 49


def test_metrics_of_the_official_code() -> None:
    case = CASES["metrics"][0]
    accuracy = np.array(case["cls_acc_task_by_class"])
    hits = (np.array(case["anytime_acc"]) * 1000).round().astype(int)[:, None]
    assert anytime_accuracy(hits, [1000], np.ones_like(hits)) == pytest.approx(case["A_auc"], abs=1e-12)
    assert f_last(accuracy, np.ones(accuracy.shape, bool)) == pytest.approx(case["F_last"], abs=1e-12)
    # classes that have not been seen count as little as those that were never right
    active = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    assert f_last(accuracy, active) == pytest.approx(case["F_last"], abs=1e-12)


# -- invariants --------------------------------------------------------------------------------------------------
shares = st.integers(0, 100)


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


def test_nothing_moves_without_blurry_classes_or_budget() -> None:
    labels = torch.arange(200) % 20
    for params in (Params(disjoint=100, blurry=70), Params(blurry=0)):
        found = assign(labels, 20, params, 3)
        for own, stream in zip(zip(found.disjoint, found.blurry, strict=True), found.streams, strict=True):
            assert set(labels[stream].tolist()) == set(torch.cat(own).tolist())


@pytest.mark.parametrize(
    ("params", "draws"), [(Params(disjoint=0), 1), (Params(blurry=0), 2), (Params(disjoint=100), 1)]
)
def test_what_is_not_needed_is_not_drawn(params: Params, draws: int) -> None:
    """The generator stands where the card's draw order says (sections 1 and 6)."""
    labels = torch.arange(60) % 10
    rng = torch.Generator().manual_seed(7)
    torch.randperm(10, generator=rng)
    sizes = [10] if params.disjoint in (0, 100) else [5, 5]
    for size in sizes[:draws]:
        torch.randint(0, size, (4,), generator=rng)
    if params.disjoint == 0:
        quotas = torch.tensor([0, *torch.randint(0, 6, (4,), generator=rng).sort().values.tolist(), 6]).diff()
        owned = [len(c) * 6 for c in assign(labels, 10, params, 7).blurry]
        torch.randperm(sum(min(int(q), n) for q, n in zip(quotas, owned, strict=True)), generator=rng)
    expected = [torch.randperm(len(s), generator=rng) for s in assign(labels, 10, params, 7).streams]
    again = assign(labels, 10, params, 7)
    for permutation, stream in zip(expected, again.streams, strict=True):
        undone = stream[permutation.argsort()]
        if params.blurry == 0 or params.disjoint == 100:
            own = undone.tolist()
            split = next((i for i in range(1, len(own)) if own[i] < own[i - 1]), len(own))
            assert own[:split] == sorted(own[:split]), "disjoint samples lie in data set order"
            assert own[split:] == sorted(own[split:]), "blurry samples lie in data set order"


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
