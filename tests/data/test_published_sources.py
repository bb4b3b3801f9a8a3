"""Data sets in the layouts of their makers: which image is what, in which part, and in which order they are split."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import publishedfiles
import pytest
import torch
from PIL import Image
from publishedfiles import LISTED
from scipy.io import savemat

from clbench.data import TEST, load, load_all, parse_view
from clbench.data.catalogue import catalogue, dataset
from clbench.data.sources import Source, detect, module
from clbench.data.sources.published import recognise
from clbench.data.sources.published.class_folders import EUROSAT, random_split
from clbench.errors import InputError

MTIL = (
    "aircraft", "caltech101-full", "cifar100", "dtd-full", "eurosat", "flowers102", "food101", "mnist", "oxford-pet",
    "stanford-cars", "sun397",
)  # fmt: skip
# sha256 of the index lists as little-endian int64, from the mtil vectors (ZSCL's code, torch 2.15): n, train, test
SPLITS = {
    "Caltech101": (8_677, "f423670f5c553ce64ffbe11495701326377015c49efb0f9f0f513a681fe29c8d",
                   "9335aa9164cc9ebfbb9936aeacfcd44b68abbb7117165beecc22f4cc75b4a506"),
    "EuroSAT": (27_000, "f493f7932a8f2d970b5fa74a817d31ec3628691c7937b85cd69f6ebc18034b29",
                "c8af882faf2841dc1605fc893c0f4083fe4283d78f7369beda337e6894079b89"),
    "SUN397": (108_754, "4a3edff2340db957479d43151de68161ddc16a5117297f50d73c2286bca843fd",
               "9fec8ae2096951b0d37414f8ef0f57bbf331e5edac0efb8278261dad8128cf6d"),
}  # fmt: skip


def source_at(path: Path) -> Source:
    source = detect(path)
    assert source is not None
    return source


def listed(path: Path) -> list[tuple[str, str, bool]]:
    """(file name, class name, is test) of what is found at a path."""
    found = recognise(path)
    assert found is not None
    listing = found[0].read(found[1])
    rows = zip(listing.files, listing.labels, listing.split, strict=True)
    return [(file.name, listing.names[label], split == TEST) for file, label, split in rows]


@pytest.mark.parametrize("name", LISTED)
def test_lists_are_read_as_they_are_meant(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write = LISTED[name]
    made = write(tmp_path / folder)
    assert sorted(listed(made.root)) == sorted(made.rows)
    source = source_at(made.root)
    assert source.kind == "published"
    assert module("published").count(source) == (6, 3)

    num_classes = 102 if name == "flowers102" else 3
    known = replace(dataset(name), rows=(6, 3), num_classes=num_classes)
    monkeypatch.setitem(catalogue(), name, known)
    store = load(name, roots=[tmp_path], size=8)
    assert store.name == name
    assert store.classes.names[:3] == made.names
    assert torch.bincount(store.split).tolist() == [6, 3]
    # each picture has one colour, which no other has: the pixels belong to the labels
    files = {file.name: file for file in source.files}
    expected = sorted((made.names.index(name), test, red(files[file])) for file, name, test in made.rows)
    found = zip(store.labels.tolist(), (store.split == TEST).tolist(), store.images[:, 0, 4, 4].tolist(), strict=True)
    assert sorted(found) == expected
    assert load(made.root, size=8).fingerprint == store.fingerprint
    assert len(store.mean or ()) == 3, "measured, where none is published"


def red(path: Path) -> int:
    with Image.open(path) as image:
        return int(np.asarray(image)[0, 0, 0])


def test_a_folder_around_it_will_do(tmp_path: Path) -> None:
    """As torchvision unpacks them: dtd/dtd, fgvc-aircraft-2013b/data, eurosat/2750, caltech101/101_ObjectCategories."""
    made = publishedfiles.dtd(tmp_path / "dtd" / "dtd" / "dtd")
    assert source_at(tmp_path / "dtd").root == source_at(made.root).root == made.root
    planes = publishedfiles.aircraft(tmp_path / "all" / "fgvc-aircraft-2013b")
    assert source_at(tmp_path / "all").root == planes.root / "data"
    publishedfiles.class_folders(tmp_path / "eurosat" / "2750", EUROSAT, 2)
    assert source_at(tmp_path / "eurosat").kind == "published"


# -- random splits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SPLITS)
def test_random_split_is_that_of_the_official_code(name: str) -> None:
    number, *expected = SPLITS[name]
    parts = random_split(number, 42)
    assert [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest() for part in parts] == expected
    assert len(parts[0]) == int(0.8 * number)
    assert sorted(np.concatenate(parts).tolist()) == list(range(number))


def test_imagenet_r_is_split_by_torch_seed_0() -> None:
    """First 80 % of torch's permutation of 30,000 with seed 0; computed with torch 2.15, as the official code would."""
    train, test = random_split(30_000, 0)
    assert (len(train), len(test)) == (24_000, 6_000)
    assert train[:5].tolist() == [6044, 23117, 9729, 26406, 14191]
    assert dataset("imagenet-r").rows == (24_000, 6_000)


@pytest.mark.parametrize(
    ("folder", "names", "seed"),
    [
        ("101_ObjectCategories", ("Faces_easy", "accordion", "yin_yang"), 42),
        ("EuroSAT_RGB", EUROSAT, 42),
        ("imagenet-r", ("n01443537", "n01484850", "n12267677"), 0),
        ("imagenet_a", ("n01498041", "n01531178"), 0),
    ],
)
def test_sorted_folders_are_split_at_random(folder: str, names: tuple[str, ...], seed: int, tmp_path: Path) -> None:
    root = tmp_path / folder
    if folder.startswith("101"):
        publishedfiles.class_folders(root, ("BACKGROUND_Google",))
    files = publishedfiles.class_folders(root, names)
    train = set(random_split(len(files), seed)[0].tolist())
    rows = listed(root)
    assert rows == [(Path(file).name, name, i not in train) for i, (file, name) in enumerate(files)]
    assert module("published").count(source_at(root)) == (len(train), len(files) - len(train))
    before = sum(len(list((root / name).iterdir())) for name in names)
    assert before == len(files)


def test_sun397_is_split_over_sorted_paths(tmp_path: Path) -> None:
    root = tmp_path / "SUN397"
    names = ("abbey", "apartment_building/outdoor", "zoo")
    publishedfiles.lines(root / "ClassName.txt", [f"/{name[0]}/{name}" for name in names])
    files = []
    for number, name in enumerate(names):
        for i in (2, 0, 1):
            file = root / name[0] / name / f"sun_{i}.jpg"
            publishedfiles.picture(file, number * 3 + i)
            files.append((file, name))
    publishedfiles.picture(root / "a" / "abbey" / "other.jpg", 90)
    train = set(random_split(9, 42)[0].tolist())
    expected = [(file.name, name, i not in train) for i, (file, name) in enumerate(sorted(files))]
    assert listed(root) == expected
    publishedfiles.picture(root / "x" / "unknown" / "sun_9.jpg", 91)
    with pytest.raises(InputError, match=r"sun_9\.jpg is in no folder that ClassName\.txt names"):
        detect(root)


def test_readme_names_the_classes_of_imagenet_r(tmp_path: Path) -> None:
    root = tmp_path / "imagenet-r"
    publishedfiles.class_folders(root, ("n01443537", "n01484850"))
    publishedfiles.lines(root / "README.txt", ["ImageNet-R", "n01443537 goldfish", "n01484850 great white shark"])
    assert {row[1] for row in listed(root)} == {"goldfish", "great white shark"}
    assert root / "README.txt" in source_at(root).files, "names depend on it"


def test_other_folders_of_imagenet_classes_are_not_taken_for_these(tmp_path: Path) -> None:
    publishedfiles.class_folders(tmp_path / "mine", ("n01443537", "n12267677"))
    assert source_at(tmp_path / "mine").kind == "folder"
    for part in ("train", "test"):  # an archive with a split of its own: to be loaded by its path
        publishedfiles.class_folders(tmp_path / "imagenet-a" / part, ("n01443537", "n12267677"))
    assert source_at(tmp_path / "imagenet-a").kind == "folder"


# -- what is not as it should be --------------------------------------------------------------------------------------
def test_wrong_counts_are_not_the_known_data_set(tmp_path: Path) -> None:
    publishedfiles.pets(tmp_path / "oxford-iiit-pet")
    with pytest.raises(
        InputError, match=r"oxford-pet is not on this machine.* holds 6 \+ 3 rows, not the 3,680 \+ 3,669"
    ):
        load("oxford-pet", roots=[tmp_path], size=8)
    assert load(tmp_path / "oxford-iiit-pet", size=8).name == "oxford-iiit-pet"


def test_images_of_many_sizes_need_one(tmp_path: Path) -> None:
    root = publishedfiles.pets(tmp_path / "oxford-iiit-pet").root
    with pytest.raises(InputError, match=r"give one size for all, such as size=64"):
        load(root)
    with pytest.raises(
        InputError, match=r"the mean and deviation of food101 are not published; use normalize\(imagenet\)"
    ):
        parse_view("normalize(food101)")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("aircraft", "data/variants.txt", None, r"variants\.txt missing from .*data, which holds other parts"),
        ("aircraft", "data/variants.txt", "A380\n", r"variant_train\.txt has a class 'ATR-42' that is listed nowhere"),
        ("aircraft", "data/images_variant_test.txt", "0000001\n", r"line '0000001' has fewer than 2 words"),
        ("dtd-full", "labels/train1.txt", "banded/banded_7777.jpg\n", r"cannot read .*banded_7777\.jpg"),
        ("food101", "meta/test.json", "{", r"test\.json is damaged: it is not JSON"),
        ("food101", "meta/test.json", "[]", r"test\.json does not list the images of each class"),
        ("food101", "meta/test.json", '{"soup": ["soup/1"]}', r"has a class 'soup' that is listed nowhere"),
        ("oxford-pet", "annotations/test.txt", "Abyssinian_3 x 1 1\n", r"test\.txt: 'x' is no whole number"),
        ("oxford-pet", "annotations/test.txt", "Abyssinian_3 9 1 1\n", r"an_3\.jpg is of class 8, not one of 0 to 3"),
        ("cub200", "train_test_split.txt", "1 1\n", r"image 2 of images\.txt has no class or no split"),
        ("cub200", "classes.txt", "1 001.A\n", r"is of class 1, not one of 0 to 0"),
        ("flowers102", "setid.mat", "x", r"setid\.mat cannot be read as a list of trnid, tstid"),
        ("stanford-cars", "cars_test_annos_withlabels.mat", None, r"cars_test_annos_withlabels\.mat missing from"),
    ],
)  # fmt: skip
def test_damaged_lists(name: str, file: str, content: str | None, message: str, tmp_path: Path) -> None:
    folder, write = LISTED[name]
    root = write(tmp_path / folder).root
    (root / file).unlink()
    if content is not None:
        (root / file).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load(root, size=8)
    assert "\n" not in str(caught.value)


def test_flowers_and_cars_count_from_one(tmp_path: Path) -> None:
    root = publishedfiles.flowers(tmp_path / "flowers-102").root
    savemat(root / "setid.mat", {"trnid": [[0, 1]], "tstid": [[3]]})
    with pytest.raises(InputError, match=r"setid\.mat names images that imagelabels\.mat does not have"):
        load(root, size=8)
    root = publishedfiles.cars(tmp_path / "stanford_cars").root
    shutil.copy(root / "devkit" / "cars_meta.mat", root / "cars_test_annos_withlabels.mat")
    with pytest.raises(InputError, match=r"cannot be read as a list of annotations"):
        load(root, size=8)


def test_what_is_missing_of_a_scenario_is_said_at_once(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_all(MTIL, roots=[tmp_path], size=32, scenario="mtil@1")
    message = str(caught.value)
    head, *rest = message.split("\n")
    assert head.startswith("scenario mtil@1 needs 11 data sets that are not on this machine; put each into")
    assert str(tmp_path) in head
    assert [line.split(":")[0].strip() for line in rest] == list(MTIL)
    for name, line in zip(MTIL, rest, strict=True):
        entry = dataset(name)
        assert entry.layout in line
        assert (entry.places[0] if entry.layout else entry.archives[0]) in line
    publishedfiles.class_folders(tmp_path / "mine", ("a", "b"))
    with pytest.raises(
        InputError, match=r"^dataset food101 is not on this machine: put the folder food-101 \(holding meta"
    ):
        load_all([str(tmp_path / "mine"), "food101"], roots=[tmp_path], size=8, scenario="x")
    assert not list((cache / "store").glob("mine-*")), "nothing is decoded before all is there"


def test_sizes_are_those_of_the_card() -> None:
    sizes = {name: (dataset(name).num_classes, *dataset(name).rows) for name in MTIL}
    assert sizes["caltech101-full"] == (101, 6_941, 1_736)
    assert sizes["flowers102"] == (102, 1_020, 6_149)
    assert sum(size[0] for size in sizes.values()) == 1_201
    assert sum(size[2] for size in sizes.values()) == 97_209
    assert dataset("cub200").rows == (5_994, 5_794)
