"""Si-Blurry: disjoint classes belong to one task, blurry classes leak into others, and how many of each a task has is
drawn at random. i-Blurry is its deterministic relative: equal shares.

Moon et al., ICCV 2023 (arXiv 2308.09303); the draw order is that of the official sampler (KHU-AGI/Si-Blurry at
c90d6d7), so that the same seed on rows in the data set's own order gives the same indices (`si_blurry` card, 1).
Everything is a lookup and a sort: milliseconds at 100,000 samples.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios.model import Scenario, StreamDefaults, Task
from clbench.scenarios.params import param
from clbench.scenarios.rows import Ints, choose_rows, class_groups, cut, first_positions, labels_at, only_tasks, tensor

__all__ = ["Assignment", "Params", "assign", "build", "class_split"]

DEFAULTS = StreamDefaults(batch_size=64, updates_per_batch=3, eval_samples=1000)


@dataclass(frozen=True)
class Params:
    tasks: int = param(5, "number of tasks; some may stay empty", low=1)
    disjoint: int = param(50, "N: percentage of the classes that belong to one task only", low=0, high=100)
    blurry: int = param(10, "m: percentage of the blurry classes' samples that change their task", low=0, high=100)
    mode: Literal["stochastic", "deterministic"] = param(
        "stochastic", "cuts drawn at random (Si-Blurry), or equal shares (i-Blurry)"
    )
    row_order: Literal["canonical", "source"] = param(
        "source", "rows numbered as the data's source has them, as the official stream needs it, or by their content"
    )
    per_class: int | None = param(None, "at most so many training rows per class, validation included", low=1)
    val_share: float = param(0.0, "share of each class's training rows kept out for validation", low=0, below=1)
    subset_seed: int = param(0, "draws the rows of per_class and val_share, whatever the order seed", low=0)
    size: int | None = param(None, "side in pixels that images are resized to; without it as they are", low=1)


class Split(NamedTuple):
    """Classes of every task: lists of (c,) int64."""

    disjoint: list[Tensor]
    blurry: list[Tensor]


class Assignment(NamedTuple):
    """disjoint, blurry: classes per task, as in `Split`. streams: per task (n,) int64 positions in the label list."""

    disjoint: list[Tensor]
    blurry: list[Tensor]
    streams: list[Tensor]


def class_split(num_classes: int, tasks: int, disjoint: int, stochastic: bool, rng: torch.Generator) -> Split:
    """Steps 1 to 3: a permutation of the classes, cut into tasks. Does not look at labels.

    Counts are rounded down to multiples of `tasks`; the last classes of the permutation may be left out.
    """
    num_disjoint = tasks * (num_classes * disjoint // 100 // tasks)
    num_blurry = tasks * ((num_classes - num_disjoint) // tasks)
    order = torch.randperm(num_classes, generator=rng)
    pools = order[:num_disjoint], order[num_disjoint : num_disjoint + num_blurry]
    disjoint_classes, blurry_classes = (
        pieces(pool, cuts(len(pool), tasks, rng) if stochastic else even_cuts(len(pool), tasks)) for pool in pools
    )
    return Split(disjoint_classes, blurry_classes)


def assign(labels: Tensor, num_classes: int, params: Params, seed: int) -> Assignment:
    """The official assignment of samples to tasks. labels: (M,) int64 in the data set's order, -1 for samples to leave
    out. All draws come from one torch generator in the order of the card; it is part of the definition.
    """
    rng = torch.Generator().manual_seed(seed)
    tasks, stochastic = params.tasks, params.mode == "stochastic"
    split = class_split(num_classes, tasks, params.disjoint, stochastic, rng)
    own = [samples_of(labels, num_classes, classes) for classes in (split.disjoint, split.blurry)]
    disjoint, blurry = own
    if stochastic:
        blurry = exchange(blurry, sum(map(len, blurry)) * params.blurry // 100, rng)
    else:
        blurry = exchange_evenly(blurry, params.blurry, rng)
    streams = []
    for fixed, leaked in zip(disjoint, blurry, strict=True):
        together = torch.cat([fixed, leaked])
        streams.append(together[torch.randperm(len(together), generator=rng)])
    return Assignment(split.disjoint, split.blurry, streams)


def exchange(blurry: list[Tensor], budget: int, rng: torch.Generator) -> list[Tensor]:
    """Step 5: tasks give their first samples into a common pool, as many as cuts of the budget say, and get as many
    back; where a task has too few to give, the trailing tasks get fewer. Without a budget nothing is drawn."""
    if budget == 0:
        return blurry
    quotas = torch.tensor(cuts(budget, len(blurry), rng)).diff().tolist()
    pool = torch.cat([samples[:quota] for samples, quota in zip(blurry, quotas, strict=True)])
    pool = pool[torch.randperm(len(pool), generator=rng)]
    start, out = 0, []
    for samples, quota in zip(blurry, quotas, strict=True):
        out.append(torch.cat([samples[quota:], pool[start : start + quota]]))
        start += quota
    return out


def exchange_evenly(blurry: list[Tensor], percent: int, rng: torch.Generator) -> list[Tensor]:
    """i-Blurry: every task gives the same share and gets the same number back; the remainder of the pool is dropped."""
    quotas = [len(samples) * percent // 100 for samples in blurry]
    pool = torch.cat([samples[:quota] for samples, quota in zip(blurry, quotas, strict=True)])
    pool = pool[torch.randperm(len(pool), generator=rng)]
    share = len(pool) // len(blurry)
    return [
        torch.cat([samples[quota:], pool[index * share : (index + 1) * share]])
        for index, (samples, quota) in enumerate(zip(blurry, quotas, strict=True))
    ]


def cuts(total: int, parts: int, rng: torch.Generator) -> list[int]:
    """0, `parts - 1` sorted draws from 0 to total - 1, total; nothing is drawn if there is nothing to cut."""
    if total == 0:
        return [0] * (parts + 1)
    return [0, *torch.randint(0, total, (parts - 1,), generator=rng).sort().values.tolist(), total]


def even_cuts(total: int, parts: int) -> list[int]:
    return [index * (total // parts) for index in range(parts + 1)]


def pieces(pool: Tensor, edges: Sequence[int]) -> list[Tensor]:
    return [pool[start:end] for start, end in pairwise(edges)]


def samples_of(labels: Tensor, num_classes: int, classes: Sequence[Tensor]) -> list[Tensor]:
    """Per task, (n,) positions of the samples of its classes, ascending."""
    owner = torch.full((num_classes + 1,), len(classes))  # the last entry serves label -1
    for task, own in enumerate(classes):
        owner[own] = task
    task_of = owner[labels]
    order = task_of.argsort(stable=True)
    sizes = torch.bincount(task_of, minlength=len(classes) + 1).tolist()
    return list(order.split(sizes)[:-1])


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "si-blurry@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """The online stream: each sample once, in order. `seed` is the order seed (the papers take 1 to 5).

    Classes keep the data set's order; those that rounding leaves out are not part of the scenario. A class counts from
    its first sample on, one that has leaked in included, so every class is a test group of its own; it belongs to a
    task if no other task has samples of it. Raises InputError if a parameter cannot be met.
    """
    if len(tables) != 1:
        raise InputError(f"{id}: a blurry stream takes one data set, not {len(tables)}")
    table = tables[0]
    where = f"{id} on {table.dataset}"
    labels, names = labels_at(table, None, where)
    if not 0 <= seed < 2**63:
        raise InputError(f"{where}: order seed {seed} is out of range: torch takes 0 to {2**63 - 1}")
    if params.tasks > len(names):
        raise InputError(f"{where}: tasks={params.tasks} is more than the {len(names)} classes; lower it")
    split = table.split.numpy()
    pool = choose_rows(labels, np.flatnonzero((split == TRAIN) & (labels >= 0)), params, names, where)
    assigned = assign(torch.from_numpy(labels[pool.train]), len(names), params, seed)
    rows = [pool.train[stream.numpy()] for stream in assigned.streams]
    kept = np.unique(labels[np.concatenate(rows)])
    id_of = np.full(len(names), -1, np.int64)
    id_of[kept] = np.arange(len(kept))
    targets = [id_of[labels[r]] for r in rows]
    first_seen = first_positions(np.concatenate(targets), len(kept))
    starts = np.cumsum([0, *map(len, rows)])
    introduced = np.searchsorted(starts, first_seen, side="right") - 1
    # Validation rows stay with the class's own task; if all its samples there have leaked, it may be seen first later.
    val_rows = pool.val[np.isin(labels[pool.val], kept)]
    val_task = np.maximum(owners(assigned, len(names))[kept], introduced)
    val = cut(val_rows, val_task[id_of[labels[val_rows]]], params.tasks)
    tasks = tuple(
        Task(
            rows=tensor(r),
            targets=tensor(t),
            classes=tensor(np.flatnonzero(introduced == index)),
            val=(tensor(val[index]), tensor(id_of[labels[val[index]]])) if params.val_share > 0 else None,
            name=f"task {index}",
        )
        for index, (r, t) in enumerate(zip(rows, targets, strict=True))
    )
    class_names = tuple(names[i] for i in kept.tolist())
    home = only_tasks(targets, len(kept))
    test = np.flatnonzero((split == TEST) & np.isin(labels, kept))
    return Scenario(
        id=id,
        datasets=(table.dataset,),
        setting="class",
        tasks=tasks,
        groups=class_groups(test, id_of[labels[test]], np.arange(len(kept)), home, class_names, where),
        classes=ClassTable(
            class_names, torch.zeros(len(kept), dtype=torch.int64), torch.full((len(kept),), -1, dtype=torch.int64)
        ),
        first_seen=tensor(first_seen),
        online=True,
        defaults=defaults,
        params=asdict(params),
    )


def owners(assigned: Assignment, num_classes: int) -> Ints:
    """(C,) the task that owns a class, disjoint or blurry; -1 for those that rounding leaves out."""
    owner = np.full(num_classes, -1, np.int64)
    for task, pair in enumerate(zip(assigned.disjoint, assigned.blurry, strict=True)):
        owner[torch.cat(pair).numpy()] = task
    return owner
