"""What a preset's images decide (duplicates, leaks) is committed in tests/golden/statistics.json and compared here, on
the data themselves. Presets whose data are not on this machine are skipped.

To pin every preset that is not, as far as its data are in CLBENCH_DATA: python tests/scenarios/test_statistics.py
It never changes what is pinned; delete a line to have it made anew.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.data import ClassTable, ImageStore, load_all
from clbench.data.catalogue import catalogue
from clbench.data.finding import Missing
from clbench.data.loading import pixel_digests
from clbench.scenarios import build, find, list_scenarios
from clbench.scenarios.model import Domains, Group, Scenario, Task
from clbench.scenarios.statistics import statistics

GOLDEN = Path(__file__).parents[1] / "golden" / "statistics.json"
IDS = {row["id"]: row["datasets"] for row in list_scenarios()}
# what CI can always look at, without real data from outside
EMBEDDED = [id for id, datasets in IDS.items() if datasets == ["digits"]]
# a preset of data that have a published subset is looked at on the subset too
SUBSETS = [
    f"{id} dataset={datasets[0]}-subset"
    for id, datasets in IDS.items()
    if len(datasets) == 1 and f"{datasets[0]}-subset" in catalogue()
]
OTHERS = [id for id in IDS if id not in EMBEDDED] + SUBSETS


def pinned() -> dict[str, Any]:
    out: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    return out


@cache
def stores_of(datasets: tuple[str, ...], order: str, size: int | None) -> tuple[list[ImageStore], np.ndarray]:
    stores = load_all(datasets, order=order, size=size)
    return stores, np.concatenate([pixel_digests(store.images.numpy()) for store in stores])


def measured(key: str) -> dict[str, Any]:
    """The statistics of a preset, or one with parameters, under order seed 0; and what they were measured on."""
    id, *given = key.split(" ")
    preset = find(id).with_params(dict(item.split("=") for item in given))
    stores, digests = stores_of(preset.datasets, preset.row_order, preset.size)
    scenario = build(preset, [store.table() for store in stores], 0)
    data = {store.name: store.fingerprint for store in stores}
    return {**statistics(scenario, digests), "fingerprint": scenario.fingerprint, "data": data}


def pin() -> None:
    """Add what is missing, one line per preset."""
    golden = pinned()
    for id in EMBEDDED + OTHERS:
        if id not in golden:
            try:
                golden[id] = measured(id)
            except Missing as error:
                print(f"{id}: {str(error)[:100]} ...")
    lines = [f"{json.dumps(id)}: {json.dumps(golden[id])}" for id in sorted(golden)]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compare(id: str) -> None:
    found, golden = measured(id), pinned()
    assert id in golden, f"{id} is not pinned: see the head of this file"
    assert found["data"] == golden[id]["data"], "these are other data than those that were measured"
    assert found == golden[id]


@pytest.mark.parametrize("id", EMBEDDED)
def test_embedded_data(id: str) -> None:
    compare(id)


@pytest.mark.slow
@pytest.mark.skipif("CLBENCH_DATA" not in os.environ, reason="wants real data through CLBENCH_DATA")
@pytest.mark.parametrize("id", OTHERS)
def test_real_data(id: str) -> None:
    try:
        compare(id)
    except Missing as error:
        pytest.skip(str(error).splitlines()[0])


def test_nothing_pinned_has_gone() -> None:
    assert {key.split(" ")[0] for key in pinned()} <= IDS.keys()


def test_only_rehearsal_repeats_rows() -> None:
    golden = pinned()
    for id, facts in golden.items():
        assert facts["val_leaks"] <= sum(facts["val"]), id
        assert max(facts["leaks_within_class"], facts["leaks_between_classes"]) <= facts["leaks"] <= sum(facts["test"])
        if id.startswith(("split-", "online-", "si-blurry", "i-blurry", "mtil", "pacs", "permuted", "rotated")):
            assert sum(facts["repeats"]) == 0, id
    assert sum(golden["power-law-digits@1"]["repeats"]) > 0
    assert golden["split-digits@1"]["leaks"] == 0


# -- the counts themselves --------------------------------------------------------------------------------------------
def scenario_of(tasks: list[Task], groups: list[Group], level: list[int], domains: Domains | None = None) -> Scenario:
    num = len(level)
    classes = ClassTable(tuple(f"c{i}" for i in range(num)), torch.tensor(level), torch.full((num,), -1))
    return Scenario(
        id="tiny@1", datasets=("tiny",), setting="class", tasks=tuple(tasks), groups=tuple(groups), classes=classes,
        first_seen=torch.zeros(num, dtype=torch.int64), domains=domains,
    )  # fmt: skip


def task(rows: list[int], targets: list[int], domain: list[int] | None = None, val: list[int] | None = None) -> Task:
    rows_, targets_ = torch.tensor(rows, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
    held = None if val is None else (torch.tensor(val), torch.zeros(len(val), dtype=torch.int64))
    return Task(rows_, targets_, targets_.unique(), None if domain is None else torch.tensor(domain), held)


def group(name: str, rows: list[int], targets: list[int], domain: list[int] | None = None) -> Group:
    through = None if domain is None else torch.tensor(domain)
    return Group(name, torch.tensor(rows), torch.tensor(targets), torch.arange(9), domain=through)


def digests_of(contents: list[int]) -> np.ndarray:
    return np.column_stack([np.zeros((len(contents), 3), np.uint64), np.array(contents, np.uint64)])


def test_by_hand() -> None:
    #          row: 0  1  2  3  4  5  6  7  8  9
    contents = [10, 11, 10, 12, 13, 10, 11, 14, 14, 12]
    scenario = scenario_of(
        [task([0, 1], [0, 0], val=[9]), task([2, 3, 1, 1], [1, 1, 0, 0]), task([], [])],
        [group("a", [5, 6], [0, 1]), group("b", [7, 8, 5], [0, 1, 0])],
        [0, 0],
    )
    assert statistics(scenario, digests_of(contents)) == {
        "train": [2, 4, 0], "val": [1, 0, 0], "test": [2, 3], "classes": [1, 2, 0],
        "repeats": [0, 2, 0],  # row 1, twice
        "duplicates": 1,  # row 2 is row 0 again
        "label_conflicts": 1,  # that image is class 0 and class 1
        "test_duplicates": 1,  # rows 7 and 8
        "shared_test": 1,  # row 5
        "leaks": 2,  # rows 5 and 6
        "leaks_within_class": 1,  # row 5 as class 0
        "leaks_between_classes": 2,  # row 5 as class 1 too, row 6 is asked as 1 and trained as 0
        "val_leaks": 1,  # row 9 is row 3 again
    }  # fmt: skip


def test_levels_and_domains_keep_images_apart() -> None:
    level = [1, 1, 0]  # two fine classes, one coarse
    coarse = scenario_of([task([0], [0]), task([0], [2])], [group("a", [1], [0])], level)
    facts = statistics(coarse, digests_of([5, 5]))
    assert (facts["label_conflicts"], facts["repeats"], facts["leaks_between_classes"]) == (0, [0, 1], 0)
    domains = Domains("rotation", torch.tensor([[0], [90]]))
    turned = scenario_of([task([0, 0], [0, 0], [0, 1])], [group("a", [1], [0], [1])], [0], domains)
    facts = statistics(turned, digests_of([5, 6]))
    assert (facts["repeats"], facts["duplicates"], facts["leaks"]) == ([0], 0, 0)
    assert statistics(turned, digests_of([5, 5]))["leaks"] == 1
    stored = scenario_of([task([0], [0])], [group("a", [1], [0], [0])], [0], domains)  # None is not the first domain
    assert statistics(stored, digests_of([5, 5]))["leaks"] == 0


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_against_plain_loops(data: st.DataObject) -> None:
    num_rows, num_classes = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 4))
    contents = data.draw(st.lists(st.integers(0, 5), min_size=num_rows, max_size=num_rows))
    sample = st.tuples(st.integers(0, num_rows - 1), st.integers(0, num_classes - 1))
    streams = data.draw(st.lists(st.lists(sample, max_size=6), min_size=1, max_size=3))
    streams[0].append(data.draw(sample))
    asked = data.draw(st.lists(st.lists(sample, min_size=1, max_size=6), min_size=1, max_size=3))
    level = [i % 2 for i in range(num_classes)]
    scenario = scenario_of(
        [task([r for r, _ in part], [t for _, t in part]) for part in streams],
        [group(str(i), [r for r, _ in part], [t for _, t in part]) for i, part in enumerate(asked)],
        level,
    )
    facts = statistics(scenario, digests_of(contents))
    trained = [(contents[r], t) for part in streams for r, t in part]
    images = {image for image, _ in trained}
    tests = [(r, t) for part in asked for r, t in part]
    assert facts["leaks"] == len({r for r, _ in tests if contents[r] in images})
    assert facts["leaks_within_class"] == len({r for r, t in tests if (contents[r], t) in trained})
    other = {r for r, t in tests for i, u in trained if i == contents[r] and u != t and level[u] == level[t]}
    assert facts["leaks_between_classes"] == len(other)
    conflicts = {i for i, t in trained for j, u in trained if i == j and t != u and level[t] == level[u]}
    assert facts["label_conflicts"] == len(conflicts)
    rows = [r for part in streams for r, _ in part]
    assert sum(facts["repeats"]) == len(rows) - len(set(rows))
    assert facts["duplicates"] == len(set(rows)) - len(images)


if __name__ == "__main__":
    pin()
