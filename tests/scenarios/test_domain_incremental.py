"""Domain-incremental scenarios: one task per domain, all classes in each, and what cannot be met."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_tables import balanced, make_table, real_layout, tables

from clbench.data.classes import LabelTable
from clbench.errors import InputError
from clbench.scenarios import build as build_preset
from clbench.scenarios import find
from clbench.scenarios.check import check_scenario
from clbench.scenarios.domain_incremental import Params, build

DIGITS = real_layout("digits")


def with_domains(table: LabelTable, number: int = 3) -> LabelTable:
    groups = torch.arange(len(table.labels)) % number
    return table._replace(groups=groups, group_names=tuple(f"domain {i}" for i in range(number)))


def test_pacs() -> None:
    scenario = build_preset(find("pacs"), [real_layout("pacs")], 0)
    assert [task.name for task in scenario.tasks] == ["photo", "art_painting", "cartoon", "sketch"]
    assert scenario.setting == "domain"
    assert scenario.domains is None
    assert sum(len(task.rows) for task in scenario.tasks) == 3_292
    assert sum(len(group.rows) for group in scenario.groups) == 823
    rows = torch.cat([task.rows for task in scenario.tasks])
    assert len(rows.unique()) == len(rows), "a row is in one domain"


def test_order_of_domains() -> None:
    table = real_layout("pacs")
    given_ = build([table], 0, Params(kind="source", order=("sketch", "photo")))
    assert [task.name for task in given_.tasks] == ["sketch", "photo"]
    orders = {
        tuple(t.name for t in build([table], seed, Params(kind="source", order="seeded")).tasks) for seed in range(9)
    }
    assert len(orders) > 3


@given(tables(), st.sampled_from(["permuted", "rotated"]), st.integers(1, 4), st.booleans())
def test_changed_images(table: LabelTable, kind: str, tasks: int, online: bool) -> None:
    scenario = build([table], 1, Params(kind=kind, tasks=tasks, online=online, pixels=9))
    assert [check for check in check_scenario(scenario, [table]) if not check.ok] == []
    first = sorted(scenario.tasks[0].rows.tolist())
    for index, (task, group) in enumerate(zip(scenario.tasks, scenario.groups, strict=True)):
        assert sorted(task.rows.tolist()) == first, "every task shows all images"
        assert set(task.domain.tolist()) == set(group.domain.tolist()) == {index}
    assert scenario.first_seen.tolist() == [0] * scenario.num_classes


def test_permutations_differ_and_the_first_is_plain() -> None:
    table = build([DIGITS], 0, Params(tasks=4)).domains.table
    assert table[0].tolist() == list(range(64))
    assert len({tuple(row.tolist()) for row in table}) == 4
    assert build([DIGITS], 0, Params(tasks=4, first_plain=False)).domains.table[0].tolist() != list(range(64))
    assert not torch.equal(build([DIGITS], 1, Params(tasks=4)).domains.table, table)


def test_rotations() -> None:
    assert build([DIGITS], 0, Params(kind="rotated", tasks=20)).domains.table[:, 0].tolist() == list(range(0, 180, 9))
    back = build([DIGITS], 0, Params(kind="rotated", tasks=3, degrees=-90))
    assert back.domains.table[:, 0].tolist() == [0, 270, 180]
    listed = build([DIGITS], 0, Params(kind="rotated", angles=(0, 7, -90, 400)))
    assert listed.domains.table[:, 0].tolist() == [0, 7, 270, 40]
    assert len(listed.tasks) == len(listed.groups) == 4
    given_ = find("rotated-digits").with_params({"angles": "0,45,90"})
    assert build_preset(given_, [DIGITS], 0).domains.table[:, 0].tolist() == [0, 45, 90]
    assert len(build_preset(given_.with_params({"tasks": "2"}), [DIGITS], 0).tasks) == 2


def test_a_permutation_needs_the_size_of_the_images() -> None:
    mine = balanced("mine", 20, 4, 2)
    assert build([mine], 0, Params(size=6)).domains.table.shape == (5, 36)
    assert build([mine], 0, Params(pixels=35)).domains.table.shape == (5, 35)
    assert build([mine], 0, Params(kind="rotated")).domains.table.shape == (5, 1), "a rotation does not"


def test_validation_rows_stay_inside_their_domain() -> None:
    table = with_domains(balanced("toy", 240, 60, 4))
    scenario = build([table], 0, Params(kind="source", val_share=0.25))
    for index, task in enumerate(scenario.tasks):
        assert len(task.val[0]) == 20
        assert set(table.groups[task.val[0]].tolist()) == {index}


@pytest.mark.parametrize(
    ("table", "params", "message"),
    [
        (DIGITS, Params(kind="source"), "no domains of their own"),
        (real_layout("pacs"), Params(kind="source", order=("photos",)), "did you mean 'photo'"),
        (real_layout("pacs"), Params(kind="source", order=("photo", "photo")), "each domain once"),
        (balanced("mine", 20, 4, 2), Params(), "give pixels="),
        (DIGITS, Params(val_share=0.1), "leave val_share out"),
        (real_layout("pacs"), Params(kind="source", tasks=2), "a task per domain; give tasks=none"),
        (DIGITS, Params(order=("photo",)), "order is one of the data's own domains"),
        (DIGITS, Params(order="seeded"), "order is one of the data's own domains"),
        (DIGITS, Params(angles=(0, 9)), "angles are for kind=rotated, not for kind=permuted"),
        (DIGITS, Params(kind="rotated", angles=()), "angles is an empty list"),
        (DIGITS, Params(kind="rotated", angles=(1, 2), tasks=2), "either tasks .* or angles, not both"),
        (
            with_domains(balanced("three", 60, 12, 2))._replace(
                group_names=("domain 0", "domain 1", "domain 2", "lost")
            ),
            Params(kind="source"),
            "domain 'lost' has no rows; complete the data",
        ),
        (
            with_domains(make_table("gap", [0, 0, 0, 1, 1], [0, 1], 2)),
            Params(kind="source"),
            "domain 0: no test rows of class",
        ),
    ],
)
def test_bad_parameters(table: LabelTable, params: Params, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build([table], 0, params)
    with pytest.raises(InputError, match="one data set, not 2"):
        build([table, table], 0, params)
