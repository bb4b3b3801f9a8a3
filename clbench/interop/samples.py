"""A store and a scenario from lists of samples: the import, whatever framework they come from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clbench.data.classes import TEST, TRAIN, ClassTable
from clbench.data.loading import measure, pixel_digests
from clbench.data.store import ImageStore
from clbench.errors import InputError
from clbench.interop.rows import data_fingerprint
from clbench.scenarios.model import Group, Scenario, SettingName, StreamDefaults, Task

__all__ = ["Samples", "scenario_from_samples"]

Ints = NDArray[np.int64]


class Samples(NamedTuple):
    """One experience as arrays, in its order.

    images: (n, C, H, W) uint8. targets: (n,) int64. task_label: of all its samples.
    rows: (n,) int64, what makes two samples the same one; None if every sample is one of its own.
    answers: targets that an answer may come from, for a test experience; None for what follows from the setting.
    """

    images: NDArray[np.uint8]
    targets: Ints
    task_label: int
    rows: Ints | None
    name: str = ""
    answers: tuple[int, ...] | None = None


def scenario_from_samples(
    train: Sequence[Samples],
    test: Sequence[Samples],
    val: Sequence[Samples] | None = None,
    *,
    name: str,
    setting: SettingName | None = None,
    online: bool = False,
    class_names: Sequence[str] | None = None,
) -> tuple[ImageStore, Scenario]:
    """One task per training experience, one group per test experience; val: one per training experience.

    Rows are in canonical order, so that images which another source also has get the same rows. Samples with the same
    `rows`, image and target are one row, shown several times. If that makes every test sample a training sample, the
    scenario is a recall test. Class ids follow ascending targets. A class is seen from the start of its task on; if
    online and several tasks train it (blurry boundaries), from its first sample on.

    setting: None takes `task` if task labels differ, `domain` if all training experiences hold the same classes, else
    `class`. A group belongs to the training experience of its task label (`task`); else to that of its number, where
    there are as many; else to the only one that trains its classes, or to none.

    Raises InputError for what cannot be a scenario.
    """
    where = f"import {name!r}"
    check(train, test, val, where)
    shown = np.unique(np.concatenate([part.targets for part in (*train, *(val or ()))]))
    for index, part in enumerate(test):
        if len(unknown := np.setdiff1d(part.targets, shown)):
            raise InputError(f"{where}: test experience {index} asks for class {unknown[0]}, which is never trained")
    if class_names is not None and len(class_names) <= shown[-1]:
        raise InputError(f"{where}: {len(class_names)} class names, but a target is {shown[-1]}; give one per target")
    names = tuple(f"class {i}" if class_names is None else class_names[i] for i in shown.tolist())
    setting = setting or setting_of(train)

    parts = [*train, *(val or ()), *test]
    num_shown = len(parts) - len(test)
    store, rows, recall = make_store(parts, num_shown, shown, names, name, where)
    targets = [torch.from_numpy(np.searchsorted(shown, part.targets)) for part in parts]
    num_tasks, num_classes = len(train), len(names)
    tasks, known, start = [], torch.zeros(num_classes, dtype=torch.bool), 0
    first_seen = torch.zeros(num_classes, dtype=torch.int64)
    for index, part in enumerate(train):
        held = (rows[num_tasks + index], targets[num_tasks + index]) if val is not None else None
        used = torch.cat([targets[index], *([] if held is None else [held[1]])]).unique()
        new = used[~known[used]]
        known[new] = True
        first_seen[new] = start
        tasks.append(Task(rows[index], targets[index], new, val=held, name=part.name or f"task {index}"))
        start += len(part.targets)
    if online:
        ids, first = np.unique(torch.cat(targets[:num_tasks]).numpy(), return_index=True)
        spread = sum(torch.isin(torch.from_numpy(ids), part).long() for part in targets[:num_tasks]) > 1
        first_seen[torch.from_numpy(ids)[spread]] = torch.from_numpy(first)[spread]
    group_names = [part.name for part in test]
    if len({*group_names, ""}) <= len(test):  # a name is missing or stands twice
        group_names = [f"test {index}" for index in range(len(test))]
    groups = []
    for index, part in enumerate(test):
        classes = torch.arange(num_classes)
        if part.answers is not None:
            classes = torch.from_numpy(np.searchsorted(shown, np.intersect1d(part.answers, shown)))
        elif setting == "task":
            own = [i for i, other in enumerate(train) if other.task_label == part.task_label]
            if not own:
                raise InputError(
                    f"{where}: test experience {index} has task label {part.task_label}, no training one has"
                )
            classes = torch.cat([targets[i] for i in own]).unique()
        at = num_shown + index
        task = task_of(index, part, train, len(test), setting)
        groups.append(Group(group_names[index], rows[at], targets[at], classes, task=task))
    return store, Scenario(
        id=name if "@" in name else f"{name}@1",
        datasets=(name,),
        setting=setting,
        tasks=tuple(tasks),
        groups=tuple(groups),
        classes=store.classes,
        first_seen=first_seen,
        online=online,
        defaults=StreamDefaults(),
        recall=recall,
    )


def check(train: Sequence[Samples], test: Sequence[Samples], val: Sequence[Samples] | None, where: str) -> None:
    """Raise InputError for experiences that cannot be put together."""
    if not any(len(part.targets) for part in train):
        raise InputError(f"{where}: there is nothing to train on; give at least one training experience with samples")
    if not test:
        raise InputError(f"{where}: there is nothing to test on; give at least one test experience")
    if val is not None and len(val) != len(train):
        raise InputError(
            f"{where}: {len(val)} validation experiences for {len(train)} training ones; give one for each"
        )
    shape = next(part.images.shape[1:] for part in train if len(part.targets))
    for kind, parts in (("training", train), ("validation", val or ()), ("test", test)):
        for index, part in enumerate(parts):
            if len(part.targets) and part.images.shape[1:] != shape:
                this, first = ("x".join(map(str, size)) for size in (part.images.shape[1:], shape))
                raise InputError(
                    f"{where}: images of {kind} experience {index} are {this}, those before them {first}; "
                    f"bring all to one size first"
                )
            if kind == "test" and not len(part.targets):
                raise InputError(f"{where}: test experience {index} has no samples; leave it out")
            if len(part.targets) and part.targets.min() < 0:
                raise InputError(f"{where}: {kind} experience {index} has a target below 0; class ids start at 0")


def setting_of(train: Sequence[Samples]) -> SettingName:
    """See `scenario_from_samples`."""
    if len({part.task_label for part in train if len(part.targets)}) > 1:
        return "task"
    same = len(train) > 1 and all(np.array_equal(np.unique(p.targets), np.unique(train[0].targets)) for p in train)
    return "domain" if same else "class"


def task_of(index: int, part: Samples, train: Sequence[Samples], num_test: int, setting: SettingName) -> int | None:
    """The training experience that a test experience belongs to, see `scenario_from_samples`."""
    if setting == "task":
        return next(i for i, other in enumerate(train) if other.task_label == part.task_label)
    if num_test == len(train):
        return index
    holding = [i for i, other in enumerate(train) if np.isin(other.targets, part.targets).any()]
    return holding[0] if len(holding) == 1 else None


def make_store(
    parts: Sequence[Samples], num_shown: int, shown: Ints, names: tuple[str, ...], name: str, where: str
) -> tuple[ImageStore, list[torch.Tensor], bool]:
    """The store of all samples, the store rows of each part, and whether the tests recall what is trained on. The first
    `num_shown` parts are training and validation."""
    filled = [part for part in parts if len(part.targets)]
    images = np.concatenate([part.images for part in filled])
    labels = np.searchsorted(shown, np.concatenate([part.targets for part in filled]))
    marked = [part.rows for part in filled if part.rows is not None]
    identity = np.concatenate(marked) if len(marked) == len(filled) else np.arange(len(labels))
    in_test = np.concatenate([np.full(len(part.targets), i >= num_shown) for i, part in enumerate(parts)])
    digests = pixel_digests(images)

    same = np.column_stack([identity.astype(np.uint64), labels.astype(np.uint64), digests])
    _, sample = np.unique(same, axis=0, return_inverse=True)  # samples with the same number are one
    sample = sample.reshape(-1)
    recall = bool(np.isin(sample[in_test], sample[~in_test]).all())
    split = np.full(len(labels), TRAIN, np.uint8) if recall else np.where(in_test, TEST, TRAIN).astype(np.uint8)
    _, first, entry = np.unique(sample * 2 + split, return_index=True, return_inverse=True)
    order = np.lexsort((identity[first], labels[first], *digests[first].T[::-1], split[first]))
    row_of = np.empty(len(order), np.int64)
    row_of[order] = np.arange(len(order))
    rows = torch.from_numpy(row_of[entry.reshape(-1)])

    chosen = first[order]
    images, labels, split = images[chosen], labels[chosen].astype(np.int64), split[chosen]
    mean, std = measure(images[split == TRAIN])
    store = ImageStore(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        split=torch.from_numpy(split),
        classes=ClassTable(names, torch.zeros(len(names), dtype=torch.int64), torch.full((len(names),), -1)),
        name=name,
        fingerprint=data_fingerprint(images, labels, split),
        mean=tuple(mean),
        std=tuple(std),
        images_of=(name,),
    )
    return store, list(rows.split([len(part.targets) for part in parts])), recall
