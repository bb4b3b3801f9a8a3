"""The reader: rows through domains and views."""

from pathlib import Path

import datafiles
import pytest
import torch

from clbench.data import ImageStore, Reader, load
from clbench.errors import InputError
from clbench.rng import generator
from clbench.scenarios.model import Domains

VIEWS = {"train": "pad_crop(2) flip normalize(0.5,0.5)", "test": "normalize(0.5,0.5)"}


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return load(datafiles.write_folder(tmp_path / "d", datafiles.make(side=16)))


def test_views_by_name(store: ImageStore) -> None:
    reader = Reader(store, VIEWS | {"small": "resize(8)"})
    rows = torch.tensor([5, 0, 5, 26])
    plain = reader(rows, view="test")
    torch.testing.assert_close(plain, store.images[rows].float() / 255 * 2 - 1, atol=1e-6, rtol=0)
    assert torch.equal(reader(rows, view="raw"), plain)
    assert reader(rows, view="small").shape == (4, 3, 8, 8)
    assert reader.output_shape("small") == (3, 8, 8)
    assert reader.output_shape() == (3, 16, 16)
    augmented = reader(rows, rng=generator(0, "batch"))
    assert torch.equal(augmented, reader(rows, None, "train", generator(0, "batch")))
    assert not torch.equal(augmented, plain)
    assert reader(rows[:0], view="test").shape == (0, 3, 16, 16)


def test_permutation_domains(store: ImageStore) -> None:
    table = torch.stack(
        [torch.arange(256), torch.randperm(256, generator=generator(0, "p")), torch.arange(256).flip(0)]
    )
    reader = Reader(store, {"test": ""}, Domains("permutation", table))
    rows, domain = torch.tensor([3, 3, 3, 8]), torch.tensor([0, 1, 2, 1])
    seen = reader(rows, domain, "test")
    for image, row, d in zip(seen, rows, domain, strict=True):
        flat = store.images[row].flatten(1).float() / 255
        for pixel in (0, 17, 255):
            assert torch.equal(image.flatten(1)[:, pixel], flat[:, table[d, pixel]])
    assert torch.equal(seen[2], seen[0].flip(1, 2))
    assert torch.equal(reader(rows, None, "test"), store.images[rows].float() / 255)


def test_features(store: ImageStore) -> None:
    reader = Reader(store, VIEWS)
    rows = torch.tensor([1, 2])
    with pytest.raises(InputError, match="needs a frozen backbone"):
        reader(rows, view="features")
    bank = torch.randn(27, 4, generator=generator(0, "bank"))
    reader.features = lambda rows, domain: bank[rows]
    assert torch.equal(reader(rows, view="features"), bank[rows])


def test_no_host_read(store: ImageStore) -> None:
    hostreads = pytest.importorskip("clbench.learner.hostreads")
    table = torch.randperm(256, generator=generator(0, "p"))[None]
    reader = Reader(store, VIEWS, Domains("permutation", table))
    rows, domain, rng = torch.tensor([1, 2]), torch.tensor([0, 0]), generator(0, "batch")
    reader(rows, domain, "train", rng)
    with hostreads.forbid_host_reads():
        reader(rows, domain, "train", rng)


def test_bad_readers(store: ImageStore) -> None:
    reader = Reader(store, VIEWS)
    with pytest.raises(InputError, match=r"unknown view 'tests'; did you mean 'test'"):
        reader(torch.tensor([0]), view="tests")
    with pytest.raises(InputError, match="needs a view named 'test'"):
        Reader(store, {"train": ""})
    with pytest.raises(InputError, match=r"random_crop\(17\) is larger than the 16x16 images"):
        Reader(store, VIEWS | {"train": "random_crop(17)"})
    with pytest.raises(InputError, match=r"changes images of 100 pixels, but those of d have 256"):
        Reader(store, VIEWS, Domains("permutation", torch.arange(100)[None]))
