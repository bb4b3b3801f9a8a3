"""Domain-incremental scenarios: the same classes in every task, seen in another way.

Domains are those of the data (PACS: photo, art painting, cartoon, sketch), pixel permutations, or rotations
(`stability_gap` card, section 2: permuted MNIST in 5 tasks, rotated MNIST in 20 steps of 9 degrees).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.errors import InputError, unknown_name
from clbench.scenarios.draws import frozen_random, row_keys
from clbench.scenarios.model import Domains, Group, Scenario, StreamDefaults, Task
from clbench.scenarios.params import param
from clbench.scenarios.pixels import num_pixels
from clbench.scenarios.rows import Ints, choose_rows, labels_at, require_rows, tensor

__all__ = ["Params", "build"]

DEFAULTS = StreamDefaults()
TASKS = 5  # where the number of tasks is not given


@dataclass(frozen=True)
class Params:
    kind: Literal["source", "permuted", "rotated"] = param(
        "permuted", "source: the data's own domains; permuted: pixels; rotated: the whole image"
    )
    tasks: int | None = param(None, "permuted and rotated: number of tasks (5)", low=1, replaces=("angles",))
    first_plain: bool = param(True, "permuted: the first task shows the images as they are")
    degrees: int = param(9, "rotated: angle between two tasks, anticlockwise", low=-359, high=359, replaces=("angles",))
    angles: tuple[int, ...] | None = param(
        None, "rotated: the angle of each task, in place of tasks and degrees", replaces=("tasks", "degrees")
    )
    order: Literal["natural", "seeded"] | tuple[str, ...] = param(
        "natural", "source: domains as in the data, in an order drawn from the order seed, or a list of their names"
    )
    online: bool = param(False, "one pass over the rows as listed, in place of reshuffled epochs")
    row_order: Literal["canonical", "source"] = param(
        "canonical", "rows numbered by their content (the same from every source), or as the data's source has them"
    )
    size: int | None = param(None, "side in pixels that all images are resized to, once; for data of many sizes", low=1)
    pixels: int | None = param(None, "height x width of the images, for data sets outside the catalogue", low=1)
    per_class: int | None = param(None, "at most so many training rows per class (and domain)", low=1)
    val_share: float = param(0.0, "source: share of training rows kept out for validation", low=0, below=1)
    subset_seed: int = param(0, "draws the rows of per_class and val_share, whatever the order seed", low=0)


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "domain-incremental@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """One task and one test group per domain; all classes are there from the start. `seed` is the order seed: it draws
    permutations, the order of domains, and that of rows where online. Raises InputError if a parameter cannot be met.
    """
    if len(tables) != 1:
        raise InputError(f"{id}: a domain-incremental scenario takes one data set, not {len(tables)}")
    table = tables[0]
    where = f"{id} on {table.dataset}"
    labels, names = labels_at(table, None, where)
    require_fitting(params, where)
    split = table.split.numpy()
    members = domains_of(table, seed, params, where)
    changed = params.kind != "source"
    keys = row_keys(seed, "row order", len(labels))
    tasks, groups = [], []
    for index, (name, inside) in enumerate(members):
        place = f"{where}, {name}"
        pool = choose_rows(labels, np.flatnonzero((split == TRAIN) & inside & (labels >= 0)), params, names, place)
        train = pool.train[np.argsort(keys[pool.train], kind="stable")] if params.online else pool.train
        test = np.flatnonzero((split == TEST) & inside & (labels >= 0))
        require_rows(np.bincount(labels[test], minlength=len(names)), names, "test", place)
        tasks.append(
            Task(
                rows=tensor(train),
                targets=tensor(labels[train]),
                classes=torch.arange(len(names) * (index == 0)),
                domain=torch.full((len(train),), index) if changed else None,
                val=(tensor(pool.val), tensor(labels[pool.val])) if params.val_share > 0 else None,
                name=name,
            )
        )
        groups.append(
            Group(
                name=name,
                rows=tensor(test),
                targets=tensor(labels[test]),
                classes=torch.arange(len(names)),
                task=index,
                domain=torch.full((len(test),), index) if changed else None,
            )
        )
    return Scenario(
        id=id,
        datasets=(table.dataset,),
        setting="domain",
        tasks=tuple(tasks),
        groups=tuple(groups),
        classes=ClassTable(tuple(names), torch.zeros(len(names), dtype=torch.int64), torch.full((len(names),), -1)),
        first_seen=torch.zeros(len(names), dtype=torch.int64),
        online=params.online,
        defaults=defaults,
        domains=changes(table, seed, params, where),
        params=asdict(params),
    )


def require_fitting(params: Params, where: str) -> None:
    """Raise InputError for a parameter that belongs to another kind of domains and would do nothing."""
    if params.kind == "source" and params.tasks is not None:
        raise InputError(f"{where}: kind=source has a task per domain; give tasks=none, and choose domains with order=")
    if params.kind != "source" and params.order != "natural":
        raise InputError(f"{where}: order is one of the data's own domains; leave it out, or give kind=source")
    if params.kind != "rotated" and params.angles is not None:
        raise InputError(f"{where}: angles are for kind=rotated, not for kind={params.kind}; leave them out")
    if params.angles is not None and params.tasks is not None:
        raise InputError(f"{where}: give either tasks (with degrees) or angles, not both")
    if params.angles == ():
        raise InputError(f"{where}: angles is an empty list; give one angle per task")
    if params.kind != "source" and params.val_share > 0:
        raise InputError(f"{where}: validation rows can't be kept per {params.kind} domain; leave val_share out")


def num_tasks(params: Params) -> int:
    """Tasks where images are changed."""
    return len(params.angles) if params.angles is not None else TASKS if params.tasks is None else params.tasks


def domains_of(table: LabelTable, seed: int, params: Params, where: str) -> list[tuple[str, np.ndarray]]:
    """Name of each task, and (N,) whether a row belongs to it."""
    if params.kind != "source":
        return [(f"task {index}", np.ones(len(table.labels), np.bool_)) for index in range(num_tasks(params))]
    known = list(table.group_names)
    if table.groups is None or not known:
        raise InputError(f"{where}: these data have no domains of their own; use kind=permuted or kind=rotated")
    if params.order == "natural":
        names = known
    elif params.order == "seeded":
        names = [known[i] for i in frozen_random(seed, "domain order").permutation(len(known))]
    else:
        names = list(params.order)
    for name in names:
        if name not in known:
            raise unknown_name(f"domain of {where}", name, known)
    if len(set(names)) < len(names) or not names:
        raise InputError(f"{where}: order must name each domain once at most, and one at least")
    groups = table.groups.numpy()
    found = [(name, groups == known.index(name)) for name in names]
    for name, inside in found:
        if not inside.any():
            raise InputError(f"{where}: domain {name!r} has no rows; complete the data, or leave it out with order=")
    return found


def changes(table: LabelTable, seed: int, params: Params, where: str) -> Domains | None:
    """How the images of each task are changed; None for the data's own domains."""
    if params.kind == "source":
        return None
    number = num_tasks(params)
    if params.kind == "rotated":
        angles = params.angles if params.angles is not None else [i * params.degrees for i in range(number)]
        return Domains("rotation", (torch.tensor(angles) % 360)[:, None])
    size = num_pixels(table, params.pixels if params.size is None else params.size**2, where)
    found: list[Ints] = [frozen_random(seed, "pixels", index).permutation(size) for index in range(number)]
    if params.first_plain:
        found[0] = np.arange(size)
    return Domains("permutation", tensor(np.stack(found)))
