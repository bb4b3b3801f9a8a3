"""What stands behind `clbench data status|fetch|verify|import`. Nothing here prints."""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clbench.atomic import atomic_write_bytes
from clbench.data.cache import NAME, cache_folder, find_imported, imported_names, inspect, open_entry
from clbench.data.catalogue import catalogue
from clbench.data.download import fetch
from clbench.data.finding import Found, Missing, check_sums, counts, find
from clbench.data.loading import build, entry_folder, open_or_build
from clbench.data.sources import detect, module
from clbench.errors import InputError

__all__ = ["Check", "Status", "fetch", "import_", "status", "verify"]


class Status(NamedTuple):
    """state: `ready` (decoded), `found` (will be decoded on first use), `imported`, `missing`, `unusable`. where: the
    source or "". bytes: of the decoded images in the cache. advice: what to do if it is not usable, else ""."""

    name: str
    title: str
    state: str
    where: str
    bytes: int
    advice: str


class Check(NamedTuple):
    """One thing that `verify` looked at."""

    what: str
    ok: bool
    detail: str


def status(roots: Sequence[str | os.PathLike[str]] = ()) -> list[Status]:
    """Every data set of the catalogue, then imported ones. Hashes files that are new or have changed."""
    imported = imported_names()
    out = []
    for name, entry in catalogue().items():
        try:
            found = find(name, roots)
        except Missing as error:
            if name not in imported:
                out.append(Status(name, entry.title, "missing", "", 0, str(error)))
        except InputError as error:
            out.append(Status(name, entry.title, "unusable", "", 0, str(error)))
        else:
            imported.discard(name)
            folder = entry_folder(found, "canonical", None)
            cached = open_entry(folder)
            state, size = ("ready", cached.images.nbytes) if cached is not None else ("found", 0)
            out.append(Status(name, entry.title, state, str(found.source.root), size, ""))
    for name in sorted(imported):
        record = find_imported(name)
        title = catalogue()[name].title if name in catalogue() else "imported"
        cached = open_entry(cache_folder() / "store" / record["folder"]) if record is not None else None
        if record is None or cached is None:
            advice = f"run `clbench data import PATH --name {name}` again"
            out.append(Status(name, title, "unusable", "", 0, advice))
        else:
            out.append(Status(name, title, "imported", record["path"], cached.images.nbytes, ""))
    return out


def verify(name_or_path: str, roots: Sequence[str | os.PathLike[str]] = ()) -> list[Check]:
    """Hash the source files and the cache entry again, read the source again and compare. A damaged cache entry is
    built anew, and reported. Raises InputError if the source is missing or damaged."""
    record = find_imported(name_or_path)
    try:
        found = find(name_or_path, roots)
    except InputError:
        if record is None:
            raise
        return verify_import(name_or_path, record)
    inspection = inspect(found.source, fresh=True)
    found = found._replace(inspection=inspection)
    if found.entry is not None:
        check_sums(found.entry, found.source, inspection)
    files = f"{len(found.source.files)} file(s) of {found.source.root}"
    published = sum(Path(file).name in found.entry.files for file in inspection.sums) if found.entry else 0
    checks = [Check("source files", True, f"{files} hashed; {published} have a published checksum, which is right")]

    folder = entry_folder(found, "canonical", None)
    cached = open_entry(folder, full=True)
    if folder.exists() and cached is None:
        shutil.rmtree(folder, ignore_errors=True)
        cached = open_or_build(found)
        checks.append(Check("cache entry", False, f"{folder} was damaged; it has been built again from the source"))
    else:
        cached = cached or open_or_build(found)
        checks.append(Check("cache entry", True, f"{folder} holds what its manifest says"))

    again = folder.with_name(f".verify-{uuid.uuid4().hex[:8]}.tmp")
    try:
        build(again, found, module(found.source.kind).read(found.source, None), "canonical", None)
        reread = open_entry(again)
        same = reread is not None and reread.manifest["fingerprint"] == cached.manifest["fingerprint"]
    finally:
        shutil.rmtree(again, ignore_errors=True)
    rows = f"{len(cached.labels):,} rows, fingerprint {cached.manifest['fingerprint']}"
    checks.append(Check("source against cache", same, rows if same else f"decoding {found.source.root} again differs"))
    return checks


def verify_import(name: str, record: dict[str, str]) -> list[Check]:
    folder = cache_folder() / "store" / record["folder"]
    if open_entry(folder, full=True) is not None:
        return [Check("cache entry", True, f"{folder} holds what its manifest says")]
    advice = f"{folder} is damaged: run `clbench data import {record['path']} --name {name}` again"
    return [Check("cache entry", False, advice)]


def import_(path: str | os.PathLike[str], name: str) -> Status:
    """Decode the data at `path` into the cache under `name`; afterwards `path` is needed no more. A name of the
    catalogue is given only to that very data. Raises InputError as `load` does."""
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot be a name: use lower-case letters, digits and . _ - (like 'my-birds')")
    place = Path(path).expanduser()
    source = detect(place)
    if source is None:
        reason = "there is nothing" if not place.exists() else "there are no images that can be read"
        raise InputError(f"cannot import {place}: {reason}; give a folder of images, Parquet files, or standard files")
    entry = catalogue().get(name)
    inspection = inspect(source)
    if entry is not None:
        if entry.embedded:
            raise InputError(f"{name} is built in; import {place} under a name of its own")
        if inspection.rows is not None and inspection.rows != entry.rows:
            raise InputError(
                f"{place} holds {counts(inspection.rows)}, not the {counts(entry.rows)} of {name}: "
                f"import it under another name, such as {name}-mine"
            )
        check_sums(entry, source, inspection)
    found = Found(name, entry, source, inspection)
    opened = open_or_build(found)
    record = {"path": str(place.resolve()), "folder": opened.folder.name, "content": inspection.content}
    atomic_write_bytes(cache_folder() / "imported" / f"{name}.json", json.dumps(record).encode())
    return Status(name, entry.title if entry else "imported", "imported", str(place), opened.images.nbytes, "")
