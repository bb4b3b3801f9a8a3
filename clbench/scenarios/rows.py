"""What builders share: labels at a level, choosing rows, dealing them to tasks, test groups of single classes.

Shapes: N rows of the store, C classes, n rows chosen.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clbench.data.classes import LabelTable
from clbench.errors import InputError
from clbench.scenarios.draws import row_keys
from clbench.scenarios.model import Group

__all__ = [
    "Ints",
    "Pool",
    "Subset",
    "choose_rows",
    "class_groups",
    "cut",
    "first_of_each",
    "first_positions",
    "labels_at",
    "only_tasks",
    "require_rows",
    "tensor",
]

Ints = npt.NDArray[np.int64]


class Subset(Protocol):
    """Parameters that a builder has if its training rows may be capped and validation rows kept out."""

    @property
    def per_class(self) -> int | None: ...
    @property
    def val_share(self) -> float: ...
    @property
    def subset_seed(self) -> int: ...


def labels_at(table: LabelTable, level: int | None, where: str) -> tuple[Ints, list[str]]:
    """Labels (N,) at a label level, counted from 0 inside it, -1 where a row has none; and the level's class names."""
    levels, parents = table.classes.level.numpy(), table.classes.parent.numpy()
    finest = table.classes.num_levels - 1
    level = finest if level is None else level
    if level > finest:
        raise InputError(f"{where}: label_level={level} does not exist; the levels are 0 (coarsest) to {finest}")
    up = np.arange(len(levels))
    for _ in range(finest):
        up = np.where((levels[up] > level) & (parents[up] >= 0), parents[up], up)
    ids = np.flatnonzero(levels == level)
    inside = np.full(len(levels), -1, dtype=np.int64)
    inside[ids] = np.arange(len(ids))
    return inside[up][table.labels.numpy()], [table.classes.names[i] for i in ids]


class Pool(NamedTuple):
    train: Ints
    val: Ints


def choose_rows(targets: Ints, rows: Ints, params: Subset, names: Sequence[str], where: str) -> Pool:
    """Cap the training `rows` per class and carve the validation rows out, both by the row's own random key.

    A class keeps n = min(its rows, per_class), of which floor(n * val_share + 1/2), but at least one, are
    for validation.
    """
    counts = np.bincount(targets[rows], minlength=len(names))
    require_rows(counts, names, "training", where)
    if params.per_class is None and params.val_share == 0:
        return Pool(rows, rows[:0])
    kept = counts if params.per_class is None else np.minimum(counts, params.per_class)
    num_val = np.zeros_like(kept)
    if params.val_share > 0:
        num_val = np.maximum(np.floor(kept * params.val_share + 0.5), 1).astype(np.int64)
        worst = int((num_val - kept).argmax())
        if num_val[worst] >= kept[worst]:
            raise InputError(
                f"{where}: val_share={params.val_share} leaves no training rows of class {names[worst]!r}, which has "
                f"{kept[worst]}; lower val_share or raise per_class"
            )
    keys = row_keys(params.subset_seed, "subset", len(targets))
    rows = rows[np.lexsort((keys[rows], targets[rows]))]  # class by class, in random order inside
    target = targets[rows]
    rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[target]
    is_train = rank < (kept - num_val)[target]
    is_val = ~is_train & (rank < kept[target])
    return Pool(np.sort(rows[is_train]), np.sort(rows[is_val]))


def first_of_each(targets: Ints, rows: Ints, keys: npt.NDArray[np.float64], count: int) -> Ints:
    """The `count` rows of each class with the smallest keys, fewer where there are fewer, class by class."""
    rows = rows[np.lexsort((keys[rows], targets[rows]))]
    first = np.flatnonzero(np.diff(targets[rows], prepend=-1))
    rank = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))
    kept: Ints = rows[rank < count]
    return kept


def require_rows(counts: Ints, names: Sequence[str], what: str, where: str) -> None:
    empty = [names[i] for i in np.flatnonzero(counts == 0).tolist()]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        raise InputError(
            f"{where}: no {what} rows of class {shown}; add some, or leave the class out (order=ID,ID,... where a "
            f"scenario has that)"
        )


def cut(rows: Ints, task: Ints, num_tasks: int) -> list[Ints]:
    """Deal rows to their tasks; their order inside a task stays."""
    ends = np.cumsum(np.bincount(task, minlength=num_tasks))
    return np.split(rows[np.argsort(task, kind="stable")], ends[:-1])


def first_positions(targets: Ints, num_classes: int) -> Ints:
    """(C,) position of the first sample of each class in a stream of targets; its length for a class without any."""
    found = np.full(num_classes, len(targets), np.int64)
    found[targets[::-1]] = np.arange(len(targets))[::-1]  # of several positions the last one assigned, the first, stays
    return found


def class_groups(
    rows: Ints, targets: Ints, classes: Ints, home: Ints, names: Sequence[str], where: str, *, level: int = 0
) -> tuple[Group, ...]:
    """One test group per class, for scenarios in which a class counts from its first sample on.

    rows, targets: (n,) test rows and their class ids.  classes: ids of this level, ascending: what answers may come
    from.  home: (C,) the only task that trains a class, or -1.  names: of all C classes.
    """
    counts = np.bincount(targets, minlength=len(names))
    require_rows(counts[classes], [names[i] for i in classes.tolist()], "test", where)
    ends = np.cumsum(counts)
    ordered = rows[np.argsort(targets, kind="stable")]
    answers = tensor(classes)
    return tuple(
        Group(
            name=unique_name(names, index),
            rows=tensor(ordered[ends[index] - counts[index] : ends[index]]),
            targets=torch.full((int(counts[index]),), index),
            classes=answers,
            task=None if home[index] < 0 else int(home[index]),
            level=level,
        )
        for index in classes.tolist()
    )


def only_tasks(tasks: Sequence[Ints], num_classes: int) -> Ints:
    """(C,) the only task with samples of a class, -1 where there are several. tasks: targets of each, (n,)."""
    home = np.full(num_classes, -1, np.int64)
    times = np.zeros(num_classes, np.int64)
    for index, targets in enumerate(tasks):
        present = np.unique(targets)
        home[present] = index
        times[present] += 1
    home[times > 1] = -1
    return home


def unique_name(names: Sequence[str], index: int) -> str:
    """A class's name, with its id where another class has the same."""
    return names[index] if names.count(names[index]) == 1 else f"{names[index]} ({index})"


def tensor(values: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
