"""What a scenario's images decide: rehearsal, duplicates, leaks. Pure: tables and digests in, numbers out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clbench.scenarios.model import Scenario

__all__ = ["statistics"]

Ints = NDArray[np.int64]


def statistics(scenario: Scenario, digests: NDArray[np.uint64]) -> dict[str, Any]:
    """Sizes and coincidences. digests: (N, 4) of every row's pixels, through all data sets in their order
    (`clbench.data.loading.pixel_digests`). Two rows hold the same image if all their pixels are the same. What is shown
    is a row as its domain shows it: a row in two domains, or in one and as it is stored, is two rows with two images.

    train, val, classes: per task, rows, validation rows and classes that it introduces. test: per group, rows.
    repeats: per task, rows that the stream has shown before (rehearsal, or tasks that share rows).
    duplicates: training rows less different images among them; a row that is repeated counts once.
    label_conflicts: training images that are shown as two classes of one label level.
    test_duplicates: test rows less different images among them. shared_test: test rows that several groups ask for.
    leaks: test rows whose image is trained on. leaks_within_class: those that are trained as the class asked for;
    leaks_between_classes: those that are trained as another class of its level. A row can be both.
    val_leaks: validation rows whose image is trained on.
    """
    show = Shown(digests)
    trains = [show(task.rows, task.domain) for task in scenario.tasks]
    tests = [show(group.rows, group.domain) for group in scenario.groups]
    rows, images = joined(trains)
    test_rows, test_images = joined(tests)
    _, val_images = joined([show(task.val[0], None) for task in scenario.tasks if task.val is not None])
    targets = np.concatenate([task.targets.numpy() for task in scenario.tasks])
    asked = np.concatenate([group.targets.numpy() for group in scenario.groups])

    # what an image is trained as: number of classes of a level, and whether a class is among them
    level, num_levels = scenario.classes.level.numpy(), scenario.classes.num_levels
    meaning = np.unique(images * len(level) + targets)
    place, count = np.unique(meaning // len(level) * num_levels + level[meaning % len(level)], return_counts=True)
    as_asked = np.isin(test_images * len(level) + asked, meaning)
    wanted = test_images * num_levels + level[asked]
    at = np.searchsorted(place, wanted).clip(max=len(place) - 1)
    num_meanings = np.where(place[at] == wanted, count[at], 0)
    return {
        "train": [len(task.rows) for task in scenario.tasks],
        "val": [0 if task.val is None else len(task.val[0]) for task in scenario.tasks],
        "test": [len(group.rows) for group in scenario.groups],
        "classes": [len(task.classes) for task in scenario.tasks],
        "repeats": repeats(rows, [len(task.rows) for task in scenario.tasks]),
        "duplicates": copies(rows, images),
        "label_conflicts": len(np.unique(place[count > 1] // num_levels)),
        "test_duplicates": copies(test_rows, test_images),
        "shared_test": shared([part for part, _ in tests]),
        "leaks": distinct(test_rows[np.isin(test_images, images)]),
        "leaks_within_class": distinct(test_rows[as_asked]),
        "leaks_between_classes": distinct(test_rows[num_meanings > as_asked]),
        "val_leaks": int(np.isin(val_images, images).sum()),
    }


class Shown:
    """Numbers for what is shown, (n,) by row and (n,) by image: equal exactly if rows or images, and domains, are."""

    def __init__(self, digests: NDArray[np.uint64]) -> None:
        whole = np.ascontiguousarray(digests).view([("", np.uint64)] * 4).reshape(-1)
        self.image = np.unique(whole, return_inverse=True)[1].reshape(-1)

    def __call__(self, rows: Tensor, domain: Tensor | None) -> tuple[Ints, Ints]:
        through = np.int64(0) if domain is None else (domain.numpy() + 1) * len(self.image)
        return rows.numpy() + through, self.image[rows.numpy()] + through


def joined(parts: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *(rows for rows, _ in parts)]), np.concatenate([empty, *(part for _, part in parts)])


def distinct(values: Ints) -> int:
    return len(np.unique(values))


def copies(rows: Ints, images: Ints) -> int:
    return distinct(rows) - distinct(images)


def repeats(rows: Ints, sizes: Sequence[int]) -> list[int]:
    """Per task, how many of its rows stood earlier in the stream."""
    again = np.ones(len(rows), np.int64)
    again[np.unique(rows, return_index=True)[1]] = 0
    return [int(part.sum()) for part in np.split(again, np.cumsum(sizes)[:-1])]


def shared(groups: Sequence[Ints]) -> int:
    """Rows that stand in more than one group."""
    _, count = np.unique(np.concatenate([np.unique(rows) for rows in groups]), return_counts=True)
    return int((count > 1).sum())
