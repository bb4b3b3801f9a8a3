"""Label tables for tests: the layouts of the real data sets (no images needed), and random ones."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from clbench.data.catalogue import dataset
from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable

DIGITS = (142, 146, 142, 146, 145, 146, 145, 143, 139, 144), (36, 36, 35, 37, 36, 36, 36, 36, 35, 36)
COARSE = {"grocery-store": 43}  # coarse classes that the data bring along, and the catalogue does not know
MNIST = (
    (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
)


def make_table(
    name: str, labels: Sequence[int], test_labels: Sequence[int], num_classes: int, num_coarse: int = 0
) -> LabelTable:
    """Train rows, then test rows. With coarse classes, class i's parent is coarse class i mod num_coarse."""
    everything = np.concatenate([np.asarray(labels), np.asarray(test_labels)])
    split = np.repeat([TRAIN, TEST], [len(labels), len(test_labels)])
    names = [f"class {i}" for i in range(num_classes)] + [f"coarse {i}" for i in range(num_coarse)]
    level = torch.zeros(len(names), dtype=torch.int64)
    parent = torch.full((len(names),), -1)
    if num_coarse:
        level[:num_classes] = 1
        parent[:num_classes] = num_classes + torch.arange(num_classes) % num_coarse
    return LabelTable(
        dataset=name,
        labels=torch.from_numpy(everything.astype(np.int64)),
        split=torch.from_numpy(split.astype(np.uint8)),
        classes=ClassTable(tuple(names), level, parent),
        fingerprint="0" * 64,
    )


def balanced(name: str, train: int, test: int, num_classes: int, num_coarse: int = 0) -> LabelTable:
    """Labels 0, 1, ..., C - 1, 0, 1, ... in each split."""
    return make_table(name, np.arange(train) % num_classes, np.arange(test) % num_classes, num_classes, num_coarse)


def real_layout(name: str) -> LabelTable:
    """The sizes of a real data set, with labels in a simple order."""
    if name in ("mnist", "digits"):
        train_counts, test_counts = MNIST if name == "mnist" else DIGITS
        return make_table(name, np.repeat(np.arange(10), train_counts), np.repeat(np.arange(10), test_counts), 10)
    known = dataset(name)
    table = balanced(name, *known.rows, known.num_classes, len(known.coarse) or COARSE.get(name, 0))
    if name == "pacs":
        groups = torch.arange(len(table.labels)) // known.num_classes % 4
        table = table._replace(groups=groups, group_names=("photo", "art_painting", "cartoon", "sketch"))
    return table


@st.composite
def tables(draw: st.DrawFn) -> LabelTable:
    """A random data set: up to 9 classes of 1 to 12 training and 1 to 4 test rows, mixed, some with coarse classes."""
    num_classes = draw(st.integers(1, 9))
    counts = [draw(st.lists(st.integers(1, top), min_size=num_classes, max_size=num_classes)) for top in (12, 4)]
    shuffler = np.random.default_rng(draw(st.integers(0, 99)))
    train, test = (shuffler.permutation(np.repeat(np.arange(num_classes), count)) for count in counts)
    return make_table("random", train, test, num_classes, draw(st.integers(0, num_classes)))
