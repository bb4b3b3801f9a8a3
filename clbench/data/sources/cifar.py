"""CIFAR-10 and CIFAR-100 as published for Python: pickles in a folder or in the tar.gz. Source: the data sets' page."""

import gzip
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from clbench.atomic import explain_os_error
from clbench.data.classes import TEST, TRAIN
from clbench.data.sources import Decoded, Source
from clbench.data.sources.images import resize_all
from clbench.errors import InputError

__all__ = ["count", "find", "read"]

# (training files, test files, file of names) of each version
LAYOUTS = (
    (tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",), "batches.meta"),
    (("train",), ("test",), "meta"),
)
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np._core.multiarray._reconstruct for core in ("core", "_core")},  # type: ignore[attr-defined]  # not in numpy's stubs
}


class ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays, numbers, texts and containers of them; refuses any other class or function, so that a file
    cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in the old protocols
            return str.encode
        if (module, name) not in ALLOWED:
            refuse(module, name)
        return ALLOWED[module, name]


def refuse(module: str, name: str) -> NoReturn:
    raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of images has no need of")


def find(path: Path) -> Source | None:
    if path.is_file():
        return Source("cifar", path.parent, (path,)) if path.name.endswith((".tar.gz", ".tgz")) else None
    for train, test, meta in LAYOUTS:
        names = (*train, *test, meta)
        there = [name for name in names if (path / name).is_file()]
        if meta in there or len(there) > 1:
            missing = sorted(set(names) - set(there))
            if missing:
                raise InputError(f"{', '.join(missing)} missing from {path}, which holds the rest of a CIFAR data set")
            return Source("cifar", path, tuple(path / name for name in sorted(names)))
    archives = sorted(path.glob("cifar-*-python.tar.gz"))
    return Source("cifar", path, (archives[0],)) if len(archives) == 1 else None


def count(source: Source) -> tuple[int, int] | None:
    return None  # nothing short of reading tells


def contents(source: Source) -> dict[str, bytes]:
    """File name -> bytes, from the folder or out of the archive."""
    wanted = {name for train, test, meta in LAYOUTS for name in (*train, *test, meta)}
    archive = source.files[0]
    try:
        if len(source.files) > 1:
            return {path.name: path.read_bytes() for path in source.files}
        with gzip.open(archive) as packed:
            whole = io.BytesIO(packed.read())  # to the end, where gzip has its checksum; tarfile stops before
        with tarfile.open(fileobj=whole) as tar:
            members = [member for member in tar if member.isfile() and Path(member.name).name in wanted]
            return {Path(member.name).name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]  # a file has content
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise explain_os_error(error, Path(error.filename or archive), "read") from error
        raise InputError(f"{archive} is damaged or cut short ({error}); get the file again") from error


def unpickle(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # damaged pickles raise almost anything
        raise InputError(
            f"{path} cannot be read as a CIFAR file ({error}); it is damaged or of another kind"
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__} where a CIFAR file has a dictionary; get the file again"
        )
    return value


def read(source: Source, size: int | None) -> Decoded:
    files = contents(source)
    place = source.files[0] if len(source.files) == 1 else source.root
    layout = next((one for one in LAYOUTS if all(name in files for name in (*one[0], *one[1], one[2]))), None)
    if layout is None:
        raise InputError(
            f"{place} holds no complete CIFAR data set (found {', '.join(sorted(files)) or 'none of its files'})"
        )
    train, test, meta_name = layout
    meta = unpickle(place / meta_name, files[meta_name])
    names = tuple(map(str, meta.get("fine_label_names") or meta.get("label_names") or ()))
    coarse_names = tuple(map(str, meta.get("coarse_label_names") or ()))
    images, labels, coarse, split = [], [], [], []
    for name in (*train, *test):
        path = place / name
        batch = unpickle(path, files[name])
        data, fine = batch.get("data"), batch.get("fine_labels", batch.get("labels"))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
            raise InputError(f"{path} has no (N, 3072) uint8 array named data; get the file again")
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(checked(path, "labels", fine, len(data), len(names)))
        if coarse_names:
            coarse.append(checked(path, "coarse_labels", batch.get("coarse_labels"), len(data), len(coarse_names)))
        split.append(np.full(len(data), TEST if name in test else TRAIN, np.uint8))
    return Decoded(
        images=resize_all(np.concatenate(images), size),
        labels=np.concatenate(labels),
        split=np.concatenate(split),
        names=names,
        coarse=np.concatenate(coarse) if coarse else None,
        coarse_names=coarse_names,
    )


def checked(path: Path, what: str, values: Any, rows: int, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`values` as (rows,) int64 in 0..classes-1, or an InputError naming the file."""
    if not isinstance(values, list) or len(values) != rows or not all(isinstance(v, int) for v in values):
        raise InputError(f"{path} has {rows} images but no list of {rows} {what}; get the file again")
    out = np.array(values, np.int64)
    if rows and not 0 <= out.min() <= out.max() < classes:
        row = int(np.flatnonzero((out < 0) | (out >= classes))[0])
        raise InputError(f"{path}, row {row}: {what} has {out[row]}, but there are {classes} class names")
    return out
