"""The catalogue of known data sets, read from `datasets.toml`, without importing torch."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

from clbench.errors import InputError, unknown_name

__all__ = ["Dataset", "Download", "KnownFile", "catalogue", "dataset", "list_datasets", "normalisation"]


@dataclass(frozen=True)
class KnownFile:
    """A published checksum. `bytes`: if given, the checksum holds only for a file of that size (Parquet shards of other
    makers carry the same names). md5 or sha256, hex."""

    md5: str = ""
    sha256: str = ""
    bytes: int | None = None


@dataclass(frozen=True)
class Download:
    """Where the published files can be had: `mirrors` are tried in order, each with a file's name behind it.
    to: their folder inside a data folder."""

    mirrors: tuple[str, ...]
    to: str = ""


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set. See the head of `datasets.toml` for the fields."""

    name: str
    title: str
    rows: tuple[int, int]
    num_classes: int
    shape: tuple[int, ...]
    licence: str
    source: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    images_of: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    layout: str = ""
    class_names: tuple[str, ...] = ()
    coarse: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows_per_class: tuple[int, int] | None = None
    subset_of: str | None = None
    embedded: bool = False
    files: Mapping[str, KnownFile] = field(default_factory=dict)
    download: Download | None = None

    @property
    def archives(self) -> tuple[str, ...]:
        """Names of the files that a download consists of."""
        return tuple(name for name in self.files if name.endswith(".gz"))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=1)
def _document() -> dict[str, Any]:
    return tomllib.loads(files("clbench.data").joinpath("datasets.toml").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def catalogue() -> dict[str, Dataset]:
    """All known data sets by name. A subset inherits from its full set what it doesn't say itself."""
    tables: dict[str, dict[str, Any]] = _document()["dataset"]
    out = {}
    for name, own in tables.items():
        full = tables.get(own.get("subset_of", ""), {})
        inherited = ("num_classes", "shape", "mean", "std", "images_of", "class_names", "coarse", "source", "licence")
        table = {key: full[key] for key in inherited if key in full} | own
        known = {file: KnownFile(**sums) for file, sums in table.pop("files", {}).items()}
        download = table.pop("download", None)
        coarse = {parent: tuple(children) for parent, children in table.pop("coarse", {}).items()}
        out[name] = Dataset(
            name=name,
            files=known,
            coarse=coarse,
            download=download and Download(**{key: _frozen(value) for key, value in download.items()}),
            **{key: _frozen(value) for key, value in table.items()},
        )
    return out


def dataset(name: str) -> Dataset:
    """The entry of a known data set. Raises InputError with the nearest names."""
    known = catalogue()
    if name not in known:
        raise unknown_name("dataset", name, known, hint="(a path to a folder or a Parquet file works too)")
    return known[name]


def list_datasets() -> list[dict[str, Any]]:
    """One plain record per known data set, for `clbench list datasets`."""
    return [
        {
            "name": entry.name,
            "title": entry.title,
            "classes": entry.num_classes,
            "shape": list(entry.shape),
            "train_rows": entry.rows[0],
            "test_rows": entry.rows[1],
            "embedded": entry.embedded,
            "licence": entry.licence,
        }
        for entry in catalogue().values()
    ]


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel on [0, 1] of a data set or of a common pretraining (`imagenet`, `clip`)."""
    common = _document()["normalisation"]
    if name in common:
        return tuple(common[name]["mean"]), tuple(common[name]["std"])
    if name not in catalogue():
        raise unknown_name("normalisation", name, [*common, *catalogue()])
    entry = catalogue()[name]
    if not entry.mean:
        raise InputError(
            f"the mean and deviation of {name} are not published; use normalize(imagenet), normalize(clip), or numbers"
        )
    return entry.mean, entry.std
