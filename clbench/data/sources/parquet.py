"""Hugging Face style Parquet: shards `<split>-*.parquet`, images as struct<bytes, path> or plain bytes, class names in
the schema metadata. Source: the `datasets` library's on-disk convention."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.atomic import explain_os_error
from clbench.data.classes import TEST, TRAIN
from clbench.data.sources import Decoded, Source
from clbench.data.sources.images import Canvas
from clbench.errors import InputError

__all__ = ["count", "find", "read"]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("fine_label", "label", "labels", "class")
COARSE, GROUP, SPLIT = "coarse_label", "domain", "split"
SHARD = re.compile(r"(?P<split>[A-Za-z]+)(-(?P<number>\d+)-of-(?P<total>\d+))?.*\.parquet$")
TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES = ("train", "training"), ("validation", "valid", "val", "dev"), ("test",)


def find(path: Path) -> Source | None:
    if path.is_file():
        return Source("parquet", path.parent, (path,)) if path.suffix == ".parquet" else None
    for folder in (path, path / "data"):
        shards = sorted(folder.glob("*.parquet"))
        if shards:
            check_complete(folder, shards)
            return Source("parquet", folder, tuple(shards))
    return None


def check_complete(folder: Path, shards: list[Path]) -> None:
    """Shards say how many they are: raise for those that are not there."""
    there = {shard.name for shard in shards}
    for shard in shards:
        match = SHARD.match(shard.name)
        if match is None or match["total"] is None:
            continue
        width = len(match["total"])
        for number in range(int(match["total"])):
            name = f"{match['split']}-{number:0{width}d}-of-{match['total']}"
            if not any(other.startswith(name) for other in there):
                raise InputError(
                    f"{name}.parquet is missing from {folder}, where {shard.name} says it should be: add it"
                )


def split_of(source: Source) -> dict[Path, int] | None:
    """Which split each shard holds, by its name; None if no name says so. Validation shards are test rows where there
    is no test shard, else training rows."""
    words = {}
    for shard in source.files:
        match = SHARD.match(shard.name)
        words[shard] = match["split"].lower() if match else ""
    if not any(word in TRAIN_NAMES + TEST_NAMES + VALIDATION_NAMES for word in words.values()):
        return None
    validation = TRAIN if any(word in TEST_NAMES for word in words.values()) else TEST
    meaning = dict.fromkeys(TRAIN_NAMES, TRAIN) | dict.fromkeys(TEST_NAMES, TEST)
    meaning |= dict.fromkeys(VALIDATION_NAMES, validation)
    for shard, word in words.items():
        if word not in meaning:
            raise InputError(f"{shard} is of no known split; name shards train-*, validation-* or test-*.parquet")
    return {shard: meaning[word] for shard, word in words.items()}


def open_shard(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except pa.ArrowInvalid as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise damaged(path, error) if error.errno is None else explain_os_error(error, path, "read") from error


def damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged or cut short: it cannot be read as Parquet ({error}); get the file again")


def count(source: Source) -> tuple[int, int] | None:
    splits = split_of(source)
    if splits is None:
        return None
    rows = [0, 0]
    for shard, split in splits.items():
        rows[split] += open_shard(shard).metadata.num_rows
    return rows[TRAIN], rows[TEST]


def pick(shard: Path, names: list[str], wanted: tuple[str, ...], what: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise InputError(f"{shard} has no {what} column: it has {', '.join(names)}; name it {' or '.join(wanted)}")


def features_of(schema: Any) -> dict[str, Any]:
    """The `features` of the schema metadata; empty if there are none."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


class Column:
    """A column of class labels: whole numbers named by the metadata, or texts."""

    def __init__(self, name: str, features: dict[str, Any]) -> None:
        self.name = name
        feature = features.get(name)
        self.names: list[str] | None = feature.get("names") if isinstance(feature, dict) else None
        self.parts: list[list[Any]] = []
        self.shards: list[tuple[Path, int]] = []  # shard and its first row in each part

    def add(self, values: list[Any], shard: Path, first: int) -> None:
        self.parts.append(values)
        self.shards.append((shard, first))

    def finish(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """(N,) int64 ids and their names."""
        values = [value for part in self.parts for value in part]
        if values and all(isinstance(value, str) for value in values):
            names = sorted(set(values))
            ids = {name: index for index, name in enumerate(names)}
            return np.array([ids[value] for value in values], np.int64), tuple(names)
        limit = len(self.names) if self.names is not None else None
        for part, (shard, first) in zip(self.parts, self.shards, strict=True):
            for index, value in enumerate(part):
                if not isinstance(value, int) or value < 0 or (limit is not None and value >= limit):
                    span = f"0..{limit - 1}" if limit is not None else "0, 1, 2 ..."
                    raise InputError(f"{shard}, row {first + index}: {self.name} is {value!r}, not one of {span}")
        labels = np.array(values, np.int64)
        return labels, tuple(self.names or map(str, range(int(labels.max(initial=-1)) + 1)))


def read(source: Source, size: int | None) -> Decoded:
    shards = [(path, open_shard(path)) for path in source.files]
    splits = split_of(source)
    first_path, first = shards[0]
    available = first.schema_arrow.names
    features = features_of(first.schema_arrow)
    image = pick(first_path, available, IMAGE_COLUMNS, "image")
    columns = {"label": Column(pick(first_path, available, LABEL_COLUMNS, "label"), features)}
    columns |= {name: Column(name, features) for name in (COARSE, GROUP) if name in available}
    in_rows = splits is None and SPLIT in available
    split: list[NDArray[np.uint8]] = []
    canvas = Canvas(sum(shard.metadata.num_rows for _, shard in shards), size)
    at = 0
    for path, shard in shards:
        missing = {image, *(column.name for column in columns.values())} - set(shard.schema_arrow.names)
        if missing:
            raise InputError(f"{path} has no column {', '.join(sorted(missing))}, which {first_path.name} has")
        for row, table in row_groups(path, shard):
            blobs = encoded(path, row, table[image])
            canvas.put(at, blobs, lambda index, path=path, row=row: f"{path}, row {row + index}")  # type: ignore[misc]  # mypy cannot type a lambda with defaults
            for column in columns.values():
                column.add(table[column.name].to_pylist(), path, row)
            if in_rows:
                split.append(split_in_rows(path, row, table[SPLIT].to_pylist()))
            elif splits is not None:
                split.append(np.full(len(table), splits[path], np.uint8))
            at += len(table)
    labels, names = columns["label"].finish()
    coarse, coarse_names = columns[COARSE].finish() if COARSE in columns else (None, ())
    groups, group_names = columns[GROUP].finish() if GROUP in columns else (None, ())
    return Decoded(
        images=canvas.finish(),
        labels=labels,
        split=np.concatenate(split) if split else None,
        names=names,
        coarse=coarse,
        coarse_names=coarse_names,
        groups=groups,
        group_names=group_names,
    )


def row_groups(path: Path, shard: Any) -> Iterator[tuple[int, Any]]:
    """(first row, table) of each row group."""
    import pyarrow as pa

    row = 0
    for index in range(shard.num_row_groups):
        try:
            table = shard.read_row_group(index)
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error
        yield row, table
        row += len(table)


def encoded(path: Path, row: int, column: Any) -> list[bytes]:
    """The encoded images of a column of struct<bytes, path> or of plain bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise InputError(f"{path}: the image column has type {column.type}; it must be bytes or struct<bytes, path>")
    blobs: list[bytes | None] = column.to_pylist()
    if None in blobs:
        raise InputError(
            f"{path}, row {row + blobs.index(None)}: there are no image bytes (a path alone is not enough)"
        )
    return blobs  # type: ignore[return-value]  # no None left, which mypy cannot see


def split_in_rows(path: Path, row: int, values: list[Any]) -> NDArray[np.uint8]:
    """A `split` column of the words train, validation (counted as train), test."""
    meaning = dict.fromkeys(TRAIN_NAMES + VALIDATION_NAMES, TRAIN) | dict.fromkeys(TEST_NAMES, TEST)
    for index, value in enumerate(values):
        if value not in meaning:
            raise InputError(f"{path}, row {row + index}: split is {value!r}, not train, validation or test")
    return np.array([meaning[value] for value in values], np.uint8)
