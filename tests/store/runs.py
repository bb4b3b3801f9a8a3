"""A small but complete run record for the tests."""

from pathlib import Path
from typing import Any

import numpy as np

from clbench.metrics import Curve, summarise
from clbench.store import RunRecord

MATRIX = [[0.9, 0.0], [1 / 3, 0.8]]
SIZES = [30, 20]
GROUPS = ["classes 0, 1", 'the "second"']


def document(**changes: Any) -> dict[str, Any]:
    """All fields of a spec."""
    return {
        "method": "er", "method_file": None,
        "hyperparameters": {"lr": {"value": 0.1, "source": "default"}, "capacity": {"value": 200, "source": "--set"}},
        "scenario": "split-digits@1", "scenario_params": {"tasks": 5, "order": "natural"}, "scenario_fingerprint": "ab",
        "datasets": ["digits"], "data_fingerprint": "cd", "setting": "class", "num_tasks": 2, "num_classes": 4,
        "seed": 0, "order_seed": 0, "backbone": "mlp", "backbone_options": {"width": 64}, "backbone_fingerprint": "ef",
        "pretrained_on": [], "weights": None, "contaminated": None, "train_view": "", "test_view": "", "batch_size": 10,
        "epochs": 1, "updates_per_batch": 1, "mask": "seen", "eval_every": 10, "eval_dense": 10, "eval_per_group": 200,
        "precision": "fp32", "device_type": "cpu", "recipe": None, "sources": {"batch_size": "scenario"},
        **changes,
    }  # fmt: skip


def curve() -> Curve:
    """Two evaluations at step 2: the end of task 0, and task 1 before its first update."""
    return Curve.of(
        steps=[0, 1, 2, 2, 3, 4], task=[0, 0, 0, 1, 1, 1], phase=[0, 0, 1, 0, 0, 1],
        hits=[[2, 0], [9, 0], [18, 0], [17, 1], [3, 9], [7, 16]], valid=[[1, 0]] * 3 + [[1, 1]] * 3,
        totals=[20, 20], groups=GROUPS, group_task=[0, 1], task_ends=[2, 4],
    )  # fmt: skip


def summary() -> dict[str, Any]:
    """All keys of a summary."""
    return {
        **summarise(MATRIX, group_task=[0, 1], sizes=SIZES, setting="class", mask="seen", curve=curve()),
        "steps": 4, "images_trained": 80, "evaluations": 6, "eval_batch": None,
        "times": {"train_s": 1.5, "evaluate_s": 0.5},
        "peak_memory_bytes": 10**8, "num_parameters": 1000, "memory_bytes": {"buffer": 12800},
        "memory_per_task": [{"buffer": 6400}, {"buffer": 12800}], "levels": [],
        "forward_flops_per_image": 2000, "weights_sha256": "01" * 32,
    }  # fmt: skip


def finished(path: Path, **changes: Any) -> RunRecord:
    """A complete record at `path`."""
    record = RunRecord(path)
    with record.lock():
        record.create(document(**changes))
        record.append_env(device="cpu")
        record.write_curve(curve(), [["train", "align"], ["train", "align"]])
        record.write_matrix(MATRIX, GROUPS, sizes=SIZES)
        record.write_losses([1, 1, 2], [0, 1, 0], [2.5, 0.1, 2.0], ["loss", "replay"])
        record.write_predictions(np.arange(50), np.arange(50) % 4, np.zeros((2, 50), np.int32))
        record.write_summary(summary())
        record.finish()
    return record
