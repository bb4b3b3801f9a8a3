import os
from pathlib import Path

import pytest
import torch
from label_tables import real_layout

from clbench.data import load
from clbench.scenarios import build, find
from clbench.scenarios.check import check_preset


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path))
    preset = find("split-digits")
    table = load("digits", order=preset.row_order).table()
    assert [check for check in check_preset(preset, [table]) if not check.ok] == []
    scenario = build(preset, [table], 0)
    assert scenario.classes.names == tuple("0123456789")
    layout = build(preset, [real_layout("digits")], 0)
    assert scenario.offsets == layout.offsets
    assert [len(group.rows) for group in scenario.groups] == [len(group.rows) for group in layout.groups]
    for index, task in enumerate(scenario.tasks):
        assert set(table.labels[task.rows].tolist()) == {2 * index, 2 * index + 1}


@pytest.mark.slow
@pytest.mark.skipif("CLBENCH_DATA" not in os.environ, reason="wants CIFAR-100 through CLBENCH_DATA")
def test_cifar100() -> None:
    preset = find("split-cifar100").with_params({"per_class": "100"})
    store = load("cifar100", order=preset.row_order)
    table = store.table()
    assert [check for check in check_preset(preset, [table], 1993) if not check.ok] == []
    scenario = build(preset, [table], 1993)
    assert scenario.classes.names[:3] == tuple(table.classes.names[i] for i in (68, 56, 78))
    assert [len(task.rows) for task in scenario.tasks] == [1000] * 10
    coarse = build(preset.with_params({"label_level": "0", "order": "natural"}), [table], 0)
    assert coarse.num_classes == 20
    row, target = int(coarse.tasks[0].rows[0]), int(coarse.tasks[0].targets[0])
    assert torch.equal(table.classes.parent[table.labels[row]], torch.tensor(100 + target))
