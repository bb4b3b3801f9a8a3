"""Scenarios made from other scenarios, whatever built them. Pure functions of the tables.

They stand behind two parameters that every scenario has: `score=validation` and `first_tasks=K`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from clbench.errors import InputError
from clbench.scenarios.model import Group, Scenario, Task

__all__ = ["first_tasks", "score_on_validation"]


def score_on_validation(scenario: Scenario) -> Scenario:
    """The same stream, but every group asks for validation rows in place of test rows: what hyperparameters are chosen
    by. No test row is left in the tables.

    A group of task t gets the validation rows of that task whose targets the group asked for, a group of no single task
    those of all tasks. The tasks themselves no longer offer the rows, so that a method cannot train on what it is
    scored on. Raises InputError if a group ends up empty, or if it is not known through which domain a row is seen.
    """
    groups = []
    for group in scenario.groups:
        tasks = scenario.tasks if group.task is None else (scenario.tasks[group.task],)
        parts = [part for task in tasks if (part := _validation(scenario, task, group)) is not None]
        rows, targets, domain = (torch.cat([part[i] for part in parts]) if parts else None for i in range(3))
        if rows is None or targets is None or not len(rows):
            raise InputError(
                f"scenario {scenario.id} has no validation rows for its group {group.name!r}; "
                f"keep some out with val_share=0.1, or score on the test rows"
            )
        groups.append(group._replace(rows=rows, targets=targets, domain=None if scenario.domains is None else domain))
    tasks = tuple(task._replace(val=None) for task in scenario.tasks)
    params = {**scenario.params, "score": "validation"}
    return replace(scenario, tasks=tasks, groups=tuple(groups), params=params)


def _validation(scenario: Scenario, task: Task, group: Group) -> tuple[Tensor, Tensor, Tensor] | None:
    """(n,) rows, targets and domain of a task's validation rows that a group asks for."""
    if task.val is None:
        return None
    rows, targets = task.val
    asked = torch.isin(targets, group.targets.unique())
    rows, targets = rows[asked], targets[asked]
    domain = torch.zeros_like(rows)
    if scenario.domains is not None and task.domain is not None:
        domains = task.domain.unique()
        if len(domains) != 1:
            raise InputError(
                f"scenario {scenario.id} shows the rows of {task.name or 'a task'} through several domains, and its "
                f"validation rows do not say through which; score on the test rows"
            )
        domain = domains.expand(len(rows)).clone()
    return rows, targets, domain


def first_tasks(scenario: Scenario, num: int) -> Scenario:
    """The first `num` tasks alone, with the groups that belong to them: a cheap first look at a hyperparameter.

    Head, class ids and the tasks that stay are the same as in the whole. Groups of no single task keep the rows whose
    classes those tasks introduce. Raises InputError if there are not so many tasks.
    """
    if not 1 <= num <= len(scenario.tasks):
        raise InputError(f"scenario {scenario.id} has {len(scenario.tasks)} tasks: first_tasks={num} is not possible")
    tasks = scenario.tasks[:num]
    known = torch.cat([task.targets for task in tasks]).unique()
    groups = []
    for group in scenario.groups:
        if group.task is not None:
            if group.task < num:
                groups.append(group)
            continue
        stay = torch.isin(group.targets, known)
        if stay.any():
            domain = None if group.domain is None else group.domain[stay]
            groups.append(group._replace(rows=group.rows[stay], targets=group.targets[stay], domain=domain))
    return replace(scenario, tasks=tasks, groups=tuple(groups), params={**scenario.params, "first_tasks": num})
