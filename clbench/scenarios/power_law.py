"""Power-law rehearsal: the environment itself shows earlier tasks again, the less the longer ago they were learned.

arXiv 2401.10393 (v1: permuted MNIST; v3: class-incremental). No official code is known; the parametrisation is that of
the `power_law` card, section 1, where it is marked as ours. Rehearsal is a property of the stream: the learner sees one
online stream in which rehearsed rows stand again, and keeps no memory. Lag d of a task: tasks since it was learned.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios.class_incremental import class_order, task_sizes
from clbench.scenarios.draws import frozen_random
from clbench.scenarios.model import Domains, Group, Scenario, StreamDefaults, Task
from clbench.scenarios.params import param
from clbench.scenarios.pixels import num_pixels
from clbench.scenarios.rows import Ints, choose_rows, cut, first_positions, labels_at, require_rows, tensor

__all__ = ["Params", "build", "natural_counts", "rehearsal_counts", "round_counts", "shape_weights"]

DEFAULTS = StreamDefaults(batch_size=128)
Weighting = Literal["power", "exponential", "uniform", "random", "none"]


@dataclass(frozen=True)
class Params:
    kind: Literal["permuted", "classes"] = param(
        "permuted", "what tasks are: pixel permutations of all classes, or disjoint blocks of classes"
    )
    tasks: int = param(10, "number of tasks", low=1)
    first_plain: bool = param(False, "permuted: the first task shows the images as they are")
    order: Literal["natural", "seeded"] | tuple[int, ...] = param(
        "natural", "classes: as in the data set, numpy's permutation of the order seed, or a list of class ids"
    )
    shape: Literal["power", "exponential", "uniform", "random", "none"] = param(
        "power", "how shares fall with the lag; uniform, random and none are controls"
    )
    exponent: float = param(1.0, "power: weights d^-exponent", low=0)
    rate: float = param(1.0, "exponential: weights exp(-rate d)", low=0)
    budget: Literal["fixed", "natural"] = param(
        "fixed", "rehearsed rows per task: a fixed total, or floor(n (1 + d)^-exponent) of each earlier task"
    )
    rehearsed: float = param(0.25, "fixed budget, as a share of the new task's rows", low=0, high=100)
    variant: Literal["after", "mixed"] = param("after", "rehearse behind the new task, or shuffled into it")
    refresh: bool = param(False, "rehearsal counts as meeting a task again, so that its lag starts anew")
    epochs: int = param(1, "passes over the new task's rows, each in another order, before the rehearsal", low=1)
    pixels: int | None = param(None, "height x width of the images, for data sets outside the catalogue", low=1)
    per_class: int | None = param(None, "at most so many training rows per class, validation included", low=1)
    val_share: float = param(0.0, "share of each class's training rows kept out for validation", low=0, below=1)
    subset_seed: int = param(0, "draws the rows of per_class and val_share, whatever the order seed", low=0)


# -- how much of what -------------------------------------------------------------------------------------------------
def shape_weights(lags: np.ndarray, shape: Weighting, exponent: float = 1.0, rate: float = 1.0) -> np.ndarray:
    """Weights of earlier tasks at the given lags (k,), each at least 1; they sum to 1.

    `power` d^-exponent, `exponential` exp(-rate d), `uniform` and `random` all the same.
    """
    lags = np.asarray(lags, np.float64)
    if shape == "power":
        raw = lags**-exponent
    elif shape == "exponential":
        raw = np.exp(-rate * (lags - lags.min(initial=np.inf)))  # the factor cancels, and large lags do not underflow
    else:
        raw = np.ones_like(lags)
    return np.asarray(raw / raw.sum())


def round_counts(weights: np.ndarray, total: int) -> Ints:
    """Whole numbers near `total * weights` that sum to `total`: largest remainders; ties go to the smaller index.

    >>> round_counts(np.array([6, 3, 2]) / 11, 7).tolist()
    [4, 2, 1]
    """
    ideal = np.asarray(weights, np.float64) * total
    counts = np.floor(ideal + 1e-9).astype(np.int64)
    # remainders that are equal but for rounding errors are ties
    remainder = np.round(ideal - counts, 9)
    order = np.argsort(-remainder, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def natural_counts(num_new: int, lags: np.ndarray, exponent: float) -> Ints:
    """floor(n (1 + d)^-a) rows of each earlier task: the new one has lag 0 and weight 1."""
    exact = num_new * (1.0 + np.asarray(lags, np.float64)) ** -exponent
    return np.floor(exact + 1e-9).astype(np.int64)


def rehearsal_counts(lags: Ints, num_new: int, params: Params, rng: np.random.RandomState) -> Ints:
    """(k,) rows to rehearse of each earlier task, for lags (k,); `rng` is used by the shape `random` alone."""
    if params.shape == "none" or len(lags) == 0:
        return np.zeros(len(lags), np.int64)
    if params.budget == "natural":
        return natural_counts(num_new, lags, params.exponent)
    total = round(params.rehearsed * num_new)
    if params.shape == "random":
        return rng.multinomial(total, np.full(len(lags), 1 / len(lags))).astype(np.int64)
    order = np.argsort(lags, kind="stable")  # ties in rounding go to the smaller lag
    counts = np.zeros(len(lags), np.int64)
    counts[order] = round_counts(shape_weights(lags[order], params.shape, params.exponent, params.rate), total)
    return counts


# -- the stream -------------------------------------------------------------------------------------------------------
class Pieces(NamedTuple):
    """What tasks are made of: per task its training rows (n,), validation rows, and test rows; and targets (N,)."""

    train: list[Ints]
    val: list[Ints]
    test: list[Ints]
    targets: Ints
    names: tuple[str, ...]


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "power-law@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """The online stream: each task's rows (`epochs` times), then rows of earlier tasks, or both shuffled together.

    Rehearsed rows are drawn from the whole training set of a task, without replacement as long as there are enough.
    `permuted` tasks share all classes (setting `domain`, one test group per permutation); `classes` is
    class-incremental. Raises InputError if a parameter cannot be met.
    """
    if len(tables) != 1:
        raise InputError(f"{id}: a rehearsal stream takes one data set, not {len(tables)}")
    table = tables[0]
    where = f"{id} on {table.dataset}"
    check(params, where)
    permuted = params.kind == "permuted"
    pieces = (whole if permuted else blocks)(table, seed, params, where)
    tasks = []
    met = np.zeros(params.tasks, np.int64)  # when a task was last met
    for index, own in enumerate(pieces.train):
        lags = index - met[:index]
        drawn = rehearsal_counts(lags, len(own), params, frozen_random(seed, "rehearsal counts", index))
        source, rows = lay_out(pieces.train, index, drawn, seed, params, where)
        if params.refresh:
            met[:index][drawn > 0] = index
        met[index] = index
        targets = pieces.targets[rows]
        new = np.unique(targets[source == index]) if not permuted else np.arange(len(pieces.names) * (index == 0))
        val = pieces.val[index]
        tasks.append(
            Task(
                rows=tensor(rows),
                targets=tensor(targets),
                classes=tensor(new),
                domain=tensor(source) if permuted else None,
                val=(tensor(val), tensor(pieces.targets[val])) if params.val_share > 0 and not permuted else None,
                name=f"task {index}",
            )
        )
    groups = tuple(
        Group(
            name=f"task {index}",
            rows=tensor(rows),
            targets=tensor(pieces.targets[rows]),
            classes=torch.arange(len(pieces.names)),
            task=index,
            domain=torch.full((len(rows),), index) if permuted else None,
        )
        for index, rows in enumerate(pieces.test)
    )
    stream = np.concatenate([task.targets.numpy() for task in tasks])
    starts = np.cumsum([0, *(len(task.rows) for task in tasks)])
    seen = first_positions(stream, len(pieces.names))
    return Scenario(
        id=id,
        datasets=(table.dataset,),
        setting="domain" if permuted else "class",
        tasks=tuple(tasks),
        groups=groups,
        classes=ClassTable(
            pieces.names,
            torch.zeros(len(pieces.names), dtype=torch.int64),
            torch.full((len(pieces.names),), -1),
        ),
        first_seen=tensor(starts[np.searchsorted(starts, seen, side="right") - 1]),
        online=True,
        defaults=defaults,
        domains=permutations(table, seed, params, where) if permuted else None,
        params=asdict(params),
    )


def check(params: Params, where: str) -> None:
    if params.budget == "natural" and params.shape not in ("power", "none"):
        raise InputError(f"{where}: budget=natural is a power of the lag; shape={params.shape} needs budget=fixed")
    if params.kind == "permuted" and params.order != "natural":
        raise InputError(f"{where}: permuted tasks share all classes; leave order out")
    if params.kind == "permuted" and params.val_share > 0:
        raise InputError(f"{where}: validation rows can't be kept per permutation; use kind=classes or val_share=0")


def whole(table: LabelTable, seed: int, params: Params, where: str) -> Pieces:
    """Every task shows all rows of the data set."""
    labels, names = labels_at(table, None, where)
    split = table.split.numpy()
    train = choose_rows(labels, np.flatnonzero((split == TRAIN) & (labels >= 0)), params, names, where).train
    test = np.flatnonzero((split == TEST) & (labels >= 0))
    require_rows(np.bincount(labels[test], minlength=len(names)), names, "test", where)
    nothing = train[:0]
    return Pieces([train] * params.tasks, [nothing] * params.tasks, [test] * params.tasks, labels, tuple(names))


def blocks(table: LabelTable, seed: int, params: Params, where: str) -> Pieces:
    """Every task has a block of classes, whose ids are their positions in the class order."""
    labels, names = labels_at(table, None, where)
    order = class_order(params.order, seed, len(names), where)
    sizes = task_sizes(len(order), params.tasks, None, None, where)
    position = np.full(len(names) + 1, -1, np.int64)
    position[order] = np.arange(len(order))
    targets, names = position[labels], [names[i] for i in order.tolist()]
    split = table.split.numpy()
    pool = choose_rows(targets, np.flatnonzero((split == TRAIN) & (targets >= 0)), params, names, where)
    test = np.flatnonzero((split == TEST) & (targets >= 0))
    require_rows(np.bincount(targets[test], minlength=len(names)), names, "test", where)
    task_of = np.repeat(np.arange(len(sizes)), sizes)
    train, val, test_rows = (cut(rows, task_of[targets[rows]], len(sizes)) for rows in (pool.train, pool.val, test))
    return Pieces(train, val, test_rows, targets, tuple(names))


def lay_out(
    train: Sequence[Ints], index: int, counts: Ints, seed: int, params: Params, where: str
) -> tuple[Ints, Ints]:
    """(n,) task that each row of the stream's task `index` belongs to, and the rows, in order."""
    own = train[index]
    passes = [frozen_random(seed, "epoch", index, epoch).permutation(own) for epoch in range(params.epochs)]
    again = [draw(train[task], count, seed, index, task) for task, count in enumerate(counts.tolist())]
    new, old = np.concatenate(passes), np.concatenate([own[:0], *again])
    source = np.concatenate([np.full(len(new), index), np.repeat(np.arange(index), counts)])
    rows = np.concatenate([new, old])
    rng = frozen_random(seed, "rehearsal order", index)
    if params.variant == "mixed":
        order = rng.permutation(len(rows))
    else:
        order = np.concatenate([np.arange(len(new)), len(new) + rng.permutation(len(old))])
    return source[order], rows[order]


def draw(rows: Ints, count: int, seed: int, at: int, task: int) -> Ints:
    """`count` of `rows`, none twice before all have come once."""
    rng = frozen_random(seed, "rehearsed rows", at, task)
    whole_passes, rest = divmod(count, len(rows))
    return np.concatenate([*[rows] * whole_passes, rows[distinct(rest, len(rows), rng)]])


def distinct(count: int, below: int, rng: np.random.RandomState) -> Ints:
    """`count` different whole numbers below `below`, in random order. Few of many cost no permutation of all."""
    if 3 * count > below:
        return rng.permutation(below)[:count].astype(np.int64)
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        drawn = np.concatenate([drawn, rng.randint(0, below, size=2 * count)])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]  # each where it came first
    return drawn[:count]


def permutations(table: LabelTable, seed: int, params: Params, where: str) -> Domains:
    """One pixel permutation per task, from the order seed; the first may be the identity."""
    size = num_pixels(table, params.pixels, where)
    found = [frozen_random(seed, "pixels", index).permutation(size) for index in range(params.tasks)]
    if params.first_plain:
        found[0] = np.arange(size)
    return Domains("permutation", torch.from_numpy(np.stack(found).astype(np.int64)))
