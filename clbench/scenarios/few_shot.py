"""Continual few-shot learning: a stream of small support sets, then one target set over all that was seen (CFSL).

Antoniou et al. 2020; Kowadlo et al., PLoS ONE 2024, arXiv 2209.07863 (`other_benchmarks` card, A): NSS support sets of
n classes with k shots each, new classes after every CCI sets, so NSS * n / CCI classes in all. In the instance test
every exemplar is a class of its own, several of one category, and the query is the very image that was shown, with a
part of its pixels changed by noise or covered. Episode and corruption are drawn by the order seed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios.draws import frozen_random, row_keys
from clbench.scenarios.model import Domains, Group, Scenario, StreamDefaults, Task
from clbench.scenarios.params import param
from clbench.scenarios.pixels import num_pixels
from clbench.scenarios.rows import Ints, labels_at, tensor

__all__ = ["Params", "build"]

DEFAULTS = StreamDefaults(batch_size=5, epochs=5)
COVER = 127  # grey value of an occlusion


@dataclass(frozen=True)
class Params:
    support_sets: int = param(10, "NSS: number of support sets", low=1)
    class_change: int = param(1, "CCI: support sets before new classes come", low=1)
    classes: int = param(5, "n: classes of a support set", low=1)
    shots: int = param(1, "k: images of each class in a support set", low=1)
    targets: int | None = param(None, "test images of each class; without it all there are", low=1)
    instance: bool = param(False, "every image is a class of its own, and the query is that image")
    per_category: int = param(5, "instance: images of one category", low=1)
    corruption: Literal["none", "noise", "occlusion"] = param("none", "instance: how queries are changed")
    level: float = param(0.3, "instance: part of the pixels that are changed or covered", low=0, high=1)
    setting: Literal["class", "task"] = param(
        "class", "answers from all classes, or from those of the query's support set (task)"
    )
    row_order: Literal["canonical", "source"] = param(
        "canonical", "rows numbered by their content (the same from every source), or as the data's source has them"
    )
    size: int | None = param(None, "side in pixels that all images are resized to, once; for data of many sizes", low=1)
    pixels: int | None = param(None, "height x width of the images, for data sets outside the catalogue", low=1)


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "few-shot@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """One task per support set; one test group per block of classes. Class ids are in order of appearance.

    A class's shots are new images in every support set that it comes in (the same image in the instance test). Raises
    InputError if the data have too few classes or images.
    """
    if len(tables) != 1:
        raise InputError(f"{id}: few-shot episodes take one data set, not {len(tables)}")
    table = tables[0]
    where = f"{id} on {table.dataset}"
    if params.support_sets % params.class_change:
        raise InputError(
            f"{where}: support_sets={params.support_sets} is no multiple of class_change={params.class_change}"
        )
    if params.setting == "task" and params.class_change > 1:
        raise InputError(
            f"{where}: setting=task needs class_change=1, so that a class belongs to one support set, not "
            f"class_change={params.class_change}"
        )
    if params.corruption != "none" and not params.instance:
        raise InputError(f"{where}: corruption={params.corruption} is for the instance test; add instance=true")
    num_classes = params.support_sets // params.class_change * params.classes
    labels, names = labels_at(table, None, where)
    split = table.split.numpy()
    keys = row_keys(seed, "shots", len(labels))
    by_class = rows_by_class(labels, split == TRAIN, len(names), keys)
    if params.instance:
        shown, categories = exemplars(by_class, num_classes, seed, params, where)
        names = [f"{names[c]} #{i}" for c, i in categories]
        tests = [rows[:1] for rows in shown]
    else:
        chosen, shown = episode(by_class, num_classes, names, seed, params, where)
        tested = rows_by_class(labels, split == TEST, len(by_class), keys)
        found = [tested[c] for c in chosen]
        short = [names[c] for c, rows in zip(chosen, found, strict=True) if len(rows) < (params.targets or 1)]
        if short:
            raise InputError(
                f"{where}: class {short[0]!r} has fewer than {params.targets or 1} test rows; lower targets"
            )
        tests = [np.sort(rows[: params.targets]) for rows in found]
        names = [names[c] for c in chosen]

    tasks = []
    for index in range(params.support_sets):
        block = range(
            index // params.class_change * params.classes, (index // params.class_change + 1) * params.classes
        )
        rows = [shown[c][index % params.class_change * params.shots :][: params.shots] for c in block]
        targets = np.repeat(np.array(block), params.shots)
        new = np.array(block) if index % params.class_change == 0 else targets[:0]
        tasks.append(Task(tensor(np.concatenate(rows)), tensor(targets), tensor(new), name=f"support set {index}"))
    domains = corruption(table, num_classes, seed, params, where) if params.instance else None
    groups = []
    for block_index in range(params.support_sets // params.class_change):
        block = range(block_index * params.classes, (block_index + 1) * params.classes)
        targets = np.concatenate([np.full(len(tests[c]), c) for c in block])
        groups.append(
            Group(
                name=f"classes {block[0]} to {block[-1]}",
                rows=tensor(np.concatenate([tests[c] for c in block])),
                targets=tensor(targets),
                classes=tensor(np.array(block)) if params.setting == "task" else torch.arange(num_classes),
                task=block_index * params.class_change,
                domain=tensor(targets) if domains is not None else None,
            )
        )
    starts = np.cumsum([0, *(len(task.rows) for task in tasks)])
    first = starts[np.arange(num_classes) // params.classes * params.class_change]
    return Scenario(
        id=id,
        datasets=(table.dataset,),
        setting=params.setting,
        tasks=tuple(tasks),
        groups=tuple(groups),
        classes=ClassTable(tuple(names), torch.zeros(num_classes, dtype=torch.int64), torch.full((num_classes,), -1)),
        first_seen=tensor(first),
        defaults=defaults,
        domains=domains,
        recall=params.instance,
        params=asdict(params),
    )


def rows_by_class(
    labels: Ints, inside: npt.NDArray[np.bool_], num_classes: int, keys: npt.NDArray[np.float64]
) -> list[Ints]:
    """Rows of each class in random order."""
    rows = np.flatnonzero(inside & (labels >= 0))
    rows = rows[np.lexsort((keys[rows], labels[rows]))]
    return np.split(rows, np.cumsum(np.bincount(labels[rows], minlength=num_classes))[:-1])


def episode(
    by_class: Sequence[Ints], num_classes: int, names: Sequence[str], seed: int, params: Params, where: str
) -> tuple[list[int], list[Ints]]:
    """Classes in order of appearance, and the rows shown of each, support set by support set."""
    if num_classes > len(by_class):
        raise InputError(
            f"{where}: support_sets * classes / class_change = {num_classes} classes, but the data have {len(by_class)}"
        )
    chosen = [int(c) for c in frozen_random(seed, "classes").permutation(len(by_class))[:num_classes]]
    needed = params.class_change * params.shots
    for c in chosen:
        if len(by_class[c]) < needed:
            raise InputError(
                f"{where}: class {names[c]!r} has {len(by_class[c])} training rows, but class_change * shots = "
                f"{needed} are shown; lower one of them"
            )
    return chosen, [by_class[c][:needed] for c in chosen]


def exemplars(
    by_class: Sequence[Ints], num_classes: int, seed: int, params: Params, where: str
) -> tuple[list[Ints], list[tuple[int, int]]]:
    """The row shown as each class, as often as it is shown; and its category, with a number inside it."""
    rich = [c for c, rows in enumerate(by_class) if len(rows) >= params.per_category]
    needed = -(-num_classes // params.per_category)
    if needed > len(rich):
        raise InputError(
            f"{where}: {num_classes} images with {params.per_category} per category need {needed} categories of that "
            f"size, but the data have {len(rich)}; lower support_sets or classes, or change per_category"
        )
    categories = [rich[i] for i in frozen_random(seed, "classes").permutation(len(rich))[:needed]]
    pairs = [(c, i) for c in categories for i in range(params.per_category)]
    times = params.class_change * params.shots
    # images of one category are spread over the episode
    order = frozen_random(seed, "exemplars").permutation(len(pairs))[:num_classes]
    chosen = [pairs[i] for i in order]
    return [np.repeat(by_class[c][i], times) for c, i in chosen], chosen


def corruption(table: LabelTable, num_classes: int, seed: int, params: Params, where: str) -> Domains | None:
    """An overlay per query: noise on a part of its pixels, or a square that covers that part of the image."""
    if params.corruption == "none":
        return None
    size = num_pixels(table, params.pixels if params.size is None else params.size**2, where)
    side = round(size**0.5)
    overlay = np.full((num_classes, size), -1, np.int64)
    if params.corruption == "noise":
        order = np.argsort(frozen_random(seed, "changed pixels").random_sample(overlay.shape), axis=1, kind="stable")
        changed = order[:, : round(params.level * size)]
        values = frozen_random(seed, "noise").randint(0, 256, size=overlay.shape)
        np.put_along_axis(overlay, changed, values[:, : changed.shape[1]], axis=1)
        return Domains("overlay", tensor(overlay))
    if side * side != size:
        raise InputError(f"{where}: occlusion needs square images, and these have {size} pixels; use noise")
    edge = round(side * params.level**0.5)
    corner = frozen_random(seed, "corner").randint(0, side - edge + 1, size=(num_classes, 2, 1))
    covered = (np.arange(side) >= corner) & (np.arange(side) < corner + edge)  # (C, 2, side) rows, and columns
    overlay[(covered[:, 0, :, None] & covered[:, 1, None, :]).reshape(num_classes, size)] = COVER
    return Domains("overlay", tensor(overlay))
