"""Where images come from: one module per kind of source, each with the same three functions.

    find(path) -> Source | None     is this a source of my kind, and which files belong to it?
    count(source) -> rows | None    (training, test) rows without decoding, if that is cheap
    read(source, size) -> Decoded   everything, in the source's own order

A source that is recognised but cannot be used (a shard is missing, a file is damaged) raises InputError with the file.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "Decoded", "Source", "detect", "module"]

# in the order they are tried; `digits` has no path
KINDS = ("parquet", "cifar", "idx", "tiny_imagenet", "published", "folder")


@dataclass(frozen=True)
class Source:
    """Files of one data set. files: all that pixels and labels depend on, sorted. root: where they are, for messages;
    they are named relative to it."""

    kind: str
    root: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Decoded:
    """A data set in memory, in its source's order.

    images: (N, 1 or 3, H, W) uint8. labels: (N,) int64 index into names.
    split: (N,) uint8 TRAIN or TEST; None if the source has no split of its own.
    coarse: (N,) int64 index into coarse_names, or None. groups: (N,) int64 index into group_names, or None.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    split: NDArray[np.uint8] | None
    names: tuple[str, ...]
    coarse: NDArray[np.int64] | None = None
    coarse_names: tuple[str, ...] = ()
    groups: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()


def module(kind: str) -> ModuleType:
    """The module of a kind of source."""
    return import_module(f"{__name__}.{kind}")


def detect(path: Path) -> Source | None:
    """What lies at `path`: the first kind that recognises it, or None."""
    if not path.exists():
        return None
    for kind in KINDS:
        source: Source | None = module(kind).find(path)
        if source is not None:
            return source
    return None
