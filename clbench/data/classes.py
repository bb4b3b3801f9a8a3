"""Names and hierarchy of classes, and the label table that scenario builders work from."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["TEST", "TRAIN", "ClassTable", "LabelTable"]

TRAIN, TEST = 0, 1  # values of `split`


@dataclass(frozen=True)
class ClassTable:
    """Classes with ids `0..C-1`. Coarse classes have ids of their own, after the finest ones.

    names: C strings.
    level: (C,) int64; 0 is the coarsest level, the finest has the highest number.
    parent: (C,) int64 class id one level up, -1 for a root.
    """

    names: tuple[str, ...]
    level: Tensor
    parent: Tensor

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_levels(self) -> int:
        return int(self.level.max()) + 1 if len(self.names) else 0


class LabelTable(NamedTuple):
    """All that a scenario builder may know of a data set: no pixels.

    labels: (N,) int64 finest class id of every row.
    split: (N,) uint8, TRAIN or TEST.
    groups: (N,) int64 index into `group_names`, the source domains (PACS), or None.
    fingerprint: sha256 of images, labels and row order, hex.
    """

    dataset: str
    labels: Tensor
    split: Tensor
    classes: ClassTable
    fingerprint: str
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
