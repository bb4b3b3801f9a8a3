"""Damaged, cut, incomplete or foreign files: one sentence that names the file, and the row or image."""

import gzip
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import datafiles
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clbench.data import load
from clbench.errors import InputError


def shards(root: Path) -> Path:
    return datafiles.write_shards(root / "d", datafiles.make())


def damage_image(root: Path, kind: str) -> Path:
    """Parquet whose seventh training image has lost its tail."""
    data = datafiles.make()
    path = shards(root)
    blobs = [datafiles.encode(image, kind) for image in data.part(test=False).images[:9]]
    blobs[6] = blobs[6][: len(blobs[6]) // 3]
    table = pa.table({"image": pa.array(blobs), "label": data.labels[:9].tolist()})
    pq.write_table(table, path / "train-00000-of-00002.parquet", row_group_size=4)
    return path


def label_of(root: Path, value: object) -> Path:
    path = shards(root)
    table = pq.read_table(path / "train-00001-of-00002.parquet")
    labels = table["label"].to_pylist()
    labels[3] = value
    table = table.set_column(1, "label", pa.array(labels))
    pq.write_table(table, path / "train-00001-of-00002.parquet")
    return path


def after(write: Callable[[Path], Path], name: str, change: Callable[[Path], None]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        path = write(root)
        change(path / name if name else path)
        return path

    return make


def idx(root: Path) -> Path:
    return datafiles.write_idx(root / "d", datafiles.make(1, 28))


def cifar(root: Path) -> Path:
    return datafiles.write_cifar(root / "d", datafiles.make())


def archive(root: Path) -> Path:
    return datafiles.write_cifar_tar(root / "d.tar.gz", datafiles.make())


def folder(root: Path) -> Path:
    return datafiles.write_folder(root / "d", datafiles.make())


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /tmp/clbench-was-here",)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((32, 32), 60000, np.uint16)).save(path)


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "parquet cut": (
        after(shards, "train-00001-of-00002.parquet", lambda p: datafiles.cut(p, 0.7)),
        r"train-00001-of-00002\.parquet is damaged or cut short",
    ),
    "parquet empty": (
        after(shards, "test-00000-of-00001.parquet", lambda p: p.write_bytes(b"")),
        r"test-00000-of-00001\.parquet is damaged or cut short",
    ),
    "parquet shard missing": (
        after(shards, "train-00001-of-00002.parquet", Path.unlink),
        r"train-00001-of-00002\.parquet is missing from .*/d",
    ),
    "parquet of another kind": (
        lambda root: datafiles.write_parquet(root / "d" / "train.parquet", datafiles.make(), image="picture").parent,
        r"train\.parquet has no image column: it has picture, label",
    ),
    "png in parquet cut": (
        lambda root: damage_image(root, "PNG"),
        r"train-00000-of-00002\.parquet, row 6 cannot be decoded",
    ),
    "webp in parquet cut": (
        lambda root: damage_image(root, "WEBP"),
        r"train-00000-of-00002\.parquet, row 6 cannot be decoded",
    ),
    "label out of range": (
        lambda root: label_of(root, 3),
        r"train-00001-of-00002\.parquet, row 3: label is 3, not one of 0\.\.2",
    ),
    "label missing": (
        lambda root: label_of(root, None),
        r"train-00001-of-00002\.parquet, row 3: label is None",
    ),
    "gz cut": (
        after(idx, "train-images-idx3-ubyte.gz", lambda p: datafiles.cut(p, 0.6)),
        r"train-images-idx3-ubyte\.gz is damaged or cut short",
    ),
    "gz byte flipped": (
        after(idx, "t10k-labels-idx1-ubyte.gz", lambda p: datafiles.flip_byte(p, 20)),
        r"t10k-labels-idx1-ubyte\.gz (is damaged|is not an idx file)",
    ),
    "gz not packed": (
        after(idx, "train-images-idx3-ubyte.gz", lambda p: p.write_bytes(gzip.decompress(p.read_bytes()))),
        r"train-images-idx3-ubyte\.gz is damaged",
    ),
    "idx file missing": (
        after(idx, "t10k-labels-idx1-ubyte.gz", Path.unlink),
        r"t10k-labels-idx1-ubyte \(plain or \.gz\) missing from .*/d",
    ),
    "idx header wrong": (
        after(
            lambda root: datafiles.write_idx(root / "d", datafiles.make(1, 28), packed=False),
            "train-labels-idx1-ubyte",
            lambda p: datafiles.flip_byte(p, 2),
        ),
        r"train-labels-idx1-ubyte is not an idx file",
    ),
    "idx short": (
        after(
            lambda root: datafiles.write_idx(root / "d", datafiles.make(1, 28), packed=False),
            "t10k-images-idx3-ubyte",
            lambda p: datafiles.cut(p, 0.9),
        ),
        r"t10k-images-idx3-ubyte is damaged or cut short: it has \d+ bytes",
    ),
    "tar cut": (after(archive, "", lambda p: datafiles.cut(p, 0.5)), r"d\.tar\.gz is damaged or cut short"),
    "tar byte flipped": (
        after(archive, "", lambda p: datafiles.flip_byte(p, p.stat().st_size // 2)),
        r"d\.tar\.gz is damaged or cut short",
    ),
    "pickle cut": (after(cifar, "train", lambda p: datafiles.cut(p, 0.5)), r"d/train cannot be read as a CIFAR file"),
    "pickle that runs code": (
        after(cifar, "test", lambda p: p.write_bytes(pickle.dumps({"data": Evil()}))),
        r"d/test cannot be read as a CIFAR file \(it asks for (posix|os|nt)\.system",
    ),
    "pickle of something else": (
        after(cifar, "meta", lambda p: p.write_bytes(pickle.dumps([1, 2]))),
        r"d/meta holds a list where a CIFAR file has a dictionary",
    ),
    "cifar file missing": (after(cifar, "test", Path.unlink), r"test missing from .*/d"),
    "png in folder cut": (
        after(folder, "train/bee/007.png", lambda p: datafiles.cut(p, 0.5)),
        r"train/bee/007\.png cannot be decoded",
    ),
    "png byte flipped": (
        after(folder, "test/ant/018.png", lambda p: datafiles.flip_byte(p, 200)),
        r"test/ant/018\.png cannot be decoded",
    ),
    "text called png": (
        after(folder, "train/cat/002.png", lambda p: p.write_text("no picture")),
        r"train/cat/002\.png cannot be decoded",
    ),
    "sixteen bits": (
        after(folder, "train/cat/002.png", sixteen_bits),
        r"train/cat/002\.png has pixels of mode I;16",
    ),
    "no test images": (
        lambda root: datafiles.write_folder(root / "d", datafiles.make().part(test=False)),
        r"has training images but none below test/",
    ),
    "nothing there": (lambda root: root / "elsewhere" / "d", r"there is nothing at .*elsewhere"),
    "a folder of nothing": (lambda root: root, r"holds no images that can be read"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_names_the_file(case: str, tmp_path: Path) -> None:
    write, pattern = CASES[case]
    with pytest.raises(InputError) as caught:
        load(write(tmp_path))
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert "\n" not in message
    assert not Path("/tmp/clbench-was-here").exists()


def test_nothing_is_cached_from_damaged_files(tmp_path: Path, cache: Path) -> None:
    path = damage_image(tmp_path, "PNG")
    with pytest.raises(InputError):
        load(path)
    assert not list(cache.glob("store/*"))
