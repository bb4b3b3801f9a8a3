"""Hierarchical label expansion: classes first have coarse labels, and split into finer ones as the stream goes.

ICCV 2023 (arXiv 2308.14374); set-ups and counts from the official repository Hyun1A/HLE at 4cfd71b (`hle` card,
sections 1 and 3). Its streams are lists of files that are not published whole: ours have the same counts and are drawn
anew, so results are comparable in distribution only. Every sample comes with the label of one level and counts in the
head of that level alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios.class_incremental import task_sizes
from clbench.scenarios.draws import class_permutation, row_keys
from clbench.scenarios.model import Scenario, StreamDefaults, Task
from clbench.scenarios.params import param
from clbench.scenarios.rows import Ints, choose_rows, class_groups, first_positions, labels_at, only_tasks, tensor
from clbench.scenarios.trees import Tree, find_tree

__all__ = ["Params", "build"]

DEFAULTS = StreamDefaults(batch_size=8, updates_per_batch=24, eval_samples=1000)


@dataclass(frozen=True)
class Params:
    setup: Literal["dual", "single", "multi"] = param(
        "dual", "dual: all images coarse, then the same ones fine; single: each image once; multi: a task per level"
    )
    tree: str | None = param(None, "table of the package, or a .csv file of child,parent; without it the data's own")
    tasks: int = param(6, "dual and single: tasks, the coarse one included", low=2)
    by_parent: bool = param(False, "dual and single: a task for the children of each coarse class, whatever tasks says")
    coarse_level: int = param(0, "dual and single: label level of the first task, 0 is the coarsest", low=0)
    row_order: Literal["canonical", "source"] = param(
        "canonical", "rows numbered by their content (the same from every source), or as the data's source has them"
    )
    per_class: int | None = param(None, "at most so many training rows per finest class", low=1)
    val_share: float = param(0.0, "share of each finest class's training rows kept out for validation", low=0, below=1)
    subset_seed: int = param(0, "draws the rows of per_class and val_share, whatever the order seed", low=0)
    size: int | None = param(None, "side in pixels that images are resized to; without it as they are", low=1)


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "hle@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """The online stream of (image, label at one level). Class ids: the finest classes first, then those of the other
    levels, coarsest first; one test group per class of every level, answered with classes of that level.

    Fine classes are dealt to tasks by the order seed. Raises InputError if a parameter cannot be met or the tree is
    none.
    """
    if len(tables) != 1:
        raise InputError(f"{id}: hierarchical label expansion takes one data set, not {len(tables)}")
    table = tables[0]
    where = f"{id} on {table.dataset}"
    tree = used_levels(find_tree(params.tree, table, where), params, where)
    labels, names = labels_at(table, None, where)
    split = table.split.numpy()
    pool = choose_rows(labels, np.flatnonzero((split == TRAIN) & (labels >= 0)), params, names, where)
    ids, offsets = class_ids(tree), level_offsets(tree)
    keys = row_keys(seed, "row order", len(labels))

    planned = (by_level if params.setup == "multi" else coarse_then_fine)(labels, pool.train, tree, seed, params, where)
    order = [np.argsort(keys[rows], kind="stable") for rows, _ in planned]
    rows = [rows[at] for (rows, _), at in zip(planned, order, strict=True)]
    targets = [ids[level][labels[r]] for r, (_, level) in zip(rows, planned, strict=True)]
    num_classes = int(sum(map(len, tree.names)))
    first_seen = first_positions(np.concatenate(targets), num_classes)
    starts = np.cumsum([0, *map(len, rows)])
    home = only_tasks(targets, num_classes)
    class_names = [name for level in level_order(tree) for name in tree.names[level]]
    test = np.flatnonzero((split == TEST) & (labels >= 0))
    tasks = []
    for index, (r, t) in enumerate(zip(rows, targets, strict=True)):
        new = np.flatnonzero((first_seen >= starts[index]) & (first_seen < starts[index + 1]))
        level = planned[index][1]
        val = pool.val[np.isin(ids[level][labels[pool.val]], np.unique(t))]
        tasks.append(
            Task(
                rows=tensor(r),
                targets=tensor(t),
                classes=tensor(new),
                val=(tensor(val), tensor(ids[level][labels[val]])) if params.val_share > 0 else None,
                name=f"task {index}: level {level}",
            )
        )
    groups = []
    for level in range(tree.num_levels):
        own = np.arange(offsets[level], offsets[level] + len(tree.names[level]))
        found = class_groups(test, ids[level][labels[test]], own, home, class_names, where, level=level)
        groups += [group._replace(name=f"level {level}: {group.name}") for group in found]
    return Scenario(
        id=id,
        datasets=(table.dataset,),
        setting="class",
        tasks=tuple(tasks),
        groups=tuple(groups),
        classes=class_table(tree),
        first_seen=tensor(first_seen),
        online=True,
        defaults=defaults,
        params=asdict(params),
    )


# -- levels and ids ---------------------------------------------------------------------------------------------------
def used_levels(tree: Tree, params: Params, where: str) -> Tree:
    """The levels that labels are shown of: all, or the coarse one of the first task and the finest."""
    if tree.num_levels < 2:
        raise InputError(f"{where}: its tree has one level only; there is nothing to expand")
    if params.setup == "multi":
        return tree
    if params.coarse_level >= tree.num_levels - 1:
        raise InputError(
            f"{where}: coarse_level={params.coarse_level} is not above the finest level; "
            f"give 0 to {tree.num_levels - 2}"
        )
    keep = [params.coarse_level, tree.num_levels - 1]
    return Tree(tuple(tree.names[level] for level in keep), tree.at[keep])


def level_order(tree: Tree) -> list[int]:
    """Levels in the order of their class ids: the finest one first."""
    return [tree.num_levels - 1, *range(tree.num_levels - 1)]


def level_offsets(tree: Tree) -> Ints:
    """(levels,) first class id of each level."""
    out, start = np.zeros(tree.num_levels, np.int64), 0
    for level in level_order(tree):
        out[level] = start
        start += len(tree.names[level])
    return out


def class_ids(tree: Tree) -> Ints:
    """(levels, C) class id of a finest class at every level."""
    return tree.at + level_offsets(tree)[:, None]


def class_table(tree: Tree) -> ClassTable:
    names, levels, parents = [], [], []
    ids = class_ids(tree)
    for level in level_order(tree):
        number = len(tree.names[level])
        names += list(tree.names[level])
        levels += [level] * number
        parent = np.full(number, -1, np.int64)
        if level > 0:
            parent[tree.at[level]] = ids[level - 1]
        parents += parent.tolist()
    return ClassTable(tuple(names), torch.tensor(levels), torch.tensor(parents))


# -- which rows come with which label ---------------------------------------------------------------------------------
def coarse_then_fine(
    labels: Ints, train: Ints, tree: Tree, seed: int, params: Params, where: str
) -> list[tuple[Ints, int]]:
    """Per task, its rows and label level: coarse first, then blocks of fine classes."""
    task_of = fine_tasks(tree, seed, params, where)
    num_tasks = int(task_of.max()) + 1
    fine = train
    coarse = train
    if params.setup == "single":
        rank, size = ranks(labels, train, len(tree.names[-1]), seed)
        share = size // num_tasks  # of every class, so many images come with the coarse label
        if share[labels[train]].min(initial=1) == 0:
            raise InputError(f"{where}: {num_tasks} tasks need as many training rows of every class; lower tasks")
        is_coarse = rank < share[labels[train]]
        coarse, fine = train[is_coarse], train[~is_coarse]
    return [(coarse, 0), *((fine[task_of[labels[fine]] == index], 1) for index in range(1, num_tasks))]


def fine_tasks(tree: Tree, seed: int, params: Params, where: str) -> Ints:
    """(C,) task of each finest class, from 1."""
    num_fine = len(tree.names[-1])
    if params.by_parent:
        order = class_permutation(seed, len(tree.names[0]))
        return np.asarray((1 + np.argsort(order))[tree.at[0]])
    if params.tasks - 1 > num_fine:
        raise InputError(f"{where}: tasks={params.tasks} is more than one and the {num_fine} finest classes; lower it")
    out = np.empty(num_fine, np.int64)
    sizes = task_sizes(num_fine, params.tasks - 1, None, None, where)
    out[class_permutation(seed, num_fine)] = 1 + np.repeat(np.arange(params.tasks - 1), sizes)
    return out


def by_level(labels: Ints, train: Ints, tree: Tree, seed: int, params: Params, where: str) -> list[tuple[Ints, int]]:
    """Per level a task with its share of every finest class's images."""
    rank, size = ranks(labels, train, len(tree.names[-1]), seed)
    if size[labels[train]].min(initial=tree.num_levels) < tree.num_levels:
        raise InputError(f"{where}: {tree.num_levels} levels need as many training rows of every class; give more rows")
    level = rank * tree.num_levels // size[labels[train]]
    return [(train[level == index], index) for index in range(tree.num_levels)]


def ranks(labels: Ints, train: Ints, num_classes: int, seed: int) -> tuple[Ints, Ints]:
    """(n,) random place of each training row inside its class, from 0; and (C,) rows per class."""
    keys = row_keys(seed, "shares", len(labels))
    order = np.lexsort((keys[train], labels[train]))
    size = np.bincount(labels[train], minlength=num_classes)
    rank = np.empty(len(train), np.int64)
    rank[order] = np.arange(len(train)) - (np.cumsum(size) - size)[labels[train][order]]
    return rank, size
