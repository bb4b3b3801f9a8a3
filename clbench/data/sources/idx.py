"""MNIST's idx files, plain or gzipped: four of them with fixed names. Source: the format note on the MNIST page."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clbench.atomic import explain_os_error
from clbench.data.classes import TEST, TRAIN
from clbench.data.sources import Decoded, Source
from clbench.data.sources.images import resize_all
from clbench.errors import InputError

__all__ = ["count", "find", "read"]

PARTS = {TRAIN: "train", TEST: "t10k"}
FILES = tuple(f"{part}-{what}-ubyte" for part in PARTS.values() for what in ("images-idx3", "labels-idx1"))


def find(path: Path) -> Source | None:
    if not path.is_dir():
        return None
    there = {name: next((p for p in (path / name, path / f"{name}.gz") if p.is_file()), None) for name in FILES}
    found = [file for file in there.values() if file is not None]
    if not found:
        return None
    missing = [name for name, file in there.items() if file is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} (plain or .gz) missing from {path}, which holds {found[0].name}: add it"
        )
    return Source("idx", path, tuple(sorted(found)))


def content(path: Path, limit: int = -1) -> bytes:
    """The first `limit` bytes of the (unpacked) file, all by default."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read(limit)
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise explain_os_error(error, path, "read") from error
        raise InputError(f"{path} is damaged or cut short ({error}); get the file again") from error


def shape_of(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    """The shape in an idx header of unsigned bytes; raises InputError for any other header."""
    end = 4 + 4 * dimensions
    if len(header) < end or header[:4] != bytes((0, 0, 8, dimensions)):
        raise InputError(
            f"{path} is not an idx file of unsigned bytes with {dimensions} dimension(s): get the file again"
        )
    return tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, end, 4))


def array(path: Path, dimensions: int) -> NDArray[np.uint8]:
    data = content(path)
    shape = shape_of(path, data, dimensions)
    body = len(data) - 4 - 4 * dimensions
    if body != int(np.prod(shape)):
        raise InputError(f"{path} is damaged or cut short: it has {body} bytes of data where its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def count(source: Source) -> tuple[int, int] | None:
    rows = {}
    for path in source.files:
        for split, part in PARTS.items():
            if path.name.startswith(f"{part}-images"):
                rows[split] = shape_of(path, content(path, 16), 3)[0]
    return rows[TRAIN], rows[TEST]


def read(source: Source, size: int | None) -> Decoded:
    files = {path.name.removesuffix(".gz"): path for path in source.files}
    images, labels, split = [], [], []
    for code, part in PARTS.items():
        pixels = files[f"{part}-images-idx3-ubyte"]
        marks = files[f"{part}-labels-idx1-ubyte"]
        images.append(array(pixels, 3)[:, None])
        labels.append(array(marks, 1).astype(np.int64))
        if len(images[-1]) != len(labels[-1]):
            raise InputError(f"{marks} has {len(labels[-1])} labels for the {len(images[-1])} images of {pixels.name}")
        split.append(np.full(len(labels[-1]), code, np.uint8))
    if images[0].shape[1:] != images[1].shape[1:]:
        raise InputError(f"the training and test images in {source.root} differ in size")
    targets = np.concatenate(labels)
    return Decoded(
        images=resize_all(np.concatenate(images), size),
        labels=targets,
        split=np.concatenate(split),
        names=tuple(map(str, range(int(targets.max(initial=-1)) + 1))),
    )
