"""Well-known data sets as their makers publish them, split as papers split them: see `lists` and `class_folders`."""

from pathlib import Path

import numpy as np

from clbench.data.classes import TEST, TRAIN
from clbench.data.sources import Decoded, Source
from clbench.data.sources.images import Canvas
from clbench.data.sources.published.class_folders import FOLDERS
from clbench.data.sources.published.layout import Layout, Listing
from clbench.data.sources.published.lists import LISTS
from clbench.errors import InputError

__all__ = ["LAYOUTS", "count", "find", "read"]

LAYOUTS: tuple[Layout, ...] = (*LISTS, *FOLDERS)


def recognise(path: Path) -> tuple[Layout, Path] | None:
    """The layout at `path`, or in the folder that was unpacked there, and where it begins. Raises InputError if a part
    of it is missing."""
    if not path.is_dir():
        return None
    for layout in LAYOUTS:
        for root in (path / inside for inside in layout.inside):
            if not layout.is_at(root):
                continue
            missing = [mark for mark in layout.marks if not (root / mark).exists()]
            if missing:
                raise InputError(
                    f"{', '.join(missing)} missing from {root}, which holds other parts of {layout.name}: add them"
                )
            return layout, root
    return None


def find(path: Path) -> Source | None:
    found = recognise(path)
    if found is None:
        return None
    layout, root = found
    listed = layout.read(root)
    lists = [root / mark for mark in layout.marks if (root / mark).is_file()]
    files = tuple(sorted({*lists, *listed.lists, *listed.files}))
    return Source("published", root, files) if listed.files else None


def listing(source: Source) -> Listing:
    found = recognise(source.root)
    if found is None:
        raise InputError(f"{source.root} has changed while it was read; run it again")
    return found[0].read(found[1])


def count(source: Source) -> tuple[int, int] | None:
    split = listing(source).split
    return split.count(TRAIN), split.count(TEST)


def read(source: Source, size: int | None) -> Decoded:
    listed = listing(source)
    canvas = Canvas(len(listed.files), size)
    canvas.put(0, listed.files, lambda index: str(listed.files[index]))
    return Decoded(
        images=canvas.finish(),
        labels=np.array(listed.labels, np.int64),
        split=np.array(listed.split, np.uint8),
        names=listed.names,
    )
