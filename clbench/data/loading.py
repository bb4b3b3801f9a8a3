"""From a name or a path to an ImageStore: find the source, check it, decode it once, open it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clbench.data.cache import Entry, cache_folder, find_imported, inspect, open_entry, write_entry
from clbench.data.catalogue import Dataset, catalogue
from clbench.data.classes import TEST, TRAIN, ClassTable
from clbench.data.finding import Found, Missing, counts, find, search_folders
from clbench.data.sources import Decoded, Source, detect, module
from clbench.data.store import ImageStore
from clbench.errors import InputError, unknown_name

__all__ = ["build", "entry_folder", "load", "load_all", "open_or_build"]

TEST_SHARE = 0.2


def load(
    name_or_path: str | os.PathLike[str],
    *,
    roots: Sequence[str | os.PathLike[str]] = (),
    order: str = "canonical",
    size: int | None = None,
    allow_download: bool = False,
) -> ImageStore:
    """Load a data set by its name in the catalogue or by the path of a folder or file; decode it on the first use.

    roots: data folders searched first; then those of CLBENCH_DATA, what was imported, and the cache's downloads.
    order: `canonical` (see ImageStore), or `source`: training rows, then test rows, each as the source has them.
    size: resize all images to size x size (short side, bicubic, antialiased; then the middle).
    allow_download: get the published files if they are nowhere (needs a network and torchvision).

    A source without a split of its own gets one: per class, rows in canonical order, numpy RandomState(0), a rounded
    20 % for testing.

    Raises InputError if the name is unknown, if the data are nowhere (it says which files belong where), are damaged,
    or are not what they are called; RunFailed if the disk is full or a download fails.
    """
    text = os.fspath(name_or_path)
    if order not in ("canonical", "source"):
        raise unknown_name("row order", order, ["canonical", "source"])
    if size is not None and size < 1:
        raise InputError(f"size must be at least 1 pixel, not {size}")
    if text not in catalogue() and (record := find_imported(text)) is not None:
        return load_imported(text, record, order, size)
    try:
        found = find(text, roots)
    except Missing:
        if (record := find_imported(text)) is not None:
            return load_imported(text, record, order, size)
        if not allow_download or catalogue()[text].download is None:
            raise
        from clbench.data.download import fetch

        fetch(text)
        found = find(text, roots)
    return as_store(found.name, found.entry, open_or_build(found, order, size))


def load_all(
    names: Sequence[str],
    *,
    roots: Sequence[str | os.PathLike[str]] = (),
    order: str = "canonical",
    size: int | None = None,
    scenario: str = "",
) -> list[ImageStore]:
    """`load` for every data set of a scenario. If several are missing, one InputError names them all, before any of the
    others is decoded."""
    absent: list[Missing] = []
    for name in names if len(names) > 1 else ():
        try:
            if name in catalogue() and find_imported(name) is None:
                find(name, roots)
        except Missing as error:
            absent.append(error)
    if len(absent) == 1:
        raise absent[0]
    if absent:
        listed = "".join(f"\n  {error.name}: {error.files}" for error in absent)
        raise Missing(
            f"scenario {scenario} needs {len(absent)} data sets that are not on this machine; put each into "
            f"{' or '.join(map(str, search_folders(roots)))}, or run `clbench data import PATH --name NAME`:{listed}"
        )
    return [load(name, roots=roots, order=order, size=size) for name in names]


# -- decoding ---------------------------------------------------------------------------------------------------------
def open_or_build(found: Found, order: str = "canonical", size: int | None = None) -> Entry:
    """The cache entry of a source, built if it is not there or not sound."""
    folder = entry_folder(found, order, size)
    entry = open_entry(folder)
    if entry is None:
        decoded = module(found.source.kind).read(found.source, size)
        build(folder, found, decoded, order, size)
        entry = open_entry(folder)
    if entry is None:
        raise InputError(
            f"{folder} cannot be read back after writing it: check the disk, or set CLBENCH_CACHE elsewhere"
        )
    return entry


def entry_folder(found: Found, order: str, size: int | None) -> Path:
    known = None if found.entry is None else [found.entry.class_names, sorted(found.entry.coarse.items())]
    key = json.dumps([1, found.source.kind, found.inspection.content, known, order, size])
    return cache_folder() / "store" / f"{found.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def build(folder: Path, found: Found, decoded: Decoded, order: str, size: int | None) -> None:
    """Check what was decoded, put it in order, write the entry."""
    decoded = with_known_names(found, decoded)
    if found.entry is not None:
        check_known(found.entry, found.source, decoded, size)
    classes = class_facts(found, decoded)
    digests = pixel_digests(decoded.images)
    groups = decoded.groups if decoded.groups is not None else np.zeros(len(decoded.labels), np.int64)
    keys = (groups, decoded.labels, *digests.T[::-1])
    split = decoded.split if decoded.split is not None else made_split(np.lexsort(keys), decoded.labels)
    rows = np.lexsort((*keys, split)) if order == "canonical" else np.argsort(split, kind="stable")
    columns: dict[str, NDArray[Any]] = {"labels": decoded.labels[rows], "split": split[rows]}
    if decoded.groups is not None:
        columns["groups"] = decoded.groups[rows]
    known = found.entry is not None and found.entry.mean
    mean, std = ((), ()) if known else measure(decoded.images[split == TRAIN])
    facts = {
        "name": found.name,
        "classes": classes,
        "group_names": list(decoded.group_names),
        "mean": mean,
        "std": std,
        "order": order,
        "size": size,
        "split": "source" if decoded.split is not None else "made here",
        "source": {"kind": found.source.kind, "root": str(found.source.root), "content": found.inspection.content},
    }
    write_entry(folder, decoded.images, rows, columns, facts)


def pixel_digests(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(N, 4) big-endian words of the sha256 of each image's (C, H, W) bytes."""
    flat = np.ascontiguousarray(images).reshape(len(images), -1)
    joined = b"".join(hashlib.sha256(row.data).digest() for row in flat)
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 4)


def made_split(canonical: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The split of a source that has none: see `load`. canonical: the rows in canonical order."""
    random = np.random.RandomState(0)  # the legacy generator is the same in every numpy
    split = np.full(len(labels), TRAIN, np.uint8)
    for label in range(int(labels.max()) + 1):
        rows = canonical[labels[canonical] == label]
        split[random.permutation(rows)[: round(TEST_SHARE * len(rows))]] = TEST
    return split


def measure(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and std per channel on [0, 1], to 4 places."""
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = np.zeros(256)
        for at in range(0, len(images), 4096):
            share += np.bincount(images[at : at + 4096, channel].reshape(-1), minlength=256)
        share /= share.sum()
        mean = float(share @ levels)
        means.append(round(mean, 4))
        stds.append(round(max(float(np.sqrt(share @ (levels - mean) ** 2)), 1e-4), 4))
    return means, stds


def with_known_names(found: Found, decoded: Decoded) -> Decoded:
    """Give the classes of a known data set the ids of the catalogue, whatever order the source has them in."""
    known = found.entry.class_names if found.entry is not None else ()
    if not known or decoded.names == known:
        return decoded
    if sorted(decoded.names) != sorted(known):
        odd = sorted(set(decoded.names) ^ set(known))[:3]
        raise InputError(f"{found.source.root} is not {found.name}: its class names differ ({', '.join(odd)} ...)")
    ids = np.array([known.index(name) for name in decoded.names], np.int64)
    return replace(decoded, labels=ids[decoded.labels], names=known)


def check_known(entry: Dataset, source: Source, decoded: Decoded, size: int | None) -> None:
    """Raise InputError unless the row counts, classes and image shape are those of the known data set."""
    problem = ""
    shape = entry.shape if size is None else (entry.shape[0], size, size)
    shape = decoded.images.shape[1:] if len(shape) == 1 else shape  # images of many sizes, which happen to be of one
    split = decoded.split
    if split is None:
        problem = "" if entry.embedded else "it is not split into training and test rows"
    else:
        rows = (int((split == TRAIN).sum()), int((split == TEST).sum()))
        if rows != entry.rows:
            problem = f"it has {counts(rows)}, not {counts(entry.rows)}"
        elif entry.rows_per_class is not None:
            for code, wanted in zip((TRAIN, TEST), entry.rows_per_class, strict=True):
                per_class = np.bincount(decoded.labels[split == code], minlength=entry.num_classes)
                if (per_class != wanted).any():
                    label = int((per_class != wanted).argmax())
                    part = "test" if code == TEST else "training"
                    problem = f"class {decoded.names[label]!r} has {per_class[label]} {part} rows, not {wanted}"
    if len(decoded.names) != entry.num_classes:
        problem = f"it has {len(decoded.names)} classes, not {entry.num_classes}"
    elif decoded.images.shape[1:] != shape:
        problem = f"its images are {'x'.join(map(str, decoded.images.shape[1:]))}, not {'x'.join(map(str, shape))}"
    if problem:
        raise InputError(
            f"{source.root} is not {entry.name}: {problem}; load it by its path, or get the published files"
        )


def class_facts(found: Found, decoded: Decoded) -> dict[str, Any]:
    """Names, levels and parents: the catalogue's hierarchy, else that of the source's coarse labels, else one level."""
    names, parents = list(decoded.names), [-1] * len(decoded.names)
    if found.entry is not None and found.entry.coarse:
        coarse_names = list(found.entry.coarse)
        parent_of = {child: parent for parent, children in found.entry.coarse.items() for child in children}
        parents = [coarse_names.index(parent_of[name]) for name in names]
        if decoded.coarse is not None:  # spellings of coarse names vary, so the partition is what must agree
            pairs = {
                (int(coarse), parents[label]) for coarse, label in zip(decoded.coarse, decoded.labels, strict=True)
            }
            if not len(pairs) == len({coarse for coarse, _ in pairs}) == len({parent for _, parent in pairs}):
                raise InputError(f"{found.source.root} is not {found.name}: its coarse labels group other classes")
    elif decoded.coarse is not None:
        coarse_names = list(decoded.coarse_names)
        for label, parent in np.unique(np.stack([decoded.labels, decoded.coarse], 1), axis=0).tolist():
            if parents[label] != -1:
                both = f"{coarse_names[parents[label]]!r} and {coarse_names[parent]!r}"
                raise InputError(f"{found.source.root}: class {names[label]!r} has two coarse labels, {both}")
            parents[label] = parent
    else:
        return {"names": names, "level": [0] * len(names), "parent": parents}
    offset = len(names)
    return {
        "names": names + coarse_names,
        "level": [1] * offset + [0] * len(coarse_names),
        "parent": [p + offset if p >= 0 else -1 for p in parents] + [-1] * len(coarse_names),
    }


# -- what was imported ------------------------------------------------------------------------------------------------
def load_imported(name: str, record: dict[str, Any], order: str, size: int | None) -> ImageStore:
    """An import stands on its own; its source is needed again only for another order or size, or to mend the entry."""
    known = catalogue().get(name)
    if order == "canonical" and size is None:
        entry = open_entry(cache_folder() / "store" / record["folder"])
        if entry is not None:
            return as_store(name, known, entry)
    path = Path(record["path"])
    source = detect(path)
    if source is None or inspect(source).content != record["content"]:
        raise InputError(
            f"the import {name!r} cannot be opened in this form, and its source {path} is gone or has changed: "
            f"run `clbench data import PATH --name {name}` again"
        )
    return as_store(name, known, open_or_build(Found(name, known, source, inspect(source)), order, size))


def as_store(name: str, known: Dataset | None, entry: Entry) -> ImageStore:
    manifest = entry.manifest
    facts = manifest["classes"]
    return ImageStore(
        images=torch.from_numpy(entry.images),
        labels=torch.from_numpy(entry.labels),
        split=torch.from_numpy(entry.split),
        classes=ClassTable(tuple(facts["names"]), torch.tensor(facts["level"]), torch.tensor(facts["parent"])),
        name=name,
        fingerprint=manifest["fingerprint"],
        groups=None if entry.groups is None else torch.from_numpy(entry.groups),
        group_names=tuple(manifest["group_names"]),
        mean=known.mean if known is not None and known.mean else tuple(manifest["mean"]),
        std=known.std if known is not None and known.std else tuple(manifest["std"]),
        images_of=known.images_of if known is not None else (),
    )
