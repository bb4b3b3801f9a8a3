"""Tiny ImageNet as published by Stanford: train/<wnid>/images/*.JPEG, and val/images/*.JPEG with val_annotations.txt.
The validation images are the test rows (the published test images have no labels)."""

from pathlib import Path

import numpy as np

from clbench.data.classes import TEST, TRAIN
from clbench.data.sources import Decoded, Source
from clbench.data.sources.folder import images_below
from clbench.data.sources.images import Canvas
from clbench.errors import InputError

__all__ = ["count", "find", "read"]

LISTS = ("wnids.txt", "words.txt", "val/val_annotations.txt")


def find(path: Path) -> Source | None:
    if not (path / LISTS[0]).is_file() or not (path / "train").is_dir():
        return None
    missing = [name for name in LISTS if not (path / name).is_file()]
    if missing:
        raise InputError(
            f"{', '.join(missing)} missing from {path}, which holds the rest of Tiny ImageNet: unpack it again"
        )
    images = images_below(path / "train") + images_below(path / "val")
    return Source("tiny_imagenet", path, tuple(sorted([*(path / name for name in LISTS), *images])))


def pictures(source: Source) -> list[tuple[Path, int]]:
    """Image files with their split."""
    parts = {"train": TRAIN, "val": TEST}
    return [(f, parts[f.relative_to(source.root).parts[0]]) for f in source.files if f.suffix.lower() != ".txt"]


def count(source: Source) -> tuple[int, int] | None:
    splits = [split for _, split in pictures(source)]
    return splits.count(TRAIN), splits.count(TEST)


def read(source: Source, size: int | None) -> Decoded:
    wnids = sorted((source.root / LISTS[0]).read_text(encoding="utf-8").split())
    words = dict(
        line.split("\t", 1) for line in (source.root / LISTS[1]).read_text(encoding="utf-8").splitlines() if line
    )
    notes = (source.root / LISTS[2]).read_text(encoding="utf-8").splitlines()
    of_image = dict(line.split("\t")[:2] for line in notes if line)
    ids = {wnid: index for index, wnid in enumerate(wnids)}
    found = pictures(source)
    labels = []
    for file, split in found:
        wnid = file.relative_to(source.root).parts[1] if split == TRAIN else of_image.get(file.name, "")
        if wnid not in ids:
            raise InputError(f"{file} has no class that {LISTS[0]} lists: unpack Tiny ImageNet again")
        labels.append(ids[wnid])
    canvas = Canvas(len(found), size)
    canvas.put(0, [file for file, _ in found], lambda index: str(found[index][0]))
    return Decoded(
        images=canvas.finish(),
        labels=np.array(labels, np.int64),
        split=np.array([split for _, split in found], np.uint8),
        names=tuple(words.get(wnid, wnid) for wnid in wnids),
    )
