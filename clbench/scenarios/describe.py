"""A scenario in words and numbers: the rows of its task table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clbench.scenarios.model import Scenario

__all__ = ["Lanes", "class_rows", "describe", "domain_lanes"]


def describe(scenario: Scenario) -> list[dict[str, Any]]:
    """One row per task, plain values.

    task: index. name. classes: class names that the task introduces. start: stream position (rows) at which it begins.
    train, val, test: rows; test counts the groups of this task. share: its part of the stream, in [0, 1].
    old: part of its rows, in [0, 1], whose class was introduced before (rehearsal, blurry boundaries); where tasks
    share their classes, whose domain was.
    """
    total = scenario.offsets[-1]
    by_domain = domain_lanes(scenario) if scenario.setting == "domain" else None
    known = torch.zeros(scenario.num_classes if by_domain is None else len(by_domain.names), dtype=torch.bool)
    out = []
    for index, task in enumerate(scenario.tasks):
        num_rows = len(task.rows)
        lane = task.targets if by_domain is None else by_domain.of_task[index]
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
                "old": float(known[lane].float().mean()) if num_rows else 0.0,
            }
        )
        known[task.classes if by_domain is None else lane] = True
    return out


def class_rows(scenario: Scenario, edges: Tensor) -> Tensor:
    """(C, bins) float64: expected rows of each class between the stream positions `edges` (bins + 1,), ascending.

    Online rows count where they stand. Offline a task is reshuffled in every epoch, so its rows count evenly over its
    whole length.
    """
    return binned(scenario, [task.targets for task in scenario.tasks], scenario.num_classes, edges)


class Lanes(NamedTuple):
    """What runs side by side in a stream. names: one per lane. of_task: per task, (n,) int64 lane of each row.
    of_group: lane that each test group belongs to, -1 for none."""

    names: tuple[str, ...]
    of_task: list[Tensor]
    of_group: list[int]


def domain_lanes(scenario: Scenario) -> Lanes:
    """The domains of a domain-incremental scenario as lanes: those its rows are seen through, else its tasks."""
    if scenario.domains is None:
        names = tuple(task.name or f"task {index}" for index, task in enumerate(scenario.tasks))
        of_task = [torch.full_like(task.rows, index) for index, task in enumerate(scenario.tasks)]
        return Lanes(names, of_task, [-1 if group.task is None else group.task for group in scenario.groups])
    num_domains = len(scenario.domains.table)
    of_task = [torch.zeros_like(task.rows) if task.domain is None else task.domain for task in scenario.tasks]
    of_group = [
        -1 if group.domain is None or not len(group.domain) else int(group.domain[0]) for group in scenario.groups
    ]
    named = {lane: group.name for lane, group in zip(of_group, scenario.groups, strict=True)}
    return Lanes(tuple(named.get(lane, f"domain {lane}") for lane in range(num_domains)), of_task, of_group)


def binned(scenario: Scenario, lanes: Sequence[Tensor], num_lanes: int, edges: Tensor) -> Tensor:
    """(num_lanes, bins) float64: expected rows of each lane between `edges`; lanes: per task, (n,) int64."""
    bins = len(edges) - 1
    counts = torch.zeros(num_lanes, bins, dtype=torch.float64)
    for index, lane in enumerate(lanes):
        start, end = scenario.offsets[index], scenario.offsets[index + 1]
        if start == end:
            continue
        if scenario.online:
            positions = torch.arange(start, end, dtype=edges.dtype)
            at = torch.bucketize(positions, edges[1:-1], right=True)
            counts += torch.bincount(lane * bins + at, minlength=num_lanes * bins).view(num_lanes, bins)
        else:
            share = (edges.clamp(start, end).diff() / (end - start)).double()
            counts += torch.bincount(lane, minlength=num_lanes).double()[:, None] * share
    return counts
