"""From a name or a path to an ImageStore: find the source, check that it is what it is called, decode it once, open it."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clbench.data.cache import Entry, Inspection, cache_folder, inspect, open_entry, read_json, write_entry
from clbench.data.catalogue import Dataset, catalogue, dataset
from clbench.data.classes import TEST, TRAIN, ClassTable
from clbench.data.sources import Decoded, Source, detect, digits, module
from clbench.data.store import ImageStore
from clbench.errors import InputError, unknown_name

__all__ = ["Found", "Order", "find", "load", "open_or_build", "search_folders"]

Order = Literal["canonical", "source"]
TEST_SHARE = 0.2
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Found(NamedTuple):
    """A source that is what its name says. entry: the catalogue's, None for data of one's own."""

    name: str
    entry: Dataset | None
    source: Source
    inspection: Inspection


def load(
    name_or_path: str | os.PathLike[str],
    *,
    roots: Sequence[str | os.PathLike[str]] = (),
    order: Order = "canonical",
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

    Raises InputError if the name is unknown, the data are nowhere (it says which files belong where), are damaged, or are
    not what they are called; RunFailed if the disk is full or a download fails.
    """
    text = os.fspath(name_or_path)
    if order not in ("canonical", "source"):
        raise unknown_name("row order", order, ["canonical", "source"])
    if size is not None and size < 1:
        raise InputError(f"size must be at least 1 pixel, not {size}")
    imported = imported_record(text)
    if imported is not None and not is_in_roots(text, roots):
        return load_imported(text, imported, order, size)
    try:
        found = find(text, roots)
    except InputError:
        if not (allow_download and text in catalogue() and catalogue()[text].download) or is_in_roots(text, roots):
            raise
        from clbench.data.download import fetch

        fetch(text)
        found = find(text, roots)
    return as_store(found.name, found.entry, open_or_build(found, order, size))


# -- finding ----------------------------------------------------------------------------------------------------------
def search_folders(roots: Sequence[str | os.PathLike[str]] = ()) -> list[Path]:
    """The data folders in the order they are searched: given ones, CLBENCH_DATA, downloads."""
    given = [Path(root).expanduser() for root in roots]
    named = [Path(part).expanduser() for part in os.environ.get("CLBENCH_DATA", "").split(os.pathsep) if part]
    return list(dict.fromkeys([*given, *named, cache_folder() / "downloads"]))


def find(name_or_path: str, roots: Sequence[str | os.PathLike[str]] = ()) -> Found:
    """Find the source of a name or path, and check that it is what it is called. Raises InputError."""
    if name_or_path in catalogue():
        return find_known(catalogue()[name_or_path], search_folders(roots))
    path = Path(name_or_path).expanduser()
    if path.exists():
        return find_at(path)
    if len(path.parts) > 1:
        raise InputError(f"there is nothing at {path}; give a known data set, a folder of images, or Parquet files")
    raise unknown_name("dataset", name_or_path, catalogue(), hint="(or give a path to a folder or a Parquet file)")


def places_of(entry: Dataset) -> list[str]:
    """Folders and files below a data folder where a known data set may lie."""
    names = [entry.name, *([entry.subset_of] if entry.subset_of else [])]
    spelt = [spelling for name in names for spelling in (name, name.replace("-", "_"))]
    archives = [name for name in entry.archives if name.endswith(".tar.gz")]
    return list(dict.fromkeys([*spelt, *entry.places, *archives]))


def candidates(entry: Dataset, folders: Sequence[Path]) -> Iterator[Source]:
    """Sources at the places where `entry` may lie, a data folder that is itself such a place included."""
    places = places_of(entry)
    for folder in folders:
        for path in [folder / place for place in places] + ([folder] if folder.name in places else []):
            source = detect(path)
            if source is not None:
                yield source


def is_in_roots(name: str, roots: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether anything lies where a known data set may lie (not yet whether it is sound)."""
    if name not in catalogue():
        return False
    return any((folder / place).exists() for folder in search_folders(roots) for place in places_of(catalogue()[name]))


def find_known(entry: Dataset, folders: Sequence[Path]) -> Found:
    if entry.embedded:
        source = digits.embedded()
        return Found(entry.name, entry, source, inspect(source))
    others = []
    for source in candidates(entry, folders):
        inspection = inspect(source)
        if source.kind == "cifar" and is_of_another(entry, inspection):
            continue
        if inspection.rows is not None and inspection.rows != entry.rows:
            others.append(f"{source.root} holds {counts(inspection.rows)}, {better_name(entry, inspection.rows)}")
            continue
        check_sums(entry, source, inspection)
        return Found(entry.name, entry, source, inspection)
    raise missing(entry, folders, others)


def find_at(path: Path) -> Found:
    """A source given by its path. It gets a known name only if it is that data set."""
    source = detect(path)
    if source is None:
        raise InputError(
            f"{path} holds no images that can be read: give a folder with train/<class>/ and test/<class>/, a folder of "
            f"train-*.parquet and test-*.parquet, one Parquet file, or the standard files of CIFAR or MNIST"
        )
    inspection = inspect(source)
    base = path.resolve().name.removesuffix(".parquet").removesuffix(".tar.gz")
    for entry in catalogue().values():
        if not entry.embedded and {path.resolve().name, base} & set(places_of(entry)):
            published = inspection.rows is None and not unlike(entry, inspection)
            if inspection.rows == entry.rows or published:
                check_sums(entry, source, inspection)
                return Found(entry.name, entry, source, inspection)
    name = re.sub(r"[^a-z0-9._-]+", "-", base.lower()).strip("-._") or "data"
    return Found(f"{name}-custom" if name in catalogue() else name, None, source, inspection)


def counts(rows: tuple[int, int]) -> str:
    return f"{rows[TRAIN]:,} + {rows[TEST]:,} rows"


def better_name(entry: Dataset, rows: tuple[int, int]) -> str:
    """What a source of other row counts should be called."""
    family = {entry.name, entry.subset_of} - {None}
    for other in catalogue().values():
        if other.rows == rows and {other.name, other.subset_of} & family:
            return f"which is {other.name!r}"
    return f"not the {counts(entry.rows)} of {entry.name} (load it by its path)"


def missing(entry: Dataset, folders: Sequence[Path], others: Sequence[str]) -> InputError:
    """The sentence for data that are nowhere: which files, in which folder, and the command that gets them."""
    shards = f"{entry.name.replace('-', '_')}/train-*.parquet and test-*.parquet with {counts(entry.rows)}"
    where = " or ".join(map(str, folders))
    importing = f"`clbench data import PATH --name {entry.name}`"
    if entry.download:
        to = f"{entry.download.to}/" if entry.download.to else ""
        files = ", ".join(f"{to}{name}" for name in entry.archives)
        how = f"put {files} (or {shards}) into {where}; or run `clbench data fetch {entry.name}` or {importing}"
    else:
        how = f"put {shards} into {where}, or run {importing}"
    seen = f"; {'; '.join(others)}" if others else ""
    return InputError(f"dataset {entry.name} is not on this machine: {how}{seen}")


def is_of_another(entry: Dataset, inspection: Inspection) -> bool:
    """Whether these are the published files of some other data set (a data folder may itself be named like both)."""
    return any(not unlike(other, inspection) for other in catalogue().values() if other.name != entry.name and other.files)


def unlike(entry: Dataset, inspection: Inspection) -> list[str]:
    """Files whose published checksum is missing or another."""
    return [
        name
        for name, sums in inspection.sums.items()
        if (known := entry.files.get(Path(name).name)) is None or known.md5 != sums["md5"]
    ]


def check_sums(entry: Dataset, source: Source, inspection: Inspection) -> None:
    """Raise InputError for a file that has the name of a published one and other contents."""
    for name, sums in inspection.sums.items():
        known = entry.files.get(Path(name).name)
        if known is None or (known.bytes is not None and known.bytes != sums["bytes"]):
            continue
        for kind in ("md5", "sha256"):
            wanted = getattr(known, kind)
            if wanted and wanted != sums[kind]:
                again = f"`clbench data fetch {entry.name}`" if entry.download else "get the file again"
                raise InputError(
                    f"{source.root / name} is damaged or not the published file of {entry.name}: its {kind} is "
                    f"{sums[kind]}, not {wanted}; move it away and {again if again[0] == 'g' else 'run ' + again}"
                )


# -- decoding ---------------------------------------------------------------------------------------------------------
def open_or_build(found: Found, order: Order = "canonical", size: int | None = None) -> Entry:
    """The cache entry of a source, built if it is not there or not sound."""
    folder = entry_folder(found, order, size)
    entry = open_entry(folder)
    if entry is None:
        decoded = module(found.source.kind).read(found.source, size)
        build(folder, found, decoded, order, size)
        entry = open_entry(folder)
    if entry is None:
        raise InputError(f"{folder} cannot be read back after writing it: check the disk, or set CLBENCH_CACHE elsewhere")
    return entry


def entry_folder(found: Found, order: Order, size: int | None) -> Path:
    known = None if found.entry is None else [found.entry.class_names, sorted(found.entry.coarse.items())]
    key = json.dumps([1, found.source.kind, found.inspection.content, known, order, size])
    return cache_folder() / "store" / f"{found.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def build(folder: Path, found: Found, decoded: Decoded, order: Order, size: int | None) -> None:
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
    columns = {"labels": decoded.labels[rows], "split": split[rows]}
    if decoded.groups is not None:
        columns["groups"] = decoded.groups[rows]
    mean, std = measure(decoded.images[split == TRAIN]) if found.entry is None else ((), ())
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
    joined = b"".join(hashlib.sha256(row).digest() for row in flat)
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 4)


def made_split(canonical: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The split of a source that has none: see `load`. canonical: the rows in canonical order."""
    random = np.random.RandomState(0)  # noqa: NPY002  # the legacy generator never changes, and the packs were split by it
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
    split = decoded.split
    if split is not None:
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
        raise InputError(f"{source.root} is not {entry.name}: {problem}; load it by its path, or get the published files")


def class_facts(found: Found, decoded: Decoded) -> dict[str, Any]:
    """Names, levels and parents: the catalogue's hierarchy, else that of the source's coarse labels, else one level."""
    names, parents = list(decoded.names), [-1] * len(decoded.names)
    if found.entry is not None and found.entry.coarse:
        coarse_names = list(found.entry.coarse)
        parent_of = {child: parent for parent, children in found.entry.coarse.items() for child in children}
        parents = [coarse_names.index(parent_of[name]) for name in names]
        if decoded.coarse is not None:
            claimed = [decoded.coarse_names[index] for index in decoded.coarse]
            wrong = [row for row, label in enumerate(decoded.labels) if claimed[row] != parent_of[names[label]]]
            if wrong:
                name = names[decoded.labels[wrong[0]]]
                raise InputError(
                    f"{found.source.root} is not {found.name}: row {wrong[0]} is {name!r} under {claimed[wrong[0]]!r}, "
                    f"not {parent_of[name]!r}"
                )
    elif decoded.coarse is not None:
        coarse_names = list(decoded.coarse_names)
        pairs = np.unique(np.stack([decoded.labels, decoded.coarse], 1), axis=0)
        for label, parent in pairs.tolist():
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
def imported_record(name: str) -> dict[str, Any] | None:
    """What `clbench data import` noted under a name: {"path", "folder"}; None if there is nothing."""
    if not NAME.fullmatch(name):
        return None
    return read_json(cache_folder() / "imported" / f"{name}.json")


def load_imported(name: str, record: dict[str, Any], order: Order, size: int | None) -> ImageStore:
    """An import stands on its own; its source is needed again only for another order or size, or if the entry is broken."""
    known = catalogue().get(name)
    if order == "canonical" and size is None:
        entry = open_entry(cache_folder() / "store" / record["folder"])
        if entry is not None:
            return as_store(name, known, entry)
    path = Path(record["path"])
    source = detect(path)
    if source is None:
        raise InputError(
            f"the import {name!r} cannot be opened in this form, and its source {path} is gone: "
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
        mean=known.mean if known is not None else tuple(manifest["mean"]),
        std=known.std if known is not None else tuple(manifest["std"]),
        images_of=known.images_of if known is not None else (),
    )
