"""A scenario id means one table for ever: every preset's fingerprint and sizes are pinned in tests/golden.

To pin a new preset or version: CLBENCH_PIN=1 python -m pytest tests/scenarios/test_scenario_golden.py
It adds what is missing and never changes what is pinned.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from label_tables import real_layout

from clbench.data.catalogue import dataset
from clbench.scenarios import build, find, list_scenarios
from clbench.scenarios.check import check_preset

GOLDEN = Path(__file__).parents[1] / "golden" / "scenarios.json"
SEEDS = (0, 1993)


def statistics(key: str) -> dict[str, Any]:
    """What is pinned of a preset and parameters, on a label table with the sizes of the real data set."""
    id, *given = key.split(" ")
    preset = find(id).with_params(dict(item.split("=") for item in given))
    built = {seed: build(preset, [real_layout(name) for name in preset.datasets], seed) for seed in SEEDS}
    scenario = built[SEEDS[0]]
    return {
        "setting": scenario.setting,
        "online": scenario.online,
        "classes": [len(task.classes) for task in scenario.tasks],
        "train": [len(task.rows) for task in scenario.tasks],
        "val": [0 if task.val is None else len(task.val[0]) for task in scenario.tasks],
        "test": [len(group.rows) for group in scenario.groups],
        "fingerprints": {str(seed): scenario.fingerprint for seed, scenario in built.items()},
    }


def pinned() -> dict[str, Any]:
    out: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    return out


IDS = [row["id"] for row in list_scenarios()]
WITH_PARAMETERS = [
    "split-cifar100@1 per_class=50 val_share=0.1",
    "split-cifar100@1 label_level=0 setting=task tasks=6",
    "online-split-cifar10@1 order=3,9,1 shuffle=false tasks=2",
]


@pytest.mark.parametrize("key", IDS + WITH_PARAMETERS)
def test_table_is_as_pinned(key: str) -> None:
    golden, found = pinned(), statistics(key)
    if key not in golden and os.environ.get("CLBENCH_PIN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        golden[key] = found
        lines = [f"{json.dumps(name)}: {json.dumps(golden[name])}" for name in sorted(golden)]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert key in golden, f"{key} is not pinned: see the head of this file"
    id = key.split(" ")[0]
    name, version = id.split("@")
    assert found == golden[key], (
        f"the table of {key} has changed, and results under this id are no longer comparable: leave {id} as it was, "
        f"and give the changed table a new version, {name}@{int(version) + 1}, in its presets file"
    )


def test_nothing_pinned_has_gone() -> None:
    missing = {key.split(" ")[0] for key in pinned()} - set(IDS)
    assert not missing, f"{sorted(missing)} can no longer be built; old versions stay in its presets file"


@pytest.mark.parametrize("id", IDS)
def test_preset_conforms(id: str) -> None:
    preset = find(id)
    checks = check_preset(preset, [real_layout(name) for name in preset.datasets], 1993)
    assert [check for check in checks if not check.ok] == []
    assert len(checks) == 10


def test_layouts_have_the_sizes_of_the_real_data() -> None:
    for name in {name for row in list_scenarios() for name in row["datasets"]}:
        table, known = real_layout(name), dataset(name)
        assert tuple(torch.bincount(table.split.long()).tolist()) == known.rows, name
        assert int(table.labels.max()) + 1 == known.num_classes, name


def is_seeded(row: dict[str, Any]) -> bool:
    """Whether the order seed is meant to change a preset's table."""
    params = find(row["id"]).params
    if row["builder"] in ("class_incremental", "class_half", "mtil"):
        return params.order == "seeded" or (getattr(params, "online", False) and params.shuffle)
    if row["builder"] == "domain_incremental":
        return params.kind == "permuted"
    return True


def test_seeds_matter_where_they_should() -> None:
    golden = pinned()
    for row in list_scenarios():
        prints = golden[row["id"]]["fingerprints"]
        assert (prints["0"] != prints["1993"]) == is_seeded(row), row["id"]


def test_sizes_of_the_papers() -> None:
    golden = pinned()
    assert golden["split-cifar100-b50@1"]["train"] == [25_000, 5_000, 5_000, 5_000, 5_000, 5_000]
    assert golden["split-cifar100@1"]["test"] == [1_000] * 10
    assert golden["split-cifar100-20@1"]["classes"] == [5] * 20
    assert golden["split-mnist@1"]["train"] == [12_665, 12_089, 11_263, 12_183, 11_800]  # real class counts, in pairs
    # online_baselines section 4: 1000 iterations of 10 per task on CIFAR-10, 500 on CIFAR-100
    assert golden["hle-cifar100-single@1"]["train"] == [8_300] + [8_340] * 5
    assert golden["mtil@1"]["test"] == [3333, 1736, 10_000, 1880, 5400, 6149, 25_250, 10_000, 3669, 8041, 21_751]
    assert sum(golden["mtil@1"]["classes"]) == 1_201
    assert golden["split-cars196@1"]["classes"] == [20] * 9 + [16]
    assert golden["online-split-cifar10@1"]["train"] == [10_000] * 5
    assert golden["online-split-cifar100@1"]["train"] == [5_000] * 10
