"""Published data sets whose lists say which image is of which class, and in which part.

Splits are those of the MTIL benchmark (`mtil` card, section 4): FGVC-Aircraft `train` and `test`, DTD partition 1
`train` and `test`, Flowers102 `trnid` and `tstid` (their validation images are left out), Oxford-IIIT Pet `trainval`
and `test`; Food-101, Stanford Cars and CUB-200-2011 as their makers split them. Classes are named as in torchvision.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clbench.data.catalogue import catalogue
from clbench.data.sources.published.layout import Layout, Listing, listed, read_lines
from clbench.errors import InputError

__all__ = ["LISTS"]

Pairs = list[tuple[Path, int]]


def words(path: Path, number: int) -> Iterator[list[str]]:
    """The lines of a list, cut into `number` words, the last of which takes the rest. InputError for a shorter line."""
    for line in read_lines(path):
        parts = line.split(None, number - 1)
        if len(parts) < number:
            raise InputError(f"{path}: line {line!r} has fewer than {number} words; the file is damaged: get it again")
        yield parts


def whole(text: str, path: Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{path}: {text!r} is no whole number; the file is damaged: get it again") from None


def number_of(name: str, names: dict[str, int], path: Path) -> int:
    if name not in names:
        raise InputError(f"{path} has a class {name!r} that is listed nowhere; get the lists again")
    return names[name]


def read_aircraft(root: Path) -> Listing:
    """`1025794 707-320` in images_variant_<part>.txt; classes in the order of variants.txt."""
    names = read_lines(root / "variants.txt")
    ids = {name: index for index, name in enumerate(names)}

    def part(name: str) -> Pairs:
        path = root / f"images_variant_{name}.txt"
        return [(root / "images" / f"{image}.jpg", number_of(c, ids, path)) for image, c in words(path, 2)]

    return listed(names, part("train"), part("test"), root)


def read_dtd(root: Path) -> Listing:
    """`banded/banded_0002.jpg` in labels/<part>1.txt, partition 1 of ten."""
    parts = {part: read_lines(root / "labels" / f"{part}1.txt") for part in ("train", "test")}
    names = sorted({line.partition("/")[0] for lines in parts.values() for line in lines})
    train, test = ([(root / "images" / f, names.index(f.partition("/")[0])) for f in parts[p]] for p in parts)
    return listed(names, train, test, root)


def read_food(root: Path) -> Listing:
    """{"apple_pie": ["apple_pie/1005649", ...], ...} in meta/<part>.json."""

    def part(name: str) -> dict[str, list[str]]:
        path = root / "meta" / f"{name}.json"
        try:
            value = json.loads("\n".join(read_lines(path)))
        except ValueError as error:
            raise InputError(f"{path} is damaged: it is not JSON ({error}); get it again") from None
        if not isinstance(value, dict) or not all(isinstance(images, list) for images in value.values()):
            raise InputError(f"{path} does not list the images of each class; get it again")
        return value

    train, test = part("train"), part("test")
    names = sorted(train)
    ids = {name: index for index, name in enumerate(names)}

    def pairs(found: dict[str, list[str]]) -> Pairs:
        labels = {c: number_of(c, ids, root / "meta") for c in sorted(found)}
        return [(root / "images" / f"{image}.jpg", labels[c]) for c in labels for image in found[c]]

    return listed(names, pairs(train), pairs(test), root)


def read_pets(root: Path) -> Listing:
    """`Abyssinian_100 1 1 1` in annotations/<part>.txt: image, class from 1, species, breed."""
    spelt: dict[int, str] = {}

    def part(name: str) -> Pairs:
        path, out = root / "annotations" / f"{name}.txt", []
        for image, number, _ in words(path, 3):
            label = whole(number, path) - 1
            spelt[label] = " ".join(word.title() for word in image.rpartition("_")[0].split("_"))
            out.append((root / "images" / f"{image}.jpg", label))
        return out

    train, test = part("trainval"), part("test")
    return listed([spelt[label] for label in sorted(spelt)], train, test, root)


def read_cub(root: Path) -> Listing:
    """Four lists by image or class number: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt."""
    names = [name.partition(".")[2].replace("_", " ") for _, name in words(root / "classes.txt", 2)]
    path = root / "image_class_labels.txt"
    labels = {image: whole(c, path) for image, c in words(path, 2)}
    trained = dict(words(root / "train_test_split.txt", 2))
    parts: dict[str, Pairs] = {"1": [], "0": []}
    for image, file in words(root / "images.txt", 2):
        if image not in labels or trained.get(image) not in parts:
            raise InputError(f"{root}: image {image} of images.txt has no class or no split; unpack CUB-200-2011 again")
        parts[trained[image]].append((root / "images" / file, labels[image] - 1))
    return listed(names, parts["1"], parts["0"], root)


# -- lists in Matlab's format -----------------------------------------------------------------------------------------
def matlab(path: Path, *names: str) -> list[Any]:
    """Variables of a .mat file, arrays of one dimension. Raises InputError if it cannot be read or lacks one."""
    from scipy.io import loadmat

    try:
        found = loadmat(path, squeeze_me=True)
        return [np.reshape(found[name], -1) for name in names]
    except Exception as error:  # scipy's reader raises almost anything on damaged bytes
        raise InputError(f"{path} cannot be read as a list of {', '.join(names)} ({error}); get it again") from None


def read_flowers(root: Path) -> Listing:
    """imagelabels.mat: class from 1 of jpg/image_00001.jpg, ...; setid.mat: image numbers from 1 of each part."""
    (labels,) = matlab(root / "imagelabels.mat", "labels")
    parts = matlab(root / "setid.mat", "trnid", "tstid")
    if any(len(part) and not 1 <= part.min() <= part.max() <= len(labels) for part in parts):
        raise InputError(f"{root}: setid.mat names images that imagelabels.mat does not have; get both again")
    train, test = ([(root / "jpg" / f"image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in part] for part in parts)
    return listed(list(catalogue()["flowers102"].class_names), train, test, root)


def read_cars(root: Path) -> Listing:
    """Annotations with `fname` and `class` from 1; class names in devkit/cars_meta.mat. Those of the test images, with
    labels, are a file of its own, which lies beside the folders or in devkit."""
    (names,) = matlab(root / "devkit" / "cars_meta.mat", "class_names")
    labelled = "cars_test_annos_withlabels.mat"
    tested = next((p for p in (root / labelled, root / "devkit" / labelled) if p.is_file()), None)
    if tested is None:
        raise InputError(f"{labelled} missing from {root}, which holds the rest of Stanford Cars: add it")

    def part(path: Path, folder: str) -> Pairs:
        (rows,) = matlab(path, "annotations")
        if rows.dtype.names is None or not {"fname", "class"} <= set(rows.dtype.names):
            raise InputError(f"{path} has no file names and classes; take the file with labels")
        return [(root / folder / str(row["fname"]), int(row["class"]) - 1) for row in rows]

    train = part(root / "devkit" / "cars_train_annos.mat", "cars_train")
    listing = listed([str(name) for name in names], train, part(tested, "cars_test"), root)
    return listing._replace(lists=(tested,))


LISTS = (
    Layout(
        "aircraft",
        read_aircraft,
        marks=("images_variant_train.txt", "images_variant_test.txt", "variants.txt", "images"),
        inside=("", "data", "fgvc-aircraft-2013b/data"),
    ),
    Layout(
        "dtd-full",
        read_dtd,
        marks=("labels/train1.txt", "labels/test1.txt", "images"),
        inside=("", "dtd", "dtd/dtd"),
    ),
    Layout(
        "food101",
        read_food,
        marks=("meta/train.json", "meta/test.json", "images"),
        inside=("", "food-101"),
    ),
    Layout(
        "oxford-pet",
        read_pets,
        marks=("annotations/trainval.txt", "annotations/test.txt", "images"),
        inside=("", "oxford-iiit-pet"),
    ),
    Layout(
        "cub200",
        read_cub,
        marks=("image_class_labels.txt", "images.txt", "train_test_split.txt", "classes.txt", "images"),
        inside=("", "CUB_200_2011"),
    ),
    Layout(
        "flowers102",
        read_flowers,
        marks=("setid.mat", "imagelabels.mat", "jpg"),
        inside=("", "flowers-102"),
    ),
    Layout(
        "stanford-cars",
        read_cars,
        marks=("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_train", "cars_test"),
        inside=("", "stanford_cars"),
    ),
)
