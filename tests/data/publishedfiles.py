"""Writes tiny data sets in the layouts in which their makers publish them: three classes, images of several sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.io import savemat


class Made(NamedTuple):
    """What was written. rows: (file, class name, is test) of every image that belongs to the data set."""

    root: Path
    names: tuple[str, ...]
    rows: list[tuple[str, str, bool]]


def picture(path: Path, number: int) -> None:
    """A picture of one colour that tells its number, larger than it is wide or the other way round."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (20, 12) if number % 2 else (12, 24)
    Image.new("RGB", size, (number * 7 % 256, 255 - number, 40)).save(path, quality=95)


def deal(names: tuple[str, ...], per_class: int = 3) -> list[tuple[str, int, bool]]:
    """(class name, number from 1, is test) in class order; the last of each class is a test image."""
    return [(name, i + 1, i == per_class - 1) for name in names for i in range(per_class)]


def lines(path: Path, values: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{value}\n" for value in values))


def aircraft(root: Path) -> Made:
    names = ("ATR-42", "707-320", "Cessna 172")  # not sorted: the order of variants.txt counts
    rows, lists = [], {"train": [], "val": [], "test": []}
    for number, (name, _, test) in enumerate(deal(names)):
        lists["test" if test else "train"].append(f"{number:07d} {name}")
        rows.append((f"{number:07d}.jpg", name, test))
        picture(root / "data" / "images" / f"{number:07d}.jpg", number)
    lists["val"] = ["0000099 ATR-42"]
    picture(root / "data" / "images" / "0000099.jpg", 99)
    for part, content in lists.items():
        lines(root / "data" / f"images_variant_{part}.txt", content)
    lines(root / "data" / "variants.txt", list(names))
    return Made(root, names, rows)


def dtd(root: Path) -> Made:
    names, rows, lists = ("banded", "dotted", "woven"), [], {"train1": [], "test1": [], "val1": [], "train2": []}
    for number, (name, index, test) in enumerate(deal(names)):
        file = f"{name}/{name}_{index:04d}.jpg"
        lists["test1" if test else "train1"].append(file)
        rows.append((Path(file).name, name, test))
        picture(root / "images" / file, number)
    lists["val1"] = lists["train2"] = ["banded/banded_0099.jpg"]
    for part, content in lists.items():
        lines(root / "labels" / f"{part}.txt", content)
    return Made(root, names, rows)


def food(root: Path) -> Made:
    names, rows = ("apple_pie", "ramen", "waffles"), []
    lists: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
    for number, (name, _, test) in enumerate(deal(names)):
        lists[test].setdefault(name, []).append(f"{name}/{number}")
        rows.append((f"{number}.jpg", name, test))
        picture(root / "images" / name / f"{number}.jpg", number)
    for test, part in ((False, "train"), (True, "test")):
        lines(root / "meta" / f"{part}.json", [json.dumps(lists[test])])
    return Made(root, names, rows)


def pets(root: Path) -> Made:
    files = ("Abyssinian", "american_bulldog", "Bengal")  # ids are in the lists: cats are written with a capital letter
    names, rows, lists = ("Abyssinian", "American Bulldog", "Bengal"), [], {False: [], True: []}
    for number, (name, index, test) in enumerate(deal(names)):
        image = f"{files[names.index(name)]}_{index}"
        lists[test].append(f"{image} {names.index(name) + 1} 1 1")
        rows.append((f"{image}.jpg", name, test))
        picture(root / "images" / f"{image}.jpg", number)
    lines(root / "annotations" / "trainval.txt", lists[False])
    lines(root / "annotations" / "test.txt", lists[True])
    return Made(root, names, rows)


def cub(root: Path) -> Made:
    folders = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
    names = ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross")
    rows, images, labels, split = [], [], [], []
    for number, (folder, index, test) in enumerate(deal(folders), 1):
        file = f"{folder}/bird_{index}_{number}.jpg"
        images.append(f"{number} {file}")
        labels.append(f"{number} {folders.index(folder) + 1}")
        split.append(f"{number} {0 if test else 1}")
        rows.append((Path(file).name, names[folders.index(folder)], test))
        picture(root / "images" / file, number)
    lines(root / "images.txt", images)
    lines(root / "image_class_labels.txt", labels)
    lines(root / "train_test_split.txt", split)
    lines(root / "classes.txt", [f"{i} {folder}" for i, folder in enumerate(folders, 1)])
    return Made(root, names, rows)


def flowers(root: Path) -> Made:
    """Classes 1 to 3 of 102; one image is for validation only."""
    names = ("pink primrose", "hard-leaved pocket orchid", "canterbury bells")
    dealt, rows, labels = deal(names), [], []
    for number, (name, _, test) in enumerate(dealt, 1):
        labels.append(names.index(name) + 1)
        rows.append((f"image_{number:05d}.jpg", name, test))
        picture(root / "jpg" / f"image_{number:05d}.jpg", number)
    picture(root / "jpg" / "image_00010.jpg", 10)
    savemat(root / "imagelabels.mat", {"labels": np.array([[*labels, 1]], np.uint8)})
    ids = {test: [[i for i, row in enumerate(dealt, 1) if row[2] == test]] for test in (False, True)}
    savemat(
        root / "setid.mat", {"trnid": np.array(ids[False]), "tstid": np.array(ids[True]), "valid": np.array([[10]])}
    )
    return Made(root, names, rows)


def cars(root: Path) -> Made:
    names, rows = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"), []
    records: dict[bool, list[tuple[str, int]]] = {False: [], True: []}
    for number, (name, _, test) in enumerate(deal(names), 1):
        file = f"{number:05d}.jpg"
        records[test].append((file, names.index(name) + 1))
        rows.append((file, name, test))
        picture(root / ("cars_test" if test else "cars_train") / file, number)
    (root / "devkit").mkdir()
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array([list(names)], dtype=object)})
    for test, path in (
        (False, root / "devkit" / "cars_train_annos.mat"),
        (True, root / "cars_test_annos_withlabels.mat"),
    ):
        table = np.zeros((1, len(records[test])), dtype=[("fname", object), ("class", object)])
        for column, (file, label) in enumerate(records[test]):
            table[0, column] = (file, label)
        savemat(path, {"annotations": table})
    return Made(root, names, rows)


Writer = Callable[[Path], Made]
LISTED: dict[str, tuple[str, Writer]] = {
    "aircraft": ("fgvc-aircraft-2013b", aircraft),
    "dtd-full": ("dtd", dtd),
    "food101": ("food-101", food),
    "oxford-pet": ("oxford-iiit-pet", pets),
    "cub200": ("CUB_200_2011", cub),
    "flowers102": ("flowers-102", flowers),
    "stanford-cars": ("stanford_cars", cars),
}


def class_folders(root: Path, names: tuple[str, ...], per_class: int = 5) -> list[tuple[str, str]]:
    """<class>/<name>_<number>.jpg, made in another order than their names'; (path, class name) in sorted order."""
    out = []
    for number, name in enumerate(names):
        for i in reversed(range(per_class)):
            picture(root / name / f"image_{i:04d}.jpg", number * per_class + i)
            out.append((f"{name}/image_{i:04d}.jpg", name))
    return sorted(out)
