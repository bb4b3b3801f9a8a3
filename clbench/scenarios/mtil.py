"""Multi-domain task-incremental learning: one data set per task, each image answered with classes of its data set.

Defined in ZSCL (ICCV 2023); orders, templates and class texts from its official code at b96e714 (`mtil` card). All test
sets are evaluated after every task, those of future tasks too: Transfer is what a model can do before it has learned.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.errors import InputError, unknown_name
from clbench.scenarios.draws import frozen_random
from clbench.scenarios.model import Group, Scenario, StreamDefaults, Task
from clbench.scenarios.params import param
from clbench.scenarios.prompts import class_texts, templates
from clbench.scenarios.rows import choose_rows, labels_at, require_rows, tensor

__all__ = ["ORDER_II", "Params", "build"]

DEFAULTS = StreamDefaults(batch_size=64)
ORDER_II = (9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2)  # the paper's second order, into its first


@dataclass(frozen=True)
class Params:
    order: Literal["I", "II", "seeded"] | tuple[str, ...] = param(
        "I", "order of the data sets: as listed, the paper's second one, from the order seed, or a list of their names"
    )
    size: int | None = param(None, "side in pixels that all images are resized to, once", low=1)
    per_class: int | None = param(None, "at most so many training rows per class, validation included", low=1)
    test_per_class: int | None = param(None, "at most so many test rows per class", low=1)
    val_share: float = param(0.0, "share of each class's training rows kept out for validation", low=0, below=1)
    subset_seed: int = param(0, "draws the rows of per_class and val_share, whatever the order seed", low=0)


@dataclass(frozen=True)
class TestSubset:
    """Caps test rows as `per_class` caps training rows."""

    per_class: int | None
    subset_seed: int
    val_share: float = 0.0


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "mtil@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """One task and one test group per data set, in the order that `order` says. Rows count through all data sets as
    they are listed; class ids follow the tasks, class names are what prompts say. Raises InputError if a parameter
    cannot be met.
    """
    if len(tables) < 2:
        raise InputError(f"{id}: a multi-domain stream takes at least two data sets, separated by commas")
    order = order_of(params.order, seed, [table.dataset for table in tables], id)
    offsets = np.cumsum([0, *(len(table.labels) for table in tables)])
    tasks, groups, prompts, first_class, start = [], [], {}, 0, 0
    names: list[str] = []
    first_seen: list[int] = []
    for index, number in enumerate(order):
        table = tables[number]
        where = f"{id} on {table.dataset}"
        labels, own_names = labels_at(table, None, where)
        split = table.split.numpy()
        pool = choose_rows(labels, np.flatnonzero((split == TRAIN) & (labels >= 0)), params, own_names, where)
        test = np.flatnonzero((split == TEST) & (labels >= 0))
        require_rows(np.bincount(labels[test], minlength=len(own_names)), own_names, "test", where)
        subset = TestSubset(params.test_per_class, params.subset_seed)
        test = choose_rows(labels, test, subset, own_names, where).train
        classes = torch.arange(first_class, first_class + len(own_names))
        rows, val, asked = (tensor(part + offsets[number]) for part in (pool.train, pool.val, test))
        targets, val_targets, right = (tensor(labels[part] + first_class) for part in (pool.train, pool.val, test))
        has_val = params.val_share > 0
        tasks.append(Task(rows, targets, classes, val=(val, val_targets) if has_val else None, name=table.dataset))
        groups.append(Group(table.dataset, asked, right, classes, task=index))
        names += class_texts(table.dataset, own_names, where)
        prompts[index] = templates(table.dataset)
        first_seen += [start] * len(own_names)
        first_class += len(own_names)
        start += len(rows)
    return Scenario(
        id=id,
        datasets=tuple(table.dataset for table in tables),
        setting="task",
        tasks=tuple(tasks),
        groups=tuple(groups),
        classes=ClassTable(tuple(names), torch.zeros(len(names), dtype=torch.int64), torch.full((len(names),), -1)),
        first_seen=torch.tensor(first_seen),
        defaults=defaults,
        prompts=prompts,
        params=asdict(params),
    )


def order_of(order: str | tuple[str, ...], seed: int, names: Sequence[str], where: str) -> list[int]:
    """Which data set each task takes, as numbers into `names`. A list may leave some out."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where}: two data sets are called {name}; import one of them under another name")
    if order == "I":
        return list(range(len(names)))
    if order == "seeded":
        return [int(i) for i in frozen_random(seed, "data set order").permutation(len(names))]
    if order == "II":
        if len(names) != len(ORDER_II):
            raise InputError(f"{where}: order=II is one of the {len(ORDER_II)} data sets of MTIL, not of {len(names)}")
        return list(ORDER_II)
    for name in order:
        if name not in names:
            raise unknown_name(f"data set of {where}", name, names)
    if not order or len(set(order)) < len(order):
        raise InputError(f"{where}: order must name each data set once at most, and one at least")
    return [names.index(name) for name in order]
