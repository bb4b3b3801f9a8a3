"""Image folders: `train/<class>/*`, `test/<class>/*`, or `<class>/*` without a split of its own."""

import os
from pathlib import Path

import numpy as np

from clbench.data.classes import TEST, TRAIN
from clbench.data.sources import Decoded, Source
from clbench.data.sources.images import Canvas
from clbench.errors import InputError

__all__ = ["count", "find", "images_below", "read"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
VALIDATION = ("val", "valid", "validation")


def images_below(folder: Path) -> list[Path]:
    """All image files below a folder, hidden ones left out, sorted by their path."""
    out = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        out += [Path(place, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    return sorted(out)


def split_folders(root: Path) -> dict[str, int]:
    """Folder name -> split; empty if the folder has no split. Validation images are test rows where there is no test
    folder, else training rows."""
    there = {child.name for child in root.iterdir() if child.is_dir()}
    if "train" not in there:
        return {}
    splits = {"train": TRAIN} | ({"test": TEST} if "test" in there else {})
    validation = TRAIN if "test" in there else TEST
    return splits | {name: validation for name in VALIDATION if name in there}


def find(path: Path) -> Source | None:
    if not path.is_dir():
        return None
    splits = split_folders(path)
    files = images_below(path)
    depth = 3 if splits else 2  # [split/]class/image
    files = [file for file in files if len(file.relative_to(path).parts) >= depth]
    if splits:
        files = [file for file in files if file.relative_to(path).parts[0] in splits]
    return Source("folder", path, tuple(files)) if files else None


def count(source: Source) -> tuple[int, int] | None:
    splits = split_folders(source.root)
    if not splits:
        return None
    rows = [0, 0]
    for file in source.files:
        rows[splits[file.relative_to(source.root).parts[0]]] += 1
    return rows[TRAIN], rows[TEST]


def read(source: Source, size: int | None) -> Decoded:
    splits = split_folders(source.root)
    parts = [file.relative_to(source.root).parts for file in source.files]
    if splits and TEST not in {splits[part[0]] for part in parts}:
        raise InputError(f"{source.root} has training images but none below test/<class>/: add them")
    classes = [part[1 if splits else 0] for part in parts]
    names = sorted(set(classes))
    ids = {name: index for index, name in enumerate(names)}
    canvas = Canvas(len(source.files), size)
    canvas.put(0, source.files, lambda index: str(source.files[index]))
    return Decoded(
        images=canvas.finish(),
        labels=np.array([ids[name] for name in classes], np.int64),
        split=np.array([splits[part[0]] for part in parts], np.uint8) if splits else None,
        names=tuple(names),
    )
