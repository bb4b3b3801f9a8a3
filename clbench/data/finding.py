"""From a name or a path to a source that is what it is called."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from clbench.data.cache import Inspection, cache_folder, imported_names, inspect
from clbench.data.catalogue import Dataset, catalogue
from clbench.data.classes import TEST, TRAIN
from clbench.data.sources import Source, detect, digits
from clbench.errors import InputError, unknown_name

__all__ = ["Found", "Missing", "check_sums", "counts", "find", "search_folders"]


class Missing(InputError):
    """A known data set that is nowhere. name: what it is called. files: what belongs into a data folder, in words, and
    what was found there in its place."""

    def __init__(self, message: str, name: str = "", files: str = "") -> None:
        super().__init__(message)
        self.name, self.files = name, files


class Found(NamedTuple):
    """A source that is what its name says. entry: the catalogue's, None for data of one's own."""

    name: str
    entry: Dataset | None
    source: Source
    inspection: Inspection


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
    known = [*catalogue(), *imported_names()]
    raise unknown_name("dataset", name_or_path, known, hint="(or give a path to a folder or a Parquet file)")


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


def find_known(entry: Dataset, folders: Sequence[Path]) -> Found:
    if entry.embedded:
        source = digits.embedded()
        return Found(entry.name, entry, source, inspect(source))
    others = []
    for source in candidates(entry, folders):
        inspection = inspect(source)
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
            f"{path} holds no images that can be read: give a folder with train/<class>/ and test/<class>/, a folder "
            f"of train-*.parquet and test-*.parquet, one Parquet file, or the standard files of CIFAR or MNIST"
        )
    inspection = inspect(source)
    base = path.resolve().name.removesuffix(".parquet").removesuffix(".tar.gz")
    for entry in catalogue().values():
        if not entry.embedded and {path.resolve().name, base} & set(places_of(entry)):
            named = inspection.rows is None and any(Path(name).name in entry.files for name in inspection.sums)
            if inspection.rows == entry.rows or named:
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


def missing(entry: Dataset, folders: Sequence[Path], others: Sequence[str]) -> Missing:
    """The sentence for data that are nowhere: which files, in which folder, and the command that gets them."""
    shards = f"{entry.name.replace('-', '_')}/train-*.parquet and test-*.parquet with {counts(entry.rows)}"
    where = " or ".join(map(str, folders))
    importing = f"`clbench data import PATH --name {entry.name}`"
    if entry.download:
        to = f"{entry.download.to}/" if entry.download.to else ""
        files = f"{', '.join(f'{to}{name}' for name in entry.archives)} (or {shards})"
        how = f"put {files} into {where}; or run `clbench data fetch {entry.name}` or {importing}"
    else:
        if entry.layout:
            home = entry.places[0] if entry.places else entry.name
            files = f"the folder {home} (holding {entry.layout}), or {shards}"
        else:
            files = "".join(f"the folder {place}, or " for place in entry.places) + shards
        how = f"put {files} into {where}, or run {importing}"
    seen = f"; {'; '.join(others)}" if others else ""
    return Missing(f"dataset {entry.name} is not on this machine: {how}{seen}", entry.name, files + seen)


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
