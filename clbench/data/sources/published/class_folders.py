"""Published data sets that are folders of classes, split at random as papers do it.

MTIL (`mtil` card, section 4): torch's `random_split` with seed 42 cuts 80 % of Caltech101, EuroSAT and SUN397 off.
ImageNet-R (`si_blurry` card, section 3): torch's permutation with seed 0, its first 80 %. ImageNet-A is split in the
same way, by our choice: no list of a published split was to be had.

The order of images before the split is part of it: class folders by name, files by name. SUN397's official order is
that of a file system and cannot be had again; here it is that of sorted paths.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clbench.data.classes import TEST, TRAIN
from clbench.data.sources.folder import images_below
from clbench.data.sources.published.layout import Layout, Listing, read_lines
from clbench.errors import InputError

__all__ = ["FOLDERS", "random_split"]

TRAIN_SHARE = 0.8
EUROSAT = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential",
    "River", "SeaLake",
)  # fmt: skip


def random_split(number: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, test) items of `torch.utils.data.random_split(items, [int(0.8 n), rest], Generator().manual_seed(seed))`,
    in the order it gives them. torch promises nothing for its permutations, so tests pin them."""
    permutation = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).numpy()
    cut = int(TRAIN_SHARE * number)
    return permutation[:cut], permutation[cut:]


def with_random_split(names: list[str], files: list[Path], labels: list[int], seed: int) -> Listing:
    split = np.full(len(files), TRAIN)
    split[random_split(len(files), seed)[1]] = TEST
    return Listing(tuple(names), tuple(files), tuple(labels), tuple(split.tolist()))


def read_folders(root: Path, seed: int, leave_out: tuple[str, ...] = ()) -> Listing:
    """<class>/<image>, as torchvision's ImageFolder lists it."""
    names = sorted(child.name for child in root.iterdir() if child.is_dir() and child.name[0] != ".")
    names = [name for name in names if name not in leave_out]
    found = [images_below(root / name) for name in names]
    files = [file for images in found for file in images]
    labels = [label for label, images in enumerate(found) for _ in images]
    return with_random_split(names, files, labels, seed)


def read_wordnet(root: Path, seed: int) -> Listing:
    """<wordnet id>/<image>; README.txt, where it is there, names the classes (`n01443537 goldfish`)."""
    listing = read_folders(root, seed)
    readme = root / "README.txt"
    lines = read_lines(readme) if readme.is_file() else []
    matches = [re.fullmatch(r"(n\d{8})[ \t]+(\S.*)", line) for line in lines]
    known = {match[1]: match[2] for match in matches if match is not None}
    names = tuple(known.get(name, name) for name in listing.names)
    return listing._replace(names=names, lists=(readme,) if lines else ())


def read_sun(root: Path, seed: int) -> Listing:
    """`/a/apartment_building/outdoor` in ClassName.txt, and images sun_*.jpg in the folders it names."""
    names = [line[3:] for line in read_lines(root / "ClassName.txt")]
    ids = {name: label for label, name in enumerate(names)}
    files = [file for file in images_below(root) if file.name.startswith("sun_") and file.suffix == ".jpg"]
    labels = []
    for file in files:
        name = "/".join(file.relative_to(root).parts[1:-1])
        if name not in ids:
            raise InputError(f"{file} is in no folder that ClassName.txt names; unpack SUN397 again")
        labels.append(ids[name])
    return with_random_split(names, files, labels, seed)


FOLDERS = (
    Layout(
        "caltech101-full",
        partial(read_folders, seed=42, leave_out=("BACKGROUND_Google",)),
        marks=("yin_yang", "Faces_easy", "accordion"),
        inside=("", "101_ObjectCategories", "caltech-101/101_ObjectCategories", "caltech101/101_ObjectCategories"),
    ),
    Layout("eurosat", partial(read_folders, seed=42), marks=EUROSAT, inside=("", "2750", "EuroSAT", "EuroSAT_RGB")),
    Layout(
        "sun397",
        partial(read_sun, seed=42),
        marks=("ClassName.txt", "a"),
        inside=("", "SUN397"),
    ),
    # any folder of ImageNet's classes looks like these two
    Layout("imagenet-r", partial(read_wordnet, seed=0)),
    Layout("imagenet-a", partial(read_wordnet, seed=0)),
)
