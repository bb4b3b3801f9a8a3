"""Real data: needs CLBENCH_DATA with the packs; decodes into CLBENCH_CACHE."""

import hashlib
import os
import time
from pathlib import Path

import pytest
import torch

from clbench.data import TEST, TRAIN, Reader, admin, load
from clbench.data.catalogue import catalogue
from clbench.errors import InputError
from clbench.rng import generator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("CLBENCH_DATA" not in os.environ, reason="set CLBENCH_DATA to a folder of real data"),
]

# what every source of these data must give; another value means that the catalogue's id stands for other data
FINGERPRINTS = {
    "cifar100": "52343f092dbf913a2f99f335553cfca8e8642e588d7c2ee2ec2a0e898cf289ff",
}
PACKS = [name for name, entry in catalogue().items() if not entry.embedded and entry.download is None] + ["cifar100"]


def present(name: str) -> None:
    if {entry.name: entry.state for entry in admin.status()}[name] == "missing":
        pytest.skip(f"{name} is not in CLBENCH_DATA")


def test_cifar100_is_the_full_published_set() -> None:
    present("cifar100")
    store = load("cifar100")
    assert store.fingerprint == FINGERPRINTS["cifar100"]
    assert torch.bincount(store.split).tolist() == [50_000, 10_000]
    for code, count in ((TRAIN, 500), (TEST, 100)):
        assert torch.bincount(store.labels[store.split == code]).tolist() == [count] * 100
    train = store.images[store.split == TRAIN].transpose(0, 1).reshape(3, -1)
    shares = torch.stack([torch.bincount(channel, minlength=256) for channel in train]).double() / train.shape[1]
    levels = torch.arange(256) / 255
    mean = (shares * levels).sum(1)
    std = ((shares * levels**2).sum(1) - mean**2).sqrt()
    assert mean.tolist() == pytest.approx([0.5071, 0.4865, 0.4409], abs=6e-5)
    assert std.tolist() == pytest.approx([0.2673, 0.2564, 0.2762], abs=6e-5)
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in store.images]
    assert len(set(digests)) == 59_974
    for code in (TRAIN, TEST):
        rows = (store.split == code).nonzero()[:, 0].tolist()
        pairs = [(digests[row], int(store.labels[row])) for row in rows]
        assert pairs == sorted(pairs)
    assert store.classes.num_levels == 2
    assert store.classes.names[int(store.classes.parent[store.classes.names.index("whale")])] == "aquatic_mammals"


def test_cifar100_opens_quickly() -> None:
    present("cifar100")
    load("cifar100")
    start = time.perf_counter()
    load("cifar100")
    assert time.perf_counter() - start < 0.3


def test_cifar100_reads_in_microseconds() -> None:
    present("cifar100")
    reader = Reader(load("cifar100"), {"train": "pad_crop(4) flip normalize(cifar100)", "test": "normalize(cifar100)"})
    rows = torch.randint(0, 50_000, (10,), generator=generator(0, "rows"))
    rng = generator(0, "views")
    for view, limit in (("test", 150e-6), ("train", 800e-6)):
        best = float("inf")
        for _ in range(100):
            start = time.process_time()
            for _ in range(10):
                reader(rows, None, view, rng)
            best = min(best, (time.process_time() - start) / 10)
        assert best < limit


@pytest.mark.parametrize("name", PACKS)
def test_every_pack_loads(name: str) -> None:
    present(name)
    try:
        entry = catalogue()[name]
        store = load(name, size=None if len(entry.shape) == 3 else 32)
    except InputError as error:
        if "is not on this machine" in str(error):
            pytest.skip(str(error))
        raise
    assert store.name == name
    assert store.image_shape == (entry.shape if len(entry.shape) == 3 else (3, 32, 32))
    assert tuple(torch.bincount(store.split).tolist()) == entry.rows
    assert len(torch.unique(store.labels)) == entry.num_classes
    assert int((store.classes.level == store.classes.num_levels - 1).sum()) == entry.num_classes
    if not entry.mean:
        return
    train = store.images[store.split == TRAIN].float() / 255
    close = 0.012 if entry.subset_of else 0.002  # a subset has the statistics of its full set
    assert train.mean((0, 2, 3)).tolist() == pytest.approx(entry.mean, abs=close)
    by_path = Path(os.environ["CLBENCH_DATA"].split(os.pathsep)[0]) / name.replace("-", "_")
    if by_path.is_dir():
        assert load(by_path).fingerprint == store.fingerprint


def test_pacs_has_domains_and_grocery_store_has_parents() -> None:
    present("pacs")
    store = load("pacs")
    assert store.group_names == ("photo", "art_painting", "cartoon", "sketch")
    assert store.groups is not None
    assert torch.bincount(store.groups).min() > 900
    classes = load("grocery-store").classes
    assert len(classes) == 81 + 43
    assert classes.names[int(classes.parent[classes.names.index("Granny-Smith")])] == "Apple"


def test_a_subset_is_not_the_full_set() -> None:
    present("mnist-subset")
    if {entry.name: entry.state for entry in admin.status()}["mnist"] == "missing":
        with pytest.raises(InputError, match="which is 'mnist-subset'"):
            load("mnist")
