"""The blurry scenario of SHARP: classes come back. Each episode has a few classes, each of them new or seen before.

Source: sharp card, section 4 (launch_utils_noisy.py of the official code): the first episode has new classes alone; in
each later one every slot is a new class with probability `novelty`, else a seen class that the episode doesn't have
yet, until there are no new classes left. An episode has all training rows of its classes; behind it all classes seen
are tested. A pure function of labels, seed and parameters.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios.draws import frozen_random
from clbench.scenarios.model import Scenario, StreamDefaults, Task
from clbench.scenarios.params import param
from clbench.scenarios.rows import Ints, choose_rows, class_groups, cut, labels_at, only_tasks, tensor

__all__ = ["Params", "build", "episodes"]

DEFAULTS = StreamDefaults()


@dataclass(frozen=True)
class Params:
    """The number of tasks follows from the draws."""

    classes_per_task: int = param(3, "classes of each task", low=1)
    novelty: float = param(
        0.3, "probability that a class of a task is a new one, as long as there are any", low=0.001, high=1
    )
    online: bool = param(False, "one pass over the rows as listed, in place of reshuffled epochs")
    row_order: Literal["canonical", "source"] = param(
        "canonical", "rows numbered by their content (the same from every source), or as the data's source has them"
    )
    per_class: int | None = param(None, "at most so many training rows per class, validation included", low=1)
    val_share: float = param(0.0, "share of each class's training rows kept out for validation", low=0, below=1)
    subset_seed: int = param(0, "draws the rows of per_class and val_share, whatever the order seed", low=0)


def episodes(num_classes: int, classes_per_task: int, novelty: float, seed: int) -> list[list[int]]:
    """Class ids of each episode, in the order of its slots.

    >>> episodes(4, 2, 1.0, 0)
    [[0, 2], [1, 3]]
    """
    rng = frozen_random(seed, "noisy classes")
    new = [int(c) for c in rng.permutation(num_classes)]  # the next new class is the last: a uniform draw
    out = [[new.pop() for _ in range(classes_per_task)]]
    seen = list(out[0])
    while new:
        picked: list[int] = []
        for _ in range(classes_per_task):
            if new and rng.random_sample() < novelty:
                picked.append(new.pop())
                seen.append(picked[-1])
            else:
                rest = [c for c in seen if c not in picked]
                picked.append(rest[rng.randint(len(rest))])
        out.append(picked)
    return out


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "noisy@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """Cut the one data set in `tables` into episodes; `seed` is the order seed. Classes keep the data set's ids.

    Rows of a task are in an order drawn anew for each; validation rows are with the task that introduces their class.
    Every class is a test group of its own; it belongs to a task if no other task trains it.
    Raises InputError if a parameter cannot be met.
    """
    if len(tables) != 1:
        raise InputError(f"{id}: a noisy stream takes one data set, not {len(tables)}")
    table = tables[0]
    where = f"{id} on {table.dataset}"
    labels, names = labels_at(table, None, where)
    num_classes = len(names)
    if params.classes_per_task > num_classes:
        raise InputError(
            f"{where}: classes_per_task={params.classes_per_task} is more than the {num_classes} classes; lower it"
        )
    split = table.split.numpy()
    pool = choose_rows(labels, np.flatnonzero((split == TRAIN) & (labels >= 0)), params, names, where)
    plan = episodes(num_classes, params.classes_per_task, params.novelty, seed)
    introduced = np.empty(num_classes, np.int64)
    for index in reversed(range(len(plan))):
        introduced[plan[index]] = index

    trains, vals = (cut(rows, labels[rows], num_classes) for rows in pool)  # by class
    tasks = []
    for index, classes in enumerate(plan):
        rows = np.sort(np.concatenate([trains[c] for c in classes]))
        rows = rows[frozen_random(seed, "noisy rows", index).permutation(len(rows))]
        new = np.flatnonzero(introduced == index)
        val = np.sort(np.concatenate([pool.val[:0], *(vals[c] for c in new)]))
        tasks.append(
            Task(
                rows=tensor(rows),
                targets=tensor(labels[rows]),
                classes=tensor(new),
                val=(tensor(val), tensor(labels[val])) if params.val_share > 0 else None,
                name=f"episode {index}",
            )
        )
    test = np.flatnonzero((split == TEST) & (labels >= 0))
    home = only_tasks([np.asarray(classes) for classes in plan], num_classes)
    return Scenario(
        id=id,
        datasets=(table.dataset,),
        setting="class",
        tasks=tuple(tasks),
        groups=class_groups(test, labels[test], np.arange(num_classes), home, names, where),
        classes=ClassTable(tuple(names), torch.zeros(num_classes, dtype=torch.int64), torch.full((num_classes,), -1)),
        first_seen=tensor(starts(tasks)[introduced]),
        online=params.online,
        defaults=defaults,
        params=asdict(params),
    )


def starts(tasks: Sequence[Task]) -> Ints:
    """(K,) stream position at which each task begins."""
    return np.cumsum([0, *(len(task.rows) for task in tasks)])[:-1]
