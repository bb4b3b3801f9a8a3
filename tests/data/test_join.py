"""Several data sets as one store: rows, labels and classes of each behind those of the one before."""

from pathlib import Path

import datafiles
import numpy as np
import pytest
import torch

from clbench.data import ImageStore, Reader, load, load_all
from clbench.data.cache import open_entry, write_entry
from clbench.data.join import join
from clbench.errors import InputError


def stores(tmp_path: Path, size: int = 16) -> list[ImageStore]:
    """Grey digits, coloured images with coarse labels, and other coloured images: three sizes, loaded as one."""
    grey = datafiles.write_folder(tmp_path / "grey", datafiles.make(1, 28, 12, 6, seed=1))
    coarse = datafiles.write_cifar(tmp_path / "coarse", datafiles.make(seed=2))
    small = datafiles.write_folder(tmp_path / "small", datafiles.make(3, 20, 9, 3, seed=3))
    return load_all([str(path) for path in (grey, coarse, small)], size=size)


def test_rows_labels_and_classes_follow_each_other(tmp_path: Path) -> None:
    parts = stores(tmp_path)
    joined = join(parts)
    assert len(joined) == sum(map(len, parts)) == 18 + 27 + 12
    assert joined.image_shape == (3, 16, 16)
    assert joined.name == "grey + coarse + small"
    start = first_class = 0
    for number, part in enumerate(parts):
        rows = slice(start, start + len(part))
        assert torch.equal(joined.images[rows], part.images.expand(-1, 3, -1, -1)), "grey images become RGB"
        assert torch.equal(joined.labels[rows], part.labels + first_class)
        assert torch.equal(joined.split[rows], part.split)
        assert joined.groups is not None
        assert set(joined.groups[rows].tolist()) == {number}
        classes = range(first_class, first_class + len(part.classes))
        assert joined.classes.names[classes.start : classes.stop] == part.classes.names
        assert torch.equal(joined.classes.level[list(classes)], part.classes.level)
        parents = torch.where(part.classes.parent < 0, -1, part.classes.parent + first_class)
        assert torch.equal(joined.classes.parent[list(classes)], parents)
        start, first_class = start + len(part), first_class + len(part.classes)
    assert joined.group_names == ("grey", "coarse", "small")


def test_grey_data_sets_stay_grey(tmp_path: Path) -> None:
    paths = [datafiles.write_folder(tmp_path / name, datafiles.make(1, 28, seed=s)) for s, name in enumerate("ab")]
    assert join([load(path) for path in paths]).image_shape == (1, 28, 28)


def test_one_data_set_is_itself(tmp_path: Path) -> None:
    store = load("digits")
    assert join([store]) is store


def test_collections_of_all_parts_count() -> None:
    digits = load("digits")
    other = ImageStore(
        digits.images, digits.labels, digits.split, digits.classes, "other", "1" * 64, images_of=("imagenet", "digits")
    )
    assert join([digits, other]).images_of == ("digits", "imagenet")


def test_it_is_written_once_and_mapped(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = stores(tmp_path)
    before = join(parts)
    (folder,) = (cache / "store").glob("joined-*")
    assert open_entry(folder, full=True) is not None
    monkeypatch.setattr("clbench.data.join.write_entry", lambda *_: pytest.fail("it is there already"))
    again = join(stores(tmp_path))
    assert again.fingerprint == before.fingerprint
    assert torch.equal(again.images, before.images)
    monkeypatch.setattr("clbench.data.join.write_entry", write_entry)
    with open(folder / "labels.npy", "r+b") as file:  # damaged: built anew
        file.seek(-3, 2)
        file.write(b"\xff")
    assert torch.equal(join(parts).labels, before.labels)
    assert join(parts[::-1]).fingerprint != before.fingerprint, "the order of the parts counts"


def test_large_parts_are_copied_block_by_block(tmp_path: Path) -> None:
    """More rows than are written at once, with blocks that begin in one part and end in another."""
    rng = np.random.default_rng(0)
    digits = load("digits")
    parts = []
    for number, rows in enumerate((5_000, 1, 4_095, 10)):
        images = torch.from_numpy(rng.integers(0, 256, (rows, 1 + 2 * (number % 2), 4, 4), dtype=np.uint8))
        labels, split = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.uint8)
        parts.append(ImageStore(images, labels, split, digits.classes, str(number), str(number) * 64))
    expected = torch.cat([part.images.expand(-1, 3, -1, -1) for part in parts])
    assert torch.equal(join(parts).images, expected)


def test_it_reads_like_any_store(tmp_path: Path) -> None:
    parts = stores(tmp_path)
    reader = Reader(
        join(parts), {"train": "pad_crop(2) flip normalize(0.5,0.5)", "test": "resize(8) normalize(0.5,0.5)"}
    )
    rows = torch.tensor([0, 20, 56])
    assert reader(rows, view="test").shape == (3, 3, 8, 8)
    own = Reader(parts[1], {"test": "resize(8) normalize(0.5,0.5)"})
    assert torch.equal(reader(rows, view="test")[1], own(torch.tensor([2]), view="test")[0])


def test_sizes_must_agree(tmp_path: Path) -> None:
    digits = load("digits")
    with pytest.raises(InputError, match=r"images of one size, not digits 8x8, small 20x20; give --scenario-set size="):
        join([digits, load(datafiles.write_folder(tmp_path / "small", datafiles.make(3, 20)))])
    assert join([load("digits", size=20), load(tmp_path / "small")]).image_shape == (3, 20, 20)
