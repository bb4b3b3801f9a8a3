"""Writes one tiny data set in every format that `clbench.data` reads."""

import gzip
import io
import json
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

NAMES = ("ant", "bee", "cat")
COARSE = ("insect", "mammal")
COARSE_OF = (0, 0, 1)


@dataclass(frozen=True)
class Pixels:
    """images (N, C, H, W) uint8; labels (N,); test (N,) bool."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    test: NDArray[np.bool_]
    names: tuple[str, ...] = NAMES

    def shuffled(self, seed: int) -> "Pixels":
        order = np.random.default_rng(seed).permutation(len(self.labels))
        return Pixels(self.images[order], self.labels[order], self.test[order], self.names)

    def part(self, test: bool) -> "Pixels":
        keep = self.test == test
        return Pixels(self.images[keep], self.labels[keep], self.test[keep], self.names)


def make(channels: int = 3, side: int = 32, train: int = 18, test: int = 9, seed: int = 0) -> Pixels:
    """Random images with some duplicates, classes in turn."""
    total = train + test
    images = np.random.default_rng(seed).integers(0, 256, (total, channels, side, side), dtype=np.uint8)
    images[3] = images[0]  # the same picture in the same class,
    images[4] = images[0]  # in another class,
    images[train] = images[0]  # and in the test rows
    return Pixels(images, np.arange(total) % len(NAMES), np.arange(total) >= train)


def encode(image: NDArray[np.uint8], kind: str = "PNG", mode: str | None = None) -> bytes:
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(
        file, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})
    )
    return file.getvalue()


def write_folder(root: Path, data: Pixels, split: bool = True) -> Path:
    for index, (image, label, test) in enumerate(zip(data.images, data.labels, data.test, strict=True)):
        folder = root / ("test" if test else "train") if split else root
        path = folder / data.names[label] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image))
    return root


def features(image: str, label: str, names: tuple[str, ...], **more: tuple[str, ...]) -> bytes:
    columns: dict[str, object] = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    columns |= {name: {"names": list(values), "_type": "ClassLabel"} for name, values in more.items()}
    return json.dumps({"info": {"features": columns}}).encode()


def write_parquet(
    path: Path,
    data: Pixels,
    kind: str = "PNG",
    *,
    image: str = "image",
    label: str = "label",
    struct: bool = True,
    mode: str | None = None,
    extra: dict[str, list[object]] | None = None,
    more: dict[str, tuple[str, ...]] | None = None,
    metadata: bool = True,
) -> Path:
    blobs = [encode(picture, kind, mode) for picture in data.images]
    pictures: pa.Array = pa.array(blobs, pa.binary())
    if struct:
        pictures = pa.StructArray.from_arrays([pictures, pa.array([None] * len(blobs), pa.string())], ["bytes", "path"])
    table = pa.table({image: pictures, label: pa.array(data.labels.tolist(), pa.int64()), **(extra or {})})
    if metadata:
        table = table.replace_schema_metadata({"huggingface": features(image, label, data.names, **(more or {}))})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=5, compression="NONE")
    return path


def write_shards(root: Path, data: Pixels, kind: str = "PNG", train_shards: int = 2, **options: object) -> Path:
    train = data.part(test=False)
    pieces = np.array_split(np.arange(len(train.labels)), train_shards)
    for number, piece in enumerate(pieces):
        shard = Pixels(train.images[piece], train.labels[piece], train.test[piece], train.names)
        write_parquet(root / f"train-{number:05d}-of-{train_shards:05d}.parquet", shard, kind, **options)  # type: ignore[arg-type]
    write_parquet(root / "test-00000-of-00001.parquet", data.part(test=True), kind, **options)  # type: ignore[arg-type]
    return root


def cifar_files(data: Pixels, fine: bool = True) -> dict[str, bytes]:
    """The pickles of CIFAR-100 (fine and coarse labels) or of CIFAR-10 (five training batches)."""

    def batch(part: Pixels) -> bytes:
        labels = part.labels.tolist()
        content: dict[str, object] = {
            "data": part.images.reshape(len(labels), -1),
            "filenames": ["x.png"] * len(labels),
        }
        if fine:
            content |= {"fine_labels": labels, "coarse_labels": [COARSE_OF[label] for label in labels]}
        else:
            content |= {"labels": labels, "batch_label": "batch"}
        return pickle.dumps(content, protocol=2)

    train, test = data.part(test=False), data.part(test=True)
    if fine:
        meta = {"fine_label_names": list(data.names), "coarse_label_names": list(COARSE)}
        return {"train": batch(train), "test": batch(test), "meta": pickle.dumps(meta, protocol=2)}
    files = {"test_batch": batch(test), "batches.meta": pickle.dumps({"label_names": list(data.names)}, protocol=2)}
    for number, piece in enumerate(np.array_split(np.arange(len(train.labels)), 5), 1):
        files[f"data_batch_{number}"] = batch(Pixels(train.images[piece], train.labels[piece], train.test[piece]))
    return files


def write_cifar(root: Path, data: Pixels, fine: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in cifar_files(data, fine).items():
        (root / name).write_bytes(content)
    return root


def write_cifar_tar(path: Path, data: Pixels, fine: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in cifar_files(data, fine).items():
            member = tarfile.TarInfo(f"cifar-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return header + array.tobytes()


def write_idx(root: Path, data: Pixels, packed: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part, test in (("train", False), ("t10k", True)):
        piece = data.part(test)
        contents = {"images-idx3": idx(piece.images[:, 0]), "labels-idx1": idx(piece.labels.astype(np.uint8))}
        for what, content in contents.items():
            path = root / f"{part}-{what}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return root


def flip_byte(path: Path, at: int) -> None:
    """Change one byte in place; `at` counts from the end if negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(bytes(data))


def cut(path: Path, keep: float) -> None:
    """Keep only the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
