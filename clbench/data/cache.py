"""The cache: decoded data sets as memory-mapped arrays, keyed by the content of their source files.

    <cache>/index/<hash of a source's place>.json   what its files held when they were last read, and their stat then
    <cache>/store/<name>-<key>/                     images.npy, labels.npy, split.npy[, groups.npy], manifest.json
    <cache>/imported/<name>.json                    names given by `clbench data import`
    <cache>/downloads/                              files that `clbench data fetch` got

An entry is built in a folder of its own and renamed, so that it is whole or not there, and two processes may build the
same one at once. The small arrays are hashed at each opening, the images' size is compared, and all is hashed by
`clbench data verify`; an entry that does not hold what its manifest says counts as absent and is built again.
"""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from clbench.atomic import atomic_write_bytes, explain_os_error, sync_folder
from clbench.data.sources import Source, module
from clbench.errors import InputError

__all__ = [
    "NAME",
    "Entry",
    "Inspection",
    "cache_folder",
    "find_imported",
    "imported_names",
    "inspect",
    "open_entry",
    "sha256_of_file",
    "write_entry",
]

VERSION = 1  # of the layout and of what decoding does; part of every key
CHUNK = 1 << 22
STALE_S = 24 * 3600.0  # a half-built folder of this age belongs to a process that died
ROWS_AT_ONCE = 4096
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")  # of an import


def cache_folder() -> Path:
    """`CLBENCH_CACHE`, or `~/.cache/clbench`."""
    given = os.environ.get("CLBENCH_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "clbench"


# -- what the source files hold ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Inspection:
    """What is known of a source's files without decoding them.

    content: sha256 over the names and contents of all files. rows: (training, test), or None if only reading tells.
    sums: file name -> {"bytes", "md5", "sha256"}; empty for sources of very many files.
    """

    content: str
    rows: tuple[int, int] | None
    sums: Mapping[str, Mapping[str, Any]]


def hash_file(path: Path) -> dict[str, Any]:
    """{"bytes", "md5", "sha256"} of a file. Raises InputError if it cannot be read."""
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(CHUNK):
                md5.update(block)
                sha256.update(block)
                size += len(block)
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    return {"bytes": size, "md5": md5.hexdigest(), "sha256": sha256.hexdigest()}


def sha256_of_file(path: Path) -> str:
    return str(hash_file(path)["sha256"])


def inspect(source: Source, *, fresh: bool = False) -> Inspection:
    """Hash a source's files, or take what was found last time if their sizes and times are unchanged (`fresh`: never).

    The change time counts too, so that a file that was altered and given its old date back is noticed.
    """
    origin = f"{source.kind}:{(source.files[0] if len(source.files) == 1 else source.root).resolve()}"
    place = cache_folder() / "index" / f"{hashlib.sha256(origin.encode()).hexdigest()}.json"
    names = [path.relative_to(source.root).as_posix() for path in source.files]
    stat = hashlib.sha256()
    try:
        for name, path in zip(names, source.files, strict=True):
            info = path.stat()
            stat.update(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ctime_ns}\n".encode())
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    known = None if fresh else read_json(place)
    if known is not None and known.get("stat") == stat.hexdigest() and known.get("version") == VERSION:
        return Inspection(known["content"], known["rows"] and tuple(known["rows"]), known["sums"])
    rows = module(source.kind).count(source)
    sums = {name: hash_file(path) for name, path in zip(names, source.files, strict=True)}
    content = hashlib.sha256("".join(f"{name}\0{sums[name]['sha256']}\n" for name in names).encode()).hexdigest()
    found = Inspection(content, rows, sums if len(sums) <= 64 else {})
    record = {"version": VERSION, "stat": stat.hexdigest(), "content": content, "rows": rows, "sums": found.sums}
    atomic_write_bytes(place, json.dumps(record | {"root": str(source.root)}).encode())
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if it is absent, damaged or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# -- entries ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """An opened entry: arrays (images memory-mapped) and the manifest."""

    folder: Path
    manifest: Mapping[str, Any]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    split: NDArray[np.uint8]
    groups: NDArray[np.int64] | None


def manifest_sum(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def open_entry(folder: Path, *, full: bool = False) -> Entry | None:
    """Open an entry; None if it is absent or not what its manifest says. full: hash the images too."""
    manifest = read_json(folder / "manifest.json")
    if manifest is None or manifest.get("version") != VERSION or manifest.get("sha256") != manifest_sum(manifest):
        return None
    arrays = {}
    for name, facts in manifest["arrays"].items():
        path = folder / f"{name}.npy"
        try:
            if path.stat().st_size != facts["bytes"]:
                return None
            if (full or name != "images") and sha256_of_file(path) != facts["sha256"]:
                return None
            # copy-on-write: torch wants writable memory, and no write may ever reach the file
            arrays[name] = np.load(path, mmap_mode="c" if name == "images" else None, allow_pickle=False)
        except (OSError, ValueError, EOFError, InputError):
            return None
    return Entry(folder, manifest, arrays["images"], arrays["labels"], arrays["split"], arrays.get("groups"))


class Rows(Protocol):
    """Images by row, an array or what stands for one. shape: (N, C, H, W)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]: ...


class HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, block: Any) -> None:
        self.file.write(block)
        self.sha256.update(block)
        self.bytes += len(block)


def save(path: Path, dtype: str, shape: tuple[int, ...], blocks: Iterator[NDArray[Any]]) -> tuple[dict[str, Any], str]:
    """Write an array in blocks of rows as .npy; returns what the manifest says of the file, and the sha256 of its data
    alone."""
    data = hashlib.sha256()
    with open(path, "wb") as raw:
        file = HashedFile(raw)
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            view = np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data
            file.write(view)
            data.update(view)
        raw.flush()
        os.fsync(raw.fileno())
    return {"bytes": file.bytes, "sha256": file.sha256.hexdigest()}, data.hexdigest()


def write_entry(
    folder: Path,
    images: Rows,
    order: NDArray[np.int64],
    columns: Mapping[str, NDArray[Any]],
    facts: Mapping[str, Any],
) -> None:
    """Build an entry and put it in place. images: (N, C, H, W) in source order; order: (N,) the source row of each row;
    columns: `labels`, `split` and perhaps `groups`, in row order already. facts go into the manifest as they are.

    Raises RunFailed for a full disk, InputError for an unwritable cache.
    """
    building = folder.with_name(f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        building.mkdir()
        try:
            blocks = (images[order[at : at + ROWS_AT_ONCE]] for at in range(0, len(order), ROWS_AT_ONCE))
            arrays, data = {}, {}
            arrays["images"], data["images"] = save(building / "images.npy", "|u1", images.shape, blocks)
            for name, column in columns.items():
                dtype = "|u1" if name == "split" else "<i8"
                arrays[name], data[name] = save(building / f"{name}.npy", dtype, column.shape, iter([column]))
            # the images' fingerprint covers what any source of the same data must agree on: not the groups
            named = "".join(f"{name}:{data[name]}\n" for name in ("images", "labels", "split"))
            manifest = dict(facts) | {"version": VERSION, "arrays": arrays, "shape": list(images.shape)}
            manifest["fingerprint"] = hashlib.sha256(f"{images.shape}\n{named}".encode()).hexdigest()
            manifest["sha256"] = manifest_sum(manifest)
            atomic_write_bytes(building / "manifest.json", json.dumps(manifest, indent=1).encode())
            publish(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error


def publish(building: Path, folder: Path) -> None:
    """Rename a finished folder into place. If another process was first and its entry is sound, that one stays."""
    for _ in range(5):
        try:
            os.rename(building, folder)
            sync_folder(folder.parent)
            return
        except OSError:
            if not folder.exists():
                raise
        if open_entry(folder, full=True) is not None:
            return
        broken = building.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.broken.tmp")
        try:
            os.rename(folder, broken)  # readers that have it mapped keep their pages
        except FileNotFoundError:
            continue  # another process was quicker
        shutil.rmtree(broken, ignore_errors=True)
    raise InputError(f"cannot put {folder} in place: other processes keep changing it; stop them and run it again")


def sweep(parent: Path) -> None:
    """Remove what processes that died while building have left."""
    for leftover in parent.glob(".*.tmp"):
        try:
            old = time.time() - leftover.stat().st_mtime > STALE_S
        except OSError:
            continue
        if old:
            shutil.rmtree(leftover, ignore_errors=True)


# -- what was imported -----------------------------------------------------------------------------------------------
def find_imported(name: str) -> dict[str, Any] | None:
    """What `clbench data import` noted under a name: {"path", "folder", "content"}; None if there is nothing."""
    if not NAME.fullmatch(name):
        return None
    return read_json(cache_folder() / "imported" / f"{name}.json")


def imported_names() -> set[str]:
    """All names that were given by an import."""
    return {path.stem for path in (cache_folder() / "imported").glob("*.json")}
