"""The catalogue: what it says is true, and a name is given only to the data it means."""

import hashlib
import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datafiles
import pytest
import torch

from clbench.data import admin, load
from clbench.data.cache import sha256_of_file
from clbench.data.catalogue import Dataset, KnownFile, catalogue, dataset, list_datasets, normalisation
from clbench.errors import InputError

DIGITS = "71d44a529c5f"  # start of the fingerprint: digits that decode to anything else are another data set


def test_digits() -> None:
    store = load("digits")
    assert store.fingerprint.startswith(DIGITS)
    assert store.image_shape == (1, 8, 8)
    assert torch.bincount(store.split).tolist() == list(dataset("digits").rows)
    assert (int(store.images.min()), int(store.images.max())) == (0, 255)
    assert len(torch.unique(store.images)) == 17
    train = store.images[store.split == 0].float() / 255
    assert float(train.mean()) == pytest.approx(store.mean[0], abs=5e-5)
    assert float(train.std(correction=0)) == pytest.approx(store.std[0], abs=5e-5)
    for label in range(10):
        rows = store.split[store.labels == label]
        assert int(rows.sum()) == round(0.2 * len(rows))
    assert [check.ok for check in admin.verify("digits")] == [True, True, True]


def test_catalogue_agrees_with_itself() -> None:
    for name, entry in catalogue().items():
        channels = entry.shape[0]
        assert len(entry.shape) in (1, 3), name
        assert len(entry.mean) == len(entry.std) == (channels if entry.mean or not entry.layout else 0), name
        assert not entry.class_names or len(entry.class_names) == entry.num_classes, name
        assert sorted(child for children in entry.coarse.values() for child in children) in (
            [], sorted(entry.class_names),
        ), name  # fmt: skip
        if entry.rows_per_class:
            assert tuple(count * entry.num_classes for count in entry.rows_per_class) == entry.rows, name
        if entry.subset_of:
            full = catalogue()[entry.subset_of]
            assert entry.rows < full.rows, name
            assert entry.images_of == full.images_of, name
            assert entry.download is None, name
        assert entry.images_of, name
        assert bool(entry.download) == bool(entry.archives), name
    assert {record["name"] for record in list_datasets()} == set(catalogue())
    assert catalogue()["tiny-imagenet-subset"].images_of == ("imagenet",)
    with pytest.raises(InputError, match="did you mean 'cifar100'"):
        dataset("cifar-100")


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [("cifar10", "cifar", "CIFAR10"), ("cifar100", "cifar", "CIFAR100"), ("mnist", "mnist", "MNIST"),
     ("fashion-mnist", "mnist", "FashionMNIST")],
)  # fmt: skip
def test_checksums_are_those_of_torchvision(name: str, module: str, kind: str) -> None:
    pytest.importorskip("torchvision")
    published = getattr(importlib.import_module(f"torchvision.datasets.{module}"), kind)
    entry = dataset(name)
    if module == "cifar":
        sums = dict(published.train_list) | dict(published.test_list)
        sums |= {published.meta["filename"]: published.meta["md5"], published.filename: published.tgz_md5}
        assert published.base_folder in entry.places
        assert [mirror + published.filename for mirror in entry.download.mirrors] == [published.url]
    else:
        sums = dict(published.resources)
        assert entry.download.to == f"{kind}/raw"
        assert list(entry.download.mirrors) == published.mirrors
    assert {file: known.md5 for file, known in entry.files.items() if known.md5} == sums


def test_normalisation() -> None:
    assert normalisation("cifar100")[0] == (0.5071, 0.4865, 0.4409)
    assert normalisation("imagenet")[1] == (0.229, 0.224, 0.225)
    with pytest.raises(InputError, match="did you mean 'cifar100'"):
        normalisation("cifar1000")


def known(name: str, data: datafiles.Pixels, **more: object) -> Dataset:
    """A catalogue entry for the tiny data."""
    rows = (int((~data.test).sum()), int(data.test.sum()))
    entry = Dataset(
        name=name, title=name, rows=rows, num_classes=3, shape=data.images.shape[1:], licence="", source="",
        mean=(0.5,) * 3, std=(0.5,) * 3, images_of=("tiny",),
    )  # fmt: skip
    return replace(entry, **more)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> datafiles.Pixels:
    """Two known data sets: `tiny`, with published sums of its standard files, and the smaller `tiny-subset`."""
    data = datafiles.make()
    sums = {name: KnownFile(md5=md5_of(content)) for name, content in datafiles.cifar_files(data).items()}
    full = known("tiny", data, class_names=datafiles.NAMES, rows_per_class=(6, 3), places=("tiny-python",), files=sums)
    full = replace(full, coarse={"insect": ("ant", "bee"), "mammal": ("cat",)})
    subset = known("tiny-subset", datafiles.make(train=9, test=6), subset_of="tiny", class_names=datafiles.NAMES)
    monkeypatch.setitem(catalogue(), "tiny", full)
    monkeypatch.setitem(catalogue(), "tiny-subset", subset)
    return data


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_known_data_from_every_place(tiny: datafiles.Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard = tmp_path / "s"
    datafiles.write_cifar(standard / "tiny-python", tiny)
    first = load("tiny", roots=[standard])
    assert first.mean == (0.5,) * 3
    assert first.images_of == ("tiny",)
    assert first.classes.parent.tolist() == [3, 3, 4, -1, -1]
    parquet = tmp_path / "p"
    renamed = replace(tiny, names=("cat", "ant", "bee"), labels=(tiny.labels + 1) % 3)  # ids of its own, same names
    datafiles.write_shards(parquet / "tiny", renamed, "WEBP", struct=False)
    second = load("tiny", roots=[parquet])
    monkeypatch.setenv("CLBENCH_DATA", f"{tmp_path}/none:{parquet}")
    third = load("tiny")
    monkeypatch.setenv("CLBENCH_DATA", str(parquet / "tiny"))
    fourth = load("tiny")
    for other in (second, third, fourth, load(parquet / "tiny")):
        assert other.name == "tiny"
        assert other.fingerprint == first.fingerprint
        assert torch.equal(other.labels, first.labels)
        assert other.classes.names == first.classes.names
        assert torch.equal(other.classes.parent, first.classes.parent)


def test_a_subset_never_gets_the_full_name(tiny: datafiles.Pixels, tmp_path: Path) -> None:
    small = datafiles.make(train=9, test=6, seed=1)
    datafiles.write_shards(tmp_path / "tiny", small)
    with pytest.raises(InputError, match=r"tiny holds 9 \+ 6 rows, which is 'tiny-subset'"):
        load("tiny", roots=[tmp_path])
    store = load("tiny-subset", roots=[tmp_path])
    assert store.name == "tiny-subset"
    assert load(tmp_path / "tiny").name == "tiny-subset"
    odd = tmp_path / "odd"
    datafiles.write_shards(odd / "tiny", datafiles.make(train=12, test=6))
    for name in ("tiny", "tiny-subset"):
        with pytest.raises(InputError, match=r"tiny holds 12 \+ 6 rows, not the"):
            load(name, roots=[odd])
    assert load(odd / "tiny").name == "tiny-custom"
    with pytest.raises(InputError, match=r"holds 12 \+ 6 rows, not the 18 \+ 9 rows of tiny"):
        admin.import_(odd / "tiny", "tiny")


def test_a_subset_name_is_not_given_to_the_full_set(tiny: datafiles.Pixels, tmp_path: Path) -> None:
    datafiles.write_shards(tmp_path / "tiny", tiny)
    with pytest.raises(InputError, match=r"tiny holds 18 \+ 9 rows, which is 'tiny'"):
        load("tiny-subset", roots=[tmp_path])


def test_data_that_only_look_right_are_refused(tiny: datafiles.Pixels, tmp_path: Path) -> None:
    labels = tiny.labels.copy()
    labels[0] = 1
    cases = {
        "per class": (replace(tiny, labels=labels), r"class 'ant' has 5 training rows, not 6"),
        "names": (replace(tiny, names=("ant", "bee", "dog")), r"its class names differ \(cat, dog"),
        "shape": (datafiles.make(side=16), r"its images are 3x16x16, not 3x32x32"),
    }
    for name, (data, pattern) in cases.items():
        datafiles.write_shards(tmp_path / name / "tiny", data)
        with pytest.raises(InputError, match=rf"{name}/tiny is not tiny: {pattern}"):
            load("tiny", roots=[tmp_path / name])
    datafiles.write_parquet(tmp_path / "whole" / "tiny" / "data.parquet", tiny)
    with pytest.raises(InputError, match=r"is not tiny: it is not split"):
        load("tiny", roots=[tmp_path / "whole"])
    coarse = [[0, 1, 1][label] for label in tiny.labels]
    split = ["test" if test else "train" for test in tiny.test]
    datafiles.write_parquet(tmp_path / "c" / "tiny" / "x.parquet", tiny, extra={"coarse_label": coarse, "split": split})
    with pytest.raises(InputError, match=r"is not tiny: its coarse labels group other classes"):
        load("tiny", roots=[tmp_path / "c"])


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_wrong_checksum(file: str, tiny: datafiles.Pixels, tmp_path: Path) -> None:
    root = datafiles.write_cifar(tmp_path / "tiny-python", tiny)
    datafiles.flip_byte(root / file, -20)
    for where in ({"name_or_path": "tiny", "roots": [tmp_path]}, {"name_or_path": root}):
        with pytest.raises(
            InputError, match=rf"tiny-python/{file} is damaged or not the published file of tiny: its md5"
        ):
            load(**where)  # type: ignore[arg-type]


def test_known_shards_have_checksums(tiny: datafiles.Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte that still decodes is found in shards whose sums are known; shards of other makers pass."""
    root = datafiles.write_shards(tmp_path / "tiny", tiny)
    sums = {p.name: KnownFile(sha256=sha256_of_file(p), bytes=p.stat().st_size) for p in root.iterdir()}
    monkeypatch.setitem(catalogue(), "tiny", replace(dataset("tiny"), files=sums))
    fingerprint = load("tiny", roots=[tmp_path]).fingerprint
    shard = root / "train-00001-of-00002.parquet"
    data = shard.read_bytes()
    datafiles.flip_byte(shard, data.index(b"IDAT") + 40)
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet is damaged .* its sha256"):
        load("tiny", roots=[tmp_path])
    datafiles.write_shards(tmp_path / "other" / "tiny", tiny, "WEBP", struct=False)
    assert load("tiny", roots=[tmp_path / "other"]).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar100", ["cifar-100-python.tar.gz", "cifar100/train-*.parquet", "clbench data fetch cifar100"]),
        ("mnist", ["MNIST/raw/train-images-idx3-ubyte.gz", "MNIST/raw/t10k-labels-idx1-ubyte.gz"]),
        ("tiny-imagenet", ["the folder tiny-imagenet-200", "clbench data import PATH --name tiny-imagenet"]),
        ("cifar10-subset", ["cifar10_subset/train-*.parquet", "10,000 + 3,000 rows"]),
    ],
)
def test_missing_data_say_what_belongs_where(name: str, files: list[str], tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(name, roots=[tmp_path / "mine"])
    message = str(caught.value)
    assert "\n" not in message
    for text in [f"dataset {name} is not on this machine", *files, str(tmp_path / "mine"), str(cache / "downloads")]:
        assert text in message


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown dataset 'cifar-100'; did you mean 'cifar100'"):
        load("cifar-100")
    admin.import_(datafiles.write_cifar(tmp_path / "d", datafiles.make()), "my-animals")
    with pytest.raises(InputError, match=r"did you mean 'my-animals'"):
        load("my-animal")
    with pytest.raises(InputError, match=r"unknown row order 'cannonical'; did you mean 'canonical'"):
        load("digits", order="cannonical")
    with pytest.raises(InputError, match="size must be at least 1"):
        load("digits", size=0)


def test_status(tiny: datafiles.Pixels, tmp_path: Path) -> None:
    datafiles.write_shards(tmp_path / "tiny", tiny)
    damaged = datafiles.write_shards(tmp_path / "usps", datafiles.make(1, 16))
    datafiles.cut(damaged / "test-00000-of-00001.parquet", 0.5)
    states = {entry.name: entry for entry in admin.status([tmp_path])}
    assert states["tiny"].state == "found"
    assert states["cifar100"].state == "missing"
    assert "clbench data fetch cifar100" in states["cifar100"].advice
    assert states["usps"].state == "unusable"
    assert "test-00000-of-00001.parquet" in states["usps"].advice
    load("tiny", roots=[tmp_path])
    ready = {entry.name: entry for entry in admin.status([tmp_path])}["tiny"]
    assert (ready.state, ready.bytes, ready.where) == ("ready", 27 * 3 * 32 * 32, str(tmp_path / "tiny"))


def test_embedded_names_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="digits is built in"):
        admin.import_(datafiles.write_cifar(tmp_path / "d", datafiles.make()), "digits")


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, clbench.data.catalogue as c; c.list_datasets(); print({'torch', 'numpy'} & set(sys.modules))"
    root = Path(importlib.import_module("clbench").__file__).parent.parent  # type: ignore[arg-type]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "set()"
