"""Class-incremental and task-incremental scenarios: the classes of one data set arrive in disjoint blocks.

Conventions (class order, sizes of the blocks, targets are positions in the order): PyCIL, LAMDA-PILOT, SLCA. A pure
function of labels, seed and parameters; sorting and counting only, no loop over rows.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios.draws import class_permutation, row_keys
from clbench.scenarios.model import Group, Scenario, StreamDefaults, Task
from clbench.scenarios.params import param
from clbench.scenarios.rows import Ints, choose_rows, cut, first_of_each, labels_at, require_rows, tensor

__all__ = ["Params", "build", "task_sizes"]

DEFAULTS = StreamDefaults()


@dataclass(frozen=True)
class Params:
    """Either `tasks`, or `increment` with or without `init`."""

    tasks: int | None = param(
        None, "number of tasks, as equal in classes as can be, larger ones first", low=1, replaces=("init", "increment")
    )
    init: int | None = param(None, "classes of the first task (without it: increment)", low=1, replaces=("tasks",))
    increment: int | None = param(
        None, "classes of each further task; the last one may be smaller", low=1, replaces=("tasks",)
    )
    order: Literal["natural", "seeded"] | tuple[int, ...] = param(
        "natural", "class order: as in the data set, numpy's permutation of the order seed, or a list of class ids"
    )
    setting: Literal["class", "task"] = param(
        "class", "whether the task of a test image is known (task) or not (class)"
    )
    online: bool = param(False, "one pass over the rows as listed, in place of reshuffled epochs")
    shuffle: bool = param(True, "online: rows of a task in an order drawn from the order seed, not as in the data set")
    row_order: Literal["canonical", "source"] = param(
        "canonical", "rows numbered by their content (the same from every source), or as the data's source has them"
    )
    size: int | None = param(None, "side in pixels that all images are resized to, once; for data of many sizes", low=1)
    per_class: int | None = param(None, "at most so many training rows per class, validation included", low=1)
    test_per_class: int | None = param(
        None, "at most so many test rows per class: quicker final tests, with a larger sampling error", low=1
    )
    val_share: float = param(0.0, "share of each class's training rows kept out for validation", low=0, below=1)
    subset_seed: int = param(
        0, "draws the rows of per_class, test_per_class and val_share, whatever the order seed", low=0
    )
    label_level: int | None = param(None, "label level to classify: 0 is the coarsest; without it the finest", low=0)


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "class-incremental@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """Cut the one data set in `tables` into tasks of disjoint classes; `seed` is the order seed.

    A class's id is its position in the class order. Rows are in ascending order where not online. One test group per
    task, with all test rows of its classes; answers may come from all classes, or from the task's (`setting=task`).
    Raises InputError if a parameter cannot be met by this data set.
    """
    if len(tables) != 1:
        raise InputError(f"{id}: a class-incremental scenario takes one data set, not {len(tables)}")
    table = tables[0]
    where = f"{id} on {table.dataset}"
    labels, names = labels_at(table, params.label_level, where)
    order = class_order(params.order, seed, len(names), where)
    num_classes = len(order)
    sizes = task_sizes(num_classes, params.tasks, params.init, params.increment, where)

    position = np.full(len(names) + 1, -1, dtype=np.int64)  # the last entry serves label -1: no class at this level
    position[order] = np.arange(num_classes)
    targets = position[labels]
    names = [names[i] for i in order.tolist()]
    split = table.split.numpy()
    pool = choose_rows(targets, np.flatnonzero((split == TRAIN) & (targets >= 0)), params, names, where)
    test = np.flatnonzero((split == TEST) & (targets >= 0))
    require_rows(np.bincount(targets[test], minlength=num_classes), names, "test", where)
    if params.test_per_class is not None:
        keys = row_keys(params.subset_seed, "test subset", len(targets))
        test = np.sort(first_of_each(targets, test, keys, params.test_per_class))

    task_of = np.repeat(np.arange(len(sizes)), sizes)  # (C,)
    train = pool.train
    if params.online and params.shuffle:
        keys = row_keys(seed, "row order", len(labels))
        train = train[np.argsort(keys[train], kind="stable")]
    trains, vals, tests = (cut(rows, task_of[targets[rows]], len(sizes)) for rows in (train, pool.val, test))
    ends = np.cumsum(sizes)
    tasks, groups = [], []
    for index, size in enumerate(sizes):
        classes = torch.arange(ends[index] - size, ends[index])
        name = f"task {index}"
        tasks.append(
            Task(
                rows=tensor(trains[index]),
                targets=tensor(targets[trains[index]]),
                classes=classes,
                val=(tensor(vals[index]), tensor(targets[vals[index]])) if params.val_share > 0 else None,
                name=name,
            )
        )
        groups.append(
            Group(
                name=name,
                rows=tensor(tests[index]),
                targets=tensor(targets[tests[index]]),
                classes=classes if params.setting == "task" else torch.arange(num_classes),
                task=index,
            )
        )
    starts = np.cumsum([0, *(len(rows) for rows in trains)])[:-1]
    return Scenario(
        id=id,
        datasets=(table.dataset,),
        setting=params.setting,
        tasks=tuple(tasks),
        groups=tuple(groups),
        classes=ClassTable(
            names=tuple(names),
            level=torch.zeros(num_classes, dtype=torch.int64),
            parent=torch.full((num_classes,), -1),
        ),
        first_seen=tensor(starts[task_of]),
        online=params.online,
        defaults=defaults,
        params=asdict(params),
    )


def task_sizes(
    num_classes: int, tasks: int | None, init: int | None, increment: int | None, where: str = "scenario"
) -> list[int]:
    """Classes of each task: `tasks` near-equal blocks, or `init`, then blocks of `increment` with a ragged last one.

    >>> task_sizes(196, None, 20, 20)
    [20, 20, 20, 20, 20, 20, 20, 20, 20, 16]
    >>> task_sizes(10, 4, None, None)
    [3, 3, 2, 2]
    """
    if tasks is not None and (init is not None or increment is not None):
        raise InputError(f"{where}: give either tasks, or init and increment, not both")
    if tasks is not None:
        if tasks > num_classes:
            raise InputError(f"{where}: tasks={tasks} is more than the {num_classes} classes; lower it")
        small, larger = divmod(num_classes, tasks)
        return [small + 1] * larger + [small] * (tasks - larger)
    if increment is None:
        raise InputError(
            f"{where}: give tasks=NUMBER, or increment=CLASSES (with init=CLASSES for a larger first task)"
        )
    first = increment if init is None else init
    if first > num_classes:
        what = "increment" if init is None else "init"
        raise InputError(f"{where}: {what}={first} is more than the {num_classes} classes; lower it")
    full, rest = divmod(num_classes - first, increment)
    return [first] + [increment] * full + ([rest] if rest else [])


def class_order(order: str | tuple[int, ...], seed: int, num_classes: int, where: str) -> Ints:
    """(C,) data set's class ids in the order in which they are learned; a list may leave classes out."""
    if order == "natural":
        return np.arange(num_classes)
    if order == "seeded":
        return class_permutation(seed, num_classes)
    ids = np.asarray(order, dtype=np.int64)
    if len(ids) == 0:
        raise InputError(f"{where}: order is an empty list; give class ids from 0 to {num_classes - 1}")
    outside = ids[(ids < 0) | (ids >= num_classes)]
    if len(outside):
        raise InputError(f"{where}: order holds class {outside[0]}, but the ids are 0 to {num_classes - 1}")
    values, counts = np.unique(ids, return_counts=True)
    if counts.max() > 1:
        raise InputError(f"{where}: order holds class {values[counts.argmax()]} {counts.max()} times; once is right")
    return ids
