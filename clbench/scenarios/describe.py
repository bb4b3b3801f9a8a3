"""A scenario in words and numbers: the rows of its task table."""

from typing import Any

import torch
from torch import Tensor

from clbench.scenarios.model import Scenario

__all__ = ["class_rows", "describe"]


def describe(scenario: Scenario) -> list[dict[str, Any]]:
    """One row per task, plain values.

    task: index. name. classes: class names that the task introduces. start: stream position (rows) at which it begins.
    train, val, test: rows; test counts the groups of this task. share: its part of the stream, in [0, 1].
    old: part of its rows, in [0, 1], whose class was introduced before (rehearsal, blurry boundaries).
    """
    total = scenario.offsets[-1]
    known = torch.zeros(scenario.num_classes, dtype=torch.bool)
    out = []
    for index, task in enumerate(scenario.tasks):
        num_rows = len(task.rows)
        out.append(
            {
                "task": index,
                "name": task.name or f"task {index}",
                "classes": tuple(scenario.classes.names[i] for i in task.classes.tolist()),
                "start": scenario.offsets[index],
                "train": num_rows,
                "val": 0 if task.val is None else len(task.val[0]),
                "test": sum(len(group.rows) for group in scenario.groups if group.task == index),
                "share": num_rows / total if total else 0.0,
                "old": float(known[task.targets].float().mean()) if num_rows else 0.0,
            }
        )
        known[task.classes] = True
    return out


def class_rows(scenario: Scenario, edges: Tensor) -> Tensor:
    """(C, bins) float64: expected rows of each class between the stream positions `edges` (bins + 1,), ascending.

    Online rows count where they stand. Offline a task is reshuffled in every epoch, so its rows count evenly over its
    whole length.
    """
    num_classes, bins = scenario.num_classes, len(edges) - 1
    counts = torch.zeros(num_classes, bins, dtype=torch.float64)
    for index, task in enumerate(scenario.tasks):
        start, end = scenario.offsets[index], scenario.offsets[index + 1]
        if start == end:
            continue
        if scenario.online:
            positions = torch.arange(start, end, dtype=edges.dtype)
            at = torch.bucketize(positions, edges[1:-1], right=True)
            counts += torch.bincount(task.targets * bins + at, minlength=num_classes * bins).view(num_classes, bins)
        else:
            share = (edges.clamp(start, end).diff() / (end - start)).double()
            counts += torch.bincount(task.targets, minlength=num_classes).double()[:, None] * share
    return counts
